"""Attention head by head and networks block by block, as a CPU does them for long inputs, against all at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, KeyValues, MultiHeadAttention, attend, attend_without_weights, in_blocks


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_agree(masked, monkeypatch):
    monkeypatch.setattr("audiozoo.layers.attention.TURNS_FROM_ALL", 1)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        query, key, value = (jnp.asarray(rng.standard_normal((2, 3, n, 4))) for n in (200, 330, 330))
        # query 3 of the first example may see nothing
        mask = jnp.asarray(rng.random((2, 1, 200, 330)) < 0.7).at[0, 0, 3].set(False) if masked else None

        def one(arrays):
            return attend(*arrays, scale=0.5, mask=mask)[0]

        def other(arrays):
            return attend_without_weights(*arrays, scale=0.5, mask=mask)

        arrays = (query, key, value)
        assert "while" in jax.jit(other).lower(arrays).as_text()
        assert "while" not in jax.jit(one).lower(arrays).as_text()
        np.testing.assert_allclose(jax.jit(other)(arrays), jax.jit(one)(arrays), rtol=1e-12, atol=1e-14)
        a, b = (jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(arrays) for f in (other, one))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("why", ["bias", "dropout", "beams"])
def test_weights_that_nobody_needs_change_nothing(why, monkeypatch):
    """A bias, dropped weights and several beams of one example are heeded where no weights are asked for, too."""
    for name in ("TURNS_FROM", "TURNS_FROM_ALL"):
        monkeypatch.setattr(f"audiozoo.layers.attention.{name}", 1)
    attention = MultiHeadAttention(8, 2, dropout=0.5, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), (1, 2, 3, 3)))

    @jax.jit
    def both(m, key):
        options = {"bias": bias if why == "bias" else None}
        memory = m.key_values(x[:1]) if why == "beams" else None
        return [m(x, memory, dropout=Dropout(key), need_weights=w, **options)[0] for w in (True, False)]

    full, bare = both(attention, jax.random.key(0) if why == "dropout" else None)
    np.testing.assert_allclose(full, bare, atol=1e-6)


def test_a_cache_keeps_its_dtype():
    cache, new = KeyValues.empty(1, 2, 4, 3, jnp.bfloat16), KeyValues(*jnp.ones((2, 1, 2, 1, 3)))
    written = cache.write(new, 2)
    assert written.key.dtype == written.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(written.value[0, 0, :, 0], [0, 0, 1, 0])


def test_blocks_of_positions_agree(monkeypatch):
    monkeypatch.setattr("audiozoo.layers.blocks.BLOCK", 100)
    monkeypatch.setattr("audiozoo.layers.blocks.BLOCKS_FROM", 200)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, into, out = (jnp.asarray(rng.standard_normal(shape)) for shape in ((3, 7, 5), (5, 20), (20, 4)))

        def whole(x, into, out):
            return jnp.tanh(x @ into) @ out

        def blocks(x, into, out):
            return in_blocks(lambda rows: whole(rows, into, out), x, 20)

        assert "while" in jax.jit(blocks).lower(x, into, out).as_text()
        np.testing.assert_allclose(jax.jit(blocks)(x, into, out), whole(x, into, out), rtol=1e-12, atol=1e-14)
        a, b = (jax.jit(jax.grad(lambda *w, f=f: (f(*w) ** 2).sum(), (0, 1, 2)))(x, into, out) for f in (blocks, whole))
        for one, other in zip(a, b, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_a_width_get_a_sentence(heads):
    with pytest.raises(UsageError, match=f"A width of 8 does not divide into {heads} heads"):
        MultiHeadAttention(8, heads, rngs=nnx.Rngs(0))
