"""Stacked layers: the numbers of the loop over layers, by a program as long as that of one layer."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo import loading, registry, sharding
from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, abstract
from audiozoo.layers.stacking import Scanned, layer_drop, rematerialise, scanned, stacks, unscanned
from audiozoo.models import unispeech_sat, wav2vec2_bert
from audiozoo.models.conformer import ConformerConfig, ConformerEncoder
from audiozoo.models.speecht5 import SpeechT5Config, SpeechT5Decoder
from audiozoo.models.whisper import WhisperForAudioClassification, WhisperForConditionalGeneration
from audiozoo.recipes import plan
from audiozoo.training.loop import Options
from audiozoo.training.parameters import join, partition
from tests.models.random_model import random_model
from tests.training import small_plans as small

# How many stacks each small model has: the encoders and decoders of Transformers, and nothing else that is a list.
STACKS = {
    **dict.fromkeys(("wav2vec2", "hubert", "sew", "unispeech", "unispeech_sat", "mms", "wav2vec2_bert"), 1),
    "wavlm": 0,  # the first of its two blocks holds the table of positions
    "whisper": 2,
    "wav2vec2_conformer": 1,
    "audio_spectrogram_transformer": 1,
    "clap": 0,  # one block in each stage
    "pop2piano": 2,
    "vits": 1,
    "speecht5": 2,
    "hifigan": 0,
    "xls_r": 2,
    "speech_to_text": 2,
    "speech_to_text_2": 1,
    "encodec": 0,
    "bark": 1,
    "musicgen": 2,
    "seamless_m4t": 3,
    "seamless_m4t_v2": 2,
}


def count(model):
    return sum(isinstance(layer, Scanned) for _, _, layers in stacks(model) for layer in layers)


def filled(shapes, dtype=np.float64):
    """Random inputs of these shapes: tokens of a small vocabulary, all to be seen."""
    rng, values = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        if not hasattr(shape, "shape"):
            values[name] = shape
        elif "mask" in name:
            values[name] = jnp.ones(shape.shape, jnp.int32)
        elif shape.dtype == jnp.int32:
            values[name] = jnp.asarray(
                rng.integers(0 if name == "languages" else 3, 2 if name == "languages" else 8, shape.shape)
            )
        else:
            values[name] = jnp.asarray(0.3 * rng.standard_normal(shape.shape), dtype)
    return values


@pytest.mark.parametrize("paper", small.CONFIGURATIONS)
def test_transformers_are_stacked_and_nothing_else(paper):
    """Every forward can still be called: arrays of the same shapes and dtypes, None between blocks, no weights."""
    choice = small.choice(paper)
    model = choice.create(None, jnp.float32)
    deep = scanned(model)
    assert count(deep) == STACKS[paper]
    shapes = plan.inputs(choice, small.AMOUNT)
    static = {name: value for name, value in shapes.items() if not hasattr(value, "shape")}
    traced = {name: value for name, value in shapes.items() if name not in static}
    asked = {"output_hidden_states": True} if STACKS[paper] else {}
    ours, theirs = (jax.eval_shape(lambda m, x: m(**x, **static, **asked), m, traced) for m in (deep, model))
    flat = [jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (ours, theirs)]
    known = [(a, b) for a, b in zip(*flat, strict=True) if a is not None]
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in known)
    assert bool(STACKS[paper]) == (len(known) < len(jax.tree.leaves(theirs)))
    if STACKS[paper]:
        with pytest.raises(UsageError, match="no attention weights and no cache"):
            jax.eval_shape(lambda m, x: m(**x, **static, output_attentions=True), deep, traced)
    forms = [jax.tree.structure(m) for m in (unscanned(deep), model)]
    assert forms[0] == forms[1]
    # What is stacked is divided by `tensor`: every product of its blocks but the small ones named here.
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
    stacked = {n: leaf for n, leaf in loading.variables(deep).items() if ".stacked." in n and n.endswith(".kernel")}
    products = {n: leaf for n, leaf in stacked.items() if leaf.ndim == 3}
    places = sharding.shardings_for(products, mesh, sharding.TRANSFORMER)
    assert all(place.spec[0] is None for place in places.values())  # each block lies whole with its neighbours
    whole = {n for n, place in places.items() if place.is_fully_replicated}
    assert not {n for n in whole if not re.search(r"gru_rel_pos_linear|adapter_layer|linear_pos|pointwise_conv", n)}


@pytest.mark.parametrize(
    "paper", ["whisper", *(pytest.param(p, marks=pytest.mark.slow) for p in ("wavlm", "sew_d", "seamless_m4t", "mms"))]
)
def test_numbers_and_gradients_are_those_of_the_loop(paper):
    """Encoders, decoders with cross-attention, blocks with statistics, and a first block unlike the others."""
    with jax.enable_x64(True):
        choice = small.choice(paper.removesuffix("_d"))
        config = choice.config
        if paper == "sew_d":
            choice = dataclasses.replace(choice, model_class="SEWDForCTC")
        if paper == "wavlm":
            config = dataclasses.replace(config, num_hidden_layers=3)
        cls = registry.paper_of_class(choice.model_class).model_class(choice.model_class)
        model = random_model(lambda rngs: cls(config, param_dtype=jnp.float64, rngs=rngs))
        batch = filled(plan.inputs(choice, plan.Amount(2, 0.4, 8), labels=True))

        def loss(model):
            if "unit_labels" in batch:
                return plan.finetuning_losses(model, **batch).total
            return model(**batch).loss

        found = []
        for network in (model, scanned(model)):
            skeleton, params, rest = partition(network)
            run = jax.jit(jax.value_and_grad(lambda p, s=skeleton, r=rest: loss(join(s, {**p, **r}))))
            value, gradient = run(params)
            found.append((value, partition(unscanned(join(skeleton, {**gradient, **rest})))[1]))
        assert count(network) == max(STACKS[choice.paper.name], 1)
        (a, ours), (b, theirs) = found
        np.testing.assert_allclose(a, b, rtol=1e-12)
        assert ours.keys() == theirs.keys()
        largest = max(float(jnp.abs(value).max()) for value in ours.values())
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, rtol=1e-9, atol=1e-12 * largest, err_msg=name)


def test_states_between_stacked_layers():
    """A stack ends where a state is looked at; where all are, there is a sentence."""
    config = dataclasses.replace(small.choice("unispeech_sat").config, num_hidden_layers=4, codevector_dim=8)
    speakers = dataclasses.replace(config, utterance_contrastive_layer=2)
    deep = scanned(unispeech_sat.UniSpeechSatForPreTraining(speakers, rngs=nnx.Rngs(0)))
    assert count(deep) == 2
    wave, key = jnp.zeros((2, 4000)), jax.random.key(0)
    output = jax.eval_shape(lambda x: deep(x, labels=jnp.ones((2, 9), int), key=key, output_hidden_states=True), wave)
    assert output.utterance_loss.shape == ()
    assert [state is None for state in output.hidden_states] == [False, True, False, True, False]
    halves = dataclasses.replace(small.choice("wav2vec2_bert").config, num_hidden_layers=4, num_contrastive_layers=2)
    deep = scanned(wav2vec2_bert.Wav2Vec2BertForPreTraining(halves, rngs=nnx.Rngs(0)))
    assert count(deep) == 2
    output = jax.eval_shape(lambda x: deep(x, key=key, output_hidden_states=True), jnp.zeros((2, 30, 160)))
    assert output.loss.shape == ()
    assert [state is None for state in output.hidden_states] == [False, True, False, True, False]
    mixed = dataclasses.replace(config, use_weighted_layer_sum=True)
    classifier = scanned(unispeech_sat.UniSpeechSatForSequenceClassification(mixed, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match="load the model unstacked"):
        jax.eval_shape(classifier, wave)
    hearing = dataclasses.replace(small.CONFIGURATIONS["whisper"][1], use_weighted_layer_sum=True)
    listener = scanned(abstract(lambda rngs: WhisperForAudioClassification(hearing, rngs=rngs)))
    with pytest.raises(UsageError, match="load the model unstacked"):
        jax.eval_shape(lambda m, x: m(x), listener, jnp.zeros((1, hearing.num_mel_bins, 100)))


def test_statistics_of_a_stack_move_as_those_of_its_layers():
    still = dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), 0.0)
    known = {f.name for f in dataclasses.fields(ConformerConfig)}
    config = ConformerConfig(16, 3, 2, 16, **{n: v for n, v in still.items() if n in known})
    model = random_model(lambda rngs: ConformerEncoder(config, rngs=rngs))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 16)), jnp.float32)

    @jax.jit
    def trained(model):
        out = model(x, dropout=Dropout(jax.random.key(0))).last_hidden_state
        return out, model

    @jax.jit
    def recomputed(model):
        rematerialise(model)
        return trained(model)

    (a, after), (b, deep), (c, again) = trained(model), trained(scanned(model)), recomputed(model)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    before = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    assert before
    pairs = zip(*(nnx.to_flat_state(nnx.state(m, nnx.BatchStat)) for m in (after, unscanned(deep))), strict=True)
    for ((path, ours), (same, theirs)), (_, old) in zip(pairs, before, strict=True):
        assert path == same
        np.testing.assert_allclose(theirs[...], ours[...], rtol=1e-4, atol=1e-6)
        assert not np.allclose(ours[...], old[...])


class Adding(nnx.Module):
    """A block whose index can be read off what it adds."""

    def __init__(self, index):
        self.part = nnx.Param(jnp.asarray(2.0**index))

    def __call__(self, x, dropout):
        return x + dropout(jnp.full(x.shape, self.part[...]), 0.25), None


def test_each_block_of_a_stack_draws_for_itself():
    """Dropout keeps, and layer drop leaves, three of four, independently from block to block; in evaluation all."""
    owner = nnx.Module()
    owner.layers = nnx.List([Adding(index) for index in range(4)])
    (stack,) = scanned(owner).layers
    zeros = jnp.zeros(10_000)
    kept = stack(zeros, Dropout(jax.random.key(0)))[0] * 0.75
    each = jnp.arange(len(zeros))

    def left(index):
        return layer_drop(stack, 0.0 * zeros[0], 0.25, Dropout(jax.random.fold_in(jax.random.key(1), index)))[0]

    stayed = jax.vmap(left)(each)
    present = [np.round(np.asarray(kept)).astype(int)[:, None] >> np.arange(4) & 1]
    # What a block adds is 4/3 of its part, or, of a quarter of those that are kept, nothing.
    present.append(np.round(0.75 * np.asarray(stayed)).astype(int)[:, None] >> np.arange(4) & 1)
    for drawn, share in zip(present, (0.75, 0.75**2), strict=True):
        np.testing.assert_allclose(drawn.mean(axis=0), share, atol=0.02)
        np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(4), atol=0.05)
    np.testing.assert_array_equal(stack(zeros, Dropout(None))[0], 15)
    np.testing.assert_array_equal(layer_drop(stack, zeros, 0.25, Dropout(None))[0], 15)


def instructions(compiled):
    """How long a program is, which is what compiling takes time for, and the same on every machine."""
    return sum(" = " in line for line in compiled.as_text().splitlines())


@pytest.mark.slow
def test_twenty_four_layers_are_loaded_as_a_program_of_six(tmp_path):
    """`load(..., stack_layers=True)`: at most half as long again, a loop is thrice as long; outputs equal."""
    choice, size = small.choice("bark"), {}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (2, 9)))
    with jax.enable_x64(True):
        for layers in (6, 24):
            config = dataclasses.replace(choice.config, num_layers=layers)
            cls = registry.paper_of_class(choice.model_class).model_class(choice.model_class)
            model = random_model(lambda rngs, c=config: cls(c, param_dtype=jnp.float64, rngs=rngs))  # noqa: B023
            audiozoo.save(model, tmp_path / f"{layers}")
            outputs = []
            for stacked in (False, True):
                same = audiozoo.load(tmp_path / f"{layers}", param_dtype=jnp.float64, stack_layers=stacked)
                assert count(same) == stacked
                compiled = audiozoo.jit(same).lower(input_ids=tokens).compile()
                size[layers, stacked] = instructions(compiled)
                outputs.append(audiozoo.jit(same)(input_ids=tokens).logits)
            assert outputs[0].dtype == jnp.float64
            np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-9, atol=1e-12)
    assert size[24, True] <= 1.5 * size[6, True], size
    assert size[24, False] >= 3 * size[6, False], size


@pytest.mark.slow
def test_a_step_of_twenty_four_layers_is_a_program_of_six():
    """Forward, backward with recomputation, and the optimiser."""
    choice, row = small.choice("bark"), small.recipe("bark")
    size = {}
    for layers in (6, 24):
        deep = dataclasses.replace(choice, config=dataclasses.replace(choice.config, num_layers=layers))
        trainer = plan.trainer(deep, row, None, None, options=Options(stack=True, remat="layers"), dtype=None)
        batch = plan.inputs(deep, plan.Amount(2, 1.0, 16), labels=True)
        size[layers] = instructions(trainer.step.lower(trainer.abstract(), batch).compile())
    assert size[24] <= 1.5 * size[6], size


def test_a_stacked_model_loads_and_is_saved_as_any_other(tmp_path):
    config = small.CONFIGURATIONS["whisper"][1]
    model = random_model(lambda rngs: WhisperForConditionalGeneration(config, rngs=rngs))
    audiozoo.save(model, tmp_path / "plain")
    stacked = audiozoo.load(tmp_path / "plain", stack_layers=True)
    assert count(stacked) == 2
    audiozoo.save(stacked, tmp_path / "again")
    audiozoo.export(stacked, tmp_path / "exported")
    for directory in ("again", "exported"):
        same = audiozoo.load(tmp_path / directory)
        values = [{n: v[...] for n, v in loading.variables(m).items()} for m in (model, same)]
        assert values[0].keys() == values[1].keys()
        for name, value in values[0].items():
            np.testing.assert_array_equal(values[1][name], value)
    inputs = filled(plan.inputs(small.choice("whisper"), plan.Amount(1, 1.0, 3)), np.float32)
    with pytest.raises(UsageError, match="no attention weights and no cache"):
        stacked(**inputs, output_attentions=True)
    with pytest.raises(UsageError, match="no attention weights and no cache"):
        stacked.generate(inputs["input_features"], decoder_input_ids=np.zeros((1, 1), int), max_new_tokens=2)
    decoder = abstract(lambda rngs: SpeechT5Decoder(SpeechT5Config(), dtype=None, param_dtype=jnp.float32, rngs=rngs))
    with pytest.raises(UsageError, match="no attention weights and no cache"):
        scanned(decoder).start(jnp.zeros((1, 3, 768)), 2)
