"""SeamlessM4T without PyTorch: shapes, the five directions, half precision, training, files, the command line."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from typer.testing import CliRunner

import audiozoo
from audiozoo import audio
from audiozoo.cli import app
from audiozoo.commands.translation import what_is_meant
from audiozoo.decoding import pieces
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.layers import abstract
from audiozoo.layers.batch_norm import writable
from audiozoo.layers.stacking import scanned
from audiozoo.models import conformer, nllb, seamless_m4t, speech_resynthesis
from audiozoo.models.conformer import ConformerConfig
from audiozoo.models.nllb import NllbConfig
from audiozoo.models.seamless_m4t import (
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToText,
    SeamlessM4TGenerationConfig,
    SeamlessM4TModel,
    SeamlessM4TRecipe,
    finetuning_losses,
    into_text_losses,
)
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from tests.models.random_model import random_model
from tests.models.streaming import peak_of, write_checkpoint
from tests.shapes import enforce
from weights_conversion import seamless_m4t as conversion

VOICE = CodeHifiGanConfig(
    unit_hifi_gan_vocab_size=26,
    unit_embed_dim=8,
    vocoder_num_langs=3,
    lang_embed_dim=4,
    vocoder_num_spkrs=5,
    spkr_embed_dim=4,
    upsample_initial_channel=8,
    upsample_rates=(5, 2),
    upsample_kernel_sizes=(11, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
)
TINY = SeamlessM4TConfig(
    vocab_size=40,
    t2u_vocab_size=30,
    hidden_size=16,
    encoder_layers=1,
    encoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_layers=1,
    decoder_ffn_dim=16,
    decoder_attention_heads=2,
    feature_projection_input_dim=160,
    speech_encoder_layers=1,
    speech_encoder_attention_heads=2,
    speech_encoder_intermediate_size=16,
    conv_depthwise_kernel_size=5,
    t2u_encoder_layers=1,
    t2u_encoder_ffn_dim=16,
    t2u_encoder_attention_heads=2,
    t2u_decoder_layers=1,
    t2u_decoder_ffn_dim=16,
    t2u_decoder_attention_heads=2,
    t2u_max_new_tokens=12,
    max_new_tokens=6,
    vocoder=VOICE,
)
TABLES = SeamlessM4TGenerationConfig(
    text_decoder_lang_to_code_id=(("eng", 30), ("spa", 31)),
    t2u_lang_code_to_id=(("eng", 28), ("spa", 29)),
    vocoder_lang_code_to_id=(("eng", 0), ("spa", 2)),
    options=(("max_new_tokens", 6),),
)


def make(cls=SeamlessM4TModel, **options):
    made = random_model(lambda rngs: cls(TINY, rngs=rngs, **options))
    made.generation_config = TABLES
    units = made.t2u_model.model.decoder.embed_tokens.embedding
    units[...] = units[...].at[jnp.array([0, 1, 2, 3, 28, 29])].set(0)  # units that sound, and no early end
    made.t2u_model.model.decoder.layer_norm.bias[...] += 3 * units[9]
    return made


@pytest.fixture(scope="module")
def model():
    return make()


def text() -> dict[str, jax.Array]:
    ids, mask = np.arange(4, 18).reshape(2, 7), np.ones((2, 7), int)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def test_annotations_hold(model, monkeypatch):
    checked = [name for module in (conformer, nllb, seamless_m4t) for name in enforce(monkeypatch, module)]
    assert {"SeamlessM4TModel.__call__", "ConformerBlock.__call__", "NllbEncoder.__call__"} <= set(checked)
    ids = jnp.ones((2, 3), int)
    for x in (text(), {"input_features": jnp.zeros((2, 20, 160)), "attention_mask": jnp.ones((2, 20), int)}):
        jax.eval_shape(lambda m, x=x: m(**x, decoder_input_ids=ids).logits, model)
        jax.eval_shape(lambda m, x=x: finetuning_losses(m, ids, ids, **x).total, model)
    heard = {"input_features": jnp.zeros((2, 20, 160)), "input_ids": jnp.ones((2, 7), int)}
    jax.eval_shape(lambda m: into_text_losses(m, ids, **heard, key=jax.random.key(0)).total, model)
    with pytest.raises(UsageError, match=r"\(1, 20, 80\); \(batch, frames, 160\)"):
        model(input_features=jnp.zeros((1, 20, 80)), decoder_input_ids=ids[:1])
    jax.eval_shape(lambda m: m.t2u_model(jnp.zeros((2, 4, 16)), labels=ids).loss, model)
    # Layers of the adaptor are as many frames long as each of them says, and stay apart in a stacked model.
    config = dataclasses.replace(TINY, num_adapter_layers=2, adaptor_kernel_size=2, adaptor_stride=2)
    stacked = scanned(abstract(lambda rngs: SeamlessM4TForSpeechToText(config, rngs=rngs)))
    jax.eval_shape(lambda m: m(jnp.zeros((2, 20, 160)), decoder_input_ids=ids).logits, stacked)


def test_published_sizes_are_the_papers():
    assert [c.num_hidden_layers for c in (ConformerConfig.conformer_s(), ConformerConfig.conformer_l())] == [16, 17]
    assert ConformerConfig.conformer_m().hidden_size == 256
    assert NllbConfig.dense_3_3b().d_model == 2 * NllbConfig.dense_1_3b().d_model
    assert NllbConfig.dense_600m().encoder_layers == SeamlessM4TConfig.medium().text.encoder_layers
    assert SeamlessM4TConfig.large().text.decoder_layers == NllbConfig.dense_1_3b().decoder_layers
    # A kernel of even length is centred on the frame before its middle; a block keeps the number of frames.
    block = random_model(lambda rngs: conformer.ConformerBlock(ConformerConfig(16, 1, 2, 16), rngs=rngs))
    assert block(jnp.zeros((1, 9, 16)), conformer.Dropout(None))[0].shape == (1, 9, 16)


def test_directions(model):
    """Text and speech in, text and speech out; the shortest input; voices that differ."""
    rng = np.random.default_rng(0)
    for source in (
        {"input_features": jnp.asarray(rng.standard_normal((1, 8, 160)), jnp.float32)},
        {"input_ids": jnp.array([[30, 3]])},
    ):
        tokens = model.generate(**source, tgt_lang="spa", generate_speech=False).sequences
        assert tokens[0, :2].tolist() == [3, 31]
        waveform, lengths = model.generate(**source, tgt_lang="spa")
        assert waveform.shape == (1, lengths[0])
        other, _ = model.generate(**source, tgt_lang="spa", speaker_id=4)
        assert (waveform != other).any()
        assert np.isfinite(waveform).all()


def test_a_language_has_voices_of_its_own(model):
    """As the authors' settings of both vocoders have them: the first speaker of English, Spanish and Vietnamese."""
    for vocoder, voices in (
        (speech_resynthesis.SeamlessM4TCodeHifiGan, [10, 42, 66]),
        (speech_resynthesis.SeamlessM4Tv2CodeHifiGan, [10, 45, 69]),
    ):
        whole = abstract(lambda rngs, vocoder=vocoder: vocoder(CodeHifiGanConfig(), rngs=rngs))
        assert [whole.own_voice(language) for language in (8, 25, 35)] == voices
        assert len(set(vocoder.own_voices)) == 36
    default, own = (
        model.generate(input_ids=jnp.array([[30, 3]]), tgt_lang="spa", **x)[0] for x in ({}, {"spkr_id": -1})
    )
    np.testing.assert_array_equal(own, default)  # of a vocoder with other voices nothing is known
    vocoder, units = model.vocoder, np.full((2, 2), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(vocoder), "own_voice", lambda self, language: language + 1)
        expected = vocoder.speak(units, [2, 3], [1, 2])[0]
        for voice in (-1, np.int64(-1)):
            np.testing.assert_array_equal(vocoder.speak(units, voice, [1, 2])[0], expected)


def test_samples_come_from_the_key(model):
    seen = []
    options = {"tgt_lang": "spa", "do_sample": True, "return_intermediate_token_ids": True, "max_length": 5}
    options["streamer"] = lambda tokens, position: seen.append(position)
    one = model.generate(**text(), **options, key=jax.random.key(0))
    again = model.generate(**text(), **options, key=jax.random.key(0))
    other = model.generate(**text(), **options, key=jax.random.key(1))
    np.testing.assert_array_equal(one.unit_sequences, again.unit_sequences)
    assert one.sequences.shape != other.sequences.shape or (one.sequences != other.sequences).any()
    # A length and a streamer are the text's.
    assert one.sequences.shape[1] <= 5 < one.unit_sequences.shape[1]
    assert set(seen) <= {2, 3, 4}
    assert seen


def test_half_precision(model):
    ids = jnp.ones((2, 3), int)
    features = jnp.asarray(np.random.default_rng(1).standard_normal((2, 24, 160)), jnp.float32)
    half = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    for x in (text(), {"input_features": features}):
        whole, ours = audiozoo.jit(model)(**x, decoder_input_ids=ids), audiozoo.jit(half)(**x, decoder_input_ids=ids)
        assert ours.logits.dtype == jnp.bfloat16
        assert np.isfinite(whole.logits).all()
        np.testing.assert_allclose(ours.logits.astype(np.float32), whole.logits, atol=0.2)


@pytest.mark.slow
def test_training_lowers_the_loss(model):
    """Speech to text and to units, with dropout and batches normalised by themselves; statistics move."""
    features = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 160)), jnp.float32)
    labels, units = jnp.array([[31, 5, 6, 7, 3], [31, 8, 9, 3, -100]]), jnp.array([[29, 9, 4, 2], [29, 7, 2, -100]])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, key):
        m = nnx.merge(graphdef, params, writable(rest))
        value = finetuning_losses(m, labels, units, input_features=features, key=key).total
        return value, nnx.state(m, nnx.Not(nnx.Param))

    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, rest, state, key):
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, key)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), rest, state, value

    state, values, before = optimiser.init(params), [], jax.tree.leaves(rest)
    for key in jax.random.split(jax.random.key(0), 20):
        params, rest, state, value = step(params, rest, state, key)
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])
    assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(rest), strict=True))
    rates = SeamlessM4TRecipe().optimizer()
    assert rates.update(params, rates.init(params), params)[0] is not None


def test_checkpoints_of_our_own(model, tmp_path):
    audiozoo.save(model, tmp_path / "native")
    back = audiozoo.load(tmp_path / "native")
    assert type(back) is SeamlessM4TModel
    assert (back.config, back.generation_config) == (TINY, TABLES)
    audiozoo.export(model, tmp_path / "foreign")
    again = audiozoo.load(tmp_path / "foreign")
    assert (again.config, again.generation_config) == (TINY, TABLES)
    for other in (back, again):
        for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, other)), strict=True):
            np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
    part = audiozoo.load(tmp_path / "foreign", model_class="SeamlessM4TForSpeechToText")
    assert type(part) is SeamlessM4TForSpeechToText
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"model_type": "seamless_m4t", "hidden_size": "x"}))
    with pytest.raises(CheckpointError, match="hidden_size"):
        audiozoo.load(tmp_path / "foreign")
    (tmp_path / "some.pt").write_bytes(b"nothing")
    assert not conversion.recognise(tmp_path / "some.pt")


def write_tokenizer(folder) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    names = ["<pad>", "<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxy"]
    made = tokenizers.Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens([tokenizers.AddedToken(f"__{n}__", special=True) for n in ("eng", "spa")])
    made.add_special_tokens(["<pad>", "<unk>", "<s>", "</s>"])
    assert made.token_to_id("__spa__") == 31
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_from_the_command_line(model, tmp_path, monkeypatch):
    folder, sound = tmp_path / "model", tmp_path / "in.wav"
    audiozoo.export(model, folder)
    SeamlessM4TFeatureExtractor().save(folder)
    write_tokenizer(folder)
    audio.write(sound, 0.1 * np.sin(np.arange(30 * 16_000) / 20).astype(np.float32), 16_000)

    def run(*arguments, **options):
        return CliRunner().invoke(app, ["translate", *map(str, arguments), "--model", str(folder)], **options)

    written = run(sound, "--to", "spa", "--format", "json")
    assert written.exit_code == 0, written.output
    assert run("-", "--to", "spa", "--format", "json", input=sound.read_bytes()).stdout == written.stdout
    os.mkfifo(tmp_path / "pipe")
    assert what_is_meant(str(tmp_path / "pipe")) == (str(tmp_path / "pipe"), None)
    segments = json.loads(written.stdout)["segments"]
    assert len(segments) == 2
    assert segments[1]["end"] == 30.0
    assert "There is no file speech.caf" in str(run("speech.caf", "--to", "spa").exception)
    spoken = run("abc", "--to", "spa", "--from", "eng", "--speech", tmp_path / "out.wav")
    assert spoken.exit_code == 0, spoken.output
    assert len(audio.read(tmp_path / "out.wav", 16_000)) > 0
    # A recording in two pieces is spoken one after the other, by the voice that was asked for.
    spoken = run(sound, "--to", "eng", "--speech", tmp_path / "long.wav", "--beams", "2", "--speaker", "3")
    assert spoken.exit_code == 0, spoken.output
    loaded, processor, made = audiozoo.load(folder), audiozoo.load_processor(folder), []

    def generate(**inputs):
        options = {"tgt_lang": "eng", "num_beams": 2, "speaker_id": 3, "return_intermediate_token_ids": True}
        output = loaded.generate(**inputs, **options)
        made.extend(w[:n] for w, n in zip(output.waveform, output.waveform_lengths, strict=True))
        return output.sequences

    found = pieces.write_pieces(loaded, processor, audio.read(sound, 16_000), generate=generate)
    assert spoken.stdout == "".join(segment["text"] + "\n" for segment in found["segments"])
    np.testing.assert_allclose(audio.read(tmp_path / "long.wav", 16_000), np.concatenate(made), atol=1e-4)
    # Where nobody is speaking nothing is translated.
    monkeypatch.setattr(audio.speech, "silero", lambda: lambda chunk: 0.0)
    assert run(sound, "--to", "spa", "--vad").stdout == ""
    refused = run(sound, "--to", "spa", "--vad", "--speech", tmp_path / "nobody.wav")
    assert "Nobody is speaking in" in str(refused.exception)
    assert not (tmp_path / "nobody.wav").exists()
    # A text of many lines: a piece for each, however many are translated at a time.
    (tmp_path / "lines.txt").write_text("abc\n\nx y\nabcd efg\n", encoding="utf-8-sig")
    told = [
        json.loads(run(tmp_path / "lines.txt", "--to", "spa", "--from", "eng", "--format", "json", *more).stdout)
        for more in ((), ("--batch-size", "1"), ("--speech", tmp_path / "lines.wav"))
    ]
    texts = [[segment["text"] for segment in of["segments"]] for of in told]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1] == texts[2]
    ends = [segment["end"] for segment in told[2]["segments"]]
    assert ends == sorted(ends)
    assert ends[-1] * 16_000 == len(audio.read(tmp_path / "lines.wav", 16_000)) > 0
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for arguments, message in (
        ((tmp_path, "--to", "spa"), "is a directory"),
        ((tmp_path / "bytes.txt", "--to", "spa", "--from", "eng"), "UTF-8"),
        (("no.txt", "--to", "spa", "--from", "eng"), "There is no file no.txt"),
        (("abc", "--to", "spa", "--from", "eng", "--batch-size", "0"), "counts from 1"),
        (("abc", "--to", "spa", "--from", "eng", "--speaker", "1"), "--speech"),
        (("abc", "--to", "spa", "--from", "eng", "--speech", tmp_path / "o.wav", "--speaker", "9"), "no speaker 9"),
        ((sound,), "say which with --to"),
        (("abc", "--to", "spa"), "say it with --from"),
        ((sound, "--to", "spa", "--from", "eng"), "leave --from out"),
        ((sound, "--to", "deu"), "does not write 'deu'"),
        (("abc", "--to", "spa", "--from", "deu"), "no language 'deu'"),
    ):
        failed = run(*arguments)
        assert failed.exit_code == 1
        assert message in str(failed.exception)
    # What is only written needs no voice.
    for name, changes in (
        ("config.json", {"architectures": ["SeamlessM4TForTextToSpeech"]}),
        ("generation_config.json", {"vocoder_lang_code_to_id": {"eng": 0}}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    written = run("abc", "--to", "spa", "--from", "eng")
    assert written.exit_code == 0, written.output
    assert written.stdout.strip() == texts[0][0]


def test_long_texts_are_cut_behind_sentences():
    assert pieces.sentence_cuts("One line.  It stays\twhole.\n\n  Another. ") == [
        "One line. It stays whole.",
        "Another.",
    ]
    long = "It is so. " * 40 + "And so on, " * 40
    found = pieces.sentence_cuts(long)
    assert " ".join(found) == long.strip()
    assert [len(piece) for piece in found] == [299, 99, 439]  # a sentence stays whole
    endless = pieces.sentence_cuts("word " * 400)
    assert " ".join(endless) == ("word " * 400).strip()
    assert [len(piece) for piece in endless] == [899, 899, 199]
    assert [len(piece) for piece in pieces.sentence_cuts("好" * 2000)] == [900, 900, 200]
    assert pieces.sentence_cuts("好" * 900 + " " + "好" * 899) == ["好" * 900, "好" * 899]
    assert pieces.sentence_cuts("好。" * 200) == ["好。" * 150, "好。" * 50]
    assert [len(piece) for piece in pieces.sentence_cuts("यह है। " * 60)] == [293, 125]  # by the mark of Hindi
    assert pieces.sentence_cuts(" \n ") == []


# --- memory and shards -----------------------------------------------------------------------------------------------

# The large model's widths, with fewer of everything.
SHALLOW = dataclasses.replace(
    SeamlessM4TConfig.large(),
    vocab_size=20_000,
    encoder_ffn_dim=2048,
    decoder_ffn_dim=2048,
    t2u_encoder_ffn_dim=2048,
    t2u_decoder_ffn_dim=2048,
    encoder_layers=1,
    decoder_layers=1,
    speech_encoder_layers=1,
    t2u_encoder_layers=1,
    t2u_decoder_layers=1,
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_a_large_model_is_read_into_the_shards_of_eight_devices(tmp_path):
    size = write_checkpoint(tmp_path, lambda rngs: SeamlessM4TModel(SHALLOW, rngs=rngs), conversion)
    assert 4e8 < size < 9e8
    peak = peak_of(8, tmp_path)
    assert peak <= 1.3 * size + 0.5e9, f"{peak / 1e9:.2f} GB for {size / 1e9:.2f} GB"
