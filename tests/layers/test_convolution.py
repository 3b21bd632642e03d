"""Convolutions in groups, whose gradients (and of depthwise ones the sums) are ours, against JAX's own."""

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


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_of_groups(name):
    geometry = GEOMETRIES[name]
    outputs = 24 if geometry["groups"] < 12 or name == "twice the channels" else 12
    with jax.enable_x64(True):
        layer = Conv1d(12, outputs, **geometry, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 31, 12)))
        padding = layer.padding

        def derived(x, kernel):
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (layer.stride,),
                (padding,),
                rhs_dilation=(layer.dilation,),
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=layer.groups,
            )
            return jnp.sin(y + layer.bias[...])

        def ours(x, kernel):
            copy = nnx.clone(layer)
            copy.kernel[...] = kernel
            return jnp.sin(copy(x))

        def gradients(function):
            return jax.jit(jax.grad(lambda *args: jnp.square(function(*args)).sum(), (0, 1)))(x, layer.kernel[...])

        allowed = tolerance("gradient", "float64")
        exact = tolerance("output", "float64")
        np.testing.assert_allclose(
            ours(x, layer.kernel[...]), derived(x, layer.kernel[...]), rtol=exact.rtol, atol=exact.atol
        )
        for a, b in zip(gradients(ours), gradients(derived), strict=True):
            np.testing.assert_allclose(a, b, rtol=allowed.rtol, atol=allowed.atol)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is read is a CPU's program")
def test_a_depthwise_convolution_is_a_sum_over_taps():
    layer = Conv1d(64, 64, 5, padding=(4, 0), groups=64, rngs=nnx.Rngs(0))
    step = jax.jit(jax.grad(lambda x: jnp.square(layer(x)).sum()))
    assert "convolution(" not in step.lower(jnp.zeros((2, 30, 64))).compile().as_text()
