"""AST's processor: normalised log-mel spectrograms of a fixed length."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from audiozoo.audio.features import double_precision_on_cpu, kaldi_fbank
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    read_json,
    waveform_batch,
)

# Mean and standard deviation of the log-mel values of each training set, and its length in frames.
AUDIOSET = {"mean": -4.2677393, "std": 4.5689974, "max_length": 1024}
ESC50 = {"mean": -6.6268077, "std": 5.358466, "max_length": 512}
SPEECH_COMMANDS = {"mean": -6.845978, "std": 5.5654526, "max_length": 128}


@partial(jax.jit, static_argnames=("n_mels", "sampling_rate"))
def _fbank(x: jax.Array, n_mels: int, sampling_rate: int) -> jax.Array:
    return kaldi_fbank(x, n_mels, sampling_rate, window="hanning")


class ASTFeatureExtractor(FeatureExtractor):
    r"""Waveforms to spectrograms; the arguments are the fields of `preprocessor_config.json`.

    Kaldi's log-mel energies of the waveform as it is, in $[-1, 1]$, with Hann windows of 25 ms every 10 ms; then zeros,
    or a cut, to `max_length` frames; then $(x - \text{mean}) / (2\,\text{std})$, padding included, so that padding is
    `padding` and not 0.

    Args:
        feature_size: of no use; kept for files.
        sampling_rate: Hz.
        num_mel_bins: mel bands.
        max_length: frames.
        padding_value: of no use; kept for files.
        do_normalize: whether to normalise.
        mean: of the training set's values.
        std: of the training set's values.
        return_attention_mask: of no use, in the original too: padding is seen; kept for files.
    """

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        return_attention_mask: bool = False,
    ) -> None:
        if max_length < 1 or num_mel_bins < 1 or (do_normalize and not std > 0):
            raise CheckpointError(
                f"AST's features need frames, mel bands and a spread: max_length is {max_length}, num_mel_bins "
                f"{num_mel_bins}, std {std}."
            )
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.padding_value = padding_value
        self.do_normalize = do_normalize
        self.mean = mean
        self.std = std
        self.return_attention_mask = return_attention_mask

    @classmethod
    def audioset(cls) -> ASTFeatureExtractor:
        """For weights trained on AudioSet: 10.24 s."""
        return cls(**AUDIOSET)  # type: ignore[arg-type]

    @classmethod
    def esc50(cls) -> ASTFeatureExtractor:
        """For weights trained on ESC-50: 5.12 s."""
        return cls(**ESC50)  # type: ignore[arg-type]

    @classmethod
    def speech_commands(cls) -> ASTFeatureExtractor:
        """For weights trained on Speech Commands: 1.28 s."""
        return cls(**SPEECH_COMMANDS)  # type: ignore[arg-type]

    @property
    def window(self) -> int:
        """Samples under one frame."""
        return int(self.sampling_rate * 0.025)

    @property
    def hop(self) -> int:
        """Samples between frames."""
        return int(self.sampling_rate * 0.010)

    @property
    def samples(self) -> int:
        """Samples that `max_length` frames read; what comes later is cut off."""
        return (self.max_length - 1) * self.hop + self.window

    @property
    def padding(self) -> float:
        r"""The value of frames after the end: $-\text{mean} / (2\,\text{std})$, 0.467 with AudioSet's numbers."""
        return float(self.normalize(np.zeros((), np.float32))) if self.do_normalize else 0.0

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> ASTFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`; without, AudioSet's at the size in `config.json`.

        Raises:
            SourceError: if there is no such directory, or none of these files.
            CheckpointError: if they are another model's.
        """
        folder = Path(directory)
        config = extractor_settings(folder)
        if config is None and (folder / "config.json").is_file():
            model = read_json(folder / "config.json")
            model = model.get("config", model)  # a native directory keeps the sizes one level down
            config = {name: model[name] for name in ("num_mel_bins", "max_length") if name in model}
        if config is None:
            raise SourceError(
                f"'{folder}' has no preprocessor_config.json; ASTFeatureExtractor.audioset(), .esc50() and "
                ".speech_commands() are the processors of the project's own files."
            )
        return cls.of_settings(config, folder)

    def normalize(self, features: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        r"""$(x - \text{mean}) / (2\,\text{std})$."""
        return (features - self.mean) / (self.std * 2)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Spectrograms of one waveform or of a batch of any lengths.

        Frames do not see each other, so every waveform is padded to `samples` first, and no length compiles anew.

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            sampling_rate: Hz of `raw_speech`, to be checked.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `input_values` float32 `(batch, max_length, num_mel_bins)`.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or shorter than one window (25 ms).
        """
        check_return_tensors(return_tensors)
        waveforms = waveform_batch(raw_speech, sampling_rate, self.sampling_rate, minimum_samples=self.window)
        features = np.zeros((len(waveforms), self.max_length, self.num_mel_bins), np.float32)
        for row, waveform in enumerate(waveforms):
            filled = np.zeros(self.samples)
            kept = waveform[: self.samples]
            filled[: len(kept)] = kept
            frames = (len(kept) - self.window) // self.hop + 1
            with double_precision_on_cpu():
                fbank = np.asarray(_fbank(jnp.asarray(filled), self.num_mel_bins, self.sampling_rate))
            features[row, :frames] = fbank[:frames]
        return {"input_values": self.normalize(features) if self.do_normalize else features}

    def in_jax(self, waveforms: Float[Array, "batch time"]) -> Float[Array, "batch frames mels"]:
        """The same for waveforms of one length inside `jax.jit`, in their own dtype: to train on mixed waveforms."""
        frames = kaldi_fbank(waveforms[:, : self.samples], self.num_mel_bins, self.sampling_rate, window="hanning")
        frames = jnp.pad(frames, ((0, 0), (0, self.max_length - frames.shape[1]), (0, 0)))
        return (frames - self.mean) / (self.std * 2) if self.do_normalize else frames
