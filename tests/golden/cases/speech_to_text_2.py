"""Speech2Text2: its decoder behind wav2vec 2.0, with its loss, by `transformers` 4.40.2, the last that has it.

python -m venv old && old/bin/pip install torch "transformers==4.40.2" -e ".[test]"
old/bin/python -m tests.golden.generate speech_to_text_2
old/bin/python -m tests.golden.speech_to_text_2_search
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.layers import fairseq_sinusoids
from audiozoo.models.xls_r import SpeechEncoderDecoderModel
from tests.golden.cases.wav2vec2 import STABLE, ctc_inputs
from tests.golden.golden import Case
from weights_conversion.xls_r import config_from_hugging_face, hugging_face_table

ENCODER = {k: v for k, v in STABLE.items() if k not in ("adapter_attn_dim", "vocab_size")}
ENCODER |= {"model_type": "wav2vec2"}
DECODER = {
    "model_type": "speech_to_text_2",
    "vocab_size": 23,
    "d_model": 20,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "tie_word_embeddings": False,
    "max_target_positions": 30,
}
SPECIAL = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
CONFIG: dict[str, Any] = {"encoder": ENCODER, "decoder": DECODER, **SPECIAL}
LABELS = np.array([[7, 5, 9, 2], [8, 2, -100, -100]], np.int32)
NEEDS = "transformers==4.40.2"


def mask() -> np.ndarray:
    return (ctc_inputs()["input_values"] != 0).astype(np.int32)


def inputs() -> dict[str, np.ndarray]:
    return {"input_values": ctc_inputs()["input_values"], "attention_mask": mask(), "labels": LABELS}


def run(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    call = jax.jit(
        lambda m, x: m(
            x["input_values"], x["attention_mask"], labels=x["labels"], output_hidden_states=True,
            output_attentions=True,
        )
    )  # fmt: skip
    output = call(model, x)
    return {
        "memory": output.encoder_last_hidden_state,
        "decoder_hidden_states": jnp.stack(output.decoder_hidden_states),
        "cross_attentions": jnp.stack(output.cross_attentions),
        "logits": output.logits,
        "loss": output.loss.astype(output.logits.dtype),
    }


def with_exact_positions(model: Any) -> Any:
    """The original with the sinusoids to float64; its own are rounded to float32."""
    import torch

    table = model.decoder.model.decoder.embed_positions.weights
    table.data.copy_(torch.from_numpy(fairseq_sinusoids(*table.shape)))
    return model


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in x.items()}
    tensors["labels"] = tensors["labels"].long()
    output = with_exact_positions(model)(**tensors, output_hidden_states=True, output_attentions=True)
    return {
        "memory": output.encoder_last_hidden_state,
        "decoder_hidden_states": torch.stack(output.decoder_hidden_states),
        "cross_attentions": torch.stack(output.cross_attentions),
        "logits": output.logits,
        "loss": output.loss,
    }


def reference() -> Any:
    import transformers

    encoder = transformers.Wav2Vec2Config(**ENCODER)
    decoder = transformers.Speech2Text2Config(**DECODER)
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.update(SPECIAL | {"tie_word_embeddings": False})
    return transformers.SpeechEncoderDecoderModel(config)


def case() -> Case:
    ours = config_from_hugging_face(CONFIG)

    def build(dtype: Any) -> nnx.Module:
        return SpeechEncoderDecoderModel(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    table = hugging_face_table(ours, "SpeechEncoderDecoderModel")
    return Case("speech_to_text_2", CONFIG, build, table, inputs, run, reference, run_reference, needs=NEEDS)


CASES = (case(),)
