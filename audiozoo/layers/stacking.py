"""One checkpoint, two layouts: a list of equal layers for reading, one stacked layer under `lax.scan` for compiling.

A deep model compiles in the time of one layer when its layers are stacked: every parameter gains a leading axis, and
the loop over layers becomes `jax.lax.scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from audiozoo.layers.basic import Dropout


def stack_layers(layers: Sequence[nnx.Module]) -> nnx.Module:
    """A module whose every array is the layers' arrays along a new first axis; the layers must be alike."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def unstack_layers(stacked: nnx.Module) -> nnx.List:
    """The list of layers that `stack_layers` was given."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return nnx.List([jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(count)])


def scan_layers(stacked: nnx.Module, call: Callable[[nnx.Module, Any], Any], x: Any) -> Any:
    """`x` through every layer in turn: `call(layer, x)` must give back something of the shape and dtype of `x`."""
    return jax.lax.scan(lambda carry, layer: (call(layer, carry), None), x, stacked)[0]


def layer_drop(layer: Any, x: jax.Array, rate: float, dropout: Dropout, *args: Any) -> tuple[Any, ...]:
    """`layer(x, dropout, *args)`, or `x` itself with probability `rate` in training (LayerDrop, arXiv 1909.11556)."""
    out, *rest = layer(x, dropout, *args)
    if rate and (key := dropout.next_key()) is not None:
        out = jnp.where(jax.random.uniform(key) < rate, x, out)
    return out, *rest
