r"""The text normalisers of Whisper's evaluation (appendix C): what must not count as a word error is made equal.

`EnglishTextNormalizer` lowers case, drops bracketed remarks and fillers, expands contractions and titles, writes
numbers in digits and words in their American spelling. `BasicTextNormalizer` serves every other language. Published
word error rates are of normalised text, so the outputs here are those of OpenAI's implementation to the character, its
oddities included ("point" is dropped before a number word that is no digit; "1" becomes "one" again).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Generator, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from importlib import resources

import regex

_BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]")
_PARENTHESISED = re.compile(r"\(([^)]+?)\)")
_SPACES = re.compile(r"\s+")

# Letters with strokes and ligatures, which Unicode does not decompose.
_LETTERS = str.maketrans(
    {
        **dict(zip("œŒæÆ", ["oe", "OE", "ae", "AE"], strict=True)),
        **dict(zip("ßẞþÞ", ["ss", "SS", "th", "th"], strict=True)),
        **dict(zip("øØđĐðÐłŁ", "oOdDdDlL", strict=True)),
    }
)


def _is_symbol(character: str) -> bool:
    """Whether a character is a mark, a symbol or punctuation (Unicode's M, S and P)."""
    return unicodedata.category(character)[0] in "MSP"


def remove_symbols(text: str) -> str:
    """Compatibility-composed text (NFKC), with a space for every mark, symbol and punctuation character."""
    return "".join(" " if _is_symbol(c) else c for c in unicodedata.normalize("NFKC", text))


def remove_symbols_and_diacritics(text: str, keep: str = "") -> str:
    """Decomposed text (NFKD) without accents, with a space for every other symbol that is not in `keep`."""
    kept = []
    for character in unicodedata.normalize("NFKD", text):
        if character in keep:
            kept.append(character)
        elif unicodedata.category(character) != "Mn":
            kept.append(" " if _is_symbol(character) else character.translate(_LETTERS))
    return "".join(kept)


class BasicTextNormalizer:
    """For every language but English: lower case, no bracketed remarks, no symbols, single spaces.

    Args:
        remove_diacritics: also strip accents.
        split_letters: a space after every letter (grapheme cluster), which makes a word error rate a character error
            rate, as the paper reports for Chinese, Japanese, Thai, Lao and Burmese.
    """

    def __init__(self, remove_diacritics: bool = False, split_letters: bool = False) -> None:
        self.remove_diacritics = remove_diacritics
        self.split_letters = split_letters

    def __call__(self, text: str) -> str:
        """The normalised text."""
        text = _PARENTHESISED.sub("", _BRACKETED.sub("", text.lower()))
        text = remove_symbols_and_diacritics(text) if self.remove_diacritics else remove_symbols(text)
        text = text.lower()
        if self.split_letters:
            text = " ".join(regex.findall(r"\X", text))
        return _SPACES.sub(" ", text)


# -------------------------------------------------------------------------------------------------------------- numbers

_ONE_TO_NINETEEN = """one two three four five six seven eight nine ten
    eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"""
_TWENTY_TO_NINETY = "twenty thirty forty fifty sixty seventy eighty ninety"
_POWERS_OF_1000 = """thousand million billion trillion quadrillion quintillion
    sextillion septillion octillion nonillion decillion"""

_ZEROS = {"o", "oh", "zero"}
_ONES = {word: number for number, word in enumerate(_ONE_TO_NINETEEN.split(), start=1)}
_TENS = {word: 10 * number for number, word in enumerate(_TWENTY_TO_NINETY.split(), start=2)}
_MULTIPLIERS = {"hundred": 100} | {w: 1000**power for power, w in enumerate(_POWERS_OF_1000.split(), start=1)}
_IRREGULAR_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "twelve": "twelfth"}


def _suffixed_small() -> dict[str, tuple[int, str]]:
    """ "sixes" -> (6, "s"), "twentieth" -> (20, "th") … for the numbers below 100."""
    table = {"zeroth": (0, "th")}
    for word, number in _ONES.items():
        table["sixes" if word == "six" else word + "s"] = (number, "s")
        regular = word + ("h" if word.endswith("t") else "th")
        table[_IRREGULAR_ORDINALS.get(word, regular)] = (number, {1: "st", 2: "nd", 3: "rd"}.get(number, "th"))
    for word, number in _TENS.items():
        table[word[:-1] + "ies"] = (number, "s")
        table[word[:-1] + "ieth"] = (number, "th")
    return table


_SMALL = _ONES | _TENS
_SMALL_SUFFIXED = _suffixed_small()
_MULTIPLIERS_SUFFIXED = {
    word + suffix: (number, suffix) for word, number in _MULTIPLIERS.items() for suffix in ("s", "th")
}
_SIGNS = {"minus": "-", "negative": "-", "plus": "+", "positive": "+"}
_CURRENCIES = {
    "pound": "£", "pounds": "£", "euro": "€", "euros": "€", "dollar": "$", "dollars": "$", "cent": "¢", "cents": "¢"
}  # fmt: skip
_PREFIXES = {*_SIGNS.values(), *_CURRENCIES.values()}
_REPEATS = {"double": 2, "triple": 3}
_DIGIT_WORDS = {*_SMALL, *_ZEROS}
_NUMBER_WORDS = {
    *_DIGIT_WORDS, *_SMALL_SUFFIXED, *_MULTIPLIERS, *_MULTIPLIERS_SUFFIXED,
    *_SIGNS, *_CURRENCIES, *_REPEATS, "per", "percent", "and", "point",
}  # fmt: skip
_DIGITS = re.compile(r"\d+(\.\d+)?")


class _NumberReader:
    """Reads words from left to right and holds the number being spelled, with the sign or currency before it.

    The number is an integer while it can still grow by arithmetic ("two hundred" + "five"), and a string of digits once
    it is dictated ("nineteen eighty four", "one oh one", "three point one four").
    """

    def __init__(self) -> None:
        self.prefix = ""
        self.value: int | str | None = None

    def emit(self, text: object) -> str:
        """A finished piece of output; whatever sign is pending goes before it."""
        result = f"{self.prefix}{text}"
        self.prefix, self.value = "", None
        return result

    def flush(self) -> Iterator[str]:
        """The number so far, if there is one."""
        if self.value is not None:
            yield self.emit(self.value)

    def joined(self, number: int, previous: str | None) -> int | str:
        """The number with a spoken number below 100 after it: added where there is room for it, else dictated."""
        if self.value is None:
            return number
        room = 10 if number < 10 else 100
        if isinstance(self.value, int) and previous not in _ONES and self.value % room == 0:
            return self.value + number
        digits = str(self.value)
        if isinstance(self.value, str) and previous in _TENS and number < 10:
            digits = digits[:-1]  # "eighty" was dictated as 80; "four" takes the place of its 0
        return digits + str(number)

    def multiplied(self, multiplier: int) -> int | None:
        """The number times "hundred", "thousand" …; `None` if that leaves a fraction or no number can be read."""
        if self.value is None:
            return multiplier
        if isinstance(self.value, int):
            thousands, rest = divmod(self.value, 1000)
            return thousands * 1000 + rest * multiplier
        try:
            product = Fraction(self.value) * multiplier
        except ValueError:
            return None
        return product.numerator if product.denominator == 1 else None

    def read(self, words: list[str]) -> Iterator[str]:
        """The words with every spelled number in digits."""
        position = 0
        while position < len(words):
            word = words[position]
            previous = words[position - 1] if position else None
            following = words[position + 1] if position + 1 < len(words) else ""
            position += 1
            if _DIGITS.fullmatch(word[1:] if word[0] in _PREFIXES else word):
                yield from self.read_digits(word)
            elif word not in _NUMBER_WORDS:
                yield from self.flush()
                yield self.emit(word)
            elif word in _ZEROS:
                self.value = str(self.value or "") + "0"
            elif word in _SMALL:
                self.value = self.joined(_SMALL[word], previous)
            elif word in _SMALL_SUFFIXED:
                number, suffix = _SMALL_SUFFIXED[word]
                yield self.emit(f"{self.joined(number, previous)}{suffix}")
            elif word in _MULTIPLIERS:
                product = self.multiplied(_MULTIPLIERS[word])
                if product is None:
                    yield from self.flush()
                self.value = _MULTIPLIERS[word] if product is None else product
            elif word in _MULTIPLIERS_SUFFIXED:
                multiplier, suffix = _MULTIPLIERS_SUFFIXED[word]
                product = self.multiplied(multiplier)
                if product is None:
                    yield from self.flush()
                yield self.emit(f"{multiplier if product is None else product}{suffix}")
            elif word in _CURRENCIES and self.value is not None:
                self.prefix = _CURRENCIES[word]
                yield from self.flush()
            elif word == "percent" and self.value is not None:
                yield self.emit(f"{self.value}%")
            elif word == "per" and self.value is not None and following == "cent":
                yield self.emit(f"{self.value}%")
                position += 1
            else:
                position += yield from self.read_connective(word, previous, following)
        yield from self.flush()

    def read_digits(self, word: str) -> Iterator[str]:
        """A number that is in digits already, perhaps with a sign or currency."""
        if isinstance(self.value, str) and self.value.endswith("."):
            self.value += word
            return
        yield from self.flush()
        if word[0] in _PREFIXES:
            self.prefix, word = word[0], word[1:]
        number = Fraction(word)
        self.value = number.numerator if number.denominator == 1 else word

    def read_connective(self, word: str, previous: str | None, following: str) -> Generator[str, None, int]:
        """Signs, "and", "double", "point", and currencies without a number; returns the following words used up."""
        leads_on = following in _NUMBER_WORDS or _DIGITS.fullmatch(following) is not None
        if word in _SIGNS and leads_on:
            yield from self.flush()
            self.prefix = _SIGNS[word]
        elif word == "and" and leads_on and previous in _MULTIPLIERS:
            pass  # "two hundred and five"
        elif word in _REPEATS and leads_on and (following in _ONES or following in _ZEROS):
            self.value = str(self.value or "") + str(_ONES.get(following, 0)) * _REPEATS[word]
            return 1
        elif word == "point" and leads_on:
            if following in _DIGIT_WORDS or _DIGITS.fullmatch(following):
                self.value = str(self.value or "") + "."
        else:
            yield from self.flush()
            yield self.emit(word)
        return 0


_AND_A_HALF = re.compile(r"\band\s+a\s+half\b")


def _halves_in_digits(text: str) -> str:
    """ "two and a half" -> "two point five", after a number word; other halves stay."""
    *heads, tail = _AND_A_HALF.split(text)
    parts = []
    for head in heads:
        if head.strip():
            number = head.split()[-1]
            parts += [head, "point five" if number in _DIGIT_WORDS or number in _MULTIPLIERS else "and a half"]
    return " ".join([*parts, tail] if tail.strip() else parts)


class EnglishNumberNormalizer:
    """Spelled numbers in digits, in lower-case text.

    "nineteen eighty four" -> "1984", "two hundred and fifth" -> "205th", "minus five point two" -> "-5.2", "twenty
    million dollars" -> "$20000000", "three dollars and five cents" -> "$3.05", "ten percent" -> "10%".
    """

    def __call__(self, text: str) -> str:
        """The normalised text."""
        text = _halves_in_digits(text)
        text = re.sub(r"(?<=[a-z])(?=[0-9])|(?<=[0-9])(?=[a-z])", " ", text)
        text = re.sub(r"([0-9])\s+(?=(?:st|nd|rd|th|s)\b)", r"\1", text)
        text = " ".join(_NumberReader().read(text.split()))
        # "$2 and ¢7" -> "$2.07"; "$0.07" -> "¢7"
        text = re.sub(r"([€£$][0-9]+) (?:and )?¢([0-9]{1,2})\b", lambda m: f"{m[1]}.{int(m[2]):02d}", text)
        text = re.sub(r"[€£$]0.([0-9]{1,2})\b", lambda m: f"¢{int(m[1])}", text)
        return re.sub(r"\b1(s?)\b", r"one\1", text)


# -------------------------------------------------------------------------------------------------------------- English

_CONTRACTIONS = {
    "won't": "will not", "can't": "can not", "let's": "let us", "ain't": "aint", "y'all": "you all", "wanna": "want to",
    "gotta": "got to", "gonna": "going to", "i'ma": "i am going to", "imma": "i am going to", "woulda": "would have",
    "coulda": "could have", "shoulda": "should have", "ma'am": "madam",
}  # fmt: skip
_TITLES = {
    "mr": "mister", "mrs": "missus", "st": "saint", "dr": "doctor", "prof": "professor", "capt": "captain",
    "gov": "governor", "ald": "alderman", "gen": "general", "sen": "senator", "rep": "representative",
    "pres": "president", "rev": "reverend", "hon": "honorable", "asst": "assistant", "assoc": "associate",
    "lt": "lieutenant", "col": "colonel", "jr": "junior", "sr": "senior", "esq": "esquire",
}  # fmt: skip
# What an apostrophe stands for depends on the participle after it; the longer readings come first.
_ENDINGS = {
    "'d been": " had been", "'s been": " has been", "'d gone": " had gone", "'s gone": " has gone",
    "'d done": " had done", "'s got": " has got",
    "n't": " not", "'re": " are", "'s": " is", "'d": " would", "'ll": " will", "'t": " not", "'ve": " have",
    "'m": " am",
}  # fmt: skip
_REPLACEMENTS = [
    *((re.compile(rf"\b{short}\b"), full) for short, full in _CONTRACTIONS.items()),
    *((re.compile(rf"\b{short}\b"), full + " ") for short, full in _TITLES.items()),
    *((re.compile(rf"{short}\b"), full) for short, full in _ENDINGS.items()),
]
_FILLERS = re.compile(r"\b(hmm|mm|mhm|mmm|uh|um)\b")
_NUMERIC_SYMBOLS = ".%$¢€£"


@lru_cache(maxsize=1)
def english_spellings() -> dict[str, str]:
    """British -> American spellings, 1,739 words: OpenAI's table (MIT licence, in `english_spellings.LICENSE`)."""
    table = resources.files("audiozoo.text").joinpath("english_spellings.json")
    spellings: dict[str, str] = json.loads(table.read_text(encoding="utf-8"))
    return spellings


class EnglishTextNormalizer:
    """For English.

    Args:
        spellings: British -> American words; OpenAI's table if not given.
    """

    def __init__(self, spellings: Mapping[str, str] | None = None) -> None:
        self.spellings = english_spellings() if spellings is None else spellings
        self._numbers = EnglishNumberNormalizer()

    def __call__(self, text: str) -> str:
        """The normalised text."""
        text = _PARENTHESISED.sub("", _BRACKETED.sub("", text.lower()))
        text = _FILLERS.sub("", text)
        text = re.sub(r"\s+'", "'", text)
        for pattern, replacement in _REPLACEMENTS:
            text = pattern.sub(replacement, text)

        text = re.sub(r"(\d),(\d)", r"\1\2", text)
        text = re.sub(r"\.([^0-9]|$)", r" \1", text)
        text = remove_symbols_and_diacritics(text, keep=_NUMERIC_SYMBOLS)

        text = self._numbers(text)
        text = " ".join(self.spellings.get(word, word) for word in text.split())

        # A currency symbol or point belongs before a digit, a percent sign after one.
        text = re.sub(r"[.$¢€£]([^0-9])", r" \1", text)
        text = re.sub(r"([^0-9])%", r"\1 ", text)
        return _SPACES.sub(" ", text)
