r"""# NLLB: No Language Left Behind: Scaling Human-Centered Machine Translation

NLLB Team: Marta R. Costa-jussà, James Cross, Onur Çelebi, Maha Elbayad, Kenneth Heafield, Kevin Heffernan and 33
others, 2022, arXiv 2207.04672.

One Transformer between any two of two hundred languages. The encoder's text begins with its language; the decoder's
first token says into which.

    <language> x_1 x_2 … </s> ── embedding · √d + sinusoids ── N × [self-attention, MLP] ── LN ──> memory
    </s> <language> y_1 y_2 … ── embedding · √d + sinusoids ── N × [causal self-attention,
      attention to the memory, MLP; each behind a LayerNorm] ── LN ── the same embedding ──> logits

| paper | here |
| --- | --- |
| §6.1, model: LayerNorm first, one embedding for all | `NllbEncoder`, `NllbEncoderLayer`, `NllbDecoder` |
| §6.1, decoder block, as mBART's | `audiozoo.models.mbart.MBartDecoderLayer` |
| §8.2 and §8.6, dense sizes | `NllbConfig.dense_600m()`, `.dense_1_3b()`, `.dense_3_3b()` |

What differs from mBART's large: positions are sinusoids and not learnt, there is no LayerNorm behind the embedding, and
the MLP has ReLU. The mixture-of-experts model of §6.2 is not here: no paper of the zoo uses it.

Checkpoints: the text encoder and decoder inside `facebook/hf-seamless-m4t-{medium,large}` and
`facebook/seamless-m4t-v2-large`, whose `…ForTextToText` is the whole model.

    import audiozoo
    model = audiozoo.load("facebook/hf-seamless-m4t-medium", model_class="SeamlessM4TForTextToText")
    encoder = model.text_encoder  # an NllbEncoder
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.layers import Dropout, LayerNorm, Linear, MultiHeadAttention, activation, layer_drop
from audiozoo.layers.positions import sinusoids_of
from audiozoo.layers.stacking import unseen
from audiozoo.models.mbart import MBartConfig, MBartDecoder, MBartDecoderLayer, MBartScaledWordEmbedding
from audiozoo.outputs import BaseModelOutput


@dataclass(frozen=True)
class NllbConfig(MBartConfig):
    """§8, sizes of an encoder and a decoder; the decoder's fields are those of `MBartConfig`."""

    vocab_size: int = 256_206  # pieces of words, and languages
    activation_function: str = "relu"  # of the MLP
    encoder_layers: int = 12  # the encoder's blocks
    encoder_attention_heads: int = 16  # the encoder's heads
    encoder_ffn_dim: int = 4096  # width inside the encoder's MLP
    encoder_layerdrop: float = 0.0  # chance that training skips a block of the encoder

    @classmethod
    def dense_600m(cls) -> NllbConfig:
        """§8.6, the distilled model of 600 million parameters."""
        return cls()

    @classmethod
    def dense_1_3b(cls) -> NllbConfig:
        """§8.6, the distilled model of 1.3 B parameters."""
        return cls(encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192, decoder_ffn_dim=8192)

    @classmethod
    def dense_3_3b(cls) -> NllbConfig:
        """§8.2, the dense model of 3.3 B parameters."""
        return cls(d_model=2048, encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192, decoder_ffn_dim=8192)


class NllbEncoderLayer(nnx.Module):
    """§6.1, an encoder's block: self-attention and MLP, each after a LayerNorm, each residual."""

    def __init__(self, config: NllbConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, heads = config.d_model, config.encoder_attention_heads
        self.self_attn = MultiHeadAttention(width, heads, dropout=config.attention_dropout, **kwargs)
        self.self_attn_layer_norm = LayerNorm(width, **kwargs)
        self.fc1 = Linear(width, config.encoder_ffn_dim, **kwargs)
        self.fc2 = Linear(config.encoder_ffn_dim, width, **kwargs)
        self.final_layer_norm = LayerNorm(width, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        dropout: Dropout,
        mask: Bool[Array, "batch 1 1 time"] | None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time d_model"], jax.Array | None]:
        """One block: its output and, if needed, attention weights."""
        config = self.config
        attention, weights = self.self_attn(
            self.self_attn_layer_norm(x), mask=mask, dropout=dropout, need_weights=need_weights
        )
        x = x + dropout(attention, config.dropout)
        hidden = activation(config.activation_function)(self.fc1(self.final_layer_norm(x)))
        hidden = self.fc2(dropout(hidden, config.activation_dropout))
        return x + dropout(hidden, config.dropout), weights


class NllbEncoder(nnx.Module):
    """§6.1: sinusoids, blocks and a last LayerNorm.

    The embedding belongs to whoever shares it with the decoder. `input_ids` say where padding stands and how far the
    positions have come; without them there are no positions, as in SeamlessM4T's text-to-unit encoder.
    """

    def __init__(self, config: NllbConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layers = nnx.List([NllbEncoderLayer(config, **kwargs) for _ in range(config.encoder_layers)])
        self.layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch time d_model"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        *,
        input_ids: Int[Array, "batch time"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutput:
        """Encode a text.

        Args:
            inputs_embeds: embedded tokens.
            attention_mask: 1 where a token is real, 0 where it is padding.
            input_ids: the tokens, for their positions.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout and layer drop on.
        """
        config, dropout, x = self.config, Dropout(key), inputs_embeds
        if input_ids is not None:
            x = x + sinusoids_of(input_ids, config.d_model, padding=config.pad_token_id, dtype=x.dtype)
        x = dropout(x, config.dropout)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
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


class NllbDecoder(MBartDecoder):
    """§6.1: mBART's decoder with sinusoids for positions; for its call and its cache see `MBartDecoder`.

    Its embedding is also the encoder's, and that of the logits: `embed_tokens(ids)` and `embed_tokens.attend(states)`.
    """

    def __init__(self, config: NllbConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.init_std)
        self.embed_tokens = MBartScaledWordEmbedding(config, embedding_init=init, **kwargs)
        self.layers = nnx.List([MBartDecoderLayer(config, **kwargs) for _ in range(config.decoder_layers)])
        self.layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def embed(
        self, input_ids: Int[Array, "batch time"], position: int | Int[Array, ""], limit: int, dropout: Dropout
    ) -> Float[Array, "batch time d_model"]:
        """Tokens with their positions; `position` tokens came before. Sinusoids have no end, so no text is too long."""
        x = self.embed_tokens(input_ids)
        padding, width = self.config.pad_token_id, self.config.d_model
        return dropout(
            x + sinusoids_of(input_ids, width, padding=padding, offset=position, dtype=x.dtype), self.config.dropout
        )
