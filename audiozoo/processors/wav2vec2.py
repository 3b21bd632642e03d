"""wav2vec 2.0's processor: normalised waveforms in; letters or phonemes, by CTC, out. The whole family uses it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from audiozoo.decoding.ctc import BeamSearch, NgramModel, Span
from audiozoo.errors import SourceError, UsageError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    numbered,
    pad_batch,
    padded_labels,
    read_json,
    settings_of,
    tidied,
    waveform_batch,
    write_json,
    zero_mean_unit_variance,
)
from audiozoo.text.phonemes import phonemes_of_words

MINIMUM_SAMPLES = 400  # one frame


class Wav2Vec2FeatureExtractor(FeatureExtractor):
    """Waveforms to model inputs; the arguments are the fields of `preprocessor_config.json`.

    Args:
        sampling_rate: Hz; all published checkpoints use 16,000.
        padding_value: what shorter waveforms are padded with.
        do_normalize: bring each waveform to mean 0 and variance 1.
        return_attention_mask: the default of the argument of that name; the base models were trained without.
    """

    def __init__(
        self,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        return_attention_mask: bool = False,
    ) -> None:
        self.sampling_rate = sampling_rate
        self.padding_value = padding_value
        self.do_normalize = do_normalize
        self.return_attention_mask = return_attention_mask

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Self:
        """From `preprocessor_config.json` or `processor_config.json`; else the defaults."""
        folder = Path(directory)
        return cls.of_settings(extractor_settings(folder) or {}, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {"feature_size": 1, "processor_class": "Wav2Vec2Processor"}

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Normalise and pad one waveform or a batch.

        Each waveform is normalised by its own samples. (`transformers` normalises over the padding as well when it
        returns no attention mask.)

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            sampling_rate: Hz of `raw_speech`, to be checked.
            padding: "longest" (or `True`), "max_length" or "do_not_pad".
            max_length: samples to pad to, and to cut to with `truncation`.
            truncation: cut what is longer than `max_length`.
            pad_to_multiple_of: round the padded length up.
            return_attention_mask: also return which samples are audio and which are padding.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `input_values` float32 `(batch, time)` and, if asked for, `attention_mask` int32 of the same shape.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or shorter than one frame (25 ms).
        """
        check_return_tensors(return_tensors)
        waveforms = waveform_batch(raw_speech, sampling_rate, self.sampling_rate, minimum_samples=MINIMUM_SAMPLES)
        if truncation and max_length is not None:
            waveforms = [waveform[:max_length] for waveform in waveforms]
        if self.do_normalize:
            waveforms = [zero_mean_unit_variance(waveform) for waveform in waveforms]
        batch, mask = pad_batch(
            waveforms,
            padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_value=self.padding_value,
        )
        wanted = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        return {"input_values": batch} | ({"attention_mask": mask} if wanted else {})


@dataclass(frozen=True)
class CTCOutput:
    """Decoded text; offsets in frames, as dictionaries with `char` or `word`, `start_offset` and `end_offset`."""

    text: Any
    char_offsets: Any = None
    word_offsets: Any = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def fairseq_symbols(path: Path) -> list[str]:
    """The entries of a fairseq dictionary: an entry and its count a line."""
    with path.open(encoding="utf-8") as file:  # read by the line: an entry may be one of Unicode's separators
        lines = [line.rstrip("\n") for line in file]
    return [re.sub(r" \d+( #fairseq:overwrite)?$", "", line) for line in lines if line.strip()]


class Wav2Vec2CTCTokenizer:
    """Letters and their indices; the arguments are the fields of `tokenizer_config.json`.

    Args:
        vocab: `{token: index}`, or `{language: {token: index}}` (MMS).
        pad_token: CTC's blank.
        bos_token: of no use to CTC.
        eos_token: of no use to CTC.
        unk_token: stands for letters outside the vocabulary when text is encoded.
        word_delimiter_token: stands between words.
        replace_word_delimiter_char: what it becomes in text.
        do_lower_case: the vocabulary is in capitals, text is wanted in small letters.
        target_lang: which of the nested vocabularies is in use.
        phonemes: the tokens are phonemes: text has spaces between them, and no word boundaries unless asked for.
        phonemizer_lang: espeak-ng's voice that turns words into phonemes; None where texts are phonemes already.
        clean_up_tokenization_spaces: decoded text has no space before a full stop, a comma and so on.
    """

    def __init__(
        self,
        vocab: Mapping[str, Any],
        *,
        pad_token: str = "<pad>",
        bos_token: str | None = "<s>",
        eos_token: str | None = "</s>",
        unk_token: str = "<unk>",
        word_delimiter_token: str | None = "|",
        replace_word_delimiter_char: str = " ",
        do_lower_case: bool = False,
        target_lang: str | None = None,
        phonemes: bool = False,
        phonemizer_lang: str | None = None,
        clean_up_tokenization_spaces: bool = False,
    ) -> None:
        self.vocab = dict(vocab)
        self.pad_token, self.bos_token, self.eos_token, self.unk_token = pad_token, bos_token, eos_token, unk_token
        self.word_delimiter_token = word_delimiter_token
        self.replace_word_delimiter_char = replace_word_delimiter_char
        self.do_lower_case = do_lower_case
        self.phonemes = phonemes
        self.phonemizer_lang = phonemizer_lang
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.target_lang = target_lang
        if self.languages and target_lang is None:
            raise UsageError(f"This vocabulary has a part for each language; choose one: {self._shown()}.")
        self._use(self.vocab[self._known(target_lang)] if self.languages and target_lang else self.vocab)

    # --- files ---

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> Wav2Vec2CTCTokenizer:
        """From `vocab.json` and `tokenizer_config.json`, or from fairseq's `dict.ltr.txt`."""
        folder = Path(directory)
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config |= read_json(folder / name)
        if not (folder / "vocab.json").is_file():
            dictionaries = sorted(folder.glob("dict.*.txt"))
            if len(dictionaries) != 1:
                raise SourceError(f"'{folder}' has neither vocab.json nor fairseq's dict.ltr.txt.")
            return cls.from_fairseq(dictionaries[0])
        vocab = read_json(folder / "vocab.json")

        def text(name: str, default: str | None) -> str | None:
            value = config.get(name, default)
            return value.get("content") if isinstance(value, Mapping) else value

        languages = [part for part in vocab.values() if isinstance(part, Mapping)]
        for part in languages or [vocab]:
            numbered(part, folder / "vocab.json")
        language = target_lang or config.get("target_lang")
        if languages and language is None:
            language = "eng" if "eng" in vocab else next(iter(vocab))
        phonemes = "Phoneme" in str(config.get("tokenizer_class", ""))
        phonemize = phonemes and config.get("do_phonemize", True)
        settings = {
            "pad_token": text("pad_token", "<pad>") or "<pad>",
            "bos_token": text("bos_token", "<s>"),
            "eos_token": text("eos_token", "</s>"),
            "unk_token": text("unk_token", "<unk>") or "<unk>",
            "word_delimiter_token": text("word_delimiter_token", None if phonemes else "|"),
            "replace_word_delimiter_char": config.get("replace_word_delimiter_char", " "),
            "do_lower_case": bool(config.get("do_lower_case", False)) and not phonemes,
            "target_lang": language if languages else None,
            "phonemes": phonemes,
            "phonemizer_lang": config.get("phonemizer_lang", "en-us") if phonemize else None,
            "clean_up_tokenization_spaces": bool(config.get("clean_up_tokenization_spaces", False)),
        }
        return cls(vocab, **settings_of(cls, settings, folder))

    @classmethod
    def from_fairseq(cls, path: str | os.PathLike[str]) -> Wav2Vec2CTCTokenizer:
        """From fairseq's `dict.ltr.txt`: a token and its count a line, after four special ones.

        In fairseq `<s>` comes first and is CTC's blank; here, as in `transformers`, that index is called `<pad>`.
        """
        return cls.from_symbols(fairseq_symbols(Path(path)))

    @classmethod
    def from_symbols(cls, symbols: Sequence[str]) -> Wav2Vec2CTCTokenizer:
        """From the entries of a fairseq dictionary behind its four special ones.

        Entries of several characters without a boundary of words among them are phonemes.
        """
        vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *symbols])}
        if "|" not in vocab and any(len(symbol) > 1 for symbol in symbols):
            return cls(vocab, word_delimiter_token=None, phonemes=True)
        return cls(vocab)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `tokenizer_config.json` as `transformers` does."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", self.vocab)
        kind = "Wav2Vec2PhonemeCTCTokenizer" if self.phonemes else "Wav2Vec2CTCTokenizer"
        names = ["pad_token", "bos_token", "eos_token", "unk_token", "word_delimiter_token", "do_lower_case"]
        names += ["clean_up_tokenization_spaces", "replace_word_delimiter_char", "target_lang"]
        config = {name: getattr(self, name) for name in names}
        if self.phonemes:
            config |= {"do_phonemize": self.phonemizer_lang is not None, "phone_delimiter_token": " "}
            config["phonemizer_lang"] = self.phonemizer_lang or "en-us"
            del config["do_lower_case"], config["replace_word_delimiter_char"], config["target_lang"]
        write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": kind})

    # --- vocabulary ---

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of a nested vocabulary, else none."""
        return tuple(name for name, part in self.vocab.items() if isinstance(part, Mapping))

    def _shown(self) -> str:
        return ", ".join(self.languages[:12]) + (" …" if len(self.languages) > 12 else "")

    def _known(self, language: str) -> str:
        if language not in self.languages:
            raise UsageError(f"There is no vocabulary for {language!r}; there are {self._shown()}.")
        return language

    def set_target_lang(self, target_lang: str) -> None:
        """Use another language's vocabulary.

        Raises:
            UsageError: if the vocabulary is not nested, or does not have the language.
        """
        if not self.languages:
            raise UsageError("This vocabulary is not divided into languages.")
        self._use(self.vocab[self._known(target_lang)])
        self.target_lang = target_lang

    def _use(self, encoder: Mapping[str, int]) -> None:
        self.encoder = dict(encoder)
        # Special tokens outside the vocabulary take the indices after it.
        size = max(self.encoder.values(), default=-1) + 1
        self._added: dict[str, int] = {}
        for token in (self.bos_token, self.eos_token, self.unk_token, self.pad_token):
            if token is not None and token not in self.encoder and token not in self._added:
                self._added[token] = size + len(self._added)
        self.decoder = {index: token for token, index in (self._added | self.encoder).items()}
        self.decoder |= {index: token for token, index in self.encoder.items()}
        long = sorted((t for t in (*self.encoder, *self._added) if len(t) > 1), key=len, reverse=True)
        self._long = re.compile(r"\s*(" + "|".join(map(re.escape, long)) + r")\s*") if long else None

    @property
    def pad_token_id(self) -> int:
        """The blank's index."""
        return (self._added | self.encoder)[self.pad_token]

    @property
    def word_delimiter_token_id(self) -> int | None:
        """The word delimiter's index, if there is one."""
        return None if self.word_delimiter_token is None else self.encoder.get(self.word_delimiter_token)

    def special_ids(self) -> tuple[int, ...]:
        """Indices of tokens that are not text, the blank left out."""
        names = {self.bos_token, self.eos_token, self.unk_token} - {self.word_delimiter_token, None}
        return tuple(sorted(i for t, i in (self._added | self.encoder).items() if t in names))

    def tokens(self, added: bool = False) -> list[str]:
        """The tokens by index, with or without special ones `added` behind the vocabulary; gaps are unknown tokens."""
        last = max(self.decoder if added else self.encoder.values())
        return [self.decoder.get(i, self.unk_token) for i in range(last + 1)]

    def __len__(self) -> int:
        return len(self.encoder)

    # --- text to tokens ---

    def word_ids(self, word: str) -> list[int]:
        """The letters of one word that the vocabulary has, in either case; a phoneme is a word of one letter.

        Of a letter with an accent that the vocabulary does not have, what it does have is taken.
        """
        ids = []
        letters: Sequence[str] = unicodedata.normalize("NFC", word)
        if self.phonemes:
            letters = self._phonemes_of(word)
        for letter in letters:
            found = self._letter_id(letter)
            parts = [found] if found is not None else map(self._letter_id, unicodedata.normalize("NFD", letter))
            ids += [part for part in parts if part is not None]
        return ids

    def _letter_id(self, letter: str) -> int | None:
        """The index of a letter in either case, if it is text."""
        for spelled in (letter, letter.upper(), letter.lower()):
            index = self.encoder.get(spelled)
            if index is not None and letter != self.word_delimiter_token:
                return None if index in self.special_ids() else index
        return None

    def _ids(self, text: str) -> list[int]:
        if self.phonemes:
            pieces = self._phonemes_of(text)
        else:
            pieces = []
            position = 0
            for match in self._long.finditer(text) if self._long else ():
                pieces += [*self._letters(text[position : match.start()]), match[1]]
                position = match.end()
            pieces += self._letters(text[position:])
        known = self._added | self.encoder
        return [known.get(piece, known[self.unk_token]) for piece in pieces]

    def _phonemes_of(self, text: str) -> list[str]:
        """What a text is in phonemes, words followed by the delimiter if there is one."""
        if self.phonemizer_lang is None:
            return text.split()
        behind = [] if self.word_delimiter_token is None else [self.word_delimiter_token]
        return [p for word in phonemes_of_words(text, self.phonemizer_lang) for p in (*word, *behind)]

    def _letters(self, text: str) -> list[str]:
        text = text.upper() if self.do_lower_case else text
        return list(text if self.word_delimiter_token is None else text.replace(" ", self.word_delimiter_token))

    def __call__(
        self, text: str | Sequence[str], *, padding: bool | str = False, return_tensors: str | None = None
    ) -> dict[str, Any]:
        """Tokens of a text or of several.

        Args:
            text: what to encode; without a `phonemizer_lang` a recogniser of phonemes wants them, with spaces between.
            padding: bring several texts to one length with the blank.
            return_tensors: "np" for arrays.
        """
        check_return_tensors(return_tensors)
        rows = [self._ids(text)] if isinstance(text, str) else [self._ids(t) for t in text]
        masks = [[1] * len(row) for row in rows]
        if padding:
            length = max(map(len, rows))
            masks = [m + [0] * (length - len(m)) for m in masks]
            rows = [row + [self.pad_token_id] * (length - len(row)) for row in rows]
        if return_tensors == "np":
            return {"input_ids": np.asarray(rows), "attention_mask": np.asarray(masks)}
        if isinstance(text, str):
            return {"input_ids": rows[0], "attention_mask": masks[0]}
        return {"input_ids": rows, "attention_mask": masks}

    # --- tokens to text ---

    def tokens_to_text(self, tokens: Sequence[str]) -> str:
        """Tokens, already collapsed, as text."""
        if self.phonemes:
            return self._finished(" ".join(t for t in tokens if t != self.word_delimiter_token))
        space, delimiter = self.replace_word_delimiter_char, self.word_delimiter_token
        return self._finished("".join(space if t == delimiter else t for t in tokens))

    def _finished(self, text: str) -> str:
        text = text.strip().lower() if self.do_lower_case else text.strip()
        return tidied(text) if self.clean_up_tokenization_spaces else text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        *,
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
        filter_word_delimiter_token: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """Text of a path: the best token of every frame.

        Args:
            token_ids: indices, one a frame.
            skip_special_tokens: leave out special tokens, and so the blank, *before* repeats are grouped, as
                `transformers` does; repeats across a blank are then one.
            group_tokens: whether repeats are one token.
            spaces_between_special_tokens: put spaces between all tokens.
            filter_word_delimiter_token: leave word boundaries out of phonemes.
            output_char_offsets: return also when each token begins and ends, in frames.
            output_word_offsets: the same for words.

        Returns:
            The text; with offsets a `CTCOutput`.
        """
        path = [self.decoder.get(int(i), self.unk_token) for i in np.asarray(token_ids).reshape(-1)]
        if skip_special_tokens:
            special = {self.bos_token, self.eos_token, self.unk_token, self.pad_token} - {self.word_delimiter_token}
            path = [token for token in path if token not in special]
        spans: list[Span] = []
        start = 0
        for i in range(1, len(path) + 1):
            if i == len(path) or not group_tokens or path[i] != path[start]:
                if path[start] != self.pad_token:
                    spans.append(Span(path[start], start, i))
                start = i
        if self.phonemes:
            delimiter = self.word_delimiter_token
            kept = [s for s in spans if not (filter_word_delimiter_token and s.text == delimiter)]
            text = self._finished(" ".join(s.text for s in kept))
        else:
            space = self.replace_word_delimiter_char
            kept = [Span(space if s.text == self.word_delimiter_token else s.text, s.start, s.end) for s in spans]
            text = self._finished((" " if spaces_between_special_tokens else "").join(s.text for s in kept))
        if not (output_char_offsets or output_word_offsets):
            return text
        chars = [{"char": s.text, "start_offset": s.start, "end_offset": s.end} for s in kept]
        words = self._words(kept) if output_word_offsets and not self.phonemes else None
        return CTCOutput(text, chars if output_char_offsets else None, words)

    def _words(self, spans: Sequence[Span]) -> list[dict[str, Any]]:
        words: list[dict[str, Any]] = []
        open_word = False
        for span in spans:
            if span.text == self.replace_word_delimiter_char:
                open_word = False
            elif open_word:
                words[-1]["word"] += span.text
                words[-1]["end_offset"] = span.end
            else:
                words.append({"word": span.text, "start_offset": span.start, "end_offset": span.end})
                open_word = True
        return words

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """`decode` of every row; with offsets one `CTCOutput` of lists."""
        rows = [self.decode(row, skip_special_tokens, **options) for row in sequences]
        if not (options.get("output_char_offsets") or options.get("output_word_offsets")):
            return rows
        return CTCOutput([r.text for r in rows], [r.char_offsets for r in rows], [r.word_offsets for r in rows])


class Wav2Vec2Processor:
    """Feature extractor and tokenizer of one checkpoint, called as the `transformers` class is.

    Attributes:
        feature_extractor: waveforms to model inputs.
        tokenizer: letters, or None for a checkpoint without a vocabulary (pre-trained, or with a classifier).
    """

    def __init__(
        self, feature_extractor: Wav2Vec2FeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer | None = None
    ) -> None:
        self.feature_extractor = feature_extractor
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Wav2Vec2CTCTokenizer:
        """The tokenizer.

        Raises:
            UsageError: if the checkpoint has none.
        """
        if self._tokenizer is None:
            raise UsageError(
                "This checkpoint has no vocabulary (vocab.json, or beside a file of fairseq's dict.ltr.txt), so it has "
                "no text."
            )
        return self._tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> Wav2Vec2Processor:
        """From the files of a checkpoint directory; without a vocabulary there is no tokenizer."""
        folder = Path(directory)
        return cls(Wav2Vec2FeatureExtractor.from_directory(folder), cls.tokenizer_in(folder, target_lang))

    @staticmethod
    def tokenizer_in(folder: Path, target_lang: str | None = None) -> Wav2Vec2CTCTokenizer | None:
        """The tokenizer whose files lie in a directory, if there are any."""
        if (folder / "dictionary.txt").is_file():
            from audiozoo.processors.mms import AlignmentTokenizer

            return AlignmentTokenizer(folder / "dictionary.txt", target_lang)
        if (folder / "vocab.json").is_file() or len(list(folder.glob("dict.*.txt"))) == 1:
            return Wav2Vec2CTCTokenizer.from_directory(folder, target_lang)
        return None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        self.feature_extractor.save(directory)
        if self._tokenizer is not None:
            self._tokenizer.save(directory)

    def __call__(
        self,
        audio: Any = None,
        sampling_rate: int | None = None,
        *,
        text: str | Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Model inputs of audio, of text, or of both for training.

        Args:
            audio: see `Wav2Vec2FeatureExtractor.__call__`, which also takes `options`.
            sampling_rate: Hz of `audio`.
            text: a text or several; alone, `options` are those of the tokenizer.
            options: passed on.

        Returns:
            `input_values` (and `attention_mask`) of audio; `input_ids` of text; of both, the former and `labels`,
            padded with -100.
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

    def set_target_lang(self, target_lang: str) -> None:
        """See `Wav2Vec2CTCTokenizer.set_target_lang`."""
        self.tokenizer.set_target_lang(target_lang)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """See `Wav2Vec2CTCTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens, **options)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """`decode` of every row."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, **options)

    def beam_search(
        self, language_model: NgramModel | str | os.PathLike[str] | None = None, **options: Any
    ) -> BeamSearch:
        """A beam search over this vocabulary; see `audiozoo.decoding.ctc.BeamSearch` for the options."""
        if isinstance(language_model, str | os.PathLike):
            language_model = NgramModel.from_arpa(language_model)
        tokenizer = self.tokenizer
        return BeamSearch(
            tokenizer.tokens(added=True),
            blank=tokenizer.pad_token_id,
            delimiter=None if tokenizer.phonemes else tokenizer.word_delimiter_token,
            skip=tokenizer.special_ids(),
            language_model=language_model,
            **options,
        )


__all__ = ["CTCOutput", "Wav2Vec2CTCTokenizer", "Wav2Vec2FeatureExtractor", "Wav2Vec2Processor"]
