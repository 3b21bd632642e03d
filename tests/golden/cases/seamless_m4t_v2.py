"""SeamlessM4T v2, small, in float64: speech to logits, text to units, units to a waveform; durations are given."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Model
from tests.golden import seamless
from tests.golden.golden import Case
from weights_conversion.seamless_m4t_v2 import config_from_hugging_face, hugging_face_table

CONFIG = seamless.CONFIG | {
    "char_vocab_size": 20,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "t2u_variance_predictor_embed_dim": 16,
    "t2u_variance_predictor_hidden_dim": 12,
}
NAME = "SeamlessM4Tv2Model"


def build(dtype: Any) -> nnx.Module:
    return seamless.blank(SeamlessM4Tv2Model, config_from_hugging_face(CONFIG), dtype)


def inputs() -> dict[str, np.ndarray]:
    return seamless.inputs() | {
        "characters": np.array([[5, 9, 4, 17, 6]], np.int32),
        "counts": np.array([[0, 3, 2, 0]], np.int32),
        "durations": np.array([[2, 1, 3, 1, 2]], np.int32),
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


def reference() -> Any:
    import transformers
    from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as theirs

    with seamless.exact_sinusoids(theirs.SeamlessM4Tv2SinusoidalPositionalEmbedding):
        # In "eager" the Conformer's attention adds its mask of truth values to the scores.
        config = transformers.SeamlessM4Tv2Config(**CONFIG, attn_implementation="sdpa")
        return transformers.SeamlessM4Tv2Model(config)


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    t = seamless.torched(x)
    speech = model(
        input_features=t["input_features"],
        attention_mask=t["attention_mask"],
        decoder_input_ids=t["decoder_input_ids"],
    )
    with seamless.lasting(model.t2u_model.model.decoder.duration_predictor, x["durations"]):
        units = model.t2u_model(
            inputs_embeds=t["states"], char_input_ids=t["characters"], char_count_per_id=t["counts"]
        )
    with seamless.lasting(model.vocoder.dur_predictor, x["frames"]):
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
