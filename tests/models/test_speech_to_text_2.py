"""Speech2Text2 without PyTorch: an encoder that stays as it is, self-training, a language model, the command line."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from flax import nnx

import audiozoo
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.models import speech_to_text_2
from audiozoo.models.hubert import HubertConfig
from audiozoo.models.speech_to_text_2 import LanguageModelFusion, Speech2Text2Config, Speech2Text2ForCausalLM
from audiozoo.models.wav2vec2_bert import Wav2Vec2BertConfig
from audiozoo.models.xls_r import (
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderGenerationConfig,
    SpeechEncoderDecoderModel,
)
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from audiozoo.processors.speech_to_text_2 import Speech2Text2Processor, Speech2Text2Tokenizer
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor
from audiozoo.recipes import recipe
from audiozoo.training.loop import Turn
from tests.models.random_model import random_model
from tests.shapes import enforce
from tests.test_cli import assert_refused, audiozoo_command  # noqa: F401 - a fixture

ENCODER = HubertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,) * 7,
    feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0,
)  # fmt: skip
DECODER = Speech2Text2Config(
    vocab_size=12,
    d_model=12,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=16,
    tie_word_embeddings=False,
)
CONFIG = SpeechEncoderDecoderConfig(ENCODER, DECODER, "hubert", "speech_to_text_2")
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "ein@@", "s", "zwei", "drei", "vier", ",", "und", "f@@"]


@pytest.fixture(scope="module")
def model():
    return random_model(lambda rngs: SpeechEncoderDecoderModel(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def author():
    return random_model(lambda rngs: Speech2Text2ForCausalLM(DECODER, rngs=rngs), seed=1)


def waves(*lengths: int) -> dict[str, jnp.ndarray]:
    size = max(lengths)
    mask = np.arange(size) < np.asarray(lengths)[:, None]
    x = np.where(mask, np.random.default_rng(0).standard_normal((len(lengths), size)), 0)
    return {"input_values": jnp.asarray(x, jnp.float32), "attention_mask": jnp.asarray(mask, jnp.int32)}


def test_the_annotations_hold(monkeypatch, model, author):
    assert enforce(monkeypatch, speech_to_text_2)
    tokens = jnp.full((2, 5), 4, jnp.int32)
    out = jax.eval_shape(lambda: model(**waves(3200, 2000), labels=tokens, output_attentions=True))
    assert out.logits.shape == (2, 5, 12)
    assert out.cross_attentions[0].shape[:3] == (2, 2, 5)
    alone = jax.eval_shape(lambda: author(tokens, labels=tokens))
    assert alone.loss.shape == ()
    with pytest.raises(UsageError, match="no encoder 'ear'"):
        dataclasses.replace(CONFIG, encoder_type="ear")


@pytest.mark.slow
def test_training_the_decoder_behind_a_frozen_encoder(model):
    """The loss falls, and not a bit of the encoder changes."""
    x, labels = waves(3200, 2400, 3000), jnp.asarray([[4, 5, 2], [6, 2, -100], [7, 8, 2]])
    graphdef, frozen, learnt = nnx.split(
        model, lambda path, _: path[0] == "encoder", lambda path, _: path[0] != "encoder"
    )
    optimiser = optax.adam(2e-2)

    @jax.jit
    def step(learnt, state):
        def loss(learnt):
            return nnx.merge(graphdef, frozen, learnt)(**x, labels=labels).loss

        value, gradients = jax.value_and_grad(loss)(learnt)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(learnt, updates), state, value

    state, losses = optimiser.init(learnt), []
    for _ in range(60):
        learnt, state, value = step(learnt, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    trained = nnx.merge(graphdef, frozen, learnt)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m.encoder)) for m in (trained, model)), strict=True):
        np.testing.assert_array_equal(a, b)
    # Its own translations are the labels of the next round, and here the very texts that it learnt.
    (batch,) = speech_to_text_2.pseudo_labels(trained, [x], max_length=5, num_beams=2)
    np.testing.assert_array_equal(batch[:, :3], labels)
    assert (batch[:, 3:] == -100).all()


@pytest.mark.slow
def test_a_language_model_has_a_say(model, author):
    x = waves(3200, 2000)
    options = {"max_length": 6, "num_beams": 3}
    plain = speech_to_text_2.translate(model, **x, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generation_config", SpeechEncoderDecoderGenerationConfig(tuple(options.items())))
        np.testing.assert_array_equal(plain, model.generate(**x))
        np.testing.assert_array_equal(plain, speech_to_text_2.translate(model, **x))
    loud = speech_to_text_2.translate(model, **x, fusion=LanguageModelFusion(author, 50.0), **options)
    # Who shouts that loud writes alone: the likeliest text of the language model.
    score = jax.jit(lambda m, t: jax.nn.log_softmax(m(t).logits))
    row = np.asarray(loud[0])
    log_p = np.asarray(score(author, jnp.asarray(row[None, :-1])))[0]
    assert row[1] == log_p[0].argmax() or log_p[0, row[1]] > np.sort(log_p[0])[-4]
    assert (np.asarray(loud) < DECODER.vocab_size).all()
    with pytest.raises(UsageError, match="weight of at least 0"):
        speech_to_text_2.translate(model, **x, fusion=LanguageModelFusion(author, -1.0))
    # Scores of models in bfloat16 still add up to 1, token by token.
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), author)
    said = jax.random.normal(jax.random.key(0), (1, 1, 12), jnp.bfloat16)
    start = half.model.decoder.start(jnp.zeros((1, 2, 12), jnp.bfloat16), 3)
    step, cache = speech_to_text_2.with_language_model(lambda *given: (said, given[2]), start, half, 0.5)
    scores, _ = step(jnp.asarray([[2]]), None, cache, 0)
    assert abs(float(jax.nn.logsumexp(scores.astype(jnp.float32)))) < 1e-5


def test_directories_and_the_command_line(model, audiozoo_command, monkeypatch, tmp_path):  # noqa: F811
    from audiozoo.commands import terminal

    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)
    search = SpeechEncoderDecoderGenerationConfig((("max_length", 7),))
    monkeypatch.setattr(model, "generation_config", search)
    processor = Speech2Text2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
        Speech2Text2Tokenizer({token: index for index, token in enumerate(TOKENS)}),
    )
    audiozoo.export(model, tmp_path / "model")
    processor.save(tmp_path / "model")
    loaded, read = audiozoo.load(tmp_path / "model"), audiozoo.load_processor(tmp_path / "model")
    assert loaded.config == CONFIG
    assert read.decode([2, 4, 5, 9, 6, 2], skip_special_tokens=True) == "eins, zwei"
    assert read.batch_decode([[11, 7]]) == ["fdrei"]
    with pytest.raises(UsageError, match=r"no merges\.txt"):
        read(text="eins")
    audiozoo.save(loaded, tmp_path / "native", processor_from=tmp_path / "model")
    native = audiozoo.load(tmp_path / "native")
    assert native.config == CONFIG
    assert native.generation_config == loaded.generation_config == search
    assert isinstance(audiozoo.load_processor(tmp_path / "native").tokenizer, Speech2Text2Tokenizer)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (native, model)), strict=True):
        np.testing.assert_array_equal(a, b)
    wave = np.random.default_rng(0).standard_normal(24_000) * 0.1
    soundfile.write(tmp_path / "noise.wav", wave, 16_000)
    found = audiozoo_command("translate", tmp_path / "noise.wav", "--model", tmp_path / "model", "--beams", "2")
    assert found.code == 0, found.err
    inputs = read([audiozoo.audio.read(tmp_path / "noise.wav")], sampling_rate=16_000, pad_to_multiple_of=64_000)
    wanted = read.batch_decode(loaded.generate(**inputs, num_beams=2, max_length=7), skip_special_tokens=True)
    assert found.out == wanted[0].strip() + "\n"
    refused = audiozoo_command("translate", tmp_path / "noise.wav", "--to", "de", "--model", tmp_path / "model")
    assert_refused(refused, "leave --to out")
    with pytest.raises(UsageError, match="one language"):
        Speech2Text2Processor.from_directory(tmp_path / "model", "de")
    with pytest.raises(CheckpointError, match="<unk>"):
        Speech2Text2Tokenizer({"<s>": 0, "<pad>": 1, "</s>": 2})


def test_an_encoder_that_hears_features(audiozoo_command, monkeypatch, tmp_path):  # noqa: F811
    """w2v-BERT before Speech2Text2's decoder: its directory says what it hears."""
    from audiozoo.commands import terminal

    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)
    encoder = Wav2Vec2BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, add_adapter=True,
        conv_depthwise_kernel_size=5, mask_time_prob=0.0,
    )  # fmt: skip
    config = SpeechEncoderDecoderConfig(encoder, DECODER, "wav2vec2-bert", "speech_to_text_2")
    model = random_model(lambda rngs: SpeechEncoderDecoderModel(config, rngs=rngs))
    extractor = SeamlessM4TFeatureExtractor()
    audiozoo.export(model, tmp_path / "model")
    Speech2Text2Processor(extractor, Speech2Text2Tokenizer({token: index for index, token in enumerate(TOKENS)})).save(
        tmp_path / "model"
    )
    loaded, read = audiozoo.load(tmp_path / "model"), audiozoo.load_processor(tmp_path / "model")
    assert loaded.config == config
    assert isinstance(read.feature_extractor, SeamlessM4TFeatureExtractor)
    wave = (0.1 * np.random.default_rng(0).standard_normal(24_000)).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", wave, 16_000, subtype="FLOAT")
    found = audiozoo_command("translate", tmp_path / "noise.wav", "--model", tmp_path / "model", "--beams", "2")
    assert found.code == 0, found.err
    alone = extractor(wave, sampling_rate=16_000, pad_to_multiple_of=256)
    tokens = speech_to_text_2.translate(loaded, **alone, num_beams=2, max_new_tokens=200, masked_adapter=True)
    assert found.out == read.decode(tokens[0], skip_special_tokens=True).strip() + "\n"
    refused = audiozoo_command("transcribe", tmp_path / "noise.wav", "--model", tmp_path / "model")
    assert_refused(refused, "which audiozoo translate takes")
    # In training the features are computed on the device.
    loss, labels = recipe("speech_to_text_2").objective.loss(read), jnp.asarray([[4, 5, 2]])
    batch = {"waveform": jnp.asarray(wave)[None], "length": jnp.asarray([len(wave)]), "labels": labels}
    learnt = jax.jit(lambda m, batch: loss({"model": m}, batch, Turn(None, jnp.asarray(0), training=False)).total)(
        loaded, batch
    )
    heard = extractor(wave, sampling_rate=16_000)
    wanted = jax.jit(lambda m, heard: m(**heard, labels=labels, masked_adapter=True).loss)(loaded, heard)
    np.testing.assert_allclose(learnt, 3 * wanted, rtol=1e-4)


def test_the_decoder_alone_in_a_directory(author, tmp_path):
    audiozoo.export(author, tmp_path / "author")
    again = audiozoo.load(tmp_path / "author")
    assert again.config == DECODER
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again, author)), strict=True):
        np.testing.assert_array_equal(a, b)
