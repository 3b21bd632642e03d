"""Weight normalisation: the published formula, folding and unfolding, and that the pieces train apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.layers.weight_norm import (
    WeightNormConv1d,
    WeightNormConvTranspose1d,
    apply_weight_norm,
    fold_weight_norm,
)


class Pair(nnx.Module):
    def __init__(self, dim: int):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([WeightNormConv1d(4, 6, 3, padding=1, groups=2, dim=dim, rngs=rngs)])
        self.up = WeightNormConvTranspose1d(6, 5, 4, stride=2, padding=1, rngs=rngs)

    def __call__(self, x):
        return self.up(self.layers[0](x))


def names(model):
    return {".".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(("dim", "magnitude"), [(0, (1, 1, 6)), (2, (3, 1, 1))])
def test_fold_and_apply(dim, magnitude):
    model = Pair(dim)
    assert names(model) == {
        "layers.0.bias": (6,),
        "layers.0.kernel_g": magnitude,
        "layers.0.kernel_v": (3, 2, 6),
        "up.bias": (5,),
        "up.kernel_g": (1, 6, 1),
        "up.kernel_v": (4, 6, 5),
    }
    x = jax.random.normal(jax.random.key(0), (2, 7, 4))
    whole = model(x)
    # A magnitude that is not the direction's norm: the product must follow it, and folding must keep it.
    model.layers[0].kernel_g[...] = 2.0 * model.layers[0].kernel_g[...]
    v = np.asarray(model.layers[0].kernel_v[...], np.float64)
    axes = {0: (0, 1), 2: (1, 2)}[dim]
    expected = v / np.sqrt((v**2).sum(axes, keepdims=True)) * np.asarray(model.layers[0].kernel_g[...], np.float64)
    np.testing.assert_allclose(model.layers[0].weight(), expected, rtol=1e-6)
    doubled = model(x)
    assert not np.allclose(whole, doubled)
    folded = fold_weight_norm(model)
    assert set(names(folded)) == {"layers.0.bias", "layers.0.kernel", "up.bias", "up.kernel"}
    assert "layers.0.kernel_g" in names(model)  # the model itself is as it was
    np.testing.assert_allclose(folded(x), doubled, rtol=1e-6, atol=1e-6)
    again = apply_weight_norm(folded)
    assert names(again) == names(model)
    np.testing.assert_allclose(again(x), doubled, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_direction_is_orthogonal_to_it():
    model = Pair(0)
    graphdef, state = nnx.split(model)
    x = jax.random.normal(jax.random.key(1), (1, 9, 4))
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graphdef, state)(x) ** 2))(state)
    v, dv = model.layers[0].kernel_v[...], nnx.to_pure_dict(gradient)["layers"][0]["kernel_v"]
    assert np.abs(dv).max() > 0.1
    np.testing.assert_allclose(jnp.sum(v * dv, (0, 1)), np.zeros(6), atol=1e-4)
