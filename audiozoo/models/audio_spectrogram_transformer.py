r"""# AST: Audio Spectrogram Transformer

Yuan Gong, Yu-An Chung, James Glass, 2021, arXiv 2104.01778.

A spectrogram is cut into overlapping 16 × 16 patches, and a plain Transformer, the one that DeiT (arXiv 2012.12877)
made for images, tells what is heard. No convolution, no recurrence: the only change against the image model is the
number of input channels and the shape of the position table, hence its ImageNet weights are a good start for sound.

    waveform 16 kHz ── Kaldi log-mel, 10 ms hop, zero-padded, (x - mean) / 2 std ──> (1024, 128)
      ── Conv 16 × 16, stride 10 × 10 ──> 12 × 101 patches, frequency by frequency ──> (1212, d)
      ── [CLS], [DIST] in front ── + learned positions ──> (1214, d)
      ── N × [LN, self-attention, LN, MLP] ── LN ──> (1214, d)
      ── mean of the first two ──> (d,) ── LN, Linear ──> one logit a class

| paper | here |
| --- | --- |
| §2.1 and Figure 1, patch split with overlap | `ASTPatchEmbeddings`, `PatchProjection` |
| §2.1, [CLS] token and positions; §2.2, DeiT's second token | `ASTEmbeddings` |
| §2.1, Transformer encoder | `ASTAttention`, `ASTMLP`, `ASTLayer`, `ASTModel` |
| §2.1, linear layer with sigmoid | `ASTMLPHead`, `ASTForAudioClassification`, `classify` |
| §2.1, what stands for the whole sound | `embed` |
| §2.2, channel averaging of the patch weights | `sum_channels` |
| §2.2, cut and bilinear interpolation of the positions | `resize_position_embeddings`, `resized` |
| §3.1, mixup, SpecAugment | `mixup`, `draw_spans`, `spec_augment` |
| §3.1, balanced sampling | `balanced_sampling_weights` |
| §3.1, Adam and its learning rates; §3.2 for the other two tasks | `ASTRecipe` |
| §3.1, weight averaging and ensembles | `average_weights`, `ensemble` |
| not in the paper; in the released code: noise and a roll in time | `noise_and_roll` |

Checkpoints: `MIT/ast-finetuned-audioset-{10-10-0.4593,10-10-0.450,10-10-0.448,10-10-0.448-v2,12-12-0.447,14-14-0.443,
16-16-0.442}`, `MIT/ast-finetuned-speech-commands-v2`; the project's own `audioset_*.pth` and `speechcommands_*.pth`,
whose classes have names where the project's `class_labels_indices.csv` lies beside them; ImageNet DeiT weights
(`deit_{tiny,small,base}_distilled_patch16_*.pth`), to start from.

The released PyTorch code has LayerNorms with eps 1e-6 in the blocks and 1e-5 in the head; `transformers` runs all with
1e-12. Both are kept: `layer_norm_eps` and `classifier_layer_norm_eps` follow from where the weights come from.
Another length or stride than the checkpoint's, which `transformers` refuses, is `resized(model, max_length=512)`.

    import audiozoo
    from audiozoo.models.audio_spectrogram_transformer import classify
    model = audiozoo.load("MIT/ast-finetuned-audioset-10-10-0.4593")
    processor = audiozoo.load_processor("MIT/ast-finetuned-audioset-10-10-0.4593")
    for label, score in classify(model, processor, audiozoo.audio.read("dog.wav"), top=5):
        print(f"{score:.2f} {label}")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.audio.features import covering
from audiozoo.audio.files import check_waveform
from audiozoo.errors import UsageError
from audiozoo.layers import (
    Dropout,
    LayerNorm,
    Linear,
    activation,
    attend,
    attend_without_weights,
    check_mask,
    in_blocks,
    merge_heads,
    promote,
    split_heads,
)
from audiozoo.layers.attention import check_heads
from audiozoo.layers.basic import at_least_float32, spread
from audiozoo.layers.losses import cross_entropy
from audiozoo.layers.stacking import unscanned, unseen
from audiozoo.outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

SPECIAL_TOKENS = 2  # [CLS] and DeiT's distillation token stand before the patches
AUDIOSET_LABELS = 527


@dataclass(frozen=True)
class ASTConfig:
    """Sizes of one checkpoint: §2.1 for the base model, Table 5 for the strides."""

    hidden_size: int = 768  # width of the encoder
    num_hidden_layers: int = 12  # blocks
    num_attention_heads: int = 12  # of hidden_size / heads channels each
    intermediate_size: int = 3072  # width of the MLP
    hidden_act: str = "gelu"  # of the MLP
    hidden_dropout_prob: float = 0.0  # after embeddings, attention and MLP
    attention_probs_dropout_prob: float = 0.0  # on attention weights
    initializer_range: float = 0.02  # standard deviation that weights, tokens and positions start from
    layer_norm_eps: float = 1e-12  # of the encoder's LayerNorms; 1e-6 in the original code
    classifier_layer_norm_eps: float = 1e-12  # of the head's LayerNorm; 1e-5 in the original code
    patch_size: int = 16  # mel bands and frames of a patch
    qkv_bias: bool = True  # whether queries, keys and values have biases
    frequency_stride: int = 10  # mel bands between patches
    time_stride: int = 10  # frames between patches
    max_length: int = 1024  # frames of 10 ms
    num_mel_bins: int = 128  # mel bands
    problem_type: str | None = None  # single_label_classification, multi_label_classification or regression
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # names of the classes

    @property
    def num_labels(self) -> int:
        """Classes of the head."""
        return len(self.id2label)

    @property
    def grid(self) -> tuple[int, int]:
        r"""Patches over frequency and time: $\lfloor (M - P)/s_f \rfloor + 1$ and $\lfloor (T - P)/s_t \rfloor + 1$.

        Raises:
            UsageError: if the spectrogram is smaller than one patch.
        """
        if min(self.num_mel_bins, self.max_length) < self.patch_size:
            raise UsageError(
                f"A spectrogram of {self.max_length} frames and {self.num_mel_bins} mel bands holds no patch of "
                f"{self.patch_size} by {self.patch_size}."
            )
        return (
            (self.num_mel_bins - self.patch_size) // self.frequency_stride + 1,
            (self.max_length - self.patch_size) // self.time_stride + 1,
        )

    @classmethod
    def _task(cls, labels: int, stride: int = 10, length: int = 1024, **changes: Any) -> ASTConfig:
        names = tuple(f"LABEL_{i}" for i in range(labels))
        return cls(frequency_stride=stride, time_stride=stride, max_length=length, id2label=names, **changes)

    @classmethod
    def audioset_10_10(cls) -> ASTConfig:
        """§2.1 and Table 5: 10 s, 527 sounds, patches that overlap by 6: 1212 of them, 86.6 M parameters."""
        return cls._task(AUDIOSET_LABELS)

    @classmethod
    def audioset_12_12(cls) -> ASTConfig:
        """Table 5: patches that overlap by 4."""
        return cls._task(AUDIOSET_LABELS, 12)

    @classmethod
    def audioset_14_14(cls) -> ASTConfig:
        """Table 5: patches that overlap by 2."""
        return cls._task(AUDIOSET_LABELS, 14)

    @classmethod
    def audioset_16_16(cls) -> ASTConfig:
        """Table 5: patches without overlap."""
        return cls._task(AUDIOSET_LABELS, 16)

    @classmethod
    def esc50(cls) -> ASTConfig:
        """§3.2: 5 s, 50 sounds."""
        return cls._task(50, length=512)

    @classmethod
    def speech_commands_v2(cls) -> ASTConfig:
        """§3.2: 1 s, 35 words."""
        return cls._task(35, length=128)

    @classmethod
    def tiny(cls) -> ASTConfig:
        """Not in the paper; in the released code (`tiny224`): the sizes of DeiT-tiny, 5.7 M parameters."""
        return cls._task(AUDIOSET_LABELS, hidden_size=192, num_attention_heads=3, intermediate_size=768)

    @classmethod
    def small(cls) -> ASTConfig:
        """Not in the paper; in the released code (`small224`): the sizes of DeiT-small, 22 M parameters."""
        return cls._task(AUDIOSET_LABELS, hidden_size=384, num_attention_heads=6, intermediate_size=1536)


# --- the model, §2.1 -------------------------------------------------------------------------------------------------


class PatchProjection(nnx.Module):
    """§2.1, linear projection layer: each patch to one vector, as a convolution of one input channel."""

    def __init__(self, config: ASTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        shape = (config.patch_size, config.patch_size, 1, config.hidden_size)
        self.kernel = nnx.Param(normal(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,), param_dtype))
        self.strides, self.dtype = (config.frequency_stride, config.time_stride), dtype

    def __call__(self, x: Float[Array, "batch mels time"]) -> Float[Array, "batch rows columns hidden"]:
        """Project every patch; rows run over frequency."""
        bias = self.bias[...]
        x, kernel, _ = promote(x, self.kernel[...], bias, dtype=self.dtype)
        y = jax.lax.conv_general_dilated(
            x[..., None], kernel, self.strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + spread(bias, y)


class ASTPatchEmbeddings(nnx.Module):
    """§2.1, patch split with overlap: a sequence of patches, all times of the lowest band first."""

    def __init__(self, config: ASTConfig, **kwargs: Any):
        self.projection = PatchProjection(config, **kwargs)

    def __call__(self, input_values: Float[Array, "batch time mels"]) -> Float[Array, "batch patches hidden"]:
        """Cut into patches and project them."""
        y = self.projection(input_values.swapaxes(1, 2))
        return y.reshape(y.shape[0], -1, y.shape[-1])


class ASTEmbeddings(nnx.Module):
    """§2.1 and §2.2: patches after [CLS] and the distillation token, plus learned positions."""

    def __init__(self, config: ASTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        draw = nnx.initializers.truncated_normal(config.initializer_range)
        rows, columns = config.grid
        self.cls_token = nnx.Param(draw(rngs.params(), (1, 1, config.hidden_size), param_dtype))
        self.distillation_token = nnx.Param(draw(rngs.params(), (1, 1, config.hidden_size), param_dtype))
        shape = (1, SPECIAL_TOKENS + rows * columns, config.hidden_size)
        self.position_embeddings = nnx.Param(draw(rngs.params(), shape, param_dtype))
        self.patch_embeddings = ASTPatchEmbeddings(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self, input_values: Float[Array, "batch time mels"], dropout: Dropout
    ) -> Float[Array, "batch tokens hidden"]:
        """The encoder's input."""
        patches = self.patch_embeddings(input_values)
        tokens = [spread(token[...], patches[:, :1]) for token in (self.cls_token, self.distillation_token)]
        x = jnp.concatenate([*tokens, patches], axis=1)
        return dropout(x + spread(self.position_embeddings[...], x), self.dropout_rate)


class ASTAttention(nnx.Module):
    """§2.1: the multi-head self-attention of the standard Transformer encoder (arXiv 1706.03762, §3.2.2)."""

    def __init__(self, config: ASTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        width, heads = config.hidden_size, config.num_attention_heads
        check_heads(width, heads)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kwargs["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        self.q_proj = Linear(width, width, use_bias=config.qkv_bias, **kwargs)
        self.k_proj = Linear(width, width, use_bias=config.qkv_bias, **kwargs)
        self.v_proj = Linear(width, width, use_bias=config.qkv_bias, **kwargs)
        self.o_proj = Linear(width, width, **kwargs)
        self.heads, self.dropout_rate = heads, config.attention_probs_dropout_prob

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        mask: Bool[Array, "batch 1 1 tokens"] | None,
        dropout: Dropout,
        need_weights: bool = False,
    ) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch heads tokens tokens"] | None]:
        """Attend from every token to every token that the mask shows; returns the attention weights too, if needed."""
        query, key, value = (split_heads(part(x), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        scale, rate, weights = query.shape[-1] ** -0.5, self.dropout_rate, None
        if need_weights or (rate and dropout.key is not None):
            y, weights = attend(query, key, value, scale=scale, mask=mask, dropout_rate=rate, dropout=dropout)
        else:
            y = attend_without_weights(query, key, value, scale=scale, mask=mask)
        return self.o_proj(merge_heads(y)), weights


class ASTMLP(nnx.Module):
    """§2.1: the position-wise network of the encoder, widened four times."""

    def __init__(self, config: ASTConfig, **kwargs: Any):
        normal = nnx.initializers.normal(config.initializer_range)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, kernel_init=normal, **kwargs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, kernel_init=normal, **kwargs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens hidden"]:
        """Two linear maps with the activation between them."""
        act = activation(self.hidden_act)
        return in_blocks(lambda y: self.fc2(act(self.fc1(y))), x, self.fc1.out_features)


class ASTLayer(nnx.Module):
    r"""§2.1, encoder block: $x + \mathrm{SelfAttention}(\mathrm{LN}(x))$, then $x + \mathrm{MLP}(\mathrm{LN}(x))$."""

    def __init__(self, config: ASTConfig, **kwargs: Any):
        self.attention = ASTAttention(config, **kwargs)
        self.layernorm_before = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.layernorm_after = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.mlp = ASTMLP(config, **kwargs)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        mask: Bool[Array, "batch 1 1 tokens"] | None,
        dropout: Dropout,
        need_weights: bool = False,
    ) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch heads tokens tokens"] | None]:
        """One block; returns its output and, if needed, its attention weights."""
        attention, weights = self.attention(self.layernorm_before(x), mask, dropout, need_weights)
        x = x + dropout(attention, self.dropout_rate)
        return x + dropout(self.mlp(self.layernorm_after(x)), self.dropout_rate), weights


class ASTModel(nnx.Module):
    """§2.1: embeddings, encoder and the last LayerNorm; the mean of [CLS] and [DIST] stands for the whole sound."""

    def __init__(self, config: ASTConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embeddings = ASTEmbeddings(config, **kwargs)
        self.layers = nnx.List([ASTLayer(config, **kwargs) for _ in range(config.num_hidden_layers)])
        self.layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_values: Float[Array, "batch time mels"],
        attention_mask: Int[Array, "batch tokens"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode spectrograms.

        Args:
            input_values: normalised log-mel spectrograms of exactly `max_length` frames, as the processor gives them.
            attention_mask: 1 for tokens to be seen, 0 for others: [CLS], [DIST], then the patches row by row. The
                released checkpoints were trained without one, padding visible.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the embeddings and every block's output, before the last LayerNorm.
            key: switches dropout on.

        Returns:
            `last_hidden_state` `(batch, 2 + patches, hidden_size)` and `pooler_output` `(batch, hidden_size)`.

        Raises:
            UsageError: if the spectrogram or the mask has another size than the model's.
        """
        config = self.config
        sizes = (config.max_length, config.num_mel_bins)
        if input_values.ndim != 3 or input_values.shape[1:] != sizes or not len(input_values):
            raise UsageError(
                f"The features have shape {tuple(input_values.shape)}; this model takes (batch, {config.max_length}, "
                f"{config.num_mel_bins}), at least one item. resized(model, max_length=…) makes one for another length."
            )
        dropout = Dropout(key)
        x = self.embeddings(input_values, dropout)
        mask = None
        if attention_mask is not None:
            check_mask(attention_mask, x.shape[:2])
            mask = (attention_mask != 0)[:, None, None, :]
        hidden_states: list[Any] = [x]
        attentions: list[Any] = []
        for layer in self.layers:
            x, weights = layer(x, mask, dropout, output_attentions)
            hidden_states += [*unseen(layer), x]
            attentions.append(weights)
        x = self.layernorm(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=(x[:, 0] + x[:, 1]) / 2,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class ASTMLPHead(nnx.Module):
    """§2.1, linear layer: not in the paper, in the released checkpoints, is the LayerNorm before it."""

    def __init__(self, config: ASTConfig, **kwargs: Any):
        self.layernorm = LayerNorm(config.hidden_size, epsilon=config.classifier_layer_norm_eps, **kwargs)
        normal = nnx.initializers.normal(config.initializer_range)
        self.dense = Linear(config.hidden_size, config.num_labels, kernel_init=normal, **kwargs)

    def __call__(self, x: Float[Array, "batch hidden"]) -> Float[Array, "batch labels"]:
        """Logits."""
        return self.dense(self.layernorm(x))


def classification_loss(
    logits: Float[Array, "batch labels"], labels: Array, problem_type: str | None = None
) -> Float[Array, ""]:
    r"""§3.1: binary cross-entropy for sounds that overlap (AudioSet), cross-entropy where one excludes the others.

    Args:
        logits: one row an item.
        labels: class numbers `(batch,)`; targets in [0, 1] `(batch, labels)` for several sounds at once (mixed ones
            included); any numbers for a regression.
        problem_type: "single_label_classification", "multi_label_classification" (mean of
            $-t\log\sigma(z) - (1-t)\log(1-\sigma(z))$) or "regression" (mean square). By default regression for one
            output, else by the labels: one class for integers, several for floats.

    Raises:
        UsageError: for another problem type, or if the labels' shape does not fit.
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        else:
            integers = jnp.issubdtype(labels.dtype, jnp.integer)
            problem_type = "single_label_classification" if integers else "multi_label_classification"
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    if problem_type not in ("multi_label_classification", "regression"):
        raise UsageError(
            f"There is no problem type {problem_type!r}; there are single_label_classification, "
            "multi_label_classification and regression."
        )
    if labels.size != logits.size:
        raise UsageError(
            f"The labels have shape {tuple(labels.shape)} where the logits have {tuple(logits.shape)}; "
            f"{problem_type} takes one target for each logit."
        )
    logits = at_least_float32(logits)
    targets = labels.reshape(logits.shape).astype(logits.dtype)
    if problem_type == "regression":
        return jnp.mean((logits - targets) ** 2)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


class ASTForAudioClassification(nnx.Module):
    """§2.1 and Figure 1: the encoder with a linear layer on what stands for the whole sound."""

    def __init__(self, config: ASTConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.audio_spectrogram_transformer = ASTModel(config, **kwargs)
        self.classifier = ASTMLPHead(config, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_values: Float[Array, "batch time mels"],
        labels: Array | None = None,
        attention_mask: Int[Array, "batch tokens"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> SequenceClassifierOutput:
        """Class logits and, with `labels`, their loss.

        Args:
            input_values: normalised log-mel spectrograms.
            labels: see `classification_loss`.
            attention_mask: see `ASTModel`.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the embeddings and every block's output.
            key: switches dropout on.

        Raises:
            UsageError: if features, mask or labels are of a wrong shape.
        """
        encoded = self.audio_spectrogram_transformer(
            input_values,
            attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )
        logits = self.classifier(encoded.pooler_output)
        return SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


# --- from images to sounds, and from one size to another, §2.2 -------------------------------------------------------


def sum_channels(
    kernel: Float[np.ndarray, "hidden channels rows columns"],
) -> Float[np.ndarray, "hidden 1 rows columns"]:
    """§2.2: an image model's patch weights for one channel.

    The paper averages the three weights and normalises the spectrogram to the images' range; the released code,
    followed here, sums them: what a grey image would get.
    """
    return kernel.sum(axis=1, keepdims=True)


def interpolation_matrix(outputs: int, inputs: int) -> Float[np.ndarray, "outputs inputs"]:
    r"""§2.2, bilinear interpolation, one axis of it: row $i$ holds the weights of the inputs in output $i$.

    Pixels are areas (PyTorch's `align_corners=False`): output $i$ lies at $x_i = \max((i + ½)\,n/m - ½,\ 0)$ for $m$
    outputs and $n$ inputs, between $\lfloor x_i \rfloor$ and the next, or on the last.
    """
    at = np.maximum((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0.0)
    low = np.minimum(at.astype(int), inputs - 1)
    high = np.minimum(low + 1, inputs - 1)
    matrix = np.zeros((outputs, inputs))
    np.add.at(matrix, (np.arange(outputs), low), 1.0 - (at - low))
    np.add.at(matrix, (np.arange(outputs), high), at - low)
    return matrix


def _cut_or_interpolate(grid: np.ndarray, length: int, axis: int) -> np.ndarray:
    have = grid.shape[axis]
    if length > have:
        matrix = interpolation_matrix(length, have).astype(np.promote_types(grid.dtype, np.float32))
        return np.moveaxis(np.tensordot(matrix, grid, (1, axis)), 0, axis).astype(grid.dtype)
    start = have // 2 - length // 2
    return np.take(grid, np.arange(start, start + length), axis)


def resize_position_embeddings(
    embeddings: Float[np.ndarray, "1 tokens hidden"], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "1 new_tokens hidden"]:
    """§2.2: positions for another grid of patches: time first, then frequency; what is shorter is cut from the middle.

    Args:
        embeddings: [CLS], [DIST] and `old[0] * old[1]` patches.
        old: rows and columns that `embeddings` are for: 24 × 24 for DeiT at 384 pixels, 12 × 101 for 10 s of sound.
        new: rows and columns wanted. Longer axes are interpolated, shorter ones cut.

    Raises:
        UsageError: if `embeddings` are not for the grid `old`.
    """
    embeddings = np.asarray(embeddings)
    tokens, hidden = embeddings.shape[1:]
    if tokens != SPECIAL_TOKENS + old[0] * old[1]:
        raise UsageError(
            f"{tokens} position embeddings are not those of {old[0]} by {old[1]} patches and {SPECIAL_TOKENS} tokens."
        )
    grid = embeddings[0, SPECIAL_TOKENS:].reshape(*old, hidden)
    grid = _cut_or_interpolate(_cut_or_interpolate(grid, new[1], axis=1), new[0], axis=0)
    return np.concatenate([embeddings[:, :SPECIAL_TOKENS], grid.reshape(1, -1, hidden)], axis=1)


def resized(
    model: ASTModel | ASTForAudioClassification,
    *,
    max_length: int | None = None,
    num_mel_bins: int | None = None,
    time_stride: int | None = None,
    frequency_stride: int | None = None,
) -> Any:
    """§2.2, between two sound tasks: the same weights for spectrograms of another size, or patches of another overlap.

    Args:
        model: stays as it is.
        max_length: frames; as before by default, like all the others.
        num_mel_bins: mel bands.
        time_stride: frames between patches.
        frequency_stride: mel bands between patches.

    Returns:
        A new model of the same class, with its position embeddings cut or interpolated; its layers are not stacked.
    """
    model, old = unscanned(model), model.config
    wanted: dict[str, Any] = {
        "max_length": max_length,
        "num_mel_bins": num_mel_bins,
        "time_stride": time_stride,
        "frequency_stride": frequency_stride,
    }
    config = dataclasses.replace(old, **{name: value for name, value in wanted.items() if value is not None})
    flat = nnx.to_flat_state(nnx.state(model))
    param_dtype = flat[0][1][...].dtype
    blank = nnx.eval_shape(lambda: type(model)(config, dtype=model.dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    leaves = []
    for path, variable in flat:
        if path[-1] == "position_embeddings":
            table = resize_position_embeddings(np.asarray(variable[...]), old.grid, config.grid)
            variable = variable.replace(jnp.asarray(table))
        leaves.append((path, variable))
    return nnx.merge(nnx.graphdef(blank), nnx.from_flat_state(leaves))


# --- use -------------------------------------------------------------------------------------------------------------


def scores(logits: Float[Array, "*batch labels"], config: ASTConfig, problem_type: str | None = None) -> jax.Array:
    """§2.1: what the logits say, in [0, 1]: a sigmoid for each where sounds overlap, else a softmax over all.

    Without a `problem_type`, neither here nor in the configuration, the 527 labels of AudioSet are taken to overlap and
    others to exclude each other.
    """
    problem_type = problem_type or config.problem_type
    if problem_type is None:
        overlap = config.num_labels in (1, AUDIOSET_LABELS)
        problem_type = "multi_label_classification" if overlap else "single_label_classification"
    if problem_type == "regression":
        return logits
    return jax.nn.sigmoid(logits) if problem_type == "multi_label_classification" else jax.nn.softmax(logits, axis=-1)


@jax.jit
def _logits(model: ASTForAudioClassification, input_values: jax.Array) -> jax.Array:
    return model(input_values).logits


@jax.jit
def _pooled(model: ASTModel, input_values: jax.Array) -> jax.Array:
    return model(input_values).pooler_output


def _inputs(processor: Any, audio: Any, sampling_rate: int) -> list[jax.Array]:
    """Features of windows that cover a recording."""
    pieces = covering(check_waveform(audio), processor.samples)
    return [jnp.asarray(processor(piece, sampling_rate=sampling_rate)["input_values"]) for piece in pieces]


def embed(
    model: ASTModel | ASTForAudioClassification,
    processor: Any,
    audio: Float[np.ndarray, " time"],
    *,
    sampling_rate: int = 16_000,
) -> Float[np.ndarray, " hidden"]:
    """§2.1: what stands for the whole sound, the mean of [CLS] and [DIST]; of a long recording, the mean of windows.

    Args:
        model: the encoder, or a classifier around it.
        processor: of the same checkpoint.
        audio: mono waveform in [-1, 1]; covered by windows as in `classify`.
        sampling_rate: Hz of `audio`, to be checked.

    Raises:
        AudioError: as the processor.
    """
    encoder = getattr(model, "audio_spectrogram_transformer", model)
    rows = [_pooled(encoder, x)[0] for x in _inputs(processor, audio, sampling_rate)]
    return np.mean(np.stack([np.asarray(row, np.float64) for row in rows]), axis=0).astype(np.float32)


def classify(
    model: ASTForAudioClassification,
    processor: Any,
    audio: Float[np.ndarray, " time"],
    top: int = 5,
    *,
    sampling_rate: int = 16_000,
    problem_type: str | None = None,
) -> list[tuple[str, float]]:
    """§2.1: what is heard, the most likely first.

    A recording longer than the model's window is cut into windows, the last one flush with its end, and their scores
    are averaged; `transformers` reads the first window only.

    Args:
        model: a classifier.
        processor: of the same checkpoint.
        audio: mono waveform in [-1, 1].
        top: how many labels.
        sampling_rate: Hz of `audio`, to be checked.
        problem_type: see `scores`.

    Returns:
        Labels and their scores.

    Raises:
        AudioError: as the processor.
        UsageError: for a `top` below 1.
    """
    if top < 1:
        raise UsageError(f"top is {top}; at least one label is to be named.")
    found = [
        np.asarray(scores(_logits(model, x), model.config, problem_type), np.float64)[0]
        for x in _inputs(processor, audio, sampling_rate)
    ]
    mean = np.mean(found, axis=0)
    order = np.argsort(-mean, kind="stable")[:top]
    return [(model.config.id2label[i], float(mean[i])) for i in order]


def attention_rollout(
    attentions: Sequence[Float[Array, "batch heads tokens tokens"]], grid: tuple[int, int]
) -> Float[Array, "batch rows columns"]:
    r"""Not in the paper: how much of each patch reaches the pooled output (attention rollout, arXiv 2005.00928, Eq. 1).

    $\tilde A_l = ½(\bar A_l + I)\,\tilde A_{l-1}$ with $\bar A_l$ the mean over heads; the rows of [CLS] and [DIST] are
    averaged, and the patches' columns laid out on the spectrogram.
    """
    rolled = None
    for weights in attentions:
        mean = weights.mean(axis=1)
        step = (mean + jnp.eye(mean.shape[-1], dtype=mean.dtype)) / 2
        rolled = step if rolled is None else step @ rolled
    if rolled is None:
        raise UsageError("Attention rollout needs the attentions of at least one layer: output_attentions=True.")
    return rolled[:, :SPECIAL_TOKENS, SPECIAL_TOKENS:].mean(axis=1).reshape(-1, *grid)


# --- training, §3.1 --------------------------------------------------------------------------------------------------


def mixup(
    waveforms: Float[Array, "batch time"],
    partners: Float[Array, "batch time"],
    labels: Float[Array, "batch labels"],
    partner_labels: Float[Array, "batch labels"],
    weight: Float[Array, " batch"],
) -> tuple[Float[Array, "batch time"], Float[Array, "batch labels"]]:
    r"""§3.1, mixup of waveforms: $\lambda (x - \bar x) + (1 - \lambda)(x' - \bar x')$; labels alike.

    Args:
        waveforms: $x$.
        partners: $x'$, padded or cut to the length of $x$.
        labels: targets of $x$, in [0, 1].
        partner_labels: targets of $x'$.
        weight: $\lambda$; the paper draws it from a Beta(10, 10), `jax.random.beta(key, 10, 10, (batch,))`, for half of
            the samples, and lets $\lambda = 1$ for the others.
    """
    weight = weight[:, None]
    x = waveforms - waveforms.mean(axis=-1, keepdims=True)
    other = partners - partners.mean(axis=-1, keepdims=True)
    return weight * x + (1 - weight) * other, weight * labels + (1 - weight) * partner_labels


def mixup_weights(key: jax.Array, batch: int, rate: float = 0.5) -> Float[Array, " batch"]:
    r"""§3.1: $\lambda \sim \mathrm{Beta}(10, 10)$ for a share `rate` of the samples, 1 (no mixing) for the others."""
    which, how = jax.random.split(key)
    return jnp.where(jax.random.uniform(which, (batch,)) < rate, jax.random.beta(how, 10.0, 10.0, (batch,)), 1.0)


def draw_spans(key: jax.Array, batch: int, length: int, widest: int) -> Int[Array, "batch 2"]:
    """§3.1, SpecAugment (arXiv 1904.08779): first and end of one span a row, its width uniform up to `widest`."""
    width_key, start_key = jax.random.split(key)
    width = jax.random.uniform(width_key, (batch,)) * min(widest, length)
    first = (jax.random.uniform(start_key, (batch,)) * (length - width)).astype(jnp.int32)
    return jnp.stack([first, first + width.astype(jnp.int32)], axis=1)


def spec_augment(
    fbank: Float[Array, "batch time mels"],
    frequencies: Int[Array, "batch 2"],
    times: Int[Array, "batch 2"],
    fill: float | Float[Array, ""] = 0.0,
) -> Float[Array, "batch time mels"]:
    """§3.1, SpecAugment: one span of mel bands and one of frames set to `fill`.

    The released code masks before it normalises, with zeros: the same value as padding's. On normalised features that
    value is `processor.padding`.

    Args:
        fbank: log-mel spectrograms.
        frequencies: first band and the one after the last, of each item; see `draw_spans`.
        times: first frame and the one after the last.
        fill: the value under the masks.
    """

    def inside(spans: jax.Array, length: int) -> jax.Array:
        index = jnp.arange(length)
        return (index >= spans[:, :1]) & (index < spans[:, 1:])

    masked = inside(times, fbank.shape[1])[:, :, None] | inside(frequencies, fbank.shape[2])[:, None, :]
    return jnp.where(masked, jnp.asarray(fill, fbank.dtype), fbank)


def noise_and_roll(
    features: Float[Array, "batch time mels"],
    noise: Float[Array, "batch time mels"],
    amount: Float[Array, " batch"],
    shift: Int[Array, " batch"],
) -> Float[Array, "batch time mels"]:
    """Not in the paper; in the released code, for Speech Commands: noise on normalised features, then a roll in time.

    Args:
        features: normalised log-mel spectrograms.
        noise: uniform in [0, 1).
        amount: uniform in [0, 1); a tenth of it scales the noise.
        shift: frames, uniform in -10 … 9; what leaves at one end comes in at the other.
    """
    noisy = features + noise * (amount / 10)[:, None, None]
    return jax.vmap(lambda row, by: jnp.roll(row, by, axis=0))(noisy, shift)


def balanced_sampling_weights(labels: Float[np.ndarray, "samples labels"]) -> Float[np.ndarray, " samples"]:
    r"""§3.1, balanced sampling: how often to draw each sample, $w_i = \sum_{c \in y_i} 1000 / (n_c + 0.01)$.

    Args:
        labels: 1 where a sample has a label, which $n_c$ samples have.
    """
    present = np.asarray(labels) > 0
    counts = present.sum(axis=0)
    return present @ (1000.0 / (counts + 0.01))


@dataclass(frozen=True)
class ASTRecipe:
    """§3.1 and §3.2: how the published models were trained; the defaults are those of full AudioSet."""

    learning_rate: float = 1e-5  # of Adam
    epochs: int = 5  # passes over the data
    batch_size: int = 12  # spectrograms a step
    decay_start: int = 2  # epochs at the full rate
    decay_every: int = 1  # epochs between decays
    decay: float = 0.5  # factor of each decay
    warmup: bool = True  # rise over the first 1000 steps, in steps of 50
    balanced: bool = True  # whether samples are drawn by `balanced_sampling_weights`
    mixup_rate: float = 0.5  # share of mixed samples
    frequency_mask: int = 48  # widest SpecAugment span, mel bands
    time_mask: int = 192  # widest SpecAugment span, frames
    noise: bool = False  # `noise_and_roll`
    average: tuple[int, int] | None = (1, 5)  # first and last epoch whose weights are averaged
    problem_type: str = "multi_label_classification"  # the loss

    @classmethod
    def audioset(cls) -> ASTRecipe:
        """§3.1, full AudioSet."""
        return cls()

    @classmethod
    def balanced_audioset(cls) -> ASTRecipe:
        """§3.1, the balanced set of 20 thousand samples."""
        return cls(learning_rate=5e-5, epochs=25, decay_start=10, decay_every=5, balanced=False, average=(6, 25))

    @classmethod
    def esc50(cls, audioset: bool = True) -> ASTRecipe:
        """§3.2, ESC-50, from AudioSet weights or from ImageNet's alone."""
        return cls(
            learning_rate=1e-5 if audioset else 1e-4,
            epochs=25,
            batch_size=48,
            decay_start=5,
            decay=0.85,
            warmup=False,
            balanced=False,
            mixup_rate=0.0,
            frequency_mask=24,
            time_mask=96,
            average=None,
            problem_type="single_label_classification",
        )

    @classmethod
    def speech_commands_v2(cls) -> ASTRecipe:
        """§3.2, Speech Commands, from ImageNet weights."""
        return cls(
            learning_rate=2.5e-4,
            epochs=30,
            batch_size=128,
            decay_start=5,
            decay=0.85,
            warmup=False,
            balanced=False,
            mixup_rate=0.6,
            time_mask=48,
            noise=True,
            average=None,
        )

    def schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate at each step: stairs down by epochs and, with `warmup`, stairs up over 1000 steps."""

        def rate(step: Any) -> jax.Array:
            epoch = step // steps_per_epoch + 1
            decays = jnp.maximum(0, (epoch - 1 - self.decay_start) // self.decay_every + 1)
            decayed = self.learning_rate * self.decay**decays
            if not self.warmup:
                return decayed
            return jnp.where(step <= 1000, self.learning_rate * (step // 50) / 20, decayed)

        return rate

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        r"""§3.1: Adam; in the released code $\beta = (0.95, 0.999)$ and an $L_2$ penalty of $5 \cdot 10^{-7}$."""
        return optax.chain(
            optax.add_decayed_weights(5e-7), optax.adam(self.schedule(steps_per_epoch), b1=0.95, b2=0.999)
        )


def average_weights(checkpoints: Iterable[Any]) -> Any:
    """§3.1, weight averaging: the mean of the parameters of several epochs, one epoch at a time in memory.

    Args:
        checkpoints: models, or pytrees of parameters, of one structure.

    Raises:
        UsageError: if there are none.
    """
    total, count = None, 0
    for model in checkpoints:
        total = model if total is None else jax.tree.map(jnp.add, total, model)
        count += 1
    if total is None:
        raise UsageError("There is no checkpoint to average.")
    return jax.tree.map(lambda x: x / count, total)


def ensemble(probabilities: Sequence[Float[Array, "batch labels"]]) -> Float[Array, "batch labels"]:
    """§3.1, ensembles: the mean of several models' probabilities (`scores`); their strides may differ."""
    return jnp.mean(jnp.stack(list(probabilities)), axis=0)


@dataclass(frozen=True)
class Augmentation:
    """§3.1: everything random about one batch, drawn once, so that it can be given too."""

    frequencies: Int[Array, "batch 2"]  # bands under SpecAugment's mask
    times: Int[Array, "batch 2"]  # frames under SpecAugment's mask
    noise: Float[Array, "batch time mels"] | None = None  # uniform
    amount: Float[Array, " batch"] | None = None  # of the noise
    shift: Int[Array, " batch"] | None = None  # frames to roll

    @classmethod
    def draw(cls, key: jax.Array, recipe: ASTRecipe, shape: tuple[int, int, int]) -> Augmentation:
        """What the recipe asks for, for features of that shape."""
        keys = jax.random.split(key, 5)
        batch, time, mels = shape
        spans = (
            draw_spans(keys[0], batch, mels, recipe.frequency_mask),
            draw_spans(keys[1], batch, time, recipe.time_mask),
        )
        if not recipe.noise:
            return cls(*spans)
        noise, amount = jax.random.uniform(keys[2], shape), jax.random.uniform(keys[3], (batch,))
        return cls(*spans, noise, amount, jax.random.randint(keys[4], (batch,), -10, 10))

    def apply(
        self, features: Float[Array, "batch time mels"], fill: float | Float[Array, ""] = 0.0
    ) -> Float[Array, "batch time mels"]:
        """SpecAugment, then noise and roll, on normalised features; `fill` is `processor.padding`."""
        features = spec_augment(features, self.frequencies, self.times, fill)
        if self.noise is None or self.amount is None or self.shift is None:
            return features
        return noise_and_roll(features, self.noise, self.amount, self.shift)
