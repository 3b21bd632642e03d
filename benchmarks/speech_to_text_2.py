"""Speech2Text2's decoder: no `transformers` of today has it, so the original is PyTorch's own Transformer decoder.

That one keeps no keys and values between tokens, so what is timed is a forward over whole texts.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, tensor, threads, within

TOKENS, FRAMES = 48, 500


@functools.lru_cache(maxsize=1)
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of eight texts, and what the encoder makes of ten seconds for each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 10_000, (8, TOKENS)).astype(np.int32)
    return tokens, rng.standard_normal((8, FRAMES, 256)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def both() -> tuple[Any, dict[str, np.ndarray]]:
    """Ours with random weights, and the weights under their foreign names."""
    from audiozoo.loading import variables
    from audiozoo.models.speech_to_text_2 import Speech2Text2Config, Speech2Text2ForCausalLM
    from weights_conversion.speech_to_text_2 import hugging_face_table

    config = Speech2Text2Config.covost_en_de()
    table = hugging_face_table(config)
    model = random_model(Speech2Text2ForCausalLM, config, table)
    return model, dict(table.write({name: np.asarray(v[...]) for name, v in variables(model).items()}))


def our_forward() -> Run:
    import jax

    import audiozoo

    tokens, memory = map(jax.numpy.asarray, inputs())
    run = audiozoo.jit(both()[0])
    return lambda: np.asarray(run(tokens, None, memory).logits)


def their_forward() -> Run:
    import torch

    from audiozoo.layers import fairseq_sinusoids

    torch.set_num_threads(threads())
    model, state = both()
    config = model.config
    tokens, memory = map(tensor, inputs())
    layers = []
    for i in range(config.decoder_layers):
        at = f"model.decoder.layers.{i}."
        layer = torch.nn.TransformerDecoderLayer(
            config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, 0.0, batch_first=True
        ).eval()
        given: dict[str, Any] = {}
        for ours, theirs in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
            for kind in ("weight", "bias"):
                parts = [state[f"{at}{theirs}.{p}_proj.{kind}"] for p in "qkv"]
                given[f"{ours}.in_proj_{kind}"] = tensor(np.concatenate(parts))
                given[f"{ours}.out_proj.{kind}"] = tensor(state[f"{at}{theirs}.out_proj.{kind}"])
        names = {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm"}
        names |= {"norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
        for o, t in names.items():
            given |= {f"{o}.{k}": tensor(state[f"{at}{t}.{k}"]) for k in ("weight", "bias")}
        layer.load_state_dict(given)
        layers.append(layer)
    embedding = tensor(state["model.decoder.embed_tokens.weight"])
    head = tensor(state["lm_head.weight"])
    positions = tensor(fairseq_sinusoids(TOKENS + 2, config.d_model)[2:].astype(np.float32))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)

    def run() -> Any:
        with torch.inference_mode():
            x = embedding[tokens.long()] * config.d_model**0.5 + positions
            for layer in layers:
                x = layer(x, memory, tgt_mask=causal)
            return (x @ head.T).numpy()

    return run


CASES = (
    Case(
        f"forward, 8 texts of {TOKENS} tokens, memory of 10 s",
        our_forward,
        {"torch.nn.TransformerDecoderLayer": their_forward},
        target=1.0,
        agreement=within(1e-3),
    ),
)
