"""AST: a tiny classifier's embeddings, logits and losses, and the positions that the released code cuts for it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.audio_spectrogram_transformer import (
    ASTForAudioClassification,
    classification_loss,
    resize_position_embeddings,
)
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.audio_spectrogram_transformer import config_from_hugging_face, hugging_face_table

CLASS = "ASTForAudioClassification"
CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "patch_size": 4,
    "frequency_stride": 3,
    "time_stride": 2,
    "max_length": 13,
    "num_mel_bins": 11,
}
LABELS, SIDE = 5, 6


def _config() -> Any:
    return config_from_hugging_face({**CONFIG, "num_labels": LABELS})


def build(dtype: Any) -> nnx.Module:
    return ASTForAudioClassification(_config(), dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def inputs() -> dict[str, np.ndarray]:
    return {
        "input_values": uniform(0, "input_values", (2, 13, 11), -1.5, 1.5),
        "classes": np.array([4, 0], np.int32),
        "targets": uniform(0, "targets", (2, LABELS), 0.0, 1.0),
        "image_positions": uniform(0, "image_positions", (1, 2 + SIDE**2, 3), -1.0, 1.0),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    output = audiozoo.jit(model)(x["input_values"], output_hidden_states=True)
    dtype = output.logits.dtype
    grown = resize_position_embeddings(np.asarray(x["image_positions"]), (SIDE, SIDE), (9, 4))
    return {
        "encoder": output.hidden_states[-1],
        "logits": output.logits,
        "cross_entropy": classification_loss(output.logits, x["classes"]).astype(dtype),
        "binary_cross_entropy": classification_loss(output.logits, x["targets"]).astype(dtype),
        "positions": jnp.asarray(grown),
    }


def reference() -> Any:
    import transformers

    # The stock eager attention rounds to float32 in its softmax; this one keeps float64.
    config = transformers.ASTConfig(**CONFIG, num_labels=LABELS, attn_implementation="sdpa")
    return transformers.ASTForAudioClassification(config)


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    output = model(torch.from_numpy(x["input_values"]), output_hidden_states=True)
    classes, targets = torch.from_numpy(x["classes"].astype(np.int64)), torch.from_numpy(x["targets"])
    positions = torch.from_numpy(x["image_positions"])
    grid = positions[:, 2:].transpose(1, 2).reshape(1, 3, SIDE, SIDE)[..., 1:5]
    grid = torch.nn.functional.interpolate(grid, size=(9, 4), mode="bilinear")
    return {
        "encoder": output.hidden_states[-1],
        "logits": output.logits,
        "cross_entropy": torch.nn.functional.cross_entropy(output.logits, classes),
        "binary_cross_entropy": torch.nn.functional.binary_cross_entropy_with_logits(output.logits, targets),
        "positions": torch.cat([positions[:, :2], grid.reshape(1, 3, -1).transpose(1, 2)], dim=1),
    }


CASES = (
    Case(
        name="audio_spectrogram_transformer",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config(), CLASS, in_memory=True),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
