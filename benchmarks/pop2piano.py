"""Pop2Piano against `transformers` (eager): forward and generation of segments, features of a song.

Published size, random weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, same_tokens, tensor, within

SEED, FRAMES, TOKENS = 0, 90, 96
CLASS = "Pop2PianoForConditionalGeneration"


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model, random weights, float32."""
    import torch
    import transformers

    config = transformers.Pop2PianoConfig(
        dense_act_fn="gelu_new", tie_word_embeddings=False, decoder_start_token_id=0, attn_implementation="eager"
    )
    theirs = randomised(transformers.Pop2PianoForConditionalGeneration(config), SEED)
    with torch.no_grad():  # queries as small as T5's start: else rounding grows eightfold a layer
        for name, weight in theirs.named_parameters():
            if name.endswith("Attention.q.weight"):
                weight *= config.d_kv**-0.5
    theirs.generation_config.composer_to_feature_token = {f"composer{i}": 2051 + i for i in range(1, 22)}
    return theirs


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.loading import variables, with_variables
    from audiozoo.models.pop2piano import Pop2PianoConfig, Pop2PianoForConditionalGeneration
    from weights_conversion.pop2piano import TABLE

    config = Pop2PianoConfig.released()
    ours = random_model(Pop2PianoForConditionalGeneration, config, TABLE, SEED)
    small = {n: v[...] * config.d_kv**-0.5 for n, v in variables(ours).items() if n.endswith("attention.q.kernel")}
    return with_variables(ours, {n: v[...] for n, v in variables(ours).items()} | small)


def segments(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, FRAMES, 512)).astype(np.float32)


def labels(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(2, 234, (count, TOKENS))


def our_forward(count: int) -> Run:
    import jax

    import audiozoo

    run, x, ids = audiozoo.jit(model()), jax.numpy.asarray(segments(count)), jax.numpy.asarray(labels(count))
    return lambda: np.asarray(run(x, decoder_input_ids=ids).logits)


def their_forward(count: int) -> Run:
    import torch

    theirs, x, ids = original(), tensor(segments(count)), tensor(labels(count))

    def run() -> Any:
        with torch.inference_mode():
            return theirs(input_features=x, decoder_input_ids=ids, use_cache=False).logits.float().numpy()

    return run


OPTIONS = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}  # random weights seldom end a segment by themselves


def our_generate(count: int) -> Run:
    import jax

    ours, x = model(), jax.numpy.asarray(segments(count))
    return lambda: ours.generate(x, **OPTIONS)


def their_generate(count: int) -> Run:

    theirs, x = original(), tensor(segments(count))
    return lambda: theirs.generate(x, **OPTIONS).numpy()


CASES = (
    Case(
        f"forward, 8 segments, {TOKENS} tokens",
        functools.partial(our_forward, 8),
        {"transformers": functools.partial(their_forward, 8)},
        target=1.5,
        agreement=within(1e-4),
        repeats=6,
    ),
    *(
        Case(
            f"generate, {count} segment{'s' if count > 1 else ''}, {TOKENS} tokens",
            functools.partial(our_generate, count),
            {"transformers": functools.partial(their_generate, count)},
            target=2.0,
            agreement=same_tokens,
            repeats=3,
        )
        for count in (1, 8)
    ),
)
