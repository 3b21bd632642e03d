r"""Long recordings by overlapping chunks: where the chunks are, and how their tokens become one text.

Not in Whisper's paper. It is the chunked long form of Distil-Whisper (arXiv 2311.00430) and of the
`automatic-speech-recognition` pipeline of `transformers`. No chunk waits for the text of another, so they are decoded
in batches. Neighbours overlap, so that what is cut at the edge of one is heard whole in the other:

    recording  ├──────────────────────────────────────────────────┤
    chunk 1    ├──────────────────┊stride┤
    chunk 2                 ├stride┊─────────────┊stride┤
    chunk 3                                ├stride┊───────────────┤

**Tokens.** Slide the beginning of the right sequence over the end of the left one. After $i$ steps $m$ tokens meet
their equals, which scores $m/i + i/10^4$; fewer than two are no match. At the best step the left sequence is kept up
to the middle of the overlap, the right one from there on.

**Word times.** Where words are timed, each token keeps the time at which its own chunk hears it, and two equal tokens
meet only if the left one is not later: the pipeline's rule. The times of two chunks differ by some 20 ms either way, so
that true matches are lost too. Let chunks share several seconds; where few words are shared, a phrase that is said
twice can be joined to its repetition, and what is said between them is lost.

**Times.** A segment ends at a time token in the middle of a chunk. Time tokens in a stride are passed over: the text on
both sides of the edge is joined first, and its segment ends at the next time that only one chunk hears.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from audiozoo.decoding.windows import FRAMES_PER_TIMESTAMP


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is heard at once, in frames of 10 ms."""

    start: int
    size: int
    left: int  # stride: how much of its beginning belongs to the chunk before
    right: int  # stride: how much of its end belongs to the chunk after


class Token(NamedTuple):
    """What is heard and, of text whose words are timed, when: in frames of 10 ms of the recording."""

    id: int
    start: int = 0
    end: int = 0
    probability: float = 0.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A segment of the joined text; a time is None where the model gave none."""

    start: int | None  # frames of 10 ms
    end: int | None
    tokens: list[Token]  # text only
    chunk: int  # index of the chunk in which it ends


def cut(start: int, end: int, size: int, left: int, right: int) -> list[Chunk]:
    """Cut `start … end` into chunks of `size` frames, with strides between them but not at the two ends."""
    chunks = []
    for begin in range(start, end, size - left - right):
        last = begin + size >= end
        chunks.append(Chunk(begin, min(size, end - begin), left if begin > start else 0, 0 if last else right))
        if last:
            break
    return chunks


def merge(sequences: Sequence[Sequence[Token]]) -> list[Token]:
    """Join the tokens of neighbouring chunks where they match best; simply one after the other if they do not."""
    merged: list[Token] = []
    left = list(sequences[0])
    for right in sequences[1:]:
        # Tokens a and b are over each other at the shift i = len(left) - a + b.
        equal = np.equal.outer(*([token.id for token in side] for side in (left, right)))
        met = [len(left) - a + b for a, b in np.argwhere(equal) if left[a][1:3] <= right[b][1:3]]
        matches = np.bincount(np.array(met, int), minlength=len(left) + len(right))
        shifts = np.arange(len(matches))
        scores = np.where(matches > 1, matches / np.maximum(shifts, 1) + shifts / 10_000, 0)
        left_end, right_begin = len(left), 0
        if scores.any():
            i = int(scores.argmax())
            left_end = (max(0, len(left) - i) + min(len(left), len(left) + len(right) - i)) // 2
            right_begin = (max(0, i - len(left)) + min(len(right), i)) // 2
        merged += left[:left_end]
        left = list(right[right_begin:])
    return merged + left


def join(heard: Iterable[tuple[Chunk, Sequence[Token]]], timestamp_begin: int) -> Iterator[Piece]:
    """The segments of a recording, each as soon as it is certain.

    Args:
        heard: the chunks in order, each with its tokens: text, and times from the start of the chunk.
        timestamp_begin: the time token of 0 s; smaller ids are text.
    """
    pending: list[list[Token]] = []  # the text of earlier chunks that no time has ended yet
    start: int | None = None  # of the segment under way
    skip = False  # the next time token, the second of a pair whose first was passed over
    index = 0
    for index, (chunk, tokens) in enumerate(heard):
        times = [FRAMES_PER_TIMESTAMP * (id - timestamp_begin) for id, *_ in tokens if id >= timestamp_begin]
        passed = math.inf  # times from here on are passed over: those in the right stride, and always the last one
        if chunk.right and times:
            passed = min([time for time in times if time >= chunk.size - chunk.right], default=times[-1])
        current: list[Token] = []
        for token in tokens:
            if token.id < timestamp_begin:
                current.append(token)
                continue
            time = FRAMES_PER_TIMESTAMP * (token.id - timestamp_begin)
            if time >= passed:
                skip = True
            elif skip or (pending and time < chunk.left):
                skip = False
            elif start is None:
                start = chunk.start + time
            elif chunk.start + time != start:
                yield Piece(start, chunk.start + time, merge([*pending, current]), index)
                pending, current, start = [], [], None
        if current:
            pending.append(current)
        elif not pending:
            start = None
    if pending:
        yield Piece(start, None, merge(pending), index)
