"""Batch normalisation with PyTorch's conventions, over the last axis, and with items left out by a mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from audiozoo.layers.basic import at_least_float32


def writable(state: Any) -> Any:
    """The same variables as new ones of the current trace, which a model merged from them may move."""
    return jax.tree.map(lambda x: x, state)


class BatchNorm(nnx.Module):
    r"""$y = (x - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot \gamma + \beta$ for each channel (arXiv 1502.03167).

    In inference $\mu$ and $\sigma^2$ are the running statistics. In training they are those of the batch, biased; the
    running ones move a step of `momentum` towards them, with the unbiased variance, and are read from the model after
    the call: `nnx.state(model, nnx.BatchStat)`. Inside `jax.grad` a model is merged with `writable(statistics)`.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        wide = jnp.promote_types(param_dtype, jnp.float32)  # small steps towards a large number would round to none
        self.mean = nnx.BatchStat(jnp.zeros((features,), wide))
        self.var = nnx.BatchStat(jnp.ones((features,), wide))
        self.epsilon, self.momentum, self.dtype = epsilon, momentum, dtype

    def __call__(
        self, x: Float[Array, "*shape channels"], train: bool = False, mask: Bool[Array, " batch"] | None = None
    ) -> Float[Array, "*shape channels"]:
        """Normalise over all axes but the last.

        Args:
            x: values, the batch first.
            train: use the batch's statistics, and move the running ones.
            mask: items that count in the batch's statistics; the others are normalised with them all the same. With
                none left the running statistics stay.
        """
        mean, var = self.mean[...], self.var[...]
        if train:
            wide = at_least_float32(x)
            axes = tuple(range(x.ndim - 1))
            weight = jnp.ones(x.shape[:1], wide.dtype) if mask is None else mask.astype(wide.dtype)
            weight = weight.reshape(-1, *(1,) * (x.ndim - 1))
            count = weight.sum() * (x[0].size // x.shape[-1])
            batch_mean = (wide * weight).sum(axes) / jnp.maximum(count, 1)
            batch_var = (jnp.square(wide - batch_mean) * weight).sum(axes) / jnp.maximum(count, 1)
            unbiased = batch_var * count / jnp.maximum(count - 1, 1)
            step = jnp.where(count > 0, self.momentum, 0.0)
            moved = ((1 - step) * mean + step * batch_mean, (1 - step) * var + step * unbiased)
            self.mean[...], self.var[...] = (jax.lax.stop_gradient(m).astype(mean.dtype) for m in moved)
            mean, var = batch_mean, batch_var
        scale, bias = self.scale[...], self.bias[...]
        dtype = jnp.result_type(x, scale, bias) if self.dtype is None else self.dtype
        x, mean, var, scale, bias = map(at_least_float32, (x, mean, var, scale, bias))
        return ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(dtype)
