"""Random spans, as SpecAugment (arXiv 1904.08779) and masked prediction draw them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def span_mask(
    key: jax.Array,
    batch: int,
    length: int,
    *,
    probability: float,
    span: int,
    minimum: int = 0,
    lengths: Int[Array, " batch"] | None = None,
) -> Bool[Array, "batch length"]:
    r"""True inside random spans of `span` steps; spans may overlap.

    Row $b$ with $L_b$ valid steps gets $\lfloor p\,L_b/\text{span} + u \rfloor$ spans, $u \sim U[0, 1)$ drawn once for
    the batch, at least `minimum`, at the most as many as fit into `length` end to end and as there are places for;
    their starts are drawn without replacement from $0 \dots L_b - \text{span}$.
    """
    if lengths is None:
        lengths = jnp.full((batch,), length)
    rounding, starts = jax.random.split(key)
    wanted = jnp.floor(probability * lengths / span + jax.random.uniform(rounding))
    possible = jnp.maximum(lengths - span + 1, 0)
    count = jnp.minimum(jnp.maximum(wanted, minimum), jnp.minimum(possible, length // span))
    position = jnp.arange(length)
    # The `count` smallest of i.i.d. uniforms are a uniform draw of `count` starts without replacement.
    draw = jnp.where(position < possible[:, None], jax.random.uniform(starts, (batch, length)), jnp.inf)
    rank = jnp.argsort(jnp.argsort(draw, axis=1), axis=1)
    is_start = rank < count[:, None]
    # A step is covered when a span starts at it or at one of the span - 1 steps before it.
    begun = jnp.cumsum(is_start, axis=1)
    before = jnp.pad(begun, ((0, 0), (span, 0)))[:, :length]
    return begun > before
