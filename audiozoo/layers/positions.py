"""Fixed positions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoids(length: int, channels: int, *, max_timescale: float = 10_000.0) -> np.ndarray:
    r"""Sinusoidal positions of "Attention Is All You Need" (arXiv 1706.03762, §3.5), halves side by side.

    Row $t$ holds $[\sin(t\,\omega_0) \dots \sin(t\,\omega_{n-1}), \cos(t\,\omega_0) \dots \cos(t\,\omega_{n-1})]$ with
    $\omega_i = \text{max\_timescale}^{-i/(n-1)}$ and $n$ = `channels` / 2.

    Returns:
        float64 array of shape `(length, channels)`.
    """
    half = channels // 2
    frequencies = np.exp(-np.log(max_timescale) / (half - 1) * np.arange(half))
    angles = np.arange(length)[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def interleaved_sinusoids(positions: np.ndarray, channels: int) -> np.ndarray:
    r"""Sinusoidal positions of arXiv 1706.03762, §3.5, as it writes them: sine and cosine in turn.

    Row $t$ holds $\sin(t\,\omega_k)$ at $2k$ and $\cos(t\,\omega_k)$ at $2k + 1$ with $\omega_k = 10000^{-2k/C}$.

    Returns:
        float64 array of shape `(len(positions), channels)`.
    """
    angles = positions[:, None] * 10_000.0 ** (-np.arange(0, channels, 2) / channels)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), -1)[:, :channels]


def fairseq_sinusoids(length: int, channels: int, *, padding: int = 1) -> np.ndarray:
    r"""fairseq's table of positions, which its descendants' checkpoints were trained with and do not hold.

    `sinusoids`, but row `padding` is zero, so that padding has no position, and the first token of a text is at row
    `padding` + 1. Frequencies and angles are rounded to float32, as they were in training: at row 5000 the angle is off
    by up to 2e-4, and the network knows the sine of that angle.

    Args:
        length: rows, those up to `padding` included.
        channels: width; an odd one ends with a zero.
        padding: the token of padding.

    Returns:
        float64 array of shape `(length, channels)`.
    """
    half = channels // 2
    steps = np.arange(half, dtype=np.float32) * np.float32(-np.log(10_000.0) / (half - 1))
    frequencies = np.exp(steps.astype(np.float64)).astype(np.float32)
    angles = (np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]).astype(np.float64)
    table = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((length, channels % 2))], axis=1)
    table[padding : padding + 1] = 0
    return table


def sinusoids_of(
    ids: Int[Array, "batch time"], channels: int, *, padding: int, offset: int | Int[Array, ""] = 0, dtype: Any
) -> Float[Array, "batch time channels"]:
    r"""The rows of `sinusoids` for tokens, as fairseq counts them: 1, 2, … + `padding`, and zeros for padding itself.

    Args:
        ids: tokens; padding among them is not counted.
        channels: of a row.
        padding: the token that is padding.
        offset: tokens before these.
        dtype: of the rows; angles are computed in float32 at least.
    """
    half, real = channels // 2, ids != padding
    accumulate = jnp.promote_types(dtype, jnp.float32)
    frequencies = jnp.asarray(np.exp(-np.log(10_000.0) / (half - 1) * np.arange(half)), accumulate)
    positions = padding + offset + jnp.cumsum(real, axis=1)
    angles = positions[..., None].astype(accumulate) * frequencies
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.where(real[..., None], table, 0).astype(dtype)


def cosines_and_sines(
    positions: Int[Array, " time"], channels: int, *, max_timescale: float = 10_000.0, dtype: Any
) -> Float[Array, "time channels"]:
    r"""$[\cos(t / \lambda_i), \sin(t / \lambda_i)]$ of given times, $\lambda_i = \text{max\_timescale}^{i / (n - 1)}$.

    The periods of `sinusoids`, the cosines first, as in the language models of EnCodec and MusicGen.

    Args:
        positions: $t$.
        channels: $2n$, of a row.
        max_timescale: the longest period, over $2\pi$.
        dtype: of the rows; angles are computed in float32 at least.
    """
    half, wide = channels // 2, jnp.promote_types(dtype, jnp.float32)
    periods = jnp.asarray(max_timescale ** (np.arange(half) / (half - 1)), wide)
    angles = positions[:, None].astype(wide) / periods
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
