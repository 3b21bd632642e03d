r"""Whisper's tokens (§2.3, Figure 1): byte-level BPE text, languages, tasks and timestamps in one sequence.

    <|startofprev|> previous text <|startoftranscript|> <|de|> <|transcribe|> <|0.00|> Guten Tag! <|1.20|> <|endoftext|>

The vocabulary is laid out in this order; only the size of the text part and the number of languages differ:

| ids (multilingual) | tokens |
| --- | --- |
| 0 … 50,256 | text: the bytes, then one token a BPE merge (50,256 tokens in the English models, GPT-2's) |
| 50,257, 50,258 | `<\|endoftext\|>`, `<\|startoftranscript\|>` |
| 50,259 … | `<\|en\|>` … 99 languages, 100 since large-v3 (`<\|yue\|>`) |
| then | `<\|translate\|>`, `<\|transcribe\|>`, `<\|startoflm\|>`, `<\|startofprev\|>` |
| then | `<\|nospeech\|>`, `<\|notimestamps\|>` |
| then | `<\|0.00\|>`, `<\|0.02\|>` … `<\|30.00\|>` |

One class reads the files of every project that publishes Whisper checkpoints: `tokenizer.json`, `vocab.json` with
`merges.txt`, OpenAI's `*.tiktoken`, and CTranslate2's `vocabulary.txt`.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from audiozoo.errors import CheckpointError, SourceError, UsageError, unknown_name
from audiozoo.text.batches import tokens_of
from audiozoo.text.normalizers import BasicTextNormalizer, EnglishTextNormalizer, english_spellings

_LANGUAGE_TABLE = """
en english    zh chinese     de german      es spanish    ru russian     ko korean      fr french      ja japanese
pt portuguese tr turkish     pl polish      ca catalan    nl dutch       ar arabic      sv swedish     it italian
id indonesian hi hindi       fi finnish     vi vietnamese he hebrew      uk ukrainian   el greek       ms malay
cs czech      ro romanian    da danish      hu hungarian  ta tamil       no norwegian   th thai        ur urdu
hr croatian   bg bulgarian   lt lithuanian  la latin      mi maori       ml malayalam   cy welsh       sk slovak
te telugu     fa persian     lv latvian     bn bengali    sr serbian     az azerbaijani sl slovenian   kn kannada
et estonian   mk macedonian  br breton      eu basque     is icelandic   hy armenian    ne nepali      mn mongolian
bs bosnian    kk kazakh      sq albanian    sw swahili    gl galician    mr marathi     pa punjabi     si sinhala
km khmer      sn shona       yo yoruba      so somali     af afrikaans   oc occitan     ka georgian    be belarusian
tg tajik      sd sindhi      gu gujarati    am amharic    yi yiddish     lo lao         uz uzbek       fo faroese
ht haitian_creole            ps pashto      tk turkmen    nn nynorsk     mt maltese     sa sanskrit
lb luxembourgish             my myanmar     bo tibetan    tl tagalog     mg malagasy    as assamese    tt tatar
haw hawaiian  ln lingala     ha hausa       ba bashkir    jw javanese    su sundanese   yue cantonese
"""
_WORDS = _LANGUAGE_TABLE.split()
LANGUAGES: dict[str, str] = {code: name.replace("_", " ") for code, name in zip(_WORDS[::2], _WORDS[1::2], strict=True)}
"""Code -> English name, in the order of the language tokens; large-v3 added the last one."""

_ALIASES = {
    "burmese": "my",
    "castilian": "es",
    "flemish": "nl",
    "haitian": "ht",
    "letzeburgesch": "lb",
    "mandarin": "zh",
    "moldavian": "ro",
    "moldovan": "ro",
    "panjabi": "pa",
    "pushto": "ps",
    "sinhalese": "si",
    "valencian": "ca",
}
LANGUAGE_CODES: dict[str, str] = {name: code for code, name in LANGUAGES.items()} | _ALIASES
"""English name or alias -> code."""

_OLD_CODES = {"iw": "he", "jv": "jw"}  # some vocabularies write `<|iw|>`

TASKS = ("transcribe", "translate")
TIMESTAMP_SECONDS = 0.02  # between two neighbouring timestamp tokens
TIMESTAMPS = 1501  # 0.00 … 30.00 s
_WINDOW_POSITIONS = 1500  # timestamp steps in one 30 s window
WITHOUT_SPACES = {"zh", "ja", "th", "lo", "my", "yue"}

# Annotations of what is not speech start with one of these.
_SINGLE_SYMBOLS = '"#()*+/:;<=>@[\\]^_`{|}~「」『』'
_DOUBLED_SYMBOLS = "<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪"
_NOTES = "♩♪♫♬♭♮♯"

_TIKTOKEN_LINE = re.compile(r"([A-Za-z0-9+/]*={0,2}) (\d+)")
_TIMESTAMP_TOKEN = re.compile(r"<\|\d+\.\d+\|>")


def language_code(language: str) -> str:
    """`"de"` for `"de"`, `"German"`, `"<|de|>"`; raises `UsageError` for a language that Whisper does not know."""
    wanted = language.strip().lower().removeprefix("<|").removesuffix("|>")
    wanted = _OLD_CODES.get(wanted, wanted)
    if wanted in LANGUAGES:
        return wanted
    if wanted in LANGUAGE_CODES:
        return LANGUAGE_CODES[wanted]
    example = "a code such as 'de' or a name such as 'german' is expected."
    raise unknown_name(f"Whisper knows no language '{language}'", wanted, [*LANGUAGE_CODES, *LANGUAGES], example)


def _byte_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for the letters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


_LETTER_OF_BYTE = _byte_letters()
_BYTE_OF_LETTER = {letter: byte for byte, letter in _LETTER_OF_BYTE.items()}


def _spell(token: bytes) -> str:
    return "".join(_LETTER_OF_BYTE[byte] for byte in token)


def _unspell(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_LETTER[letter] for letter in token)
    except KeyError:
        return token.encode()


class WhisperTokenizer:
    """Text to token ids and back, with Whisper's special tokens.

    Made by `from_directory`, `from_tokenizer_file`, `from_vocabulary_and_merges`, `from_tiktoken` or
    `from_vocabulary_list`. Argument and attribute names are those of the `transformers` class; the names of the special
    ids are those of OpenAI's.

    Attributes:
        eot, sot, sot_prev, sot_lm, no_speech, no_timestamps, transcribe, translate: ids of the special tokens.
        timestamp_begin: id of `<|0.00|>`; a timestamp of $t$ seconds is `timestamp_begin + t / 0.02`.
        language, task, predict_timestamps: what `encode` puts in front of a text; see `set_prefix_tokens`.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        backend: tokenizers.Tokenizer | None,
        *,
        special_tokens: Mapping[str, int],
        multilingual: bool | None = None,
        language: str | None = None,
        task: str | None = None,
        predict_timestamps: bool = False,
        spellings: Mapping[str, str] | None = None,
    ) -> None:
        """Use one of the `from_…` constructors.

        Args:
            vocabulary: spelling -> id of every token, special ones included.
            backend: the BPE that encodes, or `None` for a tokenizer that only decodes.
            special_tokens: name -> id of the special tokens; timestamps are not special.
            multilingual: whether language and task tokens are in use; by default, unless the vocabulary is GPT-2's.
            language: code or name of the language in the prefix.
            task: "transcribe" or "translate".
            predict_timestamps: leave `<|notimestamps|>` out of the prefix.
            spellings: British -> American words for `normalize`.
        """
        self._ids = dict(vocabulary)
        self._backend = backend
        self._specials = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self._special_ids = frozenset(self._specials.values())
        self.eot = self._special("<|endoftext|>")
        self.sot = self._special("<|startoftranscript|>")
        self.translate = self._special("<|translate|>")
        self.transcribe = self._special("<|transcribe|>")
        self.sot_lm = self._special("<|startoflm|>")
        self.sot_prev = self._special("<|startofprev|>")
        self.no_speech = self._special("<|nospeech|>", "<|nocaptions|>")
        self.no_timestamps = self._special("<|notimestamps|>")
        self.timestamp_begin = self._ids.get("<|0.00|>", self.no_timestamps + 1)
        self.multilingual = self.eot != 50256 if multilingual is None else multilingual
        self.language: str | None = None
        self.task: str | None = None
        self.predict_timestamps = False
        self._spellings = spellings
        self.set_prefix_tokens(language, task, predict_timestamps)

    def _special(self, *names: str) -> int:
        for name in names:
            if name in self._specials:
                return self._specials[name]
        raise CheckpointError(f"The vocabulary has no token {names[0]}, so it is not one of Whisper's.")

    # ------------------------------------------------------------------------------------------------- reading files

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], **options: Any) -> WhisperTokenizer:
        """The tokenizer among a checkpoint's files, whichever project wrote them.

        Looks for `tokenizer.json`, `vocab.json` with `merges.txt`, `*.tiktoken`, `vocabulary.json` or `vocabulary.txt`.

        Raises:
            SourceError: none of them is there.
            CheckpointError: the file is damaged or not Whisper's.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise SourceError(f"There is no directory '{folder}'.")
        normalizer = folder / "normalizer.json"
        if normalizer.is_file():
            options = {"spellings": _read_json(normalizer)} | options
        config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        for name in ("language", "task", "predict_timestamps"):
            if config.get(name) is not None:
                options = {name: config[name]} | options
        if (folder / "tokenizer.json").is_file():
            return cls.from_tokenizer_file(folder / "tokenizer.json", **options)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return cls.from_vocabulary_and_merges(folder / "vocab.json", folder / "merges.txt", **options)
        for tiktoken in sorted(folder.glob("*.tiktoken")):
            return cls.from_tiktoken(tiktoken, **options)
        for name in ("vocabulary.json", "vocabulary.txt"):
            if (folder / name).is_file():
                return cls.from_vocabulary_list(folder / name, **options)
        raise SourceError(
            f"'{folder}' holds no Whisper tokenizer: none of tokenizer.json, vocab.json with merges.txt, *.tiktoken, "
            "vocabulary.json or vocabulary.txt; copy it there from the checkpoint's repository."
        )

    @classmethod
    def from_tokenizer_file(cls, path: str | os.PathLike[str], **options: Any) -> WhisperTokenizer:
        """From a `tokenizer.json` of the `tokenizers` library."""
        path = Path(path)
        content = _read_json(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as problem:  # the library raises nothing narrower
            raise CheckpointError(f"'{path}' is not a file of the tokenizers library: {problem}.") from None
        specials = {token["content"]: token["id"] for token in content["added_tokens"] if token["special"]}
        return cls(backend.get_vocab(with_added_tokens=True), backend, special_tokens=specials, **options)

    @classmethod
    def from_vocabulary_and_merges(
        cls, vocabulary: str | os.PathLike[str], merges: str | os.PathLike[str], **options: Any
    ) -> WhisperTokenizer:
        """From `vocab.json` and `merges.txt`, with the `added_tokens.json` or `tokenizer_config.json` beside them."""
        vocabulary, merges = Path(vocabulary), Path(merges)
        ids: dict[str, int] = _read_json(vocabulary)
        added: dict[str, int] = {}
        if (file := vocabulary.with_name("added_tokens.json")).is_file():
            added = _read_json(file)
        if (file := vocabulary.with_name("tokenizer_config.json")).is_file():
            decoder = _read_json(file).get("added_tokens_decoder", {})
            added |= {token["content"]: int(index) for index, token in decoder.items()}
        added |= {token: index for token, index in ids.items() if token.startswith("<|") and token.endswith("|>")}
        pairs = []
        for line in _read_text(merges).splitlines():
            if line and not line.startswith("#version"):
                pair = line.split(" ")
                if len(pair) != 2:
                    raise CheckpointError(f"'{merges}' is damaged: the line '{line}' is not a pair of tokens.")
                pairs.append((pair[0], pair[1]))
        try:
            return cls._from_bpe(ids, pairs, added, **options)
        except CheckpointError as problem:
            raise CheckpointError(f"'{vocabulary}' and '{merges}' do not fit Whisper: {problem}") from None

    @classmethod
    def from_tiktoken(
        cls, path: str | os.PathLike[str], num_languages: int | None = None, **options: Any
    ) -> WhisperTokenizer:
        """From OpenAI's `multilingual.tiktoken` or `gpt2.tiktoken`: lines of a base64 token and its rank.

        Args:
            path: the file.
            num_languages: 99, or 100 for large-v3 and turbo: the checkpoint's `n_vocab - 51765 - multilingual`.
            options: see `__init__`.
        """
        path = Path(path)
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(_read_text(path).splitlines(), start=1):
            if line.strip():
                row = _TIKTOKEN_LINE.fullmatch(line.strip())
                if row is None or (len(row[1]) % 4 and row[1] != "="):
                    raise CheckpointError(f"'{path}' is damaged: line {number} is not a base64 token and a rank.")
                ranks[base64.b64decode(row[1])] = int(row[2])
        ids = {_spell(token): rank for token, rank in ranks.items()}
        names = [
            "<|endoftext|>",
            "<|startoftranscript|>",
            *(f"<|{code}|>" for code in list(LANGUAGES)[: 99 if num_languages is None else num_languages]),
            "<|translate|>",
            "<|transcribe|>",
            "<|startoflm|>",
            "<|startofprev|>",
            "<|nospeech|>",
            "<|notimestamps|>",
            *_timestamp_names(),
        ]
        # OpenAI's multilingual file ends with an empty token, spelled "=", that only takes up an id.
        first = max(ranks.values(), default=-1) + 1
        added = {name: first + i for i, name in enumerate(names)}
        return cls._from_bpe(ids, _merges_of_ranks(ranks), added, **options)

    @classmethod
    def from_openai_package(
        cls, multilingual: bool = True, num_languages: int | None = None, **options: Any
    ) -> WhisperTokenizer:
        """From the files inside the installed package `openai-whisper`, which is not imported."""
        package = importlib.util.find_spec("whisper")
        name = "multilingual.tiktoken" if multilingual else "gpt2.tiktoken"
        for folder in (package.submodule_search_locations or []) if package else []:
            if (path := Path(folder, "assets", name)).is_file():
                return cls.from_tiktoken(path, num_languages, multilingual=multilingual, **options)
        raise SourceError(
            f"There is no tokenizer: OpenAI's checkpoints come without one; put {name} from the package openai-whisper "
            "beside the checkpoint, or install that package."
        )

    @classmethod
    def from_vocabulary_list(cls, path: str | os.PathLike[str], **options: Any) -> WhisperTokenizer:
        """From CTranslate2's `vocabulary.txt` (a token a line) or `.json` (a list). It has no merges: decoding only."""
        path = Path(path)
        tokens = _read_json(path) if path.suffix == ".json" else _read_text(path).split("\n")
        if not isinstance(tokens, list):
            raise CheckpointError(f"'{path}' is not a list of tokens.")
        if tokens and not tokens[-1]:
            tokens = tokens[:-1]
        ids = {token: index for index, token in enumerate(tokens)}
        specials = {
            token: index
            for token, index in ids.items()
            if token.startswith("<|") and token.endswith("|>") and not _TIMESTAMP_TOKEN.fullmatch(token)
        }
        return cls(ids, None, special_tokens=specials, **options)

    @classmethod
    def _from_bpe(
        cls, ids: Mapping[str, int], merges: list[tuple[str, str]], added: Mapping[str, int], **options: Any
    ) -> WhisperTokenizer:
        try:
            backend = tokenizers.Tokenizer(models.BPE(vocab=dict(ids), merges=merges))
        except Exception as problem:  # the library raises nothing narrower
            raise CheckpointError(f"the merges do not fit the vocabulary ({problem}).") from None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        missing = sorted((index, token) for token, index in added.items())
        backend.add_tokens(
            [AddedToken(name, normalized=False, special=not _TIMESTAMP_TOKEN.fullmatch(name)) for _, name in missing]
        )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        for index, name in missing:
            if vocabulary[name] != index:
                raise CheckpointError(f"token {name} has id {index} in the files, but {vocabulary[name]} is the next.")
        specials = {name: index for index, name in missing if not _TIMESTAMP_TOKEN.fullmatch(name)}
        return cls(vocabulary, backend, special_tokens=specials, **options)

    # ------------------------------------------------------------------------------------------------ special tokens

    @property
    def vocabulary_size(self) -> int:
        """Ids up to the last timestamp: 51,864 (English), 51,865, 51,866 (100 languages)."""
        return self.timestamp_begin + TIMESTAMPS

    @property
    def num_languages(self) -> int:
        """99, or 100 since large-v3."""
        return len(self.all_language_tokens)

    @cached_property
    def _language_tokens(self) -> dict[str, int]:
        codes = {_OLD_CODES.get(name[2:-2], name[2:-2]): index for name, index in self._specials.items()}
        return {code: index for code, index in codes.items() if code in LANGUAGES}

    @property
    def all_language_tokens(self) -> tuple[int, ...]:
        """Ids of the language tokens, in the order of `all_language_codes`."""
        return tuple(self._language_tokens.values())

    @property
    def all_language_codes(self) -> tuple[str, ...]:
        """ "en", "zh" …, in the order of `all_language_tokens`."""
        return tuple(self._language_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens` skips; timestamps are not among them."""
        return list(self._specials.values())

    def language_token(self, language: str) -> int:
        """Id of `<|de|>` for "de" or "german"."""
        code = language_code(language)
        if code not in self._language_tokens:
            raise UsageError(
                f"This checkpoint has no token for {LANGUAGES[code]} ('{code}'); "
                f"it knows {self.num_languages} languages."
            )
        return self._language_tokens[code]

    def sot_sequence(self, language: str | None = None, task: str | None = None) -> tuple[int, ...]:
        """`<|startoftranscript|> <|language|> <|task|>`; English-only checkpoints have the first alone.

        Args:
            language: code or name; that of the tokenizer, or English, if not given.
            task: "transcribe" (default) or "translate".
        """
        language = language or self.language
        task = task or self.task
        if task is not None and task not in TASKS:
            raise UsageError(f"Whisper has no task '{task}'; choose transcribe or translate.")
        if not self.multilingual:
            if (language is not None and language_code(language) != "en") or task == "translate":
                raise UsageError(
                    f"This checkpoint is English-only: it cannot {task or 'transcribe'} {language or 'english'}; "
                    "use a multilingual one."
                )
            return (self.sot,)
        task_token = self.translate if task == "translate" else self.transcribe
        return (self.sot, self.language_token(language or "en"), task_token)

    @cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Text tokens of what is not spoken (brackets, music notes, speaker dashes …), which decoding suppresses.

        Every symbol counts with and without a space before it, where that is one token. The notes and accidentals
        (U+2669 … U+266F) take several byte tokens; suppressing the first, which they share, covers them all. A hyphen
        or an apostrophe is fine inside a word, but not at its start.
        """
        suppressed = {self.encode_ordinary(" -")[0], self.encode_ordinary(" '")[0]}
        for symbol in [*_SINGLE_SYMBOLS, *_DOUBLED_SYMBOLS.split(), *_NOTES]:
            for text in (symbol, " " + symbol):
                tokens = self.encode_ordinary(text)
                if len(tokens) == 1 or symbol in _NOTES:
                    suppressed.add(tokens[0])
        return tuple(sorted(suppressed))

    def set_prefix_tokens(
        self, language: str | None = None, task: str | None = None, predict_timestamps: bool | None = None
    ) -> None:
        """Change what `encode` puts in front of a text; what is not given stays."""
        if language is not None:
            code = language_code(language)
            self.language_token(code)
            self.language = code
        if task is not None:
            if task not in TASKS:
                raise UsageError(f"Whisper has no task '{task}'; choose transcribe or translate.")
            self.task = task
        if predict_timestamps is not None:
            self.predict_timestamps = predict_timestamps

    @property
    def prefix_tokens(self) -> list[int]:
        """`<|startoftranscript|>`, then language, task and `<|notimestamps|>` as set by `set_prefix_tokens`."""
        prefix = [self.sot]
        if self.language is not None:
            prefix.append(self.language_token(self.language))
        if self.task is not None:
            prefix.append(self.translate if self.task == "translate" else self.transcribe)
        if not self.predict_timestamps:
            prefix.append(self.no_timestamps)
        return prefix

    def get_decoder_prompt_ids(
        self, task: str | None = None, language: str | None = None, no_timestamps: bool = True
    ) -> list[tuple[int, int]]:
        """`(position, id)` of the prefix after `<|startoftranscript|>`; sets the prefix, as in `transformers`."""
        self.set_prefix_tokens(language, task, not no_timestamps)
        return list(enumerate(self.prefix_tokens[1:], start=1))

    def get_prompt_ids(self, text: str) -> np.ndarray:
        """`<|startofprev|>` and the tokens of a prompt, int64 `(length,)`, for `generate(prompt_ids=…)`."""
        tokens = self.encode(" " + text.strip(), add_special_tokens=False)
        for token in tokens:
            if token in self._special_ids:
                raise UsageError(f"A prompt cannot contain the special token {self.convert_ids_to_tokens(token)}.")
        return np.array([self.sot_prev, *tokens], np.int64)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token as the vocabulary spells it (`"Ġthe"`, `"<|en|>"`, `"<|1.20|>"`), or a list of ids."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if _TIMESTAMP_TOKEN.fullmatch(tokens):
            steps = float(tokens[2:-2]) / TIMESTAMP_SECONDS
            if abs(steps - round(steps)) < 1e-6 and round(steps) < TIMESTAMPS:
                return self.timestamp_begin + round(steps)
        return self._ids.get(tokens, self.eot)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Spelling of an id in the vocabulary, or a list of them."""
        if not isinstance(ids, int | np.integer):
            return [self.convert_ids_to_tokens(token) for token in ids]
        if self.timestamp_begin <= ids < self.vocabulary_size:
            return _timestamp_name(int(ids) - self.timestamp_begin)
        return self._names.get(int(ids))

    @cached_property
    def _names(self) -> dict[int, str]:
        return {index: token for token, index in self._ids.items()}

    # ------------------------------------------------------------------------------------------------------ encoding

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: names of special tokens in it ("<|en|>") become those tokens; see `encode_ordinary`.
            add_special_tokens: put `prefix_tokens` before and `<|endoftext|>` after it.
        """
        ids = tokens_of(self._encoder, text)
        return [*self.prefix_tokens, *ids, self.eot] if add_special_tokens else ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special: "<|en|>" is spelled out. Nothing is added."""
        return tokens_of(self._ordinary_encoder, text)

    @property
    def _encoder(self) -> tokenizers.Tokenizer:
        if self._backend is None:
            raise UsageError(
                "This tokenizer was read from a bare vocabulary list and can only decode; "
                "encoding needs tokenizer.json, or vocab.json with merges.txt."
            )
        return self._backend

    @cached_property
    def _ordinary_encoder(self) -> tokenizers.Tokenizer:
        content = json.loads(self._encoder.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": [], "post_processor": None}))

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, padding: bool = False
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` of one text or of several, as lists.

        With `padding`, shorter ones are filled up with `<|endoftext|>` and the results are int64 arrays
        `(batch, length)`.
        """
        if isinstance(text, str) and not padding:
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = [self.encode(item, add_special_tokens) for item in ([text] if isinstance(text, str) else text)]
        if not padding:
            return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        length = max(map(len, rows))
        return {
            "input_ids": np.array([row + [self.eot] * (length - len(row)) for row in rows], np.int64),
            "attention_mask": np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64),
        }

    # ------------------------------------------------------------------------------------------------------ decoding

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of every id; timestamps are spelled out, also where the files leave them to arithmetic."""
        pieces = [b""] * max(self.vocabulary_size, max(self._ids.values()) + 1)
        for token, index in self._ids.items():
            pieces[index] = token.encode() if token in self._specials else _unspell(token)
        for step, name in enumerate(_timestamp_names()):
            pieces[self.timestamp_begin + step] = name.encode()
        return pieces

    def _text(self, ids: Iterable[int]) -> str:
        pieces = self._bytes
        return b"".join(pieces[i] for i in ids if i < len(pieces)).decode("utf-8", errors="replace")

    def is_timestamp(self, token: int) -> bool:
        """Whether an id is one of `<|0.00|>` … `<|30.00|>`."""
        return token >= self.timestamp_begin

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        *,
        decode_with_timestamps: bool = False,
        output_offsets: bool = False,
        time_precision: float = TIMESTAMP_SECONDS,
        normalize: bool = False,
        basic_normalize: bool = False,
        remove_diacritics: bool = False,
    ) -> Any:
        """The text of a sequence of ids.

        Args:
            token_ids: list or array `(length,)`.
            skip_special_tokens: leave out special tokens, and a prompt (`<|startofprev|>` …) with its text.
            decode_with_timestamps: keep timestamps, as `<|1.20|>`; they count on from one 30 s window to the next.
            output_offsets: return `{"text": …, "offsets": [{"text": …, "timestamp": (start, end)}, …]}`.
            time_precision: seconds between two timestamp tokens.
            normalize: apply the English text normaliser.
            basic_normalize: apply the normaliser for any language.
            remove_diacritics: also strip accents in `basic_normalize`.
        """
        ids = self._id_list(token_ids)
        kept = ids
        if skip_special_tokens and ids[:1] == [self.sot_prev]:
            kept = ids[ids.index(self.sot) :] if self.sot in ids else []
        if decode_with_timestamps:
            text = self._text_with_timestamps(kept, skip_special_tokens, time_precision)
        elif normalize or basic_normalize:  # timestamps are among the bracketed remarks that normalisers drop
            skipped = self._special_ids if skip_special_tokens else ()
            text = self._text(i for i in kept if i not in skipped)
            text = self.normalize(text) if normalize else self.basic_normalize(text, remove_diacritics)
        else:
            text = self._plain(kept, skip_special_tokens)
        if output_offsets:
            return {"text": text, "offsets": self._offsets(ids, time_precision)}
        return text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[Any]:
        """`decode` of every row; prompts are left out too, which the batch method of transformers 5.23 forgets."""
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]

    def decode_with_timestamps(self, token_ids: Any) -> str:
        """Every token as it is spelled, special tokens and timestamps included; timestamps are not added up."""
        return self._text(self._id_list(token_ids))

    @staticmethod
    def _id_list(token_ids: Any) -> list[int]:
        array = np.asarray(token_ids)
        if array.ndim == 0:
            array = array[None]
        if array.ndim != 1:
            raise UsageError(f"Can decode one sequence at a time, not shape {array.shape}; see batch_decode.")
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"Token ids are integers, not {array.dtype}.")
        if array.size and array.min() < 0:
            raise UsageError(f"Token id {array.min()} is negative; replace the ids of ignored labels before decoding.")
        ids: list[int] = array.tolist()
        return ids

    def _plain(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        """The text without timestamps. A character whose bytes a timestamp parts stays broken, as in `transformers`."""
        skipped = self._special_ids if skip_special_tokens else ()
        runs = groupby((i for i in ids if i not in skipped), key=self.is_timestamp)
        return "".join(self._text(run) for is_timestamp, run in runs if not is_timestamp)

    def _text_with_timestamps(self, ids: list[int], skip_special_tokens: bool, time_precision: float) -> str:
        r"""Times count on across windows: a time smaller than the one before it begins a new window.

        A window that ended in one timestamp ran its whole 30 s. One that ended in a pair was cut at the first of the
        two, and the next window starts there, so the second of the pair and what follows it are dropped.
        """
        parts: list[str | list[int]] = [[]]
        passed = latest = before = 0.0
        for i, token in enumerate(ids):
            if not self.is_timestamp(token):
                last = parts[-1]
                assert isinstance(last, list)
                last.append(token)
                continue
            time = float((token - self.timestamp_begin) * time_precision)
            if time < latest:
                ended_in_pair = i < 2 or (self.is_timestamp(ids[i - 1]) and self.is_timestamp(ids[i - 2]))
                if ended_in_pair:
                    passed += before
                    latest = before
                    del parts[-2:]
                else:
                    passed += time_precision * _WINDOW_POSITIONS
            before, latest = latest, time
            parts += [f"<|{time + passed:.2f}|>", []]
        return "".join(part if isinstance(part, str) else self._plain(part, skip_special_tokens) for part in parts)

    def _offsets(self, ids: list[int], time_precision: float) -> list[dict[str, Any]]:
        """Segments between timestamps, with times that count on across windows."""
        stamped = [self.is_timestamp(token) for token in ids]
        ends = [i + 1 for i in range(len(ids) - 1) if stamped[i] and stamped[i + 1]]
        if not ends and sum(stamped) <= 1:
            return []
        final = max(i for i, is_stamp in enumerate(stamped) if is_stamp) + 1
        if final not in ends:
            ends.append(final)
        begin = stamped.index(True)
        offsets, passed, latest = [], 0, 0
        for end in ends:
            segment = ids[begin:end]
            if len(segment) > 1:
                first, last = segment[0] - self.timestamp_begin, segment[-1] - self.timestamp_begin
                if first < latest:
                    ended_in_pair = begin < 2 or (stamped[begin - 2] and stamped[begin - 1])
                    passed += latest if ended_in_pair else _WINDOW_POSITIONS
                latest = last
                offsets.append(
                    {
                        "text": self._plain(segment, skip_special_tokens=False),
                        "timestamp": (
                            first * time_precision + passed * time_precision,
                            last * time_precision + passed * time_precision,
                        ),
                    }
                )
            begin = end
        return offsets

    def normalize(self, text: str) -> str:
        """The English normaliser of the paper's appendix C, with the checkpoint's spelling table."""
        return EnglishTextNormalizer(self._spellings)(text)

    @staticmethod
    def basic_normalize(text: str, remove_diacritics: bool = False) -> str:
        """The paper's normaliser for other languages."""
        return BasicTextNormalizer(remove_diacritics=remove_diacritics)(text)

    # --------------------------------------------------------------------------------------------------------- words

    def split_to_word_tokens(
        self, tokens: Sequence[int], language: str | None = None
    ) -> tuple[list[str], list[list[int]]]:
        """Words and their tokens, for word timestamps.

        Args:
            tokens: ids `(length,)`.
            language: code; that of the tokenizer if not given. Chinese, Japanese, Thai, Lao, Burmese and Cantonese are
                split at every character, other languages before spaces, punctuation and special tokens.
        """
        code = language_code(language) if language is not None else self.language
        if code in WITHOUT_SPACES:
            return self.split_tokens_on_unicode(tokens)
        return self.split_tokens_on_spaces(tokens)

    def split_tokens_on_unicode(self, tokens: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """The shortest runs of tokens that decode to whole characters.

        U+FFFD in a run means that its last character is not complete yet, unless the whole text has it there too.
        """
        whole = self._text(tokens)
        pieces: list[str] = []
        groups: list[list[int]] = []
        group: list[int] = []
        position = 0
        for token in tokens:
            group.append(int(token))
            piece = self._text(group)
            broken = piece.find("\ufffd")
            if broken < 0 or whole[position + broken : position + broken + 1] == "\ufffd":
                pieces.append(piece)
                groups.append(group)
                group = []
                position += len(piece)
        return pieces, groups

    def split_tokens_on_spaces(self, tokens: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """Runs of tokens that begin with a space, or that are punctuation or a special token."""
        words: list[str] = []
        groups: list[list[int]] = []
        for piece, group in zip(*self.split_tokens_on_unicode(tokens), strict=True):
            alone = group[0] >= self.eot or piece.startswith(" ") or piece.strip() in string.punctuation
            if alone or not words:
                words.append(piece)
                groups.append(list(group))
            else:
                words[-1] += piece
                groups[-1] += group
        return words, groups

    # -------------------------------------------------------------------------------------------------------- saving

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `transformers` and `from_directory` read; each is renamed into place when complete.

        `tokenizer.json`, `vocab.json`, `merges.txt`, `added_tokens.json`, `normalizer.json`, `special_tokens_map.json`
        and `tokenizer_config.json`; a tokenizer that can only decode writes `vocabulary.json`.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self._backend is None:
            _write(folder / "vocabulary.json", json.dumps([self._names[i] for i in range(len(self._names))]))
            return
        names = self._specials
        prefix = self.convert_ids_to_tokens(self.prefix_tokens)
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix, "$A", "<|endoftext|>"]),
            pair=" ".join([*prefix, "$A", "$B:1", "<|endoftext|>:1"]),
            special_tokens=[(name, names[name]) for name in dict.fromkeys([*prefix, "<|endoftext|>"])],
        )
        content = json.loads(backend.to_str())
        added = {token["content"]: token for token in content["added_tokens"]}
        base = content["model"]["vocab"]
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]]
        end = "<|endoftext|>"
        common = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}
        config = common | {
            "tokenizer_class": "WhisperTokenizer",
            "add_prefix_space": False,
            "additional_special_tokens": list(names),
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 1024,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in sorted(added.values(), key=lambda token: token["id"])
            },
        }
        for name in ("language", "task"):
            if getattr(self, name) is not None:
                config[name] = getattr(self, name)
        if self.predict_timestamps:
            config["predict_timestamps"] = True
        _write(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
        _write(folder / "vocab.json", json.dumps(base, ensure_ascii=False))
        _write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pairs))
        _write(folder / "added_tokens.json", _pretty({n: t["id"] for n, t in added.items() if n not in base}))
        _write(folder / "special_tokens_map.json", _pretty(common | {"additional_special_tokens": list(names)}))
        _write(folder / "tokenizer_config.json", _pretty(config))
        _write(folder / "normalizer.json", _pretty(self._spellings or english_spellings()))


def _timestamp_name(step: int) -> str:
    return f"<|{step * TIMESTAMP_SECONDS:.2f}|>"


def _timestamp_names() -> list[str]:
    return [_timestamp_name(step) for step in range(TIMESTAMPS)]


def _merges_of_ranks(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The merge that made each token: its bytes, merged by the tokens that rank before it, end as two parts."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(candidates)
            if best >= rank:
                break
            i = candidates.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((_spell(parts[0]), _spell(parts[1])))
    return merges


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise SourceError(f"There is no file '{path}'.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"'{path}' is not a UTF-8 text file.") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as problem:
        raise CheckpointError(f"'{path}' is not valid JSON ({problem}); it may be truncated.") from None


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
