"""MMS: a tiny model of one language, with its adapters and its loss."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from audiozoo.models import wav2vec2
from audiozoo.models.mms import MMSConfig
from tests.golden.cases.wav2vec2 import STABLE, ctc_inputs, run_ctc, run_reference_ctc
from tests.golden.golden import Case
from weights_conversion.mms import hugging_face_table
from weights_conversion.wav2vec2 import config_from_hugging_face


def _case() -> Case:
    fields = STABLE | {"adapter_attn_dim": 4, "vocab_size": 13}
    ours = MMSConfig(**vars(config_from_hugging_face(fields)))

    def build(dtype: Any) -> nnx.Module:
        return wav2vec2.Wav2Vec2ForCTC(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**fields, attn_implementation="eager"))

    table = hugging_face_table(ours, "Wav2Vec2ForCTC")
    return Case("mms", fields, build, table, ctc_inputs, run_ctc, reference, run_reference_ctc)


CASES = (_case(),)
