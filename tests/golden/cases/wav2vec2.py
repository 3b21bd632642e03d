"""wav2vec 2.0: tiny models of both layouts, with their CTC losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.models import wav2vec2
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.wav2vec2 import config_from_hugging_face, hugging_face_table

CONFIG = {
    "vocab_size": 11,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "conv_dim": [16, 12, 18],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 3,
    "num_codevectors_per_group": 5,
    "codevector_dim": 8,
    "proj_codevector_dim": 6,
    "num_negatives": 4,
}
STABLE = CONFIG | {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True, "adapter_attn_dim": 5}
SAMPLES, FRAMES = 500, 24


def _mask() -> np.ndarray:
    return (np.arange(SAMPLES) < np.array([[SAMPLES], [370]])).astype(np.int32)


def _inputs() -> dict[str, np.ndarray]:
    return {"input_values": uniform(0, "input_values", (2, SAMPLES), -1.7, 1.7) * _mask()}


def ctc_inputs() -> dict[str, np.ndarray]:
    return _inputs() | {"labels": np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]], np.int32)}


def run_ctc(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, values, labels: nnx.merge(graphdef, state)(values, jnp.asarray(_mask()), labels))
    output = call(state, x["input_values"], x["labels"])
    return {"logits": output.logits, "loss": output.loss.astype(output.logits.dtype)}


def run_reference_ctc(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    mask = torch.from_numpy(_mask())
    logits = model(torch.from_numpy(x["input_values"]), attention_mask=mask).logits
    labels = torch.from_numpy(x["labels"]).long()
    lengths = model._get_feat_extract_output_lengths(mask.sum(-1))
    # The stock loss rounds to float32 in its softmax; this one keeps float64.
    loss = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), labels[labels >= 0], lengths, (labels >= 0).sum(-1), reduction="sum"
    )
    return {"logits": logits, "loss": loss}


def _case(name: str, cls: str, config: dict[str, Any], inputs: Any, run: Any, run_reference: Any) -> Case:
    ours = config_from_hugging_face(config)

    def build(dtype: Any) -> nnx.Module:
        return getattr(wav2vec2, cls)(ours, dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))

    def reference() -> Any:
        import transformers

        return getattr(transformers, cls)(transformers.Wav2Vec2Config(**config, attn_implementation="eager"))

    return Case(name, config, build, hugging_face_table(ours, cls), inputs, run, reference, run_reference)


CASES = (
    _case("wav2vec2", "Wav2Vec2ForCTC", CONFIG, ctc_inputs, run_ctc, run_reference_ctc),
    _case("wav2vec2_stable", "Wav2Vec2ForCTC", STABLE, ctc_inputs, run_ctc, run_reference_ctc),
)
