"""HuBERT against `transformers` (eager), and its clusters against scikit-learn. Published sizes, random weights."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within
from benchmarks.wav2vec2 import waves


@functools.lru_cache(maxsize=1)
def original(size: str) -> Any:
    """`transformers`' model of a published size, random weights, float32."""
    import transformers

    from audiozoo.models.hubert import HubertConfig

    names = set(transformers.HubertConfig().to_dict()) - {"id2label", "output_hidden_size"}
    fields = {k: v for k, v in vars(getattr(HubertConfig, size)()).items() if k in names}
    return randomised(transformers.HubertForCTC(transformers.HubertConfig(**fields, attn_implementation="eager")))


@functools.lru_cache(maxsize=1)
def model(size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.hubert import HubertConfig, HubertForCTC
    from weights_conversion.hubert import hugging_face_table

    config = getattr(HubertConfig, size)()
    return random_model(HubertForCTC, config, hugging_face_table(config, "HubertForCTC"))


def our_forward(size: str, batch: int, seconds: int) -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model(size)), jax.numpy.asarray(waves(batch, seconds))
    return lambda: np.asarray(run(x).logits)


def their_forward(size: str, batch: int, seconds: int) -> Run:
    import torch

    theirs, x = original(size), tensor(waves(batch, seconds))

    def run() -> Any:
        with torch.inference_mode():
            return theirs(x).logits.float().numpy()

    return run


def frames() -> np.ndarray:
    """Twenty minutes of frames of the base model's width, in some structure."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((300, 768))
    return (centres[rng.integers(0, 300, 20_000)] + rng.standard_normal((20_000, 768))).astype(np.float32)


def our_clusters() -> Run:
    import jax

    from audiozoo.decoding.units import KMeans

    x = jax.numpy.asarray(frames())
    return lambda: KMeans.fit(jax.random.key(0), x, 100, iterations=10).centroids


def their_clusters() -> Run:
    from sklearn.cluster import KMeans

    x = frames()
    return lambda: KMeans(100, n_init=1, max_iter=10, tol=0.0, random_state=0).fit(x).cluster_centers_


CASES = (
    *(
        Case(
            f"forward, {batch} x {seconds} s, {size}",
            functools.partial(our_forward, size, batch, seconds),
            {"transformers": functools.partial(their_forward, size, batch, seconds)},
            target=1.5,
            agreement=within(1e-3),
            repeats=repeats,
        )
        for size, batch, seconds, repeats in (("base", 1, 10, 8), ("large", 1, 10, 4))
    ),
    Case("100 clusters of 20,000 frames, 10 rounds", our_clusters, {"scikit-learn": their_clusters}, repeats=3),
)
