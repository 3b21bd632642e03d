"""w2v-BERT: a tiny recogniser with a length adaptor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.models import wav2vec2_bert
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.wav2vec2_bert import config_from_hugging_face, hugging_face_table

CONFIG = {
    "vocab_size": 11,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "feature_projection_input_dim": 12,
    "conv_depthwise_kernel_size": 5,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "add_adapter": True,
    "output_hidden_size": 18,
    "use_intermediate_ffn_before_adapter": True,
}
OURS = config_from_hugging_face(CONFIG)


def _inputs() -> dict[str, np.ndarray]:
    return {"input_features": uniform(0, "input_features", (2, 20, 12), -1.7, 1.7)}


def _build(dtype: Any) -> nnx.Module:
    return wav2vec2_bert.Wav2Vec2BertForCTC(OURS, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def _run(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, features: nnx.merge(graphdef, state)(features).logits)(state, x["input_features"])
    return {"logits": logits}


def _reference() -> Any:
    import transformers

    theirs = transformers.Wav2Vec2BertConfig(**CONFIG, attn_implementation="eager")
    return transformers.Wav2Vec2BertForCTC(theirs)


def _run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {"logits": model(torch.from_numpy(x["input_features"])).logits}


TABLE = hugging_face_table(OURS, "Wav2Vec2BertForCTC")
CASES = (Case("wav2vec2_bert", CONFIG, _build, TABLE, _inputs, _run, _reference, _run_reference),)
