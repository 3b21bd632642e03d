r"""Symbols and frames: the search for the alignment of both (Glow-TTS, arXiv 2005.11129), and its use."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from audiozoo.layers.basic import at_least_float32


def monotonic_alignment(
    scores: Float[Array, "batch frames time"],
    frames: Int[Array, " batch"],
    times: Int[Array, " batch"],
) -> Float[Array, "batch frames time"]:
    r"""Monotonic alignment search (Glow-TTS, arXiv 2005.11129, §3.2 and Algorithm 1), on the device.

    Of all alignments that begin at the first symbol, end at the last one, and from frame to frame stay or go one symbol
    on, the one of the greatest sum of scores: $Q_{i,j} = \max(Q_{i-1,j-1}, Q_{i,j-1}) + \text{score}_{i,j}$, walked
    back from the end. At a tie the path stays (walking back), as in the authors' search.

    Args:
        scores: log-likelihoods.
        frames: frames of each item, not fewer than its symbols.
        times: symbols of each item.

    Returns:
        1 where frame and symbol belong together, else 0. No gradient goes through it.
    """
    scores = jax.lax.stop_gradient(scores)
    batch, _, time = scores.shape
    never = jnp.asarray(-1e9, scores.dtype)
    symbol = jnp.arange(time)

    def forward(best: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        frame, score = step
        before = jnp.concatenate([jnp.full((batch, 1), never), best[:, :-1]], axis=1)
        came = (symbol == frame) | (best < before)  # from the symbol before
        start = jnp.where((frame == 0) & (symbol == 0), 0, before)
        return score + jnp.maximum(start, jnp.where(symbol == frame, never, best)), came

    def backward(index: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        frame, came = step
        valid = frame < frames
        here = jnp.where(valid[:, None], symbol == index[:, None], False)
        moves = valid & (index > 0) & jnp.take_along_axis(came, index[:, None], axis=1)[:, 0]
        return index - moves, here

    steps = jnp.arange(scores.shape[1])
    _, came = jax.lax.scan(forward, jnp.full((batch, time), never), (steps, scores.swapaxes(0, 1)))
    _, path = jax.lax.scan(backward, times - 1, (steps, came), reverse=True)
    return path.swapaxes(0, 1).astype(scores.dtype)


def repeat_by_duration(
    durations: Num[Array, "batch time"], frames: int, *values: Float[Array, "batch time channels"]
) -> tuple[Float[Array, "batch frames channels"], ...]:
    """Each symbol's values, as many times as its duration says; zeros after the last one.

    Frames are counted in at least float32: bfloat16 has no 257.
    """
    if jnp.issubdtype(durations.dtype, jnp.floating):
        durations = at_least_float32(durations)
    ends = jnp.cumsum(durations, axis=-1)
    position = jnp.arange(frames, dtype=ends.dtype)
    index = jax.vmap(partial(jnp.searchsorted, side="right"), in_axes=(0, None))(ends, position)
    valid = (position < ends[:, -1:])[..., None]
    index = jnp.minimum(index, ends.shape[1] - 1)[..., None]
    repeated = (jnp.take_along_axis(at_least_float32(v), index, axis=1).astype(v.dtype) for v in values)
    return tuple(jnp.where(valid, v, jnp.zeros((), v.dtype)) for v in repeated)
