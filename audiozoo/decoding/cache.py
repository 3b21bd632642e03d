r"""The cache of a decoder, seen by the search: any pytree whose array leaves have the batch in axis 0.

A search over $K$ beams runs the step on $B K$ rows, beam $k$ of example $b$ in row $b K + k$. Three kinds of leaves:

- a plain array `(B, …)` is repeated to `(B K, …)` before the loop, and its rows are reordered whenever beams are;
- `Shared(x)` is equal for all beams of an example (cross-attention keys and values, encoder masks). It stays `(B, …)`:
  neither repeated nor moved. The step meets $K$ rows of queries for one row of keys, and `group_beams` turns these
  rows into $K$ query positions, which costs nothing and reads the keys once instead of $K$ times;
- `Growing(x)` is a plain array that fills up along `axis`, one slot a token (self-attention keys and values
  `(B, T, …)`). Slots at or after the current position hold nothing, so a reorder copies only the slots before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

Cache = TypeVar("Cache")
State = TypeVar("State")

_BLOCK = 32  # slots of a `Growing` leaf that a reorder moves at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """A cache leaf (or subtree) with one row per example, equal for all of its beams."""

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Growing:
    """A cache leaf with one row per beam, filled along `axis` up to the current position."""

    value: Array
    axis: int = dataclasses.field(default=1, metadata={"static": True})


def group_beams(queries: Array, batch: int) -> Array:
    """View `(batch * K, L, …)` as `(batch, K * L, …)`: the beams of an example as further query positions.

    For attention against a `Shared` leaf of `batch` rows; `ungroup_beams` undoes it. With one beam both are no-ops.
    """
    rows, length, *rest = queries.shape
    return queries.reshape(batch, (rows // batch) * length, *rest)


def ungroup_beams(outputs: Array, rows: int) -> Array:
    """View `(batch, K * L, …)` as `(rows, L, …)` with `rows = batch * K`."""
    batch, length, *rest = outputs.shape
    return outputs.reshape(rows, (length * batch) // rows, *rest)


def expand(cache: Cache, count: int) -> Cache:
    """Repeat every row `count` times, rows of one example side by side; `Shared` leaves stay as they are."""
    if count == 1:
        return cache
    return _map(lambda x: jnp.repeat(x, count, axis=0), lambda g: jnp.repeat(g.value, count, axis=0), cache)


def reorder(cache: Cache, rows: Int[Array, " rows"], length: Int[Array, ""]) -> Cache:
    """Row `i` of the result is row `rows[i]` of `cache`; nothing is moved if no row changes.

    Args:
        cache: the step's cache.
        rows: for each new row the row that it continues.
        length: number of filled slots of the `Growing` leaves.
    """

    def move(cache: Cache) -> Cache:
        return _map(lambda x: x[rows], lambda g: _reorder_growing(g, rows, length), cache)

    moved = jnp.any(rows != jnp.arange(rows.shape[0], dtype=rows.dtype))
    return lax.cond(moved, move, lambda cache: cache, cache)


def _reorder_growing(leaf: Growing, rows: Int[Array, " rows"], length: Int[Array, ""]) -> Array:
    value, axis = leaf.value, leaf.axis
    size = value.shape[axis]
    block = min(_BLOCK, size)

    def move(index: Array, value: Array) -> Array:
        # The last block is shifted back into the array and then overlaps its predecessor; moving a slot twice
        # would be wrong, so slots that have been moved keep what they hold.
        start = jnp.minimum(index * block, size - block)
        old = lax.dynamic_slice_in_dim(value, start, block, axis)
        fresh = start + jnp.arange(block) >= index * block
        fresh = fresh.reshape((1,) * axis + (block,) + (1,) * (value.ndim - axis - 1))
        return lax.dynamic_update_slice_in_dim(value, jnp.where(fresh, old[rows], old), start, axis)

    return lax.fori_loop(0, (jnp.minimum(length, size) + block - 1) // block, move, value)


def while_loop(condition: Callable[[State], Array], body: Callable[[State], State], state: State) -> State:
    """`lax.while_loop` in which a cache of one row is updated in place.

    XLA's CPU compiler drops the first axis of such an array where a product reads it, but not where the loop carries
    it, and then copies the whole cache several times a step: with 951 slots of 12 heads, 4.3 ms a layer instead of
    0.7 ms. So what the loop carries are the arrays without that axis; `KeyValues.write` does its part.
    """
    leaves, structure = jax.tree.flatten(state)
    single = [jnp.ndim(leaf) > 1 and jnp.shape(leaf)[0] == 1 for leaf in leaves]

    def fold(state: State) -> list[Array]:
        return [x[0] if one else x for x, one in zip(jax.tree.leaves(state), single, strict=True)]

    def unfold(leaves: list[Array]) -> State:
        return jax.tree.unflatten(structure, [x[None] if one else x for x, one in zip(leaves, single, strict=True)])

    leaves = lax.while_loop(lambda x: condition(unfold(x)), lambda x: fold(body(unfold(x))), fold(state))
    return unfold(leaves)


def _map(plain: Any, growing: Any, cache: Any) -> Any:
    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return leaf
        if isinstance(leaf, Growing):
            return Growing(growing(leaf), leaf.axis)
        return plain(leaf) if jnp.ndim(leaf) else leaf

    return jax.tree.map(visit, cache, is_leaf=lambda leaf: isinstance(leaf, (Shared, Growing)))
