"""SpeechT5 against `transformers` (eager): a forward, and a sentence said, at the released sizes. Random weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within

CHARACTERS = 60
FRAMES = 240  # 3.8 s


@functools.lru_cache(maxsize=1)
def config() -> Any:
    """The released voice, its pre-net's dropout off: the two draw theirs differently, and what they say is compared."""
    from audiozoo.models.speecht5 import SpeechT5Config

    return dataclasses.replace(SpeechT5Config.tts(), speech_decoder_prenet_dropout=0.0)


@functools.lru_cache(maxsize=1)
def originals() -> tuple[Any, Any]:
    """`transformers`' voice and vocoder, random weights, float32."""
    import transformers

    fields = dataclasses.asdict(config())
    fields.pop("id2label")
    theirs = transformers.SpeechT5Config(**fields, attn_implementation="eager")
    model = transformers.SpeechT5ForTextToSpeech(theirs)
    # The original keeps with the probability that it should drop with; this keeps all.
    model.speecht5.decoder.prenet._consistent_dropout = lambda x, p: x
    vocoder = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig())
    return randomised(model, 0), randomised(vocoder, 1)


@functools.lru_cache(maxsize=1)
def models() -> tuple[Any, Any]:
    """Ours, with the same weights, made without the originals."""
    from audiozoo.models.hifigan import HifiGanConfig, SpeechT5HifiGan
    from audiozoo.models.speecht5 import SpeechT5ForTextToSpeech
    from weights_conversion import hifigan, speecht5

    table = speecht5.hugging_face_table(config(), "SpeechT5ForTextToSpeech")
    sizes = HifiGanConfig.speecht5()
    return (
        random_model(SpeechT5ForTextToSpeech, config(), table),
        random_model(SpeechT5HifiGan, sizes, hifigan.hugging_face_table(sizes), 1),
    )


def said() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Characters, an x-vector, and a spectrogram so far."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 79, (1, CHARACTERS))
    return ids, rng.standard_normal((1, 512)).astype(np.float32), rng.standard_normal((1, 120, 80)).astype(np.float32)


def our_forward() -> Run:
    import jax

    import audiozoo

    run, (ids, who, mel) = audiozoo.jit(models()[0]), said()
    ids, who, mel = map(jax.numpy.asarray, (ids, who, mel))
    return lambda: np.asarray(run(ids, None, mel, speaker_embeddings=who).spectrogram)


def their_forward() -> Run:
    import torch

    theirs, (ids, who, mel) = originals()[0], map(tensor, said())

    def run() -> Any:
        with torch.inference_mode():
            return theirs(ids, decoder_input_values=mel, speaker_embeddings=who).spectrogram.float().numpy()

    return run


# A stop that is never reached, and limits that are: both say as much.
_RATIO = FRAMES / CHARACTERS
LIMITS = {"threshold": 3.0, "minlenratio": _RATIO, "maxlenratio": _RATIO}


def our_speech() -> Run:
    (model, vocoder), (ids, who, _) = models(), said()
    return lambda: model.generate(ids, None, who, vocoder=vocoder, **LIMITS)


def their_speech() -> Run:
    import torch

    (model, vocoder), (ids, who, _) = originals(), said()
    ids, who = tensor(ids), tensor(who)

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(ids, speaker_embeddings=who, vocoder=vocoder, **LIMITS).numpy()

    return run


CASES = (
    Case(
        f"forward, {CHARACTERS} characters and 120 steps",
        our_forward,
        {"transformers": their_forward},
        target=1.5,
        agreement=within(1e-3),
        repeats=4,
    ),
    Case(
        f"say {FRAMES} frames, vocoder included",
        our_speech,
        {"transformers": their_speech},
        target=1.5,
        agreement=within(1e-3),
        repeats=3,
    ),
)
