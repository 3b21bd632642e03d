"""SeamlessM4T against `transformers` in float64: the five directions, losses, files; tokens and units exactly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.loading import variables
from audiozoo.models import seamless_m4t
from audiozoo.models.seamless_m4t import SeamlessM4TConfig, finetuning_losses, into_text_losses
from tests.parity import generation, harness
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
from tests.seamless_names import fairseq2_names, fairseq_names
from weights_conversion import seamless_m4t as conversion
from weights_conversion.rules import Table

TINY = SHARED | {"t2u_decoder_layers": 1, "t2u_max_new_tokens": 11}


@pytest.fixture(scope="module", autouse=True)
def _exact_positions():
    with exact_positions():
        yield


def build(name: str = "SeamlessM4TModel", seed: int = 0, dtype=None, **changes):
    theirs = transformers.SeamlessM4TConfig(**(TINY | changes), attn_implementation="eager")
    reference = harness.randomise(getattr(transformers, name)(theirs), seed, dtype)
    with torch.no_grad():  # texts and units of several tokens, the units without control symbols, which have no sound
        reference.shared.weight *= 2
        if hasattr(reference, "vocoder"):
            reference.vocoder.dur_predictor.proj.bias += 0.8
            reference.t2u_model.lm_head.weight *= 2
            reference.t2u_model.lm_head.weight[[0, 1, 3, 4, 5, 28, 29]] = 0
    for table, values in LANGUAGES.items():
        setattr(reference.generation_config, table, values)
    config = conversion.config_from_hugging_face(reference.config.to_dict())
    table = conversion.hugging_face_table(config, name)
    param = jnp.dtype(str(next(reference.parameters()).dtype).removeprefix("torch."))
    cls = getattr(seamless_m4t, name)
    model = harness.ported(reference, lambda: cls(config, param_dtype=param, rngs=nnx.Rngs(0)), table)
    model.generation_config = conversion.generation_from_hugging_face(LANGUAGES, {"max_new_tokens": 9}, "")
    return reference, model, table


@pytest.fixture(scope="module")
def whole():
    return build()


@pytest.mark.parametrize("source", [text, speech])
def test_every_tap_and_output(whole, source):
    reference, model, table = whole
    x, everything = source() | targets(), {"output_hidden_states": True, "output_attentions": True}
    skip = {
        r"lm_head|t2u_model.*|vocoder.*": "the head is the embedding here; the rest is not part of the call",
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
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert {"output.logits", "output.encoder_last_hidden_state", "output.cross_attentions[1]"} <= set(compared)


def units(seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of the text decoder, which of them are real, and units."""
    rng = np.random.default_rng(seed)
    mask = np.ones((2, 5), np.int64)
    mask[1, 3:] = 0
    return rng.standard_normal((2, 5, 16)), mask, rng.integers(4, 30, (2, 7))


def test_text_to_units(whole):
    reference, model, _ = whole
    states, mask, ids = units()
    everything = {"output_hidden_states": True, "output_attentions": True}
    taps = harness.compare_taps(
        reference.t2u_model,
        lambda: reference.t2u_model(
            inputs_embeds=torch.tensor(states),
            attention_mask=torch.tensor(mask),
            decoder_input_ids=torch.tensor(ids),
            use_cache=False,
            **everything,
        ),
        model.t2u_model,
        lambda: model.t2u_model(jnp.asarray(states), jnp.asarray(mask), jnp.asarray(ids), **everything),
        Table(conversion.T2U, tied=(conversion.Tied("lm_head.weight", "model.decoder.embed_tokens.weight"),)),
        minimum=20,
        skip={"lm_head": "the embedding here"},
        compiled=True,
    )
    harness.compare_outputs(taps.ours, taps.reference)


def smoothed(logits, labels, smoothing):
    """The authors' cross-entropy."""
    labels = torch.tensor(labels)
    labels[:, 0] = -100  # the language
    # fairseq2: (1 - ε - ε/(V-1)) · nll + ε/(V-1) · Σ nll
    logp, kept = logits.log_softmax(-1), labels != -100
    nll = -logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    each = smoothing / (logits.shape[-1] - 1)
    loss = (1 - smoothing - each) * nll - each * logp.sum(-1)
    return loss[kept].sum() / kept.sum()


def shifted(labels, pad, start):
    tokens = torch.full(labels.shape, start)
    tokens[:, 1:] = torch.tensor(np.where(labels == -100, pad, labels))[:, :-1]
    return tokens


def their_loss(reference, labels, unit_labels, smoothing, **x):
    """The authors' fine-tuning, of the modules of `transformers`."""
    output = reference(**x, decoder_input_ids=shifted(labels, 0, 3), output_hidden_states=True)
    states, real = output.decoder_hidden_states[-1], torch.tensor(labels != -100).long()
    spoken = reference.t2u_model(
        inputs_embeds=states, attention_mask=real, decoder_input_ids=shifted(unit_labels, 1, 2)
    ).logits
    return smoothed(output.logits, labels, smoothing) + smoothed(spoken, unit_labels, smoothing)


def labelled() -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([[51, 9, 17, 30, 3], [51, 8, 3, -100, -100]]),
        np.array([[29, 9, 7, 12, 25, 2], [29, 8, 20, 2, -100, -100]]),
    )


@pytest.mark.parametrize("source", [text, speech])
def test_losses_and_every_gradient(whole, source):
    reference, model, table = whole
    labels, unit_labels = labelled()
    compared = harness.compare_gradients(
        reference,
        lambda: their_loss(reference, labels, unit_labels, 0.2, **torched(source())),
        model,
        jax.jit(lambda m: finetuning_losses(m, jnp.asarray(labels), jnp.asarray(unit_labels), **jaxed(source())).total),
        table,
    )
    assert {"text_decoder.embed_tokens.embedding", "t2u_model.model.decoder.embed_tokens.embedding"} <= set(compared)
    with torch.no_grad():
        plain = reference(**torched(source()), labels=torch.tensor(labels)).loss
        of_units = reference.t2u_model(inputs_embeds=torch.tensor(units()[0]), labels=torch.tensor(unit_labels)).loss
    ours = audiozoo.jit(model)(**jaxed(source()), labels=jnp.asarray(labels)).loss
    harness.assert_close(ours, plain, kind="gradient", name="loss")
    ours = model.t2u_model(jnp.asarray(units()[0]), labels=jnp.asarray(unit_labels)).loss
    harness.assert_close(ours, of_units, kind="gradient", name="loss of units")


def test_the_text_teaches_the_speech(whole):
    """X2T's three losses and their gradients, of the logits of `transformers`, the divergence token by token."""
    reference, model, table = whole
    labels, heard, read = labelled()[0], speech(), text()
    places = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]  # all but the languages and what is behind the ends

    def theirs():
        of_text, of_speech = (
            reference(**torched(x), decoder_input_ids=shifted(labels, 0, 3)).logits for x in (read, heard)
        )
        divergence = 0.0
        for place in places:
            p, q = of_text[place].detach().softmax(-1), of_speech[place].softmax(-1)
            divergence = divergence + sum(a * (a / b).log() for a, b in zip(p, q, strict=True)) / len(places)
        return 0.5 * smoothed(of_speech, labels, 0.2) + 0.25 * smoothed(of_text, labels, 0.2) + 2.0 * divergence

    def ours(m):
        x = {"input_ids": jnp.asarray(read["input_ids"]), "text_attention_mask": jnp.asarray(read["attention_mask"])}
        return into_text_losses(m, jnp.asarray(labels), **jaxed(heard), **x, weights=(0.5, 0.25, 2.0)).total

    compared = harness.compare_gradients(reference, theirs, model, jax.jit(ours), table)
    assert any(name.startswith("text_encoder") for name in compared)
    assert any(name.startswith("speech_encoder") for name in compared)


def test_only_what_learns_has_gradients(whole):
    _, model, _ = whole
    labels, unit_labels = (jnp.asarray(x) for x in labelled())

    def gradient(**options):
        loss = lambda m: finetuning_losses(m, labels, **options, **jaxed(text())).total  # noqa: E731
        return harness.our_gradients(model, jax.jit(loss))[1]

    frozen = gradient(unit_labels=unit_labels, freeze_text=True)
    assert not any(np.any(g) for n, g in frozen.items() if not n.startswith("t2u_model"))
    assert np.any(frozen["t2u_model.model.encoder.layers.0.fc1.kernel"])
    of_text = gradient()
    assert not any(np.any(g) for n, g in of_text.items() if n.startswith(("t2u_model", "vocoder", "speech")))


@pytest.mark.parametrize("source", [text, speech])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 0.7}], ids=["greedy", "beams"])
def test_texts_are_equal(whole, source, options):
    reference, model, _ = whole
    x = source(1)
    if source is text and not options:  # what is padding is seen
        del x["attention_mask"]
    wanted = reference.generate(**torched(x), tgt_lang="spa", generate_speech=False, **options).sequences
    found = model.generate(**jaxed(x), tgt_lang="__spa__", generate_speech=False, **options)
    ours = np.array(found.sequences)
    if options:  # what the original fills short rows of a beam search with is their end
        ours = np.where(np.arange(ours.shape[1]) < found.lengths[:, None], ours, 3)
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {
            "eos_token_id": [1, 52, 32, 35],
            "repetition_penalty": 2.0,
            "min_new_tokens": 5,
            "suppress_tokens": [20],
            "begin_suppress_tokens": [17],
            "bad_words_ids": [[52, 0], [28]],
            "sequence_bias": [[[48], -6.0], [[13, 5], 5.0]],
        },
        {"eos_token_id": [1], "encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 2},
        {
            "eos_token_id": [1, 39, 48, 53],
            "num_beams": 3,
            "length_penalty": 2.0,
            "early_stopping": True,
            "no_repeat_ngram_size": 1,
            "min_length": 8,
            "forced_eos_token_id": 1,
        },
    ],
    ids=["greedy", "source", "beams"],
)
def test_options_of_translation(options):
    reference, model, table = build("SeamlessM4TForTextToText")
    generation.livelier(reference.text_decoder)
    harness.port(reference, model, table)
    ids, mask = np.random.default_rng(0).integers(9, 50, (4, 7)), np.ones((4, 7), np.int64)
    ids[:, 0], ids[:, -1] = 50, 3
    ids[1, 5:], mask[1, 5:] = 0, 0
    if "encoder_no_repeat_ngram_size" in options:
        ids[:, 2:5] = ids[:, 1:2]  # what a random decoder says, says the source
    x = {"input_ids": ids, "attention_mask": mask}
    generation.compare(
        lambda **chosen: reference.generate(**torched(x), tgt_lang="spa", max_new_tokens=12, **chosen),
        lambda **chosen: model.generate(**jaxed(x), tgt_lang="spa", max_new_tokens=12, **chosen),
        2,
        options,
    )


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (text, {}),
        (speech, {}),
        (speech, {"num_beams": 2, "num_return_sequences": 2, "speech_num_return_sequences": 1}),
        (text, {"text_num_beams": 2, "text_max_new_tokens": 7, "speech_max_new_tokens": 5}),
    ],
    ids=["text", "speech", "beams", "prefixes"],
)
def test_speech_is_equal(whole, source, options):
    """One item: tokens and units exactly, and the waveform; of a batch, each item is what it is alone."""
    reference, model, _ = whole
    options = {"tgt_lang": "spa", "spkr_id": 3, "return_intermediate_token_ids": True, **options}
    x = source(2)
    together = model.generate(**jaxed(x), **options)
    for row, length in enumerate(x["attention_mask"].sum(axis=1)):
        one = {name: array[row : row + 1, :length] for name, array in x.items()}
        wanted = reference.generate(**torched(one), **options)
        found = model.generate(**jaxed(one), **options)
        np.testing.assert_array_equal(found.sequences, wanted.sequences)
        np.testing.assert_array_equal(found.unit_sequences, wanted.unit_sequences)
        spoken = wanted.unit_sequences[:, 2:]
        spoken = spoken[spoken != 2][None] - 4  # without the end, which the original's vocoder gives a sound
        with torch.no_grad():
            waveform, _ = reference.vocoder(spoken, spkr_id=torch.tensor([[3]]), lang_id=torch.tensor([[2]]))
        harness.assert_close(found.waveform, waveform, name="waveform")
        count = found.unit_sequences.shape[1]
        np.testing.assert_array_equal(together.unit_sequences[row, :count], found.unit_sequences[0])
        samples = together.waveform_lengths[row]
        harness.assert_close(together.waveform[row, :samples], found.waveform[0], name=f"item {row} of the batch")


@pytest.mark.parametrize("name", ["ForTextToText", "ForSpeechToText", "ForTextToSpeech", "ForSpeechToSpeech"])
def test_each_class(name):
    reference, model, _ = build("SeamlessM4T" + name)
    x = {n: a[:1] for n, a in (speech(2) if "ForSpeech" in name else text(2)).items()}
    if name.endswith("Speech"):
        options = {"tgt_lang": "eng", "return_intermediate_token_ids": True}
        wanted, found = reference.generate(**torched(x), **options), model.generate(**jaxed(x), **options)
        np.testing.assert_array_equal(found.unit_sequences, wanted.unit_sequences)
        np.testing.assert_array_equal(found.sequences, wanted.sequences)
    else:
        wanted = reference.generate(**torched(x), tgt_lang="eng")
        np.testing.assert_array_equal(model.generate(**jaxed(x), tgt_lang="eng"), wanted)
    x |= {n: a[:1] for n, a in targets().items()}
    with torch.no_grad():
        logits = reference(**torched(x)).logits
    harness.assert_close(audiozoo.jit(model)(**jaxed(x)).logits, logits, name="logits")


def test_short_rows_of_beams(whole):
    """0 is the padding of texts, which the search of `transformers` takes for none: it fills rows with their end.

    The text-to-unit model then reads those ends, so that an item depends on its neighbours. Here it does not.
    """
    reference, model, _ = whole
    x, options = text(2), {"tgt_lang": "spa", "generate_speech": False, "num_beams": 3}
    options |= {"early_stopping": True, "length_penalty": 0.0}
    tokens = model.generate(**jaxed(x), **options).sequences[:, 2:]
    for end in map(int, sorted(set(tokens.ravel().tolist()))):  # let another token be the end
        found = model.generate(**jaxed(x), **options, eos_token_id=end)
        if found.lengths[0] != found.lengths[1]:
            break
    else:
        raise AssertionError("no end gives texts of different lengths")
    wanted = reference.generate(**torched(x), **options, eos_token_id=end).sequences.numpy()
    short = int(np.argmin(found.lengths))
    assert (found.sequences[short, found.lengths[short] :] == 0).all()
    assert (wanted[short, found.lengths[short] :] == end).all()


def test_mistakes_get_a_sentence(whole):
    _, model, _ = whole
    ours = jaxed(text())
    for call, message in (
        (lambda: model.generate(**ours), "needs tgt_lang"),
        (lambda: model.generate(**ours, generate_speech=False), "into which language"),
        (lambda: model.generate(**ours, tgt_lang="deu"), "does not speak 'deu'; it has eng, spa"),
        (lambda: model.generate(tgt_lang="eng"), "input_features"),
        (lambda: model.generate(input_ids=np.zeros((1, 0), int), tgt_lang="eng"), "is empty"),
        (lambda: model.generate(**ours, tgt_lang="eng", speaker_id=9), "no speaker 9"),
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
        foreign = conversion.open_checkpoint(tmp_path / "theirs")
        assert foreign.model_class == "SeamlessM4TModel"
        model = harness.ported(
            reference, lambda: seamless_m4t.SeamlessM4TModel(foreign.config, rngs=nnx.Rngs(0)), foreign.table
        )
        values = dict(
            foreign.table.read(foreign.tensors, foreign.table.plan(foreign.tensors, harness.parameters(model)))
        )
        for name, array in harness.parameters(model).items():
            np.testing.assert_array_equal(values[name], array, err_msg=name)
        model.generation_config = foreign.attributes["generation_config"]
        assert dict(model.generation_config.t2u_lang_code_to_id) == LANGUAGES["t2u_lang_code_to_id"]
        form = conversion.hugging_face(model)
        written = dict(form.table.write(harness.parameters(model)))
        state = reference.state_dict()
        for name, array in written.items():
            np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)
        tied = {"lm_head.weight", "text_encoder.embed_tokens.weight", "text_decoder.embed_tokens.weight"}
        assert set(state) - set(written) == tied | {"t2u_model.lm_head.weight"}
        back = transformers.SeamlessM4TConfig(**form.files["config.json"])
        for name in TINY:
            assert getattr(back, name) == getattr(reference.config, name), name
        assert form.files["generation_config.json"]["t2u_lang_code_to_id"] == LANGUAGES["t2u_lang_code_to_id"]
        audiozoo.export(model, tmp_path / "ours")
        again, info = transformers.SeamlessM4TModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in state.items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert again.generation_config.vocoder_lang_code_to_id == LANGUAGES["vocoder_lang_code_to_id"]
        with pytest.raises(CheckpointError, match="no class SeamlessM4TNothing"):
            conversion.open_checkpoint(tmp_path / "theirs", "SeamlessM4TNothing")


@pytest.mark.parametrize("style", ["fairseq2", "fairseq"])
def test_the_authors_files(tmp_path, whole, style, monkeypatch):
    """The same weights under fairseq2's and under fairseq's names, the latter with its order and one row too many."""
    reference, model, _ = whole
    state = {n: t.clone() for n, t in reference.state_dict().items()}
    theirs = {new: t for n, t in state.items() if (new := fairseq2_names(n)) is not None}
    if style == "fairseq":
        monkeypatch.setattr(conversion, "NLLB_100_ROWS", 61)
        before = len(theirs)
        theirs = {fairseq_names(n): t for n, t in theirs.items()}
        assert len(theirs) == before
        tokens = torch.cat([state["shared.weight"], torch.ones(1, 16)])
        tokens[[1, 3, 0, 2]] = state["shared.weight"][:4]
        for name in ("output_projection", "embed_tokens"):
            theirs[f"target_letter_decoder.{name}.weight"] = tokens
        theirs["text_encoder.embed_tokens.weight"] = tokens
        theirs["target_letter_decoder.version"] = torch.zeros(1)
        theirs["encoder.w2v_encoder.w2v_model.mask_emb"] = torch.zeros(3)
    path = tmp_path / "multitask_unity_tiny.pt"
    torch.save({"model": theirs}, path)
    assert conversion.recognise(path)
    ours = harness.parameters(model)
    for name, other in (("SpeechToText", "text_encoder"), ("TextToText", "speech_encoder")):
        foreign = conversion.open_checkpoint(path, f"SeamlessM4TFor{name}")
        expected = {n: v for n, v in ours.items() if not n.startswith((other, "vocoder", "t2u"))}
        values = dict(foreign.table.read(foreign.tensors, foreign.table.plan(foreign.tensors, expected)))
        assert set(values) == set(expected)
        for n, v in values.items():
            np.testing.assert_array_equal(v, ours[n], err_msg=n)
    for field in (
        "hidden_size",
        "vocab_size",
        "t2u_decoder_layers",
        "decoder_ffn_dim",
        "speech_encoder_attention_heads",
    ):
        assert getattr(foreign.config, field) == TINY[field], field
    with pytest.raises(SourceError, match=r"put vocoder_36langs\.pt beside"):
        conversion.open_checkpoint(path)
    # Beside the vocoder it is whole, and with the authors' tokenizer it knows languages.
    voice = {n.removeprefix("vocoder."): t for n, t in state.items() if n.startswith("vocoder.")}
    torch.save({"generator": vocoder_state(voice)}, tmp_path / "vocoder_36langs.pt")
    monkeypatch.setitem(conversion.TEXT_LANGUAGES, TINY["vocab_size"], "eng spa")
    foreign = conversion.open_checkpoint(path)
    kept = {n: TINY[n] for n in TINY if n.startswith(("upsample_r", "upsample_k", "resblock"))}  # no shape tells them
    config = dataclasses.replace(foreign.config, vocoder=dataclasses.replace(foreign.config.vocoder, **kept))
    table = conversion.original_table(
        config, "SeamlessM4TModel", fairseq=style == "fairseq", dummy_row=style == "fairseq"
    )
    empty = harness.abstract(lambda: seamless_m4t.SeamlessM4TModel(config, rngs=nnx.Rngs(0)))
    blank = variables(empty)
    values = dict(table.read(foreign.tensors, table.plan(foreign.tensors, blank)))
    assert set(values) == set(blank)
    for n in set(values) & set(ours):
        np.testing.assert_array_equal(values[n], ours[n], err_msg=n)
    # What is exported of it has the whole kernels that `transformers` has.
    exported = dict(conversion.hugging_face(empty).table.write(values))
    assert {n for n in state if n.startswith("vocoder.")} == {n for n in exported if n.startswith("vocoder.")}
    assert set(exported) <= set(state)
    for n, v in exported.items():
        np.testing.assert_allclose(v, state[n].numpy(), rtol=1e-12, err_msg=n)
    assert foreign.attributes["generation_config"].text_language("spa") == TINY["vocab_size"] - 4
    with pytest.raises(SourceError, match=r"put tokenizer\.model beside"):
        audiozoo.load_processor(path)
    write_pieces(tmp_path / "tokenizer.model")
    processor = audiozoo.load_processor(path)
    assert processor(text="ab", src_lang="spa")["input_ids"][0, 0] == TINY["vocab_size"] - 4
    assert processor.decode(processor(text="ab", src_lang="spa")["input_ids"][0], skip_special_tokens=True) == "ab"


def test_languages_of_the_authors_files():
    """The numbers that the published `generation_config.json`s have: `eng` and its neighbours, and the last ones."""
    for config, counts, english, chinese in (
        (SeamlessM4TConfig.large(), (98, 38, 36), 256_022, 256_017),
        (SeamlessM4TConfig.medium(), (202, 38, 36), 256_047, 256_201),
    ):
        tables = conversion.original_languages(config)
        text, units, voices = (tables[name] for name in conversion.LANGUAGES)
        assert (len(text), len(units), len(voices)) == counts
        assert (text["eng"], text["cmn_Hant"]) == (english, chinese)
        assert list(text.values()) == list(range(256_001, 256_001 + len(text)))
        assert (units["arb"], units["vie"], voices["eng"], voices["vie"]) == (10_043, 10_080, 8, 35)
        assert set(voices) < set(units) < set(text)
    assert conversion.original_languages(SeamlessM4TConfig(vocab_size=60)) == {}


def test_published_sizes():
    with harness.precision("float32"):
        for config, millions in ((SeamlessM4TConfig.large(), 2360), (SeamlessM4TConfig.medium(), 1210)):
            fields = {n: getattr(config, n) for n in conversion._DEFAULTS}
            count = harness.assert_same_shapes(
                lambda fields=fields: transformers.SeamlessM4TModel(transformers.SeamlessM4TConfig(**fields)),
                lambda config=config: seamless_m4t.SeamlessM4TModel(config, rngs=nnx.Rngs(0)),
                conversion.hugging_face_table(config, "SeamlessM4TModel"),
            )
            assert abs(count / 1e6 - millions) < 60, count


def test_published_widths_in_float32():
    """One block of each stack as wide as it is, from speech to logits."""
    with harness.precision("float32"):
        shallow = {"speech_encoder_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 3000}
        theirs = transformers.SeamlessM4TConfig(**shallow, attn_implementation="eager")
        config, name = conversion.config_from_hugging_face(theirs.to_dict()), "SeamlessM4TForSpeechToText"
        reference = harness.randomise(transformers.SeamlessM4TForSpeechToText(theirs), 0)
        table, cls = conversion.hugging_face_table(config, name), seamless_m4t.SeamlessM4TForSpeechToText
        model = harness.ported(reference, lambda: cls(config, rngs=nnx.Rngs(0)), table)
        x = {
            "input_features": np.random.default_rng(0).standard_normal((1, 70, 160)).astype(np.float32),
            "decoder_input_ids": np.random.default_rng(1).integers(4, 3000, (1, 9)),
        }
        with torch.no_grad():
            wanted = reference(**torched(x))
        found = audiozoo.jit(model)(**jaxed(x))
        harness.assert_close(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state, name="states")
        harness.assert_close(found.logits, wanted.logits, name="logits")


def test_mutations_are_noticed(whole):
    reference, model, _ = whole
    x = speech() | targets()
    with torch.no_grad():
        wanted = reference(**torched(x)).logits
    run = jax.jit(lambda m: m(**jaxed(x)).logits)
    unseen = r"(text_encoder|t2u_model|vocoder)\..*|.*k_proj\.bias"
    harness.assert_detects(
        lambda: harness.assert_close(run(model), wanted),
        [
            *harness.perturbations(model, 3, exclude=unseen),
            harness.dropped(model, "text_decoder.layers.1.encoder_attn.v_proj.bias"),
            harness.dropped(model, "speech_encoder.adapter.0.residual_conv.bias"),
        ],
    )


@pytest.mark.parametrize("source", [text, speech])
def test_dropouts(source):
    """The original drops behind a text block's MLP by the rate that is of its inside, here and in NLLB's code."""
    reference, model, _ = build(**harness.rates(transformers.SeamlessM4TConfig(), dropout=0.3, activation_dropout=0.3))
    inputs = {name: array for name, array in (source() | targets()).items() if not name.endswith("mask")}
    harness.compare_in_training(reference, model, inputs)
