"""wav2vec2-Conformer without its originals: commands, files, refusals, statistics in training, annotations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo.errors import CheckpointError
from audiozoo.models import wav2vec2_conformer
from tests.shapes import enforce
from tests.training import tiny

PAPER = "wav2vec2_conformer"


def family(head: str, **changes):
    return tiny.family(PAPER, f"Wav2Vec2Conformer{head}", **changes)


def waves() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 3200)), jnp.float32)


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_saved_and_exported(positions, tmp_path):
    model = family("ForCTC", position_embeddings_type=positions)
    for way in (audiozoo.save, audiozoo.export):
        way(model, tmp_path / way.__name__)
        again = audiozoo.load(tmp_path / way.__name__)
        assert again.config == model.config
        for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_cannot_be_is_refused():
    for wrong, sentence in (
        ({"conv_depthwise_kernel_size": 4}, "is odd; 4 is not"),
        ({"position_embeddings_type": "relative_key"}, "there are relative, rotary and None"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            wav2vec2_conformer.Wav2Vec2ConformerConfig(**wrong)


def test_training_moves_the_statistics():
    """Of a key come masks, distractors and noise; batches are normalised by their own statistics."""
    model = family("ForPreTraining")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, rest, key):
        model = nnx.merge(graphdef, params, rest)
        return model(waves(), key=key).loss, nnx.state(model, nnx.BatchStat)

    (first, moved), (again, _), (other, _) = (run(params, rest, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.isfinite(first)
    assert first == again != other
    assert all(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(rest), strict=True))


def test_annotations_hold(monkeypatch):
    models = {head: family(head) for head in ("ForPreTraining", "ForCTC")}
    assert "Wav2Vec2ConformerEncoder.__call__" in enforce(monkeypatch, wav2vec2_conformer)
    mask, labels = jnp.ones((2, 3200), jnp.int32), jnp.ones((2, 2), jnp.int32)
    key = jax.random.key(0)
    pretraining = jax.eval_shape(lambda model: model(waves(), mask, key=key), models["ForPreTraining"])
    assert pretraining.loss.shape == ()
    recognised = jax.eval_shape(lambda model: model(waves(), mask, labels, key=key), models["ForCTC"])
    assert recognised.loss.shape == ()
    with pytest.raises(Exception, match="Type-check"):
        jax.eval_shape(lambda: models["ForCTC"].backbone.encoder(waves()))
