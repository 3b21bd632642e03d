r"""# XLS-R: Self-supervised Cross-lingual Speech Representation Learning at Scale

Arun Babu, Changhan Wang, Andros Tjandra, Kushal Lakhotia, Qiantong Xu, Naman Goyal, Kritika Singh, Patrick von Platen,
Yatharth Saraf, Juan Pino, Alexei Baevski, Alexis Conneau, Michael Auli, 2021, arXiv 2111.09296.

wav2vec 2.0, grown: the same network and the same objective, at three sizes up to two billion parameters, pre-trained on
436,000 hours of speech in 128 languages. What is new beside the size is how the languages share it (small ones are
drawn more often than their hours say), and what is built on it: with mBART's decoder behind it, it translates speech.

    hours of each language n_l ── p_l ∝ (n_l / N)^α ──> batches of 128 languages
      ── wav2vec 2.0, LayerNorm in the convolutions and before attention and MLP ──> c (T, d)
      ── + linear ──> letters (CTC), language
      ── + strided convolutions, 160 ms a frame ── mBART's decoder, <language> first ──> translation

| paper | here |
| --- | --- |
| §2, wav2vec 2.0 | `audiozoo.models.wav2vec2`, all its classes |
| §2 and Table 2, sizes | `XLSRConfig.xls_r_300m()`, `.xls_r_1b()`, `.xls_r_2b()` |
| §3.1, language-balanced batches | `language_probabilities`, `sample_languages` |
| §4, speech translation | `SpeechEncoderDecoderModel`, `SpeechEncoderDecoderConfig` |
| §4, speech recognition | `audiozoo.models.wav2vec2.Wav2Vec2ForCTC` |
| §4, language identification, averaged over crops | `Wav2Vec2ForSequenceClassification`, `decoding.encoders.identify` |

What differs from wav2vec 2.0's LARGE: nothing but width, depth and the width of the codebooks. Heads of attention have
64, 80 and 120 channels. Of a padded batch the strided convolutions see the padding too, as in `transformers`;
`masked_adapter=True` translates each item as if it were alone, as commands do; behind an encoder with GroupNorm
`masked_group_norm=True` is needed too.

Checkpoints: `facebook/wav2vec2-xls-r-{300m,1b,2b}-{21-to-en,en-to-15}` and `-2b-22-to-16`, which translate, and
fairseq's files of the same, `xls_r_{300m,1b,2b}_{21_en,en_15}.pt` and `xls_r_2b_22_16.pt`. The pre-trained
`facebook/wav2vec2-xls-r-{300m,1b,2b}`, fairseq's `xlsr2_300m.pt`, `xlsr2_960m_1000k.pt`, `xlsr2_2B_1000k.pt`, and
everything fine-tuned from them with CTC, or to name the language (`xlsr_300m_voxlingua107_ft.pt`), load as wav2vec 2.0.

    import audiozoo
    model = audiozoo.load("facebook/wav2vec2-xls-r-300m-en-to-15")
    processor = audiozoo.load_processor("facebook/wav2vec2-xls-r-300m-en-to-15")
    inputs = processor(waveform, sampling_rate=16_000)
    tokens = model.generate(**inputs, forced_bos_token_id=processor.tokenizer.lang_code_to_id["de_DE"])
    text = processor.batch_decode(tokens, skip_special_tokens=True)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.configs import restore_parts
from audiozoo.decoding import GenerateOutput, GenerationConfig
from audiozoo.decoding.encoders import given_speech
from audiozoo.decoding.generate import Streamer
from audiozoo.errors import UsageError
from audiozoo.layers import Linear, check_ids
from audiozoo.layers.losses import shift_tokens_right
from audiozoo.models.hubert import HubertConfig, HubertModel
from audiozoo.models.mbart import MBartCache, MBartConfig, MBartForCausalLM, continue_text
from audiozoo.models.sew import SEWConfig, SEWDModel, SEWModel
from audiozoo.models.speech_to_text_2 import Speech2Text2Config, Speech2Text2ForCausalLM
from audiozoo.models.unispeech import UniSpeechConfig, UniSpeechModel
from audiozoo.models.unispeech_sat import UniSpeechSatConfig, UniSpeechSatModel
from audiozoo.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from audiozoo.models.wav2vec2_bert import Wav2Vec2BertConfig, Wav2Vec2BertModel
from audiozoo.models.wav2vec2_conformer import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel
from audiozoo.models.wavlm import WavLMConfig, WavLMModel
from audiozoo.outputs import BaseModelOutput, Seq2SeqLMOutput


@dataclass(frozen=True)
class XLSRConfig(Wav2Vec2Config):
    """Sizes of one checkpoint (Table 2); the fields are those of `Wav2Vec2Config`."""

    @classmethod
    def _size(cls, width: int, layers: int, codebooks: int, **changes: Any) -> XLSRConfig:
        return cls(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=16,
            intermediate_size=4 * width,
            feat_extract_norm="layer",
            conv_bias=True,
            do_stable_layer_norm=True,
            codevector_dim=codebooks,
            proj_codevector_dim=codebooks,
            **changes,
        )

    @classmethod
    def xls_r_300m(cls) -> XLSRConfig:
        """Table 2, XLS-R (0.3B): 24 blocks of width 1024, 317 M parameters with the quantiser."""
        return cls._size(1024, 24, 768)

    @classmethod
    def xls_r_1b(cls) -> XLSRConfig:
        """Table 2, XLS-R (1B): 48 blocks of width 1280, heads of 80 channels, 965.5 M parameters with the quantiser."""
        return cls._size(1280, 48, 1024)

    @classmethod
    def xls_r_2b(cls) -> XLSRConfig:
        """Table 2, XLS-R (2B): 48 blocks of width 1920, heads of 120 channels, 2163 M parameters with the quantiser."""
        return cls._size(1920, 48, 1024)


# What may stand before a text decoder, and which decoders there are, by the names that a checkpoint calls them by. The
# paper has the first of each.
ENCODERS: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "hubert": (HubertConfig, HubertModel),
    "wavlm": (WavLMConfig, WavLMModel),
    "unispeech": (UniSpeechConfig, UniSpeechModel),
    "unispeech-sat": (UniSpeechSatConfig, UniSpeechSatModel),
    "sew": (SEWConfig, SEWModel),
    "sew-d": (SEWConfig, SEWDModel),
    "wav2vec2-conformer": (Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel),
    "wav2vec2-bert": (Wav2Vec2BertConfig, Wav2Vec2BertModel),
}
DECODERS: dict[str, tuple[Any, Any]] = {
    "mbart": (MBartConfig, MBartForCausalLM),
    "speech_to_text_2": (Speech2Text2Config, Speech2Text2ForCausalLM),
}


@dataclass(frozen=True)
class SpeechEncoderDecoderConfig:
    """§4, speech translation: a speech encoder, a text decoder, and the tokens that frame a text."""

    encoder: Any  # of speech: a configuration of `encoder_type`, here with strided convolutions behind (`add_adapter`)
    decoder: Any  # of text: a configuration of `decoder_type`
    encoder_type: str = "wav2vec2"  # one of `ENCODERS`
    decoder_type: str = "mbart"  # one of `DECODERS`
    decoder_start_token_id: int = 2  # what the decoder reads first
    pad_token_id: int = 1  # padding
    eos_token_id: int = 2  # ends a text

    def __post_init__(self) -> None:
        for name, kinds in (("encoder", ENCODERS), ("decoder", DECODERS)):
            kind = getattr(self, f"{name}_type")
            if kind not in kinds:
                raise UsageError(f"There is no {name} {kind!r}; there are {', '.join(kinds)}.")
            restore_parts(self, **{name: kinds[kind][0]})

    @classmethod
    def _of(cls, encoder: XLSRConfig) -> SpeechEncoderDecoderConfig:
        adapted = dataclasses.replace(encoder, add_adapter=True, output_hidden_size=1024)
        return cls(adapted, MBartConfig.mbart_50())

    @classmethod
    def xls_r_300m(cls) -> SpeechEncoderDecoderConfig:
        """§4, XLS-R (0.3B) with mBART's decoder."""
        return cls._of(XLSRConfig.xls_r_300m())

    @classmethod
    def xls_r_1b(cls) -> SpeechEncoderDecoderConfig:
        """§4, XLS-R (1B) with mBART's decoder."""
        return cls._of(XLSRConfig.xls_r_1b())

    @classmethod
    def xls_r_2b(cls) -> SpeechEncoderDecoderConfig:
        """§4, XLS-R (2B) with mBART's decoder."""
        return cls._of(XLSRConfig.xls_r_2b())


@dataclass(frozen=True)
class SpeechEncoderDecoderGenerationConfig:
    """Not in the paper; how a released checkpoint wants its texts searched for (`generation_config.json`)."""

    options: tuple[tuple[str, Any], ...] = ()  # as for `transformers.GenerationConfig`, tokens above left out

    def for_sentences(self) -> dict[str, Any]:
        """The options, and where they say nothing of it five beams and 200 tokens, as the released ones are used."""
        options = dict(self.options)
        length = {} if options.keys() & {"max_length", "max_new_tokens"} else {"max_new_tokens": 200}
        return {"num_beams": 5} | length | options


# --- §3.1, language-balanced batches ----------------------------------------------------------------------------------


def language_probabilities(
    hours: Sequence[float] | Float[Array, " languages"], alpha: float
) -> Float[Array, " languages"]:
    r"""§3.1: $p_l \propto (n_l / N)^\alpha$; $\alpha$ = 1 draws by hours, 0 all languages alike.

    Raises:
        UsageError: if a language has no speech.
    """
    n = jnp.asarray(hours, jnp.float32)
    if not bool((n > 0).all()):
        raise UsageError("Every language needs more than 0 hours of speech.")
    weights = (n / n.sum()) ** alpha
    return weights / weights.sum()


def sample_languages(
    key: jax.Array, hours: Sequence[float] | Float[Array, " languages"], alpha: float, count: int
) -> Int[Array, " count"]:
    """§3.1: the language of each of `count` utterances of a batch, drawn by `language_probabilities`."""
    probabilities = language_probabilities(hours, alpha)
    return jax.random.choice(key, len(probabilities), (count,), p=probabilities)


# --- §4, speech translation -------------------------------------------------------------------------------------------


class SpeechEncoderDecoderModel(nnx.Module):
    """§4, speech translation: XLS-R, its frames shortened to 160 ms, and mBART's decoder.

    Any encoder of `ENCODERS` and any decoder of `DECODERS` fit: with wav2vec 2.0 and Speech2Text2's decoder this is
    the model of arXiv 2104.06678.
    """

    def __init__(
        self,
        config: SpeechEncoderDecoderConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = ENCODERS[config.encoder_type][1](config.encoder, **kwargs)
        self.decoder = DECODERS[config.decoder_type][1](config.decoder, **kwargs)
        if config.encoder.head_size != config.decoder.d_model:
            self.enc_to_dec_proj = Linear(config.encoder.head_size, config.decoder.d_model, **kwargs)
        self.config, self.generation_config = config, SpeechEncoderDecoderGenerationConfig()

    def encode(
        self,
        input_values: Float[Array, "batch steps *bands"],
        attention_mask: Int[Array, "batch steps"] | None = None,
        **options: Any,
    ) -> tuple[BaseModelOutput, Bool[Array, "batch frames"] | None]:
        """What the decoder attends to, and which of its frames are speech; `options` are `Wav2Vec2Model`'s."""
        encoded = self.encoder(input_values, attention_mask, **options)
        states = encoded.last_hidden_state
        if hasattr(self, "enc_to_dec_proj"):
            states = self.enc_to_dec_proj(states)
        mask = None if attention_mask is None else self.encoder.frame_mask(attention_mask, states.shape[1])
        output = BaseModelOutput(
            last_hidden_state=states, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output, mask

    def __call__(
        self,
        input_values: Float[Array, "batch steps *bands"] | None = None,
        attention_mask: Int[Array, "batch steps"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        *,
        input_features: Float[Array, "batch steps bands"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """Logits for every token and, with `labels`, their mean cross-entropy.

        Args:
            input_values: waveforms at 16 kHz, or what else the encoder reads.
            attention_mask: 1 for a sample, or a step, of the recording, 0 for padding behind it.
            decoder_input_ids: tokens; by default `labels` shifted right.
            decoder_attention_mask: 1 where a token is real.
            input_features: what an encoder reads that hears no waveforms (w2v-BERT), in place of `input_values`.
            labels: targets, -100 where there is none.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout, layer drop and masking on.
            options: of the encoder; see `Wav2Vec2Model`.

        Raises:
            UsageError: if there is nothing to hear, or there are neither tokens nor labels.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise UsageError("Give decoder_input_ids or labels; generate makes text without them.")
            decoder_input_ids = shift_tokens_right(
                jnp.asarray(labels), self.config.pad_token_id, self.config.decoder_start_token_id
            )
        returned = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        keys = [None, None] if key is None else list(jax.random.split(key))
        heard = given_speech(input_values, input_features)
        encoded, mask = self.encode(heard, attention_mask, key=keys[0], **returned, **options)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoded.last_hidden_state,
            mask,
            labels=labels,
            key=keys[1],
            **returned,
        )
        return Seq2SeqLMOutput(
            loss=decoded.loss,
            logits=decoded.logits,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def search_config(self, **options: Any) -> GenerationConfig:
        """How to search for a text: by `options`, and by those of the checkpoint where they say nothing."""
        config = self.config
        defaults: dict[str, Any] = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        defaults["forced_eos_token_id"] = config.eos_token_id  # what is cut short ends all the same
        defaults |= dict(self.generation_config.options)
        return GenerationConfig.over(defaults, options)

    def generate(
        self,
        input_values: Float[Array, "batch steps *bands"] | None = None,
        attention_mask: Int[Array, "batch steps"] | None = None,
        *,
        input_features: Float[Array, "batch steps bands"] | None = None,
        decoder_input_ids: Any = None,
        masked_group_norm: bool = False,
        masked_adapter: bool = False,
        key: jax.Array | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """Translate, by one compiled loop.

        Args:
            input_values: waveforms at 16 kHz, or what else the encoder reads.
            attention_mask: 1 for a sample, or a step, of the recording, 0 for padding behind it.
            input_features: what an encoder reads that hears no waveforms (w2v-BERT), in place of `input_values`.
            decoder_input_ids: the text's beginning; by default `decoder_start_token_id`.
            masked_group_norm: together with the next translate a padded batch as its items one by one, which
                `audiozoo translate` does; by default padding is heard as the encoder's own class hears it. See
                `Wav2Vec2Model`.
            masked_adapter: see `Wav2Vec2Model`.
            key: randomness for `do_sample=True`.
            streamer: called on the host with every token.
            options: as for `transformers.generate`, by default those of the checkpoint; `forced_bos_token_id` is the
                language to translate into.

        Returns:
            Tokens, the beginning included, padded to the longest; with `return_dict_in_generate=True` a
            `GenerateOutput`.
        """
        config, chosen = self.config, self.search_config(**options)
        heard = given_speech(input_values, input_features)
        if decoder_input_ids is None:
            decoder_input_ids = np.full((len(heard), 1), config.decoder_start_token_id)
        check_ids(decoder_input_ids, config.decoder.vocab_size)
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        masked = {"masked_group_norm": masked_group_norm, "masked_adapter": masked_adapter}
        output = _generate(
            *nnx.split(self),
            jnp.asarray(heard),
            mask,
            jnp.asarray(decoder_input_ids, jnp.int32),
            key,
            config=chosen,
            streamer=streamer,
            masked=tuple(name for name, wanted in masked.items() if wanted),
        ).trim()
        return output if chosen.return_dict_in_generate else np.asarray(output.sequences)


@partial(jax.jit, static_argnames=("graphdef", "config", "streamer", "masked"))
def _generate(
    graphdef: Any,
    state: Any,
    heard: jax.Array,
    attention_mask: jax.Array | None,
    prompt: jax.Array,
    key: jax.Array | None,
    *,
    config: GenerationConfig,
    streamer: Streamer | None,
    masked: tuple[str, ...],
) -> GenerateOutput:
    model = nnx.merge(graphdef, state)
    encoded, mask = model.encode(heard, attention_mask, **dict.fromkeys(masked, True))
    decoder = model.decoder.model.decoder
    cache = decoder.start(encoded.last_hidden_state, prompt.shape[1] + config.new_tokens(prompt.shape[1]))

    def decode(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        out = model.decoder(tokens, encoder_attention_mask=rows, past_key_values=past, cache_position=position)
        return out.logits, out.past_key_values

    return continue_text(decode, cache, mask, prompt, config, key=key, streamer=streamer)
