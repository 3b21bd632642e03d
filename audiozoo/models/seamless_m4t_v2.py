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
| §3, text-to-unit model and its loss | `SeamlessM4Tv2TextToUnitModel`, `SeamlessM4Tv2TextToUnitFor…` |
| §3, the model and its tasks | `SeamlessM4Tv2Model`, `SeamlessM4Tv2For…To…`, on `SeamlessM4Tv2PreTrainedModel` |
| §3, vocoder | `audiozoo.models.speech_resynthesis` |

Taken over from the first version: NLLB, the speech encoder around its blocks, the vocoder. The text-to-unit loss is put
together here from the paper's description (cross-entropy of the units, squared error of the log-durations, durations
from an aligner): the authors' code does not train this part. The expressive and the streaming model, which make up the
rest of the paper, are not here.

Differences from `transformers`, each shown by a test: a batch's waveforms equal those of its items and end where they
do (see `audiozoo.models.speech_resynthesis`); `batch_invariant=True` keeps the padding of speech out of the length
adaptor, where it reaches an item's last state otherwise; and a subword without a text counts as one unknown character,
there as the four letters of "None". As there, the last token of a batch's longest text, its end as a rule, is not
spoken, while the ends of shorter texts are seen by the text-to-unit encoder, unless `batch_invariant=True`.
`transformers` lets the vocoder predict durations once more, which the authors' pipeline does not; `generate` follows
the one, or with `dur_prediction=False` the other.

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

from audiozoo.decoding.synthesis import bucket
from audiozoo.errors import UsageError
from audiozoo.layers import Conv1d, Dropout, Embed, LayerNorm, MultiHeadAttention, activation, layer_drop
from audiozoo.layers.basic import spread
from audiozoo.layers.losses import cross_entropy
from audiozoo.layers.positions import sinusoids_of
from audiozoo.layers.stacking import unseen
from audiozoo.models.nllb import NllbConfig, NllbEncoder
from audiozoo.models.seamless_m4t import (
    Pairs,
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToSpeech,
    SeamlessM4TForSpeechToText,
    SeamlessM4TForTextToSpeech,
    SeamlessM4TForTextToText,
    SeamlessM4TGenerationConfig,
    SeamlessM4TGenerationOutput,
    SeamlessM4TModel,
    SeamlessM4TPreTrainedModel,
    split_options,
    vocoder_units,
)
from audiozoo.models.speech_resynthesis import (
    SeamlessM4Tv2CodeHifiGan,
    VariancePredictor,
    duration_error,
    frames_of,
    repeat,
)
from audiozoo.outputs import ABSENT, ModelOutput


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


@dataclass(frozen=True)
class SeamlessM4Tv2GenerationConfig(SeamlessM4TGenerationConfig):
    """Not in the paper; in the released checkpoint's `generation_config.json`. Tables are tuples of pairs."""

    char_to_id: Pairs = ()  # character -> its number
    id_to_text: Pairs = ()  # token -> its text


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
    padded = np.full((len(rows), longest), pad, np.int32)
    for row, spelt in zip(padded, rows, strict=True):
        row[: len(spelt)] = spelt
    return padded, counts


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

    def _positions(self, x: Float[Array, "batch time hidden"], alpha: nnx.Param) -> Float[Array, "batch time hidden"]:
        """Sinusoids, counted from `pad_token_id` + 1, by a learnt factor."""
        padding = self.config.pad_token_id
        every = jnp.full((1, x.shape[1]), padding + 1)
        return spread(alpha[...], x) * sinusoids_of(every, x.shape[-1], padding=padding, dtype=x.dtype)

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
            hidden_states += [x, *unseen(layer)]
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

    static_arguments = ("frames", "label_smoothing")

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
                loss = loss + duration_weight * duration_error(log_durations, durations, mask)
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


class SeamlessM4Tv2GenerationOutput(SeamlessM4TGenerationOutput):
    """§3: what `generate` returns with `return_intermediate_token_ids`."""


class SeamlessM4Tv2PreTrainedModel(SeamlessM4TPreTrainedModel):
    """§3: what the classes below share: the first version's classes, with other parts that speak.

    Beside that version's options, `generate` has `dur_prediction`: whether the vocoder repeats units once more, as
    `transformers` does, or not, as in the authors' pipeline. Units are drawn with `speech_do_sample=True` together with
    a `speech_temperature` other than 1.
    """

    settings: ClassVar[Any] = SeamlessM4Tv2GenerationConfig

    def add_speech(self, config: Any, **kwargs: Any) -> None:
        """The parts that speak."""
        self.t2u_model = SeamlessM4Tv2TextToUnitForConditionalGeneration(config, **kwargs)
        self.vocoder = SeamlessM4Tv2CodeHifiGan(config, **kwargs)

    def _speak(
        self,
        inputs: dict[str, Any],
        tgt_lang: str | None,
        speaker_id: int,
        return_intermediate_token_ids: bool,
        key: jax.Array | None,
        *,
        dur_prediction: bool = True,
        **options: Any,
    ) -> Any:
        """Translated speech (§3): the text, the second pass of its decoder, units, a waveform."""
        if tgt_lang is None:
            raise UsageError("Say into which language: speech needs tgt_lang.")
        tables, config = self.generation_config, self.config
        language = tables.speech_language(tgt_lang)
        if not (tables.id_to_text and tables.char_to_id):
            raise UsageError(
                "The generation_config.json of this model does not say how words are spelt; it cannot speak."
            )
        of_text, of_units = split_options(options)
        keys = [None, None] if key is None else list(jax.random.split(key))
        temperature = of_units.get("temperature") or 1.0
        sampled = bool(of_units.get("do_sample")) and temperature != 1.0  # as in `transformers`
        if sampled and key is None:
            raise UsageError("Units are drawn at random with do_sample: give a key.")
        written, memory, mask = self.write_text(inputs, tgt_lang, key=keys[0], **of_text)
        sequences = np.asarray(written.sequences)

        # The decoder's state at each token says what comes after it; the last token, the end, has no use for one.
        texts = sequences[:, 2:-1]
        texts = np.where(texts == config.eos_token_id, config.pad_token_id, texts)
        spelling = dict(tables.id_to_text), dict(tables.char_to_id)
        char_ids, counts = characters(texts, *spelling, pad=config.pad_token_id)
        counts = np.pad(counts, ((0, 0), (1, 1)))  # the first state and the last one stand for no character
        tokens = sequences[:, :-1]
        if of_text.get("batch_invariant"):
            tokens = without_ends(tokens, config.eos_token_id, config.pad_token_id)
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


def without_ends(tokens: Int[np.ndarray, "batch time"], eos: int, pad: int) -> Int[np.ndarray, "batch time"]:
    """Not in the paper: texts whose ends are padding; the first token, which is the same as an end, stays."""
    return np.where((np.arange(tokens.shape[1]) > 0) & (tokens == eos), pad, tokens)


def _padded(x: np.ndarray, length: int, value: int) -> jax.Array:
    return jnp.asarray(np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value), jnp.int32)


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


class SeamlessM4Tv2ForTextToText(SeamlessM4Tv2PreTrainedModel, SeamlessM4TForTextToText):
    """§3: translation of text."""


class SeamlessM4Tv2ForSpeechToText(SeamlessM4Tv2PreTrainedModel, SeamlessM4TForSpeechToText):
    """§3: recognition and translation of speech into text."""


class SeamlessM4Tv2ForTextToSpeech(SeamlessM4Tv2PreTrainedModel, SeamlessM4TForTextToSpeech):
    """§3: translation of text into speech."""


class SeamlessM4Tv2ForSpeechToSpeech(SeamlessM4Tv2PreTrainedModel, SeamlessM4TForSpeechToSpeech):
    """§3: translation of speech into speech."""


class SeamlessM4Tv2Model(SeamlessM4Tv2PreTrainedModel, SeamlessM4TModel):
    """§3: all tasks, by what goes in and by `generate_speech`."""
