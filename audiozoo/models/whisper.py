r"""# Whisper: Robust Speech Recognition via Large-Scale Weak Supervision

Alec Radford, Jong Wook Kim, Tao Xu, Greg Brockman, Christine McLeavey, Ilya Sutskever, 2022, arXiv 2212.04356.

One plain encoder-decoder Transformer, trained on 680,000 hours of speech with transcripts from the web, does the work
of a whole pipeline. What to do is said by the first tokens of the decoder, `<|startoftranscript|>`, the language, the
task, and whether times are wanted; what is heard comes out as text tokens between time tokens 20 ms apart.

    waveform 16 kHz ── log-mel, 10 ms hop ──> (3000, 80)
      ── Conv k3, GELU ──> (3000, d) ── Conv k3 s2, GELU ──> (1500, d) ── + sinusoids
      ── N × [LN, self-attention, LN, MLP] ── LN ──> (1500, d)                                     encoder
                                                          │ keys, values, once
    tokens ── embed + learned positions ── N × [LN, causal self-attention, LN, cross-attention, LN, MLP] ── LN
      ── × embeddingᵀ ──> logits                                                                   decoder

| paper | here |
| --- | --- |
| §2.2 and Figure 1, stem and encoder | `WhisperEncoder` |
| §2.2 and Figure 1, decoder | `WhisperDecoder` |
| §2.2, both, without a head and with it | `WhisperModel`, `WhisperLanguageModel` |
| §2.2, "the same width and number of blocks" | `WhisperEncoderLayer`, `WhisperDecoderLayer` |
| §2.3, multitask format | `WhisperForConditionalGeneration.prompt`, `WhisperGenerationConfig` |
| §2.4, training | `WhisperForConditionalGeneration.__call__(labels=…)` |
| §2.4 and Table 1, sizes | `WhisperConfig.tiny()` … `WhisperConfig.large_v3()` |
| §4.5, strategies for reliable long-form transcription | `transcribe`, on `audiozoo.decoding.long_form` |
| not in the paper; in the released checkpoints | `WhisperForAudioClassification`, turbo, distil |
| the same: a decoder alone | `WhisperForCausalLM`, `WhisperDecoderWrapper` |

Checkpoints: `openai/whisper-{tiny,base,small,medium}[.en]`, `-large`, `-large-v2`, `-large-v3`, `-large-v3-turbo`,
`distil-whisper/*`, OpenAI's own `.pt` files and CTranslate2 directories of `faster-whisper`; classifiers such as
`sanchit-gandhi/whisper-medium-fleurs-lang-id`, by `audiozoo.decoding.encoders.identify`.

    import audiozoo
    model = audiozoo.load("openai/whisper-tiny.en")
    processor = audiozoo.load_processor("openai/whisper-tiny.en")
    inputs = processor(waveform, sampling_rate=16_000)
    text = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.decoding import GenerateOutput, GenerationConfig, Growing, Shared, generate, long_form
from audiozoo.decoding.generate import Streamer
from audiozoo.decoding.speculative import assisted_generate
from audiozoo.errors import UsageError
from audiozoo.layers import (
    Conv1d,
    Dropout,
    Embed,
    KeyValues,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    activation,
    causal_mask,
    check_ids,
    layer_drop,
    sinusoids,
)
from audiozoo.layers.basic import at_least_float32, spread
from audiozoo.layers.losses import cross_entropy, shift_tokens_right
from audiozoo.layers.masking import span_mask
from audiozoo.layers.stacking import all_states, unseen
from audiozoo.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    DecoderOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from audiozoo.text.whisper_tokenizer import language_code

ENCODER_STRIDE = 2  # mel frames per encoder frame: an encoder frame lasts 20 ms


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of one checkpoint (Table 1 of the paper for the published ones)."""

    vocab_size: int = 51865  # tokens: text, special, languages and 1501 times
    num_mel_bins: int = 80  # mel channels; 128 from large-v3 on
    d_model: int = 384  # width of encoder and decoder
    encoder_layers: int = 4  # blocks
    encoder_attention_heads: int = 6  # of d_model / heads channels each
    encoder_ffn_dim: int = 1536  # width of the encoder's MLP
    decoder_layers: int = 4  # blocks
    decoder_attention_heads: int = 6  # of d_model / heads channels each
    decoder_ffn_dim: int = 1536  # width of the decoder's MLP
    max_source_positions: int = 1500  # encoder frames, 20 ms each: 30 s
    max_target_positions: int = 448  # tokens, prompt included
    activation_function: str = "gelu"  # of both MLPs; the stem's is always the exact GELU
    dropout: float = 0.0  # after embeddings, attention and MLP
    attention_dropout: float = 0.0  # on attention weights
    activation_dropout: float = 0.0  # inside the MLP
    encoder_layerdrop: float = 0.0  # chance that training skips an encoder layer
    decoder_layerdrop: float = 0.0  # chance that training skips a decoder layer
    init_std: float = 0.02  # of the normal distribution that weights start from
    pad_token_id: int = 50256  # fills up shorter rows of tokens
    eos_token_id: int = 50256  # <|endoftext|>
    bos_token_id: int = 50256  # of no use to the model; kept for export
    decoder_start_token_id: int = 50257  # <|startoftranscript|>
    tie_word_embeddings: bool = True  # logits by the token embedding's transpose
    apply_spec_augment: bool = False  # SpecAugment on the log-mel in training (large-v2's recipe)
    mask_time_prob: float = 0.05  # share of frames under time spans
    mask_time_length: int = 10  # frames a span
    mask_time_min_masks: int = 2  # spans at least, whatever the share
    mask_feature_prob: float = 0.0  # share of mel channels under channel spans
    mask_feature_length: int = 10  # channels a span
    mask_feature_min_masks: int = 0  # spans at least, whatever the share
    median_filter_width: int = 7  # encoder frames, odd: of the filter over the attention that times words
    use_weighted_layer_sum: bool = False  # classification reads a learned mix of all layers
    classifier_proj_size: int = 256  # width before the classifier
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # names of the classifier's classes

    @property
    def num_labels(self) -> int:
        """Classes of the classifier."""
        return len(self.id2label)

    @classmethod
    def _size(cls, width: int, layers: int, decoder_layers: int | None = None, **changes: Any) -> WhisperConfig:
        heads = width // 64
        return cls(
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_layers=decoder_layers or layers,
            decoder_attention_heads=heads,
            decoder_ffn_dim=4 * width,
            **{"pad_token_id": 50257, "eos_token_id": 50257, "bos_token_id": 50257, "decoder_start_token_id": 50258}
            | changes,
        )

    @staticmethod
    def _english() -> dict[str, int]:
        return {
            "vocab_size": 51864,
            "pad_token_id": 50256,
            "eos_token_id": 50256,
            "bos_token_id": 50256,
            "decoder_start_token_id": 50257,
        }

    @classmethod
    def tiny(cls) -> WhisperConfig:
        """Table 1: 4 layers of width 384, 37.8 M parameters, the embedding once; the table has 39."""
        return cls._size(384, 4)

    @classmethod
    def tiny_en(cls) -> WhisperConfig:
        """The English-only tiny model."""
        return cls._size(384, 4, **cls._english())

    @classmethod
    def base(cls) -> WhisperConfig:
        """Table 1: 6 layers of width 512, 72.6 M parameters; the table has 74."""
        return cls._size(512, 6)

    @classmethod
    def base_en(cls) -> WhisperConfig:
        """The English-only base model."""
        return cls._size(512, 6, **cls._english())

    @classmethod
    def small(cls) -> WhisperConfig:
        """Table 1: 12 layers of width 768, 241.7 M parameters; the table has 244."""
        return cls._size(768, 12)

    @classmethod
    def small_en(cls) -> WhisperConfig:
        """The English-only small model."""
        return cls._size(768, 12, **cls._english())

    @classmethod
    def medium(cls) -> WhisperConfig:
        """Table 1: 24 layers of width 1024, 763.9 M parameters; the table has 769."""
        return cls._size(1024, 24)

    @classmethod
    def medium_en(cls) -> WhisperConfig:
        """The English-only medium model."""
        return cls._size(1024, 24, **cls._english())

    @classmethod
    def large(cls) -> WhisperConfig:
        """Table 1: 32 layers of width 1280, 1543.3 M parameters; the table has 1550. large-v2 has the same sizes."""
        return cls._size(1280, 32)

    @classmethod
    def large_v2(cls) -> WhisperConfig:
        """`large`, trained longer and with SpecAugment, stochastic depth and BPE dropout (the model card)."""
        return cls.large()

    @classmethod
    def large_v3(cls) -> WhisperConfig:
        """128 mel channels and a token for Cantonese; not in the paper."""
        return cls._size(1280, 32, vocab_size=51866, num_mel_bins=128)

    @classmethod
    def large_v3_turbo(cls) -> WhisperConfig:
        """large-v3 with a decoder of 4 layers; not in the paper."""
        return cls._size(1280, 32, 4, vocab_size=51866, num_mel_bins=128)

    @classmethod
    def distil_small_en(cls) -> WhisperConfig:
        """Distil-Whisper (arXiv 2311.00430): small.en's encoder, a decoder of 4 layers."""
        return cls._size(768, 12, 4, **cls._english())

    @classmethod
    def distil_medium_en(cls) -> WhisperConfig:
        """Distil-Whisper (arXiv 2311.00430): medium.en's encoder, a decoder of 2 layers."""
        return cls._size(1024, 24, 2, **cls._english())

    @classmethod
    def distil_large_v2(cls) -> WhisperConfig:
        """Distil-Whisper (arXiv 2311.00430): large-v2's encoder, a decoder of 2 layers."""
        return cls._size(1280, 32, 2)

    @classmethod
    def distil_large_v3(cls) -> WhisperConfig:
        """Distil-Whisper (arXiv 2311.00430): large-v3's encoder, a decoder of 2 layers."""
        return cls._size(1280, 32, 2, vocab_size=51866, num_mel_bins=128)


@dataclass(frozen=True)
class WhisperGenerationConfig:
    """The token ids of §2.3's format and the choices that the released checkpoints ship for generation."""

    eos_token_id: int = 50256  # <|endoftext|>
    pad_token_id: int = 50256  # fills up shorter rows of tokens
    decoder_start_token_id: int = 50257  # <|startoftranscript|>
    prev_sot_token_id: int = 50360  # <|startofprev|>: the previous text follows
    no_timestamps_token_id: int = 50362  # the time tokens, 0.00 s first, come right after it
    is_multilingual: bool = False  # whether a language and a task belong to the prompt
    lang_to_id: tuple[tuple[str, int], ...] = ()  # ("<|en|>", id) pairs
    task_to_id: tuple[tuple[str, int], ...] = ()  # ("transcribe", id) and ("translate", id)
    suppress_tokens: tuple[int, ...] = ()  # never generated
    begin_suppress_tokens: tuple[int, ...] = ()  # not generated as the first token: a blank, the end
    max_initial_timestamp_index: int | None = 50  # the first time token is at most this many steps of 20 ms
    alignment_heads: tuple[tuple[int, int], ...] = ()  # (decoder layer, head) whose attention follows the words
    max_length: int = 448  # tokens behind the prompt, of which there are never more than positions
    language: str | None = None  # of the speech, where nobody says it
    task: str | None = None  # likewise
    return_timestamps: bool = False  # likewise
    options: tuple[tuple[str, Any], ...] = ()  # of the search for text, as for `transformers.GenerationConfig`


class WhisperEncoderLayer(nnx.Module):
    r"""Figure 1, encoder block: $x + \mathrm{SelfAttention}(\mathrm{LN}(x))$, $x + \mathrm{MLP}(\mathrm{LN}(x))$."""

    def __init__(self, config: WhisperConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.self_attn = MultiHeadAttention(
            config.d_model,
            config.encoder_attention_heads,
            key_bias=False,
            dropout=config.attention_dropout,
            **kwargs,
        )
        self.self_attn_layer_norm = LayerNorm(config.d_model, **kwargs)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim, **kwargs)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model, **kwargs)
        self.final_layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def __call__(
        self, x: Float[Array, "batch frames d_model"], dropout: Dropout, need_weights: bool = True
    ) -> tuple[Float[Array, "batch frames d_model"], Float[Array, "batch heads frames frames"] | None]:
        """One block; returns its output and, if they are needed, its attention weights."""
        config = self.config
        attention, weights = self.self_attn(self.self_attn_layer_norm(x), dropout=dropout, need_weights=need_weights)
        x = x + dropout(attention, config.dropout)
        hidden = activation(config.activation_function)(self.fc1(self.final_layer_norm(x)))
        hidden = self.fc2(dropout(hidden, config.activation_dropout))
        x = x + dropout(hidden, config.dropout)
        if x.dtype == jnp.float16:  # the released implementation keeps float16 finite here
            limit = jnp.finfo(jnp.float16).max - 1000
            x = jnp.clip(x, -limit, limit)
        return x, weights


class WhisperEncoder(nnx.Module):
    """§2.2: a stem of two convolutions, sinusoidal positions, pre-norm blocks and a last LayerNorm."""

    def __init__(self, config: WhisperConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = Conv1d(config.num_mel_bins, config.d_model, 3, padding=1, **kwargs)
        self.conv2 = Conv1d(config.d_model, config.d_model, 3, stride=ENCODER_STRIDE, padding=1, **kwargs)
        self.embed_positions = Embed(config.max_source_positions, config.d_model, **kwargs)
        table = sinusoids(config.max_source_positions, config.d_model)
        self.embed_positions.embedding[...] = jnp.asarray(table, param_dtype)
        self.layers = nnx.List([WhisperEncoderLayer(config, **kwargs) for _ in range(config.encoder_layers)])
        self.layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        input_features: Float[Array, "batch mels time"],
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        allow_short: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutput:
        """Encode log-mel features.

        Args:
            input_features: log-mel spectrogram, 10 ms a frame, channels first as the processor gives it.
            output_attentions: return every block's attention weights.
            output_hidden_states: return the input of every block, and the output.
            allow_short: accept fewer frames than 30 s, which is faster; released models were trained on 30 s only.
            key: switches dropout and layer drop on.

        Returns:
            `last_hidden_state` of shape `(batch, time / 2, d_model)`, 20 ms a frame.

        Raises:
            UsageError: without a batch axis, or if the number of frames or mel channels is not the model's.
        """
        config = self.config
        expected = ENCODER_STRIDE * config.max_source_positions
        if input_features.ndim != 3:
            raise UsageError(f"The features have shape {input_features.shape}; (batch, mels, frames) is expected.")
        _, mels, time = input_features.shape
        if mels != config.num_mel_bins:
            raise UsageError(
                f"The features have {mels} mel channels; this model was trained with {config.num_mel_bins}."
            )
        if time != expected and not (allow_short and 0 < time < expected):
            raise UsageError(f"The features have {time} frames; Whisper takes {expected} (pad the audio to 30 s).")
        dropout = Dropout(key)
        x = input_features.swapaxes(1, 2)  # (batch, time, mels)
        x = x if self.dtype is None else x.astype(self.dtype)
        gelu = activation("gelu")
        x = gelu(self.conv1(x))  # (batch, time, d_model)
        x = gelu(self.conv2(x))  # (batch, time / 2, d_model)
        x = x + spread(self.embed_positions(jnp.arange(x.shape[1])), x)
        x = dropout(x, config.dropout)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states += [x, *unseen(layer)]
            x, weights = layer_drop(layer, x, config.encoder_layerdrop, dropout, output_attentions)
            attentions.append(weights)
        x = self.layer_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


@jax.tree_util.register_dataclass
@dataclass
class WhisperCache:
    """Not in the paper: what decoding keeps, each layer's keys and values so far and those of the audio, taken once."""

    self_attention: tuple[KeyValues, ...]
    cross_attention: tuple[KeyValues, ...]  # one row an example, also when several beams share it


class WhisperDecoderLayer(nnx.Module):
    """Figure 1, decoder block: causal self-attention, cross-attention, MLP; each after a LayerNorm, each residual."""

    def __init__(self, config: WhisperConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        attention = {"key_bias": False, "dropout": config.attention_dropout, **kwargs}
        self.self_attn = MultiHeadAttention(config.d_model, config.decoder_attention_heads, **attention)
        self.self_attn_layer_norm = LayerNorm(config.d_model, **kwargs)
        self.encoder_attn = MultiHeadAttention(config.d_model, config.decoder_attention_heads, **attention)
        self.encoder_attn_layer_norm = LayerNorm(config.d_model, **kwargs)
        self.fc1 = Linear(config.d_model, config.decoder_ffn_dim, **kwargs)
        self.fc2 = Linear(config.decoder_ffn_dim, config.d_model, **kwargs)
        self.final_layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        dropout: Dropout,
        past: KeyValues | None,
        position: int | Int[Array, ""],
        mask: Bool[Array, "#batch 1 time keys"],
        audio: KeyValues | None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time d_model"], KeyValues, jax.Array | None, jax.Array | None]:
        """One block: its output, its keys and values so far and, if needed, the self- and cross-attention weights."""
        config = self.config
        y = self.self_attn_layer_norm(x)
        key_values = self.self_attn.key_values(y)
        if past is not None:
            key_values = past.write(key_values, position)
        attention, weights = self.self_attn(y, key_values, mask=mask, dropout=dropout, need_weights=need_weights)
        x = x + dropout(attention, config.dropout)
        cross_weights = None
        if audio is not None:
            y = self.encoder_attn_layer_norm(x)
            attention, cross_weights = self.encoder_attn(y, audio, dropout=dropout, need_weights=need_weights)
            x = x + dropout(attention, config.dropout)
        hidden = activation(config.activation_function)(self.fc1(self.final_layer_norm(x)))
        hidden = self.fc2(dropout(hidden, config.activation_dropout))
        return x + dropout(hidden, config.dropout), key_values, weights, cross_weights


class WhisperDecoder(nnx.Module):
    """§2.2: token and learned position embeddings, pre-norm blocks and a last LayerNorm."""

    def __init__(self, config: WhisperConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.init_std)
        self.embed_tokens = Embed(config.vocab_size, config.d_model, embedding_init=init, **kwargs)
        self.embed_positions = Embed(config.max_target_positions, config.d_model, embedding_init=init, **kwargs)
        self.layers = nnx.List([WhisperDecoderLayer(config, **kwargs) for _ in range(config.decoder_layers)])
        self.layer_norm = LayerNorm(config.d_model, **kwargs)
        self.config = config

    def start(
        self, encoder_hidden_states: Float[Array, "batch frames d_model"], length: int, *, beams: int = 1
    ) -> WhisperCache:
        """An empty cache for `length` tokens of `beams` continuations an example, and the audio's keys and values.

        Args:
            encoder_hidden_states: the encoder's output, one row an example.
            length: room for this many tokens.
            beams: rows of self-attention for each example.
        """
        batch, _, width = encoder_hidden_states.shape
        heads = self.config.decoder_attention_heads
        cross = tuple(layer.encoder_attn.key_values(encoder_hidden_states) for layer in self.layers)
        empty = KeyValues.empty(batch * beams, heads, length, width // heads, encoder_hidden_states.dtype)
        return WhisperCache(tuple(empty for _ in self.layers), cross)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        attention_mask: Int[Array, "batch keys"] | None = None,
        encoder_hidden_states: Float[Array, "batch frames d_model"] | None = None,
        *,
        past_key_values: WhisperCache | None = None,
        cache_position: int | Int[Array, ""] = 0,
        position_ids: Int[Array, "batch time"] | None = None,
        inputs_embeds: Float[Array, "batch time d_model"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> DecoderOutput:
        """Decode tokens against encoded audio.

        Args:
            input_ids: tokens.
            attention_mask: 1 where a token (of the cache's length, if there is a cache) is real, 0 where it is padding.
            encoder_hidden_states: encoded audio; not needed with a cache, which holds its keys and values.
            past_key_values: cache from `start` or from the last call; returned with these tokens added.
            cache_position: where in the cache the first of these tokens stands.
            position_ids: rows of the position table; by default `cache_position` and on.
            inputs_embeds: embedded tokens, instead of `input_ids`.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout and layer drop on.

        Raises:
            UsageError: unless exactly one of `input_ids` and `inputs_embeds` is given, or with too many tokens.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("Give the decoder either token ids or embedded tokens, not both and not neither.")
        x: Any = inputs_embeds if input_ids is None else self.embed_tokens(input_ids)
        time = x.shape[1]
        if time > config.max_target_positions:
            raise UsageError(f"{time} tokens are too many: this model has {config.max_target_positions} positions.")
        dropout = Dropout(key)
        if position_ids is None:
            position_ids = jnp.broadcast_to(cache_position + jnp.arange(time), x.shape[:2])
        positions = self.embed_positions(position_ids)
        x = dropout(x + positions.astype(x.dtype), config.dropout)
        keys = time if past_key_values is None else past_key_values.self_attention[0].key.shape[2]
        mask = causal_mask(time, keys, 0 if past_key_values is None else cache_position)
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None, :] != 0)
        hidden_states, attentions, cross_attentions = [], [], []
        key_values: list[KeyValues] = []
        for i, layer in enumerate(self.layers):
            past = audio = None
            if past_key_values is not None:
                past, audio = past_key_values.self_attention[i], past_key_values.cross_attention[i]
            elif encoder_hidden_states is not None:
                audio = layer.encoder_attn.key_values(encoder_hidden_states)
            hidden_states += [x, *unseen(layer)]
            x, new, weights, cross_weights = layer_drop(
                layer, x, config.decoder_layerdrop, dropout, past, cache_position, mask, audio, output_attentions
            )
            key_values.append(new)
            attentions.append(weights)
            cross_attentions.append(cross_weights)
        x = self.layer_norm(x)
        cache = None if past_key_values is None else WhisperCache(tuple(key_values), past_key_values.cross_attention)
        return DecoderOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )


class WhisperModel(nnx.Module):
    """§2.2, Figure 1: encoder and decoder without a head."""

    def __init__(self, config: WhisperConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = WhisperEncoder(config, **kwargs)
        self.decoder = WhisperDecoder(config, **kwargs)
        self.config = config

    def __call__(
        self,
        input_features: Float[Array, "batch mels time"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        *,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: WhisperCache | None = None,
        cache_position: int | Int[Array, ""] = 0,
        decoder_inputs_embeds: Float[Array, "batch tokens d_model"] | None = None,
        decoder_position_ids: Int[Array, "batch tokens"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        allow_short: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqModelOutput:
        """Encode audio and decode tokens.

        Args:
            input_features: log-mel spectrogram; see `WhisperEncoder`.
            attention_mask: 1 where a frame is audio. The encoder never uses it; SpecAugment draws its spans inside it.
            decoder_input_ids: tokens; see `WhisperDecoder`.
            decoder_attention_mask: 1 where a token is real.
            encoder_outputs: an earlier call's encoding, instead of `input_features`.
            past_key_values: cache from `decoder.start`.
            cache_position: where in the cache the first token stands.
            decoder_inputs_embeds: embedded tokens instead of `decoder_input_ids`.
            decoder_position_ids: rows of the position table.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            allow_short: accept less than 30 s; see `WhisperEncoder`.
            key: training: switches dropout, layer drop and SpecAugment on.
        """
        options: dict[str, Any] = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        encoder_key, decoder_key, mask_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        if encoder_outputs is None and past_key_values is None:
            if input_features is None:
                raise UsageError("Give the model input_features, or encoder_outputs of an earlier call.")
            if mask_key is not None and self.config.apply_spec_augment:
                input_features = spec_augment(mask_key, input_features, self.config, attention_mask)
            encoder_outputs = self.encoder(input_features, allow_short=allow_short, key=encoder_key, **options)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            None if encoder_outputs is None else encoder_outputs.last_hidden_state,
            past_key_values=past_key_values,
            cache_position=cache_position,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            key=decoder_key,
            **options,
        )
        encoded = encoder_outputs or BaseModelOutput()
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


def spec_augment(
    key: jax.Array,
    input_features: Float[Array, "batch mels time"],
    config: WhisperConfig,
    attention_mask: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch mels time"]:
    """SpecAugment (arXiv 1904.08779) as in large-v2's training: spans of frames and of mel channels set to zero."""
    batch, mels, time = input_features.shape
    time_key, feature_key = jax.random.split(key)
    if config.mask_time_prob > 0:
        hidden = span_mask(
            time_key,
            batch,
            time,
            probability=config.mask_time_prob,
            span=config.mask_time_length,
            minimum=config.mask_time_min_masks,
            lengths=None if attention_mask is None else attention_mask.sum(axis=1),
        )
        input_features = jnp.where(hidden[:, None, :], 0.0, input_features)
    if config.mask_feature_prob > 0:
        hidden = span_mask(
            feature_key,
            batch,
            mels,
            probability=config.mask_feature_prob,
            span=config.mask_feature_length,
            minimum=config.mask_feature_min_masks,
        )
        input_features = jnp.where(hidden[:, :, None], 0.0, input_features)
    return input_features


class WhisperLanguageModel(nnx.Module):
    """§2.2: a decoder and the head that its two users share, the whole model and the decoder alone."""

    model: Any  # has a `decoder`

    def __init__(self, config: WhisperConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        if not config.tie_word_embeddings:
            self.proj_out = Linear(
                config.d_model, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )
        self.config = config

    def head(self, x: Float[Array, "batch time d_model"]) -> Float[Array, "batch time vocabulary"]:
        """Logits: §2.2, tied to the token embedding."""
        return self.model.decoder.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.proj_out(x)

    def several(
        self, tokens: Int[Array, "batch time"], cache: WhisperCache, position: int | Int[Array, ""]
    ) -> tuple[Float[Array, "batch time vocabulary"], WhisperCache]:
        """Feed the tokens at `position` and on; returns the logits after each (for `audiozoo.decoding.speculative`).

        Drafted tokens may pass the end of the position table; they are never kept, so any row of it will do.
        """
        positions = jnp.minimum(position + jnp.arange(tokens.shape[1]), self.config.max_target_positions - 1)
        positions = jnp.broadcast_to(positions, tokens.shape)
        decoded = self.model.decoder(tokens, past_key_values=cache, cache_position=position, position_ids=positions)
        return self.head(decoded.last_hidden_state), decoded.past_key_values


class WhisperForConditionalGeneration(WhisperLanguageModel):
    """§2.3: the model with its head, which transcribes, translates, tells languages and times."""

    def __init__(self, config: WhisperConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.model = WhisperModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.generation_config = WhisperGenerationConfig(
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )

    def __call__(
        self,
        input_features: Float[Array, "batch mels time"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        *,
        labels: Int[Array, "batch tokens"] | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        r"""Logits for every token and, with `labels`, the training loss of §2.4.

        $\mathcal L = -\frac1{|M|}\sum_{t \in M} \log p(y_t \mid y_{<t}, \text{audio})$, $M$ being the
        positions whose label is not -100: §2.3 masks the loss over the previous text.

        Args:
            input_features: log-mel spectrogram.
            attention_mask: 1 where a frame is audio.
            decoder_input_ids: tokens; by default `labels` shifted right behind `<|startoftranscript|>`.
            decoder_attention_mask: 1 where a token is real.
            labels: targets, -100 where there is none.
            options: see `WhisperModel`.

        Raises:
            UsageError: if there are more labels than decoder positions.
        """
        if labels is not None:
            if labels.shape[1] > self.config.max_target_positions:
                raise UsageError(
                    f"{labels.shape[1]} labels are too many; there are {self.config.max_target_positions} positions."
                )
            if decoder_input_ids is None and options.get("decoder_inputs_embeds") is None:
                decoder_input_ids = shift_tokens_right(
                    labels, self.config.pad_token_id, self.config.decoder_start_token_id
                )
        outputs = self.model(input_features, attention_mask, decoder_input_ids, decoder_attention_mask, **options)
        logits = self.head(outputs.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels)
        rest = {name: outputs[name] for name in outputs if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **rest)

    def prompt(
        self,
        batch: int,
        *,
        language: str | Sequence[str] | None = None,
        task: str | None = None,
        return_timestamps: bool = False,
        prompt_ids: Sequence[int] | None = None,
    ) -> Int[np.ndarray, "batch tokens"]:
        """§2.3's first tokens: what to do, in which language, with or without times, after which text.

        Args:
            batch: number of examples.
            language: code, name or token ("de", "german", "<|de|>"), one for all or one each; that of the checkpoint's
                settings if not given, and English if they name none.
            task: "transcribe" or "translate"; likewise.
            return_timestamps: whether time tokens are wanted.
            prompt_ids: previous text, put before the start; its first token may be `<|startofprev|>`.

        Raises:
            UsageError: for a language or task that the model does not have.
        """
        ids = self.generation_config
        if not ids.is_multilingual:
            if language not in (None, "en", "english", "<|en|>") or task not in (None, "transcribe"):
                raise UsageError("This model is English-only: it transcribes, and takes neither a language nor a task.")
            rows = [[ids.decoder_start_token_id]] * batch
        else:
            tasks = dict(ids.task_to_id)
            language, task = language or ids.language, task or ids.task
            if (task or "transcribe") not in tasks:
                raise UsageError(f"There is no task {task!r}; there are {', '.join(tasks)}.")
            languages = [language or "en"] * batch if language is None or isinstance(language, str) else list(language)
            if len(languages) != batch:
                raise UsageError(f"{len(languages)} languages were given for {batch} examples.")
            rows = [
                [ids.decoder_start_token_id, self.language_id(name), tasks[task or "transcribe"]] for name in languages
            ]
        previous = [] if prompt_ids is None else [int(token) for token in prompt_ids]
        if previous and previous[0] != ids.prev_sot_token_id:
            previous = [ids.prev_sot_token_id, *previous]
        last = [] if return_timestamps else [ids.no_timestamps_token_id]
        return np.asarray([previous + row + last for row in rows], np.int32)

    def language_id(self, language: str) -> int:
        """The token of a language given by code, name or token.

        Raises:
            UsageError: if the model does not have it.
        """
        tokens = dict(self.generation_config.lang_to_id)
        name = language if language in tokens else f"<|{language_code(language)}|>"
        if name not in tokens:
            raise UsageError(f"This model has no token for the language {language!r}.")
        return tokens[name]

    def detect_language(
        self, input_features: Float[Array, "batch mels time"] | None = None, *, encoder_outputs: Any = None
    ) -> Float[Array, "batch languages"]:
        """§2.3, spoken-language identification: probabilities in the order of `generation_config.lang_to_id`.

        Raises:
            UsageError: for an English-only model.
        """
        ids = self.generation_config
        if not ids.is_multilingual:
            raise UsageError("This model is English-only, so it cannot tell languages apart.")
        return _detect_language(*nnx.split(self), input_features, encoder_outputs)

    def start(self, encoder_hidden_states: Float[Array, "batch frames d_model"], length: int) -> WhisperCache:
        """The cache that `step` and `prefill` take, with room for `length` tokens."""
        return _marked(self.model.decoder.start(encoder_hidden_states, length))

    def prefill(
        self, tokens: Int[Array, "batch time"], cache: WhisperCache
    ) -> tuple[Float[Array, "batch vocabulary"], WhisperCache]:
        """Feed a prompt; returns the logits after its last token (see `audiozoo.decoding.generate`)."""
        return self.step(tokens, cache, 0)

    def step(
        self, tokens: Int[Array, "rows time"], cache: WhisperCache, position: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows vocabulary"], WhisperCache]:
        """Feed the token at `position`; returns the logits of the next one."""
        decoded = self.model.decoder(tokens, past_key_values=_unmarked(cache), cache_position=position)
        return self.head(decoded.last_hidden_state[:, -1:])[:, 0], _marked(decoded.past_key_values)

    def generate(
        self,
        input_features: Float[Array, "batch mels time"] | None = None,
        *,
        language: str | Sequence[str] | None = None,
        task: str | None = None,
        return_timestamps: bool | None = None,
        prompt_ids: Sequence[int] | None = None,
        decoder_input_ids: Any = None,
        encoder_outputs: BaseModelOutput | None = None,
        allow_short: bool = False,
        key: jax.Array | None = None,
        streamer: Streamer | None = None,
        assistant_model: WhisperLanguageModel | None = None,
        num_assistant_tokens: int = 5,
        prompt_lookup_num_tokens: int | None = None,
        max_matching_ngram_size: int = 2,
        attention_mask: Any = None,
        **options: Any,
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """Tokens for one window of 30 s an example, by one compiled loop. For longer audio see `transcribe`.

        What is not given is as the checkpoint's `generation_config.json` says, be it an option of the search, the
        language or the task.

        Args:
            input_features: log-mel spectrogram.
            language: of the speech; English if nobody says (`detect_language` tells, `transcribe` detects).
            task: "transcribe" or "translate".
            return_timestamps: generate time tokens, by OpenAI's rules for them.
            prompt_ids: previous text.
            decoder_input_ids: the whole prompt, instead of what the four before it make.
            encoder_outputs: an earlier encoding, instead of `input_features`.
            allow_short: accept less than 30 s; see `WhisperEncoder`.
            key: randomness for `do_sample=True`.
            streamer: called on the host with every token.
            assistant_model: drafts tokens for this model to check, which is greedy search with the same result, sooner.
                A `WhisperForCausalLM` drafts from this model's encoding of the audio, a whole model from its own.
            num_assistant_tokens: how many tokens are drafted at a time.
            prompt_lookup_num_tokens: draft so many tokens at a time without a model, by what followed when the last
                ones stood before, in the text or in `prompt_ids`; the result is that of greedy search.
            max_matching_ngram_size: how many of the last tokens are looked for, at most.
            attention_mask: of the processor; Whisper does not use it.
            options: as for `transformers.generate`; see `audiozoo.decoding.GenerationConfig`. A `max_length` is one of
                tokens behind the prompt, as in `transformers`' Whisper.

        Returns:
            New tokens, up to and with `<|endoftext|>`, padded to the longest; with `return_dict_in_generate=True` a
            `GenerateOutput`, whose `sequences` begin with the prompt (an `AssistedOutput` with `assistant_model`).

        Raises:
            UsageError: for an unknown option, language or task, if nothing can be generated after the prompt, or if an
                assistant is to help with anything but greedy search, or has another vocabulary.
        """
        ids = self.generation_config
        if input_features is None and encoder_outputs is None:
            raise UsageError("Give generate input_features, or encoder_outputs of an earlier call.")
        if return_timestamps is None:
            return_timestamps = ids.return_timestamps
        source: Any = input_features if encoder_outputs is None else encoder_outputs.last_hidden_state
        if not len(source):
            raise UsageError("There is nothing to generate from: the batch is empty.")
        if decoder_input_ids is None:
            decoder_input_ids = self.prompt(
                len(source), language=language, task=task, return_timestamps=return_timestamps, prompt_ids=prompt_ids
            )
        check_ids(decoder_input_ids, self.config.vocab_size)
        length = decoder_input_ids.shape[1]
        room = self.config.max_target_positions - length
        if room < 1:
            raise UsageError(
                f"The prompt has {length} tokens; this model has {self.config.max_target_positions} positions in all."
            )
        defaults: dict[str, Any] = {
            "eos_token_id": ids.eos_token_id,
            "pad_token_id": ids.pad_token_id,
            "suppress_tokens": ids.suppress_tokens or None,
            "begin_suppress_tokens": ids.begin_suppress_tokens or None,
        }
        defaults |= {"max_new_tokens": min(ids.max_length, room)} | dict(ids.options)
        config = GenerationConfig.over(defaults, options)
        if config.max_new_tokens is None:
            config = config.replace(max_new_tokens=config.max_length)
        limit = min(config.new_tokens(length), room)
        # A few lengths of buffer, so that another limit does not compile again.
        buffer = min(room, next(size for size in (32, 64, 128, 256, 512, limit) if size >= limit))
        config = config.replace(max_new_tokens=buffer, max_length=None)
        rules: tuple[Any, ...] = ()
        if return_timestamps:
            from audiozoo.decoding.timestamps import TimestampRules

            rules = (TimestampRules.of(ids, length),)
        lookup = prompt_lookup_num_tokens is not None
        if streamer is not None and (lookup or assistant_model is not None):
            raise UsageError("A streamer cannot follow speculative decoding, where tokens come several at a time.")
        if lookup and assistant_model is not None:
            raise UsageError("Either assistant_model or prompt_lookup_num_tokens drafts the tokens, not both.")
        if assistant_model is not None:
            if isinstance(assistant_model, WhisperForConditionalGeneration) and input_features is None:
                raise UsageError("An assistant_model with an encoder of its own needs input_features.")
            if assistant_model.config.vocab_size != self.config.vocab_size:
                raise UsageError(
                    f"The assistant_model has {assistant_model.config.vocab_size} tokens and this model "
                    f"{self.config.vocab_size}; they must share one vocabulary."
                )
            width = assistant_model.config.d_model
            if isinstance(assistant_model, WhisperForCausalLM) and width != self.config.d_model:
                raise UsageError(
                    f"A decoder of width {width} cannot draft from this model's encoding, of width "
                    f"{self.config.d_model}; take one that was made for this encoder."
                )
        output = _generate(
            *nnx.split(self),
            input_features,
            encoder_outputs,
            jnp.asarray(decoder_input_ids, jnp.int32),
            jnp.int32(limit),
            key,
            *((None, None) if assistant_model is None else nnx.split(assistant_model)),
            config=config,
            rules=rules,
            allow_short=allow_short,
            streamer=streamer,
            drafted=prompt_lookup_num_tokens if assistant_model is None else num_assistant_tokens,
            matching=max_matching_ngram_size,
        ).trim()
        return output if config.return_dict_in_generate else np.asarray(output.sequences)[:, length:]


@partial(
    jax.jit,
    static_argnames=(
        "graphdef",
        "assistant_graphdef",
        "config",
        "rules",
        "allow_short",
        "streamer",
        "drafted",
        "matching",
    ),
)
def _generate(
    graphdef: Any,
    state: Any,
    input_features: jax.Array | None,
    encoder_outputs: BaseModelOutput | None,
    prompt: jax.Array,
    limit: jax.Array,
    key: jax.Array | None,
    assistant_graphdef: Any,
    assistant_state: Any,
    *,
    config: GenerationConfig,
    rules: tuple[Any, ...],
    allow_short: bool,
    streamer: Streamer | None,
    drafted: int | None,
    matching: int,
) -> GenerateOutput:
    model = nnx.merge(graphdef, state)
    if encoder_outputs is None:
        encoder_outputs = model.model.encoder(input_features, allow_short=allow_short)
    hidden, length = encoder_outputs.last_hidden_state, prompt.shape[1] + config.new_tokens(prompt.shape[1])
    if drafted is not None:
        draft_step = draft_cache = None  # the text itself drafts
        if assistant_graphdef is not None:
            assistant = nnx.merge(assistant_graphdef, assistant_state)
            heard = hidden
            if isinstance(assistant, WhisperForConditionalGeneration):
                heard = assistant.model.encoder(input_features, allow_short=allow_short).last_hidden_state
            draft_step, draft_cache = assistant.several, assistant.model.decoder.start(heard, length + drafted)
        return assisted_generate(
            model.several,
            draft_step,
            model.model.decoder.start(hidden, length + drafted),
            draft_cache,
            prompt,
            config,
            num_assistant_tokens=drafted,
            max_matching_ngram_size=matching,
            logits_processors=rules,
            max_new_tokens=limit,
        )
    cache = model.start(hidden, length)
    return generate(
        model.step,
        cache,
        prompt,
        config,
        prefill=model.prefill,
        max_new_tokens=limit,
        key=key,
        logits_processors=rules,
        streamer=streamer,
    )


@partial(jax.jit, static_argnames=("graphdef",))
def _detect_language(
    graphdef: Any, state: Any, input_features: jax.Array | None, encoder_outputs: BaseModelOutput | None
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    if encoder_outputs is None:
        encoder_outputs = model.model.encoder(input_features)
    hidden = encoder_outputs.last_hidden_state
    start = jnp.full((hidden.shape[0], 1), model.generation_config.decoder_start_token_id)
    logits = model.head(model.model.decoder(start, None, hidden).last_hidden_state)[:, 0]
    languages = jnp.asarray([token for _, token in model.generation_config.lang_to_id])
    return jax.nn.softmax(at_least_float32(logits[:, languages]), axis=-1)


def _marked(cache: WhisperCache) -> WhisperCache:
    """Tell the search which arrays grow with the tokens and which all beams share."""
    mark: Any = Growing
    own = tuple(KeyValues(mark(kv.key, 2), mark(kv.value, 2)) for kv in cache.self_attention)
    return WhisperCache(own, Shared(cache.cross_attention))  # type: ignore[arg-type]


def _unmarked(cache: Any) -> WhisperCache:
    own = tuple(KeyValues(kv.key.value, kv.value.value) for kv in cache.self_attention)
    return WhisperCache(own, cache.cross_attention.value)


class WhisperDecoderWrapper(nnx.Module):
    """Not in the paper; in the released checkpoints: gives a decoder alone the parameter names of the whole model."""

    def __init__(self, config: WhisperConfig, **kwargs: Any):
        self.decoder = WhisperDecoder(config, **kwargs)


class WhisperForCausalLM(WhisperLanguageModel):
    """Not in the paper; in the released checkpoints: the decoder alone, to draft for a model with the same encoder."""

    def __init__(self, config: WhisperConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.model = WhisperDecoderWrapper(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        attention_mask: Int[Array, "batch keys"] | None = None,
        encoder_outputs: BaseModelOutput | Float[Array, "batch frames d_model"] | None = None,
        *,
        labels: Int[Array, "batch time"] | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Logits for every token, against `encoder_outputs` of the model that it drafts for.

        Args:
            input_ids: tokens.
            attention_mask: 1 where a token is real.
            encoder_outputs: encoded audio.
            labels: targets, not shifted: `labels[:, t]` is what should follow token `t`; -100 where there is none.
            options: see `WhisperDecoder`.
        """
        if isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = encoder_outputs.last_hidden_state
        decoded = self.model.decoder(input_ids, attention_mask, encoder_outputs, **options)
        logits = self.head(decoded.last_hidden_state)
        return CausalLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )


class WhisperForAudioClassification(nnx.Module):
    """Not in the paper; in the released checkpoints: the encoder with a classifier on the mean of its frames."""

    def __init__(self, config: WhisperConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = WhisperEncoder(config, **kwargs)
        if config.use_weighted_layer_sum:
            states = config.encoder_layers + 1
            self.layer_weights = nnx.Param(jnp.full((states,), 1.0 / states, param_dtype))
        self.projector = Linear(config.d_model, config.classifier_proj_size, **kwargs)
        self.classifier = Linear(config.classifier_proj_size, config.num_labels, **kwargs)
        self.config = config

    def __call__(
        self,
        input_features: Float[Array, "batch mels time"] | None = None,
        *,
        encoder_outputs: BaseModelOutput | None = None,
        labels: Int[Array, " batch"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        allow_short: bool = False,
        key: jax.Array | None = None,
    ) -> SequenceClassifierOutput:
        """Class logits and, with `labels`, their cross-entropy.

        Args:
            input_features: log-mel spectrogram.
            encoder_outputs: an earlier call's encoding instead; with all hidden states if the model mixes layers.
            labels: the class of each item.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            allow_short: accept less than 30 s; see `WhisperEncoder`.
            key: switches dropout and layer drop on.
        """
        mixed = self.config.use_weighted_layer_sum
        if encoder_outputs is None:
            if input_features is None:
                raise UsageError("Give the model input_features, or encoder_outputs of an earlier call.")
            encoder_outputs = self.encoder(
                input_features,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states or mixed,
                allow_short=allow_short,
                key=key,
            )
        x = encoder_outputs.last_hidden_state
        if mixed:
            weights = jax.nn.softmax(at_least_float32(self.layer_weights[...]))
            states = jnp.stack(all_states(encoder_outputs.hidden_states or ()))
            x = jnp.einsum("l,lbtd->btd", weights, states).astype(jnp.result_type(self.layer_weights, x))
        pooled = self.projector(x).mean(axis=1)
        logits = self.classifier(pooled)
        return SequenceClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
        )


def transcribe(model: WhisperForConditionalGeneration, processor: Any, audio: Any, **options: Any) -> Any:
    """§4.5: text, segments and, if wanted, words of a recording of any length; see `audiozoo.decoding.long_form`."""
    return long_form.transcribe(model, processor, audio, **options)


def align(
    model: WhisperForConditionalGeneration, processor: Any, audio: Any, text: str, **options: Any
) -> list[dict[str, Any]]:
    """Not in the paper: when the words of a known text are said; see `audiozoo.decoding.long_form`."""
    return long_form.align(model, processor, audio, text, **options)
