"""fairseq S2T against `transformers` (eager): forward, search, and filterbanks. Published sizes, random weights.

The original takes minutes for the filterbanks of an hour, so that row has ours alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within
from benchmarks.wav2vec2 import waves

TOKENS = 40


def frames(batch: int, seconds: float) -> np.ndarray:
    """Noise of the size of normalised filterbanks."""
    return np.random.default_rng(0).standard_normal((batch, int(100 * seconds), 80)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def config(size: str) -> Any:
    from audiozoo.models.speech_to_text import Speech2TextConfig

    return getattr(Speech2TextConfig, size)()


@functools.lru_cache(maxsize=1)
def original(size: str) -> Any:
    """`transformers`' model, random weights, float32."""
    import transformers

    theirs = transformers.Speech2TextConfig(**dataclasses.asdict(config(size)), attn_implementation="eager")
    return randomised(transformers.Speech2TextForConditionalGeneration(theirs), 0)


@functools.lru_cache(maxsize=1)
def model(size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.speech_to_text import Speech2TextForConditionalGeneration
    from weights_conversion.speech_to_text import CLASSES, hugging_face_table

    table = hugging_face_table(config(size), CLASSES[0])
    return random_model(Speech2TextForConditionalGeneration, config(size), table)


def our_forward(size: str, batch: int, seconds: float) -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model(size)), jax.numpy.asarray(frames(batch, seconds))
    tokens = jax.numpy.asarray(np.tile([[2, 7, 5, 9]], (batch, 1)))
    return lambda: np.asarray(run(x, None, tokens).logits)


def their_forward(size: str, batch: int, seconds: float) -> Run:
    import torch

    theirs, x = original(size), tensor(frames(batch, seconds))
    tokens = torch.tensor([[2, 7, 5, 9]] * batch)

    def run() -> Any:
        with torch.inference_mode():
            return theirs(x, decoder_input_ids=tokens).logits.float().numpy()

    return run


def options(beams: int) -> dict[str, Any]:
    return {"num_beams": beams, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}


def our_search(size: str, beams: int) -> Run:
    x = frames(1, 10)
    return lambda: model(size).generate(x, max_length=None, early_stopping=False, **options(beams))


def their_search(size: str, beams: int) -> Run:
    import torch

    theirs, x = original(size), tensor(frames(1, 10))

    def run() -> Any:
        with torch.inference_mode():
            return theirs.generate(x, forced_eos_token_id=2, **options(beams)).numpy()

    return run


def our_filterbanks(seconds: int) -> Run:
    from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor

    extract, x = Speech2TextFeatureExtractor(), 0.1 * waves(1, seconds)[0]
    return lambda: extract(x, 16_000)["input_features"]


def their_filterbanks() -> Run:
    import transformers

    extract, x = transformers.Speech2TextFeatureExtractor(), 0.1 * waves(1, 60)[0]
    return lambda: extract(x, sampling_rate=16_000, return_tensors="np")["input_features"]


def alike(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Normalised filterbanks: the original sums six thousand frames in float32."""
    apart = float(np.abs(ours - theirs).max())
    assert apart < 1e-2, apart
    return f"max abs {apart:.1e}"


CASES = (
    *(
        Case(
            f"forward, {size}, {batch} × {seconds} s and 4 tokens",
            functools.partial(our_forward, size, batch, seconds),
            {"transformers": functools.partial(their_forward, size, batch, seconds)},
            target=1.5,
            agreement=within(1e-3),
        )
        for size, batch, seconds in (("small", 1, 10), ("small", 8, 10), ("medium", 1, 20))
    ),
    *(
        Case(
            f"generate {TOKENS} tokens from 10 s, {size}, {beams} beam{'s' if beams > 1 else ''}",
            functools.partial(our_search, size, beams),
            {"transformers": functools.partial(their_search, size, beams)},
            target=2.0,
            repeats=5,
        )
        for size, beams in (("small", 1), ("small", 5), ("medium", 5))
    ),
    Case(
        "filterbanks of 60 s",
        functools.partial(our_filterbanks, 60),
        {"transformers": their_filterbanks},
        target=1.5,
        agreement=alike,
        repeats=5,
    ),
    Case("filterbanks of an hour", functools.partial(our_filterbanks, 3600), {}, repeats=3),
)
