r"""# mBART: Multilingual Denoising Pre-training for Neural Machine Translation

Yinhan Liu, Jiatao Gu, Naman Goyal, Xian Li, Sergey Edunov, Marjan Ghazvininejad, Mike Lewis, Luke Zettlemoyer, 2020,
arXiv 2001.08210; extended to 50 languages by Tang et al., arXiv 2008.00401.

A Transformer that learns to restore text that was disturbed, in many languages at once, and then translates. Here is
its decoder alone, which XLS-R puts behind a speech encoder: the first token says into which language.

    <language> y_1 y_2 … ── embedding · √d + position ── LN ── N × [causal self-attention,
      attention to the encoder, MLP; each behind a LayerNorm] ── LN ── tied embedding ──> logits

| paper | here |
| --- | --- |
| §2.2, architecture: 12 layers, width 1024, 16 heads, one more LayerNorm | `MBartDecoder`, `MBartDecoderLayer` |
| §2.2, the language's token in front | `MBartForCausalLM`, through `forced_bos_token_id` of whoever generates |
| decoding, which the paper leaves to others | `continue_text` |
| not in the paper; in the released checkpoints | `MBartDecoderWrapper` |

The encoder is not here: no paper of the zoo uses it.

Checkpoints: the decoder inside `facebook/wav2vec2-xls-r-*-21-to-en` and `-en-to-15` (see `audiozoo.models.xls_r`).

    import audiozoo
    translator = audiozoo.load("facebook/wav2vec2-xls-r-300m-en-to-15")
    decoder = translator.decoder  # an MBartForCausalLM
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.decoding import GenerateOutput, GenerationConfig, Growing, Shared, generate
from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, Embed, KeyValues, LayerNorm, Linear, MultiHeadAttention, activation, layer_drop
from audiozoo.layers.attention import causal_mask
from audiozoo.layers.basic import spread
from audiozoo.layers.losses import cross_entropy
from audiozoo.layers.stacking import unseen
from audiozoo.outputs import CausalLMOutput, DecoderOutput


@dataclass(frozen=True)
class MBartConfig:
    """Sizes of a decoder (§2.2)."""

    vocab_size: int = 250_054  # pieces of words, and languages
    max_position_embeddings: int = 1024  # tokens of the longest text
    d_model: int = 1024  # width
    decoder_layers: int = 12  # blocks
    decoder_attention_heads: int = 16  # heads
    decoder_ffn_dim: int = 4096  # width inside the MLP
    activation_function: str = "gelu"  # of the MLP
    dropout: float = 0.1  # after embedding, attention and MLP
    attention_dropout: float = 0.0  # on attention weights
    activation_dropout: float = 0.0  # inside the MLP
    decoder_layerdrop: float = 0.0  # chance that training skips a block
    init_std: float = 0.02  # standard deviation that embeddings start from
    scale_embedding: bool = True  # multiply embeddings by √d_model
    tie_word_embeddings: bool = True  # logits by the embedding itself
    pad_token_id: int = 1  # padding
    eos_token_id: int = 2  # ends a text, and begins the decoder's

    @classmethod
    def mbart_50(cls) -> MBartConfig:
        """arXiv 2008.00401, §3: mBART's large decoder, with ReLU, for 50 languages."""
        return cls(activation_function="relu")


@jax.tree_util.register_dataclass
@dataclass
class MBartCache:
    """§2.2, the keys and values of every block, of the tokens so far and of the encoder, as a value."""

    self_attention: tuple[KeyValues, ...]
    cross_attention: tuple[KeyValues | None, ...]  # None where there is no encoder to attend to

    @property
    def length(self) -> int:
        """The tokens that there is room for."""
        return self.self_attention[0].key.shape[2]


class MBartScaledWordEmbedding(Embed):
    r"""§2.2, token embeddings, multiplied by $\sqrt d$ where the checkpoint says so; as a head they are not scaled."""

    def __init__(self, config: MBartConfig, **kwargs: Any):
        super().__init__(config.vocab_size, config.d_model, **kwargs)
        self.factor = config.d_model**0.5 if config.scale_embedding else 1.0

    def __call__(
        self, inputs: Int[Array, "batch time"], out_sharding: Any = None
    ) -> Float[Array, "batch time d_model"]:
        """Embedded tokens."""
        x = super().__call__(inputs, out_sharding)
        return x * jnp.asarray(self.factor, x.dtype)


class MBartDecoderLayer(nnx.Module):
    """§2.2, a block: causal self-attention, attention to the encoder, MLP; each after a LayerNorm, each residual."""

    norm_first: bool = True  # in follow-ups also false: $\mathrm{LN}(x + f(x))$, not $x + f(\mathrm{LN}(x))$
    attends: bool = True  # to an encoder; a language model has none

    def __init__(self, config: MBartConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, heads = config.d_model, config.decoder_attention_heads
        self.self_attn = MultiHeadAttention(width, heads, dropout=config.attention_dropout, **kwargs)
        self.self_attn_layer_norm = LayerNorm(width, **kwargs)
        if self.attends:
            self.encoder_attn = MultiHeadAttention(width, heads, dropout=config.attention_dropout, **kwargs)
            self.encoder_attn_layer_norm = LayerNorm(width, **kwargs)
        self.fc1 = Linear(width, config.decoder_ffn_dim, **kwargs)
        self.fc2 = Linear(config.decoder_ffn_dim, width, **kwargs)
        self.final_layer_norm = LayerNorm(width, **kwargs)
        self.config, self.dropout_rate = config, config.dropout

    def mlp(self, x: Float[Array, "batch time d_model"], dropout: Dropout) -> Float[Array, "batch time d_model"]:
        """Each token by itself."""
        hidden = activation(self.config.activation_function)(self.fc1(x))
        hidden = self.fc2(dropout(hidden, self.config.activation_dropout))
        return dropout(hidden, self.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        dropout: Dropout,
        past: KeyValues | None,
        position: int | Int[Array, ""],
        mask: Bool[Array, "#batch 1 time keys"],
        source: KeyValues | None,
        source_mask: Bool[Array, "#batch 1 #time frames"] | None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time d_model"], KeyValues, jax.Array | None, jax.Array | None]:
        """One block: its output, its keys and values so far and, if needed, the self- and cross-attention weights."""

        def before(norm: LayerNorm, x: jax.Array) -> jax.Array:
            return norm(x) if self.norm_first else x

        def after(norm: LayerNorm, x: jax.Array) -> jax.Array:
            return x if self.norm_first else norm(x)

        options: dict[str, Any] = {"dropout": dropout, "need_weights": need_weights}
        y = before(self.self_attn_layer_norm, x)
        key_values = self.self_attn.key_values(y)
        if past is not None:
            key_values = past.write(key_values, position)
        y, weights = self.self_attn(y, key_values, mask=mask, **options)
        x = after(self.self_attn_layer_norm, x + dropout(y, self.dropout_rate))
        cross_weights = None
        if source is not None:
            y = before(self.encoder_attn_layer_norm, x)
            y, cross_weights = self.encoder_attn(y, source, mask=source_mask, **options)
            x = after(self.encoder_attn_layer_norm, x + dropout(y, self.dropout_rate))
        y = self.mlp(before(self.final_layer_norm, x), dropout)
        return after(self.final_layer_norm, x + y), key_values, weights, cross_weights


def empty_cache(
    layers: Sequence[Any], encoder_hidden_states: Float[Array, "batch frames d_model"], heads: int, length: int
) -> MBartCache:
    """§2.2: room for the keys and values of `length` tokens in every block, and those of the encoder's states.

    Of blocks that attend to no encoder the states have the decoder's width and dtype, and are not read.
    """
    batch, _, width = encoder_hidden_states.shape
    cross = tuple(layer.encoder_attn.key_values(encoder_hidden_states) if layer.attends else None for layer in layers)
    dtype = encoder_hidden_states.dtype if cross[0] is None else cross[0].key.dtype
    empty = KeyValues.empty(batch, heads, length, width // heads, dtype)
    return MBartCache(tuple(empty for _ in layers), cross)


def decode_blocks(
    layers: Sequence[Any],
    x: Float[Array, "batch time d_model"],
    attention_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"] | None,
    encoder_hidden_states: Float[Array, "batch frames d_model"] | None,
    encoder_attention_mask: Bool[Array, "batch *queries frames"] | Int[Array, "batch *queries frames"] | None,
    *,
    past_key_values: MBartCache | None = None,
    cache_position: int | Int[Array, ""] = 0,
    output_attentions: bool = False,
    output_hidden_states: bool = False,
    drop_rate: float = 0.0,
    dropout: Dropout | None = None,
    norm: LayerNorm | None = None,
) -> DecoderOutput:
    """§2.2: embedded tokens through the blocks of a decoder; for the arguments see `MBartDecoder`.

    Args:
        layers: blocks, called as `MBartDecoderLayer` is.
        x: embedded tokens; with a cache, those that are new.
        attention_mask: 1 where a token (of the cache's length, if there is a cache) is real.
        encoder_hidden_states: the encoder's output; not needed with a cache.
        encoder_attention_mask: which of its frames are real, or which each token may see.
        past_key_values: cache so far.
        cache_position: where in it the first of these tokens stands.
        output_attentions: return attention weights.
        output_hidden_states: return the input of every block, and the output.
        drop_rate: chance that training skips a block.
        dropout: source of keys.
        norm: behind the last block, if there is one.
    """
    time, dropout = x.shape[1], dropout or Dropout(None)
    keys, first = (time, 0) if past_key_values is None else (past_key_values.length, cache_position)
    mask = causal_mask(time, keys, first)
    if attention_mask is not None:
        mask = mask & (attention_mask[:, None, None, :] != 0)
    source_mask = None
    if encoder_attention_mask is not None:
        frames = encoder_attention_mask.shape[-1]
        source_mask = (encoder_attention_mask != 0).reshape(len(encoder_attention_mask), 1, -1, frames)
    hidden_states, attentions, cross_attentions = [], [], []
    key_values: list[KeyValues] = []
    for i, layer in enumerate(layers):
        past = source = None
        if past_key_values is not None:
            past, source = past_key_values.self_attention[i], past_key_values.cross_attention[i]
        elif encoder_hidden_states is not None:
            source = layer.encoder_attn.key_values(encoder_hidden_states)
        hidden_states += [x, *unseen(layer)]
        arguments = (past, cache_position, mask, source, source_mask, output_attentions)
        x, new, weights, cross_weights = layer_drop(layer, x, drop_rate, dropout, *arguments)
        key_values.append(new)
        attentions.append(weights)
        cross_attentions.append(cross_weights)
    x = x if norm is None else norm(x)
    cache = None if past_key_values is None else MBartCache(tuple(key_values), past_key_values.cross_attention)
    return DecoderOutput(
        last_hidden_state=x,
        past_key_values=cache,
        hidden_states=(*hidden_states, x) if output_hidden_states else None,
        attentions=tuple(attentions) if output_attentions else None,
        cross_attentions=tuple(cross_attentions) if output_attentions else None,
    )


class MBartDecoder(nnx.Module):
    """§2.2: scaled token and learned position embeddings, pre-norm blocks and a last LayerNorm."""

    def __init__(self, config: MBartConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.init_std)
        self.embed_tokens: Embed = MBartScaledWordEmbedding(config, embedding_init=init, **kwargs)
        # The first two rows belong to no position.
        self.embed_positions = Embed(config.max_position_embeddings + 2, config.d_model, embedding_init=init, **kwargs)
        self.layers = nnx.List([MBartDecoderLayer(config, **kwargs) for _ in range(config.decoder_layers)])
        self.layernorm_embedding = LayerNorm(config.d_model, **kwargs)
        self.layer_norm: LayerNorm | None = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def start(self, encoder_hidden_states: Float[Array, "batch frames d_model"], length: int) -> MBartCache:
        """An empty cache for `length` tokens, and the encoder's keys and values."""
        return empty_cache(self.layers, encoder_hidden_states, self.config.decoder_attention_heads, length)

    def embed(
        self, input_ids: Int[Array, "batch time"], position: int | Int[Array, ""], limit: int, dropout: Dropout
    ) -> Float[Array, "batch time d_model"]:
        """Tokens with their positions, the first one at `position`, all of them before `limit`.

        Raises:
            UsageError: for too many tokens.
        """
        config, time = self.config, input_ids.shape[1]
        longest = max(time, limit - 1)  # the last token of a cache is not read
        if longest > config.max_position_embeddings:
            raise UsageError(
                f"{longest} tokens are too many: this model has {config.max_position_embeddings} positions."
            )
        tokens = self.embed_tokens(input_ids)
        positions = spread(self.embed_positions(2 + position + jnp.arange(time)), tokens)
        return dropout(self.layernorm_embedding(tokens + positions), config.dropout)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch keys"] | None = None,
        encoder_hidden_states: Float[Array, "batch frames d_model"] | None = None,
        encoder_attention_mask: Bool[Array, "batch *queries frames"]
        | Int[Array, "batch *queries frames"]
        | None = None,
        *,
        past_key_values: MBartCache | None = None,
        cache_position: int | Int[Array, ""] = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> DecoderOutput:
        """Decode tokens against an encoder's output.

        Args:
            input_ids: tokens.
            attention_mask: 1 where a token (of the cache's length, if there is a cache) is real, 0 where it is padding.
            encoder_hidden_states: the encoder's output; not needed with a cache, which holds its keys and values.
            encoder_attention_mask: which of its frames are real; or which of them each token may see,
                `(batch, time, frames)`.
            past_key_values: cache from `start` or from the last call; returned with these tokens added.
            cache_position: where in the cache the first of these tokens stands.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout and layer drop on.

        Raises:
            UsageError: for too many tokens.
        """
        dropout = Dropout(key)
        limit = input_ids.shape[1] if past_key_values is None else past_key_values.length
        return decode_blocks(
            self.layers,
            self.embed(input_ids, cache_position, limit, dropout),
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values=past_key_values,
            cache_position=cache_position,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            drop_rate=self.config.decoder_layerdrop,
            dropout=dropout,
            norm=self.layer_norm,
        )


class MBartDecoderWrapper(nnx.Module):
    """Not in the paper; in the released checkpoints: a level of names around the decoder."""

    decoder_class: ClassVar[Any] = MBartDecoder

    def __init__(self, config: MBartConfig, **kwargs: Any):
        self.decoder = self.decoder_class(config, **kwargs)


class MBartForCausalLM(nnx.Module):
    """§2.2: the decoder with its head."""

    wrapper_class: ClassVar[Any] = MBartDecoderWrapper

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.model = self.wrapper_class(config, **kwargs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, use_bias=False, **kwargs)
        self.config = config

    def head(self, x: Float[Array, "batch time d_model"]) -> Float[Array, "batch time vocabulary"]:
        """Logits; tied to the token embedding or not."""
        return self.model.decoder.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        *arguments: Any,
        labels: Int[Array, "batch time"] | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Logits for every token and, with `labels` (-100 where there is none), their mean cross-entropy.

        For the other arguments see the decoder.
        """
        decoded = self.model.decoder(input_ids, *arguments, **options)
        logits = self.head(decoded.last_hidden_state)
        return CausalLMOutput(
            loss=None if labels is None else cross_entropy(logits, jnp.asarray(labels)),
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )


# --- decoding ---------------------------------------------------------------------------------------------------------

# (tokens, which frames of the source are real, cache, position) -> (logits, cache)
DecoderStep = Callable[[jax.Array, jax.Array | None, MBartCache, Any], tuple[jax.Array, MBartCache]]


def continue_text(
    decode: DecoderStep,
    cache: MBartCache,
    source_mask: Bool[Array, "batch frames"] | None,
    prompt: Int[Array, "batch tokens"],
    config: GenerationConfig,
    **options: Any,
) -> GenerateOutput:
    """Search for the text that follows `prompt`, the encoder's keys and values shared by all beams of an example.

    Args:
        decode: one step of a decoder.
        cache: its `start`, with room for all tokens.
        source_mask: which frames of the encoder are real.
        prompt: the tokens that the text begins with.
        config: of the search.
        options: of `decoding.generate`.
    """

    def marked(cache: MBartCache) -> Any:
        own = tuple((Growing(kv.key, 2), Growing(kv.value, 2)) for kv in cache.self_attention)
        return own, Shared(cache.cross_attention), Shared(source_mask)

    def step(tokens: jax.Array, cache: Any, position: Any) -> tuple[jax.Array, Any]:
        own, source, mask = cache
        past = MBartCache(tuple(KeyValues(k.value, v.value) for k, v in own), source.value)
        rows = None if mask.value is None else jnp.repeat(mask.value, len(tokens) // len(mask.value), axis=0)
        logits, past = decode(tokens, rows, past, position)
        return logits[:, -1], marked(past)

    return generate(
        step, marked(cache), prompt, config, prefill=lambda tokens, cache: step(tokens, cache, 0), **options
    )
