"""A two-layer causal transformer with and without a cache, for tests of the loops that drive one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from audiozoo.decoding import Growing

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 16, 2, 2, 13, 32


def weights(seed, noise=0.0):
    def draw(rng, scale):
        def table(*shape):
            return scale * rng.normal(size=shape).astype(np.float32)

        layers = [{"qkv": table(WIDTH, 3 * WIDTH), "out": table(WIDTH, WIDTH)} for _ in range(LAYERS)]
        return {"tokens": table(VOCABULARY, WIDTH), "positions": table(POSITIONS, WIDTH), "layers": layers}

    base = draw(np.random.default_rng(seed), 0.7)
    return jax.tree.map(lambda x, n: x + noise * n, base, draw(np.random.default_rng(100 + seed), 1.0))


def start(weights, batch, length):
    def empty():
        return Growing(jnp.zeros((batch, length, WIDTH)))

    return [{"keys": empty(), "values": empty()} for _ in weights["layers"]]


def multi_step(weights, tokens, cache, position):
    """Feed several tokens at `position …`; the logits after each."""
    batch, fed = tokens.shape
    x = jnp.asarray(weights["tokens"])[tokens] + lax.dynamic_slice_in_dim(weights["positions"], position, fed, axis=0)
    after = []
    for layer, store in zip(weights["layers"], cache, strict=True):
        q, k, v = jnp.split(x @ layer["qkv"], 3, axis=-1)
        keys = lax.dynamic_update_slice_in_dim(store["keys"].value, k, position, axis=1)
        values = lax.dynamic_update_slice_in_dim(store["values"].value, v, position, axis=1)
        slots = keys.shape[1]
        visible = jnp.arange(slots) <= position + jnp.arange(fed)[:, None]
        heads = (batch, -1, HEADS, WIDTH // HEADS)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q.reshape(heads), keys.reshape(heads)) / np.sqrt(WIDTH / HEADS)
        attention = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", attention, values.reshape(heads)).reshape(x.shape) @ layer["out"]
        after.append({"keys": Growing(keys), "values": Growing(values)})
    return x @ jnp.asarray(weights["tokens"]).T, after


def step(weights, tokens, cache, position):
    logits, cache = multi_step(weights, tokens, cache, position)
    return logits[:, -1], cache


def prefill(weights, prompt, cache):
    logits, cache = multi_step(weights, prompt, cache, jnp.asarray(0, jnp.int32))
    return logits[:, -1], cache


def forward(weights, tokens):
    """Whole sequences without a cache, in NumPy float64: the logits after every token."""
    batch, length = tokens.shape
    x = np.float64(weights["tokens"])[tokens] + weights["positions"][:length]
    for layer in weights["layers"]:
        heads = (batch, length, HEADS, WIDTH // HEADS)
        q, k, v = (part.reshape(heads) for part in np.split(x @ np.float64(layer["qkv"]), 3, axis=-1))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH / HEADS)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + np.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape) @ np.float64(layer["out"])
    return x @ np.float64(weights["tokens"]).T
