"""HiFi-GAN's input: log-mel spectrograms as its authors', and as SpeechT5's, vocoder was trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from audiozoo.audio.features import double_precision_on_cpu, mel_filterbank, spectrogram
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.processors import check_return_tensors, read_json, waveform_batch, write_json

_SETTINGS = ("sampling_rate", "num_mels", "n_fft", "hop_size", "fmin", "fmax", "centered")


class HifiGanProcessor:
    r"""Waveforms to log-mel spectrograms.

    The authors' are $\ln\max(M \sqrt{|X|^2 + 10^{-9}}, 10^{-5})$ with the ends mirrored by $(N - \text{hop}) / 2$
    samples, one frame for each hop; SpeechT5's $\log_{10}\max(M |X|, 10^{-10})$, each frame centred on its sample.

    Args:
        sampling_rate: Hz.
        num_mels: bands.
        n_fft: $N$, samples in a frame.
        hop_size: samples between frames.
        fmin: lower edge of the lowest band, Hz.
        fmax: upper edge of the highest band, Hz; half the sampling rate if None.
        centered: SpeechT5's kind.
    """

    def __init__(
        self,
        sampling_rate: int = 22_050,
        num_mels: int = 80,
        n_fft: int = 1024,
        hop_size: int = 256,
        fmin: float = 0.0,
        fmax: float | None = 8000.0,
        centered: bool = False,
    ):
        if not 0 < hop_size <= n_fft or num_mels < 1:
            raise CheckpointError(f"There are no spectrograms of {num_mels} bands, {n_fft} samples, {hop_size} apart.")
        self.sampling_rate, self.num_mels, self.n_fft, self.hop_size = sampling_rate, num_mels, n_fft, hop_size
        self.fmin, self.fmax, self.centered = fmin, fmax, centered

    @classmethod
    def speecht5(cls, sampling_rate: int = 16_000, num_mels: int = 80) -> HifiGanProcessor:
        """For `microsoft/speecht5_hifigan`: windows of 64 ms every 16 ms, 80 to 7,600 Hz."""
        window, hop = sampling_rate * 64 // 1000, sampling_rate * 16 // 1000
        n_fft = 1 << (window - 1).bit_length()
        return cls(sampling_rate, num_mels, n_fft, hop, 80.0, 7600.0, centered=True)

    @classmethod
    def with_hop(cls, sampling_rate: int, num_mels: int, hop_size: int) -> HifiGanProcessor:
        """The authors' kind: windows of four hops, up to 8,000 Hz or half the sampling rate."""
        return cls(sampling_rate, num_mels, 4 * hop_size, hop_size, fmax=min(8000.0, sampling_rate / 2))

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> HifiGanProcessor:
        """From what `save` wrote, else from the `config.json` beside the weights: the authors', Hugging Face's or ours.

        Raises:
            SourceError: if there is none.
        """
        path, saved = Path(directory) / "config.json", Path(directory) / "preprocessor_config.json"
        if not path.is_file():
            raise SourceError(f"'{directory}' has no config.json, so its spectrograms are not known.")
        config = read_json(path)
        if saved.is_file() and "num_mels" in (found := read_json(saved)):
            config = found
        if "num_mels" in config:
            return cls(**{name: config[name] for name in _SETTINGS if name in config})
        config = config.get("config", config)  # a native directory keeps the sizes one level down
        rate, bands = config.get("sampling_rate", 16_000), config.get("model_in_dim", 80)
        if config.get("normalize_before", True):
            return cls.speecht5(rate, bands)
        return cls.with_hop(rate, bands, int(np.prod(config.get("upsample_rates", (8, 8, 2, 2)))))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`, with the authors' names."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "preprocessor_config.json", {name: getattr(self, name) for name in _SETTINGS})

    def __call__(
        self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str | None = None
    ) -> dict[str, np.ndarray]:
        """Spectrograms of one waveform or of a batch of any lengths.

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            sampling_rate: Hz of `raw_speech`, to be checked.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `spectrogram` float32 `(batch, frames, num_mels)`, and `lengths`, frames of each item.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or shorter than one frame.
        """
        check_return_tensors(return_tensors)
        least = self.n_fft // 2 + 1
        rows = [self._one(x) for x in waveform_batch(raw_speech, sampling_rate, self.sampling_rate, least)]
        lengths = np.array([len(row) for row in rows], np.int32)
        batch = np.zeros((len(rows), lengths.max(), self.num_mels), np.float32)
        for index, row in enumerate(rows):
            batch[index, : len(row)] = row
        return {"spectrogram": batch, "lengths": lengths}

    def _one(self, waveform: np.ndarray) -> np.ndarray:
        with double_precision_on_cpu():
            return np.asarray(self.in_jax(jnp.asarray(waveform, jnp.float64)[None])[0])

    def in_jax(self, waveforms: Float[Array, "batch time"]) -> Float[Array, "batch frames mels"]:
        """The same for waveforms of one length inside `jax.jit`, in their own dtype: to train on."""
        frequencies = self.n_fft // 2 + 1
        bank = mel_filterbank(frequencies, self.num_mels, self.sampling_rate, f_min=self.fmin, f_max=self.fmax)
        if self.centered:
            magnitude = spectrogram(waveforms, self.n_fft, self.hop_size, power=1.0)
            return jnp.log10(jnp.maximum(magnitude @ jnp.asarray(bank, magnitude.dtype), 1e-10))
        reach = (self.n_fft - self.hop_size) // 2
        mirrored = jnp.pad(waveforms, ((0, 0), (reach, reach)), mode="reflect")
        magnitude = jnp.sqrt(spectrogram(mirrored, self.n_fft, self.hop_size, center=False) + 1e-9)
        return jnp.log(jnp.maximum(magnitude @ jnp.asarray(bank, magnitude.dtype), 1e-5))
