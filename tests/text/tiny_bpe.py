"""A byte-level vocabulary with a few merges, for tests of tokenizers and of what holds one."""

from __future__ import annotations

MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("d", "o"),
    ("do", "g"),
    ("Ġ", "dog"),
    ("Ġ", "a"),
    ("o", "u"),
    ("i", "n"),
]


def byte_symbols() -> list[str]:
    """GPT-2's printable spelling of every byte, in the order of its table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def vocabulary() -> dict[str, int]:
    """Special tokens where RoBERTa has them, bytes, merges, and the mask token last."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *byte_symbols(), *(a + b for a, b in MERGES), "<mask>"]
    return {token: index for index, token in enumerate(tokens)}
