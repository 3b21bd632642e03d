"""One checkpoint, two layouts: a list of equal layers for reading, one stacked layer under `lax.scan` for compiling.

A deep model compiles in the time of one layer when its layers are stacked: every parameter gains a leading axis, and
the loop over layers becomes `jax.lax.scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from audiozoo.errors import UsageError
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


class Scanned(nnx.Module):
    """A stack of equal blocks that is called like one of them: `lax.scan` over the stack.

    In a model's list of layers it stands alone for all of them, and so the loop `for layer in layers: x, … = layer(x,
    …)` stays as it is. What else a block is given must be the same for all blocks, and what else it returns (attention
    weights, caches) must be None.
    """

    def __init__(self, blocks: nnx.Module, count: int, remat: bool = False):
        self.blocks = blocks
        self.count, self.remat = count, remat

    def __call__(self, x: jax.Array, *args: Any, drop_rate: float = 0.0, **kwargs: Any) -> tuple[Any, ...] | jax.Array:
        """`x` through all blocks; each has dropout keys of its own, and may be left out (`layer_drop`)."""
        dropout = next((a for a in (*args, *kwargs.values()) if isinstance(a, Dropout)), None)
        key = None if dropout is None else dropout.next_key()
        others: tuple[Any, ...] | None = ()

        def block(x: jax.Array, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            nonlocal others
            layer, index = inputs
            own = Dropout(None if key is None else jax.random.fold_in(key, index))

            def given(value: Any) -> Any:
                return own if value is dropout and dropout is not None else value

            out = layer(x, *map(given, args), **{name: given(value) for name, value in kwargs.items()})
            out, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            if jax.tree.leaves(others):
                raise UsageError("Blocks under a scan return nothing but their output: ask for no weights, no cache.")
            if drop_rate and (drop_key := own.next_key()) is not None:
                out = jnp.where(jax.random.uniform(drop_key) < drop_rate, x, out)
            return out.astype(x.dtype), None

        if self.remat:
            block = jax.checkpoint(block, prevent_cse=False)
        # The first block's output tells the dtype that the carry has: bfloat16 in, float32 through, for instance.
        first = jax.tree.map(lambda leaf: leaf[0], self.blocks)
        silent = [Dropout(None) if a is dropout and dropout is not None else a for a in args]
        probe = jax.eval_shape(lambda x, layer: layer(x, *silent, **kwargs), x, first)
        wide = (probe[0] if isinstance(probe, tuple) else probe).dtype
        x, _ = jax.lax.scan(block, x.astype(wide), (self.blocks, jnp.arange(self.count)))
        return x if others is None else (x, *others)


def stacks(network: nnx.Module) -> Iterator[tuple[Any, str, Any]]:
    """Every list of at least two equal blocks in a network, or of one `Scanned`: its owner, its name, itself."""
    for _, owner in nnx.iter_modules(network):
        if isinstance(owner, nnx.List):
            continue
        for name, value in list(vars(owner).items()):
            if isinstance(value, nnx.List) and len(value) and isinstance(value[0], nnx.Module):
                yield owner, name, value


def _alike(layers: Sequence[Any]) -> bool:
    def form(layer: Any) -> Any:
        leaves, structure = jax.tree.flatten(layer)
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    return all(type(layer) is type(layers[0]) and form(layer) == form(layers[0]) for layer in layers[1:])


def scanned(network: nnx.Module, *, remat: bool = False, least: int = 2) -> Any:
    """The same network with each list of at least `least` equal blocks as one `Scanned`; `network` stays as it is.

    Lists whose blocks hold statistics (batch normalisation) are left alone.
    """
    network = nnx.merge(*nnx.split(network))
    for owner, name, layers in list(stacks(network)):
        plain = not jax.tree.leaves(nnx.state(layers, nnx.Not(nnx.Param)))
        if len(layers) >= least and plain and _alike(list(layers)):
            setattr(owner, name, nnx.List([Scanned(stack_layers(list(layers)), len(layers), remat)]))
    return network


def unscanned(network: nnx.Module) -> Any:
    """What `scanned` was given, with the parameters that `network` has now."""
    network = nnx.merge(*nnx.split(network))
    for owner, name, layers in list(stacks(network)):
        if isinstance(layers[0], Scanned):
            setattr(owner, name, unstack_layers(layers[0].blocks))
    return network


@cache
def _recomputing(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return jax.checkpoint(lambda: cls.__call__(self, *args, **kwargs))()

    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def rematerialise(network: nnx.Module) -> None:
    """Make every block of every list recompute its inside in the backward pass, which keeps its input alone.

    It changes the class of the blocks in place: for a network that has just been merged inside a loss.
    """
    for _, _, layers in list(stacks(network)):
        for layer in layers:
            kind: Any = type(layer)
            if callable(layer) and not isinstance(layer, Scanned):
                layer.__class__ = _recomputing(kind)


def layer_drop(layer: Any, x: jax.Array, rate: float, dropout: Dropout, *args: Any) -> tuple[Any, ...]:
    """`layer(x, dropout, *args)`, or `x` itself with probability `rate` in training (LayerDrop, arXiv 1909.11556)."""
    if isinstance(layer.func if isinstance(layer, partial) else layer, Scanned):
        return layer(x, dropout, *args, drop_rate=rate)
    out, *rest = layer(x, dropout, *args)
    if rate and (key := dropout.next_key()) is not None:
        out = jnp.where(jax.random.uniform(key) < rate, x, out)
    return out, *rest
