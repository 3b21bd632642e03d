r"""# ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based Speaker Verification

Brecht Desplanques, Jenthe Thienpondt, Kris Demuynck, 2020, arXiv 2005.07143.

An x-vector network, a stack of dilated convolutions with statistics over time behind it, made to look at a recording as
a whole: each block splits its channels into groups that see further and further, and weighs the channels by what they
are over the whole recording; the outputs of all blocks are read together; and the network chooses for each channel
which frames its mean and deviation are taken from. Here it stands behind a speech encoder, whose layers it mixes.

    features (T, d) ── norm over time ── Conv 5 (512)
      ── 3 × [Conv 1, Res2 Conv 3 (dilated by 2, 3, 4), Conv 1, squeeze-excitation, + input]
      ── all three, Conv 1 ──> (T, 1536) ── attentive mean and deviation ──> (3072,) ── Linear ──> speaker (256,)

| paper | here |
| --- | --- |
| § "1-Dimensional Squeeze-Excitation Res2Blocks", Figure 2 | `SERes2Block`, `Res2Conv`, `SqueezeExcitation` |
| § "Multi-layer feature aggregation and summation", Figure 3 | `EcapaTdnn`, `ConvReluNorm` |
| § "Channel- and context-dependent statistics pooling" | `AttentiveStatisticsPooling` |

What Microsoft released with WavLM and UniSpeech-SAT differs from the paper: the features are a learned mix of an
encoder's layers in place of a filterbank; a block adds its input but not the earlier blocks' outputs; the last of a
block's groups is passed on as it is, not the first; the attention does not see the whole recording (`global_context`
gives the paper's, with mean and deviation beside each frame), and has a tanh in place of ReLU; the embedding is not
normalised. The classifier of speakers that it was trained with is not in this file.

With a `mask` a padded batch equals its items one by one, which the released code does not see to.

Checkpoints: the heads in Microsoft's `wavlm_large_finetune.pth` and its likes, for WavLM, UniSpeech-SAT, HuBERT and
wav2vec 2.0 (`…ForSpeakerVerification` in their files).

    import audiozoo
    model = audiozoo.load("wavlm_large_finetune.pth")  # a WavLMForSpeakerVerification
    processor = audiozoo.load_processor("microsoft/wavlm-large")
    voices = model(**processor([one, other], sampling_rate=16_000)).embeddings
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from audiozoo.errors import CheckpointError
from audiozoo.layers import Conv1d, Linear
from audiozoo.layers.basic import at_least_float32, spread
from audiozoo.layers.batch_norm import BatchNorm


@dataclass(frozen=True)
class EcapaTdnnConfig:
    """Sizes (Figures 2 and 3; Table 1 for the paper's)."""

    channels: int = 512  # C, inside the blocks
    aggregated: int = 1536  # channels of the blocks' outputs together
    embedding: int = 256  # width of the speaker's vector
    dilations: tuple[int, ...] = (2, 3, 4)  # frames between the taps of each block
    scale: int = 8  # groups that a block's channels are split into
    bottleneck: int = 128  # width inside squeeze-excitation
    attention: int = 128  # width inside the pooling's attention
    global_context: bool = False  # whether the attention also sees mean and deviation of the whole recording

    def __post_init__(self) -> None:
        if self.channels % self.scale:
            raise CheckpointError(f"{self.channels} channels do not divide into {self.scale} groups.")

    @classmethod
    def microsoft(cls) -> EcapaTdnnConfig:
        """Microsoft's, behind WavLM and UniSpeech-SAT: the paper's small one, with a wider embedding."""
        return cls()

    @classmethod
    def small(cls) -> EcapaTdnnConfig:
        """Table 1, 512 channels."""
        return cls(embedding=192, global_context=True)

    @classmethod
    def large(cls) -> EcapaTdnnConfig:
        """Table 1, 1024 channels."""
        return cls(channels=1024, embedding=192, global_context=True)


Mask = Bool[Array, "batch frames 1"] | None


def kept(x: Float[Array, "batch frames channels"], mask: Mask) -> Float[Array, "batch frames channels"]:
    """Zeros behind the end of each recording, as a convolution sees them behind the end of one alone."""
    return x if mask is None else jnp.where(mask, x, 0)


def moments(
    x: Float[Array, "batch frames channels"], weights: Float[Array, "batch frames #channels"]
) -> tuple[Float[Array, "batch 1 channels"], Float[Array, "batch 1 channels"]]:
    r"""$\mu = \sum_t \alpha_t x_t$ and $\sum_t \alpha_t (x_t - \mu)^2$ for weights of sum 1, in float32 or wider."""
    x = at_least_float32(x)
    mean = (weights * x).sum(axis=1, keepdims=True)
    return mean, (weights * jnp.square(x - mean)).sum(axis=1, keepdims=True)


def uniform(x: Float[Array, "batch frames channels"], mask: Mask) -> Float[Array, "batch frames 1"]:
    """Equal weights of the frames of each recording, in float32 or wider."""
    counted = at_least_float32(jnp.ones((*x.shape[:2], 1), x.dtype) if mask is None else mask.astype(x.dtype))
    return counted / jnp.maximum(counted.sum(axis=1, keepdims=True), 1)


class ConvReluNorm(nnx.Module):
    """Figure 2, Conv1D + ReLU + BN. In training (`train`) the statistics are those of the batch's speech."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        taps: int = 1,
        dilation: int = 1,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv1d(inputs, outputs, taps, padding=dilation * (taps // 2), dilation=dilation, **kwargs)
        self.norm = BatchNorm(outputs, **kwargs)

    def __call__(
        self, x: Float[Array, "batch frames inputs"], mask: Mask = None, train: bool = False
    ) -> Float[Array, "batch frames outputs"]:
        """As many frames as before."""
        x = jax.nn.relu(self.conv(kept(x, mask)))
        flat = x.reshape(-1, x.shape[-1])
        return self.norm(flat, train, None if mask is None else mask.reshape(-1)).reshape(x.shape)


class Res2Conv(nnx.Module):
    r"""Figure 2, Res2 dilated Conv1D: groups of channels, each convolved together with the result of the one before.

    $$y_i = \mathrm{conv}_i(x_i + y_{i-1}), \qquad y_s = x_s$$
    """

    def __init__(self, config: EcapaTdnnConfig, dilation: int, **kwargs: Any):
        width = config.channels // config.scale
        count = max(config.scale - 1, 1)
        self.parts = nnx.List([ConvReluNorm(width, width, 3, dilation, **kwargs) for _ in range(count)])
        self.scale = config.scale

    def __call__(
        self, x: Float[Array, "batch frames channels"], mask: Mask = None, train: bool = False
    ) -> Float[Array, "batch frames channels"]:
        """As many frames as before."""
        groups = jnp.split(x, self.scale, axis=-1)
        found: list[jax.Array] = []
        for part, group in zip(self.parts, groups, strict=False):
            found.append(part(group + found[-1] if found else group, mask, train))
        return jnp.concatenate([*found, *groups[len(found) :]], axis=-1)


class SqueezeExcitation(nnx.Module):
    r"""§ "1-Dimensional Squeeze-Excitation Res2Blocks": channels weighed by what they are over the whole recording.

    $$s = \sigma(W_2 \operatorname{ReLU}(W_1 z + b_1) + b_2), \qquad z = \frac 1T \sum_t h_t$$
    """

    def __init__(self, config: EcapaTdnnConfig, **kwargs: Any):
        self.linear_1 = Linear(config.channels, config.bottleneck, **kwargs)
        self.linear_2 = Linear(config.bottleneck, config.channels, **kwargs)

    def __call__(
        self, x: Float[Array, "batch frames channels"], mask: Mask = None
    ) -> Float[Array, "batch frames channels"]:
        """As many frames as before."""
        z = (uniform(x, mask) * x).sum(axis=1, keepdims=True).astype(x.dtype)
        return x * spread(jax.nn.sigmoid(self.linear_2(jax.nn.relu(self.linear_1(z)))), x)


class SERes2Block(nnx.Module):
    """Figure 2: a dilated Res2 convolution between two dense layers, squeeze-excitation, and the input added."""

    def __init__(self, config: EcapaTdnnConfig, dilation: int, **kwargs: Any):
        self.reduce = ConvReluNorm(config.channels, config.channels, **kwargs)
        self.res2 = Res2Conv(config, dilation, **kwargs)
        self.expand = ConvReluNorm(config.channels, config.channels, **kwargs)
        self.squeeze = SqueezeExcitation(config, **kwargs)

    def __call__(
        self, x: Float[Array, "batch frames channels"], mask: Mask = None, train: bool = False
    ) -> Float[Array, "batch frames channels"]:
        """As many frames as before."""
        y = self.expand(self.res2(self.reduce(x, mask, train), mask, train), mask, train)
        return x + self.squeeze(y, mask)


class AttentiveStatisticsPooling(nnx.Module):
    r"""§ "Channel- and context-dependent statistics pooling": for each channel its own frames.

    $$\alpha_{t,c} = \operatorname{softmax}_t\bigl(v_c^\top \tanh(W h_t + b) + k_c\bigr), \qquad
    \tilde\mu_c = \sum_t \alpha_{t,c} h_{t,c}, \qquad
    \tilde\sigma_c = \sqrt{\sum_t \alpha_{t,c} h_{t,c}^2 - \tilde\mu_c^2}$$
    """

    def __init__(self, config: EcapaTdnnConfig, **kwargs: Any):
        seen = config.aggregated * (3 if config.global_context else 1)
        self.linear_1 = Linear(seen, config.attention, **kwargs)
        self.linear_2 = Linear(config.attention, config.aggregated, **kwargs)
        self.global_context = config.global_context

    def __call__(self, x: Float[Array, "batch frames channels"], mask: Mask = None) -> Float[Array, "batch statistics"]:
        """Mean and deviation of every channel, side by side."""
        seen = x
        if self.global_context:
            mean, variance = moments(x, weights := uniform(x, mask))
            count = 1 / weights.max(axis=1, keepdims=True)
            deviation = jnp.sqrt(variance * count / (count - 1) + 1e-10)  # unbiased
            seen = jnp.concatenate([x, spread(mean, x), spread(deviation, x)], axis=-1)
        scores = at_least_float32(self.linear_2(jnp.tanh(self.linear_1(seen))))
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        mean, variance = moments(x, jax.nn.softmax(scores, axis=1))
        return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, 1e-9))], axis=-1)[:, 0].astype(x.dtype)


class EcapaTdnn(nnx.Module):
    """Figure 3: from frames to a speaker."""

    def __init__(
        self,
        inputs: int,
        config: EcapaTdnnConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.entry = ConvReluNorm(inputs, config.channels, 5, **kwargs)
        self.blocks = nnx.List([SERes2Block(config, dilation, **kwargs) for dilation in config.dilations])
        self.aggregate = Conv1d(config.channels * len(config.dilations), config.aggregated, 1, **kwargs)
        self.pooling = AttentiveStatisticsPooling(config, **kwargs)
        self.norm = BatchNorm(2 * config.aggregated, **kwargs)
        self.embedding = Linear(2 * config.aggregated, config.embedding, **kwargs)

    def __call__(
        self,
        features: Float[Array, "batch frames inputs"],
        mask: Bool[Array, "batch frames"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch embedding"]:
        """A vector for each recording; speakers are compared by its cosine.

        Args:
            features: of frames.
            mask: True where a frame is speech.
            train: normalise by the statistics of the batch, and move the running ones (`nnx.BatchStat`).
        """
        inside = None if mask is None else mask[..., None]
        mean, variance = moments(features, uniform(features, inside))
        x = ((features - mean) * jax.lax.rsqrt(variance + 1e-5)).astype(features.dtype)
        x, outputs = self.entry(x, inside, train), []
        for block in self.blocks:
            x = block(x, inside, train)
            outputs.append(x)
        x = jax.nn.relu(self.aggregate(jnp.concatenate(outputs, axis=-1)))  # (batch, frames, aggregated)
        return self.embedding(self.norm(self.pooling(x, inside), train))
