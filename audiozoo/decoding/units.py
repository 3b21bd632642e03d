r"""Speech as discrete units: clusters of frames (HuBERT, arXiv 2106.07447, §II-A and §IV-B), found by k-means.

Clusters of cepstra teach the first network, clusters of its states the next:

    features = cepstra(waveform)                                  # iteration 1: 39 numbers every 10 ms
    kmeans = KMeans.fit(jax.random.key(0), features, 100)
    found = units(model, processor, waveform, kmeans, layer=9)    # iteration 2 and speech without text
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from audiozoo.audio.features import kaldi_fbank
from audiozoo.decoding.encoders import embed
from audiozoo.errors import SourceError, UsageError

# --- features of the first iteration ---------------------------------------------------------------------------------


def deltas(x: Float[Array, "frames channels"]) -> Float[Array, "frames channels"]:
    r"""Slopes over five frames, $d_t = \sum_{n=1}^2 n (x_{t+n} - x_{t-n}) / 10$, the edges repeated."""
    padded = jnp.pad(x, ((2, 2), (0, 0)), mode="edge")
    frames = len(x)
    return (2 * (padded[4:] - padded[:frames]) + padded[3 : frames + 3] - padded[1 : frames + 1]) / 10


def cepstra(waveform: Float[Array, " samples"], sampling_rate: int = 16_000) -> Float[Array, "frames 39"]:
    r"""§IV-B: 13 mel-frequency cepstral coefficients every 10 ms, with their first and second slopes.

    Kaldi's: the cosine transform of 23 log-mel energies, liftered by $1 + 11 \sin(\pi k/22)$.
    """
    energies = kaldi_fbank(waveform, 23, sampling_rate)
    band, order = np.arange(23)[:, None], np.arange(13)[None]
    cosines = np.sqrt(2 / 23) * np.cos(math.pi / 23 * (band + 0.5) * order)
    cosines[:, 0] = np.sqrt(1 / 23)
    lifter = 1 + 11 * np.sin(math.pi * np.arange(13) / 22)
    x = jnp.matmul(energies, jnp.asarray(cosines * lifter, energies.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([x, deltas(x), deltas(deltas(x))], axis=1)


# --- k-means ---------------------------------------------------------------------------------------------------------


def _squared_distances(x: jax.Array, centroids: jax.Array) -> jax.Array:
    cross = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(x).sum(axis=1)[:, None] - 2 * cross + jnp.square(centroids).sum(axis=1)


@partial(jax.jit, static_argnames="clusters")
def _spread(key: jax.Array, x: jax.Array, clusters: int) -> jax.Array:
    """k-means++: each centroid is a frame, drawn with the square of its distance to the nearest one before."""
    first, rest = jax.random.split(key)
    start = x[jax.random.randint(first, (), 0, len(x))]
    centroids = jnp.zeros((clusters, x.shape[1]), x.dtype).at[0].set(start)

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        centroids, nearest = carry
        chosen = x[jax.random.categorical(jax.random.fold_in(rest, i), jnp.log(nearest))]
        return centroids.at[i].set(chosen), jnp.minimum(nearest, jnp.square(x - chosen).sum(axis=1))

    return jax.lax.fori_loop(1, clusters, add, (centroids, jnp.square(x - start).sum(axis=1)))[0]


@partial(jax.jit, static_argnames="iterations")
def _lloyd(x: jax.Array, centroids: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Centroids after so many rounds of assigning and averaging, and the mean squared distance before each round."""

    def turn(centroids: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        distances = _squared_distances(x, centroids)
        own = jax.nn.one_hot(distances.argmin(axis=1), len(centroids), dtype=x.dtype)
        count = own.sum(axis=0)[:, None]
        sums = jnp.matmul(own.T, x, precision=jax.lax.Precision.HIGHEST)
        # A cluster without frames stays where it is.
        return jnp.where(count > 0, sums / jnp.maximum(count, 1), centroids), distances.min(axis=1).mean()

    return jax.lax.scan(turn, centroids, length=iterations)


@jax.jit
def _nearest(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    distances = _squared_distances(x, centroids)
    return distances.argmin(axis=1), distances.min(axis=1).mean()


@dataclass(frozen=True)
class KMeans:
    """§II-A, the model that discovers units: a frame is its nearest centroid.

    Attributes:
        centroids: `(clusters, channels)`.
    """

    centroids: Float[np.ndarray, "clusters channels"]

    @classmethod
    def fit(
        cls,
        key: jax.Array,
        features: Float[Array, "frames channels"],
        clusters: int,
        *,
        iterations: int = 100,
        starts: int = 1,
    ) -> KMeans:
        """Find clusters of frames.

        Args:
            key: of `jax.random`.
            features: frames of many recordings; what fits into memory.
            clusters: how many: 100 in the paper's first iteration, 500 in its second.
            iterations: rounds of assigning and averaging.
            starts: from so many draws of the first centroids (k-means++) the best end is kept; the paper's code has 20.

        Raises:
            UsageError: for fewer frames than clusters.
        """
        x = jnp.asarray(features)
        if len(x) < clusters:
            raise UsageError(f"{len(x)} frames cannot be divided into {clusters} clusters.")
        best: tuple[float, np.ndarray] | None = None
        for start in jax.random.split(key, starts):
            centroids, _ = _lloyd(x, _spread(start, x, clusters), iterations)
            spread = float(_nearest(x, centroids)[1])
            if best is None or spread < best[0]:
                best = (spread, np.asarray(centroids))
        assert best is not None
        return cls(best[1])

    def __call__(
        self, features: Float[Array, "frames channels"] | Float[np.ndarray, "frames channels"]
    ) -> Int[np.ndarray, " frames"]:
        """The cluster of every frame.

        Raises:
            UsageError: for frames of another width.
        """
        if features.shape[-1] != self.centroids.shape[1]:
            raise UsageError(
                f"The clusters are of frames of {self.centroids.shape[1]} channels; these have {features.shape[-1]}."
            )
        return np.asarray(_nearest(jnp.asarray(features), jnp.asarray(self.centroids, features.dtype))[0])

    def spread(self, features: Float[Array, "frames channels"]) -> float:
        """Mean squared distance of the frames from their centroids."""
        return float(_nearest(jnp.asarray(features), jnp.asarray(self.centroids, features.dtype))[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `centroids` to a NumPy archive (.npz)."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, centroids=self.centroids)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KMeans:
        """Read what `save` wrote, or centroids alone (.npy).

        Raises:
            SourceError: if there is no such file, or something else in it.
        """
        try:
            found = np.load(path, allow_pickle=False)
            centroids = found if isinstance(found, np.ndarray) else found["centroids"]
        except Exception:  # what a damaged file raises is of many kinds
            raise SourceError(f"{path} is no file of centroids (.npz with `centroids`, or .npy).") from None
        if centroids.ndim != 2:
            raise SourceError(f"{path} holds an array of shape {centroids.shape}, not (clusters, channels).")
        if centroids.dtype.kind not in "fiu" or not np.isfinite(centroids).all():
            raise SourceError(f"{path} holds centroids that are no finite numbers.")
        return cls(centroids)


def deduplicate(sequence: Int[np.ndarray, " frames"]) -> tuple[Int[np.ndarray, " units"], Int[np.ndarray, " units"]]:
    """Runs of the same unit as one, and how many frames each lasts."""
    sequence = np.asarray(sequence)
    if not len(sequence):
        return sequence, np.zeros(0, int)
    starts = np.flatnonzero(np.concatenate([[True], sequence[1:] != sequence[:-1]]))
    return sequence[starts], np.diff(np.append(starts, len(sequence)))


def units(
    model: Any, processor: Any, audio: Float[np.ndarray, " samples"], kmeans: KMeans, *, layer: int = 9
) -> Int[np.ndarray, " frames"]:
    """The unit of every frame of a recording.

    Args:
        model: of the wav2vec 2.0 family, with or without a head.
        processor: its processor.
        audio: waveform at the processor's rate.
        kmeans: clusters of that layer's frames.
        layer: which hidden state; 0 is the Transformer's input.
    """
    return kmeans(embed(model, processor, audio, layer=layer)["frames"])
