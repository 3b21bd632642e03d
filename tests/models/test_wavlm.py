"""WavLM without PyTorch: mixing, masked prediction, the laid-out bias, and a training run on disturbed speech."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo.models import wavlm
from audiozoo.models.wavlm import Mixes, WavLMConfig, draw_mixes, mix
from tests.models.random_model import random_model
from tests.shapes import enforce
from weights_conversion.wavlm import hugging_face_table

TINY = WavLMConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8, 8),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2,
    num_buckets=16,
    max_bucket_distance=20,
    proj_codevector_dim=8,
    num_clusters=7,
    label_rate=800.0,
    mask_time_prob=0.5,
    mask_time_length=3,
    hidden_dropout=0.0,
    activation_dropout=0.0,
    attention_dropout=0.0,
    layerdrop=0.0,
)


def build(head: str = "ForPreTraining", config: WavLMConfig = TINY, seed: int = 0):
    name = f"WavLM{head}"
    table = hugging_face_table(config, name)
    return random_model(lambda rngs: getattr(wavlm, name)(config, rngs=rngs), table, seed)


def waves(batch: int = 4, samples: int = 700, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, samples)), jnp.float32)


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


def by_hand(x, mixes, noise, lengths, normalize):
    """Algorithm 1, one utterance after the other."""
    result = np.array(x, np.float64)
    for i in range(len(x)):
        if not mixes.mixed[i]:
            continue
        other = noise[mixes.other[i]] if mixes.is_noise[i] else x[mixes.other[i]][: lengths[mixes.other[i]]]
        other = np.asarray(other, np.float64)
        energy = np.mean(np.asarray(x[i][: lengths[i]], np.float64) ** 2)
        loudness = np.mean(other**2)
        scale = 0.0 if loudness == 0 else np.sqrt(energy / (loudness * 10 ** (float(mixes.ratio[i]) / 10)))
        start, begin, length = int(mixes.start[i]), int(mixes.other_start[i]), int(mixes.length[i])
        result[i, start : start + length] += scale * other[begin : begin + length]
        if normalize:
            spoken = result[i, : lengths[i]]
            result[i, : lengths[i]] = (spoken - spoken.mean()) / np.sqrt(spoken.var() + 1e-5)
    return result


@pytest.mark.parametrize("normalize", [False, True])
def test_mixing_is_algorithm_1(normalize):
    lengths = np.array([700, 500, 640, 300, 700, 700])
    x = np.where(np.arange(700) < lengths[:, None], np.asarray(waves(6)), 0)
    x[4] = 0  # silence
    noise = np.random.default_rng(2).standard_normal((3, 200)).astype(np.float32)
    draw = jax.jit(
        lambda key: draw_mixes(
            key,
            6,
            700,
            probability=0.8,
            noise_probability=0.4,
            noises=3,
            noise_samples=200,
            lengths=jnp.asarray(lengths),
        )
    )
    apply = jax.jit(
        lambda m: mix(jnp.asarray(x), m, jnp.asarray(noise), lengths=jnp.asarray(lengths), normalize=normalize)
    )
    kinds = set()
    for seed in range(30):
        mixes = jax.tree.map(np.asarray, draw(jax.random.key(seed)))
        kinds |= {(bool(a), bool(b)) for a, b in zip(mixes.mixed, mixes.is_noise, strict=True)}
        assert (mixes.length <= lengths // 2).all()
        assert ((mixes.start >= 0) & (mixes.start + mixes.length <= lengths)).all()
        np.testing.assert_allclose(apply(mixes), by_hand(x, mixes, noise, lengths, normalize), atol=2e-5)
    assert len(kinds) == 4


def test_choices_have_their_probabilities():
    mixes = jax.jit(
        lambda key: draw_mixes(
            key, 20_000, 1000, probability=0.3, noise_probability=0.25, noises=4, noise_samples=5000, longest=0.5
        )
    )(jax.random.key(0))
    mixes = jax.tree.map(np.asarray, mixes)
    assert abs(mixes.mixed.mean() - 0.3) < 0.02
    assert abs(mixes.is_noise.mean() - 0.25) < 0.02
    assert abs(mixes.length.mean() - 250) < 5
    assert mixes.length.max() == 500
    assert np.ptp(mixes.ratio[mixes.is_noise]) > 24
    assert np.abs(mixes.ratio[~mixes.is_noise]).max() <= 5
    assert set(mixes.other[mixes.is_noise]) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="needs noises"):
        draw_mixes(jax.random.key(0), 2, 100, noise_probability=0.5)


# --- the objective ---------------------------------------------------------------------------------------------------


def test_toeplitz_lays_out_offsets():
    values = jnp.arange(2 * 9.0).reshape(2, 9)
    laid = np.asarray(wavlm.toeplitz(values))
    for i in range(5):
        for j in range(5):
            np.testing.assert_array_equal(laid[:, i, j], values[:, j - i + 4])
    assert wavlm.toeplitz(values[:, :1]).shape == (2, 1, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_take_turns_agree_with_all_at_once(masked, monkeypatch):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 3, 20, 4)), jnp.float32) for _ in range(3))
    gate = jnp.asarray(rng.uniform(1, 3, (2, 3, 20, 1)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((3, 20, 20)), jnp.float32)
    mask = jnp.asarray(np.arange(20) < np.array([[20], [13]]))[:, None, None] if masked else None
    arrays = (query, key, value, gate, bias)
    at_once = jax.jit(lambda *a: wavlm.attend_gated(*a, scale=0.5, mask=mask))(*arrays)
    monkeypatch.setattr(wavlm, "TURNS_FROM", 1)
    in_turns = jax.jit(lambda *a: wavlm.attend_gated(*a, scale=0.5, mask=mask) + 0)(*arrays)
    np.testing.assert_allclose(in_turns, at_once, atol=2e-6)


@pytest.mark.slow
def test_pretraining_on_disturbed_speech_lowers_the_loss():
    """Forty steps on four utterances with other utterances laid over them; the clusters are the clean ones."""
    x = waves()
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 7, (4, 34)))
    graphdef, params = nnx.split(build(config=dataclasses.replace(TINY, num_hidden_layers=1)))
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        for_mixes, for_model = jax.random.split(key)
        mixes = draw_mixes(for_mixes, 4, 700, probability=0.5)

        def loss(params):
            output = nnx.merge(graphdef, params)(x, None, labels, mixes=mixes, features_pen_weight=10.0, key=for_model)
            return output.loss, output

        gradient, output = jax.grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, (output.loss, output.masked_loss)

    state, losses = optimiser.init(params), []
    for seed in range(40):
        params, state, loss = step(params, state, jax.random.key(seed))
        losses.append(loss)
    first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
    assert (last < 0.8 * first).all()
    repeated = step(params, state, jax.random.key(0))[2]
    assert float(repeated[0]) == float(step(params, state, jax.random.key(0))[2][0])


def test_what_pretraining_refuses():
    model = build()
    labels = jnp.zeros((4, 34), jnp.int32)
    with pytest.raises(ValueError, match="needs masks"):
        jax.eval_shape(lambda x: model(x, None, labels), waves())
    outside = np.full((4, 34), 7)
    with pytest.raises(ValueError, match=r"go up to 7; the model has 7 clusters"):
        jax.eval_shape(lambda x: model(x, None, outside, mask_time_indices=np.ones((4, 34), bool)), waves())
    with pytest.raises(ValueError, match="does not divide into four"):
        dataclasses.replace(TINY, num_buckets=6)


def test_annotations_hold(monkeypatch):
    model = build()
    assert "WavLMAttention.__call__" in enforce(monkeypatch, wavlm)
    mixes = Mixes(*(jnp.zeros(4, d) for d in (bool, bool, int, int, int, int, jnp.float32)))
    mask = jnp.ones((4, 700), jnp.int32)

    def call(x, labels, spans):
        options = {"output_attentions": True, "mixes": mixes}
        return model(x, mask, labels, mask_time_indices=spans, **options)

    output = jax.eval_shape(call, waves(), jnp.zeros((4, 34), jnp.int32), jnp.ones((4, 34), bool))
    assert output.attentions[0].shape == (4, 2, 34, 34)
