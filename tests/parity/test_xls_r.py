"""XLS-R against `transformers`: its sizes by shapes, heads of 120 channels, and speech translation, tokens and all."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from audiozoo.decoding.encoders import without_padding
from audiozoo.decoding.pieces import in_language
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.models import wav2vec2, xls_r
from audiozoo.models.xls_r import (
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderGenerationConfig,
    SpeechEncoderDecoderModel,
    XLSRConfig,
)
from audiozoo.processors.xls_r import LANGUAGES, MBart50Tokenizer, XLSRProcessor
from tests.parity import harness
from tests.parity.harness import blank
from tests.parity.seamless_family import exact_positions
from tests.parity.speech_family import LAYER, NO_DROPOUT, TINY, padded, reference_in_double
from tests.parity.test_wav2vec2 import fairseq_names
from tests.parity.test_wav2vec2_bert import ADAPTED, STILL
from tests.parity.test_wav2vec2_bert import TINY as FEATURES
from tests.parity.test_wav2vec2_bert import padded as steps
from tests.parity.test_wav2vec2_conformer import TINY as BLOCKS
from weights_conversion import wav2vec2 as encoders
from weights_conversion import xls_r as conversion

SIXTEEN = LAYER | {"num_attention_heads": 16}
PUBLISHED = {
    "xls_r_300m": SIXTEEN | {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
    "xls_r_1b": SIXTEEN | {"hidden_size": 1280, "num_hidden_layers": 48, "intermediate_size": 5120},
    "xls_r_2b": SIXTEEN | {"hidden_size": 1920, "num_hidden_layers": 48, "intermediate_size": 7680},
}
CODEBOOKS = {"xls_r_300m": 768, "xls_r_1b": 1024, "xls_r_2b": 1024}
COUNTS = {"xls_r_300m": 317_390_592, "xls_r_1b": 965_514_752, "xls_r_2b": 2_162_932_352}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, width = getattr(XLSRConfig, name)(), CODEBOOKS[name]
    theirs = transformers.Wav2Vec2Config(**PUBLISHED[name], codevector_dim=width, proj_codevector_dim=width)
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.Wav2Vec2ForPreTraining(theirs),
            lambda: wav2vec2.Wav2Vec2ForPreTraining(config, rngs=nnx.Rngs(0)),
            encoders.hugging_face_table(config, "Wav2Vec2ForPreTraining"),
        )
    assert count == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_of_translation(name):
    config = getattr(SpeechEncoderDecoderConfig, name)()
    encoder = transformers.Wav2Vec2Config(**PUBLISHED[name], add_adapter=True, output_hidden_size=1024)
    decoder = transformers.MBartConfig(vocab_size=250_054, scale_embedding=True, activation_function="relu")
    theirs = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with harness.precision("float32"):
        harness.assert_same_shapes(
            lambda: transformers.SpeechEncoderDecoderModel(theirs),
            lambda: SpeechEncoderDecoderModel(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, "SpeechEncoderDecoderModel"),
        )


def test_heads_of_120_channels_in_float32():
    changes = {"num_hidden_layers": 1, "conv_dim": (32,) * 7}
    with harness.precision("float32"):
        theirs = transformers.Wav2Vec2Config(**(PUBLISHED["xls_r_2b"] | changes))
        reference = harness.randomise(transformers.Wav2Vec2Model(theirs), 0, torch.float32)
        config = dataclasses.replace(XLSRConfig.xls_r_2b(), **changes)
        model = blank(lambda: wav2vec2.Wav2Vec2Model(config, rngs=nnx.Rngs(0)))
        harness.port(reference, model, encoders.hugging_face_table(config, "Wav2Vec2Model"))
        x = np.random.default_rng(0).standard_normal((1, 8000)).astype(np.float32)
        with torch.no_grad():
            wanted = reference(torch.tensor(x)).last_hidden_state
        ours = jax.jit(lambda m: m(x).last_hidden_state)(model)
        harness.assert_close(ours, wanted)


# --- translation -----------------------------------------------------------------------------------------------------

ENCODER = {k: v for k, v in (TINY | LAYER | NO_DROPOUT).items() if k not in ("vocab_size", "num_labels")}
ENCODER |= {"num_hidden_layers": 1, "add_adapter": True, "num_adapter_layers": 1, "mask_time_prob": 0.0}
DECODER = {
    "vocab_size": 23,
    "max_position_embeddings": 30,
    "d_model": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 32,
    "scale_embedding": True,
    "activation_function": "relu",
    "dropout": 0.0,
}


def translators(decoder=None, encoder=None, **changes):
    """The original with random weights, ours with the same, and the table between them."""
    encoder = encoder or transformers.Wav2Vec2Config(**(ENCODER | changes), attn_implementation="eager")
    text = transformers.MBartConfig(**(DECODER | (decoder or {})), attn_implementation="eager")
    theirs = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, text)
    theirs.decoder_start_token_id, theirs.pad_token_id, theirs.eos_token_id = 2, 1, 2
    theirs._attn_implementation = "eager"
    reference = harness.randomise(transformers.SpeechEncoderDecoderModel(theirs), 0)
    reference.config.encoder._attn_implementation = reference.config.decoder._attn_implementation = "eager"
    config = conversion.config_from_hugging_face(reference.config.to_dict())
    dtype = str(reference.dtype).removeprefix("torch.")
    model = blank(lambda: SpeechEncoderDecoderModel(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    table = conversion.hugging_face_table(config, "SpeechEncoderDecoderModel")
    return reference, harness.port(reference, model, table), table


@pytest.fixture(scope="module")
def translator():
    return translators()


def test_every_tap_and_output(translator):
    reference, model, table = translator
    x, mask = padded()
    tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 1]])
    known = (tokens != 1).astype(np.int64)
    arguments = (torch.tensor(x), torch.tensor(mask), torch.tensor(tokens), torch.tensor(known))
    everything = {"output_attentions": True, "output_hidden_states": True}
    taps = harness.compare_taps(
        reference,
        lambda: reference(*arguments, **everything),
        model,
        lambda: model(*map(jnp.asarray, (x, mask, tokens, known)), **everything, hidden_states_before_norm=True),
        table,
        minimum=40,
    )
    harness.compare_outputs(taps.ours, taps.reference)


def test_gradients_of_the_loss(translator):
    reference, model, table = translator
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
    assert len(compared) > 60


def test_mutations_are_noticed(translator):
    reference, model, _ = translator
    x, mask = padded()
    tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 6]])
    with torch.no_grad():
        theirs = reference(torch.tensor(x), torch.tensor(mask), torch.tensor(tokens)).logits
    run = jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(tokens)).logits)
    mutations = [
        *harness.perturbations(model, count=4, exclude=".*masked_spec_embed"),
        harness.dropped(model, "encoder.adapter.layers.0.conv.bias"),
        harness.dropped(model, "decoder.model.decoder.layers.0.encoder_attn.v_proj.bias"),
        harness.dropped(model, "decoder.model.decoder.layer_norm.bias"),
    ]
    assert harness.assert_detects(lambda: harness.assert_close(run(model), theirs), mutations) == 7


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(translator, beams):
    reference, model, _ = translator
    x, mask = padded()
    options = {"num_beams": beams, "max_new_tokens": 9, "forced_bos_token_id": 6}
    model = nnx.merge(*nnx.split(model))
    model.generation_config = SpeechEncoderDecoderGenerationConfig((("num_beams", 2), ("forced_bos_token_id", 6)))
    with torch.no_grad():
        special = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
        theirs = reference.generate(torch.tensor(x), attention_mask=torch.tensor(mask), **special, **options)
    ours = model.generate(jnp.asarray(x), jnp.asarray(mask), num_beams=beams, max_new_tokens=9)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours[:, 1] == 6).all()
    assert model.search_config(max_length=5).new_tokens(1) == 4
    assert model.generation_config.for_sentences() == {"num_beams": 2, "max_new_tokens": 200, "forced_bos_token_id": 6}
    with pytest.raises(UsageError, match="31 tokens are too many: this model has 30 positions"):
        model.generate(jnp.asarray(x), jnp.asarray(mask), max_new_tokens=31)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_padded_batch_equals_its_items(norm):
    """With `masked_adapter`, behind GroupNorm also with `masked_group_norm`, and without them not."""
    reference, model, _ = translators(num_adapter_layers=2, output_hidden_size=24, feat_extract_norm=norm)
    options = without_padding(model.config.encoder)
    assert set(options) == {"masked_adapter"} | ({"masked_group_norm"} if norm == "group" else set())
    x, mask = padded()
    length = int(mask[1].sum())
    with torch.no_grad():
        alone = reference.encoder(torch.tensor(x[1:, :length])).last_hidden_state[0].numpy()
    run = jax.jit(
        lambda m, masked: m.encode(x, mask, **dict.fromkeys(options, masked))[0].last_hidden_state, static_argnums=1
    )
    found = run(model, True)[1, : len(alone)]
    harness.assert_close(found, alone, name="the shorter item")
    assert np.abs(np.asarray(run(model, False))[1, : len(alone)] - alone).max() > 1e-3


def test_an_encoder_that_hears_features():
    """w2v-BERT before mBART: taps, gradients, tokens. (`transformers` projects from its inner width.)"""
    sizes = FEATURES | ADAPTED | STILL | {"num_hidden_layers": 1, "num_adapter_layers": 1, "output_hidden_size": 24}
    encoder = transformers.Wav2Vec2BertConfig(**sizes, mask_time_prob=0.0, attn_implementation="eager")
    reference, model, table = translators({"d_model": 21}, encoder)
    x, mask = steps()
    heard, given = (torch.tensor(x), torch.tensor(mask)), (jnp.asarray(x), jnp.asarray(mask))
    tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 6]])
    everything = {"output_attentions": True, "output_hidden_states": True}
    taps = harness.compare_taps(
        reference,
        lambda: reference(*heard, decoder_input_ids=torch.tensor(tokens), **everything),
        model,
        lambda: model(*given, jnp.asarray(tokens), **everything),
        table,
        minimum=40,
        skip={r".*\.distance_embedding": "read as a table, not called"},
    )
    harness.compare_outputs(taps.ours, taps.reference)
    labels = np.array([[7, 5, 9, 2], [8, 2, -100, -100]])
    with reference_in_double():
        harness.compare_gradients(
            reference,
            lambda: reference(input_features=heard[0], attention_mask=heard[1], labels=torch.tensor(labels)).loss,
            model,
            jax.jit(lambda m: m(input_features=x, attention_mask=mask, labels=jnp.asarray(labels)).loss),
            table,
        )
    special = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    with torch.no_grad():
        theirs = reference.generate(heard[0], attention_mask=heard[1], num_beams=2, max_new_tokens=6, **special)
    ours = model.generate(input_features=given[0], attention_mask=given[1], num_beams=2, max_new_tokens=6)
    np.testing.assert_array_equal(ours, theirs)
    assert without_padding(model.config.encoder) == {"masked_adapter": True}
    for both in ({}, {"input_values": x, "input_features": x}):
        with pytest.raises(UsageError, match="either as input_values or as input_features"):
            model.generate(**both)


def conformer(positions):
    sizes = BLOCKS | NO_DROPOUT | {"conformer_conv_dropout": 0.0, "position_embeddings_type": positions}
    return transformers.Wav2Vec2ConformerConfig(**sizes, attn_implementation="eager")


def test_conformer_blocks_before_mbart():
    """wav2vec2-Conformer as encoder: taps and outputs."""
    with exact_positions():
        reference, model, table = translators(encoder=conformer("relative"))
        x, mask = padded()
        tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 6]])
        heard = (torch.tensor(x), torch.tensor(mask), torch.tensor(tokens))
        taps = harness.compare_taps(
            reference,
            lambda: reference(*heard),
            model,
            lambda: model(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(tokens)),
            table,
            minimum=40,
        )
    harness.compare_outputs(taps.ours, taps.reference)


UNTIED = {"decoder": {"tie_word_embeddings": False}, "hidden_size": 30, "add_adapter": False}


@pytest.mark.parametrize("kind", ["tied", "untied, projected", "Conformer"])
def test_hugging_face_directories(kind, tmp_path):
    from audiozoo import checkpoints
    from audiozoo.loading import convert, variables
    from weights_conversion.readers import write_safetensors

    with harness.precision("float32"):
        changes = {"tied": {}, "untied, projected": UNTIED, "Conformer": {"encoder": conformer("rotary")}}[kind]
        reference, _, _ = translators(**changes)
        reference.generation_config.update(num_beams=3, forced_bos_token_id=6, max_length=9)
        reference.save_pretrained(tmp_path / "theirs")
        assert conversion.recognise(tmp_path / "theirs")
        foreign = conversion.open_checkpoint(tmp_path / "theirs")
        model = convert(foreign, SpeechEncoderDecoderModel)
        assert hasattr(model, "enc_to_dec_proj") == (kind == "untied, projected")
        form = conversion.hugging_face(model)
        with checkpoints.written_whole(tmp_path / "ours") as folder:
            for file, content in form.files.items():
                (folder / file).write_text(json.dumps(content))
            write_safetensors(folder, form.table.write({n: v[...] for n, v in variables(model).items()}))
        back, info = transformers.SpeechEncoderDecoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for key, tensor in reference.state_dict().items():
            np.testing.assert_array_equal(back.state_dict()[key], tensor, err_msg=key)
        wanted = {"num_beams": 3, "forced_bos_token_id": 6, "max_length": 9}
        assert wanted.items() <= dict(model.generation_config.options).items()
        assert wanted.items() <= back.generation_config.to_dict().items()
        older = {"decoder": {"num_beams": 2, "max_length": 20}, "num_beams": 1, "forced_bos_token_id": 6}
        asked = conversion.generation_from_hugging_face({}, older, "config.json")
        assert dict(asked.options) == {"num_beams": 2, "forced_bos_token_id": 6}  # 20 is a default that was written
        again = conversion.config_from_hugging_face(json.loads((tmp_path / "ours" / "config.json").read_text()))
        assert again == model.config == SpeechEncoderDecoderConfig(**dataclasses.asdict(model.config))


def xm_transformer(reference):
    """The reference's weights by the names that fairseq's `xm_transformer` gives them, written out by hand."""
    encoder = {k.removeprefix("encoder."): v for k, v in reference.state_dict().items() if k.startswith("encoder.")}
    adapter = {k: encoder.pop(k) for k in list(encoder) if k.startswith("adapter.")}
    names = {f"encoder.w2v_encoder.w2v_model.{k}": v for k, v in fairseq_names(encoder, True).items()}
    for key, value in adapter.items():
        name = key.replace("adapter.layers", "encoder.adaptor.layers").replace(".conv.", ".")
        name = name.replace("adapter.proj_layer_norm", "encoder.w2v_proj_ln")
        names[name.replace("adapter.proj", "encoder.w2v_encoder.proj")] = value
    names |= {
        key.removeprefix("decoder.model."): value
        for key, value in reference.state_dict().items()
        if key.startswith("decoder.model.")
    }
    return names | {
        "decoder.output_projection.weight": reference.decoder.lm_head.weight,
        "decoder.version": torch.tensor([3.0]),
    }


@pytest.mark.parametrize("projected", [True, False], ids=["projected, args", "cfg"])
def test_fairseq_files(projected, tmp_path):
    """`xls_r_…_21_en.pt`: recognised as it is, not as SeamlessM4T or wav2vec 2.0; read strictly; written back."""
    from argparse import Namespace

    import audiozoo
    from audiozoo.loading import variables
    from weights_conversion import seamless_m4t, seamless_m4t_v2, xm_transformer_names
    from weights_conversion.readers import open_tensors

    sizes = {"hidden_size": 32, "num_attention_heads": 16, "intermediate_size": 24}
    sizes |= {"conv_dim": (8,) * 7, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.1}
    sizes |= {k: transformers.Wav2Vec2Config().to_dict()[k] for k in ("conv_kernel", "conv_stride")}
    width = 24 if projected else 32
    changes = sizes | {"output_hidden_size": width, "num_adapter_layers": 3, "decoder": {"d_model": width}}
    if not projected:
        changes["decoder"] |= {"decoder_attention_heads": 4}
    with harness.precision("float32"):
        reference, _, _ = translators(**changes)
        settings = {"_name": "xm_transformer", "arch": "xm_transformer", "activation_fn": "relu", "mask_prob": 0.1}
        settings |= {"decoder_attention_heads": 3 if projected else 4, "adaptor_stride": 2, "decoder_dropout": 0.3}
        inner = {"_name": "wav2vec2", "encoder_attention_heads": 16, "layer_norm_first": True, "activation_fn": "gelu"}
        file = {"model": xm_transformer(reference)}
        if projected:
            file["args"] = Namespace(**settings, w2v_args=Namespace(**inner))
        else:
            file["cfg"] = {"model": settings | {"w2v_args": {"model": inner}}}
        path = tmp_path / "xls_r_21_en.pt"
        torch.save(file, path)
        assert not any(other.recognise(path) for other in (encoders, seamless_m4t, seamless_m4t_v2))
        model = audiozoo.load(path)
        assert isinstance(model, SpeechEncoderDecoderModel)
        assert model.config.decoder.dropout == 0.3
        assert (model.config.encoder.hidden_act, model.config.decoder.activation_function) == ("gelu", "relu")
        x, tokens = padded()[0][:1].astype(np.float32), np.array([[2, 7, 5, 9]])
        with torch.no_grad():
            theirs = reference(torch.tensor(x), decoder_input_ids=torch.tensor(tokens)).logits
        harness.assert_close(jax.jit(lambda m: m(x, decoder_input_ids=tokens).logits)(model), theirs)
        table = xm_transformer_names.fairseq_table(model.config)
        back = dict(table.write({n: v[...] for n, v in variables(model).items()}))
        wanted = {table.today(n): v for n, v in file["model"].items()}
        assert set(wanted) - set(back) == {"decoder.version", "decoder.output_projection.weight"}
        for name, value in back.items():
            np.testing.assert_array_equal(value, wanted[name].detach(), err_msg=name)
        # Another architecture's tensors are listed, and another size's are refused.
        torch.save(file | {"model": file["model"] | {"encoder.adaptor.proj.0.bias": torch.zeros(3)}}, path)
        with pytest.raises(CheckpointError, match=r"encoder\.adaptor\.proj\.0\.bias"):
            audiozoo.load(path)
        file["model"]["encoder.adaptor.layers.0.weight"] = torch.zeros(2 * width, width, 5)
        torch.save(file, path)
        with pytest.raises(CheckpointError, match="5 taps"):
            xm_transformer_names.config_from_fairseq(open_tensors(path))


def test_pieces_of_words(tmp_path):
    import sentencepiece

    text = ["the quick brown fox jumps over the lazy dog", "der schnelle braune Fuchs", "ein Hund und a dog"]
    (tmp_path / "text.txt").write_text("\n".join(text * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sentencepiece.bpe"), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "MBart50Tokenizer", "src_lang": "de_DE", "tgt_lang": "de_DE"})
    )
    theirs = transformers.MBart50Tokenizer.from_pretrained(tmp_path)
    processor = XLSRProcessor.from_directory(tmp_path)
    ours = processor.tokenizer
    assert isinstance(ours, MBart50Tokenizer)
    assert len(ours) == len(theirs)
    assert ours.lang_code_to_id == {code: theirs.convert_tokens_to_ids(code) for code in LANGUAGES}
    for line in [*text, "a fox und zwei"]:
        wanted = theirs(line)["input_ids"]
        assert ours(line)["input_ids"] == wanted
        assert ours.decode(wanted, skip_special_tokens=True) == theirs.decode(wanted, skip_special_tokens=True)
    batch = ours(text, padding=True)
    assert [len(row) for row in batch["input_ids"]] == [len(batch["input_ids"][0])] * 3
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="no language 'xx'"):
        ours.set_target_lang("xx")
    # Which to write: the one that is asked for, or else the checkpoint's.
    into_english = SpeechEncoderDecoderGenerationConfig((("forced_bos_token_id", ours.lang_code_to_id["en_XX"]),))
    for search, code, wanted in (
        (into_english, None, "en_XX"),
        (into_english, "de", "de_DE"),
        (None, "sv_SE", "sv_SE"),
    ):
        model = types.SimpleNamespace(generation_config=search or SpeechEncoderDecoderGenerationConfig())
        assert in_language(model, processor, code) == {"forced_bos_token_id": ours.lang_code_to_id[wanted]}
    with pytest.raises(UsageError, match="xh_ZA, gl_ES, sl_SI; say which with language"):
        in_language(model, processor, None)


def test_labels_shifted():
    shifted = xls_r.shift_tokens_right(jnp.array([[5, 6, -100, -100]]), 1, 2)
    np.testing.assert_array_equal(shifted, [[2, 5, 6, 1]])


def test_dropouts():
    rates = harness.rates(transformers.Wav2Vec2Config())
    reference, model, _ = translators(harness.rates(transformers.MBartConfig()), **rates)
    tokens = np.array([[2, 7, 5, 9], [2, 8, 4, 3]])
    harness.compare_in_training(reference, model, {"input_values": padded()[0], "decoder_input_ids": tokens})
