"""Text to phonemes in the international phonetic alphabet, by espeak-ng where it is installed.

Voices are trained on phonemes, so most texts need this step; phonemes or their ids can always be given instead. The
library espeak-ng comes in the wheel `espeakng-loader`; it is loaded through its C interface when it is first asked for.
(It is under the GPL, version 3 or later: it is for users to install, and no part of audiozoo.)
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import unicodedata
from functools import lru_cache
from typing import Any

from audiozoo.errors import AudiozooError, UsageError

# What espeak-ng's C interface calls these.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_PHONEMES_IPA = 0x02

_LANGUAGE_SWITCH = re.compile(r"\([^)]+\)")  # "(en)" around words of another language
_PUNCTUATION = re.compile(r"""[;:,.!?¡¿—…"«»“”(){}\[\]]+""")
# The run of marks that ended a clause, maybe before a closing quotation mark.
_CLAUSE_END = re.compile(r"""([.!?,;:…—–。！？，；：]+)["'”’»)\]]*\s*$""")
_MARKS = {"…": "", "—": ";", "–": ";", "。": ".", "！": "!", "？": "?", "，": ",", "；": ";", "：": ":"}


class PhonemizerMissingError(AudiozooError, ImportError):
    """Text cannot be turned into phonemes, because no espeak-ng is installed."""


class Espeak:
    """The espeak-ng library.

    Raises:
        PhonemizerMissingError: if it is not installed.
    """

    def __init__(self) -> None:
        library, data = _find()
        try:
            self._library = ctypes.CDLL(library)
        except OSError as problem:
            raise PhonemizerMissingError(f"The espeak-ng library '{library}' cannot be loaded ({problem}).") from None
        initialize = self._library.espeak_Initialize
        initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        path = None if data is None else os.fsencode(data)
        if initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, path, _INITIALIZE_DONT_EXIT) < 0:
            raise PhonemizerMissingError(f"The espeak-ng library '{library}' does not find its data in '{data}'.")
        self._convert = self._library.espeak_TextToPhonemes
        self._convert.restype = ctypes.c_char_p
        self._convert.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
        self._voice = ""

    def clauses(self, text: str, voice: str) -> list[tuple[str, str]]:
        """The clauses of a text as `(phonemes, what of the text they stand for)`.

        Raises:
            UsageError: for an unknown voice.
        """
        if voice != self._voice:
            if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise UsageError(f"espeak-ng has no voice '{voice}'; it has names like en-us, de, fr or cmn.")
            self._voice = voice
        encoded = text.encode() + b"\0"
        buffer = ctypes.create_string_buffer(encoded)
        start = ctypes.addressof(buffer)
        pointer, position, found = ctypes.c_void_p(start), 0, []
        while pointer.value:
            phonemes = self._convert(ctypes.byref(pointer), _CHARS_UTF8, _PHONEMES_IPA)
            end = pointer.value - start if pointer.value else len(encoded) - 1
            source = encoded[position:end].decode(errors="ignore")
            # It has read one character too many: the first one of the next clause.
            found.append(((phonemes or b"").decode(), source[:-1] if pointer.value else source))
            position = end
        return found


def _find() -> tuple[str, str | None]:
    """Where the library and its data are: the wheel's, or the system's."""
    if library := os.environ.get("PHONEMIZER_ESPEAK_LIBRARY"):
        return library, os.environ.get("ESPEAK_DATA_PATH")
    if importlib.util.find_spec("espeakng_loader") is not None:
        loader: Any = importlib.import_module("espeakng_loader")
        return loader.get_library_path(), loader.get_data_path()
    from ctypes.util import find_library

    if library := find_library("espeak-ng"):
        return library, None
    raise PhonemizerMissingError(
        "Turning text into phonemes needs espeak-ng, which is not installed: pip install espeakng-loader, "
        "or give phonemes or input_ids instead of text."
    )


@lru_cache(maxsize=1)
def espeak() -> Espeak:
    """The library, loaded once."""
    return Espeak()


def available() -> bool:
    """Whether text can be turned into phonemes here."""
    try:
        espeak()
    except PhonemizerMissingError:
        return False
    return True


def sentences(text: str, voice: str = "en-us") -> list[str]:
    """The phonemes of each sentence, as Piper's voices were trained on.

    Marks that end a clause stay, a space after those inside a sentence; accents are code points of their own (NFD).

    Args:
        text: any text.
        voice: espeak-ng's name of the language.

    Raises:
        PhonemizerMissingError: if espeak-ng is not installed.
        UsageError: for an unknown voice.
    """
    found, current = [], ""
    for phonemes, source in espeak().clauses(text, voice):
        mark = _terminator(source)
        current += _LANGUAGE_SWITCH.sub("", phonemes) + mark
        if mark in (",", ":", ";"):
            current += " "
        if mark in (".", "!", "?"):
            found.append(current)
            current = ""
    if current.strip():
        found.append(current)
    return [unicodedata.normalize("NFD", sentence) for sentence in found]


def _terminator(source: str) -> str:
    """The mark that ended a clause, as espeak-ng sees it: the first of several, none for an ellipsis."""
    match = _CLAUSE_END.search(source)
    if not match or match[1].startswith(".."):
        return ""
    return _MARKS.get(match[1][0], match[1][0])


def phonemize(text: str, voice: str = "en-us") -> str:
    """The phonemes of a text with its punctuation kept where it stood, as VITS' authors prepared their texts.

    Raises:
        PhonemizerMissingError: if espeak-ng is not installed.
        UsageError: for an unknown voice.
    """
    pieces: list[str] = []
    position = 0
    for match in [*_PUNCTUATION.finditer(text), None]:
        words = text[position : match.start() if match else len(text)]
        if words.strip():
            spoken = " ".join(p for p, _ in espeak().clauses(words.strip(), voice) if p)
            spoken = _LANGUAGE_SWITCH.sub("", spoken)
            lead = " " if words[0].isspace() and pieces else ""
            trail = " " if words[-1].isspace() and match else ""
            pieces.append(lead + spoken + trail)
        elif words and pieces:
            pieces.append(" ")
        if match:
            pieces.append(match[0])
            position = match.end()
    return re.sub(r"\s+", " ", "".join(pieces)).strip()
