"""VITS: a tiny model's prior, sampled log-durations, latents and waveform, each stage from inputs of its own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.vits import VitsModel
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.vits import config_from_hugging_face, hugging_face_table

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 2,
    "ffn_dim": 24,
    "flow_size": 8,
    "spectrogram_bins": 9,
    "num_speakers": 3,
    "speaker_embedding_size": 5,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 2],
    "upsample_kernel_sizes": [8, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
    "duration_predictor_flow_bins": 4,
    "duration_predictor_num_flows": 2,
    "depth_separable_num_layers": 1,
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 1,
    "posterior_encoder_num_wavenet_layers": 1,
}
DURATIONS = np.array([[2, 0, 3, 1, 4], [1, 1, 2, 0, 0]])


def build(dtype: Any) -> nnx.Module:
    return VitsModel(config_from_hugging_face(CONFIG), dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def inputs() -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([[1, 5, 9, 19, 0], [7, 7, 2, 0, 0]], np.int32),
        "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
        "durations": DURATIONS.astype(np.int32),
        "hidden_states": uniform(0, "hidden_states", (2, 5, 16), -0.5, 0.5),
        "duration_noise": uniform(0, "duration_noise", (2, 5, 2), -0.5, 0.5),
        "means": uniform(0, "means", (2, 5, 8), -1.5, 1.5),
        "log_deviations": uniform(0, "log_deviations", (2, 5, 8), -1.0, 0.0),
        "prior_noise": uniform(0, "prior_noise", (2, 10, 8), -1.0, 1.0),
        "latents": uniform(0, "latents", (2, 10, 8), -1.5, 1.5),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    dtype = x["means"].dtype
    mask = jnp.asarray(x["attention_mask"])[..., None].astype(dtype)
    speaker = model.speaker_embedding(jnp.asarray([1, 1]))
    encoded, _ = audiozoo.jit(model, "encode")(x["input_ids"], x["attention_mask"], speaker)
    log_durations = audiozoo.jit(model.duration_predictor)(x["hidden_states"], mask, speaker, noise=x["duration_noise"])
    latents = jax.jit(lambda m, *prior, noise: m.latents(*prior, frames=10, noise_scale=0.5, prior_noise=noise)[0])
    durations = jnp.asarray(x["durations"], dtype)
    z = latents(model, x["means"], x["log_deviations"], durations, speaker, noise=x["prior_noise"])
    return {
        "prior_means": encoded.prior_means,
        "log_durations": log_durations,
        "latents": z,
        "waveform": audiozoo.jit(model, "decode")(x["latents"], None, speaker),
    }


def reference() -> Any:
    import transformers

    return transformers.VitsModel(transformers.VitsConfig(**CONFIG))


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    ids, mask = torch.tensor(x["input_ids"]).long(), torch.tensor(x["attention_mask"])
    speaker = model.embed_speaker(torch.tensor([1, 1])).unsqueeze(-1)
    encoded = model.text_encoder(ids, mask[..., None].double(), attention_mask=mask)
    noise = torch.tensor(x["duration_noise"].swapaxes(1, 2))
    with mock.patch("torch.randn", return_value=noise):
        log_durations = model.duration_predictor(
            torch.tensor(x["hidden_states"].swapaxes(1, 2)), mask[:, None].double(), speaker, reverse=True
        )
    lengths = DURATIONS.sum(1)
    spread = np.zeros((2, 2, 10, 8))
    for row, durations in enumerate(DURATIONS):
        for column, name in enumerate(("means", "log_deviations")):
            spread[row, column, : lengths[row]] = np.repeat(x[name][row], durations, axis=0)
    frames = (np.arange(10) < lengths[:, None])[:, None].astype(float)
    z = spread[:, 0] + 0.5 * np.exp(spread[:, 1]) * x["prior_noise"]
    z = model.flow(torch.tensor(z.swapaxes(1, 2)), torch.tensor(frames), speaker, reverse=True) * torch.tensor(frames)
    return {
        "prior_means": encoded.prior_means,
        "log_durations": log_durations.transpose(1, 2),
        "latents": z.transpose(1, 2),
        "waveform": model.decoder(torch.tensor(x["latents"].swapaxes(1, 2)), speaker)[:, 0],
    }


CASES = (
    Case(
        name="vits",
        config=CONFIG,
        build=build,
        table=hugging_face_table(config_from_hugging_face(CONFIG)),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
    ),
)
