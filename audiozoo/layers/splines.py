r"""Monotonic rational-quadratic splines, the couplings of neural spline flows (arXiv 1906.04032)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audiozoo.layers.basic import at_least_float32

MIN_BIN = 1e-3  # least width and height of a spline's bin, as a part of the whole interval
MIN_DERIVATIVE = 1e-3  # least slope at a knot


def _softplus(x: jax.Array) -> jax.Array:
    r"""$\ln(1 + e^x)$ as PyTorch has it, with which the checkpoints were trained: $x$ itself above 20, 2e-9 less."""
    return jnp.where(x > 20, x, jax.nn.softplus(x))


def rational_quadratic_spline(
    x: Float[Array, "*shape"],
    widths: Float[Array, "*shape bins"],
    heights: Float[Array, "*shape bins"],
    derivatives: Float[Array, "*shape knots"],
    *,
    reverse: bool = False,
    bound: float = 5.0,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Monotonic rational-quadratic spline with linear tails (arXiv 1906.04032, §3.1).

    $K$ bins divide $[-B, B]$; in bin $k$, with $\xi = (x - x_k)/w_k$, mean slope $s = h_k / w_k$ and slopes $\delta$ at
    the knots,
    $$y = y_k + \frac{h_k\,[s\,\xi^2 + \delta_k\,\xi(1-\xi)]}{s + (\delta_{k+1} + \delta_k - 2s)\,\xi(1-\xi)}.$$
    Outside of $[-B, B]$ it is the identity.

    Args:
        x: where to evaluate.
        widths: of the bins, before their softmax.
        heights: of the bins, before their softmax.
        derivatives: at the $K - 1$ inner knots, before their softplus; at $\pm B$ the slope is 1.
        reverse: evaluate the inverse.
        bound: $B$.

    Returns:
        The values, and the logarithm of the derivative there.
    """
    x, widths, heights, derivatives = map(at_least_float32, (x, widths, heights, derivatives))
    bins = widths.shape[-1]
    inside = (x >= -bound) & (x <= bound)
    # Nothing outside may reach a division or a root: not even its gradient.
    x_in = jnp.where(inside, x, jnp.zeros((), x.dtype))
    edge = jnp.full((*derivatives.shape[:-1], 1), math.log(math.exp(1 - MIN_DERIVATIVE) - 1), derivatives.dtype)
    slopes = MIN_DERIVATIVE + _softplus(jnp.concatenate([edge, derivatives, edge], axis=-1))

    def knots(unnormalised: jax.Array) -> jax.Array:
        parts = MIN_BIN + (1 - MIN_BIN * bins) * jax.nn.softmax(unnormalised, axis=-1)
        inner = 2 * bound * jnp.cumsum(parts, axis=-1)[..., :-1] - bound
        end = jnp.full((*inner.shape[:-1], 1), bound, inner.dtype)
        return jnp.concatenate([-end, inner, end], axis=-1)

    x_knots, y_knots = knots(widths), knots(heights)
    located = y_knots if reverse else x_knots
    index = jnp.clip(jnp.sum(x_in[..., None] >= located[..., :-1], axis=-1) - 1, 0, bins - 1)
    chosen = jnp.arange(bins) == index[..., None]

    def at(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen, values, jnp.zeros((), values.dtype)), axis=-1)

    x_k, w = at(x_knots[..., :-1]), at(jnp.diff(x_knots, axis=-1))
    y_k, h = at(y_knots[..., :-1]), at(jnp.diff(y_knots, axis=-1))
    d_k, d_next, s = at(slopes[..., :-1]), at(slopes[..., 1:]), h / w
    curvature = d_k + d_next - 2 * s
    if reverse:
        # The root in [0, 1] of a ξ² + b ξ + c, in the form that does not cancel.
        offset = x_in - y_k
        a, b, c = h * (s - d_k) + offset * curvature, h * d_k - offset * curvature, -s * offset
        discriminant = jnp.square(b) - 4 * a * c
        positive = discriminant > 0
        root = jnp.where(positive, jnp.sqrt(jnp.where(positive, discriminant, 1)), 0)
        xi = 2 * c / (-b - root)
        value = xi * w + x_k
    else:
        xi = (x_in - x_k) / w
    mixed = xi * (1 - xi)
    denominator = s + curvature * mixed
    if not reverse:
        value = y_k + h * (s * jnp.square(xi) + d_k * mixed) / denominator
    numerator = jnp.square(s) * (d_next * jnp.square(xi) + 2 * s * mixed + d_k * jnp.square(1 - xi))
    log_slope = jnp.log(numerator) - 2 * jnp.log(denominator)
    log_slope = jnp.where(inside, -log_slope if reverse else log_slope, jnp.zeros((), x.dtype))
    return jnp.where(inside, value, x), log_slope
