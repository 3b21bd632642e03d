r"""One-dimensional convolutions over `(batch, time, channels)` with PyTorch's geometry.

Kernels are `(time, in / groups, out)`, the layout that XLA runs fastest on a CPU. Padding is symmetric and counted in
frames, as in PyTorch; "same" is never implied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from audiozoo.layers.basic import promote

_DIMENSIONS = ("NWC", "WIO", "NWC")


class Conv1d(nnx.Module):
    r"""$y_{t,o} = b_o + \sum_{k,i} W_{k,i,o}\, x_{ts - p + kd,\,i}$ with stride $s$, padding $p$ and dilation $d$.

    Frames out: $\lfloor (T + 2p - d(K-1) - 1)/s \rfloor + 1$.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = (kernel_size * in_features // groups) ** -0.5
        shape = (kernel_size, in_features // groups, out_features)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))
        self.bias = (
            nnx.Param(jax.random.uniform(rngs.params(), (out_features,), param_dtype, -bound, bound))
            if use_bias
            else None
        )
        self.stride, self.dilation, self.groups, self.dtype = stride, dilation, groups, dtype
        self.padding = (padding, padding) if isinstance(padding, int) else padding

    def weight(self) -> Float[Array, "time inputs outputs"]:
        """The kernel that is applied; a reparametrised layer computes it."""
        return self.kernel[...]

    def __call__(self, x: Float[Array, "batch time channels"]) -> Float[Array, "batch frames features"]:
        """Convolve along time."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = promote(x, self.weight(), bias, dtype=self.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,),
            (self.padding,),
            rhs_dilation=(self.dilation,),
            dimension_numbers=_DIMENSIONS,
            feature_group_count=self.groups,
        )
        return y if bias is None else y + bias


class ConvTranspose1d(nnx.Module):
    r"""The transpose of a strided convolution, as PyTorch's `ConvTranspose1d`.

    Frames out: $(T - 1)s - 2p + d(K-1) + o + 1$ with output padding $o$. The kernel is `(time, in, out / groups)`, not
    flipped; the flip is part of the computation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        output_padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = (kernel_size * out_features // groups) ** -0.5
        shape = (kernel_size, in_features, out_features // groups)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))
        self.bias = (
            nnx.Param(jax.random.uniform(rngs.params(), (out_features,), param_dtype, -bound, bound))
            if use_bias
            else None
        )
        self.stride, self.dilation, self.groups, self.dtype = stride, dilation, groups, dtype
        reach = dilation * (kernel_size - 1) - padding
        self.padding = (reach, reach + output_padding)

    def weight(self) -> Float[Array, "time inputs outputs"]:
        """The kernel that is applied; a reparametrised layer computes it."""
        return self.kernel[...]

    def __call__(self, x: Float[Array, "batch frames channels"]) -> Float[Array, "batch time features"]:
        """Spread each frame over `stride` times as many."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = promote(x, self.weight(), bias, dtype=self.dtype)
        y = self._by_phases(x, kernel) if self.groups == self.dilation == 1 else self._dilated(x, kernel)
        return y if bias is None else y + bias

    def _by_phases(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        r"""Each of a frame's $s$ samples as a channel: $y_{ns + q} = \sum_j x_{n-j} W_{js + q}$.

        An ordinary convolution of $\lceil K/s \rceil$ taps, none of which meets the zeros between the frames.
        """
        size, features, width = kernel.shape
        stride, (reach, more) = self.stride, self.padding
        taps, cut = -(-size // stride), size - 1 - reach
        length = (x.shape[1] - 1) * stride + 1 + reach + more - (size - 1)
        kernel = jnp.pad(kernel, ((0, taps * stride - size), (0, 0), (0, 0)))
        kernel = kernel.reshape(taps, stride, features, width).swapaxes(1, 2).reshape(taps, features, stride * width)
        after = max(0, -(-(cut + length) // stride) - x.shape[1])
        # Padded here, not by the convolution: its gradient for the kernel takes XLA on a CPU twenty times as long then.
        x = jnp.pad(x, ((0, 0), (taps - 1, after), (0, 0)))
        y = jax.lax.conv_general_dilated(x, jnp.flip(kernel, 0), (1,), ((0, 0),), dimension_numbers=_DIMENSIONS)
        return y.reshape(x.shape[0], -1, width)[:, cut : cut + length]

    def _dilated(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """A convolution over the frames with zeros between them."""
        if self.groups > 1:
            # (K, in, out/g) -> (K, in/g, out): the forward convolution wants its groups on the output axis.
            size, features, width = kernel.shape
            kernel = kernel.reshape(size, self.groups, features // self.groups, width)
            kernel = kernel.swapaxes(1, 2).reshape(size, features // self.groups, self.groups * width)
        return jax.lax.conv_general_dilated(
            x,
            jnp.flip(kernel, 0),
            (1,),
            (self.padding,),
            lhs_dilation=(self.stride,),
            rhs_dilation=(self.dilation,),
            dimension_numbers=_DIMENSIONS,
            feature_group_count=self.groups,
        )
