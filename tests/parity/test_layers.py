"""The shared layers against PyTorch's, in float64, over the geometries that papers use."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from audiozoo import layers
from audiozoo.layers.losses import cross_entropy
from tests.parity import harness
from weights_conversion.rules import Rule, Table, conv1d, conv_transpose1d


def table(operation) -> Table:
    return Table((Rule("weight", "kernel", operation), Rule("bias", "bias")))


def signal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        (10, 5, 0, 1, 1),
        (3, 2, 1, 1, 1),
        (3, 1, 1, 1, 1),
        (3, 1, 5, 5, 1),
        (4, 1, 2, 1, 3),
        (1, 1, 0, 1, 1),
        (7, 3, 2, 2, 6),
    ],
)
def test_conv1d(kernel, stride, padding, dilation, groups):
    theirs = harness.randomise(
        torch.nn.Conv1d(6, 12, kernel, stride, padding, dilation=dilation, groups=groups), seed=kernel
    )
    ours = layers.Conv1d(
        6,
        12,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    harness.port(theirs, ours, table(conv1d))
    x = signal(2, 41, 6)
    with torch.no_grad():
        expected = theirs(torch.tensor(x).mT).mT
    harness.assert_close(ours(jnp.asarray(x)), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "dilation", "groups"),
    [
        (16, 8, 4, 0, 1, 1),
        (4, 2, 1, 0, 1, 1),
        (11, 5, 3, 0, 1, 1),
        (3, 2, 0, 1, 1, 1),
        (8, 4, 2, 3, 1, 2),
        (5, 1, 2, 0, 2, 3),
    ],
)
def test_conv_transpose1d(kernel, stride, padding, output_padding, dilation, groups):
    theirs = harness.randomise(
        torch.nn.ConvTranspose1d(6, 12, kernel, stride, padding, output_padding, groups, dilation=dilation), seed=kernel
    )
    ours = layers.ConvTranspose1d(
        6,
        12,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    harness.port(theirs, ours, table(conv_transpose1d))
    x = signal(2, 9, 6)
    with torch.no_grad():
        expected = theirs(torch.tensor(x).mT).mT
    harness.assert_close(ours(jnp.asarray(x)), expected)


def test_norms():
    x = signal(2, 7, 12)
    rules = Table((Rule("weight", "scale"), Rule("bias", "bias")))
    theirs = harness.randomise(torch.nn.LayerNorm(12))
    ours = harness.port(theirs, layers.LayerNorm(12, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), rules)
    with torch.no_grad():
        harness.assert_close(ours(jnp.asarray(x)), theirs(torch.tensor(x)), name="LayerNorm")
        theirs = harness.randomise(torch.nn.GroupNorm(3, 12))
        ours = harness.port(theirs, layers.GroupNorm(12, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), rules)
        harness.assert_close(ours(jnp.asarray(x)), theirs(torch.tensor(x).mT).mT, name="GroupNorm")


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    q, k, v, bias = (
        signal(2, 3, 5, 4),
        signal(2, 3, 7, 4, seed=1),
        signal(2, 3, 7, 4, seed=2),
        signal(2, 3, 5, 7, seed=3),
    )
    mask = np.random.default_rng(4).random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    added = torch.tensor(np.where(mask, bias, -np.inf) if masked else bias)
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), added, scale=0.3)
    output, weights = layers.attend(
        *map(jnp.asarray, (q, k, v)), scale=0.3, bias=jnp.asarray(bias), mask=jnp.asarray(mask) if masked else None
    )
    harness.assert_close(output, expected)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("queries", [1, 4])
def test_beams_share_keys(queries):
    """Three beams of each of two examples, against keys that are kept once, equal keys repeated for every beam."""
    q, k, v = signal(6, 2, queries, 4), signal(2, 2, 7, 4, seed=1), signal(2, 2, 7, 4, seed=2)
    mask = np.random.default_rng(3).random((6, 1, queries, 7)) < 0.7
    mask[..., 0] = True
    shared = layers.attend(*map(jnp.asarray, (q, k, v)), scale=0.5, mask=jnp.asarray(mask))
    repeated = layers.attend(
        jnp.asarray(q), jnp.repeat(k, 3, axis=0), jnp.repeat(v, 3, axis=0), scale=0.5, mask=jnp.asarray(mask)
    )
    for ours, expected, name in zip(shared, repeated, ("output", "weights"), strict=True):
        harness.assert_close(ours, np.asarray(expected), name=name)


@pytest.mark.parametrize(
    "name", sorted(set(layers.ACTIVATIONS) - {"linear", "gelu_python", "swish", "elu", "tanh", "sigmoid"})
)
def test_activations(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101)
    harness.assert_close(layers.activation(name)(jnp.asarray(x)), ACT2FN[name](torch.tensor(x)), name=name)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="no activation named 'gleu'"):
        layers.activation("gleu")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    logits, labels = signal(2, 5, 11), np.random.default_rng(1).integers(0, 11, (2, 5))
    labels[0, 3:] = -100
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).flatten(0, 1), torch.tensor(labels).flatten(), label_smoothing=smoothing
    )
    harness.assert_close(cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing), expected)


def test_cross_entropy_of_no_label_at_all_is_zero():
    assert float(cross_entropy(jnp.ones((1, 2, 3)), jnp.full((1, 2), -100))) == 0.0
