"""What goes wrong in a long run: a process is killed, a disk full, a checkpoint damaged, the machine another one."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from audiozoo.errors import CheckpointError
from audiozoo.recipes import run
from audiozoo.training.checkpointing import Checkpoints, checksums
from audiozoo.training.loop import Trainer
from tests import processes
from tests.training.networks import Net, Numbers, arrays, task

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["faulty_run", *sys.argv[1:]]
import tests.training.faulty_run as run
from audiozoo.training.checkpointing import Checkpoints
save = Checkpoints.save
def limited(self, step, *args):
    self.wait()
    if step == 6:  # from here on files may not grow, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    save(self, step, *args)
    self.wait()
Checkpoints.save = limited
run.main(*sys.argv[1:])
"""


def start(directory, *arguments, devices=1, code=None):
    program = ("-c", code) if code else ("-m", "tests.training.faulty_run")
    return processes.finished(*program, directory, *arguments, devices=devices, timeout=200)


def curve(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_a_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = start(directory, 12)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory, done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_goes_on_to_the_bit(uninterrupted, tmp_path):
    """At the beginning of a checkpoint, at its very end, and within a step; its data are read ahead all the while."""
    for kill, begins in {"write:6": 0, "commit:6": 3, "step:8": 3}.items():
        killed = start(tmp_path, 12, "", kill)
        assert killed.returncode == -signal.SIGKILL, (kill, killed.returncode, killed.stderr[-1000:])
        assert f"from step {begins}\n" in killed.stdout
    done = start(tmp_path, 12)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from step 6\n" in done.stdout
    directory, printed = uninterrupted
    assert curve(tmp_path) == curve(directory)
    assert done.stdout.split()[-1] == printed.split()[-1]


@pytest.mark.slow
def test_another_number_of_devices_goes_on_within_rounding(uninterrupted, tmp_path):
    first = start(tmp_path, 6, "data=2,fsdp=2,tensor=2", devices=8)
    assert first.returncode == 0, first.stderr[-2000:]
    done = start(tmp_path, 12, "data=2,fsdp=1", devices=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from step 6" in done.stdout
    ours, alone = curve(tmp_path), curve(uninterrupted[0])
    assert [line["step"] for line in ours] == [line["step"] for line in alone]
    for a, b in zip(ours, alone, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=2e-4)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    full = start(tmp_path, 12, code=LIMITED)
    assert full.returncode == 1
    sentence = next(line for line in full.stderr.splitlines() if line.startswith("audiozoo.errors.CheckpointError: "))
    assert "cannot be written" in sentence
    assert "that of step 3 is good" in sentence
    assert "ERROR:absl" not in full.stderr  # Orbax's own long reports
    done = start(tmp_path, 6)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from step 3" in done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2 and 4, and the states that are in them."""
    directory, states, trainer = tmp_path_factory.mktemp("saved"), {}, Trainer(task())
    checkpoints, state, data = Checkpoints(directory), trainer.init(), Numbers()
    for step in (1, 2, 3, 4):
        state, _ = trainer.step(state, trainer.put(next(data)))
        if step % 2 == 0:
            states[step] = arrays(state)
            checkpoints.save(step, state, data)
    checkpoints.wait()
    checkpoints.close()
    return directory, states, trainer


@pytest.mark.parametrize("damage", ["truncated", "garbage", "gone"])
def test_a_damaged_checkpoint_is_set_aside(saved, tmp_path, damage):
    original, states, trainer = saved
    directory = tmp_path / "checkpoints"
    shutil.copytree(original, directory)
    files = [path for path in (directory / "4" / "state").rglob("*") if path.is_file()]
    for path in files if damage == "gone" else []:
        path.unlink()
    for path in files if damage in ("truncated", "garbage") else []:
        if path.parent.name == "d" or path.suffix == ".ocdbt":
            path.write_bytes(path.read_bytes()[:7] if damage == "truncated" else b"\xff" * 300)
    (directory / "damaged-4").mkdir()  # of another time
    checkpoints, data = Checkpoints(directory), Numbers()
    state = checkpoints.restore(trainer.abstract(), data)
    assert len(checkpoints.messages) == 1
    assert "step 4" in checkpoints.messages[0]
    assert "set aside" in checkpoints.messages[0]
    assert (directory / "damaged-4-2").is_dir()
    assert data.index == 2
    for a, b in zip(arrays(state), states[2], strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoints.save(4, state)  # its place is free
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()


def test_one_bit_is_noticed(tmp_path):
    """Orbax reads such a file without a word: the checksums are what tells."""
    checkpoints, states = Checkpoints(tmp_path), {}
    for step in (2, 4):
        states[step] = {"kernel": jax.random.normal(jax.random.key(step), (64, 64), jnp.bfloat16)}
        saved_now(checkpoints, step, states[step])
    largest = max((tmp_path / "4" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    restored = checkpoints.restore(jax.eval_shape(lambda: states[2]))
    np.testing.assert_array_equal(restored["kernel"], states[2]["kernel"])
    assert "step 4" in checkpoints.messages[0]
    assert "kernel is not what was saved); it is set aside" in checkpoints.messages[0]
    checkpoints.close()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32])
def test_the_last_bit_counts(dtype):
    x = np.asarray(jnp.linspace(0, 100, 9).astype(dtype))
    other = x.copy()
    other.view(np.uint8)[0] ^= 1
    assert checksums({"x": jnp.asarray(x)}) != checksums({"x": jnp.asarray(other)})
    assert checksums({"x": jnp.asarray(x)}) == checksums({"x": jnp.asarray(x[::-1])})


def test_another_dtype_is_no_damage(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), {"kernel": jax.random.normal(jax.random.key(0), (4, 4))}
    saved_now(checkpoints, 2, state)
    restored = checkpoints.restore({"kernel": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)}, step=2)
    np.testing.assert_array_equal(restored["kernel"], state["kernel"].astype(jnp.bfloat16))
    checkpoints.close()


def test_no_good_checkpoint_and_one_of_another_model(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved[0], directory)
    checkpoints = Checkpoints(directory)
    with pytest.raises(CheckpointError, match=r"of another model or recipe: it lacks .*layers.3"):
        checkpoints.restore(Trainer(task(model={"blocks": 4})).abstract())
    with pytest.raises(CheckpointError, match=r"of another model or recipe: it has besides .*layers.2"):
        checkpoints.restore(Trainer(task(model={"blocks": 2})).abstract())
    with pytest.raises(CheckpointError, match=r"of another model or recipe.*, not"):
        checkpoints.restore(Trainer(task(model={"width": 16})).abstract())
    for step in (2, 4):
        shutil.rmtree(directory / str(step) / "state")
    with pytest.raises(CheckpointError, match=r"step 4 .* is damaged \(.*\)\.$"):  # of others nothing was asked
        checkpoints.restore(saved[2].abstract(), step=4)
    with pytest.raises(CheckpointError, match=r"step 2 .* is damaged .*, and there is no other"):
        checkpoints.restore(saved[2].abstract())
    assert Checkpoints(tmp_path / "empty").restore(saved[2].abstract()) is None


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written to: (Not a directory|File exists)"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        Checkpoints("/proc/audiozoo")  # where nobody may write, root neither


def saved_now(checkpoints, step, state):
    checkpoints.save(step, state)
    checkpoints.wait()


@contextlib.contextmanager
def nobody():
    """Not root for a while, who may write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_may_only_be_read(saved):
    """At the start of a run, and after its first checkpoint, which stays good."""
    trainer = saved[2]
    with tempfile.TemporaryDirectory() as parent:  # pytest's directories may not even be entered by others
        Path(parent).chmod(0o755)
        directory = Path(parent) / "checkpoints"
        checkpoints, state = Checkpoints(directory), trainer.init()
        saved_now(checkpoints, 2, state)
        directory.chmod(0o555)
        with nobody():
            with pytest.raises(CheckpointError, match=r"cannot be written to .*denied.*that of step 2 is good\.$"):
                saved_now(checkpoints, 4, state)
            # A thread of Orbax that still waited for the directory would keep the process from its end.
            assert not [thread for thread in threading.enumerate() if "orbax" in type(thread).__module__]
            with pytest.raises(CheckpointError, match="checkpoints cannot be written to: Permission denied"):
                Checkpoints(directory)
        assert checkpoints.steps() == [2]
        for a, b in zip(arrays(checkpoints.restore(trainer.abstract())), arrays(state), strict=True):
            np.testing.assert_array_equal(a, b)
        checkpoints.close()


@pytest.mark.parametrize(("best", "kept"), [(0, [3]), (1, [2, 3]), (2, [1, 2, 3])])
def test_the_best_may_be_the_largest(tmp_path, best, kept):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=best, watch="accuracy", larger_is_better=True)
    for step, value in enumerate([0.5, 0.7, 0.1], 1):
        checkpoints.save(step, {"x": jnp.zeros(2)}, None, {"accuracy": value})
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert checkpoints.best() == kept[-2:][0]
    checkpoints.close()


def test_the_last_few_and_the_best_are_kept(tmp_path):
    trainer = Trainer(task())
    checkpoints, state = Checkpoints(tmp_path, keep=2), trainer.init()
    for step, value in enumerate([np.nan, 1.0, 3.0, 4.0, np.nan], 1):
        checkpoints.save(step, state, None, {"loss": value})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    restored = checkpoints.restore(trainer.abstract(), step=2)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert isinstance(trainer.network(restored, "model"), Net)
    # A run whose best checkpoint is damaged at its end has its last one.
    state = dataclasses.replace(state, step=jnp.asarray(5))
    assert run._best(checkpoints, trainer, state, None) is not state
    shutil.rmtree(tmp_path / "2" / "state")
    said = Console(file=io.StringIO(), width=1000)
    assert run._best(checkpoints, trainer, state, said) is state
    assert "step 2" in said.file.getvalue()
    assert "The last one's model is saved in its place." in said.file.getvalue()
    checkpoints.close()
