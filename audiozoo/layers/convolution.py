r"""One-dimensional convolutions over `(batch, time, channels)` with PyTorch's geometry.

Kernels are `(time, in / groups, out)`, the layout that XLA runs fastest on a CPU. Padding is symmetric and counted in
frames, as in PyTorch; "same" is never implied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from audiozoo.layers.basic import promote, spread, sum_of_products

_DIMENSIONS = ("NWC", "WIO", "NWC")


def _whole(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], dilation: int, groups: int
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        (padding,),
        rhs_dilation=(dilation,),
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


def _program(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], dilation: int, groups: int
) -> jax.Array:
    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _whole(x, kernel, stride, padding, dilation, groups)

    def on_a_cpu(program: Callable[..., jax.Array]) -> jax.Array:
        def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return program(x, kernel, frames, stride, padding, dilation)

        return jax.lax.platform_dependent(x, kernel, cpu=ours, default=whole)

    frames = (x.shape[1] + sum(padding) - (len(kernel) - 1) * dilation - 1) // stride + 1
    if frames < 1:
        return jnp.zeros((x.shape[0], 0, kernel.shape[2]), x.dtype)
    if _depthwise(kernel, groups):
        return on_a_cpu(_by_tap)
    if _is_large(x, kernel, stride, groups):
        return on_a_cpu(_in_fewer_products)
    if x.dtype.itemsize > 2 or groups > 1 or len(kernel) > MOST_TAPS * stride:
        return whole(x, kernel)
    return on_a_cpu(_as_products)


def _depthwise(kernel: jax.Array, groups: int) -> bool:
    """Whether each channel is convolved with taps of its own."""
    return kernel.shape[1] == 1 < groups == kernel.shape[2]


def _by_tap(
    x: jax.Array, kernel: jax.Array, frames: int, stride: int, padding: tuple[int, int], dilation: int
) -> Float[Array, "batch frames channels"]:
    r"""A depthwise convolution as it is written, for a CPU: $y_{t,c} = \sum_k W_{k,c}\, x_{ts - p + kd,\,c}$.

    XLA's CPU compiler has no fast program for as many groups as channels: 31 taps of 1,024 channels over eight times
    250 frames, a Conformer block's, take it 150 ms, and 15 ms as this sum.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*padding, 0), (0, 0, 0)))
    heard = (padded[:, k * dilation : k * dilation + (frames - 1) * stride + 1 : stride] for k in range(len(kernel)))
    return sum(w * h.astype(wide) for w, h in zip(kernel[:, 0].astype(wide), heard, strict=True)).astype(x.dtype)


def _is_large(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> bool:
    """Whether products are so much of a convolution's time that half of them repay sums over both factors, on a CPU."""
    (batch, time), (taps, inputs, outputs) = x.shape[:2], kernel.shape
    plain = stride == groups == 1 and x.dtype.itemsize > 2
    return (
        plain and taps % BLOCK in (3, 0) and taps * min(inputs, outputs) >= 352 and time >= 64 and batch * time >= 512
    )


BLOCK = 4  # frames of an output that are computed together


def _in_fewer_products(
    x: jax.Array, kernel: jax.Array, frames: int, stride: int, padding: tuple[int, int], dilation: int
) -> Float[Array, "batch frames outputs"]:
    r"""A convolution with half the multiplications, for a CPU (Winograd, Arithmetic Complexity of Computations, 1980).

    Four outputs of four taps, $y_j = \sum_k x_{j+k} W_k$, are the transpose of a product of two polynomials, which its
    values at seven points determine (`_points`): $y = A^T \left[(G W) \odot (B^T x)\right]$, with 7 products for 16.
    Each of the seven is here a convolution over blocks of four frames, with a tap for every four of $W$. In float32 the
    outputs are some four times as far from exact ones as those of `conv_general_dilated`.
    """
    taps, inputs, outputs = kernel.shape
    batch, time = x.shape[:2]
    part = min(taps, BLOCK)
    transposed, evaluate, interpolate = _points(part)
    parts, blocks = -(-taps // part), -(-frames // (BLOCK * dilation))

    length = (blocks + parts) * BLOCK * dilation
    edges = ((0, 0, 0), (padding[0], length - time - padding[0], 0), (0, 0, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
    x = x.reshape(batch, -1, dilation, inputs).swapaxes(1, 2)  # frames that a dilated kernel meets are neighbours
    x = x.reshape(batch * dilation, -1, BLOCK * inputs)
    now, after = jnp.split(x[:, :-1], BLOCK, axis=-1), jnp.split(x[:, 1:], BLOCK, axis=-1)
    tile = now + after[: part - 1]
    strided = [kernel[k::part] for k in range(part)]
    kernels = [jnp.pad(w, ((0, parts - len(w)), (0, 0), (0, 0))) for w in strided]

    products = [
        _whole(_weighted(b, tile), _weighted(g, kernels), 1, (0, 0), 1, 1)
        for b, g in zip(interpolate, evaluate, strict=True)
    ]
    weights = np.array(transposed, x.dtype).T[:, :, None]
    y = sum(a * product[:, :, None] for a, product in zip(weights, products, strict=True))
    y = y.reshape(batch, dilation, blocks * BLOCK, outputs).swapaxes(1, 2)
    return y.reshape(batch, -1, outputs)[:, :frames]


def _weighted(weights: Sequence[float], terms: Sequence[jax.Array]) -> jax.Array:
    """$\\sum_i w_i t_i$ of the terms whose weight is not zero."""
    first, *others = [t if w == 1 else w * t for w, t in zip(weights, terms, strict=True) if w]
    return sum(others, first)


@functools.cache
def _points(taps: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    r"""$A^T$, $G$ and $B^T$ of four outputs of so many taps (Toom 1963; Cook 1966).

    A row of $G$ holds the powers of a point, as far as there are taps, and one of $A$ as far as there are outputs; the
    last point is infinity, where a polynomial is its highest coefficient. $B$ inverts the powers of all points:
    $B = V^{-1}$, in parts of 180. The others are 0, ±1, -2, 1/2 and -1/2, whose rounding is least (Barabasz et al.,
    Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, 2020).
    """
    count = BLOCK + taps - 1

    def values(coefficients: int) -> np.ndarray:
        finite = np.vander(np.array([0, 1, -1, -2, 0.5, -0.5][: count - 1]), coefficients, increasing=True)
        return np.concatenate([finite, np.eye(coefficients)[-1:]])

    inverse = np.linalg.inv(values(count))
    return values(BLOCK).T.tolist(), values(taps).tolist(), (np.rint(180 * inverse.T) / 180).tolist()


MOST_TAPS = 16  # the products of a convolution in few bits, each of which has a program of its own


def _as_products(
    x: jax.Array, kernel: jax.Array, frames: int, stride: int, padding: tuple[int, int], dilation: int
) -> Float[Array, "batch frames outputs"]:
    r"""A convolution in few bits, for a CPU: $y_n = \sum_j X_{n + j} W_j$ with blocks $X$ of $s$ frames side by side.

    XLA's CPU compiler widens its factors to float32; those of products it multiplies as they are (`basic.matmul`). In
    bfloat16 the second layer of wav2vec 2.0's encoder takes 41 ms so, and 101 ms as a convolution. With dilation, and
    of a single channel, blocks are of one frame.
    """
    taps, inputs, outputs = kernel.shape
    batch = len(x)
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


def _forward(x: jax.Array, kernel: jax.Array, *geometry: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _program(x, kernel, *geometry), (x, kernel)


def _backward(
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    groups: int,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    r"""The gradients of a convolution; on a CPU, that of a kernel in groups group by group.

    $\partial L / \partial W_{k,i,o} = \sum_{b,t} x_{b,\,ts - p + kd,\,i}\, (\partial L / \partial y)_{b,t,o}$

    is itself a convolution, in which the batch takes the place of the channels. XLA's CPU compiler has no fast program
    for it in groups: of wav2vec 2.0's positional convolution it takes half a minute for what is half a second here.
    """
    x, kernel = saved
    taps, inputs, outputs = kernel.shape
    batch, frames = dy.shape[:2]

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _whole(x, kernel, stride, padding, dilation, groups)

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

    def derived(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: whole(x, kernel), kernel)(dy)[0]

    if frames and stride == 1 and (groups == 1 or _depthwise(kernel, groups)):
        # With the taps backwards. Of sums over taps JAX derives padded ones, which take XLA five times as long.
        before, after = ((taps - 1) * dilation - p for p in padding)
        turned = jnp.flip(kernel, 0) if groups > 1 else jnp.flip(kernel, 0).swapaxes(1, 2)
        dx = _program(dy, turned, 1, (before, after), dilation, groups)
    else:
        (dx,) = jax.linear_transpose(lambda x: whole(x, kernel), x)(dy)
    if groups == 1:
        return dx, derived(x, dy)
    return dx, jax.lax.platform_dependent(x, dy, cpu=by_tap if inputs < 4 else by_group, default=derived)


_with_gradients = jax.custom_vjp(_program, nondiff_argnums=(2, 3, 4, 5))
_with_gradients.defvjp(_forward, _backward)


def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], dilation: int, groups: int
) -> jax.Array:
    convolve = _with_gradients if groups > 1 or _is_large(x, kernel, stride, groups) else _program
    return convolve(x, kernel, stride, padding, dilation, groups)


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
        y = _convolve(x, kernel, self.stride, self.padding, self.dilation, self.groups)
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
