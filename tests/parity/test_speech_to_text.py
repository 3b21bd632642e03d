"""fairseq S2T against `transformers`: taps, gradients, tokens, padding, sizes and both kinds of files."""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from audiozoo import checkpoints
from audiozoo.layers import fairseq_sinusoids
from audiozoo.loading import convert, variables
from audiozoo.models import speech_to_text
from audiozoo.models.speech_to_text import (
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Speech2TextGenerationConfig,
    Speech2TextModel,
)
from audiozoo.processors import write_json
from tests.parity import generation, harness
from weights_conversion import speech_to_text as conversion
from weights_conversion.readers import write_safetensors

TINY = {
    "vocab_size": 29,
    "input_feat_per_channel": 6,
    "conv_channels": 12,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 40,
    "dropout": 0.0,
}
LENGTHS = (23, 14)
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def their_model(**changes):
    """The original with random weights, and the sinusoids to float64: its own are rounded (`test_positions`)."""
    config = transformers.Speech2TextConfig(**(TINY | changes), attn_implementation="eager")
    reference = harness.randomise(transformers.Speech2TextForConditionalGeneration(config), 0)
    for part in (reference.model.encoder, reference.model.decoder):
        table = part.embed_positions.weights
        exact = fairseq_sinusoids(len(table), config.d_model, padding=config.pad_token_id)
        table.copy_(torch.tensor(exact))
    return reference


def pair(**changes):
    """The original, ours with its weights, and the table between them."""
    reference = their_model(**changes)
    config = conversion.config_from_hugging_face(reference.config.to_dict())
    table = conversion.hugging_face_table(config, "Speech2TextForConditionalGeneration")
    dtype = str(reference.dtype).removeprefix("torch.")
    create = lambda: Speech2TextForConditionalGeneration(config, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    model = harness.ported(reference, create, table)
    model.generation_config = Speech2TextGenerationConfig(1, None, False)
    return reference, model, table


@pytest.fixture(scope="module")
def models():
    return pair()


def padded(lengths=LENGTHS, seed=0):
    """Frames of two recordings, the second padded, and their mask."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(lengths), max(lengths), TINY["input_feat_per_channel"]))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return np.where(mask[..., None] == 1, x, 0), mask


def compiled(model, **static):
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, kwargs: nnx.merge(graphdef, state)(**kwargs, **static))
    return lambda **kwargs: call(state, {k: jnp.asarray(v) for k, v in kwargs.items()})


def theirs(reference, **kwargs):
    with torch.no_grad():
        return reference(**{k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()})


def test_positions():
    """The original's float32 table to the rounding of one angle, at every width and beyond the longest text."""
    kind = transformers.models.speech_to_text.modeling_speech_to_text.Speech2TextSinusoidalPositionalEmbedding
    for width in (25, 256, 1024):
        with harness.precision("float32"):
            table = kind(1500, width, 1).weights.numpy()
        ours = fairseq_sinusoids(1502, width)
        assert np.abs(ours - table).max() < 2e-4  # 2^-24 * 1500 is what one rounding of an angle makes of its sine
        assert np.mean(np.abs(ours - table) > 1e-6) < 0.1
        assert not ours[1].any()


def test_every_tap_and_output(models):
    reference, model, table = models
    x, mask = padded()
    tokens = np.array([[2, 7, 5, 9, 6], [2, 8, 4, 1, 1]])
    known = (tokens != 1).astype(np.int64)
    inputs = {"input_features": x, "attention_mask": mask, "decoder_input_ids": tokens, "decoder_attention_mask": known}
    everything = {"output_attentions": True, "output_hidden_states": True}
    ours = {k: jnp.asarray(v) for k, v in inputs.items()}
    taps = harness.compare_taps(
        reference, lambda: theirs(reference, **inputs, **everything), model, lambda: model(**ours, **everything), table,
        minimum=50, compiled=True,
    )  # fmt: skip
    harness.compare_outputs(taps.ours, taps.reference)

    def check():
        output = jax.jit(lambda m: m(**ours, **everything))(model)
        harness.compare_outputs(output, taps.reference)

    mutations = harness.perturbations(model, 3, exclude=r".*embed_tokens.*|.*k_proj\.bias")
    harness.assert_detects(
        check,
        [*mutations, harness.dropped(model, "model.encoder.conv.conv_layers.1.bias"),
         harness.Replaced(speech_to_text, "fairseq_sinusoids", lambda n, d, **_: fairseq_sinusoids(n + 1, d)[1:])],
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_of_the_loss(models, tied):
    """The plain loss, and with smoothed labels: fairseq's formula written out on the original's logits."""
    reference, model, table = models if tied else pair(tie_word_embeddings=False, encoder_layers=1, decoder_layers=1)
    x, mask = padded()
    labels = np.array([[7, 5, 9, 2], [8, 2, -100, -100]])
    ours = {"input_features": jnp.asarray(x), "attention_mask": jnp.asarray(mask), "labels": jnp.asarray(labels)}

    def smoothed():
        logits = reference(torch.tensor(x), torch.tensor(mask), labels=torch.tensor(labels)).logits
        log_p, kept, epsilon = torch.log_softmax(logits, -1), torch.tensor(labels != -100), 0.1
        on_label = log_p.gather(-1, torch.tensor(np.maximum(labels, 0))[..., None])[..., 0]
        others = log_p.sum(-1) - on_label
        losses = -(1 - epsilon) * on_label - epsilon / (log_p.shape[-1] - 1) * others
        return losses[kept].mean()

    cases = {
        0.0: lambda: reference(torch.tensor(x), torch.tensor(mask), labels=torch.tensor(labels)).loss,
        0.1: smoothed,
    }
    for smoothing, loss in cases.items():
        reference.zero_grad()
        compared = harness.compare_gradients(
            reference, loss, model, jax.jit(lambda m, s=smoothing: m(**ours, label_smoothing=s).loss), table
        )
        assert len(compared) > 40


def test_the_prefix_is_read_but_not_learnt(models):
    _, model, _ = models
    x, mask = padded()
    labels = np.array([[7, 5, 9, 2], [8, 2, -100, -100]])
    inputs = {"input_features": x, "attention_mask": mask}
    whole = compiled(model, ignore_prefix_size=1)(**inputs, labels=labels)
    tokens = np.array([[2, 7, 5, 9], [2, 8, 2, 1]])
    labels[:, 0] = -100
    wanted = compiled(model)(**inputs, decoder_input_ids=tokens, labels=labels)
    assert whole.loss == pytest.approx(float(wanted.loss), abs=1e-12)


def test_generated_tokens(models):
    reference, model, _ = models
    x, mask = padded()
    options = {"num_beams": 5, "early_stopping": True, "num_return_sequences": 2, "max_length": 12}
    with torch.no_grad():
        wanted = reference.generate(torch.tensor(x), attention_mask=torch.tensor(mask), **SPECIAL, **options,
                                    forced_eos_token_id=2)  # fmt: skip
    np.testing.assert_array_equal(model.generate(x, mask, **options), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {
            "eos_token_id": [2, 6, 4, 24],
            "repetition_penalty": 1.3,
            "min_new_tokens": 6,
            "suppress_tokens": [22],
            "begin_suppress_tokens": [13],
            "bad_words_ids": [[28, 28], [8]],
            "sequence_bias": [[[19], -6.0], [[8, 13], 5.0]],
        },
        {
            "eos_token_id": [2, 11, 26, 17],
            "num_beams": 3,
            "length_penalty": 2.0,
            "early_stopping": True,
            "no_repeat_ngram_size": 2,
            "min_length": 9,
            "forced_eos_token_id": 26,
            "forced_bos_token_id": 12,
        },
    ],
    ids=["greedy", "beams"],
)
def test_options_of_generate(options):
    reference, model, table = pair()
    generation.livelier(reference.model.decoder)
    harness.port(reference, model, table)
    x, mask = padded((23, 14, 21, 9))
    given = (torch.tensor(x), torch.tensor(mask))
    generation.compare(
        lambda **chosen: reference.generate(
            given[0], attention_mask=given[1], max_length=14, **(SPECIAL | {"forced_eos_token_id": 2} | chosen)
        ),
        lambda **chosen: model.generate(x, mask, max_length=14, **chosen),
        1,
        options,
    )


def test_padding_in_the_convolutions(models):
    """The original's biases leak from behind an item's end into its last frames; `batch_invariant` keeps them out."""
    reference, model, _ = models
    x, mask = padded()
    alone = theirs(reference.model.encoder, input_features=x[1:, : LENGTHS[1]]).last_hidden_state
    leaking = theirs(reference.model.encoder, input_features=x, attention_mask=mask).last_hidden_state
    encoder, frames = model.model.encoder, alone.shape[1]
    harness.assert_close(compiled(encoder)(input_features=x, attention_mask=mask).last_hidden_state, leaking)
    ours = compiled(encoder, batch_invariant=True)(input_features=x, attention_mask=mask).last_hidden_state
    harness.assert_close(ours[1:, :frames], alone)
    assert np.abs(leaking[1:, :frames] - alone).max() > 1e-2


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_short_recordings(models, length):
    reference, model, _ = models
    x, tokens = padded((length,))[0], np.array([[2, 7]])
    wanted = theirs(reference, input_features=x, decoder_input_ids=tokens).logits
    harness.assert_close(compiled(model)(input_features=x, decoder_input_ids=tokens).logits, wanted)


def test_padding_that_is_not_token_one():
    """Where padding is token 3, the original's encoder loses its positions: it looks for 3 in a mask of 0 and 1."""
    reference, model, _ = pair(pad_token_id=3)
    x, mask = padded()
    wrong = theirs(reference.model.encoder, input_features=x, attention_mask=mask).last_hidden_state
    right, _, _ = pair()
    x_mask = {"input_features": x, "attention_mask": mask}
    wanted = theirs(right.model.encoder, **x_mask).last_hidden_state
    real = np.asarray(model.model.encoder.frame_mask(jnp.asarray(mask), wanted.shape[1]))
    ours = compiled(model.model.encoder)(**x_mask).last_hidden_state
    harness.assert_close(ours[real], wanted.numpy()[real])
    assert np.abs(wrong.numpy()[real] - wanted.numpy()[real]).max() > 1e-2
    # Its decoder counts from there on, and so does ours.
    tokens = np.array([[2, 7, 3, 5], [2, 8, 4, 3]])
    states = {"encoder_hidden_states": wanted.numpy()}
    said = theirs(reference.model.decoder, input_ids=tokens, use_cache=False, **states).last_hidden_state
    harness.assert_close(compiled(model.model.decoder)(input_ids=tokens, **states).last_hidden_state, said)


def test_simultaneous_translation_at_every_step(models):
    """Each token is the original's likeliest after exactly the frames and the tokens that had come by then."""
    reference, model, _ = models
    x = padded((61,), seed=3)[0][0].astype(np.float32)
    pieces = [x[:10], x[10:11], x[11:40], x[40:]]
    written = list(
        speech_to_text.simultaneous(model, pieces, 2, pre_decision_ratio=2, max_new_tokens=9, bucket=64)
    )  # fmt: skip
    text = [2]
    for item in written:
        heard = {"input_features": x[None, : item.frames].astype(np.float64), "decoder_input_ids": np.array([text])}
        assert int(theirs(reference, **heard).logits[0, -1].argmax()) == item.token
        assert item.frames >= min(len(x), (2 + len(text) - 1) * 8)
        text.append(item.token)
    assert written[0].frames == 16
    assert all(a.frames <= b.frames for a, b in itertools.pairwise(written))
    patient = speech_to_text.simultaneous(model, pieces, 100, max_new_tokens=9, bucket=64)
    offline = model.generate(x[None].astype(np.float64), max_new_tokens=9, num_beams=1, forced_eos_token_id=None)
    assert [item.token for item in patient] == offline[0, 1:].tolist()


def test_published_sizes():
    counts = {"small": 29_536_256, "medium": 71_207_936, "large": 267_834_368}
    for name, count in counts.items():
        config = getattr(Speech2TextConfig, name)()
        fields = dataclasses.asdict(config)
        with harness.precision("float32"):
            assert count == harness.assert_same_shapes(
                lambda f=fields: transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig(**f)),
                lambda c=config: Speech2TextForConditionalGeneration(c, rngs=nnx.Rngs(0)),
                conversion.hugging_face_table(config, "Speech2TextForConditionalGeneration"),
            )


def test_full_width_in_float32():
    """S as published but for its depth: widths, heads and vocabulary are whole."""
    with harness.precision("float32"):
        fields = dataclasses.asdict(Speech2TextConfig.small()) | {"encoder_layers": 2, "decoder_layers": 1}
        reference = harness.randomise(
            transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig(**fields)), 0, torch.float32
        )
        config = Speech2TextConfig(**fields)
        table = conversion.hugging_face_table(config, "Speech2TextForConditionalGeneration")
        model = harness.ported(reference, lambda: Speech2TextForConditionalGeneration(config, rngs=nnx.Rngs(0)), table)
        x = np.random.default_rng(0).standard_normal((1, 120, 80)).astype(np.float32)
        tokens = np.array([[2, 500, 7, 9000]])
        wanted = theirs(reference, input_features=x, decoder_input_ids=tokens).logits
        harness.assert_close(compiled(model)(input_features=x, decoder_input_ids=tokens).logits, wanted)


# --- files -----------------------------------------------------------------------------------------------------------


def load(path, model_class=None):
    foreign = conversion.open_checkpoint(path, model_class)
    return convert(foreign, getattr(speech_to_text, foreign.model_class))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hugging_face_directories(tied, tmp_path):
    with harness.precision("float32"):
        reference = their_model(tie_word_embeddings=tied)
        reference.generation_config.update(num_beams=4, max_length=50, length_penalty=0.2, no_repeat_ngram_size=2)
        reference.save_pretrained(tmp_path / "theirs")
        model = load(tmp_path / "theirs")
        rest = (("length_penalty", 0.2), ("no_repeat_ngram_size", 2))
        assert model.generation_config == Speech2TextGenerationConfig(4, 50, False, options=rest)
        form = conversion.hugging_face(model)
        with checkpoints.written_whole(tmp_path / "ours") as folder:
            for file, content in form.files.items():
                write_json(folder / file, content)
            write_safetensors(folder, form.table.write({n: v[...] for n, v in variables(model).items()}))
        kind = transformers.Speech2TextForConditionalGeneration
        back, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for key, tensor in reference.state_dict().items():
            np.testing.assert_array_equal(back.state_dict()[key], tensor, err_msg=key)
        assert (back.generation_config.num_beams, back.generation_config.max_length) == (4, 50)
        assert (back.generation_config.length_penalty, back.generation_config.no_repeat_ngram_size) == (0.2, 2)
        # Hub files of before: a pickle, with both tables of positions and the head; how to search is in config.json.
        old = reference.state_dict() | {
            f"model.{part}.embed_positions.weights": torch.zeros(5, 24) for part in ("encoder", "decoder")
        }
        (tmp_path / "old").mkdir()
        torch.save(old, tmp_path / "old" / "pytorch_model.bin")
        config = reference.config.to_dict() | {"num_beams": 5, "max_length": 200, "early_stopping": True}
        write_json(tmp_path / "old" / "config.json", config)
        older = load(tmp_path / "old")
        assert older.generation_config == Speech2TextGenerationConfig()
        for a, b in zip(jax.tree.leaves(nnx.state(older)), jax.tree.leaves(nnx.state(model)), strict=True):
            np.testing.assert_array_equal(a, b)
        bare = load(tmp_path / "theirs", "Speech2TextModel")
        assert isinstance(bare, Speech2TextModel)
        tokens = np.array([[2, 7, 5]])
        x = padded()[0].astype(np.float32)[:1]
        states = bare(jnp.asarray(x), decoder_input_ids=jnp.asarray(tokens)).last_hidden_state
        harness.assert_close(states, theirs(reference.model, input_features=x, decoder_input_ids=tokens)[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fairseq_files(tied, tmp_path):
    with harness.precision("float32"):
        reference = their_model(tie_word_embeddings=tied)
        state = {}
        for name, tensor in reference.model.state_dict().items():
            name = name.replace("encoder.conv.", "encoder.subsample.")
            state[name.replace("encoder.layers.", "encoder.transformer_layers.")] = tensor
        state["decoder.output_projection.weight"] = reference.lm_head.weight.detach()
        state |= {"decoder.version": torch.tensor([3.0]), "encoder.embed_positions._float_tensor": torch.zeros(1)}
        state |= {"decoder.embed_positions._float_tensor": torch.zeros(1)}
        args = argparse.Namespace(
            arch="s2t_transformer_s", encoder_attention_heads=3, decoder_attention_heads=2, dropout=0.15,
            activation_fn="relu", share_decoder_input_output_embed=tied, max_source_positions=6000,
            max_target_positions=1024, input_channels=1, conv_kernel_sizes="5,5", encoder_normalize_before=True,
        )  # fmt: skip
        path = tmp_path / "librispeech_transformer_s.pt"
        torch.save({"args": args, "model": state}, path)
        assert conversion.recognise(path)
        model = load(path)
        wanted = conversion.config_from_hugging_face(reference.config.to_dict())
        assert model.config == dataclasses.replace(wanted, dropout=0.15)
        x, tokens = padded()[0].astype(np.float32), np.array([[2, 7, 5], [2, 4, 4]])
        logits = compiled(model)(input_features=x, decoder_input_ids=tokens).logits
        harness.assert_close(logits, theirs(reference, input_features=x, decoder_input_ids=tokens).logits)
        assert model.generation_config.num_beams == 5


def test_dropouts():
    reference, model, _ = pair(**harness.rates(transformers.Speech2TextConfig()))
    inputs = {"input_features": padded()[0], "decoder_input_ids": np.array([[2, 7, 5, 9, 6], [2, 8, 4, 3, 5]])}
    harness.compare_in_training(reference, model, inputs)
