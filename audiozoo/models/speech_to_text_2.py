r"""# Speech2Text2: Large-Scale Self- and Semi-Supervised Learning for Speech Translation

Changhan Wang, Anne Wu, Juan Pino, Alexei Baevski, Michael Auli, Alexis Conneau, 2021, arXiv 2104.06678.

A translator of speech whose ears were trained on speech alone: wav2vec 2.0, pre-trained on 60,000 hours of Libri-Light,
gets a small Transformer decoder, and both are trained on what few translations there are. What the paper adds is data
for nothing: the translator's own output on unlabelled speech is trained on once more (self-training), and a language
model of the target language, trained on web text, has a say in the beam search.

    waveform ── wav2vec 2.0 LARGE (Libri-Light) ──> (frames, 1024) ── linear ──> memory (frames, d)
    </s> y_1 y_2 … ── embedding · √d + sinusoids ── N × [causal self-attention ── LN, attention to memory ── LN,
      MLP ── LN] ── head ──> log p(y_t | y_<t, x) + λ log p_LM(y_t | y_<t) ── beam search ──> translation

| paper | here |
| --- | --- |
| §2, Transformer decoder, LayerNorm after each part | `Speech2Text2Decoder`, `Speech2Text2DecoderLayer` |
| §2, decoder with its head | `Speech2Text2ForCausalLM`, `Speech2Text2Config` |
| §2, wav2vec 2.0 with the decoder behind it | `audiozoo.models.xls_r.SpeechEncoderDecoderModel` |
| §2, self-training on unlabelled speech | `pseudo_labels` |
| §2, decoding with a language model | `LanguageModelFusion`, `with_language_model`, `translate` |
| not in the paper; in the released checkpoints | `Speech2Text2DecoderWrapper` |

What differs from fairseq S2T's decoder, whose sinusoids and embedding it has: each LayerNorm comes after its part's
residual sum instead of before the part, so there is none at the end; and in the released checkpoints the head is a
matrix of its own. Any encoder of `audiozoo.models.xls_r.ENCODERS` can stand before it, frozen or not.

Checkpoints: `facebook/s2t-wav2vec2-large-en-{de,tr,ca,ar}`, and fairseq's `.pt` files of its `wav2vec_seq2seq`. They
load as a `SpeechEncoderDecoderModel`. `transformers` lost this decoder with version 5; what `audiozoo.export` writes
opens in 4.40.2, the last to run it.

    import audiozoo
    model = audiozoo.load("facebook/s2t-wav2vec2-large-en-de")
    processor = audiozoo.load_processor("facebook/s2t-wav2vec2-large-en-de")
    inputs = processor(waveform, sampling_rate=16_000)
    tokens = model.generate(**inputs, num_beams=5, max_length=200)
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
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.decoding import GenerateOutput, GenerationConfig
from audiozoo.decoding.encoders import given_speech
from audiozoo.errors import UsageError
from audiozoo.layers.basic import at_least_float32
from audiozoo.models.mbart import (
    DecoderStep,
    MBartCache,
    MBartConfig,
    MBartDecoderLayer,
    MBartForCausalLM,
    continue_text,
)
from audiozoo.models.speech_to_text import Speech2TextDecoder


@dataclass(frozen=True)
class Speech2Text2Config:
    """Sizes of a decoder; by default those of the released checkpoint's configuration class."""

    vocab_size: int = 10_000  # pieces of words; 10,224 in English to German
    d_model: int = 256  # width
    decoder_layers: int = 6  # blocks; 7 in the released checkpoints
    decoder_attention_heads: int = 4  # heads
    decoder_ffn_dim: int = 2048  # width inside the MLP
    activation_function: str = "relu"  # of the MLP
    dropout: float = 0.1  # after embedding, attention and MLP
    attention_dropout: float = 0.0  # on attention weights
    activation_dropout: float = 0.0  # inside the MLP
    decoder_layerdrop: float = 0.0  # chance that training skips a block
    init_std: float = 0.02  # standard deviation that embeddings start from
    scale_embedding: bool = True  # multiply embeddings by √d_model
    tie_word_embeddings: bool = True  # logits by the embedding itself; not so in the released checkpoints
    max_target_positions: int = 1024  # tokens in training; positions go on beyond
    pad_token_id: int = 1  # padding
    eos_token_id: int = 2  # ends a text, and begins the decoder's

    @property
    def text(self) -> MBartConfig:
        """The same in the terms of mBART's decoder, whose parts it is made of."""
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
    def covost_en_de(cls) -> Speech2Text2Config:
        """Not in the paper; the decoder in the released checkpoint of English to German: 7 blocks, its own head."""
        return cls(vocab_size=10_224, decoder_layers=7, tie_word_embeddings=False)


class Speech2Text2DecoderLayer(MBartDecoderLayer):
    r"""§2: $x \leftarrow \operatorname{LN}(x + f(x))$ for self-attention, attention to the encoder and MLP."""

    norm_first = False


class Speech2Text2Decoder(Speech2TextDecoder):
    """§2: scaled token embeddings with positions, post-norm blocks, and no LayerNorm at the end."""

    layer_class: ClassVar[Any] = Speech2Text2DecoderLayer
    last_norm: ClassVar[bool] = False


class Speech2Text2DecoderWrapper(nnx.Module):
    """Not in the paper; in the released checkpoints: a level of names around the decoder."""

    def __init__(self, config: Speech2Text2Config, **kwargs: Any):
        self.decoder = Speech2Text2Decoder(config.text, **kwargs)


class Speech2Text2ForCausalLM(MBartForCausalLM):
    """§2: the decoder with its head, called as `MBartForCausalLM` is; by itself it is a language model."""

    wrapper_class: ClassVar[Any] = Speech2Text2DecoderWrapper


# --- §2, decoding with a language model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModelFusion:
    r"""§2, shallow fusion: $\log p(y_t \mid y_{<t}, x) + \lambda \log p_{LM}(y_t \mid y_{<t})$ at every step.

    Attributes:
        model: a decoder without an encoder, of the same vocabulary (`Speech2Text2ForCausalLM`, `MBartForCausalLM`).
        weight: λ.
    """

    model: Any
    weight: float = 0.3


def translate(
    model: Any,
    input_values: Float[Array, "batch steps *bands"] | None = None,
    attention_mask: Int[Array, "batch steps"] | None = None,
    *,
    input_features: Float[Array, "batch steps bands"] | None = None,
    fusion: LanguageModelFusion | None = None,
    **options: Any,
) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
    """§2: what `model.generate` does, with a language model in the beam search.

    Args:
        model: a `SpeechEncoderDecoderModel`.
        input_values: waveforms at 16 kHz, or what else the encoder reads.
        attention_mask: 1 for a sample, or a step, of the recording, 0 for padding behind it.
        input_features: what an encoder reads that hears no waveforms (w2v-BERT), in place of `input_values`.
        fusion: the language model and its weight; without it this is `model.generate`.
        options: as for `transformers.generate`; by default the checkpoint's, or else five beams.

    Returns:
        Tokens, the beginning included, padded to the longest; with `return_dict_in_generate=True` a `GenerateOutput`.
    """
    heard = given_speech(input_values, input_features)
    options = {"num_beams": dict(model.generation_config.options).get("num_beams", 5)} | options
    if fusion is None:
        return model.generate(heard, attention_mask, **options)
    config, chosen = model.config, model.search_config(**options)
    if fusion.weight < 0 or fusion.model.config.vocab_size != config.decoder.vocab_size:
        raise UsageError(
            f"A language model needs a weight of at least 0 and the translator's {config.decoder.vocab_size} tokens; "
            f"this one has {fusion.weight} and {fusion.model.config.vocab_size}."
        )
    chosen = chosen.replace(suppress_tokens=(*(chosen.suppress_tokens or ()), config.decoder.vocab_size))
    prompt = jnp.full((len(heard), 1), config.decoder_start_token_id, jnp.int32)
    mask = None if attention_mask is None else jnp.asarray(attention_mask)
    output = _translate(
        *nnx.split(model),
        *nnx.split(fusion.model),
        jnp.asarray(heard),
        mask,
        prompt,
        fusion.weight,
        config=chosen,
    ).trim()
    return output if chosen.return_dict_in_generate else np.asarray(output.sequences)


@partial(jax.jit, static_argnames=("graphdef", "language_graphdef", "config"))
def _translate(
    graphdef: Any,
    state: Any,
    language_graphdef: Any,
    language_state: Any,
    heard: jax.Array,
    attention_mask: jax.Array | None,
    prompt: jax.Array,
    weight: jax.Array,
    *,
    config: GenerationConfig,
) -> GenerateOutput:
    model, language = nnx.merge(graphdef, state), nnx.merge(language_graphdef, language_state)
    encoded, mask = model.encode(heard, attention_mask)
    room = prompt.shape[1] + config.new_tokens(prompt.shape[1])

    def decode(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        said = model.decoder(tokens, encoder_attention_mask=rows, past_key_values=past, cache_position=position)
        return said.logits, said.past_key_values

    start = model.decoder.model.decoder.start(encoded.last_hidden_state, room)
    return continue_text(*with_language_model(decode, start, language, weight), mask, prompt, config)


def with_language_model(
    decode: DecoderStep, cache: MBartCache, language: Any, weight: float | Float[Array, ""]
) -> tuple[DecoderStep, MBartCache]:
    """§2, shallow fusion: the same step and cache with a language model beside the decoder.

    Its scores are log-probabilities of every token and, so that a softmax leaves them as they are, of one more, which
    takes what is missing to 1 and which no text may hold: the search has to suppress it, and with it the last tokens of
    a decoder that has more of them than the language model.

    Args:
        decode: one step of a decoder.
        cache: its `start`.
        language: a decoder without an encoder.
        weight: λ.
    """
    own, author = cache.self_attention, language.model.decoder
    blocks = len(own)
    nothing = author.embed_tokens(jnp.zeros((len(own[0].key), 1), jnp.int32))
    read = author.start(nothing, cache.length).self_attention

    def both(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        heard = MBartCache(past.self_attention[:blocks], past.cross_attention)
        written = MBartCache(past.self_attention[blocks:], (None,) * len(read))
        said, heard = decode(tokens, rows, heard, position)
        liked = language(tokens, past_key_values=written, cache_position=position)
        opinion = jax.nn.log_softmax(at_least_float32(liked.logits[:, -said.shape[1] :]))
        opinion = jnp.pad(opinion, ((0, 0), (0, 0), (0, said.shape[2] - opinion.shape[2])))
        scores = jax.nn.log_softmax(at_least_float32(said)) + weight * opinion
        missing = 1 - jnp.exp(scores).sum(axis=-1, keepdims=True)
        scores = jnp.concatenate([scores, jnp.log(jnp.maximum(missing, 1e-30))], axis=-1)
        states = (*heard.self_attention, *liked.past_key_values.self_attention)
        return scores, MBartCache(states, past.cross_attention)

    # One cache for both: the decoder's blocks, then those of the language model, which attend to no encoder.
    return both, MBartCache((*own, *read), cache.cross_attention)


# --- §2, self-training ------------------------------------------------------------------------------------------------


def pseudo_labels(
    model: Any,
    batches: Sequence[dict[str, Any]],
    *,
    fusion: LanguageModelFusion | None = None,
    ignored: int = -100,
    **options: Any,
) -> Iterator[Int[np.ndarray, "batch tokens"]]:
    """§2: translations of unlabelled speech by the model itself, as the `labels` of a second round of training.

    Args:
        model: a `SpeechEncoderDecoderModel`, trained on the translations that there are.
        batches: the processor's outputs.
        fusion: a language model to search with.
        ignored: the label of padding.
        options: of `translate`.
    """
    for batch in batches:
        tokens = np.asarray(translate(model, **batch, fusion=fusion, **options))[:, 1:]
        ended = np.cumsum(tokens == model.config.eos_token_id, axis=1) - (tokens == model.config.eos_token_id) > 0
        yield np.where(ended, ignored, tokens)
