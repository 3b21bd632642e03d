"""Text to phonemes in the international phonetic alphabet, or to speech, by espeak-ng where it is installed.

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
import threading
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np

from audiozoo.errors import AudiozooError, UsageError

# What espeak-ng's C interface calls these.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_PHONEMES_IPA = 0x02
_RATE, _PITCH = 1, 3
_POSITION_CHARACTER = 1
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_LANGUAGE_SWITCH = re.compile(r"\([^)]+\)")  # "(en)" around words of another language
_PUNCTUATION = re.compile(r"""[;:,.!?¡¿—…"«»“”(){}\[\]]+""")
_BLANK_LINE = re.compile(r"\n\s*\n\s*$")  # behind a heading or a paragraph, which it ends
# What stands among the phonemes for a mark that ends a clause: nothing for the full-width ones, danda and the Armenian
# full stop, whether they end a sentence or not.
_MARKS = {mark: mark for mark in ".!?,;:"} | {"…": "", "—": ";", "–": ";"}
_MARKS |= {"\u037e": "?", "\u0387": ";", "՝": ","}  # Greek, Armenian
_MARKS |= {"،": ",", "؛": ";", "؟": "?", "۔": "."}  # Arabic, Urdu
_MARKS |= {"።": ".", "፣": ",", "፤": ";", "፧": "?"}  # Ethiopic
_MARKS |= dict.fromkeys("、，：；。．！？।॥։", "")
_UNHEARD_ENDS = "。．！？।॥։"
# The run of marks that ended a clause, maybe before a closing quotation mark.
_CLAUSE_END = re.compile(rf"""([{"".join(_MARKS)}]+)["'”’»)\]]*\s*$""")


class PhonemizerMissingError(AudiozooError, ImportError):
    """Text cannot be turned into phonemes, because no espeak-ng is installed."""


class Espeak:
    """The espeak-ng library, which has one state: threads take turns.

    Raises:
        PhonemizerMissingError: if it is not installed.
    """

    _turn = threading.Lock()

    def __init__(self) -> None:
        library, data = _find()
        try:
            self._library = ctypes.CDLL(library)
        except OSError as problem:
            raise PhonemizerMissingError(f"The espeak-ng library '{library}' cannot be loaded ({problem}).") from None
        initialize = self._library.espeak_Initialize
        initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        path = None if data is None else os.fsencode(data)
        with self._turn:
            self.sampling_rate = initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, path, _INITIALIZE_DONT_EXIT)
        if self.sampling_rate < 0:
            raise PhonemizerMissingError(f"The espeak-ng library '{library}' does not find its data in '{data}'.")
        if hasattr(self._library, "espeak_ng_SetRandSeed"):  # else by the clock
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._convert = self._library.espeak_TextToPhonemes
        self._convert.restype = ctypes.c_char_p
        self._convert.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
        self._voice = ""
        self._synthesize = self._library.espeak_Synth
        number, pointer = ctypes.c_uint, ctypes.c_void_p
        position: list[Any] = [number, ctypes.c_int, number]
        self._synthesize.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *position, number, pointer, pointer]
        self._said: list[np.ndarray] = []
        self._callback = _SYNTH_CALLBACK(self._hear)  # kept, because the library calls it
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self._said.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def _speak_as(self, voice: str) -> None:
        if voice != self._voice:
            if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise UsageError(f"espeak-ng has no voice '{voice}'; it has names like en-us, de, fr or cmn.")
            self._voice = voice

    def speak(self, text: str, voice: str = "en-us", *, words_a_minute: int = 175, pitch: int = 50) -> np.ndarray:
        """A text said, as samples at `sampling_rate` Hz in -1 to 1; a thousand times faster than it is heard.

        The voices flutter, so the same text is not quite the same twice in a process.

        Args:
            text: any text.
            voice: espeak-ng's name of the language, maybe with `+` and the name of a variant, as in `en-us+f3`.
            words_a_minute: 80 to 450.
            pitch: 0 to 99.

        Raises:
            UsageError: for an unknown voice.
        """
        encoded = text.encode() + b"\0"
        with self._turn:
            self._speak_as(voice)
            self._library.espeak_SetParameter(_RATE, words_a_minute, 0)
            self._library.espeak_SetParameter(_PITCH, pitch, 0)
            self._said.clear()
            self._synthesize(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
            said = np.concatenate(self._said) if self._said else np.zeros(0, np.int16)
            self._said.clear()
        return said.astype(np.float32) / 32768

    def clauses(self, text: str, voice: str, separator: str = "") -> list[tuple[str, str]]:
        """The clauses of a text as `(phonemes, what of the text they stand for)`.

        Args:
            text: any text.
            voice: espeak-ng's name of the language.
            separator: a character to put between phonemes.

        Raises:
            UsageError: for an unknown voice.
        """
        encoded = text.encode() + b"\0"
        buffer = ctypes.create_string_buffer(encoded)
        start = ctypes.addressof(buffer)
        pointer, position, found = ctypes.c_void_p(start), 0, []
        mode = _PHONEMES_IPA | (ord(separator) << 8 if separator else 0)
        with self._turn:
            self._speak_as(voice)
            while pointer.value:
                phonemes = self._convert(ctypes.byref(pointer), _CHARS_UTF8, mode)
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

    Marks that end a clause stay, a space after those inside a sentence; a blank line ends a sentence too. Accents are
    code points of their own (NFD).

    Args:
        text: any text.
        voice: espeak-ng's name of the language.

    Raises:
        PhonemizerMissingError: if espeak-ng is not installed.
        UsageError: for an unknown voice.
    """
    found, current = [], ""
    for phonemes, source in espeak().clauses(text, voice):
        mark, ends = _terminator(source)
        current += _LANGUAGE_SWITCH.sub("", phonemes) + mark
        if mark in (",", ":", ";"):
            current += " "
        if ends or _BLANK_LINE.search(source):
            found.append(current.rstrip())
            current = ""
    found.append(current)
    return [unicodedata.normalize("NFD", sentence) for sentence in found if sentence.strip()]


def phonemes_of_words(text: str, voice: str = "en-us") -> list[list[str]]:
    """The phonemes of each word, without stress and punctuation, as recognisers of phonemes were trained on them.

    Args:
        text: any text.
        voice: espeak-ng's name of the language.

    Raises:
        PhonemizerMissingError: if espeak-ng is not installed.
        UsageError: for an unknown voice.
    """
    clauses = espeak().clauses(_PUNCTUATION.sub(" ", text.lower()), voice, "_")
    spoken = " ".join(_LANGUAGE_SWITCH.sub("", phonemes) for phonemes, _ in clauses)
    words = (re.sub(r"[ˈˌ'-]+", "", word).split("_") for word in spoken.split())
    return [found for word in words if (found := [phoneme for phoneme in word if phoneme])]


def _terminator(source: str) -> tuple[str, bool]:
    """The mark that ended a clause, the first of several, none for an ellipsis; and whether a sentence ended there."""
    match = _CLAUSE_END.search(source)
    if not match or match[1].startswith(".."):
        return "", False
    first = match[1][0]
    return _MARKS[first], _MARKS[first] in (".", "!", "?") or first in _UNHEARD_ENDS


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
