"""The engine by itself: cached against uncached, one compilation, sampling, streaming, drafting, and bad options."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiozoo.decoding import (
    GenerationConfig,
    Generator,
    Growing,
    Shared,
    assisted_generate,
    bucketed,
    cache,
    generate,
)
from audiozoo.decoding.generate import invert_cdf
from audiozoo.decoding.processors import EncoderNoRepeatNGram, RepetitionPenalty, SequenceBias, TopP
from audiozoo.errors import UsageError
from tests.decoding import table_model, tiny_transformer

VOCABULARY, EOS, PAD = 13, 3, 11
GREEDY = GenerationConfig(max_new_tokens=14, eos_token_id=EOS, pad_token_id=PAD)
PROMPT = np.array([[1, 2], [5, 6], [9, 0]])


def tables(seed=0):
    return table_model.make_tables(seed, VOCABULARY, eos=(EOS,))


# Compiling is what this module spends its time on, hence the lowest optimisation level.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick, static_argnames=("config", "stopping", "streamer"))
def run(tables, prompt, config, *, limit=None, key=None, noise=None, temperature=None, stopping=(), streamer=None):
    store = table_model.start(prompt, prompt.shape[1] + config.new_tokens(prompt.shape[1]))
    step = functools.partial(table_model.step, tables)
    return generate(
        step,
        store,
        prompt,
        config,
        max_new_tokens=limit,
        key=key,
        noise=noise,
        temperature=temperature,
        stopping=stopping,
        streamer=streamer,
    )


def greedy_by_hand(tables, prompt, new, eos=(EOS,)):
    """One row at a time, whole sequences, no cache and no JAX."""
    rows = []
    for row in prompt:
        tokens = list(row)
        for _ in range(new):
            tokens.append(int(table_model.logits_of(tables, np.array([tokens]))[0].argmax()))
            if tokens[-1] in eos:
                break
        rows.append(tokens)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_an_uncached_loop(seed):
    result = run(tables(seed), PROMPT, GREEDY).trim()
    for row, expected in enumerate(greedy_by_hand(tables(seed), PROMPT, 14)):
        assert result.sequences[row, : result.lengths[row]].tolist() == expected
        assert (result.sequences[row, result.lengths[row] :] == PAD).all()
        assert result.new_tokens(row) == expected[2:]
    assert result.sequences.shape[1] == result.lengths.max()


def test_transformer_with_cache_equals_transformer_without():
    weights = tiny_transformer.weights(0)
    prompt = np.array([[1, 2, 3], [7, 5, 9]])
    config = GREEDY.replace(eos_token_id=None, max_new_tokens=10)
    outputs = []
    for prefill in (None, tiny_transformer.prefill):

        @quick
        def decode(weights, prompt, prefill=prefill):
            bound = None if prefill is None else functools.partial(prefill, weights)
            step = functools.partial(tiny_transformer.step, weights)
            store = tiny_transformer.start(weights, prompt.shape[0], 13)
            return generate(step, store, prompt, config, prefill=bound)

        outputs.append(np.asarray(decode(weights, prompt).sequences))
    tokens = prompt
    for _ in range(10):
        tokens = np.concatenate([tokens, tiny_transformer.forward(weights, tokens)[:, -1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(outputs[0], tokens)
    np.testing.assert_array_equal(outputs[1], tokens)


def test_a_traced_limit_compiles_once_and_equals_a_static_one():
    traces = []

    @jax.jit
    def limited(limit):
        traces.append(None)
        step = functools.partial(table_model.step, tables())
        return generate(step, table_model.start(PROMPT, 16), PROMPT, GREEDY, max_new_tokens=limit)

    for limit in (1, 2, 7, 14):
        np.testing.assert_array_equal(
            limited(limit).trim().sequences,
            run(tables(), PROMPT, GREEDY.replace(max_new_tokens=limit)).trim().sequences,
        )
    assert len(traces) == 1


def test_log_probs_are_those_of_the_chosen_tokens():
    result = run(tables(), PROMPT, GREEDY.replace(output_log_probs=True, suppress_tokens=(4,))).trim()
    for row in range(3):
        for index, token in enumerate(result.new_tokens(row)):
            logits = table_model.logits_of(tables(), result.sequences[row : row + 1, : 2 + index])[0]
            logits[4] = -np.inf
            expected = logits[token] - np.log(np.exp(logits).sum())
            assert result.log_probs[row, index] == pytest.approx(expected, abs=1e-5)
        assert (result.log_probs[row, len(result.new_tokens(row)) :] == 0).all()
    np.testing.assert_allclose(result.sum_log_probs, result.log_probs.sum(1), rtol=1e-6)


@pytest.mark.parametrize("early_stopping", [True, "never"])
def test_wide_enough_beams_find_the_best_sequence(early_stopping):
    """With as many beams as there are sequences, beam search is exhaustive search."""
    vocabulary, new = 4, 3
    lookup = table_model.make_tables(1, vocabulary)
    config = GenerationConfig(
        max_new_tokens=new, num_beams=vocabulary**2, early_stopping=early_stopping, pad_token_id=0
    )
    prompt = np.array([[1], [2]])
    result = run(lookup, prompt, config).trim()
    for row, first in enumerate(prompt[:, 0]):

        def log_prob(sequence, first=first):
            total = 0.0
            for index in range(new):
                logits = table_model.logits_of(lookup, np.array([[first, *sequence[:index]]]))[0]
                total += logits[sequence[index]] - np.log(np.exp(logits).sum())
            return total

        best = max(itertools.product(range(vocabulary), repeat=new), key=log_prob)
        assert result.sequences[row, 1:].tolist() == list(best)
        assert result.sum_log_probs[row] == pytest.approx(log_prob(best), abs=1e-4)
        assert result.sequences_scores[row] == pytest.approx(log_prob(best) / new, abs=1e-4)


def test_one_beam_of_the_patient_search_is_refused_and_two_collect_by_finishing_time():
    with pytest.raises(UsageError, match="patience"):
        GREEDY.replace(patience=1.0)
    result = run(tables(), PROMPT, GREEDY.replace(num_beams=2, patience=2.0, num_return_sequences=4)).trim()
    assert result.sequences.shape[0] == 12
    scores = result.sequences_scores.reshape(3, 4)
    assert (np.diff(scores) <= 0).all()


# --- sampling --------------------------------------------------------------------------------------------------------


def test_the_inverted_distribution_is_the_softmax():
    scores = np.array([[0.3, -np.inf, 1.2, -2.0, 0.0, -np.inf, 2.0]], np.float32)
    grid = (np.arange(20_000, dtype=np.float32) + 0.5) / 20_000
    tokens = np.asarray(invert_cdf(jnp.repeat(scores, len(grid), axis=0), jnp.asarray(grid)))
    share = np.bincount(tokens, minlength=7) / len(grid)
    expected = np.exp(scores[0]) / np.exp(scores[0]).sum()
    np.testing.assert_allclose(share, expected, atol=2e-4)
    edges = invert_cdf(jnp.repeat(scores, 2, axis=0), jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))]))
    assert np.asarray(edges).tolist() == [0, 6]
    nothing = jnp.stack([jnp.full(7, jnp.nan), jnp.full(7, -jnp.inf)])  # seven tokens make three blocks of three
    assert np.asarray(invert_cdf(nothing, jnp.array([0.5, 0.5]))).tolist() == [6, 6]


def test_sampled_tokens_follow_the_model():
    config = GREEDY.replace(do_sample=True, max_new_tokens=1, temperature=0.7, top_k=5, num_return_sequences=3000)
    result = run(tables(), PROMPT[:1], config, key=jax.random.key(0))
    share = np.bincount(np.asarray(result.sequences[:, 2]), minlength=VOCABULARY) / 3000
    logits = table_model.logits_of(tables(), PROMPT[:1])[0] / 0.7
    logits[np.argsort(logits)[:-5]] = -np.inf
    expected = np.exp(logits) / np.exp(logits).sum()
    # Five standard deviations of a share of 3000 draws.
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 3000)).all()


def test_rows_are_sampled_independently_of_the_batch():
    config = GREEDY.replace(do_sample=True)
    keys = jax.random.split(jax.random.key(7), 3)
    together = run(tables(), PROMPT, config, key=keys)
    order = np.array([2, 0, 1])
    shuffled = run(tables(), PROMPT[order], config, key=keys[order])
    np.testing.assert_array_equal(np.asarray(together.sequences)[order], shuffled.sequences)
    alone = run(tables(), PROMPT[:1], config, key=jax.random.key(1))
    np.testing.assert_array_equal(alone.sequences[0], run(tables(), PROMPT, config, key=jax.random.key(1)).sequences[0])
    different = run(tables(), PROMPT, config, key=jax.random.key(2)).sequences
    assert not np.array_equal(together.sequences, different)


def test_injected_noise_decides():
    noise = np.random.default_rng(0).gumbel(size=(14, 3, VOCABULARY)).astype(np.float32)
    result = run(tables(), PROMPT, GREEDY.replace(do_sample=True, top_k=0), noise=noise).trim()
    for row in range(3):
        for index, token in enumerate(result.new_tokens(row)):
            logits = table_model.logits_of(tables(), result.sequences[row : row + 1, : 2 + index])[0]
            assert token == (logits + noise[index, row]).argmax()


def test_a_temperature_for_each_row():
    config = GREEDY.replace(do_sample=True, top_k=0, eos_token_id=None)
    cold = run(tables(), PROMPT, config, key=jax.random.key(0), temperature=jnp.array([1e-4, 1.0, 1e-4]))
    greedy = run(tables(), PROMPT, config.replace(do_sample=False))
    np.testing.assert_array_equal(cold.sequences[::2], greedy.sequences[::2])
    assert not np.array_equal(cold.sequences[1], greedy.sequences[1])


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 70])
def test_reordering_moves_exactly_the_filled_slots(length):
    rng = np.random.default_rng(length)
    store = {
        "growing": Growing(jnp.asarray(rng.normal(size=(4, 2, 70))), axis=2),
        "plain": jnp.arange(4) * 10,
        "shared": Shared(jnp.arange(2)),
        "scalar": jnp.asarray(5),
    }
    rows = jnp.array([1, 1, 3, 2])
    moved = cache.reorder(store, rows, jnp.asarray(length))
    expected = np.asarray(store["growing"].value)
    np.testing.assert_array_equal(moved["growing"].value[..., :length], expected[rows][..., :length])
    np.testing.assert_array_equal(moved["plain"], [10, 10, 30, 20])
    np.testing.assert_array_equal(moved["shared"].value, [0, 1])
    assert moved["scalar"] == 5


def test_a_step_that_changes_its_cache_is_named():
    def bad(tokens, store, position):
        return jnp.zeros((tokens.shape[0], 4)), {"keys": store["keys"].astype(jnp.float16)}

    for prompt_length in (1, 3):
        with pytest.raises(UsageError, match=r"step returned the cache leaf \['keys'\] as float16"):
            generate(bad, {"keys": jnp.zeros((1, 3))}, jnp.zeros((1, prompt_length), jnp.int32), GREEDY)


# --- streaming -------------------------------------------------------------------------------------------------------


def test_a_streamer_gets_every_token_in_order():
    seen = []
    result = run(tables(), PROMPT, GREEDY, streamer=lambda tokens, position: seen.append((position, tokens.copy())))
    jax.effects_barrier()
    result = result.trim()
    assert [position for position, _ in seen] == list(range(2, result.sequences.shape[1]))
    np.testing.assert_array_equal(np.stack([tokens for _, tokens in seen], axis=1), result.sequences[:, 2:])


def generator():
    def start(state, inputs, rows, length):
        return table_model.start(inputs, length)

    return Generator(table_model.step, start)


def test_generator_compiles_once_for_lengths_and_temperatures():
    decode = generator()
    for new in (1, 5, 30):
        config = GREEDY.replace(max_new_tokens=new)
        result = decode(tables(), PROMPT, PROMPT, config).trim()
        np.testing.assert_array_equal(result.sequences, run(tables(), PROMPT, config).trim().sequences)
    assert decode.compilations == 1
    for temperature in (0.2, 0.8, 1.0):
        decode(
            tables(1), PROMPT, PROMPT, GREEDY.replace(do_sample=True, temperature=temperature), key=jax.random.key(0)
        )
    assert decode.compilations == 2


def test_stream_yields_what_generate_returns():
    decode = generator()
    mask = np.arange(PROMPT.shape[1]) >= np.arange(len(PROMPT))[:, None] % 2  # every other row begins with padding
    for config, options, every in (
        (GREEDY, {}, 1),
        (GREEDY, {}, 100),
        (GREEDY.replace(do_sample=True, repetition_penalty=9.0), {"prompt_mask": mask, "key": jax.random.key(0)}, 3),
    ):
        whole = decode(tables(), PROMPT, PROMPT, config, **options).trim()
        before = decode.compilations
        pieces = list(decode.stream(tables(), PROMPT, PROMPT, config, **options, every=every))
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.sequences[:, 2:])
        assert all(piece.shape[1] == every for piece in pieces[:-1])
        assert decode.compilations - before <= 2


def test_buckets_respect_the_models_limit():
    config, wanted = bucketed(GREEDY.replace(max_new_tokens=100), 4, limit=110)
    assert (config.max_new_tokens, wanted) == (106, 100)
    with pytest.raises(UsageError, match="the model holds 50"):
        bucketed(GREEDY.replace(max_new_tokens=100), 4, limit=50)


# --- drafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "batch", "drafted"), [("itself", 1, 4), ("noisy", 3, 4), ("noisy", 1, 1), ("another", 1, 2)]
)
def test_drafting_changes_nothing_but_the_number_of_rounds(batch, drafted, draft):
    target = tiny_transformer.weights(0)
    other = tiny_transformer.weights(0, noise=0.02) if draft == "noisy" else tiny_transformer.weights(5)
    helper = target if draft == "itself" else other
    prompt = np.array([[1], [7], [4]])[:batch]
    config = GREEDY.replace(max_new_tokens=20, repetition_penalty=1.3, eos_token_id=(3, 4))

    @quick
    def assisted(target, helper, prompt):
        room = 1 + 20 + drafted
        return assisted_generate(
            functools.partial(tiny_transformer.multi_step, target),
            functools.partial(tiny_transformer.multi_step, helper),
            tiny_transformer.start(target, batch, room),
            tiny_transformer.start(helper, batch, room),
            prompt,
            config,
            num_assistant_tokens=drafted,
        )

    step = functools.partial(tiny_transformer.step, target)
    expected = quick(lambda prompt: generate(step, tiny_transformer.start(target, batch, 21), prompt, config))(prompt)
    result = assisted(target, helper, prompt)
    np.testing.assert_array_equal(result.sequences, expected.sequences)
    np.testing.assert_array_equal(result.lengths, expected.lengths)
    new = int(expected.lengths.max()) - 1
    if draft == "itself":
        assert int(result.rounds) == -(-(new - 1) // (drafted + 1))
    if draft == "another":
        assert int(result.accepted) < new - 1
    assert int(result.rounds) <= new - 1


@pytest.mark.parametrize(("batch", "size"), [(1, 3), (3, 2)])
def test_looking_up_drafts_changes_nothing_but_the_number_of_rounds(batch, size):
    target, drafted = tiny_transformer.weights(0), 4
    prompt = np.array([[1, 2, 5], [7, 7, 7], [4, 1, 4]])[:batch]
    config = GREEDY.replace(max_new_tokens=24, eos_token_id=12)
    start = functools.partial(tiny_transformer.start, target, batch)

    @quick
    def assisted(target, prompt):
        several = functools.partial(tiny_transformer.multi_step, target)
        return assisted_generate(
            several,
            None,
            start(27 + drafted),
            None,
            prompt,
            config,
            num_assistant_tokens=drafted,
            max_matching_ngram_size=size,
        )

    step = functools.partial(tiny_transformer.step, target)
    expected = quick(lambda prompt: generate(step, start(27), prompt, config))(prompt)
    result = assisted(target, prompt)
    np.testing.assert_array_equal(result.sequences, expected.sequences)
    np.testing.assert_array_equal(result.lengths, expected.lengths)
    # By hand, from the finished sequences: how many rounds it takes.
    rows, ends = np.asarray(expected.sequences), np.asarray(expected.lengths)
    length, rounds = 4, 0
    while length < ends.max():
        kept = []
        for row, end in zip(rows, ends, strict=True):
            if length >= end:
                continue
            seen, follows = row[:length].tolist(), 0
            for n in range(1, size + 1):
                places = [i for i in range(length - n) if seen[i : i + n] == seen[-n:]]
                follows = places[0] + n if places else follows
            known = seen + [config.fill_token_id] * drafted
            wrong = np.array(known[follows : follows + drafted]) != np.append(row, [-1] * drafted)[length:][:drafted]
            kept.append(int(np.argmax(np.append(wrong, True))))
        length, rounds = length + min(kept) + 1, rounds + 1
    assert int(result.rounds) == rounds
    assert rounds < ends.max() - 4


# --- options ---------------------------------------------------------------------------------------------------------


def test_unknown_options_are_named_with_their_neighbours():
    for make in (lambda: GenerationConfig(num_beam=2), lambda: GREEDY.replace(num_beam=2)):
        with pytest.raises(UsageError, match="'num_beam'; did you mean 'num_beams'"):
            make()
    with pytest.raises(UsageError, match=r"'max_time' is not offered here: .* sees no clock"):
        GREEDY.replace(max_time=2.0)
    with pytest.raises(UsageError, match="'lang_to_id'"):
        GenerationConfig.from_dict({"lang_to_id": {}})
    relaxed = GenerationConfig.from_dict({"lang_to_id": {}, "num_beams": 4, "eos_token_id": [1, 2]}, strict=False)
    assert (relaxed.num_beams, relaxed.eos_token_ids) == (4, (1, 2))
    arrays = GenerationConfig(num_beams=np.int64(4), eos_token_id=np.array([1, 2]), do_sample=None)
    assert hash(relaxed) == hash(arrays) == hash(GenerationConfig(num_beams=4, eos_token_id=(1, 2)))


def test_what_none_and_mappings_mean():
    assert GenerationConfig(top_k=None).top_k is None  # all tokens
    assert GenerationConfig(num_beams=None).num_beams == 1
    assert GenerationConfig.from_dict({"top_k": None}).top_k == 50
    assert GenerationConfig.over({"max_new_tokens": 5}, {"max_length": 13}).new_tokens(4) == 9
    assert GenerationConfig.over({"max_new_tokens": 5}, {"max_length": None}).new_tokens(4) == 5
    bias = GenerationConfig(sequence_bias={(5, 6): 1.0})
    assert bias == GenerationConfig(sequence_bias=[[[5, 6], 1.0]])
    assert GenerationConfig(num_beams=2, patience=0.2).max_candidates == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be between"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most 2"),
        ({"early_stopping": "soon"}, "early_stopping='soon'"),
        ({"early_stopping": 1}, "early_stopping=1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"num_beams": "2"}, "num_beams='2' must be a whole number"),
        ({"top_p": "0.9"}, "top_p='0.9' must be a number"),
        ({"do_sample": "no"}, "do_sample='no' must be True or False"),
        ({"suppress_tokens": 5}, "suppress_tokens=5 must be a list of token ids"),
        ({"bad_words_ids": [1, 2]}, r"bad_words_ids=\(1, 2\) must be a list of lists"),
        ({"bad_words_ids": [[]]}, "without an empty list"),
        ({"sequence_bias": {5: 1.0}}, "must be pairs of a list of token ids"),
        ({"forced_decoder_ids": [[1, None]]}, "must be pairs of an index and a token id"),
        ({"exponential_decay_length_penalty": [1]}, "must be a pair of a whole number and a factor"),
        ({"eos_token_id": "</s>"}, "must be a token id, or a list of them"),
        ({"length_penalty": float("nan")}, "must be a finite number"),
        ({"num_beams": 2, "patience": float("inf")}, "must be greater than 0, and finite"),
        ({"num_beams": 2, "patience": 1.0, "do_sample": True}, "used with num_beams > 1 and do_sample=False"),
        ({"num_beams": 3, "patience": 0.5, "num_return_sequences": 4}, "at most 3"),
        ({"num_beams": 2, "patience": 2.0, "num_return_sequences": 5}, "at most 4"),
        ({"sequence_bias": [[[], 1.0]]}, r"sequence_bias=.* must be without an empty list"),
        ({"min_length": -1}, "min_length=-1 must be 0 or more"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be 0 or more"),
        ({"top_k": -1}, "top_k=-1 must be 0 or more"),
        ({"typical_p": 0.0}, "typical_p=0.0 must be greater than 0"),
        ({"top_p": True}, "top_p=True must be a number"),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(UsageError, match=message):
        GenerationConfig(**options)


def test_impossible_calls():
    with pytest.raises(UsageError, match="nothing is left to generate"):
        run(tables(), PROMPT, GenerationConfig(max_length=2))
    with pytest.raises(UsageError, match="needs a key"):
        run(tables(), PROMPT, GREEDY.replace(do_sample=True))
    for token in (-1, VOCABULARY):
        with pytest.raises(UsageError, match=f"forced token {token} is not in the vocabulary"):
            run(tables(), PROMPT, GREEDY.replace(forced_eos_token_id=token))
        with pytest.raises(UsageError, match=rf"names the tokens \[1, {token}\], of which one is not in"):
            run(tables(), PROMPT, GREEDY.replace(bad_words_ids=((1, token),)))
    with pytest.raises(UsageError, match="streamer needs num_beams=1"):
        run(tables(), PROMPT, GREEDY.replace(num_beams=2), streamer=print)
    with pytest.raises(UsageError, match="2 random keys were given for 3 rows"):
        run(tables(), PROMPT, GREEDY.replace(do_sample=True), key=jax.random.split(jax.random.key(0)))


def test_words_longer_than_the_text_are_not_in_it():
    short = GREEDY.replace(max_new_tokens=3)
    found = run(tables(), PROMPT, short.replace(bad_words_ids=((4,) * 9,), no_repeat_ngram_size=9))
    np.testing.assert_array_equal(found.sequences, run(tables(), PROMPT, short).sequences)


def test_tokens_that_are_forced_stand_where_they_are_said_to():
    length = PROMPT.shape[1]
    found = run(tables(), PROMPT, GREEDY.replace(forced_decoder_ids=((length, 7), (length + 2, 4))))
    assert found.sequences[:, length].tolist() == [7] * 3
    assert found.sequences[:, length + 2].tolist() == [4] * 3
    free = run(tables(), PROMPT, GREEDY)
    assert (free.sequences[:, length] != 7).any()
    assert (free.sequences[:, length + 2] != 4).any()


def test_zeros_of_either_sign_are_as_probable():
    assert np.isfinite(TopP(0.7)(jnp.array([[0.5, 0.0, -0.0]]), PROMPT, jnp.asarray(1))).all()


def test_what_is_no_token_has_not_been_said():
    """A padding token behind the vocabulary is in the sequence, and no logit is its."""
    logits = jnp.arange(1.0, 5.0)[None]
    found = RepetitionPenalty(2.0)(logits, jnp.array([[4, 1, 4, 3]]), jnp.asarray(3))
    np.testing.assert_array_equal(found, [[1.0, 1.0, 3.0, 4.0]])


def test_what_is_not_filled_yet_completes_nothing():
    for banned, tokens in (
        (EncoderNoRepeatNGram(4, jnp.array([[5, 6, 7, 8]])), [7, 0, 0, 5, 6]),
        (SequenceBias((((5, 6, 7, 8), -np.inf),)), [0, 0, 5, 6, 7]),
    ):
        logits = banned(jnp.zeros((1, VOCABULARY)), jnp.array([tokens]), jnp.asarray(1))
        assert np.isfinite(logits).all(), banned


def test_a_stopping_rule_ends_its_row_only():
    def two_in_a_row(tokens, length):
        last = jax.lax.dynamic_slice_in_dim(tokens, length - 2, 2, axis=1)
        return (length >= 4) & (last[:, 0] == last[:, 1])

    free, stopped = run(tables(), PROMPT, GREEDY), run(tables(), PROMPT, GREEDY, stopping=(two_in_a_row,))
    for row in range(3):
        tokens = free.new_tokens(row)
        repeats = [i + 1 for i in range(1, len(tokens)) if tokens[i] == tokens[i - 1]]
        assert stopped.new_tokens(row) == tokens[: repeats[0] if repeats else None]
