r"""# SeamlessM4T v2, of Seamless: Multilingual Expressive and Streaming Speech Translation

Seamless Communication: Loïc Barrault, Yu-An Chung, Mariano Coria Meglioli, David Dale, Ning Dong, Mark Duppenthaler
and 61 others, 2023, arXiv 2312.05187.

Speech or text goes in, in a hundred languages, and speech or text comes out, as in the first SeamlessM4T. What is new
is how text becomes speech, UnitY2: not unit by unit, but all units at once. The translated text is spelt, each
character is given a duration, and what stands for it is repeated that often; a Transformer with convolutions then says
which unit each of these frames is. So speech takes three passes instead of hundreds, and says every character.

    speech ── w2v-BERT 2.0, length adaptor ──┐
    text ── NLLB encoder ────────────────────┴─> memory ── NLLB decoder, token by token ──> translated text
    translated text ── NLLB decoder once more ──> a state before each subword ── Transformer encoder ──> (T, d)
      ── repeated for each character, + characters ── duration predictor ──> (C, d), units of each character
      ── repeated for each unit ── [self-attention, convolutions] × 6 ──> (U, d) ── head ──> U units
      ── vocoder of units ──> waveform at 16 kHz

| paper | here |
| --- | --- |
| §3, speech encoder: causal convolutions, positions of clipped distance | `SeamlessM4Tv2Config.conformer` |
| §3, UnitY2's upsampling: subwords to characters | `characters`, `SeamlessM4Tv2TextToUnitDecoder.upsample` |
| §3, characters to units: duration predictor | `audiozoo.models.speech_resynthesis.VariancePredictor` |
| §3, unit decoder | `SeamlessM4Tv2TextToUnitDecoder`, `SeamlessM4Tv2TextToUnitDecoderLayer` |
| §3, text-to-unit model and its loss | `SeamlessM4Tv2TextToUnitForConditionalGeneration` |
| §3, the model and its tasks | `SeamlessM4Tv2Model`, and a class for each of four tasks |
| §3, vocoder | `audiozoo.models.speech_resynthesis` |

Taken over from the first version: NLLB, the speech encoder around its blocks, the vocoder. The text-to-unit loss is put
together here from the paper's description (cross-entropy of the units, squared error of the log-durations, durations
from an aligner): the authors' code does not train this part. The expressive and the streaming model, which make up the
rest of the paper, are not here.

Differences from `transformers`, each shown by a test: a batch's waveforms equal those of its items and end where they
do (see `audiozoo.models.speech_resynthesis`), and a subword without a text counts as one unknown character, there as
the four letters of "None". As there, the last token of a batch's longest text, its end as a rule, is not spoken, while
the ends of shorter texts are seen by the text-to-unit encoder. `transformers` lets the vocoder predict durations once
more, which the authors' pipeline does not; `generate` follows the one, or with `dur_prediction=False` the other.

Checkpoints: `facebook/seamless-m4t-v2-large`; the authors' `seamlessM4T_v2_large.pt` and `vocoder_v2.pt`.

    import audiozoo
    model = audiozoo.load("facebook/seamless-m4t-v2-large")
    processor = audiozoo.load_processor("facebook/seamless-m4t-v2-large")
    inputs = processor(text="Where is the library?", src_lang="eng")
    waveform, lengths = model.generate(**inputs, tgt_lang="spa")
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
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.decoding import GenerateOutput, GenerationConfig
from audiozoo.decoding.generate import Streamer
from audiozoo.decoding.synthesis import bucket
from audiozoo.errors import UsageError
from audiozoo.layers import Conv1d, Dropout, Embed, LayerNorm, MultiHeadAttention, activation, layer_drop
from audiozoo.layers.losses import cross_entropy
from audiozoo.layers.positions import sinusoids_of
from audiozoo.models.mbart import MBartCache, continue_text
from audiozoo.models.nllb import NllbConfig, NllbDecoder, NllbEncoder
from audiozoo.models.seamless_m4t import SeamlessM4TConfig, SeamlessM4TSpeechEncoder
from audiozoo.models.speech_resynthesis import (
    CodeHifiGanConfig,
    SeamlessM4Tv2CodeHifiGan,
    VariancePredictor,
    frames_of,
    repeat,
)
from audiozoo.models.xls_r import shift_tokens_right
from audiozoo.outputs import ABSENT, BaseModelOutput, ModelOutput, Seq2SeqLMOutput

VOCODER = CodeHifiGanConfig.seamless()


@dataclass(frozen=True)
class SeamlessM4Tv2Config(SeamlessM4TConfig):
    """§3: sizes of the checkpoint, as `transformers` names them; those not here are `SeamlessM4TConfig`'s."""

    max_position_embeddings: int = 4096  # kept for export: sinusoids have no end

    # --- speech encoder, w2v-BERT 2.0 with positions and convolutions that can be streamed
    position_embeddings_type: str | None = "relative_key"  # see `ConformerConfig`
    left_max_position_embeddings: int = 64  # frames back that are told apart
    right_max_position_embeddings: int = 8  # frames ahead that are told apart
    speech_encoder_chunk_size: int | None = 20_000  # frames that see one another
    speech_encoder_left_chunk_num: int = 128  # chunks before its own that a frame sees

    # --- text-to-unit model, UnitY2's (§3)
    char_vocab_size: int = 10_943  # characters
    t2u_max_position_embeddings: int = 4096  # kept for export: sinusoids have no end
    t2u_variance_predictor_embed_dim: int = 1024  # width that the duration predictor reads
    t2u_variance_predictor_hidden_dim: int = 256  # its own width
    t2u_variance_predictor_kernel_size: int = 3  # taps of its convolutions
    t2u_variance_pred_dropout: float = 0.5  # in it

    # --- vocoder (§3)
    vocoder: CodeHifiGanConfig = VOCODER  # its sizes
    vocoder_offset: int = 4  # control symbols in front of the units of the text-to-unit model

    def __post_init__(self) -> None:
        if isinstance(self.vocoder, Mapping):  # out of a checkpoint of our own
            fields = {name: from_lists(value) for name, value in self.vocoder.items()}
            object.__setattr__(self, "vocoder", CodeHifiGanConfig(**fields))

    @property
    def conformer(self) -> Any:
        """w2v-BERT 2.0's blocks, which look back further than ahead."""
        return dataclasses.replace(
            super().conformer,
            causal_convolution=True,
            left_max_position_embeddings=self.left_max_position_embeddings,
            right_max_position_embeddings=self.right_max_position_embeddings,
            chunk_size=self.speech_encoder_chunk_size,
            left_chunk_num=self.speech_encoder_left_chunk_num,
        )

    @classmethod
    def large(cls) -> SeamlessM4Tv2Config:
        """§3, SeamlessM4T v2 Large: 2.3 B parameters."""
        return cls()


def from_lists(value: Any) -> Any:
    """Not in the paper: lists, which JSON has, as tuples."""
    return tuple(from_lists(v) for v in value) if isinstance(value, list | tuple) else value


Pairs = tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class SeamlessM4Tv2GenerationConfig:
    """Not in the paper; in the released checkpoint's `generation_config.json`. Tables are tuples of pairs."""

    text_decoder_lang_to_code_id: Pairs = ()  # language -> the token that a text in it begins with
    t2u_lang_code_to_id: Pairs = ()  # kept for export: the first version's unit of a language
    vocoder_lang_code_to_id: Pairs = ()  # language -> the vocoder's number for it
    char_to_id: Pairs = ()  # character -> its number
    id_to_text: Pairs = ()  # token -> its text
    options: Pairs = (("max_new_tokens", 256),)  # of the search, as for `transformers.GenerationConfig`

    def text_language(self, tgt_lang: str) -> int:
        """The token that a text in that language begins with; `eng` and `__eng__` are the same.

        Raises:
            UsageError: if the model does not write it.
        """
        return _language(self.text_decoder_lang_to_code_id, tgt_lang, "write")

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


# --- §3, from subwords to characters --------------------------------------------------------------------------------

SPACE = "▁"


def characters(
    input_ids: Int[np.ndarray, "batch time"],
    id_to_text: Mapping[int, str],
    char_to_id: Mapping[str, int],
    *,
    pad: int = 0,
    unk: int = 1,
) -> tuple[Int[np.ndarray, "batch characters"], Int[np.ndarray, "batch time"]]:
    """§3: the characters of a text, and how many belong to each of its subwords.

    A space belongs to the word behind it; but after a punctuation mark it belongs to the mark. An unknown subword is
    one unknown character, as is one that the tables have no text for (`transformers` spells the word None there).

    Args:
        input_ids: subwords, without the language and the end; padding behind them.
        id_to_text: the text of each subword.
        char_to_id: the number of each character.
        pad: padding, of subwords and of characters.
        unk: the unknown, likewise.
    """
    ids = np.asarray(input_ids)
    counts, rows = np.zeros(ids.shape, np.int32), []
    for row, count in zip(ids, counts, strict=True):
        length = int(np.argmax(row == pad)) if (row == pad).any() else len(row)
        texts = [None if i == unk else id_to_text.get(int(i)) for i in row[:length]]
        spelt: list[int] = []
        moved = False  # does the space of this subword belong to the mark before it
        for i, text in enumerate(texts):
            spelt += [unk] if text is None else [char_to_id.get(c, unk) for c in text]
            count[i] = (1 if text is None else len(text)) - moved
            following = texts[i + 1] if i + 1 < length else None
            mark = text is not None and len(text) == 1 and not (text.isalpha() or text.isnumeric() or text == SPACE)
            moved = bool(mark and following and len(following) > 1 and following[0] == SPACE)
            count[i] += moved
        rows.append(spelt)
    longest = max(map(len, rows), default=0)
    return np.array([spelt + [pad] * (longest - len(spelt)) for spelt in rows], np.int32).reshape(
        len(rows), longest
    ), counts


# --- §3, text to units ----------------------------------------------------------------------------------------------


class SeamlessM4Tv2TextToUnitDecoderOutput(ModelOutput):
    """§3: states of the unit decoder, and which of them are speech."""

    last_hidden_state: Float[Array, "batch frames hidden"] = ABSENT
    hidden_states: tuple[Float[Array, "batch frames hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    padding_mask: Bool[Array, "batch frames"] = ABSENT


class SeamlessM4Tv2TextToUnitOutput(ModelOutput):
    """§3: what the text-to-unit model returns; with its head, `last_hidden_state` is the logits, as there."""

    last_hidden_state: Float[Array, "batch frames channels"] = ABSENT
    padding_mask: Bool[Array, "batch frames"] = ABSENT
    decoder_hidden_states: tuple[Float[Array, "batch frames hidden"], ...] | None = None
    decoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    encoder_last_hidden_state: Float[Array, "batch time hidden"] | None = None
    encoder_hidden_states: tuple[Float[Array, "batch time hidden"], ...] | None = None
    encoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    loss: Float[Array, ""] | None = None


class SeamlessM4Tv2TextToUnitDecoderLayer(nnx.Module):
    """§3, a block of the unit decoder, as FastSpeech 2's (arXiv 2006.04558): each part added, then normalised.

    Self-attention over the whole sequence, then two convolutions over time with ReLU between them.
    """

    def __init__(self, config: NllbConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.d_model
        self.self_attn = MultiHeadAttention(
            width, config.decoder_attention_heads, dropout=config.attention_dropout, **kwargs
        )
        self.self_attn_layer_norm = LayerNorm(width, **kwargs)
        self.conv1 = Conv1d(width, width, 7, padding=3, **kwargs)
        self.conv2 = Conv1d(width, width, 7, padding=3, **kwargs)
        self.conv_layer_norm = LayerNorm(width, **kwargs)
        self.act, self.rate = config.activation_function, config.dropout

    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        dropout: Dropout,
        mask: Bool[Array, "batch frames"],
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
        """One block: its output and, if needed, attention weights; convolutions see zeros outside `mask`."""
        attended, weights = self.self_attn(x, mask=mask[:, None, None], dropout=dropout, need_weights=need_weights)
        x = self.self_attn_layer_norm(x + attended)
        y = self.conv1(jnp.where(mask[..., None], x, 0))
        y = self.conv2(activation(self.act)(jnp.where(mask[..., None], y, 0)))
        return self.conv_layer_norm(x + dropout(y, self.rate)), weights


class SeamlessM4Tv2TextToUnitDecoder(nnx.Module):
    r"""§3, the unit decoder: all units at once, as many as the durations of the characters say.

    states of subwords (T, d) ── each for as many as its characters ──> + characters + positions (C, d)
      ── duration predictor ──> frames of each character ── repeated ──> + positions (U, d) ── blocks ──> (U, d)
    """

    def __init__(
        self, config: SeamlessM4Tv2Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        units, width = config.units, config.hidden_size
        self.embed_tokens = Embed(config.t2u_vocab_size, width, **kwargs)  # the head's; no unit is read
        self.embed_char = Embed(config.char_vocab_size, width, **kwargs)
        self.pos_emb_alpha_char = nnx.Param(jnp.ones((1,), param_dtype))
        self.pos_emb_alpha = nnx.Param(jnp.ones((1,), param_dtype))
        self.duration_predictor = VariancePredictor(
            config.t2u_variance_predictor_embed_dim,
            config.t2u_variance_predictor_hidden_dim,
            config.t2u_variance_predictor_kernel_size,
            dropout=config.t2u_variance_pred_dropout,
            **kwargs,
        )
        layers = range(units.decoder_layers)
        self.layers = nnx.List([SeamlessM4Tv2TextToUnitDecoderLayer(units, **kwargs) for _ in layers])
        self.layer_norm = LayerNorm(width, **kwargs)
        self.config = units

    def _positions(self, x: Float[Array, "batch time hidden"], alpha: nnx.Param) -> Float[Array, "1 time hidden"]:
        """Sinusoids, counted from `pad_token_id` + 1, by a learnt factor."""
        padding = self.config.pad_token_id
        every = jnp.full((1, x.shape[1]), padding + 1)
        return alpha[...].astype(x.dtype) * sinusoids_of(every, x.shape[-1], padding=padding, dtype=x.dtype)

    def upsample(
        self,
        char_input_ids: Int[Array, "batch characters"],
        char_count_per_id: Int[Array, "batch time"],
        encoder_hidden_states: Float[Array, "batch time hidden"],
        dropout: Dropout | None = None,
    ) -> tuple[
        Float[Array, "batch characters hidden"], Bool[Array, "batch characters"], Float[Array, "batch characters"]
    ]:
        r"""The first half: a state for each character, which are real, and their log-durations $\ln(1 + d)$."""
        length = char_input_ids.shape[1]
        mask = jnp.arange(length) < char_count_per_id.sum(axis=1)[:, None]
        subwords = repeat(encoder_hidden_states, char_count_per_id, length)
        embedded = self.embed_char(char_input_ids)
        scale = self.config.d_model**0.5 if self.config.scale_embedding else 1.0
        x = embedded * jnp.asarray(scale, embedded.dtype) + self._positions(subwords, self.pos_emb_alpha_char)
        x = x + subwords
        return x, mask, self.duration_predictor(x, mask, dropout)

    def decode(
        self,
        x: Float[Array, "batch characters hidden"],
        durations: Int[Array, "batch characters"],
        frames: int,
        dropout: Dropout | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> SeamlessM4Tv2TextToUnitDecoderOutput:
        """The second half: states of characters, each for as many units as it lasts, through the blocks."""
        dropout = dropout or Dropout(None)
        mask = jnp.arange(frames) < durations.sum(axis=1)[:, None]
        x = repeat(x, durations, frames)
        x = dropout(x + self._positions(x, self.pos_emb_alpha), self.config.dropout)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states.append(x)
            x, weights = layer_drop(layer, x, self.config.decoder_layerdrop, dropout, mask, output_attentions)
            attentions.append(weights)
        x = self.layer_norm(x)
        return SeamlessM4Tv2TextToUnitDecoderOutput(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            padding_mask=mask,
        )


class SeamlessM4Tv2TextToUnitModel(nnx.Module):
    """§3: a Transformer encoder without positions, and the unit decoder."""

    def __init__(
        self, config: SeamlessM4Tv2Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = NllbEncoder(config.units, **kwargs)
        self.decoder = SeamlessM4Tv2TextToUnitDecoder(config, **kwargs)


class SeamlessM4Tv2TextToUnitForConditionalGeneration(nnx.Module):
    """§3: text to units, with its head, the transpose of a table."""

    def __init__(
        self, config: SeamlessM4Tv2Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.model = SeamlessM4Tv2TextToUnitModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch time hidden"],
        char_input_ids: Int[Array, "batch characters"],
        char_count_per_id: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        durations: Int[Array, "batch characters"] | None = None,
        frames: int | None = None,
        labels: Int[Array, "batch frames"] | None = None,
        label_smoothing: float = 0.0,
        duration_weight: float = 1.0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> SeamlessM4Tv2TextToUnitOutput:
        r"""Units for a text.

        Args:
            inputs_embeds: states of the text decoder, one before each subword.
            char_input_ids: the text's characters.
            char_count_per_id: how many of them belong to each state.
            attention_mask: 1 for states of the text, 0 for padding.
            durations: units of each character, in place of predicted ones; for training, from an aligner.
            frames: the most units; by default what `labels` or the durations say, which must be known (not inside
                `jax.jit`).
            labels: units, -100 where there is none. The loss is their mean cross-entropy; with `durations`, and the
                mean of $(\ln(1 + \hat d) - \ln(1 + d))^2$ on top: the objective as §3 describes it, put together
                here, since the authors' code does not train this model.
            label_smoothing: of the cross-entropy.
            duration_weight: of the durations' part.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout and layer drop on.

        Returns:
            Logits as `last_hidden_state`, and which of them are speech.

        Raises:
            UsageError: inside `jax.jit`, if the number of units is not known.
        """
        model, keys = self.model, [None] * 3 if key is None else list(jax.random.split(key, 3))
        returned: dict[str, Any] = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        encoded = model.encoder(inputs_embeds, attention_mask, key=keys[0], **returned)
        x, mask, log_durations = model.decoder.upsample(
            char_input_ids, char_count_per_id, encoded.last_hidden_state, Dropout(keys[1])
        )
        given = durations is not None
        if durations is None:
            durations = frames_of(log_durations, mask)
        durations = jnp.where(mask, durations, 0)
        if frames is None and labels is not None:
            frames = labels.shape[1]
        if frames is None:
            frames = total(durations)
        decoded = model.decoder.decode(x, durations, frames, Dropout(keys[2]), **returned)
        logits = self.logits(decoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, jnp.asarray(labels), label_smoothing=label_smoothing)
            if given:
                error = jnp.square(log_durations - jnp.log1p(durations.astype(log_durations.dtype)))
                loss = loss + duration_weight * jnp.sum(jnp.where(mask, error, 0)) / jnp.maximum(mask.sum(), 1)
        return SeamlessM4Tv2TextToUnitOutput(
            last_hidden_state=logits,
            padding_mask=decoded.padding_mask,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            loss=loss,
        )

    def logits(self, x: Float[Array, "batch frames hidden"]) -> Float[Array, "batch frames units"]:
        """Scores of units and control symbols."""
        return self.model.decoder.embed_tokens.attend(x)


def total(durations: Int[Array, "batch time"]) -> int:
    """Not in the paper: frames of the longest item, at least one.

    Raises:
        UsageError: inside `jax.jit`, where it is not known.
    """
    if isinstance(durations, jax.core.Tracer):
        raise UsageError("How many units there are depends on the text, so inside jax.jit frames must be given.")
    return max(int(durations.sum(axis=1).max(initial=0)), 1)


# --- §3, the whole model --------------------------------------------------------------------------------------------


class SeamlessM4Tv2GenerationOutput(ModelOutput):
    """§3: what `generate` returns with `return_intermediate_token_ids`."""

    waveform: Float[np.ndarray, "batch samples"] = ABSENT
    waveform_lengths: Int[np.ndarray, " batch"] = ABSENT
    sequences: Int[np.ndarray, "batch tokens"] = ABSENT
    unit_sequences: Int[np.ndarray, "batch units"] = ABSENT


class SeamlessM4Tv2PreTrainedModel(nnx.Module):
    """§3: what the classes below share; each of them has some of the model's parts."""

    parts: ClassVar[tuple[str, ...]] = ()
    static_arguments = ("label_smoothing",)

    def __init__(
        self, config: SeamlessM4Tv2Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if "text_encoder" in self.parts:
            self.text_encoder = NllbEncoder(config.text, **kwargs)
        if "speech_encoder" in self.parts:
            self.speech_encoder = SeamlessM4TSpeechEncoder(config, **kwargs)
        self.text_decoder = NllbDecoder(config.text, **kwargs)  # its embedding is the encoder's and the head's too
        if "vocoder" in self.parts:
            self.t2u_model = SeamlessM4Tv2TextToUnitForConditionalGeneration(config, **kwargs)
            self.vocoder = SeamlessM4Tv2CodeHifiGan(config, **kwargs)
        self.config = config
        self.generation_config = SeamlessM4Tv2GenerationConfig()

    def encode(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        input_features: Float[Array, "batch time bands"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        **options: Any,
    ) -> tuple[BaseModelOutput, Bool[Array, "batch frames"] | None]:
        """What the text decoder attends to, of speech or of text, and which of it is real.

        Raises:
            UsageError: if there is neither speech nor text.
        """
        if input_features is not None:
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
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqLMOutput:
        config = self.config
        if decoder_input_ids is None:
            if labels is None:
                raise UsageError("Give decoder_input_ids or labels; generate makes text without them.")
            decoder_input_ids = shift_tokens_right(
                jnp.asarray(labels), config.pad_token_id, config.decoder_start_token_id
            )
        returned: dict[str, Any] = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        keys = [None, None] if key is None else list(jax.random.split(key))
        encoded, mask = self.encode(input_ids, input_features, attention_mask, key=keys[0], **returned)
        decoded = self.text_decoder(
            decoder_input_ids, decoder_attention_mask, encoded.last_hidden_state, mask, key=keys[1], **returned
        )
        logits = self.text_decoder.embed_tokens.attend(decoded.last_hidden_state)
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

    def _write(
        self,
        inputs: dict[str, Any],
        tgt_lang: str | None,
        *,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        key: jax.Array | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> tuple[GenerateOutput, jax.Array, jax.Array | None]:
        """The translated text, and the memory that it was written from."""
        config = self.config
        defaults = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        chosen = GenerationConfig(**(defaults | dict(self.generation_config.options) | options))
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
        output, memory, mask = _write(
            *nnx.split(self),
            {name: jnp.asarray(x) for name, x in inputs.items()},
            None if attention_mask is None else jnp.asarray(attention_mask),
            jnp.asarray(prompt, jnp.int32),
            key,
            config=chosen,
            streamer=streamer,
        )
        return output.trim(), memory, mask

    def _speak(
        self,
        inputs: dict[str, Any],
        tgt_lang: str | None,
        speaker_id: int,
        return_intermediate_token_ids: bool,
        dur_prediction: bool,
        key: jax.Array | None,
        **options: Any,
    ) -> Any:
        """Translated speech (§3): the text, the second pass of its decoder, units, a waveform."""
        if tgt_lang is None:
            raise UsageError("Say into which language: speech needs tgt_lang.")
        tables, config = self.generation_config, self.config
        language = tables.speech_language(tgt_lang)
        of_text, of_units = split_options(options)
        keys = [None, None] if key is None else list(jax.random.split(key))
        temperature = of_units.get("temperature") or 1.0
        sampled = bool(of_units.get("do_sample")) and temperature != 1.0  # as in `transformers`
        if sampled and key is None:
            raise UsageError("Units are drawn at random with do_sample: give a key.")
        written, memory, mask = self._write(inputs, tgt_lang, key=keys[0], **of_text)
        sequences = np.asarray(written.sequences)

        # The decoder's state at each token says what comes after it; the last token, the end, has no use for one.
        texts = sequences[:, 2:-1]
        texts = np.where(texts == config.eos_token_id, config.pad_token_id, texts)
        spelling = dict(tables.id_to_text), dict(tables.char_to_id)
        char_ids, counts = characters(texts, *spelling, pad=config.pad_token_id)
        counts = np.pad(counts, ((0, 0), (1, 1)))  # the first state and the last one stand for no character
        tokens = sequences[:, :-1]
        width, length = bucket(tokens.shape[1]), bucket(char_ids.shape[1])
        repeats = len(sequences) // len(memory)
        graphdef, state = nnx.split(self)
        states, durations = _characters(
            graphdef,
            state,
            _padded(tokens, width, config.pad_token_id),
            jnp.repeat(memory, repeats, axis=0),
            None if mask is None else jnp.repeat(mask, repeats, axis=0),
            _padded(char_ids, length, config.pad_token_id),
            _padded(counts, width, 0),
        )
        lengths = np.asarray(durations).sum(axis=1)
        longest = total(durations)
        units = _units(graphdef, state, states, durations, bucket(longest), keys[1] if sampled else None, temperature)
        units = np.asarray(units)[:, :longest]

        spoken = vocoder_units(units, np.arange(longest) < lengths[:, None], config)
        waveform, waveform_lengths = self.vocoder.speak(
            spoken, speaker_id, language, lengths=lengths, dur_prediction=dur_prediction
        )
        if not return_intermediate_token_ids:
            return waveform, waveform_lengths
        return SeamlessM4Tv2GenerationOutput(waveform, waveform_lengths, sequences, units)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Not in the paper: `text_…` options for the text, `speech_…` for the units, all others for both."""
    both = {name: value for name, value in options.items() if not name.startswith(("text_", "speech_"))}

    def of(side: str) -> dict[str, Any]:
        return both | {name.removeprefix(side): value for name, value in options.items() if name.startswith(side)}

    return of("text_"), of("speech_")


def vocoder_units(
    units: Int[np.ndarray, "batch time"], mask: Bool[np.ndarray, "batch time"], config: SeamlessM4Tv2Config
) -> Int[np.ndarray, "batch time"]:
    """Not in the paper; in the released code: the vocoder's units, counted without control symbols.

    An end, and whatever else the vocoder has no unit for, is its padding.
    """
    moved = units - config.vocoder_offset
    known = mask & (moved >= 0) & (moved < config.vocoder.unit_hifi_gan_vocab_size)
    return np.where(known, moved, config.t2u_pad_token_id)


def _padded(x: np.ndarray, length: int, value: int) -> jax.Array:
    return jnp.asarray(np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value), jnp.int32)


@partial(jax.jit, static_argnames=("graphdef", "config", "streamer"))
def _write(
    graphdef: Any,
    state: Any,
    inputs: dict[str, jax.Array],
    attention_mask: jax.Array | None,
    prompt: jax.Array,
    key: jax.Array | None,
    *,
    config: GenerationConfig,
    streamer: Streamer | None,
) -> tuple[GenerateOutput, jax.Array, jax.Array | None]:
    """Encode once, and search for the text in one loop."""
    model = nnx.merge(graphdef, state)
    encoded, mask = model.encode(attention_mask=attention_mask, **inputs)
    memory, decoder = encoded.last_hidden_state, model.text_decoder
    cache = decoder.start(memory, prompt.shape[1] + config.new_tokens(prompt.shape[1]))

    def decode(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        out = decoder(tokens, encoder_attention_mask=rows, past_key_values=past, cache_position=position)
        return decoder.embed_tokens.attend(out.last_hidden_state), out.past_key_values

    return continue_text(decode, cache, mask, prompt, config, key=key, streamer=streamer), memory, mask


@partial(jax.jit, static_argnames="graphdef")
def _characters(
    graphdef: Any, state: Any, tokens: Any, memory: Any, mask: Any, char_ids: Any, counts: Any
) -> tuple[jax.Array, jax.Array]:
    """The decoder's second pass, and the text-to-unit model as far as the durations."""
    model = nnx.merge(graphdef, state)
    embedded = model.text_decoder(tokens, None, memory, mask).last_hidden_state
    real = jnp.arange(tokens.shape[1]) < (tokens != model.config.pad_token_id).sum(axis=1)[:, None]
    t2u = model.t2u_model.model
    encoded = t2u.encoder(embedded, real).last_hidden_state
    x, char_mask, log_durations = t2u.decoder.upsample(char_ids, counts, encoded)
    return x, frames_of(log_durations, char_mask)


@partial(jax.jit, static_argnames=("graphdef", "frames"))
def _units(
    graphdef: Any, state: Any, x: Any, durations: Any, frames: int, key: jax.Array | None, temperature: Any
) -> jax.Array:
    """The rest of the text-to-unit model: the likeliest units, or drawn ones."""
    model = nnx.merge(graphdef, state).t2u_model
    logits = model.logits(model.model.decoder.decode(x, durations, frames).last_hidden_state)
    return jnp.argmax(logits, axis=-1) if key is None else jax.random.categorical(key, logits / temperature)


class SeamlessM4Tv2ForTextToText(SeamlessM4Tv2PreTrainedModel):
    """§3: translation of text."""

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
            options: `labels`, targets, -100 where there is none, with `label_smoothing` (0.2 in the authors'
                fine-tuning); `output_attentions`; `output_hidden_states`; `key`, which switches dropout on.

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
            options: `attention_mask`; `decoder_input_ids` in place of `tgt_lang`; `key`, randomness for
                `do_sample=True`; `streamer`, called on the host with every token; all others as for
                `transformers.generate`.

        Returns:
            Tokens, the end-of-text token and the language in front; with `return_dict_in_generate=True` a
            `GenerateOutput`.
        """
        output, *_ = self._write({"input_ids": input_ids}, tgt_lang, **options)
        return output if options.get("return_dict_in_generate") else np.asarray(output.sequences)


class SeamlessM4Tv2ForSpeechToText(SeamlessM4Tv2PreTrainedModel):
    """§3: recognition and translation of speech into text."""

    parts: ClassVar[tuple[str, ...]] = ("speech_encoder",)

    def __call__(
        self,
        input_features: Float[Array, "batch time bands"],
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """As `SeamlessM4Tv2ForTextToText`, of `input_features`: pairs of log-mel frames, 20 ms each."""
        return self._forward(
            attention_mask, decoder_input_ids, decoder_attention_mask, input_features=input_features, **options
        )

    def generate(
        self, input_features: Float[Array, "batch time bands"], tgt_lang: str | None = None, **options: Any
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """Recognise (into the language spoken) or translate; see `SeamlessM4Tv2ForTextToText`."""
        output, *_ = self._write({"input_features": input_features}, tgt_lang, **options)
        return output if options.get("return_dict_in_generate") else np.asarray(output.sequences)


Speech = tuple[Float[np.ndarray, "batch samples"], Int[np.ndarray, " batch"]] | SeamlessM4Tv2GenerationOutput


class SeamlessM4Tv2ForTextToSpeech(SeamlessM4Tv2ForTextToText):
    """§3: translation of text into speech; the call is that of text to text."""

    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "vocoder")

    def generate(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch time"],
        return_intermediate_token_ids: bool = False,
        tgt_lang: str | None = None,
        speaker_id: int = 0,
        *,
        dur_prediction: bool = True,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Speech:
        """Translate and speak.

        Args:
            input_ids: the text to translate.
            return_intermediate_token_ids: also return the text's tokens and the units.
            tgt_lang: into which language.
            speaker_id: one of the vocoder's voices.
            dur_prediction: let the vocoder repeat units once more, as `transformers` does; the authors do not.
            key: randomness, for sampling.
            options: as for text (`attention_mask`, `num_beams` …); with `text_` in front they are for the text alone,
                with `speech_` for the units alone (`do_sample` together with a `temperature` other than 1).

        Returns:
            Waveforms, silent after each item's end, and the samples of each; or a `SeamlessM4Tv2GenerationOutput`.
        """
        of_units = (return_intermediate_token_ids, dur_prediction, key)
        return self._speak({"input_ids": input_ids}, tgt_lang, speaker_id, *of_units, **options)


class SeamlessM4Tv2ForSpeechToSpeech(SeamlessM4Tv2ForSpeechToText):
    """§3: translation of speech into speech; the call is that of speech to text."""

    parts: ClassVar[tuple[str, ...]] = ("speech_encoder", "vocoder")

    def generate(  # type: ignore[override]
        self,
        input_features: Float[Array, "batch time bands"],
        return_intermediate_token_ids: bool = False,
        tgt_lang: str | None = None,
        speaker_id: int = 0,
        *,
        dur_prediction: bool = True,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Speech:
        """Translate and speak; see `SeamlessM4Tv2ForTextToSpeech`."""
        of_units = (return_intermediate_token_ids, dur_prediction, key)
        return self._speak({"input_features": input_features}, tgt_lang, speaker_id, *of_units, **options)


class SeamlessM4Tv2Model(SeamlessM4Tv2PreTrainedModel):
    """§3: all tasks, by what goes in and by `generate_speech`."""

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
        """As `SeamlessM4Tv2ForTextToText`, of `input_ids` or, if they are given, of `input_features`."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "input_features": input_features}
        return self._forward(attention_mask, decoder_input_ids, decoder_attention_mask, **inputs, **options)

    def generate(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        input_features: Float[Array, "batch time bands"] | None = None,
        return_intermediate_token_ids: bool = False,
        tgt_lang: str | None = None,
        speaker_id: int = 0,
        generate_speech: bool = True,
        *,
        dur_prediction: bool = True,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Speech | GenerateOutput:
        """Translate text or, if it is given, speech, into speech; with `generate_speech=False` into text.

        The arguments are those of `SeamlessM4Tv2ForTextToSpeech`. Text comes back as a `GenerateOutput`, as there.
        """
        inputs = {"input_features": input_features} if input_features is not None else {"input_ids": input_ids}
        if not generate_speech:
            return self._write(inputs, tgt_lang, key=key, **split_options(options)[0])[0]
        of_units = (return_intermediate_token_ids, dur_prediction, key)
        return self._speak(inputs, tgt_lang, speaker_id, *of_units, **options)
