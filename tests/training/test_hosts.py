"""Two processes that find each other on this machine, two devices each, against one with four."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import audiozoo
from audiozoo.errors import UsageError
from audiozoo.training import hosts
from audiozoo.training.checkpointing import Checkpoints
from tests import processes
from tests.models.random_model import random_model
from tests.training import tiny

ROOT = Path(__file__).parents[2]


def start(directory, devices, *address):
    environment = processes.environment(devices) | {"JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.host_run", str(directory), *address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def answers(runs):
    found = [run.communicate(timeout=280) for run in runs]
    for run, (_, error) in zip(runs, found, strict=True):
        assert run.returncode == 0, error[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in found]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Losses, checkpoints and the model of a run of wav2vec 2.0 in float64; what both wrote, one reads.

    They read its parameters straight into shards, and evaluate nine recordings in a batch of eight and one by itself.
    """
    config = dataclasses.replace(tiny.family("wav2vec2", "Wav2Vec2ForCTC").config, intermediate_size=256)
    with jax.enable_x64(True):
        model = random_model(lambda rngs: tiny.wav2vec2.Wav2Vec2ForCTC(config, param_dtype=jnp.float64, rngs=rngs))
        audiozoo.save(model, tmp_path / "init")
    rows = []
    for index in range(16):
        sound = np.random.default_rng(index).normal(0, 0.1, 6400 - 160 * (index % 5))
        soundfile.write(tmp_path / f"{index}.wav", sound.astype(np.float32), 16_000)
        # One text is longer than the others, so that the host that reads it has wider labels.
        text = "we do as one we do as one" if index == 3 else "as one" if index % 2 else "we do"
        rows.append({"audio": f"{index}.wav", "text": text, "duration": len(sound) / 16e3})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows[:9])))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = answers([start(tmp_path, 2, f"{address},2,{i}") for i in (0, 1)])
    (alone,) = answers([start(tmp_path, 4)])
    assert [told.pop("devices") for told in (alone, *together)] == [[1, 4, 4], [2, 4, 2], [2, 4, 2]]
    assert together[0] == together[1]
    assert len(alone["losses"]) == 6
    for (step, ours), (same, theirs) in zip(together[0]["losses"], alone["losses"], strict=True):
        assert (step, ours.keys()) == (same, theirs.keys())
        np.testing.assert_allclose([ours[k] for k in ours], [theirs[k] for k in ours], rtol=1e-9)
    np.testing.assert_allclose(together[0]["total"], alone["total"], rtol=1e-12)

    states = {}
    for name in ("together", "alone"):
        kept = Checkpoints(tmp_path / name / "checkpoints")
        assert kept.steps()[-1] == 4
        with jax.enable_x64(True):
            stored = kept._manager.item_metadata(4)["state"].tree
            states[name] = kept.restore({n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in stored.items()})
        kept.close()
    assert states["together"].keys() == states["alone"].keys()
    assert any(value.dtype == np.float64 and value.ndim == 2 for value in states["alone"].values())
    for name, value in states["alone"].items():
        np.testing.assert_allclose(states["together"][name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    ours, theirs = (audiozoo.load(tmp_path / name / "model", param_dtype=np.float32) for name in states)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_mistakes_get_a_sentence():
    for wrong in ("somewhere", "host:1,2", "host:1,2,2"):
        with pytest.raises(UsageError, match="names no process among others"):
            hosts.connect(wrong)
