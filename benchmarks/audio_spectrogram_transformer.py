"""AST against `transformers` (eager): the base model on 10 s of sound, a batch, one word, and the features.

Published sizes, random weights.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, threads, within

SEED, RATE = 0, 16_000


@functools.lru_cache(maxsize=1)
def original(size: str) -> Any:
    """`transformers`' model of a published size, random weights, float32."""
    import transformers

    from audiozoo.models.audio_spectrogram_transformer import ASTConfig

    ours = dataclasses.asdict(getattr(ASTConfig, size)())
    names = set(transformers.ASTConfig().to_dict()) - {"id2label"}
    fields = {name: value for name, value in ours.items() if name in names}
    config = transformers.ASTConfig(**fields, num_labels=len(ours["id2label"]), attn_implementation="eager")
    return randomised(transformers.ASTForAudioClassification(config), SEED)


@functools.lru_cache(maxsize=1)
def model(size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.audio_spectrogram_transformer import ASTConfig, ASTForAudioClassification
    from weights_conversion.audio_spectrogram_transformer import hugging_face_table

    config = getattr(ASTConfig, size)()
    table = hugging_face_table(config, "ASTForAudioClassification", in_memory=True)
    return random_model(ASTForAudioClassification, config, table, SEED)


def features(size: str, batch: int) -> np.ndarray:
    """A batch of spectrograms' worth of noise, float32 `(batch, frames, mels)`."""
    from audiozoo.models.audio_spectrogram_transformer import ASTConfig

    config = getattr(ASTConfig, size)()
    shape = (batch, config.max_length, config.num_mel_bins)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def our_forward(size: str, batch: int) -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model(size)), jax.numpy.asarray(features(size, batch))
    return lambda: np.asarray(run(x).logits)


def their_forward(size: str, batch: int) -> Run:
    import torch

    theirs, x = original(size), tensor(features(size, batch))

    def run() -> Any:
        with torch.inference_mode():
            return theirs(x).logits.float().numpy()

    return run


def noise() -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.1, 10 * RATE).astype(np.float32)


def our_features() -> Run:
    from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor

    extract, x = ASTFeatureExtractor(), noise()
    return lambda: extract(x, sampling_rate=RATE)["input_values"]


def their_features() -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads())
    extract, x = transformers.ASTFeatureExtractor(), noise()
    return lambda: extract(x, sampling_rate=RATE, return_tensors="np")["input_values"]


CASES = (
    *(
        Case(
            name,
            functools.partial(our_forward, size, batch),
            {"transformers": functools.partial(their_forward, size, batch)},
            target=1.5,
            agreement=within(1e-4),
            repeats=repeats,
        )
        for name, size, batch, repeats in (
            ("forward, 10 s, base (1214 tokens)", "audioset_10_10", 1, 10),
            ("forward, 4 x 10 s, base", "audioset_10_10", 4, 4),
            ("forward, 1 s, base (146 tokens)", "speech_commands_v2", 1, 20),
        )
    ),
    Case("features of 10 s", our_features, {"transformers": their_features}, agreement=within(1e-4)),
)
