"""SpeechT5's processor: waveforms and characters in, log-mel spectrograms and characters as targets, text out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import check_return_tensors, read_json, write_json
from audiozoo.processors.hifigan import HifiGanProcessor
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor
from audiozoo.text.numbers import spell_numbers
from audiozoo.text.sentences import pieces, sentences

LONGEST = 300  # characters of a sentence that is said at once; the released voice was trained on up to 600


def read_x_vector(path: str | os.PathLike[str], width: int) -> Float[np.ndarray, " width"]:
    """A speaker's embedding out of a .npy file, float32.

    Raises:
        SourceError: if it holds something else than `width` finite numbers.
    """
    try:
        vector = np.load(path, allow_pickle=False)
    except Exception:  # what a damaged file raises is of many kinds
        raise SourceError(f"{path} cannot be read as an array of NumPy's.") from None
    if not isinstance(vector, np.ndarray):
        raise SourceError(f"{path} holds several arrays; an x-vector is one, in a .npy file.")
    if vector.size != width or not np.issubdtype(vector.dtype, np.floating) or not np.isfinite(vector).all():
        raise SourceError(f"{path} holds no x-vector of {width} finite numbers, but {vector.dtype}{vector.shape}.")
    return vector.reshape(-1).astype(np.float32)


class SpeechT5FeatureExtractor(Wav2Vec2FeatureExtractor):
    """Waveforms as inputs, and their spectrograms as targets; the arguments are fields of `preprocessor_config.json`.

    Args:
        sampling_rate: Hz.
        padding_value: what shorter waveforms are padded with.
        do_normalize: bring each waveform to mean 0 and variance 1.
        return_attention_mask: the default of the argument of that name.
        num_mel_bins: bands of a spectrogram.
    """

    def __init__(
        self,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        do_normalize: bool = False,
        return_attention_mask: bool = True,
        num_mel_bins: int = 80,
    ) -> None:
        super().__init__(sampling_rate, padding_value, do_normalize, return_attention_mask)
        self.num_mel_bins = num_mel_bins

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`: what the targets are made with."""
        spectrogram = {"fmin": 80, "fmax": 7600, "hop_length": 16, "win_length": 64, "mel_floor": 1e-10}
        return super().saved_besides() | spectrogram | {"processor_class": "SpeechT5Processor"}

    def spectrograms(self, waveforms: Any, sampling_rate: int | None = None) -> dict[str, np.ndarray]:
        r"""Targets: $\log_{10}\max(M |X|, 10^{-10})$ of 64 ms every 16 ms, zeros behind the end, and their mask.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or shorter than half a window.
        """
        rate = self.sampling_rate
        made = HifiGanProcessor.speecht5(rate, self.num_mel_bins)(waveforms, sampling_rate=sampling_rate)
        values, lengths = made["spectrogram"], made["lengths"]
        return {
            "input_values": values,
            "attention_mask": (np.arange(values.shape[1]) < lengths[:, None]).astype(np.int32),
        }


class SpeechT5Tokenizer:
    """Characters, by SentencePiece: a text is its characters, a word boundary before each word, and an end.

    Args:
        model: a SentencePiece model's file (`spm_char.model`).
        normalize: write numbers in words.
        added: further tokens and their ids; by default `<mask>` and `<ctc_blank>` after the characters.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: if special tokens are missing.
    """

    def __init__(
        self, model: str | os.PathLike[str], normalize: bool = False, added: Mapping[str, int] | None = None
    ) -> None:
        import sentencepiece

        if not Path(model).is_file():
            raise SourceError(f"There is no file {model}.")
        self.file = Path(model)
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        size = self.pieces.get_piece_size()
        self.added = dict(added) if added is not None else {"<mask>": size, "<ctc_blank>": size + 1}
        self.normalize = normalize
        self.special = {token: self.pieces.piece_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")}
        if missing := [token for token, index in self.special.items() if self.pieces.id_to_piece(index) != token]:
            raise CheckpointError(f"'{model}' has no {', '.join(missing)}.")
        self.names = {index: token for token, index in self.added.items()}
        whole = "|".join(map(re.escape, sorted(self.special | self.added, key=len, reverse=True)))
        self._whole = re.compile(f"({whole})")

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> SpeechT5Tokenizer:
        """From `spm_char.model`, `tokenizer_config.json` and `added_tokens.json`."""
        folder = Path(directory)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        added: dict[str, int] | None = None
        if isinstance(config.get("added_tokens_decoder"), Mapping):
            added = {str(t["content"]): int(i) for i, t in config["added_tokens_decoder"].items()}
        elif (folder / "added_tokens.json").is_file():
            added = {str(token): int(index) for token, index in read_json(folder / "added_tokens.json").items()}
        found = cls(folder / "spm_char.model", bool(config.get("normalize", False)), added)
        size = found.pieces.get_piece_size()
        # The files list the tokens of the model itself too.
        found.names = {index: token for index, token in found.names.items() if index >= size}
        return found

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Put the model's file and the settings into a directory, as `transformers` does."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.resolve() != (folder / "spm_char.model").resolve():
            (folder / "spm_char.model").write_bytes(self.file.read_bytes())
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        config = special | {"normalize": self.normalize, "tokenizer_class": "SpeechT5Tokenizer"}
        tokens = {}
        for token, index in sorted((self.special | self.added).items(), key=lambda item: item[1]):
            shown = {"content": token, "lstrip": token == "<mask>", "rstrip": False, "single_word": False}
            tokens[str(index)] = shown | {"normalized": token != "<mask>", "special": token not in ("<ctc_blank>",)}
        write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": tokens})
        write_json(folder / "added_tokens.json", self.added)

    def __len__(self) -> int:
        return max(self.pieces.get_piece_size(), 1 + max(self.added.values(), default=-1))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Every token, in the order of the ids."""
        return tuple(map(self._name, range(len(self))))

    @property
    def pad_token_id(self) -> int:
        """What pads a batch."""
        return self.special["<pad>"]

    @property
    def eos_token_id(self) -> int:
        """What ends a text."""
        return self.special["</s>"]

    def encode(self, text: str, normalize: bool | None = None) -> list[int]:
        """Ids of a text, with its end."""
        if self.normalize if normalize is None else normalize:
            text = spell_numbers(text)
        ids: list[int] = []
        for index, part in enumerate(self._whole.split(text)):
            if index % 2:
                ids.append((self.special | self.added)[part])
            elif part:
                ids += self.pieces.encode(part)
        return [*ids, self.eos_token_id]

    def __call__(self, text: str | Sequence[str], normalize: bool | None = None) -> dict[str, np.ndarray]:
        """Ids of a text or several, padded, and which are real.

        Raises:
            UsageError: for anything but text.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(line, str) for line in texts):
            raise UsageError("A text is a string; give one, or a list of at least one.")
        rows = [self.encode(line, normalize) for line in texts]
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self.pad_token_id, np.int32)
        mask = np.zeros((len(rows), longest), np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids; with `skip_special_tokens` without ends, padding and masks."""
        skipped = {*self.special.values(), self.added.get("<mask>")} if skip_special_tokens else set()
        pieces = [self._name(index) for index in np.asarray(token_ids).reshape(-1).tolist() if index not in skipped]
        return "".join(pieces).replace("▁", " ").strip()

    def _name(self, index: int) -> str:
        """The token of an id; of one that the vocabulary does not have, the unknown token."""
        inside = 0 <= index < self.pieces.get_piece_size()
        return self.names.get(index) or (self.pieces.id_to_piece(index) if inside else "<unk>")

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]


class SpeechT5Processor:
    """Both ends of SpeechT5: `audio` or `text` as input, `audio_target` or `text_target` as labels.

    Args:
        feature_extractor: of waveforms.
        tokenizer: of characters; a checkpoint for voice conversion may have none.
    """

    def __init__(self, feature_extractor: SpeechT5FeatureExtractor, tokenizer: SpeechT5Tokenizer | None = None) -> None:
        self.feature_extractor, self._tokenizer = feature_extractor, tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> SpeechT5Processor:
        """From the files of a checkpoint directory."""
        folder = Path(directory)
        extractor = SpeechT5FeatureExtractor.from_directory(folder)
        if not (folder / "spm_char.model").is_file():
            return cls(extractor)
        return cls(extractor, SpeechT5Tokenizer.from_directory(folder))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files of both."""
        self.feature_extractor.save(directory)
        if self._tokenizer is not None:
            self._tokenizer.save(directory)

    @property
    def tokenizer(self) -> SpeechT5Tokenizer:
        """Of characters.

        Raises:
            SourceError: if the checkpoint brought none.
        """
        if self._tokenizer is None:
            raise SourceError("This checkpoint has no spm_char.model beside it, so its characters are not known.")
        return self._tokenizer

    def __call__(
        self,
        audio: Any = None,
        *,
        text: str | Sequence[str] | None = None,
        audio_target: Any = None,
        text_target: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        normalize: bool | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Inputs, and with a target `labels` and `decoder_attention_mask`; a target alone as an input.

        Args:
            audio: waveforms to hear.
            text: texts to say.
            audio_target: waveforms whose spectrograms are to be made.
            text_target: texts to be written.
            sampling_rate: Hz of the waveforms, to be checked.
            normalize: write numbers in words; the checkpoint's setting if not given.
            return_tensors: "np" or `None`; results are NumPy arrays.
            options: of `Wav2Vec2FeatureExtractor`, for `audio`.

        Raises:
            UsageError: without input and target, or with two of a kind.
            AudioError: for a waveform that cannot be used.
        """
        check_return_tensors(return_tensors)
        if audio is not None and text is not None:
            raise UsageError("Give audio or text, not both; a target is called audio_target or text_target.")
        if audio_target is not None and text_target is not None:
            raise UsageError("Give audio_target or text_target, not both.")
        inputs = targets = None
        if audio is not None:
            inputs = self.feature_extractor(audio, sampling_rate, **options)
        elif text is not None:
            inputs = self.tokenizer(text, normalize)
        if audio_target is not None:
            targets = self.feature_extractor.spectrograms(audio_target, sampling_rate)
        elif text_target is not None:
            targets = self.tokenizer(text_target, normalize)
        if inputs is None and targets is None:
            raise UsageError("There is nothing to process: give audio, text, audio_target or text_target.")
        if inputs is None or targets is None:
            return inputs or targets  # type: ignore[return-value]
        labels = targets["input_values" if audio_target is not None else "input_ids"]
        return inputs | {"labels": labels, "decoder_attention_mask": targets["attention_mask"]}

    def sentences(self, text: str, *, normalize: bool = True, longest: int = LONGEST) -> list[tuple[str, list[int]]]:
        """The sentences of a text, each with its ids; one of more than `longest` characters in several pieces.

        Raises:
            UsageError: if there is nothing to say.
        """
        said = (" ".join(sentence.split()) for sentence in sentences(text))
        found = [(p, self.tokenizer.encode(p, normalize)) for sentence in said for p in pieces(sentence, longest)]
        unknown = {self.tokenizer.special["<unk>"], self.tokenizer.pieces.piece_to_id("▁"), self.tokenizer.eos_token_id}
        found = [(piece, ids) for piece, ids in found if set(ids) - unknown]
        if not found:
            raise UsageError("There is nothing to say: the text has no character that this voice knows.")
        return found

    def symbol(self, index: int) -> str:
        """The character of an id; empty for the text's end, a blank for the boundary before a word."""
        name = self.tokenizer._name(int(index))
        return "" if int(index) == self.tokenizer.eos_token_id else name.replace("▁", " ")

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of every row of ids."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)
