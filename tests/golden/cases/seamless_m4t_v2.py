"""SeamlessM4T v2, small, in float64: speech to logits, text to units, units to a waveform; durations are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.layers import abstract
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Model
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.seamless_m4t_v2 import config_from_hugging_face, hugging_face_table

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "t2u_vocab_size": 30,
    "char_vocab_size": 20,
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
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 4,
    "t2u_encoder_layers": 1,
    "t2u_encoder_ffn_dim": 20,
    "t2u_encoder_attention_heads": 2,
    "t2u_decoder_layers": 1,
    "t2u_decoder_ffn_dim": 20,
    "t2u_decoder_attention_heads": 2,
    "t2u_variance_predictor_embed_dim": 16,
    "t2u_variance_predictor_hidden_dim": 12,
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
NAME = "SeamlessM4Tv2Model"


def build(dtype: Any) -> nnx.Module:
    config, wanted = config_from_hugging_face(CONFIG), jnp.dtype(dtype)
    model = abstract(lambda rngs: SeamlessM4Tv2Model(config, dtype=wanted, param_dtype=dtype, rngs=rngs))
    flat = [(p, v.replace(jnp.zeros(v.shape, v.dtype))) for p, v in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def inputs() -> dict[str, np.ndarray]:
    mask = np.ones((2, 21), np.int32)
    mask[1, 13:] = 0
    return {
        "input_features": uniform(0, "input_features", (2, 21, 10), -1.7, 1.7),
        "attention_mask": mask,
        "decoder_input_ids": (np.arange(10, dtype=np.int32).reshape(2, 5) * 7 % 36) + 4,
        "states": uniform(0, "states", (1, 4, 16), -1.7, 1.7),
        "characters": np.array([[5, 9, 4, 17, 6]], np.int32),
        "counts": np.array([[0, 3, 2, 0]], np.int32),
        "durations": np.array([[2, 1, 3, 1, 2]], np.int32),
        "units": np.array([[5, 12, 25, 5]], np.int32),
        "frames": np.array([[1, 3, 2, 2]], np.int32),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    speech = audiozoo.jit(model)(
        input_features=x["input_features"],
        attention_mask=x["attention_mask"],
        decoder_input_ids=x["decoder_input_ids"],
    )

    units = model.t2u_model(x["states"], x["characters"], x["counts"], durations=x["durations"])
    waveform, _ = model.vocoder(x["units"], 3, 2, durations=x["frames"])
    return {"encoder": speech.encoder_last_hidden_state, "units": units.last_hidden_state, "waveform": waveform}


@contextlib.contextmanager
def _lasting(predictor: Any, durations: np.ndarray) -> Iterator[None]:
    """A duration predictor that says what it is told."""
    import torch

    told = torch.log1p(torch.from_numpy(durations).to(next(predictor.parameters()).dtype))
    handle = predictor.register_forward_hook(lambda module, given, output: told)
    try:
        yield
    finally:
        handle.remove()


def reference() -> Any:
    import torch
    import transformers
    from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as theirs

    def exact(length: int, width: int, padding: int) -> Any:
        angles = np.arange(length)[:, None] * np.exp(-np.log(1e4) / (width // 2 - 1) * np.arange(width // 2))
        table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
        table[padding] = 0
        return table

    # The stock table has angles in float32; this one keeps float64.
    sinusoids = theirs.SeamlessM4Tv2SinusoidalPositionalEmbedding
    stock = sinusoids.get_embedding
    sinusoids.get_embedding = staticmethod(exact)
    try:
        # In "eager" the Conformer's attention adds its mask of truth values to the scores.
        config = transformers.SeamlessM4Tv2Config(**CONFIG, attn_implementation="sdpa")
        return transformers.SeamlessM4Tv2Model(config)
    finally:
        sinusoids.get_embedding = stock


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    t = {name: torch.from_numpy(a if a.dtype.kind == "f" else a.astype(np.int64)) for name, a in x.items()}
    speech = model(
        input_features=t["input_features"],
        attention_mask=t["attention_mask"],
        decoder_input_ids=t["decoder_input_ids"],
    )
    with _lasting(model.t2u_model.model.decoder.duration_predictor, x["durations"]):
        units = model.t2u_model(
            inputs_embeds=t["states"], char_input_ids=t["characters"], char_count_per_id=t["counts"]
        )
    with _lasting(model.vocoder.dur_predictor, x["frames"]):
        waveform, _ = model.vocoder(t["units"], speaker_id=torch.tensor([[3]]), lang_id=torch.tensor([[2]]))
    return {
        "encoder": speech.encoder_last_hidden_state,
        "units": units.last_hidden_state,
        "waveform": waveform,
    }


CASES = (
    Case(
        name="seamless_m4t_v2",
        config=CONFIG,
        build=build,
        table=hugging_face_table(config_from_hugging_face(CONFIG), NAME),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
