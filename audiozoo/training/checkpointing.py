"""Checkpoints of a training run: written in the background, whole or not at all; the last few and the best are kept.

    OUT/checkpoints/300/state/…     parameters, statistics, the optimiser's state (Orbax), for any number of devices
    OUT/checkpoints/300/run/…       the position in the data, the best evaluation so far, checksums (JSON)

A step is a directory that Orbax writes under another name and renames when it is complete: a process that is killed
leaves the last complete one behind, and `restore` goes on from there, to the bit. Orbax's files do not tell when a bit
of an array has changed; the checksums do, on any number of devices.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from audiozoo.errors import CheckpointError, first_line
from audiozoo.training import hosts

_STATE, _RUN = "state", "run"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are kept; made if need be.
        keep: how many of the last are kept.
        keep_best: how many of the best are kept besides.
        watch: the evaluation's metric that says which is best.
        larger_is_better: of `watch`.

    Raises:
        CheckpointError: the directory cannot be made or written to.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int = 2,
        keep_best: int = 1,
        watch: str = "loss",
        larger_is_better: bool = False,
    ):
        self.directory = Path(directory).absolute()
        self.watch, self.sign = watch, 1.0 if larger_is_better else -1.0
        self._keep, self._keep_best = keep, keep_best
        self.progress: dict[str, Any] = {}  # what a run knows of its evaluations: `best`, `worse`
        self.messages: list[str] = []  # what was wrong with checkpoints that `restore` passed over
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:  # of every process its own
                probe.write(b"0")
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be written to: {error.strerror}.") from None
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        kept = [managers.LatestN(self._keep)]
        if self._keep_best:
            kept.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: self.sign * metrics[self.watch],
                    n=self._keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept),
            best_fn=lambda metrics: self.sign * metrics[self.watch],
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Else, where a directory cannot be made, the threads that would fill it wait for it for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {_STATE: ocp.PyTreeCheckpointHandler(use_compression=False), _RUN: ocp.JsonCheckpointHandler()}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(_STATE, ocp.args.PyTreeSave, handlers[_STATE])
        registry.add(_STATE, ocp.args.PyTreeRestore, handlers[_STATE])
        registry.add(_RUN, ocp.args.JsonSave, handlers[_RUN])
        registry.add(_RUN, ocp.args.JsonRestore, handlers[_RUN])
        return ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """The steps of which there is a complete checkpoint."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step of the best checkpoint, None if none was evaluated."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, data: Any = None, metrics: dict[str, float] | None = None) -> None:
        """Begin to write a checkpoint; it is complete when `wait`, or the next `save`, returns.

        Args:
            step: its name.
            state: any pytree of arrays.
            data: an iterator with `get_state`, whose position is kept.
            metrics: an evaluation's; where `watch` is no number among them, it is not the best.

        Raises:
            CheckpointError: this one, or the one before it, could not be written.
        """
        position = data.get_state() if hasattr(data, "get_state") else None
        position = position.decode() if isinstance(position, bytes) else position
        run = {"data": position, "progress": self.progress, "checksums": checksums(_named(state))}
        with self._sentence(f"The checkpoint of step {step} cannot be written to {self.directory}"):
            self._manager.check_for_errors()
            self._manager.save(
                step,
                args=ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(_named(state)), _RUN: ocp.args.JsonSave(run)}),
                metrics=metrics if metrics and math.isfinite(metrics[self.watch]) else None,
                force=True,
            )

    def wait(self) -> None:
        """Return when every checkpoint is complete.

        Raises:
            CheckpointError: one could not be written.
        """
        with self._sentence(f"A checkpoint cannot be written to {self.directory}"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: Any, data: Any = None, step: int | None = None) -> Any:
        """The last complete checkpoint's state, straight into its shards; None if there is no checkpoint.

        A checkpoint that turns out to be damaged is set aside, `messages` says so, and the one before it is taken.

        Args:
            abstract: shapes, dtypes and shardings (`Trainer.abstract`).
            data: an iterator with `set_state`, which is put where it was.
            step: this one and no other.

        Raises:
            CheckpointError: no checkpoint can be read, or they are not of this model.
        """
        steps = [step] if step is not None else self.steps()[::-1]
        for number in steps:
            try:
                return self._restore(number, abstract, data)
            except _Mismatch as error:
                raise CheckpointError(str(error)) from None
            except Exception as error:
                reason = first_line(error, most=160)
                sentence = f"The checkpoint of step {number} in {self.directory} is damaged ({reason})"
                if step is not None:
                    raise CheckpointError(f"{sentence}.") from None
                if number == steps[-1]:
                    raise CheckpointError(f"{sentence}, and there is no other.") from None
                self.messages.append(f"{sentence}; it is set aside, and the one before it is taken.")
                self._set_aside(number)
        return None

    def _restore(self, step: int, abstract: Any, data: Any) -> Any:
        wanted = _named(abstract)
        stored = self._manager.item_metadata(step)[_STATE].tree
        missing, more = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
        if stored and (missing or more):
            sign, name = ("lacks", missing[0]) if missing else ("has besides", more[0])
            if all(other.startswith("optimizer.") for other in (*missing, *more)):
                raise _Mismatch(
                    f"The checkpoint of step {step} in {self.directory} is of this model, but of another optimiser: it "
                    f"{sign} {name}. Go on with the settings of the run's beginning, or begin anew in another place."
                )
            raise _Mismatch(
                f"The checkpoint of step {step} in {self.directory} is of another model or recipe: it {sign} {name}"
                f" ({len(missing)} missing, {len(more)} unexpected)."
            )
        for name, leaf in wanted.items():
            if tuple(stored[name].shape) != tuple(leaf.shape):
                raise _Mismatch(
                    f"The checkpoint of step {step} in {self.directory} is of another model or recipe: {name} is "
                    f"{tuple(stored[name].shape)}, not {tuple(leaf.shape)}."
                )
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        arguments = {
            name: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=getattr(leaf, "sharding", None) or place)
            for name, leaf in wanted.items()
        }
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.PyTreeRestore(item=wanted, restore_args=arguments),
                    _RUN: ocp.args.JsonRestore(),
                }
            ),
        )
        run = restored[_RUN]
        same = {name: array for name, array in restored[_STATE].items() if stored[name].dtype == array.dtype}
        known = run.get("checksums", {})
        wrong = [name for name, value in checksums(same).items() if known.get(name, value) != value]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what was saved")
        if hasattr(data, "set_state") and run["data"] is not None:
            data.set_state(run["data"].encode() if isinstance(run["data"], str) else run["data"])
        self.progress = run["progress"]
        arrays = [jnp.asarray(restored[_STATE][name]) for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), arrays)

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be written again."""
        self.close()
        target = self.directory / f"damaged-{step}"
        number = 1
        while target.exists():
            number += 1
            target = self.directory / f"damaged-{step}-{number}"
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(target)
        hosts.wait("a damaged checkpoint is set aside")
        self._manager = self._open()

    def close(self) -> None:
        """Finish what is being written, and let go of the directory."""
        with contextlib.suppress(Exception):
            self._manager.close()
        _settle()

    @contextlib.contextmanager
    def _sentence(self, sentence: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            _settle()
            reason = getattr(error, "strerror", None) or first_line(error)
            steps = [n for n in self.steps() if (self.directory / str(n)).exists()]
            before = f"; that of step {steps[-1]} is good" if steps else ""
            raise CheckpointError(f"{sentence} ({reason}){before}.") from None


def checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """The sum of each array's bits as numbers of 32 bits, modulo $2^{32}$: the same in any order, so on any mesh."""
    sums = _sums({name: array for name, array in arrays.items() if array.size})
    return {name: int(np.asarray(total.addressable_data(0))) for name, total in sums.items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = x.astype(unsigned) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
        return bits.sum(dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


class _Mismatch(Exception):
    """A checkpoint of something else."""


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by a name that tells their place in the tree."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax reports its progress, and each error of its threads at length, to absl's log; it raises them besides."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _settle() -> None:
    """Return when no thread of Orbax writes any more: the first one's error is raised while the others still do."""
    while busy := [t for t in threading.enumerate() if t.name == "async_save" or "orbax" in type(t).__module__]:
        for thread in busy:
            threading.Thread.join(thread)  # whose own `join` raises its error again
