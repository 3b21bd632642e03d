"""AST against `transformers` in float64, against the forward of its own project's files, and DeiT's way to AST."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo import cli
from audiozoo.audio import read
from audiozoo.errors import CheckpointError
from audiozoo.layers import activations
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.recipes import recipe
from tests.parity import harness
from weights_conversion.audio_spectrogram_transformer import (
    ORIGINAL_TABLE,
    config_from_hugging_face,
    config_from_original,
    features_of,
    from_deit,
    hugging_face_table,
)

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "patch_size": 4,
    "frequency_stride": 3,
    "time_stride": 2,
    "max_length": 13,
    "num_mel_bins": 11,
}
CLASSIFIER = "ASTForAudioClassification"


@pytest.fixture
def softmax_in_its_own_dtype(monkeypatch):
    """The original's eager attention takes its softmax in float32 even in a float64 model; here it may not."""
    original = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: original(x, dim=dim))


def pair(name: str = CLASSIFIER, seed: int = 0, attention: str = "eager", **changes):
    """The original with random weights, ours with the same, and the table between them."""
    theirs_config = transformers.ASTConfig(**(TINY | {"num_labels": 5} | changes), attn_implementation=attention)
    reference = harness.randomise(getattr(transformers, name)(theirs_config), seed)
    config = config_from_hugging_face(theirs_config.to_dict())
    table = hugging_face_table(config, name)
    create = lambda: getattr(ast, name)(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
    return reference, harness.ported(reference, create, table), table


def features(batch: int = 2, seed: int = 0, time: int = 13, mels: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, time, mels))


EVERYTHING = {"output_attentions": True, "output_hidden_states": True}


@pytest.mark.usefixtures("softmax_in_its_own_dtype")
@pytest.mark.parametrize("name", ["ASTModel", CLASSIFIER])
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "relu", "qkv_bias": False}], ids=["gelu", "relu, no biases"])
def test_every_tap_and_output(name, changes):
    reference, model, table = pair(name, **changes)
    x = features()
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), **EVERYTHING),
        table,
        minimum=27,
    )
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert {"output.hidden_states[2]", "output.attentions[1]"} <= set(compared)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frequency_stride": 4, "time_stride": 4},
        {"frequency_stride": 1, "time_stride": 3, "max_length": 17, "num_mel_bins": 6},
        {"max_length": 4, "num_mel_bins": 4},  # one patch
        {"hidden_size": 21, "patch_size": 1},
    ],
    ids=str,
)
def test_sizes_and_strides_by_the_stock_attention(changes):
    """`sdpa`, untouched: in float64 it casts nothing."""
    reference, model, _ = pair(attention="sdpa", **changes)
    x = features(3, time=model.config.max_length, mels=model.config.num_mel_bins)
    with torch.no_grad():
        theirs = reference(torch.tensor(x), output_hidden_states=True)
    harness.compare_outputs(audiozoo.jit(model)(jnp.asarray(x), output_hidden_states=True), theirs)


def test_attention_mask():
    reference, model, _ = pair("ASTModel", attention="sdpa")
    mask = np.ones((2, 2 + 15), np.int64)
    mask[0, 9:] = 0
    mask[1, [3, 11]] = 0
    with torch.no_grad():
        theirs = reference(torch.tensor(features()), attention_mask=torch.tensor(mask))
        unmasked = reference(torch.tensor(features()))
    harness.compare_outputs(model(jnp.asarray(features()), jnp.asarray(mask)), theirs)
    assert np.abs(theirs.pooler_output - unmasked.pooler_output).max() > 1e-3


def test_the_released_attention_rounds_to_float32():
    """What the fixture above takes away: with it the same model differs at float32's precision, and no further."""
    reference, model, _ = pair()
    x = features()
    with torch.no_grad():
        theirs = reference(torch.tensor(x)).logits.numpy()
    apart = np.abs(np.asarray(model(jnp.asarray(x)).logits) - theirs).max()
    assert 1e-12 < apart < 1e-6


LOSSES = {
    "single_label_classification": (5, np.array([4, 0])),
    "multi_label_classification": (5, np.random.default_rng(1).uniform(0, 1, (2, 5))),
    "regression": (1, np.array([0.3, -1.2])),
}


@pytest.mark.parametrize("problem", LOSSES)
@pytest.mark.parametrize("named", [False, True], ids=["by the labels", "by the configuration"])
def test_losses_and_every_gradient(problem, named):
    count, labels = LOSSES[problem]
    changes = {"problem_type": problem} if named else {}
    reference, model, table = pair(attention="sdpa", num_labels=count, **changes)
    assert model.config.problem_type == (problem if named else None)
    x = features()
    if named:
        with torch.no_grad():
            theirs = reference(torch.tensor(x), labels=torch.tensor(labels))
        harness.compare_outputs(audiozoo.jit(model)(jnp.asarray(x), jnp.asarray(labels)), theirs)
        return
    compared = harness.compare_gradients(
        reference,
        lambda: reference(torch.tensor(x), labels=torch.tensor(labels)).loss,
        model,
        lambda m: m(jnp.asarray(x), labels=jnp.asarray(labels)).loss,
        table,
    )
    assert len(compared) == 5 + 2 * 16 + 2 + 4
    assert reference.config.problem_type == problem


def test_mutations_are_noticed():
    reference, model, _ = pair(attention="sdpa")
    x = features()
    with torch.no_grad():
        theirs = reference(torch.tensor(x))

    def check():
        harness.compare_outputs(model(jnp.asarray(x)), theirs)

    mutations = [
        *harness.perturbations(model, count=3),
        harness.dropped(model, "audio_spectrogram_transformer.layers.1.attention.v_proj.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
    ]
    assert harness.assert_detects(check, mutations) == 5


# --- directories, both spellings -------------------------------------------------------------------------------------


def test_directories_there_and_back(tmp_path):
    """What `save_pretrained` writes (old names) loads; what we write loads there, to the bit, with no key left over."""
    with harness.precision("float32"):
        reference, _, _ = pair(num_labels=3)
        reference.config.id2label = {0: "bark", 1: "meow", 2: "moo"}
        reference.save_pretrained(tmp_path / "theirs")
        names = _tensor_names(tmp_path / "theirs")
        assert "audio_spectrogram_transformer.encoder.layer.0.attention.attention.query.weight" in names
        model = audiozoo.load(tmp_path / "theirs")
        assert type(model) is ast.ASTForAudioClassification
        assert model.config.id2label == ("bark", "meow", "moo")
        x = features().astype(np.float32)
        with torch.no_grad():
            harness.compare_outputs(model(jnp.asarray(x)), reference(torch.tensor(x)))
        audiozoo.export(model, tmp_path / "ours")
        back, info = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert _tensor_names(tmp_path / "ours") == names
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name]), name
        assert back.config.id2label == {0: "bark", 1: "meow", 2: "moo"}

        bare = audiozoo.load(tmp_path / "theirs", model_class="ASTModel")
        with torch.no_grad():
            theirs = reference.audio_spectrogram_transformer(torch.tensor(x))
        harness.compare_outputs(bare(jnp.asarray(x)), theirs)
        audiozoo.export(bare, tmp_path / "bare")
        _, info = transformers.ASTModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with pytest.raises(CheckpointError, match=r"classifier\.dense\.kernel"):
            audiozoo.load(tmp_path / "bare", model_class=CLASSIFIER)
        tuned = audiozoo.load(tmp_path / "bare", model_class=CLASSIFIER, initialize=r"classifier\..*")
        inside = tuned.audio_spectrogram_transformer(jnp.asarray(x)).pooler_output
        harness.assert_close(inside, np.asarray(bare(jnp.asarray(x)).pooler_output))


def _tensor_names(directory) -> set[str]:
    with (directory / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return set(json.loads(file.read(size))) - {"__metadata__"}


# --- the project's own files -----------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A block of a vision Transformer under `timm`'s names."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.LayerNorm(width, eps=1e-6)
        self.attn = torch.nn.ModuleDict(
            {"qkv": torch.nn.Linear(width, 3 * width), "proj": torch.nn.Linear(width, width)}
        )
        self.norm2 = torch.nn.LayerNorm(width, eps=1e-6)
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(width, inner), "fc2": torch.nn.Linear(inner, width)})

    def forward(self, x):
        batch, tokens, width = x.shape
        fused = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Original(torch.nn.Module):
    """The forward of the released `ASTModel` over a plain distilled DeiT, names and epsilons included."""

    def __init__(
        self,
        labels: int,
        strides: tuple[int, int],
        grid: tuple[int, int],
        width: int = 64,
        layers: int = 2,
        inner: int = 96,
    ):
        super().__init__()
        self.v = torch.nn.Module()
        self.v.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.v.dist_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.v.pos_embed = torch.nn.Parameter(torch.zeros(1, 2 + grid[0] * grid[1], width))
        self.v.patch_embed = torch.nn.Module()
        self.v.patch_embed.proj = torch.nn.Conv2d(1, width, 16, strides)
        self.v.blocks = torch.nn.Sequential(*(Block(width, width // 64, inner) for _ in range(layers)))
        self.v.norm = torch.nn.LayerNorm(width, eps=1e-6)
        self.v.head, self.v.head_dist = torch.nn.Linear(width, 10), torch.nn.Linear(width, 10)
        self.mlp_head = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, labels))

    def forward(self, x):
        x = self.v.patch_embed.proj(x.unsqueeze(1).transpose(2, 3)).flatten(2).transpose(1, 2)
        tokens = [token.expand(len(x), -1, -1) for token in (self.v.cls_token, self.v.dist_token)]
        x = self.v.norm(self.v.blocks(torch.cat([*tokens, x], dim=1) + self.v.pos_embed))
        return self.mlp_head((x[:, 0] + x[:, 1]) / 2)


@pytest.mark.parametrize(
    ("name", "labels", "stride", "length", "grid"),
    [
        ("audioset_10_10_0.4593.pth", 527, 10, 1024, (12, 101)),
        ("audioset_12_12_0.4467.pth", 527, 12, 1024, (10, 85)),
        ("audioset_16_16_0.4422.pth", 527, 16, 1024, (8, 64)),
        ("speechcommands_10_10_0.9812.pth", 35, 10, 128, (12, 12)),
        ("best_audio_model.pth", 50, 10, 512, (12, 50)),
        ("mine_14_14_.pth", 3, 14, 100, (9, 7)),
    ],
)
def test_the_projects_own_files(tmp_path, name, labels, stride, length, grid):
    reference = harness.randomise(Original(labels, (stride, stride), grid), 1)
    torch.save({f"module.{k}": v for k, v in reference.state_dict().items()}, tmp_path / name)
    model = audiozoo.load(tmp_path / name, param_dtype=jnp.float64)
    config = model.config
    assert (config.time_stride, config.max_length, config.grid) == (stride, length, grid)
    assert (config.layer_norm_eps, config.classifier_layer_norm_eps) == (1e-6, 1e-5)
    x = features(1, time=length, mels=128) * 0.01 if length > 512 else features(2, time=length, mels=128)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    harness.assert_close(audiozoo.jit(model)(jnp.asarray(x)).logits, theirs, name="logits")
    source = harness.StateDict(reference.state_dict())
    assert dataclasses.replace(config_from_original(source, tmp_path / name)) == config
    written = dict(ORIGINAL_TABLE.write(harness.parameters(model)))
    for key, array in written.items():
        np.testing.assert_array_equal(array, reference.state_dict()[key].numpy(), err_msg=key)


RELEASED = {
    **dict.fromkeys((f"audioset_10_10_0.{score}.pth" for score in (4593, 4495, 4483, 4475)), "audioset_10_10"),
    "audioset_12_12_0.4467.pth": "audioset_12_12",
    "audioset_14_14_0.4431.pth": "audioset_14_14",
    "audioset_16_16_0.4422.pth": "audioset_16_16",
    "speechcommands_10_10_0.9812.pth": "speech_commands_v2",
}


def test_every_released_file_by_its_shapes(tmp_path):
    """The names of the README, at the base model's size; nothing is computed."""
    with torch.device("meta"):
        state = Original(1, (10, 10), (1, 1), 768, 12, inner=3072).state_dict()
    for name, size in RELEASED.items():
        wanted = getattr(ast.ASTConfig, size)()
        state["v.pos_embed"] = torch.empty((1, 2 + wanted.grid[0] * wanted.grid[1], 768), device="meta")
        state["mlp_head.1.weight"] = torch.empty((wanted.num_labels, 768), device="meta")
        config = config_from_original(harness.StateDict({f"module.{k}": v for k, v in state.items()}), tmp_path / name)
        assert (config.layer_norm_eps, config.classifier_layer_norm_eps) == (1e-6, 1e-5)
        assert dataclasses.replace(config, layer_norm_eps=1e-12, classifier_layer_norm_eps=1e-12) == wanted, name
        task = ASTFeatureExtractor.speech_commands() if size == "speech_commands_v2" else ASTFeatureExtractor.audioset()
        assert vars(features_of(config)) == vars(task)


def test_one_of_the_projects_files_from_the_shell(tmp_path, monkeypatch, capsys):
    """Its features, which it does not hold, are those of its task; its classes are named by the list beside it."""
    reference = harness.randomise(Original(35, (10, 10), (12, 12), layers=1), 1, torch.float32)
    path, names = tmp_path / "speechcommands_10_10_0.9812.pth", [f"word, {i}" for i in range(35)]
    torch.save(reference.state_dict(), path)
    rows = [f'{i},/m/{i},"{name}"' for i, name in enumerate(names)]
    table = tmp_path / "speechcommands_class_labels_indices.csv"
    table.write_text("\n".join(["index,mid,display_name", *rows]), encoding="utf-8")
    wanted = vars(ASTFeatureExtractor.speech_commands())
    assert vars(audiozoo.load_processor(path)) == wanted
    monkeypatch.setattr("sys.argv", ["audiozoo", "convert", str(path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert vars(audiozoo.load_processor(tmp_path / "out")) == wanted
    assert audiozoo.load(tmp_path / "out").config.id2label == tuple(names)
    table.write_text("index,mid\n0,/m/0\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no list of classes"):
        audiozoo.load(path)
    ASTFeatureExtractor.esc50().save(tmp_path)  # what lies beside the file counts
    table.unlink()
    assert vars(audiozoo.load_processor(path)) == vars(ASTFeatureExtractor.esc50())
    with pytest.warns(
        UserWarning, match=r"names of its 35 classes.* list of them beside it: class_labels_indices\.csv"
    ) as said:
        assert audiozoo.load(path).config.id2label[:2] == ("LABEL_0", "LABEL_1")
    assert len(said) == 1
    monkeypatch.setattr("sys.argv", ["audiozoo", "convert", str(path), str(tmp_path / "unnamed")])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().err
    assert f"\n{path} does not hold the names of its 35 classes" in told
    assert "UserWarning" not in told


def test_epsilons_survive_a_directory(tmp_path):
    reference = harness.randomise(Original(3, (14, 14), (9, 7)), 1, torch.float32)
    torch.save(reference.state_dict(), tmp_path / "mine_14_14_.pth")
    model = audiozoo.load(tmp_path / "mine_14_14_.pth")
    audiozoo.export(model, tmp_path / "out")
    assert audiozoo.load(tmp_path / "out").config == model.config
    theirs = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.layer_norm_eps == 1e-6


# --- from ImageNet ---------------------------------------------------------------------------------------------------


def released_positions(pos_embed: torch.Tensor, side: int, grid: tuple[int, int]) -> torch.Tensor:
    """What the released code makes of DeiT's positions."""
    width, (rows, columns) = pos_embed.shape[-1], grid
    table = pos_embed[:, 2:].transpose(1, 2).reshape(1, width, side, side)
    if columns <= side:
        start = int(side / 2) - int(columns / 2)
        table = table[..., start : start + columns]
    else:
        table = torch.nn.functional.interpolate(table, size=(side, columns), mode="bilinear")
    if rows <= side:
        start = int(side / 2) - int(rows / 2)
        table = table[:, :, start : start + rows]
    else:
        table = torch.nn.functional.interpolate(table, size=(rows, columns), mode="bilinear")
    return torch.cat([pos_embed[:, :2], table.reshape(1, width, -1).transpose(1, 2)], dim=1)


@pytest.mark.parametrize(
    ("side", "grid"),
    [(24, (12, 101)), (24, (12, 12)), (14, (12, 50)), (14, (14, 14)), (14, (23, 9)), (24, (31, 60)), (5, (1, 1))],
)
def test_positions_are_cut_and_interpolated_alike(side, grid):
    table = torch.tensor(np.random.default_rng(0).standard_normal((1, 2 + side**2, 3)))
    ours = ast.resize_position_embeddings(table.numpy(), (side, side), grid)
    harness.assert_close(ours, released_positions(table, side, grid), name="positions")


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 3), (101, 24), (3, 7), (2, 1), (513, 101)])
def test_interpolation_is_torchs(outputs, inputs):
    row = torch.tensor(np.random.default_rng(0).standard_normal((1, 1, inputs)))
    theirs = torch.nn.functional.interpolate(row, size=outputs, mode="linear")[0, 0]
    harness.assert_close(ast.interpolation_matrix(outputs, inputs) @ row[0, 0].numpy(), theirs, name="interpolated")


def test_an_image_model_starts_an_audio_model(tmp_path):
    image = harness.randomise(Original(3, (16, 16), (24, 24)), 2)
    deit = {k.removeprefix("v."): v for k, v in image.state_dict().items() if k.startswith("v.")}
    colours = torch.tensor(np.random.default_rng(3).standard_normal((64, 3, 16, 16)) * 0.05)
    deit["patch_embed.proj.weight"] = colours
    torch.save({"model": deit}, tmp_path / "deit.pth")
    names = tuple("abcd")
    model = from_deit(tmp_path / "deit.pth", rngs=nnx.Rngs(0), param_dtype=jnp.float64, max_length=300, id2label=names)
    assert model.config.grid == (12, 29)
    reference = Original(4, (10, 10), (12, 29)).double().eval()
    state = {f"v.{k}": v for k, v in deit.items()}
    state["v.patch_embed.proj.weight"] = colours.sum(dim=1).unsqueeze(1)
    state["v.pos_embed"] = released_positions(deit["pos_embed"], 24, (12, 29))
    head = dict(ORIGINAL_TABLE.write(harness.parameters(model)))
    state |= {k: torch.tensor(v) for k, v in head.items() if k.startswith("mlp_head")}
    reference.load_state_dict(state)
    x = features(1, time=300, mels=128)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    harness.assert_close(audiozoo.jit(model)(jnp.asarray(x)).logits, theirs, name="logits")
    with pytest.raises(CheckpointError, match="from_deit"):
        audiozoo.load(tmp_path / "deit.pth", model_class=CLASSIFIER)
    torch.save({k: v for k, v in deit.items() if k != "dist_token"}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="no distilled DeiT"):
        from_deit(tmp_path / "vit.pth", rngs=nnx.Rngs(0))


def test_positions_between_two_sound_tasks():
    """The rule of the released code for its AudioSet weights, whose grid is 12 by 101."""
    table = torch.tensor(np.random.default_rng(0).standard_normal((1, 2 + 12 * 101, 3)))
    grid = table[:, 2:].transpose(1, 2).reshape(1, 3, 12, 101)
    for rows, columns in ((12, 12), (12, 50), (9, 100), (5, 101), (12, 150), (14, 150), (31, 7), (23, 101)):
        if columns < 101:
            wanted = grid[..., 50 - int(columns / 2) : 50 - int(columns / 2) + columns]
        else:
            wanted = torch.nn.functional.interpolate(grid, size=(12, columns), mode="bilinear")
        if rows < 12:
            wanted = wanted[:, :, 6 - int(rows / 2) : 6 - int(rows / 2) + rows]
        elif rows > 12:
            wanted = torch.nn.functional.interpolate(wanted, size=(rows, columns), mode="bilinear")
        ours = ast.resize_position_embeddings(table.numpy(), (12, 101), (rows, columns))
        harness.assert_close(ours[:, 2:], wanted.reshape(1, 3, -1).transpose(1, 2), name=f"{rows} x {columns}")


def test_a_resized_model_is_the_released_one_with_other_positions():
    """Longer, with more bands, and at another stride: the forward, not the table alone."""
    reference, weights = (Original(3, (s, s), g, layers=1) for s, g in ((10, (12, 12)), (9, (14, 20))))
    reference = harness.randomise(reference, 1)
    state = dict(reference.state_dict())
    config = config_from_original(harness.StateDict(state), Path("mine_10_10_.pth"))
    create = lambda: ast.ASTForAudioClassification(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
    model = harness.ported(reference, create, ORIGINAL_TABLE)
    ours = ast.resized(model, max_length=190, num_mel_bins=140, time_stride=9, frequency_stride=9)
    assert ours.config.grid == (14, 20)
    grid = state["v.pos_embed"][:, 2:].transpose(1, 2).reshape(1, 64, 12, 12)
    grid = torch.nn.functional.interpolate(grid, size=(14, 20), mode="bilinear")
    state["v.pos_embed"] = torch.cat([state["v.pos_embed"][:, :2], grid.reshape(1, 64, -1).transpose(1, 2)], dim=1)
    weights.double().eval().load_state_dict(state)
    x = features(2, time=190, mels=140)
    with torch.no_grad():
        theirs = weights(torch.tensor(x))
    harness.assert_close(audiozoo.jit(ours)(jnp.asarray(x)).logits, theirs, name="logits")


# --- published sizes -------------------------------------------------------------------------------------------------

PUBLISHED = {
    "audioset_10_10": {"num_labels": 527},
    "audioset_12_12": {"num_labels": 527, "frequency_stride": 12, "time_stride": 12},
    "audioset_14_14": {"num_labels": 527, "frequency_stride": 14, "time_stride": 14},
    "audioset_16_16": {"num_labels": 527, "frequency_stride": 16, "time_stride": 16},
    "esc50": {"num_labels": 50, "max_length": 512},
    "speech_commands_v2": {"num_labels": 35, "max_length": 128},
    "tiny": {"num_labels": 527, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"num_labels": 527, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = getattr(ast.ASTConfig, name)()
    theirs = transformers.ASTConfig(**PUBLISHED[name])
    assert dataclasses.replace(config_from_hugging_face(theirs.to_dict()), id2label=config.id2label) == config
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.ASTForAudioClassification(theirs),
            lambda: ast.ASTForAudioClassification(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, CLASSIFIER),
        )
    assert name != "audioset_10_10" or count == 86_594_063


def test_full_size_in_float32():
    config = ast.ASTConfig.audioset_10_10()
    with harness.precision("float32"):
        reference = transformers.ASTForAudioClassification(transformers.ASTConfig(num_labels=527))
        reference = harness.randomise(reference, 0, torch.float32)
        create = lambda: ast.ASTForAudioClassification(config, rngs=nnx.Rngs(0))  # noqa: E731
        model = harness.ported(reference, create, hugging_face_table(config, CLASSIFIER))
        x = features(1, time=1024, mels=128).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(audiozoo.jit(model)(jnp.asarray(x)), theirs)


def test_bfloat16_stays_close():
    _, model, _ = pair()
    x = jnp.asarray(features())
    kwargs = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    half = harness.blank(lambda: ast.ASTForAudioClassification(model.config, **kwargs, rngs=nnx.Rngs(0)))
    harness.assign(half, harness.parameters(model))
    ours = audiozoo.jit(half)(x).logits
    assert ours.dtype == jnp.bfloat16
    harness.assert_close(ours, np.asarray(audiozoo.jit(model)(x).logits, np.float32), name="bfloat16 logits")


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _single_precision():
    with harness.precision("float32"):
        yield


def check_features(waveforms, ours: ASTFeatureExtractor, theirs) -> None:
    mine = ours(waveforms, sampling_rate=16_000)["input_values"]
    reference = theirs(waveforms, sampling_rate=16_000, return_tensors="np")["input_values"]
    assert mine.dtype == reference.dtype == np.float32
    harness.assert_close(mine, reference, kind="features", name="input_values")


@pytest.mark.usefixtures("_single_precision")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_length": 128, "mean": -6.845978, "std": 5.5654526}, {"do_normalize": False, "num_mel_bins": 64}],
    ids=str,
)
def test_features_of_waveforms(options):
    rng = np.random.default_rng(0)
    batch = [rng.uniform(-0.5, 0.5, n).astype(np.float32) for n in (400, 559, 560, 16_000, 163_000, 164_080, 200_000)]
    batch.append(np.zeros(5_000, np.float32))
    ours, theirs = ASTFeatureExtractor(**options), transformers.ASTFeatureExtractor(**options)
    check_features(batch, ours, theirs)
    check_features(batch[3], ours, theirs)
    check_features(batch[3].astype(np.float64), ours, theirs)
    check_features(np.stack([batch[3], batch[4][:16_000]]), ours, theirs)
    check_features(batch[3].tolist(), ours, theirs)


@pytest.mark.usefixtures("_single_precision")
def test_features_of_recordings(recordings):
    ours, theirs = ASTFeatureExtractor(), transformers.ASTFeatureExtractor()
    for path in sorted(recordings.iterdir()):
        if path.suffix in {".wav", ".flac", ".ogg", ".mp3"}:
            check_features(read(path), ours, theirs)


@pytest.mark.usefixtures("_single_precision")
def test_processor_files(tmp_path):
    theirs = transformers.ASTFeatureExtractor(max_length=200, mean=-3.5, std=2.25, num_mel_bins=40)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ASTFeatureExtractor.from_directory(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    back = transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in back.to_dict().items() if k in vars(ours)} == vars(ours)
    x = np.random.default_rng(0).uniform(-1, 1, 20_000).astype(np.float32)
    check_features(x, ours, back)
    check_features(x, ours, theirs)
    in_jax = jax.jit(ours.in_jax)(jnp.asarray(x[None], jnp.float32))
    harness.assert_close(in_jax, ours(x, 16_000)["input_values"], kind="features in float32", name="in_jax")


@pytest.mark.parametrize(
    "published", [ast.ASTRecipe.esc50().optimizer(33), recipe("ast").settings.transformation()], ids=["paper", "recipe"]
)
def test_the_optimiser(published):
    """`torch.optim.Adam` with its `weight_decay`, part of the gradient, for weights and biases alike."""
    rng = np.random.default_rng(0)
    start = {"layer.kernel": rng.standard_normal((3, 2)), "layer.bias": rng.standard_normal(2)}
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    adam = torch.optim.Adam(theirs.values(), 1e-5, weight_decay=5e-7, betas=(0.95, 0.999))
    ours = {name: jnp.asarray(value) for name, value in start.items()}
    state = published.init(ours)
    for _ in range(3):
        gradients = {name: 1e-7 * rng.standard_normal(value.shape) for name, value in start.items()}
        for name, value in theirs.items():
            value.grad = torch.tensor(gradients[name])
        adam.step()
        changes, state = published.update({n: jnp.asarray(g) for n, g in gradients.items()}, state, ours)
        ours = optax.apply_updates(ours, changes)
    for name, value in start.items():
        np.testing.assert_allclose(ours[name] - value, theirs[name].detach().numpy() - value, rtol=1e-6, err_msg=name)


@pytest.mark.usefixtures("softmax_in_its_own_dtype")
def test_dropouts():
    reference, model, _ = pair(**harness.rates(transformers.ASTConfig()))
    harness.compare_in_training(reference, model, {"input_values": features()})
