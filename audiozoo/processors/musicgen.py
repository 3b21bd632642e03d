"""MusicGen's processor: T5's tokens, waveforms to continue, and chromagrams of melodies to follow."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from audiozoo.audio.chunks import check_chunk
from audiozoo.audio.features import double_precision_on_cpu, spectrogram
from audiozoo.audio.files import check_waveform
from audiozoo.errors import AudioError, CheckpointError, UsageError
from audiozoo.processors import FeatureExtractor, check_return_tensors, extractor_settings, pad_batch
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.text.t5_tokenizer import T5Tokenizer

_power = partial(jax.jit, static_argnames=("n_fft", "hop_length"))(spectrogram)


class MusicgenMelodyFeatureExtractor(FeatureExtractor):
    r"""§2.3: a melody as the loudest of twelve pitch classes, every 128 ms; arguments as in `preprocessor_config.json`.

    The power spectrogram of windows of half a second is summed over octaves into pitch classes (from C on), of which
    the largest becomes 1 and the others 0: less of the original leaks through than with a whole chromagram.

    Args:
        feature_size: pitch classes.
        sampling_rate: Hz.
        hop_length: samples between frames.
        chunk_length: seconds that are heard; the rest is left out.
        n_fft: samples under a frame.
        num_chroma: pitch classes.
        padding_value: what shorter waveforms are padded with.
        return_attention_mask: whether to say which frames are real.
        stem_indices: of separated sources, those that carry the melody: vocals and other.
    """

    def __init__(
        self,
        feature_size: int = 12,
        sampling_rate: int = 32_000,
        hop_length: int = 4096,
        chunk_length: int = 30,
        n_fft: int = 16_384,
        num_chroma: int = 12,
        padding_value: float = 0.0,
        return_attention_mask: bool = False,
        stem_indices: tuple[int, ...] = (3, 2),
    ) -> None:
        check_chunk("chunk_length", chunk_length, sampling_rate)
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.chunk_length = chunk_length
        self.n_fft = n_fft
        self.num_chroma = num_chroma
        self.padding_value = padding_value
        self.return_attention_mask = return_attention_mask
        self.stem_indices = tuple(stem_indices)

    @property
    def n_samples(self) -> int:
        """Samples that are heard."""
        return self.chunk_length * self.sampling_rate

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> MusicgenMelodyFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`."""
        folder = Path(directory)
        return cls.of_settings(extractor_settings(folder) or {}, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {"n_samples": self.n_samples}

    def chroma(self, waveforms: Float[np.ndarray, "batch samples"]) -> Float[np.ndarray, "batch frames chroma"]:
        """One-hot pitch classes; silence counts as the first."""
        import librosa

        short = max(0, self.n_fft - waveforms.shape[1])
        waveforms = np.pad(waveforms, ((0, 0), (short // 2, short - short // 2)))
        filters = librosa.filters.chroma(
            sr=self.sampling_rate, n_fft=self.n_fft, n_chroma=self.num_chroma, tuning=0.0, dtype=np.float64
        )
        with double_precision_on_cpu():
            power = np.asarray(_power(jnp.asarray(waveforms, jnp.float64), self.n_fft, self.hop_length))
        loudest = (power @ filters.T.astype(power.dtype)).argmax(axis=-1)
        return np.eye(self.num_chroma, dtype=np.float32)[loudest]

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, np.ndarray]:
        """The chromagrams of one waveform, or of a batch.

        Args:
            audio: floats in [-1, 1]: `(samples,)`, `(channels, samples)`, a list of such, or separated sources as
                Demucs orders them, `(batch, sources, channels, samples)`.
            sampling_rate: Hz of `audio`, to be checked.
            padding: `True` or "longest"; "max_length"; or `False`, for waveforms of one length.
            truncation: leave out what is beyond `max_length`.
            max_length: samples; `chunk_length` by default.
            return_attention_mask: which frames are real; by default as the settings say.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `input_features` float32 `(batch, frames, num_chroma)`, perhaps `attention_mask` int32 `(batch, frames)`.

        Raises:
            AudioError: empty, not finite, integer, or at another rate.
        """
        check_return_tensors(return_tensors)
        if isinstance(audio, np.ndarray) and audio.ndim == 4:
            if audio.shape[1] <= max(self.stem_indices):
                raise AudioError(f"There are {audio.shape[1]} sources; number {max(self.stem_indices)} is wanted.")
            audio = list(audio[:, list(self.stem_indices)].sum(axis=1))
        batched = isinstance(audio, list | tuple) and len(audio) > 0 and np.ndim(audio[0]) > 0
        waveforms = []
        for index, item in enumerate(audio if batched else [audio]):
            array = np.asarray(item)
            try:
                channels = array[None] if array.ndim == 1 else array
                checked = [check_waveform(channel, sampling_rate, self.sampling_rate) for channel in channels]
                if not checked:
                    raise AudioError("The waveform is empty (0 channels).")
            except AudioError as problem:
                raise AudioError(f"Item {index} of the batch: {problem}" if batched else str(problem)) from None
            waveforms.append(np.mean(checked, axis=0).astype(np.float32))
        batch, mask = pad_batch(
            waveforms,
            padding,
            max_length=max_length or self.n_samples,
            truncation=truncation,
            padding_value=self.padding_value,
        )
        features = {"input_features": self.chroma(batch)}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            features["attention_mask"] = mask[:, :: self.hop_length]
        return features


class MusicgenProcessor:
    """Texts and music to continue; and back from waveforms and tokens.

    Args:
        feature_extractor: for music to continue.
        tokenizer: for texts.
    """

    def __init__(self, feature_extractor: Any, tokenizer: T5Tokenizer) -> None:
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> MusicgenProcessor:
        """From a checkpoint's files; a melody model's gives a `MusicgenMelodyProcessor`."""
        folder = Path(directory)
        config = extractor_settings(folder) or {}
        kind = config.get("feature_extractor_type", "EncodecFeatureExtractor")
        tokenizer = T5Tokenizer.from_directory(folder)
        if kind == MusicgenMelodyFeatureExtractor.__name__:
            return MusicgenMelodyProcessor(MusicgenMelodyFeatureExtractor.from_directory(folder), tokenizer)
        if kind != "EncodecFeatureExtractor":
            raise CheckpointError(f"'{folder}' holds the settings of a {kind}, not of MusicGen's features.")
        if config:
            return MusicgenProcessor(EncodecFeatureExtractor.from_directory(folder), tokenizer)
        return MusicgenProcessor(EncodecFeatureExtractor(sampling_rate=32_000, padding_side="left"), tokenizer)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        self.feature_extractor.save(directory)
        self.tokenizer.save(directory)

    def __call__(
        self,
        audio: Any = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Model inputs of texts, of waveforms, or of both.

        Args:
            audio: see the feature extractor.
            text: a text or several.
            sampling_rate: Hz of `audio`.
            padding: of texts; waveforms are padded to the longest.
            truncation: of texts.
            max_length: of texts, in tokens.
            return_tensors: "np" or `None`; results are NumPy arrays.
        """
        check_return_tensors(return_tensors)
        if text is None and audio is None:
            raise UsageError("Give the processor a text, audio, or both.")
        inputs: dict[str, np.ndarray] = {}
        if text is not None:
            inputs |= self.tokenizer(text, padding=padding, truncation=truncation, max_length=max_length)
        if audio is not None:
            inputs |= self.feature_extractor(audio, sampling_rate)
        return inputs

    def melody(self, waveform: Any, sampling_rate: int) -> Float[np.ndarray, "batch frames chroma"]:
        """`input_features` of a melody to follow."""
        extractor = self.feature_extractor
        if not isinstance(extractor, MusicgenMelodyFeatureExtractor):
            extractor = MusicgenMelodyFeatureExtractor(sampling_rate=extractor.sampling_rate)
        return extractor(waveform, sampling_rate)["input_features"]

    def batch_decode(self, values: Any, padding_mask: Any = None) -> list[Any]:
        """Waveforms without their padding, or the texts of tokens.

        Args:
            values: waveforms `(batch, channels, samples)`, or tokens `(batch, time)`.
            padding_mask: of the music that was continued, 1 where it sounds; what was generated always sounds.
        """
        array = np.asarray(values)
        if array.ndim == 2:
            return self.tokenizer.batch_decode(array)
        if padding_mask is None:
            return list(array)
        mask = np.asarray(padding_mask) != 0
        mask = np.pad(mask, ((0, 0), (0, array.shape[2] - mask.shape[1])), constant_values=True)
        return [waveform[:, row] for waveform, row in zip(array, mask, strict=True)]


class MusicgenMelodyProcessor(MusicgenProcessor):
    """The same for melody models: `audio` is a melody to follow."""

    def get_unconditional_inputs(self, num_samples: int = 1) -> dict[str, np.ndarray]:
        """Inputs for music without a text: an empty one, hidden."""
        inputs = self.tokenizer([""] * num_samples)
        return inputs | {"attention_mask": np.zeros_like(inputs["attention_mask"])}


__all__ = ["MusicgenMelodyFeatureExtractor", "MusicgenMelodyProcessor", "MusicgenProcessor"]
