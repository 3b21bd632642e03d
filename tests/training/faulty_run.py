"""A run in a process of its own, to be killed: `python faulty_run.py DIRECTORY STEPS [MESH] [KILL AT]`.

KILL is `step:7` (while step 7 computes) or `write:6` (while the checkpoint of step 6 is being written).
"""

import os
import signal
import sys
import threading

import jax
import optax

from audiozoo import sharding
from audiozoo.training.checkpointing import Checkpoints
from audiozoo.training.loop import Options, Trainer
from audiozoo.training.reporting import Reporter
from tests.training.networks import Numbers, loss, task


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main(directory, steps, mesh="", kill=""):
    when, _, at = kill.partition(":")
    trainer = Trainer(
        task(loss, optax.adamw(1e-2)), Options(average=0.9), mesh=sharding.parse_mesh(mesh) if mesh else None
    )
    checkpoints, data = Checkpoints(f"{directory}/checkpoints"), Numbers()
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
    with Reporter(directory, steps=int(steps), start=int(state.step)) as report:
        state = trainer.fit(
            state,
            data,
            steps=int(steps),
            evaluation=lambda: [next(Numbers())],
            evaluate_every=3,
            log_every=1,
            report=report,
            checkpoints=checkpoints,
        )
    print(f"{sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(state.params)):.17g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
