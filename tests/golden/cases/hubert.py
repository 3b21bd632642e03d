"""HuBERT: a tiny CTC model with its loss."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from audiozoo.models import hubert
from tests.golden.cases.wav2vec2 import CONFIG, ctc_inputs, run_ctc, run_reference_ctc
from tests.golden.golden import Case
from weights_conversion.hubert import config_from_hugging_face, hugging_face_table


def _build(config: Any, dtype: Any) -> nnx.Module:
    return hubert.HubertForCTC(config, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def _case() -> Case:
    fields = {k: v for k, v in CONFIG.items() if "code" not in k and k != "num_negatives"}
    fields |= {"feat_proj_layer_norm": False, "do_stable_layer_norm": True}
    ours = config_from_hugging_face(fields)

    def reference() -> Any:
        import transformers

        return transformers.HubertForCTC(transformers.HubertConfig(**fields, attn_implementation="eager"))

    return Case(
        "hubert",
        fields,
        lambda dtype: _build(ours, dtype),
        hugging_face_table(ours, "HubertForCTC"),
        ctc_inputs,
        run_ctc,
        reference,
        run_reference_ctc,
    )


CASES = (_case(),)
