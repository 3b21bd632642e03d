"""CLAP's processor: log-mel spectrograms in dB, one or four views of a sound, and RoBERTa's tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from audiozoo.audio.chunks import check_chunk
from audiozoo.audio.features import double_precision_on_cpu, mel_filterbank, spectrogram
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    read_json,
    waveform_batch,
)
from audiozoo.text.roberta_tokenizer import RobertaTokenizer

CHUNK = 1001  # frames that are transformed at once: ten seconds and the frame at their end


def log_mel_db(
    x: Float[Array, "*batch time"],
    *,
    n_fft: int,
    hop: int,
    n_mels: int,
    sampling_rate: int,
    f_min: float,
    f_max: float,
    slaney: bool,
    center: bool = True,
) -> Float[Array, "*batch frames mels"]:
    r"""$10 \log_{10} \max(M |X|^2, 10^{-10})$, with filters of torchaudio (HTK, peaks at 1) or librosa (Slaney)."""
    power = spectrogram(x, n_fft, hop, center=center)
    scale, norm = ("slaney", "slaney") if slaney else ("htk", None)
    filters = mel_filterbank(n_fft // 2 + 1, n_mels, sampling_rate, f_min=f_min, f_max=f_max, scale=scale, norm=norm)
    mel = jnp.matmul(power, jnp.asarray(filters, power.dtype), precision=jax.lax.Precision.HIGHEST)
    return 10.0 * jnp.log10(jnp.maximum(mel, 1e-10))


_SETTINGS = ("n_fft", "hop", "n_mels", "sampling_rate", "f_min", "f_max", "slaney")
_chunk = partial(jax.jit, static_argnames=_SETTINGS)(partial(log_mel_db, center=False))


def shrink(mel: Float[np.ndarray, "frames mels"], frames: int) -> Float[np.ndarray, "shrunk mels"]:
    """A long spectrogram at `frames` frames: linear between the two nearest, as PyTorch's, with no smoothing before."""
    have = len(mel)
    at = np.clip((np.arange(frames) + 0.5) * have / frames - 0.5, 0.0, have - 1)
    low = np.minimum(at.astype(int), max(have - 2, 0))
    weight = (at - low)[:, None]
    return mel[low] * (1 - weight) + mel[np.minimum(low + 1, have - 1)] * weight


class ClapFeatureExtractor(FeatureExtractor):
    r"""Waveforms to spectrograms; the arguments are the fields of `preprocessor_config.json`.

    What is shorter than ten seconds is repeated as often as it fits, then padded with zeros. What is longer is either
    cut to ten seconds (`rand_trunc`) or seen four times (`fusion`): as a whole, shrunk, and through three windows of
    ten seconds, one from each third of it. Where the original draws windows at random, `crops="deterministic"` takes
    the middle of what could be drawn, so that a sound has one embedding.

    Args:
        feature_size: mel bands.
        sampling_rate: Hz.
        hop_length: samples between frames.
        max_length_s: seconds that the model hears.
        fft_window_size: samples under a frame.
        padding_value: of no use; kept for files.
        return_attention_mask: of no use; kept for files.
        frequency_min: lower edge of the lowest band, Hz.
        frequency_max: upper edge of the highest band, Hz.
        top_db: of no use, in the original too; kept for files.
        truncation: "fusion" or "rand_trunc".
        padding: "repeatpad", "repeat" (and cut) or "pad".
        quantize: round samples to 16 bits first, as LAION's own code does.
    """

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 48_000,
        hop_length: int = 480,
        max_length_s: int = 10,
        fft_window_size: int = 1024,
        padding_value: float = 0.0,
        return_attention_mask: bool = False,
        frequency_min: float = 0,
        frequency_max: float = 14_000,
        top_db: int | None = None,
        truncation: str = "fusion",
        padding: str = "repeatpad",
        quantize: bool = False,
    ) -> None:
        if min(feature_size, sampling_rate, hop_length, max_length_s, fft_window_size) < 1:
            raise CheckpointError("CLAP's features need bands, a rate, a hop, a length and a window of at least 1.")
        check_chunk("max_length_s", max_length_s, sampling_rate)
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.max_length_s = max_length_s
        self.fft_window_size = fft_window_size
        self.padding_value = padding_value
        self.return_attention_mask = return_attention_mask
        self.frequency_min = frequency_min
        self.frequency_max = frequency_max
        self.top_db = top_db
        self.truncation = self._known("truncation", truncation, ("fusion", "rand_trunc"))
        self.padding = self._known("padding", padding, ("repeatpad", "repeat", "pad"))
        self.quantize = quantize

    @staticmethod
    def _known(what: str, value: str, choices: tuple[str, ...]) -> str:
        if value not in choices:
            raise UsageError(f"There is no {what} {value!r} of CLAP's; choose {', '.join(choices)}.")
        return value

    @classmethod
    def laion(cls, fusion: bool) -> ClapFeatureExtractor:
        """For LAION's own `.pt` files."""
        return cls(frequency_min=50, truncation="fusion" if fusion else "rand_trunc", quantize=True)

    @property
    def nb_max_samples(self) -> int:
        """Samples that the model hears."""
        return int(self.max_length_s * self.sampling_rate)

    def _settings(self, truncation: str) -> dict[str, Any]:
        return {
            "n_fft": self.fft_window_size,
            "hop": self.hop_length,
            "n_mels": self.feature_size,
            "sampling_rate": self.sampling_rate,
            "f_min": self.frequency_min,
            "f_max": self.frequency_max,
            "slaney": truncation != "fusion",
        }

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> ClapFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`; without, the defaults for the `config.json`.

        Raises:
            SourceError: if there is no such directory, or none of these files.
            CheckpointError: if they are another model's.
        """
        folder = Path(directory)
        config = extractor_settings(folder)
        if config is None and (folder / "config.json").is_file():
            model = read_json(folder / "config.json")
            model = model.get("config", model)  # a native directory keeps the sizes one level down
            fused = model.get("audio_config", model).get("enable_fusion", False)
            config = {"truncation": "fusion" if fused else "rand_trunc"}
        if config is None:
            raise SourceError(
                f"'{folder}' has no preprocessor_config.json; ClapFeatureExtractor.laion(fusion=…) is that of LAION's "
                "own files."
            )
        return cls.of_settings(config, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {
            "nb_max_samples": self.nb_max_samples,
            "nb_frequency_bins": self.fft_window_size // 2 + 1,
            "processor_class": "ClapProcessor",
        }

    def _log_mel(self, waveform: np.ndarray, truncation: str) -> np.ndarray:
        """The whole spectrogram through one compiled chunk, so that no length compiles anew; float32."""
        half, hop = self.fft_window_size // 2, self.hop_length
        frames = 1 + len(waveform) // hop
        padded = np.pad(waveform.astype(np.float64), half, mode="reflect")
        span = (CHUNK - 1) * hop + self.fft_window_size
        pieces = []
        for first in range(0, frames, CHUNK):
            piece = padded[first * hop : first * hop + span]
            with double_precision_on_cpu():
                filled = jnp.asarray(np.pad(piece, (0, span - len(piece))))
                pieces.append(np.asarray(_chunk(filled, **self._settings(truncation)), np.float32))
        return np.concatenate(pieces)[:frames]

    def fill(self, waveform: Float[np.ndarray, " time"], length: int, padding: str) -> Float[np.ndarray, " samples"]:
        """A waveform shorter than `length` as `padding` says: repeated, repeated and cut, or neither; then zeros."""
        times = length // len(waveform)
        if padding == "repeat":
            waveform = np.tile(waveform, times + 1)[:length]
        elif padding == "repeatpad":
            waveform = np.tile(waveform, times)
        return np.pad(waveform, (0, length - len(waveform)))

    def _start(self, candidates: np.ndarray, crops: str, rng: np.random.Generator) -> int:
        if not len(candidates):
            return 0
        return int(rng.choice(candidates) if crops == "random" else candidates[len(candidates) // 2])

    def _views(
        self, waveform: np.ndarray, length: int, truncation: str, padding: str, crops: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """The spectrograms of one waveform, and whether it is longer than the model hears."""
        longer = len(waveform) > length
        if truncation == "rand_trunc":
            if longer:
                start = self._start(np.arange(len(waveform) - length + 1), crops, rng)
                waveform = waveform[start : start + length]
            elif len(waveform) < length:
                waveform = self.fill(waveform, length, padding)
            return self._log_mel(waveform, truncation)[None], longer
        if len(waveform) < length:
            waveform = self.fill(waveform, length, padding)
        mel, frames = self._log_mel(waveform, truncation), length // self.hop_length + 1
        if len(mel) <= frames:  # less than one frame more than the model hears is not longer
            return np.stack([mel] * 4), False
        thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
        starts = [self._start(third, crops, rng) for third in thirds]
        return np.stack([shrink(mel, frames), *(mel[start : start + frames] for start in starts)]), True

    def __call__(
        self,
        raw_speech: Any,
        truncation: str | None = None,
        padding: bool | str | None = None,
        max_length: int | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        *,
        crops: str = "deterministic",
        rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """Spectrograms of one waveform or of a batch of any lengths.

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            truncation: instead of the checkpoint's.
            padding: instead of the checkpoint's.
            max_length: samples that the model hears, if not ten seconds.
            sampling_rate: Hz of `raw_speech`, to be checked.
            return_tensors: "np" or `None`; results are NumPy arrays.
            crops: "deterministic", or "random" as in the original, for training.
            rng: source of random crops.

        Returns:
            `input_features` float32 `(batch, 1 or 4, frames, feature_size)`, 1,001 frames for ten seconds, and
            `is_longer` bool `(batch, 1)`. Unlike `transformers`, which says so of one item drawn at random when none
            is, this says of an item that it is longer only when it is.

        Raises:
            AudioError: empty, not finite, integer, stereo, or at another rate.
            UsageError: for an unknown option.
        """
        check_return_tensors(return_tensors)
        truncation = self._known("truncation", truncation or self.truncation, ("fusion", "rand_trunc"))
        padding = self.padding if padding is None or padding is True else padding
        padding = self._known("padding", str(padding), ("repeatpad", "repeat", "pad"))
        self._known("choice of crops", crops, ("deterministic", "random"))
        waveforms = waveform_batch(raw_speech, sampling_rate, self.sampling_rate, minimum_samples=1)
        if self.quantize:
            waveforms = [(np.clip(w, -1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767 for w in waveforms]
        rng = rng or np.random.default_rng()
        length = max_length or self.nb_max_samples
        views = [self._views(waveform, length, truncation, padding, crops, rng) for waveform in waveforms]
        return {
            "input_features": np.stack([mel for mel, _ in views]).astype(np.float32),
            "is_longer": np.asarray([[longer] for _, longer in views]),
        }

    def in_jax(self, waveforms: Float[Array, "batch time"]) -> Float[Array, "batch views frames mels"]:
        """Spectrograms of waveforms as they are, neither filled nor cut, inside `jax.jit` and in their own dtype.

        A model stretches what has fewer frames than ten seconds: see `fill`.
        """
        if self.quantize:
            waveforms = jnp.trunc(jnp.clip(waveforms, -1, 1) * 32767) / 32767
        mel = log_mel_db(waveforms, **self._settings(self.truncation))[:, None]
        return jnp.repeat(mel, 4, axis=1) if self.truncation == "fusion" else mel


class ClapProcessor:
    """Feature extractor and tokenizer of one checkpoint, called as the `transformers` class is.

    Args:
        feature_extractor: waveforms to spectrograms.
        tokenizer: text to tokens and back; without one, sounds alone are read.
    """

    def __init__(self, feature_extractor: ClapFeatureExtractor, tokenizer: RobertaTokenizer | None) -> None:
        self.feature_extractor = feature_extractor
        self._tokenizer = tokenizer

    @property
    def reads_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> RobertaTokenizer:
        """Text to tokens and back.

        Raises:
            SourceError: if the checkpoint came without one, as LAION's own files do.
        """
        if self._tokenizer is None:
            raise SourceError(
                "This CLAP came without a tokenizer, and reads no text: put the files of roberta-base beside it "
                "(tokenizer.json, or vocab.json with merges.txt)."
            )
        return self._tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> ClapProcessor:
        """From the files of a checkpoint directory, of which those of the tokenizer may be missing."""
        features = ClapFeatureExtractor.from_directory(directory)
        try:
            return cls(features, RobertaTokenizer.from_directory(directory))
        except SourceError:
            return cls(features, None)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        self.feature_extractor.save(directory)
        if self.reads_text:
            self.tokenizer.save(directory)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Model inputs of text, of audio, or of both.

        Args:
            text: a text or several.
            audio: a waveform or several.
            sampling_rate: Hz of `audio`.
            padding: of the text; see `RobertaTokenizer.__call__`.
            truncation: of the text.
            max_length: of the text.
            return_tensors: "np" or `None`; results are NumPy arrays.
            options: of the audio; see `ClapFeatureExtractor.__call__`.

        Returns:
            `input_ids` and `attention_mask` of text, `input_features` and `is_longer` of audio.

        Raises:
            UsageError: without text and audio, or for an option of audio that is not there.
        """
        check_return_tensors(return_tensors)
        if text is None and audio is None:
            raise UsageError("Give the processor text, audio, or both.")
        if audio is None and options:
            raise UsageError(f"{next(iter(options))!r} is an option of audio, and no audio was given.")
        inputs: dict[str, np.ndarray] = {}
        if text is not None:
            inputs |= self.tokenizer(text, padding=padding, truncation=truncation, max_length=max_length)
        if audio is not None:
            inputs |= self.feature_extractor(audio, sampling_rate=sampling_rate, **options)
        return inputs

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """See `RobertaTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of every row."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)
