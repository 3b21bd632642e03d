"""Bark-small against `transformers`: each stage, with random weights and as many tokens as two seconds have."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, dtype, random_model, tensor

SEED = 0
TOKENS = 100  # semantic tokens: two seconds
FORCED = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}  # random weights may end at any time


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model."""
    import torch
    import transformers

    from audiozoo.models.bark import BarkConfig
    from tests.random_weights import random_tensor

    ours = BarkConfig.bark_small()
    parts = {
        name: dataclasses.asdict(getattr(ours, name))
        for name in ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")
    }
    model = transformers.BarkModel(transformers.BarkConfig(**parts, codec_config={})).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # a tied one once, by its first name
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape), SEED)))
    return model.to(getattr(torch, dtype()))


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.bark import BarkConfig, BarkModel
    from weights_conversion.bark import hugging_face_table

    config = BarkConfig.bark_small()
    return random_model(BarkModel, config, hugging_face_table(config), SEED)


def _settings() -> dict[str, Any]:
    from transformers.models.bark import generation_configuration_bark as settings

    return {
        "semantic_generation_config": settings.BarkSemanticGenerationConfig(),
        "coarse_generation_config": settings.BarkCoarseGenerationConfig(),
        "fine_generation_config": settings.BarkFineGenerationConfig(),
    }


def text() -> np.ndarray:
    return np.random.default_rng(1).integers(1000, 100_000, (1, 256))


def semantic() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 10_000, (1, 60))


def coarse() -> np.ndarray:
    frames = int(TOKENS * 75 / 49.9)
    codes = np.random.default_rng(3).integers(0, 1024, (1, frames, 2))
    return (codes + 10_000 + 1024 * np.arange(2)).reshape(1, -1)


def our_semantic() -> Run:
    stage, ids = model().semantic, text()
    return lambda: stage.generate(ids, **FORCED)


def their_semantic() -> Run:
    stage, ids, config = original().semantic, tensor(text()), _settings()["semantic_generation_config"]
    return lambda: stage.generate(ids, config, **FORCED).numpy()


def our_coarse() -> Run:
    stage, tokens = model().coarse_acoustics, semantic()
    return lambda: stage.generate(tokens)


def their_coarse() -> Run:
    stage, tokens, settings = original().coarse_acoustics, tensor(semantic()), _settings()
    chosen = (settings["semantic_generation_config"], settings["coarse_generation_config"])
    return lambda: stage.generate(tokens.clone(), *chosen).numpy()


def our_fine() -> Run:
    stage, tokens = model().fine_acoustics, coarse()
    return lambda: stage.generate(tokens)


def their_fine() -> Run:
    stage, tokens, settings = original().fine_acoustics, tensor(coarse()), _settings()
    return lambda: stage.generate(tokens, **settings).numpy()


def equal(ours: Any, theirs: Any) -> str:
    """Nearly all tokens: a float32 tie between two of them changes what follows."""
    if np.shape(ours) != np.shape(theirs):
        raise AssertionError(f"{np.shape(ours)} tokens here, {np.shape(theirs)} there")
    same = float(np.mean(np.asarray(ours) == np.asarray(theirs)))
    if same < 0.9:
        raise AssertionError(f"only {same:.1%} of the tokens are the same")
    return f"{same:.1%} of the tokens the same"


CASES = tuple(
    Case(name, ours, {"transformers": theirs}, target=target, agreement=equal, repeats=2)
    for name, ours, theirs, target in (
        (f"semantic stage, {TOKENS} tokens", our_semantic, their_semantic, 2.0),
        ("coarse stage, 180 tokens", our_coarse, their_coarse, 2.0),
        ("fine stage, one window of six codebooks", our_fine, their_fine, 1.5),
    )
)
