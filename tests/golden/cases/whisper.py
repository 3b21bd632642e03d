"""Whisper: a tiny encoder, the logits of forced tokens, the training loss, and the tokens of greedy decoding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import audiozoo
from audiozoo.models.whisper import WhisperForConditionalGeneration
from tests.golden.golden import Case
from tests.random_weights import uniform
from weights_conversion.whisper import config_from_hugging_face, hugging_face_table

CLASS = "WhisperForConditionalGeneration"
CONFIG = {
    "vocab_size": 67,
    "num_mel_bins": 16,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 36,
    "max_source_positions": 20,
    "max_target_positions": 18,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "begin_suppress_tokens": None,
}
# Greedy decoding: what it begins with, how long it runs, which tokens end it, and a factor on the decoder's last scale
# that makes the choices clear enough for every dtype.
PROMPT, NEW_TOKENS, ENDS, SHARPER = (2, 11), 12, (1, 40, 41, 42, 43), 6.0


def _theirs() -> Any:
    import transformers

    return transformers.WhisperConfig(**CONFIG, attn_implementation="eager")


def _config() -> Any:
    return config_from_hugging_face({**CONFIG, "model_type": "whisper", "architectures": [CLASS]})


def build(dtype: Any) -> nnx.Module:
    return WhisperForConditionalGeneration(_config(), dtype=jnp.dtype(dtype), param_dtype=dtype, rngs=nnx.Rngs(0))


def inputs() -> dict[str, np.ndarray]:
    tokens = np.concatenate([np.full((2, 1), 2), 3 + (np.arange(18).reshape(2, 9) * 7) % 60], axis=1)
    labels = np.roll(tokens, -1, axis=1)
    labels[0, 6:] = -100
    labels[1, :2] = -100
    return {
        "input_features": uniform(0, "input_features", (2, 16, 40), -1.5, 1.5),
        "tokens": tokens.astype(np.int32),
        "labels": labels.astype(np.int32),
    }


def run(model: nnx.Module, x: dict[str, Any]) -> dict[str, Any]:
    output = audiozoo.jit(model)(x["input_features"], decoder_input_ids=x["tokens"], labels=x["labels"])
    results = {
        "encoder": output.encoder_last_hidden_state,
        "logits": output.logits,
        "loss": output.loss.astype(output.logits.dtype),  # a float32 mean where the model is in half precision
    }
    scale = model.model.decoder.layer_norm.scale
    scale[...] = SHARPER * scale[...]
    results["tokens"] = model.generate(
        x["input_features"],
        decoder_input_ids=np.array([PROMPT] * 2),
        max_new_tokens=NEW_TOKENS,
        no_repeat_ngram_size=1,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    return results


def reference() -> Any:
    import transformers

    return transformers.WhisperForConditionalGeneration(_theirs())


def run_reference(model: Any, x: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch
    import transformers

    features = torch.from_numpy(x["input_features"])
    tokens, labels = (torch.from_numpy(x[name].astype(np.int64)) for name in ("tokens", "labels"))
    output = model(features, decoder_input_ids=tokens, labels=labels)
    results = {"encoder": output.encoder_last_hidden_state, "logits": output.logits, "loss": output.loss}
    model.model.decoder.layer_norm.weight.mul_(SHARPER)
    # The grandparent's `generate`: the plain search, without Whisper's own wrapping of it.
    found = transformers.GenerationMixin.generate(
        model,
        features,
        decoder_input_ids=torch.tensor([PROMPT] * 2),
        max_new_tokens=NEW_TOKENS,
        no_repeat_ngram_size=1,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.scores).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 0.4, "a choice is close: take another seed"
    results["tokens"] = found.sequences[:, len(PROMPT) :].to(torch.int32)
    return results


CASES = (
    Case(
        name="whisper",
        config=CONFIG,
        build=build,
        table=hugging_face_table(_config(), CLASS),
        inputs=inputs,
        run=run,
        reference=reference,
        run_reference=run_reference,
        seed=39,
    ),
)
