"""SpeechT5 against `transformers`: each task's taps, outputs and gradients, generation, files and published sizes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.speecht5 import modeling_speecht5

import audiozoo
from audiozoo.errors import CheckpointError
from audiozoo.layers import fairseq_sinusoids
from audiozoo.layers.positions import interleaved_sinusoids
from audiozoo.loading import convert, load, variables
from audiozoo.models import speech_to_text, speecht5
from audiozoo.models.hifigan import SpeechT5HifiGan
from audiozoo.models.speecht5 import SpeechT5Config, SpeechT5LanguageModel, SpeechT5LanguageModelConfig
from audiozoo.processors.speecht5 import SpeechT5Processor
from audiozoo.text.numbers import spell_numbers
from tests.models.tiny_speecht5 import train_characters
from tests.parity import generation, harness
from tests.parity.harness import blank
from tests.parity.speech_family import NO_DROPOUT, TINY, Family, padded, reference_in_double
from weights_conversion import hifigan as vocoders
from weights_conversion import hubert as hubert_files
from weights_conversion import speecht5 as conversion
from weights_conversion.rules import Rule, transpose
from weights_conversion.wav2vec2 import norm

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
            rows, width = module.pe.shape[1:]
            module.pe.data = torch.tensor(interleaved_sinusoids(np.arange(rows), width))[None].to(module.pe)
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


def test_gradients_of_conversion(changer):
    """`transformers` gives voice conversion no loss: its own criterion, the one of synthesis, on its own outputs."""
    reference, model, table = changer
    x, mask = padded()
    labels, who, kept_units = target(), speakers(), masks(STEPS)

    def theirs():
        before = modeling_speecht5.shift_spectrograms_right(torch.tensor(labels), reference.config.reduction_factor)[0]
        outputs = reference.speecht5(
            torch.tensor(x),
            torch.tensor(mask),
            before,
            speaker_embeddings=torch.tensor(who),
            output_attentions=True,
            use_cache=False,
        )
        frames = outputs.encoder_last_hidden_state.shape[1]
        real = reference.speecht5.encoder.prenet._get_feature_vector_attention_mask(frames, torch.tensor(mask))
        criterion = modeling_speecht5.SpeechT5SpectrogramLoss(reference.config)
        made = reference.speech_decoder_postnet(outputs.last_hidden_state)
        return criterion(real.long(), *made, torch.tensor(labels), outputs.cross_attentions)

    def ours(model):
        given = {"speaker_embeddings": jnp.asarray(who), "labels": jnp.asarray(labels), "prenet_masks": kept_units}
        return model(jnp.asarray(x), jnp.asarray(mask), **given).loss

    with kept(reference, kept_units), reference_in_double():
        compared = harness.compare_gradients(reference, theirs, model, jax.jit(ours), table)
    assert len(compared) > 80


class Teller(torch.nn.Module):
    """Identification as the released code has it, of the original's encoder and decoder.

    The decoder reads one vector of zeros and the encoder's states; a matrix turns what it makes of them into speakers.
    """

    def __init__(self, config, speakers):
        super().__init__()
        encoder = modeling_speecht5.SpeechT5EncoderWithSpeechPrenet(config)
        decoder = modeling_speecht5.SpeechT5DecoderWithoutPrenet(config)
        self.config, self.speecht5 = config, transformers.SpeechT5Model(config, encoder, decoder)
        self.classifier = torch.nn.Linear(config.hidden_size, speakers, bias=False)

    def forward(self, x, mask):
        nothing = torch.zeros(len(x), 1, self.config.hidden_size)
        states = self.speecht5(x, mask, nothing, use_cache=False).last_hidden_state
        return self.classifier(states[:, 0])


def test_gradients_of_identification():
    names = tuple("abcde")
    reference = exact_positions(harness.randomise(Teller(FAMILY.their_config(), len(names)), 7))
    config = dataclasses.replace(conversion.config_from_hugging_face(reference.config.to_dict()), id2label=names)
    table = conversion.hugging_face_table(config, "SpeechT5ForSpeechToText")
    table = dataclasses.replace(table, rules=(*table.rules, Rule("classifier.weight", "classifier.kernel", transpose)))
    model = blank(lambda: speecht5.SpeechT5ForSequenceClassification(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    harness.port(reference, model, table)
    x, mask = padded()
    labels = np.array([3, 0])

    def told(model):
        return model(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(labels)).loss

    with reference_in_double():
        compared = harness.compare_gradients(
            reference,
            lambda: torch.nn.functional.cross_entropy(
                reference(torch.tensor(x), torch.tensor(mask)), torch.tensor(labels)
            ),
            model,
            jax.jit(told),
            table,
        )
    assert len(compared) > 70


def test_enhancement():
    """The released code's three ways: out of the noisy spectrogram comes a clean one, a factor of it, or the excess."""
    theirs = FAMILY.their_config(reduction_factor=1, use_guided_attention_loss=False)
    reference = exact_positions(harness.randomise(transformers.SpeechT5ForSpeechToSpeech(theirs), 8))
    config = conversion.config_from_hugging_face(theirs.to_dict())
    table = conversion.hugging_face_table(config, "SpeechT5ForSpeechToSpeech")
    model = blank(lambda: speecht5.SpeechT5ForSpeechEnhancement(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    harness.port(reference, model, table)
    x, mask = padded()
    clean, kept_units = target(), masks(2 * STEPS)
    noisy = np.random.default_rng(5).standard_normal(clean.shape)
    given, wanted = torch.tensor(noisy), {}
    with kept(reference, kept_units), reference_in_double(), torch.no_grad():
        states = reference.speecht5(torch.tensor(x), torch.tensor(mask), given, use_cache=False).last_hidden_state
        *made, stop = reference.speech_decoder_postnet(states)
        criterion = modeling_speecht5.SpeechT5SpectrogramLoss(theirs)
        ways = {"target": lambda y: y, "masking": lambda y: torch.sigmoid(y) * given, "delta": lambda y: y - given}
        for name, way in ways.items():
            before, after = map(way, made)
            wanted[name] = after, criterion(None, before, after, stop, torch.tensor(clean))

    @jax.jit
    def enhance(model):
        arguments = (jnp.asarray(x), jnp.asarray(noisy), jnp.asarray(mask))
        options = {"labels": jnp.asarray(clean), "prenet_masks": kept_units}
        return {name: model.enhance(*arguments, predict=name, **options) for name in ways}

    found = enhance(model)
    for name, (after, loss) in wanted.items():
        harness.assert_close(found[name].spectrogram, after, name=name)
        harness.assert_close(found[name].loss, loss, name=f"loss of {name}")


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


@pytest.mark.parametrize(
    "options",
    [
        {
            "eos_token_id": [2, 8],
            "repetition_penalty": 2.0,
            "min_new_tokens": 4,
            "suppress_tokens": [7],
            "bad_words_ids": [[7, 7], [6]],
            "sequence_bias": [[[4], -6.0], [[6, 6], 5.0]],
        },
        {
            "eos_token_id": [2, 4],
            "num_beams": 3,
            "length_penalty": 2.0,
            "early_stopping": True,
            "no_repeat_ngram_size": 2,
            "min_length": 9,
            "forced_eos_token_id": 2,
            "forced_bos_token_id": 7,
        },
    ],
    ids=["greedy", "beams"],
)
def test_options_of_recognition(options):
    reference, model, table = pair("ForSpeechToText")
    generation.livelier(reference.speecht5.decoder)
    harness.port(reference, model, table)
    mask = (np.arange(700) < np.array([700, 480, 700, 600])[:, None]).astype(np.int64)
    x = np.random.default_rng(0).standard_normal((4, 700)) * mask
    given = (torch.tensor(x), torch.tensor(mask))
    generation.compare(
        lambda **chosen: reference.generate(given[0], attention_mask=given[1], max_new_tokens=12, **chosen),
        lambda **chosen: model.generate(x, mask, max_new_tokens=12, **chosen),
        1,
        options,
    )


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
        *harness.perturbations(model, exclude=r".*(prob_out.*|masked_spec_embed)"),
        harness.dropped(model, "speecht5.encoder.wrapped_encoder.embed_positions.pe_k.embedding"),
        harness.dropped(model, "speech_decoder_postnet.layers.1.batch_norm.bias"),
    ]
    assert harness.assert_detects(check, mutations) == 5
    with pytest.raises(AssertionError):
        check(np.ones_like(kept_units))


# --- LARGE: norms first ----------------------------------------------------------------------------------------------


class LargeEncoderLayer(modeling_speecht5.SpeechT5EncoderLayer):
    """The original's block with its norms first, one of them for the relative positions, as the authors have it."""

    def __init__(self, config):
        super().__init__(config)
        self.norm_k = torch.nn.LayerNorm(config.hidden_size // config.encoder_attention_heads)

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False):
        """Norm, attention, residual; norm, MLP, residual."""
        attention, weights = self.attention(
            self.layer_norm(hidden_states),
            attention_mask=attention_mask,
            position_bias=self.norm_k(position_bias),
            output_attentions=output_attentions,
        )
        hidden_states = hidden_states + attention
        return hidden_states + self.feed_forward(self.final_layer_norm(hidden_states)), weights


class LargeDecoderLayer(modeling_speecht5.SpeechT5DecoderLayer):
    """The original's block of the decoder with its norms first."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **_):
        """Norm, self-attention, residual; norm, attention, residual; norm, MLP, residual."""
        x = hidden_states
        x = x + self.self_attn(self.self_attn_layer_norm(x), attention_mask=attention_mask)[0]
        y = self.encoder_attn_layer_norm(x)
        y = self.encoder_attn(y, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask)[0]
        x = x + y
        return (x + self.feed_forward(self.final_layer_norm(x)),)


def test_norms_first_as_in_large(monkeypatch):
    monkeypatch.setattr(modeling_speecht5, "SpeechT5EncoderLayer", LargeEncoderLayer)
    monkeypatch.setattr(modeling_speecht5, "SpeechT5DecoderLayer", LargeDecoderLayer)
    sizes = FAMILY.tiny | {"feat_extract_norm": "layer"}
    theirs = transformers.SpeechT5Config(**sizes, attn_implementation="eager")
    reference = transformers.SpeechT5ForSpeechToText(theirs)
    encoder, decoder = reference.speecht5.encoder.wrapped_encoder, reference.speecht5.decoder.wrapped_decoder
    last_of_encoder, encoder.layer_norm = encoder.layer_norm, torch.nn.Identity()
    encoder.last_norm, decoder.last_norm = last_of_encoder, torch.nn.LayerNorm(24)
    exact_positions(harness.randomise(reference, 5))
    for half in (encoder, decoder):
        half.register_forward_hook(
            lambda module, _, output: output.__setitem__(
                "last_hidden_state", module.last_norm(output.last_hidden_state)
            )
        )
    config = conversion.config_from_hugging_face(theirs.to_dict() | {"layer_norm_first": True})
    last = dataclasses.replace(config, layer_norm_first=False)
    plain = conversion.hugging_face_table(last, "SpeechT5ForSpeechToText")
    halves = ("speecht5.encoder.wrapped_encoder.", "speecht5.decoder.wrapped_decoder.")
    table = dataclasses.replace(
        plain,
        rules=(
            *(r for r in plain.rules if not str(r.foreign).startswith(f"('{halves[0]}layer_norm.")),
            *norm(halves[0] + "layers.{i}.norm_k"),
            *(rule for half in halves for rule in norm(f"{half}last_norm", f"{half}layer_norm")),
        ),
    )
    model = blank(lambda: speecht5.SpeechT5ForSpeechToText(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    harness.port(reference, model, table)
    x, mask = padded()
    tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 6]])
    with torch.no_grad():
        wanted = reference(torch.tensor(x), torch.tensor(mask), torch.tensor(tokens), use_cache=False)
    ours = jax.jit(lambda m: m(*map(jnp.asarray, (x, mask, tokens))))(model)
    harness.assert_close(ours.logits, wanted.logits)
    with pytest.raises(CheckpointError, match="norms first"):
        conversion.hugging_face(model)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["ForTextToSpeech", "ForSpeechToSpeech", "ForSpeechToText", "Model"])
def test_hugging_face_directories(head, tmp_path):
    model = FAMILY.round_trip(head, tmp_path)
    assert isinstance(model, getattr(speecht5, f"SpeechT5{head}"))
    if head == "ForSpeechToText":
        untied = FAMILY.round_trip(head, tmp_path / "untied", tie_word_embeddings=False)
        assert hasattr(untied, "text_decoder_postnet")
        search = {"num_beams": 3, "max_new_tokens": 6}
        transformers.GenerationConfig(**search).save_pretrained(tmp_path / "theirs")
        searching = audiozoo.load(tmp_path / "theirs")
        x, mask = padded()
        found = searching.generate(x, mask)
        np.testing.assert_array_equal(found, searching.generate(x, mask, **search))
        assert found.shape[1] <= 7
        audiozoo.export(searching, tmp_path / "again")
        audiozoo.save(searching, tmp_path / "native")
        for name in ("again", "native"):
            assert dict(audiozoo.load(tmp_path / name).generation_config.options).items() >= search.items()


def test_older_names(tmp_path):
    """Files of version 4 spell weight normalisation otherwise, and hold the tables of positions."""
    with harness.precision("float32"):
        reference, model, table = FAMILY.pair("ForSpeechToSpeech")
        old = {}
        for name, tensor in reference.state_dict().items():
            old[name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            )] = tensor  # fmt: skip
        old["speecht5.decoder.prenet.encode_positions.pe"] = torch.zeros(1, 60, 24)
        again = blank(lambda: speecht5.SpeechT5ForSpeechToSpeech(model.config, rngs=nnx.Rngs(0)))
        steps = table.plan(harness.StateDict(old), harness.parameters(again))
        harness.assign(again, dict(table.read(harness.StateDict(old), steps)))
        for path, value in harness.parameters(model).items():
            np.testing.assert_array_equal(harness.parameters(again)[path], value, err_msg=path)


LEFT_OVER = {
    "encoder.version": (1,),
    "decoder.version": (1,),
    "decoder.pos_emb.pe_k.weight": (10, 8),
    "encoder.layers.0.norm_k.weight": (8,),
    "decoder.layers.1.norm_k.bias": (8,),
    "speech_encoder_prenet.embed_positions._float_tensor": (1,),
    "text_decoder_postnet.output_projection.weight": (11, 24),
}


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("t2s", "ForTextToSpeech"),
        ("s2s", "ForSpeechToSpeech"),
        ("s2t", "ForSpeechToText"),
        ("s2c", "ForSequenceClassification"),
        ("pretrain", "ForPreTraining"),
        ("pretrain", "ForPreTraining of LARGE"),
    ],
)
def test_the_authors_files(task, head, tmp_path):
    """A file with the authors' names, of our own weights, loads by its task to the same bits."""
    from audiozoo.loading import paper_of

    name, large = f"SpeechT5{head.removesuffix(' of LARGE')}", head.endswith("LARGE")
    with harness.precision("float32"):
        joint = {"ctc_weight": 0.5} if task == "s2t" else {}
        joint |= {"layer_norm_first": True, "feat_extract_norm": "layer"} if large else {}
        config = SpeechT5Config(
            **(FAMILY.tiny | joint), frame_rule="samples", num_clusters=9, final_dim=6, codevector_dim=24,
            num_codevectors_per_group=5, id2label=("a", "b", "c"),
        )  # fmt: skip
        model = getattr(speecht5, name)(config, rngs=nnx.Rngs(3))
        table = conversion.original_table(config, name)
        tensors = {k: torch.tensor(v) for k, v in table.write({n: v[...] for n, v in variables(model).items()})}
        old = {
            k.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): v
            for k, v in tensors.items()
        }
        extra = {k: torch.zeros(shape) for k, shape in LEFT_OVER.items() if k not in old}
        if task != "pretrain":
            extra["hubert_layer.label_embs_concat"] = torch.zeros(9, 6)
        settings = {"t5_task": task, "arch": "t5_transformer_base_asr", "mask_prob": 0.05, "ctc_weight": 0.5}
        settings |= {"conv_feature_layers": "[(16, 10, 5), (12, 3, 2), (18, 2, 2)]", "max_text_positions": 30}
        settings |= dict.fromkeys(("dropout", "encoder_layerdrop", "decoder_layerdrop", "activation_dropout"), 0.0)
        settings |= {"attention_dropout": 0.0, "max_speech_positions": 60}
        torch.save({"args": argparse.Namespace(**settings), "model": old | extra}, tmp_path / "checkpoint.pt")
        if registered():
            assert paper_of(tmp_path / "checkpoint.pt").name == "speecht5"
        assert conversion.recognise(tmp_path / "checkpoint.pt")
        assert not hubert_files.recognise(tmp_path / "checkpoint.pt")
        foreign = conversion.open_checkpoint(tmp_path / "checkpoint.pt")
        assert foreign.model_class == name
        again = convert(foreign, getattr(speecht5, name))
        for path, value in variables(model).items():
            np.testing.assert_array_equal(variables(again)[path][...], value[...], err_msg=path)
        assert again.config.ctc_weight == (0.5 if task == "s2t" else 0)
        assert again.config.layer_norm_first == large


def registered():
    from audiozoo import registry

    return any(entry.name == "speecht5" for entry in registry.PAPERS)


# --- the language model ----------------------------------------------------------------------------------------------

AUTHOR = {"vocab_size": 11, "d_model": 12, "attention_heads": 3, "ffn_dim": 20, "num_layers": 2}
AUTHOR |= {"activation_function": "gelu", "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
WORDS = np.array([[2, 7, 5, 9, 6], [2, 8, 4, 3, 10]])
NEXT = np.array([[7, 5, 9, 6, 2], [8, 4, 3, -100, -100]])


def authors_file(path, reference, **changes):
    """What fairseq writes of a `transformer_lm`: the weights under its names, its marks and its settings."""
    state = {
        n.replace("lm_head", "decoder.output_projection").replace("model.", "decoder.", 1): t
        for n, t in reference.state_dict().items()
    }
    state |= {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    settings = {
        "arch": "transformer_lm_t5", "decoder_attention_heads": 3, "activation_fn": "gelu", "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_layerdrop": 0, "decoder_learned_pos": False,
        "share_decoder_input_output_embed": reference.config.tie_word_embeddings, "tokens_per_sample": 512,
    }  # fmt: skip
    torch.save({"args": argparse.Namespace(**(settings | changes)), "model": state}, path)
    return state


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_language_model(tied, tmp_path):
    """A file with fairseq's names against `transformers`' XGLM, which is fairseq's `transformer_lm`."""
    theirs = transformers.XGLMConfig(**AUTHOR, tie_word_embeddings=tied, attn_implementation="eager")
    reference = harness.randomise(transformers.XGLMForCausalLM(theirs))
    positions = reference.model.embed_positions.weights
    exact = torch.tensor(fairseq_sinusoids(*positions.shape))
    assert (positions - exact)[:20].abs().max() < 1e-6
    positions.copy_(exact)  # its own are rounded
    state = authors_file(tmp_path / "lm.pt", reference)
    (tmp_path / "dict.txt").write_text("".join(f"{letter} 9\n" for letter in "▁ETAOIN"), encoding="utf-8")
    model = load(tmp_path, param_dtype="float64")
    assert isinstance(model, SpeechT5LanguageModel)
    assert model.config.tie_word_embeddings == tied
    assert model.config.tokens == ("<s>", "<pad>", "</s>", "<unk>", *"▁ETAOIN")
    # Back to the same names and bits, but for marks and what is tied.
    own = conversion.language_model_table(model.config)
    back = dict(own.write({n: np.asarray(v[...]) for n, v in variables(model).items()}))
    left_out = {"decoder.version", "decoder.embed_positions._float_tensor"}
    assert set(back) == set(state) - left_out - ({"decoder.output_projection.weight"} if tied else set())
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)

    names = ((r"^model\.", "decoder."), (r"^lm_head", "decoder.output_projection"))
    table = dataclasses.replace(own, renames=names)
    words, asked = jnp.asarray(WORDS), {"output_hidden_states": True, "output_attentions": True}
    taps = harness.compare_taps(
        reference, lambda: reference(torch.tensor(WORDS), **asked), model, lambda: model(words, **asked), table,
        minimum=20, compiled=True, skip={r".*embed_tokens|lm_head": "scaled there; the logits are compared"},
    )  # fmt: skip
    harness.compare_outputs(taps.ours, taps.reference, skip={"cross_attentions": "there is no encoder"})
    harness.compare_gradients(
        reference,
        lambda: torch.nn.functional.cross_entropy(
            reference(torch.tensor(WORDS)).logits.flatten(0, 1), torch.tensor(NEXT).flatten()
        ),
        model,
        lambda m: m(words, labels=jnp.asarray(NEXT)).loss,
        table,
    )
    if tied:

        def check():
            harness.assert_close(jax.jit(lambda m: m(words).logits)(model), taps.reference.logits)

        changes = [
            harness.Replaced(speecht5.SpeechT5LanguageModelLayer, "norm_first", False),
            harness.Replaced(speech_to_text, "fairseq_sinusoids", lambda n, d, **_: fairseq_sinusoids(n + 1, d)[1:]),
        ]
        harness.assert_detects(check, [*harness.perturbations(model, 3, exclude=r".*k_proj\.bias"), *changes])


def test_language_models_that_are_refused(tmp_path):
    path = tmp_path / "lm.pt"
    reference = transformers.XGLMForCausalLM(transformers.XGLMConfig(**AUTHOR))
    authors_file(path, reference, no_token_positional_embeddings=True)
    with pytest.raises(CheckpointError, match="no_token_positional_embeddings=True, which is not built"):
        load(path)
    authors_file(path, reference, activation_fn="gelu_fast")
    with pytest.raises(CheckpointError, match="activation_fn=gelu_fast, which is not built"):
        load(path)
    state = authors_file(path, reference)
    with pytest.raises(CheckpointError, match="holds a SpeechT5LanguageModel, not a SpeechT5Model"):
        load(path, model_class="SpeechT5Model")
    with pytest.raises(CheckpointError, match="transformers has no class SpeechT5LanguageModel"):
        conversion.hugging_face(load(path))
    (tmp_path / "dict.txt").write_text("A 1\nB 1\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"names 6 tokens, four special ones included; lm\.pt has 11"):
        load(path)
    (tmp_path / "dict.txt").unlink()
    torch.save({"model": state | {"decoder.embed_positions.weight": torch.zeros(9, 12)}, "args": None}, path)
    with pytest.raises(CheckpointError, match="does not say with how many heads"):
        load(path)
    settings = {"model": {"decoder_attention_heads": 3, "share_decoder_input_output_embed": True}}
    torch.save({"model": state | {"decoder.embed_positions.weight": torch.zeros(9, 12)}, "cfg": settings}, path)
    with pytest.raises(CheckpointError, match=r"decoder\.embed_positions\.weight"):  # learned
        load(path)


# --- published sizes -------------------------------------------------------------------------------------------------

PUBLISHED = {
    "asr": ("ForSpeechToText", {}, 151_165_056),
    "tts": ("ForTextToSpeech", {"max_speech_positions": 1876, "max_text_positions": 600}, 144_433_892),
    "vc": ("ForSpeechToSpeech", {"max_speech_positions": 1876, "max_text_positions": 600}, 153_687_395),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    head, changes, count = PUBLISHED[name]
    config = getattr(SpeechT5Config, name)()
    theirs = transformers.SpeechT5Config(**changes)
    assert conversion.config_from_hugging_face(theirs.to_dict()) == config
    with harness.precision("float32"):
        counted = harness.assert_same_shapes(
            lambda: getattr(transformers, f"SpeechT5{head}")(theirs),
            lambda: getattr(speecht5, f"SpeechT5{head}")(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, f"SpeechT5{head}"),
        )
    assert counted == count


def test_published_size_of_the_language_model():
    """`transformer_lm_t5`: 20 blocks of width 1280, 6144 inside the MLP, 16 heads."""
    sizes = {"d_model": 1280, "num_layers": 20, "ffn_dim": 6144, "attention_heads": 16, "vocab_size": 79}
    config = SpeechT5LanguageModelConfig()
    assert config.decoder_attention_heads == 16
    names = ((r"^model\.", "decoder."), (r"^lm_head", "decoder.output_projection"))
    with harness.precision("float32"):
        counted = harness.assert_same_shapes(
            lambda: transformers.XGLMForCausalLM(transformers.XGLMConfig(**sizes)),
            lambda: SpeechT5LanguageModel(config, rngs=nnx.Rngs(0)),
            dataclasses.replace(conversion.language_model_table(config), renames=names),
        )
    assert counted == 446_101_760


def test_published_voice_in_float32():
    """The released voice's own sizes, but for its depth: one block on either side."""
    changes = {"encoder_layers": 1, "decoder_layers": 1, "max_speech_positions": 1876, "max_text_positions": 600}
    with harness.precision("float32"):
        theirs = transformers.SpeechT5Config(**changes, attn_implementation="eager")
        reference = harness.randomise(transformers.SpeechT5ForTextToSpeech(theirs), 0, torch.float32)
        config = dataclasses.replace(SpeechT5Config.tts(), encoder_layers=1, decoder_layers=1)
        model = blank(lambda: speecht5.SpeechT5ForTextToSpeech(config, rngs=nnx.Rngs(0)))
        harness.port(reference, model, conversion.hugging_face_table(config, "SpeechT5ForTextToSpeech"))
        rng = np.random.default_rng(0)
        ids, mel = rng.integers(4, 79, (1, 40)), rng.standard_normal((1, 30, 80)).astype(np.float32)
        who, units = rng.standard_normal((1, 512)).astype(np.float32), rng.random((2, 30, 256)) < 0.5
        with kept(reference, units), torch.no_grad():
            wanted = reference(
                torch.tensor(ids), decoder_input_values=torch.tensor(mel), speaker_embeddings=torch.tensor(who)
            )
        run = jax.jit(
            lambda m: m(ids, decoder_input_values=mel, speaker_embeddings=who, prenet_masks=units).spectrogram
        )
        harness.assert_close(run(model), wanted.spectrogram)


# --- processor -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processor")
    tokenizer = transformers.SpeechT5Tokenizer(str(train_characters(directory / "characters")))
    tokenizer.add_special_tokens({"mask_token": transformers.AddedToken("<mask>", lstrip=True)})
    tokenizer.add_tokens(["<ctc_blank>"])
    extractor = transformers.SpeechT5FeatureExtractor(num_mel_bins=80)
    theirs = transformers.SpeechT5Processor(extractor, tokenizer)
    theirs.save_pretrained(directory / "theirs")
    return theirs, SpeechT5Processor.from_directory(directory / "theirs")


SAYINGS = ["the dog.", "A Fox jumps, please!", "42 zebras <mask> over", "vexing  é ☂ box ", "", "it's </s> done"]
NUMBERS = {
    "I have 3 boxes": "I have three boxes",
    "1234567 dogs": "one million two hundred and thirty four thousand five hundred and sixty seven dogs",
    "$5.20 and -7% of 15,000": "five point two zero dollars and minus seven percent of fifteen thousand",
    "10 20 110 13 99": "ten twenty one hundred and ten thirteen ninety nine",
    "3.00 or 3.05, room 12b": "three or three point zero five, room 12b",
    "€100": "one hundred euros",
    "1000, 1001 or 21000": "one thousand, one thousand one or twenty one thousand",
}


def test_characters_and_text(processors):
    theirs, ours = processors
    assert len(ours.tokenizer) == len(theirs.tokenizer)
    for line in SAYINGS:
        wanted = theirs.tokenizer(line)["input_ids"]
        assert ours(text=line)["input_ids"][0].tolist() == wanted, line
        for skip in (False, True):
            assert ours.decode(wanted, skip) == theirs.decode(wanted, skip_special_tokens=skip)
    wanted = theirs(text=SAYINGS, padding=True, return_tensors="np")
    found = ours(text=SAYINGS)
    np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])
    np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    assert ours.batch_decode(found["input_ids"], True) == theirs.batch_decode(found["input_ids"], True)
    for line, spoken in NUMBERS.items():
        assert spell_numbers(line) == theirs.tokenizer.normalizer(line) == spoken
        assert (
            ours(text=line, normalize=True)["input_ids"][0].tolist()
            == theirs.tokenizer(line, normalize=True)["input_ids"]
        )
    # Where the original loses a number, or its thousands.
    assert (spell_numbers("0 dogs"), theirs.tokenizer.normalizer("0 dogs").strip()) == ("zero dogs", "dogs")
    assert spell_numbers("1,000,000") == "one million" != theirs.tokenizer.normalizer("1,000,000")


def test_waveforms_and_spectrograms(processors, tmp_path):
    theirs, ours = processors
    rng = np.random.default_rng(0)
    waves = [(0.2 * rng.standard_normal(n)).astype(np.float32) for n in (5000, 3777)]
    wanted = theirs(audio=waves, sampling_rate=16_000, padding=True, return_tensors="np")
    found = ours(waves, sampling_rate=16_000)
    np.testing.assert_allclose(found["input_values"], wanted["input_values"], atol=1e-6)
    np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    wanted = theirs(text=["dog", "a fox"], audio_target=waves, sampling_rate=16_000, padding=True, return_tensors="np")
    found = ours(text=["dog", "a fox"], audio_target=waves, sampling_rate=16_000)
    assert set(found) == set(wanted)
    harness.assert_close(found["labels"], wanted["labels"], kind="features")
    for name in ("input_ids", "decoder_attention_mask"):
        np.testing.assert_array_equal(found[name], wanted[name])
    found = ours(waves[0], text_target="a fox", sampling_rate=16_000)
    assert found["labels"][0].tolist() == theirs.tokenizer("a fox")["input_ids"]
    ours.save(tmp_path)
    back = transformers.SpeechT5Processor.from_pretrained(tmp_path)
    for line in SAYINGS:
        assert back(text=line)["input_ids"] == theirs(text=line)["input_ids"]
    assert back.feature_extractor.to_dict() == theirs.feature_extractor.to_dict()


def test_dropouts():
    reference, model, _ = pair("ForSpeechToText", **harness.rates(transformers.SpeechT5Config()))
    inputs = {"input_values": padded()[0], "decoder_input_ids": np.array([[2, 7, 5, 9], [2, 8, 4, 3]])}
    harness.compare_in_training(reference, model, inputs)


def test_dropouts_of_speech():
    reference, model, _ = pair("ForTextToSpeech", **harness.rates(transformers.SpeechT5Config()))
    ids, units = text()[0], masks(STEPS)
    inputs = {"input_ids": ids, "decoder_input_values": target(STEPS), "speaker_embeddings": speakers()}
    with kept(reference, units):
        harness.compare_in_training(reference, model, inputs, prenet_masks=jnp.asarray(units))
