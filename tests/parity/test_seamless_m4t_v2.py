"""SeamlessM4T v2 against `transformers` in float64: text to units, the five directions, files; tokens exactly."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as theirs_v2

import audiozoo
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.models import seamless_m4t_v2
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Config, characters
from tests.parity import harness
from tests.parity.seamless_family import (
    LANGUAGES,
    exact_positions,
    jaxed,
    speech,
    targets,
    text,
    torched,
    vocoder_state,
    write_pieces,
)
from tests.parity.seamless_family import TINY as SHARED
from tests.seamless_names import FAIRSEQ_SPEECH, W2V, fairseq2_names
from weights_conversion import seamless_m4t as first
from weights_conversion import seamless_m4t_v2 as conversion
from weights_conversion.seamless_m4t_v2 import (
    config_from_hugging_face,
    generation_from_hugging_face,
    hugging_face_table,
    t2u_table,
)

TINY = SHARED | {
    "char_vocab_size": 34,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "t2u_decoder_layers": 2,
    "t2u_variance_predictor_embed_dim": 16,
    "t2u_variance_predictor_hidden_dim": 12,
}
LETTERS = "▁abcdefghijklmnopqrstuvwxyzäöü"
CHARACTERS = {letter: i for i, letter in enumerate(LETTERS, start=4)}


def _texts() -> dict[str, str]:
    """A text for every token: words with and without a space in front, letters, marks, and characters unknown."""
    rng = np.random.default_rng(0)
    texts = {"0": "<pad>", "1": "<unk>", "2": "<s>", "3": "</s>", "4": ".", "5": ",", "6": "▁", "7": "▁ß", "8": "7"}
    for i in range(9, 60):
        word = "".join(rng.choice(list(LETTERS[1:]), rng.integers(1, 4)))
        texts[str(i)] = ("▁" if i % 2 else "") + word
    return texts


TABLES: dict[str, Any] = LANGUAGES | {"char_to_id": CHARACTERS, "id_to_text": _texts()}


@pytest.fixture(scope="module", autouse=True)
def _exact_positions():
    with exact_positions():
        yield


def their_config(**changes):
    # In "eager" the Conformer's attention adds its mask of truth values to the scores: ones, where nothing is 0.
    return transformers.SeamlessM4Tv2Config(**(TINY | changes), attn_implementation="sdpa")


def spread(reference):
    """Durations of several frames, and control symbols that are never the likeliest unit, which have no sound."""
    with torch.no_grad():
        for predictor in (reference.t2u_model.model.decoder.duration_predictor, reference.vocoder.dur_predictor):
            predictor.proj.bias += 0.8
            predictor.proj.weight *= 1.5
        reference.t2u_model.lm_head.weight[[0, 1, 2, 3]] = 0
    return reference


def build(name: str = "SeamlessM4Tv2Model", seed: int = 0, dtype=None, **changes):
    reference = harness.randomise(getattr(transformers, name)(their_config(**changes)), seed, dtype)
    if hasattr(reference, "vocoder"):
        spread(reference)
    for table, values in TABLES.items():
        setattr(reference.generation_config, table, values)
    reference.generation_config.max_new_tokens = 9
    config = config_from_hugging_face(reference.config.to_dict())
    table = hugging_face_table(config, name)
    param = jnp.dtype(str(next(reference.parameters()).dtype).removeprefix("torch."))
    cls = getattr(seamless_m4t_v2, name)
    model = harness.ported(reference, lambda: cls(config, param_dtype=param, rngs=nnx.Rngs(0)), table)
    model.generation_config = generation_from_hugging_face(TABLES, {"max_new_tokens": 9}, "")
    return reference, model, table


@pytest.fixture(scope="module")
def whole():
    return build()


# --- the text side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [text, speech])
def test_every_tap_and_output(whole, source):
    reference, model, table = whole
    x, everything = source() | targets(), {"output_hidden_states": True, "output_attentions": source is text}
    reference.set_attn_implementation("eager" if source is text else "sdpa")
    skip = {
        r"lm_head|t2u_model.*|vocoder.*": "the head is the embedding here; the rest is not part of the call",
        r".*\.distance_embedding": "read as a table, not called",
        r"text_.*\.embed_tokens": "one table here, which encoder and decoder share",
        r"speech_encoder.*" if source is text else r"text_encoder.*": "not part of this call",
    }
    taps = harness.compare_taps(
        reference,
        lambda: reference(**torched(x), **everything),
        model,
        lambda: model(**jaxed(x), **everything),
        table,
        minimum=20,
        skip=skip,
        compiled=True,
    )
    reference.set_attn_implementation("sdpa")
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert {"output.logits", "output.encoder_last_hidden_state", "output.decoder_hidden_states[2]"} <= set(compared)
    assert ("output.cross_attentions[1]" in compared) == (source is text)


@pytest.mark.parametrize("source", [text, speech])
def test_loss_and_every_gradient(whole, source):
    reference, model, table = whole
    x, labels = source(), targets()["decoder_input_ids"]
    labels[0, 5] = -100
    smoothing = 0.2

    def theirs():
        logits = reference(**torched(x), labels=torch.tensor(labels)).logits
        flat = torch.tensor(labels).view(-1)
        return torch.nn.functional.cross_entropy(logits.view(len(flat), -1), flat, label_smoothing=smoothing)

    def ours(m):
        return m(**jaxed(x), labels=jnp.asarray(labels), label_smoothing=smoothing).loss

    for p in reference.parameters():
        p.requires_grad_(True)
    compared = harness.compare_gradients(reference, theirs, model, jax.jit(ours), table)
    assert "text_decoder.embed_tokens.embedding" in compared
    with torch.no_grad():
        plain = reference(**torched(x), labels=torch.tensor(labels)).loss
    harness.assert_close(model(**jaxed(x), labels=jnp.asarray(labels)).loss, plain, name="loss")


# --- text to units ---------------------------------------------------------------------------------------------------


def t2u_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    counts = np.array([[0, 2, 1, 3, 0], [0, 1, 2, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    ids = rng.integers(4, 34, (2, 6))
    ids[1, 3:] = 0
    return {
        "inputs_embeds": rng.standard_normal((2, 5, 16)),
        "char_input_ids": ids,
        "char_count_per_id": counts,
        "attention_mask": mask,
    }


def test_text_to_units(whole):
    reference, model, _ = whole
    reference, model, table = reference.t2u_model, model.t2u_model, t2u_table()
    reference.set_attn_implementation("eager")
    x, everything = t2u_inputs(), {"output_attentions": True, "output_hidden_states": True}
    taps = harness.compare_taps(
        reference,
        lambda: reference(**torched(x), **everything),
        model,
        lambda: model(**jaxed(x), **everything),
        table,
        minimum=25,
        skip={"lm_head": "a product with the table here", r"model(\.decoder)?": "two halves here"},
    )
    reference.set_attn_implementation("sdpa")
    compared = harness.compare_outputs(
        dataclasses.replace(taps.ours, padding_mask=taps.ours.padding_mask.astype(float)), taps.reference
    )
    assert {"output.last_hidden_state", "output.padding_mask", "output.decoder_attentions[1]"} <= set(compared)
    lengths = np.asarray(taps.ours.padding_mask).sum(axis=1)
    assert lengths[0] > 6  # more units than characters
    assert lengths[1] > 3
    assert lengths[0] != lengths[1]
    harness.assert_detects(
        lambda: harness.assert_close(model(**jaxed(x)).last_hidden_state, taps.reference.last_hidden_state),
        [
            harness.dropped(model, "model.decoder.pos_emb_alpha"),
            harness.dropped(model, "model.decoder.pos_emb_alpha_char"),
            *harness.perturbations(model, 2, exclude=r".*(duration_predictor|k_proj\.bias).*"),
        ],
    )
    # A batch's units are those of its items.
    alone = model(**{name: jnp.asarray(array[1:, : {"char_input_ids": 3}.get(name, 4)]) for name, array in x.items()})
    together = taps.ours.last_hidden_state[1, : lengths[1]]
    harness.assert_close(together, np.asarray(alone.last_hidden_state[0]), name="the second item alone")


def test_text_to_unit_loss_and_gradients(whole):
    """With durations given, cross-entropy of the units and squared error of the log-durations."""
    reference, model, _ = whole
    reference, model = reference.t2u_model, model.t2u_model
    x = t2u_inputs()
    durations = np.array([[2, 1, 3, 1, 2, 1], [1, 2, 2, 0, 0, 0]])
    labels = np.random.default_rng(5).integers(4, 30, (2, 10))
    labels[1, 5:] = -100

    def theirs():
        decoder, told = reference.model.decoder, []

        def hook(module, inputs, output):
            told.append(output)
            return torch.log1p(torch.tensor(durations, dtype=output.dtype))

        handle = decoder.duration_predictor.register_forward_hook(hook)
        try:
            loss = reference(**torched(x), labels=torch.tensor(labels)).loss
        finally:
            handle.remove()
        mask = torch.tensor(durations > 0)
        wanted = torch.log1p(torch.tensor(durations, dtype=told[0].dtype))
        return loss + 0.5 * torch.nn.functional.mse_loss(told[0][mask], wanted[mask])

    def ours(m):
        return m(**jaxed(x), durations=jnp.asarray(durations), labels=jnp.asarray(labels), duration_weight=0.5).loss

    compared = harness.compare_gradients(reference, theirs, model, jax.jit(ours), t2u_table())
    assert {"model.decoder.duration_predictor.proj.kernel", "model.decoder.embed_char.embedding"} <= set(compared)
    with pytest.raises(UsageError, match="frames must be given"):
        jax.jit(lambda m: m(**jaxed(x)).last_hidden_state)(model)


def test_characters_are_equal(whole):
    reference, _, _ = whole
    rng = np.random.default_rng(6)
    seen = set()
    for _ in range(60):
        ids = rng.choice([1, 4, 4, 5, 6, 7, 8, *range(9, 60)], (3, 8))
        for row, length in enumerate(rng.integers(1, 9, 3)):
            ids[row, length:] = 0
        words = reference._indices_to_subwords(torch.tensor(ids))
        counts = reference._count_character_length_in_subword(torch.tensor(ids), words)
        chars = reference._get_char_input_ids(torch.tensor(ids), words, counts)
        ours, our_counts = characters(ids, {int(k): v for k, v in TABLES["id_to_text"].items()}, CHARACTERS)
        np.testing.assert_array_equal(our_counts, counts)
        np.testing.assert_array_equal(ours, chars)
        seen |= set(our_counts.ravel().tolist())
    assert {0, 1, 2, 3, 4} <= seen
    # A subword that has no text: one unknown character, where the original spells None.
    ids = np.array([[9, 99, 10]])
    _, counts = characters(ids, {9: "ab", 10: "c"}, CHARACTERS)
    reference.generation_config.id_to_text = {"9": "ab", "10": "c"}
    words = reference._indices_to_subwords(torch.tensor(ids))
    reference.generation_config.id_to_text = TABLES["id_to_text"]
    assert words[0][1] == "None"
    assert counts.tolist() == [[2, 1, 1]]
    empty, counts = characters(np.zeros((2, 0), int), {}, {})
    assert empty.shape == counts.shape == (2, 0)


# --- the five directions ---------------------------------------------------------------------------------------------


def arguments(x):
    return torched(x), jaxed(x)


@pytest.mark.parametrize("source", [text, speech])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 0.7}], ids=["greedy", "beams"])
def test_texts_are_equal(whole, source, options):
    reference, model, _ = whole
    theirs, ours = arguments(source(1))
    wanted = reference.generate(**theirs, tgt_lang="spa", generate_speech=False, **options).sequences
    found = model.generate(**ours, tgt_lang="__spa__", generate_speech=False, **options)
    np.testing.assert_array_equal(found.sequences, wanted)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (text, {}),
        (speech, {}),
        (speech, {"num_beams": 2, "num_return_sequences": 2}),
        (text, {"text_num_beams": 2, "text_max_new_tokens": 7}),
    ],
    ids=["text", "speech", "beams", "prefixes"],
)
def test_speech_is_equal(whole, source, options):
    """Tokens and units of the batch exactly; each waveform as the original's vocoder makes it of that item alone."""
    reference, model, _ = whole
    theirs, ours = arguments(source(2))
    options = {"tgt_lang": "spa", "speaker_id": 3, "return_intermediate_token_ids": True, **options}
    masks = []
    handle = reference.t2u_model.register_forward_hook(lambda module, given, output: masks.append(output.padding_mask))
    wanted = reference.generate(**theirs, **options)
    handle.remove()
    found = model.generate(**ours, **options)
    np.testing.assert_array_equal(found.sequences, wanted.sequences)
    np.testing.assert_array_equal(found.unit_sequences, wanted.unit_sequences)
    assert len(found.waveform) == len(wanted.sequences)
    for row, count in enumerate(masks[0].sum(dim=1).int().tolist()):
        with torch.no_grad():
            ids = wanted.unit_sequences[row : row + 1, :count] - 4
            alone, _ = reference.vocoder(ids, speaker_id=torch.tensor([[3]]), lang_id=torch.tensor([[2]]))
        length = found.waveform_lengths[row]
        harness.assert_close(found.waveform[row, :length], alone[0], name=f"waveform {row}")
        assert not found.waveform[row, length:].any()
    longest = int(np.argmax(found.waveform_lengths))
    assert found.waveform_lengths[longest] == found.waveform.shape[1]


def test_one_text_is_spoken_equally(whole):
    reference, model, _ = whole
    one = {name: array[:1] for name, array in text(3).items()}
    theirs, ours = arguments(one)
    wanted, _ = reference.generate(**theirs, tgt_lang="eng")
    found, lengths = model.generate(**ours, tgt_lang="eng")
    harness.assert_close(found, wanted, name="waveform")
    assert lengths[0] == wanted.shape[1]
    # As the authors' pipeline has it: no second prediction of durations.
    short = model.generate(**ours, tgt_lang="eng", dur_prediction=False, return_intermediate_token_ids=True)
    assert short.waveform.shape == (1, 10 * short.unit_sequences.shape[1])


@pytest.mark.parametrize("name", ["ForTextToText", "ForSpeechToText", "ForTextToSpeech", "ForSpeechToSpeech"])
def test_each_class(name):
    source = speech(2) if "ForSpeech" in name else text(2)
    reference, ours, _ = build("SeamlessM4Tv2" + name)
    spoken = name.endswith("Speech")
    theirs, mine = arguments(source)
    if spoken:
        wanted = reference.generate(**theirs, tgt_lang="eng", return_intermediate_token_ids=True)
        found = ours.generate(**mine, tgt_lang="eng", return_intermediate_token_ids=True)
        np.testing.assert_array_equal(found.unit_sequences, wanted.unit_sequences)
        np.testing.assert_array_equal(found.sequences, wanted.sequences)
    else:
        np.testing.assert_array_equal(
            ours.generate(**mine, tgt_lang="eng"), reference.generate(**theirs, tgt_lang="eng")
        )
    with torch.no_grad():
        logits = reference(**theirs, **torched(targets())).logits
    harness.assert_close(audiozoo.jit(ours)(**mine, **jaxed(targets())).logits, logits, name="logits")


def test_units_can_be_drawn(whole):
    _, model, _ = whole
    _, ours = arguments(text(3))
    options = {"tgt_lang": "spa", "return_intermediate_token_ids": True}
    greedy = model.generate(**ours, **options)
    drawn = model.generate(**ours, **options, speech_do_sample=True, speech_temperature=0.5, key=jax.random.key(0))
    np.testing.assert_array_equal(greedy.sequences, drawn.sequences)
    assert greedy.unit_sequences.shape == drawn.unit_sequences.shape
    assert (greedy.unit_sequences != drawn.unit_sequences).any()
    cold = model.generate(**ours, **options, speech_do_sample=True, speech_temperature=1e-6, key=jax.random.key(0))
    np.testing.assert_array_equal(greedy.unit_sequences, cold.unit_sequences)


def test_mistakes_get_a_sentence(whole):
    _, model, _ = whole
    _, ours = arguments(text())
    for call, message in (
        (lambda: model.generate(**ours), "needs tgt_lang"),
        (lambda: model.generate(**ours, generate_speech=False), "into which language"),
        (lambda: model.generate(**ours, tgt_lang="deu"), "does not speak 'deu'; it has eng, spa"),
        (lambda: model.generate(tgt_lang="eng"), "input_features"),
        (lambda: model.generate(input_ids=np.zeros((1, 0), int), tgt_lang="eng"), "is empty"),
        (lambda: model.generate(**ours, tgt_lang="eng", speaker_id=9), "no speaker 9"),
        (lambda: model.generate(**ours, tgt_lang="eng", do_sample=True, temperature=0.5), "give a key"),
        (lambda: model.generate(**ours, tgt_lang="eng", num_beans=3), "num_beams"),
        (lambda: model(**ours), "decoder_input_ids or labels"),
        (lambda: model(decoder_input_ids=jnp.zeros((1, 2), int)), "input_features"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


# --- files -----------------------------------------------------------------------------------------------------------


def test_directories_there_and_back(tmp_path):
    with harness.precision("float32"):
        reference, _, _ = build(dtype=torch.float32)
        reference.save_pretrained(tmp_path / "theirs")
        model = audiozoo.load(tmp_path / "theirs")
        assert dict(model.generation_config.char_to_id) == CHARACTERS
        assert dict(model.generation_config.options) == {"max_new_tokens": 9}
        x = text() | targets()
        with torch.no_grad():
            theirs = reference(**torched(x)).logits
        harness.assert_close(audiozoo.jit(model)(**jaxed(x)).logits, theirs, name="logits")
        form = conversion.hugging_face(model)
        written = dict(form.table.write(harness.parameters(model)))
        state = reference.state_dict()
        for name, array in written.items():
            np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)
        tied = {"lm_head.weight", "text_encoder.embed_tokens.weight", "text_decoder.embed_tokens.weight"}
        assert set(state) - set(written) == tied | {"t2u_model.lm_head.weight"}
        back = transformers.SeamlessM4Tv2Config(**form.files["config.json"])
        for name in TINY:
            assert getattr(back, name) == getattr(reference.config, name), name
        assert form.files["generation_config.json"]["id_to_text"] == TABLES["id_to_text"]
        audiozoo.export(model, tmp_path / "ours")
        again, info = transformers.SeamlessM4Tv2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in state.items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert again.generation_config.vocoder_lang_code_to_id == TABLES["vocoder_lang_code_to_id"]
        # A part of the whole, and what is not there.
        less = audiozoo.load(tmp_path / "theirs", model_class="SeamlessM4Tv2ForTextToText")
        harness.assert_close(audiozoo.jit(less)(**jaxed(x)).logits, theirs, name="logits")
        with pytest.raises(CheckpointError, match="no class SeamlessM4Tv2Nothing"):
            conversion.open_checkpoint(tmp_path / "theirs", "SeamlessM4Tv2Nothing")


def fairseq_names(name: str) -> str:
    """A name of fairseq2 as fairseq has it (the authors' `_fairseq_key_map` read backwards)."""
    pairs = (
        *FAIRSEQ_SPEECH,
        (r"^speech_encoder\.adaptor_layers\.(\d+)\.ffn\.inner_proj", r"encoder.adaptor.layers.\1.fc1"),
        (r"^speech_encoder\.adaptor_layers\.(\d+)\.ffn\.output_proj", r"encoder.adaptor.layers.\1.fc2"),
        (r"^speech_encoder\.adaptor_layers\.(\d+)\.ffn_layer_norm", r"encoder.adaptor.layers.\1.final_layer_norm"),
        (r"^speech_encoder\.adaptor_layers\.(.*)output_proj", r"encoder.adaptor.layers.\1out_proj"),
        (r"^speech_encoder\.adaptor_layers\.", "encoder.adaptor.layers."),
        (
            r"^speech_encoder\.inner\.layers\.(\d+)\.conv\.layer_norm",
            W2V + r"encoder.layers.\1.conv_module.layer_norm2",
        ),
        (r"^speech_encoder\.inner\.layers\.(\d+)\.conv_layer_norm", W2V + r"encoder.layers.\1.conv_module.layer_norm"),
        (r"^speech_encoder\.inner\.layers\.(\d+)\.conv\.", W2V + r"encoder.layers.\1.conv_module."),
        (r"^speech_encoder\.inner\.layers\.(\d+)\.ffn(\d)_layer_norm", W2V + r"encoder.layers.\1.ffn\2.layer_norm"),
        (r"^speech_encoder\.inner\.layers\.(\d+)\.ffn(\d)\.inner_proj", W2V + r"encoder.layers.\1.ffn\2.w_1"),
        (r"^speech_encoder\.inner\.layers\.(\d+)\.ffn(\d)\.output_proj", W2V + r"encoder.layers.\1.ffn\2.w_2"),
        (r"^speech_encoder\.inner\.layers\.(\d+)\.layer_norm", W2V + r"encoder.layers.\1.final_layer_norm"),
        (r"^speech_encoder\.inner\.(.*)sdpa\.rel_k_embed", W2V + r"encoder.\1rel_k_embedding"),
        (r"^speech_encoder\.inner\.(.*)output_proj", W2V + r"encoder.\1out_proj"),
        (r"^speech_encoder\.inner\.", W2V + "encoder."),
        (r"^final_proj", "target_letter_decoder.output_projection"),
        (r"^text_(en|de)coder_frontend\.embed", r"text_\1coder.embed_tokens"),
        (r"^t2u_model\.decoder_frontend\.embed_char", "decoder.embed_tokens_text"),
        (r"^t2u_model\.decoder_frontend\.embed", "decoder.embed_tokens_unit"),
        (r"^t2u_model\.decoder_frontend\.variance_adaptor", "decoder.var_adaptor"),
        (r"^t2u_model\.decoder_frontend\.pos_emb_alpha_char", "decoder.char_upsampler.pos_emb_alpha"),
        (r"^t2u_model\.decoder_frontend\.pos_emb_alpha", "decoder.dec_pos_emb_alpha"),
        (r"^t2u_model\.final_proj", "decoder.output_projection"),
        (r"^t2u_model\.decoder\.layers\.(\d+)\.conv1d\.conv1", r"decoder.layers.\1.ffn.ffn.0"),
        (r"^t2u_model\.decoder\.layers\.(\d+)\.conv1d\.conv2", r"decoder.layers.\1.ffn.ffn.2"),
        (r"^t2u_model\.decoder\.layers\.(\d+)\.conv1d_layer_norm", r"decoder.layers.\1.ffn.layer_norm"),
        (r"^t2u_model\.decoder\.layers\.(\d+)\.self_attn_layer_norm", r"decoder.layers.\1.layer_norm"),
        (r"^t2u_model\.decoder\.", "decoder."),
        (r"^t2u_model\.encoder\.", "synthesizer_encoder."),
        (r"ffn\.inner_proj", "fc1"),
        (r"(?<!var_adaptor\.)ffn\.output_proj", "fc2"),
        (r"ffn_layer_norm", "final_layer_norm"),
        (r"encoder_decoder_attn", "encoder_attn"),
        (r"self_attn\.output_proj", "self_attn.out_proj"),
        (r"encoder_attn\.output_proj", "encoder_attn.out_proj"),
        (r"^text_decoder\.", "target_letter_decoder."),
    )
    if name.startswith("speech_encoder"):
        pairs = tuple(p for p in pairs if p[0].startswith("^speech"))
        for pattern, new in pairs:
            if re.search(pattern, name):
                return re.sub(pattern, new, name)
    for pattern, new in pairs:
        name = re.sub(pattern, new, name)
    return name


def test_the_authors_files(tmp_path, whole, monkeypatch):
    """The same random weights under fairseq2's and under fairseq's names, the latter with their tables in its order."""
    reference, model, _ = whole
    state = {n: t.clone() for n, t in reference.state_dict().items()}
    fairseq2 = {new: t for n, t in state.items() if (new := fairseq2_names(n)) is not None}
    (tmp_path / "two").mkdir()
    torch.save({"model": fairseq2}, tmp_path / "two" / "seamlessM4T_v2_large.pt")
    letters = ["<pad>", "<unk>", "<s>", "</s>", *LETTERS]
    order = conversion.character_order(letters)
    assert order[:4] == [0, 1, 2, 3]
    assert sorted(order) == list(range(34))
    assert order != sorted(order)
    fairseq = {fairseq_names(n): t for n, t in fairseq2.items()}
    assert len(fairseq) == len(fairseq2)
    tokens, chars = state["shared.weight"].clone(), state["t2u_model.model.decoder.embed_char.weight"].clone()
    tokens[[1, 3, 0, 2]] = state["shared.weight"][:4]
    chars[order] = state["t2u_model.model.decoder.embed_char.weight"]
    for name in ("target_letter_decoder.output_projection", "text_encoder.embed_tokens"):
        fairseq[f"{name}.weight"] = tokens
    fairseq["target_letter_decoder.embed_tokens.weight"] = fairseq.pop("text_decoder.embed_tokens.weight", tokens)
    fairseq["target_letter_decoder.embed_tokens.weight"] = tokens
    fairseq["decoder.embed_tokens_text.weight"] = chars
    fairseq["decoder.alignment_encoder.proj.weight"] = torch.zeros(2, 2)
    fairseq["target_letter_decoder.version"] = torch.zeros(1)
    (tmp_path / "one").mkdir()
    torch.save({"model": fairseq}, tmp_path / "one" / "seamlessM4T_v2_large.pt")
    monkeypatch.setattr(conversion, "character_pieces", lambda directory: letters)
    ours = harness.parameters(model)
    for name in ("one", "two"):
        path = tmp_path / name / "seamlessM4T_v2_large.pt"
        assert conversion.recognise(path)
        foreign = conversion.open_checkpoint(path, "SeamlessM4Tv2ForSpeechToText")
        config = foreign.config
        assert config.left_max_position_embeddings + config.right_max_position_embeddings == 6
        for field in ("hidden_size", "vocab_size", "char_vocab_size", "t2u_decoder_layers", "decoder_ffn_dim"):
            assert getattr(config, field) == TINY[field], field
        assert config.adaptor_kernel_size == 4
        expected = {n: v for n, v in ours.items() if not n.startswith(("vocoder", "text_encoder", "t2u"))}
        values = dict(foreign.table.read(foreign.tensors, foreign.table.plan(foreign.tensors, expected)))
        for n, v in values.items():
            np.testing.assert_array_equal(v, ours[n], err_msg=n)
        with pytest.raises(SourceError, match=r"put vocoder_v2\.pt beside"):
            conversion.open_checkpoint(path)
        # Beside the vocoder it is whole.
        voice = {n.removeprefix("vocoder."): t for n, t in state.items() if n.startswith("vocoder.")}
        torch.save({"generator": vocoder_state(voice)}, tmp_path / name / "vocoder_v2.pt")
        foreign = conversion.open_checkpoint(path)
        assert foreign.config.vocoder.weight_norm
        sizes = dataclasses.replace(
            foreign.config.vocoder,
            **{n: TINY[n] for n in TINY if n.startswith(("upsample_r", "upsample_k", "resblock"))},
        )
        config = dataclasses.replace(foreign.config, vocoder=sizes)
        table = conversion.original_table(config, "SeamlessM4Tv2Model", letters if name == "one" else None)
        blank = harness.abstract(lambda c=config: seamless_m4t_v2.SeamlessM4Tv2Model(c, rngs=nnx.Rngs(0)))
        wanted = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(blank))}
        values = dict(table.read(foreign.tensors, table.plan(foreign.tensors, wanted)))
        assert set(values) == set(wanted)
        for n in ("t2u_model.model.decoder.embed_char.embedding", "text_decoder.embed_tokens.embedding"):
            np.testing.assert_array_equal(values[n], ours[n], err_msg=n)
        exported = dict(conversion.hugging_face(blank).table.write(values))
        for n in ("vocoder.hifi_gan.conv_pre.weight", "vocoder.hifi_gan.upsampler.1.weight"):
            np.testing.assert_allclose(exported[n], state[n].numpy(), rtol=1e-12, err_msg=n)
    # With the authors' tokenizers beside it, it knows its languages and how to spell.
    monkeypatch.setitem(first.TEXT_LANGUAGES, TINY["vocab_size"], "eng spa")
    assert not conversion.open_checkpoint(path).attributes["generation_config"].char_to_id
    write_pieces(path.parent / "tokenizer.model")
    (path.parent / conversion.CHARACTERS).touch()
    tables = conversion.open_checkpoint(path).attributes["generation_config"]
    assert dict(tables.char_to_id) == {letter: i for i, letter in enumerate(letters)}
    tokenizer = audiozoo.load_processor(path).tokenizer
    spelling, ids = dict(tables.id_to_text), tokenizer("abc de")["input_ids"][0]
    assert "".join(spelling[int(i)] for i in ids) == "__eng__▁abc▁de</s>"
    assert tables.text_language("eng") == ids[0]


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_published_size():
    config = SeamlessM4Tv2Config.large()
    with harness.precision("float32"):
        assert config_from_hugging_face(transformers.SeamlessM4Tv2Config().to_dict()) == config
        count = harness.assert_same_shapes(
            lambda: transformers.SeamlessM4Tv2Model(transformers.SeamlessM4Tv2Config()),
            lambda: seamless_m4t_v2.SeamlessM4Tv2Model(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, "SeamlessM4Tv2Model"),
        )
    assert round(count / 1e6) == 2309


def test_published_widths_in_float32():
    """One layer of each stack, text to units and units to a waveform as wide as they are."""
    with harness.precision("float32"):
        shallow = {"t2u_encoder_layers": 1, "t2u_decoder_layers": 1}
        theirs = transformers.SeamlessM4Tv2Config(**shallow, attn_implementation="sdpa")
        config = config_from_hugging_face(theirs.to_dict())
        rng = np.random.default_rng(0)
        reference = harness.randomise(theirs_v2.SeamlessM4Tv2TextToUnitForConditionalGeneration(theirs), 0)
        cls = seamless_m4t_v2.SeamlessM4Tv2TextToUnitForConditionalGeneration
        model = harness.ported(reference, lambda: cls(config, rngs=nnx.Rngs(0)), t2u_table())
        x = {
            "inputs_embeds": rng.standard_normal((1, 6, 1024)).astype(np.float32),
            "char_input_ids": rng.integers(4, 10_000, (1, 14)),
            "char_count_per_id": np.array([[0, 3, 4, 2, 5, 0]]),
        }
        with torch.no_grad():
            wanted = reference(**torched(x)).last_hidden_state
        harness.assert_close(model(**jaxed(x)).last_hidden_state, wanted, name="logits")
        vocoder = harness.randomise(theirs_v2.SeamlessM4Tv2CodeHifiGan(theirs), 0)
        table = hugging_face_table(config, conversion.VOCODER)
        voice = harness.ported(
            vocoder, lambda: seamless_m4t_v2.SeamlessM4Tv2CodeHifiGan(config, rngs=nnx.Rngs(0)), table
        )
        units = rng.integers(2, 10_000, (1, 12))
        with torch.no_grad():
            waveform, _ = vocoder(torch.tensor(units), torch.tensor([[7]]), torch.tensor([[30]]))
        harness.assert_close(voice.speak(units, 7, 30)[0], waveform, name="waveform")


@pytest.mark.parametrize("source", [text, speech])
def test_dropouts(source):
    """The original drops behind a text block's MLP by the rate that is of its inside, here and in NLLB's code."""
    reference, model, _ = build(
        **harness.rates(transformers.SeamlessM4Tv2Config(), dropout=0.3, activation_dropout=0.3)
    )
    reference.set_attn_implementation("eager")
    inputs = {name: array for name, array in (source() | targets()).items() if not name.endswith("mask")}
    harness.compare_in_training(reference, model, inputs)


def test_dropouts_of_units():
    rates = harness.rates(transformers.SeamlessM4Tv2Config(), dropout=0.3, activation_dropout=0.3)
    reference, model, _ = build(**rates)
    reference.set_attn_implementation("eager")
    with harness.bent_dropouts(), torch.no_grad():
        theirs = reference.t2u_model.train()(**torched(t2u_inputs())).last_hidden_state
        run = jax.jit(lambda m, x, key: m(**x, frames=theirs.shape[1], key=key).last_hidden_state)
        ours = run(model.t2u_model, jaxed(t2u_inputs()), jax.random.key(0))
    harness.assert_close(ours, theirs)
