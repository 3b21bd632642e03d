r"""# T5: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer

Colin Raffel, Noam Shazeer, Adam Roberts, Katherine Lee, Sharan Narang, Michael Matena, Yanqi Zhou, Wei Li,
Peter J. Liu, 2019, arXiv 1910.10683.

An encoder-decoder Transformer with three simplifications: normalisation only rescales, no map has a bias, and positions
are a number added to the attention scores, looked up by how far query and key are apart, the same table for all layers.
Here it is Pop2Piano's whole model and MusicGen's text encoder.

    encoder:  x ── N × [+ SelfAttention(RMS(x), B), + MLP(RMS(x))] ── RMS ──> memory
    decoder:  y ── N × [+ causal SelfAttention(RMS(y), B'), + CrossAttention(RMS(y), memory), + MLP(RMS(y))] ── RMS ──>

| paper | here |
| --- | --- |
| §2.1, normalisation without shift, outside the residual path | `T5LayerNorm` |
| §2.1, relative position embeddings: 32 buckets up to an offset of 128 | `relative_position_bucket`, `T5Stack.bias` |
| §2.1, attention without scaling | `T5Attention` |
| §2.1, feed-forward network; gated kinds (T5 v1.1) from arXiv 2002.05202 | `T5FeedForward` |
| §2.1, blocks | `T5Block`, `T5Stack` |
| §2.1, encoder with its token embeddings | `T5EncoderModel` |
| §3.1.1 and §3.7, sizes | `T5Config.small()` … `T5Config.xxl()` |

Checkpoints: the T5 inside `sweetcocoa/pop2piano`, and `t5-base` inside `facebook/musicgen-*`.

    import audiozoo
    from flax import nnx
    from audiozoo.models.t5 import T5Config, T5EncoderModel
    encode = audiozoo.jit(T5EncoderModel(T5Config.base(), rngs=nnx.Rngs(0)))
    states = encode(input_ids, attention_mask).last_hidden_state  # (batch, time, 768)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, Embed, KeyValues, Linear, activation, attend, causal_mask, merge_heads, split_heads
from audiozoo.layers.basic import at_least_float32, promote, spread
from audiozoo.layers.stacking import all_weights, unseen
from audiozoo.outputs import BaseModelOutput, DecoderOutput


@dataclass(frozen=True)
class T5Config:
    """Sizes of one model: §3.1.1 for base, §3.7 for the others."""

    vocab_size: int = 32128  # tokens
    d_model: int = 768  # width
    d_kv: int = 64  # channels of a head; heads times d_kv need not be d_model
    d_ff: int = 3072  # width of the feed-forward network
    num_layers: int = 12  # blocks of the encoder
    num_decoder_layers: int = 12  # blocks of the decoder
    num_heads: int = 12  # heads
    relative_attention_num_buckets: int = 32  # distances that are told apart
    relative_attention_max_distance: int = 128  # tokens, from which on distances are not told apart
    dropout_rate: float = 0.1  # everywhere
    layer_norm_epsilon: float = 1e-6  # of all normalisations
    gated: bool = False  # whether the feed-forward network has a gate (T5 v1.1)
    dense_act_fn: str = "relu"  # of the feed-forward network, or of its gate; gelu_new in T5 v1.1

    def __post_init__(self) -> None:
        buckets, most = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or most <= buckets // 2:
            raise UsageError(
                f"{buckets} buckets cannot tell distances up to {most} apart: at least 4 are there, for distances "
                "beyond half their number."
            )

    @classmethod
    def small(cls) -> T5Config:
        """§3.7: 60 million parameters, 35.3 M parameters in the encoder alone."""
        return cls(d_model=512, d_ff=2048, num_layers=6, num_decoder_layers=6, num_heads=8)

    @classmethod
    def base(cls) -> T5Config:
        """§3.1.1: 220 million parameters, 109.6 M parameters in the encoder alone."""
        return cls()

    @classmethod
    def large(cls) -> T5Config:
        """§3.7: 770 million parameters, 334.9 M parameters in the encoder alone."""
        return cls(d_model=1024, d_ff=4096, num_layers=24, num_decoder_layers=24, num_heads=16)

    @classmethod
    def xl(cls) -> T5Config:
        """§3.7, 3B."""
        return cls(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_decoder_layers=24, num_heads=32)

    @classmethod
    def xxl(cls) -> T5Config:
        """§3.7, 11B."""
        return cls(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_decoder_layers=24, num_heads=128)


def relative_position_bucket(
    relative_position: Int[Array, "*shape"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    r"""§2.1: the bucket of a distance (key minus query): near ones have their own, far ones share, by their logarithm.

    Half the buckets are for keys that come later, if they can be seen. Of the $n$ buckets of one direction the first
    half hold the distances $0 \dots n/2 - 1$; distance $d$ is in bucket
    $n/2 + \lfloor \log(2d/n) / \log(2 D/n) \cdot n/2 \rfloor$, at most $n - 1$.
    """
    first: Any = 0
    if bidirectional:
        buckets //= 2
        first = jnp.where(relative_position > 0, buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    exact = buckets // 2
    # In float32 as in the original: the logarithm's rounding decides on which side of a border a distance falls.
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (far * (buckets - exact)).astype(distance.dtype), buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


class T5LayerNorm(nnx.Module):
    r"""§2.1: $x / \sqrt{\overline{x^2} + \epsilon} \cdot \gamma$, no mean, no shift (RMSNorm, arXiv 1910.07467)."""

    def __init__(self, width: int, *, epsilon: float, dtype: Any, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Rescale every position; the mean square is taken in float32 or wider."""
        wide = at_least_float32(x)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...]
        y, _ = promote(wide.astype(x.dtype), scale, dtype=self.dtype)
        return y * spread(scale, y)


class T5Attention(nnx.Module):
    r"""§2.1: $\operatorname{softmax}(QK^\top + B)\,V$, without biases; $1/\sqrt d$ is in how $W_Q$ starts."""

    def __init__(self, config: T5Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner, width = config.num_heads * config.d_kv, config.d_model
        normal = nnx.initializers.normal
        self.q = Linear(width, inner, kernel_init=normal((width * config.d_kv) ** -0.5), **kwargs)
        self.k = Linear(width, inner, kernel_init=normal(width**-0.5), **kwargs)
        self.v = Linear(width, inner, kernel_init=normal(width**-0.5), **kwargs)
        self.o = Linear(inner, width, kernel_init=normal(inner**-0.5), **kwargs)
        self.heads, self.dropout_rate = config.num_heads, config.dropout_rate

    def key_values(self, y: Float[Array, "batch keys width"]) -> KeyValues:
        """Keys and values, to be computed once and used by many queries."""
        return KeyValues(split_heads(self.k(y), self.heads), split_heads(self.v(y), self.heads))

    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        key_values: KeyValues,
        mask: Bool[Array, "#batch 1 #queries keys"] | None,
        bias: Float[Array, "1 heads queries keys"] | None,
        dropout: Dropout,
    ) -> tuple[Float[Array, "batch queries width"], Float[Array, "batch heads queries keys"]]:
        """The output and the attention weights."""
        query = split_heads(self.q(x), self.heads)
        y, weights = attend(
            query,
            key_values.key,
            key_values.value,
            scale=1.0,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout=dropout,
        )
        return self.o(merge_heads(y)), weights


class T5FeedForward(nnx.Module):
    r"""§2.1: $W_o\,\phi(W_i x)$, or with a gate $W_o\,(\phi(W_0 x) \odot W_1 x)$ (T5 v1.1, arXiv 2002.05202)."""

    def __init__(self, config: T5Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        into, out = (nnx.initializers.normal(size**-0.5) for size in (config.d_model, config.d_ff))
        shape = (config.d_model, config.d_ff)
        self.wi = None if config.gated else Linear(*shape, kernel_init=into, **kwargs)
        self.wi_0 = Linear(*shape, kernel_init=into, **kwargs) if config.gated else None
        self.wi_1 = Linear(*shape, kernel_init=into, **kwargs) if config.gated else None
        self.wo = Linear(*shape[::-1], kernel_init=out, **kwargs)
        self.dense_act_fn, self.dropout_rate = config.dense_act_fn, config.dropout_rate

    def __call__(self, x: Float[Array, "batch time width"], dropout: Dropout) -> Float[Array, "batch time width"]:
        """Each position by itself."""
        act = activation(self.dense_act_fn)
        if self.wi is not None:
            hidden = act(self.wi(x))
        else:
            assert self.wi_0 is not None
            assert self.wi_1 is not None
            hidden = act(self.wi_0(x)) * self.wi_1(x)
        return self.wo(dropout(hidden, self.dropout_rate))


class T5Block(nnx.Module):
    """§2.1: self-attention, in a decoder cross-attention, feed-forward; each after a norm, each on a residual path."""

    def __init__(self, config: T5Config, decoder: bool, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm: dict[str, Any] = {"epsilon": config.layer_norm_epsilon, "dtype": dtype, "param_dtype": param_dtype}
        self.self_attention_norm = T5LayerNorm(config.d_model, **norm)
        self.self_attention = T5Attention(config, **kwargs)
        self.cross_attention_norm = T5LayerNorm(config.d_model, **norm) if decoder else None
        self.cross_attention = T5Attention(config, **kwargs) if decoder else None
        self.feed_forward_norm = T5LayerNorm(config.d_model, **norm)
        self.feed_forward = T5FeedForward(config, **kwargs)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "#batch 1 #time keys"] | None,
        bias: Float[Array, "1 heads time keys"],
        dropout: Dropout,
        past: KeyValues | None = None,
        position: int | Int[Array, ""] = 0,
        memory: KeyValues | None = None,
        memory_mask: Bool[Array, "#batch 1 1 frames"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], KeyValues, jax.Array, jax.Array | None]:
        """One block: its output, its keys and values so far, and the self- and cross-attention weights."""
        y = self.self_attention_norm(x)
        key_values = self.self_attention.key_values(y)
        if past is not None:
            key_values = past.write(key_values, position)
        attended, weights = self.self_attention(y, key_values, mask, bias, dropout)
        x = x + dropout(attended, self.dropout_rate)
        cross_weights = None
        if self.cross_attention is not None and self.cross_attention_norm is not None and memory is not None:
            y = self.cross_attention_norm(x)
            attended, cross_weights = self.cross_attention(y, memory, memory_mask, None, dropout)
            x = x + dropout(attended, self.dropout_rate)
        hidden = self.feed_forward(self.feed_forward_norm(x), dropout)
        return x + dropout(hidden, self.dropout_rate), key_values, weights, cross_weights


@jax.tree_util.register_dataclass
@dataclass
class T5Cache:
    """What a decoder keeps between tokens (not in the paper): its own keys and values, and those of the memory."""

    self_attention: tuple[KeyValues, ...]
    cross_attention: tuple[KeyValues, ...]  # one row an example, also when several beams share it
    memory_mask: Bool[Array, "batch 1 1 frames"] | None = None


class T5Stack(nnx.Module):
    """§2.1: the blocks of an encoder or of a decoder, with the position bias that all of them share."""

    def __init__(
        self, config: T5Config, decoder: bool, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        count = config.num_decoder_layers if decoder else config.num_layers
        normal = nnx.initializers.normal(config.d_model**-0.5)
        table = normal(rngs.params(), (config.relative_attention_num_buckets, config.num_heads), param_dtype)
        self.relative_attention_bias = nnx.Param(table)
        self.block = nnx.List([T5Block(config, decoder, **kwargs) for _ in range(count)])
        self.final_layer_norm = T5LayerNorm(
            config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, param_dtype=param_dtype
        )
        self.config, self.decoder = config, decoder

    def bias(
        self, queries: int, keys: int, position: int | Int[Array, ""] = 0, dtype: Any = None
    ) -> Float[Array, "1 heads queries keys"]:
        """§2.1: what is added to the scores of `queries` that begin at `position`, for keys that begin at 0."""
        apart = jnp.arange(keys)[None, :] - (jnp.arange(queries)[:, None] + position)
        config = self.config
        buckets = relative_position_bucket(
            apart, not self.decoder, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = self.relative_attention_bias[...][buckets]
        return jnp.moveaxis(bias, -1, 0)[None].astype(dtype or bias.dtype)

    def start(
        self,
        memory: Float[Array, "batch frames width"],
        length: int,
        memory_mask: Int[Array, "batch frames"] | None = None,
    ) -> T5Cache:
        """An empty cache for `length` tokens, and the memory's keys and values.

        Args:
            memory: the encoder's output, one row an example.
            length: room for this many tokens.
            memory_mask: 1 for frames to be seen.
        """
        attentions = [block.cross_attention for block in self.block]
        cross = tuple(attention.key_values(memory) for attention in attentions if attention is not None)
        empty = KeyValues.empty(len(memory), self.config.num_heads, length, self.config.d_kv, memory.dtype)
        mask = None if memory_mask is None else (memory_mask != 0)[:, None, None, :]
        return T5Cache(tuple(empty for _ in self.block), cross, mask)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        attention_mask: Int[Array, "batch keys"] | None = None,
        memory: Float[Array, "batch frames width"] | None = None,
        memory_mask: Int[Array, "batch frames"] | None = None,
        *,
        cache: T5Cache | None = None,
        position: int | Int[Array, ""] = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> DecoderOutput:
        """Run the blocks.

        Args:
            x: embedded tokens or features.
            attention_mask: 1 for positions to be seen, 0 for others.
            memory: a decoder's: the encoder's output; not needed with a cache, which holds its keys and values.
            memory_mask: 1 for frames of the memory to be seen.
            cache: a decoder's, from `start` or from the last call; returned with these tokens added.
            position: where in the cache the first of these tokens stands.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout on.
        """
        dropout, rate = Dropout(key), self.config.dropout_rate
        time = x.shape[1]
        keys = time if cache is None else cache.self_attention[0].key.shape[2]
        bias = self.bias(time, keys, position, jnp.promote_types(x.dtype, jnp.float32))
        mask: Any = causal_mask(time, keys, position) if self.decoder else None
        if attention_mask is not None:
            seen = (attention_mask != 0)[:, None, None, :]
            mask = seen if mask is None else mask & seen
        shown = None if memory_mask is None else (memory_mask != 0)[:, None, None, :]
        x = dropout(x, rate)
        hidden_states: list[Any] = [x]
        attentions: list[Any] = []
        cross_attentions: list[Any] = []
        key_values: list[KeyValues] = []
        for i, block in enumerate(self.block):
            past = seen_memory = None
            if cache is not None:
                past, seen_memory, shown = cache.self_attention[i], cache.cross_attention[i], cache.memory_mask
            elif memory is not None and block.cross_attention is not None:
                seen_memory = block.cross_attention.key_values(memory)
            x, new, weights, cross_weights = block(x, mask, bias, dropout, past, position, seen_memory, shown)
            hidden_states += [*unseen(block), x]
            attentions.append(weights)
            cross_attentions.append(cross_weights)
            key_values.append(new)
        x = dropout(self.final_layer_norm(x), rate)
        hidden_states[-1] = x
        crossed = output_attentions and self.decoder and cross_attentions[0] is not None
        return DecoderOutput(
            last_hidden_state=x,
            past_key_values=None if cache is None else T5Cache(tuple(key_values), cache.cross_attention, shown),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=all_weights(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if crossed else None,
        )


class T5EncoderModel(nnx.Module):
    """§2.1: token embeddings and the encoder; MusicGen reads its prompts with it."""

    def __init__(self, config: T5Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shared = Embed(config.vocab_size, config.d_model, embedding_init=nnx.initializers.normal(1.0), **kwargs)
        self.encoder = T5Stack(config, decoder=False, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutput:
        """Encode texts.

        Args:
            input_ids: tokens.
            attention_mask: 1 for real tokens, 0 for padding; all are real by default.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the embeddings and every block's output.
            key: switches dropout on.
        """
        if input_ids.ndim != 2:
            raise UsageError(f"The tokens have shape {tuple(input_ids.shape)}; (batch, time) is expected.")
        output = self.encoder(
            self.shared(input_ids),
            attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )
        return BaseModelOutput(output.last_hidden_state, output.hidden_states, output.attentions)
