"""MMS's processor: wav2vec 2.0's, with a vocabulary for each language; and the aligner's romanised alphabet."""

from __future__ import annotations

import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

from audiozoo.errors import SourceError, UsageError
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2Processor


@lru_cache(maxsize=1)
def _uroman() -> Any:
    try:
        import uroman
    except ImportError:
        raise UsageError(
            "The aligner reads romanised text, and this text has other characters; pip install uroman, "
            "or romanise it beforehand."
        ) from None
    return uroman.Uroman()


def romanised(word: str, language: str | None = None) -> str:
    """§3.1: a word in the aligner's alphabet: Latin letters of any language's sounds, and the apostrophe.

    Args:
        word: in any script.
        language: ISO 639-3 code, where it decides how a script is read.
    """
    word = unicodedata.normalize("NFC", word).replace("’", "'")
    if not word.isascii():
        word = str(_uroman().romanize_string(word, lcode=language))
    return re.sub(r"[^a-z']", "", word.lower())


class AlignmentTokenizer(Wav2Vec2CTCTokenizer):
    """§3.1: the alphabet of the aligner, from its `dictionary.txt`; words are romanised, nothing stands between them.

    Args:
        dictionary: a token a line, in the order of the model's outputs; `<blank>` is CTC's.
        language: ISO 639-3 code of the texts.

    Raises:
        SourceError: if there is no such file, or no `<blank>` in it.
    """

    def __init__(self, dictionary: str | os.PathLike[str], language: str | None = None) -> None:
        path = Path(dictionary)
        if not path.is_file():
            raise SourceError(f"There is no file {path}.")
        tokens = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if "<blank>" not in tokens:
            raise SourceError(f"{path} has no <blank>, so it is no dictionary of the aligner.")
        vocabulary = {token: index for index, token in enumerate(tokens)}
        names = [name if name in vocabulary else None for name in ("<s>", "</s>")]
        super().__init__(
            vocabulary, pad_token="<blank>", bos_token=names[0], eos_token=names[1], word_delimiter_token=None
        )
        self.language = language

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `dictionary.txt`, and for `transformers`, which romanises nothing, `vocab.json`."""
        super().save(directory)
        (Path(directory) / "dictionary.txt").write_text("\n".join(self.tokens()) + "\n", encoding="utf-8")

    def set_target_lang(self, target_lang: str) -> None:
        """The language of the texts; any, for it only says how a script is read."""
        self.language = target_lang

    def word_ids(self, word: str) -> list[int]:
        """The letters of one word, romanised."""
        return [self.encoder[letter] for letter in romanised(word, self.language) if letter in self.encoder]


class MMSProcessor(Wav2Vec2Processor):
    """wav2vec 2.0's processor, with nested vocabularies or, beside a `dictionary.txt`, the aligner's alphabet."""
