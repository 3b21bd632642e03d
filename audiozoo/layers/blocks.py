r"""Position-wise networks (arXiv 1706.03762, §3.3) over inputs whose hidden layer does not fit into a cache."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 1 << 21  # hidden values of one block: 8 MB in float32
BLOCKS_FROM = 1 << 23  # hidden values from which blocks pay


def in_blocks(
    network: Callable[[jax.Array], jax.Array], x: Float[Array, "*batch channels"], width: int
) -> Float[Array, "*batch outputs"]:
    """`network(x)`, for a network that treats all positions alike and each by itself.

    On a CPU blocks of positions take turns, so that what one matrix product writes, the activation and the next product
    find in the cache. With 4 × 1214 tokens, 768 channels and 3072 hidden ones, 162 ms instead of 178 ms on two cores.

    Args:
        network: from `(..., channels)` to `(..., outputs)`.
        x: any number of axes before the channels.
        width: of its hidden layer.
    """
    positions = x.size // x.shape[-1]
    if positions * width < BLOCKS_FROM:
        return network(x)
    blocks = -(-positions * width // BLOCK)

    def in_turns(x: jax.Array) -> jax.Array:
        length = -(-positions // blocks)
        flat = jnp.pad(x.reshape(positions, -1), ((0, length * blocks - positions), (0, 0)))
        y = jax.lax.map(network, flat.reshape(blocks, length, -1))
        return y.reshape(blocks * length, -1)[:positions].reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, cpu=in_turns, default=network)
