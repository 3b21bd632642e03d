"""The gradients of convolutions in groups, which are ours, against those that JAX derives."""

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
    "depthwise, dilated": {"kernel_size": 3, "dilation": 3, "padding": 3, "groups": 12},
    "strided, some frames unheard": {"kernel_size": 2, "stride": 3, "dilation": 2, "groups": 3},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_of_groups(name):
    geometry = GEOMETRIES[name]
    outputs = 24 if geometry["groups"] < 12 or name == "depthwise" else 12
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
        np.testing.assert_array_equal(ours(x, layer.kernel[...]), derived(x, layer.kernel[...]))
        for a, b in zip(gradients(ours), gradients(derived), strict=True):
            np.testing.assert_allclose(a, b, rtol=allowed.rtol, atol=allowed.atol)
