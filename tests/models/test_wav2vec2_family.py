"""wav2vec 2.0 and what grew from it: annotations of shapes hold, and a batch is its items under `vmap`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo.decoding import ctc, encoders
from audiozoo.decoding.pieces import write_pieces
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.evaluation.tasks import Heard, Transcription
from audiozoo.layers.losses import ctc_loss
from audiozoo.loading import variables
from audiozoo.models import hubert, mms, wav2vec2, xls_r
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from audiozoo.training.data import Item
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
    "wav2vec2_conformer": "Wav2Vec2ConformerForCTC",
    "wav2vec2_bert": "Wav2Vec2BertForCTC",
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
    heard = waves()[:, :1920].reshape(3, 12, 160) if paper == "wav2vec2_bert" else waves()
    rows, batch = jax.jit(lambda *a: (one(*a), call(*a)))(heard, *more)
    assert rows.shape == batch.shape
    limit = tolerance("sharded", "float32")
    np.testing.assert_allclose(rows, batch, rtol=limit.rtol, atol=limit.atol)


def test_a_recogniser_becomes_a_classifier(tmp_path):
    """Its own head is left behind; a new one has to be asked for."""
    model = tiny.family("wav2vec2", "Wav2Vec2ForCTC")
    audiozoo.export(model, tmp_path / "ctc")
    wanted = {"model_class": "Wav2Vec2ForSequenceClassification"}
    with pytest.raises(CheckpointError, match=r"0 unexpected \(\+\), 4 missing"):
        audiozoo.load(tmp_path / "ctc", **wanted)
    known = variables(model)
    tuned = variables(audiozoo.load(tmp_path / "ctc", **wanted, initialize=r"(projector|classifier)\..*"))
    assert {name.partition(".")[0] for name in set(known) ^ set(tuned)} == {"lm_head", "projector", "classifier"}
    for name in set(known) & set(tuned):
        np.testing.assert_array_equal(tuned[name][...], known[name][...])


ALONE = {
    "half a pair": ("sew", "SEWForCTC", {}),
    "convolutions in the blocks": ("wav2vec2_conformer", "Wav2Vec2ConformerForCTC", {}),
    "blocks of samples": ("hubert", "HubertForCTC", {"frame_rule": "samples"}),
    "strided convolutions": ("wav2vec2", "Wav2Vec2ForCTC", {"add_adapter": True, "num_adapter_layers": 2}),
}


@pytest.mark.parametrize("why", ALONE)
def test_a_recording_is_heard_as_if_alone(why):
    """Commands fill it up to one of few lengths; by the rules of training its end would hear what it is filled with."""
    paper, name, changes = ALONE[why]
    model = tiny.family(paper, name, **changes)
    wave = np.random.default_rng(5).standard_normal(2980).astype(np.float32)  # 9 frames, and a good part of one
    filled, mask = np.zeros((1, 4000), np.float32), np.zeros((1, 4000), np.int32)
    filled[0, : len(wave)], mask[0, : len(wave)] = wave, 1
    labels = jnp.asarray([[5, 7]])

    @jax.jit
    def run(model):
        alone = model(wave[None], output_hidden_states=True)
        return alone.logits[0], alone.hidden_states[-1][0], model(filled, mask, labels, masked_group_norm=True)

    logits, states, trained = run(model)
    limit = tolerance("sharded", "float32")
    close = {"rtol": limit.rtol, "atol": limit.atol + limit.rtol * float(jnp.sqrt(jnp.square(logits).mean()))}
    np.testing.assert_allclose(ctc.chunked_logits(model, wave), logits, **close)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False))
    np.testing.assert_allclose(encoders.embed(model, processor, wave)["frames"], states, **close)
    assert np.abs(trained.logits[0, : len(logits)] - logits).max() > 1e-3
    # The loss counts the frames that the Transformer heard.
    counted = model.backbone.frame_mask(mask, trained.logits.shape[1]).sum(axis=1)
    assert (int(counted[0]) > len(logits)) == (why == "blocks of samples")
    wanted = ctc_loss(trained.logits, labels, counted, reduction=model.config.ctc_loss_reduction)
    np.testing.assert_allclose(trained.loss, wanted, rtol=1e-6)


def test_a_translator_hears_a_recording_as_if_alone(monkeypatch):
    """Its pieces are filled up too, and its encoder may have been trained by the same rules."""
    model, _ = tiny.s2t2_model()
    model.encoder.config = dataclasses.replace(model.encoder.config, frame_rule="samples")
    listeners = []

    def generate(self, input_values, **options):
        listeners.append(self)
        return np.ones((len(input_values), 2), int)

    monkeypatch.setattr(type(model), "generate", generate)
    wave = np.random.default_rng(5).standard_normal(12_860).astype(np.float32)  # the last 60 make no frame
    write_pieces(model, tiny.PROCESSOR, wave)
    filled, mask = np.zeros((1, 16_000), np.float32), np.zeros((1, 16_000), np.int32)
    filled[0, : len(wave)], mask[0, : len(wave)] = wave, 1

    @jax.jit
    def run(model, listener):
        heard = listener.encode(filled, mask, masked_group_norm=True)
        return model.encode(wave[None])[0].last_hidden_state, heard, model.encode(filled, mask)[1]

    states, (heard, counted), trained = run(model, listeners[0])
    frames = states.shape[1]
    assert (int(counted.sum()), int(trained.sum())) == (frames, frames + 1)
    limit = tolerance("sharded", "float32")
    close = limit.atol + limit.rtol * float(jnp.sqrt(jnp.square(states).mean()))
    np.testing.assert_allclose(heard.last_hidden_state[:, :frames], states, rtol=limit.rtol, atol=close)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForXVector", "ForSpeakerVerification", "ForCTC"])
def test_a_row_of_padding_harms_nobody(head):
    """Nor do a few samples that make no frame: numbers and gradients stay finite."""
    small = {"tdnn_dim": (6, 6), "tdnn_kernel": (3, 1), "tdnn_dilation": (2, 1), "xvector_output_dim": 5}
    model = tiny.family("wav2vec2", f"Wav2Vec2{head}", **small)
    mask = jnp.asarray(np.arange(SAMPLES) < np.array([[SAMPLES], [7], [0]]), jnp.int32)
    labels = {"ForCTC": jnp.asarray([[5], [-100], [-100]]), "ForSpeakerVerification": None}
    given = labels.get(head, jnp.asarray([1, -100, -100]))
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)

    def loss(state, mask):
        model = nnx.merge(graphdef, state, rest)
        more = {} if given is None else {"labels": given}
        output = model(waves() * mask, mask, masked_group_norm=True, **more)
        return output.embeddings.sum() if given is None else output.loss

    value, gradients = jax.jit(jax.value_and_grad(loss))(state, mask)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


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


def test_several_languages_are_transcribed_one_at_a_time():
    model, wave = languages_model(), np.asarray(waves()[0])
    model.lm_head.bias[...] = model.lm_head.bias[...].at[:, :5].add(-1e3)  # letters alone
    alphabets = {"eng": "abc", "fra": "defghij"}
    vocabulary = {
        language: {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *letters])}
        for language, letters in alphabets.items()
    }
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(vocabulary, target_lang="eng"))
    french = ctc.transcribe_ctc(model, processor, wave, language="fra")
    assert processor.tokenizer.target_lang == "eng"
    processor.set_target_lang("fra")
    assert french == ctc.transcribe_ctc(model.speaking("fra"), processor, wave)
    assert set(french.text) & set(alphabets["fra"])
    (word,) = ctc.align(model, processor, wave, "de", language="fra")
    assert word["text"] == "de"
    item = Item("clip", Path("clip.wav"), None, {"text": french.text})
    task = Transcription(model, processor, language="fra", normalise="none")
    task.prepare([item], [french.text])
    assert task.predict([Heard("clip", wave, french.text)])[0]["hypothesis"] == french.text
    with pytest.raises(UsageError, match="holds eng, fra; say which with language"):
        ctc.transcribe_ctc(model, processor, wave)
    with pytest.raises(UsageError, match="load the adapters of eng"):
        ctc.align(model.speaking("fra"), processor, wave, "de", language="eng")


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


@pytest.mark.parametrize(
    ("paper", "name"),
    [("wav2vec2", "Wav2Vec2ForPreTraining"), ("wavlm", "WavLMForPreTraining"), ("wav2vec2", "Wav2Vec2ForXVector")],
)
def test_heads_that_read_every_frame(paper, name):
    with pytest.raises(UsageError, match="reads a frame every 20 ms; it does not go with add_adapter"):
        tiny.family(paper, name, add_adapter=True)
