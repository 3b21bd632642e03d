"""HiFi-GAN against `transformers` (eager): SpeechT5's vocoder at its published size, random weights, 3.2 s."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, threads

SEED, FRAMES = 0, 200


def spectrogram() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, FRAMES, 80)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' vocoder with its own initialisation, float32."""
    import torch
    import transformers

    torch.set_num_threads(threads())
    torch.manual_seed(SEED)
    return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig()).eval()


def ours() -> Run:
    import torch
    from flax import nnx

    import audiozoo
    from audiozoo.models.hifigan import SpeechT5HifiGan
    from tests.parity.harness import ported
    from weights_conversion.hifigan import config_from_hugging_face, hugging_face_table

    theirs, x = original(), spectrogram()
    config = config_from_hugging_face(theirs.config.to_dict())
    with torch.no_grad():
        model = ported(theirs, lambda: SpeechT5HifiGan(config, rngs=nnx.Rngs(0)), hugging_face_table(config))
    vocoder = audiozoo.jit(model)
    return lambda: np.asarray(vocoder(x))


def theirs() -> Run:
    import torch

    model, x = original(), torch.from_numpy(spectrogram())

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(x).numpy()

    return run


def close(ours: Any, theirs: Any) -> str:
    """The largest difference; within 1e-4 of the waveform's size."""
    apart, size = float(np.max(np.abs(ours - theirs))), float(np.max(np.abs(theirs)))
    if ours.shape != theirs.shape or apart > 1e-4 * size:
        raise AssertionError(f"the waveforms {ours.shape} and {theirs.shape} differ by {apart:.3g} of {size:.3g}")
    return f"max diff {apart:.1e} of {size:.2g}"


CASES = (Case("vocoder, 3.2 s at 16 kHz", ours, {"transformers": theirs}, target=1.5, agreement=close),)
