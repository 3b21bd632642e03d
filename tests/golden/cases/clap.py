"""CLAP: both towers, with fusion, small, in float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.layers import abstract
from audiozoo.models.clap import ClapModel, resize_cubic
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.clap import config_from_hugging_face, hugging_face_table

CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 40,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 14,
    },
    "audio_config": {
        "window_size": 2,
        "num_mel_bins": 16,
        "spec_size": 32,
        "patch_size": 4,
        "hidden_size": 16,
        "depths": [2, 1],
        "num_attention_heads": [2, 4],
        "patch_embeds_hidden_size": 8,
        "aff_block_r": 2,
        "enable_fusion": True,
        "fusion_type": "aff_2d",
    },
    "projection_dim": 10,
}


def _config() -> Any:
    return config_from_hugging_face(CONFIG)


def build(dtype: Any) -> nnx.Module:
    model = abstract(lambda rngs: ClapModel(_config(), dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def inputs() -> dict[str, np.ndarray]:
    mask = np.ones((2, 9), np.int32)
    mask[1, 6:] = 0
    ids = np.arange(18, dtype=np.int32).reshape(2, 9) * 7 % 37 + 3
    return {
        "input_ids": np.where(mask == 1, ids, 1).astype(np.int32),
        "attention_mask": mask,
        "input_features": uniform(0, "input_features", (2, 4, 30, 16), -1.7, 1.7),
        "is_longer": np.array([[1], [0]], np.int32),
        "row": uniform(0, "row", (17,), -1.0, 1.0),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in x.items() if name != "row"}
    output = audiozoo.jit(model)(**given, return_loss=True)
    return {
        "audio_embeds": output.audio_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_audio": output.logits_per_audio,
        "logits_per_text": output.logits_per_text,
        "audio": output.audio_model_output.last_hidden_state,
        "text": output.text_model_output.last_hidden_state,
        "loss": output.loss.astype(output.audio_embeds.dtype),
        "resized": resize_cubic(jnp.asarray(x["row"]), 40, 0),
    }


def reference() -> Any:
    import transformers

    return transformers.ClapModel(transformers.ClapConfig(**CONFIG))


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    # The stock text attention rounds to float32 in its softmax; this one keeps float64.
    stock, rows = torch.nn.functional.softmax, torch.nn.functional.cross_entropy
    torch.nn.functional.softmax = lambda z, dim, dtype=None: stock(z, dim=dim)
    try:
        whole = {"input_ids", "attention_mask", "is_longer"}
        given = {name: torch.from_numpy(a.astype(np.int64) if name in whole else a) for name, a in x.items()}
        row = given.pop("row")
        output = model(**given)
    finally:
        torch.nn.functional.softmax = stock
    labels = torch.arange(2)
    resized = torch.nn.functional.interpolate(row[None, None, :, None], (40, 1), mode="bicubic", align_corners=True)
    return {
        "audio_embeds": output.audio_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_audio": output.logits_per_audio,
        "logits_per_text": output.logits_per_text,
        "audio": output.audio_model_output.last_hidden_state,
        "text": output.text_model_output.last_hidden_state,
        "loss": (rows(output.logits_per_audio, labels) + rows(output.logits_per_text, labels)) / 2,
        "resized": resized[0, 0, :, 0],
    }


CASES = (
    Case(
        name="clap",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config(), "ClapModel"),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
