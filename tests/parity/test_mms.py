"""MMS against `transformers`: each item of a batch in its own language, as one language at a time there; sizes."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import save_file

import audiozoo
from audiozoo.layers.losses import ctc_loss
from audiozoo.loading import speak_language, variables
from audiozoo.models import mms, wav2vec2
from audiozoo.models.mms import MMSConfig, MMSForCTC
from audiozoo.processors.mms import romanised
from tests.parity import harness
from tests.parity.harness import blank
from tests.parity.speech_family import LAYER, NO_DROPOUT, TINY, padded
from tests.parity.test_wav2vec2 import fairseq_names
from tests.test_cli import assert_refused, audiozoo_command  # noqa: F401 - a fixture
from weights_conversion import mms as conversion
from weights_conversion import wav2vec2 as alone

LETTERS = {"deu": 14, "eng": 11, "fra": 17}
CHANGES = LAYER | NO_DROPOUT | {"adapter_attn_dim": 5, "mask_time_prob": 0.0, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What a repository of MMS holds, tiny: a model that speaks English, and adapters of three languages."""
    folder = tmp_path_factory.mktemp("mms")
    with harness.precision("float32"):
        for seed, (language, size) in enumerate(LETTERS.items()):
            config = transformers.Wav2Vec2Config(**(TINY | CHANGES | {"vocab_size": size}))
            model = harness.randomise(transformers.Wav2Vec2ForCTC(config), seed, torch.float32)
            own = {k: v.contiguous() for k, v in model._get_adapters().items()}
            save_file(own, folder / f"adapter.{language}.safetensors", metadata={"format": "pt"})
            if language == "eng":
                model.save_pretrained(folder)
    vocabularies = {
        language: {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4} | {chr(97 + i): i for i in range(5, size)}
        for language, size in LETTERS.items()
    }
    (folder / "vocab.json").write_text(json.dumps(vocabularies))
    (folder / "tokenizer_config.json").write_text(json.dumps({"target_lang": "eng"}))
    return folder


@pytest.fixture(scope="module")
def model(directory):
    foreign = conversion.open_checkpoint(directory, "MMSForCTC")
    from audiozoo.loading import convert

    with harness.precision("float64"):
        return convert(foreign, MMSForCTC, param_dtype=jnp.float64)


SPOKEN = ["fra", "deu", "eng"]


def three():
    """A wave for each of `SPOKEN`, and their mask."""
    x, mask = padded()
    return np.concatenate([x, x[:1, ::-1]]), np.concatenate([mask, mask[:1]])


@pytest.fixture(scope="module")
def originals(directory):
    """What the original makes of `three`, one language at a time."""
    x, mask = three()
    logits = []
    for row, language in enumerate(SPOKEN):
        reference = transformers.Wav2Vec2ForCTC.from_pretrained(directory).double().eval()
        reference.load_adapter(language)
        reference = reference.double()
        with torch.no_grad():
            values, own = torch.tensor(x[row : row + 1]), torch.tensor(mask[row : row + 1])
            logits.append(reference(values, attention_mask=own).logits[0])
    return logits


def test_a_batch_in_three_languages(originals, model):
    x, mask = three()
    labels = np.array([[5, 16, -100], [13, 6, 6], [10, -100, -100]])

    @jax.jit
    def run(m, index):
        return m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(labels), languages=index)

    ours = run(model, model.language_index(SPOKEN, 3))
    assert model.config.languages == ("deu", "eng", "fra")
    losses = []
    for row, (language, theirs) in enumerate(zip(SPOKEN, originals, strict=True)):
        size = LETTERS[language]
        assert theirs.shape[1] == size
        harness.assert_close(ours.logits[row, :, :size], theirs, name=language)
        assert (ours.logits[row, :, size:] == jnp.finfo(jnp.float64).min).all()
        frames = model.backbone.frame_lengths(jnp.asarray(mask[row].sum()))
        losses.append(
            ctc_loss(jnp.asarray(theirs)[None], jnp.asarray(labels[row])[None], frames[None], reduction="sum")
        )
    harness.assert_close(ours.loss, sum(losses), name="loss")


def test_mutations_are_noticed(originals, model):
    x, mask = three()
    run = jax.jit(lambda m, index: m(jnp.asarray(x), jnp.asarray(mask), languages=index).logits)
    spoken = model.language_index(SPOKEN, 3)

    def check():
        logits = run(model, spoken)
        for row, theirs in enumerate(originals):
            harness.assert_close(logits[row, :, : theirs.shape[1]], theirs)

    def exchanged(adapters):
        return adapters[[1, 0, 2]]

    own = "wav2vec2.encoder.layers.0.adapter_layer.linear_2.bias"
    mutations = [
        *harness.perturbations(model, count=3, exclude=r".*masked_spec_embed|lm_head.*"),
        harness.dropped(model, own),
        harness.Changed(model, own, exchanged, "two languages exchanged in"),
        harness.Changed(model, "lm_head.kernel", exchanged, "two languages exchanged in"),
    ]
    assert harness.assert_detects(check, mutations) == 6


def test_gradients_reach_each_language_from_its_own_items(model):
    x, mask = padded()
    labels = jnp.asarray([[5, 6, -100], [7, 6, 6]])

    @jax.jit
    def gradient(m, index):
        return jax.grad(lambda m: m(jnp.asarray(x), jnp.asarray(mask), labels, languages=index).loss)(m)

    found = gradient(model, model.language_index(["fra", "eng"], 2))
    own = found.wav2vec2.encoder.layers[0].adapter_layer.linear_1.kernel[...]
    size = np.abs(own).max(axis=(1, 2))
    assert size[0] == 0  # nobody spoke German
    assert size[1] > 0
    assert size[2] > 0
    # As one language alone, from its own item.
    single = model.speaking("fra")
    values, row = jnp.asarray(x[:1]), jnp.asarray(mask[:1])
    one = jax.jit(jax.grad(lambda m: m(values, row, labels[:1]).loss))(single)
    alone_there = one.wav2vec2.encoder.layers[0].adapter_layer.linear_1.kernel[...]
    harness.assert_close(own[2], alone_there, kind="gradient")


def test_one_language_alone_exports(directory, model, tmp_path):
    with harness.precision("float32"):
        loaded = audiozoo.load(directory, model_class="MMSForCTC")
        french = loaded.speaking("fra")
        audiozoo.export(french, tmp_path / "fra")
        back, info = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "fra", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        reference = transformers.Wav2Vec2ForCTC.from_pretrained(directory)
        reference.load_adapter("fra")
        for key, tensor in reference.state_dict().items():
            np.testing.assert_array_equal(back.state_dict()[key], tensor, err_msg=key)
        audiozoo.save(loaded, tmp_path / "native")
        again = audiozoo.load(tmp_path / "native")
        np.testing.assert_array_equal(again.lm_head.kernel[...], loaded.lm_head.kernel[...])
        assert again.config == loaded.config
    with pytest.raises(ValueError, match=r"export model\.speaking"):
        audiozoo.export(loaded, tmp_path / "all")
    with pytest.raises(ValueError, match="holds no ita; it holds deu, eng, fra"):
        model.language_index(["ita"], 1)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter"):
        audiozoo.load(tmp_path / "fra", model_class="MMSForCTC")


def test_the_command_exports_one_language(directory, audiozoo_command, tmp_path):  # noqa: F811
    """Of a directory of Hugging Face's, and of a native one with all languages."""
    with harness.precision("float32"):
        audiozoo.save(audiozoo.load(directory, model_class="MMSForCTC"), tmp_path / "native", processor_from=directory)
        reference = transformers.Wav2Vec2ForCTC.from_pretrained(directory)
        reference.load_adapter("fra")
        for source, out in ((directory, tmp_path / "one"), (tmp_path / "native", tmp_path / "two")):
            run = audiozoo_command("export", source, out, "--language", "fra")
            assert run.code == 0, run.err
            back, info = transformers.Wav2Vec2ForCTC.from_pretrained(out, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            for key, tensor in reference.state_dict().items():
                np.testing.assert_array_equal(back.state_dict()[key], tensor, err_msg=key)
            tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(out)
            assert (tokenizer.target_lang, tokenizer.vocab_size) == ("fra", LETTERS["fra"])
    refused = audiozoo_command("export", tmp_path / "native", tmp_path / "all")
    assert_refused(refused, "holds deu, eng, fra; say which with --language")
    refused = audiozoo_command("export", directory, tmp_path / "ita", "--language", "ita")
    assert_refused(refused, "has no adapter for 'ita'")


def in_fairseq(state: dict) -> dict:
    """A state dict by the names of fairseq's MMS: one adapter a block, along an axis of length one."""
    own = {"norm.weight": "ln_W", "norm.bias": "ln_b"}
    own |= {f"linear_{i}.{kind}": f"{short}_{x}" for i, x in ((1, "a"), (2, "b")) for kind, short in MAPS}
    result = {}
    for key, tensor in state.items():
        front, adapter, part = key.partition("adapter_layer.")
        if key.startswith("lm_head."):
            result[f"w2v_encoder.proj.{key.removeprefix('lm_head.')}"] = tensor
        elif adapter:
            result[f"w2v_encoder.w2v_model.{front.removeprefix('wav2vec2.')}adapter_layer.{own[part]}"] = tensor[None]
        else:
            ((name, _),) = fairseq_names({key: tensor}, layered=True).items()
            result[f"w2v_encoder.w2v_model.{name}"] = tensor
    return result


MAPS = (("weight", "W"), ("bias", "b"))


class Dictionary:
    """Stands for fairseq's, which a file holds as an object."""

    def __init__(self, symbols):
        self.symbols, self.indices = symbols, {symbol: index for index, symbol in enumerate(symbols)}


def test_fairseqs_file_of_all_languages(directory, audiozoo_command, tmp_path, monkeypatch):  # noqa: F811
    """`mms1b_all.pt`: the network, and every language's adapters, head and alphabet; both ways."""
    from audiozoo.loading import convert

    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):  # what the file's pickle calls it
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(Dictionary, "__module__", name)
    sys.modules[name].Dictionary = Dictionary
    with harness.precision("float32"):
        reference = transformers.Wav2Vec2ForCTC.from_pretrained(directory)
        own = {}
        for language in LETTERS:
            reference.load_adapter(language)
            adapters = {k: v.clone() for k, v in reference._get_adapters().items()}
            symbols = ["<s>", "<pad>", "</s>", "<unk>", "a", "b"]
            own[language] = {"model": in_fairseq(adapters), "task_state": {"target_dictionary": Dictionary(symbols)}}
        reference.load_adapter("eng")
        settings = {"_name": "wav2vec_ctc", "w2v_args": {"model": {"encoder_attention_heads": 3}}}
        settings["w2v_args"]["model"]["conv_feature_layers"] = "[(16, 10, 5), (12, 3, 2), (18, 2, 2)]"
        file = {"cfg": {"model": settings}, "model": in_fairseq(reference.state_dict()), "adapter": own}
        path = tmp_path / "mms1b_all.pt"
        torch.save(file, path)
        loaded = audiozoo.load(path, model_class="MMSForCTC")
        assert loaded.config.languages == tuple(LETTERS)
        assert loaded.config.vocab_sizes == tuple(LETTERS.values())
        wanted = variables(audiozoo.load(directory, model_class="MMSForCTC"))
        for name, leaf in variables(loaded).items():
            np.testing.assert_array_equal(leaf[...], wanted[name][...], err_msg=name)
        # One language alone, and the whole file again.
        french = convert(conversion.open_checkpoint(path, languages=["fra"]), MMSForCTC).speaking("fra")
        ours = variables(loaded.speaking("fra"))
        for name, leaf in variables(french).items():
            np.testing.assert_array_equal(leaf[...], ours[name][...], err_msg=name)
        assert type(audiozoo.load(path)) is wav2vec2.Wav2Vec2ForCTC  # speaks English
        run = audiozoo_command("export", path, tmp_path / "spoken", "--language", "fra")
        assert run.code == 0, run.err
        assert audiozoo.load_processor(tmp_path / "spoken").tokenizer.target_lang == "fra"
        for name, leaf in variables(audiozoo.load(tmp_path / "spoken")).items():
            np.testing.assert_array_equal(leaf[...], ours[name][...], err_msg=name)
        back = conversion.fairseq_checkpoint(loaded)
        assert set(back["adapter"]) == set(LETTERS)
        today = alone.fairseq_table(loaded.config, "Wav2Vec2ForCTC").today
        pairs = [(back["model"], in_fairseq(loaded_first(reference, "deu")))]
        pairs += [(back["adapter"][language]["model"], own[language]["model"]) for language in LETTERS]
        for mine, theirs in pairs:
            theirs = {today(name): value for name, value in theirs.items()}
            assert {today(name) for name in mine} == set(theirs)
            for name, value in mine.items():
                np.testing.assert_array_equal(value, theirs[today(name)].detach(), err_msg=name)
        assert conversion.vocabularies(path)["deu"] == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5}
        # Unpacked, it is a directory of which `transformers` loads a language.
        audiozoo.export(audiozoo.load(path), tmp_path / "hub")
        assert conversion.unpack_languages(path, tmp_path / "hub", ["deu", "fra"]) == ["deu", "fra"]
        unpacked = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "hub")
        unpacked.load_adapter("fra")
        switched = alone.load_adapter(audiozoo.load(path), path, "fra")
        for key, tensor in unpacked.state_dict().items():
            np.testing.assert_array_equal(loaded_first(reference, "fra")[key], tensor, err_msg=key)
        np.testing.assert_array_equal(switched.lm_head.kernel[...], unpacked.lm_head.weight.detach().T)
        assert audiozoo.load_processor(tmp_path / "hub").tokenizer.tokens()[4:] == ["a", "b"]
        # The file alone will do: it speaks the language of its network, and others when asked.
        processor = audiozoo.load_processor(path)
        assert (processor.tokenizer.target_lang, processor.tokenizer.languages) == ("eng", tuple(LETTERS))
        spoken, processor = speak_language(audiozoo.load(path), processor, "fra", str(path))
        np.testing.assert_array_equal(spoken.lm_head.kernel[...], switched.lm_head.kernel[...])
        assert processor.tokenizer.target_lang == "fra"
        with pytest.raises(FileNotFoundError, match="no adapter for ita"):
            conversion.open_checkpoint(path, languages=["ita"])
        own["deu"]["model"].popitem()
        torch.save(file, path)
        with pytest.raises(ValueError, match="adapter for 'deu' does not fit"):
            conversion.open_checkpoint(path)


def loaded_first(reference, language):
    """The state dict of the network when it speaks a language."""
    reference.load_adapter(language)
    return reference.state_dict()


BILLION = LAYER | {
    "hidden_size": 1280,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "codevector_dim": 1024,
    "proj_codevector_dim": 1024,
}
MILLION = BILLION | {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
MILLION |= {"codevector_dim": 768, "proj_codevector_dim": 768}
LID = BILLION | {"classifier_proj_size": 1024}


@pytest.mark.parametrize(
    ("config", "changes", "head"),
    [
        (MMSConfig.mms_300m(), MILLION, "ForPreTraining"),
        (MMSConfig.mms_1b(), BILLION, "ForPreTraining"),
        (MMSConfig.mms_1b_all(), BILLION | {"adapter_attn_dim": 16, "vocab_size": 154}, "ForCTC"),
        (MMSConfig.lid(126), LID | {"num_labels": 126}, "ForSequenceClassification"),
        (MMSConfig.lid(4017), LID | {"num_labels": 4017}, "ForSequenceClassification"),
    ],
    ids=["300m", "1b", "1b-all", "lid-126", "lid-4017"],
)
def test_published_sizes(config, changes, head):
    name = f"Wav2Vec2{head}"
    with harness.precision("float32"):
        harness.assert_same_shapes(
            lambda: getattr(transformers, name)(transformers.Wav2Vec2Config(**changes)),
            lambda: getattr(wav2vec2, name)(config, rngs=nnx.Rngs(0)),
            alone.hugging_face_table(config, name),
        )


def test_full_width_in_float32():
    """Two blocks of the recogniser of a billion parameters, speaking the second of the languages that it holds."""
    config = dataclasses.replace(MMSConfig.mms_1b_all(), num_hidden_layers=2)
    with harness.precision("float32"):
        theirs = BILLION | {"adapter_attn_dim": 16, "vocab_size": 154, "num_hidden_layers": 2}
        reference = harness.randomise(transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**theirs)), 0)
        table = alone.hugging_face_table(config, "Wav2Vec2ForCTC")
        many = dataclasses.replace(config, languages=("eng", "fra"), vocab_sizes=(9, 154))
        model = blank(lambda: MMSForCTC(many, rngs=nnx.Rngs(0)))
        shapes = harness.abstract(lambda: wav2vec2.Wav2Vec2ForCTC(config, rngs=nnx.Rngs(0)))
        source = harness.StateDict(reference.state_dict())
        values = dict(table.read(source, table.plan(source, variables(shapes))))
        own = {name for name in values if ".adapter_layer." in name or name.startswith("lm_head.")}
        harness.assign(model, values | {name: np.stack([np.zeros_like(values[name]), values[name]]) for name in own})
        x = np.random.default_rng(0).standard_normal((1, 16_000)).astype(np.float32)
        with torch.no_grad():
            wanted = reference(torch.tensor(x)).logits
        ours = jax.jit(lambda m, index: m(jnp.asarray(x), languages=index).logits)(model, jnp.asarray([1]))
        harness.assert_close(ours, wanted)


def test_two_million_parameters_a_language():
    """§5.1, as counted in the model."""
    many = MMSConfig(**(vars(MMSConfig.mms_1b_all()) | {"languages": ("eng", "fra"), "vocab_sizes": (154, 154)}))
    shapes = harness.abstract(lambda: MMSForCTC(many, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(shapes, nnx.Param))
    own = sum(int(np.prod(leaf.shape)) for path, leaf in flat if mms.is_of_a_language(path))
    assert own / 2 == pytest.approx(2.3e6, abs=0.1e6)


def test_other_scripts_are_romanised():
    assert romanised("привет") == "privet"
    assert romanised("Übung") == "uebung"
    assert romanised("Don’t!") == "don't"
