"""SEW and SEW-D: tiny models with their CTC losses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from audiozoo.models import sew
from tests.golden.cases.wav2vec2 import CONFIG as WAV2VEC2
from tests.golden.cases.wav2vec2 import ctc_inputs, run_ctc, run_reference_ctc
from tests.golden.golden import Case
from weights_conversion.sew import config_from_hugging_face, hugging_face_table

PLAIN = {k: v for k, v in WAV2VEC2.items() if not k.startswith("num_codevectors")} | {"ctc_loss_reduction": "sum"}
# Heads of 12 channels, so that the original's sqrt(3 * 12), which it takes in float32, is exact.
DISENTANGLED = PLAIN | {"num_attention_heads": 2, "position_buckets": 8, "max_position_embeddings": 12}


def _case(name: str, prefix: str, config: dict[str, Any]) -> Case:
    ours = config_from_hugging_face(config | {"model_type": "sew-d" if prefix == "SEWD" else "sew"})

    def build(dtype: Any) -> nnx.Module:
        return getattr(sew, f"{prefix}ForCTC")(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        theirs = getattr(transformers, f"{prefix}Config")(**config, attn_implementation="eager")
        return getattr(transformers, f"{prefix}ForCTC")(theirs)

    table = hugging_face_table(ours, f"{prefix}ForCTC")
    return Case(name, config, build, table, ctc_inputs, run_ctc, reference, run_reference_ctc)


CASES = (_case("sew", "SEW", PLAIN), _case("sew_d", "SEWD", DISENTANGLED))
