"""The decoding loop against `transformers.generate` and OpenAI's beam search, on identical logits.

Both sides read the same table of logits (`tests/decoding/table_model.py`), equal to the bit, so that only the search is
compared: tokens must be equal, scores equal to float32 rounding.
"""

from __future__ import annotations

import functools
import random

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from audiozoo.decoding import GenerationConfig, beam, generate
from audiozoo.decoding import cache as caches
from audiozoo.decoding import processors as ours
from audiozoo.decoding.generate import Search
from tests.decoding import table_model
from tests.parity.harness import precision
from tests.tolerances import tolerance

pytestmark = pytest.mark.reference

VOCABULARY, PAD, BATCH, PROMPT, NEW = 13, 11, 3, 2, 14


class TableConfig(PretrainedConfig):
    model_type = "table"


class TableModel(PreTrainedModel, GenerationMixin):
    """The table of logits as a PyTorch language model."""

    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, tables):
        super().__init__(TableConfig(vocab_size=VOCABULARY))
        self.tables = tables
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        logits = torch.from_numpy(table_model.logits_of(self.tables, input_ids.numpy()))
        return CausalLMOutputWithPast(logits=logits[:, None])


@pytest.fixture(autouse=True)
def _single_precision():
    """`transformers` searches in float32 whatever the model computes in."""
    with precision("float32"):
        yield


# Compiling is what this module spends its time on, hence the lowest optimisation level.
@functools.partial(jax.jit, static_argnames="config", compiler_options={"xla_backend_optimization_level": 0})
def _run(tables, prompt, config, mask=None, noise=None):
    cache = table_model.start(prompt, prompt.shape[1] + config.new_tokens(prompt.shape[1]))
    step = functools.partial(table_model.step, tables)
    # `transformers` takes the prompt for the encoder's input where there is no encoder.
    return generate(step, cache, prompt, config, prompt_mask=mask, noise=noise, encoder_tokens=prompt)


def _both(tables, prompt, options, mask=None, noise=None):
    """The same options on both sides, all outputs asked for."""
    wanted = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    options = {"pad_token_id": PAD, **wanted, **options}
    if "max_length" not in options:
        options = {"max_new_tokens": NEW, **options}
    result = _run(tables, prompt, GenerationConfig(**options), mask, noise).trim()
    theirs = {key: [list(w) for w in value] if key == "bad_words_ids" else value for key, value in options.items()}
    if "sequence_bias" in theirs:
        theirs["sequence_bias"] = {tuple(tokens): bias for tokens, bias in options["sequence_bias"]}
    theirs = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    expected = TableModel(tables).generate(
        torch.from_numpy(prompt),
        attention_mask=torch.from_numpy(np.ones_like(prompt) if mask is None else mask.astype(np.int64)),
        use_cache=False,
        **{"do_sample": False, **theirs},
    )
    return result, expected


def _close(actual, expected):
    entry = tolerance("scores", "float32")
    np.testing.assert_allclose(actual, expected, rtol=entry.rtol, atol=entry.atol)


def _compare(result, expected):
    np.testing.assert_array_equal(result.sequences, expected.sequences.numpy())
    assert len(expected.scores) == result.steps
    if getattr(expected, "beam_indices", None) is not None:
        np.testing.assert_array_equal(result.beam_indices, expected.beam_indices.numpy())
    if getattr(expected, "sequences_scores", None) is not None:
        _close(result.sequences_scores, expected.sequences_scores.numpy())
    for name in ("scores", "logits"):
        for actual, wanted in zip(getattr(result, name), getattr(expected, name), strict=True):
            _close(actual, wanted.numpy())


def _prompt(seed, length=PROMPT):
    return np.random.default_rng(1000 + seed).integers(0, VOCABULARY, size=(BATCH, length))


def _check(options, seeds, prompt=PROMPT, **tables_options):
    eos = options.get("eos_token_id", ())
    eos = (eos,) if isinstance(eos, int) else eos
    for seed in seeds:
        scale = (0.5, 1.5, 4.0)[seed % 3]
        tables = table_model.make_tables(seed, VOCABULARY, scale=scale, eos=eos, **tables_options)
        _compare(*_both(tables, _prompt(seed, prompt), options))


CONSTRAINTS = {
    "none": {},
    "repetition": {"repetition_penalty": 1.4},
    "repetition<1": {"repetition_penalty": 0.8},
    "1-gram": {"no_repeat_ngram_size": 1, "max_new_tokens": 5},
    "2-grams": {"no_repeat_ngram_size": 2},
    "3-grams": {"no_repeat_ngram_size": 3},
    "suppress": {"suppress_tokens": (1, 4, 5), "begin_suppress_tokens": (2, 3)},
    "bad words": {"bad_words_ids": ((4,), (2, 6), (1, 7, 2), (3,))},
    "bias": {"sequence_bias": (((5,), 2.0), ((1, 2), -3.0), ((3, 4), 4.0), ((8, 4), 1.0), ((3, 2, 1), 5.0))},
    "forced": {"forced_eos_token_id": 3},
    "min_length": {"min_length": 9},
    "min_new_tokens": {"min_new_tokens": 6, "min_length": 1},
    "decay": {"exponential_decay_length_penalty": (4, 1.3)},
    "renormalize": {"renormalize_logits": True, "suppress_tokens": (2,)},
    "max_length": {"max_length": 9},
    "one token": {"max_new_tokens": 1},
    "source": {"encoder_repetition_penalty": 1.6, "encoder_no_repeat_ngram_size": 2, "remove_invalid_values": True},
}
EOS = {"one eos": {"eos_token_id": 3}, "two eos": {"eos_token_id": (3, 8)}, "no eos": {}}
UNPADDED = {"eos_token_id": (8, 3), "pad_token_id": None, "max_new_tokens": None}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_greedy(constraint):
    _check({**CONSTRAINTS[constraint], "eos_token_id": 3}, range(10))


@pytest.mark.parametrize("eos", EOS)
def test_end_of_sequence(eos):
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        _check({**EOS[eos], **options, "suppress_tokens": (5,)}, range(10))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_first_token_that_is_forced(beams):
    """Behind a prompt of one token; and without a padding token or a length, of which there are defaults."""
    options = {**UNPADDED, "num_beams": beams, "forced_bos_token_id": 7, "begin_suppress_tokens": (2, 5)}
    _check(options, range(6), prompt=1)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("length_penalty", "beams"), [(-1.5, 3), (0.0, 5), (0.6, 2), (1.0, 3), (2.0, 5)])
def test_beams_and_lengths(beams, early_stopping, length_penalty):
    options = {"num_beams": beams, "early_stopping": early_stopping, "length_penalty": length_penalty}
    _check({**options, "num_return_sequences": 2, "eos_token_id": (3, 8) if beams == 3 else 3}, range(10))


@pytest.mark.parametrize("constraint", sorted(set(CONSTRAINTS) - {"none"}))
def test_beams_and_constraints(constraint):
    _check({**CONSTRAINTS[constraint], "eos_token_id": 3, "num_beams": 3, "num_return_sequences": 3}, range(10))


def _random_options(seed):
    draw = random.Random(seed)
    options = {}
    for name in draw.sample(sorted(CONSTRAINTS), k=draw.choice((1, 2, 3))):
        options.update(CONSTRAINTS[name])
    if "max_length" in options:
        options.pop("max_new_tokens", None)
    options.update(EOS[draw.choice(("one eos", "two eos"))])
    beams = draw.choice((1, 1, 2, 4))
    if beams > 1:
        options.update(
            num_beams=beams,
            num_return_sequences=draw.randint(1, beams),
            early_stopping=draw.choice((True, False, "never")),
            length_penalty=draw.choice((-1.0, 0.0, 0.7, 1.0, 2.0)),
        )
    return options


@pytest.mark.parametrize("seed", range(25))
def test_random_combinations(seed):
    _check(_random_options(seed), range(seed, seed + 9))


# --- sampling --------------------------------------------------------------------------------------------------------

WARPERS = {
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top_k": {"top_k": 4},
    "top_p": {"top_k": 0, "top_p": 0.7},
    "min_p": {"top_k": 0, "min_p": 0.1},
    "typical": {"top_k": 0, "typical_p": 0.6},
    "cutoffs": {"top_k": 0, "epsilon_cutoff": 0.05, "eta_cutoff": 0.1},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("warper", WARPERS)
def test_sampling_with_the_same_noise(warper, monkeypatch):
    """With `torch.multinomial` replaced by the Gumbel trick on our noise, tokens and processed scores are equal."""
    for seed in range(4):
        noise = np.random.default_rng(seed).gumbel(size=(NEW, BATCH, VOCABULARY)).astype(np.float32)
        steps = iter(noise)

        def multinomial(probabilities, num_samples, steps=steps):
            assert num_samples == 1
            return (probabilities.log() + torch.from_numpy(next(steps))).argmax(-1, keepdim=True)

        monkeypatch.setattr(torch, "multinomial", multinomial)
        options = {"do_sample": True, "eos_token_id": 3, **WARPERS[warper]}
        lookup = table_model.make_tables(seed, VOCABULARY, eos=(3,))
        _compare(*_both(lookup, _prompt(seed), options, noise=noise))


def test_beam_sampling_with_the_same_noise(monkeypatch):
    for seed in range(4):
        noise = np.random.default_rng(seed).gumbel(size=(NEW, BATCH, 3 * VOCABULARY)).astype(np.float32)
        steps = iter(noise)

        def multinomial(probabilities, num_samples, steps=steps):
            return (probabilities.log() + torch.from_numpy(next(steps))).topk(num_samples).indices

        monkeypatch.setattr(torch, "multinomial", multinomial)
        options = {"do_sample": True, "eos_token_id": 3, "num_beams": 3, "num_return_sequences": 2, "temperature": 1.5}
        lookup = table_model.make_tables(seed, VOCABULARY, eos=(3,))
        _compare(*_both(lookup, _prompt(seed), options, noise=noise))


@pytest.mark.parametrize("eos", [None, 3, (3, 8)])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_shapes_the_distribution(beams, eos):
    """Which warpers there are, in which order, and how many tokens they keep; also at the ends of their ranges."""
    logits = np.random.default_rng(beams).normal(size=(5, VOCABULARY)).astype(np.float32)
    tokens = np.zeros((5, NEW), np.int32)
    for options in (
        {},
        {"top_k": 1},
        {"top_k": None, "top_p": 0.01},
        {"top_k": 0, "min_p": 1.0},
        {"top_k": 0, "typical_p": 0.01},
        {"top_k": 0, "epsilon_cutoff": 0.99},
        {"top_k": 0, "eta_cutoff": 0.99},
        {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 1.0, "eta_cutoff": 1.0},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 0.5, "renormalize_logits": True},
    ):
        common = {"do_sample": True, "num_beams": beams, **options}
        wanted = transformers.GenerationConfig(**common, eos_token_id=list(eos) if isinstance(eos, tuple) else eos)
        model = TableModel(None)
        model._prepare_special_tokens(wanted)
        chain = model._get_logits_processor(wanted, input_ids_seq_length=PROMPT)
        found = ours.apply(
            ours.warpers_from_config(GenerationConfig(**common, eos_token_id=eos)), logits, tokens, np.int32(NEW)
        )
        _close(found, chain(torch.from_numpy(tokens), torch.from_numpy(logits.copy())).numpy())


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
def test_left_padding_is_not_a_repetition(beams):
    prompt = np.array([[PAD, PAD, 1], [PAD, 4, 2], [3, 5, 6]])
    mask = prompt != PAD
    options = {"repetition_penalty": 2.0, "num_beams": beams}
    lookup = table_model.make_tables(3, VOCABULARY, scale=1.0)
    lookup.position[:, PAD] += 1.0  # the padding token is also an attractive word
    _compare(*_both(lookup, prompt, options, mask=mask))
    unmasked, _ = _both(lookup, prompt, options)
    masked, _ = _both(lookup, prompt, options, mask=mask)
    assert not np.array_equal(unmasked.sequences, masked.sequences)


def test_padding_zero_is_padding_where_the_reference_fills_with_end_of_sequence():
    options = {"pad_token_id": 0, "eos_token_id": 3, "num_beams": 2}
    seen = 0
    for seed in range(6):
        lookup = table_model.make_tables(seed, VOCABULARY, eos=(3,))
        result, expected = _both(lookup, _prompt(seed), options)
        for row, length in enumerate(result.lengths):
            theirs = expected.sequences[row].numpy()
            np.testing.assert_array_equal(result.sequences[row, :length], theirs[:length])
            assert (result.sequences[row, length:] == 0).all()
            assert (theirs[length:] == 3).all()
            seen += len(theirs) - length
    assert seen > 0


# --- OpenAI's beam search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beams", "patience"), [(2, 1.0), (3, 2.0), (5, 0.6)])
def test_patient_beam_search_is_openais(beams, patience):
    from whisper.decoding import BeamSearchDecoder, MaximumLikelihoodRanker

    class Inference:
        def rearrange_kv_cache(self, source_indices):
            pass

    eos, returned = 3, max(beams, round(beams * patience))
    options = GenerationConfig(
        max_new_tokens=NEW,
        num_beams=beams,
        patience=patience,
        num_return_sequences=min(returned, round(beams * patience)),
        begin_suppress_tokens=(eos,),  # as Whisper does; OpenAI's ranking divides by zero on an empty text
        eos_token_id=eos,
        pad_token_id=eos,
    )
    for seed in range(10):
        lookup = table_model.make_tables(seed, VOCABULARY, scale=(0.5, 1.5, 4.0)[seed % 3], eos=(eos,))
        prompt = _prompt(seed)
        result = _run(lookup, prompt, options).trim()

        decoder = BeamSearchDecoder(beams, eos, Inference(), patience)
        tokens = torch.from_numpy(prompt).repeat_interleave(beams, dim=0)
        totals = torch.zeros(BATCH * beams)
        for index in range(NEW):
            logits = torch.from_numpy(table_model.logits_of(lookup, tokens.numpy()))
            if index == 0:
                logits[:, eos] = -torch.inf
            tokens, completed = decoder.update(tokens, logits, totals)
            if completed:
                break
        grouped, sums = decoder.finalize(tokens.reshape(BATCH, beams, -1), totals.reshape(BATCH, beams))
        new = [[row[PROMPT:] for row in rows] for rows in grouped]  # the prompt may hold eos
        found = [[row[: (row == eos).nonzero()[0, 0]] for row in rows] for rows in new]
        best = MaximumLikelihoodRanker(None).rank(found, sums)
        for example in range(BATCH):
            rows = slice(example * options.num_return_sequences, (example + 1) * options.num_return_sequences)
            ours_by_text = {
                tuple(token for token in result.new_tokens(row) if token != eos): result.sum_log_probs[row]
                for row in range(rows.start, rows.stop)
                if result.lengths[row] > PROMPT
            }
            theirs = {tuple(row.tolist()): total for row, total in zip(found[example], sums[example], strict=True)}
            first = tuple(token for token in result.new_tokens(rows.start) if token != eos)
            assert first == tuple(found[example][best[example]].tolist())
            assert set(ours_by_text) <= set(theirs)
            assert len(ours_by_text) == min(len(theirs), options.num_return_sequences)
            for text, total in ours_by_text.items():
                _close(total, theirs[text])


# --- processors one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_processor(dtype):
    from transformers.generation import logits_process as theirs

    eos, source = (3, 8), np.array([[1, 2, 1, 4, 2, 1], [5, 5, 6, 7, 5, 6]])
    source_t, mask = torch.from_numpy(source), torch.tensor([2, 0])
    bias = {(5,): 2.0, (1, 2): -3.0, (3, 4): 4.0, (8, 4): 1.0, (3, 2, 1): 5.0}
    bad = [[4], [2, 6], [1, 7, 2], [3]]
    bad_ours = tuple((tuple(word), -np.inf) for word in bad if word != [3])
    pairs = [
        (ours.SuppressTokens((1, 4, 99)), theirs.SuppressTokensLogitsProcessor([1, 4, 99])),
        (ours.SuppressTokensAtBegin((1, 4), 5), theirs.SuppressTokensAtBeginLogitsProcessor([1, 4], 5)),
        (ours.MinLength(6, eos), theirs.MinLengthLogitsProcessor(6, list(eos))),
        (ours.MinLength(3 + 4, eos), theirs.MinNewTokensLengthLogitsProcessor(3, 4, list(eos))),
        (ours.ForcedTokens(((1, 7),)), theirs.ForcedBOSTokenLogitsProcessor(7)),
        (ours.ForcedTokens(((8 - 1, eos),)), theirs.ForcedEOSTokenLogitsProcessor(8, list(eos))),
        (ours.RepetitionPenalty(1.7), theirs.RepetitionPenaltyLogitsProcessor(1.7)),
        (ours.RepetitionPenalty(1.7, mask.numpy()), theirs.RepetitionPenaltyLogitsProcessor(1.7, mask)),
        (ours.EncoderRepetitionPenalty(1.7, source), theirs.EncoderRepetitionPenaltyLogitsProcessor(1.7, source_t)),
        *((ours.NoRepeatNGram(n), theirs.NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3, 4)),
        *(
            (ours.EncoderNoRepeatNGram(n, source), theirs.EncoderNoRepeatNGramLogitsProcessor(n, source_t))
            for n in (2, 3)
        ),
        (ours.SequenceBias(tuple(bias.items())), theirs.SequenceBiasLogitsProcessor(bias)),
        (ours.SequenceBias(bad_ours), theirs.NoBadWordsLogitsProcessor(bad, list(eos))),
        (
            ours.ExponentialDecayLengthPenalty(3 + 2, 1.3, eos),
            theirs.ExponentialDecayLengthPenalty((2, 1.3), list(eos), 3),
        ),
        (ours.RemoveInvalidValues(), theirs.InfNanRemoveLogitsProcessor()),
        (ours.Normalize(), theirs.LogitNormalization()),
        (ours.Temperature(0.3), theirs.TemperatureLogitsWarper(0.3)),
        *((ours.TopK(k, 2), theirs.TopKLogitsWarper(k, min_tokens_to_keep=2)) for k in (1, 5, 12, 99)),
        *((ours.TopP(p, 2), theirs.TopPLogitsWarper(p, min_tokens_to_keep=2)) for p in (0.05, 0.5, 0.9, 0.999)),
        *((ours.MinP(p, 2), theirs.MinPLogitsWarper(p, min_tokens_to_keep=2)) for p in (0.0, 0.05, 0.5, 1.0)),
        *((ours.TypicalP(p, 2), theirs.TypicalLogitsWarper(p, min_tokens_to_keep=2)) for p in (0.05, 0.5, 0.9)),
        *((ours.EpsilonCutoff(e, 2), theirs.EpsilonLogitsWarper(e, min_tokens_to_keep=2)) for e in (0.01, 0.1, 0.9)),
        *((ours.EtaCutoff(e, 2), theirs.EtaLogitsWarper(e, min_tokens_to_keep=2)) for e in (0.01, 0.1, 0.9)),
    ]
    entry = tolerance("output", "float64") if dtype == "float64" else tolerance("scores", "float32")
    changed = set()
    with jax.enable_x64(dtype == "float64"):
        for mine, reference in pairs:
            apply = jax.jit(
                lambda *arguments, mine=mine: mine(*arguments), compiler_options={"xla_backend_optimization_level": 0}
            )
            for seed, length in [(seed, length) for seed in range(4) for length in (1, 2, 3, 5, 6, 7, 14)]:
                rng = np.random.default_rng([seed, length])
                logits = (3 * rng.normal(size=(2, VOCABULARY))).astype(dtype)
                logits[rng.random(logits.shape) < 0.15] = -np.inf
                tokens = rng.integers(0, 5, size=(2, 14)) if seed else np.tile([3, 2, 1, 2, 4, 3, 4], (2, 2))
                if isinstance(mine, ours.SequenceBias):
                    logits = np.maximum(logits, -50)  # their index arithmetic is for finite logits
                actual = np.asarray(apply(logits, tokens, np.int32(length)))
                given, seen = torch.from_numpy(logits.copy()), torch.from_numpy(tokens[:, :length])
                if length < getattr(reference, "ngram_size", 1) - 1:
                    continue
                expected = reference(seen, given).numpy()
                assert actual.dtype == logits.dtype, mine
                np.testing.assert_allclose(actual, expected, rtol=entry.rtol, atol=entry.atol, err_msg=repr(mine))
                if not np.array_equal(expected, logits):
                    changed.add(id(mine))
    # Only a top-k of (almost) the whole vocabulary and a min-p of 0 may leave everything as it was.
    idle = [mine for mine, _ in pairs if id(mine) not in changed]
    assert all(
        (isinstance(mine, ours.TopK) and mine.k >= VOCABULARY - 1) or mine == ours.MinP(0.0, 2) for mine in idle
    ), idle


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_through_a_transformers_model_with_encoder_and_cache(beams):
    """Our loop drives BART through a callback, without a cache; `transformers` drives it with its own."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=31,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=40,
        init_std=0.7,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    source = torch.randint(3, 31, (3, 7), generator=torch.Generator().manual_seed(1))
    options = {
        "max_new_tokens": 16,
        "eos_token_id": (2, 9),
        "pad_token_id": 1,
        "num_beams": beams,
        "length_penalty": 0.5,
    }
    options["num_return_sequences"] = beams

    def logits_after(tokens, length, source):
        with torch.no_grad():
            ids = torch.from_numpy(np.array(source)).long()
            decoded = torch.from_numpy(np.array(tokens)[:, : int(length)]).long()
            return model(input_ids=ids, decoder_input_ids=decoded).logits[:, -1].numpy()

    def step(tokens, cache, position):
        written = jax.lax.dynamic_update_slice_in_dim(cache["tokens"], tokens, position, axis=1)
        shape = jax.ShapeDtypeStruct((tokens.shape[0], 31), np.float32)
        logits = jax.pure_callback(logits_after, shape, written, position + 1, cache["source"])
        return logits, {"tokens": written, "source": cache["source"]}

    prompt = np.full((3, 1), config.decoder_start_token_id, np.int32)
    cache = {"tokens": np.zeros((3, 17), np.int32), "source": source.numpy().astype(np.int32)}
    ours_result = generate(step, cache, prompt, GenerationConfig(**options)).trim()
    expected = model.generate(
        source,
        attention_mask=torch.ones_like(source),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **{**options, "eos_token_id": [2, 9]},
    )
    np.testing.assert_array_equal(ours_result.sequences, expected.sequences.numpy())
    if beams > 1:
        entry = tolerance("output", "float32")  # with and without a cache: another order of summation
        np.testing.assert_allclose(
            ours_result.sequences_scores, expected.sequences_scores.numpy(), rtol=entry.rtol, atol=entry.atol
        )


# --- mutation --------------------------------------------------------------------------------------------------------


def _wrong_penalty(self, generated, dtype):
    return (generated + 1) ** self.setup.config.length_penalty


def _never_stops(self, tokens, last, length):
    return jax.numpy.broadcast_to(length >= self.max_length, last.shape)


def _no_reorder(cache, rows, length):
    return cache


@pytest.mark.parametrize(
    ("place", "name", "mutant"),
    [
        (beam._Standard, "_penalty", _wrong_penalty),
        (Search, "stops", _never_stops),
        (caches, "reorder", _no_reorder),
        (beam, "_NEVER", -1.0),
    ],
)
def test_a_wrong_search_is_noticed(place, name, mutant, monkeypatch):
    options = {
        "num_beams": 3,
        "length_penalty": 0.7,
        "num_return_sequences": 3,
        "eos_token_id": 3,
        "max_new_tokens": 13,
    }
    _check(options, range(6))
    _run.clear_cache()
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises(AssertionError):
        _check(options, range(6))
    _run.clear_cache()
