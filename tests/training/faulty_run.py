"""A run in a process of its own, to be killed: `python faulty_run.py DIRECTORY STEPS [MESH] [KILL AT]`.

KILL is `step:7` (while step 7 computes), `write:6` (when the checkpoint of step 6 begins to be written) or `commit:6`
(when all of it is written, and it lacks its name). The data are recordings, read by threads ahead of the steps.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import soundfile

from audiozoo import sharding
from audiozoo.training.checkpointing import Checkpoints
from audiozoo.training.data import Batches, Whole, find_items
from audiozoo.training.loop import Options, Trainer
from audiozoo.training.reporting import Reporter
from tests.training.networks import Numbers, loss, task


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def recordings(root):
    """Twenty noises of several lengths."""
    root.mkdir(parents=True, exist_ok=True)
    for index in range(20):
        noise = np.random.default_rng(index).normal(0, 0.1, 1000 + 100 * index)
        soundfile.write(root / f"{index:02}.wav", noise, 8000)
    return find_items(root)


def prepare(waveform, fields, rng):
    start = int(rng.integers(len(waveform) - 799))
    x = waveform[start : start + 800].reshape(8, 100).std(axis=1) * 10
    return {"x": x, "y": x.sum()}


def main(directory, steps, mesh="", kill=""):
    when, _, at = kill.partition(":")
    trainer = Trainer(
        task(loss, optax.adamw(1e-2)), Options(average=0.9), mesh=sharding.parse_mesh(mesh) if mesh else None
    )
    checkpoints = Checkpoints(f"{directory}/checkpoints")
    data = Batches(recordings(Path(directory) / "sounds"), prepare, batch_size=8, sampling_rate=8000).training()
    state = checkpoints.restore(trainer.abstract(), data)
    state = trainer.init() if state is None else state
    print("\n".join(checkpoints.messages), f"from step {int(state.step)}", flush=True)
    if when == "step":
        step, count = trainer.step, int(state.step)

        def counted(*args):
            nonlocal count
            count += 1
            result = step(*args)
            if count == int(at):
                checkpoints.wait()
                die()  # dispatched, and perhaps not computed
            return result

        trainer.step = counted
    if when == "write":
        save = checkpoints.save

        def interrupted(number, *args):
            if number == int(at):
                checkpoints.wait()
                target = checkpoints.directory

                def watch():
                    while not list(target.glob(f"{number}*")):
                        pass
                    die()

                threading.Thread(target=watch, daemon=True).start()
            save(number, *args)
            if number == int(at):
                checkpoints.wait()
                raise SystemExit("The checkpoint was complete before the process was killed.")

        checkpoints.save = interrupted
    if when == "commit":
        rename = os.rename

        def uncommitted(source, target):
            if Path(target) == checkpoints.directory / at:
                die()
            rename(source, target)

        os.rename = uncommitted
    with Reporter(directory, steps=int(steps), start=int(state.step)) as report:
        state = trainer.fit(
            state,
            data,
            steps=int(steps),
            evaluation=lambda: [next(Numbers()), Whole(next(Numbers(3)))],
            evaluate_every=3,
            log_every=1,
            report=report,
            checkpoints=checkpoints,
        )
    print(f"{sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(state.params)):.17g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
