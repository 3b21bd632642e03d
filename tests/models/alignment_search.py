"""Monotonic alignment search as a plain loop over NumPy arrays, cell by cell: the reference for ours."""

from __future__ import annotations

import numpy as np


def brute_force_alignment(scores: np.ndarray, frames: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Dynamic programming in the dtype of `scores`, the way Glow-TTS' Algorithm 1 writes it down."""
    path = np.zeros_like(scores)
    for b, (count, symbols) in enumerate(zip(frames, times, strict=True)):
        best = np.full((count, symbols), -np.inf, scores.dtype)
        for j in range(count):
            for i in range(min(j + 1, symbols)):
                if j == 0:
                    best[j, i] = scores[b, j, i]
                    continue
                stay = best[j - 1, i]
                move = best[j - 1, i - 1] if i else -np.inf
                best[j, i] = scores[b, j, i] + max(stay, move)
        i = symbols - 1
        for j in range(count - 1, -1, -1):
            path[b, j, i] = 1
            if i and (i == j or best[j - 1, i] < best[j - 1, i - 1]):
                i -= 1
    return path


def exhaustive_alignment(scores: np.ndarray) -> tuple[float, int]:
    """The greatest sum over all monotonic alignments of one item, by trying each; and how many reach it."""
    frames, symbols = scores.shape
    sums = []

    def walk(j: int, i: int, total: float) -> None:
        total += scores[j, i]
        if j == frames - 1:
            if i == symbols - 1:
                sums.append(total)
            return
        walk(j + 1, i, total)
        if i + 1 < symbols:
            walk(j + 1, i + 1, total)

    walk(0, 0, 0.0)
    return max(sums), sum(s == max(sums) for s in sums)
