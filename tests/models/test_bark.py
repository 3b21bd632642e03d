"""Bark without PyTorch: loops against no loops, training, long texts, histories, the command line."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import audiozoo
from audiozoo import cli
from audiozoo.audio.files import read
from audiozoo.commands import speech
from audiozoo.errors import UsageError
from audiozoo.models import bark
from audiozoo.processors.bark import BarkProcessor, load_voice_preset, save_voice_preset
from tests.models.random_model import random_model
from tests.models.tiny_bark import CONFIG, GENERATION
from tests.shapes import enforce
from weights_conversion.bark import config_from_hugging_face, generation_from_hugging_face

IDS = np.array([[3, 5, 7, 9, 11, 13, 15, 17], [2, 4, 6, 8, 10, 12, 14, 16]])
SHORT: dict[str, int] = {"max_coarse_input_length": 8, "max_coarse_history": 12, "sliding_window_len": 6}
LETTERS = {letter: i for i, letter in enumerate(["[PAD]", "[UNK]", *"abcdefghij."])}


@pytest.fixture(scope="module")
def model() -> bark.BarkModel:
    config = config_from_hugging_face(CONFIG)
    made = random_model(lambda rngs: bark.BarkModel(config, rngs=rngs))
    made.generation_config = generation_from_hugging_face(GENERATION)
    return made


def processor() -> BarkProcessor:
    made = BarkProcessor.from_vocabulary(LETTERS)
    made.max_length = 8
    return made


def test_the_annotations_hold(monkeypatch, model):
    assert enforce(monkeypatch, bark)
    out = jax.eval_shape(lambda: model.semantic(jnp.asarray(IDS), output_attentions=True, output_hidden_states=True))
    assert out.logits.shape == (2, 8, 48)
    assert len(out.hidden_states) == 3
    codes = jnp.zeros((2, 9, 8), jnp.int32)
    assert jax.eval_shape(lambda: model.fine_acoustics(2, codes)).logits.shape == (2, 9, 20)


def test_one_token_at_a_time(model):
    """The cached loop gives the tokens of whole forwards."""
    stage, ids = model.semantic, model.generation_config.semantic_config
    tokens = stage.generate(IDS, max_new_tokens=6, min_new_tokens=6)
    text, none = jnp.asarray(IDS + 48), jnp.full((1, 8), 40)
    allowed = jnp.arange(48) < 40

    @jax.jit
    def whole(stage, tokens):
        x = jnp.concatenate([stage.prompt(text, none, ids), stage.input_embeds_layer(tokens[:, :-1])], axis=1)
        return jnp.where(allowed, stage(inputs_embeds=x).logits[:, 8:], -jnp.inf).argmax(axis=-1)

    np.testing.assert_array_equal(whole(stage, jnp.asarray(tokens)), tokens)


@pytest.mark.slow
def test_a_row_is_what_it_is_alone_and_a_history_goes_on(model, tmp_path):
    """Drawn, with a key: a batch's first row has the tokens, and the sound, that it has by itself."""
    options = {"sampling": "original", "key": jax.random.key(1), "semantic_max_new_tokens": 12, "min_eos_p": None}
    waveform, samples, said = model.generate(IDS, None, True, return_history=True, **options)
    alone, _, again = model.generate(IDS[:1], None, True, return_history=True, **options)
    np.testing.assert_array_equal(said[0]["fine_prompt"], again[0]["fine_prompt"])
    np.testing.assert_allclose(waveform[0, : samples[0]], alone[0, : samples[0]], atol=1e-6)
    assert waveform.shape[1] == samples.max()
    assert (samples % 4 == 0).all()
    save_voice_preset(tmp_path / "voice.npz", said[0])
    np.testing.assert_equal(load_voice_preset(tmp_path / "voice.npz"), said[0])
    onward = model.generate(IDS[:1], said[0], **options)
    assert onward.shape != alone.shape or (onward != alone).any()


def test_rows_are_decoded_together(model, monkeypatch):
    """In one program for many lengths; but apart where one is so short that the start would mirror what is behind."""
    shapes = []

    def decode(graphdef, state, codes):
        shapes.append(codes.shape)
        return np.ones((len(codes), 1, 4 * codes.shape[2]))

    monkeypatch.setattr(bark, "_decode", decode)
    for lengths, wanted in (([16, 30], [(2, 8, 64)]), ([6, 30], [(1, 8, 6), (1, 8, 30)]), ([0, 7], [(1, 8, 7)])):
        shapes.clear()
        waveform, samples = model.codec_decode(np.zeros((2, 8, 30), int), lengths)
        assert shapes == wanted
        assert samples.tolist() == waveform.sum(axis=1).tolist() == [4 * n for n in lengths]


def test_options_of_one_stage(model):
    options = {"temperature": 0.7, "do_sample": True, "max_length": 30, "coarse_temperature": 0.3, "fine_top_k": 4}
    split = bark._by_stage(options)
    assert split["semantic_"] == {"temperature": 0.7, "do_sample": True, "max_length": 30}
    assert split["coarse_"] == {"temperature": 0.3, "do_sample": True}
    assert split["fine_"] == {"temperature": 0.7, "top_k": 4}
    tokens = np.arange(40)[None] % 16 + 40 + 16 * (np.arange(40) % 2)
    greedy = model.fine_acoustics.generate(tokens, codebook_size=16)
    sure = model.fine_acoustics.generate(tokens, codebook_size=16, do_sample=True, top_k=1, key=jax.random.key(0))
    np.testing.assert_array_equal(sure, greedy)
    drawn = model.fine_acoustics.generate(tokens, codebook_size=16, temperature=2.0, key=jax.random.key(0))
    assert (drawn != greedy).any()


def test_mistakes_get_a_sentence(model):
    call = model.semantic.generate
    for options, message in (
        ({"temprature": 1}, "temprature"),
        ({"sampling": "loud"}, "no sampling 'loud'"),
        ({"max_new_tokens": 100}, "positions for 40 semantic tokens"),
        ({"min_eos_p": -1.0}, "min_eos_p must be above 0"),
        ({"sampling": "original"}, "needs a key"),
        ({"attention_mask": np.ones((1, 8), int)}, r"attention_mask has shape \(1, 8\); \(2, 8\) is expected"),
        ({"history_prompt": {}}, "no semantic_prompt"),
        ({"history_prompt": {"semantic_prompt": np.array([99])}}, "from 0 to 39"),
        ({"history_prompt": {"semantic_prompt": np.zeros((1, 2), int)}}, r"\(time,\) is expected"),
    ):
        with pytest.raises(UsageError, match=message):
            call(IDS, **options)
    for stage, shape, message in (
        (call, (1, 0), "at least one"),
        (model.semantic_to_waveform, (9,), r"semantic_output has shape \(9,\); \(batch, tokens\) is expected"),
        (model.fine_acoustics.generate, (8,), "coarse_output has shape"),
        (model.codec_decode, (8, 9), "fine_output has shape"),
    ):
        with pytest.raises(UsageError, match=message):
            stage(np.zeros(shape, int))
    with pytest.raises(UsageError, match="lacks"):
        call(IDS + 100)
    names = ("semantic_generation_config", "coarse_generation_config")
    ids = model.generation_config
    for stage, given, options, message in (
        (model.semantic, IDS, {names[0]: dataclasses.replace(ids.semantic_config, semantic_infer_token=100)}, "id 100"),
        (model.semantic, IDS, {names[0]: dataclasses.replace(ids.semantic_config, eos_token_id=48)}, "id 48 is none"),
        (model.coarse_acoustics, [[1]], {names[1]: bark.BarkCoarseGenerationConfig(**SHORT)}, "id 12048 is none"),
        (model.coarse_acoustics, [[1]], {"codebook_size": 21}, "id 81 is none"),
        (model.fine_acoustics, [[41, 41]], {"codebook_size": 20}, "id 20 is none"),
    ):
        with pytest.raises(UsageError, match=message):
            stage.generate(np.asarray(given), **options)
    for stage, options, message in (
        (model.coarse_acoustics, {"max_new_tokens": 4}, "takes no length"),
        (model.coarse_acoustics, {"max_length": 400}, "takes no length"),
        (model.fine_acoustics, {"num_beams": 2, "temperature": 0.7}, "and not num_beams"),
        (model.fine_acoustics, {"suppress_tokens": [1], "min_new_tokens": 3}, "not min_new_tokens, suppress_tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            stage.generate(np.full((1, 4), 41), codebook_size=16, key=jax.random.key(0), **options)
    with pytest.raises(UsageError, match="says a text once"):
        next(bark.speak(model, processor(), "abc.", semantic_num_return_sequences=2, do_sample=True))
    with pytest.raises(UsageError, match="codebooks 1 to 7, not 0"):
        model.fine_acoustics(0, jnp.zeros((1, 4, 8), jnp.int32))
    with pytest.raises(UsageError, match="not both"):
        model.semantic()
    odd = bark.BarkCoarseGenerationConfig(sliding_window_len=5)
    with pytest.raises(UsageError, match="must be even"):
        model.coarse_acoustics.generate(np.ones((1, 3), int), None, odd)
    silent = model.semantic_to_waveform(np.full((1, 3), 40))
    assert silent[0].shape == (1, 0)


def learns(model, loss) -> np.ndarray:
    graphdef, params = nnx.split(model, nnx.Param)
    optimiser = optax.adam(1e-2)

    @jax.jit
    def steps(params, state):
        def body(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p)))(params)
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, state), length=60)[1]

    return np.asarray(steps(params, optimiser.init(params)))


def test_what_every_stage_reads_and_is_asked():
    """Each token after all before it; padding is read as what stands for nothing, and not asked for."""
    rng, seen = np.random.default_rng(0), []
    ids = generation_from_hugging_face(GENERATION)

    def network(*given, inputs_embeds=None, key=None):
        tokens = given[-1] if inputs_embeds is None else inputs_embeds[..., 0]
        seen.append(np.asarray(tokens))
        return SimpleNamespace(logits=logits[:, : tokens.shape[1]])

    network.generation_config, network.input_embeds_layer = ids, lambda tokens: tokens[..., None]
    network.prompt = lambda text, history, _: jnp.concatenate([text, history], axis=1)[..., None]
    logits = jnp.asarray(rng.standard_normal((1, 9, 90)), jnp.float32)

    def loss(rows, targets):
        return -np.mean([jax.nn.log_softmax(logits[0, row])[target] for row, target in zip(rows, targets, strict=True)])

    found = bark.semantic_loss(network, jnp.asarray([[7, 8]]), jnp.asarray([[5, 6, 40, -100, -100]]))
    np.testing.assert_array_equal(seen.pop(), [[7, 8, 40, 40, 5, 6, 40, 40]])
    assert float(found) == pytest.approx(loss([3, 4, 5], [5, 6, 40]), rel=1e-5)
    found = bark.coarse_loss(network, jnp.asarray([[7, 8, 9]]), jnp.asarray([[41, -100, 42, 60]]))
    np.testing.assert_array_equal(seen.pop(), [[7, 8, 9, 74, 41, 72, 42]])
    assert float(found) == pytest.approx(loss([3, 5, 6], [41, 42, 60]), rel=1e-5)
    codes = rng.integers(0, 16, (1, 4, 3))
    found = bark.fine_loss(network, jnp.asarray(codes), 1, jnp.asarray([1]), jnp.asarray([3]))
    shown = codes.copy()
    shown[:, 1:, 1:] = shown[:, 3] = 16  # the first frame is known, and the last padding
    np.testing.assert_array_equal(seen.pop(), shown)
    assert float(found) == pytest.approx(loss([1, 2], codes[0, 1:3, 1]), rel=1e-5)
    bark.fine_loss(network, jnp.asarray(codes), 2)
    np.testing.assert_array_equal(seen.pop()[..., :2], codes[..., :2])


@pytest.mark.slow
def test_every_stage_learns(model):
    """Our reconstruction of the three losses, on one example each."""
    rng = np.random.default_rng(0)
    spoken = jnp.asarray(np.concatenate([rng.integers(0, 40, (2, 6)), [[40], [40]]], axis=1))
    losses = learns(model.semantic, lambda m: bark.semantic_loss(m, jnp.asarray(IDS + 48), spoken))
    assert losses[-1] < 0.5 * losses[0]
    coarse = jnp.asarray(40 + rng.integers(0, 16, (2, 12)) + 16 * (np.arange(12) % 2))
    losses = learns(model.coarse_acoustics, lambda m: bark.coarse_loss(m, jnp.asarray(IDS), coarse))
    assert losses[-1] < 0.5 * losses[0]
    codes = jnp.asarray(rng.integers(0, 16, (2, 10, 8)))
    losses = learns(model.fine_acoustics, lambda m: bark.fine_loss(m, codes, 4))
    assert losses[-1] < 0.7 * losses[0]
    drawn = {bark.draw_codebook(rng, model.generation_config) for _ in range(100)}
    assert drawn == set(range(2, 8))


@pytest.mark.parametrize("tied", [True, False])
def test_one_program_is_for_every_codebook(model, tied):
    """Compiled by `audiozoo.jit`, which traces numbers; a number of NumPy's is one, too."""
    config = dataclasses.replace(model.fine_acoustics.config, tie_word_embeddings=tied)
    fine = random_model(lambda rngs: bark.BarkFineModel(config, rngs=rngs))
    codes = np.random.default_rng(0).integers(0, config.output_vocab_size, (2, 5, config.n_codes_total))
    run = audiozoo.jit(fine)
    for book in range(config.n_codes_given, config.n_codes_total):
        logits = run(book, codes).logits
        np.testing.assert_allclose(logits, fine(np.int64(book), jnp.asarray(codes)).logits, rtol=1e-4, atol=1e-5)
    assert run.compiled._cache_size() == 1


def test_half_precision_stays_near():
    config = config_from_hugging_face(CONFIG).fine_acoustics_config
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (1, 9, 8)))
    whole, half = (
        random_model(lambda rngs, d=dtype: bark.BarkFineModel(config, dtype=d, rngs=rngs))(3, codes).logits
        for dtype in (None, jnp.bfloat16)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_long_texts(model):
    said = list(bark.speak(model, processor(), "abc. dej. abcdefghij abcdefghij.", semantic_max_new_tokens=8))
    assert [s.text for s in said][:2] == ["abc.", "dej."]
    assert not any(s.complete for s in said)  # eight tokens each, and no end among them
    (brief,) = bark.speak(model, processor(), "abc.", semantic_max_new_tokens=8, semantic_min_eos_p=1e-9)
    assert brief.complete
    assert not brief.waveform.size
    assert all(s.waveform.size == s.history["fine_prompt"].shape[1] * 4 for s in said)
    ids = model.generation_config
    long = {"semantic_prompt": np.arange(30), "coarse_prompt": np.zeros((2, 45)), "fine_prompt": np.zeros((8, 45))}
    both = bark.joined(long, said[0].history, ids)
    assert both["semantic_prompt"].size == 8
    assert both["fine_prompt"].shape == (8, 12)
    np.testing.assert_array_equal(both["fine_prompt"][:, -1], said[0].history["fine_prompt"][:, -1])


@pytest.mark.slow
def test_speak(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speech, "keep_compiled_programs", lambda: None)
    audiozoo.export(model, tmp_path / "model")
    processor().save(tmp_path / "model")
    given = {
        "semantic_prompt": np.arange(9),
        "coarse_prompt": np.ones((2, 13), int),
        "fine_prompt": np.ones((8, 13), int),
    }
    save_voice_preset(tmp_path / "me.npz", given)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["audiozoo", "speak", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    call = ("abc. dej.", "--model", tmp_path / "model", "-o", tmp_path / "out.wav")
    hot = ("--temperature", 2.5, "--min-eos-p", 0.9, "--save-voice", tmp_path / "new.npz", "--seed", 3)
    code, shown = run(*call, "--voice-preset", tmp_path / "me.npz", "--subtitles", tmp_path / "out.srt", *hot)
    assert code == 0, shown.err
    assert read(tmp_path / "out.wav").size
    voice = load_voice_preset(tmp_path / "new.npz")
    assert voice["coarse_prompt"].shape[1] == voice["fine_prompt"].shape[1] > 0
    assert "dej." in (tmp_path / "out.srt").read_text()
    for options, message in (
        (("--speed", 2), "--speed is for VITS"),
        (("--voice-preset", "nobody"), "no voice preset"),
        (("--temperature", 0), "--temperature must be above 0"),
        (("--temperature", "nan"), "--temperature must be above 0"),
        (("--save-voice", tmp_path / "new.wav"), "writes an .npz file"),
        (("--output", tmp_path / "x.xyz"), "no format 'xyz'"),
    ):
        code, shown = run(*call, *options)
        assert code == 1
        assert message in " ".join(shown.err.split())
