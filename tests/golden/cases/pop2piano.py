"""Pop2Piano: a T5 with gates, small, in float64; and tokens as text would be."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.layers import abstract
from audiozoo.models.pop2piano import Pop2PianoForConditionalGeneration
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.pop2piano import CLASS, config_from_hugging_face, hugging_face_table

CONFIG: dict[str, Any] = {
    "vocab_size": 240,
    "composer_vocab_size": 3,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "dense_act_fn": "gelu_new",
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def _config() -> Any:
    return config_from_hugging_face(CONFIG)


def build(dtype: Any) -> nnx.Module:
    kind, wanted = Pop2PianoForConditionalGeneration, jnp.dtype(dtype)
    model = abstract(lambda rngs: kind(_config(), dtype=wanted, param_dtype=dtype, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def inputs() -> dict[str, np.ndarray]:
    mask = np.ones((2, 11), np.int32)
    mask[1, 7:] = 0
    labels = (np.arange(14, dtype=np.int32).reshape(2, 7) * 37 % 230) + 3
    labels[0, 5:] = -100
    return {
        "input_features": uniform(0, "input_features", (2, 10, 12), -1.7, 1.7),
        "attention_mask": mask,
        "rows": np.array([2, 0], np.int32),
        "labels": labels,
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    features, mask = model.condition(x["input_features"], x["rows"], x["attention_mask"][:, 1:])
    output = audiozoo.jit(model)(features, mask, labels=x["labels"])
    return {
        "encoder": output.encoder_last_hidden_state,
        "loss": output.loss.astype(output.logits.dtype),
    }


def reference() -> Any:
    import transformers

    return transformers.Pop2PianoForConditionalGeneration(
        transformers.Pop2PianoConfig(**CONFIG, attn_implementation="eager")
    )


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch
    from transformers.models.pop2piano.modeling_pop2piano import Pop2PianoLayerNorm

    # The stock norm takes its mean square in float32; this one keeps float64.
    stock = Pop2PianoLayerNorm.forward
    Pop2PianoLayerNorm.forward = lambda self, y: (
        self.weight * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    )
    try:
        rows = torch.from_numpy(x["rows"].astype(np.int64))
        features = model.mel_conditioner(torch.from_numpy(x["input_features"]), rows, 0)
        mask, labels = (torch.from_numpy(x[name].astype(np.int64)) for name in ("attention_mask", "labels"))
        output = model(input_features=features, attention_mask=mask, labels=labels)
    finally:
        Pop2PianoLayerNorm.forward = stock
    return {"encoder": output.encoder_last_hidden_state, "loss": output.loss}


CASES = (
    Case(
        name="pop2piano",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config(), CLASS),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
