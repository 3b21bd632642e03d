"""What the golden cases of both versions of SeamlessM4T share: sizes, inputs, blank models, and their originals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.layers import abstract
from tests.random_weights import uniform

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "t2u_vocab_size": 30,
    "hidden_size": 16,
    "encoder_layers": 1,
    "encoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_ffn_dim": 20,
    "decoder_attention_heads": 2,
    "feature_projection_input_dim": 10,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 20,
    "conv_depthwise_kernel_size": 5,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 4,
    "t2u_encoder_layers": 1,
    "t2u_encoder_ffn_dim": 20,
    "t2u_encoder_attention_heads": 2,
    "t2u_decoder_layers": 1,
    "t2u_decoder_ffn_dim": 20,
    "t2u_decoder_attention_heads": 2,
    "unit_hifi_gan_vocab_size": 26,
    "unit_embed_dim": 6,
    "vocoder_num_langs": 3,
    "lang_embed_dim": 4,
    "vocoder_num_spkrs": 5,
    "spkr_embed_dim": 3,
    "upsample_initial_channel": 8,
    "upsample_rates": (5, 2),
    "upsample_kernel_sizes": (11, 4),
    "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 3),),
}


def blank(cls: Any, config: Any, dtype: Any) -> nnx.Module:
    """A model of zeros, which a case's weights are put into."""
    model = abstract(lambda rngs: cls(config, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def inputs() -> dict[str, np.ndarray]:
    """Speech, the text decoder's tokens, states that speech is made from, units and how long they sound."""
    mask = np.ones((2, 21), np.int32)
    mask[1, 13:] = 0
    return {
        "input_features": uniform(0, "input_features", (2, 21, 10), -1.7, 1.7),
        "attention_mask": mask,
        "decoder_input_ids": (np.arange(10, dtype=np.int32).reshape(2, 5) * 7 % 36) + 4,
        "states": uniform(0, "states", (1, 4, 16), -1.7, 1.7),
        "units": np.array([[5, 12, 25, 5]], np.int32),
        "frames": np.array([[1, 3, 2, 2]], np.int32),
    }


@contextlib.contextmanager
def lasting(predictor: Any, durations: np.ndarray) -> Iterator[None]:
    """A duration predictor that says what it is told."""
    import torch

    told = torch.log1p(torch.from_numpy(durations).to(next(predictor.parameters()).dtype))
    handle = predictor.register_forward_hook(lambda module, given, output: told)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def exact_sinusoids(kind: Any) -> Iterator[None]:
    """Tables of sinusoids in float64, where the original's have angles in float32.

    Args:
        kind: the original's class of positions.
    """
    import torch

    def exact(length: int, width: int, padding: int) -> Any:
        angles = np.arange(length)[:, None] * np.exp(-np.log(1e4) / (width // 2 - 1) * np.arange(width // 2))
        table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
        table[padding] = 0
        return table

    stock = kind.get_embedding
    kind.get_embedding = staticmethod(exact)
    try:
        yield
    finally:
        kind.get_embedding = stock


def torched(x: dict[str, np.ndarray]) -> dict[str, Any]:
    """Inputs for the original."""
    import torch

    return {name: torch.from_numpy(a if a.dtype.kind == "f" else a.astype(np.int64)) for name, a in x.items()}
