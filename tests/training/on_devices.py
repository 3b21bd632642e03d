"""Training steps on one device and on eight, in a process of its own: `python -m tests.training.on_devices OUT`.

With names of recipes behind it, of these, also of those that the test leaves out. Writes a JSON object: for each recipe
and mesh what differs most, by how much of the tolerance, or the error.
"""

import dataclasses
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from flax import nnx

from audiozoo import sharding
from audiozoo.recipes import ROWS, recipe, run
from audiozoo.recipes.objectives import Pretraining
from audiozoo.training.data import find_items
from audiozoo.training.loop import Options, Trainer
from tests.tolerances import tolerance
from tests.training import tiny

TEXTS = ["a low hum", "high hiss", "a bell", "owl", "low bell", "a high hall", "nine low owls", "hush"]
CONVOLUTIONAL = ("vits", "hifigan", "encodec")  # of which `tensor` divides little or nothing
MESHES = {
    "data=4,fsdp=2": lambda row: row.paper in CONVOLUTIONAL,
    "data=2,fsdp=2,tensor=2": lambda row: row.paper not in CONVOLUTIONAL,
}
# Small parameters too are divided; those of the papers are, by `sharding.TRAINING_RULES`, from 4,096 numbers on.
RULES = (*sharding.TRANSFORMER, sharding.fsdp(16, "fsdp", combine=True))


def chosen():
    """A recipe of every paper, pre-training where there is any, and one of every objective."""
    rows, papers, objectives = [], set(), set()
    for row in sorted(ROWS, key=lambda row: not isinstance(row.objective, Pretraining)):
        if row.paper not in papers or type(row.objective) not in objectives:
            rows.append(row)
        papers.add(row.paper)
        objectives.add(type(row.objective))
    return rows


def corpus(root: Path) -> Path:
    """Eight sounds of five lengths, two of them quiet, with all that a recipe may want to know of them."""
    lines = []
    for index, text in enumerate(TEXTS):
        rng = np.random.default_rng(index)
        time = np.arange(4800 + 400 * (index % 5)) / 16_000
        sound = 0.4 * np.sin(2 * np.pi * (200 + 130 * index) * time) + rng.normal(0, 0.05, len(time))
        soundfile.write(root / f"{index}.wav", (0.9**index * sound).astype(np.float32), 16_000)
        row = {"audio": f"{index}.wav", "text": text, "label": "high" if index % 3 else "low"}
        row |= {"units": rng.integers(0, 6, 20).tolist(), "phonemes": rng.integers(1, 5, 2 + index % 3).tolist()}
        row |= {"language": "eng" if index % 2 else "deu", "composer": f"composer{1 + index % 3}"}
        row |= {"beats": [0.08 * beat for beat in range(6)], "notes": [[0, 2, 60, 80], [2, 5, 64 + index, 80]]}
        row["speaker_embedding"] = rng.normal(0, 1, 6).tolist()
        lines.append(json.dumps(row | {"duration": len(time) / 16_000}))
    (root / "set.jsonl").write_text("\n".join(lines))
    return root / "set.jsonl"


def double(tree):
    """Every float of a tree in float64."""
    return jax.tree.map(lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x, tree)


def remembered(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser with the gradient of the last step in its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )
    return optax.chain(keep, optimizer)


def task(row, items):
    """A recipe's task with a small model, all in float64, and a batch of eight."""
    row, model, processor = tiny.small(row)
    for _, module in nnx.iter_modules(model):
        if getattr(module, "dtype", None) == np.float32:  # Flax's embeddings take their parameter's
            module.dtype = jnp.float64
    graphdef, state = nnx.split(model)
    settings = {
        "batch_size": 8,
        "steps": 6,
        "schedule": "constant",
        "warmup": 0,
        "learning_rate": 1e-3,
        "held_steps": 0,
    }
    settings["epsilon"] = 1e-6  # of a gradient that is 0 but for rounding (the keys' biases) Adam would make a step
    ready = run.build(row, items, model=nnx.merge(graphdef, double(state)), processor=processor, settings=settings)
    batch = double(ready.batches(items, buckets=1).batch(0))
    phases = [dataclasses.replace(phase, optimizer=remembered(phase.optimizer)) for phase in ready.trainer.task.phases]
    return dataclasses.replace(ready.trainer.task, phases=phases), batch


def step(task, batch, mesh):
    """The state after one step and its metrics, by name, on the host."""
    trainer = Trainer(task, Options(average=0.9), mesh=mesh, rules=RULES)
    state = trainer.init()
    if mesh is not None:
        divided = [a for a in jax.tree.leaves((state.params, state.rest)) if not a.is_fully_replicated]
        for axis in set(mesh.axis_names) - {"data"}:
            assert sum(axis in jax.tree.leaves(tuple(a.sharding.spec)) for a in divided) >= 5, f"little over {axis}"
    state, metrics = trainer.step(state, trainer.put(batch))
    flat, _ = jax.tree.flatten_with_path((state, metrics))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def begins_in_shards(items):
    """A model that begins with nothing has the numbers of one device, and on each its part of the large kernels."""
    known = {name: value for name, value in tiny.SPEECH.items() if name not in ("vocab_size", "id2label")}
    how = {"config": known | {"intermediate_size": 256}, "settings": {"batch_size": 8}}
    alone, divided = (
        run.build(recipe("wav2vec2_ctc"), items, mesh=mesh, **how)
        for mesh in (None, sharding.parse_mesh("data=2,fsdp=2,tensor=2"))
    )
    kernel = divided.model.wav2vec2.encoder.layers[0].feed_forward.intermediate_dense.kernel[...]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    for trainer in (alone.trainer, divided.trainer):
        for a, b in zip(jax.tree.leaves(alone.model), jax.tree.leaves(trainer.task.networks["model"]), strict=True):
            np.testing.assert_array_equal(a, b)
    moments = [a for a in jax.tree.leaves(divided.trainer.init()) if a.shape == kernel.shape]
    assert len(moments) == 3
    assert all(a.sharding == kernel.sharding for a in moments)


def difference(ours, alone):
    """The name of what is furthest apart, and by how many times the tolerance."""
    assert ours.keys() == alone.keys()
    allowed, worst = tolerance("sharded", "float64"), ("", 0.0)
    for name, a in ours.items():
        b = alone[name]
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert np.isfinite(b).all(), name
        if a.size:
            limit = allowed.atol + allowed.rtol * np.maximum(np.abs(b), np.sqrt(np.mean(np.square(b, dtype=float))))
            worst = max(worst, (name, float((np.abs(a.astype(float) - b) / limit).max())), key=lambda pair: pair[1])
    return worst


def main(out, *names):
    assert len(jax.devices()) == 8
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        items = find_items(corpus(Path(directory)))
        begins_in_shards(items)
        for row in [row for row in ROWS if row.name in names] if names else chosen():
            begun = time.process_time()
            try:
                what, batch = task(row, items)
                alone = step(what, batch, None)
                wide = {n for n, a in alone.items() if a.dtype == np.float32}
                assert not wide, f"{sorted(wide)[:3]} are float32"
                moved = [n for n, a in alone.items() if n.startswith("0.optimizer") and a.ndim and np.any(a)]
                assert moved, "no gradient"
                for mesh, wanted in MESHES.items():
                    if wanted(row):
                        found[f"{row.name} {mesh}"] = difference(step(what, batch, sharding.parse_mesh(mesh)), alone)
            except Exception:
                found[row.name] = traceback.format_exc()
            jax.clear_caches()
            print(row.name, f"{time.process_time() - begun:.1f} s", found.get(row.name, "")[-300:], flush=True)
    Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
