"""UniSpeech-SAT: a tiny model's speaker embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.models import unispeech_sat
from tests.golden.cases.wav2vec2 import CONFIG as WAV2VEC2
from tests.golden.cases.wav2vec2 import SAMPLES
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.unispeech_sat import config_from_hugging_face, hugging_face_table

CONFIG = WAV2VEC2 | {
    "tdnn_dim": [10, 9, 8],
    "tdnn_kernel": [3, 3, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 6,
    "num_labels": 3,
}
OURS = config_from_hugging_face(CONFIG)


def _inputs() -> dict[str, np.ndarray]:
    return {"input_values": uniform(0, "input_values", (2, SAMPLES), -1.7, 1.7)}


def _build(dtype: Any) -> nnx.Module:
    return unispeech_sat.UniSpeechSatForXVector(OURS, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def _run(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    graphdef, state = nnx.split(model)
    output = jax.jit(lambda state, values: nnx.merge(graphdef, state)(values))(state, x["input_values"])
    return {"embeddings": output.embeddings, "logits": output.logits}


def _reference() -> Any:
    import transformers

    theirs = transformers.UniSpeechSatConfig(**CONFIG, attn_implementation="eager")
    return transformers.UniSpeechSatForXVector(theirs)


def _run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    output = model(torch.from_numpy(x["input_values"]))
    return {"embeddings": output.embeddings, "logits": output.logits}


TABLE = hugging_face_table(OURS, "UniSpeechSatForXVector")
CASES = (Case("unispeech_sat", CONFIG, _build, TABLE, _inputs, _run, _reference, _run_reference),)
