"""Whisper's processor: 30 s log-mel spectrograms in, text out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.audio.chunks import check_chunk
from audiozoo.audio.features import WHISPER_HOP, WHISPER_N_FFT, WHISPER_SAMPLING_RATE, long_log_mel_spectrogram
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    pad_batch,
    padded_labels,
    read_json,
    waveform_batch,
    write_json,
    zero_mean_unit_variance,
)
from audiozoo.text.whisper_tokenizer import WhisperTokenizer


class WhisperFeatureExtractor(FeatureExtractor):
    """Waveforms to log-mel spectrograms; the arguments are the fields of `preprocessor_config.json`.

    Args:
        feature_size: mel bands; 80, or 128 for large-v3 and turbo.
        sampling_rate: Hz; all published checkpoints use 16,000.
        hop_length: samples between frames (160).
        chunk_length: seconds that waveforms are padded to, at most an hour.
        n_fft: samples in a window (400).
        padding_value: what waveforms are padded with.
        dither: standard deviation of noise to add to waveforms.
        return_attention_mask: the default of the argument of that name.
    """

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = WHISPER_SAMPLING_RATE,
        hop_length: int = WHISPER_HOP,
        chunk_length: int = 30,
        n_fft: int = WHISPER_N_FFT,
        padding_value: float = 0.0,
        dither: float = 0.0,
        return_attention_mask: bool = False,
    ) -> None:
        if (sampling_rate, hop_length, n_fft) != (WHISPER_SAMPLING_RATE, WHISPER_HOP, WHISPER_N_FFT):
            raise CheckpointError(
                "Whisper's features are windows of 400 samples every 160 at 16000 Hz; "
                f"this checkpoint asks for {n_fft} every {hop_length} at {sampling_rate} Hz."
            )
        check_chunk("chunk_length", chunk_length, sampling_rate)
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.chunk_length = chunk_length
        self.n_fft = n_fft
        self.padding_value = padding_value
        self.dither = dither
        self.return_attention_mask = return_attention_mask

    @property
    def n_samples(self) -> int:
        """Samples in a chunk: 480,000."""
        return self.chunk_length * self.sampling_rate

    @property
    def nb_max_frames(self) -> int:
        """Frames in a chunk: 3,000."""
        return self.n_samples // self.hop_length

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> WhisperFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`; else the bands of `config.json`, or 80."""
        folder = Path(directory)
        config = extractor_settings(folder)
        if config is None and (folder / "config.json").is_file():
            model = read_json(folder / "config.json")
            model = model.get("config", model)  # in a native checkpoint the model's fields stand there
            config = {"feature_size": model.get("num_mel_bins", 80)}
        return cls.of_settings(config or {}, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {
            "n_samples": self.n_samples,
            "nb_max_frames": self.nb_max_frames,
            "processor_class": "WhisperProcessor",
        }

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        do_normalize: bool = False,
        return_tensors: str | None = None,
        rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """Log-mel spectrograms of one waveform or of a batch.

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            sampling_rate: Hz of `raw_speech`, to be checked.
            padding: "max_length" (30 s), "longest" or "do_not_pad".
            max_length: samples to pad and cut to, if not 30 s.
            truncation: cut what is longer. Longer input is for `truncation=False, padding="longest"`.
            pad_to_multiple_of: round the padded length up.
            return_attention_mask: also return which frames are audio and which are padding.
            do_normalize: bring each waveform to mean 0 and variance 1 first.
            return_tensors: "np" or `None`; results are NumPy arrays.
            rng: source of the dither noise, if the checkpoint asks for dither.

        Returns:
            `input_features` float32 `(batch, feature_size, frames)` and, if asked for, `attention_mask` int32
            `(batch, frames)`; 3,000 frames in 30 s.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or shorter than one window (25 ms).
        """
        check_return_tensors(return_tensors)
        waveforms = waveform_batch(raw_speech, sampling_rate, self.sampling_rate, minimum_samples=self.n_fft)
        max_length = max_length or self.n_samples
        if do_normalize:
            cut = max_length if truncation else None
            waveforms = [zero_mean_unit_variance(waveform[:cut]) for waveform in waveforms]
        batch, mask = pad_batch(
            waveforms,
            padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_value=self.padding_value,
        )
        if self.dither:
            rng = rng or np.random.default_rng()
            batch = batch + self.dither * rng.standard_normal(batch.shape, np.float32)
        features = np.stack([long_log_mel_spectrogram(row, self.feature_size) for row in batch])
        inputs = {"input_features": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            inputs["attention_mask"] = np.ascontiguousarray(mask[:, :: self.hop_length][:, : features.shape[-1]])
        return inputs


class WhisperProcessor:
    """Feature extractor and tokenizer of one checkpoint, called as the `transformers` class is.

    Attributes:
        feature_extractor: waveforms to spectrograms.
        tokenizer: text to tokens and back; a classifier may have none.
        generation_config: the content of `generation_config.json`, empty if there is none.
    """

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: WhisperTokenizer | None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.feature_extractor = feature_extractor
        self._tokenizer = tokenizer
        self.generation_config = generation_config or {}

    @property
    def tokenizer(self) -> WhisperTokenizer:
        """The tokenizer.

        Raises:
            UsageError: if the checkpoint, a classifier, has none.
        """
        if self._tokenizer is None:
            raise UsageError("This checkpoint is a classifier without a tokenizer, so it has no text.")
        return self._tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> WhisperProcessor:
        """From the files of a checkpoint directory (Hugging Face's, CTranslate2's, or with OpenAI's `*.tiktoken`)."""
        folder = Path(directory)
        feature_extractor = WhisperFeatureExtractor.from_directory(folder)
        generation_config: dict[str, Any] = {}
        if (folder / "generation_config.json").is_file():
            generation_config = read_json(folder / "generation_config.json")
        tokenizer: WhisperTokenizer | None = None
        try:
            tokenizer = WhisperTokenizer.from_directory(folder, multilingual=generation_config.get("is_multilingual"))
        except SourceError:
            if not _is_classifier(folder):
                raise
        return cls(feature_extractor, tokenizer, generation_config)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        self.feature_extractor.save(directory)
        if self._tokenizer is not None:
            self._tokenizer.save(directory)
        if self.generation_config:
            write_json(Path(directory) / "generation_config.json", self.generation_config)

    def __call__(
        self,
        audio: Any = None,
        sampling_rate: int | None = None,
        *,
        text: str | list[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Model inputs of audio, of text, or of both for training.

        Args:
            audio: see `WhisperFeatureExtractor.__call__`, which also takes `options`.
            sampling_rate: Hz of `audio`.
            text: a text or several; alone, `options` are those of the tokenizer (`padding`, `add_special_tokens`).
            options: passed on.

        Returns:
            `input_features` (and `attention_mask`) of audio; `input_ids` and `attention_mask` of text; of both, the
            features and the tokens as `labels`, an array padded with -100 (`transformers` leaves lists, which its model
            does not take).
        """
        if audio is None:
            if text is None:
                raise UsageError("Give the processor audio, text, or both.")
            return self.tokenizer(text, **options)
        inputs: dict[str, Any] = dict(self.feature_extractor(audio, sampling_rate, **options))
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            inputs["labels"] = padded_labels([self.tokenizer(t)["input_ids"] for t in texts])
        return inputs

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """See `WhisperTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens, **options)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[Any]:
        """`decode` of every row."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, **options)

    def get_decoder_prompt_ids(
        self, task: str | None = None, language: str | None = None, no_timestamps: bool = True
    ) -> list[tuple[int, int]]:
        """See `WhisperTokenizer.get_decoder_prompt_ids`."""
        return self.tokenizer.get_decoder_prompt_ids(task, language, no_timestamps)

    def get_prompt_ids(self, text: str) -> np.ndarray:
        """See `WhisperTokenizer.get_prompt_ids`."""
        return self.tokenizer.get_prompt_ids(text)


def _is_classifier(folder: Path) -> bool:
    """Whether a directory holds a model that hears classes and writes no text."""
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    native = config.get("audiozoo") or {}
    return "WhisperForAudioClassification" in (native.get("model_class"), *(config.get("architectures") or ()))
