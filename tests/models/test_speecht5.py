"""SpeechT5 without the original: its cache, its losses, joint decoding, pre-training, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo.decoding.ctc_prefix import PrefixScorer
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.layers.batch_norm import writable
from audiozoo.models import speecht5
from audiozoo.models.speech_to_text_2 import LanguageModelFusion
from audiozoo.models.speecht5 import SpeechT5Config, SpeechT5LanguageModel, SpeechT5LanguageModelConfig
from audiozoo.processors.speecht5 import SpeechT5FeatureExtractor, SpeechT5Processor, SpeechT5Tokenizer
from audiozoo.text.numbers import spell_numbers
from tests import processes
from tests.models.random_model import random_model
from tests.models.tiny_speecht5 import SIZES, build, train_characters, vocoder, wave
from tests.shapes import enforce
from tests.tolerances import tolerance

IDS = np.array([[5, 9, 12, 4, 2], [7, 8, 2, 1, 1]], np.int32)
WHO = np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def voice():
    return build("ForTextToSpeech")


# --- speaking --------------------------------------------------------------------------------------------------------


def test_the_cached_loop_says_what_the_whole_says(voice):
    """Frame by frame with a cache, and all frames at once given those before them."""
    kept = np.random.default_rng(0).random((2, 24, 12)) < 0.5
    options = {"threshold": 3.0, "maxlenratio": 4.0, "prenet_masks": kept}  # the stop is never reached
    spectrogram, attentions = voice.generate(IDS[:1], None, WHO[:1], output_cross_attentions=True, **options)
    assert spectrogram.shape == (20, 8)
    assert attentions.shape == (1, 3, 10, 5)
    # What came before each step: the frames as they were before the post-net's convolutions.
    frames = np.zeros((1, 10, 8), np.float32)

    @jax.jit
    def call(m, x):
        states = m.speecht5(IDS[:1], None, x, speaker_embeddings=WHO[:1], prenet_masks=kept[:, :10]).last_hidden_state
        return m.speech_decoder_postnet(states)

    for step in range(1, 10):
        frames[:, step] = call(voice, frames)[0][:, 2 * step - 1]
    after = call(voice, frames)[1]
    np.testing.assert_allclose(spectrogram, after[0], rtol=1e-4, atol=1e-5)


def test_the_same_seed_the_same_speech(voice):
    sound = {"vocoder": vocoder(), "threshold": 0.9, "maxlenratio": 6.0, "minlenratio": 1.0}
    first = voice.generate(IDS[:1], None, WHO[:1], **sound)
    np.testing.assert_array_equal(first, voice.generate(IDS[:1], None, WHO[:1], **sound))
    other = voice.generate(IDS[:1], None, WHO[:1], key=jax.random.key(1), **sound)
    assert first.shape != other.shape or np.abs(first - other).max() > 1e-6
    assert first.size % 16 == 0
    # An item of a padded batch is what it is alone; only the limit is that of the longest text.
    waves, lengths = voice.generate(IDS, IDS != 1, WHO, return_output_lengths=True, **sound)
    alone = voice.generate(IDS[:1], None, WHO[:1], **sound)
    np.testing.assert_allclose(waves[0, : lengths[0]], alone, atol=1e-5)
    assert not waves[1, lengths[1] :].any()


SHARDED = """
import jax, numpy as np
from audiozoo import sharding
from tests.models.test_speecht5 import IDS, WHO
from tests.models.random_model import random_model
from tests.models.tiny_speecht5 import build, vocoder

def say(model, vocoder, seed):
    options = {"threshold": 0.9, "maxlenratio": 6.0, "minlenratio": 2.0, "return_output_lengths": True}
    return model.generate(IDS, IDS != 1, WHO, key=jax.random.key(seed), vocoder=vocoder, **options)

mesh = sharding.make_mesh({"data": 4, "tensor": 2})
voice, sound = build("ForTextToSpeech"), vocoder()
(alone, lengths), (together, same) = say(voice, sound, 3), say(*(sharding.shard(m, mesh) for m in (voice, sound)), 3)
assert lengths == same
other, _ = say(voice, sound, 4)
assert other.shape != alone.shape or np.abs(other - alone).max() > 1e-4
print(np.abs(alone - together).max())
"""


@pytest.mark.slow
def test_eight_devices_say_with_a_seed_what_one_says():
    assert float(processes.output("-c", SHARDED)) < 1e-5


def test_text_longer_than_any_table(voice):
    """`transformers` fails beyond `max_text_positions`."""
    ids = np.random.default_rng(0).integers(4, 79, (1, 640)).astype(np.int32)
    spectrogram = voice.generate(ids, None, WHO[:1], frames=6)
    assert spectrogram.shape == (6, 8)
    assert np.isfinite(spectrogram).all()


def test_distances_beyond_the_table():
    """The diagonals hold what a table of all pairs would, for texts shorter and longer than the reach."""
    rng = np.random.default_rng(0)
    for time in (1, 2, 5, 6, 7, 13, 20):
        query, keys = rng.standard_normal((2, 3, time, 4)), rng.standard_normal((12, 4))
        query, keys = query.astype(np.float32), keys.astype(np.float32)
        distance = np.arange(time)[:, None] - np.arange(time)
        wanted = np.einsum("bhid,ijd->bhij", query, keys[np.clip(distance, -6, 5) + 6])
        np.testing.assert_allclose(speecht5.relative_scores(query, jnp.asarray(keys)), wanted, atol=1e-5)


def test_dropout_keeps_as_many_as_it_says():
    config = dataclasses.replace(SpeechT5Config(**SIZES), speech_decoder_prenet_dropout=0.2)
    few = speecht5.draw_prenet_masks(config, jax.random.key(0), 40)
    assert few.shape == (2, 40, 12)
    np.testing.assert_array_equal(few, speecht5.draw_prenet_masks(config, jax.random.key(0), 90)[:, :40])
    assert abs(float(speecht5.draw_prenet_masks(config, jax.random.key(0), 400).mean()) - 0.8) < 0.02


# --- learning --------------------------------------------------------------------------------------------------------


def learns(model, loss, steps=12, rate=3e-3):
    """The loss at each of some steps of Adam, the model after them, and what else `loss` gave at the last."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(rate)

    def objective(params, rest, key):
        trained = nnx.merge(graphdef, params, writable(rest))
        value, *extra = loss(trained, key)
        return value, (nnx.state(trained, nnx.Not(nnx.Param)), extra)

    @jax.jit
    def step(params, rest, state, key):
        (value, (rest, extra)), gradient = jax.value_and_grad(objective, has_aux=True)(params, rest, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), rest, state, value, extra

    state, values = optimizer.init(params), []
    for index in range(steps):
        params, rest, state, value, extra = step(params, rest, state, jax.random.key(index))
        values.append(float(value))
    return values, nnx.merge(graphdef, params, rest), *extra


def spectrogram_target():
    time = np.arange(12)[:, None] / 3
    labels = np.stack([np.sin(time + np.arange(8)), np.cos(time - np.arange(8))]).astype(np.float32)
    labels[1, 9:] = -100
    return labels


def test_a_row_of_padding_alone_guides_no_attention():
    attentions, steps = jnp.full((2, 1, 4, 3), 1 / 3), jnp.asarray([[True] * 3 + [False], [False] * 4])
    loss, gradient = jax.value_and_grad(speecht5.guided_attention_loss)(attentions, None, steps)
    alone = speecht5.guided_attention_loss(attentions[:1], None, steps[:1])
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[1])


@pytest.mark.slow
def test_a_voice_learns():
    model = build("ForTextToSpeech", hidden_dropout=0.1, decoder_layerdrop=0.1, speech_decoder_postnet_dropout=0.1)
    before = np.asarray(model.speech_decoder_postnet.layers[0].batch_norm.mean[...])
    labels = spectrogram_target()
    values, trained = learns(
        model, lambda m, key: [m(IDS, IDS != 1, speaker_embeddings=WHO, labels=labels, key=key).loss], steps=16
    )
    assert np.mean(values[-3:]) < 0.8 * values[0]
    assert np.abs(trained.speech_decoder_postnet.layers[0].batch_norm.mean[...] - before).max() > 1e-3


@pytest.mark.slow
def test_pre_training_learns_from_both():
    """One step of speech and one of text at a time, as their batches alternate."""
    model = build("ForPreTraining", mask_time_prob=0.5)
    waves = np.stack([wave(3200, 0), wave(3200, 1)])
    labels, units = spectrogram_target(), np.random.default_rng(0).integers(0, 7, (2, 10))
    rng = np.random.default_rng(0)
    whole = [0, *rng.integers(4, 79, 12).tolist(), 2]
    masked = speecht5.text_infilling(whole, 79, rng)
    spans = np.zeros((2, 10), bool)
    spans[:, 2:6] = True

    def both(m, key):
        speech, text = jax.random.split(key)
        heard = m.speech(waves, None, units, labels, speaker_embeddings=WHO, mask_time_indices=spans, key=speech)
        read = m.text(np.array([masked]), None, np.array([whole]), key=text)
        return heard.loss + read.loss, heard

    values, _, heard = learns(model, both, steps=12)
    assert np.mean(values[-3:]) < 0.9 * values[0]
    assert heard.logits.shape == (2, 10, 7)
    total = heard.mlm_loss + heard.reconstruction_loss + 0.1 * heard.diversity_loss + 10 * heard.features_pen
    np.testing.assert_allclose(heard.loss, total, rtol=1e-5)
    # By hand: cosines over the hidden frames, in units of the temperature.
    chosen = jax.nn.log_softmax(heard.logits, axis=-1)
    rows = [(b, t) for b in range(2) for t in range(2, 6)]
    by_hand = -np.mean([chosen[b, t, units[b, t]] for b, t in rows])
    np.testing.assert_allclose(heard.mlm_loss, by_hand, rtol=1e-5)
    with pytest.raises(UsageError, match="hidden frames"):
        model.speech(waves, None, units, labels)
    with pytest.raises(UsageError, match="needs labels"):
        model.text(IDS)


def test_codes_in_place_of_states():
    model = build("ForPreTraining")
    states = jnp.asarray(np.random.default_rng(0).standard_normal((2, 30, 24)), jnp.float32)
    mixed, diversity = model.mix(states, key=jax.random.key(0))
    changed = np.abs(mixed - states).max(axis=(0, 2)) > 0
    assert changed.sum() == 3  # a tenth of the steps, the same ones for all items
    assert 0 <= diversity < 1
    chosen = jnp.arange(30) < 4
    mixed, _ = model.mix(states, chosen)
    codes, _, _ = model.quantizer(states)
    np.testing.assert_allclose(mixed[:, :4], codes[:, :4], rtol=1e-6)
    np.testing.assert_array_equal(mixed[:, 4:], states[:, 4:])
    # The entries of both codebooks, nothing else.
    books = np.asarray(model.quantizer.codevectors[...]).reshape(2, 5, 12)
    nearest = np.abs(np.asarray(codes).reshape(-1, 2, 1, 12) - books).max(-1).min(-1)
    assert nearest.max() < 1e-6


def test_masked_text():
    rng = np.random.default_rng(0)
    lengths, masks = [], []
    for _ in range(60):
        text = [0, *range(10, 60), 2]
        masked = speecht5.text_infilling(text, 5, rng)
        assert (masked[0], masked[-1]) == (0, 2)
        kept = [token for token in masked if token != 5]
        assert kept == [token for token in text if token in kept]  # in order, nothing twice
        lengths.append(len(text) - len(kept))
        masks.append(masked.count(5))
    assert 10 < np.mean(lengths) <= 15  # up to 30 % of 50, less where spans meet
    assert 2 < np.mean(masks) < 8
    assert speecht5.text_infilling([0, 2], 5, rng) == [0, 2]


@pytest.mark.slow
def test_a_recogniser_learns_by_both_losses():
    model = build("ForSpeechToText", mask_time_prob=0.0)
    labels = np.array([[5, 9, 9, 2], [7, 2, -100, -100]])
    waves = np.stack([wave(5000, 0), wave(5000, 1)])
    mask = np.ones((2, 5000), np.int32)
    mask[1, 4000:] = 0
    out = jax.jit(lambda m: m(waves, mask, labels=labels))(model)
    plain = jax.jit(lambda m: m(waves, mask, labels=labels).loss)(model.without_ctc())
    # CTC by hand: of the letters alone, without their end, over the frames that count.
    alignments = []
    for row, (letters, frames) in enumerate((([5, 9, 9], 16), ([7], 13))):
        log_probs = np.asarray(jax.nn.log_softmax(out.ctc_logits[row], axis=-1), np.float64)[:frames]
        alignments.append(-ctc_by_hand(log_probs, letters, blank=80))
    np.testing.assert_allclose(out.loss, 0.5 * plain + 0.5 * sum(alignments) / 6, rtol=1e-4)
    values, _ = learns(model, lambda m, key: [m(waves, mask, labels=labels, key=key).loss], steps=8)
    assert values[-1] < 0.9 * values[0]


def ctc_by_hand(log_probs, labels, blank):
    """ln of the sum over all paths, by the forward recursion written out."""
    extended = [blank]
    for label in labels:
        extended += [label, blank]
    alpha = np.full(len(extended), -np.inf)
    alpha[0], alpha[1] = log_probs[0, blank], log_probs[0, extended[1]]
    for frame in log_probs[1:]:
        new = np.full_like(alpha, -np.inf)
        for s, label in enumerate(extended):
            terms = [alpha[s]] + ([alpha[s - 1]] if s else [])
            if s > 1 and label != blank and label != extended[s - 2]:
                terms.append(alpha[s - 2])
            new[s] = np.logaddexp.reduce(terms) + frame[label]
        alpha = new
    return np.logaddexp(alpha[-1], alpha[-2])


# --- joint decoding --------------------------------------------------------------------------------------------------


def test_probabilities_of_prefixes():
    """Against the sum over every path of five frames over four labels."""
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(4), (2, 5)))
    blank, end, lengths = 3, 2, (5, 4)
    scorer = PrefixScorer(jnp.asarray(log_probs), jnp.asarray(lengths), 0.3, 1, blank, end)

    def brute(row, prefix):
        """Probability of the label sequences that begin so, and of exactly this one."""
        begins = exactly = 0.0
        for path in itertools.product(range(4), repeat=lengths[row]):
            said = [k for k, _ in itertools.groupby(path)]
            said = [k for k in said if k != blank]
            p = np.exp(sum(log_probs[row, t, k] for t, k in enumerate(path)))
            begins += p * (said[: len(prefix)] == list(prefix))
            exactly += p * (said == list(prefix))
        return begins, exactly

    for prefix in ((), (0,), (0, 1), (1, 1), (0, 0, 1)):
        labels = np.full((2, 6), 9 % 4)
        labels[:, : len(prefix)] = prefix
        whole, following = scorer.prefix(jnp.asarray(labels), jnp.asarray(len(prefix)))
        for row in range(2):
            begins, exactly = brute(row, prefix)
            np.testing.assert_allclose(np.exp(whole[row]), begins, rtol=1e-4)
            np.testing.assert_allclose(np.exp(following[row, end]), exactly, rtol=1e-4)
            for token in (0, 1):
                np.testing.assert_allclose(np.exp(following[row, token]), brute(row, (*prefix, token))[0], rtol=1e-4)
    beams = np.array([[0, 1, 9, 9], [1, 1, 9, 9]] * 2)  # two of each recording
    whole, following = scorer.prefix(jnp.asarray(beams), jnp.asarray(2))
    for i, prefix in enumerate(beams[:, :2].tolist()):
        np.testing.assert_allclose(np.exp(whole[i]), brute(i // 2, prefix)[0], rtol=1e-4)
        np.testing.assert_allclose(np.exp(following[i, 0]), brute(i // 2, (*prefix, 0))[0], rtol=1e-4)
    heard = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((2, 4))))
    tokens = jnp.asarray([[2, 0, 1, 9], [2, 1, 1, 9]])
    mixed = scorer(heard, tokens, jnp.asarray(3))
    whole, following = scorer.prefix(tokens[:, 1:], jnp.asarray(2))
    wanted = 0.7 * heard + 0.3 * (following - whole[:, None])
    np.testing.assert_allclose(mixed[:, :3], wanted[:, :3], rtol=1e-5)
    assert np.isneginf(mixed[:, blank]).all()
    alone = dataclasses.replace(scorer, weight=1.0)(heard.at[:, 0].set(-jnp.inf), tokens, jnp.asarray(3))
    np.testing.assert_allclose(alone[:, 1:3], (following - whole[:, None])[:, 1:3], rtol=1e-5)
    assert np.isneginf(alone[:, 0]).all(), "what the search forbids stays forbidden"


def test_joint_decoding():
    model = build("ForSpeechToText")
    # A CTC head that is sure: frames of silence, then one label.
    model.ctc_proj.kernel[...] = jnp.zeros_like(model.ctc_proj.kernel[...])
    model.ctc_proj.bias[...] = jnp.full((81,), -20.0).at[80].set(0.0).at[33].set(-1.0)
    x, mask = wave(4000)[None], np.ones((1, 4000), np.int32)
    plain = model.generate(x, mask, max_new_tokens=6)
    joint = model.generate(x, mask, max_new_tokens=6, num_beams=3, ctc_weight=0.9)
    assert joint[0, 1] == 33 != plain[0, 1]
    assert 80 not in joint
    for weight, sentence in ((1.5, "between 0 and 1"), (0.5, "no CTC head")):
        with pytest.raises(UsageError, match=sentence):
            (model if weight > 1 else model.without_ctc()).generate(x, ctc_weight=weight)


@pytest.mark.slow
def test_a_language_model_has_a_say():
    """The sum over a text of what the three say of each token, each asked anew about the whole text so far.

    The language model has neither `<mask>` nor `<ctc_blank>`, and what it does not have is not written.
    """
    model = build("ForSpeechToText")
    sizes = SpeechT5LanguageModelConfig(d_model=12, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    author = random_model(lambda rngs: SpeechT5LanguageModel(sizes, rngs=rngs), seed=1)
    waves, mask = np.stack([wave(4000, 0), wave(4000, 1)]), np.ones((2, 4000), np.int32)
    mask[1, 3000:] = 0
    fusion, w, new = LanguageModelFusion(author, 0.4), 0.3, 5

    @jax.jit
    def scores(tokens, length, weight=fusion.weight):
        said = model(waves, mask, tokens)
        frames = model.speecht5.encoder.mask(jnp.asarray(mask), said.ctc_logits.shape[1]).sum(axis=-1)
        scorer = PrefixScorer(jax.nn.log_softmax(said.ctc_logits), frames, w, 1, 80, 2)
        whole, following = scorer.prefix(tokens[:, 1:], length - 1)
        attention, liked = (jax.nn.log_softmax(x.logits)[:, length - 1] for x in (said, author(tokens)))
        total = (1 - w) * attention + w * (following - whole[:, None])
        return total.at[:, :79].add(weight * liked).at[:, 79:].set(-jnp.inf)

    options = {"ctc_weight": w, "max_new_tokens": new, "min_new_tokens": new}
    beams = {"num_beams": 3, "return_dict_in_generate": True}
    found = model.generate(waves, mask, fusion=fusion, **options, **beams)
    texts, both, alone = np.asarray(found.sequences), np.zeros(2), np.zeros(2)
    for length in range(1, 1 + new):
        chosen = np.arange(2), texts[:, length]
        both += np.asarray(scores(texts, length))[chosen]
        alone += np.asarray(scores(texts, length, 0.0))[chosen]
    np.testing.assert_allclose(found.sum_log_probs, both, rtol=1e-4)
    assert (np.abs(both - alone) > 1).all()
    # The beam is wide enough to hold what taking the best each time leads to, or something better.
    tokens, best = np.full((2, 1 + new), 2, np.int32), np.zeros(2)
    for length in range(1, 1 + new):
        found = np.array(scores(tokens, length))
        found[:, 2] = -np.inf  # no end before its time
        tokens[:, length], best = found.argmax(axis=-1), best + found.max(axis=-1)
    assert (both >= best - 1e-4).all()
    for wrong, weight in ((LanguageModelFusion(author, -1.0), w), (fusion, 1.0)):
        with pytest.raises(UsageError, match="A language model needs"):
            model.generate(waves, mask, fusion=wrong, ctc_weight=weight)


# --- the other heads -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_identification_and_enhancement():
    waves = np.stack([wave(3000, 0), np.sin(np.arange(3000) / 7).astype(np.float32)])
    teller = build("ForSequenceClassification", id2label=("ann", "bob", "cy"), mask_time_prob=0.0)
    values, _ = learns(teller, lambda m, key: [m(waves, labels=np.array([0, 2]), key=key).loss], steps=10, rate=3e-4)
    # The first step leaves the point where the decoder, all its biases being 0, sees a vector of zeros.
    assert values[-1] < 0.8 * values[1]
    cleaner = build("ForSpeechEnhancement", reduction_factor=1)
    noisy, clean = spectrogram_target(), spectrogram_target() * 0.5
    noisy = np.where(noisy == -100, 0, noisy)
    kinds = ("target", "masking", "delta")
    run = jax.jit(lambda m: [m.enhance(waves, noisy, predict=how, labels=clean) for how in kinds])
    target, factor, excess = run(cleaner)
    np.testing.assert_allclose(factor.spectrogram, jax.nn.sigmoid(target.spectrogram) * noisy, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(excess.spectrogram, target.spectrogram - noisy, rtol=1e-4, atol=1e-5)
    assert target.loss != factor.loss != excess.loss
    with pytest.raises(UsageError, match="reduction_factor of 1"):
        build("ForSpeechEnhancement").enhance(waves, noisy)


def test_shapes_are_what_the_annotations_say(monkeypatch):
    checked = enforce(monkeypatch, speecht5)
    assert {"SpeechT5Speaking.forward", "SpeechT5Model.__call__", "SpeechT5ForPreTraining.speech"} <= set(checked)
    ids, who, labels = jnp.asarray(IDS), jnp.asarray(WHO), jnp.asarray(spectrogram_target())
    waves, mask, tokens = jnp.zeros((2, 4000)), jnp.ones((2, 4000), jnp.int32), jnp.asarray([[5, 9, 2], [7, 2, -100]])
    key, wanted = jax.random.key(0), {"speaker_embeddings": who, "labels": labels}

    def of(head, call, **changes):
        return jax.eval_shape(call, build(head, **changes))

    spoken = of("ForTextToSpeech", lambda m: m(ids, (ids != 1).astype(jnp.int32), key=key, **wanted))
    assert (spoken.loss.shape, spoken.spectrogram.shape) == ((), (2, 12, 8))
    assert of("ForSpeechToSpeech", lambda m: m(waves, mask, key=key, **wanted)).spectrogram.shape == (2, 12, 8)
    written = of("ForSpeechToText", lambda m: m(waves, mask, labels=tokens, key=key))
    assert (written.logits.shape, written.ctc_logits.shape) == ((2, 3, 81), (2, 13, 81))
    told = of("ForSequenceClassification", lambda m: m(waves, mask, jnp.asarray([0, 1]), key=key))
    assert told.logits.shape == (2, 2)
    units = {"labels": jnp.zeros((2, 12), jnp.int32), "spectrogram": labels, "key": key}
    assert of("ForPreTraining", lambda m: m.speech(waves, mask, **units), mask_time_prob=0.5).logits.shape == (2, 13, 7)
    assert of("ForPreTraining", lambda m: m.text(ids, None, ids, key=key)).logits.shape == (2, 5, 81)
    with pytest.raises(Exception, match="speaker_embeddings"):
        of("ForTextToSpeech", lambda m: m(ids, speaker_embeddings=who[:1], labels=labels))


def test_bfloat16_and_jit(voice):
    labels = spectrogram_target()[:, :4]
    half = nnx.merge(*nnx.split(build("ForTextToSpeech")))
    low = speecht5.SpeechT5ForTextToSpeech(half.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    call = jax.jit(lambda m: m(IDS, IDS != 1, labels[:, ::2], speaker_embeddings=WHO).spectrogram)
    wanted, found = call(half), call(low)
    assert found.dtype == jnp.bfloat16
    allowed = tolerance("output", "bfloat16")
    np.testing.assert_allclose(
        np.asarray(found, np.float32), wanted, rtol=allowed.rtol, atol=allowed.atol * float(jnp.abs(wanted).max())
    )
    nets = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (low.speech_decoder_postnet, vocoder()))
    frames, lengths = jnp.zeros((1, 4, 8), jnp.bfloat16), jnp.asarray([4])
    assert jax.eval_shape(lambda: speecht5._finish(*nnx.split(nets), frames, lengths)).dtype == jnp.float32
    one = jax.vmap(lambda ids, who: half(ids[None], None, labels[:1, ::2], speaker_embeddings=who[None]).spectrogram)
    many = jax.jit(one)(jnp.asarray(IDS), jnp.asarray(WHO))
    alone = jax.jit(lambda ids, who: one(ids, who))(jnp.asarray(IDS[1:]), jnp.asarray(WHO[1:]))
    np.testing.assert_allclose(many[1], alone[0], rtol=1e-4, atol=1e-5)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_get_a_sentence(voice):
    for arguments, options, sentence in (
        ((IDS,), {}, "speaker_embeddings must be given"),
        ((IDS, None, WHO[:, :5]), {}, r"\(2, 6\)"),
        ((IDS[0], None, WHO), {}, "shape"),
        ((IDS[:, :0], None, WHO), {}, "at least one"),
        ((IDS + 80, None, WHO), {}, "from 0 to 80"),
        ((IDS, None, WHO), {"threshold": 0.0}, "above 0"),
        ((IDS, None, WHO), {"maxlenratio": -1.0}, "above 0"),
        ((IDS, None, WHO), {"maxlenratio": np.inf}, "above 0"),
        ((IDS, None, WHO), {"prenet_masks": np.ones((2, 3, 12), bool)}, "for 3 steps"),
    ):
        with pytest.raises(UsageError, match=sentence):
            voice.generate(*arguments, **options)
    with pytest.raises(UsageError, match="decoder_input_values or labels"):
        voice(IDS)
    recogniser = build("ForSpeechToText")
    with pytest.raises(UsageError, match="decoder_input_ids or labels"):
        recogniser(wave()[None])
    with pytest.raises(UsageError, match="too few"):
        recogniser(wave(20)[None], decoder_input_ids=np.array([[2]]))
    with pytest.raises(UsageError, match="its input"):
        recogniser(decoder_input_ids=np.array([[2]]))
    with pytest.raises(CheckpointError, match="the same ones"):
        SpeechT5Config(conv_dim=(1, 2))


def test_the_processor(tmp_path):
    with pytest.raises(SourceError, match="no file"):
        SpeechT5Tokenizer(tmp_path / "nothing.model")
    processor = SpeechT5Processor(SpeechT5FeatureExtractor(), SpeechT5Tokenizer(train_characters(tmp_path / "c")))
    processor.save(tmp_path / "saved")
    processor = SpeechT5Processor.from_directory(tmp_path / "saved")
    said = processor.sentences("The  fox has 2 dogs. It jumps!\n\n… ok?")
    assert [line for line, _ in said][:2] == ["The fox has 2 dogs.", "It jumps!"]
    assert processor.decode(said[0][1], True).endswith("has two dogs.")
    long = processor.sentences(", ".join(["jump over the dog"] * 40) + " fox" * 100)
    assert all(len(line) <= 300 for line, _ in long)
    assert len(long) > 3
    assert " ".join(line for line, _ in long) == ", ".join(["jump over the dog"] * 40) + " fox" * 100
    assert [len(line) for line, _ in processor.sentences("a" * 700)] == [300, 300, 100]
    for call, error, sentence in (
        (lambda: processor.sentences(" \n"), UsageError, "nothing to say"),
        (lambda: processor(), UsageError, "nothing to process"),
        (lambda: processor(wave(), text="a", sampling_rate=16_000), UsageError, "not both"),
        (lambda: processor(text="a", text_target="b", audio_target=wave()), UsageError, "not both"),
        (lambda: processor(text=[]), UsageError, "a string"),
        (lambda: processor(text="a", return_tensors="pt"), UsageError, "NumPy"),
        (lambda: processor(wave(0), sampling_rate=16_000), AudioError, "empty"),
        (lambda: processor(wave(100), sampling_rate=16_000), AudioError, "too short"),
        (lambda: processor(wave(), sampling_rate=8_000), AudioError, "16000|16,000"),
        (lambda: processor(audio_target=wave() * np.nan, sampling_rate=16_000), AudioError, "finite|NaN|nan"),
        (lambda: processor(np.zeros((4000, 2), np.float32), sampling_rate=16_000), AudioError, "channel"),
        (lambda: processor(np.zeros(4000, np.int16), sampling_rate=16_000), AudioError, "int"),
        (lambda: SpeechT5Processor(SpeechT5FeatureExtractor())(text="a"), SourceError, "spm_char"),
    ):
        with pytest.raises(error, match=sentence):
            call()
    assert spell_numbers("9" * 40) == "9" * 40
