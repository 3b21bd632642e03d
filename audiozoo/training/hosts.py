"""Several hosts, one program: every process runs the same command, and they find each other through one of them.

    audiozoo train … --distributed auto                     # on a TPU pod, under Slurm or Open MPI
    audiozoo train … --distributed 10.0.0.1:8476,4,0        # by hand: the first process's address, of how many, which

Each host reads its own rows of a batch and holds its own shards; see `audiozoo.training.loop`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from audiozoo.errors import UsageError, first_line


def connect(how: str) -> None:
    """Join the other processes; before anything asks JAX for its devices.

    Args:
        how: `auto`, or `HOST:PORT,COUNT,INDEX`.

    Raises:
        UsageError: it cannot be understood, or the others cannot be reached.
    """
    found = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", how)
    if how != "auto" and (found is None or int(found[3]) >= int(found[2])):
        raise UsageError(f"{how!r} names no process among others; write auto, or HOST:PORT,COUNT,INDEX from 0.")
    try:
        if found is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(found[1], int(found[2]), int(found[3]))
    except Exception as error:
        raise UsageError(f"The other processes cannot be joined ({first_line(error)}).") from None


def whole(model: nnx.Module) -> Any:
    """The model with every array whole, in this host's memory; all processes must ask for it."""
    if jax.process_count() == 1:
        return model
    from jax.experimental import multihost_utils

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, model)


def largest(numbers: Sequence[int]) -> list[int]:
    """Of each number the largest among those that the processes give; all must ask, in the same order."""
    if jax.process_count() == 1 or not len(numbers):
        return list(numbers)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32))).max(axis=0).tolist()


def wait(name: str) -> None:
    """Return when every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
