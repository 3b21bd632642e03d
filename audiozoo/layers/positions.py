"""Fixed position tables."""

from __future__ import annotations

import numpy as np


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
