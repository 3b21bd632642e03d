r"""Scaled dot-product attention (arXiv 1706.03762, §3.2) and its cache.

Arrays of one head are laid out `(batch, heads, time, head_dim)`: on a CPU both products are then batched matrix
products without a copy. The softmax keeps the dtype of its input, float64 included; sums of products in bfloat16 and
float16 are taken in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers.basic import Dropout, Linear, matmul
from audiozoo.layers.fused import kernel_for


@jax.tree_util.register_dataclass
@dataclass
class KeyValues:
    """Keys and values of one attention layer, `(batch, heads, time, head_dim)` each: the cache, as a value."""

    key: Float[Array, "batch heads time head_dim"]
    value: Float[Array, "batch heads time head_dim"]

    @classmethod
    def empty(cls, batch: int, heads: int, time: int, head_dim: int, dtype: Any) -> KeyValues:
        """Room for `time` frames."""
        return cls(jnp.zeros((batch, heads, time, head_dim), dtype), jnp.zeros((batch, heads, time, head_dim), dtype))

    def write(self, other: KeyValues, position: int | Int[Array, ""]) -> KeyValues:
        """This cache with `other`'s frames put at `position` and after."""

        def put(mine: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(mine.dtype)
            if mine.shape[0] == 1:  # without its batch axis, XLA's CPU compiler updates the array in place
                return jax.lax.dynamic_update_slice_in_dim(mine[0], new[0], position, axis=1)[None]
            return jax.lax.dynamic_update_slice_in_dim(mine, new, position, axis=2)

        return KeyValues(put(self.key, other.key), put(self.value, other.value))


def check_heads(width: int, heads: int) -> None:
    """Refuse heads that do not divide a width.

    Raises:
        UsageError: a part of a channel would be left to each head, or there is none.
    """
    if heads < 1 or width % heads:
        raise UsageError(f"A width of {width} does not divide into {heads} heads.")


def split_heads(x: Float[Array, "batch time channels"], heads: int) -> Float[Array, "batch heads time head_dim"]:
    """Cut the channels into heads."""
    batch, time, channels = x.shape
    return x.reshape(batch, time, heads, channels // heads).swapaxes(1, 2)


def merge_heads(x: Float[Array, "batch heads time head_dim"]) -> Float[Array, "batch time channels"]:
    """Lay the heads side by side again."""
    batch, heads, time, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, time, heads * head_dim)


def relative_to_absolute(x: Float[Array, "*batch queries offsets"]) -> Float[Array, "*batch queries queries"]:
    r"""$y_{i,j} = x_{i,\,j-i+w}$ where $|j - i| \le w$, else 0: the $2w + 1$ offsets put on their diagonals.

    Row $i$ moves right by $i$ when rows of length $L + 1$ are read as rows of length $L$.
    """
    queries, offsets = x.shape[-2:]
    window, width = offsets // 2, queries + offsets - 1
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width + 1 - offsets)])
    x = x.reshape(*x.shape[:-2], -1)[..., : queries * width].reshape(*x.shape[:-2], queries, width)
    return x[..., window : window + queries]


def causal_mask(queries: int, keys: int, offset: int | Int[Array, ""] = 0) -> Bool[Array, "1 1 queries keys"]:
    r"""True where query $i$, which stands at position `offset` + $i$, may see key $j \le$ `offset` + $i$."""
    return (jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + offset)[None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal:
    """A causal mask that is not written out: a kernel need not look at what no query sees.

    Attributes:
        seen: which of the keys up to its own a query may see; all by default.
    """

    seen: Bool[Array, "#batch 1 1 keys"] | None = None

    def written_out(
        self, queries: int, keys: int, offset: int | Int[Array, ""] = 0
    ) -> Bool[Array, "#batch 1 queries keys"]:
        """`causal_mask`, without the keys that are not to be seen."""
        mask = causal_mask(queries, keys, offset)
        return mask if self.seen is None else mask & self.seen


Mask = Bool[Array, "#batch #heads #queries keys"] | Causal


def attend(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch heads keys head_dim"],
    value: Float[Array, "batch heads keys head_dim"],
    *,
    scale: float,
    mask: Mask | None = None,
    bias: Float[Array, "#batch #heads #queries keys"] | None = None,
    dropout_rate: float = 0.0,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "batch heads queries head_dim"], Float[Array, "batch heads queries keys"]]:
    r"""$\operatorname{softmax}(\text{scale}\; QK^\top + B)\,V$ and the attention weights.

    Args:
        query: $Q$. Its batch may be a multiple of the keys' (several beams of one example, side by side).
        key: $K$.
        value: $V$.
        scale: multiplies the queries.
        mask: True where a query may see a key. A query that may see nothing attends to all keys alike.
        bias: $B$, added to the scores.
        dropout_rate: for the attention weights.
        dropout: source of dropout keys.
    """
    batch, heads, queries, head_dim = query.shape
    if isinstance(mask, Causal):
        mask = mask.written_out(queries, key.shape[2])
    beams = batch // key.shape[0]
    if beams > 1:
        query = query.reshape(key.shape[0], beams, heads, queries, head_dim).swapaxes(1, 2)
        query = query.reshape(key.shape[0], heads, beams * queries, head_dim)
        mask = None if mask is None else _rows_of_beams(mask, key.shape[0], beams, queries)
        bias = None if bias is None else _rows_of_beams(bias, key.shape[0], beams, queries)
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query * scale, key, preferred_element_type=accumulate)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights, dropout_rate)
    output = matmul(weights, value)
    if beams > 1:
        output = output.reshape(-1, heads, beams, queries, head_dim).swapaxes(1, 2).reshape(batch, heads, queries, -1)
        weights = weights.reshape(-1, heads, beams, queries, key.shape[2]).swapaxes(1, 2)
        weights = weights.reshape(batch, heads, queries, -1)
    return output, weights


# Scores of one head, and of all, from which heads take turns on a CPU: fewer fit into its caches side by side.
TURNS_FROM, TURNS_FROM_ALL = 1 << 16, 1 << 22


def attend_without_weights(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch heads keys head_dim"],
    value: Float[Array, "batch heads keys head_dim"],
    *,
    scale: float,
    mask: Mask | None = None,
) -> Float[Array, "batch heads queries head_dim"]:
    r"""`attend` for callers that do not look at the weights.

    On a CPU the heads of long inputs take turns, so that the scores $S$ of one stay in the cache instead of going
    through memory three times, and the sum of the softmax divides the output, which is smaller than the weights:
    $\operatorname{softmax}(S)V = (e^{S - \max S}V) / \sum e^{S - \max S}$. With 6 heads of 1500 tokens,
    51 ms instead of 166 ms on two cores. The gradient computes the weights again instead of reading them from memory.
    On a TPU, `fused_attention` has a kernel do likewise.
    """
    seen, causal = (mask.seen, True) if isinstance(mask, Causal) else (mask, False)
    kernel = kernel_for(query, key, value, keys_alone=seen is None or seen.shape[1:3] == (1, 1))
    if isinstance(mask, Causal):
        mask = mask.written_out(query.shape[2], key.shape[2])

    def whole(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
        return attend(query, key, value, scale=scale, mask=mask)[0]

    def in_turns(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
        batch, heads = query.shape[:2]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (batch, heads, *mask.shape[2:]))
        flat = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), (query * scale, key, value, mask))
        return _in_turns(*flat).reshape(*query.shape[:3], value.shape[3])

    def fused(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
        shown = None if seen is None else jnp.broadcast_to(seen[:, 0, 0], (query.shape[0], key.shape[2]))
        return kernel(query, key, value, shown, scale=scale, causal=causal)

    scores = query.shape[2] * key.shape[2]
    few = scores < TURNS_FROM or query.shape[0] * query.shape[1] * scores < TURNS_FROM_ALL
    if few and kernel is None:
        return whole(query, key, value, mask)
    ways: dict[str, Any] = {"cpu": whole if few else in_turns} | ({} if kernel is None else {"tpu": fused})
    return jax.lax.platform_dependent(query, key, value, mask, **ways, default=whole)


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """$S = QK^T$ of one head, in float32 or wider."""
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("qd,kd->qk", query, key, preferred_element_type=accumulate)
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


@jax.custom_vjp
def _in_turns(
    query: Float[Array, "heads queries head_dim"],
    key: Float[Array, "heads keys head_dim"],
    value: Float[Array, "heads keys head_dim"],
    mask: Bool[Array, "#heads #queries keys"] | None,
) -> Float[Array, "heads queries head_dim"]:
    r"""$\operatorname{softmax}(QK^T)V$, one head after the other."""
    return _in_turns_forward(query, key, value, mask)[0]


def _in_turns_forward(*arrays: Any) -> tuple[jax.Array, Any]:
    r"""$O$, and for its gradient of each query $m = \max_j S_{ij}$ and $\Sigma = \sum_j e^{S_{ij} - m}$."""

    def one(arrays: Any) -> tuple[jax.Array, ...]:
        query, key, value, mask = arrays
        scores = _scores(query, key, mask)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        return matmul(weights.astype(value.dtype), value) / total.astype(value.dtype), largest, total

    output, largest, total = jax.lax.map(one, arrays)
    return output, (arrays, output, largest, total)


def _in_turns_backward(saved: Any, d_output: jax.Array) -> tuple[jax.Array | None, ...]:
    r"""With $P = e^{S - m}$ and $D = dO / \Sigma$: $dV = P^T D$ and $dS = P \circ (D V^T - \sum_d D \circ O)$."""

    def one(arrays: Any) -> tuple[jax.Array, ...]:
        (query, key, value, mask), output, largest, total, d_output = arrays
        d_output = d_output / total.astype(value.dtype)
        weights = jnp.exp(_scores(query, key, mask) - largest)
        d_weights = jnp.einsum("qd,kd->qk", d_output, value, preferred_element_type=largest.dtype)
        d_scores = weights * (d_weights - jnp.sum(d_output * output, axis=-1, keepdims=True, dtype=largest.dtype))
        if mask is not None:
            d_scores = jnp.where(mask, d_scores, 0)
        d_scores, weights = d_scores.astype(query.dtype), weights.astype(value.dtype)
        return matmul(d_scores, key), matmul(d_scores.T, query), matmul(weights.T, d_output)

    return *jax.lax.map(one, (*saved, d_output)), None


_in_turns.defvjp(_in_turns_forward, _in_turns_backward)


def _rows_of_beams(x: jax.Array, examples: int, beams: int, queries: int) -> jax.Array:
    """A mask or bias `(#batch, #heads, #queries, keys)` in the layout of beams folded into the queries."""
    x = jnp.broadcast_to(x, (x.shape[0], x.shape[1], queries, x.shape[3]))
    if x.shape[0] == 1:
        return jnp.tile(x, (1, 1, beams, 1))
    x = x.reshape(examples, beams, x.shape[1], queries, x.shape[3]).swapaxes(1, 2)
    return x.reshape(examples, x.shape[1], beams * queries, x.shape[4])


class MultiHeadAttention(nnx.Module):
    r"""$\operatorname{MultiHead}(X, Y) = [\text{head}_1; \dots; \text{head}_h]\,W^O$ (arXiv 1706.03762, §3.2.2).

    Queries come from $X$, keys and values from $Y$ (from $X$ itself in self-attention). The projections are called
    `q_proj`, `k_proj`, `v_proj` and `out_proj`, as everywhere in the field.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        use_bias: bool = True,
        key_bias: bool | None = None,
        dropout: float = 0.0,
        kernel_init: nnx.Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_heads(features, heads)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if kernel_init is not None:
            kwargs["kernel_init"] = kernel_init
        self.q_proj = Linear(features, features, use_bias=use_bias, **kwargs)
        self.k_proj = Linear(features, features, use_bias=use_bias if key_bias is None else key_bias, **kwargs)
        self.v_proj = Linear(features, features, use_bias=use_bias, **kwargs)
        self.out_proj = Linear(features, features, use_bias=use_bias, **kwargs)
        self.heads, self.dropout_rate = heads, dropout
        self.scale = (features // heads) ** -0.5

    def key_values(self, y: Float[Array, "batch keys channels"]) -> KeyValues:
        """The keys and values of $Y$, to be computed once and used by many queries."""
        return KeyValues(split_heads(self.k_proj(y), self.heads), split_heads(self.v_proj(y), self.heads))

    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        key_values: KeyValues | None = None,
        *,
        mask: Mask | None = None,
        bias: Float[Array, "#batch #heads #queries keys"] | None = None,
        dropout: Dropout | None = None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch queries channels"], Float[Array, "batch heads queries keys"] | None]:
        """Attend from $X$ to `key_values`, or to $X$ itself; returns the output and the attention weights.

        Without `need_weights` the second may be None, and long inputs are faster on a CPU.
        """
        if key_values is None:
            key_values = self.key_values(x)
        query = split_heads(self.q_proj(x), self.heads)
        undropped = dropout is None or dropout.key is None or not self.dropout_rate
        if not need_weights and bias is None and undropped and query.shape[0] == key_values.key.shape[0]:
            output = attend_without_weights(query, key_values.key, key_values.value, scale=self.scale, mask=mask)
            return self.out_proj(merge_heads(output)), None
        output, weights = attend(
            query,
            key_values.key,
            key_values.value,
            scale=self.scale,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout=dropout,
        )
        return self.out_proj(merge_heads(output)), weights
