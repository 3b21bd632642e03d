"""XLS-R against `transformers` (eager): the encoder of 0.3 billion parameters, and translation. Random weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within
from benchmarks.wav2vec2 import waves

TOKENS = 24


@functools.lru_cache(maxsize=1)
def config() -> Any:
    """The encoder of XLS-R (0.3B) and mBART's decoder, with a vocabulary cut to a tenth to save memory."""
    from audiozoo.models.xls_r import SpeechEncoderDecoderConfig

    published = SpeechEncoderDecoderConfig.xls_r_300m()
    return dataclasses.replace(published, decoder=dataclasses.replace(published.decoder, vocab_size=25_005))


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model, random weights, float32."""
    import transformers

    from weights_conversion.xls_r import MODEL_TYPE

    fields = dataclasses.asdict(config().encoder)
    fields.pop("id2label")
    encoder = transformers.Wav2Vec2Config(**fields, attn_implementation="eager")
    decoder = transformers.MBartConfig(**dataclasses.asdict(config().decoder), attn_implementation="eager")
    both = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    both.decoder_start_token_id, both.pad_token_id, both.eos_token_id = 2, 1, 2
    assert both.model_type == MODEL_TYPE
    return randomised(transformers.SpeechEncoderDecoderModel(both), 0)


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.xls_r import SpeechEncoderDecoderModel
    from weights_conversion.xls_r import hugging_face_table

    table = hugging_face_table(config(), "SpeechEncoderDecoderModel")
    return random_model(SpeechEncoderDecoderModel, config(), table)


def our_translation() -> Run:
    x = waves(1, 10)
    return lambda: model().generate(x, max_new_tokens=TOKENS, min_new_tokens=TOKENS)


def their_translation() -> Run:
    import torch

    theirs, x = original(), tensor(waves(1, 10))

    def run() -> Any:
        with torch.inference_mode():
            return theirs.generate(x, max_new_tokens=TOKENS, min_new_tokens=TOKENS).numpy()

    return run


def our_forward() -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model()), jax.numpy.asarray(waves(1, 10))
    tokens = jax.numpy.asarray([[2, 7, 5, 9]])
    return lambda: np.asarray(run(x, None, tokens).logits)


def their_forward() -> Run:
    import torch

    theirs, x = original(), tensor(waves(1, 10))

    def run() -> Any:
        with torch.inference_mode():
            return theirs(x, decoder_input_ids=torch.tensor([[2, 7, 5, 9]])).logits.float().numpy()

    return run


CASES = (
    Case(
        "forward, 10 s and 4 tokens, 0.3B",
        our_forward,
        {"transformers": their_forward},
        target=1.5,
        agreement=within(1e-3),
        repeats=4,
    ),
    Case(
        f"translate 10 s into {TOKENS} tokens, 0.3B",
        our_translation,
        {"transformers": their_translation},
        target=1.5,
        repeats=3,
    ),
)
