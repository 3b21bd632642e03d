r"""# Performance-Efficiency Trade-offs in Unsupervised Pre-training for Speech Recognition (SEW, SEW-D)

Felix Wu, Kwangyoun Kim, Jing Pan, Kyu Han, Kilian Q. Weinberger, Yoav Artzi, 2021, arXiv 2109.06870.

wav2vec 2.0, measured for where its time goes and mended there. The first convolutions, which see the most frames, get
the fewest channels, and cheap one-frame convolutions between the strides give the depth back. The Transformer runs on
every second frame: frames are averaged in pairs, and after the Transformer each is opened into two again, so that
masks, distractors and letters keep their 20 ms. SEW-D exchanges the attention for DeBERTa's, in which content and
relative position are compared separately, and gets by with a narrower network.

    waveform ── 13 convolutions, 64 … 512 channels, 320 samples a frame ──> LN ──┬─> product quantiser ─> MLP ─> q
                                                                                 │                           │
      (Linear) ── spans masked ──┬── mean of 2 frames ──────────┐                │                contrastive loss
                                 └── conv, stride 2 (position) ─┴─(+)─> (T/2, d) │                           │
      ── N × [attention, MLP] ── Linear d → 2d, GELU, two frames ──> (T, d) ─────┴── MLP ─> c ───────────────┘
                                                                       └── Linear ──> letters, CTC

| paper | here |
| --- | --- |
| § "Compact wave feature extractors" (WFE-C) | `SEWConfig.conv_dim`, wav2vec 2.0's `Wav2Vec2FeatureEncoder` |
| § "Squeezed context networks" | `SEWPositionalConvEmbedding`, `SEWUpsampling`, `SEWEncoder`, `SEWModel` |
| § "MLP predictor heads" | `SEWPredictor`, `SEWForPreTraining` |
| § "SEW-D", disentangled attention (DeBERTa, arXiv 2006.03654, Eq. 4) | `DisentangledSelfAttention` |
| § "SEW-D", the squeezed network of it | `SEWDLayer`, `SEWDEncoder`, `SEWDModel` |
| the same, log buckets (DeBERTa v3, arXiv 2111.09543) | `log_bucket_positions` |
| pre-training objective (wav2vec 2.0's) | `SEWForPreTraining`, `SEWDForPreTraining` |
| Tables of sizes | `SEWConfig.sew_tiny()` … `.sew_d_base_plus()` |
| not in the paper; in the released checkpoints | `SEWForCTC`, `SEWDForCTC` |
| the same | `SEWFeatureProjection`, `SEWDFeatureProjection` |
| the same | `SEWForSequenceClassification`, `SEWDForSequenceClassification` |

The convolutions, masking, quantiser and heads are wav2vec 2.0's, imported from its file. `hidden_states` are at the
Transformer's rate, one every 40 ms, as in `transformers`.

An odd last frame has no partner: it is dropped before the Transformer, and the output ends in a frame of zeros. In a
padded batch the original pairs it with padding instead, so that a recording's end depends on its neighbours.
`squeeze_rule="floor"` treats every recording of a batch as if it were alone; "max" (the default) does as `transformers`
does from its version 5 on. Its earlier versions and the original code drop the half pair from the attention, as
"floor" does, and let it through in the output. Of a padded batch a classifier over mixed layers
(`use_weighted_layer_sum`) pools the frames of the recording; `transformers` counts frames of 20 ms among those of
40 ms, and so pools padding. Pre-training, which it leaves out, is here.

Checkpoints: `asapp/sew-tiny-100k`, `-small-100k`, `-mid-100k`, `-tiny-100k-ft-ls100h`, `asapp/sew-d-tiny-100k`,
`-small-100k`, `-mid-100k`, `-mid-400k`, `-mid-k127-100k`, `-mid-k127-400k`, `-base-100k`, `-base-plus-100k`,
`-base-plus-400k`, `-tiny-100k-ft-ls100h`, `-mid-400k-ft-ls100h`, and the original `.pt` files of the same names.

    import audiozoo
    model = audiozoo.load("asapp/sew-d-tiny-100k-ft-ls100h")
    processor = audiozoo.load_processor("asapp/sew-d-tiny-100k-ft-ls100h")
    logits = model(**processor(waveform, sampling_rate=16_000)).logits
    text = processor.batch_decode(logits.argmax(-1))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import CheckpointError, UsageError
from audiozoo.layers import (
    Dropout,
    Embed,
    LayerNorm,
    Linear,
    activation,
    attend,
    layer_drop,
    merge_heads,
    promote,
    split_heads,
)
from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.batch_norm import BatchNorm
from audiozoo.layers.stacking import unseen
from audiozoo.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2Encoder,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
    Wav2Vec2PositionalConvEmbedding,
)
from audiozoo.outputs import BaseModelOutput


@dataclass(frozen=True)
class SEWConfig(Wav2Vec2Config):
    """Sizes of one checkpoint of SEW or SEW-D (§ "Experiments"): wav2vec 2.0's, and what the paper adds."""

    squeeze_factor: int = 2  # frames that become one for the Transformer
    squeeze_rule: str = "max"  # half pairs at the end of padded recordings: "max" as released, "floor" as if alone
    conv_dim: tuple[int, ...] = (64, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512)  # channels
    conv_stride: tuple[int, ...] = (5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1)  # 320 samples a frame in all: 20 ms
    conv_kernel: tuple[int, ...] = (10, 3, 1, 3, 1, 3, 1, 3, 1, 2, 1, 2, 1)  # taps
    ctc_loss_reduction: str = "mean"  # over the batch: "sum", "mean"
    frame_rule: str = "lengths"  # how padding is counted in frames; "samples" as in the released code
    mlp_hidden_size: int = 4096  # width inside the predictor heads of pre-training
    position_buckets: int = 256  # SEW-D: buckets of relative positions in each direction
    max_position_embeddings: int = 512  # SEW-D: squeezed frames; all distances beyond share the last bucket
    share_att_key: bool = True  # SEW-D: positions go through the projections of the content
    pos_att_type: tuple[str, ...] = ("p2c", "c2p")  # SEW-D: which of the two cross terms there are
    norm_rel_ebd: str = "layer_norm"  # SEW-D: LayerNorm on the table of positions; "none" for none
    feature_layer_norm_eps: float = 1e-5  # SEW-D: in the LayerNorm of the features

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.squeeze_rule not in ("max", "floor"):
            raise CheckpointError(f"squeeze_rule is {self.squeeze_rule!r}; there are 'max' and 'floor'.")
        if self.squeeze_factor < 1:
            raise CheckpointError(f"squeeze_factor is {self.squeeze_factor}; a squeezed frame is made of 1 at least.")
        if self.position_buckets < 2:
            raise CheckpointError(f"position_buckets is {self.position_buckets}; there must be 2 at least.")
        if unknown := sorted(set(self.pos_att_type) - {"p2c", "c2p"}):
            raise CheckpointError(f"pos_att_type names {', '.join(unknown)}; there are p2c and c2p.")

    @classmethod
    def _sized(cls, layers: int, width: int, **others: Any) -> SEWConfig:
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
        sizes |= {"intermediate_size": 4 * width, "num_conv_pos_embeddings": 31}
        return cls(**(sizes | others))

    @classmethod
    def sew_tiny(cls) -> SEWConfig:
        """SEW-tiny: 12 blocks of width 512, 40.7 M parameters."""
        return cls._sized(12, 512, layerdrop=0.05)

    @classmethod
    def sew_small(cls) -> SEWConfig:
        """SEW-small: 12 blocks of width 768, 89.6 M parameters."""
        return cls._sized(12, 768, layerdrop=0.05)

    @classmethod
    def sew_mid(cls) -> SEWConfig:
        """SEW-mid: 24 blocks of width 768, 174.7 M parameters."""
        return cls._sized(24, 768, layerdrop=0.2)

    @classmethod
    def _disentangled(cls, layers: int, width: int, **others: Any) -> SEWConfig:
        return cls._sized(layers, width, **({"layer_norm_eps": 1e-7, "hidden_act": "gelu_python"} | others))

    @classmethod
    def sew_d_tiny(cls) -> SEWConfig:
        """SEW-D-tiny: 12 blocks of width 384, 24.1 M parameters."""
        return cls._disentangled(12, 384, layerdrop=0.05)

    @classmethod
    def sew_d_small(cls) -> SEWConfig:
        """SEW-D-small: 12 blocks of width 512, 41.0 M parameters."""
        return cls._disentangled(12, 512, layerdrop=0.05)

    @classmethod
    def sew_d_mid(cls) -> SEWConfig:
        """SEW-D-mid: 24 blocks of width 512, 78.8 M parameters."""
        return cls._disentangled(24, 512, layerdrop=0.2)

    @classmethod
    def sew_d_mid_k127(cls) -> SEWConfig:
        """SEW-D-mid with 127 taps in the positional convolution."""
        return cls._disentangled(24, 512, layerdrop=0.2, num_conv_pos_embeddings=127)

    @classmethod
    def sew_d_base(cls) -> SEWConfig:
        """SEW-D-base: 24 blocks of width 768, 175.1 M parameters."""
        return cls._disentangled(24, 768, layerdrop=0.2)

    @classmethod
    def sew_d_base_plus(cls) -> SEWConfig:
        """SEW-D-base+: SEW-D-base with half as many channels again in the convolutions, 177.0 M parameters."""
        channels = tuple(c // 2 * 3 for c in cls().conv_dim)
        return cls._disentangled(24, 768, layerdrop=0.2, conv_dim=channels)


# --- § "Squeezed context networks" -----------------------------------------------------------------------------------


class SEWFeatureProjection(nnx.Module):
    """Not in the paper; in the released checkpoints: a LayerNorm, and a linear map only where the widths differ."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layer_norm = LayerNorm(config.conv_dim[-1], epsilon=self.epsilon(config), **kwargs)
        if config.conv_dim[-1] != config.hidden_size:
            self.projection = Linear(config.conv_dim[-1], config.hidden_size, **kwargs)
        self.config = config

    @staticmethod
    def epsilon(config: Any) -> float:
        """Of the LayerNorm."""
        return config.layer_norm_eps

    def __call__(
        self, x: Float[Array, "batch frames features"], dropout: Dropout
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch frames features"]]:
        """What is masked and squeezed, and the normalised features, which are what the quantiser reads."""
        features = self.layer_norm(x)
        x = self.projection(features) if hasattr(self, "projection") else features
        return dropout(x, self.config.feat_proj_dropout), features


class SEWPositionalConvEmbedding(Wav2Vec2PositionalConvEmbedding):
    """§ "Squeezed context networks": wav2vec 2.0's positional convolution, at the rate of the squeezed frames."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv.stride = config.squeeze_factor
        self.surplus = 1 if config.num_conv_pos_embeddings % 2 == 0 else 0

    def __call__(
        self, x: Float[Array, "batch frames hidden"], training: bool = False
    ) -> Float[Array, "batch squeezed hidden"]:
        """What is added to the squeezed frames. An even number of taps gives a frame too many; the last one goes."""
        y = self.conv(x)
        return activation(self.activation)(y[:, : y.shape[1] - self.surplus])


class SEWUpsampling(nnx.Module):
    """§ "Squeezed context networks": each squeezed frame opens into as many as went into it."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        width, factor = config.hidden_size, config.squeeze_factor
        self.projection = Linear(width, width * factor, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.factor, self.activation = factor, config.feat_extract_activation

    def __call__(self, x: Float[Array, "batch squeezed hidden"]) -> Float[Array, "batch frames hidden"]:
        """The channels of a squeezed frame, widened, are those of its frames one after the other."""
        batch, frames, width = x.shape
        return activation(self.activation)(self.projection(x)).reshape(batch, frames * self.factor, width)


def squeeze_mask(mask: Bool[Array, "batch frames"], factor: int, rule: str) -> Bool[Array, "batch squeezed"]:
    """Which squeezed frames count: by "max" those of which any frame is speech, by "floor" those of which all are."""
    groups = mask[:, : mask.shape[1] - mask.shape[1] % factor].reshape(len(mask), -1, factor)
    return groups.any(axis=-1) if rule == "max" else groups.all(axis=-1)


class SEWEncoder(nnx.Module):
    r"""§ "Squeezed context networks": the Transformer on every second frame."""

    layer_class: ClassVar[type] = Wav2Vec2Encoder.layer_class

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.pos_conv_embed = SEWPositionalConvEmbedding(config, **kwargs)
        self.layers = nnx.List([self.layer_class(config, **kwargs) for _ in range(config.num_hidden_layers)])
        self.upsample = SEWUpsampling(config, **kwargs)
        self.make_norms(config, kwargs)
        self.config = config

    def make_norms(self, config: Any, kwargs: dict[str, Any]) -> None:
        """The parts in which SEW and SEW-D differ beside their blocks."""
        self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def enter(
        self, x: Float[Array, "batch squeezed hidden"], dropout: Dropout
    ) -> tuple[Float[Array, "batch squeezed hidden"], list[Any]]:
        """What the first block reads, and what every block is told beside its input and the mask."""
        return dropout(self.layer_norm(x), self.config.hidden_dropout), []

    def squeeze(self, x: Float[Array, "batch frames hidden"]) -> Float[Array, "batch squeezed hidden"]:
        """The mean of each group of frames, and its position; frames without a whole group are left out.

        Raises:
            UsageError: if there is no whole group.
        """
        batch, frames, width = x.shape
        factor = self.config.squeeze_factor
        count = frames // factor
        if count == 0:
            raise UsageError(f"{frames} frames are too few: the Transformer sees one for {factor} of them.")
        mean = x[:, : count * factor].reshape(batch, count, factor, width).mean(axis=2)
        return mean + self.pos_conv_embed(x)[:, :count]

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "batch frames"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        hidden_states_before_norm: bool = False,
        dropout: Dropout | None = None,
    ) -> BaseModelOutput:
        """Contextualized representations, as many as there are frames; hidden states are those of squeezed frames.

        Args:
            x: projected features.
            mask: True where a frame is speech. Padding is zeroed and not attended to.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the input of every block, and the output of the last one.
            hidden_states_before_norm: of no effect, since no LayerNorm follows the last block.
            dropout: source of dropout keys.
        """
        config, dropout = self.config, dropout or Dropout(None)
        frames, keys, counted = x.shape[1], None, None
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
            counted = squeeze_mask(mask, config.squeeze_factor, config.squeeze_rule)
            keys = counted[:, None, None, :]
        x, shared = self.enter(self.squeeze(x), dropout)
        hidden_states, attentions = [x], []
        for layer in self.layers:
            block = partial(layer, need_weights=output_attentions)
            x, weights = layer_drop(block, x, config.layerdrop, dropout, *shared, keys)
            hidden_states += [*unseen(layer), x]
            attentions.append(weights)
        x = self.upsample(x)
        if counted is not None and config.squeeze_rule == "floor":
            x = jnp.where(jnp.repeat(counted, config.squeeze_factor, axis=1)[..., None], x, 0)
        return BaseModelOutput(
            last_hidden_state=jnp.pad(x, ((0, 0), (0, frames - x.shape[1]), (0, 0))),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class SEWModel(Wav2Vec2Model):
    """Figure "SEW": feature encoder, masking, squeezed context network."""

    feature_projection_class = SEWFeatureProjection
    encoder_class = SEWEncoder
    stable_encoder_class = SEWEncoder

    @property
    def frame_rule(self) -> str:  # type: ignore[override]
        """How padding is counted in frames; see `audiozoo.models.wav2vec2.frame_mask`."""
        return self.config.frame_rule

    def frame_mask(
        self, attention_mask: Int[Array, "batch samples"], frames: int, *, adapter: bool = True
    ) -> Bool[Array, "batch frames"]:
        """Which frames are speech; of as many as the Transformer sees, which squeezed ones."""
        total = int(self.frame_lengths(attention_mask.shape[1], adapter=adapter))
        mask = super().frame_mask(attention_mask, total, adapter=adapter)
        if frames == total:
            return mask
        return squeeze_mask(mask, self.config.squeeze_factor, self.config.squeeze_rule)


# --- § "SEW-D": disentangled attention -------------------------------------------------------------------------------


def log_bucket_positions(distances: np.ndarray, buckets: int, maximum: int) -> np.ndarray:
    r"""Signed buckets of distances $\delta = i - j$ (DeBERTa v3): exact up to half the buckets $m$, logarithmic beyond.

    $$\operatorname{sgn}(\delta)\Bigl(m + \Bigl\lceil \frac{\log(|\delta|/m)}{\log((M - 1)/m)}\,(m - 1)
    \Bigr\rceil\Bigr) \quad\text{for } |\delta| > m$$

    The logarithm is taken in float32, as in the models' training.
    """
    middle = buckets // 2
    size = np.maximum(np.abs(distances), middle).astype(np.float32)
    whole = np.log(np.float32((maximum - 1) / middle))
    far = np.ceil(np.log(size / np.float32(middle)) / whole * np.float32(middle - 1)) + middle
    return np.where(np.abs(distances) <= middle, distances, np.sign(distances) * far).astype(np.int64)


def skew(x: Float[Array, "*leading frames offsets"]) -> Float[Array, "*leading frames frames"]:
    r"""$A_{ij} = X_{i,\,j-i}$ from $X$ at the offsets $-(T-1) \dots T-1$, without a gather (arXiv 1901.02860, B)."""
    *leading, frames, offsets = x.shape
    if frames == 1:
        return x
    flat = x.reshape(*leading, frames * offsets)
    lines = flat[..., frames - 1 : frames - 1 + frames * (offsets - 1)]
    return lines.reshape(*leading, frames, offsets - 1)[..., :frames]


class DisentangledSelfAttention(nnx.Module):
    r"""§ "SEW-D": self-attention with content and relative position apart (DeBERTa, arXiv 2006.03654, Eq. 4).

    $$\tilde A_{ij} = \underbrace{Q^c_i {K^c_j}^\top}_{\text{content-to-content}} + \underbrace{Q^c_i
    {K^r_{\delta(i,j)}}^\top}_{\text{content-to-position, c2p}} + \underbrace{K^c_j
    {Q^r_{\delta(j,i)}}^\top}_{\text{position-to-content, p2c}}, \qquad
    H = \operatorname{softmax}\Bigl(\frac{\tilde A}{\sqrt{3d}}\Bigr) V^c$$
    """

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kwargs["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, **kwargs) for _ in range(3))
        if not config.share_att_key:
            if "c2p" in config.pos_att_type:
                self.pos_key_proj = Linear(width, width, **kwargs)
            if "p2c" in config.pos_att_type:
                self.pos_query_proj = Linear(width, width, **kwargs)
        self.heads = config.num_attention_heads
        self.scale = (width // self.heads * (1 + len(set(config.pos_att_type)))) ** -0.5
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        table: Float[Array, "rows hidden"],
        rows: Int[np.ndarray, " offsets"],
        *,
        mask: Bool[Array, "batch 1 1 frames"] | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"]]:
        r"""Attend.

        Args:
            x: content.
            table: an embedding for each bucket of positions.
            rows: the bucket of $\delta = i - j$ for each of $-(T-1) \dots T-1$.
            mask: True for keys that are speech.
            dropout: source of dropout keys.

        Returns:
            The heads' outputs side by side, and the attention weights.
        """
        config, dropout = self.config, dropout or Dropout(None)
        query, key, value = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        table = dropout(table, config.activation_dropout)[None]
        bias = None

        def at(rows: Int[np.ndarray, " offsets"], projection: Linear) -> Float[Array, "heads offsets channels"]:
            positions = split_heads(projection(table), self.heads)[0]
            return at_least_float32(positions)[:, rows].astype(key.dtype)  # many offsets share a far row

        # Position-to-content: K^c_j Q^r at the offsets i - j of each key j, turned over to queries by keys.
        if "p2c" in config.pos_att_type:
            projection = self.q_proj if config.share_att_key else self.pos_query_proj
            bias = skew(jnp.einsum("bhkd,hod->bhko", key, at(rows, projection))).swapaxes(2, 3)
        # Content-to-position: Q^c_i K^r at the offsets j - i of each query i, which are those of i - j turned round.
        if "c2p" in config.pos_att_type:
            projection = self.k_proj if config.share_att_key else self.pos_key_proj
            scores = skew(jnp.einsum("bhqd,hod->bhqo", query, at(rows[::-1], projection)))
            bias = scores if bias is None else bias + scores
        output, weights = attend(
            query,
            key,
            value,
            scale=self.scale,
            mask=mask,
            bias=None if bias is None else bias * self.scale,
            dropout_rate=config.attention_dropout,
            dropout=dropout,
        )
        return merge_heads(output), weights


class SEWDLayer(nnx.Module):
    r"""§ "SEW-D": a block of DeBERTa, norms last."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = kwargs | {"kernel_init": nnx.initializers.normal(config.initializer_range)}
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = DisentangledSelfAttention(config, **kwargs)
        self.attention_output = Linear(width, width, **linear)
        self.layer_norm = LayerNorm(width, epsilon=config.layer_norm_eps, **kwargs)
        self.intermediate_dense = Linear(width, inner, **linear)
        self.output_dense = Linear(inner, width, **linear)
        self.final_layer_norm = LayerNorm(width, epsilon=config.layer_norm_eps, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        dropout: Dropout,
        table: Float[Array, "rows hidden"],
        rows: Int[np.ndarray, " offsets"],
        mask: Bool[Array, "batch 1 1 frames"] | None,
        *,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
        """One block; returns its output and, if they are needed, its attention weights."""
        config = self.config
        attention, weights = self.attention(x, table, rows, mask=mask, dropout=dropout)
        attention = dropout(self.attention_output(attention), config.activation_dropout)
        x = self.layer_norm(x + attention)
        inner = activation(config.hidden_act)(self.intermediate_dense(x))
        x = self.final_layer_norm(x + dropout(self.output_dense(inner), config.activation_dropout))
        return x, weights if need_weights else None


class SEWDEncoder(SEWEncoder):
    r"""§ "SEW-D": the squeezed Transformer with disentangled attention; one table of positions for all blocks."""

    layer_class = SEWDLayer

    def make_norms(self, config: Any, kwargs: dict[str, Any]) -> None:
        """A table of positions, and its LayerNorm; there is none after the positional convolution."""
        self.rel_embeddings = Embed(2 * config.position_buckets, config.hidden_size, **kwargs)
        if "layer_norm" in config.norm_rel_ebd.lower():
            self.rel_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def enter(
        self, x: Float[Array, "batch squeezed hidden"], dropout: Dropout
    ) -> tuple[Float[Array, "batch squeezed hidden"], list[Any]]:
        """The squeezed frames as they are; the table, and which of its rows stands for each distance."""
        config, span = self.config, self.config.position_buckets
        offsets = np.arange(1 - x.shape[1], x.shape[1])
        buckets = log_bucket_positions(offsets, span, config.max_position_embeddings)
        (table,) = promote(self.rel_embeddings.embedding[...], dtype=x.dtype)
        if hasattr(self, "rel_layer_norm"):
            table = self.rel_layer_norm(table)
        return x, [table, np.clip(buckets + span, 0, 2 * span - 1)]


class SEWDFeatureProjection(SEWFeatureProjection):
    """Not in the paper; in the released checkpoints: SEW's, with an epsilon of its own."""

    @staticmethod
    def epsilon(config: Any) -> float:
        """Of the LayerNorm."""
        return config.feature_layer_norm_eps


class SEWDModel(SEWModel):
    """§ "SEW-D": feature encoder, masking, squeezed context network with disentangled attention."""

    feature_projection_class = SEWDFeatureProjection
    encoder_class = SEWDEncoder
    stable_encoder_class = SEWDEncoder


# --- pre-training ----------------------------------------------------------------------------------------------------


class SEWPredictor(nnx.Module):
    """§ "MLP predictor heads": Linear, BatchNorm, ReLU, Linear, in place of wav2vec 2.0's linear projections."""

    def __init__(self, inputs: int, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = kwargs | {"kernel_init": nnx.initializers.glorot_normal()}
        self.dense_1 = Linear(inputs, config.mlp_hidden_size, use_bias=False, **linear)
        self.batch_norm = BatchNorm(config.mlp_hidden_size, **kwargs)
        self.dense_2 = Linear(config.mlp_hidden_size, config.proj_codevector_dim, **linear)

    def __call__(
        self,
        x: Float[Array, "batch frames inputs"],
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        training: bool = False,
    ) -> Float[Array, "batch frames projected"]:
        """Project every frame; in training, normalise by the statistics of the masked ones."""
        batch, frames, _ = x.shape
        y = self.dense_1(x).reshape(batch * frames, -1)
        counted = None if mask_time_indices is None else jnp.asarray(mask_time_indices, bool).reshape(-1)
        y = jax.nn.relu(self.batch_norm(y, training, counted))
        return self.dense_2(y.reshape(batch, frames, -1))


class SEWForPreTraining(Wav2Vec2ForPreTraining):
    """§ "MLP predictor heads": wav2vec 2.0's objective (arXiv 2006.11477, Eq. 2), with MLPs before the comparison.

    In training (with a `key`) the running statistics of the MLPs' BatchNorms move a step; they are `nnx.BatchStat`s.
    """

    base_model_prefix = "sew"
    base_class = SEWModel

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, **kwargs)
        self.project_hid = SEWPredictor(config.hidden_size, config, **kwargs)  # type: ignore[assignment]
        self.project_q = SEWPredictor(config.codevector_dim, config, **kwargs)  # type: ignore[assignment]

    def project(
        self,
        which: str,
        x: Float[Array, "batch frames width"],
        mask_time_indices: Bool[Array, "batch frames"] | None,
        training: bool,
    ) -> Float[Array, "batch frames projected"]:
        """`project_hid` or `project_q`."""
        return getattr(self, which)(x, mask_time_indices, training)


class SEWDForPreTraining(SEWForPreTraining):
    """§ "SEW-D", pre-training."""

    base_model_prefix = "sew_d"
    base_class = SEWDModel


# --- the heads of the released checkpoints ---------------------------------------------------------------------------


class SEWForCTC(Wav2Vec2ForCTC):
    """§ "Experiments": a linear layer onto the letters, trained with CTC."""

    base_model_prefix = "sew"
    base_class = SEWModel


class SEWForSequenceClassification(Wav2Vec2ForSequenceClassification):
    """Not in the paper; in the released checkpoints: a class for a recording (keyword)."""

    base_model_prefix = "sew"
    base_class = SEWModel


class SEWDForCTC(Wav2Vec2ForCTC):
    """§ "Experiments": a linear layer onto the letters, trained with CTC."""

    base_model_prefix = "sew_d"
    base_class = SEWDModel


class SEWDForSequenceClassification(Wav2Vec2ForSequenceClassification):
    """Not in the paper; in the released checkpoints: a class for a recording (keyword)."""

    base_model_prefix = "sew_d"
    base_class = SEWDModel
