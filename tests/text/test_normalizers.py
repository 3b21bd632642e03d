"""What the normalisers make equal; outputs are those of openai-whisper 20250625 (tests/parity compares live)."""

from __future__ import annotations

import pytest

from audiozoo.text import BasicTextNormalizer, EnglishTextNormalizer
from audiozoo.text.normalizers import english_spellings

ENGLISH = [
    ("Let's go, y'all!", "let us go you all"),
    ("He's like: won't you? Can't! I'ma go.", "he is like will not you can not i am going to go"),
    ("She'd been there, she'd go, she's gone.", "she had been there she would go she has gone"),
    ("Mr. Park visited Mrs. Smith at St. Mary's", "mister park visited missus smith at saint mary is"),
    ("Dr. No, Jr.", "doctor no junior"),
    ("[laughs] (inaudible) hello <noise> uh um hmm there", "hello there"),
    ("The colour of the theatre's aluminium centre", "the color of the theater is aluminum center"),
    ("nineteen eighty four", "1984"),
    ("one oh one", "101"),
    ("two hundred and five thousand and six", "205006"),
    ("two and a half million people", "2500000 people"),
    ("a day and a half", "a day and a half"),
    ("twenty first century, the nineteen sixties, twenty-sixth", "21st century the 1960s 26th"),
    ("double oh seven is not triple five", "007 is not 555"),
    ("minus five point two degrees, plus six", "-5.2 degrees +6"),
    ("$20 million or twenty million dollars", "$20000000 or $20000000"),
    ("three dollars and seven cents; five cents; £0.50", "$3.07 ¢5 ¢50"),
    ("ten percent, fifty per cent, 3.5%", "10% 50% 3.5%"),
    ("1,000,000 and 3,141", "1000000 and 3141"),
    ("one of the ones", "one of the ones"),
    ("point taken; two point hundred", "point taken 200"),
    ("Crème brûlée, Œuvre, Straße, Ångström", "creme brulee oeuvre strasse angstrom"),
    ("the 3rd of the 1990s at 5 th avenue, a1b2", "the 3rd of the 1990s at 5th avenue a one b 2"),
    ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ENGLISH)
def test_english(text, expected):
    assert EnglishTextNormalizer()(text).strip() == expected


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "Ça va, l'été?! [bruit] (rires) «Où»", "ça va l été où "),
        ({"remove_diacritics": True}, "Ça va, l'été, Łódź, Øre", "ca va l ete lodz ore"),
        ({"split_letters": True}, "你好ab", "你 好 a b"),
        ({}, "ﬁn  ½\tⅧ", "fin 1 2 viii"),
    ],
)
def test_basic(options, text, expected):
    assert BasicTextNormalizer(**options)(text) == expected


def test_the_spelling_table():
    table = english_spellings()
    assert len(table) == 1_739
    assert (table["colour"], table["mobilisation"], table["theatre"]) == ("color", "mobilization", "theater")
    assert EnglishTextNormalizer({"cat": "dog"})("The cat of colour") == "the dog of colour"
