r"""# WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing

Sanyuan Chen, Chengyi Wang, Zhengyang Chen, Yu Wu, Shujie Liu, Zhuo Chen, Jinyu Li, Naoyuki Kanda, Takuya Yoshioka,
Xiong Xiao, Jian Wu, Long Zhou, Shuo Ren, Yanmin Qian, Yao Qian, Jian Wu, Michael Zeng, Xiangzhan Yu, Furu Wei, 2021,
arXiv 2110.13900.

A model that is to serve every speech task has to know who speaks as well as what is said. WavLM learns as HuBERT does,
predicting the cluster of every hidden frame, but it is handed *disturbed* speech: a stretch of another utterance or of
noise is laid over a part of the waveform, and the clusters to predict are those of the main speaker alone. Its
Transformer also learns where frames stand to each other: a bias for each bucket of distances, one table for all
blocks, which each frame opens or closes by a gate of its own.

    another utterance, or noise ─┐ (masked speech denoising)
    waveform 16 kHz ─────────────┴─> wav2vec 2.0's convolutions ──> spans masked ──> + conv positions
                                                                                        │
      distance table d (320 buckets × heads) ──────────┐                                │
                                                       ▼                                ▼
      N × [ softmax( q·k/√d + gate(x) · d_{i−j} ) v , MLP ] ──> Linear ── cosine / 0.1 ──> cluster of each masked frame

| paper | here |
| --- | --- |
| §IV-A, gated relative position bias | `WavLMAttention`, `relative_position_buckets` |
| §IV-A, Transformer | `WavLMEncoder`, `WavLMEncoderLayer`, `WavLMModel` |
| §IV-B, masked speech denoising and prediction; Algorithm 1 | `draw_mixes`, `mix` |
| §IV-B, Eq. 7, loss (HuBERT's, arXiv 2106.07447, Eq. 3) | `WavLMForPreTraining` |
| §V-A, sizes | `WavLMConfig.base()`, `.base_plus()`, `.large()` |
| not in the paper; in the released checkpoints | `WavLMFor…` heads, `WavLMEncoder…StableLayerNorm` |
| §V-C, speaker verification | `WavLMForSpeakerVerification` |

The convolutions, masking and heads are wav2vec 2.0's, the masked prediction is HuBERT's, imported from their files. The
paper gates by the projected query; the released models, and this one, by what the attention layer reads, cut into
heads. The released files hold no prediction head, so that `WavLMForPreTraining` starts it afresh.

Where `transformers` and this file part: attention weights are those of each head (`transformers` returns their mean
in place of each); for a pre-norm model the last of the hidden states is normalised (`hidden_states_before_norm=True`
gives what its version 5 returns); x-vectors pool the frames that the dilated layers really see. Pre-training, which it
leaves out, is here. Of a padded batch, `frame_rule="samples"` counts frames as the released code does, "lengths" as
`transformers` does: usually one frame fewer.

Checkpoints: `microsoft/wavlm-base`, `-base-plus`, `-large`, `-base-sd`, `-base-sv`, `-base-plus-sd`, `-base-plus-sv`,
and Microsoft's own `WavLM-Base.pt`, `WavLM-Base+.pt`, `WavLM-Large.pt` (and torchaudio's `wavlm_base.pth` and its
likes), and with ECAPA-TDNN for speakers `wavlm_large_finetune.pth` and its likes.

    import audiozoo
    model = audiozoo.load("microsoft/wavlm-base-plus-sv")
    processor = audiozoo.load_processor("microsoft/wavlm-base-plus-sv")
    voices = model(**processor([one, other], sampling_rate=16_000)).embeddings
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    MultiHeadAttention,
    attend,
    merge_heads,
    split_heads,
)
from audiozoo.layers.attention import TURNS_FROM
from audiozoo.layers.basic import at_least_float32, spread
from audiozoo.models.hubert import masked_prediction, targets_of_frames
from audiozoo.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2Encoder,
    Wav2Vec2FeedForward,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForSpeakerVerification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
    _WithBackbone,
    check_every_frame,
    check_labels,
    features_penalty,
)
from audiozoo.outputs import ModelOutput


@dataclass(frozen=True)
class WavLMConfig(Wav2Vec2Config):
    """Sizes of one checkpoint (§V-A): wav2vec 2.0's, and what the paper adds."""

    num_buckets: int = 320  # rows of the table of relative positions, half of them for each direction
    max_bucket_distance: int = 800  # frames; all distances beyond share the last bucket
    ctc_loss_reduction: str = "mean"  # over the batch: "sum", "mean"
    num_clusters: int = 504  # classes of the pre-training targets
    label_rate: float = 50.0  # pre-training targets a second
    frame_rule: str = "lengths"  # how padding is counted in frames; "samples" as in the released code

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise CheckpointError(f"num_buckets ({self.num_buckets}) does not divide into four.")

    @classmethod
    def base(cls) -> WavLMConfig:
        """§V-A, WavLM Base: 12 blocks of width 768, pre-trained on 960 hours.

        94.4 M parameters; 94.7 M with the head of pre-training, which the paper counts.
        """
        return cls()

    @classmethod
    def base_plus(cls) -> WavLMConfig:
        """§V-A, WavLM Base+: Base, pre-trained on 94,000 hours."""
        return cls()

    @classmethod
    def large(cls) -> WavLMConfig:
        """§V-A, WavLM Large: 24 pre-norm blocks of width 1024, LayerNorm in the convolutions.

        315.5 M parameters; 316.6 M with the head of pre-training.
        """
        return cls(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            codevector_dim=768,
            proj_codevector_dim=768,
        )


# --- §IV-A, gated relative position bias ------------------------------------------------------------------------------


def relative_position_buckets(distances: np.ndarray, num_buckets: int = 320, max_distance: int = 800) -> np.ndarray:
    r"""The bucket of each signed distance $j - i$ in frames (§IV-A; T5's rule, arXiv 1910.10683).

    Half of the $n$ buckets belong to each direction. Of that half the first $n/4$ hold one distance each; the others
    hold ranges that widen with the logarithm, up to the maximum $m$:

    $$\left\lfloor \frac n4 \left(1 + \frac{\log (|d| / \tfrac n4)}{\log (m / \tfrac n4)}\right) \right\rfloor
    \le \frac n2 - 1$$

    The logarithm is taken in float32, as in the models' training, so that distances at the edge of a range stay on
    their side of it.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    with np.errstate(divide="ignore"):
        logarithm = np.log(size.astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + np.where(size < exact, 0, logarithm * np.float32(half - exact)).astype(np.int64)
    return np.where(distances > 0, half, 0) + np.where(size < exact, size, np.minimum(far, half - 1))


def toeplitz(values: Float[Array, "heads offsets"]) -> Float[Array, "heads frames frames"]:
    r"""$M_{ij} = v_{j-i}$ from $v$ at the offsets $-(T-1) \dots T-1$, by copying rows alone, without a gather."""
    heads, offsets = values.shape
    frames = (offsets + 1) // 2
    # Rows of a text of period 2T, read in lines of 2T - 1: each line begins one later in the period.
    text = jnp.broadcast_to(jnp.pad(values, ((0, 0), (0, 1)))[:, None], (heads, frames, offsets + 1))
    lines = text.reshape(heads, -1)[:, : frames * offsets].reshape(heads, frames, offsets)
    return lines[:, :, frames - 1 :]


def attend_gated(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch heads keys head_dim"],
    value: Float[Array, "batch heads keys head_dim"],
    gate: Float[Array, "batch heads queries 1"],
    position_bias: Float[Array, "heads queries keys"],
    *,
    scale: float,
    mask: Bool[Array, "batch 1 1 keys"] | None = None,
) -> Float[Array, "batch heads queries head_dim"]:
    r"""$\operatorname{softmax}(\text{scale}\;QK^\top + g\,d)\,V$ for callers that do not look at the weights.

    On a CPU the heads of long inputs take turns, so that the scores of one stay in the cache; the sum of the softmax
    divides the output, which is smaller than the weights.
    """

    def whole(*arrays: Any) -> jax.Array:
        query, key, value, gate, position_bias, mask = arrays
        return attend(query, key, value, scale=scale, mask=mask, bias=at_least_float32(gate) * position_bias)[0]

    def in_turns(*arrays: Any) -> jax.Array:
        query, key, value, gate, position_bias, mask = arrays
        batch, heads = query.shape[:2]
        accumulate = jnp.promote_types(query.dtype, jnp.float32)

        def one(index: jax.Array) -> jax.Array:
            item, head = index // heads, index % heads
            scores = jnp.einsum(
                "qd,kd->qk", query[item, head] * scale, key[item, head], preferred_element_type=accumulate
            )
            scores = scores + at_least_float32(gate[item, head]) * position_bias[head]
            if mask is not None:
                scores = jnp.where(mask[item, 0], scores, jnp.finfo(scores.dtype).min)
            weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
            output = weights.astype(value.dtype) @ value[item, head]
            return (output / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)

        return jax.lax.map(one, jnp.arange(batch * heads)).reshape(*query.shape[:3], value.shape[3])

    arrays = (query, key, value, gate, position_bias, mask)
    if query.shape[2] * key.shape[2] < TURNS_FROM:
        return whole(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=in_turns, default=whole)


class WavLMAttention(MultiHeadAttention):
    r"""§IV-A: self-attention with a gated relative position bias.

    $$a_{ij} \propto \exp\Bigl(\frac{q_i \cdot k_j}{\sqrt d} + r_{ij}\Bigr), \qquad
    g^\text{update}_i = \sigma(x_i \cdot u), \quad g^\text{reset}_i = \sigma(x_i \cdot w)$$

    $$\tilde r_{ij} = s\, g^\text{reset}_i\, d_{j-i}, \qquad
    r_{ij} = d_{j-i} + g^\text{update}_i\, d_{j-i} + (1 - g^\text{update}_i)\, \tilde r_{ij}$$

    `gru_rel_pos_linear` gives four numbers for each gate, which are summed; the released code's first gate is
    $1 - g^\text{update}$; `gru_rel_pos_const` is $s$.
    """

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kwargs["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        super().__init__(config.hidden_size, config.num_attention_heads, dropout=config.attention_dropout, **kwargs)
        self.gru_rel_pos_linear = Linear(config.hidden_size // config.num_attention_heads, 8, **kwargs)
        self.gru_rel_pos_const = nnx.Param(jnp.ones((1, config.num_attention_heads, 1, 1), param_dtype))

    def gate(self, x: Float[Array, "batch frames channels"]) -> Float[Array, "batch heads frames 1"]:
        r"""What each query multiplies $d$ by: $1 + g^\text{update} + (1 - g^\text{update})\,s\,g^\text{reset}$."""
        gates = self.gru_rel_pos_linear(split_heads(x, self.heads))
        gates = jax.nn.sigmoid(gates.reshape(*gates.shape[:-1], 2, 4).sum(axis=-1))
        keep, reset = gates[..., :1], gates[..., 1:]  # keep = 1 - g^update
        return keep * (reset * spread(self.gru_rel_pos_const[...], reset) - 1.0) + 2.0

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "batch frames channels"],
        position_bias: Float[Array, "heads frames frames"],
        *,
        mask: Bool[Array, "batch 1 1 frames"] | None = None,
        dropout: Dropout | None = None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames channels"], Float[Array, "batch heads frames frames"] | None]:
        """Attend; `position_bias` is the table $d$ laid out. Returns the output and, if needed, each head's weights."""
        gate = self.gate(x)
        if need_weights or (dropout is not None and dropout.key is not None):
            return super().__call__(x, mask=mask, bias=at_least_float32(gate) * position_bias, dropout=dropout)
        keys = self.key_values(x)
        query = split_heads(self.q_proj(x), self.heads)
        output = attend_gated(query, keys.key, keys.value, gate, position_bias, scale=self.scale, mask=mask)
        return self.out_proj(merge_heads(output)), None


class WavLMEncoderLayer(nnx.Module):
    r"""§IV-A, a block, norms last: $x = \mathrm{LN}(x + \mathrm{Attention}(x))$, then the MLP alike."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention = WavLMAttention(config, **kwargs)
        self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.feed_forward = Wav2Vec2FeedForward(config, **kwargs)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        dropout: Dropout,
        position_bias: Float[Array, "heads frames frames"],
        mask: Bool[Array, "batch 1 1 frames"] | None,
        *,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
        """One block; returns its output and, if they are needed, its attention weights."""
        attention, weights = self.attention(x, position_bias, mask=mask, dropout=dropout, need_weights=need_weights)
        x = self.layer_norm(x + dropout(attention, self.config.hidden_dropout))
        return self.final_layer_norm(x + self.feed_forward(x, dropout)), weights


class WavLMEncoderLayerStableLayerNorm(WavLMEncoderLayer):
    r"""Not in the paper; in the released checkpoint of Large: $x + \mathrm{Attention}(\mathrm{LN}(x))$."""

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        dropout: Dropout,
        position_bias: Float[Array, "heads frames frames"],
        mask: Bool[Array, "batch 1 1 frames"] | None,
        *,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
        """One block; returns its output and, if they are needed, its attention weights."""
        attention, weights = self.attention(
            self.layer_norm(x), position_bias, mask=mask, dropout=dropout, need_weights=need_weights
        )
        x = x + dropout(attention, self.config.hidden_dropout)
        return x + self.feed_forward(self.final_layer_norm(x), dropout), weights


class WavLMEncoder(Wav2Vec2Encoder):
    r"""§IV-A, the Transformer; its first block owns the table $d$, and all blocks use it."""

    layer_class: ClassVar[type] = WavLMEncoderLayer
    never_dropped: ClassVar[int] = 1

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        table = Embed(config.num_buckets, config.num_attention_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.layers[0].attention.rel_attn_embed = table

    def position_bias(self, frames: int) -> Float[Array, "heads frames frames"]:
        r"""$d_{j-i}$ for every pair of that many frames."""
        config = self.config
        offsets = np.arange(-(frames - 1), frames)
        buckets = relative_position_buckets(offsets, config.num_buckets, config.max_bucket_distance)
        found = self.layers[0].attention.rel_attn_embed(jnp.asarray(buckets)).T
        # Rounded at the end: the gradient of a distance is a sum over all pairs of frames that are so far apart.
        return toeplitz(at_least_float32(found)).astype(found.dtype)

    def for_every_block(self, frames: int) -> tuple[Float[Array, "heads frames frames"]]:
        """The laid-out table."""
        return (self.position_bias(frames),)


class WavLMEncoderStableLayerNorm(WavLMEncoder):
    """Not in the paper; in the released checkpoint of Large: pre-norm blocks and a last LayerNorm."""

    layer_class = WavLMEncoderLayerStableLayerNorm
    norm_first = True


class WavLMModel(Wav2Vec2Model):
    """§IV-A: wav2vec 2.0's model around this Transformer."""

    encoder_class = WavLMEncoder
    stable_encoder_class = WavLMEncoderStableLayerNorm

    @property
    def frame_rule(self) -> str:  # type: ignore[override]
        """How padding is counted in frames; see `audiozoo.models.wav2vec2.frame_mask`."""
        return self.config.frame_rule


# --- §IV-B, masked speech denoising and prediction --------------------------------------------------------------------


class Mixes(ModelOutput):
    """Algorithm 1: what is laid over each utterance of a batch; times in samples."""

    mixed: Bool[Array, " batch"]  # whether anything is
    is_noise: Bool[Array, " batch"]  # out of the noises, or out of the batch itself
    other: Int[Array, " batch"]  # which noise, or which utterance
    length: Int[Array, " batch"]  # of the stretch
    other_start: Int[Array, " batch"]  # where it begins in the other
    start: Int[Array, " batch"]  # where it comes to lie
    ratio: Float[Array, " batch"]  # dB, energy of the utterance over that of the other


def draw_mixes(
    key: jax.Array,
    batch: int,
    samples: int,
    *,
    probability: float = 0.2,
    noise_probability: float = 0.0,
    noises: int = 0,
    noise_samples: int = 0,
    longest: float = 0.5,
    lengths: Int[Array, " batch"] | None = None,
) -> Mixes:
    r"""Algorithm 1, its random choices.

    A stretch of up to `longest` of the utterance, of uniform length, from anywhere in the other and to anywhere in the
    utterance; the ratio of energies is uniform in [-5, 5] dB for another utterance and in [-5, 20] dB for noise.

    Args:
        key: source of the choices.
        batch: utterances.
        samples: of each.
        probability: of mixing at all.
        noise_probability: of noise instead of another utterance.
        noises: how many noises there are.
        noise_samples: of each.
        longest: share of the utterance that may be covered.
        lengths: samples of each utterance, where some are padded.

    Raises:
        UsageError: if noise is wanted and there is none.
    """
    if noises * noise_samples == 0 and noise_probability > 0:
        raise UsageError("Mixing with noise needs noises: give their number and their length.")
    keys = jax.random.split(key, 8)
    own = jnp.full((batch,), samples) if lengths is None else jnp.asarray(lengths)
    mixed = jax.random.uniform(keys[0], (batch,)) < probability
    is_noise = jax.random.uniform(keys[1], (batch,)) < noise_probability
    other = jnp.where(
        is_noise,
        jax.random.randint(keys[2], (batch,), 0, max(noises, 1)),
        jax.random.randint(keys[3], (batch,), 0, batch),
    )
    available = jnp.where(is_noise, noise_samples, own[jnp.where(is_noise, 0, other)])
    length = jax.random.randint(keys[4], (batch,), 0, jnp.floor(own * longest).astype(own.dtype) + 1)
    length = jnp.minimum(length, available)
    other_start = jax.random.randint(keys[5], (batch,), 0, available - length + 1)
    start = jax.random.randint(keys[6], (batch,), 0, own - length + 1)
    ratio = jax.random.uniform(keys[7], (batch,), minval=-5.0, maxval=jnp.where(is_noise, 20.0, 5.0))
    return Mixes(mixed, is_noise, other, length, other_start, start, ratio)


def mix(
    waveforms: Float[Array, "batch samples"],
    mixes: Mixes,
    noise: Float[Array, "noises noise_samples"] | None = None,
    *,
    lengths: Int[Array, " batch"] | None = None,
    normalize: bool = False,
) -> Float[Array, "batch samples"]:
    r"""Algorithm 1: utterances with a stretch of another, or of noise, laid over them.

    The other is scaled by $\sqrt{E / (E_\text{other}\, 10^{\text{ratio}/10})}$, $E$ being mean squares of whole
    waveforms; silence is not mixed in. All stretches come from the utterances as they were. (The released code mixes
    one after the other in place, so that a later utterance may receive what an earlier one received.)

    Args:
        waveforms: the batch.
        mixes: see `draw_mixes`.
        noise: recordings of noise.
        lengths: samples of each utterance, where some are padded.
        normalize: bring utterances that something was mixed into back to mean 0 and variance 1, for models that read
            normalised waveforms.
    """
    batch, samples = waveforms.shape
    position = jnp.arange(samples)
    inside = position < (jnp.full((batch,), samples) if lengths is None else jnp.asarray(lengths))[:, None]
    count = inside.sum(axis=1)

    def stretch(source: jax.Array, row: jax.Array) -> jax.Array:
        index = position[None] - mixes.start[:, None] + mixes.other_start[:, None]
        return jnp.take_along_axis(source[row], jnp.clip(index, 0, source.shape[1] - 1), axis=1)

    energy = jnp.where(inside, jnp.square(waveforms), 0).sum(axis=1) / count
    utterance = jnp.where(mixes.is_noise, 0, mixes.other)
    piece, other_energy = stretch(waveforms, utterance), energy[utterance]
    if noise is not None:
        row = jnp.where(mixes.is_noise, mixes.other, 0)
        piece = jnp.where(mixes.is_noise[:, None], stretch(noise, row), piece)
        other_energy = jnp.where(mixes.is_noise, jnp.square(noise).mean(axis=1)[row], other_energy)
    scaled = other_energy * 10 ** (mixes.ratio / 10)
    audible = scaled > 0
    scale = jnp.where(audible, jnp.sqrt(energy / jnp.where(audible, scaled, 1)), 0).astype(waveforms.dtype)
    covered = (position >= mixes.start[:, None]) & (position < (mixes.start + mixes.length)[:, None])
    result = waveforms + jnp.where(covered & mixes.mixed[:, None], scale[:, None] * piece, 0)
    if not normalize:
        return result
    mean = jnp.where(inside, result, 0).sum(axis=1, keepdims=True) / count[:, None]
    variance = jnp.where(inside, jnp.square(result - mean), 0).sum(axis=1, keepdims=True) / count[:, None]
    normal = jnp.where(inside, (result - mean) * jax.lax.rsqrt(variance + 1e-5), 0)
    return jnp.where(mixes.mixed[:, None], normal, result)


class WavLMForPreTrainingOutput(ModelOutput):
    """§IV-B, Eq. 7: the loss, a sum over masked frames, and its parts."""

    loss: Float[Array, ""] | None = None
    projected_states: Float[Array, "batch frames width"] | None = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    masked_loss: Float[Array, ""] | None = None
    unmasked_loss: Float[Array, ""] | None = None
    features_pen: Float[Array, ""] | None = None


class WavLMForPreTraining(_WithBackbone):
    r"""§IV-B: clusters of the main speaker, predicted from disturbed speech."""

    base_model_prefix = "wavlm"
    base_class = WavLMModel

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        check_every_frame(config, "Pre-training")
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.final_proj = Linear(config.hidden_size, config.proj_codevector_dim, **kwargs)
        shape = (config.num_clusters, config.proj_codevector_dim)
        self.label_embeddings = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype))

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, "batch targets"] | None = None,
        *,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        mixes: Mixes | None = None,
        noise: Float[Array, "noises noise_samples"] | None = None,
        normalize: bool = False,
        unmasked_weight: float = 0.0,
        features_pen_weight: float | Float[Array, ""] = 0.0,
        key: jax.Array | None = None,
        **options: Any,
    ) -> WavLMForPreTrainingOutput:
        r"""Predictions and, with `labels`, the loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: clusters of the undisturbed speech, `label_rate` a second; -100 is left out. Frames behind the last
                one are left out too. (The released code cuts them off before the Transformer.)
            mask_time_indices: frames to mask and to predict; drawn if there is a `key`.
            mixes: what to lay over the waveforms (see `draw_mixes`); nothing by default.
            noise: recordings of noise, for `mixes`.
            normalize: bring waveforms that something was mixed into back to mean 0 and variance 1.
            unmasked_weight: weight of the loss over the frames that are not masked.
            features_pen_weight: weight of the mean square of the features, for each masked frame (10 in the recipes).
            key: switches dropout, layer drop and masking on.
            options: see `Wav2Vec2Model`.

        Returns:
            `projected_states`, $o$; with labels `loss`, a sum over frames, and its parts.

        Raises:
            UsageError: if there are labels and no mask, or a label is no cluster.
        """
        config = self.config
        keys = [None, None] if key is None else list(jax.random.split(key))
        lengths = None if attention_mask is None else jnp.asarray(attention_mask).astype(jnp.int32).sum(axis=-1)
        if mixes is not None:
            input_values = mix(jnp.asarray(input_values), mixes, noise, lengths=lengths, normalize=normalize)
        spans, valid = self.frames_to_predict(input_values, attention_mask, mask_time_indices, keys[0])
        outputs = self.backbone(input_values, attention_mask, spans, key=keys[1], **options)
        states = self.final_proj(outputs.last_hidden_state)
        features_pen = features_penalty(outputs.conv_features)
        loss = masked = unmasked = None
        if labels is not None:
            if spans is None:
                raise UsageError("Pre-training needs masks: give mask_time_indices, or a key and a mask_time_prob.")
            check_labels(labels, config.num_clusters, f"the model has {config.num_clusters} clusters")
            ratio = config.label_rate * config.inputs_to_logits_ratio / 16_000
            targets = targets_of_frames(jnp.asarray(labels), valid.shape[1], ratio)
            embeddings, temperature = self.label_embeddings[...], config.contrastive_logits_temperature
            masked, count = masked_prediction(states, embeddings, targets, spans & valid, temperature)
            unmasked, others = masked_prediction(states, embeddings, targets, ~spans & valid, temperature)
            loss, total = masked, count
            if unmasked_weight:
                loss, total = loss + unmasked_weight * unmasked, total + others
            loss = loss + features_pen_weight * features_pen * total
        return WavLMForPreTrainingOutput(
            loss=loss,
            projected_states=states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            masked_loss=masked,
            unmasked_loss=unmasked,
            features_pen=features_pen,
        )


# --- the heads of the released checkpoints ---------------------------------------------------------------------------


class WavLMForCTC(Wav2Vec2ForCTC):
    """§V-F: a linear layer onto the letters, trained with CTC."""

    base_model_prefix = "wavlm"
    base_class = WavLMModel


class WavLMForSequenceClassification(Wav2Vec2ForSequenceClassification):
    """Not in the paper; in the released checkpoints: a class for a recording."""

    base_model_prefix = "wavlm"
    base_class = WavLMModel


class WavLMForAudioFrameClassification(Wav2Vec2ForAudioFrameClassification):
    """§V-B: who speaks when (`microsoft/wavlm-base-plus-sd`)."""

    base_model_prefix = "wavlm"
    base_class = WavLMModel


class WavLMForXVector(Wav2Vec2ForXVector):
    """§V-B: a vector for a speaker (`microsoft/wavlm-base-plus-sv`)."""

    base_model_prefix = "wavlm"
    base_class = WavLMModel


class WavLMForSpeakerVerification(Wav2Vec2ForSpeakerVerification):
    """§V-C: speakers, by ECAPA-TDNN (`wavlm_large_finetune.pth`)."""

    base_model_prefix = "wavlm"
    base_class = WavLMModel
