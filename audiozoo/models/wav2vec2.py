r"""# wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations

Alexei Baevski, Henry Zhou, Abdelrahman Mohamed, Michael Auli, 2020, arXiv 2006.11477.

Speech is first learned without any text. Convolutions turn the waveform into a latent vector every 20 ms; a span of
these is hidden, and a Transformer has to tell the true latent behind each hidden frame from distractors out of the
same utterance. What it tells apart are not the latents but *codes*, one entry of each of two codebooks, learned along
with the rest through a Gumbel softmax. A linear layer and the CTC loss then make a recogniser out of it, for which ten
minutes of transcribed speech are enough.

    waveform 16 kHz ── 7 × [Conv, norm, GELU], 320 samples a frame ──> z (T, 512) ── LN ──┬─> product quantiser ─> q
                                                                                          │                       │
      Linear ──> (T, d) ── spans replaced by one learned vector ── + conv positions ──    │            contrastive loss
      ── N × [self-attention, MLP] ──> c (T, d) ──────────────────────────────────────────┼───────────────────────┘
                                        └── Linear ──> logits (T, letters) ── CTC

| paper | here |
| --- | --- |
| §2, feature encoder $f: X \to Z$ | `Wav2Vec2FeatureEncoder`, `Wav2Vec2ConvLayer`, `TimeGroupNorm` |
| §2, contextualized representations $g: Z \to C$ | `Wav2Vec2FeatureProjection`, `Wav2Vec2Encoder`, `Wav2Vec2Model` |
| §2, the Transformer's blocks | `Wav2Vec2EncoderLayer`, `Wav2Vec2FeedForward` |
| §2, relative positional embedding | `Wav2Vec2PositionalConvEmbedding` |
| §2, quantization module, Eq. 1 | `Wav2Vec2GumbelVectorQuantizer`, `gumbel_temperature` |
| §3.1, masking | `Wav2Vec2Model.mask`, `audiozoo.layers.masking.span_mask` |
| §3.2, Eq. 2 | `Wav2Vec2ForPreTraining` |
| §3.2, contrastive loss, Eq. 3 | `contrastive_loss`, `contrastive_logits`, `sample_negative_indices` |
| §3.2, diversity loss, Eq. 4 | `diversity_loss`, `perplexity` |
| §3.3, fine-tuning | `Wav2Vec2ForCTC`, `audiozoo.layers.losses.ctc_loss` |
| §4.2, sizes | `Wav2Vec2Config.base()`, `Wav2Vec2Config.large()`, `Wav2Vec2Config.large_lv60()` |
| not in the paper; in the released checkpoints | `Wav2Vec2Encoder…StableLayerNorm`, `Wav2Vec2For…` heads |
| the same: of speech translation, and of MMS | `Wav2Vec2Adapter`, `Wav2Vec2AdapterLayer`; `Wav2Vec2AttnAdapterLayer` |
| the same: speakers | `TDNNLayer`, `AMSoftmaxLoss` |

Where `transformers` and this file part: the last hidden state is normalised, as up to its version 4 and in the heads
that were trained on it (`hidden_states_before_norm=True` gives version 5's); x-vectors pool the frames that the dilated
layers really see (`ignore_dilation=True` gives the original's). `masked_group_norm=True` makes a padded batch equal its
items one by one in the base models too, whose GroupNorm otherwise averages over the padding. The penalty on the
features, the scaled gradient of the feature encoder and the temperature's schedule, which it leaves out, are here.

Checkpoints: `facebook/wav2vec2-base`, `-base-960h`, `-large`, `-large-960h`, `-large-960h-lv60`,
`-large-960h-lv60-self`, `-large-lv60`, `-large-xlsr-53`, `-lv-60-espeak-cv-ft`, fairseq's `.pt` files (pre-trained and
fine-tuned), torchaudio's state dicts, and the same network at other sizes (XLS-R, MMS).

    import audiozoo
    model = audiozoo.load("facebook/wav2vec2-base-960h")
    processor = audiozoo.load_processor("facebook/wav2vec2-base-960h")
    logits = model(**processor(waveform, sampling_rate=16_000)).logits
    text = processor.batch_decode(logits.argmax(-1))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import CheckpointError, UsageError
from audiozoo.layers import Conv1d, Dropout, LayerNorm, Linear, MultiHeadAttention, activation, layer_drop, promote
from audiozoo.layers.basic import at_least_float32, spread, unit_vectors
from audiozoo.layers.losses import cross_entropy, ctc_loss
from audiozoo.layers.masking import span_mask
from audiozoo.layers.stacking import all_states, unseen
from audiozoo.layers.weight_norm import WeightNormConv1d
from audiozoo.models.ecapa_tdnn import EcapaTdnn, EcapaTdnnConfig
from audiozoo.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    ModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
    XVectorOutput,
)


def check_convolutions(config: Any) -> None:
    """Refuse sizes of a feature encoder (§2) that do not belong together.

    Raises:
        CheckpointError: if they describe different numbers of convolutions, or none, or one of no size.
    """
    if min((*config.conv_dim, *config.conv_stride, *config.conv_kernel), default=0) < 1:
        raise CheckpointError("conv_dim, conv_stride and conv_kernel must describe a convolution at least, from 1 on.")
    if not len(config.conv_dim) == len(config.conv_stride) == len(config.conv_kernel):
        raise CheckpointError(
            f"conv_dim, conv_stride and conv_kernel describe {len(config.conv_dim)}, {len(config.conv_stride)} and "
            f"{len(config.conv_kernel)} convolutions; they must describe the same ones."
        )


def check_division(config: Any, whole: str, parts: str) -> None:
    """Refuse a width (§2: of a quantised frame, of the positional convolution) that its groups do not divide.

    Raises:
        CheckpointError: if a rest remains, or there is no group.
    """
    width, count = getattr(config, whole), getattr(config, parts)
    if count < 1 or width % count:
        raise CheckpointError(f"{whole} ({width}) does not divide into {count} ({parts}).")


def check_x_vector(config: Any) -> None:
    """Refuse sizes of x-vector layers that do not belong together.

    Raises:
        CheckpointError: if they describe different numbers of layers, or none.
    """
    counts = [len(sizes) for sizes in (config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation)]
    if counts[0] < 1 or len(set(counts)) > 1:
        raise CheckpointError(
            "tdnn_dim, tdnn_kernel and tdnn_dilation describe {}, {} and {} layers; they must describe the same "
            "ones, and one at least.".format(*counts)
        )


def check_every_frame(config: Any, purpose: str) -> None:
    """Refuse strided convolutions behind the Transformer for what needs each of its frames.

    Raises:
        UsageError: if there are some.
    """
    if getattr(config, "add_adapter", False):
        raise UsageError(f"{purpose} reads a frame every 20 ms; it does not go with add_adapter.")


class _HeadSizes:
    """What the heads ask of a configuration."""

    id2label: tuple[str, ...]
    hidden_size: int
    output_hidden_size: int | None
    add_adapter: bool

    @property
    def num_labels(self) -> int:
        """Classes of the classifier."""
        return len(self.id2label)

    @property
    def adapter_size(self) -> int:
        """Width after the strided adapter."""
        return self.output_hidden_size or self.hidden_size

    @property
    def head_size(self) -> int:
        """Width that a head reads."""
        return self.adapter_size if self.add_adapter else self.hidden_size


@dataclass(frozen=True)
class Wav2Vec2Config(_HeadSizes):
    """Sizes of one checkpoint (§4.2 of the paper for BASE and LARGE)."""

    vocab_size: int = 32  # letters and special tokens of the CTC head
    hidden_size: int = 768  # width of the Transformer
    num_hidden_layers: int = 12  # Transformer blocks
    num_attention_heads: int = 12  # of hidden_size / heads channels each
    intermediate_size: int = 3072  # width of the MLP
    hidden_act: str = "gelu"  # of the MLP
    hidden_dropout: float = 0.1  # after attention and MLP
    activation_dropout: float = 0.1  # inside the MLP
    attention_dropout: float = 0.1  # on attention weights
    feat_proj_dropout: float = 0.0  # after the feature projection
    feat_quantizer_dropout: float = 0.0  # on the features that are quantised
    final_dropout: float = 0.1  # before the CTC head
    layerdrop: float = 0.1  # chance that training skips a block
    initializer_range: float = 0.02  # standard deviation that linear weights start from
    layer_norm_eps: float = 1e-5  # in every LayerNorm but those of the convolutions
    feat_extract_norm: str = "group"  # "group": GroupNorm after the first convolution; "layer": LayerNorm after each
    feat_extract_activation: str = "gelu"  # after every convolution
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)  # channels out of each convolution
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)  # 320 samples a frame in all: 20 ms
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)  # taps; a frame sees 400 samples: 25 ms
    conv_bias: bool = False  # whether the convolutions have biases
    num_conv_pos_embeddings: int = 128  # taps of the positional convolution, 20 ms each
    num_conv_pos_embedding_groups: int = 16  # its channel groups
    do_stable_layer_norm: bool = False  # LayerNorm before attention and MLP instead of after
    apply_spec_augment: bool = True  # whether spans may be masked at all
    mask_time_prob: float = 0.05  # share of frames under time spans; 0.65 in pre-training
    mask_time_length: int = 10  # frames a span
    mask_time_min_masks: int = 2  # spans at least, whatever the share
    mask_feature_prob: float = 0.0  # share of channels under channel spans
    mask_feature_length: int = 10  # channels a span
    mask_feature_min_masks: int = 0  # spans at least, whatever the share
    num_codevectors_per_group: int = 320  # V, entries of each codebook
    num_codevector_groups: int = 2  # G, codebooks
    contrastive_logits_temperature: float = 0.1  # κ of Eq. 3
    num_negatives: int = 100  # K, distractors of each masked frame
    codevector_dim: int = 256  # width of a quantised frame, all groups side by side
    proj_codevector_dim: int = 256  # width in which predictions and targets are compared
    diversity_loss_weight: float = 0.1  # α of Eq. 2
    ctc_loss_reduction: str = "sum"  # over the batch: "sum", "mean"
    ctc_zero_infinity: bool = False  # drop items with too few frames for their labels
    use_weighted_layer_sum: bool = False  # heads read a learned mix of all layers
    classifier_proj_size: int = 256  # width before the sequence classifier
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)  # channels out of the x-vector layers
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)  # their taps
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)  # frames between their taps
    xvector_output_dim: int = 512  # width of the speaker embedding
    pad_token_id: int = 0  # CTC's blank
    bos_token_id: int = 1  # of no use to the model; kept for export
    eos_token_id: int = 2  # of no use to the model; kept for export
    add_adapter: bool = False  # strided convolutions after the Transformer, for an encoder-decoder
    adapter_kernel_size: int = 3  # their taps
    adapter_stride: int = 2  # their stride: three of them give a frame every 160 ms
    num_adapter_layers: int = 3  # how many
    output_hidden_size: int | None = None  # their width, if not hidden_size
    adapter_attn_dim: int | None = None  # width inside the per-language adapters of MMS, in every block
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # names of the classifier's classes

    def __post_init__(self) -> None:
        check_convolutions(self)
        if self.feat_extract_norm not in ("group", "layer"):
            raise CheckpointError(f"feat_extract_norm is {self.feat_extract_norm!r}; there are 'group' and 'layer'.")
        check_division(self, "hidden_size", "num_conv_pos_embedding_groups")
        check_division(self, "codevector_dim", "num_codevector_groups")
        check_x_vector(self)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples a frame."""
        return math.prod(self.conv_stride)

    @classmethod
    def base(cls) -> Wav2Vec2Config:
        """§4.2, BASE: 12 blocks of width 768, 95 M parameters with the quantiser."""
        return cls()

    @classmethod
    def large(cls) -> Wav2Vec2Config:
        """§4.2, LARGE, pre-trained on Librispeech (`libri960_big`): 24 blocks of width 1024.

        317 M parameters with the quantiser.
        """
        return cls(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            codevector_dim=768,
            proj_codevector_dim=768,
        )

    @classmethod
    def large_lv60(cls) -> Wav2Vec2Config:
        """§4.2, LARGE, pre-trained on LibriVox with LayerNorm in the convolutions and before attention and MLP."""
        return cls(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            codevector_dim=768,
            proj_codevector_dim=768,
            feat_extract_norm="layer",
            conv_bias=True,
            do_stable_layer_norm=True,
        )

    @classmethod
    def large_xlsr_53(cls) -> Wav2Vec2Config:
        """XLSR-53 (arXiv 2006.13979): `large_lv60`, pre-trained on 53 languages."""
        return cls.large_lv60()

    @classmethod
    def large_espeak(cls) -> Wav2Vec2Config:
        """`large_lv60`, fine-tuned on eSpeak's phonemes of many languages (arXiv 2109.11680)."""
        return cls(**{**vars(cls.large_lv60()), "vocab_size": 392})


# --- §2, feature encoder: waveform to latent speech representations -------------------------------------------------


Lengths = TypeVar("Lengths", int, Array)  # of one recording, or of each of a batch


def conv_lengths(lengths: Lengths, kernels: Sequence[int], strides: Sequence[int]) -> Lengths:
    r"""Frames that a stack of unpadded convolutions makes: $\lfloor (L - k)/s \rfloor + 1$, layer by layer."""
    for kernel, stride in zip(kernels, strides, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return lengths


def samples_of_a_frame(config: Any) -> int:
    r"""Samples that one frame sees, from the last convolution to the first: $L = (L - 1)s + k$."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def frame_mask(
    config: Any, attention_mask: Int[Array, "batch samples"], frames: int, rule: str = "lengths"
) -> Bool[Array, "batch frames"]:
    """Which frames are speech, from which samples are.

    Args:
        config: of the convolutions.
        attention_mask: 1 for a sample of the recording, 0 for padding behind it.
        frames: how many the convolutions made of the padded batch.
        rule: "lengths": the frames that the convolutions make of the unpadded recording, as `transformers` and today's
            fairseq do. "samples": the padded samples are dealt out to the frames in equal blocks, and a frame counts if
            its block holds a sample of the recording, as in the code that HuBERT, WavLM, UniSpeech-SAT and SpeechT5
            were released with; usually one frame more.
    """
    if rule == "lengths":
        lengths = conv_lengths(attention_mask.astype(jnp.int32).sum(axis=-1), config.conv_kernel, config.conv_stride)
        return jnp.arange(frames) < lengths[:, None]
    if rule != "samples":
        raise UsageError(f"There is no frame rule {rule!r}; there are lengths and samples.")
    block = attention_mask.shape[1] // frames
    samples = attention_mask[:, : attention_mask.shape[1] - attention_mask.shape[1] % frames]
    return (samples.reshape(len(samples), frames, block) != 0).any(axis=-1)


class TimeGroupNorm(nnx.Module):
    r"""§2, "normalization" of the first block: GroupNorm with a group for each channel, so a norm over time.

    $\mu$ and $\sigma$ are those of each channel over the whole recording; `epsilon` 1e-5. The padding behind a shorter
    item of a batch counts too, as in the released implementation, unless `lengths` says where it begins.
    """

    def __init__(self, channels: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "batch frames channels"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch frames channels"]:
        """Normalise over time; with `lengths`, by the mean and variance of that many frames of each item."""
        x, scale, bias = promote(x, self.scale[...], self.bias[...], dtype=self.dtype)
        wide = at_least_float32(x)
        if lengths is None:
            mean = wide.mean(axis=1, keepdims=True)
            variance = jnp.square(wide - mean).mean(axis=1, keepdims=True)
        else:
            inside = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
            count = jnp.maximum(lengths, 1)[:, None, None]
            mean = jnp.where(inside, wide, 0).sum(axis=1, keepdims=True) / count
            variance = jnp.where(inside, jnp.square(wide - mean), 0).sum(axis=1, keepdims=True) / count
        factor = scale * jax.lax.rsqrt(variance + 1e-5)
        return ((wide - mean) * factor + bias).astype(x.dtype)


class Wav2Vec2ConvLayer(nnx.Module):
    """§2, one block of the feature encoder: temporal convolution, a norm (or none), GELU."""

    def __init__(self, config: Any, index: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels, kernel = config.conv_dim[index], config.conv_kernel[index]
        inputs = config.conv_dim[index - 1] if index else 1
        self.conv = Conv1d(
            inputs, channels, kernel, stride=config.conv_stride[index], use_bias=config.conv_bias, **kwargs
        )
        # Kaiming's normal initialisation.
        deviation = math.sqrt(2 / (inputs * kernel))
        self.conv.kernel[...] = deviation * jax.random.normal(rngs.params(), (kernel, inputs, channels), param_dtype)
        self.groups = config.feat_extract_norm == "group" and index == 0
        self.layer_norm: Any
        if self.groups:
            self.layer_norm = TimeGroupNorm(channels, **kwargs)
        elif config.feat_extract_norm == "layer":
            self.layer_norm = LayerNorm(channels, **kwargs)
        self.activation = config.feat_extract_activation

    def __call__(
        self, x: Float[Array, "batch time inputs"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch frames channels"]:
        """Convolve; `lengths` are the frames *after* the convolution that a masked GroupNorm looks at."""
        x = self.conv(x)
        if self.groups:
            x = self.layer_norm(x, lengths)
        elif hasattr(self, "layer_norm"):
            x = self.layer_norm(x)
        return activation(self.activation)(x)


class Wav2Vec2FeatureEncoder(nnx.Module):
    r"""§2, feature encoder $f: X \to Z$: seven blocks of convolution, from samples to frames of 20 ms."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv_layers = nnx.List([Wav2Vec2ConvLayer(config, i, **kwargs) for i in range(len(config.conv_dim))])
        self.config, self.dtype = config, dtype

    def __call__(
        self, input_values: Float[Array, "batch samples"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch frames channels"]:
        """Latent speech representations; `lengths` in samples make the GroupNorm leave the padding out.

        Raises:
            UsageError: if the input is not `(batch, samples)` or too short for one frame.
        """
        if input_values.ndim != 2:
            raise UsageError(f"input_values of shape (batch, samples) are wanted, not {input_values.shape}.")
        config = self.config
        if input_values.shape[1] < (needed := samples_of_a_frame(config)):
            raise UsageError(f"{input_values.shape[1]} samples are too few for one frame; this model needs {needed}.")
        x = input_values if self.dtype is None else input_values.astype(self.dtype)
        x = x[..., None]
        if lengths is not None:
            lengths = conv_lengths(lengths, config.conv_kernel[:1], config.conv_stride[:1])
        for layer in self.conv_layers:
            x = layer(x, lengths)
        return x


@jax.custom_vjp
def scale_gradient(x: Float[Array, "*shape"], factor: float | Float[Array, ""]) -> Float[Array, "*shape"]:
    """`x`, with its gradient multiplied by `factor` (§4.2: "scale down the gradients for the feature encoder")."""
    return x


def _scaled(factor: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient * jnp.asarray(factor, gradient.dtype), jnp.zeros_like(factor)


scale_gradient.defvjp(lambda x, factor: (x, jnp.asarray(factor)), _scaled)


# --- §2, context network ---------------------------------------------------------------------------------------------


def _uniform(bound: float) -> nnx.Initializer:
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(key, shape, dtype, -bound, bound)


class Wav2Vec2FeatureProjection(nnx.Module):
    """§2, from the features' width to the Transformer's, after a LayerNorm."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layer_norm = LayerNorm(config.conv_dim[-1], epsilon=config.layer_norm_eps, **kwargs)
        init = _uniform(config.conv_dim[-1] ** -0.5)
        self.projection = Linear(config.conv_dim[-1], config.hidden_size, kernel_init=init, bias_init=init, **kwargs)
        self.config = config

    def __call__(
        self, x: Float[Array, "batch frames features"], dropout: Dropout
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch frames features"]]:
        """The Transformer's input, and the normalised features, which are what the quantiser reads."""
        features = self.layer_norm(x)
        return dropout(self.projection(features), self.config.feat_proj_dropout), features


class Wav2Vec2PositionalConvEmbedding(nnx.Module):
    """§2, "a convolutional layer … which acts as relative positional embedding": 128 taps, 16 groups, weight norm."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        width, taps = config.hidden_size, config.num_conv_pos_embeddings
        self.conv = WeightNormConv1d(
            width,
            width,
            taps,
            padding=taps // 2,
            groups=config.num_conv_pos_embedding_groups,
            dim=2,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        v = (4 / (taps * width)) ** 0.5 * jax.random.normal(rngs.params(), self.conv.kernel_v.shape, param_dtype)
        self.conv.kernel_v[...] = v
        self.conv.kernel_g[...] = jnp.sqrt(jnp.square(v).sum(axis=(1, 2), keepdims=True))
        assert self.conv.bias is not None
        self.conv.bias[...] = jnp.zeros((width,), param_dtype)
        self.activation = config.feat_extract_activation

    def __call__(
        self, x: Float[Array, "batch frames hidden"], training: bool = False
    ) -> Float[Array, "batch frames hidden"]:
        """What is added to the frames. An even number of taps would give a frame too many; the last one goes.

        Args:
            x: frames.
            training: of no effect here; a follow-up normalises by the batch in training.
        """
        return activation(self.activation)(self.conv(x)[:, : x.shape[1]])


class Wav2Vec2FeedForward(nnx.Module):
    """§2, the MLP of a Transformer block (arXiv 1706.03762, Eq. 2, with GELU)."""

    def __init__(self, config: Any, width: int | None = None, **kwargs: Any):
        kwargs["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        width = width or config.intermediate_size
        self.intermediate_dense = Linear(config.hidden_size, width, **kwargs)
        self.output_dense = Linear(width, config.hidden_size, **kwargs)
        self.config = config

    def __call__(self, x: Float[Array, "batch frames hidden"], dropout: Dropout) -> Float[Array, "batch frames hidden"]:
        """Each frame by itself."""
        config = self.config
        x = activation(config.hidden_act)(self.intermediate_dense(x))
        x = self.output_dense(dropout(x, config.activation_dropout))
        return dropout(x, config.hidden_dropout)


class Wav2Vec2AttnAdapterLayer(nnx.Module):
    """Not in the paper; in the released checkpoints of MMS (arXiv 2305.13516, §5.1): a bottleneck for each language."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = LayerNorm(config.hidden_size, **kwargs)
        kwargs["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        self.linear_1 = Linear(config.hidden_size, config.adapter_attn_dim, **kwargs)
        self.linear_2 = Linear(config.adapter_attn_dim, config.hidden_size, **kwargs)

    def __call__(self, x: Float[Array, "batch frames hidden"]) -> Float[Array, "batch frames hidden"]:
        """What is added to the block's output."""
        return self.linear_2(jax.nn.relu(self.linear_1(self.norm(x))))


class Wav2Vec2EncoderLayer(nnx.Module):
    r"""§2, a Transformer block, norms last: $x = \mathrm{LN}(x + \mathrm{Attention}(x))$, then the MLP alike."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention = MultiHeadAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.attention_dropout,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            **kwargs,
        )
        self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.feed_forward = Wav2Vec2FeedForward(config, **kwargs)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        dropout: Dropout,
        mask: Bool[Array, "batch 1 1 frames"] | None,
        *,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
        """One block; returns its output and, if they are needed, its attention weights."""
        attention, weights = self.attention(x, mask=mask, dropout=dropout, need_weights=need_weights)
        x = self.layer_norm(x + dropout(attention, self.config.hidden_dropout))
        return self.final_layer_norm(x + self.feed_forward(x, dropout)), weights


class Wav2Vec2EncoderLayerStableLayerNorm(Wav2Vec2EncoderLayer):
    r"""Not in the paper; in the released checkpoints of LARGE (LibriVox): $x + \mathrm{Attention}(\mathrm{LN}(x))$.

    With `adapter_attn_dim` the block ends in MMS's adapter.
    """

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if getattr(config, "adapter_attn_dim", None) is not None:
            self.adapter_layer = Wav2Vec2AttnAdapterLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        dropout: Dropout,
        mask: Bool[Array, "batch 1 1 frames"] | None,
        *,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
        """One block; returns its output and, if they are needed, its attention weights."""
        attention, weights = self.attention(self.layer_norm(x), mask=mask, dropout=dropout, need_weights=need_weights)
        x = x + dropout(attention, self.config.hidden_dropout)
        x = x + self.feed_forward(self.final_layer_norm(x), dropout)
        if hasattr(self, "adapter_layer"):
            x = x + self.adapter_layer(x)
        return x, weights


class Wav2Vec2Encoder(nnx.Module):
    r"""§2, the Transformer $g: Z \to C$ behind its positional convolution."""

    layer_class: ClassVar[type] = Wav2Vec2EncoderLayer
    positional_class: ClassVar[type] = Wav2Vec2PositionalConvEmbedding
    norm_first: ClassVar[bool] = False  # whether the blocks normalise before, and the last LayerNorm stands at the end
    never_dropped: ClassVar[int] = 0  # blocks from the first on that layer drop leaves in

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.pos_conv_embed = self.positional_class(config, **kwargs)
        self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.layers = nnx.List([self.layer_class(config, **kwargs) for _ in range(config.num_hidden_layers)])
        self.config = config

    def for_every_block(self, frames: int) -> tuple[Any, ...]:
        """What every block is told between its dropout and the mask: nothing here, positions in follow-ups."""
        return ()

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
        """Contextualized representations.

        Args:
            x: projected features.
            mask: True where a frame is speech. Padding is zeroed and not attended to.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the input of every block, and the output.
            hidden_states_before_norm: the last of them as the last block leaves it, where a LayerNorm follows.
            dropout: source of dropout keys.
        """
        dropout = dropout or Dropout(None)
        keys = None
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
            keys = mask[:, None, None, :]
        x = x + self.pos_conv_embed(x, dropout.key is not None)
        if not self.norm_first:
            x = self.layer_norm(x)
        x = dropout(x, self.config.hidden_dropout)
        told = self.for_every_block(x.shape[1])
        hidden_states, attentions = [x], []
        for index, layer in enumerate(self.layers):
            block = partial(layer, need_weights=output_attentions)
            rate = 0.0 if index < self.never_dropped else self.config.layerdrop
            x, weights = layer_drop(block, x, rate, dropout, *told, keys)
            hidden_states += [*unseen(layer), x]
            attentions.append(weights)
        if self.norm_first:
            x = self.layer_norm(x)
            if not hidden_states_before_norm:
                hidden_states[-1] = x
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class Wav2Vec2EncoderStableLayerNorm(Wav2Vec2Encoder):
    """Not in the paper; in the released checkpoints of LARGE (LibriVox): pre-norm blocks and a last LayerNorm."""

    layer_class = Wav2Vec2EncoderLayerStableLayerNorm
    norm_first = True


class Wav2Vec2AdapterLayer(nnx.Module):
    """Not in the paper; in the released checkpoints for speech translation: a strided convolution with a gate."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        width = config.adapter_size
        self.conv = Conv1d(
            width,
            2 * width,
            config.adapter_kernel_size,
            stride=config.adapter_stride,
            padding=1,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch frames width"]) -> Float[Array, "batch shorter width"]:
        """Half as many frames."""
        value, gate = jnp.split(self.conv(x), 2, axis=-1)
        return value * jax.nn.sigmoid(gate)


class Wav2Vec2Adapter(nnx.Module):
    """Not in the paper; in the released checkpoints for speech translation: from 20 to 160 ms a frame."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if config.adapter_size != config.hidden_size:
            init = nnx.initializers.normal(config.initializer_range)
            self.proj = Linear(config.hidden_size, config.adapter_size, kernel_init=init, **kwargs)
            self.proj_layer_norm = LayerNorm(config.adapter_size, **kwargs)
        self.layers = nnx.List([Wav2Vec2AdapterLayer(config, **kwargs) for _ in range(config.num_adapter_layers)])
        self.stride = config.adapter_stride

    def __call__(
        self, x: Float[Array, "batch frames hidden"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch shorter width"]:
        """Shorten the sequence. (Layer drop, which would change the length at random, is not applied here.)

        Args:
            x: frames.
            lengths: how many of each item are speech; the others are zeros to every convolution then.
        """
        if hasattr(self, "proj"):
            x = self.proj_layer_norm(self.proj(x))
        for layer in self.layers:
            if lengths is not None:
                x = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0)
                lengths = (lengths - 1) // self.stride + 1
            x = layer(x)
        return x


class Wav2Vec2Model(nnx.Module):
    """§2 and Figure 1: feature encoder, masking, context network."""

    feature_projection_class: ClassVar[type] = Wav2Vec2FeatureProjection
    encoder_class: ClassVar[type] = Wav2Vec2Encoder
    stable_encoder_class: ClassVar[type] = Wav2Vec2EncoderStableLayerNorm
    frame_rule: ClassVar[str] = "lengths"

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.feature_extractor = Wav2Vec2FeatureEncoder(config, **kwargs)
        self.feature_projection = self.feature_projection_class(config, **kwargs)
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nnx.Param(jax.random.uniform(rngs.params(), (config.hidden_size,), param_dtype))
        stable = config.do_stable_layer_norm
        self.encoder = (self.stable_encoder_class if stable else self.encoder_class)(config, **kwargs)
        if getattr(config, "add_adapter", False):
            self.adapter = Wav2Vec2Adapter(config, **kwargs)
        self.config = config

    def frame_lengths(self, sample_lengths: Lengths, *, adapter: bool = True) -> Lengths:
        """Frames out of that many samples, after the adapter if there is one."""
        config = self.config
        lengths = conv_lengths(sample_lengths, config.conv_kernel, config.conv_stride)
        if adapter and getattr(config, "add_adapter", False):
            count = config.num_adapter_layers
            lengths = conv_lengths(lengths, (1,) * count, (config.adapter_stride,) * count)
        return lengths

    def frame_mask(
        self, attention_mask: Int[Array, "batch samples"], frames: int, *, adapter: bool = True
    ) -> Bool[Array, "batch frames"]:
        """Which frames are speech, after the adapter if there is one; see `frame_mask`."""
        if adapter and getattr(self.config, "add_adapter", False):
            lengths = self.frame_lengths(attention_mask.astype(jnp.int32).sum(axis=-1))
            return jnp.arange(frames) < lengths[:, None]
        return frame_mask(self.config, attention_mask, frames, self.frame_rule)

    def draw_masks(
        self, key: jax.Array, batch: int, frames: int, mask: Bool[Array, "batch frames"] | None = None
    ) -> tuple[Bool[Array, "batch frames"] | None, Bool[Array, "batch hidden"] | None]:
        """§3.1 and Appendix A: random spans of frames, and for fine-tuning (§3.3) of channels, or None."""
        config = self.config
        if not config.apply_spec_augment:
            return None, None
        for_time, for_features = jax.random.split(key)
        spans = channels = None
        if config.mask_time_prob > 0:
            spans = span_mask(
                for_time,
                batch,
                frames,
                probability=config.mask_time_prob,
                span=config.mask_time_length,
                minimum=config.mask_time_min_masks,
                lengths=None if mask is None else mask.sum(axis=1),
            )
        if config.mask_feature_prob > 0:
            channels = span_mask(
                for_features,
                batch,
                config.hidden_size,
                probability=config.mask_feature_prob,
                span=config.mask_feature_length,
                minimum=config.mask_feature_min_masks,
            )
        return spans, channels

    def mask(
        self,
        x: Float[Array, "batch frames hidden"],
        spans: Bool[Array, "batch frames"] | None,
        channels: Bool[Array, "batch hidden"] | None,
    ) -> Float[Array, "batch frames hidden"]:
        """§3.1: masked frames become one learned vector; masked channels (SpecAugment) become zero."""
        if not self.config.apply_spec_augment:
            return x
        if spans is not None:
            if not hasattr(self, "masked_spec_embed"):
                raise UsageError("This model has no masked_spec_embed: its mask_time_prob and mask_feature_prob are 0.")
            x = jnp.where(jnp.asarray(spans, bool)[..., None], spread(self.masked_spec_embed[...], x), x)
        return x if channels is None else jnp.where(jnp.asarray(channels, bool)[:, None, :], 0, x)

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        *,
        mask_feature_indices: Bool[Array, "batch hidden"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        hidden_states_before_norm: bool = False,
        masked_group_norm: bool = False,
        masked_adapter: bool = False,
        feature_grad_mult: float | Float[Array, ""] = 1.0,
        key: jax.Array | None = None,
    ) -> Wav2Vec2BaseModelOutput:
        """Contextualized representations of waveforms.

        Args:
            input_values: waveforms at 16 kHz, normalised if the checkpoint's processor says so.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it. The base models were trained
                without; give it to them together with `masked_group_norm=True`.
            mask_time_indices: frames to mask; drawn if there is a `key`.
            mask_feature_indices: channels to mask; drawn if there is a `key`.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the input of every block, and the output, before any adapter.
            hidden_states_before_norm: the last of them without the last LayerNorm of a pre-norm model, as
                `transformers` returns it from version 5 on.
            masked_group_norm: normalise the first convolution's output over the recording only and not over the
                padding, so that a padded batch gives what its items give one by one. Needs an `attention_mask`.
            masked_adapter: let the strided convolutions behind the Transformer see zeros in place of the padding, to
                the same end. (fairseq does so for the first of them, `transformers` for none.)
            feature_grad_mult: factor on the gradient that reaches the feature encoder (§4.2: 0.1 for BASE); 0 freezes
                it.
            key: switches dropout, layer drop and masking on.

        Returns:
            `last_hidden_state`, `(batch, frames, hidden)`; `conv_features`, the feature encoder's output; and
            `extract_features`, the same after its LayerNorm, which is what the quantiser reads.

        Raises:
            UsageError: for input of a wrong shape or of fewer samples than one frame sees, 400 as published.
        """
        lengths = None
        if masked_group_norm and attention_mask is not None:
            lengths = attention_mask.astype(jnp.int32).sum(axis=-1)
        features = self.feature_extractor(input_values, lengths)
        features = scale_gradient(features, feature_grad_mult)
        dropout = Dropout(key)
        batch, frames, _ = features.shape
        mask = None if attention_mask is None else self.frame_mask(attention_mask, frames, adapter=False)
        x, extract_features = self.feature_projection(features, dropout)
        if (mask_key := dropout.next_key()) is not None:
            spans, channels = self.draw_masks(mask_key, batch, frames, mask)
            mask_time_indices = spans if mask_time_indices is None else mask_time_indices
            mask_feature_indices = channels if mask_feature_indices is None else mask_feature_indices
        x = self.mask(x, mask_time_indices, mask_feature_indices)
        encoded = self.encoder(
            x,
            mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            hidden_states_before_norm=hidden_states_before_norm,
            dropout=dropout,
        )
        x = encoded.last_hidden_state
        if hasattr(self, "adapter"):
            x = self.adapter(x, mask.sum(axis=1) if masked_adapter and mask is not None else None)
        return Wav2Vec2BaseModelOutput(
            last_hidden_state=x,
            extract_features=extract_features,
            conv_features=features,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


# --- §2, quantization module, and §3.2, the pre-training objective ---------------------------------------------------


def gumbel_temperature(
    step: int | Int[Array, ""], start: float = 2.0, end: float = 0.5, decay: float = 0.999995
) -> Float[Array, ""]:
    r"""§4.2: $\tau = \max(\text{start} \cdot \text{decay}^\text{step}, \text{end})$; BASE ends at 0.5, LARGE at 0.1."""
    return jnp.maximum(start * jnp.exp(step * math.log(decay)), end)  # a power of 0.999995 in float32 would not be it


def perplexity(
    probabilities: Float[Array, "frames groups entries"], weights: Float[Array, " frames"]
) -> Float[Array, ""]:
    r"""$\sum_g \exp H(\bar p_g)$ with $\bar p_g$ the mean over the frames of weight 1: how many entries are in use."""
    mean = jnp.einsum("ngv,n->gv", probabilities, weights) / jnp.maximum(weights.sum(), 1)
    # An entry that is never probable adds nothing, and has no slope.
    logarithm = jnp.log(jnp.where(mean > 0, mean, 1))
    return jnp.exp(-(mean * logarithm).sum(axis=-1)).sum()


class Wav2Vec2GumbelVectorQuantizer(nnx.Module):
    r"""§2, quantization module: one entry from each of $G$ codebooks of $V$ entries, side by side.

    In training entry $v$ of group $g$ is chosen with probability

    $$p_{g,v} = \frac{\exp((l_{g,v} + n_v)/\tau)}{\sum_k \exp((l_{g,k} + n_k)/\tau)}, \qquad n = -\log(-\log u)
    \qquad\text{(Eq. 1)}$$

    and what goes forward is the most probable entry alone, while the gradient goes through $p$ (straight-through).
    """

    def __init__(
        self,
        config: Any,
        *,
        channels: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """With `channels` for features of that width, else for those of the convolutions."""
        self.groups, self.entries = config.num_codevector_groups, config.num_codevectors_per_group
        shape = (1, self.groups * self.entries, config.codevector_dim // self.groups)
        self.codevectors = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype))
        self.weight_proj = Linear(
            channels or config.conv_dim[-1],
            self.groups * self.entries,
            kernel_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        features: Float[Array, "batch frames features"],
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        *,
        temperature: float | Float[Array, ""] = 2.0,
        gumbel_noise: Float[Array, "batch frames groups entries"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch frames codevector"], Float[Array, ""], Int[Array, "batch frames groups"]]:
        r"""Quantise every frame.

        Args:
            features: normalised features.
            mask_time_indices: the frames whose use of the codebooks counts; all by default.
            temperature: $\tau$.
            gumbel_noise: $n$; drawn if there is a `key`. With neither, the entry of the largest $l$ is taken.
            key: source of the noise.

        Returns:
            The quantised frames, the perplexity of the codebooks' use (of the softmax of $l$ in training, of the
            entries taken outside it), and the indices of the entries.
        """
        batch, frames, _ = features.shape
        logits = self.weight_proj(features).reshape(batch * frames, self.groups, self.entries)
        logits = at_least_float32(logits)
        if gumbel_noise is None and key is not None:
            gumbel_noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        if gumbel_noise is None:
            index = logits.argmax(axis=-1)
            chosen = in_use = jax.nn.one_hot(index, self.entries, dtype=logits.dtype)
        else:
            # Eq. 1
            soft = jax.nn.softmax((logits + gumbel_noise.reshape(logits.shape)) / temperature, axis=-1)
            index = soft.argmax(axis=-1)
            chosen = jax.nn.one_hot(index, self.entries, dtype=logits.dtype)
            chosen = chosen + (soft - jax.lax.stop_gradient(soft))  # the bracket is 0 and has the gradient
            in_use = jax.nn.softmax(logits, axis=-1)
        if mask_time_indices is None:
            weights = jnp.ones((batch * frames,), logits.dtype)
        else:
            weights = jnp.asarray(mask_time_indices, logits.dtype).reshape(-1)
        codebooks = self.codevectors[...].reshape(self.groups, self.entries, -1)
        quantised = jnp.einsum("ngv,gvd->ngd", chosen.astype(codebooks.dtype), codebooks)
        return (
            quantised.reshape(batch, frames, -1),
            perplexity(in_use, weights),
            index.reshape(batch, frames, self.groups),
        )


def sample_negative_indices(
    key: jax.Array, mask_time_indices: Bool[Array, "batch frames"], num_negatives: int
) -> Int[Array, "batch frames negatives"]:
    r"""§3.2: for each masked frame $K$ other masked frames of its utterance, drawn uniformly with replacement.

    The indices count through the whole batch, row after row, as `transformers` counts. Those of frames that are not
    masked point to the first frame of their utterance and are of no consequence.
    """
    batch, frames = mask_time_indices.shape
    mask = jnp.asarray(mask_time_indices, bool)
    count = mask.sum(axis=1)[:, None, None]
    rank = (jnp.cumsum(mask, axis=1) - 1)[..., None]
    unit = jax.random.uniform(key, (batch, frames, num_negatives))
    others = jnp.maximum(count - 1, 1)
    drawn = jnp.minimum(jnp.floor(unit * others).astype(jnp.int32), others - 1)
    # The frame itself is skipped, which leaves the others equally probable.
    drawn = jnp.minimum(drawn + (drawn >= rank), jnp.maximum(count - 1, 0))
    position = jnp.argsort(~mask, axis=1, stable=True)  # of the masked frames, in order
    chosen = jnp.take_along_axis(position, drawn.reshape(batch, -1), axis=1).reshape(drawn.shape)
    return jnp.where(mask[..., None], chosen, 0) + (jnp.arange(batch) * frames)[:, None, None]


def cosine_similarity(
    a: Float[Array, "*#shape channels"], b: Float[Array, "*#shape channels"]
) -> Float[Array, "*shape"]:
    r"""$a^\top b / \lVert a \rVert \lVert b \rVert$, each norm at least 1e-8."""
    return (unit_vectors(a) * unit_vectors(b)).sum(axis=-1)


def contrastive_logits(
    context: Float[Array, "batch frames width"],
    targets: Float[Array, "batch frames width"],
    negatives: Float[Array, "batch frames negatives width"],
    temperature: float = 0.1,
    same: Bool[Array, "batch frames negatives"] | None = None,
) -> Float[Array, "batch frames candidates"]:
    r"""$\mathrm{sim}(c_t, \tilde q)/\kappa$ of Eq. 3 for the true $q_t$, first, and the $K$ distractors.

    A distractor equal to the truth is struck out; `same` says which are, or else their vectors do.
    """
    candidates = jnp.concatenate([targets[:, :, None], negatives], axis=2)
    wide = jnp.promote_types(candidates.dtype, jnp.float32)
    logits = cosine_similarity(context[:, :, None].astype(wide), candidates.astype(wide)) / temperature
    if same is None:
        same = (negatives == targets[:, :, None]).all(axis=-1)
    return jnp.where(jnp.pad(same, ((0, 0), (0, 0), (1, 0))), -jnp.inf, logits)


def contrastive_loss(
    logits: Float[Array, "batch frames candidates"], mask_time_indices: Bool[Array, "batch frames"]
) -> Float[Array, ""]:
    r"""$\mathcal L_m$ of Eq. 3, summed over the masked frames; the truth is candidate 0."""
    losses = jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]
    return jnp.where(mask_time_indices, losses, 0).sum()


def diversity_loss(in_use: Float[Array, ""], config: Any) -> Float[Array, ""]:
    r"""$\mathcal L_d$ of Eq. 4, as released: $(GV - \sum_g \exp H(\bar p_g))/GV$, 0 where all are used alike."""
    entries = config.num_codevectors_per_group * config.num_codevector_groups
    return (entries - in_use) / entries


def features_penalty(features: Float[Array, "batch frames channels"]) -> Float[Array, ""]:
    """§4.2: the mean square of what the convolutions give, in at least float32."""
    return jnp.square(at_least_float32(features)).mean()


def check_labels(labels: Int[Array, "*shape"], count: int, what: str) -> None:
    """See to it that labels are below `count`; inside `jax.jit`, where no value is known, nothing is looked at.

    Raises:
        UsageError: if one is not.
    """
    if not isinstance(labels, jax.core.Tracer) and (largest := int(np.asarray(labels).max(initial=-1))) >= count:
        raise UsageError(f"The labels go up to {largest}; {what}.")


class Wav2Vec2ForPreTrainingOutput(ModelOutput):
    """§3.2: the loss (Eq. 2) and its parts. `features_pen` is the penalty of §4.2 before its weight."""

    loss: Float[Array, ""] | None = None
    projected_states: Float[Array, "batch frames width"] | None = None
    projected_quantized_states: Float[Array, "batch frames width"] | None = None
    codevector_perplexity: Float[Array, ""] | None = None
    hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    contrastive_loss: Float[Array, ""] | None = None
    diversity_loss: Float[Array, ""] | None = None
    features_pen: Float[Array, ""] | None = None


class _WithBackbone(nnx.Module):
    """What the heads share: a model under its family's name, `wav2vec2` here, and options that go through to it.

    The `...` of an input's shape is nothing, or the bands of a follow-up that hears features.
    """

    base_model_prefix: ClassVar[str] = "wav2vec2"
    base_class: ClassVar[type] = Wav2Vec2Model

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        backbone = self.base_class(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        setattr(self, self.base_model_prefix, backbone)
        self.config = config

    @property
    def backbone(self) -> Any:
        """The model below the head."""
        return getattr(self, self.base_model_prefix)

    def frames_to_predict(
        self,
        input_values: Float[Array, "batch samples ..."],
        attention_mask: Int[Array, "batch samples"] | None,
        mask_time_indices: Bool[Array, "batch frames"] | None,
        key: jax.Array | None,
    ) -> tuple[Bool[Array, "batch frames"] | None, Bool[Array, "batch frames"]]:
        """For pre-training (§3.1): the masked frames, given, drawn with `key` or none; and the frames of speech."""
        batch, frames = len(input_values), int(self.backbone.frame_lengths(input_values.shape[1], adapter=False))
        valid = jnp.ones((batch, frames), bool)
        if attention_mask is not None:
            valid = self.backbone.frame_mask(attention_mask, frames, adapter=False)
        if mask_time_indices is not None:
            return jnp.asarray(mask_time_indices, bool), valid
        drawn = None if key is None else self.backbone.draw_masks(key, batch, frames, valid)[0]
        return drawn, valid


class Wav2Vec2ForPreTraining(_WithBackbone):
    r"""§3.2: $\mathcal L = \mathcal L_m + \alpha \mathcal L_d$ (Eq. 2), and in BASE's recipe a penalty on the features.

    $$\mathcal L_m = -\log \frac{\exp(\mathrm{sim}(c_t, q_t)/\kappa)}{\sum_{\tilde q} \exp(\mathrm{sim}(c_t, \tilde
    q)/\kappa)} \qquad\text{(Eq. 3)}$$

    summed over the masked frames. For $\mathcal L_d$ (Eq. 4) the paper writes the negative entropy $-H(\bar p)/GV$; the
    released implementation, and this one, take the perplexity: $(GV - \sum_g \exp H(\bar p_g))/GV$ a masked frame.
    """

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        check_every_frame(config, "Pre-training")
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(config, **kwargs)

        def projection(width: int) -> Linear:
            init = _uniform(width**-0.5)
            return Linear(width, config.proj_codevector_dim, kernel_init=init, bias_init=init, **kwargs)

        self.project_hid = projection(config.hidden_size)
        self.project_q = projection(config.codevector_dim)

    def project(
        self,
        which: str,
        x: Float[Array, "batch frames width"],
        mask_time_indices: Bool[Array, "batch frames"] | None,
        training: bool,
    ) -> Float[Array, "batch frames projected"]:
        """`project_hid` or `project_q`, frame by frame; a follow-up's projections may look at what is masked."""
        return getattr(self, which)(x)

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        sampled_negative_indices: Int[Array, "batch frames negatives"] | None = None,
        *,
        temperature: float | Float[Array, ""] = 2.0,
        gumbel_noise: Float[Array, "batch frames groups entries"] | None = None,
        features_pen_weight: float | Float[Array, ""] = 0.0,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Wav2Vec2ForPreTrainingOutput:
        r"""Predictions, targets and, in training, the loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            mask_time_indices: frames to mask and to predict; drawn if there is a `key`.
            sampled_negative_indices: distractors of each frame (see `sample_negative_indices`); drawn if there is a
                `key`. With neither there is no loss.
            temperature: $\tau$ of Eq. 1 (see `gumbel_temperature`).
            gumbel_noise: $n$ of Eq. 1; drawn if there is a `key`. With neither the quantiser takes the best entry.
            features_pen_weight: weight of the mean square of the features, for each masked frame (§4.2; 10 for BASE).
            key: switches dropout, layer drop, masking, sampling and noise on.
            options: see `Wav2Vec2Model`.

        Returns:
            `projected_states` and `projected_quantized_states`, $c$ and $q$ in the width in which they are compared;
            `codevector_perplexity`; with negatives `loss`, a sum over masked frames, and its parts.
        """
        config = self.config
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        mask_time_indices, _ = self.frames_to_predict(input_values, attention_mask, mask_time_indices, keys[0])
        if mask_time_indices is None and key is not None:
            raise UsageError("Pre-training needs masks: apply_spec_augment with a mask_time_prob above 0.")
        outputs = self.backbone(input_values, attention_mask, mask_time_indices, key=keys[1], **options)
        features_pen = features_penalty(outputs.conv_features)
        context = self.project("project_hid", outputs.last_hidden_state, mask_time_indices, key is not None)
        unmasked = Dropout(keys[2])(outputs.extract_features, config.feat_quantizer_dropout)
        quantised, in_use, codes = self.quantizer(
            unmasked, mask_time_indices, temperature=temperature, gumbel_noise=gumbel_noise, key=keys[3]
        )
        quantised = self.project("project_q", quantised, mask_time_indices, key is not None)
        if sampled_negative_indices is None and keys[4] is not None and mask_time_indices is not None:
            sampled_negative_indices = sample_negative_indices(keys[4], mask_time_indices, config.num_negatives)
        loss = contrastive = diversity = None
        if sampled_negative_indices is not None:
            if mask_time_indices is None:
                raise UsageError("Give mask_time_indices together with sampled_negative_indices.")
            negatives = at_least_float32(quantised).reshape(-1, quantised.shape[-1])[sampled_negative_indices]
            # By their codes, which are equal or not; the original compares rounded vectors.
            same = (codes.reshape(-1, codes.shape[-1])[sampled_negative_indices] == codes[:, :, None]).all(axis=-1)
            logits = contrastive_logits(context, quantised, negatives, config.contrastive_logits_temperature, same)
            masked_frames = mask_time_indices.sum()
            contrastive = contrastive_loss(logits, mask_time_indices)
            diversity = diversity_loss(in_use, config) * masked_frames
            # Eq. 2
            loss = contrastive + config.diversity_loss_weight * diversity
            # §4.2, the penalty on the features
            loss = loss + features_pen_weight * features_pen * masked_frames
        return Wav2Vec2ForPreTrainingOutput(
            loss=loss,
            projected_states=context,
            projected_quantized_states=quantised,
            codevector_perplexity=in_use,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            contrastive_loss=contrastive,
            diversity_loss=diversity,
            features_pen=features_pen,
        )


# --- §3.3, fine-tuning, and the heads of the released checkpoints ----------------------------------------------------


class Wav2Vec2ForCTC(_WithBackbone):
    """§3.3: a linear layer onto the letters, trained with CTC."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.lm_head = Linear(
            getattr(config, "head_size", config.hidden_size),
            config.vocab_size,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        input_values: Float[Array, "batch samples ..."],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Letters for each frame and, with `labels`, the CTC loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: targets; -100 and the blank (`pad_token_id`) are left out.
            key: switches dropout, layer drop and masking on.
            options: see `Wav2Vec2Model`.

        Raises:
            UsageError: if a label is not in the vocabulary.
        """
        config = self.config
        if labels is not None:
            check_labels(labels, config.vocab_size, f"the vocabulary has {config.vocab_size} entries")
        keys = [None, None] if key is None else list(jax.random.split(key))
        outputs = self.backbone(input_values, attention_mask, key=keys[0], **options)
        x = Dropout(keys[1])(outputs.last_hidden_state, config.final_dropout)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            spoken = attention_mask is not None
            loss = ctc_loss(
                logits,
                jnp.asarray(labels),
                self.backbone.frame_mask(attention_mask, logits.shape[1]).sum(axis=1) if spoken else None,
                blank=config.pad_token_id,
                reduction=config.ctc_loss_reduction,
                zero_infinity=config.ctc_zero_infinity,
            )
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def mix_of_states(
    states: Sequence[Float[Array, "batch frames hidden"] | None], weights: Float[Array, " states"]
) -> Float[Array, "batch frames hidden"]:
    r"""$\sum_i \operatorname{softmax}(w)_i\, h_i$ over the input of every block and the output of the last.

    Raises:
        UsageError: if blocks are stacked.
    """
    shares = jax.nn.softmax(at_least_float32(weights))
    mixed = sum((w * h for w, h in zip(shares, all_states(states), strict=True)), jnp.zeros((), shares.dtype))
    return mixed.astype(jnp.result_type(weights, *states))


class _WithLayerSum(_WithBackbone):
    """A backbone whose layers may be mixed with learned weights, as the SUPERB benchmark (arXiv 2105.01051) does."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        check_every_frame(config, "Classification")
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if config.use_weighted_layer_sum:
            states = config.num_hidden_layers + 1
            self.layer_weights = nnx.Param(jnp.full((states,), 1.0 / states, param_dtype))

    def check_classes(self, labels: Int[Array, " batch"] | None) -> None:
        """See `check_labels`."""
        if labels is not None:
            check_labels(labels, self.config.num_labels, f"the model has {self.config.num_labels} classes")

    def frames(
        self, input_values: jax.Array, attention_mask: jax.Array | None, options: dict[str, Any]
    ) -> tuple[Float[Array, "batch frames hidden"], Wav2Vec2BaseModelOutput]:
        """What the head reads, and the backbone's output with only the fields that were asked for."""
        if not self.config.use_weighted_layer_sum:
            outputs = self.backbone(input_values, attention_mask, **options)
            return outputs.last_hidden_state, outputs
        outputs = self.backbone(input_values, attention_mask, **(options | {"output_hidden_states": True}))
        x = mix_of_states(outputs.hidden_states, self.layer_weights[...])
        if not options.get("output_hidden_states"):
            outputs.hidden_states = None
        return x, outputs


class Wav2Vec2ForSequenceClassification(_WithLayerSum):
    """Not in the paper; in the released checkpoints: a class for a recording (keyword, language, speaker, emotion)."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kwargs["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        self.projector = Linear(config.hidden_size, config.classifier_proj_size, **kwargs)
        self.classifier = Linear(config.classifier_proj_size, config.num_labels, **kwargs)

    def __call__(
        self,
        input_values: Float[Array, "batch samples ..."],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, " batch"] | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Class logits and, with `labels`, their cross-entropy.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: the class of each item; -100 is left out.
            options: see `Wav2Vec2Model`.

        Raises:
            UsageError: if a label is no class.
        """
        self.check_classes(labels)
        x, outputs = self.frames(input_values, attention_mask, options)
        x = self.projector(x)
        if attention_mask is None:
            pooled = x.mean(axis=1)
        else:
            mask = self.backbone.frame_mask(attention_mask, x.shape[1])[..., None]
            pooled = jnp.where(mask, x, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
        logits = self.classifier(pooled)
        return SequenceClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, jnp.asarray(labels)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class Wav2Vec2ForAudioFrameClassification(_WithLayerSum):
    """Not in the paper; in the released checkpoints: a class for every frame (who speaks when)."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = nnx.initializers.normal(config.initializer_range)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.classifier = Linear(config.hidden_size, config.num_labels, kernel_init=init, **kwargs)

    def __call__(
        self,
        input_values: Float[Array, "batch samples ..."],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Float[Array, "batch frames labels"] | None = None,
        **options: Any,
    ) -> TokenClassifierOutput:
        """Class logits of every frame and, with `labels`, their cross-entropy.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: one-hot; the largest entry of each row is the class of that frame.
            options: see `Wav2Vec2Model`.
        """
        x, outputs = self.frames(input_values, attention_mask, options)
        logits = self.classifier(x)
        return TokenClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, jnp.asarray(labels).argmax(axis=-1)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TDNNLayer(Conv1d):
    """Not in the paper; in the released checkpoints: a dilated convolution and ReLU (Snyder et al. 2018)."""

    def __call__(self, x: Float[Array, "batch frames inputs"]) -> Float[Array, "batch fewer features"]:
        """Convolve along time without padding."""
        return jax.nn.relu(super().__call__(x))


class AMSoftmaxLoss(nnx.Module):
    r"""Not in the paper; in the released checkpoints: additive-margin softmax (arXiv 1801.05599, Eq. 6)."""

    def __init__(self, features: int, labels: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (features, labels), param_dtype))

    def __call__(
        self, x: Float[Array, "batch features"], labels: Int[Array, " batch"], scale: float = 30.0, margin: float = 0.4
    ) -> Float[Array, ""]:
        r"""Cross-entropy of $s(\cos\theta_y - m)$ for the label $y$ against $s\cos\theta_j$ for the others."""
        x, kernel = (at_least_float32(a) for a in promote(x, self.kernel[...]))
        cosine = unit_vectors(x, shortest=1e-12) @ unit_vectors(kernel, axis=0, shortest=1e-12)
        own = jax.nn.one_hot(labels, cosine.shape[1], dtype=cosine.dtype)
        return cross_entropy(scale * (cosine - margin * own), labels)


def pooled_statistics(
    x: Float[Array, "batch frames channels"], lengths: Int[Array, " batch"]
) -> Float[Array, "batch statistics"]:
    """Not in the paper; in the released checkpoints: mean and (unbiased) standard deviation over so many frames."""
    mask, wide = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None], at_least_float32(x)
    count = jnp.maximum(lengths, 2)[:, None].astype(wide.dtype)  # fewer are padding's, in a compiled call
    mean = jnp.where(mask, wide, 0).sum(axis=1) / count
    variance = jnp.where(mask, jnp.square(wide - mean[:, None]), 0).sum(axis=1) / (count - 1)
    # Where a channel is silent, its deviation is 0 and has no slope.
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    return jnp.concatenate([mean, deviation], axis=-1).astype(x.dtype)


class Wav2Vec2ForXVector(_WithLayerSum):
    """Not in the paper; in the released checkpoints: an x-vector for a speaker (Snyder et al. 2018, Table 1)."""

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = kwargs | {"kernel_init": nnx.initializers.normal(config.initializer_range)}
        widths = (config.tdnn_dim[0], *config.tdnn_dim)
        self.projector = Linear(config.hidden_size, widths[0], **linear)
        self.tdnn = nnx.List(
            [
                TDNNLayer(widths[i], widths[i + 1], taps, dilation=dilation, **kwargs)
                for i, (taps, dilation) in enumerate(zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
            ]
        )
        self.feature_extractor = Linear(2 * widths[-1], config.xvector_output_dim, **linear)
        self.classifier = Linear(config.xvector_output_dim, config.xvector_output_dim, **linear)
        self.objective = AMSoftmaxLoss(config.xvector_output_dim, config.num_labels, param_dtype=param_dtype, rngs=rngs)

    @property
    def least_frames(self) -> int:
        """Frames of the shortest recording: behind the dilated layers there must be two, to have a deviation."""
        config = self.config
        return 2 + sum(d * (k - 1) for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))

    def __call__(
        self,
        input_values: Float[Array, "batch samples ..."],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, " batch"] | None = None,
        *,
        ignore_dilation: bool = False,
        **options: Any,
    ) -> XVectorOutput:
        """Speaker embeddings and, with `labels`, the additive-margin loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: the speaker of each item.
            ignore_dilation: count the frames to pool as `transformers` does, as if the layers were not dilated: then
                the last few frames of a shorter item have seen padding.
            options: see `Wav2Vec2Model`.

        Raises:
            UsageError: if a waveform is too short for the dilated layers, or a label is no class.
        """
        config = self.config
        self.check_classes(labels)
        shortest = input_values.shape[1]
        if attention_mask is not None and not (ignore_dilation or isinstance(attention_mask, jax.core.Tracer)):
            shortest = int(np.asarray(attention_mask).sum(axis=-1).min(initial=shortest))
        fewest = self.backbone.frame_lengths(shortest)
        if fewest < self.least_frames:
            raise UsageError(f"{fewest} frames are too few for a speaker; {self.least_frames} are needed.")
        x, outputs = self.frames(input_values, attention_mask, options)
        x = self.projector(x)
        for layer in self.tdnn:
            x = layer(x)
        lengths = jnp.full((len(x),), x.shape[1])
        if attention_mask is not None:
            lengths = self.backbone.frame_lengths(attention_mask.astype(jnp.int32).sum(axis=-1))
            dilations = (1,) * len(config.tdnn_kernel) if ignore_dilation else config.tdnn_dilation
            for taps, dilation in zip(config.tdnn_kernel, dilations, strict=True):
                lengths = lengths - dilation * (taps - 1)
            lengths = jnp.minimum(lengths, x.shape[1])
        embeddings = self.feature_extractor(pooled_statistics(x, lengths))
        logits = self.classifier(embeddings)
        return XVectorOutput(
            loss=None if labels is None else self.objective(logits, jnp.asarray(labels)),
            logits=logits,
            embeddings=embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class Wav2Vec2ForSpeakerVerification(_WithBackbone):
    """Not in the paper; in checkpoints released with WavLM: ECAPA-TDNN (arXiv 2005.07143) over a mix of all layers."""

    ecapa_config: ClassVar[EcapaTdnnConfig] = EcapaTdnnConfig.microsoft()

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, **kwargs)
        self.feature_weight = nnx.Param(jnp.zeros((config.num_hidden_layers + 1,), param_dtype))
        self.ecapa = EcapaTdnn(config.hidden_size, self.ecapa_config, **kwargs)

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> XVectorOutput:
        """Speaker embeddings, by whose cosine voices are compared.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            key: switches dropout, layer drop and masking on, and the batch's statistics in the head.
            options: see `Wav2Vec2Model`.
        """
        outputs = self.backbone(input_values, attention_mask, key=key, **(options | {"output_hidden_states": True}))
        x = mix_of_states(outputs.hidden_states, self.feature_weight[...])
        mask = None if attention_mask is None else self.backbone.frame_mask(attention_mask, x.shape[1])
        return XVectorOutput(
            embeddings=self.ecapa(x + 1e-6, mask, key is not None),
            hidden_states=outputs.hidden_states if options.get("output_hidden_states") else None,
            attentions=outputs.attentions,
        )
