r"""# RoBERTa: A Robustly Optimized BERT Pretraining Approach

Yinhan Liu, Myle Ott, Naman Goyal, Jingfei Du, Mandar Joshi, Danqi Chen, Omer Levy, Mike Lewis, Luke Zettlemoyer,
Veselin Stoyanov, 2019, arXiv 1907.11692.

BERT's encoder (arXiv 1810.04805), trained longer, on more text, with masks drawn anew each time, without the
next-sentence task, over a byte-level vocabulary. Here it is the text tower of CLAP, so the file holds the encoder and
its pooler; its pretraining objective is not repeated, since CLAP starts from the finished weights.

    tokens (time,) ── words + positions + segment ── LN ──> (time, d)
      ── N × [self-attention, + x, LN, MLP, + x, LN] ──> (time, d)
      ── first token ── Linear, tanh ──> (d,)

| paper | here |
| --- | --- |
| §2.1 and §2.2, BERT's setup and architecture | `RobertaEmbeddings`, `RobertaLayer`, `RobertaModel` |
| §2.2, pooling over the first token (BERT, §3) | `RobertaPooler` |
| Table 9, sizes | `RobertaConfig.base()`, `RobertaConfig.large()` |

Positions count from `pad_token_id + 1` and padding keeps position `pad_token_id`: what fairseq, where the paper's code
lives, does.

Checkpoints: the text towers inside `laion/clap-htsat-{unfused,fused}`, `laion/larger_clap_*` and LAION's own files.

    import audiozoo
    from flax import nnx
    from audiozoo.models.roberta import RobertaConfig, RobertaModel
    encode = audiozoo.jit(RobertaModel(RobertaConfig.base(), rngs=nnx.Rngs(0)))
    sentence = encode(input_ids, attention_mask).pooler_output  # (batch, 768)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, Embed, LayerNorm, Linear, MultiHeadAttention, activation, check_mask
from audiozoo.layers.stacking import unseen
from audiozoo.outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class RobertaConfig:
    """Sizes of one encoder: Table 9; the defaults are those of RoBERTa base."""

    vocab_size: int = 50265  # byte-level tokens
    hidden_size: int = 768  # width of the encoder
    num_hidden_layers: int = 12  # blocks
    num_attention_heads: int = 12  # of hidden_size / heads channels each
    intermediate_size: int = 3072  # width of the MLP
    hidden_act: str = "gelu"  # of the MLP
    hidden_dropout_prob: float = 0.1  # after embeddings, attention and MLP
    attention_probs_dropout_prob: float = 0.1  # on attention weights
    max_position_embeddings: int = 514  # positions, pad_token_id + 1 of them before the first token's
    type_vocab_size: int = 1  # segments; RoBERTa has one
    layer_norm_eps: float = 1e-5  # of all LayerNorms; 1e-12 in Hugging Face's CLAP
    pad_token_id: int = 1  # token that pads

    @classmethod
    def base(cls) -> RobertaConfig:
        """Table 9, RoBERTa base: 124.6 M parameters."""
        return cls()

    @classmethod
    def large(cls) -> RobertaConfig:
        """Table 9, RoBERTa large: 355 M parameters."""
        return cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

    @property
    def longest_text(self) -> int:
        """Tokens for which there are positions."""
        return self.max_position_embeddings - self.pad_token_id - 1


_NORMAL = nnx.initializers.normal(0.02)


def positions_of(input_ids: Int[Array, "batch time"], pad_token_id: int) -> Int[Array, "batch time"]:
    """Positions that leave padding out: $p + 1, p + 2, …$ for real tokens, $p$ = `pad_token_id` for padding."""
    real = (input_ids != pad_token_id).astype(input_ids.dtype)
    return jnp.cumsum(real, axis=1) * real + pad_token_id


class RobertaEmbeddings(nnx.Module):
    """§2.1, input: the sum of word, position and segment embeddings, normalised."""

    def __init__(self, config: RobertaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.hidden_size
        self.word_embeddings = Embed(config.vocab_size, width, embedding_init=_NORMAL, **kwargs)
        self.position_embeddings = Embed(config.max_position_embeddings, width, embedding_init=_NORMAL, **kwargs)
        self.token_type_embeddings = Embed(config.type_vocab_size, width, embedding_init=_NORMAL, **kwargs)
        self.layernorm = LayerNorm(width, epsilon=config.layer_norm_eps, **kwargs)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self, input_ids: Int[Array, "batch time"], position_ids: Int[Array, "batch time"], dropout: Dropout
    ) -> Float[Array, "batch time hidden"]:
        """The encoder's input; all tokens are of segment 0."""
        segment = self.token_type_embeddings(jnp.zeros_like(input_ids))
        x = self.word_embeddings(input_ids) + segment + self.position_embeddings(position_ids)
        return dropout(self.layernorm(x), self.dropout_rate)


class RobertaLayer(nnx.Module):
    r"""§2.2, block: $y = \mathrm{LN}(x + \mathrm{SelfAttention}(x))$, then $\mathrm{LN}(y + \mathrm{MLP}(y))$."""

    def __init__(self, config: RobertaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = MultiHeadAttention(
            width,
            config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            kernel_init=_NORMAL,
            **kwargs,
        )
        self.attention_layernorm = LayerNorm(width, epsilon=config.layer_norm_eps, **kwargs)
        self.intermediate = Linear(width, inner, kernel_init=_NORMAL, **kwargs)
        self.output = Linear(inner, width, kernel_init=_NORMAL, **kwargs)
        self.layernorm = LayerNorm(width, epsilon=config.layer_norm_eps, **kwargs)
        self.hidden_act, self.dropout_rate = config.hidden_act, config.hidden_dropout_prob

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        mask: Bool[Array, "batch 1 1 time"] | None,
        dropout: Dropout,
        need_weights: bool = False,
    ) -> tuple[Float[Array, "batch time hidden"], Float[Array, "batch heads time time"] | None]:
        """One block; returns its output and, if needed, its attention weights."""
        attended, weights = self.attention(x, mask=mask, dropout=dropout, need_weights=need_weights)
        x = self.attention_layernorm(x + dropout(attended, self.dropout_rate))
        inner = self.output(activation(self.hidden_act)(self.intermediate(x)))
        return self.layernorm(x + dropout(inner, self.dropout_rate)), weights


class RobertaPooler(nnx.Module):
    r"""Not in the paper; in the released checkpoint, from BERT: $\tanh(W x_0 + b)$ of the first token."""

    def __init__(self, config: RobertaConfig, **kwargs: Any):
        self.dense = Linear(config.hidden_size, config.hidden_size, kernel_init=_NORMAL, **kwargs)

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch hidden"]:
        """One vector for the whole text."""
        return jnp.tanh(self.dense(x[:, 0]))


class RobertaModel(nnx.Module):
    """§2.2: embeddings, blocks and pooler."""

    def __init__(self, config: RobertaConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embeddings = RobertaEmbeddings(config, **kwargs)
        self.layers = nnx.List([RobertaLayer(config, **kwargs) for _ in range(config.num_hidden_layers)])
        self.pooler = RobertaPooler(config, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        position_ids: Int[Array, "#batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: tokens, `<s>` first.
            attention_mask: 1 for real tokens, 0 for padding; all are real by default.
            position_ids: where each token stands; by default counted along the tokens that are not padding.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the embeddings and every block's output.
            key: switches dropout on.

        Returns:
            `last_hidden_state` `(batch, time, hidden_size)` and `pooler_output` `(batch, hidden_size)`.

        Raises:
            UsageError: for a text that is longer than there are positions, no text, or a mask of another shape.
        """
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise UsageError(
                f"The tokens have shape {tuple(input_ids.shape)}; (batch, time) is expected, none of it 0."
            )
        check_mask(attention_mask, input_ids.shape)
        if input_ids.shape[1] > self.config.longest_text and position_ids is None:
            raise UsageError(
                f"The text has {input_ids.shape[1]} tokens; this encoder reads up to {self.config.longest_text}."
            )
        if position_ids is None:
            position_ids = positions_of(input_ids, self.config.pad_token_id)
        dropout = Dropout(key)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        x = self.embeddings(input_ids, position_ids, dropout)
        hidden_states: list[Any] = [x]
        attentions: list[Any] = []
        for layer in self.layers:
            x, weights = layer(x, mask, dropout, output_attentions)
            hidden_states += [*unseen(layer), x]
            attentions.append(weights)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pooler(x),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
