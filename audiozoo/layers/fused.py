r"""FlashAttention (arXiv 2205.14135) on TPUs, by the kernel that JAX ships; for attention whose weights nobody wants.

The scores $QK^\top$ of a block of queries and a block of keys are made, used and forgotten in the memory on the chip;
those of long inputs would else go through main memory several times, in both directions. The gradient makes them again.

    with fused_attention(mesh):
        step = jax.jit(loss_and_gradient).lower(…)      # or the first call of a program: what is traced in here

It is asked for, not the default: the kernel's results are tested by an interpreter, and its programs by the TPU's
compiler, but it has not run on a TPU here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class _Place:
    mesh: Mesh | None


_PLACE: ContextVar[_Place | None] = ContextVar("fused_attention", default=None)
FEWEST_SCORES = 1 << 16  # of one head, below which they fit on the chip anyway
BLOCKS, LANES = (512, 384, 256), 128


@contextlib.contextmanager
def fused_attention(mesh: Mesh | None = None) -> Iterator[None]:
    """Programs that are traced inside use the kernel on TPUs: long inputs, no bias, no dropout of weights.

    Args:
        mesh: what arrays are divided over, for a kernel is not divided by the compiler: `data` and `fsdp` divide the
            batch, `tensor` the heads. One device without it.
    """
    token = _PLACE.set(_Place(mesh))
    try:
        yield
    finally:
        _PLACE.reset(token)


def _divided(mesh: Mesh, batch: int, heads: int) -> P | None:
    """How `(batch, heads, …)` lies on a mesh; None if it does not divide."""
    sizes = dict(mesh.shape)
    rows = tuple(name for name in ("data", "fsdp") if name in sizes)
    if batch % math.prod(sizes[name] for name in rows):
        return None
    return P(rows or None, "tensor" if "tensor" in sizes and heads % sizes["tensor"] == 0 else None)


def kernel_for(query: jax.Array, key: jax.Array, value: jax.Array, keys_alone: bool) -> Any:
    """The kernel, to be called like `flash`; None if it is not asked for, or does not do what these arrays need.

    Args:
        query: $Q$, likewise `key` and `value`.
        keys_alone: whether the mask is the same for all heads and queries.
    """
    place = _PLACE.get()
    narrow = query.dtype in (jnp.float32, jnp.bfloat16) and query.dtype == key.dtype == value.dtype
    if place is None or not keys_alone or not narrow or value.shape[3] != query.shape[3]:
        return None
    if query.shape[2] * key.shape[2] < FEWEST_SCORES:
        return None
    if place.mesh is None:
        return flash
    where = _divided(place.mesh, *query.shape[:2])
    if where is None:
        return None

    def divided(query: Any, key: Any, value: Any, seen: Any, *, scale: float, causal: bool) -> jax.Array:
        def local(query: Any, key: Any, value: Any, seen: Any) -> jax.Array:
            return flash(query, key, value, seen, scale=scale, causal=causal)

        rows = None if seen is None else P(where[0])
        return jax.shard_map(
            local, mesh=place.mesh, in_specs=(where, where, where, rows), out_specs=where, check_vma=False
        )(query, key, value, seen)

    return divided


def _block(length: int) -> int:
    """Of the kernel's blocks the one that leaves the least padding, the larger of equals."""
    if length <= BLOCKS[0]:
        return -(-length // LANES) * LANES
    return min(BLOCKS, key=lambda block: -length % block)


def flash(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch heads keys head_dim"],
    value: Float[Array, "batch heads keys head_dim"],
    seen: Bool[Array, "batch keys"] | None = None,
    *,
    scale: float,
    causal: bool,
) -> Float[Array, "batch heads queries head_dim"]:
    r"""$\operatorname{softmax}(\text{scale}\;QK^\top)\,V$ in blocks (arXiv 2205.14135, Algorithm 1), on a TPU.

    Args:
        query: $Q$.
        key: $K$.
        value: $V$.
        seen: keys that queries may see. What comes of a query that may see none is not defined.
        scale: multiplies the scores.
        causal: query $i$ sees no key beyond $i$; there are as many of both.
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    rows, columns = _block(queries), _block(keys)

    def padded(x: jax.Array, block: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)])

    segments = None
    if seen is not None or (keys % columns and not causal):
        seen = jnp.ones((batch, keys), bool) if seen is None else seen
        inside = jnp.pad(seen, [(0, 0), (0, -keys % columns)]).astype(jnp.int32)
        segments = SegmentIds(jnp.ones((batch, queries + -queries % rows), jnp.int32), inside)
    blocks = BlockSizes(
        block_b=1,
        block_q=rows,
        block_k_major=columns,
        block_k=columns,
        block_q_major_dkv=rows,
        block_q_dkv=rows,
        block_k_major_dkv=columns,
        block_k_dkv=columns,
        block_q_dq=rows,
        block_k_major_dq=columns,
        block_k_dq=columns,
    )
    arrays = padded(query, rows), padded(key, columns), padded(value, columns)
    output = flash_attention(*arrays, None, segments, causal=causal, sm_scale=scale, block_sizes=blocks)
    return output[:, :, :queries]
