"""wav2vec2-Conformer: a tiny recogniser, by relative positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.models import wav2vec2_conformer
from audiozoo.models.conformer import relative_sinusoids
from tests.golden.cases.wav2vec2 import CONFIG as WAV2VEC2
from tests.golden.cases.wav2vec2 import SAMPLES
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.wav2vec2_conformer import config_from_hugging_face, hugging_face_table

CONFIG = WAV2VEC2 | {"hidden_act": "swish", "conv_depthwise_kernel_size": 5}
OURS = config_from_hugging_face(CONFIG)


def _inputs() -> dict[str, np.ndarray]:
    return {"input_values": uniform(0, "input_values", (2, SAMPLES), -1.7, 1.7)}


def _build(dtype: Any) -> nnx.Module:
    cls = wav2vec2_conformer.Wav2Vec2ConformerForCTC
    return cls(OURS, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def _run(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, values: nnx.merge(graphdef, state)(values).logits)(state, x["input_values"])
    return {"logits": logits}


def _reference() -> Any:
    import torch
    import transformers

    theirs = transformers.Wav2Vec2ConformerConfig(**CONFIG, attn_implementation="eager")
    model = transformers.Wav2Vec2ConformerForCTC(theirs)
    positions = model.wav2vec2_conformer.encoder.embed_positions
    table = torch.from_numpy(relative_sinusoids(positions.max_len, OURS.hidden_size))
    # It comes out as it is where it is long enough; the stock one has angles in float32.
    positions.extend_pe = lambda x, pe=None: table[None].to(x.dtype)
    return model


def _run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {"logits": model(torch.from_numpy(x["input_values"])).logits}


TABLE = hugging_face_table(OURS, "Wav2Vec2ConformerForCTC")
CASES = (Case("wav2vec2_conformer", CONFIG, _build, TABLE, _inputs, _run, _reference, _run_reference),)
