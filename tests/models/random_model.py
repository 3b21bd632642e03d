"""A model with random values that nobody has to compile: drawn by NumPy, of the size that an initialiser gives."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.layers import abstract


def random_model(create: Callable[[Any], nnx.Module], seed: int = 0) -> Any:
    """The model that `create(rngs)` makes.

    Kernels keep variances; scales, and the variances that batch normalisation keeps, are about 1, biases about 0.
    """
    graphdef, state = nnx.split(abstract(create))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        rng = np.random.default_rng([seed, zlib.crc32(".".join(map(str, path)).encode())])
        values = rng.standard_normal(variable.shape)
        if path[-1] in ("u", "v"):
            values = values / np.linalg.norm(values)
        elif path[-1] in ("scale", "kernel_g", "var"):
            values = 1 + 0.1 * values
        elif values.ndim > 1:
            values = values / np.sqrt(np.prod(variable.shape[:-1]))
        else:
            values = 0.1 * values
        flat.append((path, variable.replace(jnp.asarray(values, variable.dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
