"""wav2vec 2.0 without PyTorch: sampling, schedules, scaled gradients, masks and dropout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.layers.losses import ctc_loss
from audiozoo.models import ecapa_tdnn, wav2vec2
from audiozoo.models.wav2vec2 import Wav2Vec2Config
from tests.models.random_model import random_model
from weights_conversion.wav2vec2 import hugging_face_table

TINY = Wav2Vec2Config(
    vocab_size=12,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8, 8),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2,
    num_codevectors_per_group=6,
    codevector_dim=8,
    proj_codevector_dim=8,
    num_negatives=5,
    mask_time_prob=0.5,
    mask_time_length=3,
    mask_feature_prob=0.2,
    mask_feature_length=2,
    tdnn_dim=(8, 6),
    tdnn_kernel=(3, 1),
    tdnn_dilation=(2, 1),
    xvector_output_dim=6,
    classifier_proj_size=5,
    id2label=("one", "two", "three"),
)


def build(head: str = "ForCTC", config: Wav2Vec2Config = TINY, seed: int = 0):
    name = f"Wav2Vec2{head}"
    table = hugging_face_table(config, name)
    return random_model(lambda rngs: getattr(wav2vec2, name)(config, rngs=rngs), table, seed)


def waves(batch: int = 2, samples: int = 700, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, samples)), jnp.float32)


# --- sampling and schedules ------------------------------------------------------------------------------------------


def test_distractors_are_other_masked_frames_of_the_same_utterance():
    mask = np.zeros((3, 20), bool)
    mask[0, 3:9] = mask[1, [0, 5, 19]] = mask[2, 4] = True
    drawn = np.asarray(jax.jit(wav2vec2.sample_negative_indices, static_argnums=2)(jax.random.key(0), mask, 4000))
    for row in range(2):
        places = set(np.flatnonzero(mask[row]))
        for frame in places:
            found = drawn[row, frame] - 20 * row
            assert set(found) == places - {frame}
            share = np.bincount(found, minlength=20)[sorted(places - {frame})] / 4000
            assert np.abs(share - 1 / (len(places) - 1)).max() < 0.05  # uniform
    assert (drawn[2, 4] == 44).all()  # alone, it can only be its own; the loss strikes that out


def test_temperature_schedule():
    steps = np.array([0, 1000, 200_000, 10_000_000])
    found = wav2vec2.gumbel_temperature(jnp.asarray(steps), 2.0, 0.5, 0.999995)
    np.testing.assert_allclose(found, [2.0, 2 * 0.999995**1000, 2 * 0.999995**200_000, 0.5], rtol=1e-5)


def test_perplexity_counts_the_entries_in_use():
    uniform = jnp.full((7, 2, 8), 1 / 8)
    assert float(wav2vec2.perplexity(uniform, jnp.ones(7))) == pytest.approx(16)
    one = jax.nn.one_hot(jnp.zeros((7, 2), int), 8)
    assert float(wav2vec2.perplexity(one, jnp.ones(7))) == pytest.approx(2)
    # Neither an entry whose probability is 0 in float32 nor a batch without a masked frame makes weights of NaN.
    far = jnp.zeros((7, 2, 8)).at[..., 0].set(-200.0)
    for weights in (jnp.ones(7), jnp.zeros(7)):
        slope = jax.grad(lambda x: wav2vec2.perplexity(jax.nn.softmax(x), weights))(far)  # noqa: B023
        assert np.isfinite(slope).all()


def test_gumbel_noise_chooses_by_probability():
    """Over many draws, each entry is taken as often as the softmax says (Eq. 1)."""
    quantizer = build("ForPreTraining").quantizer
    features = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 8)) * 0.5, jnp.float32)
    many = jnp.broadcast_to(features, (1, 20_000, 8))
    _, _, index = jax.jit(lambda x, key: quantizer(x, key=key, temperature=0.7))(many, jax.random.key(1))
    wanted = jax.nn.softmax(quantizer.weight_proj(features).reshape(2, 6), axis=-1)
    for group in range(2):
        share = np.bincount(np.asarray(index[0, :, group]), minlength=6) / 20_000
        np.testing.assert_allclose(share, wanted[group], atol=0.02)


def test_noise_that_is_given_is_not_drawn():
    quantizer = build("ForPreTraining").quantizer
    x, noise = jnp.ones((1, 3, 8)), jnp.asarray(np.random.default_rng(0).gumbel(size=(1, 3, 2, 6)), jnp.float32)
    given, drawn = (jax.jit(quantizer)(x, gumbel_noise=noise, key=key)[2] for key in (None, jax.random.key(0)))
    np.testing.assert_array_equal(given, drawn)


@pytest.mark.slow
def test_gradient_of_the_feature_encoder_is_scaled():
    model, x = build("ForPreTraining"), waves()
    spans = np.zeros((2, 34), bool)
    spans[:, 4:12] = True
    negatives = wav2vec2.sample_negative_indices(jax.random.key(0), spans, 5)
    graphdef, params = nnx.split(model)

    @jax.jit
    def gradient(params, factor):
        loss = lambda p: nnx.merge(graphdef, p)(x, None, spans, negatives, feature_grad_mult=factor).loss  # noqa: E731
        return jax.grad(loss)(params)

    tenth, whole = (nnx.to_flat_state(gradient(params, factor)) for factor in (0.1, 1.0))
    for (path, a), (_, b) in zip(tenth, whole, strict=True):
        factor = 0.1 if "feature_extractor" in path else 1.0
        np.testing.assert_allclose(a[...], factor * b[...], rtol=1e-4, atol=1e-6 * float(jnp.abs(b[...]).max() + 1))


def test_penalty_on_the_features():
    model, x = build("ForPreTraining"), waves()
    spans = np.zeros((2, 34), bool)
    spans[:, 4:12] = True
    negatives = wav2vec2.sample_negative_indices(jax.random.key(0), spans, 5)
    run = audiozoo.jit(model)
    plain, more = run(x, None, spans, negatives), run(x, None, spans, negatives, features_pen_weight=10.0)
    features = model.wav2vec2.feature_extractor(x)
    assert float(plain.features_pen) == pytest.approx(float(jnp.square(features).mean()), rel=1e-5)
    assert float(more.loss - plain.loss) == pytest.approx(10 * 16 * float(plain.features_pen), rel=1e-4)


def test_training_draws_its_own_masks_and_distractors():
    run = jax.jit(lambda state, key: nnx.merge(graphdef, state)(waves(), key=key))
    graphdef, state = nnx.split(build("ForPreTraining"))
    first, again, other = (run(state, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.isfinite(first.loss)
    assert float(first.loss) == float(again.loss) != float(other.loss)


def test_dropout_masks_and_layer_drop_need_a_key():
    model = build(config=dataclasses.replace(TINY, layerdrop=1.0, num_hidden_layers=1))
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, key: nnx.merge(graphdef, state)(waves(), output_hidden_states=True, key=key))
    trained = run(state, jax.random.key(0))
    np.testing.assert_array_equal(trained.hidden_states[0], trained.hidden_states[1])  # the only layer is dropped
    a, b = run(state, None), run(state, None)
    np.testing.assert_array_equal(a.logits, b.logits)
    assert np.abs(a.hidden_states[0] - a.hidden_states[1]).max() > 0.1


def test_masks_can_be_given():
    model = build("Model")
    x = jnp.ones((2, 5, 16))
    spans, channels = np.eye(2, 5, dtype=bool), np.eye(2, 16, 3, dtype=bool)
    masked = np.asarray(model.mask(x, spans, channels))
    np.testing.assert_array_equal(masked[0, 0, np.arange(16) != 3], model.masked_spec_embed[...][np.arange(16) != 3])
    assert (masked[0, :, 3] == 0).all()
    assert (masked[1, :, 4] == 0).all()
    assert (masked[1, 0, :4] == 1).all()
    bare = build("Model", dataclasses.replace(TINY, mask_time_prob=0.0, mask_feature_prob=0.0))
    with pytest.raises(ValueError, match="no masked_spec_embed"):
        bare.mask(x, spans, None)


def test_masks_follow_the_settings():
    """Spans lie inside a recording and are as many as the settings ask for at least; without SpecAugment none."""
    config = dataclasses.replace(TINY, mask_time_prob=1e-6, mask_feature_prob=1e-6)
    least = dataclasses.replace(config, mask_time_min_masks=2, mask_feature_min_masks=1)
    inside = jnp.arange(34) < jnp.asarray([[34], [5]])
    few = dataclasses.replace(config, mask_time_min_masks=0, mask_feature_prob=9.0)
    none = dataclasses.replace(least, apply_spec_augment=False)
    few, many, none = (build("Model", c).draw_masks(jax.random.key(1), 2, 34, inside) for c in (few, least, none))
    assert not np.any(few[0])
    assert np.asarray(few[1]).sum(axis=1).min() > 8
    assert np.asarray(many[0]).sum(axis=1).min() > TINY.mask_time_length
    assert not np.any(many[0][1, 5:])
    np.testing.assert_array_equal(np.asarray(many[1]).sum(axis=1), TINY.mask_feature_length)
    assert none == (None, None)
    still, x = build("Model", dataclasses.replace(TINY, apply_spec_augment=False)), jnp.ones((2, 5, 16))
    np.testing.assert_array_equal(still.mask(x, jnp.ones((2, 5), bool), jnp.ones((2, 16), bool)), x)


def test_given_masks_are_not_drawn():
    """With a key, and nothing else that is drawn, the frames and channels that are given are those that are masked."""
    rates = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop")
    model = build("Model", dataclasses.replace(TINY, **dict.fromkeys(rates, 0.0)))
    spans, channels = np.eye(2, 34, dtype=bool), np.eye(2, 16, 3, dtype=bool)
    run = jax.jit(lambda m, key: m(waves(), None, spans, mask_feature_indices=channels, key=key).last_hidden_state)
    np.testing.assert_allclose(run(model, jax.random.key(0)), run(model, None), atol=1e-5)


def test_what_the_heads_hand_on(monkeypatch):
    """A mix of all states returns them if asked; a voice's head learns by the batch's statistics in training alone."""
    classifier, told = build("ForSequenceClassification", dataclasses.replace(TINY, use_weighted_layer_sum=True)), []
    bare, full = (
        jax.eval_shape(lambda m, x: m(x, output_hidden_states=asked), classifier, waves())  # noqa: B023
        for asked in (False, True)
    )
    assert bare.hidden_states is None
    assert len(full.hidden_states) == TINY.num_hidden_layers + 1
    speaker = nnx.eval_shape(lambda: wav2vec2.Wav2Vec2ForSpeakerVerification(TINY, rngs=nnx.Rngs(0)))
    monkeypatch.setattr(ecapa_tdnn.EcapaTdnn, "__call__", lambda self, x, mask, train=False: told.append(train) or x)
    for key in (None, jax.random.key(0)):
        jax.eval_shape(lambda m, x, key: m(x, key=key).embeddings, speaker, waves(), key)
    assert told == [False, True]


def test_labels_that_are_none():
    classifier, speakers = build("ForSequenceClassification"), build("ForXVector")
    for model in (classifier, speakers):
        with pytest.raises(ValueError, match=r"labels go up to 3; the model has 3 classes"):
            model(waves(), labels=np.array([3, 0]))
    wav2vec2.check_labels(np.zeros((1, 0), int), 5, "an empty text has none")


@pytest.mark.parametrize(("reduction", "zero"), [("sum", False), ("mean", True)])
def test_settings_of_the_ctc_loss(reduction, zero):
    model = build(
        config=dataclasses.replace(TINY, ctc_loss_reduction=reduction, ctc_zero_infinity=zero, pad_token_id=3)
    )
    mask = (jnp.arange(700) < jnp.asarray([[700], [60]])).astype(jnp.int32)
    labels = jnp.asarray([[4, 3, 5, -100], [6, 7, 8, 9]])  # of the second there are two frames
    out = jax.jit(lambda m: m(waves(), mask, labels))(model)
    lengths = model.backbone.frame_lengths(mask.sum(axis=1))
    wanted = ctc_loss(out.logits, labels, lengths, blank=3, reduction=reduction, zero_infinity=zero)
    assert bool(jnp.isfinite(wanted)) == zero
    np.testing.assert_allclose(out.loss, wanted, rtol=1e-5)


def test_statistics_in_bfloat16_are_those_of_its_values():
    """A sum, a mean or a margin that is rounded on the way is not: a speaker's deviation is small beside its mean."""
    x = jnp.asarray(4 + 0.1 * np.random.default_rng(0).standard_normal((2, 301, 3)), jnp.bfloat16)
    exact, lengths = np.asarray(x, np.float64), np.array([301, 260])
    wanted = [
        np.concatenate([v[:n].mean(axis=0), v[:n].std(axis=0, ddof=1)]) for v, n in zip(exact, lengths, strict=True)
    ]
    found = wav2vec2.pooled_statistics(x, jnp.asarray(lengths))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, np.asarray(wanted).astype(jnp.bfloat16))
    mean, variance = ecapa_tdnn.moments(x[:1], ecapa_tdnn.uniform(x[:1], None))
    np.testing.assert_allclose(mean[0, 0], exact[0].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance[0, 0], exact[0].var(axis=0), rtol=1e-5)
    states, weights = jnp.split(x, 7, axis=1), jnp.asarray([0.5, 0, 1, 0, -1, 0, 2], jnp.bfloat16)
    shares = np.exp(np.asarray(weights, np.float64)) / np.exp(np.asarray(weights, np.float64)).sum()
    mixed = np.tensordot(shares, np.stack(np.split(exact, 7, axis=1)), 1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(wav2vec2.mix_of_states(states, weights), mixed)
    np.testing.assert_allclose(wav2vec2.features_penalty(x), np.square(exact).mean(), rtol=1e-5)
    objective = wav2vec2.AMSoftmaxLoss(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    loss = objective(x[:, 0], jnp.asarray([1, 2]))
    np.testing.assert_allclose(loss, objective(x[:, 0].astype(jnp.float32), jnp.asarray([1, 2])), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_conv_pos_embedding_groups": 0}, r"hidden_size \(16\) does not divide into 0 \(num_conv_pos"),
        ({"num_codevector_groups": 3}, r"codevector_dim \(8\) does not divide into 3"),
        ({"tdnn_dim": ()}, "describe 0, 2 and 2 layers"),
        ({"conv_dim": (8, 8)}, "describe 2, 3 and 3 convolutions"),
        ({"conv_stride": (5, 0, 2)}, "a convolution at least, from 1 on"),
    ],
)
def test_sizes_that_do_not_belong_together(changes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("samples", [29, 30])
def test_the_shortest_recording(samples):
    """Of these convolutions a frame sees 30 samples, not the 400 of the published ones."""
    encoder = build("Model").feature_extractor
    if samples == 30:
        assert jax.eval_shape(encoder, waves(1, samples)).shape == (1, 1, 8)
    else:
        with pytest.raises(UsageError, match="29 samples are too few for one frame; this model needs 30"):
            jax.eval_shape(encoder, waves(1, samples))


def test_a_recording_too_short_for_a_speaker():
    model, x = build("ForXVector"), waves()
    mask = (np.arange(x.shape[1]) < np.array([[x.shape[1]], [60]])).astype(np.int32)
    with pytest.raises(ValueError, match="2 frames are too few for a speaker; 6 are needed"):
        model(x, jnp.asarray(mask))
