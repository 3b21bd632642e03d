"""EnCodec: a tiny causal codec's latent vectors, the waveform of given codes, and codes of given vectors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.encodec import EncodecModel
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.encodec import config_from_hugging_face, hugging_face_table

CONFIG = {
    "target_bandwidths": [1.2, 2.4],
    "sampling_rate": 2400,
    "hidden_size": 6,
    "num_filters": 4,
    "upsampling_ratios": [3, 2],
    "codebook_size": 8,
}


def _config() -> Any:
    return config_from_hugging_face(CONFIG)


def build(dtype: Any) -> nnx.Module:
    return EncodecModel(_config(), dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def inputs() -> dict[str, np.ndarray]:
    return {
        "input_values": uniform(0, "input_values", (2, 1, 97), -0.8, 0.8),
        "codes": uniform(0, "codes", (2, 2, 17), 0, 8).astype(np.int32),
        "entries": np.array([3, 0, 7, 5, 1], np.int32),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    graphdef, state = nnx.split(model)
    whole = nnx.merge(graphdef, state)
    waves = jnp.swapaxes(x["input_values"], 1, 2)
    return {
        "latents": audiozoo.jit(whole.encoder)(waves),
        "waveform": audiozoo.jit(whole, "decode")(x["codes"][None], [None]).audio_values,
        # Vectors that are entries themselves: no rounding can make another one nearer.
        "codes": whole.quantizer.encode(whole.quantizer.embed[...][0][x["entries"]][None], 1),
    }


def reference() -> Any:
    import transformers

    return transformers.EncodecModel(transformers.EncodecConfig(**CONFIG))


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    latents = model.encoder(torch.from_numpy(x["input_values"]))
    waveform = model.decode(torch.from_numpy(x["codes"].astype(np.int64))[None], [None]).audio_values
    book = model.quantizer.layers[0].codebook
    codes = book.encode(book.embed[torch.from_numpy(x["entries"].astype(np.int64))][None])
    return {"latents": latents.mT, "waveform": waveform, "codes": codes[:, None].to(torch.int32)}


CASES = (
    Case(
        name="encodec",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config()),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
