"""MusicGen against `transformers` in float64: states, losses, gradients, codes; files of both projects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.musicgen import modeling_musicgen
from transformers.models.musicgen_melody import modeling_musicgen_melody
from transformers.models.t5 import modeling_t5

import audiozoo
from audiozoo.models import musicgen
from tests.parity import harness
from weights_conversion.musicgen import MELODY, WHOLE, config_from_hugging_face, hugging_face_table

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
        return torch.from_numpy(np.array(musicgen.positions(0, length, width, jnp.float64)))

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


@pytest.mark.parametrize("melody", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
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
        harness.Replaced(musicgen, "positions", lambda start, length, width, dtype: jnp.zeros((length, width), dtype)),
    ]
    assert harness.assert_detects(check, mutations) == 4
