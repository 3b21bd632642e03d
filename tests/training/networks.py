"""Small things to train: what the tests of the loop, of checkpoints and of meshes share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from audiozoo.layers import Dropout, Linear
from audiozoo.training.loop import Loss, Phase, Task


class Block(nnx.Module):
    def __init__(self, width, *, rngs, **kwargs):
        self.fc1 = Linear(width, 2 * width, rngs=rngs, **kwargs)
        self.fc2 = Linear(2 * width, width, rngs=rngs, **kwargs)

    def __call__(self, x, dropout, mask=None):
        return x + self.fc2(dropout(jnp.tanh(self.fc1(x)), 0.1)), None


class Net(nnx.Module):
    """Blocks in a loop, with a statistic that training moves in place."""

    def __init__(self, width=8, blocks=3, *, rngs, **kwargs):
        self.layers = nnx.List([Block(width, rngs=rngs, **kwargs) for _ in range(blocks)])
        self.head = Linear(width, 1, rngs=rngs, **kwargs)
        self.seen = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x, key=None):
        dropout = Dropout(key)
        for layer in self.layers:
            x, _ = layer(x, dropout)
        if key is not None:
            self.seen[...] = self.seen[...] + 1
        return self.head(x)[..., 0]


def loss(networks, batch, turn):
    error = jnp.square(networks["model"](batch["x"], turn.key) - batch["y"])
    return Loss(error.sum(), error.size, {"error": jnp.abs(error).sum()})


def without_dropout(networks, batch, turn):
    return loss(networks, batch, turn._replace(key=None))


def task(objective=loss, optimizer=None, **settings):
    model = Net(rngs=nnx.Rngs(0), **settings.pop("model", {}))
    return Task({"model": model}, [Phase("model", objective, optimizer or optax.adam(1e-2), **settings)])


class Numbers:
    """An endless iterator with a position."""

    def __init__(self, size=8, dtype=np.float32):
        self.size, self.dtype, self.index = size, dtype, 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng(self.index)
        self.index += 1
        x = rng.normal(size=(self.size, 8)).astype(self.dtype)
        return {"x": x, "y": x.sum(axis=1)}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
