"""Products and convolutions in few bits: factors stay as they are, sums are taken in float32, the result is rounded."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.layers import Embed, Linear
from audiozoo.layers.basic import matmul
from audiozoo.layers.convolution import Conv1d, ConvTranspose1d

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


CONVOLUTIONS = {  # channels in, channels out, taps, frames, and the geometry
    "one channel": (1, 6, 10, 83, {"stride": 5}),
    "stride": (8, 6, 3, 40, {"stride": 2}),
    "stride beyond the kernel": (8, 6, 2, 41, {"stride": 3}),
    "more than blocks of the stride": (8, 6, 7, 41, {"stride": 3, "padding": 2}),
    "padding": (8, 6, 5, 20, {"padding": (4, 1)}),
    "dilation": (8, 6, 3, 30, {"dilation": 3, "padding": 3, "stride": 2}),
    "as many frames as taps": (8, 6, 5, 5, {}),
    "fewer frames than taps": (8, 6, 5, 3, {}),
    "many taps": (8, 6, 40, 60, {}),
    "groups": (8, 6, 3, 30, {"groups": 2}),
    "depthwise": (8, 8, 5, 30, {"groups": 8, "padding": (4, 0), "dilation": 2}),
    "depthwise, fewer frames than taps": (8, 8, 5, 3, {"groups": 8}),
}


@few_bits
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, dtype):
    channels, outputs, taps, frames, geometry = CONVOLUTIONS[name]
    layer = Conv1d(channels, outputs, taps, **geometry, param_dtype=dtype, use_bias=False, rngs=nnx.Rngs(0))
    _like_float64(layer, drawn(2, frames, channels, dtype=dtype))


@few_bits
@pytest.mark.parametrize(
    "geometry", [{"stride": 4, "padding": 2}, {"stride": 2, "output_padding": 1}, {"dilation": 2}], ids=str
)
def test_transposed_convolutions(geometry, dtype):
    layer = ConvTranspose1d(8, 6, 7, **geometry, param_dtype=dtype, use_bias=False, rngs=nnx.Rngs(0))
    _like_float64(layer, drawn(2, 9, 8, dtype=dtype))


def _like_float64(layer: nnx.Module, x: jax.Array) -> None:
    """One rounding of the output; gradients to a hundredth of the largest."""
    graph, state = nnx.split(layer)

    @jax.jit
    def both(state, x, toward):
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return y, pull(toward.astype(y.dtype))

    toward = drawn(*jax.eval_shape(layer, x).shape, seed=3, dtype=x.dtype)
    found, gradients = both(state, x, toward)
    assert found.dtype == x.dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda value: jnp.asarray(np.asarray(value), jnp.float64), (state, x, toward))
        expected, exact = both(*wide)
    assert expected.shape == found.shape
    if found.size:
        one_rounding(found, np.asarray(expected))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=0.01 * float(np.abs(b).max()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is read is a CPU's program")
def test_a_convolution_in_few_bits_is_made_of_products():
    layer = Conv1d(64, 64, 3, stride=2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    compiled = jax.jit(lambda x: layer(x)).lower(drawn(1, 257, 64)).compile().as_text()
    assert "convolution(" not in compiled
