"""Overlapping chunks: where they are, how their tokens meet, and which times count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.decoding.overlaps import Chunk, Piece, Token, cut, join, merge

ZERO = 1000  # the time token of 0 s


def said(*ids: int) -> list[Token]:
    return [Token(id) for id in ids]


@pytest.mark.parametrize(
    ("left", "right", "joined"),
    [
        ([1, 2, 3, 4], [3, 4, 5], [1, 2, 3, 4, 5]),
        ([1, 2, 3, 9], [2, 3, 4, 5], [1, 2, 3, 4, 5]),  # the end of the left one was heard wrongly
        ([1, 2, 3, 4], [9, 3, 4, 5], [1, 2, 3, 4, 5]),  # and here the beginning of the right one
        ([1, 2, 3], [3, 4, 5], [1, 2, 3, 3, 4, 5]),  # one equal token is no match
        ([1, 2, 3], [7, 8], [1, 2, 3, 7, 8]),
        ([], [1, 2], [1, 2]),
        ([1, 2], [], [1, 2]),
    ],
)
def test_two_sequences(left: list[int], right: list[int], joined: list[int]):
    assert merge([said(*left), said(*right)]) == said(*joined)


@given(st.integers(20, 200), st.integers(4, 12), st.integers(2, 3))
def test_what_every_chunk_heard_rightly_comes_out_whole(length: int, size: int, shared: int):
    text = list(range(length))
    heard = [said(*text[c.start : c.start + c.size]) for c in cut(0, length, size, shared, 0)]
    assert merge(heard) == said(*text)


def test_tokens_meet_if_the_left_one_is_not_later():
    early, late = [Token(1, 0, 20), Token(2, 20, 40)], [Token(1, 0, 40), Token(2, 40, 60)]
    assert merge([early, late]) == [early[0], late[1]]
    assert merge([late, early]) == late + early


def test_a_phrase_said_twice_is_joined_to_its_repetition():
    """If the right chunk hears it 20 ms earlier than the left one: the pipeline's rule, and its fault."""
    left = [Token(7, 0, 10), Token(1, 10, 20), Token(2, 20, 30)]
    right = [Token(1, 8, 18), Token(2, 18, 28), Token(9, 28, 38), Token(1, 38, 48), Token(2, 48, 58)]
    heard = [said(*(token.id for token in tokens)) for tokens in (left, right)]
    assert merge(heard) == said(7, 1, 2, 9, 1, 2)
    assert [token.id for token in merge([left, right])] == [7, 1, 2]


@given(st.integers(0, 50), st.integers(1, 3000), st.integers(2, 300), st.data())
def test_chunks_cover_everything_and_share_their_strides(start: int, length: int, size: int, data: st.DataObject):
    left = data.draw(st.integers(0, size - 1))
    right = data.draw(st.integers(0, size - 1 - left))
    end = start + length
    chunks = cut(start, end, size, left, right)
    own = [frame for c in chunks for frame in range(c.start + c.left, c.start + c.size - c.right)]
    assert own == list(range(start, end))
    assert all(c.size == size for c in chunks[:-1])
    assert (chunks[0].left, chunks[-1].right) == (0, 0)
    assert cut(end, start, size, left, right) == []


def test_times_in_strides_do_not_cut():
    """The sentence across the edge is one segment, with times of the two chunks that hear its ends."""
    first = said(ZERO, 1, 2, ZERO + 50, ZERO + 50, 3, 4, 5, ZERO + 145)
    second = said(ZERO, 4, 5, 6, ZERO + 75, ZERO + 75, 7, 8, ZERO + 100)
    heard = [(Chunk(0, 300, 0, 60), first), (Chunk(180, 200, 60, 0), second)]
    assert list(join(heard, ZERO)) == [
        Piece(0, 100, said(1, 2), 0),
        Piece(100, 330, said(3, 4, 5, 6), 1),
        Piece(330, 380, said(7, 8), 1),
    ]


def test_a_segment_comes_as_soon_as_it_is_certain():
    asked = []

    def heard():
        for i in range(3):
            asked.append(i)
            yield Chunk(100 * i, 120, 0, 20), said(ZERO, i, ZERO + 30, ZERO + 30, 9, ZERO + 55)

    pieces = join(heard(), ZERO)
    assert next(pieces) == Piece(0, 60, said(0), 0)
    assert asked == [0]


def test_without_times_all_is_one():
    chunks = Chunk(0, 300, 0, 60), Chunk(180, 300, 60, 60), Chunk(360, 90, 60, 0)
    heard = zip(chunks, [said(1, 2, 3), [], said(2, 3, 4)], strict=True)
    assert list(join(heard, ZERO)) == [Piece(None, None, said(1, 2, 3, 4), 2)]
    assert list(join([(Chunk(0, 300, 0, 60), []), (Chunk(180, 300, 60, 0), [])], ZERO)) == []
