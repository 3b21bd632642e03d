r"""Times in Whisper's output: the rules for timestamp tokens, and word times read off the cross-attention.

**Timestamp tokens** (paper §4.5; the rules are those of the released code, "heuristics" in the paper's words). Text
stands between two timestamps, $\langle t_0 \rangle \text{text} \langle t_1 \rangle \langle t_1' \rangle \text{text} …$,
which never go back; where all timestamps together are more probable than every single text token, it is time for one.

**Word times** (not in the paper; in the released code). Some cross-attention heads of the decoder look at the audio of
the word that they are about to write. Their weights, normalised, smoothed and averaged, give a matrix *tokens x
frames*; the cheapest monotone path through its negative (dynamic time warping) says when each token begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

SECONDS_PER_TIMESTAMP = 0.02  # between two neighbouring timestamp tokens, and between two encoder frames

# ----------------------------------------------------------------------------------------------- rules for the tokens


@dataclasses.dataclass(frozen=True)
class TimestampRules:
    """A logits processor: which timestamps, and whether text or a timestamp, may come next.

    1. The first token is a timestamp, at most `max_initial`.
    2. Timestamps come in pairs, but for the first, and for a last one right before the end.
    3. They do not go back, and no segment is empty: the timestamp that ends it is later than the one that began it.
    4. If the timestamps that are left are together more probable than the most probable other token, it is one of them.
    """

    begin: int  # index of the first generated token: the length of the prompt
    timestamp_begin: int  # <|0.00|>; larger ids are later times
    eos_token_id: int  # smaller ids are text
    no_timestamps_token_id: int
    max_initial: int | None = 50  # steps of 20 ms

    @classmethod
    def of(cls, ids: Any, prompt_length: int) -> TimestampRules:
        """From a generation config with `no_timestamps_token_id` and so on."""
        return cls(
            begin=prompt_length,
            timestamp_begin=ids.no_timestamps_token_id + 1,
            eos_token_id=ids.eos_token_id,
            no_timestamps_token_id=ids.no_timestamps_token_id,
            max_initial=ids.max_initial_timestamp_index,
        )

    def __call__(
        self, logits: Float[Array, "batch vocab"], tokens: Int[Array, "batch buffer"], length: Int[Array, ""]
    ) -> Float[Array, "batch vocab"]:
        """`logits`, with $-\\infty$ where the rules forbid a token."""
        first = self.timestamp_begin
        vocabulary = jnp.arange(logits.shape[-1])
        columns = jnp.arange(tokens.shape[1])
        generated = (columns >= self.begin) & (columns < length)
        stamped = generated & (tokens >= first)  # (batch, buffer)

        def stamp_at(index: Array) -> Array:
            return lax.dynamic_index_in_dim(stamped, jnp.maximum(index, 0), axis=1)  # (batch, 1)

        is_first = length == self.begin
        last_was_stamp = stamp_at(length - 1)
        one_before_was_stamp = (length - self.begin < 2) | stamp_at(length - 2)

        # Rule 3. After the end of a segment the next one may begin at the same time; else time moves on.
        latest = jnp.max(jnp.where(stamped, tokens, -1), axis=1, keepdims=True)
        closing = last_was_stamp & ~one_before_was_stamp
        earliest = jnp.where(latest < 0, first, jnp.where(closing, latest, latest + 1))
        # Rule 2. A complete pair is followed by text; a closing timestamp by its partner or the end.
        stamps_from = jnp.where(last_was_stamp & one_before_was_stamp, logits.shape[-1], earliest)
        text_from = jnp.where(closing, self.eos_token_id, 0)
        # Rule 1.
        initial_to = logits.shape[-1] if self.max_initial is None else first + self.max_initial + 1
        stamps_to = jnp.where(is_first, initial_to, logits.shape[-1])
        text_from = jnp.where(is_first, first, text_from)

        is_stamp = vocabulary >= first
        allowed = jnp.where(
            is_stamp,
            (vocabulary >= stamps_from) & (vocabulary < stamps_to),
            (vocabulary >= text_from) & (vocabulary != self.no_timestamps_token_id),
        )
        logits = jnp.where(allowed, logits, -jnp.inf)

        # Rule 4. The normaliser of the softmax is on both sides, so logits will do.
        any_stamp = jax.nn.logsumexp(logits[:, first:], axis=-1, keepdims=True)
        best_text = jnp.max(logits[:, :first], axis=-1, keepdims=True)
        return jnp.where((any_stamp > best_text) & ~is_stamp, -jnp.inf, logits)


# --------------------------------------------------------------------------------------- from attention to token times


def median_filter(x: Float[Array, "*batch time"], width: int, length: int | Array | None = None) -> Array:
    """The median of every `width` (odd) neighbours along the last axis, mirrored at both ends.

    Args:
        x: any leading axes.
        width: neighbours; an `x` of at most `width // 2` values is returned as it is.
        length: the values that count, of which there are more than `width // 2`; what comes after is not defined.
            May be traced.
    """
    half, time = width // 2, x.shape[-1]
    if time <= half:
        return x
    end, zero = jnp.asarray(time if length is None else length, jnp.int32), jnp.int32(0)  # one type in all indices
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)])  # sample i is now at i + half
    start = [zero] * (x.ndim - 1)
    left = lax.slice_in_dim(x, half + 1, 2 * half + 1, axis=-1)
    right = lax.dynamic_slice(x, (*start, end - 1), (*x.shape[:-1], half))  # the `half` values before the last one
    x = lax.dynamic_update_slice(x, left[..., ::-1], (*start, zero))
    x = lax.dynamic_update_slice(x, right[..., ::-1], (*start, end + half))
    neighbours = [x[..., i : i + time] for i in range(width)]
    # Odd-even transposition sort of `width` arrays: element-wise, so the compiler fuses all of it.
    for turn in range(width):
        for i in range(turn % 2, width - 1, 2):
            low, high = neighbours[i], neighbours[i + 1]
            neighbours[i], neighbours[i + 1] = jnp.minimum(low, high), jnp.maximum(low, high)
    return neighbours[half]


def alignment_matrix(
    weights: Float[Array, "heads tokens frames"],
    tokens: int | Int[Array, ""],
    frames: int | Int[Array, ""],
    width: int = 7,
) -> Float[Array, "tokens frames"]:
    r"""How strongly each token attends to each frame, comparable between tokens.

    Per head: the softmax over the frames that hold audio (that over all frames, renormalised), then
    $z = (w - \mu) / \sigma$ over the tokens, then a median filter over time; then the mean over the heads.

    Args:
        weights: cross-attention weights of the alignment heads, which sum to 1 over all frames.
        tokens: number of real tokens, the others being padding; may be traced, as may `frames`.
        frames: number of frames that hold audio, 20 ms each. With a single one all tokens are at its time; the released
            code divides 0 by 0 there and lets the first word begin before the window.
        width: of the median filter.
    """
    real = (jnp.arange(weights.shape[1]) < tokens)[:, None]
    heard = jnp.arange(weights.shape[2]) < frames
    weights = jnp.where(heard, weights, 0.0)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mean = jnp.where(real, weights, 0.0).sum(axis=1, keepdims=True) / tokens
    variance = jnp.where(real, jnp.square(weights - mean), 0.0).sum(axis=1, keepdims=True) / tokens
    weights = (weights - mean) / jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    filtered = median_filter(weights, width, jnp.maximum(frames, width // 2 + 1))
    weights = jnp.where(frames > width // 2, filtered, weights)
    return weights.mean(axis=0)


def dynamic_time_warping(cost: Float[np.ndarray, "rows columns"]) -> tuple[np.ndarray, np.ndarray]:
    r"""The monotone path through `cost` from its first to its last cell with the least sum.

    $D_{i,j} = c_{i,j} + \min(D_{i-1,j-1},\, D_{i-1,j},\, D_{i,j-1})$. All cells of an anti-diagonal depend on the two
    before it only, so one NumPy operation does a whole anti-diagonal.

    As in the released code, sums are float32, and where neither of the first two is the one smallest, $D_{i,j-1}$ is
    taken, which for $D_{i-1,j-1} = D_{i-1,j} < D_{i,j-1}$ is not the least.

    Returns:
        Rows and columns of the path's cells, in order.
    """
    rows, columns = cost.shape
    wide = np.zeros((rows, columns + 1), np.float32)  # one more column, so that a diagonal's stride is never 0
    wide[:, :columns] = cost
    flat = wide.reshape(-1)
    # moves[i + j, i]: how cell (i, j), counted from 1, was reached: 0 diagonal, 1 from (i - 1, j), 2 from (i, j - 1).
    moves = np.zeros((rows + columns + 1, rows + 1), np.int8)
    infinite = np.full(rows + 1, np.inf, np.float32)
    before, last = infinite.copy(), infinite.copy()  # anti-diagonals d - 2 and d - 1, by i
    before[0] = 0.0
    for d in range(2, rows + columns + 1):
        low, high = max(1, d - columns), min(rows, d - 1)  # i
        diagonal, above, left = before[low - 1 : high], last[low - 1 : high], last[low : high + 1]
        move = np.where(
            (diagonal < above) & (diagonal < left), 0, np.where((above < diagonal) & (above < left), 1, 2)
        ).astype(np.int8)
        least = np.where(move == 0, diagonal, np.where(move == 1, above, left))
        first = (low - 1) * (columns + 1) + d - low - 1
        cells = flat[first::columns][: high - low + 1]
        new = infinite.copy()
        new[low : high + 1] = least + cells
        moves[d, low : high + 1] = move
        before, last = last, new
    i, j = rows, columns
    path = []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        came_from = 2 if i == 0 else 1 if j == 0 else int(moves[i + j, i])
        i, j = i - (came_from != 2), j - (came_from != 1)
    steps = np.array(path[::-1])
    return steps[:, 0], steps[:, 1]


def token_times(matrix: Float[np.ndarray, "tokens frames"]) -> Float[np.ndarray, " tokens"]:
    """When each token of an `alignment_matrix` begins, in seconds: where the warping path first reaches its row."""
    rows, columns = dynamic_time_warping(-matrix)
    reached = np.concatenate([[True], np.diff(rows) > 0])
    return columns[reached] * SECONDS_PER_TIMESTAMP


# --------------------------------------------------------------------------------------------- from tokens to words


@dataclasses.dataclass
class WordTiming:
    """A word, its tokens, its times in seconds from the start of the window, and its mean token probability."""

    word: str
    tokens: list[int]
    start: float
    end: float
    probability: float

    def written(self, offset: float) -> dict[str, Any]:
        """As `openai-whisper` writes it, for a window that begins `offset` seconds into the recording."""
        return {
            "word": self.word,
            "start": round(offset + self.start, 2),
            "end": round(offset + self.end, 2),
            "probability": self.probability,
        }


def word_timings(
    words: Sequence[str],
    word_tokens: Sequence[list[int]],
    starts: Float[np.ndarray, " tokens"],
    ends: Float[np.ndarray, " tokens"],
    probabilities: Float[np.ndarray, " tokens"],
) -> list[WordTiming]:
    """Words, each from the start of its first token to the end of its last, or none of the time if that is earlier.

    Args:
        words: the words, and one entry more for the end of the text.
        word_tokens: their tokens.
        starts: when each token begins, seconds; the end of the text is left out, here and below.
        ends: when each token ends.
        probabilities: of each token.
    """
    if len(word_tokens) <= 1:
        return []
    boundaries = np.cumsum([0, *(len(tokens) for tokens in word_tokens[:-1])])
    return [
        WordTiming(
            word, list(tokens), float(starts[i]), float(max(starts[i], ends[j - 1])), float(np.mean(probabilities[i:j]))
        )
        for word, tokens, i, j in zip(words, word_tokens, boundaries[:-1], boundaries[1:], strict=False)
    ]


PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"
_SENTENCE_ENDS = ".。!！?？"


def merge_punctuation(alignment: list[WordTiming], prepended: str = PREPENDED, appended: str = APPENDED) -> None:
    """Make opening punctuation part of the word after it and closing punctuation part of the word before it, in place.

    What has been merged away stays in the list, as an empty word without tokens.
    """
    following = len(alignment) - 1
    for i in range(len(alignment) - 2, -1, -1):
        mark, word = alignment[i], alignment[following]
        if mark.word.startswith(" ") and mark.word.strip() in prepended:
            word.word, word.tokens = mark.word + word.word, mark.tokens + word.tokens
            mark.word, mark.tokens = "", []
        else:
            following = i
    previous = 0
    for i in range(1, len(alignment)):
        word, mark = alignment[previous], alignment[i]
        if not word.word.endswith(" ") and mark.word in appended:
            word.word, word.tokens = word.word + mark.word, word.tokens + mark.tokens
            mark.word, mark.tokens = "", []
        else:
            previous = i


@dataclasses.dataclass(frozen=True)
class _Durations:
    """What is a usual and what a long duration of a word here."""

    median: float
    longest: float

    @classmethod
    def of(cls, alignment: Sequence[WordTiming]) -> _Durations | None:
        durations = np.array([word.end - word.start for word in alignment])
        durations = durations[durations != 0]
        if not len(durations):
            return None
        median = min(0.7, float(np.median(durations)))
        return cls(median, 2 * median)


def add_words(
    segments: list[dict[str, Any]],
    alignment: list[WordTiming],
    *,
    is_text: Callable[[int], bool],
    time_offset: float,
    last_speech: float,
    prepended: str = PREPENDED,
    appended: str = APPENDED,
) -> None:
    """Give every segment its `words`, and let them correct its `start` and `end`, in place.

    The warping path lets a pause count as part of a word, so that words next to a pause come out too long. The released
    code shortens them to twice the median duration at the ends of sentences and after pauses, and believes the
    segment's own timestamp where it differs from the word's by more than half a second.

    Args:
        segments: consecutive segments of one window; their tokens are those of `alignment`.
        alignment: the words of the window.
        is_text: whether a token is text.
        time_offset: start of the window, seconds.
        last_speech: when speech was last heard before this window, seconds.
        prepended: punctuation that belongs to the word after it.
        appended: punctuation that belongs to the word before it.
    """
    usual = _Durations.of(alignment)
    if usual is not None:
        for before, word in pairwise(alignment):
            if word.end - word.start > usual.longest:
                if word.word in _SENTENCE_ENDS:
                    word.end = word.start + usual.longest
                elif before.word in _SENTENCE_ENDS:
                    word.start = word.end - usual.longest
    usual = usual or _Durations(0.0, 0.0)
    merge_punctuation(alignment, prepended, appended)

    position = 0
    for segment in segments:
        wanted = sum(map(is_text, segment["tokens"]))
        words: list[dict[str, Any]] = []
        taken = 0
        while position < len(alignment) and taken < wanted:
            timing = alignment[position]
            if timing.word:
                words.append(timing.written(time_offset))
            taken += len(timing.tokens)
            position += 1
        if words:
            _shorten_after_pause(words, usual, last_speech)
            _reconcile(segment, words, usual)
            last_speech = segment["end"]
        segment["words"] = words


def _shorten_after_pause(words: list[dict[str, Any]], usual: _Durations, last_speech: float) -> None:
    first = words[0]
    second = words[1] if len(words) > 1 else None
    if first["end"] - last_speech <= 4 * usual.median:
        return
    both_too_long = second is not None and second["end"] - first["start"] > 2 * usual.longest
    if first["end"] - first["start"] > usual.longest or both_too_long:
        if second is not None and second["end"] - second["start"] > usual.longest:
            first["end"] = second["start"] = max(second["end"] / 2, second["end"] - usual.longest)
        first["start"] = max(0, first["end"] - usual.longest)


def _reconcile(segment: dict[str, Any], words: list[dict[str, Any]], usual: _Durations) -> None:
    first, last = words[0], words[-1]
    if segment["start"] < first["end"] and segment["start"] - 0.5 > first["start"]:
        first["start"] = max(0, min(first["end"] - usual.median, segment["start"]))
    else:
        segment["start"] = first["start"]
    if segment["end"] > last["start"] and segment["end"] + 0.5 < last["end"]:
        last["end"] = max(last["start"] + usual.median, segment["end"])
    else:
        segment["end"] = last["end"]
