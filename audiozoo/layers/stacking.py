"""One checkpoint, two layouts: a list of equal layers for reading, one stacked layer under `lax.scan` for compiling.

A deep model compiles in the time of one layer when its layers are stacked: every parameter gains a leading axis, and
the loop over layers becomes `jax.lax.scan`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from audiozoo.errors import UsageError
from audiozoo.layers.basic import Dropout


def stack_layers(layers: Sequence[nnx.Module]) -> nnx.Module:
    """A module whose every array is the layers' arrays along a new first axis; the layers must be alike."""

    def stack(*arrays: Any) -> Any:
        if isinstance(arrays[0], jax.ShapeDtypeStruct):  # a model of shapes
            return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
        return jnp.stack(arrays)

    return jax.tree.map(stack, *layers)


def unstack_layers(stacked: nnx.Module) -> nnx.List:
    """The list of layers that `stack_layers` was given."""

    def part(array: Any, index: int) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
        return array[index]

    count = jax.tree.leaves(stacked)[0].shape[0]
    return nnx.List([jax.tree.map(partial(part, index=i), stacked) for i in range(count)])


def scan_layers(stacked: nnx.Module, call: Callable[[nnx.Module, Any], Any], x: Any) -> Any:
    """`x` through every layer in turn: `call(layer, x)` must give back something of the shape and dtype of `x`."""
    return jax.lax.scan(lambda carry, layer: (call(layer, carry), None), x, stacked)[0]


_NO_CACHE = "Stacked layers have no attention weights and no cache: load the model unstacked."


@dataclass(frozen=True)
class _Later:
    """A call of a part of every block, made when the block's turn comes."""

    part: str
    method: str
    args: tuple[Any, ...]

    def of(self, block: Any) -> Any:
        return getattr(getattr(block, self.part), self.method)(*self.args)

    @property
    def key(self) -> Any:
        """The keys that a cache would be made of."""
        raise UsageError(_NO_CACHE)


@dataclass(frozen=True)
class _Part:
    """A part of every block: `layer.encoder_attn`, of which a decoder asks the keys and values of what it reads."""

    name: str

    def __getattr__(self, method: str) -> Callable[..., _Later]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args: _Later(self.name, method, args)


class Scanned(nnx.Module):
    """A stack of equal blocks that is called like one of them: `lax.scan` over the stack.

    In a model's list of layers it stands alone for all of them, and so the loop `for layer in layers: x, … = layer(x,
    …)` stays as it is. What else a block is given must be the same for all blocks, or what a part of the block makes of
    it (`layer.encoder_attn.key_values(states)`, computed when the block's turn comes). What else it returns is None: a
    stack has no attention weights, no states between its blocks and no cache. Statistics that blocks move are kept.
    """

    def __init__(self, blocks: nnx.Module, count: int, remat: bool = False):
        self.stacked = blocks
        self.count, self.remat = count, remat

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "stacked":
            raise AttributeError(name)
        part = getattr(self.stacked, name)
        return _Part(name) if isinstance(part, nnx.Module) else part

    def __call__(self, x: jax.Array, *args: Any, drop_rate: float = 0.0, **kwargs: Any) -> tuple[Any, ...] | jax.Array:
        """`x` through all blocks; each has dropout keys of its own, and may be left out (`layer_drop`).

        Raises:
            UsageError: if attention weights are asked for, or a cache is given.
        """
        given = inspect.signature(type(self.stacked).__call__).bind(self.stacked, x, *args, **kwargs).arguments
        if given.get("need_weights") is True or given.get("past") is not None:
            raise UsageError(_NO_CACHE)
        dropout = next((a for a in (*args, *kwargs.values()) if isinstance(a, Dropout)), None)
        key = None if dropout is None else dropout.next_key()
        more, moved = 0, False

        def call(layer: Any, x: jax.Array, own: Dropout) -> Any:
            def resolved(value: Any) -> Any:
                if isinstance(value, _Later):
                    return value.of(layer)
                return own if isinstance(value, Dropout) else value

            return layer(x, *map(resolved, args), **{name: resolved(value) for name, value in kwargs.items()})

        def block(x: jax.Array, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
            nonlocal more, moved
            layer, index = inputs
            own = Dropout(None if key is None else jax.random.fold_in(key, index))
            before = jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
            out = call(layer, x, own)
            out, more = (out[0], len(out) - 1) if isinstance(out, tuple) else (out, 0)
            statistics = nnx.state(layer, nnx.Not(nnx.Param))
            moved = any(a is not b for a, b in zip(before, jax.tree.leaves(statistics), strict=True))
            if drop_rate and (drop_key := own.next_key()) is not None:
                out = jnp.where(jax.random.uniform(drop_key) < drop_rate, x, out)
            return out.astype(x.dtype), statistics if moved else None

        # The first block's output tells the dtype that the carry has: bfloat16 in, float32 through, for instance.
        first = jax.tree.map(lambda leaf: leaf[0], self.stacked)
        probe = jax.eval_shape(lambda x, layer: call(layer, x, Dropout(None)), x, first)
        wide = (probe[0] if isinstance(probe, tuple) else probe).dtype
        turn = jax.checkpoint(block, prevent_cse=False) if self.remat else block
        x, statistics = jax.lax.scan(turn, x.astype(wide), (self.stacked, jnp.arange(self.count)))
        if moved:
            nnx.update(self.stacked, statistics)
        return (x, *(None,) * more) if more else x


def stacks(network: nnx.Module) -> Iterator[tuple[Any, str, Any]]:
    """Every list of modules in a network: its owner, its name, itself."""
    for _, owner in nnx.iter_modules(network):
        if isinstance(owner, nnx.List):
            continue
        for name, value in list(vars(owner).items()):
            if isinstance(value, nnx.List) and len(value) and isinstance(value[0], nnx.Module):
                yield owner, name, value


def _is_block(layer: Any) -> bool:
    """Whether it is called `layer(x, …, dropout, …)`, as the blocks of a Transformer are: one after the other."""
    if isinstance(layer, Scanned) or not callable(layer):
        return False
    parameter = inspect.signature(type(layer).__call__).parameters.get("dropout")
    return parameter is not None and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _form(layer: Any) -> Any:
    leaves, structure = jax.tree.flatten(layer)
    return type(layer), structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def unseen(layer: Any) -> tuple[Any, ...]:
    """The states between the blocks of a stack, which it does not show."""
    return (None,) * (layer.count - 1) if isinstance(layer, Scanned) else ()


def all_states(states: Sequence[jax.Array | None]) -> tuple[Any, ...]:
    """The input of every block and the output of the last, for what reads them all.

    Raises:
        UsageError: if blocks are stacked.
    """
    if any(state is None for state in states):
        raise UsageError(
            "The states between stacked layers are not known, and all are mixed: load the model unstacked."
        )
    return tuple(states)


def all_weights(weights: Sequence[jax.Array | None]) -> tuple[Any, ...]:
    """The attention weights of every block, of blocks that are not told whether anyone looks at them.

    Raises:
        UsageError: if blocks are stacked.
    """
    if any(of_block is None for of_block in weights):
        raise UsageError(_NO_CACHE)
    return tuple(weights)


def scanned(network: nnx.Module, *, remat: bool = False, least: int = 2) -> Any:
    """The same network with at least `least` equal blocks in a row as one `Scanned`; `network` stays as it is.

    Where the owner of the blocks says `seen_after` how many of them its state is looked at, there a stack ends.
    """
    network = nnx.merge(*nnx.split(network))
    for owner, name, layers in list(stacks(network)):
        if not all(map(_is_block, layers)):
            continue
        runs: list[list[Any]] = []
        for index, layer in enumerate(layers):
            if runs and index != getattr(owner, "seen_after", None) and _form(runs[-1][0]) == _form(layer):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        short = [run if len(run) < least else [Scanned(stack_layers(run), len(run), remat)] for run in runs]
        if any(len(run) >= least for run in runs):
            setattr(owner, name, nnx.List([layer for run in short for layer in run]))
    return network


def unscanned(network: nnx.Module) -> Any:
    """What `scanned` was given, with the parameters that `network` has now."""
    network = nnx.merge(*nnx.split(network))
    for owner, name, layers in list(stacks(network)):
        if any(isinstance(layer, Scanned) for layer in layers):
            apart = [unstack_layers(layer.stacked) if isinstance(layer, Scanned) else [layer] for layer in layers]
            setattr(owner, name, nnx.List([layer for run in apart for layer in run]))
    return network


@cache
def _recomputing(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, state = nnx.split(self)

        def inside(state: Any) -> tuple[Any, Any]:
            layer = nnx.merge(graphdef, state)
            return cls.__call__(layer, *args, **kwargs), nnx.state(layer, nnx.Not(nnx.Param))

        out, statistics = jax.checkpoint(inside)(state)
        nnx.update(self, statistics)
        return out

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
