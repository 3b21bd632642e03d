"""w2v-BERT without its originals: whole recordings, pieces and padding; pre-training's refusals; annotations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo.decoding import ctc, encoders
from audiozoo.errors import AudioError, CheckpointError, UsageError
from audiozoo.models import wav2vec2, wav2vec2_bert
from tests.shapes import enforce
from tests.tolerances import tolerance
from tests.training import tiny

RATE = 16_000
PROCESSOR = tiny.PROCESSORS["wav2vec2_bert"]


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def close(ours, wanted):
    limit = tolerance("sharded", "float32")
    scale = float(np.sqrt(np.square(np.asarray(wanted)).mean()))
    np.testing.assert_allclose(ours, wanted, rtol=limit.rtol, atol=limit.atol + limit.rtol * scale)


@pytest.mark.parametrize("changes", [{}, {"add_adapter": True}], ids=["bare", "adaptor"])
def test_a_recording_is_heard_as_if_alone(changes):
    """Commands fill it up to one of few lengths."""
    model, x = tiny.family("wav2vec2_bert", "Wav2Vec2BertForCTC", **changes), wave(1.31)
    inputs = PROCESSOR(x, sampling_rate=RATE)
    assert inputs["attention_mask"].sum() == inputs["attention_mask"].size - 1  # half of the last step is silence
    features = inputs["input_features"][:, :-1]
    run = jax.jit(lambda m, x: (m(x, output_hidden_states=True), m(x).logits))
    output, logits = run(model, jnp.asarray(features))
    assert features.shape == (1, 64, 160)
    close(ctc.chunked_logits(model, features[0]), logits[0])
    found = encoders.embed(model, PROCESSOR, x, layer=1)
    close(found["frames"], output.hidden_states[1][0])
    np.testing.assert_allclose(found["times"], 0.02 * np.arange(64))
    heard = ctc.transcribe_ctc(model, PROCESSOR, x)
    frame = 0.04 if changes else 0.02
    tokens = logits[0].argmax(-1)
    spans = ctc.collapse(np.asarray(tokens), 0)
    said = [span for span in spans if span.text > 4]
    letters = PROCESSOR.tokenizer.tokens()
    assert [c["text"] for c in heard.characters] == [letters[span.text] for span in said]
    assert heard.characters[0]["start"] == pytest.approx(said[0].start * frame)
    words = ctc.align(model, PROCESSOR, x, "sow")
    assert [word["text"] for word in words] == ["sow"]
    assert 0 <= words[0]["start"] < words[0]["end"] <= 1.32


def test_long_recordings_are_heard_in_pieces():
    """The middle of every piece is what a forward of that piece gives, and nothing is missing."""
    model, x = tiny.family("wav2vec2_bert", "Wav2Vec2BertForCTC"), wave(3.0)
    features = encoders.first_heard(PROCESSOR(x, sampling_rate=RATE))
    found = ctc.chunked_logits(model, features, chunk_length_s=1.0, stride_length_s=0.2, batch_size=2)
    run = jax.jit(lambda m, x: m(x).logits)
    whole = run(model, features[None])[0]
    assert found.shape == whole.shape == (149, len(tiny.LETTERS))
    close(found[:40], run(model, features[None, :50])[0, :40])
    close(found[40:70], run(model, features[None, 30:80])[0, 10:40])
    close(found[130:], run(model, features[None, 120:])[0, 10:])


def test_classes_and_speakers():
    classifier = tiny.family("wav2vec2_bert", "Wav2Vec2BertForSequenceClassification")
    found = encoders.identify(classifier, PROCESSOR, wave(0.8))
    assert sorted(label for label, _ in found) == ["high", "low"]
    assert sum(probability for _, probability in found) == pytest.approx(1, abs=1e-6)
    several = encoders.identify(classifier, PROCESSOR, wave(2.0), crops=3, crop_length_s=0.5)
    assert sum(probability for _, probability in several) == pytest.approx(1, abs=1e-6)
    with pytest.raises(UsageError, match="too short for one frame"):
        encoders.identify(classifier, PROCESSOR, wave(2.0), crops=3, crop_length_s=0.01)
    small = {"tdnn_dim": (6, 6), "tdnn_kernel": (3, 1), "tdnn_dilation": (2, 1), "xvector_output_dim": 5}
    speaker = tiny.family("wav2vec2_bert", "Wav2Vec2BertForXVector", **small)
    assert encoders.embed(speaker, PROCESSOR, wave(0.7))["embedding"].shape == (5,)
    with pytest.raises(AudioError, match="too short"):
        encoders.embed(speaker, PROCESSOR, wave(0.1))


def pretraining(**changes):
    return tiny.family("wav2vec2_bert", "Wav2Vec2BertForPreTraining", **changes)


def features(batch: int = 2, frames: int = 30) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, frames, 160)), jnp.float32)


def test_a_key_draws_all_that_pretraining_needs():
    model, mask = pretraining(), jnp.asarray(np.arange(30) < np.array([[30], [17]]), jnp.int32)
    run = jax.jit(lambda m, key: m(features(), mask, key=key))
    first, again, other = (run(model, jax.random.key(seed)) for seed in (0, 0, 1))
    assert first.loss == again.loss != other.loss
    config = model.config
    whole = config.contrastive_weight * (first.contrastive_loss + config.diversity_loss_weight * first.diversity_loss)
    assert first.loss == pytest.approx(float(whole + config.prediction_weight * first.prediction_loss), rel=1e-5)
    adapted = pretraining(add_adapter=True)  # which is behind all of it
    assert run(adapted, jax.random.key(0)).prediction_logits.shape[:2] == (2, 30)
    still = jax.jit(lambda m: m(features(), mask))(model)
    assert still.loss is None
    assert still.codes.shape == (2, 30, 1)


def test_the_entries_that_are_to_be_said_have_no_gradient():
    """The quantiser learns from the contrastive module alone."""
    model = pretraining(contrastive_weight=0.0)
    graphdef, state = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda s: nnx.merge(graphdef, s)(features(), key=jax.random.key(0)).loss))(state)
    found = {".".join(map(str, path)): float(jnp.abs(leaf).max()) for path, leaf in nnx.to_flat_state(gradient)}
    assert all(size == 0 for name, size in found.items() if name.startswith(("quantizer", "project_")))
    assert found["prediction.kernel"] > 0


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="The contrastive module cannot have 2 of 2 blocks"):
        pretraining(num_contrastive_layers=2)
    with pytest.raises(UsageError, match="Pre-training needs masks"):
        pretraining(mask_time_prob=0.0)(features(), key=jax.random.key(0))
    with pytest.raises(UsageError, match=r"\(batch, frames, 160\) is expected"):
        pretraining()(features()[..., :80])
    for wrong, sentence in (
        ({"use_intermediate_ffn_before_adapter": True}, "is for models with add_adapter"),
        ({"conv_depthwise_kernel_size": 4}, "is odd; 4 is not"),
        ({"codevector_dim": 9, "num_codevector_groups": 2}, r"codevector_dim \(9\) does not divide into 2"),
        ({"tdnn_dim": (1,)}, "must describe the same ones"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            wav2vec2_bert.Wav2Vec2BertConfig(**wrong)


def test_saved_and_exported(tmp_path):
    model = tiny.family("wav2vec2_bert", "Wav2Vec2BertForCTC", add_adapter=True)
    for way in (audiozoo.save, audiozoo.export):
        way(model, tmp_path / way.__name__)
        again = audiozoo.load(tmp_path / way.__name__)
        for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_annotations_hold(monkeypatch):
    models = {
        head: tiny.family("wav2vec2_bert", f"Wav2Vec2Bert{head}")
        for head in ("Model", "ForPreTraining", "ForCTC", "ForAudioFrameClassification")
    }
    checked = enforce(monkeypatch, wav2vec2) + enforce(monkeypatch, wav2vec2_bert)
    assert {"Wav2Vec2ForCTC.__call__", "Wav2Vec2BertModel.__call__"} <= set(checked)
    mask, labels = jnp.ones((2, 30), jnp.int32), jnp.ones((2, 2), jnp.int32)
    key = jax.random.key(0)
    assert jax.eval_shape(lambda: models["ForPreTraining"](features(), mask, key=key)).loss.shape == ()
    assert jax.eval_shape(lambda: models["ForCTC"](features(), mask, labels, key=key)).loss.shape == ()
    classes = jnp.zeros((2, 30, 2))
    assert jax.eval_shape(lambda: models["ForAudioFrameClassification"](features(), mask, classes)).loss.shape == ()
    with pytest.raises(Exception, match="Type-check"):
        jax.eval_shape(lambda: models["Model"](features()[0]))
