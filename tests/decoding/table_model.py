"""A decoder without weights: logits are looked up in random tables, so that two frameworks get them equal to the bit.

The logits after a sequence $t_0 … t_n$ are, in float32,

    first[t_0] + last[t_n] + history[(sum_i (i + 1) t_i) mod M] + position[n]

The JAX step knows only $t_n$; the rest comes from its cache, which holds all three kinds of leaves: $t_0$ is `Shared`,
the tokens so far are `Growing`, their running sum is plain. A search that mistreats any of them goes wrong at once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from audiozoo.decoding import Growing, Shared, group_beams, ungroup_beams

MODULUS = 61


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    first: np.ndarray
    last: np.ndarray
    history: np.ndarray
    position: np.ndarray


def make_tables(seed: int, vocabulary: int = 13, length: int = 48, scale: float = 1.5, eos=(), eos_slope: float = 0.15):
    """Random tables; the logits of the tokens `eos` rise with the position, so that sequences end at various times."""
    rng = np.random.default_rng(seed)

    def table(rows):
        return (scale * rng.normal(size=(rows, vocabulary))).astype(np.float32)

    position = table(length) / 2
    for token in eos:
        position[:, token] += (eos_slope * np.arange(length) - 1.0).astype(np.float32)
    return Tables(table(vocabulary), table(vocabulary), table(MODULUS), position)


def start(prompt, length):
    """The cache of a sequence that is not begun yet."""
    batch = prompt.shape[0]
    return {
        "first": Shared(jnp.asarray(prompt)[:, 0]),
        "tokens": Growing(jnp.zeros((batch, 1, length), jnp.int32), axis=2),
        "sum": jnp.zeros((batch,), jnp.int32),
    }


def step(tables: Tables, tokens, cache, position):
    """Feed one token a row."""
    rows, batch = tokens.shape[0], cache["first"].value.shape[0]
    token = tokens[:, 0]
    # The Shared leaf meets the beams of an example as further "query positions".
    first = jnp.asarray(tables.first)[cache["first"].value]
    grouped = group_beams(jnp.zeros((rows, 1, first.shape[1]), first.dtype), batch) + first[:, None]
    first = ungroup_beams(grouped, rows)[:, 0]
    history = cache["tokens"].value.at[:, 0, position].set(token)
    index = jnp.arange(history.shape[2])
    from_history = jnp.sum(jnp.where(index <= position, (index + 1) * history[:, 0], 0), axis=1)
    total = cache["sum"] + (position + 1) * token
    # Both ways of remembering must agree, else the logits are no numbers.
    agree = jnp.where(from_history == total, 0.0, jnp.nan).astype(first.dtype)
    logits = (
        first
        + jnp.asarray(tables.last)[token]
        + jnp.asarray(tables.history)[total % MODULUS]
        + jnp.asarray(tables.position)[position]
        + agree[:, None]
    )
    return logits, {"first": cache["first"], "tokens": Growing(history, axis=2), "sum": total.astype(jnp.int32)}


def logits_of(tables: Tables, tokens: np.ndarray) -> np.ndarray:
    """The logits after whole sequences, without a cache: what `step` must amount to."""
    length = tokens.shape[1]
    total = (tokens * np.arange(1, length + 1)).sum(1)
    return (
        tables.first[tokens[:, 0]]
        + tables.last[tokens[:, -1]]
        + tables.history[total % MODULUS]
        + tables.position[length - 1]
    )
