"""Random weights that any machine can make again, bit for bit, from a seed, a name and a shape.

Only NumPy is needed, and of NumPy only the raw bits of the Philox counter generator, fixed by its algorithm: a golden
file holds a seed instead of weights, and the original (in PyTorch) and our model are filled alike.

No value stays at the 0 or 1 that initialisers like: a forgotten bias or scale would not show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from weights_conversion.rules import Table


def uniform(seed: int, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """float64 values, uniform in [low, high), determined by `seed` and `name` alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key).random_raw(int(np.prod(shape, dtype=np.int64)))
    unit = (np.asarray(bits, np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (low + (high - low) * unit).reshape(shape)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    r"""A foreign tensor's random values, scaled by what its name says it is.

    Scales, norms and variances (one-dimensional weights, weight-norm magnitudes, `running_var`) lie in [0.5, 1.5); a
    kernel has standard deviation $1/\sqrt{\text{fan in}}$, so that activations stay of order one; all else has 0.2.
    """
    leaf = name.rsplit(".", 1)[-1]
    magnitude = leaf in ("weight_g", "original0", "running_var")
    if magnitude or (leaf in ("weight", "gamma") and len(shape) <= 1):
        return uniform(seed, name, shape, 0.5, 1.5)
    if len(shape) >= 2 and "bias" not in leaf:
        spread = float(np.prod(shape[1:])) ** -0.5
    else:
        spread = 0.2
    return uniform(seed, name, shape, -(3**0.5) * spread, 3**0.5 * spread)


def random_parameters(parameters: Mapping[str, Any], table: Table, seed: int) -> dict[str, np.ndarray]:
    """Our parameters as the table makes them from random foreign tensors: what `port` gives, without PyTorch.

    Args:
        parameters: our paths with anything that has a `.shape`.
        table: the conversion whose foreign names key the generator.
        seed: the seed.
    """
    result: dict[str, np.ndarray] = {}
    for step in table.steps_for(parameters):
        blank = tuple(np.broadcast_to(np.float64(0), tuple(parameters[path].shape)) for path in step.ours)
        shapes = [array.shape for array in step.operation.inverse(blank)]
        foreign = tuple(random_tensor(n, s, seed) for n, s in zip(step.foreign, shapes, strict=True))
        result.update(zip(step.ours, step.operation.forward(foreign), strict=True))
    return result
