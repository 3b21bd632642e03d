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
| §4.1, w2v-BERT 2.0: a Conformer | `SeamlessM4TFeatureProjection`, `audiozoo.models.conformer` |
| §4.1 and §4.2.3, both, and the adaptor behind them | `SeamlessM4TSpeechEncoder` |
| §4.2.3, length adaptor: one frame in eight | `audiozoo.models.conformer.LengthAdaptorLayer` |
| §4.2, text encoder and decoder: NLLB | `audiozoo.models.nllb` |
| §4.3, text to units (UnitY, arXiv 2212.08055) | `SeamlessM4TTextToUnitModel`, `…ForConditionalGeneration` |
| §4.3, vocoder of units | `audiozoo.models.speech_resynthesis` |
| §4, Fig. 4: T2TT; S2TT and ASR; T2ST; S2ST; all | `SeamlessM4TFor…To…`, `SeamlessM4TModel` |
| the same, what these share | `SeamlessM4TPreTrainedModel` |
| §4.2.3, Eq. 3 to 5, X2T: speech and text into text, with distillation | `into_text_losses` |
| §4.3.3, fine-tuning: smoothed cross-entropy of text and units | `finetuning_losses`, `SeamlessM4TRecipe` |
| Table 13, sizes | `SeamlessM4TConfig.large()`, `.medium()` |

What is not here: how NLLB was trained beforehand, and the extractor of units (XLS-R and k-means). How w2v-BERT
is trained, as far as it is published, is in `audiozoo.models.wav2vec2_bert`.

What differs from `transformers`: an item of a batch gives what it gives alone; of speech, with `batch_invariant=True`,
for without it the padding of a batch reaches an item's last state through the length adaptor, as there. There also,
behind the first of several layers of the adaptor padding counts as speech; and a text that ends early in a beam search
is filled up with its end instead of padding (0 is taken for "no padding"), and those ends are spoken too. As there, the
text-to-unit model also reads the state of a text's end, which the authors cut off, in training too.

Checkpoints: `facebook/hf-seamless-m4t-medium`, `facebook/hf-seamless-m4t-large`, and the authors' own
`multitask_unity_medium.pt` and `multitask_unity_large.pt`, with `vocoder_36langs.pt` beside them.

    import audiozoo
    model = audiozoo.load("facebook/hf-seamless-m4t-medium")
    processor = audiozoo.load_processor("facebook/hf-seamless-m4t-medium")
    inputs = processor(audio=waveform, sampling_rate=16_000)
    tokens = model.generate(**inputs, tgt_lang="spa", generate_speech=False).sequences
    text = processor.batch_decode(tokens, skip_special_tokens=True)
    waveform, lengths = model.generate(**processor(text=text, src_lang="spa"), tgt_lang="eng")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.configs import restore_parts
from audiozoo.decoding import GenerateOutput, GenerationConfig
from audiozoo.decoding.generate import Streamer
from audiozoo.decoding.synthesis import bucket
from audiozoo.errors import UsageError
from audiozoo.layers import Dropout, LayerNorm, Linear, check_frames, check_ids
from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.losses import IGNORED_LABEL, cross_entropy, shift_tokens_right
from audiozoo.models.conformer import ConformerConfig, ConformerEncoder, ConformerFeedForward, LengthAdaptorLayer
from audiozoo.models.mbart import MBartCache, continue_text
from audiozoo.models.nllb import NllbConfig, NllbDecoder, NllbEncoder
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig, SeamlessM4TCodeHifiGan
from audiozoo.models.speech_to_text import label_smoothed_cross_entropy
from audiozoo.outputs import ABSENT, BaseModelOutput, DecoderOutput, ModelOutput, Seq2SeqLMOutput

VOCODER = CodeHifiGanConfig()


@dataclass(frozen=True)
class SeamlessM4TConfig:
    """Sizes of one checkpoint (§4 and Table 13), under the names that `transformers` gives them."""

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

    # --- speech encoder, w2v-BERT 2.0 and the length adaptor (§4.1, §4.2.3)
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
    t2u_max_new_tokens: int = 1024  # the most units
    t2u_pad_token_id: int = 1  # padding
    t2u_bos_token_id: int = 0  # kept for export: no sequence begins with it
    t2u_eos_token_id: int = 2  # ends a sequence of units
    t2u_decoder_start_token_id: int = 2  # what its decoder reads first

    # --- vocoder (§4.3)
    vocoder: CodeHifiGanConfig = VOCODER  # its sizes
    vocoder_offset: int = 4  # control symbols in front of the units of the text-to-unit model
    sampling_rate: int = 16_000  # Hz of the speech that comes in and goes out

    def __post_init__(self) -> None:
        restore_parts(self, vocoder=CodeHifiGanConfig)

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
        """Table 13, SeamlessM4T-Large: 2.3 B parameters."""
        return cls()

    @classmethod
    def medium(cls) -> SeamlessM4TConfig:
        """Table 13, SeamlessM4T-Medium: 1.2 B parameters."""
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


class SeamlessM4TSpeechEncoder(nnx.Module):
    """§4.1 and §4.2.3: w2v-BERT 2.0, half a feed-forward network, and the length adaptor: 160 ms a frame."""

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.feature_projection = SeamlessM4TFeatureProjection(config, **kwargs)
        self.encoder = ConformerEncoder(config.conformer, **kwargs)
        self.intermediate_ffn = ConformerFeedForward(config.conformer, act="relu", dropout=0.0, **kwargs)
        layers = config.num_adapter_layers if config.add_adapter else 0
        pooling: dict[str, Any] = {"taps": config.adaptor_kernel_size, "stride": config.adaptor_stride, "act": "relu"}
        pooling |= {"dropout": config.adaptor_dropout, "ffn_dropout": config.adaptor_dropout}
        self.adapter = nnx.List([LengthAdaptorLayer(config.conformer, **pooling, **kwargs) for _ in range(layers)])
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
        batch_invariant: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> BaseModelOutput:
        """Encode speech.

        Args:
            input_features: pairs of log-mel frames, 20 ms each.
            attention_mask: 1 for speech, 0 for padding behind it.
            batch_invariant: keep the padding out of the length adaptor too, so that an item of a padded batch gives
                what it gives alone.
            output_attentions: return the Conformer's attention weights.
            output_hidden_states: return the input of every Conformer block, and the output.
            key: switches dropout and layer drop on, and normalises batches by their own statistics.

        Raises:
            UsageError: for features of another width, and for none.
        """
        dropout = Dropout(key)
        check_frames(input_features, self.config.feature_projection_input_dim)
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
            real = None
            if lengths is not None:
                real = jnp.arange(x.shape[1]) < lengths[:, None] if batch_invariant else None
                lengths = self.config.pooled(lengths)
            x = layer(x, lengths, real, dropout=dropout)
        x = self.inner_layer_norm(x)
        states = encoded.hidden_states
        return BaseModelOutput(x, None if states is None else (*states[:-1], x), encoded.attentions)


# --- §4.3, text to units ----------------------------------------------------------------------------------------------


class SeamlessM4TTextToUnitModel(nnx.Module):
    """§4.3, the text-to-unit encoder and decoder: NLLB's, smaller; the encoder reads the text decoder's states."""

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = NllbEncoder(config.units, **kwargs)
        self.decoder = NllbDecoder(config.units, **kwargs)


class SeamlessM4TTextToUnitForConditionalGeneration(nnx.Module):
    """§4.3, the text-to-unit model with its head, which is the units' embedding."""

    static_arguments = ("label_smoothing",)

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.model = SeamlessM4TTextToUnitModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config

    def head(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time units"]:
        """Logits of the units."""
        return self.model.decoder.embed_tokens.attend(x)

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch time hidden"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch units"] | None = None,
        decoder_attention_mask: Int[Array, "batch units"] | Bool[Array, "batch units"] | None = None,
        *,
        labels: Int[Array, "batch units"] | None = None,
        label_smoothing: float = 0.0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits of each unit given those before it, and with `labels` their mean cross-entropy.

        Args:
            inputs_embeds: the text decoder's states.
            attention_mask: 1 where there is a token, 0 for padding.
            decoder_input_ids: units, control symbols counted; by default `labels` shifted right.
            decoder_attention_mask: 1 where one of these is real.
            labels: wanted units, -100 where there is none.
            label_smoothing: of the loss.
            output_attentions: return attention weights.
            output_hidden_states: return the states between blocks.
            key: switches dropout and layer drop on.

        Raises:
            UsageError: if there are neither units nor labels.
        """
        config = self.config
        if decoder_input_ids is None:
            decoder_input_ids = inputs_of(labels, config.t2u_pad_token_id, config.t2u_decoder_start_token_id)
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        keys = [None, None] if key is None else list(jax.random.split(key))
        encoded = self.model.encoder(inputs_embeds, attention_mask, key=keys[0], **asked)
        decoded = self.model.decoder(
            decoder_input_ids, decoder_attention_mask, encoded.last_hidden_state, attention_mask, key=keys[1], **asked
        )
        return written(self.head(decoded.last_hidden_state), encoded, decoded, labels, label_smoothing)


def inputs_of(labels: Int[Array, "batch time"] | None, pad: int, start: int) -> Int[Array, "batch time"]:
    """Not in the paper: the labels one later, for teacher forcing.

    Raises:
        UsageError: if there are none.
    """
    if labels is None:
        raise UsageError("Give decoder_input_ids or labels; generate makes text without them.")
    return shift_tokens_right(jnp.asarray(labels), pad, start)


def written(
    logits: Float[Array, "batch time vocabulary"],
    encoded: BaseModelOutput,
    decoded: DecoderOutput,
    labels: Int[Array, "batch time"] | None,
    label_smoothing: float,
) -> Seq2SeqLMOutput:
    """Not in the paper: what an encoder and a decoder returned, under the names of `transformers`."""
    loss = None
    if labels is not None:
        loss = cross_entropy(logits, jnp.asarray(labels), label_smoothing=label_smoothing)
    return Seq2SeqLMOutput(
        loss=loss,
        logits=logits,
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
        cross_attentions=decoded.cross_attentions,
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


# --- §4, the whole model ----------------------------------------------------------------------------------------------

Pairs = tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class SeamlessM4TGenerationConfig:
    """Not in the paper; in the released checkpoints' `generation_config.json`. Tables are tuples of pairs."""

    text_decoder_lang_to_code_id: Pairs = ()  # language -> the token that a text in it begins with
    t2u_lang_code_to_id: Pairs = ()  # language -> the symbol that its units begin with
    vocoder_lang_code_to_id: Pairs = ()  # language -> the vocoder's number for it
    options: Pairs = ()  # of the search for text, as for `transformers.GenerationConfig`

    def text_language(self, tgt_lang: str) -> int:
        """The token that a text in that language begins with; `eng` and `__eng__` are the same.

        Raises:
            UsageError: if the model does not write it.
        """
        return _language(self.text_decoder_lang_to_code_id, tgt_lang, "write")

    def unit_language(self, tgt_lang: str) -> int:
        """The symbol that units of a language begin with.

        Raises:
            UsageError: if the model does not speak it.
        """
        return _language(self.t2u_lang_code_to_id, tgt_lang, "speak")

    def speech_language(self, tgt_lang: str) -> int:
        """The vocoder's number for a language.

        Raises:
            UsageError: if the model does not speak it.
        """
        return _language(self.vocoder_lang_code_to_id, tgt_lang, "speak")


def _language(table: Pairs, tgt_lang: str, does: str) -> int:
    known, name = dict(table), tgt_lang.replace("__", "")
    if name not in known:
        there = f"it has {', '.join(sorted(known))}" if known else "its generation_config.json names no languages"
        raise UsageError(f"This model does not {does} {tgt_lang!r}; {there}.")
    return int(known[name])


class SeamlessM4TGenerationOutput(ModelOutput):
    """Not in the paper: what `generate` returns with `return_intermediate_token_ids`."""

    waveform: Float[np.ndarray, "batch samples"] = ABSENT
    waveform_lengths: Int[np.ndarray, " batch"] = ABSENT
    sequences: Int[np.ndarray, "batch tokens"] = ABSENT
    unit_sequences: Int[np.ndarray, "batch units"] = ABSENT


class SeamlessM4TPreTrainedModel(nnx.Module):
    """§4, Fig. 4: what the classes below share; each of them has some of the model's parts."""

    parts: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[Any] = SeamlessM4TGenerationConfig
    static_arguments = ("label_smoothing",)

    def __init__(self, config: SeamlessM4TConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if "text_encoder" in self.parts:
            self.text_encoder = NllbEncoder(config.text, **kwargs)
        if "speech_encoder" in self.parts:
            self.speech_encoder = SeamlessM4TSpeechEncoder(config, **kwargs)
        self.text_decoder = NllbDecoder(config.text, **kwargs)  # its embedding is the encoder's and the head's too
        if "vocoder" in self.parts:
            self.add_speech(config, **kwargs)
        self.config = config
        self.generation_config = self.settings()

    def add_speech(self, config: SeamlessM4TConfig, **kwargs: Any) -> None:
        """The parts that speak."""
        self.t2u_model: Any = SeamlessM4TTextToUnitForConditionalGeneration(config, **kwargs)
        self.vocoder: Any = SeamlessM4TCodeHifiGan(config.vocoder, **kwargs)

    def encode(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        input_features: Float[Array, "batch time bands"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        batch_invariant: bool = False,
        **options: Any,
    ) -> tuple[BaseModelOutput, Bool[Array, "batch frames"] | None]:
        """What the text decoder attends to, of speech or of text, and which of it is real.

        Raises:
            UsageError: if there is neither speech nor text.
        """
        if input_features is not None:
            options["batch_invariant"] = batch_invariant  # the text encoder always is
            encoded = self.speech_encoder(input_features, attention_mask, **options)
            return encoded, self.speech_encoder.frame_mask(attention_mask, encoded.last_hidden_state.shape[1])
        if input_ids is None:
            raise UsageError("Give input_features (speech) or input_ids (text).")
        embedded = self.text_decoder.embed_tokens(input_ids)
        encoded = self.text_encoder(embedded, attention_mask, input_ids=input_ids, **options)
        return encoded, None if attention_mask is None else attention_mask != 0

    def _forward(
        self,
        attention_mask: Int[Array, "batch time"] | None,
        decoder_input_ids: Int[Array, "batch tokens"] | None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None,
        *,
        input_ids: Int[Array, "batch time"] | None = None,
        input_features: Float[Array, "batch time bands"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        label_smoothing: float = 0.0,
        batch_invariant: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqLMOutput:
        config = self.config
        if decoder_input_ids is None:
            decoder_input_ids = inputs_of(labels, config.pad_token_id, config.decoder_start_token_id)
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        keys = [None, None] if key is None else list(jax.random.split(key))
        encoded, mask = self.encode(
            input_ids, input_features, attention_mask, batch_invariant=batch_invariant, key=keys[0], **asked
        )
        decoded = self.text_decoder(
            decoder_input_ids, decoder_attention_mask, encoded.last_hidden_state, mask, key=keys[1], **asked
        )
        logits = self.text_decoder.embed_tokens.attend(decoded.last_hidden_state)
        return written(logits, encoded, decoded, labels, label_smoothing)

    def write_text(
        self,
        inputs: dict[str, Any],
        tgt_lang: str | None,
        *,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        batch_invariant: bool = False,
        key: jax.Array | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> tuple[GenerateOutput, jax.Array, jax.Array | None]:
        """§4.3, the first half: the translated text, the states that it was written from, and which of them are real.

        Args:
            inputs: `input_ids` or `input_features`.
            tgt_lang: into which language.
            attention_mask: 1 where the input is real; by default, of text, where it is not padding.
            decoder_input_ids: the text's beginning, in place of `tgt_lang`.
            batch_invariant: of speech, keep the padding out of the length adaptor too.
            key: randomness, for sampling.
            streamer: called on the host with every token.
            options: as for `transformers.generate`.
        """
        config = self.config
        defaults: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
        defaults |= {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        defaults |= dict(self.generation_config.options)
        chosen = GenerationConfig.over(defaults, options)
        given = next((x for x in inputs.values() if x is not None), None)
        if given is None:
            raise UsageError("Give input_features (speech) or input_ids (text).")
        if 0 in np.shape(given)[:2]:
            raise UsageError("There is nothing to translate: the input is empty.")
        if tgt_lang is not None:
            language = self.generation_config.text_language(tgt_lang)
            prompt = np.full((len(given), 1), language)
        elif decoder_input_ids is not None:
            prompt = np.asarray(decoder_input_ids)
        else:
            raise UsageError("Say into which language: tgt_lang, or decoder_input_ids.")
        if (prompt[:, 0] != config.decoder_start_token_id).any():
            prompt = np.concatenate([np.full((len(prompt), 1), config.decoder_start_token_id), prompt], axis=1)
        check_ids(prompt, config.vocab_size)
        if "input_ids" in inputs:
            check_ids(inputs["input_ids"], config.vocab_size)
        output, memory, mask = _write(
            *nnx.split(self),
            {name: jnp.asarray(x) for name, x in inputs.items()},
            None if attention_mask is None else jnp.asarray(attention_mask),
            jnp.asarray(prompt, jnp.int32),
            key,
            config=chosen,
            batch_invariant=batch_invariant,
            streamer=streamer,
        )
        return output.trim(), memory, mask

    def generate_text(
        self, tgt_lang: str | None = None, *, input_ids: Any = None, input_features: Any = None, **options: Any
    ) -> GenerateOutput:
        """§4.2: the translated text alone; a model that speaks also writes languages that it has no voice for.

        Args:
            tgt_lang: into which language.
            input_ids: the text to translate.
            input_features: speech, in place of text.
            options: of `write_text`.
        """
        inputs = {"input_ids": input_ids} if input_features is None else {"input_features": input_features}
        return self.write_text(inputs, tgt_lang, **options)[0]

    def _speak(
        self,
        inputs: dict[str, Any],
        tgt_lang: str | None,
        speaker_id: int,
        return_intermediate_token_ids: bool,
        key: jax.Array | None,
        **options: Any,
    ) -> Speech:
        """Translated speech: the text, the second pass of its decoder, units, a waveform."""
        if tgt_lang is None:
            raise UsageError("Say into which language: speech needs tgt_lang.")
        language = self.generation_config.speech_language(tgt_lang)
        of_text, of_units = split_options(options)
        keys = [None, None] if key is None else list(jax.random.split(key))
        text, memory, mask = self.write_text(inputs, tgt_lang, key=keys[0], **of_text)
        sequences = np.asarray(text.sequences)
        several = len(sequences) // len(memory)
        if several > 1:  # of several texts, the best
            if text.sequences_scores is None:
                raise UsageError("Of several sampled texts none is the best: speech takes one, or beams.")
            best = np.argmax(np.asarray(text.sequences_scores).reshape(-1, several), axis=1)
            sequences = sequences[best + several * np.arange(len(memory))]
        units, spoken, lengths = write_units(self, sequences, memory, mask, tgt_lang, key=keys[1], **of_units)
        waveform, waveform_lengths = self.vocoder.speak(spoken, speaker_id, language, lengths=lengths)
        if not return_intermediate_token_ids:
            return waveform, waveform_lengths
        return SeamlessM4TGenerationOutput(waveform, waveform_lengths, sequences, units)


Speech = tuple[Float[np.ndarray, "batch samples"], Int[np.ndarray, " batch"]] | SeamlessM4TGenerationOutput


ONLY_OF_TEXT = ("attention_mask", "decoder_input_ids", "batch_invariant", "streamer", "max_length")


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Not in the paper: `text_…` options for the text, `speech_…` for the units, others but `ONLY_OF_TEXT` for both."""
    both = {name: value for name, value in options.items() if not name.startswith(("text_", "speech_"))}

    def of(side: str) -> dict[str, Any]:
        return {name.removeprefix(side): value for name, value in options.items() if name.startswith(side)}

    of_both = {name: value for name, value in both.items() if name not in ONLY_OF_TEXT}
    return both | of("text_"), of_both | of("speech_")


def vocoder_units(
    units: Int[np.ndarray, "batch time"], mask: Bool[np.ndarray, "batch time"], config: SeamlessM4TConfig
) -> Int[np.ndarray, "batch time"]:
    """Not in the paper; in the released code: the vocoder's units, counted without control symbols.

    Whatever the vocoder has no unit for is its padding.
    """
    moved = units - config.vocoder_offset
    known = mask & (moved >= 0) & (moved < config.vocoder.unit_hifi_gan_vocab_size)
    return np.where(known, moved, config.t2u_pad_token_id)


def write_units(
    model: Any,
    sequences: Int[np.ndarray, "batch tokens"],
    memory: Float[Array, "batch frames hidden"],
    mask: Bool[Array, "batch frames"] | None,
    tgt_lang: str,
    *,
    key: jax.Array | None = None,
    **options: Any,
) -> tuple[Int[np.ndarray, "rows units"], Int[np.ndarray, "rows time"], Int[np.ndarray, " rows"]]:
    """§4.3, the second half: units of a text, as they were written, and as the vocoder reads them with their number.

    Args:
        model: a `SeamlessM4TModel`, or one that speaks.
        sequences: the text's tokens.
        memory: the states that it was written from.
        mask: which of them are real.
        tgt_lang: the text's language.
        key: randomness, for sampling.
        options: as for `transformers.generate`.
    """
    config = model.config
    defaults: dict[str, Any] = {"max_new_tokens": config.t2u_max_new_tokens}
    defaults |= {"eos_token_id": config.t2u_eos_token_id, "pad_token_id": config.t2u_pad_token_id}
    chosen = GenerationConfig.over(defaults, options)
    language = model.generation_config.unit_language(tgt_lang)
    prompt = jnp.broadcast_to(jnp.asarray([config.t2u_eos_token_id, language], jnp.int32), (len(sequences), 2))
    padded = np.full((len(sequences), bucket(sequences.shape[1])), config.pad_token_id)
    padded[:, : sequences.shape[1]] = sequences
    graphdef, state = nnx.split(model)
    tokens = jnp.asarray(padded, jnp.int32)
    found = _to_units(graphdef, state, tokens, memory, mask, prompt, key, config=chosen).trim()
    units, lengths = np.asarray(found.sequences), np.asarray(found.lengths)
    ended = units[np.arange(len(units)), lengths - 1] == config.t2u_eos_token_id
    lengths = lengths - 2 - ended
    spoken = np.arange(units.shape[1] - 2) < lengths[:, None]
    return units, vocoder_units(units[:, 2:], spoken, config), lengths


@partial(jax.jit, static_argnames=("graphdef", "config", "batch_invariant", "streamer"))
def _write(
    graphdef: Any,
    state: Any,
    inputs: dict[str, jax.Array],
    attention_mask: jax.Array | None,
    prompt: jax.Array,
    key: jax.Array | None,
    *,
    config: GenerationConfig,
    batch_invariant: bool,
    streamer: Streamer | None,
) -> tuple[GenerateOutput, jax.Array, jax.Array | None]:
    """Encode once, and search for the text in one loop."""
    model = nnx.merge(graphdef, state)
    if attention_mask is None and "input_ids" in inputs:
        attention_mask = inputs["input_ids"] != model.config.pad_token_id
    encoded, mask = model.encode(attention_mask=attention_mask, batch_invariant=batch_invariant, **inputs)
    memory = encoded.last_hidden_state
    told: dict[str, Any] = {"encoder_tokens": inputs.get("input_ids"), "key": key, "streamer": streamer}
    return search(model.text_decoder, memory, mask, prompt, config, **told), memory, mask


@partial(jax.jit, static_argnames=("graphdef", "config"))
def _to_units(
    graphdef: Any,
    state: Any,
    tokens: jax.Array,
    memory: jax.Array,
    mask: jax.Array | None,
    prompt: jax.Array,
    key: jax.Array | None,
    *,
    config: GenerationConfig,
) -> GenerateOutput:
    """The text decoder once more, over the whole text; then a search for units."""
    model = nnx.merge(graphdef, state)
    states = model.text_decoder(tokens, None, memory, mask).last_hidden_state
    real = jnp.arange(tokens.shape[1]) < (tokens != model.config.pad_token_id).sum(axis=1)[:, None]
    t2u = model.t2u_model.model
    encoded = t2u.encoder(states, real).last_hidden_state
    return search(t2u.decoder, encoded, real, prompt, config, key=key)


def search(
    decoder: NllbDecoder,
    memory: Float[Array, "batch frames hidden"],
    mask: Bool[Array, "batch frames"] | None,
    prompt: Int[Array, "batch tokens"],
    config: GenerationConfig,
    **options: Any,
) -> GenerateOutput:
    """Not in the paper: continue `prompt` by a decoder whose embedding is its head; see `continue_text`."""
    cache = decoder.start(memory, prompt.shape[1] + config.new_tokens(prompt.shape[1]))

    def decode(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        out = decoder(tokens, encoder_attention_mask=rows, past_key_values=past, cache_position=position)
        return decoder.embed_tokens.attend(out.last_hidden_state), out.past_key_values

    return continue_text(decode, cache, mask, prompt, config, **options)


class SeamlessM4TForTextToText(SeamlessM4TPreTrainedModel):
    """§4.2: translation of text (T2TT)."""

    parts: ClassVar[tuple[str, ...]] = ("text_encoder",)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """Logits for every token and, with `labels`, their mean cross-entropy.

        Args:
            input_ids: the text to translate; its language stands in front.
            attention_mask: 1 for tokens, 0 for padding.
            decoder_input_ids: tokens of the translation; by default `labels` shifted right.
            decoder_attention_mask: 1 where one of these is real.
            options: `labels`, targets, -100 where there is none, with `label_smoothing`; `batch_invariant`, for speech;
                `output_attentions`; `output_hidden_states`; `key`, which switches dropout on.

        Raises:
            UsageError: if there are neither tokens nor labels.
        """
        return self._forward(attention_mask, decoder_input_ids, decoder_attention_mask, input_ids=input_ids, **options)

    def generate(
        self, input_ids: Int[Array, "batch time"], tgt_lang: str | None = None, **options: Any
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """Translate, by one compiled loop.

        Args:
            input_ids: the text to translate.
            tgt_lang: into which language.
            options: `attention_mask`; `decoder_input_ids` in place of `tgt_lang`; `batch_invariant`, for speech; `key`,
                randomness for `do_sample=True`; `streamer`, called on the host with every token; all others as for
                `transformers.generate`.

        Returns:
            Tokens, the end-of-text token and the language in front; with `return_dict_in_generate=True` a
            `GenerateOutput`.
        """
        output = self.generate_text(tgt_lang, input_ids=input_ids, **options)
        return output if options.get("return_dict_in_generate") else np.asarray(output.sequences)


class SeamlessM4TForSpeechToText(SeamlessM4TPreTrainedModel):
    """§4.1 and §4.2: recognition and translation of speech into text (ASR, S2TT)."""

    parts: ClassVar[tuple[str, ...]] = ("speech_encoder",)

    def __call__(
        self,
        input_features: Float[Array, "batch time bands"],
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """As `SeamlessM4TForTextToText`, of `input_features`: pairs of log-mel frames, 20 ms each."""
        return self._forward(
            attention_mask, decoder_input_ids, decoder_attention_mask, input_features=input_features, **options
        )

    def generate(
        self, input_features: Float[Array, "batch time bands"], tgt_lang: str | None = None, **options: Any
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """Recognise (into the language spoken) or translate; see `SeamlessM4TForTextToText`."""
        output = self.generate_text(tgt_lang, input_features=input_features, **options)
        return output if options.get("return_dict_in_generate") else np.asarray(output.sequences)


class SeamlessM4TForTextToSpeech(SeamlessM4TForTextToText):
    """§4.3: translation of text into speech (T2ST); the call is that of text to text."""

    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "vocoder")

    def generate(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch time"],
        return_intermediate_token_ids: bool = False,
        tgt_lang: str | None = None,
        spkr_id: int = 0,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Speech:
        """Translate and speak.

        Args:
            input_ids: the text to translate.
            return_intermediate_token_ids: also return the text's tokens and the units.
            tgt_lang: into which language.
            spkr_id: one of the vocoder's voices; `speaker_id` is the same. -1 is a speaker of the language, as the
                authors' pipeline has it.
            key: randomness, for sampling.
            options: as for text (`attention_mask`, `num_beams` …); with `text_` in front they are for the text alone,
                with `speech_` for the units alone.

        Returns:
            Waveforms, silent after each item's end, and the samples of each; or a `SeamlessM4TGenerationOutput`.
        """
        speaker = options.pop("speaker_id", spkr_id)
        return self._speak({"input_ids": input_ids}, tgt_lang, speaker, return_intermediate_token_ids, key, **options)


class SeamlessM4TForSpeechToSpeech(SeamlessM4TForSpeechToText):
    """§4.3: translation of speech into speech (S2ST); the call is that of speech to text."""

    parts: ClassVar[tuple[str, ...]] = ("speech_encoder", "vocoder")

    def generate(  # type: ignore[override]
        self,
        input_features: Float[Array, "batch time bands"],
        return_intermediate_token_ids: bool = False,
        tgt_lang: str | None = None,
        spkr_id: int = 0,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Speech:
        """Translate and speak; see `SeamlessM4TForTextToSpeech`."""
        speaker, inputs = options.pop("speaker_id", spkr_id), {"input_features": input_features}
        return self._speak(inputs, tgt_lang, speaker, return_intermediate_token_ids, key, **options)


class SeamlessM4TModel(SeamlessM4TPreTrainedModel):
    """§4, Fig. 4: all five tasks, by what goes in and by `generate_speech`."""

    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "speech_encoder", "vocoder")

    def __call__(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        input_features: Float[Array, "batch time bands"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """As `SeamlessM4TForTextToText`, of `input_ids` or, if they are given, of `input_features`."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "input_features": input_features}
        return self._forward(attention_mask, decoder_input_ids, decoder_attention_mask, **inputs, **options)

    def generate(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        input_features: Float[Array, "batch time bands"] | None = None,
        return_intermediate_token_ids: bool = False,
        tgt_lang: str | None = None,
        spkr_id: int = 0,
        generate_speech: bool = True,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Speech | GenerateOutput:
        """Translate text or, if it is given, speech, into speech; with `generate_speech=False` into text.

        The arguments are those of `SeamlessM4TForTextToSpeech`. Text comes back as a `GenerateOutput`, as there.
        """
        speaker = options.pop("speaker_id", spkr_id)
        if not generate_speech:
            of_text = split_options(options)[0]
            return self.generate_text(tgt_lang, input_ids=input_ids, input_features=input_features, key=key, **of_text)
        inputs = {"input_features": input_features} if input_features is not None else {"input_ids": input_ids}
        return self._speak(inputs, tgt_lang, speaker, return_intermediate_token_ids, key, **options)


# --- §4.2.3 and §4.3.3, training --------------------------------------------------------------------------------------


class SeamlessM4TLosses(ModelOutput):
    """§4.3.3: the loss of fine-tuning, and its two parts."""

    total: Float[Array, ""] = ABSENT
    text: Float[Array, ""] = ABSENT
    units: Float[Array, ""] | None = None


def finetuning_losses(
    model: Any,
    labels: Int[Array, "batch tokens"],
    unit_labels: Int[Array, "batch units"] | None = None,
    *,
    input_features: Float[Array, "batch time bands"] | None = None,
    input_ids: Int[Array, "batch time"] | None = None,
    attention_mask: Int[Array, "batch time"] | None = None,
    batch_invariant: bool = False,
    label_smoothing: float = 0.2,
    freeze_text: bool = False,
    key: jax.Array | None = None,
) -> SeamlessM4TLosses:
    r"""§4.3.3: $L_\text{S2T} + L_\text{S2U}$, the smoothed cross-entropies of text and units, each a mean over tokens.

    Both begin with their language, which is given and not learnt. The text-to-unit model reads the states in which the
    text decoder, forced to write the right text, stands.

    Args:
        model: with a speech or a text encoder, and for `unit_labels` with a text-to-unit model.
        labels: `<language> … </s>`, -100 behind it.
        unit_labels: `<language> … </s>`, control symbols counted, -100 behind it; without, text alone is learnt.
        input_features: speech.
        input_ids: text, in place of speech.
        attention_mask: 1 where the input is real.
        batch_invariant: of speech, keep the padding out of the length adaptor too.
        label_smoothing: $\epsilon$, which fairseq spreads over all tokens but the right one.
        freeze_text: only the text-to-unit model learns, as in the paper (the authors' mode TEXT_TO_SPEECH).
        key: switches dropout on.
    """
    config, keys = model.config, [None] * 4 if key is None else list(jax.random.split(key, 4))
    source = (input_ids, input_features, attention_mask)
    states, logits = _forced(model, labels, *source, batch_invariant=batch_invariant, keys=keys)
    if freeze_text:
        states, logits = jax.lax.stop_gradient((states, logits))
    text = label_smoothed_cross_entropy(logits, without_language(labels), label_smoothing)
    if unit_labels is None:
        return SeamlessM4TLosses(text, text)
    real, t2u = labels != IGNORED_LABEL, model.t2u_model.model
    memory = t2u.encoder(states, real, key=keys[2]).last_hidden_state
    units = inputs_of(unit_labels, config.t2u_pad_token_id, config.t2u_decoder_start_token_id)
    decoded = t2u.decoder(units, None, memory, real, key=keys[3]).last_hidden_state
    logits = model.t2u_model.head(decoded)
    spoken = label_smoothed_cross_entropy(logits, without_language(unit_labels), label_smoothing)
    return SeamlessM4TLosses(text + spoken, text, spoken)


def _forced(
    model: Any,
    labels: jax.Array,
    *source: jax.Array | None,
    batch_invariant: bool = False,
    keys: list[Any],
) -> tuple[jax.Array, jax.Array]:
    """§4.2.3: the states and logits of the text decoder, forced to write the right text."""
    config = model.config
    encoded, mask = model.encode(*source, batch_invariant=batch_invariant, key=keys[0])
    tokens = inputs_of(labels, config.pad_token_id, config.decoder_start_token_id)
    states = model.text_decoder(tokens, None, encoded.last_hidden_state, mask, key=keys[1]).last_hidden_state
    return states, model.text_decoder.embed_tokens.attend(states)


class SeamlessM4TIntoTextLosses(ModelOutput):
    """§4.2.3: the loss of X2T, and its three parts without their weights."""

    total: Float[Array, ""] = ABSENT
    speech: Float[Array, ""] = ABSENT
    text: Float[Array, ""] = ABSENT
    distillation: Float[Array, ""] = ABSENT


def into_text_losses(
    model: Any,
    labels: Int[Array, "batch tokens"],
    *,
    input_features: Float[Array, "batch time bands"],
    attention_mask: Int[Array, "batch time"] | None = None,
    input_ids: Int[Array, "batch pieces"],
    text_attention_mask: Int[Array, "batch pieces"] | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    label_smoothing: float = 0.2,
    batch_invariant: bool = False,
    key: jax.Array | None = None,
) -> SeamlessM4TIntoTextLosses:
    r"""§4.2.3, X2T: $\alpha L_\text{S2TT} + \beta L_\text{T2TT} + \gamma L_\text{KD}$.

    Speech and its text have one translation and one decoder. What it makes of the text teaches what it makes of the
    speech, token by token:

    $$L_\text{KD} = \frac{1}{|y|} \sum_t D_\text{KL}\bigl[p(\cdot \mid y_{<t}, x_\text{text}) \,\|\,
    p(\cdot \mid y_{<t}, x_\text{speech})\bigr]$$

    The teacher does not learn from that: no gradient goes through $p(\cdot \mid y_{<t}, x_\text{text})$, which is our
    reading, as are weights of 1.

    Args:
        model: with a speech and a text encoder: `SeamlessM4TModel` or `SeamlessM4Tv2Model`.
        labels: the translation, `<language> … </s>`, -100 behind it; the language is given and not learnt.
        input_features: speech.
        attention_mask: 1 where the speech is real.
        input_ids: what is said, `<language> … </s>`.
        text_attention_mask: 1 where `input_ids` are real.
        weights: $\alpha$, $\beta$ and $\gamma$.
        label_smoothing: $\epsilon$ of both cross-entropies, which fairseq spreads over all tokens but the right one.
        batch_invariant: of speech, keep the padding out of the length adaptor too.
        key: switches dropout on.
    """
    keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
    speech = (None, input_features, attention_mask)
    _, of_speech = _forced(model, labels, *speech, batch_invariant=batch_invariant, keys=keys[:2])
    _, of_text = _forced(model, labels, input_ids, None, text_attention_mask, keys=keys[2:])
    targets = without_language(labels)
    learnt = targets != IGNORED_LABEL
    # D_KL[p || q] = sum p (log p - log q)
    p = jax.nn.log_softmax(at_least_float32(jax.lax.stop_gradient(of_text)))
    q = jax.nn.log_softmax(at_least_float32(of_speech))
    divergence = jnp.where(learnt, (jnp.exp(p) * (p - q)).sum(-1), 0).sum() / jnp.maximum(learnt.sum(), 1)
    heard = label_smoothed_cross_entropy(of_speech, targets, label_smoothing)
    read = label_smoothed_cross_entropy(of_text, targets, label_smoothing)
    total = weights[0] * heard + weights[1] * read + weights[2] * divergence
    return SeamlessM4TIntoTextLosses(total, heard, read, divergence)


def without_language(labels: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """§4.2.3 and §4.3.3: labels, the first of which is given and not learnt."""
    return labels.at[:, 0].set(IGNORED_LABEL)


@dataclass(frozen=True)
class SeamlessM4TRecipe:
    """Not in the paper; in the authors' code for fine-tuning."""

    learning_rate: float = 1e-5  # after the warm-up, then falling as the inverse square root
    warmup_steps: int = 100  # steps of rising rate
    batch_size: int = 5  # sentences

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with betas (0.9, 0.98)."""

        def rate(step: Any) -> Any:
            step = jnp.maximum(step, 1)
            return self.learning_rate * jnp.minimum(step / self.warmup_steps, (self.warmup_steps / step) ** 0.5)

        return optax.adam(rate, b1=0.9, b2=0.98)
