"""WavLM: a tiny model with its CTC loss."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from audiozoo.models import wavlm
from tests.golden.cases.wav2vec2 import CONFIG as WAV2VEC2
from tests.golden.cases.wav2vec2 import ctc_inputs, run_ctc, run_reference_ctc
from tests.golden.golden import Case
from weights_conversion.wavlm import config_from_hugging_face, hugging_face_table

CONFIG = WAV2VEC2 | {"num_buckets": 16, "max_bucket_distance": 20, "ctc_loss_reduction": "sum"}


def _case(name: str, config: dict[str, Any]) -> Case:
    ours = config_from_hugging_face(config)

    def build(dtype: Any) -> nnx.Module:
        return wavlm.WavLMForCTC(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        return transformers.WavLMForCTC(transformers.WavLMConfig(**config))

    table = hugging_face_table(ours, "WavLMForCTC")
    return Case(name, config, build, table, ctc_inputs, run_ctc, reference, run_reference_ctc)


CASES = (_case("wavlm", CONFIG),)
