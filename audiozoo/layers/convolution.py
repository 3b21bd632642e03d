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

from audiozoo.layers.basic import promote, spread, sum_of_products

_DIMENSIONS = ("NWC", "WIO", "NWC")


def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], dilation: int, groups: int
) -> jax.Array:
    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride,),
            (padding,),
            rhs_dilation=(dilation,),
            dimension_numbers=_DIMENSIONS,
            feature_group_count=groups,
        )

    def as_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _as_products(x, kernel, stride, padding, dilation)

    def by_tap(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _by_tap(x, kernel, stride, padding, dilation)

    if _depthwise(kernel, groups):
        return jax.lax.platform_dependent(x, kernel, cpu=by_tap, default=whole)
    if x.dtype.itemsize > 2 or groups > 1 or len(kernel) > MOST_TAPS * stride:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=as_products, default=whole)


def _depthwise(kernel: jax.Array, groups: int) -> bool:
    """Whether each channel is convolved with taps of its own."""
    return kernel.shape[1] == 1 < groups == kernel.shape[2]


def _by_tap(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], dilation: int
) -> Float[Array, "batch frames channels"]:
    r"""A depthwise convolution as it is written, for a CPU: $y_{t,c} = \sum_k W_{k,c}\, x_{ts - p + kd,\,c}$.

    XLA's CPU compiler has no fast program for as many groups as channels: 31 taps of 1,024 channels over eight times
    250 frames, a Conformer block's, take it 150 ms, and 15 ms as this sum.
    """
    taps, time = len(kernel), x.shape[1] + sum(padding)
    frames = (time - (taps - 1) * dilation - 1) // stride + 1
    if frames < 1:
        return jnp.zeros((x.shape[0], 0, x.shape[-1]), x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*padding, 0), (0, 0, 0)))
    heard = (padded[:, k * dilation : k * dilation + (frames - 1) * stride + 1 : stride] for k in range(taps))
    return sum(w * h.astype(wide) for w, h in zip(kernel[:, 0].astype(wide), heard, strict=True)).astype(x.dtype)


MOST_TAPS = 16  # the products of a convolution in few bits, each of which has a program of its own


def _as_products(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], dilation: int
) -> Float[Array, "batch frames outputs"]:
    r"""A convolution in few bits, for a CPU: $y_n = \sum_j X_{n + j} W_j$ with blocks $X$ of $s$ frames side by side.

    XLA's CPU compiler widens its factors to float32; those of products it multiplies as they are (`basic.matmul`). In
    bfloat16 the second layer of wav2vec 2.0's encoder takes 41 ms so, and 101 ms as a convolution. With dilation, and
    of a single channel, blocks are of one frame.
    """
    taps, inputs, outputs = kernel.shape
    batch, time = x.shape[0], x.shape[1] + sum(padding)
    frames = (time - (taps - 1) * dilation - 1) // stride + 1
    if frames < 1:
        return jnp.zeros((batch, 0, outputs), x.dtype)
    x = jnp.pad(x, ((0, 0), padding, (0, 0)))
    if dilation == 1 and inputs > 1:
        count = -(-taps // stride)
        length = (frames + count - 1) * stride  # more or less than there is: what no tap meets
        x = x[:, :length]
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0))).reshape(batch, -1, stride * inputs)
        kernels = [kernel[j : j + stride].reshape(-1, outputs) for j in range(0, taps, stride)]
        blocks = [x[:, j : j + frames, : len(w)] for j, w in enumerate(kernels)]
    else:
        starts = range(0, taps * dilation, dilation)
        kernels, blocks = list(kernel), [x[:, k : k + (frames - 1) * stride + 1 : stride] for k in starts]
    return sum_of_products(blocks, kernels)


def _grouped_forward(x: jax.Array, kernel: jax.Array, *geometry: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, *geometry), (x, kernel)


def _grouped_backward(
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    groups: int,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    r"""The gradients of a convolution in groups; on a CPU, that of the kernel group by group.

    $\partial L / \partial W_{k,i,o} = \sum_{b,t} x_{b,\,ts - p + kd,\,i}\, (\partial L / \partial y)_{b,t,o}$

    is itself a convolution, in which the batch takes the place of the channels. XLA's CPU compiler has no fast program
    for it in groups: of wav2vec 2.0's positional convolution it takes half a minute for what is half a second here.
    """
    x, kernel = saved
    taps, inputs, outputs = kernel.shape
    batch, frames = dy.shape[:2]

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _convolve(x, kernel, stride, padding, dilation, groups)

    def by_tap(x: jax.Array, dy: jax.Array) -> jax.Array:
        before, after = padding
        x = jnp.pad(x, ((0, 0), (before, after), (0, 0)))
        dy = dy.reshape(batch, frames, groups, outputs // groups)

        def tap(k: jax.Array) -> jax.Array:
            heard = jax.lax.dynamic_slice_in_dim(x, k * dilation, (frames - 1) * stride + 1, axis=1)[:, ::stride]
            return jnp.einsum("btgi,btgo->igo", heard.reshape(batch, frames, groups, inputs), dy)

        return jax.lax.map(tap, jnp.arange(taps)).reshape(kernel.shape)

    def by_group(x: jax.Array, dy: jax.Array) -> jax.Array:
        needed = (taps - 1) * dilation + (frames - 1) * stride + 1
        ends = (padding[0], max(needed - x.shape[1] - padding[0], 0))
        # Padded here: of a convolution that pads and has a kernel as long as its input, XLA exchanges the two, and then
        # has no fast program for it (4 s instead of 0.1 s).
        x = jnp.pad(x, ((0, 0), ends, (0, 0)))[:, :needed]

        def group(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jax.lax.conv_general_dilated(
                *pair, (dilation,), "VALID", rhs_dilation=(stride,), dimension_numbers=_DIMENSIONS
            )

        parts = (
            x.reshape(batch, -1, groups, inputs).transpose(2, 3, 1, 0),
            dy.reshape(batch, frames, groups, outputs // groups).transpose(2, 1, 0, 3),
        )
        # (groups, inputs, taps, outputs of a group)
        return jax.lax.map(group, parts).transpose(2, 1, 0, 3).reshape(kernel.shape)

    if frames and stride == 1 and _depthwise(kernel, groups):
        # With the taps backwards. JAX derives a sum of padded products, which takes XLA five times as long.
        ends = [(taps - 1) * dilation - p for p in padding]
        dx = _convolve(dy, jnp.flip(kernel, 0), 1, (ends[0], ends[1]), dilation, groups)
    else:
        (dx,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(dy)
    dkernel = jax.lax.platform_dependent(
        x,
        dy,
        cpu=by_tap if inputs < 4 else by_group,
        default=lambda x, dy: jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(dy)[0],
    )
    return dx, dkernel


_grouped = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3, 4, 5))
_grouped.defvjp(_grouped_forward, _grouped_backward)


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
        x, kernel, _ = promote(x, self.weight(), bias, dtype=self.dtype)
        convolve = _grouped if self.groups > 1 else _convolve
        y = convolve(x, kernel, self.stride, self.padding, self.dilation, self.groups)
        return y if bias is None else y + spread(bias, y)


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
        x, kernel, _ = promote(x, self.weight(), bias, dtype=self.dtype)
        y = self._by_phases(x, kernel) if self.groups == self.dilation == 1 else self._dilated(x, kernel)
        return y if bias is None else y + spread(bias, y)

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
        y = _convolve(x, jnp.flip(kernel, 0), 1, (0, 0), 1, 1)
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
