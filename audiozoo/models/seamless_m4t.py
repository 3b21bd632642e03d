r"""# SeamlessM4T: Massively Multilingual & Multimodal Machine Translation

Seamless Communication: Loïc Barrault, Yu-An Chung, Mariano Coria Meglioli, David Dale, Ning Dong, Paul-Ambroise
Duquenne and 62 others, 2023, arXiv 2308.11596.

One model, five tasks: speech or text in, text or speech out, in a hundred languages. Whatever comes in is encoded into
states of one kind; one decoder writes the translation from them; a second, small translator reads the first one's
states and writes units, a phonetic alphabet learnt from speech; a vocoder speaks those.

    speech ── log-mel 80, 10 ms, two and two ──> (T, 160) ── w2v-BERT 2.0 ── length adaptor ──> 160 ms a state ┐
    text ── <source language> pieces </s> ── NLLB encoder ─────────────────────────────────────> states ───────┤
      ┌────────────────────────────────────────────────────────────────────────────────────────────────────────┘
      └─ </s> <target language> … ── NLLB decoder ──> translated text, and its last states
           └─ T2U encoder ── </s> <target language> … ── T2U decoder ──> units ── vocoder ──> translated speech

| paper | here |
| --- | --- |
| §4.1, w2v-BERT 2.0: a Conformer | `audiozoo.models.conformer`, `SeamlessM4TSpeechEncoder` |
| §4.1, length adaptor | `SeamlessM4TAdapterLayer` |
| §4.2, text encoder and decoder: NLLB | `audiozoo.models.nllb` |

Checkpoints: `facebook/hf-seamless-m4t-medium`, `facebook/hf-seamless-m4t-large`.

    import audiozoo
    model = audiozoo.load("facebook/hf-seamless-m4t-medium")
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.layers import Conv1d, Dropout, LayerNorm, Linear
from audiozoo.models.conformer import ConformerConfig, ConformerEncoder, ConformerFeedForward, ConformerSelfAttention
from audiozoo.models.nllb import NllbConfig
from audiozoo.outputs import BaseModelOutput


@dataclass(frozen=True)
class SeamlessM4TConfig:
    """Sizes of one checkpoint (§4 and Table 12), under the names that `transformers` gives them."""

    hidden_size: int = 1024  # width of everything but the vocoder
    layer_norm_eps: float = 1e-5  # of the features' LayerNorm, and of the one behind the Conformer

    # --- text encoder and decoder, NLLB (§4.2)
    vocab_size: int = 256_102  # pieces of words, and languages
    encoder_layers: int = 24  # blocks of the text encoder
    encoder_ffn_dim: int = 8192  # width inside its MLP
    encoder_attention_heads: int = 16  # its heads
    encoder_layerdrop: float = 0.05  # chance that training skips one of its blocks
    decoder_layers: int = 24  # blocks of the text decoder
    decoder_ffn_dim: int = 8192  # width inside its MLP
    decoder_attention_heads: int = 16  # its heads
    decoder_layerdrop: float = 0.05  # chance that training skips one of its blocks
    activation_function: str = "relu"  # of the MLPs
    dropout: float = 0.1  # after embedding, attention and MLP
    attention_dropout: float = 0.1  # on attention weights
    activation_dropout: float = 0.0  # inside the MLP
    scale_embedding: bool = True  # multiply embeddings by √hidden_size
    initializer_range: float = 0.02  # standard deviation that embeddings start from
    max_position_embeddings: int = 1024  # kept for export: sinusoids have no end
    max_new_tokens: int = 256  # the longest text
    pad_token_id: int = 0  # padding
    bos_token_id: int = 2  # kept for export: no text begins with it
    eos_token_id: int = 3  # ends a text
    decoder_start_token_id: int = 3  # what the decoder reads first

    # --- speech encoder, w2v-BERT 2.0 and the length adaptor (§4.1)
    feature_projection_input_dim: int = 160  # two frames of 80 log-mel bands
    speech_encoder_layers: int = 24  # Conformer blocks
    speech_encoder_attention_heads: int = 16  # heads
    speech_encoder_intermediate_size: int = 4096  # width inside the feed-forward modules
    speech_encoder_hidden_act: str = "swish"  # of feed-forward and convolution modules
    speech_encoder_dropout: float = 0.0  # everywhere in it
    speech_encoder_layerdrop: float = 0.1  # chance that training skips a block
    conv_depthwise_kernel_size: int = 31  # frames that the convolution sees
    position_embeddings_type: str | None = "relative"  # see `ConformerConfig`
    rotary_embedding_base: int = 10_000  # see `ConformerConfig`
    add_adapter: bool = True  # is there a length adaptor
    num_adapter_layers: int = 1  # its blocks
    adaptor_kernel_size: int = 8  # frames that its convolution sees
    adaptor_stride: int = 8  # frames in for each frame out
    adaptor_dropout: float = 0.1  # in it

    # --- text-to-unit model (§4.3)
    t2u_vocab_size: int = 10_082  # 10,000 units, control symbols and languages
    t2u_encoder_layers: int = 6  # blocks
    t2u_encoder_ffn_dim: int = 8192  # width inside the encoder's MLP
    t2u_encoder_attention_heads: int = 16  # heads
    t2u_decoder_layers: int = 6  # blocks
    t2u_decoder_ffn_dim: int = 8192  # width inside the decoder's MLP
    t2u_decoder_attention_heads: int = 16  # heads
    t2u_max_position_embeddings: int = 2048  # kept for export: sinusoids have no end
    t2u_max_new_tokens: int = 1024  # kept for export: the most units
    t2u_pad_token_id: int = 1  # padding
    t2u_bos_token_id: int = 0  # kept for export: no sequence begins with it
    t2u_eos_token_id: int = 2  # ends a sequence of units
    t2u_decoder_start_token_id: int = 2  # kept for export: what its decoder reads first

    # --- vocoder (§4.4)
    sampling_rate: int = 16_000  # Hz of the speech it makes

    @property
    def text(self) -> NllbConfig:
        """Text encoder and decoder."""
        return NllbConfig(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            encoder_layers=self.encoder_layers,
            encoder_attention_heads=self.encoder_attention_heads,
            encoder_ffn_dim=self.encoder_ffn_dim,
            encoder_layerdrop=self.encoder_layerdrop,
            decoder_layers=self.decoder_layers,
            decoder_attention_heads=self.decoder_attention_heads,
            decoder_ffn_dim=self.decoder_ffn_dim,
            decoder_layerdrop=self.decoder_layerdrop,
            activation_function=self.activation_function,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            init_std=self.initializer_range,
            scale_embedding=self.scale_embedding,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
        )

    @property
    def units(self) -> NllbConfig:
        """Text-to-unit encoder and decoder."""
        return dataclasses.replace(
            self.text,
            vocab_size=self.t2u_vocab_size,
            encoder_layers=self.t2u_encoder_layers,
            encoder_attention_heads=self.t2u_encoder_attention_heads,
            encoder_ffn_dim=self.t2u_encoder_ffn_dim,
            decoder_layers=self.t2u_decoder_layers,
            decoder_attention_heads=self.t2u_decoder_attention_heads,
            decoder_ffn_dim=self.t2u_decoder_ffn_dim,
            pad_token_id=self.t2u_pad_token_id,
            eos_token_id=self.t2u_eos_token_id,
        )

    @property
    def conformer(self) -> ConformerConfig:
        """w2v-BERT 2.0's blocks."""
        return ConformerConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.speech_encoder_layers,
            num_attention_heads=self.speech_encoder_attention_heads,
            intermediate_size=self.speech_encoder_intermediate_size,
            hidden_act=self.speech_encoder_hidden_act,
            conv_depthwise_kernel_size=self.conv_depthwise_kernel_size,
            dropout=self.speech_encoder_dropout,
            layerdrop=self.speech_encoder_layerdrop,
            layer_norm_eps=self.layer_norm_eps,
            position_embeddings_type=self.position_embeddings_type,
            rotary_embedding_base=self.rotary_embedding_base,
        )

    def pooled(self, lengths: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """Frames that one block of the length adaptor makes of so many."""
        return (lengths + 2 * (self.adaptor_stride // 2) - self.adaptor_kernel_size) // self.adaptor_stride + 1

    @classmethod
    def large(cls) -> SeamlessM4TConfig:
        """Table 12, SeamlessM4T-Large: 2.3 B parameters."""
        return cls()

    @classmethod
    def medium(cls) -> SeamlessM4TConfig:
        """Table 12, SeamlessM4T-Medium: 1.2 B parameters."""
        return cls(
            vocab_size=256_206,
            encoder_layers=12,
            encoder_ffn_dim=4096,
            decoder_layers=12,
            decoder_ffn_dim=4096,
            speech_encoder_layers=12,
            t2u_encoder_layers=4,
            t2u_decoder_layers=4,
        )


# --- §4.1, speech encoder ---------------------------------------------------------------------------------------------


class SeamlessM4TFeatureProjection(nnx.Module):
    """§4.1: LayerNorm over the bands of a frame, and a linear map to the model's width."""

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        bands = config.feature_projection_input_dim
        self.layer_norm = LayerNorm(bands, epsilon=config.layer_norm_eps, **kwargs)
        self.projection = Linear(bands, config.hidden_size, **kwargs)
        self.rate = config.speech_encoder_dropout

    def __call__(self, x: Float[Array, "batch time bands"], dropout: Dropout) -> Float[Array, "batch time hidden"]:
        """Projected frames."""
        return dropout(self.projection(self.layer_norm(x)), self.rate)


class SeamlessM4TAdapterLayer(nnx.Module):
    r"""§4.1, the length adaptor (after arXiv 2207.00952): a block of a Transformer that keeps one frame in eight.

    What goes into attention and what goes around it are both pooled, each by a gated convolution of its own.
    """

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, taps, stride = config.hidden_size, config.adaptor_kernel_size, config.adaptor_stride

        def pooling() -> Conv1d:
            return Conv1d(width, 2 * width, taps, stride=stride, padding=stride // 2, **kwargs)

        self.residual_layer_norm = LayerNorm(width, **kwargs)
        self.residual_conv = pooling()
        self.self_attn_layer_norm = LayerNorm(width, **kwargs)
        self.self_attn_conv = pooling()
        self.self_attn = ConformerSelfAttention(config.conformer, positions=False, **kwargs)
        self.ffn_layer_norm = LayerNorm(width, **kwargs)
        self.ffn = ConformerFeedForward(config.conformer, act="relu", dropout=config.adaptor_dropout, **kwargs)
        self.rate = config.adaptor_dropout

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        dropout: Dropout,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch frames hidden"]:
        """Fewer frames; `lengths` says how many of them are speech."""
        residual = nnx.glu(self.residual_conv(self.residual_layer_norm(x)))  # (batch, time / stride, hidden)
        x = nnx.glu(self.self_attn_conv(self.self_attn_layer_norm(x)))
        seen = None if lengths is None else (jnp.arange(x.shape[1]) < lengths[:, None])[:, None, None, :]
        x = residual + dropout(self.self_attn(x, seen, dropout, need_weights=False)[0], self.rate)
        return x + self.ffn(self.ffn_layer_norm(x), dropout)


class SeamlessM4TSpeechEncoder(nnx.Module):
    """§4.1: w2v-BERT 2.0, half a feed-forward network, and the length adaptor: 160 ms a frame."""

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.feature_projection = SeamlessM4TFeatureProjection(config, **kwargs)
        self.encoder = ConformerEncoder(config.conformer, **kwargs)
        self.intermediate_ffn = ConformerFeedForward(config.conformer, act="relu", dropout=0.0, **kwargs)
        layers = config.num_adapter_layers if config.add_adapter else 0
        self.adapter = nnx.List([SeamlessM4TAdapterLayer(config, **kwargs) for _ in range(layers)])
        self.inner_layer_norm = LayerNorm(config.hidden_size, **kwargs)
        self.config = config

    def frame_mask(
        self, attention_mask: Int[Array, "batch time"] | None, frames: int
    ) -> Bool[Array, "batch frames"] | None:
        """Which of the frames that come out are speech, or None if all are."""
        if attention_mask is None:
            return None
        lengths = (attention_mask != 0).sum(axis=1)
        for _ in self.adapter:
            lengths = self.config.pooled(lengths)
        return jnp.arange(frames) < lengths[:, None]

    def __call__(
        self,
        input_features: Float[Array, "batch time bands"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutput:
        """Encode speech.

        Args:
            input_features: pairs of log-mel frames, 20 ms each.
            attention_mask: 1 for speech, 0 for padding behind it.
            output_attentions: return the Conformer's attention weights.
            output_hidden_states: return the input of every Conformer block, and the output.
            key: switches dropout and layer drop on, and normalises batches by their own statistics.
        """
        dropout = Dropout(key)
        encoded = self.encoder(
            self.feature_projection(input_features, dropout),
            attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            dropout=dropout,
        )
        x = encoded.last_hidden_state
        x = x + 0.5 * self.intermediate_ffn(x, dropout)
        lengths = None if attention_mask is None else (attention_mask != 0).sum(axis=1)
        for layer in self.adapter:
            lengths = None if lengths is None else self.config.pooled(lengths)
            x = layer(x, dropout, lengths)
        x = self.inner_layer_norm(x)
        states = encoded.hidden_states
        return BaseModelOutput(x, None if states is None else (*states[:-1], x), encoded.attentions)
