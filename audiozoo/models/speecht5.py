r"""# SpeechT5: Unified-Modal Encoder-Decoder Pre-Training for Spoken Language Processing

Junyi Ao, Rui Wang, Long Zhou, Chengyi Wang, Shuo Ren, Yu Wu, Shujie Liu, Tom Ko, Qing Li, Yu Zhang, Zhihua Wei, Yao
Qian, Jinyu Li, Furu Wei, 2021, arXiv 2110.07205.

One Transformer for speech and text, in and out. Six small nets stand around a shared encoder and decoder: whatever goes
in, a pre-net of its kind brings it to the same width, and whatever is to come out, a post-net of its kind makes. So one
pre-trained network becomes a recogniser, a voice, a voice changer, or whatever else has speech or text at its ends. It
learns from speech without text and text without speech, and a codebook that both must pass through now and then puts
them into one space.

    waveform 16 kHz ── convolutions, positions ──┐              ┌── tokens so far ── embedding ────────────────┐
         (speech-encoder pre-net)                ├── encoder ── decoder                 (text-decoder pre-net)
    characters ── embedding, positions ──────────┘   │  └ codes │ └── mel frames so far ── 2 × [MLP, dropout] ──┘
         (text-encoder pre-net)               units (HuBERT)    │       + speaker      (speech-decoder pre-net)
                                                                ├── tied embedding ──> next character  (post-net)
                                                                └── linear ── + 5 convolutions ──> two mel frames
                                                                    linear ──> stop?                   (post-net)

| paper | here |
| --- | --- |
| §2.1 and Figure 2, encoder | `SpeechT5Encoder`, `SpeechT5EncoderLayer` |
| §2.1 and Figure 2, decoder | `SpeechT5Decoder`, `SpeechT5DecoderLayer` |
| §2.1, relative positions in the encoder | `SpeechT5RelativePositionalEncoding`, `SpeechT5RelativeAttention` |
| §2.1 and Figure 2, each behind a pre-net | `SpeechT5EncoderWithPrenet`, `SpeechT5DecoderWithPrenet` |
| §2.1 and Figure 2, both | `SpeechT5Model` |
| §2.1, speech pre-nets | `SpeechT5SpeechEncoderPrenet`, `SpeechT5SpeechDecoderPrenet` |
| the same, positions of text encoder and speech decoder | `SpeechT5ScaledPositionalEncoding` |
| §2.1, speech post-net | `SpeechT5SpeechDecoderPostnet`, `SpeechT5BatchNormConvLayer` |
| §2.1, text pre-nets | `SpeechT5TextEncoderPrenet`, `SpeechT5TextDecoderPrenet` |
| §2.1, text post-net | `SpeechT5TextDecoderPostnet`, or tied `head` |
| §2.2, speech pre-training, Eq. 1 and 2 | `SpeechT5ForPreTraining.speech`, `spectrogram_loss` |
| §2.2, text pre-training, Eq. 3 | `SpeechT5ForPreTraining.text`, `text_infilling` |
| §2.2, joint pre-training, Eq. 4 and 5 | `SpeechT5ForPreTraining.mix`, `Wav2Vec2GumbelVectorQuantizer` |
| §3.2, automatic speech recognition; §3.4, speech translation | `SpeechT5ForSpeechToText` |
| §3.2, joint decoding with CTC and a language model | `SpeechT5ForSpeechToText.generate(ctc_weight=…, fusion=…)` |
| §3.2, the language model | `SpeechT5LanguageModel`, `SpeechT5LanguageModelDecoder`, `SpeechT5LanguageModelLayer` |
| not in the paper; in the released checkpoint of it | `SpeechT5LanguageModelWrapper` |
| §3.3, text to speech | `SpeechT5ForTextToSpeech`, on `SpeechT5Speaking`; `guided_attention_loss` |
| §3.5, voice conversion | `SpeechT5ForSpeechToSpeech` |
| §3.6, speech enhancement | `SpeechT5ForSpeechToSpeech.generate_speech(frames=…)`, `SpeechT5ForSpeechEnhancement` |
| §3.7, speaker identification | `SpeechT5ForSequenceClassification` |

What `transformers` lacks is here: enhancement, identification, the CTC head and the joint decoding, pre-training, and
LARGE, whose pre-norm blocks normalise the relative positions too. Where the two part: dropout in the speech-decoder
pre-net, which stays on when speaking (Tacotron 2, arXiv 1712.05884, §2.2), is drawn from a key and can be passed in
(`transformers` draws it anew, and keeps with the probability that it should drop with); cross-attentions of a batch
belong to their items (there, items and layers are mixed up); a shorter item of a batch is vocoded without what follows
it; text may be longer than the table of positions; a spectrogram with an odd frame at its end can be a target.

Checkpoints: `microsoft/speecht5_asr`, `_tts`, `_vc`, with `microsoft/speecht5_hifigan` to make sound, and the authors'
`speecht5_base.pt`, `speecht5_large.pt`, `speecht5_base_asr.pt`, `speecht5_tts.pt`, `speecht5_vc.pt`, `speecht5_sid.pt`;
and the authors' language model, fairseq's `transformer_lm`, with the `dict.txt` that names its tokens.

    import audiozoo
    model = audiozoo.load("microsoft/speecht5_tts")
    vocoder = audiozoo.load("microsoft/speecht5_hifigan")
    inputs = audiozoo.load_processor("microsoft/speecht5_tts")(text="Hello, my dog is cute.")
    waveform = model.generate(**inputs, speaker_embeddings=x_vector, vocoder=vocoder)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.decoding import GenerateOutput, GenerationConfig, while_loop
from audiozoo.decoding.ctc_prefix import PrefixScorer
from audiozoo.decoding.generate import Streamer
from audiozoo.decoding.synthesis import bucket
from audiozoo.errors import UsageError
from audiozoo.layers import (
    Conv1d,
    Dropout,
    Embed,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    attend,
    check_ids,
    layer_drop,
    merge_heads,
    relative_to_absolute,
    sinusoids,
    split_heads,
)
from audiozoo.layers.basic import at_least_float32, spread, unit_vectors
from audiozoo.layers.batch_norm import BatchNorm
from audiozoo.layers.losses import IGNORED_LABEL, cross_entropy, ctc_loss, shift_tokens_right
from audiozoo.layers.positions import interleaved_sinusoids
from audiozoo.layers.stacking import all_weights, unseen
from audiozoo.models import hubert, wav2vec2
from audiozoo.models.mbart import (
    MBartCache,
    MBartConfig,
    MBartDecoderLayer,
    MBartDecoderWrapper,
    MBartForCausalLM,
    continue_text,
    decode_blocks,
    empty_cache,
)
from audiozoo.models.speech_to_text import Speech2TextDecoder
from audiozoo.models.speech_to_text_2 import LanguageModelFusion, with_language_model
from audiozoo.outputs import (
    BaseModelOutput,
    DecoderOutput,
    ModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)

Modality = Literal["speech", "text"]


@dataclass(frozen=True)
class SpeechT5Config:
    """Sizes of one checkpoint (§3.1 for the base model); the defaults are those of `transformers`."""

    vocab_size: int = 81  # characters, special tokens, <mask> and <ctc_blank>
    hidden_size: int = 768  # width of the Transformer
    encoder_layers: int = 12  # blocks
    encoder_attention_heads: int = 12  # heads
    encoder_ffn_dim: int = 3072  # width inside the encoder's MLP
    encoder_layerdrop: float = 0.1  # chance that training skips a block
    decoder_layers: int = 6  # blocks
    decoder_ffn_dim: int = 3072  # width inside the decoder's MLP
    decoder_attention_heads: int = 12  # heads
    decoder_layerdrop: float = 0.1  # chance that training skips a block
    layer_norm_first: bool = False  # LayerNorm before attention and MLP instead of after (LARGE)
    hidden_act: str = "gelu"  # of the MLPs
    positional_dropout: float = 0.1  # after positions are added
    hidden_dropout: float = 0.1  # after attention and MLP
    attention_dropout: float = 0.1  # on attention weights
    activation_dropout: float = 0.1  # inside the MLPs
    initializer_range: float = 0.02  # standard deviation that weights start from
    layer_norm_eps: float = 1e-5  # in every LayerNorm but those of the convolutions
    scale_embedding: bool = False  # multiply the decoder's token embeddings by √hidden_size
    feat_extract_norm: str = "group"  # "group": GroupNorm after the first convolution; "layer": LayerNorm after each
    feat_proj_dropout: float = 0.0  # after the feature projection
    feat_extract_activation: str = "gelu"  # after every convolution
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)  # channels out of each convolution
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)  # 320 samples a frame in all: 20 ms
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)  # taps; a frame sees 400 samples: 25 ms
    conv_bias: bool = False  # whether the convolutions have biases
    num_conv_pos_embeddings: int = 128  # taps of the positional convolution, 20 ms each
    num_conv_pos_embedding_groups: int = 16  # its channel groups
    frame_rule: str = "lengths"  # how padding is counted in frames; "samples" as in the authors' code
    apply_spec_augment: bool = True  # whether spans may be masked at all
    mask_time_prob: float = 0.05  # share of frames under time spans; 0.8 in pre-training
    mask_time_length: int = 10  # frames a span
    mask_time_min_masks: int = 2  # spans at least, whatever the share
    mask_feature_prob: float = 0.0  # share of channels under channel spans
    mask_feature_length: int = 10  # channels a span
    mask_feature_min_masks: int = 0  # spans at least, whatever the share
    pad_token_id: int = 1  # padding
    bos_token_id: int = 0  # of no use to the model; kept for export
    eos_token_id: int = 2  # ends a text
    decoder_start_token_id: int = 2  # what the text decoder reads first
    num_mel_bins: int = 80  # bands of a spectrogram's frame
    speech_decoder_prenet_layers: int = 2  # layers before the decoder
    speech_decoder_prenet_units: int = 256  # their width
    speech_decoder_prenet_dropout: float = 0.5  # behind each of them, always
    speaker_embedding_dim: int = 512  # width of an x-vector
    speech_decoder_postnet_layers: int = 5  # convolutions after the decoder
    speech_decoder_postnet_units: int = 256  # their channels
    speech_decoder_postnet_kernel: int = 5  # their taps
    speech_decoder_postnet_dropout: float = 0.5  # behind each of them, in training
    reduction_factor: int = 2  # frames that the decoder makes in a step
    max_speech_positions: int = 4000  # longest spectrogram, which is no limit here; kept for export
    max_text_positions: int = 450  # tokens of the longest text that is generated
    encoder_max_relative_position: int = 160  # distances that are told apart, in either direction
    use_guided_attention_loss: bool = True  # push cross-attention towards the diagonal when learning to speak
    guided_attention_loss_num_heads: int = 2  # on so many heads of every block; -1 for all
    guided_attention_loss_sigma: float = 0.4  # how wide the diagonal is
    guided_attention_loss_scale: float = 10.0  # weight
    tie_word_embeddings: bool = True  # logits by the embedding itself
    ctc_weight: float = 0.0  # share of the CTC loss in recognition, 0.5 in the authors' recipe; 0 for no CTC head
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # speakers, of identification
    num_clusters: int = 504  # hidden units of pre-training: 500, and fairseq's four special ones
    label_rate: float = 50.0  # units a second
    final_dim: int = 256  # width in which states and units are compared
    logit_temp: float = 0.1  # temperature of that comparison
    num_codevectors_per_group: int = 100  # K of §2.2, entries of each codebook
    num_codevector_groups: int = 2  # G of §2.2, codebooks
    codevector_dim: int = 768  # width of a code, that of the states
    codebook_prob: float = 0.1  # share of the time steps at which codes replace states

    def __post_init__(self) -> None:
        wav2vec2.check_convolutions(self)

    @property
    def num_labels(self) -> int:
        """Speakers that are told apart."""
        return len(self.id2label)

    @property
    def ctc_blank_id(self) -> int:
        """CTC's blank, the last entry of the vocabulary."""
        return self.vocab_size - 1

    @classmethod
    def base(cls) -> SpeechT5Config:
        """§3.1: 12 and 6 blocks of width 768; as pre-trained, with text of up to 600 tokens."""
        return cls(max_text_positions=600, mask_time_prob=0.8, encoder_layerdrop=0.05, decoder_layerdrop=0.05)

    @classmethod
    def large(cls) -> SpeechT5Config:
        """Not in the paper; in the released checkpoints: 24 and 6 pre-norm blocks of width 1024."""
        return cls(
            hidden_size=1024,
            encoder_layers=24,
            encoder_attention_heads=16,
            encoder_ffn_dim=4096,
            decoder_attention_heads=16,
            decoder_ffn_dim=4096,
            layer_norm_first=True,
            feat_extract_norm="layer",
            max_text_positions=600,
            mask_time_prob=0.8,
            codevector_dim=1024,
            final_dim=768,
        )

    @classmethod
    def asr(cls) -> SpeechT5Config:
        """§3.2, the base model as a recogniser, `microsoft/speecht5_asr`: 151 M parameters, the embedding once."""
        return cls()

    @classmethod
    def tts(cls) -> SpeechT5Config:
        """§3.3, the base model as a voice, `microsoft/speecht5_tts`: 144 M parameters."""
        return cls(max_speech_positions=1876, max_text_positions=600)

    @classmethod
    def vc(cls) -> SpeechT5Config:
        """§3.5, the base model as a voice changer, `microsoft/speecht5_vc`: 154 M parameters."""
        return cls(max_speech_positions=1876, max_text_positions=600)


@dataclass(frozen=True)
class SpeechT5GenerationConfig:
    """§3.2, how a recogniser searches; nothing said, it takes the most probable tokens up to `max_text_positions`."""

    options: tuple[tuple[str, Any], ...] = ()  # as for `transformers.GenerationConfig`


# --- positions -------------------------------------------------------------------------------------------------------


def padded_sinusoids(count: int, channels: int, padding: int) -> np.ndarray:
    """Rows for padding (zeros) and for the 1st to the `count`-th token, fairseq's: sines beside cosines, from there on.

    fairseq numbers positions from `padding` + 1.
    """
    table = sinusoids(padding + 1 + count, channels)[padding:]
    table[0] = 0
    return table


class SpeechT5ScaledPositionalEncoding(nnx.Module):
    r"""§2.1, positions of text encoder and speech decoder: $x + \alpha\,\mathrm{PE}$ (arXiv 1809.08895, §3.2)."""

    def __init__(self, config: SpeechT5Config, *, param_dtype: Any, **_: Any):
        self.alpha = nnx.Param(jnp.ones((), param_dtype))
        self.rate = config.positional_dropout

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        dropout: Dropout,
        position: int | Int[Array, ""] = 0,
        limit: int | None = None,
    ) -> Float[Array, "batch time hidden"]:
        """Add positions from `position` on, all of them less than `limit`, the number of steps by default."""
        table = jnp.asarray(interleaved_sinusoids(np.arange(limit or x.shape[1]), x.shape[2]), x.dtype)
        rows = jax.lax.dynamic_slice_in_dim(table, position, x.shape[1])
        return dropout(x + spread(self.alpha[...], x) * rows, self.rate)


class SpeechT5RelativePositionalEncoding(nnx.Module):
    r"""§2.1, "relative position embedding" (Shaw et al., arXiv 1803.02155): a key for each distance $i - j$."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        width = config.hidden_size // config.encoder_attention_heads
        normal = nnx.initializers.normal(1.0)
        self.pe_k = Embed(2 * config.encoder_max_relative_position, width, embedding_init=normal, **kwargs)

    def __call__(self) -> Float[Array, "distances head_dim"]:
        """The keys of the distances $-n, \\dots, n - 1$; farther ones share those at the ends."""
        return self.pe_k.embedding[...]


def relative_scores(
    query: Float[Array, "batch heads time head_dim"], keys: Float[Array, "distances head_dim"]
) -> Float[Array, "batch heads time time"]:
    r"""§2.1: $q_i^\top a_{\mathrm{clip}(i - j,\,-n,\,n-1)}$ (Shaw et al., arXiv 1803.02155, Eq. 4 and 5, keys alone).

    The product with every key once, and then its columns along the diagonals: no table of all pairs is made.
    """
    time, reach = query.shape[2], len(keys) // 2
    scores = (query @ keys.T.astype(query.dtype))[..., ::-1]  # column c: distance i - j = n - 1 - c
    far = [(0, 0)] * 3 + [(max(time - reach, 0), max(time - 1 - reach, 0))]
    first = max(reach - time, 0)
    scores = jnp.pad(at_least_float32(scores), far, mode="edge").astype(query.dtype)
    return relative_to_absolute(scores[..., first : first + 2 * time - 1])


# --- §2.1, pre-nets and post-nets ------------------------------------------------------------------------------------


class SpeechT5SpeechEncoderPrenet(wav2vec2.Wav2Vec2Model):
    """§2.1, speech-encoder pre-net: wav2vec 2.0 up to its Transformer, and sinusoidal positions.

    Unlike there, padded frames are not zeroed before the positional convolution, so the last frames of a shorter item
    see a little of its padding.
    """

    def __init__(self, config: SpeechT5Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.feature_encoder = wav2vec2.Wav2Vec2FeatureEncoder(config, **kwargs)
        self.feature_projection = wav2vec2.Wav2Vec2FeatureProjection(config, **kwargs)
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nnx.Param(jax.random.uniform(rngs.params(), (config.hidden_size,), param_dtype))
        self.pos_conv_embed = wav2vec2.Wav2Vec2PositionalConvEmbedding(config, **kwargs)
        self.config = config

    @property
    def frame_rule(self) -> str:  # type: ignore[override]
        """How padding is counted in frames."""
        return self.config.frame_rule

    def features(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        *,
        masked_group_norm: bool = False,
        feature_grad_mult: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "batch frames channels"], Bool[Array, "batch frames"] | None]:
        """What the convolutions make of waveforms, and which of it is speech; for the options see `Wav2Vec2Model`."""
        lengths = None
        if masked_group_norm and attention_mask is not None:
            lengths = attention_mask.astype(jnp.int32).sum(axis=-1)
        features = wav2vec2.scale_gradient(self.feature_encoder(input_values, lengths), feature_grad_mult)
        return features, None if attention_mask is None else self.frame_mask(attention_mask, features.shape[1])

    def embed(
        self,
        features: Float[Array, "batch frames channels"],
        mask: Bool[Array, "batch frames"] | None,
        dropout: Dropout,
        spans: Bool[Array, "batch frames"] | None = None,
        channels: Bool[Array, "batch hidden"] | None = None,
    ) -> tuple[Float[Array, "batch frames hidden"], Bool[Array, "batch frames"] | None]:
        """Project features, hide spans and channels, which training draws, add positions; returns the spans too."""
        if (key := dropout.next_key()) is not None:
            drawn = self.draw_masks(key, features.shape[0], features.shape[1], mask)
            spans, channels = drawn[0] if spans is None else spans, drawn[1] if channels is None else channels
        x, _ = self.feature_projection(features, dropout)
        x = self.mask(x, spans, channels)
        x = x + self.pos_conv_embed(x)
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        table = padded_sinusoids(x.shape[1], self.config.hidden_size, self.config.pad_token_id)
        return x + jnp.asarray(table, x.dtype)[jnp.cumsum(real, axis=1) * real], spans

    def __call__(  # type: ignore[override]
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        *,
        mask_feature_indices: Bool[Array, "batch hidden"] | None = None,
        dropout: Dropout | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "batch frames hidden"], Bool[Array, "batch frames"] | None]:
        """The encoder's input, and which of its frames are speech; what is to be hidden is drawn in training."""
        features, mask = self.features(input_values, attention_mask, **options)
        x, _ = self.embed(features, mask, dropout or Dropout(None), mask_time_indices, mask_feature_indices)
        return x, mask


class SpeechT5TextEncoderPrenet(nnx.Module):
    """§2.1, text-encoder pre-net: an embedding of characters, and positions."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        init = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, embedding_init=init, **kwargs)
        self.encode_positions = SpeechT5ScaledPositionalEncoding(config, **kwargs)

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Int[Array, "batch tokens"] | None = None,
        *,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], Bool[Array, "batch tokens"] | None]:
        """The encoder's input, and which of its tokens are real."""
        mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        return self.encode_positions(self.embed_tokens(input_ids), dropout or Dropout(None)), mask


def draw_prenet_masks(
    config: SpeechT5Config, key: jax.Array, steps: int | Int[Array, " steps"]
) -> Bool[Array, "layers steps units"]:
    """Which units of the speech-decoder pre-net are kept at each decoder step, for all items alike (§2.1).

    A step's are drawn from its own key, so that they do not depend on how many steps follow.
    """
    shape = (config.speech_decoder_prenet_layers, config.speech_decoder_prenet_units)
    keep = 1 - config.speech_decoder_prenet_dropout

    def one(step: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, step), keep, shape)

    return jax.vmap(one, out_axes=1)(jnp.arange(steps) if isinstance(steps, int) else steps)


class SpeechT5SpeechDecoderPrenet(nnx.Module):
    """§2.1, speech-decoder pre-net: fully connected layers with ReLU, fed with frames of the log-mel spectrogram.

    Dropout behind the first two is never switched off. The speaker's x-vector, of unit length, joins every frame.
    """

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        units, hidden, speaker = config.speech_decoder_prenet_units, config.hidden_size, config.speaker_embedding_dim
        inputs = [config.num_mel_bins] + [units] * (config.speech_decoder_prenet_layers - 1)
        self.layers = nnx.List([Linear(width, units, **kwargs) for width in inputs])
        self.final_layer = Linear(units, hidden, **kwargs)
        self.encode_positions = SpeechT5ScaledPositionalEncoding(config, **kwargs)
        self.speaker_embeds_layer = Linear(speaker + hidden, hidden, **kwargs)
        self.rate, self.dtype = config.speech_decoder_prenet_dropout, kwargs["dtype"]

    def __call__(
        self,
        frames: Float[Array, "batch steps mels"],
        speaker_embeddings: Float[Array, "batch speaker"] | None,
        masks: Bool[Array, "layers steps units"],
        *,
        position: int | Int[Array, ""] = 0,
        limit: int | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch steps hidden"]:
        """The decoder's input.

        Args:
            frames: of the spectrogram so far, one for each step.
            speaker_embeddings: x-vectors.
            masks: units that are kept; see `draw_prenet_masks`.
            position: of the first step.
            limit: more than any position; by default the number of steps.
            dropout: source of keys for the dropout of training.
        """
        x = frames if self.dtype is None else frames.astype(self.dtype)
        for layer, kept in zip(self.layers, masks, strict=True):
            x = jax.nn.relu(layer(x))
            x = jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype)) if self.rate else x
        x = self.encode_positions(self.final_layer(x), dropout or Dropout(None), position, limit)
        if speaker_embeddings is None:
            return x
        speaker = unit_vectors(jnp.asarray(speaker_embeddings, x.dtype), shortest=1e-12)
        speaker = jnp.broadcast_to(speaker[:, None], (*x.shape[:2], speaker.shape[-1]))
        return jax.nn.relu(self.speaker_embeds_layer(jnp.concatenate([x, speaker], axis=-1)))


class SpeechT5TextDecoderPrenet(nnx.Module):
    """§2.1, text-decoder pre-net: an embedding of characters, and positions; the post-net has the same embedding."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        init = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, embedding_init=init, **kwargs)
        self.config = config

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        position: int | Int[Array, ""] = 0,
        limit: int | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        """The decoder's input; `position` is that of the first token, and `limit` more than any."""
        config = self.config
        x = self.embed_tokens(input_ids)
        if config.scale_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        real = input_ids != config.pad_token_id
        table = padded_sinusoids(limit or input_ids.shape[1], config.hidden_size, config.pad_token_id)
        x = x + jnp.asarray(table, x.dtype)[(jnp.cumsum(real, axis=1) + position) * real]
        return (dropout or Dropout(None))(x, config.positional_dropout)


class SpeechT5BatchNormConvLayer(nnx.Module):
    """§2.1, one of the post-net's "five 1-dimensional convolutional layers", batch-normalised."""

    def __init__(self, config: SpeechT5Config, index: int, **kwargs: Any):
        last, taps = config.speech_decoder_postnet_layers - 1, config.speech_decoder_postnet_kernel
        inputs = config.num_mel_bins if index == 0 else config.speech_decoder_postnet_units
        outputs = config.num_mel_bins if index == last else config.speech_decoder_postnet_units
        self.conv = Conv1d(inputs, outputs, taps, padding=(taps - 1) // 2, use_bias=False, **kwargs)
        self.batch_norm = BatchNorm(outputs, **kwargs)
        self.squash, self.rate = index < last, config.speech_decoder_postnet_dropout

    def __call__(
        self, x: Float[Array, "batch frames inputs"], dropout: Dropout
    ) -> Float[Array, "batch frames outputs"]:
        """Convolve, normalise and, but for the last layer, squash."""
        x = self.batch_norm(self.conv(x), train=dropout.key is not None)
        return dropout(jnp.tanh(x) if self.squash else x, self.rate)


class SpeechT5SpeechDecoderPostnet(nnx.Module):
    """§2.1, speech-decoder post-net: frames, what five convolutions add to them, and when to stop."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        self.feat_out = Linear(config.hidden_size, config.num_mel_bins * config.reduction_factor, **kwargs)
        self.prob_out = Linear(config.hidden_size, config.reduction_factor, **kwargs)
        count = config.speech_decoder_postnet_layers
        self.layers = nnx.List([SpeechT5BatchNormConvLayer(config, i, **kwargs) for i in range(count)])
        self.config = config

    def postnet(
        self,
        frames: Float[Array, "batch frames mels"],
        lengths: Int[Array, " batch"] | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "batch frames mels"]:
        """Refine a spectrogram; with `lengths` as if each item stood alone, and zeros behind it."""

        inside: Any = None if lengths is None else (jnp.arange(frames.shape[1]) < lengths[:, None])[..., None]

        def cut(x: jax.Array) -> jax.Array:
            return x if inside is None else jnp.where(inside, x, jnp.zeros((), x.dtype))

        x = cut(frames)
        for layer in self.layers:
            x = cut(layer(x, dropout or Dropout(None)))
        return cut(frames + x)

    def __call__(
        self, states: Float[Array, "batch steps hidden"], dropout: Dropout | None = None
    ) -> tuple[Float[Array, "batch frames mels"], Float[Array, "batch frames mels"], Float[Array, "batch frames"]]:
        """Frames before and after the convolutions, and each one's logit of being the last."""
        before = self.feat_out(states).reshape(len(states), -1, self.config.num_mel_bins)
        return before, self.postnet(before, dropout=dropout), self.prob_out(states).reshape(len(states), -1)


class SpeechT5TextDecoderPostnet(nnx.Module):
    """§2.1, text-decoder post-net where it is not tied to the pre-net's embedding."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        self.lm_head = Linear(config.hidden_size, config.vocab_size, use_bias=False, **kwargs)

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocabulary"]:
        """Logits."""
        return self.lm_head(x)


# --- §2.1, encoder-decoder backbone ----------------------------------------------------------------------------------


class SpeechT5RelativeAttention(MultiHeadAttention):
    r"""§2.1, self-attention of the encoder: $(q_i^\top k_j + q_i^\top a_{i-j}) / \sqrt{d}$ inside the softmax."""

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "batch time hidden"],
        distances: Float[Array, "distances head_dim"],
        *,
        mask: Bool[Array, "#batch 1 1 time"] | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], Float[Array, "batch heads time time"]]:
        """Attend; returns the output and the attention weights."""
        query, own = split_heads(self.q_proj(x), self.heads), self.key_values(x)
        bias, options = relative_scores(query * self.scale, distances), {"scale": self.scale, "mask": mask}
        options |= {"dropout_rate": self.dropout_rate, "dropout": dropout}
        output, weights = attend(query, own.key, own.value, bias=bias, **options)
        return self.out_proj(merge_heads(output)), weights


class SpeechT5EncoderLayer(nnx.Module):
    """§2.1, a block of the encoder, norms last; in LARGE norms first, and one for the keys of the distances too."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        width, heads, eps = config.hidden_size, config.encoder_attention_heads, config.layer_norm_eps
        init = nnx.initializers.normal(config.initializer_range)
        self.attention = SpeechT5RelativeAttention(
            width, heads, dropout=config.attention_dropout, kernel_init=init, **kwargs
        )
        self.layer_norm = LayerNorm(width, epsilon=eps, **kwargs)
        self.feed_forward = wav2vec2.Wav2Vec2FeedForward(config, config.encoder_ffn_dim, **kwargs)
        self.final_layer_norm = LayerNorm(width, epsilon=eps, **kwargs)
        if config.layer_norm_first:
            self.norm_k = LayerNorm(width // heads, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        dropout: Dropout,
        mask: Bool[Array, "batch 1 1 time"] | None,
        distances: Float[Array, "distances head_dim"],
    ) -> tuple[Float[Array, "batch time hidden"], Float[Array, "batch heads time time"]]:
        """One block; returns its output and its attention weights."""
        rate = self.config.hidden_dropout
        if self.config.layer_norm_first:
            attention, weights = self.attention(self.layer_norm(x), self.norm_k(distances), mask=mask, dropout=dropout)
            x = x + dropout(attention, rate)
            return x + self.feed_forward(self.final_layer_norm(x), dropout), weights
        attention, weights = self.attention(x, distances, mask=mask, dropout=dropout)
        x = self.layer_norm(x + dropout(attention, rate))
        return self.final_layer_norm(x + self.feed_forward(x, dropout)), weights


class SpeechT5Encoder(nnx.Module):
    """§2.1, the shared encoder."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        self.layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.layers = nnx.List([SpeechT5EncoderLayer(config, **kwargs) for _ in range(config.encoder_layers)])
        self.embed_positions = SpeechT5RelativePositionalEncoding(config, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        mask: Bool[Array, "batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        dropout: Dropout | None = None,
    ) -> BaseModelOutput:
        """Encode what a pre-net made, where `mask` is True; for the options see `SpeechT5Model`."""
        config, dropout = self.config, dropout or Dropout(None)
        keys = None if mask is None else mask[:, None, None, :]
        if not config.layer_norm_first:
            x = self.layer_norm(x)
        x = dropout(x, config.hidden_dropout)
        distances = self.embed_positions()
        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer_drop(layer, x, config.encoder_layerdrop, dropout, keys, distances)
            hidden_states += [*unseen(layer), x]
            attentions.append(weights)
        if config.layer_norm_first:
            x = hidden_states[-1] = self.layer_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=all_weights(attentions) if output_attentions else None,
        )


class SpeechT5DecoderLayer(MBartDecoderLayer):
    """§2.1, a block of the decoder, made as mBART's: but norms last, in LARGE first as there."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        width, heads, init = config.hidden_size, config.decoder_attention_heads, config.initializer_range
        norm = partial(LayerNorm, width, epsilon=config.layer_norm_eps, **kwargs)
        kwargs["kernel_init"] = nnx.initializers.normal(init)
        attention = partial(MultiHeadAttention, width, heads, dropout=config.attention_dropout, **kwargs)
        self.self_attn, self.self_attn_layer_norm = attention(), norm()
        self.encoder_attn, self.encoder_attn_layer_norm = attention(), norm()
        self.feed_forward = wav2vec2.Wav2Vec2FeedForward(config, config.decoder_ffn_dim, **kwargs)
        self.final_layer_norm = norm()
        self.norm_first, self.dropout_rate = config.layer_norm_first, config.hidden_dropout

    def mlp(self, x: Float[Array, "batch time hidden"], dropout: Dropout) -> Float[Array, "batch time hidden"]:
        """wav2vec 2.0's, as in the encoder."""
        return self.feed_forward(x, dropout)


class SpeechT5Decoder(nnx.Module):
    """§2.1, the shared decoder."""

    def __init__(self, config: SpeechT5Config, **kwargs: Any):
        self.layers = nnx.List([SpeechT5DecoderLayer(config, **kwargs) for _ in range(config.decoder_layers)])
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm = LayerNorm(width, epsilon=eps, **kwargs) if config.layer_norm_first else None
        self.config = config

    def start(self, memory: Float[Array, "batch frames hidden"], length: int) -> MBartCache:
        """An empty cache for `length` steps, and the keys and values of the encoder's states."""
        return empty_cache(self.layers, memory, self.config.decoder_attention_heads, length)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        attention_mask: Int[Array, "batch time"] | Bool[Array, "batch time"] | None = None,
        encoder_hidden_states: Float[Array, "batch frames hidden"] | None = None,
        encoder_attention_mask: Bool[Array, "batch frames"] | None = None,
        **options: Any,
    ) -> DecoderOutput:
        """Decode what a pre-net made, against the encoder's states; for the options see `decode_blocks`."""
        source, rate = (encoder_hidden_states, encoder_attention_mask), self.config.decoder_layerdrop
        return decode_blocks(self.layers, x, attention_mask, *source, drop_rate=rate, norm=self.layer_norm, **options)


class SpeechT5EncoderWithPrenet(nnx.Module):
    """§2.1 and Figure 2, the left half: the shared encoder behind the pre-net of one modality, or of none."""

    def __init__(self, config: SpeechT5Config, modality: Modality | None, **kwargs: Any):
        if modality is not None:
            net: Any = SpeechT5SpeechEncoderPrenet if modality == "speech" else SpeechT5TextEncoderPrenet
            self.prenet = net(config, **kwargs)
        self.wrapped_encoder = SpeechT5Encoder(config, **kwargs)
        self.modality = modality

    def mask(self, attention_mask: Int[Array, "batch time"] | None, states: int) -> Bool[Array, "batch states"] | None:
        """Which of so many states are real."""
        if attention_mask is None or self.modality != "speech":
            return None if attention_mask is None else jnp.asarray(attention_mask) != 0
        return self.prenet.frame_mask(attention_mask, states)

    def __call__(
        self,
        input_values: Any,
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
        **options: Any,
    ) -> tuple[BaseModelOutput, Bool[Array, "batch states"] | None]:
        """Encode waveforms, tokens or states; returns the states, and which of them are real."""
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        dropout = Dropout(key)
        if self.modality is None:
            x, mask = input_values, self.mask(attention_mask, 0)
        else:
            x, mask = self.prenet(input_values, attention_mask, dropout=dropout, **options)
        return self.wrapped_encoder(x, mask, dropout=dropout, **asked), mask


class SpeechT5DecoderWithPrenet(nnx.Module):
    """§2.1 and Figure 2, the right half: the shared decoder behind the pre-net of one modality, or of none."""

    def __init__(self, config: SpeechT5Config, modality: Modality | None, **kwargs: Any):
        if modality is not None:
            net: Any = SpeechT5SpeechDecoderPrenet if modality == "speech" else SpeechT5TextDecoderPrenet
            self.prenet = net(config, **kwargs)
        self.wrapped_decoder = SpeechT5Decoder(config, **kwargs)
        self.modality = modality


class SpeechT5Model(nnx.Module):
    """§2.1 and Figure 2: encoder and decoder, each with a pre-net; by itself without, from states to states."""

    def __init__(
        self, config: SpeechT5Config, encoder: Modality | None = None, decoder: Modality | None = None, **kwargs: Any
    ):
        self.encoder = SpeechT5EncoderWithPrenet(config, encoder, **kwargs)
        self.decoder = SpeechT5DecoderWithPrenet(config, decoder, **kwargs)
        self.config = config

    def __call__(
        self,
        input_values: Any = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_values: Any = None,
        decoder_attention_mask: Int[Array, "batch steps"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        *,
        speaker_embeddings: Float[Array, "batch speaker"] | None = None,
        prenet_masks: Bool[Array, "layers steps units"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Seq2SeqModelOutput:
        """The decoder's states.

        Args:
            input_values: waveforms, tokens or states, as the encoder's pre-net has it.
            attention_mask: 1 where a sample or token is real.
            decoder_input_values: spectrogram, tokens or states, as the decoder's pre-net has it.
            decoder_attention_mask: 1 where one of them is real.
            encoder_outputs: an earlier encoding.
            speaker_embeddings: x-vectors of the wanted voices.
            prenet_masks: units of the speech-decoder pre-net that are kept; drawn from `key`, or from a fixed key.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout, layer drop and masking on.
            options: of the speech-encoder pre-net.

        Raises:
            UsageError: without an input.
        """
        keys: Any = (None, None, jax.random.key(0)) if key is None else jax.random.split(key, 3)
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is not None:
            encoded = encoder_outputs
            mask = self.encoder.mask(attention_mask, encoded.last_hidden_state.shape[1])
        elif input_values is None:
            raise UsageError("Give the model its input, or encoder_outputs of an earlier call.")
        else:
            encoded, mask = self.encoder(input_values, attention_mask, key=keys[0], **asked, **options)
        x, dropout = decoder_input_values, Dropout(keys[1])
        if self.decoder.modality == "speech":
            if prenet_masks is None:
                prenet_masks = draw_prenet_masks(self.config, keys[2], x.shape[1])
            x = self.decoder.prenet(x, speaker_embeddings, prenet_masks, dropout=dropout)
        elif self.decoder.modality == "text":
            x = self.decoder.prenet(x, dropout=dropout)
        decoded = self.decoder.wrapped_decoder(
            x, decoder_attention_mask, encoded.last_hidden_state, mask, dropout=dropout, **asked
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


def _states(outputs: Seq2SeqModelOutput) -> dict[str, Any]:
    """What a head passes on of the model's output."""
    return {name: outputs[name] for name in outputs.keys() if name != "last_hidden_state"}  # noqa: SIM118


# --- §3.2 and §3.4, speech to text ------------------------------------------------------------------------------------


class SpeechT5SpeechToTextOutput(Seq2SeqLMOutput):
    """§3.2: the decoder's logits and, of a model with a CTC head, those of each frame."""

    ctc_logits: Float[Array, "batch frames vocabulary"] | None = None


class SpeechT5ForSpeechToText(nnx.Module):
    r"""§3.2, recognition, and §3.4, translation: $\mathcal L = (1 - w)\,\mathcal L_{CE} + w\,\mathcal L_{CTC}$."""

    def __init__(self, config: SpeechT5Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.speecht5 = SpeechT5Model(config, "speech", "text", **kwargs)
        if not config.tie_word_embeddings:
            self.text_decoder_postnet = SpeechT5TextDecoderPostnet(config, **kwargs)
        if config.ctc_weight:
            self.ctc_proj = Linear(config.hidden_size, config.vocab_size, **kwargs)
        self.config = config
        self.generation_config = SpeechT5GenerationConfig()

    def head(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocabulary"]:
        """§2.1, text-decoder post-net: logits by the pre-net's embedding."""
        if self.config.tie_word_embeddings:
            return self.speecht5.decoder.prenet.embed_tokens.attend(x)
        return self.text_decoder_postnet(x)

    def without_ctc(self) -> SpeechT5ForSpeechToText:
        """The same recogniser without its CTC head, as `transformers` knows it."""
        model = nnx.merge(*nnx.split(self))
        model.config = model.speecht5.config = dataclasses.replace(self.config, ctc_weight=0.0)
        if hasattr(model, "ctc_proj"):
            del model.ctc_proj
        return model

    def __call__(
        self,
        input_values: Float[Array, "batch samples"] | None = None,
        attention_mask: Int[Array, "batch samples"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        *,
        labels: Int[Array, "batch tokens"] | None = None,
        key: jax.Array | None = None,
        **options: Any,
    ) -> SpeechT5SpeechToTextOutput:
        """Logits for every token and, with `labels`, the loss, a token's.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            decoder_input_ids: tokens; by default `labels` shifted right.
            decoder_attention_mask: 1 where a token is real.
            encoder_outputs: an earlier encoding.
            labels: targets, -100 where there is none.
            key: switches dropout, layer drop and masking on.
            options: see `SpeechT5Model`.

        Raises:
            UsageError: if there are neither tokens nor labels.
        """
        config = self.config
        keys: Any = (None, None) if key is None else jax.random.split(key)
        if decoder_input_ids is None:
            if labels is None:
                raise UsageError("Give decoder_input_ids or labels; generate makes text without them.")
            start = config.decoder_start_token_id
            decoder_input_ids = shift_tokens_right(jnp.asarray(labels), config.pad_token_id, start)
        given = (input_values, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs)
        outputs = self.speecht5(*given, key=keys[0], **options)
        logits, encoded = self.head(outputs.last_hidden_state), outputs.encoder_last_hidden_state
        ctc_logits = loss = None
        if hasattr(self, "ctc_proj") and encoded is not None:
            ctc_logits = self.ctc_proj(Dropout(keys[1])(encoded, config.hidden_dropout))
        if labels is not None:
            labels = jnp.asarray(labels)
            loss = cross_entropy(logits, labels)
            if ctc_logits is not None:
                mask: Any = self.speecht5.encoder.mask(attention_mask, ctc_logits.shape[1])
                lengths = None if mask is None else mask.sum(axis=-1)
                ends = jnp.asarray((config.eos_token_id, config.pad_token_id))
                letters = jnp.where(jnp.isin(labels, ends), IGNORED_LABEL, labels)
                ctc = ctc_loss(ctc_logits, letters, lengths, blank=config.ctc_blank_id, zero_infinity=True)
                tokens = jnp.maximum((labels != IGNORED_LABEL).sum(), 1)
                loss = (1 - config.ctc_weight) * loss + config.ctc_weight * ctc / tokens
        return SpeechT5SpeechToTextOutput(loss=loss, logits=logits, ctc_logits=ctc_logits, **_states(outputs))

    def generate(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        *,
        decoder_input_ids: Any = None,
        ctc_weight: float = 0.0,
        fusion: LanguageModelFusion | None = None,
        masked_group_norm: bool = False,
        key: jax.Array | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        r"""Recognise or translate, by one compiled loop; every token $c$ after the text $h$ scores

        $$(1 - w)\log p_{att}(c \mid h) + w\,[\log\psi(h c) - \log\psi(h)] + \lambda \log p_{LM}(c \mid h).$$

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            decoder_input_ids: the text's beginning; by default `decoder_start_token_id`.
            ctc_weight: §3.2, $w$, share of CTC's opinion of each prefix in the choice of its next token; usually
                together with `num_beams`.
            fusion: §3.2, a language model over the same tokens and its weight $\lambda$. It may lack the last two,
                `<mask>` and `<ctc_blank>`, as the authors' does; then they are never written.
            masked_group_norm: leave the padding of shorter items out of the first convolution's norm.
            key: randomness for `do_sample=True`.
            streamer: called on the host with every token.
            options: as for `transformers.generate`; by default the checkpoint's, and up to `max_text_positions` tokens.

        Returns:
            Tokens, the beginning included, padded to the longest; with `return_dict_in_generate=True` a
            `GenerateOutput`.

        Raises:
            UsageError: for a `ctc_weight` outside of 0 to 1, or of a model without a CTC head; for a language model
                with other tokens, or one beside CTC alone.
        """
        ours = self.config
        if not 0 <= ctc_weight <= 1:
            raise UsageError(f"ctc_weight must be between 0 and 1; it is {ctc_weight}.")
        if ctc_weight and not hasattr(self, "ctc_proj"):
            raise UsageError("This model has no CTC head, so ctc_weight must be 0.")
        defaults: dict[str, Any] = {"eos_token_id": ours.eos_token_id, "pad_token_id": ours.pad_token_id}
        defaults |= {"max_length": ours.max_text_positions, **dict(self.generation_config.options)}
        config = GenerationConfig.over(defaults, options)
        language: Any = None
        if fusion is not None:
            known = fusion.model.config.vocab_size
            if fusion.weight < 0 or known not in (ours.vocab_size, ours.vocab_size - 2) or ctc_weight == 1:
                raise UsageError(
                    f"A language model needs {ours.vocab_size} tokens, or {ours.vocab_size - 2} without <mask> and "
                    f"<ctc_blank>, a weight of at least 0, and ctc_weight below 1; these are {known}, {fusion.weight} "
                    f"and {ctc_weight}."
                )
            language = (*nnx.split(fusion.model), jnp.float32(fusion.weight))
            unknown = range(known, ours.vocab_size + 1)
            config = config.replace(suppress_tokens=(*(config.suppress_tokens or ()), *unknown))
        if decoder_input_ids is None:
            decoder_input_ids = np.full((len(input_values), 1), ours.decoder_start_token_id)
        check_ids(decoder_input_ids, ours.vocab_size)
        output = _generate(
            *nnx.split(self),
            jnp.asarray(input_values),
            None if attention_mask is None else jnp.asarray(attention_mask),
            jnp.asarray(decoder_input_ids, jnp.int32),
            key,
            *(language or (None, None, None)),
            config=config,
            ctc_weight=float(ctc_weight),
            masked_group_norm=masked_group_norm,
            streamer=streamer,
        ).trim()
        return output if config.return_dict_in_generate else np.asarray(output.sequences)


@partial(
    jax.jit, static_argnames=("graphdef", "language_graphdef", "config", "ctc_weight", "masked_group_norm", "streamer")
)
def _generate(
    graphdef: Any,
    state: Any,
    input_values: jax.Array,
    attention_mask: jax.Array | None,
    prompt: jax.Array,
    key: jax.Array | None,
    language_graphdef: Any,
    language_state: Any,
    language_weight: jax.Array | None,
    *,
    config: GenerationConfig,
    ctc_weight: float,
    masked_group_norm: bool,
    streamer: Streamer | None,
) -> GenerateOutput:
    model = nnx.merge(graphdef, state)
    decoder, ours = model.speecht5.decoder, model.config
    encoded, mask = model.speecht5.encoder(input_values, attention_mask, masked_group_norm=masked_group_norm)
    limit = prompt.shape[1] + config.new_tokens(prompt.shape[1])

    def decode(tokens: Any, rows: Any, past: MBartCache, position: Any) -> tuple[jax.Array, MBartCache]:
        x = decoder.prenet(tokens, position=position, limit=limit)
        out = decoder.wrapped_decoder(x, encoder_attention_mask=rows, past_key_values=past, cache_position=position)
        logits = model.head(out.last_hidden_state[:, -1:])
        return jax.nn.log_softmax(at_least_float32(logits)) if ctc_weight else logits, out.past_key_values

    processors: tuple[Any, ...] = ()
    if ctc_weight:
        log_probs = jax.nn.log_softmax(at_least_float32(model.ctc_proj(encoded.last_hidden_state)), axis=-1)
        frames, ends = None if mask is None else mask.sum(axis=-1), (ours.ctc_blank_id, ours.eos_token_id)
        processors = (PrefixScorer(log_probs, frames, ctc_weight, prompt.shape[1], *ends),)
    step: Any = decode
    cache = decoder.wrapped_decoder.start(encoded.last_hidden_state, limit)
    if language_weight is not None:
        # The attention's score, in which the language model's goes along, counts (1 - w) times.
        language = nnx.merge(language_graphdef, language_state)
        step, cache = with_language_model(decode, cache, language, language_weight / (1 - ctc_weight))
    return continue_text(step, cache, mask, prompt, config, key=key, logits_processors=processors, streamer=streamer)


@dataclass(frozen=True)
class SpeechT5LanguageModelConfig(MBartConfig):
    """Not in the paper; in the released checkpoint: sizes of the language model, by default `transformer_lm_t5`'s."""

    vocab_size: int = 79  # characters and special tokens, without <mask> and <ctc_blank>
    d_model: int = 1280  # width
    decoder_layers: int = 20  # blocks
    decoder_ffn_dim: int = 6144  # width inside the MLP
    attention_dropout: float = 0.1  # on attention weights
    tokens: tuple[str, ...] = ()  # the vocabulary in order; none where `dict.txt` was not beside the file


class SpeechT5LanguageModelLayer(MBartDecoderLayer):
    """§3.2, a block of the language model: causal self-attention and MLP, each after a LayerNorm, each residual."""

    attends = False


class SpeechT5LanguageModelDecoder(Speech2TextDecoder):
    """§3.2: scaled embeddings of the characters so far, sinusoids, blocks and a last LayerNorm."""

    layer_class = SpeechT5LanguageModelLayer


class SpeechT5LanguageModelWrapper(MBartDecoderWrapper):
    """Not in the paper; in the released checkpoint: a level of names around the blocks."""

    decoder_class = SpeechT5LanguageModelDecoder


class SpeechT5LanguageModel(MBartForCausalLM):
    """§3.2, the language model of the joint decoding, for `LanguageModelFusion`; called as `MBartForCausalLM` is."""

    config_class = SpeechT5LanguageModelConfig
    wrapper_class = SpeechT5LanguageModelWrapper


# --- §2.2, Eq. 2, and §3.3: the losses of speaking --------------------------------------------------------------------


def shift_spectrograms_right(
    labels: Float[Array, "batch frames mels"], reduction_factor: int = 1
) -> Float[Array, "batch steps mels"]:
    """Decoder inputs out of targets: of each step's frames the last, a step later, zeros in front and for padding."""
    last = labels[:, reduction_factor - 1 :: reduction_factor]
    shifted = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.where(shifted == IGNORED_LABEL, 0, shifted)


def guided_attention_loss(
    attentions: Float[Array, "batch heads steps tokens"],
    tokens: Bool[Array, "batch tokens"] | None,
    steps: Bool[Array, "batch steps"],
    sigma: float = 0.4,
    scale: float = 10.0,
) -> Float[Array, ""]:
    r"""§3.3, guided attention (arXiv 1710.08969, §4.1): what lies far from the diagonal costs.

    $$\lambda\,\mathrm{mean}\bigl(A_{tn} W_{tn}\bigr), \qquad
    W_{tn} = 1 - \exp\bigl(-(n/N - t/T)^2 / 2\sigma^2\bigr)$$

    Args:
        attentions: $A$ of all heads that are guided.
        tokens: which inputs are real, by default all; there are $N$.
        steps: which outputs are real; there are $T$.
        sigma: width of the diagonal.
        scale: $\lambda$.
    """
    tokens = jnp.ones((len(steps), attentions.shape[3]), bool) if tokens is None else tokens
    down = jnp.arange(steps.shape[1]) / jnp.maximum(steps.sum(axis=1, keepdims=True), 1)
    across = jnp.arange(tokens.shape[1]) / jnp.maximum(tokens.sum(axis=1, keepdims=True), 1)
    weights = 1 - jnp.exp(-jnp.square(across[:, None, :] - down[:, :, None]) / (2 * sigma**2))
    inside = (steps[:, :, None] & tokens[:, None, :])[:, None]
    total = jnp.where(inside, weights[:, None] * attentions, 0).sum()
    return scale * total / (inside.sum() * attentions.shape[1])


def spectrogram_loss(
    before: Float[Array, "batch frames mels"],
    after: Float[Array, "batch frames mels"],
    stop_logits: Float[Array, "batch frames"],
    labels: Float[Array, "batch frames mels"],
    positive_weight: float = 5.0,
) -> Float[Array, ""]:
    r"""§2.2, Eq. 2, and the stop's cross-entropy, over the frames that are not -100:

    $$\mathcal L_1 = \mathrm{mean}\,|y - x| + \mathrm{mean}\,|y' - x|, \qquad
    \mathcal L_{bce} = -\mathrm{mean}\,[5\,s \log \sigma(l) + (1 - s) \log (1 - \sigma(l))]$$

    with $y$ and $y'$ before and after the post-net's convolutions, and $s$ = 1 for the last frame of an item.
    """
    stop_logits, real = at_least_float32(stop_logits), labels != IGNORED_LABEL
    deviation = jnp.abs(after - labels) + jnp.abs(before - labels)
    distance = jnp.where(real, deviation, 0).sum() / real.sum()
    frames = real[:, :, 0]
    stop = ~jnp.pad(frames[:, 1:], ((0, 0), (0, 1)))
    entropy = jnp.where(stop, -positive_weight * jax.nn.log_sigmoid(stop_logits), -jax.nn.log_sigmoid(-stop_logits))
    return distance + jnp.where(frames, entropy, 0).sum() / frames.sum()


class Seq2SeqSpectrogramOutput(ModelOutput):
    """§2.1, what the speech-decoder post-net makes: a spectrogram, and with labels the loss."""

    loss: Float[Array, ""] | None = None
    spectrogram: Float[Array, "batch frames mels"] | None = None
    decoder_hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    decoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    cross_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    encoder_last_hidden_state: Float[Array, "batch time channels"] | None = None
    encoder_hidden_states: tuple[Float[Array, "batch time channels"], ...] | None = None
    encoder_attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None


# --- §3.3, §3.5 and §3.6: speaking ------------------------------------------------------------------------------------


class SpeechT5Speaking(nnx.Module):
    """§3.3, §3.5 and §3.6, what speaks: the shared model with a speech decoder, and its post-net."""

    modality: ClassVar[Modality] = "text"

    def __init__(self, config: SpeechT5Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.speecht5 = SpeechT5Model(config, self.modality, "speech", **kwargs)
        self.speech_decoder_postnet = SpeechT5SpeechDecoderPostnet(config, **kwargs)
        self.config = config

    def decode(self, *arguments: Any, key: jax.Array | None, **options: Any) -> tuple[Seq2SeqModelOutput, Any]:
        """The model's states, and the post-net's frames before and after its convolutions, and stops."""
        keys: Any = (None, None) if key is None else jax.random.split(key)
        outputs = self.speecht5(*arguments, key=keys[0], **options)
        return outputs, self.speech_decoder_postnet(outputs.last_hidden_state, Dropout(keys[1]))

    def forward(
        self,
        inputs: Int[Array, "batch tokens"] | Float[Array, "batch samples"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        decoder_input_values: Float[Array, "batch steps mels"] | None = None,
        decoder_attention_mask: Int[Array, "batch frames"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        *,
        labels: Float[Array, "batch frames mels"] | None = None,
        output_attentions: bool = False,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Seq2SeqSpectrogramOutput:
        """The spectrogram given the one before each step and, with `labels`, the loss, guided attention included.

        Args:
            inputs: characters, called `input_ids`, or waveforms at 16 kHz, `input_values`.
            attention_mask: 1 where one of them is real.
            decoder_input_values: spectrogram so far, one frame a step; by default out of the labels.
            decoder_attention_mask: 1 for the frames of the labels, or for the steps, that are real.
            encoder_outputs: an earlier encoding.
            labels: the wanted spectrogram, -100 behind its end.
            output_attentions: return attention weights.
            key: switches dropout, layer drop and masking on, and the statistics of the batch in the post-net.
            options: see `SpeechT5Model`, `speaker_embeddings` above all.

        Raises:
            UsageError: if there is neither a spectrogram so far nor a wanted one.
        """
        config, reduction = self.config, self.config.reduction_factor
        guided = config.use_guided_attention_loss and labels is not None
        if labels is not None:
            labels = jnp.asarray(labels)[:, : labels.shape[1] - labels.shape[1] % reduction]
            if decoder_input_values is None:
                decoder_input_values = shift_spectrograms_right(labels, reduction)
                if decoder_attention_mask is not None:
                    decoder_attention_mask = decoder_attention_mask[:, reduction - 1 : labels.shape[1] : reduction]
        if decoder_input_values is None:
            raise UsageError("Give decoder_input_values or labels; generate speaks without them.")
        given = (inputs, attention_mask, decoder_input_values, decoder_attention_mask, encoder_outputs)
        options["output_attentions"] = output_attentions or guided
        outputs, (before, after, stop) = self.decode(*given, key=key, **options)
        loss: Any = None if labels is None else spectrogram_loss(before, after, stop, labels)
        if labels is not None and guided:
            heads, cross = config.guided_attention_loss_num_heads, outputs.cross_attentions or ()
            attentions = jnp.concatenate([a[:, : None if heads < 0 else heads] for a in cross], axis=1)
            real = self.speecht5.encoder.mask(attention_mask, attentions.shape[3])
            steps = (labels != IGNORED_LABEL)[:, reduction - 1 :: reduction, 0]
            shape = config.guided_attention_loss_sigma, config.guided_attention_loss_scale
            loss = loss + guided_attention_loss(attentions, real, steps, *shape)
        states = {name: x for name, x in _states(outputs).items() if output_attentions or "attentions" not in name}
        return Seq2SeqSpectrogramOutput(loss=loss, spectrogram=after, **states)

    def generate_speech(
        self,
        input_values: Any,
        speaker_embeddings: Float[Array, "#batch speaker"] | None = None,
        attention_mask: Int[Array, "batch time"] | None = None,
        threshold: float = 0.5,
        minlenratio: float = 0.0,
        maxlenratio: float = 20.0,
        vocoder: Any = None,
        output_cross_attentions: bool = False,
        return_output_lengths: bool = False,
        *,
        frames: int | None = None,
        prenet_masks: Bool[Array, "layers steps units"] | None = None,
        key: jax.Array | None = None,
    ) -> Any:
        """Speak, by one compiled loop over decoder steps, and another program from frames to sound.

        Args:
            input_values: tokens, or waveforms at 16 kHz.
            speaker_embeddings: x-vectors of the wanted voices, one for all or one an item; of speech by default zeros.
            attention_mask: 1 where a token or sample is real; without it, tokens of padding are not.
            threshold: an item ends where the probabilities of a step's frames of being the last add up to this.
            minlenratio: least number of frames for each of the encoder's states.
            maxlenratio: greatest number.
            vocoder: makes sound of spectrograms (`SpeechT5HifiGan`).
            output_cross_attentions: return the decoder's attention to the encoder.
            return_output_lengths: return how long each item is.
            frames: §3.6: make that many, wherever the stop is.
            prenet_masks: units of the speech-decoder pre-net that are kept at each step; drawn from `key` otherwise.
            key: of these; a fixed one by default, so that the same input sounds the same.

        Returns:
            As in `transformers`: the spectrogram `(frames, mels)`, or with a vocoder the waveform; of a batch
            `(batch, …)`, zeros behind the shorter ones. With `return_output_lengths` always a batch, and the lengths;
            with `output_cross_attentions` then `(layers, heads, steps, inputs)`, of a batch `(batch, layers, …)`.

        Raises:
            UsageError: for speakers, limits or masks that do not fit.
        """
        config, reduction = self.config, self.config.reduction_factor
        given, mask, speaker = np.asarray(input_values), attention_mask, speaker_embeddings
        self._check(given, speaker, threshold, minlenratio, maxlenratio)
        batch, states = given.shape
        if self.modality == "speech":
            states = self.speecht5.encoder.prenet.frame_lengths(states)
            speaker = jnp.zeros((1, config.speaker_embedding_dim)) if speaker is None else speaker
        else:  # padded to one of a few lengths, which masks make as good as none: a new text compiles nothing anew
            pad, more = config.pad_token_id, ((0, 0), (0, bucket(states, 32) - states))
            mask = jnp.pad((given != pad) if mask is None else np.asarray(mask) != 0, more)
            given = np.pad(given, more, constant_values=pad).astype(np.int32)
        limit, least = int(states * maxlenratio / reduction), int(states * minlenratio / reduction)
        if frames is not None:
            limit = least = -(-frames // reduction)
            threshold = np.inf
        limit = max(limit, least, 1)
        steps = bucket(limit, 32)
        if prenet_masks is not None:
            if prenet_masks.shape[1] < limit:
                raise UsageError(f"prenet_masks are for {prenet_masks.shape[1]} steps; up to {limit} may be needed.")
            prenet_masks = jnp.pad(jnp.asarray(prenet_masks), ((0, 0), (0, max(steps - limit, 0)), (0, 0)))[:, :steps]
        if speaker is not None:
            speaker = jnp.broadcast_to(jnp.asarray(speaker), (batch, config.speaker_embedding_dim))
        spectrogram, counts, attentions = _speak(
            *nnx.split(self),
            jnp.asarray(given),
            None if mask is None else jnp.asarray(mask),
            speaker,
            prenet_masks,
            jax.random.key(0) if key is None else key,
            (float(threshold), least, limit),
            steps=steps,
            attentions=output_cross_attentions,
        )
        counts = np.asarray(counts)
        longest, lengths = int(counts.max()), counts * reduction
        hop = 1 if vocoder is None else vocoder.config.samples_per_frame
        room = bucket(longest * reduction, 64)
        whole = spectrogram.reshape(batch, -1, config.num_mel_bins)[:, :room]
        whole = jnp.pad(whole, ((0, 0), (0, room - whole.shape[1]), (0, 0)))
        sound = _finish(*nnx.split((self.speech_decoder_postnet, vocoder)), whole, jnp.asarray(lengths))
        result: list[Any] = [np.asarray(sound)[:, : longest * reduction * hop]]
        if output_cross_attentions:
            cross = np.moveaxis(np.asarray(attentions), 0, 3)  # (layers, batch, heads, steps, inputs)
            result.append(np.moveaxis(cross[..., :longest, :states], 1, 0))
        if batch == 1 and not return_output_lengths:
            result = [array[0] for array in result]
        if return_output_lengths:
            result.insert(1, (lengths * hop).tolist())
        return tuple(result) if len(result) > 1 else result[0]

    def _check(self, given: np.ndarray, speaker: Any, threshold: float, least: float, most: float) -> None:
        """Refuse what cannot be spoken."""
        last, width = self.config.vocab_size - 1, self.config.speaker_embedding_dim
        if given.ndim != 2 or not given.size:
            raise UsageError(f"Inputs of shape (batch, time) are wanted, at least one; these have {given.shape}.")
        if not np.issubdtype(given.dtype, np.floating) and not 0 <= given.min() <= given.max() <= last:
            raise UsageError(f"This model's tokens run from 0 to {last}; these from {given.min()} to {given.max()}.")
        if not (threshold > 0 and 0 <= least < np.inf and 0 < most < np.inf):
            raise UsageError(
                f"threshold and maxlenratio must be above 0 and minlenratio at least 0; they are {threshold}, {most} "
                f"and {least}."
            )
        if speaker is not None and np.shape(speaker) not in ((1, width), (len(given), width)):
            wanted = f"speaker_embeddings of shape ({len(given)}, {width}) or (1, {width}) are wanted"
            raise UsageError(f"{wanted}, not {np.shape(speaker)}.")


@partial(jax.jit, static_argnames=("graphdef", "steps", "attentions"))
def _speak(
    graphdef: Any,
    state: Any,
    inputs: jax.Array,
    attention_mask: jax.Array | None,
    speaker: jax.Array | None,
    prenet_masks: jax.Array | None,
    key: jax.Array,
    limits: tuple[jax.Array, jax.Array, jax.Array],
    *,
    steps: int,
    attentions: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Frames of up to `steps` steps before the post-net's convolutions, each item's steps, and the attentions."""
    model = nnx.merge(graphdef, state)
    config, decoder, out = model.config, model.speecht5.decoder, model.speech_decoder_postnet
    encoded, mask = model.speecht5.encoder(inputs, attention_mask)
    memory = encoded.last_hidden_state
    batch, states, _ = memory.shape
    threshold, least, limit = limits
    if prenet_masks is None:
        prenet_masks = draw_prenet_masks(config, key, steps)

    def step(carry: Any) -> Any:
        index, frame, cache, spectrogram, counts, seen = carry
        kept = jax.lax.dynamic_slice_in_dim(prenet_masks, index, 1, axis=1)
        x = decoder.prenet(frame[:, None], speaker, kept, position=index, limit=steps)
        past: dict[str, Any] = {"past_key_values": cache, "cache_position": index}
        decoded = decoder.wrapped_decoder(x, encoder_attention_mask=mask, output_attentions=attentions, **past)
        state, done = decoded.last_hidden_state[:, 0], index + 1
        frames = out.feat_out(state)
        stop = jax.nn.sigmoid(out.prob_out(state)).sum(axis=-1)
        ends = ((stop >= threshold) | (done >= limit)) & (done >= least)
        spectrogram = jax.lax.dynamic_update_index_in_dim(spectrogram, frames, index, axis=1)
        counts = jnp.where((counts == 0) & ends, done, counts)
        if attentions:
            now = jnp.stack(decoded.cross_attentions)[:, :, :, 0]
            seen = jax.lax.dynamic_update_index_in_dim(seen, now, index, axis=0)
        return done, frames[:, -config.num_mel_bins :], decoded.past_key_values, spectrogram, counts, seen

    dtype = jnp.result_type(memory, out.feat_out.kernel[...]) if out.feat_out.dtype is None else out.feat_out.dtype
    of_attentions = (steps, config.decoder_layers, batch, config.decoder_attention_heads, states)
    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch, config.num_mel_bins), dtype),
        decoder.wrapped_decoder.start(memory, steps),
        jnp.zeros((batch, steps, config.reduction_factor * config.num_mel_bins), dtype),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros(of_attentions, memory.dtype) if attentions else None,
    )
    _, _, _, spectrogram, counts, seen = while_loop(lambda carry: (carry[4] == 0).any(), step, start)
    return spectrogram, counts, seen


@partial(jax.jit, static_argnames="graphdef")
def _finish(graphdef: Any, state: Any, spectrogram: jax.Array, lengths: jax.Array) -> jax.Array:
    """The post-net's convolutions and, if there is one, the vocoder."""
    net, vocoder = nnx.merge(graphdef, state)
    refined = net.postnet(spectrogram, lengths)
    # Half precision is no sound file's.
    return refined if vocoder is None else at_least_float32(vocoder(refined, lengths=lengths))


class SpeechT5ForTextToSpeech(SpeechT5Speaking):
    """§3.3: text in, a spectrogram in a given voice out."""

    def __call__(
        self, input_ids: Int[Array, "batch tokens"] | None = None, *arguments: Any, **options: Any
    ) -> Seq2SeqSpectrogramOutput:
        """The spectrogram given the one before each step, and its loss; see `forward`."""
        return self.forward(input_ids, *arguments, **options)

    def generate(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Int[Array, "batch tokens"] | None = None,
        speaker_embeddings: Float[Array, "#batch speaker"] | None = None,
        **options: Any,
    ) -> Any:
        """Speak; for the options and what is returned see `generate_speech`.

        Raises:
            UsageError: without a speaker, or for options that do not fit.
        """
        if speaker_embeddings is None:
            raise UsageError(
                "speaker_embeddings must be given: an x-vector of the wanted voice, such as those of CMU ARCTIC's "
                "speakers (Matthijs/cmu-arctic-xvectors)."
            )
        return self.generate_speech(input_ids, speaker_embeddings, attention_mask, **options)


class SpeechT5ForSpeechToSpeech(SpeechT5Speaking):
    """§3.5, voice conversion, and §3.6, enhancement: speech in, a spectrogram in another voice or without noise out."""

    modality = "speech"

    def __call__(
        self, input_values: Float[Array, "batch samples"] | None = None, *arguments: Any, **options: Any
    ) -> Seq2SeqSpectrogramOutput:
        """The spectrogram given the one before each step, and its loss, which `transformers` lacks; see `forward`."""
        return self.forward(input_values, *arguments, **options)


class SpeechT5ForSpeechEnhancement(SpeechT5ForSpeechToSpeech):
    """Not in the paper; in the released code: noise taken off a spectrogram in one pass, frame by frame.

    The decoder reads the noisy spectrogram instead of what it has made so far; `reduction_factor` is 1.
    """

    def enhance(
        self,
        input_values: Float[Array, "batch samples"],
        spectrogram: Float[Array, "batch frames mels"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        *,
        predict: Literal["target", "masking", "delta"] = "target",
        labels: Float[Array, "batch frames mels"] | None = None,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Seq2SeqSpectrogramOutput:
        """The clean spectrogram and, with `labels`, the loss of Eq. 2.

        Args:
            input_values: noisy waveforms at 16 kHz.
            spectrogram: their log-mel spectrograms.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            predict: what the post-net gives: the clean spectrogram; what a sigmoid makes a factor; or what exceeds it.
            labels: the clean spectrogram, -100 behind its end.
            key: switches dropout, layer drop and masking on.
            options: see `SpeechT5Model`.

        Raises:
            UsageError: for another prediction, or a model that makes several frames a step.
        """
        if predict not in ("target", "masking", "delta"):
            raise UsageError(f"There is no prediction {predict!r}; there are target, masking and delta.")
        if self.config.reduction_factor != 1:
            raise UsageError("Enhancement in one pass needs a reduction_factor of 1.")

        def clean(x: jax.Array) -> jax.Array:
            if predict == "masking":
                return jax.nn.sigmoid(x) * spectrogram
            return x - spectrogram if predict == "delta" else x

        outputs, (*made, stop) = self.decode(input_values, attention_mask, spectrogram, key=key, **options)
        before, after = map(clean, made)
        loss = None if labels is None else spectrogram_loss(before, after, stop, jnp.asarray(labels))
        return Seq2SeqSpectrogramOutput(loss=loss, spectrogram=after, **_states(outputs))


# --- §3.7, speaker identification -------------------------------------------------------------------------------------


class SpeechT5ForSequenceClassification(nnx.Module):
    """§3.7: whose voice it is, told by the decoder "at the first step", which sees nothing but the encoder.

    As in the released code that step reads a vector of zeros, and a linear map names the speaker.
    """

    def __init__(self, config: SpeechT5Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.speecht5 = SpeechT5Model(config, "speech", None, **kwargs)
        self.classifier = Linear(config.hidden_size, config.num_labels, use_bias=False, **kwargs)
        self.config = config

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, " batch"] | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits of the speakers and, with `labels`, their cross-entropy.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: the speaker of each item.
            options: see `SpeechT5Model`; `key` switches dropout, layer drop and masking on.
        """
        nothing = jnp.zeros((len(input_values), 1, self.config.hidden_size), self.classifier.kernel[...].dtype)
        outputs = self.speecht5(input_values, attention_mask, nothing, **options)
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        return SequenceClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, jnp.asarray(labels)),
            logits=logits,
            hidden_states=outputs.encoder_hidden_states,
            attentions=outputs.encoder_attentions,
        )


# --- §2.2, pre-training -----------------------------------------------------------------------------------------------


def text_infilling(
    tokens: Sequence[int], mask_token_id: int, rng: np.random.Generator, ratio: float = 0.3, mean: float = 3.5
) -> list[int]:
    r"""§2.2, text pre-training (BART, arXiv 1910.13461, §2.2): spans become one mask each.

    Spans of Poisson($\lambda$) tokens are drawn until they cover `ratio` of the text; one of no token puts a mask where
    there was none. The first and the last token stay.

    Args:
        tokens: a text with its beginning and end.
        mask_token_id: of `<mask>`.
        rng: source of the spans.
        ratio: share of the tokens that are covered.
        mean: $\lambda$.
    """
    inner, last = max(len(tokens) - 2, 0), len(tokens) - 1
    left, spans = int(np.ceil(inner * ratio)), []
    while left > 0:
        spans.append(min(int(rng.poisson(mean)), left))
        left -= spans[-1]
    lengths = [length for length in spans if length][:inner]
    begins = (1 + rng.permutation(inner)[: len(lengths)]).tolist()
    gone = {i for begin, length in zip(begins, lengths, strict=True) for i in range(begin + 1, begin + length)}
    kept = [i for i in range(len(tokens)) if i in (0, last) or i not in gone]
    result = [mask_token_id if i in begins else tokens[i] for i in kept]
    for _ in range(spans.count(0)):
        result.insert(int(rng.integers(1, len(result))), mask_token_id)
    return result


class SpeechT5PreTrainingOutput(ModelOutput):
    r"""§2.2: the loss of one modality and its parts, before their weights; `features_pen` is not in the paper."""

    loss: Float[Array, ""] | None = None
    spectrogram: Float[Array, "batch frames mels"] | None = None
    logits: Float[Array, "batch time classes"] | None = None
    mlm_loss: Float[Array, ""] | None = None
    reconstruction_loss: Float[Array, ""] | None = None
    diversity_loss: Float[Array, ""] | None = None
    features_pen: Float[Array, ""] | None = None


class SpeechT5ForPreTraining(nnx.Module):
    r"""§2.2, Figure 2 (b): all six nets around encoder and decoder, and the codebook that both modalities share.

    $$\mathcal L = \mathcal L^s_{mlm} + \mathcal L^s_1 + \mathcal L^s_{bce} + \mathcal L^t_{mle} + \gamma \mathcal L_d$$

    A batch is of one modality: `speech` and `text` give their parts, each a mean. The text encoder's embedding, the
    text decoder's and its head are one table.
    """

    def __init__(self, config: SpeechT5Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.speech_encoder_prenet = SpeechT5SpeechEncoderPrenet(config, **kwargs)
        self.text_encoder_positions = SpeechT5ScaledPositionalEncoding(config, **kwargs)
        self.encoder = SpeechT5Encoder(config, **kwargs)
        self.final_proj = Linear(config.hidden_size, config.final_dim, **kwargs)
        shape = (config.num_clusters, config.final_dim)
        self.label_embeddings = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype))
        states = dataclasses.replace(config, conv_dim=(config.hidden_size,) * len(config.conv_dim))
        self.quantizer = wav2vec2.Wav2Vec2GumbelVectorQuantizer(states, **kwargs)
        self.speech_decoder_prenet = SpeechT5SpeechDecoderPrenet(config, **kwargs)
        self.text_decoder_prenet = SpeechT5TextDecoderPrenet(config, **kwargs)
        self.decoder = SpeechT5Decoder(config, **kwargs)
        self.speech_decoder_postnet = SpeechT5SpeechDecoderPostnet(config, **kwargs)
        self.config = config

    def mix(
        self,
        states: Float[Array, "batch time hidden"],
        codebook_steps: Bool[Array, " time"] | None = None,
        *,
        temperature: float | Float[Array, ""] = 2.0,
        gumbel_noise: Float[Array, "batch time groups entries"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], Float[Array, ""]]:
        r"""§2.2, joint pre-training: codes (Eq. 4, as released by a Gumbel softmax) in place of some states.

        Args:
            states: the encoder's.
            codebook_steps: at which time steps; drawn if there is a `key`, a share of `codebook_prob` of them.
            temperature: of the Gumbel softmax; see `gumbel_temperature`.
            gumbel_noise: drawn if there is a `key`.
            key: source of both.

        Returns:
            What the decoder attends to, and $\mathcal L_d$: 0 where all codes are used alike (Eq. 5, as released from
            the perplexity).
        """
        config, keys = self.config, (None, None) if key is None else jax.random.split(key)
        time = states.shape[1]
        codes, in_use, _ = self.quantizer(states, temperature=temperature, gumbel_noise=gumbel_noise, key=keys[0])
        if codebook_steps is None:
            codebook_steps = jnp.zeros(time, bool)
            if keys[1] is not None:
                codebook_steps = jax.random.permutation(keys[1], time) < int(time * config.codebook_prob)
        mixed = jnp.where(codebook_steps[:, None], codes.astype(states.dtype), states)
        return mixed, wav2vec2.diversity_loss(in_use, config)

    def speech(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, "batch units"] | None = None,
        spectrogram: Float[Array, "batch frames mels"] | None = None,
        *,
        speaker_embeddings: Float[Array, "batch speaker"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        prenet_masks: Bool[Array, "layers steps units"] | None = None,
        features_pen_weight: float = 10.0,
        diversity_weight: float = 0.1,
        feature_grad_mult: float | Float[Array, ""] = 0.1,
        key: jax.Array | None = None,
        **codes: Any,
    ) -> SpeechT5PreTrainingOutput:
        r"""§2.2, speech pre-training: name the units under the mask (Eq. 1), and say the speech again (Eq. 2).

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: hidden units, `label_rate` a second, from HuBERT's k-means.
            spectrogram: their log-mel, -100 behind the end: what the decoder is to make.
            speaker_embeddings: x-vectors.
            mask_time_indices: frames to hide and to name; drawn if there is a `key`.
            prenet_masks: units of the speech-decoder pre-net that are kept.
            features_pen_weight: not in the paper but in its recipe: weight of the mean square of the features.
            diversity_weight: $\gamma$.
            feature_grad_mult: factor on the gradient that reaches the convolutions.
            key: switches dropout, layer drop and all drawing on.
            codes: options of `mix`.

        Raises:
            UsageError: without units, a spectrogram, and hidden frames.
        """
        if labels is None or spectrogram is None:
            raise UsageError("Pre-training on speech needs labels (hidden units) and a spectrogram.")
        config, reduction = self.config, self.config.reduction_factor
        keys: Any = (None, None, None, jax.random.key(0)) if key is None else jax.random.split(key, 4)
        prenet, dropout = self.speech_encoder_prenet, Dropout(keys[0])
        features, mask = prenet.features(input_values, attention_mask, feature_grad_mult=feature_grad_mult)
        features_pen = wav2vec2.features_penalty(features)
        x, hidden = prenet.embed(features, mask, dropout, mask_time_indices)
        if hidden is None:
            raise UsageError("Pre-training on speech needs hidden frames: give mask_time_indices or a key.")
        states = self.encoder(x, mask, dropout=dropout).last_hidden_state
        # Eq. 1, by HuBERT's cosines
        ratio = config.label_rate * np.prod(config.conv_stride) / 16_000
        targets = hubert.targets_of_frames(jnp.asarray(labels), x.shape[1], float(ratio))
        counted = jnp.asarray(hidden, bool) & (True if mask is None else mask)
        projected, embeddings = self.final_proj(states), self.label_embeddings[...]
        total, count = hubert.masked_prediction(projected, embeddings, targets, counted, config.logit_temp)
        mlm = total / jnp.maximum(count, 1)
        # Eq. 4 and 5
        memory, diversity = self.mix(states, key=keys[1], **codes)
        # Eq. 2
        wanted = jnp.asarray(spectrogram)[:, : spectrogram.shape[1] - spectrogram.shape[1] % reduction]
        before_each = shift_spectrograms_right(wanted, reduction)
        if prenet_masks is None:
            prenet_masks = draw_prenet_masks(config, keys[3], before_each.shape[1])
        y = self.speech_decoder_prenet(before_each, speaker_embeddings, prenet_masks, dropout=dropout)
        real = (wanted != IGNORED_LABEL)[:, reduction - 1 :: reduction, 0]
        decoded = self.decoder(y, real, memory, mask, dropout=dropout).last_hidden_state
        before, after, stop = self.speech_decoder_postnet(decoded, Dropout(keys[2]))
        reconstruction = spectrogram_loss(before, after, stop, wanted)
        return SpeechT5PreTrainingOutput(
            loss=mlm + reconstruction + diversity_weight * diversity + features_pen_weight * features_pen,
            spectrogram=after,
            logits=hubert.cluster_logits(projected, embeddings, config.logit_temp),
            mlm_loss=mlm,
            reconstruction_loss=reconstruction,
            diversity_loss=diversity,
            features_pen=features_pen,
        )

    def text(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Int[Array, "batch tokens"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        *,
        diversity_weight: float = 0.1,
        key: jax.Array | None = None,
        **codes: Any,
    ) -> SpeechT5PreTrainingOutput:
        r"""§2.2, text pre-training: write the whole text, given one with spans masked (Eq. 3).

        Args:
            input_ids: characters, spans of them masked (`text_infilling`).
            attention_mask: 1 where a character is real.
            labels: the whole text, -100 behind its end.
            diversity_weight: $\gamma$.
            key: switches dropout, layer drop and all drawing on.
            codes: options of `mix`.

        Raises:
            UsageError: without labels.
        """
        if labels is None:
            raise UsageError("Pre-training on text needs labels: the text before spans of it were masked.")
        config, keys = self.config, (None, None) if key is None else jax.random.split(key)
        dropout, table = Dropout(keys[0]), self.text_decoder_prenet.embed_tokens
        mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        x = self.text_encoder_positions(table(input_ids), dropout)
        states = self.encoder(x, mask, dropout=dropout).last_hidden_state
        memory, diversity = self.mix(states, key=keys[1], **codes)
        labels = jnp.asarray(labels)
        shifted = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        y = self.text_decoder_prenet(shifted, dropout=dropout)
        logits = table.attend(self.decoder(y, None, memory, mask, dropout=dropout).last_hidden_state)
        likelihood = cross_entropy(logits, labels)  # Eq. 3
        loss = likelihood + diversity_weight * diversity
        return SpeechT5PreTrainingOutput(
            loss=loss, logits=logits, reconstruction_loss=likelihood, diversity_loss=diversity
        )
