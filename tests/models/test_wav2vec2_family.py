"""wav2vec 2.0 and what grew from it: annotations of shapes hold, and a batch is its items under `vmap`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiozoo.models import hubert, mms, wav2vec2, xls_r
from tests.models.random_model import random_model
from tests.shapes import enforce
from tests.tolerances import tolerance
from tests.training import tiny

SAMPLES = 2000
HEADS = {
    "wav2vec2": "Wav2Vec2ForCTC",
    "hubert": "HubertForCTC",
    "wavlm": "WavLMForCTC",
    "unispeech": "UniSpeechForCTC",
    "unispeech_sat": "UniSpeechSatForCTC",
    "sew": "SEWForCTC",
}


def languages_model():
    changes = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True, "adapter_attn_dim": 4}
    config = mms.MMSConfig(**tiny.SPEECH | changes, languages=("eng", "fra"), vocab_sizes=(8, 12))
    return random_model(lambda rngs: mms.MMSForCTC(config, rngs=rngs))


def waves(batch: int = 3):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, SAMPLES)), jnp.float32)


TOKENS = jnp.asarray([[2, 7, 5], [2, 8, 4], [2, 9, 9]])
SPOKEN = jnp.asarray([0, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("paper", [*HEADS, "mms", "xls_r"])
def test_vmap_and_a_batch_agree(paper):
    if paper == "xls_r":
        model, more = tiny.xls_r_model()[0], (TOKENS,)
        call = lambda x, tokens: model(x, None, tokens).logits  # noqa: E731
    elif paper == "mms":
        model, more = languages_model(), (SPOKEN,)
        call = lambda x, spoken: model(x, languages=spoken).logits  # noqa: E731
    else:
        model, more = tiny.family(paper, HEADS[paper]), ()
        call = lambda x: model(x).logits  # noqa: E731
    one = jax.vmap(lambda *row: call(*(part[None] for part in row))[0])
    rows, batch = jax.jit(lambda *a: (one(*a), call(*a)))(waves(), *more)
    assert rows.shape == batch.shape
    limit = tolerance("sharded", "float32")
    np.testing.assert_allclose(rows, batch, rtol=limit.rtol, atol=limit.atol)


def test_each_item_has_its_own_language_and_mask():
    model, x = languages_model(), waves()
    spans = jnp.asarray(np.random.default_rng(1).random((3, model.backbone.frame_lengths(SAMPLES))) < 0.5)
    run = jax.jit(lambda x, spoken, spans: model(x, languages=spoken, mask_time_indices=spans).logits)
    turned = run(*(jnp.roll(part, 1, axis=0) for part in (x, SPOKEN, spans)))
    np.testing.assert_allclose(turned, jnp.roll(run(x, SPOKEN, spans), 1, axis=0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="The id 2 is none of this model's"):
        model.language_index([0, 2, 1], 3)
    with pytest.raises(ValueError, match="go up to 9; eng has 8 letters"):
        model(x[:2], labels=jnp.asarray([[9], [9]]), languages=["fra", "eng"])


def test_annotations_of_wav2vec2_and_hubert_hold(monkeypatch):
    mask, labels = jnp.ones((3, SAMPLES), jnp.int32), jnp.ones((3, 2), jnp.int32)
    models = {
        head: tiny.family("wav2vec2", f"Wav2Vec2{head}")
        for head in ("ForCTC", "ForPreTraining", "ForAudioFrameClassification")
    }
    clusters = tiny.family("hubert", "HubertForPreTraining")
    assert {"Wav2Vec2Model.__call__", "Wav2Vec2ForCTC.__call__"} <= set(enforce(monkeypatch, wav2vec2))
    assert "HubertForPreTraining.__call__" in enforce(monkeypatch, hubert)
    frames = models["ForCTC"].wav2vec2.frame_lengths(SAMPLES)
    spans = jnp.ones((3, frames), bool)
    found = jax.eval_shape(lambda x: models["ForCTC"](x, mask, labels, key=jax.random.key(0)), waves())
    assert found.logits.shape == (3, frames, len(tiny.LETTERS))
    negatives = jnp.zeros((3, frames, 5), jnp.int32)
    pretraining = {"mask_time_indices": spans, "sampled_negative_indices": negatives}
    assert jax.eval_shape(lambda x: models["ForPreTraining"](x, mask, **pretraining), waves()).loss.shape == ()
    classes = jnp.zeros((3, frames, 2))
    assert jax.eval_shape(lambda x: models["ForAudioFrameClassification"](x, mask, classes), waves()).loss.shape == ()
    units = jnp.zeros((3, frames), jnp.int32)
    assert jax.eval_shape(lambda x: clusters(x, mask, units, mask_time_indices=spans), waves()).loss.shape == ()
    with pytest.raises(Exception, match="Type-check"):
        jax.eval_shape(lambda x: models["ForCTC"](x[0]), waves())


def test_annotations_of_mms_and_xls_r_hold(monkeypatch):
    spoken, translator = languages_model(), tiny.xls_r_model()[0]
    mask, labels = jnp.ones((3, SAMPLES), jnp.int32), jnp.ones((3, 2), jnp.int32)
    assert "MMSForCTC.__call__" in enforce(monkeypatch, mms)
    assert "SpeechEncoderDecoderModel.__call__" in enforce(monkeypatch, xls_r)
    found = jax.eval_shape(lambda x: spoken(x, mask, labels, languages=["eng", "fra", "fra"]), waves())
    assert found.logits.shape[2] == 12
    found = jax.eval_shape(lambda x: translator(x, mask, TOKENS, labels=TOKENS), waves())
    assert found.logits.shape == (3, 3, 64)
    with pytest.raises(Exception, match="Type-check"):
        jax.eval_shape(lambda x: translator(x[0], None, TOKENS), waves())
