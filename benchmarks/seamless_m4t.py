"""SeamlessM4T against `transformers`: speech and text to logits, text, and speech.

The published widths, vocoder and heads, random weights; two layers of each of the stacks, and 20,000 of the tokens, so
that both models fit side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, same_tokens, tensor, within

SEED, TOKENS, NAME = 0, 48, "SeamlessM4TModel"
Model = Callable[[], Any]
SIZES: dict[str, Any] = {
    "vocab_size": 20_000,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "speech_encoder_layers": 2,
    "t2u_encoder_layers": 2,
    "t2u_decoder_layers": 2,
}
TABLES = {
    "text_decoder_lang_to_code_id": {"spa": 19_000},
    "t2u_lang_code_to_id": {"spa": 10_050},
    "vocoder_lang_code_to_id": {"spa": 3},
}
# Random weights: no text ends before its time, and no symbol of control is spoken.
OPTIONS = {"tgt_lang": "spa", "text_max_new_tokens": TOKENS, "text_min_new_tokens": TOKENS}
SPOKEN = OPTIONS | {"speech_max_new_tokens": 2 * TOKENS, "speech_suppress_tokens": (0, 1, 2, 3, *range(10_004, 10_082))}


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model, random weights, float32."""
    import transformers

    theirs = randomised(transformers.SeamlessM4TModel(transformers.SeamlessM4TConfig(**SIZES)), SEED)
    for name, table in TABLES.items():
        setattr(theirs.generation_config, name, table)
    return theirs


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.seamless_m4t import SeamlessM4TModel
    from weights_conversion import seamless_m4t as conversion

    config = conversion.config_from_hugging_face(SIZES)
    table = conversion.hugging_face_table(config, NAME)
    ours = random_model(SeamlessM4TModel, config, table, SEED)
    ours.generation_config = conversion.generation_from_hugging_face(TABLES, {}, "")
    return ours


def speech(seconds: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 50 * seconds, 160)).astype(np.float32)


def text(count: int) -> np.ndarray:
    ids = np.random.default_rng(2).integers(4, 19_000, (count, 24))
    ids[:, -1] = 3
    return ids


def our_forward(model: Model, seconds: int) -> Run:
    import jax

    import audiozoo

    run, x, ids = audiozoo.jit(model()), jax.numpy.asarray(speech(seconds)), jax.numpy.asarray(text(1))
    return lambda: np.asarray(run(input_features=x, decoder_input_ids=ids).logits)


def their_forward(original: Model, seconds: int) -> Run:
    import torch

    theirs, x, ids = original(), tensor(speech(seconds)), tensor(text(1))

    def run() -> Any:
        with torch.inference_mode():
            return theirs(input_features=x, decoder_input_ids=ids, use_cache=False).logits.float().numpy()

    return run


def our_text(model: Model, count: int) -> Run:
    import jax

    ours, x = model(), jax.numpy.asarray(text(count))
    return lambda: ours.generate(input_ids=x, generate_speech=False, **OPTIONS).sequences


def their_text(original: Model, count: int) -> Run:

    theirs, x = original(), tensor(text(count))
    return lambda: theirs.generate(input_ids=x, generate_speech=False, **OPTIONS).sequences.numpy()


def our_speech(model: Model, options: dict[str, Any], seconds: int) -> Run:
    import jax

    ours, x = model(), jax.numpy.asarray(speech(seconds))
    return lambda: ours.generate(input_features=x, return_intermediate_token_ids=True, **options).unit_sequences


def their_speech(original: Model, options: dict[str, Any], seconds: int) -> Run:

    theirs, x = original(), tensor(speech(seconds))

    def run() -> Any:
        made = theirs.generate(input_features=x, return_intermediate_token_ids=True, **options)
        return made.unit_sequences.numpy()

    return run


def cases(model: Model, original: Model, spoken: dict[str, Any]) -> tuple[Case, ...]:
    """The rows of one version of the paper.

    Args:
        model: makes ours.
        original: makes `transformers`'.
        spoken: options of `generate` for speech.
    """
    return (
        Case(
            "forward, 10 s of speech",
            functools.partial(our_forward, model, 10),
            {"transformers": functools.partial(their_forward, original, 10)},
            target=1.5,
            agreement=within(1e-4),
            repeats=6,
        ),
        *(
            Case(
                f"text to {TOKENS} tokens, {count} text{'s' if count > 1 else ''}",
                functools.partial(our_text, model, count),
                {"transformers": functools.partial(their_text, original, count)},
                target=2.0,
                agreement=same_tokens,
                repeats=3,
            )
            for count in (1, 4)
        ),
        Case(
            f"speech to speech, 10 s to {TOKENS} tokens",
            functools.partial(our_speech, model, spoken, 10),
            {"transformers": functools.partial(their_speech, original, spoken, 10)},
            target=2.0,
            agreement=same_tokens,
            repeats=3,
        ),
    )


CASES = cases(model, original, SPOKEN)
