"""WavLM against `transformers` (eager): forwards of base and large. Published sizes, random weights."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within

SEED, RATE = 0, 16_000


@functools.lru_cache(maxsize=1)
def original(paper: str, config: str, cls: str, size: str) -> Any:
    """`transformers`' model of a published size, random weights, float32."""
    import transformers

    models = importlib.import_module(f"audiozoo.models.{paper}")
    ours = vars(getattr(getattr(models, config), size)())
    theirs = getattr(transformers, cls).config_class
    names = set(theirs().to_dict()) - {"id2label", "output_hidden_size"}
    fields = {k: v for k, v in ours.items() if k in names}
    return randomised(getattr(transformers, cls)(theirs(**fields, attn_implementation="eager")), SEED)


@functools.lru_cache(maxsize=1)
def model(paper: str, config: str, cls: str, size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    models = importlib.import_module(f"audiozoo.models.{paper}")
    conversion = importlib.import_module(f"weights_conversion.{paper}")
    sizes = getattr(getattr(models, config), size)()
    table = conversion.hugging_face_table(sizes, cls)
    return random_model(getattr(models, cls), sizes, table, SEED)


def waves(batch: int, seconds: int) -> np.ndarray:
    """Noise of variance 1, float32 `(batch, samples)`."""
    return np.random.default_rng(1).standard_normal((batch, seconds * RATE)).astype(np.float32)


Inputs = Callable[[int, int], np.ndarray]  # of so many recordings of so many seconds


def our_forward(paper: str, config: str, cls: str, size: str, batch: int, seconds: int, inputs: Inputs = waves) -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model(paper, config, cls, size)), jax.numpy.asarray(inputs(batch, seconds))
    return lambda: np.asarray(run(x).logits)


def their_forward(
    paper: str, config: str, cls: str, size: str, batch: int, seconds: int, inputs: Inputs = waves
) -> Run:
    import torch

    theirs, x = original(paper, config, cls, size), tensor(inputs(batch, seconds))

    def run() -> Any:
        with torch.inference_mode():
            return theirs(x).logits.float().numpy()

    return run


def forwards(
    paper: str, config: str, rows: tuple[tuple[str, str, int, int, int], ...], inputs: Inputs = waves
) -> tuple[Case, ...]:
    """Forward passes, one a row: class, size, batch, seconds, repeats."""
    return tuple(
        Case(
            f"forward, {batch} x {seconds} s, {size}",
            functools.partial(our_forward, paper, config, cls, size, batch, seconds, inputs),
            {"transformers": functools.partial(their_forward, paper, config, cls, size, batch, seconds, inputs)},
            target=1.5,
            agreement=within(1e-3),
            repeats=repeats,
        )
        for cls, size, batch, seconds, repeats in rows
    )


CASES = forwards(
    "wavlm",
    "WavLMConfig",
    (
        ("WavLMForCTC", "base", 1, 10, 8),
        ("WavLMForCTC", "base", 8, 5, 3),
        ("WavLMForCTC", "large", 1, 10, 4),
    ),
)
