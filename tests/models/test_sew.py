"""SEW without PyTorch: squeezing, buckets, batches that equal their items, and a pre-training run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo.models import sew
from audiozoo.models.sew import SEWConfig
from tests.models.random_model import random_model
from tests.shapes import enforce
from weights_conversion.sew import hugging_face_table

TINY = SEWConfig(
    vocab_size=12,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8, 8),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    feat_extract_norm="layer",
    num_conv_pos_embeddings=7,
    num_conv_pos_embedding_groups=2,
    num_codevectors_per_group=6,
    codevector_dim=8,
    proj_codevector_dim=8,
    num_negatives=5,
    mask_time_prob=0.5,
    mask_time_length=3,
    mlp_hidden_size=16,
    position_buckets=8,
    max_position_embeddings=12,
    hidden_dropout=0.0,
    activation_dropout=0.0,
    attention_dropout=0.0,
    feat_quantizer_dropout=0.0,
    layerdrop=0.0,
)


def build(name: str, config: SEWConfig = TINY, seed: int = 0):
    return random_model(lambda rngs: getattr(sew, name)(config, rngs=rngs), hugging_face_table(config, name), seed)


def waves(batch: int = 3, samples: int = 700, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, samples)), jnp.float32)


def test_rules_for_half_pairs():
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(sew.squeeze_mask(mask, 2, "max"), [[1, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(sew.squeeze_mask(mask, 2, "floor"), [[1, 1], [1, 0], [0, 0]])


def test_skew_aligns_offsets():
    rng = np.random.default_rng(0)
    for frames in (1, 2, 5):
        x = rng.standard_normal((2, frames, 2 * frames - 1)).astype(np.float32)
        skewed = np.asarray(sew.skew(jnp.asarray(x)))
        for i in range(frames):
            for j in range(frames):
                np.testing.assert_array_equal(skewed[:, i, j], x[:, i, j - i + frames - 1])


def test_buckets():
    found = sew.log_bucket_positions(np.array([0, 1, -128, 129, -300, 511, -511]), 256, 512)
    np.testing.assert_array_equal(found, [0, 1, -128, 129, -207, 255, -255])


@pytest.mark.parametrize("name", ["SEWForCTC", "SEWDForCTC"])
def test_a_padded_batch_is_its_items(name):
    """With whole pairs alone attended to."""
    model = build(name, dataclasses.replace(TINY, squeeze_rule="floor"))
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda x, mask: nnx.merge(graphdef, state)(x, mask).logits)
    lengths = np.array([700, 480])  # the second makes 23 frames
    mask = jnp.asarray(np.arange(700) < lengths[:, None], jnp.int32)
    x = waves(2) * mask
    alone = jax.jit(lambda x: nnx.merge(graphdef, state)(x).logits)(x[1:, :480])
    assert alone.shape[1] == 23
    np.testing.assert_allclose(run(x, mask)[1, :23], alone[0], atol=3e-5)


@pytest.mark.slow
def test_pretraining_lowers_the_loss_and_moves_the_statistics():
    graphdef, params, statistics = nnx.split(build("SEWDForPreTraining"), nnx.Param, ...)
    x, optimiser = waves(), optax.adam(5e-3)

    @jax.jit
    def step(params, statistics, state, key):
        def loss(params):
            # The statistics are moved, so they must belong to this trace.
            model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, statistics))
            output = model(x, key=key, features_pen_weight=10.0)
            return output.loss, nnx.state(model, nnx.BatchStat)

        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), moved, state, value

    before, state, losses = statistics, optimiser.init(params), []
    for seed in range(40):
        params, statistics, state, value = step(params, statistics, state, jax.random.key(seed % 4))
        losses.append(float(value))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(statistics), strict=True):
        assert np.abs(old - new).max() > 1e-3


def test_what_is_refused():
    with pytest.raises(ValueError, match="1 frames are too few"):
        jax.eval_shape(build("SEWModel"), waves(1, 40))
    with pytest.raises(ValueError, match="squeeze_rule is 'min'"):
        dataclasses.replace(TINY, squeeze_rule="min")
    with pytest.raises(ValueError, match="pos_att_type names p2p"):
        dataclasses.replace(TINY, pos_att_type=("p2p", "c2p"))
    with pytest.raises(ValueError, match="squeeze_factor is 0"):
        dataclasses.replace(TINY, squeeze_factor=0)
    with pytest.raises(ValueError, match="position_buckets is -1"):
        dataclasses.replace(TINY, position_buckets=-1)


def test_annotations_hold(monkeypatch):
    models = [build("SEWForCTC"), build("SEWDForPreTraining")]
    assert "DisentangledSelfAttention.__call__" in enforce(monkeypatch, sew)
    mask = jnp.ones((3, 700), jnp.int32)
    output = jax.eval_shape(lambda x: models[0](x, mask, output_attentions=True), waves())
    assert output.attentions[0].shape == (3, 2, 17, 17)
    spans = np.ones((3, 34), bool)
    output = jax.eval_shape(lambda x: models[1](x, mask, spans, output_hidden_states=True), waves())
    assert output.hidden_states[0].shape == (3, 17, 16)
