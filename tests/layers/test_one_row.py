"""What a decoder's step computes on one row: products in parts, and caches that are written in place."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.decoding.cache import while_loop
from audiozoo.layers.attention import KeyValues
from audiozoo.layers.basic import Embed, Linear
from tests.tolerances import tolerance


def assert_close(ours, theirs, kind, dtype):
    allowed = tolerance(kind, dtype)
    np.testing.assert_allclose(ours, theirs, rtol=allowed.rtol, atol=allowed.atol)


def row(features, dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, features)), dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_parts_is_the_product(bias):
    """Value and every gradient, in float64; twice the row goes the usual way."""
    with jax.enable_x64(True):
        layer = Linear(384, 512, use_bias=bias, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        if bias:
            layer.bias[...] = jax.random.normal(jax.random.key(1), (512,), jnp.float64)
        x = row(384, jnp.float64)

        def plain(kernel, x):
            return jnp.sin(x @ kernel + (layer.bias[...] if bias else 0.0)).sum()

        def parts(kernel, x):
            copy = nnx.clone(layer)
            copy.kernel[...] = kernel
            return jnp.sin(copy(x)).sum()

        kernel = layer.kernel[...]
        assert_close(layer(x), layer(jnp.concatenate([x, x]))[:1], "sharded", "float64")
        assert layer(x).shape == (1, 1, 512)
        for ours, theirs in zip(jax.grad(parts, (0, 1))(kernel, x), jax.grad(plain, (0, 1))(kernel, x), strict=True):
            assert_close(ours, theirs, "sharded", "float64")
        many = jnp.stack([x, 2 * x, -x])
        assert_close(jax.vmap(layer)(many), layer(many), "sharded", "float64")


def test_parts_are_summed_in_float32():
    """In bfloat16 the result is as near to the exact one as that of the whole product."""
    layer = Linear(1024, 256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = row(1024, jnp.bfloat16)
    exact = x.astype(jnp.float32) @ layer.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    ours = layer(x)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_less(jnp.abs(ours - exact), 2**-8 * jnp.abs(exact) + 1e-6)


@pytest.mark.parametrize("entries", [1000, 51_865, 257])
def test_logits_in_parts_are_the_logits(entries):
    table = Embed(entries, 64, rngs=nnx.Rngs(0))
    x = row(64, jnp.float32)
    assert table.attend(x).shape == (1, 1, entries)
    assert_close(table.attend(x), table.attend(jnp.concatenate([x, x]))[:1], "sharded", "float32")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_products_are_cut_on_a_cpu_only(platform):
    """Elsewhere a product stays whole: there cutting gains nothing, and would tear a sharded matrix's shards."""
    layer, table = Linear(256, 384, rngs=nnx.Rngs(0)), Embed(384, 256, rngs=nnx.Rngs(0))
    both = jax.jit(lambda x: (layer(x), table.attend(x)))
    text = jax.export.export(both, platforms=[platform])(row(256, jnp.float32)).mlir_module()
    assert [bool(re.search(cut, text)) for cut in ("tensor<4x64x384x", "tensor<4x96x256x")] == 2 * [platform == "cpu"]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_loop_writes_its_cache_in_place(batch):
    """The loop's values are those of steps one by one; with one row, its program copies no cache."""
    slots, heads, size = 48, 3, 8
    shape = (batch, heads, slots, size)
    query, news = jax.random.normal(jax.random.key(0), (2, batch, heads, 1, size))

    def step(state):
        position, cache, x = state
        cache = cache.write(KeyValues(x, 2 * x + news), position)
        weights = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", x, cache.key), axis=-1)
        return position + 1, cache, jnp.tanh(jnp.einsum("bhqk,bhkd->bhqd", weights, cache.value))

    state = (jnp.int32(0), KeyValues(jnp.zeros(shape), jnp.zeros(shape)), query)
    run = jax.jit(lambda state: while_loop(lambda s: s[0] < 20, step, state))
    expected = state
    for _ in range(20):
        expected = step(expected)
    jax.tree.map(lambda a, b: assert_close(a, b, "sharded", "float32"), run(state), expected)
    if batch == 1:
        text = run.lower(state).compile().as_text()
        copies = re.findall(rf"f32\[(?:1,)?{heads},{slots},{size}\]\S* copy\(", text)
        outside = 2 * 2  # of the arguments, which are not the loop's to write to, and of the results
        assert len(copies) <= outside, copies
