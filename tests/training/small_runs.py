"""Overfit one small batch by each recipe: `python -m tests.training.small_runs corpus.jsonl NAME …`, a JSON line each.

In a process of its own, which has all threads of the machine.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.processes import QUICKLY_COMPILED

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = QUICKLY_COMPILED

import jax
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.recipes import ROWS, run
from audiozoo.training.checkpointing import Checkpoints
from audiozoo.training.data import find_items
from tests.training import tiny

STEPS = 60
RESUMED = "wavlm_pretraining"  # which draws masks and mixes in every step
SLOW = ("encodec",)  # to learn: at the others' rate it overshoots
WATCHED = {"encodec": "time", "vits": "mel", "hifigan": "mel"}  # what of a generator's loss the judge has no part in


def overfit(name: str, corpus: str) -> dict[str, Any]:
    """The loss of a batch before and after it was trained on, and what else there is to check."""
    row, model, processor = tiny.small(next(row for row in ROWS if row.name == name))
    settings = {"batch_size": 2, "steps": STEPS, "schedule": "constant", "warmup": 0, "held_steps": 0, "clip": 1.0}
    settings |= {"optimizer": "adam", "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "average": None}
    settings["learning_rate"] = 1e-3 if name in SLOW else 5e-3
    items = find_items(corpus)
    ready = run.build(row, items, model=model, processor=processor, settings=settings)
    before = {name: np.asarray(leaf[...]) for name, leaf in audiozoo.loading.variables(model).items()}
    trainer, batch = ready.trainer, ready.batches(items, buckets=1).batch(0)
    state, watched = trainer.init(), WATCHED.get(name, "loss")
    at_first = jax.tree.map(np.array, state.params)
    first, again = (trainer.evaluate(state, [batch]) for _ in range(2))
    finite = True
    for step in range(STEPS):
        state, metrics = trainer.step(state, trainer.put(batch))
        finite &= all(bool(np.isfinite(value)) for value in metrics.values())
        if name == RESUMED and step == 2:
            resumed = _resumed(trainer, state)
            resumed, _ = trainer.step(resumed, trainer.put(batch))
            resumed, _ = trainer.step(resumed, trainer.put(batch))
        if name == RESUMED and step == 4:
            equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), state, resumed)
    trained = {n: np.asarray(leaf[...]) for n, leaf in audiozoo.loading.variables(ready.trained(state)).items()}
    moved = [n for n in before if not np.array_equal(before[n], trained[n])]
    parameters = [n for n, leaf in audiozoo.loading.variables(model).items() if isinstance(leaf, nnx.Param)]
    still = [n for n in at_first if jax.tree.all(jax.tree.map(np.array_equal, at_first[n], state.params[n]))]
    return {
        "before": first[watched],
        "after": trainer.evaluate(state, [batch])[watched],
        "deterministic": first == again,
        "finite": finite,
        "moved": len(moved),
        "networks_that_stood_still": [n for n in still if at_first[n]],
        "of": len(before),
        "frozen_that_moved": [
            n for n in moved if row.settings.frozen and re.search(row.settings.frozen, n) and n in parameters
        ],
        "resumed": all(jax.tree.leaves(equal)) if name == RESUMED else None,
    }


def _resumed(trainer: Any, state: Any) -> Any:
    """The state, saved and restored."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints")
        checkpoints.save(int(state.step), state, metrics=None)
        checkpoints.wait()
        restored = checkpoints.restore(trainer.abstract())
        checkpoints.close()
    return restored


def main(corpus: str, names: list[str]) -> None:
    """Each recipe in turn."""
    jax.config.update("jax_default_matmul_precision", "highest")
    for name in names:
        try:
            result = overfit(name, corpus)
        except Exception:
            result = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps({"recipe": name, **result}), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
