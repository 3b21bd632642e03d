"""Linear maps, embeddings, normalisation and dropout: Flax's own, with PyTorch's numerics where the defaults differ.

Every layer takes `dtype` (the dtype of the computation; by default that of its input and parameters together) and
`param_dtype` (of the parameters), and keeps float64 when it is given float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.errors import UsageError

Dtype = Any


def promote(*arrays: jax.Array | None, dtype: Dtype | None = None) -> tuple[Any, ...]:
    """The arrays in `dtype`, or in the dtype that holds them all; None stays None."""
    common = jnp.result_type(*(a for a in arrays if a is not None)) if dtype is None else dtype
    return tuple(None if a is None else jnp.asarray(a, common) for a in arrays)


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The array in float32 or wider, in which sums and choices keep the digits that they need."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def spread(values: Float[Array, "*small"], over: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`values` at every place of `over`, in its dtype; their gradient, a sum over places, in float32 or wider."""
    return jnp.broadcast_to(at_least_float32(values), over.shape).astype(over.dtype)


def unit_vectors(x: Float[Array, "*shape"], *, axis: int = -1, shortest: float = 1e-8) -> Float[Array, "*shape"]:
    r"""$x / \max(\lVert x \rVert, \text{shortest})$; of a vector of zeros the gradient is finite too."""
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=axis, keepdims=True), shortest**2))


def matmul(x: Float[Array, "*batch rows inner"], y: Float[Array, "*batch inner columns"]) -> jax.Array:
    """$xy$ in the dtype of `x`, its sums taken in float32 or wider.

    Asked for a product in bfloat16, XLA's CPU compiler widens both factors to float32 first; asked for one in float32,
    it multiplies bfloat16 as it is, six times as fast where the processor can. That the result is then rounded must be
    said by an operation of its own, or the compiler would join the two to the slow product again.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if wide == x.dtype:
        return jnp.matmul(x, y)

    def rounded(x: jax.Array, y: jax.Array) -> jax.Array:
        return _rounded(jnp.matmul(x, y, preferred_element_type=wide), x.dtype)

    def joined(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, preferred_element_type=wide).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=rounded, default=joined)


def _rounded(x: jax.Array, dtype: Dtype) -> jax.Array:
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


@jax.custom_vjp
def sum_of_products(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
    r"""$\sum_j x_j y_j$ of several `(batch, rows, inner)` and `(inner, columns)`, for a CPU; see `matmul`."""
    wide = jnp.promote_types(xs[0].dtype, jnp.float32)
    products = [jnp.matmul(x, y, preferred_element_type=wide) for x, y in zip(xs, ys, strict=True)]
    return _rounded(sum(products[1:], products[0]), xs[0].dtype)


def _sum_backward(saved: Any, d: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    r"""$dx_j = d\,y_j^T$ and $dy_j = x_j^T d$."""
    xs, ys = saved
    rows = d.reshape(-1, d.shape[-1])
    return [matmul(d, y.T) for y in ys], [matmul(x.reshape(-1, x.shape[-1]).T, rows) for x in xs]


sum_of_products.defvjp(lambda xs, ys: (sum_of_products(xs, ys), (xs, ys)), _sum_backward)


@jax.custom_vjp
def _product(x: Float[Array, "*batch features"], kernel: Float[Array, "features outputs"]) -> jax.Array:
    """$xW$ for many rows, or in few bits."""
    return matmul(x, kernel)


def _product_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""$dx = dy\,W^T$ and $dW = x^T dy$, on a CPU with all rows on one axis.

    With two axes XLA's CPU compiler makes a transposed copy of $dy$, and computes it anew for it: that of a residual
    stream, which is a sum over all blocks above, from the last block on. It took a sixth of a step of Whisper tiny.
    """
    x, kernel = saved

    def by_rows(x: jax.Array, dy: jax.Array) -> jax.Array:
        return matmul(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, dy.shape[-1]))

    def whole(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum("...i,...o->io", x, dy)

    return matmul(dy, kernel.T), jax.lax.platform_dependent(x, dy, cpu=by_rows, default=whole)


_product.defvjp(lambda x, kernel: (matmul(x, kernel), (x, kernel)), _product_backward)


ROWS_FROM = 1 << 16  # size of a batch from which its gradient is the one above
PARTS, SPLIT_FROM = 4, 1 << 16  # a single row's product is cut into so many, from this size of $W$ on


class Linear(nnx.Linear):
    r"""$x W + b$ with `kernel` $W$ of shape `(in, out)`.

    XLA's CPU compiler runs the product of a single row, of which every step of a decoder is made, on one thread, and
    one thread cannot read a large $W$ as fast as the memory gives it. As a batch of products over parts of the
    inputs, $\sum_p x_p W_p + b$, it runs on all: 1.5 to 2 times as fast on two cores.
    """

    def __call__(
        self, inputs: Float[Array, "*batch features"], out_sharding: Any = None
    ) -> Float[Array, "*batch out_features"]:
        """The product for every row of `inputs`."""
        single = inputs.size == inputs.shape[-1] and self.kernel.size >= SPLIT_FROM and self.in_features % PARTS == 0
        many = inputs.ndim > 2 and inputs.size >= ROWS_FROM
        bias = None if self.bias is None else self.bias[...]
        x, kernel, _ = promote(inputs, self.kernel[...], bias, dtype=self.dtype)
        narrow = x.dtype.itemsize < 4
        if out_sharding is not None or not (single or many or narrow):
            return super().__call__(inputs, out_sharding)

        def in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            kernel = kernel.reshape(PARTS, -1, self.out_features)
            y = jnp.einsum("pi,pio->po", x.reshape(PARTS, -1), kernel, preferred_element_type=wide)
            return y.sum(axis=0).astype(x.dtype).reshape(*x.shape[:-1], -1)

        if single:
            y = jax.lax.platform_dependent(x, kernel, cpu=in_parts, default=jnp.matmul)
        else:
            y = _product(x, kernel)
        return y if bias is None else y + spread(bias, y)


def check_ids(ids: Any, entries: int) -> None:
    """Refuse what is no index of a table of so many entries: JAX would read NaN there.

    Inside a compiled program ids are not known yet; what compiles itself calls this before.

    Raises:
        UsageError: for an id below 0, or beyond the last.
    """
    if isinstance(ids, jax.core.Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    known = np.asarray(ids)
    wrong = known[(known < 0) | (known >= entries)]
    if wrong.size:
        raise UsageError(f"The id {wrong[0]} is none of this model's: they are 0 to {entries - 1}.")


def check_frames(x: Any, channels: int) -> None:
    """Refuse what are no frames of so many channels, or none at all.

    Raises:
        UsageError: for another shape than `(batch, frames, channels)`.
    """
    if x.ndim != 3 or 0 in x.shape or x.shape[2] != channels:
        raise UsageError(f"The features have shape {x.shape}; (batch, frames, {channels}) is expected, none of it 0.")


def check_mask(mask: Any, shape: tuple[int, ...], name: str = "attention_mask") -> None:
    """Refuse a mask, if there is one, of another shape than what it masks.

    Raises:
        UsageError: for another shape.
    """
    if mask is not None and np.shape(mask) != shape:
        raise UsageError(f"{name} has shape {np.shape(mask)}; {shape} is expected.")


class Embed(nnx.Embed):
    """A table of shape `(entries, features)`, read by index; `attend` multiplies by its transpose, for tied heads."""

    def __call__(self, inputs: Int[Array, "*batch"], out_sharding: Any = None) -> Float[Array, "*batch features"]:
        """The entries of these indices, which `check_ids` has seen."""
        check_ids(inputs, self.num_embeddings)
        if out_sharding is not None:
            return super().__call__(inputs, out_sharding)
        # Rounded behind the table, in whose dtype the gradients of an entry that stands a thousand times are summed.
        return jnp.take(self.embedding[...], inputs, axis=0).astype(self.dtype or self.embedding.dtype)

    def attend(
        self, query: Float[Array, "*batch features"], out_sharding: Any = None
    ) -> Float[Array, "*batch entries"]:
        """The product of every entry with `query`: logits, where the table is that of the tokens."""
        if out_sharding is not None:
            return super().attend(query, out_sharding)
        query, table = promote(query, self.embedding[...], dtype=self.dtype)
        if query.size > query.shape[-1]:
            return matmul(query, table.T)

        def in_parts(query: jax.Array, table: jax.Array) -> jax.Array:
            parts = next((n for n in (*range(PARTS, 4 * PARTS), 3, 2) if len(table) % n == 0), 1)
            queries = jnp.broadcast_to(query, (parts, len(query)))
            return jnp.einsum("pei,pi->pe", table.reshape(parts, -1, len(query)), queries).reshape(-1)

        # XLA's CPU compiler reads the table of `query @ table.T` column by column; of `table @ query` as it lies. In
        # parts for the reason that `Linear` gives, here over the entries.
        logits = jax.lax.platform_dependent(
            query.reshape(-1), table, cpu=in_parts, default=lambda query, table: table @ query
        )
        return logits.reshape(*query.shape[:-1], -1)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the last axis, two-pass variance, `epsilon` 1e-5 unless told otherwise."""

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            use_bias=use_bias,
            use_scale=use_scale,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )


class GroupNorm(nnx.GroupNorm):
    """Group normalisation of `(batch, time, channels)` over time and the channels of each group, two-pass variance."""

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        *,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_features,
            num_groups=num_groups,
            epsilon=epsilon,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )


def dropout(x: Float[Array, "*shape"], rate: float, key: jax.Array | None) -> Float[Array, "*shape"]:
    """Zero each value with probability `rate` and scale the rest by 1/(1 - rate); with no key, return `x` as it is."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class Dropout:
    """A sequence of dropout keys split off one key, so that a forward draws each mask from a key of its own.

    `Dropout(None)` drops nothing: inference.
    """

    def __init__(self, key: jax.Array | None):
        self.key = key
        self.count = 0

    def next_key(self) -> jax.Array | None:
        """The next key, or None outside training."""
        if self.key is None:
            return None
        self.count += 1
        return jax.random.fold_in(self.key, self.count)

    def __call__(self, x: Float[Array, "*shape"], rate: float) -> Float[Array, "*shape"]:
        """`x` with the next mask applied."""
        return dropout(x, rate, self.next_key()) if rate else x
