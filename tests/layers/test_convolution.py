"""Convolutions whose sums or gradients are ours, in groups and large ones, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.layers.convolution import Conv1d
from tests.tolerances import tolerance

GEOMETRIES = {
    "of positions": {"kernel_size": 8, "padding": 4, "groups": 3},
    "of a judge": {"kernel_size": 11, "stride": 4, "padding": 5, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": (4, 0), "groups": 12},
    "twice the channels": {"kernel_size": 5, "padding": (4, 0), "groups": 12},
    "depthwise, dilated": {"kernel_size": 3, "dilation": 3, "padding": 3, "groups": 12},
    "depthwise, strided": {"kernel_size": 4, "stride": 3, "dilation": 2, "padding": (1, 5), "groups": 12},
    "depthwise, more padding than taps": {"kernel_size": 2, "padding": (3, 2), "groups": 12},
    "strided, some frames unheard": {"kernel_size": 2, "stride": 3, "dilation": 2, "groups": 3},
}


LARGE = {
    "three taps": (128, 120, {"kernel_size": 3, "padding": (5, 0)}),
    "four": (96, 100, {"kernel_size": 4, "dilation": 3}),
    "seven, dilated": (64, 52, {"kernel_size": 7, "dilation": 5, "padding": 15}),
    "eleven, of few channels": (32, 40, {"kernel_size": 11, "padding": (0, 3)}),
}


def _plain(layer, x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (layer.stride,),
        (layer.padding,),
        rhs_dilation=(layer.dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=layer.groups,
    )


def _like_jax(layer, x):
    def derived(x, kernel):
        return jnp.sin(_plain(layer, x, kernel) + layer.bias[...])

    def ours(x, kernel):
        copy = nnx.clone(layer)
        copy.kernel[...] = kernel
        return jnp.sin(copy(x))

    def gradients(function):
        return jax.jit(jax.grad(lambda *args: jnp.square(function(*args)).sum(), (0, 1)))(x, layer.kernel[...])

    exact, allowed = tolerance("output", "float64"), tolerance("gradient", "float64")
    y, expected = ours(x, layer.kernel[...]), derived(x, layer.kernel[...])
    np.testing.assert_allclose(y, expected, rtol=exact.rtol, atol=exact.atol)
    for a, b in zip(gradients(ours), gradients(derived), strict=True):
        np.testing.assert_allclose(a, b, rtol=allowed.rtol, atol=allowed.atol)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_of_groups(name):
    geometry = GEOMETRIES[name]
    outputs = 24 if geometry["groups"] < 12 or name == "twice the channels" else 12
    with jax.enable_x64(True):
        layer = Conv1d(12, outputs, **geometry, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        _like_jax(layer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 31, 12))))


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_in_fewer_products(name):
    """Winograd's sums, whatever frames are left over at the end of a block."""
    inputs, outputs, geometry = LARGE[name]
    shape = (8, 67, inputs) if name.startswith("seven") else (1, 515, inputs)
    with jax.enable_x64(True):
        layer = Conv1d(inputs, outputs, **geometry, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        _like_jax(layer, jnp.asarray(np.random.default_rng(0).normal(size=shape)))


@pytest.mark.parametrize("name", LARGE)
def test_rounding_of_fewer_products(name):
    """In float32 the sums are at most eight times as far from exact ones as those of the plain convolution."""
    inputs, outputs, geometry = LARGE[name]
    layer = Conv1d(inputs, outputs, **geometry, use_bias=False, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 1000, inputs)).astype(np.float32)
    found, plain = layer(jnp.asarray(x)), _plain(layer, jnp.asarray(x), layer.kernel[...])
    with jax.enable_x64(True):
        exact = _plain(layer, jnp.asarray(x, jnp.float64), jnp.asarray(np.asarray(layer.kernel[...]), jnp.float64))
    error, of_plain = (
        np.sqrt(np.mean(np.square(np.asarray(y, np.float64) - np.asarray(exact)))) for y in (found, plain)
    )
    assert error < 8 * of_plain


@pytest.mark.parametrize(("dilation", "frames"), [(40, 0), (1, 234)])
def test_fewer_frames_than_taps_in_a_large_batch(dilation, frames):
    layer = Conv1d(64, 64, 7, dilation=dilation, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((4, 240, 64))).shape == (4, frames, 64)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is read is a CPU's program")
@pytest.mark.parametrize(("taps", "most"), [(7, 0.6), (5, 1.0)])
def test_large_ones_take_half_the_operations(taps, most):
    """Where the taps fill blocks of four; of five taps seven eighths of the products would be left."""
    layer = Conv1d(64, 128, taps, padding=taps // 2, rngs=nnx.Rngs(0))
    compiled = jax.jit(layer).lower(jnp.zeros((1, 4000, 64))).compile()
    share = compiled.cost_analysis()["flops"] / (2 * 4000 * taps * 64 * 128)
    assert most - 0.1 < share < most + 0.1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is read is a CPU's program")
def test_a_depthwise_convolution_is_a_sum_over_taps():
    layer = Conv1d(64, 64, 5, padding=(4, 0), groups=64, rngs=nnx.Rngs(0))
    step = jax.jit(jax.grad(lambda x: jnp.square(layer(x)).sum()))
    assert "convolution(" not in step.lower(jnp.zeros((2, 30, 64))).compile().as_text()
