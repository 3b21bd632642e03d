"""Native checkpoints: exact, strict both ways, written whole or not at all."""

import json
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from audiozoo import checkpoints
from audiozoo.errors import CheckpointError, SourceError, UsageError

CONFIG = {"model_class": "Tiny", "config": {"width": 4}, "labels": ["a", "b"]}


class Tiny(nnx.Module):
    def __init__(self, width=4, rngs=None):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def structs(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def tree():
    key = jax.random.key(0)
    return {
        "encoder": {"layers": {"0": {"kernel": jax.random.normal(key, (3, 5))}, "1": {"kernel": jnp.ones((3, 5))}}},
        "half": jax.random.normal(key, (7,), jnp.bfloat16),
        "scalar": jnp.float32(2.5),
        "count": jnp.arange(4),
    }


@pytest.fixture(scope="module")
def saved(tree, tmp_path_factory):
    directory = tmp_path_factory.mktemp("native") / "model"
    checkpoints.save(tree, directory, CONFIG)
    return directory


def test_round_trip_is_exact(tree, saved):
    same(checkpoints.restore(saved, structs(tree)), tree)
    assert checkpoints.read_config(saved) == CONFIG
    assert checkpoints.is_native(saved)
    header = json.loads((saved / "config.json").read_text())["audiozoo"]
    assert header["format"] == 1
    assert header["model_class"] == "Tiny"
    assert set(header) == {"format", "version", "model_class"}


def test_names_may_be_nested_or_dotted(tree, saved, tmp_path):
    dotted = {
        "encoder.layers.0.kernel": tree["encoder"]["layers"]["0"]["kernel"],
        "encoder.layers.1.kernel": tree["encoder"]["layers"]["1"]["kernel"],
        **{name: tree[name] for name in ("half", "scalar", "count")},
    }
    same(checkpoints.restore(saved, structs(dotted)), dotted)
    checkpoints.save(dotted, tmp_path / "dotted", CONFIG)
    same(checkpoints.restore(tmp_path / "dotted", structs(tree)), tree)


def test_a_module_and_its_abstract_twin(tmp_path):
    model = Tiny(rngs=nnx.Rngs(0))
    checkpoints.save(model, tmp_path / "model", CONFIG)
    twin = nnx.eval_shape(lambda: Tiny(rngs=nnx.Rngs(1)))
    flat = {".".join(map(str, p)): leaf for p, leaf in nnx.to_flat_state(nnx.state(twin, nnx.Not(nnx.RngState)))}
    restored = checkpoints.restore(tmp_path / "model", flat)
    assert set(restored) == set(flat)
    assert not any("rng" in name for name in restored)
    np.testing.assert_array_equal(restored["layers.1.kernel"], model.layers[1].kernel[...])
    np.testing.assert_array_equal(restored["norm.mean"], model.norm.mean[...])


def test_the_arrays_are_readable_without_audiozoo(tree, saved):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(saved / "params")
    np.testing.assert_array_equal(
        restored["encoder"]["layers"]["0"]["kernel"], tree["encoder"]["layers"]["0"]["kernel"]
    )


def test_arrays_that_are_much_of_the_whole_are_restored_first(tree, saved, monkeypatch):
    monkeypatch.setattr(checkpoints, "_IN_FLIGHT_BYTES", 0)
    parts, restore = [], checkpoints.ocp.Checkpointer.restore

    def observed(self, directory, *, args):
        parts.append(set(checkpoints._leaves(args.item)[0]))
        return restore(self, directory, args=args)

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "restore", observed)
    same(checkpoints.restore(saved, structs(tree)), tree)
    leaves = checkpoints._leaves(tree)[0]
    whole = sum(leaf.nbytes for leaf in leaves.values())
    large, small = parts
    assert large == {name for name, leaf in leaves.items() if leaf.nbytes > whole / 8}
    assert small == set(leaves) - large


def test_dtype_changes_on_the_way(tree, saved):
    for dtype in (jnp.bfloat16, jnp.float16):
        restored = checkpoints.restore(saved, structs(tree, dtype))
        same(restored, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), tree))


def test_differences_are_listed_together(tree, saved):
    wrong = structs(tree)
    wrong["encoder"]["layers"]["2"] = {"kernel": jax.ShapeDtypeStruct((3, 5), "float32")}
    wrong["count"] = jax.ShapeDtypeStruct((5,), "int32")
    del wrong["half"]
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(saved, wrong)
    assert str(caught.value).splitlines()[1:] == [
        "  - encoder.layers.2.kernel (3, 5)",
        "  + half (7,)",
        "  ! count is (4,), not (5,)",
    ]
    many = {f"p{i}": jax.ShapeDtypeStruct((), "float32") for i in range(40)}
    with pytest.raises(CheckpointError, match="- … and 28 more"):
        checkpoints.restore(saved, many)


def test_any_tree_of_arrays(tmp_path):
    params = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))
    state = optimiser.init(params)
    _, state = optimiser.update(params, state, params)
    tree = {"params": params, "optimizer": state, "step": np.int32(3), "history": [np.float32(1), np.float32(2)]}
    checkpoints.save_tree(tree, tmp_path / "step_3")
    abstract = jax.eval_shape(lambda: tree)
    restored = checkpoints.restore_tree(tmp_path / "step_3", abstract)
    same(restored, jax.tree.map(jnp.asarray, tree))
    assert type(restored["optimizer"][1][0]) is type(state[1][0])
    with pytest.raises(CheckpointError, match=r"- more \(2,\)"):
        checkpoints.restore_tree(tmp_path / "step_3", {**abstract, "more": jax.ShapeDtypeStruct((2,), "float32")})


def test_files_are_copied_and_checked(tree, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    (tmp_path / "voices").mkdir()
    (tmp_path / "voices" / "ann.npy").write_bytes(b"a")
    checkpoints.save(tree, tmp_path / "model", CONFIG, files=[tokenizer, tmp_path / "voices"])
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "params", "tokenizer.json", "voices"]
    assert (tmp_path / "model" / "voices" / "ann.npy").read_bytes() == b"a"
    with pytest.raises(SourceError, match=r"vocab\.json is to be copied"):
        checkpoints.save(tree, tmp_path / "other", CONFIG, files=[tmp_path / "vocab.json"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="would overwrite"):
        checkpoints.save(tree, tmp_path / "other", CONFIG, files=[tmp_path / "config.json"])
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model", "tokenizer.json", "voices"]


def test_an_existing_directory_is_kept_unless_told(tree, tmp_path):
    target = tmp_path / "model"
    checkpoints.save({"old": jnp.ones(2)}, target, CONFIG)
    with pytest.raises(CheckpointError, match="exists already; choose another place, or replace it by overwrite=True"):
        checkpoints.save(tree, target, CONFIG)
    with pytest.raises(UsageError, match="PRNG key"):
        checkpoints.save({"key": jax.random.key(0)}, target, CONFIG, overwrite=True)
    same(checkpoints.restore(target, {"old": jnp.ones(2)}), {"old": jnp.ones(2)})
    checkpoints.save(tree, target, CONFIG, overwrite=True)
    same(checkpoints.restore(target, structs(tree)), tree)
    assert os.listdir(tmp_path) == ["model"]
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint"):
        checkpoints.save(tree, target, CONFIG, overwrite=True)
    assert os.listdir(target) == ["params"]


def test_what_cannot_be_replaced_is_there_as_before(tree, saved, tmp_path, monkeypatch):
    target, rename = tmp_path / "model", Path.rename
    shutil.copytree(saved, target)

    def failing(self, place):
        if self.name == "model" and place == target:
            raise OSError(28, "No space left on device")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match=r"model cannot be written: No space left on device\."):
        checkpoints.save({"new": jnp.ones(2)}, target, CONFIG, overwrite=True)
    same(checkpoints.restore(target, structs(tree)), tree)
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link exists already"):
        checkpoints.save(tree, tmp_path / "link", CONFIG)


def test_a_full_disk(tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"/out cannot be written \(… .*File too large"):
            checkpoints.save({"w": np.ones(100_000)}, tmp_path / "out", CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


def test_an_interrupted_write_leaves_nothing(tmp_path):

    def interrupted():
        with checkpoints.written_whole(tmp_path / "a") as temporary:
            (temporary / "half").write_text("…")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="is a file"),
        checkpoints.written_whole(tmp_path / "file", overwrite=True),
    ):
        pass
    with pytest.raises(CheckpointError, match="cannot be written"), checkpoints.written_whole(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (({"a": np.ones(2)}, {"config": {}}), "needs a model_class"),
        (({"a": np.ones(2)}, {"model_class": "X", "bad": object()}), "plain JSON"),
        (({}, CONFIG), "no array to save"),
        (({"a": jax.ShapeDtypeStruct((2,), "float32")}, CONFIG), "a has no numbers"),
        (({"a": "text"}, CONFIG), "a has no numbers"),
        (({"a": np.zeros((0, 3))}, CONFIG), "a has no numbers"),
        (({"a": np.ones(2), "a.b": np.ones(2)}, CONFIG), "a.b lies below a leaf"),
        (({"a.b": np.ones(2), "a": np.ones(2)}, CONFIG), "a is both|a.b lies below"),
        (({"a": {"b": np.ones(2)}, "a.b": np.ones(2)}, CONFIG), "Two leaves of the tree are named a.b"),
    ],
)
def test_what_cannot_be_saved(tmp_path, arguments, sentence):
    params, config = arguments
    with pytest.raises(UsageError, match=sentence):
        checkpoints.save(params, tmp_path / "model", config)
    assert os.listdir(tmp_path) == []


def damage_config(directory):
    (directory / "config.json").write_text("{")


def damage_format(directory):
    config = json.loads((directory / "config.json").read_text())
    config["audiozoo"]["format"] = 2
    (directory / "config.json").write_text(json.dumps(config))


def remove_params(directory):
    (directory / "params").rename(directory / "elsewhere")


def damage_metadata(directory):
    (directory / "params" / "_METADATA").write_text("{]")


def remove_manifest(directory):
    (directory / "params" / "manifest.ocdbt").unlink()


def truncate_data(directory):
    for file in (directory / "params").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 3)


def remove_config(directory):
    (directory / "config.json").unlink()


def foreign_config(directory):
    (directory / "config.json").write_text('{"architectures": ["X"]}')


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (remove_config, SourceError, "cannot be read"),
        (foreign_config, SourceError, "not a checkpoint that audiozoo.save wrote"),
        (damage_config, CheckpointError, "not valid JSON"),
        (damage_format, CheckpointError, "of format 2"),
        (remove_params, SourceError, "holds no arrays"),
        (damage_metadata, CheckpointError, "incomplete or damaged"),
        (remove_manifest, CheckpointError, "incomplete or damaged"),
        (truncate_data, CheckpointError, "incomplete or damaged"),
    ],
)
def test_damage_ends_in_one_sentence(tree, tmp_path, damage, error, sentence):
    checkpoints.save(tree, tmp_path / "model", CONFIG)
    damage(tmp_path / "model")
    with pytest.raises(error, match=sentence) as caught:
        checkpoints.restore(tmp_path / "model", structs(tree))
    assert "\n" not in str(caught.value)


def test_what_is_not_native(tmp_path):
    assert not checkpoints.is_native(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert not checkpoints.is_native(tmp_path)
    with pytest.raises(SourceError, match="has no entry audiozoo"):
        checkpoints.read_config(tmp_path)


def test_every_parameter_needs_a_sharding(tree, saved):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    same(checkpoints.restore(saved, structs(tree), one), tree)
    with pytest.raises(UsageError, match="4 parameters have no sharding"):
        checkpoints.restore(saved, structs(tree), {"count": one})


def resident(field):
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_is_the_model_and_a_few_arrays(tmp_path):
    """512 MB in 32 arrays of 16 MB: saving needs no second copy, restoring one copy and the arrays in flight."""
    count, size = 32, 16 << 20
    tree = {f"p{i}": jnp.full(size // 4, i, jnp.float32) for i in range(count)}
    jax.block_until_ready(tree)
    clear = Path("/proc/self/clear_refs")
    clear.write_text("5")
    before = resident("VmRSS")
    checkpoints.save(tree, tmp_path / "model", CONFIG)
    assert resident("VmHWM") - before < 0.6 * count * size
    abstract = structs(tree)
    del tree
    clear.write_text("5")
    before = resident("VmRSS")
    restored = checkpoints.restore(tmp_path / "model", abstract)
    jax.block_until_ready(restored)
    assert resident("VmHWM") - before < 1.3 * count * size + (512 << 20)
    assert float(restored["p7"][-1]) == 7
