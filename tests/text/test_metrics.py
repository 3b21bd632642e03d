"""Error rates and their alignments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.errors import UsageError
from audiozoo.text import character_error_rate, word_error_rate


def test_counts_and_alignment():
    result = word_error_rate("the cat sat on the mat", "oh the cat sit on mat")
    assert (result.substitutions, result.deletions, result.insertions, result.hits) == (1, 1, 1, 4)
    assert result.rate == float(result) == 3 / 6
    assert result.alignments[0] == (
        (None, "oh"),
        ("the", "the"),
        ("cat", "cat"),
        ("sat", "sit"),
        ("on", "on"),
        ("the", None),
        ("mat", "mat"),
    )


def test_several_texts_are_summed_before_dividing():
    assert float(word_error_rate(["a b c", "d"], ["a b c", "e"])) == 1 / 4
    assert float(word_error_rate(["a", "b"], ["", "b c d"])) == 3 / 2


def test_characters():
    assert float(character_error_rate("abcd", "abxd")) == 1 / 4
    assert float(character_error_rate("你好", "你们好")) == 1 / 2


def distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's distance, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=8)


@given(words.filter(bool), words)
def test_the_path_is_shortest_and_covers_both_sides(said, heard):
    result = word_error_rate(" ".join(said), " ".join(heard))
    assert result.errors == distance(said, heard)
    assert result.reference_length == len(said)
    (pairs,) = result.alignments
    assert [left for left, _ in pairs if left is not None] == said
    assert [right for _, right in pairs if right is not None] == heard
    assert sum(left != right for left, right in pairs) == result.errors


def test_what_has_no_rate():
    with pytest.raises(UsageError, match="The reference holds no word"):
        word_error_rate("", "a")
    with pytest.raises(UsageError, match="2 references but 1 hypotheses"):
        word_error_rate(["a", "b"], ["a"])
