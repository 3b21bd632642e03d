"""UniSpeech: a tiny model with its CTC loss."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from audiozoo.models import unispeech
from tests.golden.cases.wav2vec2 import CONFIG as WAV2VEC2
from tests.golden.cases.wav2vec2 import ctc_inputs, run_ctc, run_reference_ctc
from tests.golden.golden import Case
from weights_conversion.unispeech import config_from_hugging_face, hugging_face_table

CONFIG = WAV2VEC2 | {
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "ctc_loss_reduction": "sum",
}
OURS = config_from_hugging_face(CONFIG)


def _build(dtype: Any) -> nnx.Module:
    return unispeech.UniSpeechForCTC(OURS, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def _reference() -> Any:
    import transformers

    return transformers.UniSpeechForCTC(transformers.UniSpeechConfig(**CONFIG, attn_implementation="eager"))


TABLE = hugging_face_table(OURS, "UniSpeechForCTC")
CASES = (Case("unispeech", CONFIG, _build, TABLE, ctc_inputs, run_ctc, _reference, run_reference_ctc),)
