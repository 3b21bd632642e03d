"""Bark: the logits of its three stages, small, in float64, and what EnCodec makes of the codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.layers import abstract
from audiozoo.models.bark import BarkModel
from tests.golden.golden import Case
from tests.models.tiny_bark import CONFIG
from weights_conversion.bark import config_from_hugging_face, hugging_face_table


def _config() -> Any:
    return config_from_hugging_face(CONFIG)


def build(dtype: Any) -> nnx.Module:
    wanted = jnp.dtype(dtype)
    model = abstract(lambda rngs: BarkModel(_config(), dtype=wanted, param_dtype=dtype, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def inputs() -> dict[str, np.ndarray]:
    return {
        "text": (np.arange(16, dtype=np.int32).reshape(2, 8) * 37 % 50) + 48,
        "coarse": (np.arange(24, dtype=np.int32).reshape(2, 12) * 31 % 80),
        "codes": np.arange(2 * 9 * 8, dtype=np.int32).reshape(2, 9, 8) * 29 % 17,
    }


@jax.jit
def _logits(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    return {
        "semantic": model.semantic(x["text"]).logits,
        "coarse": model.coarse_acoustics(x["coarse"]).logits,
        "fine": model.fine_acoustics(5, x["codes"]).logits,
        "waveform": model.codec_model.decode_frame(x["codes"].swapaxes(1, 2))[:, 0],
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    return _logits(model, x)


def reference() -> Any:
    import transformers

    return transformers.BarkModel(transformers.BarkConfig(**CONFIG))


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    text, coarse, codes = (torch.from_numpy(x[name].astype(np.int64)) for name in ("text", "coarse", "codes"))
    return {
        "semantic": model.semantic(text, use_cache=False).logits,
        "coarse": model.coarse_acoustics(coarse, use_cache=False).logits,
        "fine": model.fine_acoustics(5, codes).logits,
        "waveform": model.codec_decode(codes.transpose(1, 2)),
    }


CASES = (
    Case(
        name="bark",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config()),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
