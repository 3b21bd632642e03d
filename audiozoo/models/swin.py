r"""# Swin Transformer: Hierarchical Vision Transformer using Shifted Windows

Ze Liu, Yutong Lin, Yue Cao, Han Hu, Yixuan Wei, Zheng Zhang, Stephen Lin, Baining Guo, 2021, arXiv 2103.14030.

Self-attention inside small windows, so that its cost grows with the number of patches and not with its square. Every
second block shifts the windows by half their size, which connects neighbours; between stages, 2 × 2 patches are merged
into one of twice the width. Here it is the body of HTSAT, CLAP's audio encoder.

    patches (rows, columns, d) ── depth × block ──> ── merge 2 × 2 ──> (rows / 2, columns / 2, 2 d)   one stage

    block:  x + W-MSA(LN(x)), then + MLP(LN(·));   every second one: roll by -M/2, SW-MSA with a mask, roll back

| paper | here |
| --- | --- |
| §3.2, windows of $M \times M$ patches | `window_partition`, `window_reverse` |
| §3.2 and Figure 4, cyclic shift and its mask | `shift_mask`, `SwinBlock` |
| §3.2, Eq. 4, attention with relative position bias | `relative_position_index`, `WindowAttention` |
| §3.2, Eq. 3, two successive blocks | `SwinBlock`, `SwinMLP` |
| §3.1, patch merging | `PatchMerging` |
| §3.1 and Figure 3, stage | `SwinStage` |

A window that is not smaller than the grid is the whole grid, and is not shifted.

Checkpoints: the audio towers of CLAP; this file has no classifier for images.

    import audiozoo
    from flax import nnx
    from audiozoo.models.swin import SwinStage
    stage = audiozoo.jit(SwinStage(96, (64, 64), depth=2, heads=4, window=8, rngs=nnx.Rngs(0)))
    merged, patches, _ = stage(x)  # (batch, 64, 64, 96) -> (batch, 32, 32, 192), and before merging
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.layers import Dropout, LayerNorm, Linear, activation, attend, merge_heads, split_heads
from audiozoo.layers.attention import check_heads
from audiozoo.layers.basic import at_least_float32

MASKED = -100.0  # added to the scores of patches that are neighbours only by the cyclic shift
_NORMAL = nnx.initializers.truncated_normal(0.02)


def window_partition(
    x: Float[Array, "batch rows columns channels"], window: int
) -> Float[Array, "windows patches channels"]:
    """§3.2: the windows of every item, row by row; the patches of a window row by row as well."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // window, window, columns // window, window, channels)
    return x.swapaxes(2, 3).reshape(-1, window * window, channels)


def window_reverse(
    windows: Float[Array, "windows patches channels"], window: int, rows: int, columns: int
) -> Float[Array, "batch rows columns channels"]:
    """The inverse of `window_partition`."""
    channels = windows.shape[-1]
    x = windows.reshape(-1, rows // window, columns // window, window, window, channels)
    return x.swapaxes(2, 3).reshape(-1, rows, columns, channels)


def relative_position_index(window: int) -> Int[np.ndarray, "patches patches"]:
    r"""§3.2: where in $\hat B$ stands the bias of each pair of patches of a window.

    For patches at $(r, c)$ and $(r', c')$ it is row $(r - r' + M - 1)(2M - 1) + (c - c' + M - 1)$.
    """
    row, column = (axis.reshape(-1) for axis in np.indices((window, window)))
    apart = [axis[:, None] - axis[None, :] + window - 1 for axis in (row, column)]
    return apart[0] * (2 * window - 1) + apart[1]


def shift_mask(rows: int, columns: int, window: int, shift: int) -> Float[np.ndarray, "windows patches patches"]:
    """§3.2, Figure 4: 0 between patches of a shifted window that are neighbours in the image, else `MASKED`.

    After the cyclic shift a window may hold patches of up to four regions; each axis has three, cut at `window` and at
    `shift` before its end.
    """

    def region(length: int) -> np.ndarray:
        at = np.arange(length)
        return (at >= length - window).astype(int) + (at >= length - shift)

    regions = region(rows)[:, None] * 3 + region(columns)
    regions = regions.reshape(rows // window, window, columns // window, window).swapaxes(1, 2)
    regions = regions.reshape(-1, window * window)
    return np.where(regions[:, None, :] == regions[:, :, None], 0.0, MASKED)


class WindowAttention(nnx.Module):
    r"""§3.2, Eq. 4: $\operatorname{softmax}(QK^\top / \sqrt d + B)\,V$ within each window."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_heads(dim, heads)
        kwargs: dict[str, Any] = {"kernel_init": _NORMAL, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q_proj = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.k_proj = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.v_proj = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.o_proj = Linear(dim, dim, **kwargs)
        table = _NORMAL(rngs.params(), ((2 * window - 1) ** 2, heads), param_dtype)
        self.relative_position_bias_table = nnx.Param(table)
        self.heads, self.window, self.dropout_rate = heads, window, dropout

    def __call__(
        self,
        x: Float[Array, "windows patches dim"],
        mask: Float[np.ndarray, "windows_of_one patches patches"] | None,
        dropout: Dropout,
    ) -> tuple[Float[Array, "windows patches dim"], Float[Array, "windows heads patches patches"]]:
        """Attend within windows.

        Args:
            x: windows of all items, those of an item together.
            mask: what to add to the scores of each window of one item.
            dropout: source of dropout keys.

        Returns:
            The output and the attention weights.
        """
        query, key, value = (split_heads(part(x), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        bias = self.relative_position_bias_table[...][relative_position_index(self.window)]  # (patches, patches, heads)
        bias = at_least_float32(jnp.moveaxis(bias, -1, 0)[None])
        if mask is not None:
            bias = bias + jnp.asarray(mask, bias.dtype)[:, None]
            bias = jnp.tile(bias, (x.shape[0] // mask.shape[0], 1, 1, 1))
        scale, rate = query.shape[-1] ** -0.5, self.dropout_rate
        y, weights = attend(query, key, value, scale=scale, bias=bias, dropout_rate=rate, dropout=dropout)
        return self.o_proj(merge_heads(y)), weights


class SwinMLP(nnx.Module):
    """§3.1: two linear maps with the activation between them."""

    def __init__(self, dim: int, inner: int, hidden_act: str, **kwargs: Any):
        self.fc1 = Linear(dim, inner, kernel_init=_NORMAL, **kwargs)
        self.fc2 = Linear(inner, dim, kernel_init=_NORMAL, **kwargs)
        self.hidden_act = hidden_act

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        """Each patch by itself."""
        return self.fc2(activation(self.hidden_act)(self.fc1(x)))


def drop_path(x: Float[Array, "batch ..."], rate: float, dropout: Dropout) -> Float[Array, "batch ..."]:
    """§4.1, stochastic depth (arXiv 1603.09382): drop a whole branch of an item, scaling those that stay."""
    if not rate or (key := dropout.next_key()) is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], *(1,) * (x.ndim - 1)))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class SwinBlock(nnx.Module):
    r"""§3.2, Eq. 3: $y = \text{(S)W-MSA}(\mathrm{LN}(z)) + z$, then $\mathrm{MLP}(\mathrm{LN}(y)) + y$."""

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        heads: int,
        window: int,
        *,
        shifted: bool,
        mlp_ratio: float = 4.0,
        hidden_act: str = "gelu",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.window = min(window, *resolution)
        self.shift = window // 2 if shifted and min(resolution) > window else 0
        self.layernorm_before = LayerNorm(dim, epsilon=epsilon, **kwargs)
        self.attention = WindowAttention(
            dim, heads, self.window, qkv_bias=qkv_bias, dropout=attention_dropout, **kwargs
        )
        self.layernorm_after = LayerNorm(dim, epsilon=epsilon, **kwargs)
        self.mlp = SwinMLP(dim, int(mlp_ratio * dim), hidden_act, **kwargs)
        self.dropout_rate, self.attention_dropout, self.drop_path_rate = dropout, attention_dropout, drop_path_rate

    def __call__(
        self, x: Float[Array, "batch rows columns dim"], dropout: Dropout
    ) -> tuple[Float[Array, "batch rows columns dim"], Float[Array, "windows heads patches patches"]]:
        """One block; returns its output and its attention weights."""
        _, rows, columns, _ = x.shape
        window, shift = self.window, self.shift
        # A grid that does not divide into windows grows at its lower and right edges.
        more = (-rows % window, -columns % window)
        y = jnp.pad(self.layernorm_before(x), ((0, 0), (0, more[0]), (0, more[1]), (0, 0)))
        mask = None
        if shift:
            y = jnp.roll(y, (-shift, -shift), axis=(1, 2))
            mask = shift_mask(rows + more[0], columns + more[1], window, shift)
        y, weights = self.attention(window_partition(y, window), mask, dropout)
        y = window_reverse(dropout(y, self.attention_dropout), window, rows + more[0], columns + more[1])
        if shift:
            y = jnp.roll(y, (shift, shift), axis=(1, 2))
        x = x + drop_path(y[:, :rows, :columns], self.drop_path_rate, dropout)
        y = dropout(self.mlp(self.layernorm_after(x)), self.dropout_rate)
        return x + drop_path(y, self.drop_path_rate, dropout), weights


class PatchMerging(nnx.Module):
    """§3.1, patch merging: 2 × 2 neighbours side by side, normalised, and projected to twice the width."""

    def __init__(self, dim: int, **kwargs: Any):
        self.norm = LayerNorm(4 * dim, **kwargs)
        self.reduction = Linear(4 * dim, 2 * dim, use_bias=False, kernel_init=_NORMAL, **kwargs)

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch half_rows half_columns wide"]:
        """Halve the grid; an odd one is padded with zeros. The upper left comes first, then the lower left."""
        batch, rows, columns, dim = x.shape
        x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
        x = x.reshape(batch, -(-rows // 2), 2, -(-columns // 2), 2, dim)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, x.shape[1], x.shape[3], 4 * dim)
        return self.reduction(self.norm(x))


class SwinStage(nnx.Module):
    """§3.1, Figure 3: blocks at one resolution, every second one shifted, and the merging that follows them."""

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        depth: int,
        heads: int,
        window: int,
        *,
        downsample: bool = True,
        drop_path_rates: tuple[float, ...] = (),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        rates = drop_path_rates or (0.0,) * depth
        self.blocks = nnx.List(
            [
                SwinBlock(
                    dim, resolution, heads, window, shifted=i % 2 == 1, drop_path_rate=rates[i], **options, **kwargs
                )
                for i in range(depth)
            ]
        )
        self.downsample = PatchMerging(dim, **kwargs) if downsample else None

    def __call__(
        self, x: Float[Array, "batch rows columns dim"], dropout: Dropout | None = None
    ) -> tuple[
        Float[Array, "batch merged_rows merged_columns merged_dim"],
        Float[Array, "batch rows columns dim"],
        Float[Array, "windows heads patches patches"],
    ]:
        """The patches after merging, before it, and the last block's attention weights."""
        dropout = Dropout(None) if dropout is None else dropout
        for block in self.blocks:
            x, weights = block(x, dropout)
        return (x if self.downsample is None else self.downsample(x)), x, weights
