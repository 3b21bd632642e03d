"""XLS-R: a tiny model that translates, with its loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.models.xls_r import SpeechEncoderDecoderModel
from tests.golden.cases.wav2vec2 import STABLE, ctc_inputs
from tests.golden.golden import Case
from weights_conversion.xls_r import config_from_hugging_face, hugging_face_table

ENCODER = {k: v for k, v in STABLE.items() if k not in ("adapter_attn_dim", "vocab_size")}
ENCODER |= {"model_type": "wav2vec2", "add_adapter": True, "num_adapter_layers": 1}
DECODER = {
    "model_type": "mbart",
    "vocab_size": 23,
    "max_position_embeddings": 30,
    "d_model": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 32,
    "scale_embedding": True,
    "activation_function": "relu",
}
CONFIG = {"encoder": ENCODER, "decoder": DECODER, "decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
LABELS = np.array([[7, 5, 9, 2], [8, 2, -100, -100]], np.int32)


def inputs() -> dict[str, np.ndarray]:
    return {"input_values": ctc_inputs()["input_values"], "labels": LABELS}


def run(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    output = jax.jit(lambda m, x: m(x["input_values"], labels=x["labels"]))(model, x)
    return {"logits": output.logits, "loss": output.loss.astype(output.logits.dtype)}


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    output = model(torch.from_numpy(x["input_values"]), labels=torch.from_numpy(x["labels"]).long())
    return {"logits": output.logits, "loss": output.loss}


def _case() -> Case:
    ours = config_from_hugging_face(CONFIG)

    def build(dtype: Any) -> nnx.Module:
        return SpeechEncoderDecoderModel(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        encoder = transformers.Wav2Vec2Config(**ENCODER, attn_implementation="eager")
        decoder = transformers.MBartConfig(**DECODER, attn_implementation="eager")
        config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
        return transformers.SpeechEncoderDecoderModel(config)

    table = hugging_face_table(ours, "SpeechEncoderDecoderModel")
    return Case("xls_r", CONFIG, build, table, inputs, run, reference, run_reference)


CASES = (_case(),)
