"""EnCodec's processor: waveforms of one or two channels, padded so that every chunk is whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from audiozoo.audio.chunks import chunk_sizes
from audiozoo.audio.files import check_waveform
from audiozoo.errors import AudioError, UsageError
from audiozoo.processors import FeatureExtractor, check_return_tensors, extractor_settings, read_json


class EncodecFeatureExtractor(FeatureExtractor):
    """Waveforms to model inputs; the arguments are the fields of `preprocessor_config.json`.

    Args:
        feature_size: channels: 1 mono, 2 stereo.
        sampling_rate: Hz.
        padding_value: what shorter waveforms are padded with.
        chunk_length_s: seconds that the model encodes at once; None for the whole.
        overlap: share of a chunk that the next one repeats.
        padding_side: where shorter waveforms are padded: "right", or "left" so that they can be continued (MusicGen).
    """

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24_000,
        padding_value: float = 0.0,
        chunk_length_s: float | None = None,
        overlap: float | None = None,
        padding_side: str = "right",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise UsageError(f"There is no padding_side {padding_side!r}; there are left and right.")
        chunk_sizes(chunk_length_s, overlap, sampling_rate)
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.padding_value = padding_value
        self.chunk_length_s = chunk_length_s
        self.overlap = overlap
        self.padding_side = padding_side

    @property
    def chunk_length(self) -> int | None:
        """Samples of a chunk."""
        return chunk_sizes(self.chunk_length_s, self.overlap, self.sampling_rate)[0]

    @property
    def chunk_stride(self) -> int | None:
        """Samples from one chunk's start to the next."""
        return chunk_sizes(self.chunk_length_s, self.overlap, self.sampling_rate)[1]

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> EncodecFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`; without them, from the model's `config.json`."""
        folder = Path(directory)
        config = extractor_settings(folder)
        if config is None and (folder / "config.json").is_file():
            model = read_json(folder / "config.json")
            config = model["config"] if "audiozoo" in model else model
            config = {k: v for k, v in config.items() if k in ("sampling_rate", "chunk_length_s", "overlap")} | (
                {"feature_size": config["audio_channels"]} if "audio_channels" in config else {}
            )
        return cls.of_settings(config or {}, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {"return_attention_mask": True}

    def __call__(
        self,
        raw_audio: Any,
        sampling_rate: int | None = None,
        *,
        padding: bool | str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Pad one waveform or a batch.

        Args:
            raw_audio: floats in [-1, 1]: `(samples,)` for mono, `(2, samples)` for stereo, or a list of such.
            sampling_rate: Hz of `raw_audio`, to be checked.
            padding: `True` or "longest" (the default), "max_length", or `False`. A chunked model's batch is padded
                until its last chunk is whole.
            truncation: cut to `max_length`, or a chunked model's batch to whole chunks.
            max_length: samples.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `input_values` float32 `(batch, channels, samples)` and, unless `padding` is `False`, `padding_mask` int32
            `(batch, samples)`.

        Raises:
            AudioError: empty, not finite, integer, at another rate, or of another number of channels.
        """
        check_return_tensors(return_tensors)
        if padding and truncation:
            raise UsageError("padding and truncation exclude each other; set one of them.")
        if padding not in (None, True, False, "longest", "max_length", "do_not_pad"):
            raise UsageError(f"There is no padding '{padding}'; choose longest, max_length or do_not_pad.")
        padding = True if padding is None else False if padding == "do_not_pad" else padding
        waveforms = self._checked(raw_audio, sampling_rate)
        lengths = [w.shape[1] for w in waveforms]
        length = max(lengths)
        if self.chunk_stride is not None and self.chunk_length is not None and max_length is None:
            if truncation:
                steps = min(lengths) // self.chunk_stride
                if steps < 1:
                    raise AudioError(f"{min(lengths)} samples are too few to cut to whole chunks.")
                max_length = (steps - 1) * self.chunk_stride + self.chunk_length
            elif padding:
                max_length = (-(-length // self.chunk_stride) - 1) * self.chunk_stride + self.chunk_length
                padding = "max_length"
        if (truncation or padding == "max_length") and max_length is None:
            raise UsageError("Padding to max_length and truncation need a max_length.")
        if truncation:
            waveforms = [w[:, :max_length] for w in waveforms]
            lengths = [w.shape[1] for w in waveforms]
            length = max(lengths)
        if padding == "max_length" and max_length is not None:
            length = max(length, max_length)
        if not padding:
            if min(lengths) < length:
                raise UsageError(
                    f"Waveforms of {min(lengths)} to {length} samples do not make one array; choose padding='longest'."
                )
            return {"input_values": np.stack(waveforms)}
        batch = np.full((len(waveforms), self.feature_size, length), self.padding_value, np.float32)
        mask = np.zeros((len(waveforms), length), np.int32)
        for row, waveform in enumerate(waveforms):
            first = length - waveform.shape[1] if self.padding_side == "left" else 0
            batch[row, :, first : first + waveform.shape[1]] = waveform
            mask[row, first : first + waveform.shape[1]] = 1
        return {"input_values": batch, "padding_mask": mask}

    def _checked(self, raw: Any, rate: int | None) -> list[Float[np.ndarray, "channels samples"]]:
        batched = isinstance(raw, list | tuple) and len(raw) > 0 and np.ndim(raw[0]) > 0
        items: Sequence[Any] = raw if batched else [raw]
        if batched and self.feature_size == 2 and all(np.ndim(item) == 1 for item in items):
            raise AudioError(
                "This model is stereo: give (2, samples), or a list of such; read the file with "
                f"audiozoo.audio.read(path, {self.sampling_rate}, mono=False)."
            )
        checked = []
        for index, item in enumerate(items):
            try:
                checked.append(self._one(item, rate))
            except AudioError as problem:
                raise AudioError(f"Item {index} of the batch: {problem}" if batched else str(problem)) from None
        return checked

    def _one(self, item: Any, rate: int | None) -> Float[np.ndarray, "channels samples"]:
        if self.feature_size == 1:
            return check_waveform(item, rate, self.sampling_rate).astype(np.float32)[None]
        array = np.asarray(item)
        if array.ndim != 2 or array.shape[0] != self.feature_size:
            raise AudioError(
                f"The waveform has shape {array.shape}; ({self.feature_size}, samples) is expected. A mono one can be "
                "doubled: numpy.stack([x, x])."
            )
        return np.stack([check_waveform(channel, rate, self.sampling_rate) for channel in array]).astype(np.float32)


__all__ = ["EncodecFeatureExtractor"]
