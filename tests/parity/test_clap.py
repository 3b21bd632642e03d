"""CLAP against `transformers` in float64; its parts alone.

What `transformers` does not have is compared with LAION's own code in `test_clap_laion.py`.
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
from transformers.models.clap import modeling_clap

import audiozoo
from audiozoo.layers import Dropout, abstract, activations
from audiozoo.models import clap, roberta, swin
from tests.parity import harness
from weights_conversion.clap import (
    _roberta,
    config_from_hugging_face,
    hugging_face_table,
)
from weights_conversion.rules import Ignore, Table

TEXT = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 14,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
AUDIO = {
    "window_size": 2,
    "num_mel_bins": 16,
    "spec_size": 32,
    "patch_size": 4,
    "hidden_size": 16,
    "depths": [2, 1],
    "num_attention_heads": [2, 4],
    "patch_embeds_hidden_size": 8,
    "aff_block_r": 2,
    "hidden_dropout_prob": 0.0,
    "num_hidden_layers": 2,
}
FRAMES = 50  # of 64 that the folded spectrogram holds


@pytest.fixture(scope="module", autouse=True)
def _softmax_in_its_own_dtype():
    """The original's text attention takes its softmax in float32 even in a float64 model; here it may not."""
    original = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: original(x, dim=dim))
        yield


def original(fusion: bool = False, **changes) -> transformers.ClapModel:
    audio = AUDIO | ({"enable_fusion": True, "fusion_type": "aff_2d"} if fusion else {}) | changes
    config = transformers.ClapConfig(text_config=TEXT, audio_config=audio, projection_dim=10)
    return transformers.ClapModel(config)


def blank(name: str, config: clap.ClapConfig, param_dtype=jnp.float64, dtype=None):
    kwargs = {"dtype": dtype, "param_dtype": param_dtype}
    return harness.blank(lambda: getattr(clap, name)(config, **kwargs, rngs=nnx.Rngs(0)))


def pair(fusion: bool = False, seed: int = 0, **changes):
    """The original with random weights, ours with the same, and the table between them."""
    reference = harness.randomise(original(fusion, **changes), seed)
    config = config_from_hugging_face(reference.config.to_dict())
    model = blank("ClapModel", config)
    table = hugging_face_table(config, "ClapModel")
    return reference, harness.port(reference, model, table), table


def inputs(fusion: bool = False, batch: int = 3, frames: int = FRAMES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40, (batch, 9))
    ids[:, 0] = 0
    mask = np.ones((batch, 9), np.int64)
    ids[1, 6:], mask[1, 6:] = 1, 0
    longer = np.array([True, False, True, True])[:batch, None]
    x = {"input_ids": ids, "attention_mask": mask, "is_longer": longer}
    return x | {"input_features": rng.standard_normal((batch, 4 if fusion else 1, frames, 16))}


def torched(x: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array) for name, array in x.items()}


def jaxed(x: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in x.items()}


@pytest.fixture(scope="module")
def fused():
    return pair(fusion=True)


@pytest.fixture(scope="module")
def unfused():
    return pair()


# --- both towers -----------------------------------------------------------------------------------------------------


def test_every_tap_and_output(fused):
    reference, model, table = fused
    x, everything = inputs(fusion=True), {"output_attentions": True, "output_hidden_states": True}
    x["is_longer"] = np.ones((3, 1), bool)  # the original runs its fusion on the longer items alone
    taps = harness.compare_taps(
        reference,
        lambda: reference(**torched(x), **everything),
        model,
        lambda: model(**jaxed(x), **everything),
        table,
        minimum=70,
        skip={
            r"audio_model\.audio_encoder\.batch_norm": "laid out as (batch, mels, frames, views)",
            r".*\.patch_embed\.fusion_model.*": "there (batch, channels, rows, columns), here places in a row",
        },
    )
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert {
        "output.logits_per_audio",
        "output.audio_model_output.hidden_states[2]",
        "output.audio_model_output.attentions[1]",
        "output.text_model_output.attentions[1]",
    } <= set(compared)


@pytest.mark.parametrize(
    "changes",
    [
        # The second stage is one window, not shifted.
        {"depths": [2, 2], "window_size": 4, "hidden_act": "relu", "qkv_bias": False},
        {"depths": [2, 2], "spec_size": 48, "window_size": 5},
        {"patch_size": 6, "enable_patch_layer_norm": False, "mlp_ratio": 2.0},
    ],
    ids=["one window", "grids that windows do not divide", "patches that overlap"],
)
def test_sizes(changes):
    reference, model, _ = pair(**changes)
    x = inputs(frames=60)
    with torch.no_grad():
        theirs = reference(**torched(x), output_hidden_states=True)
    ours = audiozoo.jit(model)(**jaxed(x), output_hidden_states=True)
    harness.compare_outputs(ours.audio_model_output, theirs.audio_model_output)
    harness.compare_outputs(ours.logits_per_text, theirs.logits_per_text)


def paper_loss(output) -> torch.Tensor:
    """Eq. 2 of the paper, and what LAION's code computes: both directions."""
    labels = torch.arange(len(output.logits_per_text))
    rows = torch.nn.functional.cross_entropy
    return (rows(output.logits_per_audio, labels) + rows(output.logits_per_text, labels)) / 2


def test_loss_and_every_gradient(fused):
    reference, model, table = fused
    x = inputs(fusion=True)
    compared = harness.compare_gradients(
        reference,
        lambda: paper_loss(reference(**torched(x))),
        model,
        jax.jit(lambda m: m(**jaxed(x), return_loss=True).loss),
        table,
    )
    assert "audio_model.audio_encoder.patch_embed.fusion_model.attention.global_att.conv1.kernel" in compared
    assert {"logit_scale_a", "logit_scale_t"} <= set(compared)


def test_the_loss_of_transformers_looks_one_way_only(unfused):
    """Its second term is the cross-entropy of the transposed logits: texts looking for sounds, twice."""
    reference, model, _ = unfused
    x = inputs()
    with torch.no_grad():
        theirs = reference(**torched(x), return_loss=True)
        papers = paper_loss(theirs)
    ours = audiozoo.jit(model)(**jaxed(x), return_loss=True)
    harness.assert_close(ours.loss, papers, name="Eq. 2")
    one_way = [
        -np.diag(np.asarray(jax.nn.log_softmax(z))).mean() for z in (ours.logits_per_text, ours.logits_per_audio.T)
    ]
    harness.assert_close(np.mean(one_way), theirs.loss, name="the loss of transformers")
    assert abs(float(ours.loss) - float(theirs.loss)) > 1e-3


def test_batches_normalised_by_their_own_statistics(fused):
    """Training: items that are not fused do not count in the fusion's statistics; running ones move as PyTorch's."""
    reference, model, table = fused
    before = {n: b.clone() for n, b in reference.named_buffers()}
    x = inputs(fusion=True)
    try:
        with torch.no_grad():
            theirs = reference.train()(**torched(x))
        after = {n: b.clone() for n, b in reference.named_buffers()}
    finally:
        reference.eval()
        reference.load_state_dict(before, strict=False)

    @jax.jit
    def step(graphdef_state):
        trained = nnx.merge(*graphdef_state)
        output = trained(**jaxed(x), key=jax.random.key(0))
        return output, nnx.state(trained, nnx.BatchStat)

    output, statistics = step(nnx.split(model))
    harness.compare_outputs(output.logits_per_audio, theirs.logits_per_audio)
    ours = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(statistics)}
    moved = {
        s.ours[0]: after[s.foreign[0]] for s in table.steps_for(harness.parameters(model)) if s.foreign[0] in after
    }
    assert set(moved) == set(ours)
    assert len(ours) == 2 * 5
    for path, value in moved.items():
        harness.assert_close(ours[path], value, name=path)


@pytest.mark.parametrize("name", ["ClapTextModelWithProjection", "ClapAudioModelWithProjection"])
def test_one_tower(name):
    whole = original(fusion=True)
    part = whole.config.text_config if "Text" in name else whole.config.audio_config
    reference = harness.randomise(getattr(transformers, name)(part))
    config = config_from_hugging_face(part.to_dict())
    model = blank(name, config)
    harness.port(reference, model, hugging_face_table(config, name))
    wanted = ("input_ids", "attention_mask") if "Text" in name else ("input_features", "is_longer")
    x = {k: v for k, v in inputs(fusion=True).items() if k in wanted}
    with torch.no_grad():
        theirs = reference(**torched(x))
    compared = harness.compare_outputs(audiozoo.jit(model)(**jaxed(x)), theirs)
    assert "output.text_embeds" in compared or "output.audio_embeds" in compared


def test_features_and_items_that_are_not_longer(fused):
    """An item that is not longer equals itself in any batch, and what the model gives with no fusion at all."""
    reference, model, _ = fused
    x = inputs(fusion=True)
    short = np.zeros((3, 1), bool)
    with torch.no_grad():
        theirs = reference.get_audio_features(torch.tensor(x["input_features"]), torch.tensor(short)).pooler_output
        text = reference.get_text_features(torch.tensor(x["input_ids"]), torch.tensor(x["attention_mask"]))
    encode = audiozoo.jit(model, "get_audio_features")
    ours = encode(jnp.asarray(x["input_features"]), jnp.asarray(short)).pooler_output
    harness.assert_close(ours, theirs, name="audio features")
    mixed = encode(jnp.asarray(x["input_features"]), jnp.asarray(x["is_longer"])).pooler_output
    harness.assert_close(mixed[1], theirs[1], name="the short item among longer ones")
    assert np.abs(mixed[0] - ours[0]).max() > 1e-3
    words = audiozoo.jit(model, "get_text_features")(jnp.asarray(x["input_ids"]), jnp.asarray(x["attention_mask"]))
    harness.assert_close(words.pooler_output, text.pooler_output, name="text features")


def test_mutations_are_noticed(fused):
    reference, model, _ = fused
    x = inputs(fusion=True)
    with torch.no_grad():
        theirs = reference(**torched(x))

    def check():
        ours = jax.jit(lambda m: m(**jaxed(x)).logits_per_audio)(model)
        harness.assert_close(ours, theirs.logits_per_audio)

    encoder = "audio_model.audio_encoder."
    mutations = [
        harness.dropped(model, encoder + "layers.0.blocks.1.attention.relative_position_bias_table"),
        harness.dropped(model, encoder + "patch_embed.fusion_model.attention.local_att.norm2.mean"),
        harness.dropped(model, "text_model.layers.1.attention.v_proj.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
        harness.Replaced(swin, "MASKED", 0.0),
    ]
    assert harness.assert_detects(check, mutations) == 5


# --- the parts alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs_", "outputs"), [(1001, 1024), (1, 4), (2, 7), (64, 64), (5, 3), (7, 1)])
def test_bicubic_resize_is_torchs(inputs_, outputs):
    x = np.random.default_rng(0).standard_normal((2, inputs_, 3))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x)[:, None], (outputs, 3), mode="bicubic", align_corners=True
    )[:, 0]
    harness.assert_close(clap.resize_cubic(jnp.asarray(x), outputs, 1), theirs, name="resized")


@pytest.mark.parametrize(("frames", "mels"), [(FRAMES, 16), (64, 13)])
def test_folding(unfused, frames, mels):
    """One axis stretched at a time: `transformers` stretches time, then bands, at the frames there were before."""
    reference, model, _ = unfused
    x = np.random.default_rng(0).standard_normal((2, 1, frames, mels))
    theirs = reference.audio_model.audio_encoder.reshape_mel2img(torch.tensor(x))
    ours = clap.fold(jnp.asarray(x), model.config.audio_config)
    harness.assert_close(ours, theirs, name="folded")


@pytest.mark.parametrize(("rows", "columns", "window", "shift"), [(8, 8, 4, 2), (6, 9, 3, 1), (4, 8, 2, 1)])
def test_windows_shifts_and_masks(rows, columns, window, shift):
    x = np.random.default_rng(0).standard_normal((2, rows, columns, 3))
    theirs = modeling_clap.window_partition(torch.tensor(x), window)
    ours = swin.window_partition(jnp.asarray(x), window)
    np.testing.assert_array_equal(ours, theirs.reshape(-1, window**2, 3))
    np.testing.assert_array_equal(swin.window_reverse(ours, window, rows, columns), x)
    config = transformers.ClapAudioConfig(**(AUDIO | {"window_size": window}))
    layer = modeling_clap.ClapAudioLayer(config, 8, (rows, columns), 2, shift_size=shift)
    np.testing.assert_array_equal(
        swin.shift_mask(rows, columns, window, shift), layer.get_attn_mask(rows, columns, torch.float64, "cpu")
    )
    index = layer.attention.self.create_relative_position_index()
    np.testing.assert_array_equal(swin.relative_position_index(window), index)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
def test_merging_order(shape):
    reference = harness.randomise(modeling_clap.ClapAudioPatchMerging(4))
    ours = swin.PatchMerging(4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    state = {k: v.numpy() for k, v in reference.state_dict().items()}
    values = {"norm.scale": state["norm.weight"], "norm.bias": state["norm.bias"]}
    harness.assign(ours, values | {"reduction.kernel": state["reduction.weight"].T})
    x = np.random.default_rng(0).standard_normal((2, *shape, 4))
    theirs = reference(torch.tensor(x).flatten(1, 2), shape)
    harness.assert_close(ours(jnp.asarray(x)).reshape(theirs.shape), theirs, name="merged")


def test_a_shifted_window_sees_its_neighbours_only():
    """Figure 4 of Swin: what wraps around the image's edge is not seen."""
    block = swin.SwinBlock(4, (8, 8), 2, 4, shifted=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 4)))
    seen = jax.jit(jax.grad(lambda y: block(y, Dropout(None))[0][0, 0, 0].sum()))(x)[0]
    reached = np.asarray(jnp.abs(seen).sum(-1)) > 1e-20
    assert reached[:2, :2].all()
    assert reached.sum() == 4


ROBERTA = Table(_roberta("", ""), ignored=(Ignore(r"embeddings\.(position_ids|token_type_ids)", "tables"),))


def test_roberta_alone():
    """The paper's own encoder, at its own eps, to its longest text; and positions that are given."""
    theirs_config = transformers.RobertaConfig(**(TEXT | {"layer_norm_eps": 1e-5}), attn_implementation="eager")
    reference = harness.randomise(transformers.RobertaModel(theirs_config))
    names = {f.name for f in dataclasses.fields(roberta.RobertaConfig)}
    config = roberta.RobertaConfig(**{n: v for n, v in theirs_config.to_dict().items() if n in names})
    model = abstract(lambda rngs: roberta.RobertaModel(config, param_dtype=jnp.float64, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    model = harness.port(reference, nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat)), ROBERTA)
    ids = np.random.default_rng(0).integers(3, 40, (2, config.longest_text))
    mask = np.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = config.pad_token_id, 0
    run, counted = audiozoo.jit(model), roberta.positions_of(jnp.asarray(ids), config.pad_token_id)
    backwards = np.arange(2, 2 + config.longest_text)[None, ::-1].repeat(2, axis=0)
    for ours, given in ((counted, {}), (jnp.asarray(backwards), {"position_ids": torch.tensor(backwards.copy())})):
        with torch.no_grad():
            theirs = reference(torch.tensor(ids), torch.tensor(mask), **given, output_hidden_states=True)
        harness.compare_outputs(run(jnp.asarray(ids), jnp.asarray(mask), ours, output_hidden_states=True), theirs)


@pytest.mark.parametrize(("size", "millions"), [("base", 124.6), ("large", 355.4)])
def test_robertas_published_sizes(size, millions):
    config = getattr(roberta.RobertaConfig, size)()
    theirs = transformers.RobertaConfig(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, bos_token_id=0, eos_token_id=2
    )
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.RobertaModel(theirs), lambda: roberta.RobertaModel(config, rngs=nnx.Rngs(0)), ROBERTA
        )
    assert round(count / 1e6, 1) == millions


# --- directories -----------------------------------------------------------------------------------------------------


def test_directories_there_and_back(tmp_path):
    with harness.precision("float32"):
        reference, _, _ = pair(fusion=True)
        reference.save_pretrained(tmp_path / "theirs")
        model = audiozoo.load(tmp_path / "theirs")
        assert type(model) is clap.ClapModel
        x = inputs(fusion=True)
        x["input_features"] = x["input_features"].astype(np.float32)
        with torch.no_grad():
            theirs = reference(**torched(x))
        harness.compare_outputs(audiozoo.jit(model)(**jaxed(x)), theirs)
        audiozoo.export(model, tmp_path / "ours")
        back, info = transformers.ClapModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert _tensor_names(tmp_path / "ours") == _tensor_names(tmp_path / "theirs")
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name]), name
        for name in ("ClapTextModelWithProjection", "ClapAudioModelWithProjection"):
            tower = audiozoo.load(tmp_path / "theirs", model_class=name)
            audiozoo.export(tower, tmp_path / name)
            alone, info = getattr(transformers, name).from_pretrained(tmp_path / name, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert all(torch.equal(t, reference.state_dict()[n]) for n, t in alone.state_dict().items())
            assert type(audiozoo.load(tmp_path / name)).__name__ == name


def _tensor_names(directory) -> set[str]:
    with (directory / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return set(json.loads(file.read(size))) - {"__metadata__"}


# --- published sizes -------------------------------------------------------------------------------------------------

BASE = {"hidden_size": 1024, "patch_embeds_hidden_size": 128, "depths": [2, 2, 12, 2]}
LARGE = {"hidden_size": 2048, "patch_embeds_hidden_size": 256, "depths": [2, 2, 12, 2]}
PUBLISHED = {
    "htsat_unfused": {},
    "htsat_fused": {"enable_fusion": True, "fusion_type": "aff_2d"},
    "larger": BASE,
    "largest": LARGE,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = getattr(clap.ClapConfig, name)()
    theirs = transformers.ClapConfig(audio_config=PUBLISHED[name])
    assert config_from_hugging_face(theirs.to_dict()) == config
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.ClapModel(theirs),
            lambda: clap.ClapModel(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, "ClapModel"),
        )
    assert name != "htsat_unfused" or round(count / 1e6, 1) == 153.5


def test_full_size_in_float32():
    config = clap.ClapConfig.htsat_fused()
    with harness.precision("float32"):
        theirs = transformers.ClapAudioConfig(enable_fusion=True, fusion_type="aff_2d")
        reference = harness.randomise(transformers.ClapAudioModelWithProjection(theirs), 0, torch.float32)
        model = blank("ClapAudioModelWithProjection", config, jnp.float32)
        harness.port(reference, model, hugging_face_table(config, "ClapAudioModelWithProjection"))
        x = np.random.default_rng(0).standard_normal((1, 4, 1001, 64)).astype(np.float32)
        with torch.no_grad():
            expected = reference(torch.tensor(x), torch.ones((1, 1), dtype=torch.bool))
        ours = audiozoo.jit(model)(jnp.asarray(x), jnp.ones((1, 1), bool))
        harness.compare_outputs(ours, expected)


def test_bfloat16_stays_close(unfused):
    _, model, _ = unfused
    half = blank("ClapModel", model.config, jnp.bfloat16, jnp.bfloat16)
    harness.assign(half, harness.parameters(model))
    x = jaxed(inputs())
    ours = audiozoo.jit(half)(**x).logits_per_audio
    assert ours.dtype == jnp.bfloat16
    wanted = np.asarray(audiozoo.jit(model)(**x).logits_per_audio, np.float32)
    harness.assert_close(ours, wanted, name="bfloat16 logits")


def test_dropouts(monkeypatch):
    """The original drops after the audio tower's MLPs, and in the text tower."""
    monkeypatch.setitem(TEXT, "hidden_dropout_prob", 0.2)
    monkeypatch.setitem(TEXT, "attention_probs_dropout_prob", 0.3)
    rates = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.5, "drop_path_rate": 0.0}
    reference, model, _ = pair(**rates)
    harness.compare_in_training(reference, model, inputs())
