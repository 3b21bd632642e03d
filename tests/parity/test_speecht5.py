"""SpeechT5 against `transformers`: each task's taps, outputs and gradients, generation, files and published sizes."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from audiozoo.models import speecht5
from audiozoo.models.hifigan import SpeechT5HifiGan
from tests.parity import harness
from tests.parity.speech_family import NO_DROPOUT, TINY, Family, blank, padded, reference_in_double
from weights_conversion import hifigan as vocoders
from weights_conversion import speecht5 as conversion

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEPT = ("vocab_size", "hidden_size", "conv_dim", "conv_kernel", "conv_stride", "num_conv_pos_embeddings")
SMALL = {k: TINY[k] for k in KEPT} | {k: v for k, v in NO_DROPOUT.items() if k not in ("layerdrop", "final_dropout")}
SMALL |= {
    "num_conv_pos_embedding_groups": 3,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 32,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "positional_dropout": 0.0,
    "encoder_max_relative_position": 5,
    "num_mel_bins": 6,
    "speech_decoder_prenet_units": 10,
    "speech_decoder_postnet_units": 7,
    "speech_decoder_postnet_layers": 3,
    "speaker_embedding_dim": 5,
    "max_speech_positions": 60,
    "max_text_positions": 30,
}
FAMILY = Family("SpeechT5", "SpeechT5Config", speecht5, conversion, SMALL)
EVERYTHING = {"output_attentions": True, "output_hidden_states": True}
NO_PAIRS = {r".*embed_positions(\.pe_k)?": "a key for every pair of time steps there, one for every distance here"}
STEPS = 4


def exact_positions(reference):
    """The original computes its tables of positions in float32; here they are exact."""
    for module in reference.modules():
        if type(module).__name__ == "SpeechT5SinusoidalPositionalEmbedding":
            rows, width = module.weights.shape
            table = speecht5.padded_sinusoids(rows - 2, width, 1)
            module.weights.data = torch.tensor(np.concatenate([np.zeros((1, width)), table])[:rows]).to(module.weights)
        elif type(module).__name__ == "SpeechT5ScaledPositionalEncoding":
            module.pe.data = torch.tensor(speecht5.interleaved_sinusoids(*module.pe.shape[1:]))[None].to(module.pe)
    return reference


def pair(head, seed=0, **changes):
    """The original with random weights and exact positions, ours with the same, and the table between them."""
    reference, model, table = FAMILY.pair(head, seed, **changes)
    return exact_positions(reference), model, table


@contextlib.contextmanager
def kept(reference, masks):
    """The original's speech-decoder pre-net with these units kept, however many steps it is called with."""
    prenet, calls = reference.speecht5.decoder.prenet, iter(range(10**6))
    original = prenet._consistent_dropout

    def dropout(x, p):
        layer = next(calls) % len(masks)
        chosen = torch.tensor(np.asarray(masks[layer, : x.shape[1]]), dtype=x.dtype)
        return x * chosen / (1 - p)

    prenet._consistent_dropout = dropout
    try:
        yield
    finally:
        prenet._consistent_dropout = original


def masks(steps, seed=0):
    return np.random.default_rng(seed).random((2, steps, SMALL["speech_decoder_prenet_units"])) < 0.5


def text():
    """Two texts, the second shorter, and their mask."""
    ids = np.array([[5, 3, 8, 6, 2, 4, 9], [7, 4, 3, 2, 1, 1, 1]])
    return ids, (ids != 1).astype(np.int64)


def target(frames=2 * STEPS, seed=3):
    """Two spectrograms, -100 behind the second's end."""
    labels = np.random.default_rng(seed).standard_normal((2, frames, SMALL["num_mel_bins"]))
    labels[1, frames - 3 :] = -100.0
    return labels


def speakers(seed=4):
    return np.random.default_rng(seed).standard_normal((2, SMALL["speaker_embedding_dim"]))


@pytest.fixture(scope="module")
def voice():
    return pair("ForTextToSpeech")


@pytest.fixture(scope="module")
def changer():
    return pair("ForSpeechToSpeech")


@pytest.fixture(scope="module")
def recogniser():
    return pair("ForSpeechToText")


# --- forward, taps, gradients ----------------------------------------------------------------------------------------


def test_recognition_taps_and_outputs(recogniser):
    reference, model, table = recogniser
    x, mask = padded()
    tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 1]])
    known = (tokens != 1).astype(np.int64)
    arguments = (torch.tensor(x), torch.tensor(mask), torch.tensor(tokens), torch.tensor(known))
    taps = harness.compare_taps(
        reference,
        lambda: reference(*arguments, **EVERYTHING),
        model,
        lambda: model(*map(jnp.asarray, (x, mask, tokens, known)), **EVERYTHING),
        table,
        minimum=50,
        skip=NO_PAIRS,
        compiled=True,
    )
    harness.compare_outputs(taps.ours, taps.reference)


def test_synthesis_taps_and_outputs(voice):
    reference, model, table = voice
    ids, mask = text()
    mel, who, kept_units = target()[:, :STEPS], speakers(), masks(STEPS)
    with kept(reference, kept_units):
        taps = harness.compare_taps(
            reference,
            lambda: reference(
                torch.tensor(ids),
                torch.tensor(mask),
                torch.tensor(mel),
                speaker_embeddings=torch.tensor(who),
                **EVERYTHING,
            ),
            model,
            lambda: model(
                *map(jnp.asarray, (ids, mask, mel)),
                speaker_embeddings=jnp.asarray(who),
                prenet_masks=jnp.asarray(kept_units),
                **EVERYTHING,
            ),
            table,
            minimum=50,
            skip=NO_PAIRS,
            compiled=True,
        )
    harness.compare_outputs(taps.ours, taps.reference)


def test_conversion_outputs(changer):
    """Without speakers and without masks of the input."""
    reference, model, _ = changer
    x, _ = padded()
    mel, kept_units = target()[:, :STEPS], masks(STEPS)
    with kept(reference, kept_units), torch.no_grad():
        wanted = reference(torch.tensor(x), decoder_input_values=torch.tensor(mel), **EVERYTHING)
    ours = jax.jit(lambda m: m(jnp.asarray(x), None, jnp.asarray(mel), prenet_masks=kept_units, **EVERYTHING))(model)
    harness.compare_outputs(ours, wanted)


def test_gradients_of_recognition(recogniser):
    reference, model, table = recogniser
    x, mask = padded()
    labels = np.array([[7, 5, 9, 2], [8, 2, -100, -100]])
    with reference_in_double():
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), torch.tensor(mask), labels=torch.tensor(labels)).loss,
            model,
            jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask), labels=jnp.asarray(labels)).loss),
            table,
        )
    assert len(compared) > 80


def test_gradients_of_synthesis(voice):
    """Both spectrograms, the stop and the guided attention, at once."""
    reference, model, table = voice
    ids, mask = text()
    labels, who, kept_units = target(), speakers(), masks(STEPS)
    known = (labels[:, :, 0] != -100).astype(np.int64)

    def theirs():
        return reference(
            torch.tensor(ids),
            torch.tensor(mask),
            decoder_attention_mask=torch.tensor(known),
            speaker_embeddings=torch.tensor(who),
            labels=torch.tensor(labels),
        ).loss

    def ours(model):
        return model(
            *map(jnp.asarray, (ids, mask)),
            decoder_attention_mask=jnp.asarray(known),
            speaker_embeddings=jnp.asarray(who),
            labels=jnp.asarray(labels),
            prenet_masks=kept_units,
        ).loss

    with kept(reference, kept_units), reference_in_double():
        compared = harness.compare_gradients(reference, theirs, model, jax.jit(ours), table)
    assert len(compared) > 80


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_recognised_tokens(recogniser, beams):
    reference, model, _ = recogniser
    x, mask = padded()
    options = {"num_beams": beams, "max_new_tokens": 9}
    with torch.no_grad():
        theirs = reference.generate(torch.tensor(x), attention_mask=torch.tensor(mask), **options)
    ours = model.generate(x, mask, **options)
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) > 2


@pytest.fixture(scope="module")
def vocoder():
    sizes = {
        "model_in_dim": 6,
        "upsample_initial_channel": 8,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
    }
    sizes |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
    reference = harness.randomise(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**sizes)), 1)
    reference.scale.data.abs_().add_(0.5)
    config = vocoders.config_from_hugging_face(reference.config.to_dict())
    model = blank(lambda: SpeechT5HifiGan(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    return reference, harness.port(reference, model, vocoders.hugging_face_table(config))


LIMITS = {"threshold": 0.95, "minlenratio": 1.0, "maxlenratio": 6.0}


def test_speech_of_one_text(voice, vocoder):
    """Spectrogram, cross-attentions and waveform, step by step with the same dropout."""
    reference, model, _ = voice
    theirs, ours = vocoder
    ids, who, kept_units = text()[0][1:, :4], speakers()[1:], masks(32)
    options = LIMITS | {"output_cross_attentions": True}
    with kept(reference, kept_units):
        arguments = {"input_ids": torch.tensor(ids), "speaker_embeddings": torch.tensor(who)}
        spectrogram, attentions = reference.generate(**arguments, **options)
        waveform = reference.generate(**arguments, **LIMITS, vocoder=theirs)
    found = model.generate(ids, speaker_embeddings=who, prenet_masks=kept_units, **options)
    harness.assert_close(found[0], spectrogram, name="spectrogram")
    harness.assert_close(found[1], attentions, name="cross-attentions")
    sound = model.generate(ids, speaker_embeddings=who, prenet_masks=kept_units, **LIMITS, vocoder=ours)
    harness.assert_close(sound, waveform.detach(), name="waveform")
    assert 4 < len(spectrogram) < 24  # neither of the limits


def test_speech_of_a_batch(voice, vocoder):
    """Lengths and spectrograms are the original's; attentions and sound those of the items one by one."""
    reference, model, _ = voice
    ids, mask = text()
    who, kept_units = speakers(), masks(32)
    options = LIMITS | {"output_cross_attentions": True, "return_output_lengths": True}
    with kept(reference, kept_units):
        spectrograms, lengths, mixed = reference.generate(
            torch.tensor(ids), torch.tensor(mask), speaker_embeddings=torch.tensor(who), **options
        )
    found, ours, attentions = model.generate(ids, mask, who, prenet_masks=kept_units, **options)
    assert ours == lengths
    assert len(set(ours)) == 2  # the first at its limit, the second before
    harness.assert_close(found, spectrograms, name="spectrograms")
    # The original reads (layers, items) as (items, layers).
    assert mixed.shape == attentions.shape
    right = mixed.reshape(2, 2, *mixed.shape[2:]).transpose(0, 1)
    harness.assert_close(attentions, right.contiguous(), name="cross-attentions")
    assert np.abs(attentions - mixed.numpy()).max() > 1e-3
    sounds, samples = model.generate(
        ids, mask, who, prenet_masks=kept_units, **LIMITS, vocoder=vocoder[1], return_output_lengths=True
    )
    assert samples == [4 * length for length in lengths]
    for row in range(2):
        alone = jax.jit(lambda m, s: m(s))(vocoder[1], found[row : row + 1, : lengths[row]])
        harness.assert_close(sounds[row, : samples[row]], alone[0], name=f"waveform {row}")
        assert not sounds[row, samples[row] :].any()


def test_converted_speech(changer):
    reference, model, _ = changer
    x, mask = padded()
    kept_units = masks(64)
    options = {"threshold": 1.2, "maxlenratio": 1.0, "minlenratio": 0.2, "return_output_lengths": True}
    with kept(reference, kept_units):
        wanted, lengths = reference.generate_speech(
            torch.tensor(x), torch.tensor(speakers()), torch.tensor(mask), **options
        )
        silent = reference.generate_speech(torch.tensor(x[:1]), torch.zeros(1, 5), **(LIMITS | {"maxlenratio": 0.5}))
    found, ours = model.generate_speech(x, speakers(), mask, prenet_masks=kept_units, **options)
    assert ours == lengths
    assert 6 < min(ours) < max(ours) < 34
    harness.assert_close(found, wanted, name="spectrograms")
    found = model.generate_speech(x[:1], prenet_masks=kept_units, **(LIMITS | {"maxlenratio": 0.5}))
    harness.assert_close(found, silent, name="without a speaker")
    assert model.generate_speech(x[:1], frames=9, prenet_masks=kept_units).shape == (10, 6)


def test_mutations_are_seen(voice):
    """A changed weight, a forgotten bias, and dropout forgotten in the pre-net."""
    reference, model, _ = voice
    ids, mask = text()
    mel, who, kept_units = target()[:, :STEPS], speakers(), masks(STEPS)
    with kept(reference, kept_units), torch.no_grad():
        wanted = reference(
            torch.tensor(ids), torch.tensor(mask), torch.tensor(mel), speaker_embeddings=torch.tensor(who)
        )
    run = jax.jit(
        lambda m, units: m(*map(jnp.asarray, (ids, mask, mel)), speaker_embeddings=who, prenet_masks=units).spectrogram
    )

    def check(units=kept_units):
        harness.assert_close(run(model, units), wanted.spectrogram)

    mutations = [
        *harness.perturbations(model, exclude=r".*(num_batches_tracked|prob_out.*|masked_spec_embed)"),
        harness.dropped(model, "speecht5.encoder.wrapped_encoder.embed_positions.pe_k.embedding"),
        harness.dropped(model, "speech_decoder_postnet.layers.1.batch_norm.bias"),
    ]
    assert harness.assert_detects(check, mutations) == 5
    with pytest.raises(AssertionError):
        check(np.ones_like(kept_units))
