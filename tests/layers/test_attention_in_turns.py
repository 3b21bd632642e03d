"""Attention head by head, as a CPU does it for long inputs, against all heads at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiozoo.layers import attend, attend_without_weights
from audiozoo.layers.attention import TURNS_FROM


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_agree(masked):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        query, key, value = (jnp.asarray(rng.standard_normal((2, 3, n, 4))) for n in (200, 330, 330))
        assert query.shape[2] * key.shape[2] >= TURNS_FROM
        mask = jnp.asarray(rng.random((2, 1, 1, 330)) < 0.7) if masked else None

        def one(arrays):
            return attend(*arrays, scale=0.5, mask=mask)[0]

        def other(arrays):
            return attend_without_weights(*arrays, scale=0.5, mask=mask)

        arrays = (query, key, value)
        np.testing.assert_allclose(jax.jit(other)(arrays), jax.jit(one)(arrays), rtol=1e-12, atol=1e-14)
        a, b = (jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(arrays) for f in (other, one))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
