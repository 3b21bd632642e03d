"""Activations under the names that configurations give them."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audiozoo.errors import UsageError


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The exact GELU (JAX's default is not): $x\,\Phi(x) = \tfrac{x}{2}(1 + \operatorname{erf}(x / \sqrt 2))$."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * (1.0 / math.sqrt(2.0))))


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation of GELU, for checkpoints that were trained with it."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "elu": jax.nn.elu,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name.

    Raises:
        UsageError: for a name that no checkpoint of the zoo uses.
    """
    if name not in ACTIVATIONS:
        raise UsageError(f"There is no activation named {name!r}; there are {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]
