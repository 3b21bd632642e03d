r"""# fairseq S2T: Fast Speech-to-Text Modeling with fairseq

Changhan Wang, Yun Tang, Xutai Ma, Anne Wu, Sravya Popuri, Dmytro Okhonko, Juan Pino, 2020, arXiv 2010.05171.

One plain Transformer for recognition and for translation of speech. Two strided convolutions with gates make a frame of
40 ms out of four of 10 ms; from there on it is a text translator whose source happens to be sound. What makes it strong
is training: an encoder that learnt to recognise before it learns to translate, SpecAugment, smoothed labels, an average
of the last checkpoints; and one model for many target languages, told which by the first token.

    waveform ── log-mel 80, each band to mean 0 and variance 1 over the utterance ──> (T, 80)
      ── 2 × [Conv k5 s2, GLU] ──> (T/4, d) ── · √d + sinusoids ── N × [self-attention, MLP] ── LN ──> memory
    </s> <lang> y_1 y_2 … ── embedding · √d + sinusoids ── M × [causal self-attention, attention to memory, MLP]
      ── LN ── tied embedding ──> logits ── beam search ──> pieces of words

| paper | here |
| --- | --- |
| §2, log-mel features; CMVN by utterance or by corpus | `processors.speech_to_text`, `audio.features.kaldi_fbank` |
| §2 and §3.1, SpecAugment: LB, LD; SM, SS (arXiv 1904.08779, Table 1) | `SpecAugmentPolicy`, `spec_augment` |
| not in the paper; in the released code: convolutional subsampling (arXiv 1911.08460) | `Conv1dSubsampler` |
| §2, Transformer (arXiv 1706.03762), LayerNorm first | `Speech2TextEncoder`, `Speech2TextDecoder` |
| §2, the encoder's blocks | `Speech2TextEncoderLayer` |
| §2, the model with its head or without | `Speech2TextModel`, `Speech2TextForConditionalGeneration` |
| Table 3, sizes S, M, L | `Speech2TextConfig.small()`, `.medium()`, `.large()` |
| not in the paper; in the released recipes: label-smoothed cross-entropy | `label_smoothed_cross_entropy` |
| §3.1, encoder pre-trained on recognition | `with_encoder_of` |
| §3.1, average of the last ten checkpoints | `average` |
| §3.3.1, multilingual translation | `forced_bos_token_id` of `generate`, `ignore_prefix_size` |
| §2, simultaneous translation: wait-k (arXiv 1810.08398) | `wait_k_mask`, `simultaneous`, `average_lagging` |

What differs from `transformers`: a position is right also where padding is not token 1; convolutions can be told where
the padding begins (`batch_invariant=True`), so that an item of a padded batch gives what it gives alone, where the
original's biases leak into its last frames; labels can be smoothed; a text that is cut short ends all the same, and the
features of digital silence are finite, both as in fairseq.

Checkpoints: `facebook/s2t-{small,medium,large}-librispeech-asr`, `facebook/s2t-medium-mustc-multilingual-st`,
`facebook/s2t-small-mustc-en-{de,es,fr,it,nl,pt,ro,ru}-st`, `facebook/s2t-small-covost2-{ca,de,es,fr}-en-st` and
`-en-{ca,de,et,fa}-st`, and fairseq's own `.pt` files of the architecture `s2t_transformer`.

    import audiozoo
    model = audiozoo.load("facebook/s2t-medium-mustc-multilingual-st")
    processor = audiozoo.load_processor("facebook/s2t-medium-mustc-multilingual-st")
    inputs = processor(waveform, sampling_rate=16_000)
    tokens = model.generate(**inputs, forced_bos_token_id=processor.tokenizer.lang_code_to_id["de"])
    text = processor.batch_decode(tokens, skip_special_tokens=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.decoding import GenerateOutput, GenerationConfig
from audiozoo.decoding.generate import Streamer
from audiozoo.errors import UsageError
from audiozoo.layers import (
    Conv1d,
    Dropout,
    Embed,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    activation,
    check_frames,
    check_ids,
    fairseq_sinusoids,
    layer_drop,
)
from audiozoo.layers.losses import IGNORED_LABEL, cross_entropy, shift_tokens_right
from audiozoo.layers.stacking import unseen
from audiozoo.models.mbart import (
    MBartCache,
    MBartConfig,
    MBartDecoder,
    MBartDecoderLayer,
    continue_text,
)
from audiozoo.outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput


@dataclass(frozen=True)
class Speech2TextConfig:
    """Sizes of one checkpoint (Table 3); by default those of S."""

    vocab_size: int = 10_000  # pieces of words
    input_feat_per_channel: int = 80  # mel bands
    input_channels: int = 1  # stacks of them
    num_conv_layers: int = 2  # strided convolutions
    conv_kernel_sizes: tuple[int, ...] = (5, 5)  # their taps
    conv_channels: int = 1024  # channels between them, before the gate
    d_model: int = 256  # width
    encoder_layers: int = 12  # blocks
    encoder_attention_heads: int = 4  # heads
    encoder_ffn_dim: int = 2048  # width inside the MLP
    decoder_layers: int = 6  # blocks
    decoder_attention_heads: int = 4  # heads
    decoder_ffn_dim: int = 2048  # width inside the MLP
    activation_function: str = "relu"  # of the MLPs
    dropout: float = 0.1  # after embedding, attention and MLP
    attention_dropout: float = 0.0  # on attention weights
    activation_dropout: float = 0.0  # inside the MLPs
    encoder_layerdrop: float = 0.0  # chance that training skips a block
    decoder_layerdrop: float = 0.0  # the same, in the decoder
    init_std: float = 0.02  # standard deviation that embeddings start from
    scale_embedding: bool = True  # multiply embeddings and subsampled frames by √d_model
    tie_word_embeddings: bool = True  # logits by the embedding itself
    max_source_positions: int = 6000  # frames in training, kept for export; positions go on beyond
    max_target_positions: int = 1024  # tokens in training; positions go on beyond
    pad_token_id: int = 1  # padding
    bos_token_id: int = 0  # of no use, kept for export
    eos_token_id: int = 2  # ends a text
    decoder_start_token_id: int = 2  # what the decoder reads first

    def __post_init__(self) -> None:
        if len(self.conv_kernel_sizes) != self.num_conv_layers:
            raise UsageError(
                f"{self.num_conv_layers} convolutions need as many sizes of kernels, not {self.conv_kernel_sizes}."
            )

    @property
    def decoder(self) -> MBartConfig:
        """The decoder's sizes; its blocks are those of mBART's decoder, as both follow fairseq."""
        return MBartConfig(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_target_positions,
            d_model=self.d_model,
            decoder_layers=self.decoder_layers,
            decoder_attention_heads=self.decoder_attention_heads,
            decoder_ffn_dim=self.decoder_ffn_dim,
            activation_function=self.activation_function,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            decoder_layerdrop=self.decoder_layerdrop,
            init_std=self.init_std,
            scale_embedding=self.scale_embedding,
            tie_word_embeddings=self.tie_word_embeddings,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
        )

    @classmethod
    def _size(cls, width: int, heads: int, inner: int, dropout: float) -> Speech2TextConfig:
        return cls(
            d_model=width,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=inner,
            decoder_ffn_dim=inner,
            dropout=dropout,
        )

    @classmethod
    def small(cls) -> Speech2TextConfig:
        """Table 3, S (`s2t_transformer_s`): 29.5 M parameters, the embedding once; the table has 31."""
        return cls._size(256, 4, 2048, 0.1)

    @classmethod
    def medium(cls) -> Speech2TextConfig:
        """Table 3, M (`s2t_transformer_m`): 71.2 M parameters; the table has 72."""
        return cls._size(512, 8, 2048, 0.15)

    @classmethod
    def large(cls) -> Speech2TextConfig:
        """Table 3, L (`s2t_transformer_l`): 267.8 M parameters; the table has 263."""
        return cls._size(1024, 16, 4096, 0.2)


@dataclass(frozen=True)
class Speech2TextGenerationConfig:
    """§3.1: how the released checkpoints search, by a beam of five."""

    num_beams: int = 5  # beams
    max_length: int | None = 200  # tokens of a text, the first included
    early_stopping: bool = True  # end when as many hypotheses as beams have
    forced_bos_token_id: int | None = None  # the first token after the start: a language
    options: tuple[tuple[str, Any], ...] = ()  # the rest of the search, as for `transformers.GenerationConfig`


# --- §2 and §3.1, SpecAugment -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpecAugmentPolicy:
    """§3.1: SpecAugment's numbers (arXiv 1904.08779, Table 1), without time warping unless `time_warp` is set."""

    freq_masks: int  # m_F, bands of masked frequencies
    freq_width: int  # F, each is narrower than this
    time_masks: int  # m_T, stretches of masked frames
    time_width: int  # T, each is shorter than this
    time_ratio: float  # p, and than this part of the utterance
    time_warp: int = 0  # W, frames that a point may be moved; 80 for LB and LD, 40 for SM and SS in SpecAugment's paper

    @classmethod
    def lb(cls) -> SpecAugmentPolicy:
        """LibriSpeech basic."""
        return cls(1, 27, 1, 100, 1.0)

    @classmethod
    def ld(cls) -> SpecAugmentPolicy:
        """LibriSpeech double."""
        return cls(2, 27, 2, 100, 1.0)

    @classmethod
    def sm(cls) -> SpecAugmentPolicy:
        """Switchboard mild."""
        return cls(2, 15, 2, 70, 0.2)

    @classmethod
    def ss(cls) -> SpecAugmentPolicy:
        """Switchboard strong."""
        return cls(2, 27, 2, 70, 0.2)


def spec_augment(
    features: Float[Array, "batch frames mels"],
    policy: SpecAugmentPolicy,
    key: jax.Array,
    attention_mask: Int[Array, "batch frames"] | None = None,
) -> Float[Array, "batch frames mels"]:
    r"""SpecAugment (arXiv 1904.08779, §2): masked bands and stretches become the utterance's mean.

    A width $f \sim U\{0, F-1\}$ and a first band $f_0 \sim U\{0, \nu - f - 1\}$ a mask; in time the same, with widths
    below $\min(T, p\,\tau)$. With time warping, a point $w_0 \sim U\{W, \tau - W - 1\}$ of the utterance is moved by
    $w \sim U\{1 - W, W - 1\}$ frames, and what lies on either side is stretched or pressed linearly.

    Args:
        features: log-mel frames, normalised.
        policy: how much.
        key: randomness; every item draws for itself.
        attention_mask: 1 for frames of the utterance, 0 for padding behind it, which stays as it is.
    """
    batch, frames, bands = features.shape
    lengths = jnp.full((batch,), frames) if attention_mask is None else jnp.sum(attention_mask, axis=1)

    def below(key: jax.Array, limit: Int[Array, ""]) -> Int[Array, ""]:
        """Uniform on 0 … limit - 1; 0 where there is nothing to choose from."""
        return jnp.minimum((jax.random.uniform(key) * limit).astype(jnp.int32), jnp.maximum(limit - 1, 0))

    def span(key: jax.Array, widths: Int[Array, ""], size: Int[Array, ""], positions: int) -> Bool[Array, " positions"]:
        of_width, of_start = jax.random.split(key)
        width = below(of_width, widths)
        start = below(of_start, size - width)
        index = jnp.arange(positions)
        return (index >= start) & (index < start + width)

    def one(x: jax.Array, length: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 1 + policy.freq_masks + policy.time_masks)
        real = (jnp.arange(frames) < length)[:, None]
        mean = jnp.sum(jnp.where(real, x, 0)) / (jnp.maximum(length, 1) * bands).astype(x.dtype)
        y = x
        if policy.time_warp:
            point, shift = jax.random.split(keys[0])
            width = policy.time_warp
            w0 = width + below(point, length - 2 * width)
            moved = w0 + 1 - width + below(shift, jnp.asarray(2 * width - 1))
            y = jnp.where(2 * width < length, warp_time(x, length, w0, moved), x)
        chosen = jnp.zeros((frames, bands), bool)
        for i in range(policy.freq_masks):
            of_mask = span(keys[1 + i], jnp.asarray(policy.freq_width), jnp.asarray(bands), bands)
            chosen |= of_mask[None, :]
        longest = jnp.minimum(policy.time_width, jnp.floor(length * policy.time_ratio).astype(jnp.int32))
        for i in range(policy.time_masks):
            of_mask = span(keys[1 + policy.freq_masks + i], longest, length, frames)
            chosen |= of_mask[:, None]
        chosen &= bands >= policy.freq_width  # fewer bands than a mask may be wide: nothing is masked
        return jnp.where(real & chosen, mean, jnp.where(real, y, x))

    return jax.vmap(one)(features, lengths, jax.random.split(key, batch))


def warp_time(
    x: Float[Array, "frames mels"], length: Int[Array, ""], point: Int[Array, ""], moved: Int[Array, ""]
) -> Float[Array, "frames mels"]:
    """SpecAugment (arXiv 1904.08779, §2): frames before `point` fill those before `moved`, the others the rest."""
    index = jnp.arange(len(x))
    before = index < moved
    # Linear interpolation with samples at the middle of frames, on each side by itself.
    size = jnp.where(before, point, length - point)
    place = jnp.where(before, index + 0.5, index - moved + 0.5) * size
    place = place / jnp.maximum(jnp.where(before, moved, length - moved), 1) - 0.5
    first = jnp.where(before, 0, point)
    place = jnp.clip(place, 0, size - 1)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    part = (place - low).astype(x.dtype)[:, None]
    return x[first + low] * (1 - part) + x[first + high] * part


# --- §2, the model ----------------------------------------------------------------------------------------------------


class Conv1dSubsampler(nnx.Module):
    """Not in the paper; in the released code (arXiv 1911.08460): convolutions of stride two with gated linear units."""

    def __init__(self, config: Speech2TextConfig, **kwargs: Any):
        widths = [config.conv_channels] * (config.num_conv_layers - 1) + [2 * config.d_model]
        inputs = [config.input_feat_per_channel * config.input_channels, *(width // 2 for width in widths)]
        self.conv_layers = nnx.List(
            [
                Conv1d(inputs[i], width, taps, stride=2, padding=taps // 2, **kwargs)
                for i, (width, taps) in enumerate(zip(widths, config.conv_kernel_sizes, strict=True))
            ]
        )

    def frame_lengths(self, lengths: Any) -> Any:
        """Frames out of that many: every second one, the first included, a layer."""
        for _ in self.conv_layers:
            lengths = (lengths - 1) // 2 + 1
        return lengths

    def __call__(
        self, x: Float[Array, "batch time mels"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch frames d_model"]:
        """A quarter of the frames; with `lengths`, what lies behind each item's end is zero at every layer."""
        for conv in self.conv_layers:
            if lengths is not None:
                x = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0)
                lengths = (lengths - 1) // 2 + 1
            x = jax.nn.glu(conv(x), axis=-1)  # GLU([a, b]) = a ⊙ σ(b); (batch, time / 2, width / 2)
        return x


class Speech2TextEncoderLayer(nnx.Module):
    """§2 (arXiv 1706.03762, §3.1): self-attention and MLP, each after a LayerNorm, each residual."""

    def __init__(self, config: Speech2TextConfig, **kwargs: Any):
        width = config.d_model
        self.self_attn = MultiHeadAttention(
            width, config.encoder_attention_heads, dropout=config.attention_dropout, **kwargs
        )
        self.self_attn_layer_norm = LayerNorm(width, **kwargs)
        self.fc1 = Linear(width, config.encoder_ffn_dim, **kwargs)
        self.fc2 = Linear(config.encoder_ffn_dim, width, **kwargs)
        self.final_layer_norm = LayerNorm(width, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch frames d_model"],
        dropout: Dropout,
        mask: Bool[Array, "batch 1 1 frames"] | None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames d_model"], jax.Array | None]:
        """One block, and its attention weights if needed."""
        config = self.config
        y = self.self_attn_layer_norm(x)
        attention, weights = self.self_attn(y, mask=mask, dropout=dropout, need_weights=need_weights)
        x = x + dropout(attention, config.dropout)
        hidden = activation(config.activation_function)(self.fc1(self.final_layer_norm(x)))
        hidden = self.fc2(dropout(hidden, config.activation_dropout))
        x = x + dropout(hidden, config.dropout)
        if x.dtype == jnp.float16:  # as the original: what overflows would be infinite
            limit = float(jnp.finfo(jnp.float16).max) - 1000
            x = jnp.clip(x, -limit, limit)
        return x, weights


class Speech2TextEncoder(nnx.Module):
    """§2: subsampled frames with positions, blocks and a last LayerNorm."""

    def __init__(self, config: Speech2TextConfig, **kwargs: Any):
        self.conv = Conv1dSubsampler(config, **kwargs)
        self.layers = nnx.List([Speech2TextEncoderLayer(config, **kwargs) for _ in range(config.encoder_layers)])
        self.layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def frame_mask(self, attention_mask: Int[Array, "batch time"], frames: int) -> Bool[Array, "batch frames"]:
        """Which subsampled frames are speech."""
        lengths = self.conv.frame_lengths(jnp.sum(attention_mask.astype(jnp.int32), axis=1))
        return jnp.arange(frames) < lengths[:, None]

    def __call__(
        self,
        input_features: Float[Array, "batch time mels"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        batch_invariant: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutput:
        """Encode; see `Speech2TextModel`."""
        config, dropout = self.config, Dropout(key)
        check_frames(input_features, config.input_feat_per_channel * config.input_channels)
        lengths = None
        if batch_invariant and attention_mask is not None:
            lengths = jnp.sum(attention_mask.astype(jnp.int32), axis=1)
        x = self.conv(input_features, lengths)
        if config.scale_embedding:
            x = x * jnp.asarray(config.d_model**0.5, x.dtype)
        frames = x.shape[1]
        positions = jnp.asarray(fairseq_sinusoids(frames + 2, config.d_model)[2:], x.dtype)[None]
        mask = None
        if attention_mask is not None:
            real = self.frame_mask(attention_mask, frames)
            positions = jnp.where(real[..., None], positions, 0)
            mask = real[:, None, None, :]
        x = dropout(x + positions, config.dropout)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states += [x, *unseen(layer)]
            x, weights = layer_drop(layer, x, config.encoder_layerdrop, dropout, mask, output_attentions)
            attentions.append(weights)
        x = self.layer_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class Speech2TextDecoder(MBartDecoder):
    """§2 (arXiv 1706.03762, §3.1): scaled token embeddings with positions, pre-norm blocks and a last LayerNorm.

    It is called as `MBartDecoder` is; with `wait_k_mask` for `encoder_attention_mask` each token sees its own frames.
    """

    layer_class: ClassVar[Any] = MBartDecoderLayer
    last_norm: ClassVar[bool] = True

    def __init__(self, config: MBartConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.init_std)
        self.embed_tokens = Embed(config.vocab_size, config.d_model, embedding_init=init, **kwargs)
        self.layers = nnx.List([self.layer_class(config, **kwargs) for _ in range(config.decoder_layers)])
        self.layer_norm = LayerNorm(config.d_model, **kwargs) if self.last_norm else None
        self.config = config

    def embed(
        self, input_ids: Int[Array, "batch time"], position: int | Int[Array, ""], limit: int, dropout: Dropout
    ) -> Float[Array, "batch time d_model"]:
        """Tokens with their positions; padding has none, and does not count."""
        x, config = self.embed_tokens(input_ids), self.config
        if config.scale_embedding:
            x = x * jnp.asarray(config.d_model**0.5, x.dtype)
        padding = config.pad_token_id
        table = jnp.asarray(fairseq_sinusoids(limit + padding + 1, config.d_model, padding=padding), x.dtype)
        real = input_ids != padding
        rows = jnp.where(real, padding + position + jnp.cumsum(real, axis=1), padding)
        return dropout(x + table[rows], config.dropout)


class Speech2TextModel(nnx.Module):
    """§2: encoder and decoder, without a head."""

    static_arguments = ("wait_k", "pre_decision_ratio")

    def __init__(self, config: Speech2TextConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = Speech2TextEncoder(config, **kwargs)
        self.decoder = Speech2TextDecoder(config.decoder, **kwargs)
        self.config = config

    def __call__(
        self,
        input_features: Float[Array, "batch time mels"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        *,
        batch_invariant: bool = False,
        wait_k: int | None = None,
        pre_decision_ratio: int = 7,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqModelOutput:
        """The decoder's states for every token.

        Args:
            input_features: log-mel frames as the processor gives them.
            attention_mask: 1 for a frame of the recording, 0 for padding behind it.
            decoder_input_ids: tokens.
            decoder_attention_mask: 1 where a token is real.
            encoder_outputs: an earlier encoding, instead of `input_features`.
            batch_invariant: keep the padding out of the convolutions too, so that an item of a padded batch gives
                what it gives alone.
            wait_k: let token t see only the first (t + k) · `pre_decision_ratio` frames of the encoder (see
                `wait_k_mask`).
            pre_decision_ratio: encoder frames between two decisions to read or to write.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout and layer drop on.

        Raises:
            UsageError: without features or tokens, and for features of another width.
        """
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        keys: Any = (None, None) if key is None else jax.random.split(key)
        if encoder_outputs is None:
            if input_features is None:
                raise UsageError("Give the model input_features, or encoder_outputs of an earlier call.")
            encoder_outputs = self.encoder(
                input_features, attention_mask, batch_invariant=batch_invariant, key=keys[0], **asked
            )
        if decoder_input_ids is None:
            raise UsageError("Give the model decoder_input_ids; generate makes text without them.")
        memory = encoder_outputs.last_hidden_state
        mask = None if attention_mask is None else self.encoder.frame_mask(attention_mask, memory.shape[1])
        if wait_k is not None:
            seen = wait_k_mask(decoder_input_ids.shape[1], memory.shape[1], wait_k, pre_decision_ratio)
            mask = jnp.broadcast_to(seen if mask is None else seen & mask[:, None], (len(memory), *seen.shape[1:]))
        decoded = self.decoder(decoder_input_ids, decoder_attention_mask, memory, mask, key=keys[1], **asked)
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def label_smoothed_cross_entropy(
    logits: Float[Array, "batch time vocabulary"], labels: Int[Array, "batch time"], label_smoothing: float = 0.1
) -> Float[Array, ""]:
    r"""The mean of $-\sum_v q_v \log p_v$ with $q = 1 - \epsilon$ on the label and $\epsilon / (V - 1)$ elsewhere.

    fairseq spreads $\epsilon$ over the other classes, PyTorch over all: its $\epsilon V / (V - 1)$ is $\epsilon$ here.
    """
    vocabulary = logits.shape[-1]
    return cross_entropy(logits, labels, label_smoothing=label_smoothing * vocabulary / (vocabulary - 1))


class Speech2TextForConditionalGeneration(nnx.Module):
    """§2: the model with its head, tied to the token embedding; recognition or translation, as it was trained."""

    static_arguments = ("wait_k", "pre_decision_ratio", "label_smoothing", "ignore_prefix_size")

    def __init__(self, config: Speech2TextConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.model = Speech2TextModel(config, **kwargs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, use_bias=False, **kwargs)
        self.config = config
        self.generation_config = Speech2TextGenerationConfig()

    def head(self, x: Float[Array, "batch time d_model"]) -> Float[Array, "batch time vocabulary"]:
        """Logits; tied to the token embedding or not."""
        return self.model.decoder.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def __call__(
        self,
        input_features: Float[Array, "batch time mels"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        *,
        labels: Int[Array, "batch tokens"] | None = None,
        label_smoothing: float = 0.0,
        ignore_prefix_size: int = 0,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """Logits for every token and, with `labels`, their mean cross-entropy.

        Args:
            input_features: log-mel frames as the processor gives them.
            attention_mask: 1 for a frame of the recording, 0 for padding behind it.
            decoder_input_ids: tokens; by default `labels` shifted right.
            decoder_attention_mask: 1 where a token is real.
            encoder_outputs: an earlier encoding, instead of `input_features`.
            labels: targets, -100 where there is none; for many languages each begins with its language's token.
            label_smoothing: ε; 0.1 in the released recipes, 0 in `transformers`.
            ignore_prefix_size: so many first labels are read but not learnt: 1 for the language's token.
            options: of `Speech2TextModel`.

        Raises:
            UsageError: without features, or without tokens and labels.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise UsageError("Give decoder_input_ids or labels; generate makes text without them.")
            ids = self.config
            decoder_input_ids = shift_tokens_right(jnp.asarray(labels), ids.pad_token_id, ids.decoder_start_token_id)
        output = self.model(
            input_features, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, **options
        )
        logits, loss = self.head(output.last_hidden_state), None
        if labels is not None:
            learnt = jnp.where(jnp.arange(labels.shape[1]) < ignore_prefix_size, IGNORED_LABEL, jnp.asarray(labels))
            loss = label_smoothed_cross_entropy(logits, learnt, label_smoothing)
        rest = {name: output[name] for name in output.keys() if name != "last_hidden_state"}  # noqa: SIM118
        return Seq2SeqLMOutput(loss=loss, logits=logits, **rest)

    def generate(
        self,
        input_features: Float[Array, "batch time mels"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        decoder_input_ids: Any = None,
        batch_invariant: bool = False,
        key: jax.Array | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """Recognise or translate, by one compiled loop; with a beam of five unless the checkpoint or you say otherwise.

        Args:
            input_features: log-mel frames as the processor gives them.
            attention_mask: 1 for a frame of the recording, 0 for padding behind it.
            decoder_input_ids: the text's beginning; by default `decoder_start_token_id`.
            batch_invariant: keep the padding out of the convolutions too.
            key: randomness for `do_sample=True`.
            streamer: called on the host with every token.
            options: as for `transformers.generate`; `forced_bos_token_id` is the language to translate into.

        Returns:
            Tokens, the beginning included, padded to the longest; with `return_dict_in_generate=True` a
            `GenerateOutput`.
        """
        ids, search = self.config, self.generation_config
        defaults: dict[str, Any] = {
            "eos_token_id": ids.eos_token_id,
            "pad_token_id": ids.pad_token_id,
            "forced_eos_token_id": ids.eos_token_id,
            "num_beams": search.num_beams,
            "early_stopping": search.early_stopping,
            "forced_bos_token_id": search.forced_bos_token_id,
            "max_length": search.max_length,
            **dict(search.options),
        }
        if options.get("do_sample") and "num_beams" not in options:
            defaults["num_beams"] = 1
        chosen = GenerationConfig.over(defaults, options)
        if decoder_input_ids is None:
            decoder_input_ids = np.full((len(input_features), 1), ids.decoder_start_token_id)
        check_ids(decoder_input_ids, self.config.vocab_size)
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        output = _generate(
            *nnx.split(self),
            jnp.asarray(input_features),
            mask,
            jnp.asarray(decoder_input_ids, jnp.int32),
            key,
            config=chosen,
            batch_invariant=batch_invariant,
            streamer=streamer,
        ).trim()
        return output if chosen.return_dict_in_generate else np.asarray(output.sequences)


@partial(jax.jit, static_argnames=("graphdef", "config", "batch_invariant", "streamer"))
def _generate(
    graphdef: Any,
    state: Any,
    input_features: jax.Array,
    attention_mask: jax.Array | None,
    prompt: jax.Array,
    key: jax.Array | None,
    *,
    config: GenerationConfig,
    batch_invariant: bool,
    streamer: Streamer | None,
) -> GenerateOutput:
    model = nnx.merge(graphdef, state)
    encoder, decoder = model.model.encoder, model.model.decoder
    memory = encoder(input_features, attention_mask, batch_invariant=batch_invariant).last_hidden_state
    mask = None if attention_mask is None else encoder.frame_mask(attention_mask, memory.shape[1])
    cache = decoder.start(memory, prompt.shape[1] + config.new_tokens(prompt.shape[1]))

    def decode(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        out = decoder(tokens, encoder_attention_mask=rows, past_key_values=past, cache_position=position)
        return model.head(out.last_hidden_state), out.past_key_values

    return continue_text(decode, cache, mask, prompt, config, key=key, streamer=streamer)


# --- §2, simultaneous translation -------------------------------------------------------------------------------------


def wait_k_mask(tokens: int, frames: int, k: int, pre_decision_ratio: int = 7) -> Bool[Array, "1 tokens frames"]:
    r"""arXiv 1810.08398, Eq. 6, on speech (§2): which frames each token may see, $\tau \le g(t)$.

    $g(t) = (k + t - 1) \cdot r$: first $k$ pieces of $r$ encoder frames are read, then one more for every token
    written. Teacher forcing with it trains a translator that does not wait for the end.

    Args:
        tokens: how many are written.
        frames: of the encoder.
        k: pieces read before the first token.
        pre_decision_ratio: $r$; 7 frames are 280 ms.

    Raises:
        UsageError: for a k or a ratio below 1.
    """
    if k < 1 or pre_decision_ratio < 1:
        raise UsageError(f"wait-{k} with pieces of {pre_decision_ratio} frames: both are at least 1.")
    seen = (k + jnp.arange(tokens)) * pre_decision_ratio
    return (jnp.arange(frames)[None, :] < seen[:, None])[None]


@dataclass(frozen=True)
class Written:
    """§2, simultaneous translation: one token, and how much of the recording had been read when it was written."""

    token: int
    frames: int  # input frames of 10 ms
    finished: bool  # whether the recording had ended by then


def simultaneous(
    model: Speech2TextForConditionalGeneration,
    pieces: Any,
    k: int,
    *,
    pre_decision_ratio: int = 7,
    max_new_tokens: int = 200,
    forced_bos_token_id: int | None = None,
    bucket: int = 512,
) -> Iterator[Written]:
    """arXiv 1810.08398, §3.1, on speech: translate while the speaker speaks, k pieces behind.

    Every piece read is encoded with all before it, as the released agent does; every token is the likeliest given what
    has been read. An end of the text before the end of the recording is not written: another piece is read instead.
    What follows does not wait for it, by Eq. 6; the agent (`force_finish`) counts such an end as a token, and is a
    piece later from there on.

    Args:
        model: the translator.
        pieces: log-mel frames `(time, mels)` in the order in which they come, of any lengths; normalised as in
            training, by statistics that do not need the end (global CMVN): see
            `audiozoo.processors.speech_to_text.stream_filterbanks`.
        k: pieces of `pre_decision_ratio` encoder frames to be ahead by.
        pre_decision_ratio: encoder frames of a piece; of 40 ms each.
        max_new_tokens: write at most that many.
        forced_bos_token_id: the language to translate into, by default the checkpoint's; it is not waited for.
        bucket: input frames that shapes are rounded up to, so that few programs are compiled.

    Yields:
        What is written, when it is written.
    """
    wait_k_mask(1, 1, k, pre_decision_ratio)
    ids, source = model.config, iter(pieces)
    if forced_bos_token_id is None:
        forced_bos_token_id = model.generation_config.forced_bos_token_id
    graphdef, state = nnx.split(model)
    heard = np.zeros((0, ids.input_feat_per_channel * ids.input_channels), np.float32)
    ended = False
    text = [ids.decoder_start_token_id] + ([] if forced_bos_token_id is None else [forced_bos_token_id])
    first, step = len(text), pre_decision_ratio * 2**ids.num_conv_layers
    room, read = first + max_new_tokens, 0

    def listen(frames: int) -> int:
        """Hear pieces until there are so many frames, or no more come; how many of those wanted there are."""
        nonlocal heard, ended
        while len(heard) < frames and not ended:
            piece = next(source, None)
            ended = piece is None
            heard = heard if piece is None else np.concatenate([heard, np.asarray(piece, heard.dtype)])
        return min(frames, len(heard))

    while len(text) < room:
        read = max(read, listen((k + len(text) - first) * step))
        if read == 0:
            return
        while True:
            size = -(-read // bucket) * bucket
            features = np.zeros((1, size, heard.shape[1]), heard.dtype)
            features[0, :read] = heard[:read]
            tokens = np.full((1, -(-room // 64) * 64), ids.pad_token_id, np.int32)
            tokens[0, : len(text)] = text
            token = int(_next_token(graphdef, state, features, jnp.int32(read), tokens, jnp.int32(len(text))))
            if token != ids.eos_token_id or ended:
                break
            read = listen(read + step)
        text.append(token)
        yield Written(token, read, ended)
        if token == ids.eos_token_id:
            return


@partial(jax.jit, static_argnames="graphdef")
def _next_token(
    graphdef: Any, state: Any, features: jax.Array, read: jax.Array, tokens: jax.Array, count: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    mask = (jnp.arange(features.shape[1]) < read).astype(jnp.int32)[None]
    logits = model(features, mask, tokens, batch_invariant=True).logits
    return jnp.argmax(jax.lax.dynamic_index_in_dim(logits[0], count - 1, keepdims=False))


def average_lagging(read: Sequence[float], source: float, target: int | None = None) -> float:
    r"""arXiv 1810.08398, Eq. 8 and 9: how far the writer is behind an ideal one, in the units of the source.

    $$ AL = \frac1{\tau} \sum_{t=1}^{\tau} g(t) - \frac{t - 1}{\gamma}, \qquad
       \gamma = \frac{|y|}{|x|}, \quad \tau = \min\{t : g(t) = |x|\} $$

    Args:
        read: $g(t)$, what had been read when token $t$ was written.
        source: $|x|$.
        target: $|y|$, the length of the reference; by default that of what was written.

    Raises:
        UsageError: if nothing was written.
    """
    if not read:
        raise UsageError("Nothing was written, so nothing lags.")
    gamma = (target or len(read)) / source
    last = next((t for t, g in enumerate(read, 1) if g >= source), len(read))
    return sum(g - t / gamma for t, g in enumerate(read[:last])) / last


# --- §3, training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speech2TextRecipe:
    """§3.1, and for what it leaves open the released recipe of LibriSpeech."""

    learning_rate: float = 2e-3  # the highest; S, and 1e-3 for M, 5e-4 for L
    warmup_updates: int = 10_000  # until it is reached
    clip_norm: float = 10.0  # largest norm of the gradient
    label_smoothing: float = 0.1  # ε
    averaged_checkpoints: int = 10  # the last so many

    def schedule(self) -> optax.Schedule:
        r"""Linear up to the highest rate, then $\propto 1/\sqrt{\text{update}}$ (arXiv 1706.03762, Eq. 3)."""
        warmup = max(self.warmup_updates, 1)

        def rate(update: Any) -> Any:
            update = jnp.asarray(update, jnp.float32) + 1
            return self.learning_rate * jnp.minimum(update / warmup, jnp.sqrt(warmup / update))

        return rate

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with clipped gradients."""
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.adam(self.schedule()))


def average(models: Sequence[Any]) -> Any:
    """§3.1: one model whose every parameter is the mean of the models'.

    Raises:
        UsageError: if there is none.
    """
    if not models:
        raise UsageError("There is no checkpoint to average.")
    return jax.tree.map(lambda *values: sum(values[1:], values[0]) / len(values), *models)


def with_encoder_of(
    model: Speech2TextForConditionalGeneration, recogniser: Speech2TextForConditionalGeneration
) -> Speech2TextForConditionalGeneration:
    """§3.1: a translator to be trained, whose encoder begins as that of a recogniser.

    Raises:
        UsageError: if the two encoders differ in size.
    """
    ours, theirs = nnx.state(model.model.encoder), nnx.state(recogniser.model.encoder)
    if jax.tree.map(jnp.shape, ours) != jax.tree.map(jnp.shape, theirs):
        raise UsageError("The encoders differ in size; train a recogniser of the translator's size first.")
    graphdef, state = nnx.split(model)
    state["model"]["encoder"] = theirs
    return nnx.merge(graphdef, state)
