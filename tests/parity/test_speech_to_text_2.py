"""Speech2Text2 against PyTorch's own Transformer decoder, and against what `transformers` 4.40.2 computed.

No `transformers` of today has this decoder. Live, it is compared with a second statement of it, made of
`torch.nn.TransformerDecoderLayer` (which normalises last, as the paper does), behind the live wav2vec 2.0 of
`transformers`: outputs, every block, gradients. Tokens of searches, gradients and texts of the last `transformers` that
had it lie in `tests/golden/speech_to_text_2_search.npz`, its taps in `speech_to_text_2.npz`.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo import checkpoints
from audiozoo.errors import CheckpointError
from audiozoo.layers import fairseq_sinusoids
from audiozoo.loading import convert, variables
from audiozoo.models import speech_to_text_2
from audiozoo.models.speech_to_text_2 import LanguageModelFusion, Speech2Text2Config, Speech2Text2ForCausalLM
from audiozoo.models.xls_r import SpeechEncoderDecoderConfig, SpeechEncoderDecoderModel
from audiozoo.processors import write_json
from audiozoo.processors.speech_to_text_2 import Speech2Text2Tokenizer
from tests.golden import golden
from tests.golden import speech_to_text_2_search as search
from tests.golden.cases import speech_to_text_2 as case
from tests.models.random_model import random_model
from tests.parity import harness
from tests.parity.speech_family import LAYER, NO_DROPOUT, TINY, padded
from tests.parity.test_wav2vec2 import fairseq_names
from weights_conversion import speech_to_text_2 as conversion
from weights_conversion import xls_r as translators
from weights_conversion.readers import write_safetensors

DECODER = Speech2Text2Config(
    vocab_size=19, d_model=20, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=28, dropout=0.0,
    tie_word_embeddings=False,
)  # fmt: skip
TOKENS = np.array([[2, 7, 5, 9, 6], [2, 8, 4, 1, 1]])
LABELS = np.array([[7, 5, 9, 6, 2], [8, 4, 2, -100, -100]])


def with_state(create, table):
    """Ours with random weights, and the same under the foreign names."""
    model = random_model(create, table)
    return model, dict(table.write({name: np.asarray(v[...]) for name, v in variables(model).items()}))


class Statement:
    """The decoder, said with PyTorch's layers."""

    def __init__(self, state, config, prefix=""):
        self.state = {k.removeprefix(prefix): torch.tensor(v, requires_grad=True) for k, v in state.items()}
        self.config = config

    def layer(self, i):
        c, w = self.config, self.state
        layer = torch.nn.TransformerDecoderLayer(
            c.d_model, c.decoder_attention_heads, c.decoder_ffn_dim, 0.0, batch_first=True, norm_first=False
        )
        at, given = f"model.decoder.layers.{i}.", {}
        for ours, theirs in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
            for kind in ("weight", "bias"):
                parts = [w[f"{at}{theirs}.{p}_proj.{kind}"] for p in "qkv"]
                given[f"{ours}.in_proj_{kind}"] = torch.cat(parts)
                given[f"{ours}.out_proj.{kind}"] = w[f"{at}{theirs}.out_proj.{kind}"]
        names = {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm"}
        names |= {"norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
        given |= {f"{o}.{k}": w[f"{at}{t}.{k}"] for o, t in names.items() for k in ("weight", "bias")}
        return lambda *args, **kwargs: torch.func.functional_call(layer, given, args, kwargs)

    def __call__(self, tokens, memory, memory_mask=None):
        """Logits, and the state before each block and after the last."""
        tokens = torch.tensor(tokens)
        real = tokens != 1
        rows = torch.where(real, real.cumsum(1) + 1, 1)
        table = torch.tensor(fairseq_sinusoids(tokens.shape[1] + 2, self.config.d_model))
        embedding = self.state["model.decoder.embed_tokens.weight"]
        x = embedding[tokens] * self.config.d_model**0.5 + table[rows]
        states = [x]
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        hidden = None if memory_mask is None else ~torch.tensor(memory_mask)
        for i in range(self.config.decoder_layers):
            x = self.layer(i)(x, memory, tgt_mask=causal, memory_key_padding_mask=hidden)
            states.append(x)
        return x @ self.state.get("lm_head.weight", embedding).T, states


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(LABELS).flatten())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_decoder_and_its_gradients(tied):
    config = dataclasses.replace(DECODER, tie_word_embeddings=tied)
    table = conversion.hugging_face_table(config)
    model, state = with_state(lambda rngs: Speech2Text2ForCausalLM(config, param_dtype="float64", rngs=rngs), table)
    theirs = Statement(state, config)
    memory = np.random.default_rng(0).standard_normal((2, 7, config.d_model))
    mask = np.arange(7) < np.array([[7], [4]])
    logits, states = theirs(TOKENS, torch.tensor(memory), mask)

    def run(model):
        return model(
            jnp.asarray(TOKENS), None, jnp.asarray(memory), jnp.asarray(mask), labels=jnp.asarray(LABELS),
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip

    def check():
        ours = jax.jit(lambda m: run(m))(model)
        harness.assert_close(ours.logits, logits)
        for a, b in zip(ours.hidden_states[:-1], states, strict=False):
            harness.assert_close(a, b)
        assert len(ours.cross_attentions) == config.decoder_layers
        return ours

    loss = loss_of(logits)
    harness.assert_close(check().loss, loss)
    loss.backward()
    gradients = jax.jit(jax.grad(lambda m: run(m).loss))(model)
    found = dict(table.write({n: np.asarray(v[...]) for n, v in variables(gradients).items()}))
    largest = max(np.sqrt(np.mean(np.square(g))) for g in found.values())
    for name, tensor in theirs.state.items():
        scale = max(np.sqrt(np.mean(np.square(tensor.grad.numpy()))), 1e-3 * largest)
        harness.assert_close(found[name], tensor.grad, kind="gradient", name=name, scale=scale)
    if not tied:
        mutations = harness.perturbations(model, 2, exclude=r".*(embed_tokens|k_proj\.bias).*")
        kind = speech_to_text_2.Speech2Text2DecoderLayer
        pre_norm = harness.Replaced(kind, "norm_first", True)
        harness.assert_detects(check, [*mutations, pre_norm])


def test_without_an_encoder_it_is_a_language_model():
    model = random_model(
        lambda rngs: Speech2Text2ForCausalLM(DECODER, param_dtype="float64", rngs=rngs),
        conversion.hugging_face_table(DECODER),
    )
    alone = jax.jit(lambda m: m(jnp.asarray(TOKENS)).logits)(model)
    assert alone.shape == (2, 5, 19)
    again = jax.jit(lambda m: m(jnp.asarray(TOKENS[:, :3])).logits)(model)
    harness.assert_close(alone[:, :3], again)


ENCODER = {k: v for k, v in (TINY | LAYER | NO_DROPOUT).items() if k not in ("vocab_size", "num_labels")}
ENCODER |= {"num_hidden_layers": 1, "mask_time_prob": 0.0}
FAMILY = {
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    "unispeech": (transformers.UniSpeechConfig, transformers.UniSpeechModel),
    "unispeech-sat": (transformers.UniSpeechSatConfig, transformers.UniSpeechSatModel),
    "sew": (transformers.SEWConfig, transformers.SEWModel),
}


@pytest.mark.parametrize("kind", FAMILY)
def test_any_encoder_of_the_family_before_it(kind, tmp_path):
    """The live encoder, a projection and the statement of the decoder, against one directory loaded as one model."""
    config_class, model_class = FAMILY[kind]
    encoder = harness.randomise(model_class(config_class(**ENCODER, attn_implementation="eager")), 0)
    table = conversion.hugging_face_table(DECODER)
    _, decoder = with_state(lambda rngs: Speech2Text2ForCausalLM(DECODER, param_dtype="float64", rngs=rngs), table)
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((20, 24)) * 0.2, rng.standard_normal(20) * 0.2
    tensors = {f"encoder.{k}": v.numpy() for k, v in encoder.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.items()}
    tensors |= {"enc_to_dec_proj.weight": kernel, "enc_to_dec_proj.bias": bias}
    # Files of before hold the sinusoids too.
    tensors["decoder.model.decoder.embed_positions.weights"] = np.zeros((5, 20))
    raw = {"architectures": ["SpeechEncoderDecoderModel"], "model_type": "speech-encoder-decoder"}
    # Published configurations call the head tied, and it is not.
    text = conversion.config_to_hugging_face(DECODER) | {"tie_word_embeddings": True}
    raw |= {"encoder": encoder.config.to_dict(), "decoder": text, **case.SPECIAL}
    write_json(tmp_path / "config.json", json.loads(json.dumps(raw, default=str)))
    write_safetensors(tmp_path, tensors.items())
    foreign = translators.open_checkpoint(tmp_path)
    assert foreign.config.decoder == DECODER
    model = convert(foreign, SpeechEncoderDecoderModel, param_dtype="float64")
    x, mask = padded()
    with torch.no_grad():
        states = encoder(torch.tensor(x), attention_mask=torch.tensor(mask)).last_hidden_state
        memory = states @ torch.tensor(kernel).T + torch.tensor(bias)
        frames = encoder._get_feature_vector_attention_mask(memory.shape[1], torch.tensor(mask)).bool().numpy()
        wanted, _ = Statement(decoder, DECODER)(TOKENS, memory, frames)
    call = jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(TOKENS)).logits)
    harness.assert_close(call(model), wanted)
    if kind == "wav2vec2":
        form = translators.hugging_face(model)
        with checkpoints.written_whole(tmp_path / "ours") as folder:
            for file, content in form.files.items():
                write_json(folder / file, content)
            write_safetensors(folder, form.table.write({n: v[...] for n, v in variables(model).items()}))
        again = translators.open_checkpoint(tmp_path / "ours")
        assert again.config == model.config == SpeechEncoderDecoderConfig(**dataclasses.asdict(model.config))
        for name in again.tensors.names():
            np.testing.assert_array_equal(again.tensors.read(name), tensors[name], err_msg=name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fairseq_files(tied, tmp_path):
    """A `wav2vec_seq2seq` under fairseq's names: the same model as the directory with the same weights, and back."""
    text = dataclasses.replace(DECODER, tie_word_embeddings=tied, max_target_positions=2048)
    their_config = transformers.Wav2Vec2Config(**(ENCODER | {"mask_time_prob": 0.5}))
    with harness.precision("float32"):
        encoder = harness.randomise(transformers.Wav2Vec2Model(their_config), 0, torch.float32)
        table = conversion.hugging_face_table(text)
        _, decoder = with_state(lambda rngs: Speech2Text2ForCausalLM(text, rngs=rngs), table)
        rng = np.random.default_rng(0)
        projection = {"weight": rng.standard_normal((20, 24)), "bias": rng.standard_normal(20)}
        projection = {n: v.astype(np.float32) for n, v in projection.items()}
        # Hugging Face's directory
        tensors = {f"encoder.{k}": v.numpy() for k, v in encoder.state_dict().items()}
        tensors |= {f"decoder.{k}": v for k, v in decoder.items()}
        tensors |= {f"enc_to_dec_proj.{k}": v for k, v in projection.items()}
        raw = {"architectures": ["SpeechEncoderDecoderModel"], "model_type": "speech-encoder-decoder", **case.SPECIAL}
        raw |= {"encoder": their_config.to_dict(), "decoder": conversion.config_to_hugging_face(text)}
        (tmp_path / "directory").mkdir()
        write_json(tmp_path / "directory" / "config.json", json.loads(json.dumps(raw, default=str)))
        write_safetensors(tmp_path / "directory", tensors.items())
        # fairseq's file
        layered = their_config.feat_extract_norm == "layer"
        names = fairseq_names(encoder.state_dict(), layered)
        state = {f"encoder.w2v_model.{k}": v for k, v in names.items()}
        state |= {f"encoder.proj.{k}": torch.tensor(v) for k, v in projection.items()}
        for name, values in decoder.items():
            name = "decoder.embed_out" if name == "lm_head.weight" else name.removeprefix("model.")
            state[name] = torch.tensor(values)
        marks = {"decoder.embed_positions._float_tensor": torch.zeros(1), "decoder.version": torch.tensor([3.0])}
        convolutions = zip(their_config.conv_dim, their_config.conv_kernel, their_config.conv_stride, strict=True)
        inner = {
            "_name": "wav2vec2",
            "encoder_attention_heads": their_config.num_attention_heads,
            "layer_norm_first": their_config.do_stable_layer_norm,
            "conv_feature_layers": str(list(convolutions)),
        }
        outer = {"_name": "wav2vec_seq2seq", "w2v_args": {"model": inner}, "decoder_attention_heads": 4}
        outer |= {"decoder_normalize_before": False, "decoder_dropout": 0.0, "apply_mask": True, "mask_prob": 0.5}
        path = tmp_path / "fairseq" / "checkpoint_best.pt"
        path.parent.mkdir()
        torch.save({"cfg": {"model": outer}, "args": None, "model": state | marks}, path)
        pieces = (f"{piece} 1\n" for piece in ["gu@@", "ten", "\x85", "tag", *map(str, range(11))])
        (path.parent / "dict.de.txt").write_text("".join(pieces), encoding="utf-8")

        assert translators.recognise(path)
        foreign, directory = (translators.open_checkpoint(p) for p in (path, tmp_path / "directory"))
        assert foreign.config.decoder == directory.config.decoder
        (model, wanted) = (convert(c, SpeechEncoderDecoderModel) for c in (foreign, directory))
        assert type(audiozoo.load(path)) is SpeechEncoderDecoderModel
        found = variables(model)
        for name, variable in variables(wanted).items():
            np.testing.assert_array_equal(found[name][...], variable[...], err_msg=name)
        assert len(found) == len(variables(wanted))
        again = dict(foreign.table.write({name: np.asarray(v[...]) for name, v in found.items()}))
        assert set(again) == {foreign.table.today(name) for name in state}
        for name, tensor in state.items():
            np.testing.assert_array_equal(again[foreign.table.today(name)], tensor.numpy(), err_msg=name)
        processor = audiozoo.load_processor(path)
        assert processor.batch_decode(np.array([[2, 4, 5, 7, 2]]), skip_special_tokens=True) == ["guten tag"]
        torch.save({"cfg": {"model": outer | {"decoder_normalize_before": True}}, "model": state}, path)
        with pytest.raises(CheckpointError, match="decoder_normalize_before=True, which is not built"):
            translators.open_checkpoint(path)


# --- what transformers 4.40.2 computed -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept():
    with np.load(search.PATH) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def translator():
    return golden.randomised(case.case(), "float64")


@pytest.mark.parametrize("name", search.SEARCHES)
def test_tokens(kept, translator, name):
    x = case.inputs()
    options = {"forced_eos_token_id": None} | search.SEARCHES[name]
    ours = translator.generate(jnp.asarray(x["input_values"]), jnp.asarray(x["attention_mask"]), **options)
    np.testing.assert_array_equal(ours, kept[f"tokens.{name}"])


def test_gradients_summarised(kept, translator):
    x = {name: jnp.asarray(array) for name, array in case.inputs().items()}
    table = case.case().table

    def loss(model):
        return model(x["input_values"], x["attention_mask"], labels=x["labels"]).loss

    gradients = jax.jit(jax.grad(loss))(translator)
    found = dict(table.write({n: np.asarray(v[...]) for n, v in variables(gradients).items()}))
    wanted = {n.removeprefix("gradient."): v for n, v in kept.items() if n.startswith("gradient.")}
    assert len(wanted) > 60
    largest = max(v[0] for v in wanted.values())
    for name, (norm, total, moment) in wanted.items():
        ours, size = search.summary(found[name]), found[name].size
        scale = max(norm, 1e-3 * largest)
        assert ours[0] == pytest.approx(norm, abs=1e-9 * scale), name
        assert ours[1] == pytest.approx(total, abs=1e-9 * scale * size**0.5), name
        assert ours[2] == pytest.approx(moment, abs=1e-9 * scale * size**1.5), name


def test_texts(kept, tmp_path):
    texts = json.loads(str(kept["texts"]))
    write_json(tmp_path / "vocab.json", search.VOCABULARY)
    decoder = Speech2Text2Tokenizer.from_directory(tmp_path)
    assert decoder.batch_decode(search.DECODED, skip_special_tokens=True) == texts["decoded"]
    assert decoder.batch_decode(search.DECODED, clean_up_tokenization_spaces=False) == texts["untidied"]
    with pytest.raises(ValueError, match=r"no merges\.txt"):
        decoder("der hund")
    tokenizer = Speech2Text2Tokenizer(search.VOCABULARY, search.MERGES, do_lower_case=True)
    tokenizer.save(tmp_path)
    again = Speech2Text2Tokenizer.from_directory(tmp_path)
    assert again(search.ENCODED)["input_ids"] == texts["encoded"]
    model = harness.abstract(lambda: Speech2Text2ForCausalLM(Speech2Text2Config.covost_en_de(), rngs=nnx.Rngs(0)))
    assert sum(int(np.prod(v.shape)) for v in variables(model).values()) == texts["parameters"]


# --- decoding with a language model ----------------------------------------------------------------------------------


def test_shallow_fusion_against_all_texts(translator):
    """Against the scores of every text of three tokens, summed by hand."""
    x = {name: jnp.asarray(array) for name, array in case.inputs().items() if name != "labels"}
    config = dataclasses.replace(DECODER, vocab_size=23)
    author = random_model(
        lambda rngs: Speech2Text2ForCausalLM(config, param_dtype="float64", rngs=rngs),
        conversion.hugging_face_table(config),
    )
    fusion = LanguageModelFusion(author, 0.7)
    options = {"max_length": 4, "num_beams": 23 * 8, "return_dict_in_generate": True, "forced_eos_token_id": None}
    found = speech_to_text_2.translate(translator, **x, fusion=fusion, length_penalty=0.0, **options)
    vocabulary = np.arange(23)
    texts = np.stack(np.meshgrid([2], vocabulary, vocabulary, vocabulary, indexing="ij"), -1).reshape(-1, 4)
    ended = np.cumsum(texts[:, 1:] == 2, axis=1) - (texts[:, 1:] == 2)
    texts = texts[~np.any((ended > 0) & (texts[:, 1:] != 1), axis=1)]
    encoded, mask = jax.jit(lambda m: m.encode(**x))(translator)
    for row in range(2):
        memory = jnp.broadcast_to(encoded.last_hidden_state[row], (len(texts), *encoded.last_hidden_state.shape[1:]))
        seen = jnp.broadcast_to(mask[row], (len(texts), mask.shape[1]))
        inputs = jnp.asarray(texts[:, :-1])
        said = jax.jit(lambda m, i, h, s: m.decoder(i, None, h, s).logits)(translator, inputs, memory, seen)
        liked = jax.jit(lambda m, i: m(i).logits)(author, inputs)
        scores = jax.nn.log_softmax(said) + 0.7 * jax.nn.log_softmax(liked)
        chosen = np.take_along_axis(np.asarray(scores), texts[:, 1:, None], axis=2)[..., 0]
        before = np.cumsum(texts[:, 1:] == 2, axis=1) - (texts[:, 1:] == 2)
        totals = np.where(before > 0, 0, chosen).sum(axis=1)
        best = texts[np.argmax(totals)]
        np.testing.assert_array_equal(found.sequences[row][: len(best)], best[: found.sequences.shape[1]])
    plain = speech_to_text_2.translate(translator, **x, max_length=6, num_beams=2)
    silent = speech_to_text_2.translate(
        translator, **x, max_length=6, num_beams=2, fusion=LanguageModelFusion(author, 0.0)
    )
    np.testing.assert_array_equal(plain, silent)
