"""wav2vec 2.0 against `transformers` (eager): forwards of base and large, and the alignment of an hour of speech.

Published sizes, random weights. No other CTC aligner of an hour is at hand, so that row has ours alone: 2 s on two
cores of a Xeon, once the emissions are there.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within

SEED, RATE = 0, 16_000


@functools.lru_cache(maxsize=1)
def original(size: str) -> Any:
    """`transformers`' model of a published size, random weights, float32."""
    import transformers

    from audiozoo.models.wav2vec2 import Wav2Vec2Config

    ours = vars(getattr(Wav2Vec2Config, size)())
    names = set(transformers.Wav2Vec2Config().to_dict())
    fields = {k: v for k, v in ours.items() if k in names and k != "id2label"}
    config = transformers.Wav2Vec2Config(**fields, attn_implementation="eager")
    return randomised(transformers.Wav2Vec2ForCTC(config), SEED)


@functools.lru_cache(maxsize=1)
def model(size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForCTC
    from weights_conversion.wav2vec2 import hugging_face_table

    config = getattr(Wav2Vec2Config, size)()
    table = hugging_face_table(config, "Wav2Vec2ForCTC")
    return random_model(Wav2Vec2ForCTC, config, table, SEED)


def waves(batch: int, seconds: int) -> np.ndarray:
    """Noise of variance 1, float32 `(batch, samples)`."""
    return np.random.default_rng(1).standard_normal((batch, seconds * RATE)).astype(np.float32)


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


def our_alignment(batch: int, frames: int, letters: int) -> Run:
    """Texts of a letter in four frames, as reading has."""
    from audiozoo.decoding.ctc import forced_alignment
    from tests.decoding.test_ctc import speech_like

    log_probs, targets = zip(*(speech_like(frames, letters, 32, seed) for seed in range(batch)), strict=True)
    emissions, texts = np.stack(log_probs), np.array(targets)
    return lambda: forced_alignment(emissions, texts).states


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
        for size, batch, seconds, repeats in (
            ("base", 1, 10, 10),
            ("base", 8, 5, 4),
            ("large_lv60", 1, 10, 6),
            ("large_lv60", 8, 5, 3),
        )
    ),
    Case(
        "align an hour (180,000 frames, 50,000 letters)",
        functools.partial(our_alignment, 1, 180_000, 50_000),
        {},
        repeats=3,
    ),
    Case("align 4 x 15 minutes in one batch", functools.partial(our_alignment, 4, 45_000, 12_500), {}, repeats=3),
)
