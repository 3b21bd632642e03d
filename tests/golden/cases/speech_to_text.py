"""fairseq S2T: a tiny model, padded, with its loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.layers import fairseq_sinusoids
from audiozoo.models.speech_to_text import Speech2TextForConditionalGeneration
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.speech_to_text import CLASSES, config_from_hugging_face, hugging_face_table

CONFIG: dict[str, Any] = {
    "vocab_size": 23,
    "input_feat_per_channel": 6,
    "conv_channels": 12,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 40,
}


def inputs() -> dict[str, np.ndarray]:
    mask = (np.arange(21) < np.array([[21], [14]])).astype(np.int32)
    features = uniform(0, "input_features", (2, 21, 6), -1.7, 1.7) * mask[..., None]
    labels = np.array([[7, 5, 9, 2], [8, 2, -100, -100]], np.int32)
    return {"input_features": features, "attention_mask": mask, "labels": labels}


def run(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    output = jax.jit(lambda m, x: m(x["input_features"], x["attention_mask"], labels=x["labels"]))(model, x)
    return {
        "encoder": output.encoder_last_hidden_state,
        "logits": output.logits,
        "loss": output.loss.astype(output.logits.dtype),
    }


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    for part in (model.model.encoder, model.model.decoder):  # its own are rounded to float32
        table = part.embed_positions.weights
        table.copy_(torch.from_numpy(fairseq_sinusoids(*table.shape)))
    tensors = {name: torch.from_numpy(array) for name, array in x.items()}
    output = model(**tensors | {"labels": tensors["labels"].long()})
    return {"encoder": output.encoder_last_hidden_state, "logits": output.logits, "loss": output.loss}


def _case() -> Case:
    ours = config_from_hugging_face(CONFIG)

    def build(dtype: Any) -> nnx.Module:
        kind = Speech2TextForConditionalGeneration
        return kind(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        config = transformers.Speech2TextConfig(**CONFIG, attn_implementation="eager")
        return transformers.Speech2TextForConditionalGeneration(config)

    table = hugging_face_table(ours, CLASSES[0])
    return Case("speech_to_text", CONFIG, build, table, inputs, run, reference, run_reference)


CASES = (_case(),)
