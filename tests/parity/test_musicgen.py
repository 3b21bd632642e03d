"""MusicGen against `transformers` in float64: states, losses, gradients, codes; files of both projects."""

from __future__ import annotations

import dataclasses
import importlib
import io
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from flax import nnx
from transformers.generation import logits_process
from transformers.models.musicgen import modeling_musicgen
from transformers.models.musicgen_melody import modeling_musicgen_melody
from transformers.models.t5 import modeling_t5
from typer.testing import CliRunner

import audiozoo
from audiozoo import cli
from audiozoo.errors import CheckpointError
from audiozoo.layers import abstract
from audiozoo.layers.positions import cosines_and_sines
from audiozoo.models import musicgen
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor, MusicgenProcessor
from audiozoo.text.t5_tokenizer import T5Tokenizer
from tests.parity import generation, harness
from weights_conversion import encodec as codec_conversion
from weights_conversion.musicgen import (
    MELODY,
    WHOLE,
    config_from_hugging_face,
    generation_from_hugging_face,
    hugging_face,
    hugging_face_table,
)

TEXT = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "relu",
}
AUDIO = {
    "sampling_rate": 800,
    "target_bandwidths": [1.0],
    "num_filters": 2,
    "hidden_size": 6,
    "upsampling_ratios": [4, 2],
    "num_lstm_layers": 1,
    "codebook_size": 32,
    "codebook_dim": 6,
    "use_causal_conv": False,
    "use_conv_shortcut": False,
    "kernel_size": 3,
    "last_kernel_size": 3,
}
LM = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "num_codebooks": 4,
    "pad_token_id": 32,
    "bos_token_id": 32,
    "decoder_start_token_id": 32,
    "max_position_embeddings": 64,
}
AUDIO["target_bandwidths"] = [2.0]  # 100 frames a second, 5 bits: 4 codebooks


@pytest.fixture(scope="module", autouse=True)
def _everything_in_double_precision():
    """The originals compute their positions, and T5 its mean square, in float32 even in a float64 model."""

    def table(length: int, width: int) -> torch.Tensor:
        return torch.from_numpy(np.array(cosines_and_sines(jnp.arange(length), width, dtype=jnp.float64)))

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((modeling_musicgen, "Musicgen"), (modeling_musicgen_melody, "MusicgenMelody")):
            cls = getattr(module, f"{name}SinusoidalPositionalEmbedding")
            patch.setattr(cls, "get_embedding", staticmethod(table))
        patch.setattr(modeling_t5.T5LayerNorm, "forward", norm)
        yield


def their_config(melody: bool = False, **changes):
    kind = transformers.MusicgenMelodyConfig if melody else transformers.MusicgenConfig
    return kind(
        text_encoder={"model_type": "t5", **TEXT},
        audio_encoder={"model_type": "encodec", **AUDIO},
        decoder=LM | changes,
        **({"num_chroma": 5, "chroma_length": 7} if melody else {}),
    )


def make(melody: bool = False, seed: int = 0, **changes):
    """Theirs with random values, ours with the same, and the table between them."""
    theirs = their_config(melody, **changes)
    kind = (
        transformers.MusicgenMelodyForConditionalGeneration if melody else transformers.MusicgenForConditionalGeneration
    )
    theirs._attn_implementation = "eager"
    for part in (theirs.decoder, theirs.text_encoder):
        part._attn_implementation = "eager"
    reference = harness.randomise(kind(theirs), seed)
    for module in reference.modules():
        if hasattr(module, "make_weights"):
            module.make_weights(module.num_positions, module.embedding_dim)
    name = MELODY if melody else WHOLE
    config = config_from_hugging_face(theirs.to_dict())
    table = hugging_face_table(config, name)
    model = harness.ported(
        reference, lambda: getattr(musicgen, name)(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), table
    )
    for settings in (reference.generation_config, reference.decoder.generation_config):
        settings.update(
            pad_token_id=32,
            bos_token_id=32,
            decoder_start_token_id=32,
            max_length=20,
            do_sample=False,
            guidance_scale=None,
        )
    model.generation_config = musicgen.MusicgenGenerationConfig(max_length=20, do_sample=False, guidance_scale=1.0)
    return reference, model, table


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def melodic():
    return make(melody=True)


def texts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((2, 5), np.int64)
    mask[1, 3:] = 0
    return {"input_ids": rng.integers(2, 40, (2, 5)), "attention_mask": mask}


def codes(batch: int = 2, steps: int = 6, books: int = 4) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 32, (batch * books, steps))


def chroma(frames: int = 3) -> np.ndarray:
    return np.eye(5)[np.random.default_rng(2).integers(0, 5, (2, frames))]


def torched(x):
    return {name: torch.tensor(array) for name, array in x.items()}


def jaxed(x):
    return {name: jnp.asarray(array) for name, array in x.items()}


EVERYTHING = {"output_attentions": True, "output_hidden_states": True}


def test_every_tap_and_output(plain):
    reference, model, table = plain
    mask = np.ones((2, 6), np.int64)
    mask[0, 4] = 0
    x = texts() | {"decoder_input_ids": codes(), "decoder_attention_mask": mask}
    taps = harness.compare_taps(
        reference,
        lambda: reference(**torched(x), **EVERYTHING),
        model,
        lambda: model(**jaxed(x), **EVERYTHING),
        table,
        minimum=35,
    )
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert {"output.cross_attentions[1]", "output.decoder_hidden_states[2]", "output.encoder_attentions[0]"} <= set(
        compared
    )


def test_every_tap_and_output_of_melody(melodic):
    reference, model, table = melodic
    x = texts() | {"decoder_input_ids": codes(), "input_features": chroma()}
    taps = harness.compare_taps(
        reference,
        lambda: reference(**torched(x), **EVERYTHING),
        model,
        lambda: model(**jaxed(x), **EVERYTHING),
        table,
        minimum=25,
    )
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert {"output.hidden_states[2]", "output.attentions[1]", "output.encoder_hidden_states"} <= set(compared)


# --- losses and gradients --------------------------------------------------------------------------------------------


def test_loss_and_every_gradient(plain):
    reference, model, table = plain
    labels = np.random.default_rng(3).integers(0, 33, (2, 6, 4))
    labels[1, 4:] = -100
    x = texts()
    compared = harness.compare_gradients(
        reference,
        lambda: reference(**torched(x), labels=torch.tensor(labels)).loss,
        model,
        jax.jit(lambda m: m(**jaxed(x), labels=jnp.asarray(labels)).loss),
        table,
    )
    assert {"decoder.model.embed_tokens.embedding", "decoder.lm_heads.kernel", "enc_to_dec_proj.bias"} <= set(compared)


def test_loss_and_gradients_of_melody(melodic):
    reference, model, table = melodic
    labels = np.random.default_rng(3).integers(0, 32, (2, 6, 4))
    x = texts() | {"input_features": chroma()}
    compared = harness.compare_gradients(
        reference,
        lambda: reference(**torched(x), labels=torch.tensor(labels)).loss,
        model,
        jax.jit(lambda m: m(**jaxed(x), labels=jnp.asarray(labels)).loss),
        table,
    )
    assert "audio_enc_to_dec_proj.kernel" in compared


def test_training_lays_codes_out_which_the_original_does_not(plain):
    """§3.1: our loss is theirs on labels that someone has delayed and cut; on plain codes theirs has no pattern."""
    reference, model, _ = plain
    plain_codes = np.random.default_rng(4).integers(0, 32, (2, 4, 9))
    x = texts()
    pattern = model.config.pattern_for(9)
    laid = pattern.interleave(plain_codes, 32)  # steps 0 to 12; the last three hold no code of the first codebook
    labels = torch.tensor(laid[..., 1:10]).transpose(1, 2)
    with torch.no_grad():
        delayed = reference(**torched(x), labels=labels).loss
        undelayed = reference(**torched(x), labels=torch.tensor(plain_codes).transpose(1, 2)).loss
    given, side_by_side = jnp.asarray(plain_codes), musicgen.Pattern.parallel(9, 4)
    loss, each = jax.jit(lambda m: m.training_loss(given, **jaxed(x)))(model)
    parallel = jax.jit(lambda m: m.decoder.predict(given, m.condition(**jaxed(x)), pattern=side_by_side))(model)
    harness.assert_close(loss, delayed, name="loss")
    harness.assert_close(each.mean(), delayed, name="mean over codebooks")
    harness.assert_close(
        musicgen.codebook_loss(parallel.logits, jnp.asarray(plain_codes)).mean(), undelayed, name="no pattern"
    )
    assert abs(float(delayed) - float(undelayed)) > 1e-3


def test_padding_in_training_is_neither_seen_nor_counted(plain):
    reference, model, _ = plain
    both = np.random.default_rng(5).integers(0, 32, (2, 4, 9))
    mask = np.ones((2, 4, 9), bool)
    mask[1, :, 6:] = False
    x = texts()
    with torch.no_grad():
        hidden = np.where(mask, both, 32)
        labels = torch.tensor(model.config.pattern_for(9).interleave(hidden, 32)[..., 1:10]).transpose(1, 2)
        theirs = reference(**torched(x), labels=labels).loss
    run = jax.jit(lambda m, c: m.training_loss(c, code_mask=jnp.asarray(mask), **jaxed(x))[0])
    harness.assert_close(run(model, jnp.asarray(both)), theirs, name="loss")
    other = np.where(mask, both, (both + 1) % 32)
    assert float(run(model, jnp.asarray(other))) == float(run(model, jnp.asarray(both)))


# --- masks -----------------------------------------------------------------------------------------------------------


def test_both_ways_to_treat_padded_text(plain):
    """transformers hides padding; the authors' decoder sees zeros there. A lone text is the same either way."""
    reference, model, _ = plain
    x, ids = texts(), codes()
    with torch.no_grad():
        states = reference.enc_to_dec_proj(reference.text_encoder(**torched(x)).last_hidden_state)
        states = states * torch.tensor(x["attention_mask"])[..., None]
        seen = reference.decoder(torch.tensor(ids), encoder_hidden_states=states).logits
        hidden = reference(**torched(x), decoder_input_ids=torch.tensor(ids)).logits
    run = audiozoo.jit(model)
    ours = run(**jaxed(x), decoder_input_ids=jnp.asarray(ids), mask_text=False).logits
    harness.assert_close(ours, seen, name="zeros are seen")
    harness.assert_close(run(**jaxed(x), decoder_input_ids=jnp.asarray(ids)).logits, hidden, name="padding is hidden")
    harness.assert_close(ours[:4], hidden[:4], name="the text without padding")
    assert float(jnp.abs(ours[4:] - hidden[4:].numpy()).max()) > 1e-3


def test_dropped_conditions_are_the_null_condition(plain, melodic):
    """Text zeros; melody the first pitch class throughout."""
    for _, model, _ in (plain, melodic):
        x = jaxed(texts()) | ({"input_features": jnp.asarray(chroma())} if model is melodic[1] else {})

        def conditions(m, rate, x=x):
            given = m.condition(**x)
            return given, m.null_condition(given), m._training_condition(jax.random.key(0), rate, 2, **x)

        run = jax.jit(conditions)
        given, null, dropped = run(model, 1.0)
        np.testing.assert_array_equal(dropped.states, null.states)
        np.testing.assert_array_equal(run(model, 0.0)[2].states, given.states)
        if model is melodic[1]:
            first = model.audio_enc_to_dec_proj.kernel[0] + model.audio_enc_to_dec_proj.bias
            harness.assert_close(null.states[:, :7], np.broadcast_to(np.asarray(first), (2, 7, 16)), name="no melody")
            null = musicgen.Condition(null.states[:, 7:])
        assert not np.asarray(null.states).any()


# --- generation ------------------------------------------------------------------------------------------------------


def their_music(reference, **options):
    """Their waveform, and the codes that their codec was given."""
    found, decode = [], reference.audio_encoder.decode

    def watched(audio_codes, *arguments, **keywords):
        found.append(audio_codes[0].numpy())
        return decode(audio_codes, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.audio_encoder, "decode", watched)
        output = reference.generate(**options)
    if len(found) == 2:  # left and right
        found = [np.stack(found, axis=2).reshape(len(found[0]), -1, found[0].shape[-1])]
    return output, found[0]


def compare_music(reference, model, inputs, **options):
    theirs, their_codes = their_music(reference, **torched(inputs), **options)
    ours = model.generate(**jaxed(inputs), return_dict_in_generate=True, **options)
    np.testing.assert_array_equal(ours.audio_codes, their_codes)
    harness.assert_close(ours.sequences, theirs, name="waveform")
    return ours


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_codes_and_music_are_equal(plain, guidance):
    reference, model, _ = plain
    ours = compare_music(reference, model, texts(), guidance_scale=guidance, max_new_tokens=14)
    # Of N steps K - 1 complete no frame; `frames` is exact, and begins with the same codes.
    assert ours.audio_codes.shape == (2, 4, 11)
    exact = model.generate(
        **jaxed(texts()), guidance_scale=guidance, frames=14, two_step_cfg=True, return_dict_in_generate=True
    )
    assert exact.audio_codes.shape == (2, 4, 14)
    np.testing.assert_array_equal(exact.audio_codes[..., :11], ours.audio_codes)
    assert len(np.unique(ours.audio_codes)) > 8


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": [3, 9, 17, 25]},
        {"begin_suppress_tokens": [11]},
        {"bad_words_ids": [[27], [22, 19]], "sequence_bias": [[[4], 1.0]]},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_generate(plain, options):
    reference, model, _ = plain
    without = their_music(reference, **torched(texts()), max_new_tokens=10)[1]
    with generation.biases_in_single():
        ours = compare_music(reference, model, texts(), max_new_tokens=10, **options)
    assert (ours.audio_codes != without).any()
    # Likewise where the checkpoint asks for them, and a longer search than the caller.
    file = vars(model.generation_config) | options | {"max_new_tokens": 30}
    plainly, model.generation_config = model.generation_config, generation_from_hugging_face(file, "a file")
    found = model.generate(**jaxed(texts()), max_length=11, return_dict_in_generate=True)
    model.generation_config = plainly
    np.testing.assert_array_equal(found.audio_codes, ours.audio_codes)


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1.5), ("no_repeat_ngram_size", 2)])
def test_repetitions_are_those_of_the_music(plain, name, value, monkeypatch):
    """The original also counts the codes that it found before a codebook's delay was over, which never sound."""
    reference, model, _ = plain
    options = {name: value, "max_new_tokens": 10}
    with_silent_codes = their_music(reference, **torched(texts()), **options)[1]
    kind = {
        "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": logits_process.NoRepeatNGramLogitsProcessor,
    }[name]
    process = kind.__call__

    def of_the_music(self, input_ids, scores):
        rows = [(input_ids[i : i + 1, i % 4 + 1 :], scores[i : i + 1]) for i in range(len(input_ids))]
        return torch.cat([process(self, heard, row) if heard.shape[1] else row for heard, row in rows])

    monkeypatch.setattr(kind, "__call__", of_the_music)
    ours = compare_music(reference, model, texts(), **options)
    assert (ours.audio_codes != with_silent_codes).any()


def test_a_few_steps_have_the_pattern_too_and_guidance_chooses_nothing_forbidden(plain):
    """The original has no delays where fewer than 2K - 2 new steps are wanted, and forbids before it guides."""
    reference, model, _ = plain
    options = {"guidance_scale": 2.5, "suppress_tokens": [3, 9, 17, 25]}

    def both(steps):
        ours = model.generate(**jaxed(texts()), max_new_tokens=steps, return_dict_in_generate=True, **options)
        return their_music(reference, **torched(texts()), max_new_tokens=steps, **options)[1], ours.audio_codes

    for steps, frames in ((5, 5), (6, 3)):
        theirs, ours = both(steps)
        assert (theirs.shape[2], ours.shape[2]) == (frames, steps - 3)
        assert np.isin(theirs, options["suppress_tokens"]).any()
        assert not np.isin(ours, options["suppress_tokens"]).any()


def test_several_versions_keep_their_streams(plain):
    """The original repeats streams, not items, of which it then takes four of two codebooks for an item."""
    reference, model, _ = plain
    drawn = {"max_new_tokens": 10, "num_return_sequences": 2, "do_sample": True, "top_k": 1}
    once = model.generate(**jaxed(texts()), max_new_tokens=10, return_dict_in_generate=True).audio_codes
    twice = model.generate(**jaxed(texts()), key=jax.random.key(0), return_dict_in_generate=True, **drawn).audio_codes
    np.testing.assert_array_equal(twice, np.repeat(once, 2, axis=0))
    theirs = their_music(reference, **torched(texts()), **drawn)[1]
    assert (theirs.shape, once.shape) == ((2, 4, 14), (2, 4, 7))
    assert (theirs[..., :7] != once).any()


def test_music_to_continue(plain):
    reference, model, _ = plain
    rng = np.random.default_rng(7)
    x = texts() | {"input_values": rng.standard_normal((2, 1, 36)), "padding_mask": np.ones((2, 36), np.int64)}
    with torch.no_grad():
        known = reference.audio_encoder.encode(torch.tensor(x["input_values"]), torch.ones(2, 36)).audio_codes[0]
    ours = compare_music(reference, model, x, guidance_scale=3.0, max_new_tokens=10)
    np.testing.assert_array_equal(ours.audio_codes[..., : known.shape[2]], known)
    assert ours.audio_codes.shape[2] == known.shape[2] + 10 - 3
    with torch.no_grad():
        theirs = reference(**torched(x)).logits
    harness.assert_close(audiozoo.jit(model)(**jaxed(x)).logits, theirs, name="logits of a waveform")


def test_music_without_a_text(plain):
    reference, model, _ = plain
    given = reference.get_unconditional_inputs(num_samples=2)
    theirs, their_codes = their_music(reference, **given, max_new_tokens=9)
    ours = model.generate(**model.get_unconditional_inputs(2), max_new_tokens=9, return_dict_in_generate=True)
    np.testing.assert_array_equal(ours.audio_codes, their_codes)
    harness.assert_close(ours.sequences, theirs, name="waveform")


@pytest.mark.parametrize(("melody", "guidance"), [(True, 1.0), (True, 2.5), (False, 2.5)])
def test_music_along_a_melody(melodic, melody, guidance):
    reference, model, _ = melodic
    x = texts() | ({"input_features": chroma(9)} if melody else {})
    compare_music(reference, model, x, guidance_scale=guidance, max_new_tokens=9)


def test_stereo():
    reference, model, _ = make(num_codebooks=8, audio_channels=2)
    rng = np.random.default_rng(8)
    x = texts() | {"input_values": rng.standard_normal((2, 2, 24))}
    ours = compare_music(reference, model, x, guidance_scale=2.0, max_new_tokens=9)
    assert ours.sequences.shape[:2] == (2, 2)
    assert model.config.stream_delays == (0, 0, 1, 1, 2, 2, 3, 3)
    mono = np.asarray(model.audio_to_codes(jnp.asarray(x["input_values"][:, :1])))
    np.testing.assert_array_equal(mono[:, ::2], mono[:, 1::2])


def test_sampling_sees_the_same_distribution(plain):
    """Their draws, forced upon ours by noise: the processed scores of every step are the same."""
    reference, model, _ = plain
    options = {"guidance_scale": 3.0, "max_new_tokens": 10, "do_sample": True}
    options |= {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    theirs, their_codes = their_music(reference, **torched(texts()), **options)
    pattern = model.config.pattern_for(7)
    laid = pattern.interleave(their_codes, 32).reshape(8, -1)
    noise = np.zeros((10, 8, 33))
    for step, row in np.ndindex(10, 8):
        noise[step, row, laid[row, step + 1]] = 1e6
    ours = model.generate(**jaxed(texts()), noise=jnp.asarray(noise), **options)
    np.testing.assert_array_equal(ours.audio_codes, their_codes)
    free = laid[:, 1:] != 32
    assert ours.scores.shape == (10, 8, 32)
    for step in range(10):
        harness.assert_close(ours.scores[step][free[:, step]], theirs.scores[step].numpy()[free[:, step]])


def test_the_cached_loop_gives_what_no_cache_gives(plain):
    """Each code of a greedy run is the most probable one given the whole sequence before it."""
    _, model, _ = plain
    found = model.generate(**jaxed(texts()), guidance_scale=1.0, frames=9, return_dict_in_generate=True).audio_codes
    predicted = jax.jit(lambda m: m.decoder.predict(jnp.asarray(found), m.condition(**jaxed(texts()))))(model)
    best = np.asarray(predicted.logits.argmax(axis=-1))
    there = np.broadcast_to(np.asarray(predicted.mask), best.shape)
    np.testing.assert_array_equal(best[there], found[there])
    assert there.sum() == 2 * (4 * 9 - 6)


def test_delays_are_the_originals(plain):
    """Theirs fills a prompt into a mask; where nothing is known it has -1."""
    reference, model, _ = plain
    for known in (0, 1, 5):
        prompt = np.random.default_rng(known).integers(0, 32, (4, known))
        ids = torch.tensor(np.concatenate([np.full((4, 1), 32), prompt], axis=1))
        first, mask = reference.decoder.build_delay_pattern_mask(ids, 32, max_length=12)
        pattern = model.config.pattern_for(12 - 1 - 3)
        ours = np.concatenate([prompt, np.full((4, 8 - known), -1)], axis=1)
        ours = pattern.interleave(ours, 32)
        np.testing.assert_array_equal(ours, mask)
        np.testing.assert_array_equal(ours[:, : first.shape[1]], first)


def test_mutations_are_noticed(plain):
    reference, model, _ = plain
    x = texts() | {"decoder_input_ids": codes()}
    with torch.no_grad():
        theirs = reference(**torched(x)).logits

    def check():
        harness.assert_close(jax.jit(lambda m: m(**jaxed(x)).logits)(model), theirs)

    mutations = [
        *harness.perturbations(
            model, count=2, exclude=r"(audio_encoder|text_encoder|decoder\.model\.embed_tokens)\..*"
        ),
        harness.dropped(model, "enc_to_dec_proj.bias"),
        harness.Replaced(
            musicgen, "cosines_and_sines", lambda times, width, dtype: jnp.zeros((len(times), width), dtype)
        ),
    ]
    assert harness.assert_detects(check, mutations) == 4


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("melody", [False, True], ids=["text", "melody"])
def test_directories_there_and_back(tmp_path, melody):
    with harness.precision("float32"):
        reference, _, _ = make(melody)
        reference.generation_config.update(do_sample=True, guidance_scale=2.0, max_length=30, min_p=0.05)
        reference.save_pretrained(tmp_path / "theirs")
        model = audiozoo.load(tmp_path / "theirs")
        assert type(model).__name__ == (MELODY if melody else WHOLE)
        settings = musicgen.MusicgenGenerationConfig(max_length=30, guidance_scale=2.0, others=(("min_p", 0.05),))
        assert model.generation_config == settings
        x = texts() | {"decoder_input_ids": codes()}
        with torch.no_grad():
            theirs = reference(**torched(x)).logits
        harness.assert_close(audiozoo.jit(model)(**jaxed(x)).logits, theirs, name="logits")
        audiozoo.export(model, tmp_path / "ours")
        back, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in reference.state_dict().items():
            if tensor.is_floating_point() and "inited" not in name:
                assert torch.equal(tensor, back.state_dict()[name]), name
        for part in ("decoder", "audio_encoder", "text_encoder"):
            for key, value in getattr(reference.config, part).to_dict().items():
                if key in LM | AUDIO | TEXT and key != "max_position_embeddings":  # of a table that grows
                    assert getattr(getattr(back.config, part), key) == value, (part, key)
        assert (back.generation_config.guidance_scale, back.generation_config.min_p) == (2.0, 0.05)
        audiozoo.save(model, tmp_path / "native")
        native = audiozoo.load(tmp_path / "native")
        assert (native.config, native.generation_config) == (model.config, settings)


def test_older_names_and_a_decoder_alone(tmp_path):
    """Files of transformers 4: the table of positions, weight norm spelt g and v, both copies of the embedding."""
    with harness.precision("float32"):
        reference, _, _ = make()
        reference.save_pretrained(tmp_path / "today")
        state = reference.state_dict()
        old = {
            n.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): t.clone()
            for n, t in state.items()
        }
        old["decoder.model.decoder.embed_positions.weights"] = torch.zeros(64, 16)
        (tmp_path / "old").mkdir()
        torch.save(old, tmp_path / "old" / "pytorch_model.bin")
        (tmp_path / "old" / "config.json").write_bytes((tmp_path / "today" / "config.json").read_bytes())
        one, other = (harness.parameters(audiozoo.load(tmp_path / name)) for name in ("today", "old"))
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
        reference.decoder.save_pretrained(tmp_path / "decoder")
        decoder = audiozoo.load(tmp_path / "decoder")
        assert type(decoder).__name__ == "MusicgenForCausalLM"
        np.testing.assert_array_equal(decoder.lm_heads.kernel[...], one["decoder.lm_heads.kernel"])


def authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A decoder and its projections as AudioCraft spells them: queries, keys and values fused."""
    plain = {
        r"decoder\.model\.decoder\.embed_tokens\.": "emb.",
        r"decoder\.lm_heads\.": "linears.",
        r"decoder\.model\.decoder\.layer_norm\.": "out_norm.",
        r"decoder\.model\.decoder\.layers\.": "transformer.layers.",
        r"\.encoder_attn_layer_norm\.": ".norm_cross.",
        r"\.encoder_attn\.": ".cross_attention.",
        r"\.self_attn_layer_norm\.": ".norm1.",
        r"\.final_layer_norm\.": ".norm2.",
        r"\.fc1\.": ".linear1.",
        r"\.fc2\.": ".linear2.",
        r"^audio_enc_to_dec_proj\.": "condition_provider.conditioners.self_wav.output_proj.",
        r"^enc_to_dec_proj\.": "condition_provider.conditioners.description.output_proj.",
    }
    named = {}
    for name, tensor in state.items():
        if not name.startswith(("text_encoder", "audio_encoder")):
            for pattern, word in plain.items():
                name = re.sub(pattern, word, name)
            named[name] = tensor.clone()
    for name in [n for n in named if n.endswith("q_proj.weight")]:
        parts = [named.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        named[name.replace("q_proj.weight", "in_proj_weight")] = torch.cat(parts)
    named["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.zeros(8)
    return named


XP = """
sample_rate: 800
lm_model: transformer_lm
transformer_lm: {dim: 16, num_heads: 2, num_layers: 2, hidden_scale: 1.5, n_q: 4, card: 32, dropout: 0.0,
  activation: gelu, norm_first: true, positional_embedding: sin, bias_proj: false}
codebooks_pattern:
  modeling: delay
  delay: {delays: [0, 1, 2, 3], flatten_first: 0, empty_initial: 0}
classifier_free_guidance: {training_dropout: 0.3, inference_coef: 3.0}
interleave_stereo_codebooks: {use: false, per_timestep: false}
fuser: {cross_attention_pos_emb: false, sum: [], prepend: [self_wav, description], cross: [], input_interpolate: []}
conditioners: {self_wav: {model: chroma_stem, chroma_stem: {n_chroma: 5, radix2_exp: 14}}}
dataset: {segment_duration: 31}  # of which 4096 samples make a frame: 7 frames
"""


def test_the_authors_files(melodic, tmp_path, tokenizer_directory):
    """With the codec in a file; `test_musicgen_authors` has one that is named, and a model that follows no melody."""
    reference, model, _ = melodic
    torch.save({"best_state": authors_names(reference.state_dict()), "xp.cfg": XP}, tmp_path / "state_dict.bin")
    reference.text_encoder.save_pretrained(tmp_path / "t5-base")
    table = codec_conversion.original_table(model.config.audio_encoder)
    arrays = dict(table.write(harness.parameters(model.audio_encoder)))
    seanet = AUDIO | {"norm": "weight_norm", "pad_mode": "reflect"}
    lines = {
        "dimension": 6, "n_filters": 2, "n_residual_layers": 1, "ratios": [4, 2], "norm": "weight_norm",
        "kernel_size": 3, "last_kernel_size": 3, "residual_kernel_size": 3, "dilation_base": 2, "causal": False,
        "pad_mode": seanet["pad_mode"], "compress": 2, "lstm": 1, "true_skip": True,
    }  # fmt: skip
    config = {"sample_rate": 800, "channels": 1, "seanet": lines, "rvq": {"bins": 32, "n_q": 4}}
    whole = {"best_state": {n: torch.tensor(np.array(a)) for n, a in arrays.items()}, "xp.cfg": repr(config)}
    whole["xp.cfg"] = whole["xp.cfg"].replace("'", '"').replace("True", "true").replace("False", "false")
    torch.save(whole, tmp_path / "compression_state_dict.bin")
    for source in (tmp_path, tmp_path / "state_dict.bin"):
        loaded = audiozoo.load(source, param_dtype=jnp.float64)
        ours, expected = harness.parameters(loaded), harness.parameters(model)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert type(loaded).__name__ == MELODY
    assert not loaded.config.mask_text
    assert loaded.config.stream_delays == (0, 1, 2, 3)
    assert loaded.generation_config == musicgen.MusicgenGenerationConfig()
    x = texts() | {"decoder_input_ids": codes()}
    ours = audiozoo.jit(loaded)(**jaxed(x)).logits
    theirs = audiozoo.jit(model)(**jaxed(x)).logits
    np.testing.assert_array_equal(ours, theirs)
    # What is converted brings the tokenizer that lies with T5, and says so if there is none.
    convert = ["convert", str(tmp_path / "state_dict.bin"), str(tmp_path / "out"), "--overwrite"]
    done = CliRunner().invoke(cli.app, convert)
    assert (done.exit_code, "reads no texts until one is put there" in " ".join(done.stderr.split())) == (0, True)
    for file in tokenizer_directory.iterdir():
        shutil.copy(file, tmp_path / "t5-base")
    done = CliRunner().invoke(cli.app, convert)
    assert (done.exit_code, "no tokenizer" in done.stderr) == (0, False), done.stderr
    processor = audiozoo.load_processor(tmp_path / "out")
    for other in (audiozoo.load_processor(tmp_path), audiozoo.load_processor(tmp_path / "state_dict.bin")):
        assert vars(other.feature_extractor) == vars(processor.feature_extractor)
    assert processor.feature_extractor.sampling_rate == 800
    assert type(processor).__name__ == "MusicgenMelodyProcessor"
    assert audiozoo.load(tmp_path / "out").config.segment_duration == 31.0
    odd = XP.replace("flatten_first: 0", "flatten_first: 2")
    torch.save({"best_state": authors_names(reference.state_dict()), "xp.cfg": odd}, tmp_path / "state_dict.bin")
    with pytest.raises(CheckpointError, match=r"pattern delay with .*flatten_first"):
        audiozoo.load(tmp_path)
    expected = T5Tokenizer.from_directory(tokenizer_directory)("a slow song")["input_ids"]
    np.testing.assert_array_equal(processor.tokenizer("a slow song")["input_ids"], expected)


SIZES = [
    ("small", WHOLE, 589), ("medium", WHOLE, 2007), ("large", WHOLE, 3426),
    ("medium", MELODY, 1554), ("large", MELODY, 2620), ("stereo_small", WHOLE, 606), ("stereo_medium", WHOLE, 2033),
    ("stereo_medium", MELODY, 1579), ("stereo_large", WHOLE, 3459), ("stereo_large", MELODY, 2654),
    ("audiogen_medium", WHOLE, 2233),
]  # fmt: skip


@pytest.mark.parametrize(("size", "name", "millions"), SIZES, ids=[f"{s} {n[8:14]}" for s, n, _ in SIZES])
def test_published_sizes(size, name, millions):
    with harness.precision("float32"):
        config = getattr(musicgen.MusicgenConfig, size)()
        cls = getattr(musicgen, name)
        sizes = {"config": config, "generation_config": musicgen.MusicgenGenerationConfig()}
        written = hugging_face(type(name, (), sizes)()).files["config.json"]  # all that it looks at
        codec = dataclasses.replace(config.audio_encoder, codebook_dim=config.audio_encoder.hidden_size)
        assert config_from_hugging_face(written) == dataclasses.replace(config, audio_encoder=codec)
        kind = transformers.MusicgenMelodyConfig if name == MELODY else transformers.MusicgenConfig
        theirs = kind.from_dict(dict(written))
        count = harness.assert_same_shapes(
            lambda: getattr(transformers, name)(theirs),
            lambda: cls(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, name),
        )
        assert round(count / 1e6) == millions


# --- processor -------------------------------------------------------------------------------------------------------

WORDS = "a slow folk song with guitar and fiddle, 120 bpm; bright drums! an old waltz for two violins and a cello."


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("t5"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split() * 4), model_writer=model, vocab_size=60, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def test_processor_is_the_originals(tokenizer_directory, tmp_path):
    tokenizer = transformers.T5Tokenizer.from_pretrained(tokenizer_directory)
    extractor = transformers.EncodecFeatureExtractor(feature_size=1, sampling_rate=800, padding_side="left")
    theirs = transformers.MusicgenProcessor(extractor, tokenizer)
    theirs.save_pretrained(tmp_path)
    ours = MusicgenProcessor.from_directory(tmp_path)
    assert ours.feature_extractor.padding_side == "left"
    rng = np.random.default_rng(0)
    audio = [rng.uniform(-1, 1, 90).astype(np.float32), rng.uniform(-1, 1, 60).astype(np.float32)]
    text = [
        "a slow  folk song",
        "fiddle<extra_id_3> and <extra_id_100>Drums\t",  # there are a hundred sentinels
    ]
    one = theirs(text=text, audio=audio, sampling_rate=800, padding=True, return_tensors="np")
    other = ours(text=text, audio=audio, sampling_rate=800)
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(other[name], one[name], err_msg=name)
    values = rng.uniform(-1, 1, (2, 1, 120)).astype(np.float32)
    for mine, its in zip(
        ours.batch_decode(values, other["padding_mask"]),
        theirs.batch_decode(values, padding_mask=one["padding_mask"]),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)
    # Theirs takes tokens for waveforms; its tokenizer does not.
    expected = tokenizer.batch_decode(one["input_ids"], skip_special_tokens=True)
    assert ours.batch_decode(other["input_ids"]) == expected
    # The sentencepiece model by itself.
    alone = MusicgenProcessor.from_directory(tokenizer_directory)
    np.testing.assert_array_equal(alone(text=text)["input_ids"], one["input_ids"])
    ours.save(tmp_path / "again")
    np.testing.assert_array_equal(
        MusicgenProcessor.from_directory(tmp_path / "again")(text=text)["input_ids"], one["input_ids"]
    )


def test_melodies_are_the_originals(recordings):
    """Theirs needs torchaudio, which is not here; its power spectrogram is torch.stft over the norm of the window."""
    module = importlib.import_module("transformers.models.musicgen_melody.feature_extraction_musicgen_melody")
    theirs = object.__new__(module.MusicgenMelodyFeatureExtractor)
    window = torch.hann_window(16384, dtype=torch.float32)

    def spectrogram(x):
        found = torch.stft(x, 16384, 4096, window=window, center=True, pad_mode="reflect", return_complex=True)
        return (found / window.pow(2).sum().sqrt()).abs().pow(2)

    theirs.n_fft, theirs.spectrogram = 16384, spectrogram
    theirs.chroma_filters = torch.from_numpy(
        transformers.audio_utils.chroma_filter_bank(
            sampling_rate=32000, num_frequency_bins=16384, tuning=0, num_chroma=12
        )
    ).float()
    ours = MusicgenMelodyFeatureExtractor()
    song = audiozoo.audio.read(recordings / "hungarian_dance_5.ogg", 32_000)[: 12 * 32_000]
    for part in (song, song[:9000], song[:32_000], np.zeros(20_000, np.float32)):
        expected = theirs._torch_extract_fbank_features(torch.from_numpy(part)[None]).numpy()
        found = ours(part, 32_000)["input_features"]
        np.testing.assert_array_equal(found, expected)
    assert len(np.unique(ours(song, 32_000)["input_features"].argmax(-1))) > 6
    both = ours([song[:40_000], song[:30_000]], 32_000, return_attention_mask=True)
    assert both["input_features"].shape == (2, 10, 12)
    assert both["attention_mask"].sum(axis=1).tolist() == [10, 8]
    stems = np.stack([np.zeros_like(song), np.zeros_like(song), 0.25 * song, 0.75 * song])[None, :, None]
    np.testing.assert_array_equal(ours(stems, 32_000)["input_features"], ours(song, 32_000)["input_features"])
    stereo = ours([np.stack([1.5 * song, 0.5 * song])], 32_000)
    np.testing.assert_array_equal(stereo["input_features"], ours(song, 32_000)["input_features"])


def test_full_size_in_float32():
    """musicgen-small's decoder, 420 M parameters."""
    with harness.precision("float32"):
        theirs = transformers.MusicgenDecoderConfig()
        theirs._attn_implementation = "sdpa"
        with torch.device("meta"):  # drawing weights that are overwritten takes time
            reference = transformers.MusicgenForCausalLM(theirs)
        reference = harness.randomise(reference.to_empty(device="cpu"), 0, torch.float32)
        reference.model.decoder.embed_positions.make_weights(2048, 1024)
        config = musicgen.MusicgenConfig.small()
        model = harness.ported(
            reference,
            lambda: musicgen.MusicgenForCausalLM(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, "MusicgenForCausalLM"),
        )
        rng = np.random.default_rng(0)
        ids, states = rng.integers(0, 2049, (4, 20)), rng.standard_normal((1, 7, 1024)).astype(np.float32)
        with torch.no_grad():
            expected = reference(torch.tensor(ids), encoder_hidden_states=torch.tensor(states)).logits
        ours = audiozoo.jit(model)(jnp.asarray(ids), encoder_hidden_states=jnp.asarray(states)).logits
        harness.assert_close(ours, expected, name="logits")


def test_bfloat16_stays_close(plain):
    _, model, _ = plain
    half = abstract(
        lambda rngs: musicgen.MusicgenForConditionalGeneration(
            model.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
        )
    )
    values = harness.parameters(model)
    flat = [
        (p, v.replace(jnp.asarray(values[".".join(map(str, p))], v.dtype)))
        for p, v in nnx.to_flat_state(nnx.state(half))
    ]
    half = nnx.merge(nnx.graphdef(half), nnx.from_flat_state(flat))
    x = jaxed(texts() | {"decoder_input_ids": codes()})
    ours = audiozoo.jit(half)(**x).logits
    assert ours.dtype == jnp.bfloat16
    harness.assert_close(ours, np.asarray(audiozoo.jit(model)(**x).logits, np.float32), name="bfloat16 logits")


def test_dropouts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXT, "dropout_rate", 0.25)
        reference, model, _ = make(**harness.rates(transformers.MusicgenDecoderConfig()))
    harness.compare_in_training(reference, model, texts() | {"decoder_input_ids": codes()})
