"""Timestamp rules against a plain restatement of them, and the way from attention weights to words."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.decoding.timestamps import (
    TimestampRules,
    WordTiming,
    add_words,
    alignment_matrix,
    dynamic_time_warping,
    median_filter,
    merge_punctuation,
    token_times,
    word_timings,
)

TEXT, EOT, NO_STAMPS, ZERO, VOCABULARY = 10, 10, 11, 12, 30  # text is 0 … 9; times are 12 … 29


def allowed(generated: list[int], max_initial: int | None) -> set[int]:
    """The rules of `TimestampRules`, 1 to 3, token by token."""
    found = set()
    stamps = [token for token in generated if token >= ZERO]
    for token in range(VOCABULARY):
        stamp = token >= ZERO
        if token == NO_STAMPS:
            continue
        if not generated:
            if stamp and (max_initial is None or token <= ZERO + max_initial):
                found.add(token)
            continue
        after_stamp = generated[-1] >= ZERO
        closed = after_stamp and len(generated) > 1 and generated[-2] < ZERO
        if after_stamp and not closed and stamp:
            continue
        if closed and token < EOT:
            continue
        if stamp and stamps and token < stamps[-1] + (0 if closed else 1):
            continue
        found.add(token)
    return found


@cache
def compiled(rules: TimestampRules):
    return jax.jit(rules)


def run_rules(generated: list[int], logits: np.ndarray, max_initial: int | None = None, prompt: int = 3) -> np.ndarray:
    rules = compiled(TimestampRules(prompt, ZERO, EOT, NO_STAMPS, max_initial))
    tokens = np.full((1, prompt + 12), 29, np.int32)  # the prompt, and what is not filled yet, must not count
    tokens[0, prompt : prompt + len(generated)] = generated
    return np.asarray(rules(logits[None], tokens, np.int32(prompt + len(generated))))[0]


@st.composite
def histories(draw: st.DrawFn) -> list[int]:
    """Token by token what the rules allow."""
    generated: list[int] = []
    for _ in range(draw(st.integers(0, 9))):
        choices = sorted(allowed(generated, 5) - {EOT})
        if not choices:
            break
        generated.append(draw(st.sampled_from(choices)))
    return generated


@given(histories())
def test_rules_allow_what_they_should(generated: list[int]):
    # Text far more probable than all times together: the fourth rule stays out of it.
    logits = np.where(np.arange(VOCABULARY) < ZERO, 20.0, 0.0).astype(np.float32)
    found = set(np.flatnonzero(np.isfinite(run_rules(generated, logits, 5))))
    assert found == allowed(generated, 5)


def test_times_that_are_together_more_probable_win():
    logits = np.zeros(VOCABULARY, np.float32)
    logits[3] = 2.0  # more than each time, less than ln 18 = 2.9
    found = run_rules([ZERO, 1, 2], logits)
    assert set(np.flatnonzero(np.isfinite(found))) == set(range(ZERO + 1, VOCABULARY))
    logits[3] = 3.0
    found = run_rules([ZERO, 1, 2], logits)
    assert np.isfinite(found[3])
    logits[29] = 3.0
    assert np.isfinite(run_rules([28, 1], logits)[3])  # the one time that is left is as probable, not more


@pytest.mark.parametrize("length", [4, 9, 40])
@pytest.mark.parametrize(("width", "double"), [(3, False), (7, False), (7, True)])
def test_median_filter(length: int, width: int, double: bool):
    x = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    half = width // 2
    mirrored = np.pad(x[:, :length], ((0, 0), (half, half)), mode="reflect")
    wanted = np.median(np.lib.stride_tricks.sliding_window_view(mirrored, width, axis=1), axis=-1)
    with jax.enable_x64(double):
        found = jax.jit(median_filter, static_argnums=1)(x, width, np.int32(length))
    np.testing.assert_array_equal(np.asarray(found)[:, :length], wanted.astype(np.float32))


def test_median_filter_leaves_short_rows_alone():
    x = jnp.arange(3.0)
    assert median_filter(x, 7) is x


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 1000))
def test_dynamic_time_warping(rows: int, columns: int, seed: int):
    cost = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    i, j = dynamic_time_warping(cost)
    assert (i[0], j[0], i[-1], j[-1]) == (0, 0, rows - 1, columns - 1)
    steps = set(zip(np.diff(i).tolist(), np.diff(j).tolist(), strict=True))
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for r in range(rows):
        for c in range(columns):
            total[r + 1, c + 1] = cost[r, c] + min(total[r, c], total[r, c + 1], total[r + 1, c])
    assert cost[i, j].sum() == pytest.approx(total[-1, -1], abs=1e-4)


def test_token_times_follow_the_attention():
    # Token t attends to frames 10 t … 10 t + 9.
    matrix = np.kron(np.eye(4) - 0.1, np.ones((1, 10))).astype(np.float32)
    np.testing.assert_allclose(token_times(matrix), [0.0, 0.2, 0.4, 0.6])


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 20])
def test_alignment_matrix(frames: int):
    """Against a restatement without padding; too few frames for the median are left as they are."""
    tokens, weights = 4, np.random.default_rng(1).dirichlet(np.ones(30), size=(3, 6)).astype(np.float32)
    heard = weights[:, :tokens, :frames] / weights[:, :tokens, :frames].sum(-1, keepdims=True)
    deviation = heard.std(axis=1, keepdims=True)
    wanted = (heard - heard.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1.0)
    if frames > 3:
        mirrored = np.pad(wanted, ((0, 0), (0, 0), (3, 3)), mode="reflect")
        wanted = np.median(np.lib.stride_tricks.sliding_window_view(mirrored, 7, axis=2), axis=-1)
    found = jax.jit(alignment_matrix)(weights, tokens, frames)
    np.testing.assert_allclose(found[:tokens, :frames], wanted.mean(axis=0), rtol=1e-4, atol=1e-5)


def words(*entries: tuple[str, float, float]) -> list[WordTiming]:
    return [WordTiming(word, [i], start, end, 0.9) for i, (word, start, end) in enumerate(entries)]


def test_word_timings():
    starts, ends = np.array([0.0, 0.2, 0.3]), np.array([0.2, 0.3, 0.6])
    found = word_timings([" a", " bc", "<end>"], [[5], [6, 7], [9]], starts, ends, np.ones(3) / 2)
    assert found == [WordTiming(" a", [5], 0.0, 0.2, 0.5), WordTiming(" bc", [6, 7], 0.2, 0.6, 0.5)]
    assert word_timings(["<end>"], [[9]], np.zeros(0), np.zeros(0), np.zeros(0)) == []


def test_no_word_ends_before_it_begins():
    """Where its tokens are of two chunks, which do not agree on the time."""
    starts, ends = np.array([0.5, 0.2]), np.array([0.7, 0.4])
    found = word_timings([" bc", "<end>"], [[6, 7], [9]], starts, ends, np.ones(2))
    assert found == [WordTiming(" bc", [6, 7], 0.5, 0.5, 1.0)]


def test_merge_punctuation():
    alignment = words(
        (' "', 0, 0.1), ("Yes", 0.1, 0.5), (",", 0.5, 0.5), (" no", 0.6, 0.8), (".", 0.8, 0.8), ('"', 0.8, 0.9)
    )
    merge_punctuation(alignment)
    assert [word.word for word in alignment] == ["", ' "Yes,', "", ' no."', "", ""]
    assert [word.tokens for word in alignment] == [[], [0, 1, 2], [], [3, 4, 5], [], []]


def test_words_correct_their_segments():
    """A first word that swallowed a pause is cut to twice the median; the segment begins with it."""
    alignment = words((" a", 0.0, 3.0), (" b", 3.0, 3.2), (" c", 3.2, 3.4), (" d", 3.4, 3.6))
    segment = {"start": 2.9, "end": 5.0, "tokens": [0, 1, 2, 3]}
    add_words([segment], alignment, is_text=lambda _: True, time_offset=10.0, last_speech=0.0)
    assert [word["word"] for word in segment["words"]] == [" a", " b", " c", " d"]
    assert segment["words"][0]["start"] == pytest.approx(12.6)
    assert (segment["start"], segment["end"]) == (pytest.approx(12.6), 13.6)


def test_no_word_begins_before_the_recording():
    """The segment begins within the first word, which is shorter than the usual one."""
    alignment = words((" a", 0.0, 0.6), (" b", 0.6, 1.6), (" c", 1.6, 2.6))
    segment = {"start": 0.55, "end": 2.6, "tokens": [0, 1, 2]}
    add_words([segment], alignment, is_text=lambda _: True, time_offset=0.0, last_speech=0.0)
    assert segment["words"][0]["start"] == 0
