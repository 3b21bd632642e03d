"""BatchNorm: its running statistics."""

import jax
import jax.numpy as jnp
import numpy as np

from audiozoo.layers.batch_norm import BatchNorm


def test_statistics_of_bfloat16_arrive():
    """A tenth of the way at each step, they would stop halfway, at steps that bfloat16 rounds to none."""
    norm = BatchNorm(2, param_dtype=jnp.bfloat16)
    x = 100 + jax.random.normal(jax.random.key(0), (64, 2), jnp.bfloat16)
    for _ in range(80):
        assert norm(x, train=True).dtype == jnp.bfloat16
    wanted = np.asarray(x, np.float32)
    np.testing.assert_allclose(norm.mean[...], wanted.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(norm.var[...], wanted.var(axis=0, ddof=1), rtol=2e-2)
    assert norm(x).dtype == jnp.bfloat16
