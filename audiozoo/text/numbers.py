"""English numbers in words, for voices that know no digits."""

from __future__ import annotations

import re

_SMALL = tuple(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
    """.split()  # noqa: SIM905
)
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_POWERS = tuple(
    """
    hundred thousand million billion trillion quadrillion quintillion sextillion septillion octillion nonillion
    decillion
    """.split()  # noqa: SIM905
)
_CURRENCIES = {
    "$": "dollars",
    "€": "euros",
    "£": "pounds",
    "¢": "cents",
    "¥": "japanese yen",
    "﷼": "saudi riyal",
    "₹": "indian rupees",
    "₽": "russian rubles",
    "฿": "thai baht",
    "₺": "turkish liras",
    "₴": "ukrainian hryvnia",
    "₣": "swiss francs",
    "₡": "costa rican colon",
    "₱": "philippine peso",
    "₪": "israeli shekels",
    "₮": "mongolian tögrög",
    "₩": "south korean won",
    "₦": "nigerian naira",
    "₫": "vietnamese Đồng",
}
_NUMBER = re.compile(
    r"(?<!\w)(?P<minus>-?)(?P<currency>[" + "".join(map(re.escape, _CURRENCIES)) + r"]?)"
    r"(?P<whole>\d+)(?:\.(?P<part>\d{1,2}))?(?P<percent>%?)(?!\w)"
)
_LIMIT = 10 ** (3 * len(_POWERS))


def cardinal(number: int) -> str:
    """A whole number in words: 1205 is "one thousand two hundred and five"."""
    if number < 1000:
        return _hundreds(number)
    groups, power = [], 0
    while number:
        number, group = divmod(number, 1000)
        if group:
            groups.append(_hundreds(group) + (f" {_POWERS[power]}" if power else ""))
        power += 1
    return " ".join(reversed(groups))


def _hundreds(number: int) -> str:
    words = []
    if number >= 100:
        words.append(f"{_SMALL[number // 100]} hundred")
        number %= 100
        if number == 0:
            return words[0]
        words.append("and")
    if number < 20:
        words.append(_SMALL[number])
    else:
        words.append(_TENS[number // 10])
        if number % 10:
            words.append(_SMALL[number % 10])
    return " ".join(words)


def spell_numbers(text: str) -> str:
    """The text with its numbers, amounts of money and percentages in words.

    As SpeechT5's tokenizer in `transformers` has them, but that 0 is "zero" where that says nothing, and that commas
    may group the digits of more than six. Numbers too great for English words stay as they are.
    """

    def spelled(match: re.Match[str]) -> str:
        whole, part = int(match["whole"]), match["part"]
        if whole >= _LIMIT:
            return match[0]
        words = ["minus"] if match["minus"] else []
        words.append(cardinal(whole))
        if part is not None and part != "00":
            words += ["point", *(_SMALL[int(digit)] for digit in part)]
        if match["percent"]:
            words.append("percent")
        if match["currency"]:
            words.append(_CURRENCIES[match["currency"]])
        return " ".join(words)

    grouped = re.sub(r"(?<=\d),(?=\d)", "", text)
    return re.sub(" +", " ", _NUMBER.sub(spelled, grouped))
