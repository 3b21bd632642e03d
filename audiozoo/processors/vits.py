"""Text to a voice's symbols: Hugging Face's and MMS' characters, the VITS authors' and Piper's phonemes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import check_return_tensors, read_json, read_vocabulary, settings_of, write_json
from audiozoo.text import phonemes
from audiozoo.text.sentences import pieces, sentences

# The symbols of the authors' English voices: padding, punctuation, letters, phonemes.
AUTHORS_SYMBOLS = (
    "_"
    ';:,.!?¡¿—…"«»“” '
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'̩'ᵻ"
)
# Arguments of `VitsTokenizer`, in `tokenizer_config.json`.
_SETTINGS = ("language", "add_blank", "normalize", "phonemize", "is_uroman", "pad_token", "unk_token")
_BLOCK = re.compile(r"\[\[(.*?)\]\]")  # phonemes in the midst of a text of Piper's
_GIVEN_PHONEMES = ("hebrew", "japanese", "thai")  # of espeak's letters, each with an id of its own
LONGEST = 600  # characters of a sentence that is said at once; what attention needs grows with the square


@lru_cache(maxsize=1)
def _uroman() -> Any:
    try:
        import uroman
    except ImportError:
        raise UsageError(
            "This voice reads romanised text, and the text has other characters; pip install uroman, "
            "or romanise it beforehand."
        ) from None
    return uroman.Uroman()


class VitsTokenizer:
    """Characters or phonemes as `transformers.VitsTokenizer` reads them; the arguments are its.

    Args:
        vocabulary: id of each symbol.
        language: ISO 639-3 code, of MMS' voices.
        add_blank: put symbol 0 between all symbols and at both ends.
        normalize: lower the case and drop what the vocabulary does not have.
        phonemize: read the text as phonemes of American English.
        is_uroman: romanise what is not ASCII.
        pad_token: symbol that pads a batch.
        unk_token: symbol for what the vocabulary does not have.
        cuts_special: whether these two are tokens of their own in a text, as in Hugging Face's directories.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        language: str | None = None,
        add_blank: bool = True,
        normalize: bool = True,
        phonemize: bool = True,
        is_uroman: bool = False,
        pad_token: str | None = "<pad>",
        unk_token: str | None = "<unk>",
        cuts_special: bool = True,
    ):
        self.vocabulary = dict(vocabulary)
        # Special tokens that the vocabulary lacks come after it.
        self.added: dict[str, int] = {}
        for token in (unk_token, pad_token):
            if token is not None and token not in self.vocabulary and token not in self.added:
                self.added[token] = len(self.vocabulary) + len(self.added)
        self.symbols = {index: symbol for symbol, index in (self.vocabulary | self.added).items()}
        self.language, self.add_blank, self.normalize = language, add_blank, normalize
        self.phonemize, self.is_uroman = phonemize, is_uroman
        self.pad_token, self.unk_token, self.cuts_special = pad_token, unk_token, cuts_special

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> VitsTokenizer:
        """From `vocab.json` and `tokenizer_config.json`, MMS' `vocab.txt`, or the authors' fixed symbols."""
        folder = Path(directory)
        if (folder / "vocab.json").is_file():
            config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
            options = {name: config[name] for name in (*_SETTINGS, "cuts_special") if name in config}
            for name in ("pad_token", "unk_token"):
                if isinstance(options.get(name), dict):
                    options[name] = options[name].get("content")
            return cls(read_vocabulary(folder / "vocab.json"), **settings_of(cls, options, folder))
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        data = config.get("data", {})
        blank = bool(data.get("add_blank", True))
        if (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
            symbols = lines[:-1] if lines[-1] == "" else lines
            uroman = str(data.get("training_files", "")).split(".")[-1] == "uroman"
            vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
            return cls(
                vocabulary,
                language="ron" if folder.resolve().name == "ron" else None,  # MMS' directories are named so
                add_blank=blank,
                phonemize=False,
                is_uroman=uroman,
                pad_token=symbols[0],
                unk_token=None,
                cuts_special=False,
            )
        if "text_cleaners" in data:
            vocabulary = {symbol: index for index, symbol in enumerate(AUTHORS_SYMBOLS)}
            return cls(vocabulary, add_blank=blank, phonemize=True, pad_token="_", unk_token=None, cuts_special=False)
        raise SourceError(f"'{folder}' holds no vocab.json, vocab.txt or .onnx.json, so its symbols are not known.")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `tokenizer_config.json` as `transformers` does."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", dict(sorted(self.vocabulary.items())))
        settings = {name: getattr(self, name) for name in _SETTINGS} | {"tokenizer_class": "VitsTokenizer"}
        if not self.cuts_special:
            settings["cuts_special"] = False  # read here alone
        write_json(folder / "tokenizer_config.json", settings)

    def _lowered(self, text: str) -> str:
        """Lower case, but for what is a symbol as it stands."""
        known = [*self.vocabulary, *self.added]
        result, position = "", 0
        while position < len(text):
            found = next((symbol for symbol in known if symbol and text.startswith(symbol, position)), None)
            result += text[position].lower() if found is None else found
            position += len(found or " ")
        return result

    def prepare(self, text: str, normalize: bool | None = None) -> str:
        """The text as it is cut into symbols: lowered, romanised, read as phonemes, as the voice wants it.

        Raises:
            UsageError: if the romaniser is missing.
            PhonemizerMissingError: if espeak-ng is missing.
        """
        normalize = self.normalize if normalize is None else normalize
        if normalize:
            text = self._lowered(text)
        if self.language == "ron":
            text = text.replace("ț", "ţ")
        if self.is_uroman and not text.isascii():
            text = str(_uroman().romanize_string(text))
        if self.phonemize:
            return phonemes.phonemize(text, "en-us")
        if normalize:
            text = "".join(c for c in text if c in self.vocabulary).strip()
        return text

    def encode(self, prepared: str) -> list[int]:
        """Ids of a prepared text.

        In Hugging Face's directories the token for padding is cut out first, even where it is a letter (MMS' English
        voice pads with k): no blank stands between it and the text's end, or another one.

        Raises:
            UsageError: for a symbol that the voice does not have and has no token for.
        """
        if not self.cuts_special:
            return self._ids(prepared)
        special = "|".join(re.escape(token) for token in (self.unk_token, self.pad_token) if token)
        pieces = re.split(f"({special})", prepared) if special else [prepared]
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append((self.vocabulary | self.added)[piece])
            elif piece:
                ids += self._ids(piece)
        return ids

    def _ids(self, prepared: str) -> list[int]:
        ids = []
        for symbol in prepared:
            index = self.vocabulary.get(symbol)
            if index is None:
                if self.unk_token is None:
                    if self.phonemize:
                        continue
                    raise UsageError(f"This voice has no symbol {symbol!r}.")
                index = (self.vocabulary | self.added)[self.unk_token]
            ids.append(index)
        return _interspersed(ids) if self.add_blank else ids

    def sentences(self, text: str) -> list[tuple[str, list[int]]]:
        """The sentences of a text, each with its ids; those without a symbol are left out."""
        said = [piece for sentence in sentences(text) for piece in pieces(sentence, LONGEST)]
        found = [(piece, self.encode(self.prepare(piece))) for piece in said]
        return [(piece, ids) for piece, ids in found if len(ids) > int(self.add_blank)]

    def decode(self, ids: Sequence[int]) -> str:
        """The symbols of ids, without the blanks between."""
        kept = list(ids)[1::2] if self.add_blank and len(ids) > 1 else list(ids)
        return "".join(self.symbols.get(int(index), "") for index in kept)

    @property
    def pad_token_id(self) -> int:
        """What pads a batch."""
        return (self.vocabulary | self.added).get(self.pad_token or "", 0)


def _interspersed(ids: Sequence[int], blank: int = 0) -> list[int]:
    result = [blank] * (2 * len(ids) + 1)
    result[1::2] = ids
    return result


class PiperTokenizer:
    """Piper's phonemes: `^ _ p _ p _ … $`, each phoneme followed by a blank; unknown ones are skipped.

    Piper marks the vowels of an Arabic text before it reads it; here they must stand in the text.

    Args:
        phoneme_ids: ids of each phoneme, from the `.onnx.json`.
        voice: espeak-ng's name of the language.
        phoneme_type: "espeak"; "text" for voices that read characters; or one of those whose phonemes must be given,
            because nothing here makes them of a text: "hebrew", "japanese" and "thai".
        phoneme_map: phonemes to be replaced, each by several.
        vowel_clusters: phonemes that have one id where they follow one another, as those of a diphthong.
    """

    def __init__(
        self,
        phoneme_ids: Mapping[str, Sequence[int]],
        voice: str = "en-us",
        phoneme_type: str = "espeak",
        phoneme_map: Mapping[str, Sequence[str]] | None = None,
        vowel_clusters: Sequence[Sequence[str]] | None = None,
    ):
        for mark in ("_", "^", "$"):
            if not phoneme_ids.get(mark):
                raise CheckpointError(f"The voice's phoneme_id_map has no {mark!r}.")
        if phoneme_type not in ("espeak", "text", *_GIVEN_PHONEMES):
            raise CheckpointError(
                f"This voice reads phonemes of the kind '{phoneme_type}'; audiozoo makes those of espeak, or takes ids."
            )
        self.phoneme_ids = {phoneme: list(ids) for phoneme, ids in phoneme_ids.items()}
        self.symbols = {ids[0]: phoneme for phoneme, ids in self.phoneme_ids.items() if len(ids) == 1}
        self.voice, self.phoneme_type, self.phoneme_map = voice, phoneme_type, dict(phoneme_map or {})
        self.vowel_clusters = [list(cluster) for cluster in vowel_clusters or ()]
        longest_first = sorted(map("".join, self.vowel_clusters), key=len, reverse=True)
        self._phoneme = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)
        self.pad_token_id = self.phoneme_ids["_"][0]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> PiperTokenizer:
        """From a voice's `.onnx.json`."""
        config = read_json(Path(path))
        if not isinstance(config.get("phoneme_id_map"), dict):
            raise CheckpointError(f"'{path}' holds no phoneme_id_map, so it is no Piper voice's.")
        voice = config.get("espeak", {}).get("voice", "en-us")
        kind = config.get("phoneme_type", "espeak")
        return cls(config["phoneme_id_map"], voice, kind, config.get("phoneme_map"), config.get("vowel_clusters"))

    def save(self, directory: str | os.PathLike[str], **voices: Any) -> None:
        """Write `voice.onnx.json`: what is read of it here, and what it says of its `voices`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "phoneme_type": self.phoneme_type,
            "espeak": {"voice": self.voice},
            "phoneme_map": self.phoneme_map,
        }
        config |= {"phoneme_id_map": self.phoneme_ids, "vowel_clusters": self.vowel_clusters}
        write_json(folder / "voice.onnx.json", config | voices)

    def prepare(self, text: str, normalize: bool | None = None) -> str:
        """The phonemes of a text, all sentences of it."""
        if self.phoneme_type == "text":
            return unicodedata.normalize("NFD", text)
        return " ".join(self._spoken(text))

    def _spoken(self, text: str) -> list[str]:
        """The phonemes of each sentence. `[[ … ]]` in a text holds phonemes, which belong to the sentence before."""
        if self.phoneme_type in _GIVEN_PHONEMES:
            raise UsageError(
                f"This voice reads phonemes of the kind '{self.phoneme_type}', which audiozoo cannot make of a text: "
                "give the phonemes or input_ids instead."
            )
        parts = _BLOCK.split(text)  # texts, and a block between each two
        found = phonemes.sentences(parts[0], self.voice)
        for index in range(1, len(parts), 2):
            before, block, after = parts[index - 1 : index + 2]
            lead, trail = " " * before.endswith(" "), " " * after.startswith(" ")
            first, *others = phonemes.sentences(after, self.voice) or [""]
            found[-1:] = ["".join([*found[-1:], lead, block.strip(), trail, first]), *others]
        return found

    def encode(self, prepared: str) -> list[int]:
        """Ids of phonemes, with the marks for the beginning and the end."""
        ids = [*self.phoneme_ids["^"], self.pad_token_id]
        for phoneme in self._phoneme.findall(unicodedata.normalize("NFD", prepared)):
            for replaced in self.phoneme_map.get(phoneme, (phoneme,)):
                if replaced in self.phoneme_ids:
                    ids += [*self.phoneme_ids[replaced], self.pad_token_id]
        return ids + self.phoneme_ids["$"]

    def sentences(self, text: str) -> list[tuple[str, list[int]]]:
        """The sentences of a text, each with its ids; espeak-ng says where a sentence ends."""
        written = sentences(text)
        if max(map(len, written), default=0) > LONGEST:
            said = (piece for sentence in written for piece in pieces(sentence, LONGEST))
            return [row for piece in said for row in self.sentences(piece)]
        if self.phoneme_type == "text":
            spoken = [self.prepare(sentence) for sentence in written]
        else:
            spoken = self._spoken(text)
            # An abbreviation ends a sentence for espeak-ng and not here; then the phonemes have to do.
            written = written if len(written) == len(spoken) else spoken
        found = zip(written, spoken, strict=True)
        return [(sentence, self.encode(prepared)) for sentence, prepared in found if prepared.strip()]

    def decode(self, ids: Sequence[int]) -> str:
        """The phonemes of ids, without blanks and marks."""
        dropped = {self.pad_token_id, *self.phoneme_ids["^"], *self.phoneme_ids["$"]}
        return "".join(self.symbols.get(int(index), "") for index in ids if int(index) not in dropped)


class VitsProcessor:
    """A voice's front end: text, phonemes or nothing but ids to the model's inputs.

    Args:
        tokenizer: of the voice.
        speakers: numbers of the speakers that have names.
        default_speaker: number of the one that speaks if none is asked for.
    """

    def __init__(
        self,
        tokenizer: VitsTokenizer | PiperTokenizer,
        speakers: Mapping[str, int] | None = None,
        default_speaker: int = 0,
    ):
        self.tokenizer, self.speakers, self.default_speaker = tokenizer, dict(speakers or {}), default_speaker

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> VitsProcessor:
        """From what lies beside a checkpoint: `vocab.json`, `vocab.txt`, the authors' `config.json`, `*.onnx.json`.

        Raises:
            SourceError: if there is none of them.
            CheckpointError: if there are several voices.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise SourceError(f"There is no directory '{folder}'.")
        if (folder / "vocab.json").is_file():
            return cls(VitsTokenizer.from_directory(folder))
        voices = sorted(folder.glob("*.onnx.json"))
        if len(voices) > 1:
            names = ", ".join(path.name for path in voices)
            raise CheckpointError(f"'{folder}' holds several voices ({names}); give each a directory of its own.")
        if voices:
            return cls.from_piper(voices[0])
        if (folder / "config.json").is_file() and "phoneme_id_map" in read_json(folder / "config.json"):
            return cls.from_piper(folder / "config.json")
        return cls(VitsTokenizer.from_directory(folder))

    @classmethod
    def from_piper(cls, path: str | os.PathLike[str]) -> VitsProcessor:
        """From a voice's `.onnx.json`, or the `config.json` of its training."""
        config = read_json(Path(path))
        return cls(PiperTokenizer.from_file(path), config.get("speaker_id_map"), config.get("default_speaker_id") or 0)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` reads: Hugging Face's, or Piper's."""
        if isinstance(self.tokenizer, PiperTokenizer):
            self.tokenizer.save(directory, speaker_id_map=self.speakers, default_speaker_id=self.default_speaker)
        else:
            self.tokenizer.save(directory)

    def symbol(self, index: int) -> str:
        """The symbol of an id; empty for one that has none."""
        return self.tokenizer.symbols.get(int(index), "")

    def sentences(self, text: str, *, is_phonemes: bool = False) -> list[tuple[str, list[int]]]:
        """The sentences of a text, or of phonemes, each with its ids.

        Raises:
            UsageError: if there is nothing to say.
            PhonemizerMissingError: if the voice reads phonemes and espeak-ng is not installed.
        """
        if is_phonemes:
            found = [(sentence, self.tokenizer.encode(sentence)) for sentence in sentences(text)]
        else:
            found = self.tokenizer.sentences(text)
        if not found:
            raise UsageError("There is nothing to say: the text has no symbol that this voice knows.")
        return found

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        is_phonemes: bool = False,
        normalize: bool | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Ids of a text or of several, padded to one length.

        Args:
            text: one text or a list of them.
            is_phonemes: whether they are phonemes already.
            normalize: lower the case and drop unknown characters; the voice's setting if not given.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `input_ids` and `attention_mask`, int32 `(batch, time)`.

        Raises:
            UsageError: if there is no text.
            PhonemizerMissingError: if the voice reads phonemes and espeak-ng is not installed.
        """
        check_return_tensors(return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise UsageError("There is no text.")
        rows = []
        for one in texts:
            if not isinstance(one, str):
                raise UsageError(f"A text is a string, not a {type(one).__name__}.")
            rows.append(self.tokenizer.encode(one if is_phonemes else self.tokenizer.prepare(one, normalize)))
        length = max(1, *(len(row) for row in rows)) if rows else 1
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def batch_decode(self, ids: Any) -> list[str]:
        """The symbols of each row of ids, blanks left out."""
        return [self.tokenizer.decode(row) for row in np.asarray(ids)]

    def decode(self, ids: Sequence[int]) -> str:
        """The symbols of ids, blanks left out."""
        return self.tokenizer.decode(ids)
