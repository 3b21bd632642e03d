"""HiFi-GAN: a tiny generator of SpeechT5's kind, from a spectrogram and from one padded beyond its end."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.hifigan import SpeechT5HifiGan
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.hifigan import config_from_hugging_face, hugging_face_table

CONFIG = {
    "model_in_dim": 6,
    "upsample_initial_channel": 16,
    "upsample_rates": [5, 2],
    "upsample_kernel_sizes": [11, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
}


def build(dtype: Any) -> nnx.Module:
    return SpeechT5HifiGan(
        config_from_hugging_face(CONFIG), dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0)
    )


def inputs() -> dict[str, np.ndarray]:
    return {"spectrogram": uniform(0, "spectrogram", (2, 9, 6), -1.5, 1.5), "lengths": np.array([9, 5], np.int32)}


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    vocoder = audiozoo.jit(model)
    return {"waveform": vocoder(x["spectrogram"]), "cut": vocoder(x["spectrogram"], lengths=x["lengths"])[1]}


def reference() -> Any:
    import transformers

    return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**CONFIG))


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    whole = torch.tensor(x["spectrogram"])
    cut = model(whole[1, : x["lengths"][1]])
    return {"waveform": model(whole), "cut": torch.nn.functional.pad(cut, (0, 90 - len(cut)))}


CASES = (
    Case(
        name="hifigan",
        config=CONFIG,
        build=build,
        table=hugging_face_table(config_from_hugging_face(CONFIG)),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
