"""FlashAttention: the TPU's kernel, run by Pallas' interpreter, against all scores at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiozoo import sharding
from audiozoo.layers import Causal, attend, attend_without_weights, fused_attention
from audiozoo.layers.fused import kernel_for
from tests import processes
from tests.tolerances import assert_close


def interpret(patch):
    """Kernels become programs of loops."""
    from jax.experimental import pallas

    patch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))


@pytest.fixture
def interpreted(monkeypatch):
    interpret(monkeypatch)


def arrays(batch, heads, queries, keys, head_dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(queries)
    shapes = [(batch, heads, length, head_dim) for length in (queries, keys, keys)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def kernel(query, key, value, mask, mesh=None):
    """Output by the kernel that `attend_without_weights` would run on a TPU."""
    causal = isinstance(mask, Causal)
    seen = mask.seen if causal else mask
    with fused_attention(mesh):
        run = kernel_for(query, key, value, keys_alone=True)
    return run(query, key, value, None if seen is None else seen[:, 0, 0], scale=0.25, causal=causal)


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "masked"),
    [(300, 300, True, False), (300, 300, True, True), (260, 530, False, False), (130, 700, False, True)],
)
def test_values_and_gradients_agree(queries, keys, causal, masked, interpreted):
    """Lengths that no block divides; keys that are not to be seen."""
    given = arrays(2, 1, queries, keys)
    seen = None
    if masked:
        seen = jnp.arange(keys)[None, None, None] < jnp.asarray([keys - 37, keys])[:, None, None, None]
    mask = Causal(seen) if causal else seen
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(given[0].shape), jnp.float32)

    def whole(*x):
        return attend(*x, scale=0.25, mask=mask)[0]

    def fused(*x):
        return kernel(*x, mask)

    for ours, theirs in zip(
        (fused(*given), *jax.grad(lambda *x: (fused(*x) * weight).sum(), (0, 1, 2))(*given)),
        (whole(*given), *jax.grad(lambda *x: (whole(*x) * weight).sum(), (0, 1, 2))(*given)),
        strict=True,
    ):
        assert_close(ours, theirs, "output")


def on_eight_devices():
    """Each has a row of four and two heads of four."""
    interpret(pytest.MonkeyPatch())
    mesh = sharding.parse_mesh("data=2,fsdp=2,tensor=2")
    given = arrays(4, 4, 256, 256)
    mask = Causal((jnp.arange(256)[None] < jnp.asarray([256, 200, 131, 255])[:, None])[:, None, None])
    output = jax.jit(lambda *x: kernel(*x, mask, mesh))(*given)
    assert output.sharding.shard_shape(output.shape) == (1, 2, 256, 16)
    assert_close(output, attend(*given, scale=0.25, mask=mask)[0], "output")
    with fused_attention(mesh):
        assert kernel_for(*arrays(2, 2, 256, 256), keys_alone=True) is None  # two rows do not divide into four


def test_each_device_runs_the_kernel_on_its_rows_and_heads():
    processes.output("-c", "from tests.layers import test_fused_attention as t; t.on_eight_devices()")


def test_who_gets_the_kernel():
    """Whoever asks for it, with long inputs in float32 or bfloat16 and a mask of keys; all others as before."""
    given = arrays(2, 2, 256, 256)
    assert kernel_for(*given, keys_alone=True) is None
    with fused_attention():
        assert kernel_for(*given, keys_alone=True) is not None
        assert kernel_for(*arrays(2, 2, 256, 256, dtype=jnp.bfloat16), keys_alone=True) is not None
        assert kernel_for(*given, keys_alone=False) is None
        assert kernel_for(*arrays(2, 2, 1, 256), keys_alone=True) is None
        assert kernel_for(*arrays(2, 2, 256, 256, dtype=jnp.float16), keys_alone=True) is None
        assert kernel_for(*given[:2], given[2][..., :8], keys_alone=True) is None
    assert kernel_for(*given, keys_alone=True) is None


def test_on_a_cpu_nothing_changes():
    given = arrays(2, 2, 256, 256)
    mask = Causal(jnp.ones((2, 1, 1, 256), bool).at[0, ..., 200:].set(False))
    plain = jax.jit(lambda *x: attend_without_weights(*x, scale=0.25, mask=mask))(*given)
    with fused_attention():
        fused = jax.jit(lambda *x: attend_without_weights(*x, scale=0.25, mask=mask))(*given)
    np.testing.assert_array_equal(plain, fused)
    assert_close(plain, attend(*given, scale=0.25, mask=mask)[0], "output")
