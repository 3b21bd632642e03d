"""The gradient of a product of many rows, against that of Flax's own layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.layers.basic import ROWS_FROM, Linear


@pytest.mark.parametrize("shape", [(2, 3000), (2, 3, 1000)])
def test_values_and_gradients_are_those_of_flax(shape):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 12)))
        assert x.size >= ROWS_FROM
        ours = Linear(12, 7, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

        def loss(layer, x, call):
            return (call(layer, x) ** 2).sum()

        def result(call):
            return nnx.jit(nnx.value_and_grad(lambda layer, x: loss(layer, x, call), argnums=(0, 1)))(ours, x)

        assert "custom_vjp" in str(jax.make_jaxpr(lambda x: ours(x))(x))
        for a, b in zip(*map(jax.tree.leaves, (result(Linear.__call__), result(nnx.Linear.__call__))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
