"""Whisper against `transformers`, module by module in float64, and against openai-whisper's own files."""

from __future__ import annotations

import base64
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo.layers import activations
from audiozoo.models import whisper
from tests.parity import generation, harness
from weights_conversion import whisper as conversion
from weights_conversion.whisper import (
    OPENAI_TABLE,
    config_from_hugging_face,
    config_from_openai,
    hugging_face_table,
)

TINY = {
    "vocab_size": 97,
    "num_mel_bins": 20,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 36,
    "max_source_positions": 25,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "begin_suppress_tokens": None,
}


def pair(name: str, seed: int = 0, **changes):
    """The original with random weights, ours with the same, and the table between them."""
    theirs_config = transformers.WhisperConfig(**(TINY | changes), attn_implementation="eager")
    reference = harness.randomise(getattr(transformers, name)(theirs_config), seed)
    config = config_from_hugging_face(theirs_config.to_dict())
    table = hugging_face_table(config, name)
    create = lambda: getattr(whisper, name)(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
    return reference, harness.ported(reference, create, table), table


def features(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, TINY["num_mel_bins"], 50))


def tokens(batch: int = 2, time: int = 7, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, TINY["vocab_size"], (batch, time))


EVERYTHING = {"output_attentions": True, "output_hidden_states": True}


@pytest.mark.parametrize(
    "name", ["WhisperModel", "WhisperForConditionalGeneration", "WhisperForCausalLM", "WhisperForAudioClassification"]
)
@pytest.mark.parametrize("changes", [{}, {"activation_function": "relu"}], ids=["gelu", "relu"])
def test_every_tap_and_output(name, changes):
    reference, model, table = pair(name, **changes)
    x, ids = features(), tokens()
    if name == "WhisperForCausalLM":
        encoded = np.random.default_rng(3).standard_normal((2, 25, 24))
        theirs = lambda: reference(torch.tensor(ids), encoder_outputs=(torch.tensor(encoded),), **EVERYTHING)  # noqa: E731
        ours = lambda: model(jnp.asarray(ids), encoder_outputs=jnp.asarray(encoded), **EVERYTHING)  # noqa: E731
        minimum = 40
    elif name == "WhisperForAudioClassification":
        labels = np.array([1, 0])
        theirs = lambda: reference(torch.tensor(x), labels=torch.tensor(labels), **EVERYTHING)  # noqa: E731
        ours = lambda: model(jnp.asarray(x), labels=jnp.asarray(labels), **EVERYTHING)  # noqa: E731
        minimum = 25
    else:
        theirs = lambda: reference(torch.tensor(x), decoder_input_ids=torch.tensor(ids), **EVERYTHING)  # noqa: E731
        ours = lambda: model(jnp.asarray(x), decoder_input_ids=jnp.asarray(ids), **EVERYTHING)  # noqa: E731
        minimum = 70
    with torch.no_grad():
        taps = harness.compare_taps(reference, theirs, model, ours, table, minimum=minimum)
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert len(compared) >= 3


def test_weighted_layer_sum():
    reference, model, table = pair("WhisperForAudioClassification", use_weighted_layer_sum=True, num_labels=5)
    x = features()
    with torch.no_grad():
        harness.compare_outputs(
            model(jnp.asarray(x), output_hidden_states=True), reference(torch.tensor(x), output_hidden_states=True)
        )
    labels = np.array([4, 2])
    harness.compare_gradients(
        reference,
        lambda: reference(torch.tensor(x), labels=torch.tensor(labels)).loss,
        model,
        lambda m: m(jnp.asarray(x), labels=jnp.asarray(labels)).loss,
        table,
        skip={"encoder.embed_positions.embedding": "the original does not train the sinusoids"},
    )


def test_padded_targets_and_positions():
    reference, model, _ = pair("WhisperForConditionalGeneration")
    x, ids = features(), tokens()
    mask = np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        theirs = reference(
            torch.tensor(x),
            decoder_input_ids=torch.tensor(ids),
            decoder_attention_mask=torch.tensor(mask),
            decoder_position_ids=torch.tensor(positions),
        ).logits
        alone = reference(torch.tensor(x[1:]), decoder_input_ids=torch.tensor(ids[1:, 2:])).logits
    ours = model(
        jnp.asarray(x),
        decoder_input_ids=jnp.asarray(ids),
        decoder_attention_mask=jnp.asarray(mask),
        decoder_position_ids=jnp.asarray(positions),
    ).logits
    harness.assert_close(ours[0], theirs[0], name="logits of the unpadded row")
    harness.assert_close(ours[1, 2:], theirs[1, 2:], name="logits behind the padding")
    harness.assert_close(ours[1:, 2:], alone, name="the padded row against the row alone")


def test_loss_and_every_gradient():
    reference, model, table = pair("WhisperForConditionalGeneration")
    x, ids, labels = features(), tokens(), tokens(seed=4)
    labels[0, 5:] = -100
    labels[1, :2] = -100
    # No padding among the inputs: the original's embedding gives its padding row no gradient, OpenAI's has no such row.
    compared = harness.compare_gradients(
        reference,
        lambda: reference(torch.tensor(x), decoder_input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss,
        model,
        lambda m: m(jnp.asarray(x), decoder_input_ids=jnp.asarray(ids), labels=jnp.asarray(labels)).loss,
        table,
        skip={"model.encoder.embed_positions.embedding": "the original does not train the sinusoids"},
    )
    assert len(compared) > 90


def test_labels_become_inputs():
    reference, model, _ = pair("WhisperForConditionalGeneration")
    x, labels = features(), tokens()
    labels[0, 5:] = -100
    with torch.no_grad():
        theirs = reference(torch.tensor(x), labels=torch.tensor(labels))
    harness.compare_outputs(model(jnp.asarray(x), labels=jnp.asarray(labels)), theirs)


def test_causal_gradients():
    reference, model, table = pair("WhisperForCausalLM")
    ids, labels = tokens(), tokens(seed=5)
    encoded = np.random.default_rng(3).standard_normal((2, 25, 24))
    harness.compare_gradients(
        reference,
        lambda: (
            reference(torch.tensor(ids), encoder_outputs=(torch.tensor(encoded),), labels=torch.tensor(labels)).loss
        ),
        model,
        lambda m: m(jnp.asarray(ids), encoder_outputs=jnp.asarray(encoded), labels=jnp.asarray(labels)).loss,
        table,
    )


def test_cached_steps_equal_the_whole():
    _, model, _ = pair("WhisperForConditionalGeneration")
    x, ids = jnp.asarray(features()), jnp.asarray(tokens())
    whole = model(x, decoder_input_ids=ids).logits
    cache = model.model.decoder.start(model.model.encoder(x).last_hidden_state, 12)
    first = model(decoder_input_ids=ids[:, :3], past_key_values=cache)
    logits, cache = [first.logits], first.past_key_values
    for position in range(3, 7):
        out = model(decoder_input_ids=ids[:, position : position + 1], past_key_values=cache, cache_position=position)
        logits.append(out.logits)
        cache = out.past_key_values
    harness.assert_close(jnp.concatenate(logits, axis=1), np.asarray(whole), name="cached logits")


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": [1, 40, 41, 42], "num_return_sequences": 2, "num_beams": 3, "max_new_tokens": 5},
        {
            "eos_token_id": [1, 76, 21, 47],
            "repetition_penalty": 1.5,
            "min_new_tokens": 5,
            "suppress_tokens": [17],
            "begin_suppress_tokens": [37],
            "bad_words_ids": [[70, 84], [31]],
            "sequence_bias": [[[25], -6.0], [[84, 25], 5.0]],
        },
        {
            "eos_token_id": [1, 25, 72, 31],
            "num_beams": 3,
            "length_penalty": 2.0,
            "early_stopping": True,
            "no_repeat_ngram_size": 2,
            "min_length": 9,
            "forced_eos_token_id": 1,
        },
    ],
    ids=["five tokens", "greedy", "beams"],
)
def test_generate_gives_the_same_tokens(options):
    """The grandparent's `generate`: the plain search, without Whisper's own wrapping of it."""
    reference, model, table = pair("WhisperForConditionalGeneration", seed=7)
    with torch.no_grad():  # sharper logits, so that the search has something to decide
        reference.model.decoder.layer_norm.weight.mul_(6.0)
    harness.port(reference, model, table)
    x, prompt = features(4), np.array([[2, 11]] * 4)

    def theirs(**chosen):
        given = {"decoder_input_ids": torch.tensor(prompt), "pad_token_id": 0, "do_sample": False}
        chosen = {"max_new_tokens": 12} | chosen
        return transformers.GenerationMixin.generate(reference, torch.tensor(x), **given, **chosen)

    def ours(**chosen):
        given = {"decoder_input_ids": prompt, "pad_token_id": 0, "return_dict_in_generate": True}
        return model.generate(jnp.asarray(x), **given, **({"max_new_tokens": 12} | chosen)).sequences

    generation.compare(theirs, ours, 2, options)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3, "suppress_tokens": [5, 7]},
    ],
    ids=str,
)
def test_prompt_lookup_gives_the_same_tokens(options, monkeypatch):
    """One example at a time, as the original has it; the prompt repeats itself, and few tokens repeat often.

    Where nothing matches, the original drafts nothing and we draft anything, so ours takes no more rounds.
    """
    reference, model, _ = pair("WhisperForConditionalGeneration", seed=7, vocab_size=13, max_target_positions=48)
    x, prompt = features(4), np.array([[2, 11, 5, 7, 2, 11]])
    options = {"max_new_tokens": 40, "eos_token_id": 1, "pad_token_id": 0} | options
    fed = []
    forward = type(reference).forward

    def watched(self, *arguments, **given):
        fed.append(given["decoder_input_ids"].shape[1])
        return forward(self, *arguments, **given)

    monkeypatch.setattr(type(reference), "forward", watched)
    accepted = 0
    for row in range(len(x)):
        fed.clear()
        theirs = transformers.GenerationMixin.generate(
            reference,
            torch.tensor(x[row : row + 1]),
            decoder_input_ids=torch.tensor(prompt),
            do_sample=False,
            **options,
        )
        ours = model.generate(
            jnp.asarray(x[row : row + 1]), decoder_input_ids=prompt, return_dict_in_generate=True, **options
        )
        np.testing.assert_array_equal(ours.sequences, theirs)
        assert int(ours.rounds) + 1 <= len(fed)
        assert max(fed[1:]) == 1 + options["prompt_lookup_num_tokens"]
        accepted += int(ours.accepted)
    assert accepted > 20


def test_mutations_are_noticed(monkeypatch):
    reference, model, _ = pair("WhisperForConditionalGeneration")
    x, ids = features(), tokens()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), decoder_input_ids=torch.tensor(ids))

    def check():
        harness.compare_outputs(model(jnp.asarray(x), decoder_input_ids=jnp.asarray(ids)), theirs)

    mutations = [
        *harness.perturbations(model, count=4),
        harness.dropped(model, "model.decoder.layers.1.encoder_attn.v_proj.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
    ]
    assert harness.assert_detects(check, mutations) == 6


SIZES = {
    "tiny": {"d_model": 384, "encoder_layers": 4, "heads": 6},
    "base": {"d_model": 512, "encoder_layers": 6, "heads": 8},
    "small": {"d_model": 768, "encoder_layers": 12, "heads": 12},
    "medium": {"d_model": 1024, "encoder_layers": 24, "heads": 16},
    "large": {"d_model": 1280, "encoder_layers": 32, "heads": 20},
}


def published(name: str) -> transformers.WhisperConfig:
    """The configuration of a released checkpoint, from the sizes in the paper's Table 1 and the model cards."""
    english, base = name.endswith("_en"), name.removesuffix("_en").removeprefix("distil_")
    size = SIZES[base.split("_")[0]]
    layers = size["encoder_layers"]
    decoder = {"distil_small_en": 4, "large_v3_turbo": 4}.get(name, 2 if name.startswith("distil") else layers)
    v3 = "v3" in name
    return transformers.WhisperConfig(
        vocab_size=51864 if english else 51866 if v3 else 51865,
        num_mel_bins=128 if v3 else 80,
        d_model=size["d_model"],
        encoder_layers=layers,
        decoder_layers=decoder,
        encoder_attention_heads=size["heads"],
        decoder_attention_heads=size["heads"],
        encoder_ffn_dim=4 * size["d_model"],
        decoder_ffn_dim=4 * size["d_model"],
    )


PARAMETERS = {
    "tiny": 37_760_640,
    "base": 72_593_920,
    "small": 241_734_912,
    "medium": 763_857_920,
    "large_v3_turbo": 808_878_080,
}


@pytest.mark.parametrize(
    "name",
    [
        *(size + english for size in ("tiny", "base", "small", "medium") for english in ("", "_en")),
        *("large", "large_v2", "large_v3", "large_v3_turbo"),
        *("distil_small_en", "distil_medium_en", "distil_large_v2", "distil_large_v3"),
    ],
)
def test_published_sizes(name):
    config = getattr(whisper.WhisperConfig, name)()
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.WhisperForConditionalGeneration(published(name)),
            lambda: whisper.WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, "WhisperForConditionalGeneration"),
        )
    assert count == PARAMETERS.get(name, count)


@pytest.mark.parametrize("name", ["tiny", "base", "small"])
def test_full_size_in_float32(name):
    with harness.precision("float32"):
        reference = harness.randomise(transformers.WhisperForConditionalGeneration(published(name)), 0, torch.float32)
        config = getattr(whisper.WhisperConfig, name)()
        table = hugging_face_table(config, "WhisperForConditionalGeneration")
        create = lambda: whisper.WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0))  # noqa: E731
        model = harness.ported(reference, create, table)
        x = np.random.default_rng(0).standard_normal((1, 80, 3000)).astype(np.float32)
        ids = np.random.default_rng(1).integers(0, 50_000, (1, 12))
        with torch.no_grad():
            theirs = reference(torch.tensor(x), decoder_input_ids=torch.tensor(ids))
        graphdef, state = nnx.split(model)
        ours = jax.jit(lambda state: nnx.merge(graphdef, state)(x, decoder_input_ids=ids))(state)
        harness.compare_outputs(ours, theirs)


# --- OpenAI's own ----------------------------------------------------------------------------------------------------


def test_openai_model_through_its_own_names():
    openai = pytest.importorskip("whisper", reason="openai-whisper is part of the extra `reference`")
    dims = {
        "n_mels": 20,
        "n_vocab": 51865,
        "n_audio_ctx": 25,
        "n_audio_state": 24,
        "n_audio_head": 3,
        "n_audio_layer": 2,
        "n_text_ctx": 20,
        "n_text_state": 24,
        "n_text_head": 4,
        "n_text_layer": 3,
    }
    with harness.precision("float32"):
        reference = openai.model.Whisper(openai.model.ModelDimensions(**dims))
        reference = harness.randomise(reference, 3, torch.float32)
        config = config_from_openai(dims)
        create = lambda: whisper.WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0))  # noqa: E731
        model = harness.ported(reference, create, OPENAI_TABLE)
        x, ids = features().astype(np.float32), tokens()
        with torch.no_grad():
            theirs = reference(torch.tensor(x), torch.tensor(ids))
        # LayerNorm and softmax are float32 inside the original whatever its weights are.
        ours = model(jnp.asarray(x), decoder_input_ids=jnp.asarray(ids)).logits
        harness.assert_close(ours, theirs, name="logits")


def test_the_files_of_the_original_and_their_alignment_heads():
    """Each is listed, and words are timed by the heads that its name stands for there."""
    openai = pytest.importorskip("whisper", reason="openai-whisper is part of the extra `reference`")
    sizes = {listed.checkpoint: listed.size for listed in audiozoo.list_models("whisper")}
    for name in {url.rsplit("/")[-1] for url in openai._MODELS.values()}:
        config = getattr(whisper.WhisperConfig, sizes[name])()
        packed = base64.b85decode(openai._ALIGNMENT_HEADS[name.removesuffix(".pt")])
        heads = np.frombuffer(gzip.decompress(packed), bool).reshape(config.decoder_layers, -1)
        assert conversion._alignment_heads(config, name) == tuple(map(tuple, np.argwhere(heads).tolist())), name


def test_bfloat16_stays_close():
    _, model, _ = pair("WhisperForConditionalGeneration")
    x, ids = jnp.asarray(features()), jnp.asarray(tokens())
    whole = model(x, decoder_input_ids=ids).logits
    kwargs = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    half = harness.blank(lambda: whisper.WhisperForConditionalGeneration(model.config, **kwargs, rngs=nnx.Rngs(0)))
    harness.assign(half, harness.parameters(model))
    ours = half(x, decoder_input_ids=ids).logits
    assert ours.dtype == jnp.bfloat16
    harness.assert_close(ours, np.asarray(whole, np.float32), name="bfloat16 logits")


def test_dropouts():
    reference, model, _ = pair("WhisperForConditionalGeneration", **harness.rates(transformers.WhisperConfig()))
    harness.compare_in_training(reference, model, {"input_features": features(), "decoder_input_ids": tokens()})
