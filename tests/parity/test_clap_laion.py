"""CLAP against LAION's own package: every fusion, the tagging head, both losses, and its files.

Small models of LAION's classes, random weights. Of what the package imports besides PyTorch, the models need nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import audiozoo
from audiozoo import cli
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models import clap
from audiozoo.processors.clap import ClapFeatureExtractor
from audiozoo.text.roberta_tokenizer import RobertaTokenizer
from tests.parity import harness
from tests.parity.test_clap import blank
from tests.text.tiny_bpe import MERGES, vocabulary
from weights_conversion.clap import ORIGINAL_TABLE, config_from_original, hugging_face

AUDIO = {"model_type": "HTSAT", "model_name": "tiny", "class_num": 6, "hop_size": 480}
TEXT = {"context_length": 9, "vocab_size": 40, "width": 768, "heads": 12, "layers": 1, "model_type": "roberta"}
BODY = {"depths": [2, 1, 1, 1], "num_heads": [2, 2, 4, 4], "embed_dim": 8, "window_size": 4, "spec_size": 128}
ROBERTA = {
    "vocab_size": 40,
    "hidden_size": 768,  # LAION's projection takes no other
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "intermediate_size": 20,
    "max_position_embeddings": 14,
    "layer_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
FRAMES = 250  # of 256 that the folded spectrogram holds


@pytest.fixture(scope="module", autouse=True)
def _softmax_in_its_own_dtype():
    """The original's text attention takes its softmax in float32 even in a float64 model; here it may not."""
    original = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None, **_: original(x, dim=dim))
        yield


@pytest.fixture(scope="module")
def laion():
    """`laion_clap` as it is on PyPI, without what its beginning imports: training, and a hub."""
    if importlib.util.find_spec("laion_clap") is None or importlib.util.find_spec("torchlibrosa") is None:
        pytest.skip("the original needs `pip install --no-deps laion-clap==1.1.7 torchlibrosa==0.1.0`")
    (folder,) = importlib.util.find_spec("laion_clap").submodule_search_locations
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "h5py", "laion_clap", "laion_clap.clap_module")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            module = types.ModuleType(name)
            module.__path__ = [str(Path(folder, *name.split(".")[1:]))]
            patch.setitem(sys.modules, name, module)
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.Identity
        parts = [importlib.import_module(f"laion_clap.clap_module.{part}") for part in ("model", "htsat", "loss")]
    return types.SimpleNamespace(**dict(zip(("model", "htsat", "loss"), parts, strict=True)))


def released(laion, fusion: str | None) -> torch.nn.Module:
    """LAION's whole model, random but for its tables, with a small HTSAT and a RoBERTa of one layer."""

    def htsat(config, enable_fusion, fusion_type):
        options = {"config": config, "num_classes": config.class_num, **BODY}
        return laion.htsat.HTSAT_Swin_Transformer(enable_fusion=enable_fusion, fusion_type=fusion_type, **options)

    roberta = types.SimpleNamespace(
        from_pretrained=lambda _: transformers.RobertaModel(transformers.RobertaConfig(**ROBERTA))
    )
    with mock.patch.multiple(laion.model, create_htsat_model=htsat, RobertaModel=roberta):
        options = {"enable_fusion": fusion is not None, "fusion_type": fusion or "None", "joint_embed_shape": 10}
        model = laion.model.CLAP(64, AUDIO, TEXT, **options)
    tables = {n: b.clone() for n, b in model.named_buffers() if n.endswith("attn_mask")}
    tables |= {n: p.detach().clone() for n, p in model.named_parameters() if "_extractor." in n}
    reference = harness.randomise(model, 3)
    reference.load_state_dict(tables, strict=False)
    return reference


def inputs(fusion: str | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 40, (3, 9)), np.ones((3, 9), np.int64)
    ids[:, 0], ids[1, 6:], mask[1, 6:] = 0, 1, 0
    features = rng.standard_normal((3, 4 if fusion else 1, FRAMES, 64))
    longer = np.array([[True], [False], [True]])
    return {"input_ids": ids, "attention_mask": mask, "input_features": features, "is_longer": longer}


def theirs_of(laion, reference: torch.nn.Module, x: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What LAION's model gives for spectrograms, which one that does not fuse makes of waveforms itself."""
    mel = torch.tensor(x["input_features"])
    heard = reference.audio_branch
    heard.spectrogram_extractor, heard.logmel_extractor = torch.nn.Identity(), torch.nn.Identity()
    audio = {"waveform": mel, "mel_fusion": mel, "longer": torch.tensor(x["is_longer"])}
    text = {name: torch.tensor(x[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        tags = reference.encode_audio(audio, device="cpu")
        one, two, one_mlp, two_mlp, scale_a, scale_t = reference(audio, text, device="cpu")
        loss = laion.loss.ClipLoss(mlp_loss=True)(one, two, scale_a, scale_t, one_mlp, two_mlp)
        plain = laion.loss.ClipLoss()(one, two, scale_a)
    return tags | {"audio_embeds": one, "text_embeds": two, "loss": loss, "plain_loss": plain}


@jax.jit
def ours_of(model: clap.ClapModel, x: dict[str, jax.Array]):
    tagged = model.audio_model.tag(x["input_features"], x["is_longer"])
    output = model(**x, return_loss=True)
    scale = jnp.exp(model.logit_scale_a[...])
    return tagged, output, clap.contrastive_loss(output.audio_embeds, output.text_embeds, scale, scale)


@pytest.mark.parametrize("fusion", clap.FUSIONS)
def test_every_fusion(laion, fusion):
    """What enters the Swin stages, of a batch in which one item is not longer; every name of the file is known."""
    reference, x, entered = released(laion, fusion), inputs(fusion), []
    names = harness.StateDict(reference.state_dict())
    config = config_from_original(names)
    assert config.audio_config.fusion == fusion
    model = blank("ClapModel", config)
    steps = ORIGINAL_TABLE.plan(names, harness.parameters(model))
    left = set(names.names()) - {name for step in steps for name in step.foreign}
    marks = ("_extractor.", "attn_mask", "_index", "num_batches_tracked", "_ids", ".head.", "global_att2.")
    assert all(any(mark in name for mark in marks) for name in left), left
    harness.assign(model, dict(ORIGINAL_TABLE.read(names, steps)))
    reference.audio_branch.pos_drop.register_forward_hook(lambda _, given, __: entered.append(given[0]))
    reference.audio_branch.layers = torch.nn.ModuleList()
    with torch.no_grad(), pytest.raises((RuntimeError, UnboundLocalError)):  # nothing is left to come after
        reference.encode_audio(
            {"mel_fusion": torch.tensor(x["input_features"]), "longer": torch.tensor(x["is_longer"])}, device="cpu"
        )

    @jax.jit
    def patches(encoder, features, longer):
        y = encoder.batch_norm(features)
        if encoder.mel_fusion is not None:
            y = encoder.mel_fusion(y, longer)
        return encoder.patch_embed(clap.fold(y, encoder.config), longer)

    encoder = model.audio_model.audio_encoder
    ours = patches(encoder, jnp.asarray(x["input_features"]), jnp.asarray(x["is_longer"][:, 0]))
    harness.assert_close(ours.reshape(entered[0].shape), entered[0], name=f"patches fused by {fusion}")
    if fusion != "aff_2d":
        with pytest.raises(CheckpointError, match="aff_2d alone"):
            hugging_face(model)


@pytest.mark.parametrize("fusion", [None, "iaff_2d"])
def test_a_whole_file(laion, fusion, tmp_path):
    """As LAION writes it: embeddings, tags over time, both losses, and back."""
    reference, x = released(laion, fusion), inputs(fusion)
    names = {f"module.{name}": tensor for name, tensor in reference.state_dict().items()}
    torch.save({"epoch": 3, "name": "mine", "state_dict": names}, tmp_path / "630k-best.pt")
    model = audiozoo.load(tmp_path / "630k-best.pt", param_dtype=jnp.float64)
    config = model.config.audio_config
    assert config.fusion == fusion
    assert (config.spec_size, config.depths, config.window_size) == (128, (2, 1, 1, 1), 4)
    assert config.tagging_head
    assert model.config.embedding_mlps
    theirs = theirs_of(laion, reference, x)
    tagged, output, plain = ours_of(model, {name: jnp.asarray(array) for name, array in x.items()})
    for name in ("clipwise_output", "framewise_output", "fine_grained_embedding", "embedding"):
        harness.assert_close(tagged[name], theirs[name], name=name)
    for name in ("audio_embeds", "text_embeds", "loss"):
        harness.assert_close(output[name], theirs[name], name=name)
    harness.assert_close(plain, theirs["plain_loss"], name="the loss of two terms")
    for name, array in dict(ORIGINAL_TABLE.write(harness.parameters(model))).items():
        np.testing.assert_array_equal(array, names[f"module.{name}"].numpy(), err_msg=name)
    features = audiozoo.load_processor(tmp_path / "630k-best.pt").feature_extractor
    assert vars(features) == vars(ClapFeatureExtractor.laion(fusion is not None))  # 50 Hz, 16 bits: no file says so
    if fusion is None:
        audiozoo.export(model, tmp_path / "out")  # without the head and the MLPs
        _, info = transformers.ClapModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def test_features_of_a_waveform(laion):
    """What a model that does not fuse computes by convolutions, from 50 Hz on, in decibels."""
    heard = released(laion, None).audio_branch
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000)
    with torch.no_grad():
        theirs = heard.logmel_extractor(heard.spectrogram_extractor(torch.tensor(wave)[None]))[0]
    extract = ClapFeatureExtractor.laion(fusion=False)
    extract.quantize = False
    ours = np.asarray(extract.in_jax(jnp.asarray(wave)[None])[0], np.float32)
    harness.assert_close(ours, theirs.float(), kind="features", name="log-mel in dB")


def test_a_file_from_the_shell(laion, tmp_path, monkeypatch, capsys):
    """Without RoBERTa's tokenizer it reads sounds alone, and says so; with it, whatever lies beside it, texts too."""
    file = tmp_path / "mine" / "630k-best.pt"
    file.parent.mkdir()
    torch.save(released(laion, None).float().state_dict(), file)

    def convert(out):
        monkeypatch.setattr("sys.argv", ["audiozoo", "convert", str(file), str(out)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return audiozoo.load_processor(out), capsys.readouterr().err

    def resolve(source, **_):
        if not Path(source).exists():
            raise SourceError("There is no connection.")
        return Path(source)

    monkeypatch.setattr("audiozoo.hub.resolve", resolve)
    processor, said = convert(tmp_path / "deaf")
    assert "will have no tokenizer" in said
    assert processor.feature_extractor.frequency_min == 50
    with pytest.raises(SourceError, match=r"reads no text.*merges\.txt"):
        processor(text="a dog")
    RobertaTokenizer.from_vocabulary(vocabulary(), MERGES).save(file.parent)
    processor, said = convert(tmp_path / "whole")
    assert "tokenizer" not in said
    assert processor.decode(processor(text="the dog")["input_ids"][0], skip_special_tokens=True) == "the dog"
    assert processor.feature_extractor.frequency_min == 50
