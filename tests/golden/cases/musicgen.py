"""MusicGen: text encoder, decoder and codec, small, in float64: logits, loss, music that is continued."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.layers import abstract
from audiozoo.layers.positions import cosines_and_sines
from audiozoo.models.musicgen import MusicgenForConditionalGeneration
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.musicgen import WHOLE, config_from_hugging_face, hugging_face_table

CONFIG: dict[str, Any] = {
    "text_encoder": {
        "model_type": "t5",
        "vocab_size": 40,
        "d_model": 12,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "relu",
    },
    "audio_encoder": {
        "model_type": "encodec",
        "sampling_rate": 800,
        "target_bandwidths": [2.0],
        "num_filters": 2,
        "hidden_size": 6,
        "codebook_dim": 6,
        "upsampling_ratios": [4, 2],
        "num_lstm_layers": 1,
        "codebook_size": 32,
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "kernel_size": 3,
        "last_kernel_size": 3,
    },
    "decoder": {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "num_codebooks": 4,
        "pad_token_id": 32,
        "bos_token_id": 32,
        "decoder_start_token_id": 32,
        "max_position_embeddings": 64,
    },
}


def _config() -> Any:
    return config_from_hugging_face(CONFIG)


def build(dtype: Any) -> nnx.Module:
    kind, wanted = MusicgenForConditionalGeneration, jnp.dtype(dtype)
    model = abstract(lambda rngs: kind(_config(), dtype=wanted, param_dtype=dtype, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def inputs() -> dict[str, np.ndarray]:
    mask = np.ones((2, 5), np.int32)
    mask[1, 3:] = 0
    labels = (np.arange(56, dtype=np.int32).reshape(2, 7, 4) * 37) % 33
    labels[0, 5:] = -100
    clear = 170  # of 400 draws the one whose codes are furthest from a tie, which bfloat16 may decide otherwise
    return {
        "input_ids": np.arange(10, dtype=np.int32).reshape(2, 5) * 3 % 38 + 2,
        "attention_mask": mask,
        "labels": labels,
        "input_values": uniform(clear, "input_values", (2, 1, 40), -0.9, 0.9),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    call = audiozoo.jit(model)
    trained = call(x["input_ids"], x["attention_mask"], labels=x["labels"])
    continued = call(x["input_ids"], x["attention_mask"], input_values=x["input_values"])
    logits = trained.logits
    return {"logits": logits, "loss": trained.loss.astype(logits.dtype), "continued": continued.logits}


@contextmanager
def _double_precision() -> Any:
    """The stock table of positions and T5's norm are in float32; these keep float64."""
    import torch
    from transformers.models.musicgen.modeling_musicgen import MusicgenSinusoidalPositionalEmbedding as Positions
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    stock = Positions.forward, T5LayerNorm.forward

    def table(self: Any, ids: Any, past: int = 0) -> Any:
        steps = past + jnp.arange(ids.shape[2])
        return torch.from_numpy(np.array(cosines_and_sines(steps, self.embedding_dim, dtype=jnp.float64)))

    def norm(self: Any, y: Any) -> Any:
        return self.weight * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    Positions.forward, T5LayerNorm.forward = table, norm
    try:
        yield
    finally:
        Positions.forward, T5LayerNorm.forward = stock


def reference() -> Any:
    import transformers

    config = transformers.MusicgenConfig(**CONFIG)
    config._attn_implementation = "eager"
    return transformers.MusicgenForConditionalGeneration(config)


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    ids, mask, labels = (torch.from_numpy(x[n].astype(np.int64)) for n in ("input_ids", "attention_mask", "labels"))
    with _double_precision():
        trained = model(ids, mask, labels=labels)
        continued = model(ids, mask, input_values=torch.from_numpy(x["input_values"]))
    return {"logits": trained.logits, "loss": trained.loss, "continued": continued.logits}


CASES = (
    Case(
        name="musicgen",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config(), WHOLE),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
