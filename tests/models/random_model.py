"""A model with random values that nobody has to compile: drawn by NumPy, of the size that an initialiser gives."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.layers import abstract
from audiozoo.loading import variables, with_variables
from tests.random_weights import random_parameters
from weights_conversion.rules import Table


def random_model(create: Callable[[Any], nnx.Module], table: Table | None = None, seed: int = 0) -> Any:
    """The model that `create(rngs)` makes, no value of it at an initialiser's 0 or 1.

    Args:
        create: builds it from `nnx.Rngs`.
        table: a conversion: the values are those that `tests.parity.harness.randomise` gives the original. Without it
            they are drawn by our names: kernels keep variances; scales, and the variances that batch normalisation
            keeps, are about 1, biases about 0.
        seed: of the draw.
    """
    blank = abstract(create)
    shapes = variables(blank)
    values = _by_name(shapes, seed) if table is None else random_parameters(shapes, table, seed)
    return with_variables(blank, {name: jnp.asarray(values.pop(name), v.dtype) for name, v in shapes.items()})


def _by_name(shapes: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    drawn = {}
    for name, variable in shapes.items():
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(variable.shape)
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("u", "v"):
            values = values / np.linalg.norm(values)
        elif leaf in ("scale", "kernel_g", "var"):
            values = 1 + 0.1 * values
        elif values.ndim > 1:
            values = values / np.sqrt(np.prod(variable.shape[:-1]))
        else:
            values = 0.1 * values
        drawn[name] = values
    return drawn
