"""SeamlessM4T, small, in float64: speech to logits, states to units, units to a waveform; durations are given."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.conformer import relative_sinusoids
from audiozoo.models.seamless_m4t import SeamlessM4TModel
from tests.golden import seamless
from tests.golden.golden import Case
from weights_conversion.seamless_m4t import config_from_hugging_face, hugging_face_table

CONFIG = seamless.CONFIG
NAME = "SeamlessM4TModel"


def build(dtype: Any) -> nnx.Module:
    return seamless.blank(SeamlessM4TModel, config_from_hugging_face(CONFIG), dtype)


def inputs() -> dict[str, np.ndarray]:
    return seamless.inputs() | {"unit_ids": np.array([[2, 29, 9, 14, 20]], np.int32)}


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


def reference() -> Any:
    import torch
    import transformers
    from transformers.models.seamless_m4t import modeling_seamless_m4t as theirs

    with seamless.exact_sinusoids(theirs.SeamlessM4TSinusoidalPositionalEmbedding):
        model = transformers.SeamlessM4TModel(transformers.SeamlessM4TConfig(**CONFIG, attn_implementation="eager"))
    positions = model.speech_encoder.encoder.embed_positions
    table = torch.from_numpy(relative_sinusoids(positions.max_len, CONFIG["hidden_size"]))
    # It comes out as it is where it is long enough; the stock one has angles in float32.
    positions.extend_pe = lambda x, pe=None: table[None].to(x.dtype)
    return model


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    t = seamless.torched(x)
    speech = model(
        input_features=t["input_features"],
        attention_mask=t["attention_mask"],
        decoder_input_ids=t["decoder_input_ids"],
    )
    units = model.t2u_model(inputs_embeds=t["states"], decoder_input_ids=t["unit_ids"], use_cache=False)
    with seamless.lasting(model.vocoder.dur_predictor, x["frames"]):
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
