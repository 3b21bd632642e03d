"""SeamlessM4T, small, in float64: speech to logits, states to units, units to a waveform; durations are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.layers import abstract
from audiozoo.models.conformer import relative_sinusoids
from audiozoo.models.seamless_m4t import SeamlessM4TModel
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.seamless_m4t import config_from_hugging_face, hugging_face_table

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
NAME = "SeamlessM4TModel"


def build(dtype: Any) -> nnx.Module:
    config, wanted = config_from_hugging_face(CONFIG), jnp.dtype(dtype)
    model = abstract(lambda rngs: SeamlessM4TModel(config, dtype=wanted, param_dtype=dtype, rngs=rngs))
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
        "unit_ids": np.array([[2, 29, 9, 14, 20]], np.int32),
        "units": np.array([[5, 12, 25, 5]], np.int32),
        "frames": np.array([[1, 3, 2, 2]], np.int32),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    speech = audiozoo.jit(model)(
        input_features=x["input_features"],
        attention_mask=x["attention_mask"],
        decoder_input_ids=x["decoder_input_ids"],
    )
    units = audiozoo.jit(model.t2u_model)(x["states"], None, x["unit_ids"])
    waveform, _ = model.vocoder(x["units"], 3, 2, durations=x["frames"])
    return {
        "encoder": speech.encoder_last_hidden_state,
        "text": speech.logits,
        "units": units.logits,
        "waveform": waveform,
    }


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
    from transformers.models.seamless_m4t import modeling_seamless_m4t as theirs

    def exact(length: int, width: int, padding: int) -> Any:
        angles = np.arange(length)[:, None] * np.exp(-np.log(1e4) / (width // 2 - 1) * np.arange(width // 2))
        table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
        table[padding] = 0
        return table

    # The stock table has angles in float32; this one keeps float64.
    sinusoids = theirs.SeamlessM4TSinusoidalPositionalEmbedding
    stock = sinusoids.get_embedding
    sinusoids.get_embedding = staticmethod(exact)
    try:
        model = transformers.SeamlessM4TModel(transformers.SeamlessM4TConfig(**CONFIG, attn_implementation="eager"))
        positions = model.speech_encoder.encoder.embed_positions
        table = torch.from_numpy(relative_sinusoids(positions.max_len, CONFIG["hidden_size"]))
        # It comes out as it is where it is long enough; the stock one has angles in float32.
        positions.extend_pe = lambda x, pe=None: table[None].to(x.dtype)
        return model
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
    units = model.t2u_model(inputs_embeds=t["states"], decoder_input_ids=t["unit_ids"], use_cache=False)
    with _lasting(model.vocoder.dur_predictor, x["frames"]):
        waveform, _ = model.vocoder(t["units"], spkr_id=torch.tensor([[3]]), lang_id=torch.tensor([[2]]))
    return {
        "encoder": speech.encoder_last_hidden_state,
        "text": speech.logits,
        "units": units.logits,
        "waveform": waveform,
    }


CASES = (
    Case(
        name="seamless_m4t",
        config=CONFIG,
        build=build,
        table=hugging_face_table(config_from_hugging_face(CONFIG), NAME),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
