"""UniSpeech and UniSpeech-SAT without PyTorch: replacement, instances, the speaker task, and training runs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo.layers.losses import ctc_loss
from audiozoo.models import unispeech, unispeech_sat
from audiozoo.models.wavlm import draw_mixes
from tests.models.random_model import random_model
from tests.shapes import enforce
from weights_conversion import unispeech as unispeech_conversion
from weights_conversion import unispeech_sat as sat_conversion

SIZES = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 6,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "num_negatives": 5,
    "mask_time_prob": 0.5,
    "mask_time_length": 3,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
UNISPEECH = unispeech.UniSpeechConfig(**SIZES, num_ctc_classes=9)
SAT = unispeech_sat.UniSpeechSatConfig(
    **SIZES, num_clusters=7, label_rate=800.0, utterance_contrastive_layer=1, cross_sample_instances=6
)


def build(module, conversion, name, config, seed=0):
    table = conversion.hugging_face_table(config, name)
    return random_model(lambda rngs: getattr(module, name)(config, rngs=rngs), table, seed)


def waves(batch: int = 4, samples: int = 700, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, samples)), jnp.float32)


def train(model, call, steps=30):
    """The losses of a short run."""
    graphdef, params = nnx.split(model)
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        value, gradient = jax.value_and_grad(lambda p: call(nnx.merge(graphdef, p), key).loss)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimiser.init(params), []
    for seed in range(steps):
        params, state, value = step(params, state, jax.random.key(seed))
        losses.append(float(value))
    return np.array(losses)


def test_replacement():
    context, codes = jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 2))
    mixed = unispeech.replace_states(context, codes, jnp.asarray([[True, False, True]]))
    np.testing.assert_array_equal(mixed[0, :, 0], [1, 0, 1])
    assert unispeech.replace_states(context, codes, None) is context


def test_what_is_drawn_in_training(monkeypatch):
    """A share of the frames to be replaced, and distractors of all frames of speech, not of masked ones alone."""
    small = dataclasses.replace(UNISPEECH, num_hidden_layers=1, replace_prob=0.2)
    model, seen = build(unispeech, unispeech_conversion, "UniSpeechForPreTraining", small), {}
    mask = (jnp.arange(400) < jnp.asarray([[400], [250]])).astype(jnp.int32)

    def replace(context, codes, replaced):
        seen["replaced"] = replaced
        return context

    def sample(key, among, count):
        seen["among"] = among
        return jnp.zeros((*among.shape, count), int)

    monkeypatch.setattr(unispeech, "replace_states", replace)
    monkeypatch.setattr(unispeech, "sample_negative_indices", sample)

    def draw(key):
        model(waves(2, 400), mask, key=key)
        return seen["replaced"], seen["among"]

    replaced, among = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 300))
    assert float(replaced.mean()) == pytest.approx(0.2, abs=0.02)
    valid = model.backbone.frame_mask(mask, among.shape[2])
    np.testing.assert_array_equal(among, np.broadcast_to(valid, among.shape))


def test_speech_without_phonemes_is_not_silence():
    """An utterance that nobody labelled has no CTC loss; that of no phonemes would teach blanks."""
    small = dataclasses.replace(UNISPEECH, num_hidden_layers=1)
    model = build(unispeech, unispeech_conversion, "UniSpeechForPreTraining", small)
    labels = jnp.asarray([[3, 4, -100], [-100, -100, -100]])
    output = jax.jit(lambda m: m(waves(2, 400), labels=labels))(model)
    alone = ctc_loss(output.ctc_logits[:1], labels[:1], blank=small.pad_token_id)
    np.testing.assert_allclose(output.ctc_loss, alone, rtol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_phonemes_that_do_not_fit(zero, monkeypatch):
    """Infinitely improbable, or left out, as the configuration says."""
    model = build(
        unispeech,
        unispeech_conversion,
        "UniSpeechForPreTraining",
        dataclasses.replace(UNISPEECH, ctc_zero_infinity=zero),
    )
    told = {}
    monkeypatch.setattr(unispeech, "ctc_loss", lambda *args, **options: told.update(options) or jnp.zeros(2))
    jax.eval_shape(lambda m: m(waves(2, 400), labels=jnp.ones((2, 4), int)).loss, model)
    assert told == {"blank": UNISPEECH.pad_token_id, "reduction": "none", "zero_infinity": zero}


@pytest.mark.slow
def test_multitask_pretraining_lowers_the_loss():
    small = dataclasses.replace(UNISPEECH, num_hidden_layers=1)
    model = build(unispeech, unispeech_conversion, "UniSpeechForPreTraining", small)
    labels = jnp.asarray(np.random.default_rng(1).integers(1, 9, (2, 4)))
    losses = train(model, lambda m, key: m(waves(2, 400), labels=labels, key=key))
    assert losses[-5:].mean() < 0.85 * losses[:5].mean()


def test_masked_padding_does_not_count_and_blocks_are_read_as_they_are():
    model = build(unispeech_sat, sat_conversion, "UniSpeechSatForPreTraining", SAT)
    mask = (jnp.arange(400) < jnp.asarray([[400], [250]])).astype(jnp.int32)
    labels = np.random.default_rng(1).integers(0, 7, (2, 19))
    everywhere = np.ones((2, 19), bool)
    run = jax.jit(lambda m: m(waves(2, 400), mask, labels, mask_time_indices=everywhere))
    out = run(model)
    losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(out.logits)), labels[..., None], axis=2)[..., 0]
    valid = np.asarray(model.backbone.frame_mask(mask, 19))
    assert not valid.all()
    assert float(out.masked_loss) == pytest.approx(losses[valid].sum(), rel=1e-5)
    assert out.hidden_states is None
    model.layer_norm_for_extract.scale[...] *= 0  # for pre-norm models alone
    np.testing.assert_array_equal(run(model).projected_quantized_states, out.projected_quantized_states)


def test_instances_are_masked_frames_of_the_batch():
    mask = np.zeros((3, 10), bool)
    mask[0, 2:5] = mask[1, [0, 9]] = mask[2, 4] = True
    drawn = np.asarray(unispeech_sat.sample_instances(jax.random.key(0), jnp.asarray(mask), 600))
    places = set(np.flatnonzero(mask.reshape(-1)))
    for row, frame in zip(*np.nonzero(mask), strict=True):
        assert set(drawn[row, frame]) == places - {10 * row + frame}


def test_speaker_task_by_hand():
    rng = np.random.default_rng(0)
    states, codes = (rng.standard_normal((2, 4, 5)) for _ in range(2))
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0]], bool)
    instances = rng.choice([0, 1, 6], (2, 4, 3))
    losses = []
    for b, t in zip(*np.nonzero(mask), strict=True):
        for index in (4 * b + t, *instances[b, t]):
            code = codes[index // 4, index % 4]
            similarity = states[b, t] @ code / np.linalg.norm(states[b, t]) / np.linalg.norm(code) / 0.1
            chance = 1 / (1 + np.exp(-similarity))
            losses.append(-np.log(chance if index // 4 == b else 1 - chance))
    found = unispeech_sat.utterance_contrastive_loss(*(jnp.asarray(a) for a in (states, codes, instances, mask)))
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
def test_speaker_aware_pretraining_lowers_the_loss():
    """With mixed utterances, their clusters and the speaker task."""
    small = dataclasses.replace(SAT, num_hidden_layers=1)
    model = build(unispeech_sat, sat_conversion, "UniSpeechSatForPreTraining", small)
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 7, (3, 19)))

    def call(m, key):
        for_mixes, for_model = jax.random.split(key)
        return m(waves(3, 400), None, labels, mixes=draw_mixes(for_mixes, 3, 400, probability=0.2), key=for_model)

    losses = train(model, call)
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()


def test_what_is_refused():
    model = build(unispeech_sat, sat_conversion, "UniSpeechSatForPreTraining", SAT)
    labels = np.full((4, 34), 7)
    spans = np.ones((4, 34), bool)
    with pytest.raises(ValueError, match="needs masks"):
        jax.eval_shape(lambda x: model(x, None, labels), waves())
    with pytest.raises(ValueError, match="go up to 7; the model has 7 clusters"):
        jax.eval_shape(lambda x: model(x, None, labels, mask_time_indices=spans), waves())
    with pytest.raises(ValueError, match="must agree"):
        jax.eval_shape(
            build(
                unispeech_sat,
                sat_conversion,
                "UniSpeechSatForPreTraining",
                dataclasses.replace(SAT, proj_codevector_dim=10),
            ),
            waves(),
        )
    deeper = dataclasses.replace(SAT, utterance_contrastive_layer=SAT.num_hidden_layers + 1)
    with pytest.raises(ValueError, match="The speaker task reads block"):
        jax.eval_shape(build(unispeech_sat, sat_conversion, "UniSpeechSatForPreTraining", deeper), waves())
    other = build(unispeech, unispeech_conversion, "UniSpeechForPreTraining", UNISPEECH)
    with pytest.raises(ValueError, match="go up to 9; the pre-training head has 9 classes"):
        jax.eval_shape(lambda x: other(x, labels=np.full((4, 2), 9)), waves())


def test_annotations_hold(monkeypatch):
    first = build(unispeech, unispeech_conversion, "UniSpeechForPreTraining", UNISPEECH)
    second = build(unispeech_sat, sat_conversion, "UniSpeechSatForPreTraining", SAT)
    assert "UniSpeechForPreTraining.__call__" in enforce(monkeypatch, unispeech)
    assert "utterance_contrastive_loss" in enforce(monkeypatch, unispeech_sat)
    key, labels = jax.random.key(0), jnp.ones((4, 34), jnp.int32)
    output = jax.eval_shape(lambda x: first(x, labels=labels[:, :5], key=key), waves())
    assert output.ctc_logits.shape == (4, 34, 9)
    output = jax.eval_shape(lambda x: second(x, None, labels, key=key), waves())
    assert output.logits.shape == (4, 34, 7)
