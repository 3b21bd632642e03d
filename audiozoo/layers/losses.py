"""Losses that many papers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED_LABEL = -100


def cross_entropy(
    logits: Float[Array, "*positions classes"], labels: Int[Array, "*positions"], *, label_smoothing: float = 0.0
) -> Float[Array, ""]:
    r"""Mean of $-\log\operatorname{softmax}(\text{logits})_\text{label}$ over the positions whose label is not -100.

    With `label_smoothing` $\epsilon$ the target is $(1-\epsilon)$ on the label plus $\epsilon/C$ on each of the classes.
    With no label left the loss is 0, where PyTorch gives NaN.
    """
    kept = labels != IGNORED_LABEL
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.where(kept, labels, 0)[..., None], axis=-1)[..., 0]
    losses = log_normaliser - chosen
    if label_smoothing:
        uniform = log_normaliser - logits.mean(axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    return jnp.where(kept, losses, 0.0).sum() / jnp.maximum(kept.sum(), 1)
