"""CLAP against `transformers` (eager): the sound tower on ten seconds, fused and in a batch, the text tower, features.

Published sizes, random weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, threads, within

SEED, RATE = 0, 48_000
AUDIO, TEXT = "ClapAudioModelWithProjection", "ClapTextModelWithProjection"
FUSED = {"enable_fusion": True, "fusion_type": "aff_2d"}


@functools.lru_cache(maxsize=2)
def original(name: str, fused: bool) -> Any:
    """One tower of `transformers`, random weights, float32."""
    import transformers

    config = (
        transformers.ClapAudioConfig(**(FUSED if fused else {})) if name == AUDIO else transformers.ClapTextConfig()
    )
    config._attn_implementation = "eager"
    return randomised(getattr(transformers, name)(config), SEED)


@functools.lru_cache(maxsize=2)
def model(name: str, fused: bool) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models import clap
    from weights_conversion.clap import hugging_face_table

    config = clap.ClapConfig.htsat_fused() if fused else clap.ClapConfig.htsat_unfused()
    table = hugging_face_table(config, name)
    return random_model(getattr(clap, name), config, table, SEED)


def arguments(name: str, fused: bool, batch: int) -> dict[str, np.ndarray]:
    """Spectrograms' worth of noise, or captions of 20 tokens."""
    rng = np.random.default_rng(1)
    if name == TEXT:
        return {"input_ids": rng.integers(3, 50_000, (batch, 20)), "attention_mask": np.ones((batch, 20), np.int64)}
    features = rng.standard_normal((batch, 4 if fused else 1, 1001, 64)).astype(np.float32)
    return {"input_features": features, "is_longer": np.full((batch, 1), fused)}


def _embeds(output: Any) -> Any:
    return output["audio_embeds"] if "audio_embeds" in output.keys() else output["text_embeds"]  # noqa: SIM118


def our_forward(name: str, fused: bool, batch: int) -> Run:
    import jax

    import audiozoo

    run = audiozoo.jit(model(name, fused))
    given = {key: jax.numpy.asarray(value) for key, value in arguments(name, fused, batch).items()}
    return lambda: np.asarray(_embeds(run(**given)))


def their_forward(name: str, fused: bool, batch: int) -> Run:
    import torch

    theirs = original(name, fused)
    given = {key: tensor(value) for key, value in arguments(name, fused, batch).items()}

    def run() -> Any:
        with torch.inference_mode():
            return _embeds(theirs(**given)).float().numpy()

    return run


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def our_features() -> Run:
    from audiozoo.processors.clap import ClapFeatureExtractor

    extract, x = ClapFeatureExtractor(), noise(10)
    return lambda: extract(x, sampling_rate=RATE)["input_features"]


def their_features() -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads())
    extract, x = transformers.ClapFeatureExtractor(), noise(10)
    return lambda: extract(x, sampling_rate=RATE, return_tensors="np")["input_features"]


CASES = (
    *(
        Case(
            label,
            functools.partial(our_forward, name, fused, batch),
            {"transformers": functools.partial(their_forward, name, fused, batch)},
            target=1.5,
            agreement=within(1e-4),
            repeats=repeats,
        )
        for label, name, fused, batch, repeats in (
            ("sound, 10 s, HTSAT-tiny", AUDIO, False, 1, 10),
            ("sound, 30 s fused, HTSAT-tiny", AUDIO, True, 1, 10),
            ("sound, 4 x 10 s, HTSAT-tiny", AUDIO, False, 4, 4),
            ("text, 8 x 20 tokens, RoBERTa base", TEXT, False, 8, 6),
        )
    ),
    Case("features of 10 s", our_features, {"transformers": their_features}, agreement=within(1e-4)),
)
