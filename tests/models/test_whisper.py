"""Whisper in use, without the original: compiled, batched, sharded, in half precision, generating and training."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import audiozoo
from audiozoo import audio, packaged
from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, scan_layers, stack_layers, unstack_layers
from audiozoo.loading import variables
from audiozoo.models import whisper
from audiozoo.models.whisper import (
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)
from audiozoo.outputs import BaseModelOutput
from audiozoo.processors.whisper import WhisperProcessor
from tests import processes
from tests.models.tiny_whisper import TINY, build
from tests.shapes import enforce
from tests.tolerances import tolerance
from weights_conversion.whisper import _generation_defaults, generation_from_hugging_face, hugging_face


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return build()


def features(batch: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, 8, 24)), jnp.float32)


def tokens(batch: int = 2, time: int = 6, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(3, 67, (batch, time)))


def assert_close(ours, reference, kind: str = "output") -> None:
    ours_dtype = str(ours.dtype)
    allowed = tolerance(kind, ours_dtype)
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    size = np.maximum(np.abs(reference), np.sqrt(np.mean(np.square(reference))))
    assert (np.abs(ours - reference) / (allowed.atol + allowed.rtol * size)).max() <= 1


@pytest.fixture(scope="module")
def outputs(model):
    """The compiled call on `features()` and `tokens()`, and the function that made it."""
    run = audiozoo.jit(model)
    return run(features(), decoder_input_ids=tokens(), labels=tokens(seed=2)), run


# --- compiled, batched, in half precision ----------------------------------------------------------------------------


def test_jit_equals_eager_and_compiles_once_a_shape(model, outputs):
    compiled, run = outputs
    eager = model(features(), decoder_input_ids=tokens(), labels=tokens(seed=2))
    assert compiled.keys() == eager.keys()
    jax.tree.map(assert_close, compiled, eager)
    assert run.compiled._cache_size() == 1
    other = run(features(seed=3), decoder_input_ids=tokens(seed=4), labels=tokens(seed=2))
    assert run.compiled._cache_size() == 1
    assert np.abs(other.logits - eager.logits).max() > 0.1
    run(features(3), decoder_input_ids=tokens(3), labels=tokens(3))
    assert run.compiled._cache_size() == 2


def test_vmap_over_a_batch(model, outputs):
    graphdef, state = nnx.split(model)

    def one(x, ids):
        return nnx.merge(graphdef, state)(x[None], decoder_input_ids=ids[None]).logits[0]

    assert_close(jax.jit(jax.vmap(one))(features(), tokens()), outputs[0].logits)


def test_bfloat16_stays_close(outputs):
    whole, _ = outputs
    x, ids, labels = features(), tokens(), tokens(seed=2)
    half = build(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {str(v.dtype) for v in variables(half).values()} == {"bfloat16"}
    out = audiozoo.jit(half)(x, decoder_input_ids=ids, labels=labels)
    assert out.logits.dtype == out.encoder_last_hidden_state.dtype == jnp.bfloat16
    assert_close(out.logits, whole.logits)
    assert_close(out.encoder_last_hidden_state, whole.encoder_last_hidden_state)
    assert_close(out.loss.astype(jnp.bfloat16), whole.loss)


def test_dtype_is_of_the_computation_and_param_dtype_of_the_parameters():
    mixed = build(dtype=jnp.bfloat16)
    assert {str(v.dtype) for v in variables(mixed).values()} == {"float32"}
    out = jax.eval_shape(lambda x, ids: mixed(x, decoder_input_ids=ids), features(), tokens())
    assert out.logits.dtype == out.encoder_last_hidden_state.dtype == jnp.bfloat16


def test_scanned_layers_equal_the_loop(model, outputs):
    encoder = model.model.encoder
    stacked = stack_layers(list(encoder.layers))
    assert stacked.fc1.kernel.shape == (2, 16, 24)
    for layer, again in zip(encoder.layers, unstack_layers(stacked), strict=True):
        jax.tree.map(np.testing.assert_array_equal, again, layer)

    @jax.jit
    def scan(stacked, x):
        return scan_layers(stacked, lambda layer, x: layer(x, Dropout(None))[0], x)

    @jax.jit
    def loop(layers, x):
        for layer in layers:
            x, _ = layer(x, Dropout(None))
        return x

    x = outputs[0].encoder_last_hidden_state
    assert_close(scan(stacked, x), loop(list(encoder.layers), x))


def test_runs_with_graph_mode_off(outputs):
    with nnx.set_graph_mode(False):
        out = jax.jit(lambda model, x, ids: model(x, decoder_input_ids=ids).logits)(build(), features(), tokens())
    assert_close(out, outputs[0].logits)


# --- generation ------------------------------------------------------------------------------------------------------


def test_generate_equals_the_loop_without_a_cache(model):
    """No token twice, so that a random model does not repeat one for ever."""
    prompt, new = 2, 16
    x = features(4, seed=2)
    run = audiozoo.jit(model)
    ids = np.zeros((4, prompt + new), np.int64)
    ids[:, :prompt] = [2, 11]
    for position in range(prompt, ids.shape[1]):  # what stands behind is not seen: the mask is causal
        logits = np.array(run(x, decoder_input_ids=ids).logits)[:, position - 1]
        np.put_along_axis(logits, ids[:, :position], -np.inf, axis=1)
        ids[:, position] = logits.argmax(-1)
    assert run.compiled._cache_size() == 1
    ids = ids[:, prompt:]
    end = int(ids[1, 4])  # ends one row early, and perhaps others somewhere else
    for row in ids:
        row[1 + int(np.argmax(np.append(row == end, True))) :] = 0
    assert len({tuple(row) for row in ids}) > 1
    ours = model.generate(
        x, decoder_input_ids=np.full((4, 2), (2, 11)), max_new_tokens=new, eos_token_id=end, no_repeat_ngram_size=1
    )
    np.testing.assert_array_equal(ours, ids[:, : ours.shape[1]])
    assert not ids[:, ours.shape[1] :].any()


def test_generate_compiles_once_for_any_number_of_tokens(model):
    model.generate(features(), max_new_tokens=3)
    before = whisper._generate._cache_size()
    for count in (1, 5, 17, 32):
        assert model.generate(features(), max_new_tokens=count, eos_token_id=66).shape[1] <= count
        assert whisper._generate._cache_size() <= before + 1  # another end of sequence is another program
    model.generate(features(seed=9), max_new_tokens=30, eos_token_id=66)
    assert whisper._generate._cache_size() == before + 1


def test_generate_follows_the_checkpoints_settings_and_the_caller_before_them(model):
    given = {"input_features": features(), "decoder_input_ids": np.full((2, 2), (2, 11))}
    search = {"num_beams": 2, "no_repeat_ngram_size": 1, "min_new_tokens": 6}
    settled = build()
    settled.generation_config = dataclasses.replace(
        model.generation_config, max_length=6, options=tuple(search.items())
    )
    found = settled.generate(**given)
    assert found.shape == (2, 6)
    np.testing.assert_array_equal(found, model.generate(**given, max_new_tokens=6, **search))
    plain = settled.generate(**given, num_beams=1, no_repeat_ngram_size=0)
    np.testing.assert_array_equal(plain, model.generate(**given, max_new_tokens=6, min_new_tokens=6))
    assert not np.array_equal(plain, found)


def test_generate_from_an_earlier_encoding(model):
    encoded = audiozoo.jit(model.model.encoder)(features())
    np.testing.assert_array_equal(
        model.generate(encoder_outputs=encoded, max_new_tokens=6), model.generate(features(), max_new_tokens=6)
    )


@cache
def multilingual() -> WhisperForConditionalGeneration:
    config = dataclasses.replace(
        WhisperConfig.tiny(),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        max_source_positions=12,
        max_target_positions=24,
    )
    model = build(config=config)
    model.generation_config = _generation_defaults(config)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["WhisperForConditionalGeneration", "WhisperForCausalLM"])
def test_a_draft_model_changes_nothing_but_the_number_of_rounds(model, kind):
    x = features()
    draft = build(kind)  # the same decoder; as a part of the whole model it hears the same audio, too
    draft.model.decoder.layer_norm.bias[...] += 0.3 * np.random.default_rng(0).standard_normal(16)
    # To the last position of the table, which the last drafts pass.
    options = {"decoder_input_ids": tokens(2, 3), "return_dict_in_generate": True, "eos_token_id": 66}
    alone = model.generate(x, **options)
    helped = model.generate(x, assistant_model=draft, num_assistant_tokens=4, **options)
    np.testing.assert_array_equal(helped.sequences, alone.sequences)
    np.testing.assert_array_equal(helped.lengths, alone.lengths)
    assert int(helped.accepted) > 0
    assert int(helped.rounds) < int(alone.steps) - 1
    looked = model.generate(x, prompt_lookup_num_tokens=4, **options)
    np.testing.assert_array_equal(looked.sequences, alone.sequences)
    assert int(looked.rounds) + int(looked.accepted) >= int(alone.steps) - 1
    timed = {"return_timestamps": True, "max_new_tokens": 12}
    many = multilingual()
    np.testing.assert_array_equal(many.generate(x, assistant_model=many, **timed), many.generate(x, **timed))


def test_a_draft_model_that_cannot_help(model):
    x = features(1)
    refuse("share one vocabulary", model.generate, x, assistant_model=multilingual())
    refuse("greedy", model.generate, x, assistant_model=model, do_sample=True, key=jax.random.key(0))
    refuse("greedy", model.generate, x, assistant_model=model, num_beams=2)
    wider = build("WhisperForCausalLM", dataclasses.replace(TINY, d_model=24))
    refuse("width 24 cannot draft", model.generate, x, assistant_model=wider)
    refuse("streamer", model.generate, x, assistant_model=model, streamer=print)
    refuse("not both", model.generate, x, assistant_model=model, prompt_lookup_num_tokens=2)
    encoded = BaseModelOutput(last_hidden_state=jnp.zeros((1, 12, 16)))
    refuse("needs input_features", model.generate, encoder_outputs=encoded, assistant_model=model)


def test_prompts():
    model = multilingual.__wrapped__()
    start, en, de, transcribe, translate, plain, previous = 50258, 50259, 50261, 50359, 50358, 50363, 50361
    assert model.prompt(1).tolist() == [[start, en, transcribe, plain]]
    assert model.prompt(1, language="german", task="translate", return_timestamps=True).tolist() == [
        [start, de, translate]
    ]
    assert model.prompt(2, language=["de", "<|en|>"]).tolist() == [
        [start, de, transcribe, plain],
        [start, en, transcribe, plain],
    ]
    assert model.prompt(1, prompt_ids=[7, 8]).tolist() == [[previous, 7, 8, start, en, transcribe, plain]]
    assert model.prompt(1, prompt_ids=[previous, 7]).tolist() == [[previous, 7, start, en, transcribe, plain]]
    assert model.prompt(1, prompt_ids=np.array([previous, 7])).tolist() == model.prompt(1, prompt_ids=[7]).tolist()
    older = {"forced_decoder_ids": [[1, de], [2, translate], [3, plain]]}
    for said in ({"language": "german", "task": "translate"}, older):
        model.generation_config = generation_from_hugging_face(said, model.config)
        assert model.prompt(1).tolist() == [[start, de, translate, plain]]
        assert model.prompt(1, language="en", task="transcribe").tolist() == [[start, en, transcribe, plain]]


def test_language_probabilities():
    model = multilingual()
    probabilities = model.detect_language(features())
    assert probabilities.shape == (2, 99)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    logits = audiozoo.jit(model)(features(), decoder_input_ids=jnp.full((2, 1), 50258)).logits[:, 0]
    best = [dict(model.generation_config.lang_to_id)[f"<|{code}|>"] for code in ("en", "zh")]
    ratio = probabilities[:, 0] / probabilities[:, 1]
    np.testing.assert_allclose(np.log(ratio), logits[:, best[0]] - logits[:, best[1]], rtol=1e-3, atol=1e-4)


# --- sharded ---------------------------------------------------------------------------------------------------------

SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import audiozoo
from audiozoo.loading import variables
from audiozoo.sharding import batch_sharding, make_mesh

jax.config.update("jax_default_matmul_precision", "highest")
assert len(jax.devices()) == 8
mesh = make_mesh({"data": 4, "tensor": 2})
given = np.load(sys.argv[1])
for kind in ("hugging_face", "native"):
    model = audiozoo.load(sys.argv[2] + "/" + kind, mesh=mesh)
    values = {name: leaf[...] for name, leaf in variables(model).items()}
    assert all(len(v.sharding.device_set) == 8 for v in values.values())
    fc1, fc2 = (values[f"model.encoder.layers.0.{n}.kernel"] for n in ("fc1", "fc2"))
    assert fc1.sharding.spec == P(None, "tensor") and fc1.addressable_shards[0].data.shape == (16, 12), fc1.sharding
    assert fc2.sharding.spec == P("tensor", None) and fc2.addressable_shards[0].data.shape == (12, 16), fc2.sharding
x, ids = (jax.device_put(given[name], batch_sharding(mesh)) for name in ("x", "ids"))
out = audiozoo.jit(model)(x, decoder_input_ids=ids, labels=ids)
assert len(out.logits.sharding.device_set) == 8
tokens = model.generate(x, decoder_input_ids=given["ids"][:, :2], max_new_tokens=6)
np.savez(sys.argv[3], logits=out.logits, loss=out.loss, tokens=tokens)
"""


@pytest.mark.slow
def test_sharded_on_eight_devices(model, tmp_path):
    """Straight from disk into the shards of a 4 × 2 mesh, from both kinds of directory: the numbers of one device."""
    config = dataclasses.replace(TINY, vocab_size=66, encoder_layers=1, decoder_layers=1)
    model = build(config=config)
    audiozoo.export(model, tmp_path / "hugging_face")
    audiozoo.save(model, tmp_path / "native")
    x, ids = np.asarray(features(4)), np.asarray(tokens(4)) % 66
    np.savez(tmp_path / "given.npz", x=x, ids=ids)
    processes.output("-c", SHARDED, tmp_path / "given.npz", tmp_path, tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    one = audiozoo.jit(model)(x, decoder_input_ids=ids, labels=ids)
    assert_close(found["logits"], one.logits, "sharded")
    assert_close(found["loss"], one.loss, "sharded")
    written = model.generate(x, decoder_input_ids=ids[:, :2], max_new_tokens=6)
    np.testing.assert_array_equal(found["tokens"], written)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_a_real_recording():
    """A random model learns ten seconds of real speech by heart, with all that training switches on, in seconds."""
    directory = packaged.TINY_EN.find()
    speech = packaged.SPEECH.find()
    if directory is None or speech is None:
        pytest.skip("the packages of the extra `demo` are not installed")
    processor = WhisperProcessor.from_directory(directory.parent)
    inputs = processor(audio.read(speech), 16_000, text=packaged.SPEECH_TEXT)
    x = jnp.asarray(inputs["input_features"][:, :, :1000])  # ten seconds; the model below is made for ten
    ids = np.atleast_2d(inputs["labels"])  # <|startoftranscript|><|notimestamps|>Ever tried. … <|endoftext|>
    given, labels = ids[:, :-1], ids[:, 1:].copy()
    labels[:, 0] = -100  # the prompt is given, not learnt (§2.3)
    english = WhisperConfig.tiny_en()
    config = dataclasses.replace(
        english,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=500,
        max_target_positions=64,
        dropout=0.02,
        attention_dropout=0.02,
        activation_dropout=0.02,
        apply_spec_augment=True,
        mask_feature_prob=0.1,
        encoder_layerdrop=0.1,
    )
    model = WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0))
    model.generation_config = _generation_defaults(config)
    graphdef, state = nnx.split(model)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 120))

    def loss_of(state, key):
        return nnx.merge(graphdef, state)(x, decoder_input_ids=given, labels=labels, key=key).loss

    @jax.jit
    def step(state, moments, key):
        loss, gradients = jax.value_and_grad(loss_of)(state, key)
        updates, moments = optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    moments, losses = optimizer.init(state), []
    for i in range(120):
        state, moments, loss = step(state, moments, jax.random.key(i))
        losses.append(float(loss))
    assert losses[0] > 9
    assert losses[-1] < 0.5
    trained = nnx.merge(graphdef, state)
    new = trained.generate(x, max_new_tokens=32)
    text = processor.batch_decode(new, skip_special_tokens=True)[0]
    assert text.strip() == packaged.SPEECH_TEXT


def test_spec_augment(monkeypatch):
    """Spans inside the audio, and channels, as many as the settings say at least; in training, if asked for, alone."""
    sizes = {"mask_time_prob": 1e-6, "mask_time_length": 3, "mask_feature_prob": 1e-6, "mask_feature_length": 2}
    few = dataclasses.replace(TINY, apply_spec_augment=True, **sizes, mask_time_min_masks=0)
    least = dataclasses.replace(few, mask_time_min_masks=2, mask_feature_min_masks=1)
    heard = (jnp.arange(24) < jnp.asarray([[24], [5]])).astype(jnp.int32)
    x = jnp.ones((2, 8, 24))
    np.testing.assert_array_equal(whisper.spec_augment(jax.random.key(0), x, few, heard), x)
    hidden = np.asarray(whisper.spec_augment(jax.random.key(0), x, least, heard)) == 0
    frames, channels = hidden.all(axis=1), hidden.all(axis=2)
    np.testing.assert_array_equal(hidden, frames[:, None] | channels[:, :, None])
    assert frames.sum(axis=1).min() > 3
    assert not frames[1, 5:].any()
    assert channels.sum(axis=1).tolist() == [2, 2]

    def noted(key, features, config, mask):
        called.append(mask)
        return features

    monkeypatch.setattr(whisper, "spec_augment", noted)
    for config, key, times in ((least, jax.random.key(0), 1), (least, None, 0), (TINY, jax.random.key(0), 0)):
        called = []
        model = build(config=config)
        jax.eval_shape(lambda m, x, k: m(x, heard, decoder_input_ids=tokens(), key=k).logits, model, x, key)
        assert len(called) == times
        assert all(mask is heard for mask in called)


def test_layer_drop(model):
    encoder = build(config=dataclasses.replace(TINY, encoder_layerdrop=1.0)).model.encoder
    dropped = audiozoo.jit(encoder)(features(), key=jax.random.key(0), output_hidden_states=True)
    first, *rest, last = dropped.hidden_states
    for state in rest:
        np.testing.assert_array_equal(state, first)
    assert_close(last, encoder.layer_norm(first))
    kept = audiozoo.jit(encoder)(features(), output_hidden_states=True)
    assert np.abs(kept.hidden_states[1] - kept.hidden_states[0]).max() > 0.1
    assert_close(kept.last_hidden_state, audiozoo.jit(model.model.encoder)(features()).last_hidden_state)


def test_dropout_needs_a_key(outputs):
    model = build(config=dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.2, activation_dropout=0.1))
    run = audiozoo.jit(model)
    ids = tokens()
    assert_close(run(features(), decoder_input_ids=ids).logits, outputs[0].logits)
    a, b, c = (run(features(), decoder_input_ids=ids, key=jax.random.key(i)).logits for i in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


# --- shapes, fields, errors ------------------------------------------------------------------------------------------


def test_shapes_are_as_annotated(model, monkeypatch):
    checked = enforce(monkeypatch, whisper)
    assert {"WhisperEncoder.__call__", "WhisperDecoder.__call__", "WhisperModel.__call__", "spec_augment"} <= set(
        checked
    )
    everything = {"output_attentions": True, "output_hidden_states": True}
    x, ids = features(), tokens()

    def shapes(call, *args):
        return jax.eval_shape(call, *args)

    out = shapes(lambda x, ids, key: model(x, labels=ids, key=key, **everything), x, ids, jax.random.key(0))
    assert out.logits.shape == (2, 6, 67)
    assert [a.shape for a in out.encoder_attentions] == [(2, 2, 12, 12)] * 2
    assert [a.shape for a in out.cross_attentions] == [(2, 4, 6, 12)]
    assert len(out.decoder_hidden_states) == 2
    assert shapes(lambda x: model.model.encoder(x[:, :, :9], allow_short=True), x).last_hidden_state.shape == (2, 5, 16)
    assert model.generate(x, max_new_tokens=2).shape[0] == 2
    assert shapes(multilingual().detect_language, x).shape == (2, 99)
    bare = build("WhisperModel")
    assert shapes(lambda x, ids: bare(x, None, ids), x, ids).last_hidden_state.shape == (2, 6, 16)
    causal = build("WhisperForCausalLM")
    frames = jnp.zeros((2, 12, 16))
    assert shapes(lambda ids: causal(ids, encoder_outputs=frames, labels=ids), ids).logits.shape == (2, 6, 67)
    classes = build("WhisperForAudioClassification")
    out = shapes(lambda x: classes(x, labels=jnp.array([0, 1]), **everything), x)
    assert out.logits.shape == (2, 2)
    assert out.loss.shape == ()
    masked = dataclasses.replace(TINY, apply_spec_augment=True, mask_feature_prob=0.2)
    assert shapes(lambda key, x: whisper.spec_augment(key, x, masked), jax.random.key(0), x).shape == x.shape
    for wrong in (
        lambda: model(x[0], decoder_input_ids=ids),  # no batch
        lambda: model(x, decoder_input_ids=ids.astype(jnp.float32)),  # tokens that are no integers
        lambda: model(x, decoder_input_ids=ids[0]),
        lambda: bare(x, None, ids, tokens(3)),  # a mask of another batch
    ):
        with pytest.raises(Exception, match=r"(?i)type-check|violates"):
            jax.eval_shape(wrong)


def test_every_field_of_the_configuration_is_read():
    """By construction, training or classification; what only an export needs shows in the export."""
    read = set()

    class Watched(WhisperConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    given = dataclasses.asdict(TINY) | {
        "apply_spec_augment": True,
        "mask_feature_prob": 0.3,
        "use_weighted_layer_sum": True,
    }
    config = Watched(**given)
    fields = {f.name for f in dataclasses.fields(WhisperConfig)}
    read.clear()

    def train(key, x, ids):
        model = WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0))
        classifier = WhisperForAudioClassification(config, rngs=nnx.Rngs(0))
        return model(x, labels=ids, key=key).loss, classifier(x).logits

    jax.eval_shape(train, jax.random.key(0), features(), tokens())
    assert fields - read == {"bos_token_id", "median_filter_width"}  # the latter by what times words
    exported = hugging_face(build(config=dataclasses.replace(TINY, bos_token_id=33))).files["config.json"]
    assert exported["bos_token_id"] == 33


def refuse(sentence: str, call, *args, **kwargs) -> None:
    with pytest.raises(UsageError, match=sentence):
        call(*args, **kwargs)


def test_wrong_features(model):
    refuse(
        r"have 9 mel channels; this model was trained with 8", model, jnp.zeros((1, 9, 24)), decoder_input_ids=tokens(1)
    )
    refuse(r"have 22 frames; Whisper takes 24 \(pad the audio to 30 s\)", model, features()[:, :, :22])
    refuse("have 26 frames", model.model.encoder, jnp.zeros((1, 8, 26)), allow_short=True)
    refuse("input_features, or encoder_outputs", model, decoder_input_ids=tokens())
    refuse(r"have shape \(8, 24\); \(batch, mels, frames\)", model.generate, features()[0])
    refuse("input_features, or encoder_outputs", model.generate)
    refuse("the batch is empty", model.generate, features()[:0])
    refuse("input_features, or encoder_outputs", build("WhisperForAudioClassification"))


def test_wrong_tokens(model):
    x = features(1)
    refuse("49 labels are too many; there are 48", model, x, labels=tokens(1, 49))
    refuse("49 tokens are too many", model, x, decoder_input_ids=tokens(1, 49))
    both = {"decoder_input_ids": tokens(1), "decoder_inputs_embeds": jnp.zeros((1, 6, 16))}
    refuse("either token ids or embedded tokens", model, x, **both)
    encoded = BaseModelOutput(last_hidden_state=jnp.zeros((1, 12, 16)))
    refuse("either token ids or embedded tokens", model, encoder_outputs=encoded)
    refuse("prompt has 48 tokens; this model has 48 positions", model.generate, x, decoder_input_ids=tokens(1, 48))


def test_wrong_options(model):
    x = features(1)
    refuse("option 'num_beam'; did you mean 'num_beams'", model.generate, x, num_beam=3)
    refuse("max_new_tokens=0 must be at least 1", model.generate, x, max_new_tokens=0)
    refuse("A number is no key", model.generate, x, do_sample=True, key=0)
    refuse("English-only", model.generate, x, language="de")
    refuse("English-only", model.generate, x, task="translate")
    refuse("English-only", model.detect_language, x)
    many = multilingual()
    refuse("no task 'summarise'; there are translate, transcribe", many.generate, x, task="summarise")
    refuse("(?i)klingon", many.generate, x, language="klingon")
    refuse("no token for the language 'yue'", many.generate, x, language="yue")  # only large-v3 has Cantonese
    refuse("2 languages were given for 1 examples", many.generate, x, language=["de", "en"])
