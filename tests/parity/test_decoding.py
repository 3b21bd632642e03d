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
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from audiozoo.decoding import GenerationConfig, generate
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
    return generate(step, cache, prompt, config, prompt_mask=mask, noise=noise)


def _both(tables, prompt, options, mask=None, noise=None):
    """The same options on both sides, all outputs asked for."""
    options = {"pad_token_id": PAD, "output_scores": True, "return_dict_in_generate": True, **options}
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
    for actual, wanted in zip(result.scores, expected.scores, strict=True):
        _close(actual, wanted.numpy())


def _prompt(seed):
    return np.random.default_rng(1000 + seed).integers(0, VOCABULARY, size=(BATCH, PROMPT))


def _check(options, seeds, **tables_options):
    eos = options.get("eos_token_id", ())
    eos = (eos,) if isinstance(eos, int) else eos
    for seed in seeds:
        scale = (0.5, 1.5, 4.0)[seed % 3]
        tables = table_model.make_tables(seed, VOCABULARY, scale=scale, eos=eos, **tables_options)
        _compare(*_both(tables, _prompt(seed), options))


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
}
EOS = {"one eos": {"eos_token_id": 3}, "two eos": {"eos_token_id": (3, 8)}, "no eos": {}}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_greedy(constraint):
    _check({**CONSTRAINTS[constraint], "eos_token_id": 3}, range(10))


@pytest.mark.parametrize("eos", EOS)
def test_end_of_sequence(eos):
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        _check({**EOS[eos], **options, "suppress_tokens": (5,)}, range(10))


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


@pytest.mark.parametrize("seed", range(30))
def test_random_combinations(seed):
    _check(_random_options(seed), range(seed, seed + 9))
