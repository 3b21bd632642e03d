"""Products in bfloat16 and float16: the factors stay as they are, sums are taken in float32, the result is rounded."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.layers import Embed, Linear
from audiozoo.layers.basic import matmul

few_bits = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])


def drawn(*shape: int, seed: int = 0, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def one_rounding(found: jax.Array, exact: np.ndarray) -> None:
    """`found` is `exact` rounded to its dtype; sums in float32 may fall on the other side of a border."""
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert np.all(error <= 0.51 * float(jnp.finfo(found.dtype).eps) * np.abs(exact) + 1e-3 * np.abs(exact).max() / 256)


@few_bits
def test_one_rounding(dtype):
    x, y = drawn(3, 5, 300, dtype=dtype), drawn(300, 7, seed=1, dtype=dtype)
    found = jax.jit(matmul)(x, y)
    assert found.dtype == dtype
    one_rounding(found, np.asarray(x, np.float64) @ np.asarray(y, np.float64))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is read is a CPU's program")
def test_factors_are_not_widened():
    x, y = drawn(64, 256), drawn(256, 128)
    compiled = jax.jit(matmul).lower(x, y).compile().as_text()
    assert not re.search(r"f32\[(64,256|256,128)\]", compiled)


@few_bits
def test_gradients_of_a_linear_map(dtype):
    layer = Linear(96, 40, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    wide = Linear(96, 40, rngs=nnx.Rngs(0))
    wide.kernel[...] = layer.kernel[...].astype(jnp.float32)
    x = drawn(2, 33, 96, dtype=dtype)

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x).astype(jnp.float32)))

    found, expected = (nnx.grad(loss, argnums=(0, 1))(*pair) for pair in ((layer, x), (wide, x.astype(jnp.float32))))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * float(jnp.abs(b).max()))


@few_bits
def test_logits_by_a_table(dtype):
    table = Embed(50, 64, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    for query in (drawn(2, 3, 64, dtype=dtype), drawn(1, 1, 64, dtype=dtype)):
        found = table.attend(query)
        assert found.dtype == dtype
        one_rounding(found, np.asarray(query, np.float64) @ np.asarray(table.embedding[...], np.float64).T)
