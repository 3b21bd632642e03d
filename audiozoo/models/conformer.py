r"""# Conformer: Convolution-augmented Transformer for Speech Recognition

Anmol Gulati, James Qin, Chung-Cheng Chiu, Niki Parmar, Yu Zhang, Jiahui Yu, Wei Han, Shibo Wang, Zhengdong Zhang,
Yonghui Wu, Ruoming Pang, 2020, arXiv 2005.08100.

Attention sees a recording as a whole, convolution what lies next to each other; a Conformer block has one after the
other, between two halves of a feed-forward network.

    x ── + ½ FFN ── + self-attention, by relative positions ── + convolution ── + ½ FFN ── LN ──> x

| paper | here |
| --- | --- |
| §2.1, multi-headed self-attention | `ConformerSelfAttention` |
| §2.1, relative sinusoidal positions (arXiv 1901.02860, §3.3) | `relative_sinusoids`, `relative_shift` |
| §2.2, convolution module | `ConformerConvolutionModule` |
| §2.3, feed-forward module | `ConformerFeedForward` |
| §2.4, Eq. 1, block | `ConformerBlock` |
| Fig. 1, encoder behind the subsampling | `ConformerEncoder` |
| Table 1, sizes | `ConformerConfig.conformer_s()`, `.conformer_m()`, `.conformer_l()` |
| not in the paper: length adaptor (arXiv 2207.00952) | `LengthAdaptorLayer` |

A configuration chooses between this and what w2v-BERT 2.0 made of it in the second SeamlessM4T (arXiv 2312.05187):
learnt positions of clipped distance (arXiv 1803.02155), a convolution that looks back only, with LayerNorm, and
attention that looks back a number of chunks.

Checkpoints: `facebook/wav2vec2-conformer-{rel-pos,rope}-large` (and what has been fine-tuned from them),
`facebook/w2v-bert-2.0`, and the speech encoders inside `facebook/hf-seamless-m4t-{medium,large}` and
`facebook/seamless-m4t-v2-large`.
The paper's own subsampling and transducer are not here: no paper of the zoo uses them.

    import audiozoo
    model = audiozoo.load("facebook/hf-seamless-m4t-medium", model_class="SeamlessM4TForSpeechToText")
    blocks = model.speech_encoder.encoder.layers  # ConformerBlocks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import (
    Conv1d,
    Dropout,
    Embed,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    activation,
    attend,
    layer_drop,
    merge_heads,
    split_heads,
)
from audiozoo.layers.basic import at_least_float32, spread
from audiozoo.layers.batch_norm import BatchNorm
from audiozoo.layers.positions import interleaved_sinusoids
from audiozoo.layers.stacking import unseen
from audiozoo.outputs import BaseModelOutput


@dataclass(frozen=True)
class ConformerConfig:
    """Sizes of an encoder (Table 1), and which of the two kinds of blocks it has."""

    hidden_size: int = 512  # width
    num_hidden_layers: int = 17  # blocks
    num_attention_heads: int = 8  # heads
    intermediate_size: int = 2048  # width inside a feed-forward module
    hidden_act: str = "swish"  # of feed-forward and convolution module
    conv_depthwise_kernel_size: int = 32  # frames that the convolution sees
    dropout: float = 0.1  # everywhere, attention weights included, where the next three do not say otherwise
    activation_dropout: float | None = None  # inside a feed-forward module
    attention_dropout: float | None = None  # on attention weights, and behind attention
    conv_dropout: float | None = None  # behind the convolution module
    layerdrop: float = 0.0  # chance that training skips a block
    layer_norm_eps: float = 1e-5  # of the features' and the last LayerNorm
    block_layer_norm_eps: float = 1e-5  # of the blocks' LayerNorms
    last_layer_norm: bool = True  # a LayerNorm behind the last block, whose own is the last thing in the paper
    # "relative" (§2.1), "relative_key" (learnt, arXiv 1803.02155), "rotary" (arXiv 2104.09864), or None.
    position_embeddings_type: str | None = "relative"
    rotary_embedding_base: int = 10_000  # "rotary": longest period / 2π
    left_max_position_embeddings: int = 64  # "relative_key": frames back that are told apart
    right_max_position_embeddings: int = 8  # "relative_key": frames ahead that are told apart
    causal_convolution: bool = False  # the convolution looks back only, and has LayerNorm instead of BatchNorm
    masked_convolution: bool = True  # the convolution sees zeros in place of padding
    chunk_size: int | None = None  # frames that see one another, and none ahead; None: all
    left_chunk_num: int = -1  # chunks before its own that a frame sees; negative: all

    def __post_init__(self) -> None:
        if self.position_embeddings_type not in ("relative", "relative_key", "rotary", None):
            raise UsageError(
                f"There are no positions of type {self.position_embeddings_type!r}; there are relative, relative_key, "
                "rotary and None."
            )

    @classmethod
    def of_speech_encoder(cls, config: Any, **others: Any) -> ConformerConfig:
        """Blocks by the names that wav2vec 2.0's descendants in `transformers` give their sizes; and `others`."""
        return cls(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            conv_depthwise_kernel_size=config.conv_depthwise_kernel_size,
            dropout=config.hidden_dropout,
            activation_dropout=config.activation_dropout,
            attention_dropout=config.attention_dropout,
            conv_dropout=config.conformer_conv_dropout,
            layerdrop=config.layerdrop,
            position_embeddings_type=config.position_embeddings_type,
            rotary_embedding_base=config.rotary_embedding_base,
            **others,
        )

    def rate(self, own: float | None) -> float:
        """The dropout of a part that may have one of its own."""
        return self.dropout if own is None else own

    @classmethod
    def conformer_s(cls) -> ConformerConfig:
        """Table 1, Conformer (S)."""
        return cls(144, 16, 4, 576)

    @classmethod
    def conformer_m(cls) -> ConformerConfig:
        """Table 1, Conformer (M)."""
        return cls(256, 16, 4, 1024)

    @classmethod
    def conformer_l(cls) -> ConformerConfig:
        """Table 1, Conformer (L)."""
        return cls(512, 17, 8, 2048)


# --- §2.1, positions --------------------------------------------------------------------------------------------------


def relative_sinusoids(length: int, width: int) -> np.ndarray:
    r"""§2.1: $R_d$ for the distances $d = T-1, \dots, 0, \dots, -(T-1)$ from a frame back to another.

    $R_{d,2k} = \sin(d\,\omega_k)$ and $R_{d,2k+1} = \cos(d\,\omega_k)$ with $\omega_k = 10000^{-2k/D}$.

    Returns:
        float64 array of shape `(2 length - 1, width)`.
    """
    return interleaved_sinusoids(np.arange(length - 1, -length, -1), width)


def relative_shift(scores: Float[Array, "batch heads time distances"]) -> Float[Array, "batch heads time time"]:
    """§2.1: scores by distance $T-1 … -(T-1)$ as scores by key: row $i$ begins at distance $i$ (1901.02860, App. B).

    With one column in front, and read as rows one shorter, every row begins one further to the left than the last.
    """
    batch, heads, time, distances = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    shifted = padded.reshape(batch, heads, distances + 1, time)[:, :, 1:].reshape(scores.shape)
    return shifted[..., :time]


def rotate(x: Float[Array, "batch time channels"], heads: int, base: int) -> Float[Array, "batch time channels"]:
    r"""Not in the paper; in the released checkpoints' code: rotary positions (arXiv 2104.09864, Eq. 34).

    Each head's halves $(a, b)$ turn by $t\,\omega_k$, with $\omega_k = \text{base}^{-2k/d}$.
    """
    batch, time, channels = x.shape
    half = channels // heads // 2
    angles = np.arange(time)[:, None] * float(base) ** (-np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angles)[:, None], x.dtype) for f in (np.cos, np.sin))
    a, b = jnp.split(x.reshape(batch, time, heads, 2 * half), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def chunk_mask(length: int, chunk: int, left: int) -> Bool[Array, "1 1 time time"]:
    """Not in the paper; in the released checkpoint of arXiv 2312.05187: a frame sees its chunk and `left` before it."""
    of = jnp.arange(length) // chunk
    query, key = of[:, None], of[None, :]
    seen = key <= query
    return (seen if left < 0 else seen & (key >= query - left))[None, None]


# --- §2.1, attention --------------------------------------------------------------------------------------------------


class ConformerSelfAttention(MultiHeadAttention):
    r"""§2.1, self-attention that knows how far apart two frames are.

    "relative" is Transformer-XL's (arXiv 1901.02860, §3.3), with learnt $u$ and $v$ for each head:

    $$A_{ij} = (W^Q x_i + u)^\top W^K x_j + (W^Q x_i + v)^\top W^R R_{i-j}$$

    "relative_key" is Shaw's (arXiv 1803.02155, Eq. 5) without the values' part, learnt $w$ for each clipped distance:

    $$A_{ij} = (W^Q x_i)^\top (W^K x_j + w_{\text{clip}(j - i, -l, r)})$$
    """

    def __init__(
        self,
        config: ConformerConfig,
        *,
        positions: bool = True,
        dropout: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, heads = config.hidden_size, config.num_attention_heads
        rate = config.rate(config.attention_dropout) if dropout is None else dropout
        super().__init__(width, heads, dropout=rate, **kwargs)
        kind = config.position_embeddings_type if positions else None
        init = nnx.initializers.xavier_uniform()
        if kind == "relative":
            self.linear_pos = Linear(width, width, use_bias=False, **kwargs)
            self.pos_bias_u = nnx.Param(init(rngs.params(), (heads, width // heads), param_dtype))
            self.pos_bias_v = nnx.Param(init(rngs.params(), (heads, width // heads), param_dtype))
        elif kind == "relative_key":
            distances = config.left_max_position_embeddings + config.right_max_position_embeddings + 1
            self.distance_embedding = Embed(distances, width // heads, **kwargs)
        self.kind, self.config = kind, config

    def _relative(self, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries with $u$, and what positions add to the scores."""
        width = self.config.hidden_size
        table = jnp.asarray(relative_sinusoids(query.shape[2], width), query.dtype)[None]
        distances = split_heads(self.linear_pos(table), self.heads)  # (1, heads, 2T - 1, head_dim)
        u, v = (spread(p[...][:, None], query) for p in (self.pos_bias_u, self.pos_bias_v))
        # (W^Q x_i + v)^T W^R R_d for all distances d, then for the distance i - j of every key j
        scores = jnp.einsum("bhqd,hrd->bhqr", query + v, distances[0])
        return query + u, relative_shift(scores) * self.scale

    def _relative_key(self, query: jax.Array) -> jax.Array:
        left, right = self.config.left_max_position_embeddings, self.config.right_max_position_embeddings
        time = jnp.arange(query.shape[2])
        apart = jnp.clip(time[None, :] - time[:, None], -left, right) + left  # (query, key)
        table = self.distance_embedding.embedding[...].astype(query.dtype)
        scores = jnp.einsum("bhqd,rd->bhqr", query, table)  # one for each distance, not for each key
        apart = jnp.broadcast_to(apart, (*query.shape[:2], *apart.shape))
        return jnp.take_along_axis(at_least_float32(scores), apart, 3).astype(scores.dtype) * self.scale

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "batch time channels"],
        mask: Bool[Array, "#batch 1 #time time"] | None = None,
        dropout: Dropout | None = None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch heads time time"] | None]:
        """Attended frames and, if needed, attention weights; `mask` is True where a frame may be seen."""
        if self.kind is None:
            return super().__call__(x, mask=mask, dropout=dropout, need_weights=need_weights)
        placed = rotate(x, self.heads, self.config.rotary_embedding_base) if self.kind == "rotary" else x
        query = split_heads(self.q_proj(placed), self.heads)
        key, value = split_heads(self.k_proj(placed), self.heads), split_heads(self.v_proj(x), self.heads)
        bias = None
        if self.kind == "relative":
            query, bias = self._relative(query)
        elif self.kind == "relative_key":
            bias = self._relative_key(query)
        output, weights = attend(
            query, key, value, scale=self.scale, mask=mask, bias=bias, dropout_rate=self.dropout_rate, dropout=dropout
        )
        return self.out_proj(merge_heads(output)), weights if need_weights else None


# --- §2.2 and §2.3, convolution and feed-forward ----------------------------------------------------------------------


class ConformerConvolutionModule(nnx.Module):
    r"""§2.2 and Fig. 2: LN, pointwise convolution and GLU, depthwise convolution, BN, Swish, pointwise convolution."""

    def __init__(self, config: ConformerConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, taps = config.hidden_size, config.conv_depthwise_kernel_size
        before = taps - 1 if config.causal_convolution else (taps - 1) // 2
        self.layer_norm = LayerNorm(width, epsilon=config.block_layer_norm_eps, **kwargs)
        self.pointwise_conv1 = Linear(width, 2 * width, use_bias=False, **kwargs)
        self.depthwise_conv = Conv1d(
            width, width, taps, padding=(before, taps - 1 - before), groups=width, use_bias=False, **kwargs
        )
        if config.causal_convolution:
            self.depthwise_layer_norm = LayerNorm(width, epsilon=config.block_layer_norm_eps, **kwargs)
        else:
            self.batch_norm = BatchNorm(width, **kwargs)
        self.pointwise_conv2 = Linear(width, width, use_bias=False, **kwargs)
        self.config = config

    def __call__(
        self, x: Float[Array, "batch time channels"], dropout: Dropout, mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time channels"]:
        """What the convolution adds; frames outside `mask` do not reach it.

        In training, BatchNorm's statistics are those of all frames of the batch, padding included, as in the
        originals' code.
        """
        x = self.layer_norm(x)
        if mask is not None:
            x = jnp.where(mask[:, :, None], x, 0)
        x = self.depthwise_conv(nnx.glu(self.pointwise_conv1(x)))
        if self.config.causal_convolution:
            x = self.depthwise_layer_norm(x)
        else:
            x = self.batch_norm(x, train=dropout.key is not None)
        x = self.pointwise_conv2(activation(self.config.hidden_act)(x))
        return dropout(x, self.config.rate(self.config.conv_dropout))


class ConformerFeedForward(nnx.Module):
    """§2.3 and Fig. 4: two linear maps with Swish between; the LayerNorm in front belongs to the block."""

    def __init__(
        self,
        config: ConformerConfig,
        *,
        act: str | None = None,
        dropout: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kwargs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kwargs)
        self.act = act or config.hidden_act
        self.inner_dropout = config.rate(config.activation_dropout) if dropout is None else dropout
        self.dropout = config.dropout if dropout is None else dropout

    def __call__(self, x: Float[Array, "batch time channels"], dropout: Dropout) -> Float[Array, "batch time channels"]:
        """The network's output."""
        x = dropout(activation(self.act)(self.fc1(x)), self.inner_dropout)
        return dropout(self.fc2(x), self.dropout)


# --- §2.4, block and encoder ------------------------------------------------------------------------------------------


class ConformerBlock(nnx.Module):
    r"""§2.4, Eq. 1: attention and convolution between two half-steps of a feed-forward network."""

    def __init__(self, config: ConformerConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.hidden_size
        self.ffn1_layer_norm = LayerNorm(width, epsilon=config.block_layer_norm_eps, **kwargs)
        self.ffn1 = ConformerFeedForward(config, **kwargs)
        self.self_attn_layer_norm = LayerNorm(width, epsilon=config.block_layer_norm_eps, **kwargs)
        self.self_attn = ConformerSelfAttention(config, **kwargs)
        self.conv_module = ConformerConvolutionModule(config, **kwargs)
        self.ffn2_layer_norm = LayerNorm(width, epsilon=config.block_layer_norm_eps, **kwargs)
        self.ffn2 = ConformerFeedForward(config, **kwargs)
        self.final_layer_norm = LayerNorm(width, epsilon=config.block_layer_norm_eps, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        dropout: Dropout,
        attention_mask: Bool[Array, "#batch 1 #time time"] | None = None,
        mask: Bool[Array, "batch time"] | None = None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time channels"], jax.Array | None]:
        """The block's output and attention weights.

        Args:
            x: frames.
            dropout: source of keys.
            attention_mask: True where a frame may see another.
            mask: True for frames of the recording; the convolution does not see the others.
            need_weights: whether attention weights are returned.
        """
        # x~ = x + ½ FFN(x)
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x), dropout)
        # x' = x~ + MHSA(x~)
        attended, weights = self.self_attn(self.self_attn_layer_norm(x), attention_mask, dropout, need_weights)
        x = x + dropout(attended, self.config.rate(self.config.attention_dropout))
        # x'' = x' + Conv(x')
        x = x + self.conv_module(x, dropout, mask)
        # y = LayerNorm(x'' + ½ FFN(x''))
        return self.final_layer_norm(x + 0.5 * self.ffn2(self.ffn2_layer_norm(x), dropout)), weights


class ConformerEncoder(nnx.Module):
    """Fig. 1, the blocks; the last LayerNorm is not in the paper, but in the released checkpoints."""

    def __init__(self, config: ConformerConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layers = nnx.List([ConformerBlock(config, **kwargs) for _ in range(config.num_hidden_layers)])
        if config.last_layer_norm:
            self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout: Dropout | None = None,
    ) -> BaseModelOutput:
        """Encode frames.

        Args:
            x: frames.
            attention_mask: 1 for frames of the recording, 0 for padding.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the last one's output before the LayerNorm.
            dropout: source of keys: training. Batches are then normalised by their own statistics.
        """
        config, dropout = self.config, dropout or Dropout(None)
        mask = None if attention_mask is None else attention_mask != 0
        seen = None if mask is None else mask[:, None, None, :]
        if mask is not None:
            x = jnp.where(mask[:, :, None], x, 0)
        if not config.masked_convolution:
            mask = None
        if config.chunk_size is not None:
            chunks = chunk_mask(x.shape[1], config.chunk_size, config.left_chunk_num)
            seen = chunks if seen is None else seen & chunks
        x = dropout(x, config.dropout)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states += [x, *unseen(layer)]
            x, weights = layer_drop(layer, x, config.layerdrop, dropout, seen, mask, output_attentions)
            attentions.append(weights)
        return BaseModelOutput(
            last_hidden_state=self.layer_norm(x) if self.config.last_layer_norm else x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


# --- not in the paper: length adaptor --------------------------------------------------------------------------------


class LengthAdaptorLayer(nnx.Module):
    r"""Not in the paper; in the released checkpoints (after arXiv 2207.00952): a Transformer block that shortens.

    What goes into attention and what goes around it are both pooled, each by a gated convolution of its own.
    """

    def __init__(
        self,
        config: ConformerConfig,
        taps: int,
        stride: int,
        *,
        act: str,
        dropout: float,
        ffn_dropout: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, norm = config.hidden_size, {"epsilon": config.block_layer_norm_eps, **kwargs}

        def pooling() -> Conv1d:
            return Conv1d(width, 2 * width, taps, stride=stride, padding=stride // 2, **kwargs)

        self.residual_layer_norm = LayerNorm(width, **norm)
        self.residual_conv = pooling()
        self.self_attn_layer_norm = LayerNorm(width, **norm)
        self.self_attn_conv = pooling()
        self.self_attn = ConformerSelfAttention(config, positions=False, **kwargs)
        self.ffn_layer_norm = LayerNorm(width, **norm)
        self.ffn = ConformerFeedForward(config, act=act, dropout=ffn_dropout, **kwargs)
        self.rate = dropout

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        lengths: Int[Array, " batch"] | None = None,
        real: Bool[Array, "batch time"] | None = None,
        *,
        dropout: Dropout,  # by name: what changes the number of frames is no block of a stack
    ) -> Float[Array, "batch frames hidden"]:
        """Fewer frames; `lengths` says how many of them are speech, and outside `real` the convolutions see zeros."""

        def seen_by_convolutions(x: jax.Array) -> jax.Array:
            return x if real is None else jnp.where(real[:, :, None], x, 0)

        # (batch, time / stride, hidden)
        residual = nnx.glu(self.residual_conv(seen_by_convolutions(self.residual_layer_norm(x))))
        x = nnx.glu(self.self_attn_conv(seen_by_convolutions(self.self_attn_layer_norm(x))))
        seen = None if lengths is None else (jnp.arange(x.shape[1]) < lengths[:, None])[:, None, None, :]
        x = residual + dropout(self.self_attn(x, seen, dropout, need_weights=False)[0], self.rate)
        return x + self.ffn(self.ffn_layer_norm(x), dropout)
