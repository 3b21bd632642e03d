"""Texts cut into sentences, and sentences that are too long for a model into pieces."""

from __future__ import annotations

import re

_MARKS = r".!?؟۔।॥።፧։\u037e။។"  # of Arabic, Urdu, Hindi, Amharic, Armenian, Greek, Burmese and Khmer too
SENTENCE_END = re.compile(rf"(?<=[{_MARKS}…])\s+|(?<=[。！？])\s*")
_SPOKEN_END = re.compile(rf"(?<=[{_MARKS}])\s+|(?<=[。！？])\s*|\s*\n\s*\n\s*")


def sentences(text: str) -> list[str]:
    """The sentences of a text: each up to its mark, or up to a blank line, as a heading is."""
    return [sentence for sentence in _SPOKEN_END.split(text.strip()) if sentence]


def pieces(sentence: str, longest: int) -> list[str]:
    """A sentence in pieces of at most so many characters, cut behind a comma where there is one, else between words."""
    found = []
    while len(sentence) > longest:
        window = sentence[: longest + 1]
        place = max(window.rfind(", ") + 1, window.rfind("— ") + 1) or window.rfind(" ")
        place = place if place > 0 else longest
        found.append(sentence[:place].strip())
        sentence = sentence[place:].strip()
    return [*found, sentence] if sentence else found
