"""What must not be counted in few bits is not, and what is divided by a length may have none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from audiozoo.layers.alignment import repeat_by_duration
from audiozoo.layers.basic import unit_vectors
from audiozoo.layers.positions import cosines_and_sines


def test_frames_are_counted_beyond_256_in_bfloat16():
    durations, values = np.array([[200, 101, 3]]), jnp.asarray([[[1.0], [2.0], [3.0]]], jnp.bfloat16)
    (repeated,) = repeat_by_duration(jnp.asarray(durations, jnp.bfloat16), 400, values)
    assert repeated.dtype == jnp.bfloat16
    wanted = np.repeat([1.0, 2.0, 3.0, 0.0], [200, 101, 3, 96])
    np.testing.assert_array_equal(np.asarray(repeated[0, :, 0], np.float32), wanted)


def test_positions_beyond_256_differ_in_bfloat16():
    exact = cosines_and_sines(jnp.array([1000, 1001, 1002]), 8, dtype=jnp.float32)
    rounded = cosines_and_sines(jnp.array([1000, 1001, 1002]), 8, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_a_vector_of_zeros_has_a_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit_vectors(x), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit_vectors(x).sum())(x)).all()
