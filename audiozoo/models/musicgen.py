r"""# MusicGen: Simple and Controllable Music Generation

Jade Copet, Felix Kreuk, Itai Gat, Tal Remez, David Kant, Gabriel Synnaeve, Yossi Adi, Alexandre Défossez, 2023,
arXiv 2306.05284.

EnCodec (arXiv 2210.13438) writes a second of music as 50 frames of four codes. One Transformer predicts all four
streams, with no second model for the finer ones: an interleaving pattern lays the codes out over steps, so that the
codes of one step may be predicted together although they are not independent. The music follows a text, read by T5
(arXiv 1910.10683), and a melody, given as the loudest of twelve pitch classes over time; guidance without a classifier
makes it follow them more closely.

    text ── T5 ── Linear ──> conditions (P, D) ─────────────┐  in cross-attention; or, in melody models,
    melody ── chromagram ── argmax ── Linear ──> (235, D) ──┘  in front of the steps
    codes (K, T) ── pattern ──> steps (K, S) ── Σₖ Eₖ + position ── N × [+ SelfAttention, + CrossAttention, + MLP]
      ── LayerNorm ── K heads ──> the codes of the next step ── pattern undone ──> codes (K, T) ── EnCodec ──> waveform

| paper | here |
| --- | --- |
| §2.1, audio tokens | `audiozoo.models.encodec`, `MusicgenForConditionalGeneration.audio_to_codes` |
| §2.2 and Figure 1, codebook interleaving patterns | `Pattern` |
| §2.3, text conditioning | `MusicgenForConditionalGeneration.condition` |
| §2.3, melody conditioning | `MusicgenMelodyForConditionalGeneration.condition`; chromagram in the processor |
| §2.4, codebook projection and positional embedding, decoder | `MusicgenDecoder`, `MusicgenDecoderLayer` |
| §2.4, logits prediction | `MusicgenForCausalLM`, `MusicgenMelodyForCausalLM` |
| §3.1, guidance, top-k sampling | `MusicgenForCausalLM.generate` |
| §3.1, training: loss, dropped conditions; optimiser; texts | `training_loss`, `MusicgenRecipe`, `augmented` |
| not in the paper; in the released code: more than 30 s by a sliding window | `compose` |

`transformers` departs from the paper and from the authors' code in these places, each shown by a test. It hides padded
text from cross-attention, where the authors let zeros be seen (`mask_text=False`). Of `max_new_tokens` steps the last
K - 1 complete no frame; here `duration` and `frames` are exact. Codes that it finds before a codebook's delay is over,
and that never sound, are repetitions to `repetition_penalty` and `no_repeat_ngram_size`; here they are not. Fewer than
2K - 2 new steps have no pattern there. Under guidance it chooses the very codes that `suppress_tokens` forbids: minus
infinity less itself is no number. With `num_return_sequences` it mixes the streams of an item's versions. And it trains
on whatever labels it is given, without a pattern (`labels=` here too): `training_loss` lays the codes out, and counts
only those whose context is complete.

Checkpoints: `facebook/musicgen-{small,medium,large,melody,melody-large}`, `facebook/musicgen-stereo-*`; the authors'
`state_dict.bin` with `compression_state_dict.bin`, AudioGen's (arXiv 2209.15352) among them.

    import audiozoo
    import jax
    from audiozoo.models.musicgen import compose
    model = audiozoo.load("facebook/musicgen-small")
    processor = audiozoo.load_processor("facebook/musicgen-small")
    music = compose(model, processor, "a fast fiddle tune", duration=8.0, key=jax.random.key(0))  # (channels, samples)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from audiozoo.configs import restore_parts
from audiozoo.decoding import GenerationConfig, bucketed, generate
from audiozoo.errors import UsageError
from audiozoo.layers import (
    Causal,
    Dropout,
    Embed,
    KeyValues,
    LayerNorm,
    Linear,
    Mask,
    MultiHeadAttention,
    activation,
    check_frames,
    check_ids,
    check_mask,
)
from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.losses import IGNORED_LABEL, cross_entropy
from audiozoo.layers.positions import cosines_and_sines
from audiozoo.layers.stacking import unseen
from audiozoo.models.encodec import EncodecConfig, EncodecModel
from audiozoo.models.t5 import T5Config, T5EncoderModel
from audiozoo.outputs import ABSENT, BaseModelOutput, CausalLMOutput, DecoderOutput, ModelOutput, Seq2SeqLMOutput

# --- §2.2: codebook interleaving patterns ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    r"""§2.2: the order in which codes are predicted: sets $P_1, \dots, P_S$ of pairs $(t, k)$, one set a step.

    $P_0 = \emptyset$: a sequence begins with a step of special tokens. Every code stands in one set; a set holds at
    most one code of each codebook, and the codes of a codebook come in the order of time.
    """

    places: tuple[tuple[int, ...], ...]  # places[k][t] = s: code t of codebook k stands in P_s
    incomplete: int = 0  # steps at the end that hold no code of the first codebook: training leaves them out

    def __post_init__(self) -> None:
        table = self.table
        if table.ndim != 2 or not table.size or table.min() < 1 or np.any(np.diff(table, axis=1) < 1):
            raise UsageError(
                "A pattern places the codes of every codebook at steps from 1 on, each later than the last."
            )

    @classmethod
    def delay(cls, timesteps: int, delays: Sequence[int]) -> Pattern:
        """Figure 1, "delay": codebook k comes `delays[k]` steps late; (0, 1, 1, 1) is "partial delay".

        Stereo models have left and right in turn: (0, 0, 1, 1, 2, 2, 3, 3).
        """
        times = range(1, timesteps + 1)
        return cls(tuple(tuple(t + delay for t in times) for delay in delays), max(delays, default=0))

    @classmethod
    def parallel(cls, timesteps: int, codebooks: int) -> Pattern:
        """Figure 1: all codes of a frame at once."""
        return cls.delay(timesteps, (0,) * codebooks)

    @classmethod
    def flatten(cls, timesteps: int, order: Sequence[int]) -> Pattern:
        """Figure 1: each frame takes several steps; codebook k comes at its step `order[k]`.

        (0, 1, 2, 3) is "flattening", (0, 1, 1, 1) "partial flattening".
        """
        inner = max(order, default=0) + 1
        return cls(tuple(tuple(inner * t + place + 1 for t in range(timesteps)) for place in order))

    @classmethod
    def coarse_first(cls, timesteps: int, codebooks: int) -> Pattern:
        """Figure 1: all of the first codebook, then the others in parallel (VALL-E, arXiv 2301.02111)."""
        later = tuple(range(timesteps + 1, 2 * timesteps + 1))
        return cls((tuple(range(1, timesteps + 1)), *(later,) * (codebooks - 1)))

    @property
    def table(self) -> Int[np.ndarray, "codebooks timesteps"]:
        """`places` as an array."""
        return np.asarray(self.places, np.int32)

    @property
    def steps(self) -> int:
        """$S$."""
        return int(self.table.max())

    @property
    def sets(self) -> tuple[frozenset[tuple[int, int]], ...]:
        """$P_0, P_1, \\dots, P_S$, as sets of (t, k)."""
        found: list[set[tuple[int, int]]] = [set() for _ in range(self.steps + 1)]
        for k, row in enumerate(self.places):
            for t, s in enumerate(row):
                found[s].add((t, k))
        return tuple(map(frozenset, found))

    @property
    def columns(self) -> Int[np.ndarray, "codebooks steps+1"]:
        """For each codebook and step the time of the code that stands there, or -1."""
        table = self.table
        columns = np.full((len(table), self.steps + 1), -1, np.int32)
        columns[np.arange(len(table))[:, None], table] = np.arange(table.shape[1])
        return columns

    def interleave(self, codes: Int[Any, "*batch codebooks timesteps"], special: int) -> Any:
        """Codes laid out over the steps $0 \\dots S$, `(*batch, codebooks, S + 1)`; `special` where none stands."""
        columns = self.columns
        laid = codes[..., np.arange(len(columns))[:, None], np.maximum(columns, 0)]
        return (np if isinstance(codes, np.ndarray) else jnp).where(columns >= 0, laid, special)

    def revert(self, sequence: Int[Any, "*batch codebooks steps+1"]) -> Any:
        """The codes back from `interleave`'s layout."""
        return sequence[..., np.arange(len(self.places))[:, None], self.table]

    def revert_logits(
        self, logits: Float[Array, "batch codebooks steps vocabulary"]
    ) -> tuple[Float[Array, "batch codebooks timesteps vocabulary"], Bool[np.ndarray, "codebooks timesteps"]]:
        """For every code the logits that predict it, which stand one step before, and whether they are there.

        Args:
            logits: after the steps $0, 1, \\dots$; there may be fewer than $S$.
        """
        before = self.table - 1
        there = before < logits.shape[2]
        found = logits[:, np.arange(len(before))[:, None], np.where(there, before, 0)]
        return found, there


# --- sizes -----------------------------------------------------------------------------------------------------------

_T5_LARGE = T5Config.large()


@dataclass(frozen=True)
class MusicgenConfig:
    """§3.1: sizes of the language model, its text encoder and its codec; the defaults are those of the 300M model."""

    text_encoder: T5Config = field(default=T5Config())  # reads the text
    audio_encoder: EncodecConfig = field(default=EncodecConfig.encodec_32khz())  # writes and reads codes
    vocab_size: int = 2048  # entries of a codebook; the special token comes after them
    num_codebooks: int = 4  # K, streams of codes; in stereo both channels' together
    audio_channels: int = 1  # 1, or 2: stereo, streams of left and right in turn
    hidden_size: int = 1024  # D, width
    num_hidden_layers: int = 24  # layers
    num_attention_heads: int = 16  # heads
    ffn_dim: int = 4096  # width of the feed-forward network
    activation_function: str = "gelu"  # of the feed-forward network
    dropout: float = 0.1  # after every sublayer and the embedding; transformers' default, the authors train with 0
    attention_dropout: float = 0.0  # of attention weights
    activation_dropout: float = 0.0  # inside the feed-forward network
    pattern: str = "delay"  # of §2.2: delay, flatten or coarse_first
    delays: tuple[int, ...] | None = None  # of "delay": steps by which each stream is late; by default 0, 1, …
    mask_text: bool = True  # hide padded text from cross-attention, as transformers does; the authors' code does not
    num_chroma: int = 12  # pitch classes of a melody
    chroma_length: int = 235  # frames of melody, of 128 ms: 30 s
    segment_duration: float = 30.0  # seconds of an excerpt in training; what is longer is made in windows

    def __post_init__(self) -> None:
        restore_parts(self, text_encoder=T5Config, audio_encoder=EncodecConfig)
        if self.audio_channels not in (1, 2) or self.num_codebooks % self.audio_channels:
            raise UsageError(
                f"{self.num_codebooks} streams of codes and {self.audio_channels} channels do not go together."
            )
        if self.pattern not in ("delay", "flatten", "coarse_first"):
            raise UsageError(f"There is no pattern {self.pattern!r}; there are delay, flatten and coarse_first.")
        if self.delays is not None and len(self.delays) != self.num_codebooks:
            raise UsageError(f"There are {self.num_codebooks} streams of codes and {len(self.delays)} delays.")

    @property
    def special_token_id(self) -> int:
        """The token of steps where a stream has no code; never predicted."""
        return self.vocab_size

    @property
    def stream_delays(self) -> tuple[int, ...]:
        """`delays`, or by default one step more for each codebook."""
        return self.delays or tuple(k // self.audio_channels for k in range(self.num_codebooks))

    def pattern_for(self, frames: int) -> Pattern:
        """The model's pattern for so many frames."""
        if self.pattern == "flatten":
            return Pattern.flatten(frames, range(self.num_codebooks))
        if self.pattern == "coarse_first":
            return Pattern.coarse_first(frames, self.num_codebooks)
        return Pattern.delay(frames, self.stream_delays)

    def frames_in(self, steps: int) -> int:
        """The most frames whose codes fit into so many steps of the pattern."""
        if self.pattern == "delay":
            return steps - max(self.stream_delays)
        return steps // {"flatten": self.num_codebooks, "coarse_first": 2}[self.pattern]

    @classmethod
    def small(cls, **changes: Any) -> MusicgenConfig:
        """§3.1, 300M parameters: 24 layers."""
        return cls(**changes)

    @classmethod
    def medium(cls, **changes: Any) -> MusicgenConfig:
        """§3.1, 1.5B parameters: 48 layers."""
        sizes = {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "ffn_dim": 6144}
        return cls(**(sizes | changes))

    @classmethod
    def large(cls, **changes: Any) -> MusicgenConfig:
        """§3.1, 3.3B parameters: 48 layers."""
        sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "ffn_dim": 8192}
        return cls(**(sizes | changes))

    @classmethod
    def stereo_small(cls) -> MusicgenConfig:
        """The released stereo checkpoints: eight streams."""
        return cls.small(num_codebooks=8, audio_channels=2)

    @classmethod
    def stereo_medium(cls) -> MusicgenConfig:
        """The released stereo checkpoints: eight streams."""
        return cls.medium(num_codebooks=8, audio_channels=2)

    @classmethod
    def stereo_large(cls) -> MusicgenConfig:
        """The released stereo checkpoints: eight streams."""
        return cls.large(num_codebooks=8, audio_channels=2)

    @classmethod
    def audiogen_medium(cls) -> MusicgenConfig:
        """AudioGen's released checkpoint (arXiv 2209.15352): sounds at 16 kHz, texts read by T5-large."""
        parts = {"text_encoder": _T5_LARGE, "audio_encoder": EncodecConfig.audiogen_16khz()}
        return cls.medium(**parts, segment_duration=10.0)


@dataclass(frozen=True)
class MusicgenGenerationConfig:
    """§3.1: how the released models are sampled (`generation_config.json`)."""

    max_length: int = 1500  # steps, the first included: 30 s
    do_sample: bool = True  # draw codes; otherwise take the most probable
    top_k: int = 250  # codes to draw from; what a file does not say is as in the paper, not transformers' 50
    temperature: float = 1.0  # of the distribution
    top_p: float = 1.0  # probability of the codes to draw from
    guidance_scale: float = 3.0  # of classifier-free guidance; 1 is without
    others: tuple[tuple[str, Any], ...] = ()  # the rest of the search, as for `transformers.GenerationConfig`

    def options(self) -> dict[str, Any]:
        """As `audiozoo.decoding.GenerationConfig` takes them."""
        named = {name: value for name, value in vars(self).items() if name not in ("guidance_scale", "others")}
        return named | dict(self.others)


# --- what models return ----------------------------------------------------------------------------------------------


class MusicgenMelodyOutputWithPast(ModelOutput):
    """What melody models return (§2.4); `logits` and states cover the conditions in front, too."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "streams positions vocabulary"] = ABSENT
    past_key_values: Any = None
    hidden_states: tuple[Float[Array, "batch positions width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads query key"], ...] | None = None
    encoder_hidden_states: Float[Array, "batch conditions width"] | None = None


class MusicgenPrediction(ModelOutput):
    """Logits of every code given those before it in the pattern (§2.2), and which of them have a complete context."""

    logits: Float[Array, "batch codebooks frames vocabulary"] = ABSENT
    mask: Bool[Array, "codebooks frames"] = ABSENT


class MusicgenGenerateOutput(ModelOutput):
    """What `generate` found (§3.1): `sequences` are the waveform, or the codes where there is no codec."""

    sequences: Any = ABSENT
    audio_codes: Int[Any, "batch codebooks frames"] = ABSENT
    scores: Float[Any, "steps streams vocabulary"] | None = None  # row b · K + k is stream k of item b
    logits: Float[Any, "steps streams vocabulary"] | None = None  # likewise, after guidance


# --- §2.4: the decoder -----------------------------------------------------------------------------------------------


class MusicgenDecoderLayer(nnx.Module):
    """§2.4: causal self-attention, cross-attention to the conditions, feed-forward; each after a norm, no biases."""

    def __init__(self, config: MusicgenConfig, cross_attention: bool, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, heads = config.hidden_size, config.num_attention_heads
        attention: dict[str, Any] = {"use_bias": False, "dropout": config.attention_dropout, **kwargs}
        self.self_attn_layer_norm = LayerNorm(width, **kwargs)
        self.self_attn = MultiHeadAttention(width, heads, **attention)
        self.encoder_attn_layer_norm = LayerNorm(width, **kwargs) if cross_attention else None
        self.encoder_attn = MultiHeadAttention(width, heads, **attention) if cross_attention else None
        self.final_layer_norm = LayerNorm(width, **kwargs)
        self.fc1 = Linear(width, config.ffn_dim, use_bias=False, **kwargs)
        self.fc2 = Linear(config.ffn_dim, width, use_bias=False, **kwargs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Mask,
        dropout: Dropout,
        past: KeyValues | None = None,
        position: int | Int[Array, ""] = 0,
        memory: KeyValues | None = None,
        memory_mask: Bool[Array, "#batch 1 1 conditions"] | None = None,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time width"], KeyValues, jax.Array | None, jax.Array | None]:
        """One layer: its output, its keys and values so far, and the self- and cross-attention weights."""
        rate = self.config.dropout
        y = self.self_attn_layer_norm(x)
        key_values = self.self_attn.key_values(y)
        if past is not None:
            key_values = past.write(key_values, position)
        y, weights = self.self_attn(y, key_values, mask=mask, dropout=dropout, need_weights=need_weights)
        x = x + dropout(y, rate)
        cross_weights = None
        if self.encoder_attn is not None and self.encoder_attn_layer_norm is not None and memory is not None:
            y = self.encoder_attn_layer_norm(x)
            y, cross_weights = self.encoder_attn(
                y, memory, mask=memory_mask, dropout=dropout, need_weights=need_weights
            )
            x = x + dropout(y, rate)
        y = activation(self.config.activation_function)(self.fc1(self.final_layer_norm(x)))
        y = self.fc2(dropout(y, self.config.activation_dropout))
        return x + dropout(y, rate), key_values, weights, cross_weights


@jax.tree_util.register_dataclass
@dataclass
class MusicgenCache:
    """What the decoder keeps between steps (not in the paper): its keys and values, and those of the conditions."""

    self_attention: tuple[KeyValues, ...]
    cross_attention: tuple[KeyValues, ...] | None = None
    memory_mask: Bool[Array, "batch 1 1 conditions"] | None = None


class MusicgenDecoder(nnx.Module):
    r"""§2.4: $\sum_k E_k[c_k]$ plus positions, the layers, a norm."""

    def __init__(
        self,
        config: MusicgenConfig,
        cross_attention: bool = True,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        entries = config.num_codebooks * (config.vocab_size + 1)  # one table below the other, the special token in each
        self.embed_tokens = Embed(entries, config.hidden_size, **kwargs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([MusicgenDecoderLayer(config, cross_attention, **kwargs) for _ in layers])
        self.layer_norm = LayerNorm(config.hidden_size, **kwargs)
        self.config = config

    def embed(self, codes: Int[Array, "batch codebooks time"]) -> Float[Array, "batch time width"]:
        r"""$\sum_k E_k[c_k]$."""
        check_ids(codes, self.config.vocab_size + 1)  # a larger one would be the next codebook's
        first = (self.config.vocab_size + 1) * jnp.arange(codes.shape[1], dtype=codes.dtype)
        return self.embed_tokens(codes + first[:, None]).sum(axis=1)

    def start(
        self,
        batch: int,
        length: int,
        dtype: Any,
        memory: Float[Array, "batch conditions width"] | None = None,
        memory_mask: Bool[Array, "batch conditions"] | None = None,
    ) -> MusicgenCache:
        """An empty cache for `length` positions, and the conditions' keys and values."""
        config = self.config
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        empty = KeyValues.empty(batch, heads, length, head_dim, dtype)
        cross = None
        if memory is not None:
            attentions = [layer.encoder_attn for layer in self.layers]
            cross = tuple(attention.key_values(memory) for attention in attentions if attention is not None)
        mask = None if memory_mask is None else memory_mask[:, None, None, :]
        return MusicgenCache(tuple(empty for _ in self.layers), cross, mask)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        attention_mask: Int[Array, "batch time"] | None = None,
        memory: Float[Array, "batch conditions width"] | None = None,
        memory_mask: Bool[Array, "batch conditions"] | None = None,
        *,
        cache: MusicgenCache | None = None,
        position: int | Int[Array, ""] = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> DecoderOutput:
        """Run the layers.

        Args:
            x: embedded codes, in melody models after the conditions.
            attention_mask: 1 for positions to be seen, 0 for others.
            memory: conditions for cross-attention; not needed with a cache, which holds their keys and values.
            memory_mask: conditions to be seen.
            cache: from `start` or from the last call; returned with these positions added.
            position: where the first of them stands.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every layer, and the output.
            key: switches dropout on.
        """
        dropout, time = Dropout(key), x.shape[1]
        visible = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        mask: Mask = Causal(visible)
        if cache is not None:
            mask = Causal(visible).written_out(time, cache.self_attention[0].key.shape[2], position)
        shown = None if memory_mask is None else memory_mask[:, None, None, :]
        if cache is not None:
            shown = cache.memory_mask
        # §2.4: "a sinusoidal positional embedding"
        x = x + cosines_and_sines(position + jnp.arange(time), x.shape[2], dtype=x.dtype)
        x = dropout(x, self.config.dropout)
        hidden_states: list[Any] = [x]
        attentions: list[Any] = []
        cross_attentions: list[Any] = []
        key_values: list[KeyValues] = []
        for i, layer in enumerate(self.layers):
            past = seen = None
            if cache is not None:
                past = cache.self_attention[i]
                seen = None if cache.cross_attention is None else cache.cross_attention[i]
            elif memory is not None and layer.encoder_attn is not None:
                seen = layer.encoder_attn.key_values(memory)
            x, new, weights, cross_weights = layer(x, mask, dropout, past, position, seen, shown, output_attentions)
            hidden_states += [*unseen(layer), x]
            attentions.append(weights)
            cross_attentions.append(cross_weights)
            key_values.append(new)
        x = hidden_states[-1] = self.layer_norm(x)
        crossed = output_attentions and cross_attentions[0] is not None
        return DecoderOutput(
            last_hidden_state=x,
            past_key_values=None
            if cache is None
            else MusicgenCache(tuple(key_values), cache.cross_attention, cache.memory_mask),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if crossed else None,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """What the decoder follows (§2.3): vectors, zero where there is none, and which of them are to be seen."""

    states: Float[Array, "batch conditions width"]
    mask: Bool[Array, "batch conditions"] | None = None

    def repeat(self, count: int) -> Condition:
        """Every item `count` times, side by side."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self)

    def null(self) -> Condition:
        """No condition: zeros, which cross-attention without biases turns into zero."""
        return Condition(jnp.zeros_like(self.states), None if self.mask is None else jnp.zeros_like(self.mask))


class MusicgenForCausalLM(nnx.Module):
    """§2.4: the decoder and a linear head for each codebook.

    Codes are `(batch · codebooks, steps)` at the boundary, already laid out by a pattern, as in `transformers`.
    """

    cross_attention: ClassVar[bool] = True  # or conditions in front

    def __init__(self, config: MusicgenConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.model = MusicgenDecoder(config, self.cross_attention, **kwargs)
        self.lm_heads = Linear(config.hidden_size, config.num_codebooks * config.vocab_size, use_bias=False, **kwargs)
        self.config, self.dtype = config, dtype
        self.generation_config = MusicgenGenerationConfig()

    def heads(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch codebooks time vocabulary"]:
        """§2.4: logits of every stream's next code."""
        logits = self.lm_heads(x).reshape(*x.shape[:2], self.config.num_codebooks, self.config.vocab_size)
        return logits.swapaxes(1, 2)

    def __call__(
        self,
        input_ids: Int[Array, "streams steps"] | None = None,
        attention_mask: Int[Array, "batch steps"] | None = None,
        encoder_hidden_states: Float[Array, "batch conditions width"] | None = None,
        encoder_attention_mask: Int[Array, "batch conditions"] | None = None,
        labels: Int[Array, "batch steps codebooks"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> CausalLMOutput:
        """Logits after every step, and with `labels` the mean cross-entropy of the codebooks.

        Args:
            input_ids: codes as a pattern lays them out; by default the labels, one step later.
            attention_mask: 1 for steps to be seen.
            encoder_hidden_states: conditions.
            encoder_attention_mask: 1 for conditions to be seen.
            labels: wanted codes of every step, in the same layout: no pattern is applied. The special token and -100
                stand for no code.
            output_attentions: return attention weights.
            output_hidden_states: return the states between layers.
            key: switches dropout on.

        Raises:
            UsageError: without codes or labels.
        """
        config = self.config
        if input_ids is None:
            if labels is None:
                raise UsageError("Give the model input_ids or labels.")
            input_ids = shift_right(labels, config.special_token_id)
        codes = input_ids.reshape(-1, config.num_codebooks, input_ids.shape[-1])
        x = self.model.embed(codes)
        memory, mask = encoder_hidden_states, encoder_attention_mask
        if not self.cross_attention and memory is not None:
            if mask is not None or attention_mask is not None:
                ones = jnp.ones(x.shape[:2], jnp.int32) if attention_mask is None else attention_mask
                front = jnp.ones(memory.shape[:2], ones.dtype) if mask is None else mask.astype(ones.dtype)
                attention_mask = jnp.concatenate([front, ones], axis=1)
            x, memory, mask = jnp.concatenate([memory.astype(x.dtype), x], axis=1), None, None
        out = self.model(
            x,
            attention_mask,
            memory,
            None if mask is None else mask != 0,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )
        logits = self.heads(out.last_hidden_state)
        loss = None
        if labels is not None:
            wanted = jnp.where(labels == config.special_token_id, IGNORED_LABEL, labels).swapaxes(1, 2)
            loss = codebook_loss(logits[:, :, logits.shape[2] - wanted.shape[2] :], wanted).mean()
        return CausalLMOutput(
            loss=loss,
            logits=logits.reshape(-1, *logits.shape[2:]),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cross_attentions=out.cross_attentions,
        )

    # --- training ---

    def predict(
        self,
        codes: Int[Array, "batch codebooks frames"],
        condition: Condition | None = None,
        *,
        pattern: Pattern | None = None,
        key: jax.Array | None = None,
    ) -> MusicgenPrediction:
        """§2.2: logits of all codes, which the model's pattern lays out over the steps.

        Args:
            codes: of the codec; the special token where there is none.
            condition: what they follow.
            pattern: another pattern than the model's.
            key: switches dropout on.
        """
        pattern = pattern or self.config.pattern_for(codes.shape[2])
        # The steps at the end that lack codes are left out, as in the released code; the last step predicts nothing.
        sequence = pattern.interleave(codes, self.config.special_token_id)[..., : pattern.steps - pattern.incomplete]
        states = None if condition is None else condition.states
        mask = None if condition is None or condition.mask is None else condition.mask.astype(jnp.int32)
        ids = sequence.reshape(-1, sequence.shape[-1])
        logits = self(ids, None, states, mask, key=key).logits
        logits = logits.reshape(*codes.shape[:2], *logits.shape[1:])[:, :, -sequence.shape[-1] :]
        found, there = pattern.revert_logits(logits)
        return MusicgenPrediction(found, jnp.asarray(there))

    # --- §3.1: generation ---

    def start(self, condition: Condition | None, batch: int, length: int) -> MusicgenCache:
        """A cache for `length` steps; see `audiozoo.decoding`."""
        dtype = self.dtype or self.lm_heads.kernel.dtype
        if condition is None:
            return self.model.start(batch, length, dtype)
        if self.cross_attention:
            return self.model.start(batch, length, dtype, condition.states.astype(dtype), condition.mask)
        return self.model.start(batch, condition.states.shape[1] + length, dtype)

    def feed(
        self,
        codes: Int[Array, "batch codebooks time"],
        cache: MusicgenCache,
        position: int | Int[Array, ""],
        front: Float[Array, "batch conditions width"] | None = None,
    ) -> tuple[Float[Array, "batch codebooks vocabulary"], MusicgenCache]:
        """Logits after the last of these steps, of which the first stands at `position`; `front` comes before them."""
        x = self.model.embed(codes)
        if front is not None:
            x = jnp.concatenate([front.astype(x.dtype), x], axis=1)
        out = self.model(x, cache=cache, position=position)
        return self.heads(out.last_hidden_state[:, -1:])[:, :, 0], out.past_key_values

    def generate(
        self,
        inputs: Int[Any, "streams frames"] | None = None,
        *,
        encoder_hidden_states: Float[Array, "batch conditions width"] | None = None,
        encoder_attention_mask: Int[Array, "batch conditions"] | None = None,
        null_condition: Condition | None = None,
        guidance_scale: float | None = None,
        two_step_cfg: bool = False,
        frames: int | None = None,
        pattern: Pattern | None = None,
        key: jax.Array | None = None,
        noise: Float[Array, "new streams vocabulary+1"] | None = None,
        streamer: Callable[[np.ndarray, int], None] | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "batch codebooks frames"] | MusicgenGenerateOutput:
        r"""§3.1: codes, step by step of the pattern, in one compiled loop.

        With guidance $\gamma$ the logits are $l_\emptyset + \gamma\,(l_c - l_\emptyset)$.

        Args:
            inputs: codes to continue, not laid out; a first column of special tokens is ignored.
            encoder_hidden_states: conditions, one item each; unlike in `transformers` without the null ones.
            encoder_attention_mask: 1 for conditions to be seen.
            null_condition: that of $l_\emptyset$; zeros by default.
            guidance_scale: $\gamma$, at least 1; by default the checkpoint's.
            two_step_cfg: compute $l_c$ and $l_\emptyset$ one after the other, not as one batch: less memory at a time.
                Before the steps of a melody model the null condition is then as short as it is by itself.
            frames: frames in all, those given included. By default as many as `max_new_tokens` (or `max_length`, which
                counts a first step and the frames given) steps complete, as in `transformers`.
            pattern: another pattern than the model's, of `frames` frames.
            key: randomness for `do_sample=True`.
            noise: Gumbel noise instead, of which there is one more than codes.
            streamer: called with the codes of every step and its number.
            options: as for `transformers.generate`; see `audiozoo.decoding.GenerationConfig`.

        Returns:
            Codes, those given included; with `return_dict_in_generate=True` a `MusicgenGenerateOutput`.

        Raises:
            UsageError: for options that contradict each other.
        """
        model, defaults = self.config, self.generation_config
        config = GenerationConfig.over(defaults.options(), options)
        if config.num_beams > 1:
            raise UsageError("MusicGen draws codes or takes the most probable ones; it has no beams (num_beams=1).")
        if options.get("eos_token_id") is not None:
            raise UsageError("Among MusicGen's codes none is an end; say by frames or max_new_tokens how many to make.")
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        if not scale >= 1:
            raise UsageError(f"guidance_scale is {scale}; it is at least 1, which is no guidance.")

        conditions: tuple[Condition, ...] = ()
        if encoder_hidden_states is not None:
            mask = None if encoder_attention_mask is None else encoder_attention_mask != 0
            given = Condition(encoder_hidden_states, mask)
            conditions = (given, null_condition or given.null()) if scale > 1 else (given,)
        copies = config.num_return_sequences
        conditions = tuple(condition.repeat(copies) for condition in conditions)

        prompt = self._prompt(inputs, len(conditions[0].states) // copies if conditions else None)
        batch, known = len(prompt) * copies, prompt.shape[2]
        if frames is None:
            frames = pattern.table.shape[1] if pattern else model.frames_in(known + config.new_tokens(known + 1))
        if frames <= known:
            raise UsageError(
                f"{frames} frames are wanted and {known} are given: nothing is left to generate. Raise max_new_tokens, "
                f"frames or the duration (max_new_tokens counts steps, of which the pattern takes "
                f"{model.pattern_for(1).steps} for the first frame)."
            )
        pattern = pattern or model.pattern_for(frames)
        if pattern.table.shape != (model.num_codebooks, frames):
            raise UsageError(f"The pattern is for {pattern.table.shape}, not for {(model.num_codebooks, frames)}.")

        # What every step must hold: the special token, a code that is given, or -1: to be found.
        codes = np.concatenate([prompt, np.full((*prompt.shape[:2], frames - known), -1, np.int32)], axis=2)
        forced = np.repeat(pattern.interleave(codes, model.special_token_id), copies, axis=0)
        first = int(np.argmax(np.any(forced == -1, axis=(0, 1))))
        rows = forced.reshape(batch * model.num_codebooks, -1)
        config = config.replace(
            max_new_tokens=rows.shape[1] - first, max_length=None, num_return_sequences=1, eos_token_id=None
        )
        config, wanted = bucketed(config, first)
        room = first + config.new_tokens(first)
        rows = np.pad(rows, ((0, 0), (0, room - rows.shape[1])), constant_values=model.special_token_id)
        temperature = None
        if config.do_sample:
            temperature, config = config.temperature, config.replace(temperature=1.0)
        output = _generate(
            *nnx.split(self),
            conditions,
            jnp.asarray(rows),
            scale,
            wanted,
            temperature,
            key,
            noise,
            first=first,
            config=config,
            two_step=two_step_cfg,
            streamer=streamer,
        ).trim()
        found = output.sequences.reshape(batch, model.num_codebooks, -1)
        found = pattern.revert(found)
        if not config.return_dict_in_generate:
            return found
        size = model.vocab_size
        cut = {n: None if (x := getattr(output, n)) is None else x[..., :size] for n in ("scores", "logits")}
        return MusicgenGenerateOutput(found, found, **cut)

    def _prompt(self, inputs: Any, batch: int | None) -> Int[np.ndarray, "batch codebooks frames"]:
        """The codes to continue, checked."""
        books, size = self.config.num_codebooks, self.config.vocab_size
        if inputs is None:
            return np.zeros((batch or 1, books, 0), np.int32)
        codes = np.asarray(inputs, np.int32)
        if codes.ndim != 2 or len(codes) % books:
            raise UsageError(f"Codes to continue have shape {codes.shape}; (batch x {books}, frames) is expected.")
        codes = codes.reshape(len(codes) // books, books, codes.shape[1])
        if codes.shape[2] and np.all(codes[..., 0] == self.config.special_token_id):
            codes = codes[..., 1:]
        if codes.size and not (codes.min() >= 0 and codes.max() < size):
            raise UsageError(f"Codes to continue lie between 0 and {size - 1}.")
        if batch not in (None, len(codes)):
            raise UsageError(f"There are {len(codes)} items to continue and {batch} conditions.")
        return codes


class MusicgenMelodyForCausalLM(MusicgenForCausalLM):
    """§2.3: as `MusicgenForCausalLM`, with the conditions in front of the steps instead of in cross-attention."""

    cross_attention: ClassVar[bool] = False


@dataclass(frozen=True)
class _Forced:
    """A logits processor: where a step's token is known, it alone is possible."""

    rows: Int[Array, "streams steps"]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        known = jax.lax.dynamic_index_in_dim(self.rows, length, axis=1)
        only = jnp.where(jnp.arange(logits.shape[-1]) == known, 0.0, -jnp.inf).astype(logits.dtype)
        return jnp.where(known >= 0, only, logits)


@partial(jax.jit, static_argnames=("graphdef", "first", "config", "two_step", "streamer"))
def _generate(
    graphdef: Any,
    state: Any,
    conditions: tuple[Condition, ...],
    forced: jax.Array,
    scale: jax.Array,
    wanted: jax.Array,
    temperature: jax.Array | None,
    key: jax.Array | None,
    noise: jax.Array | None,
    *,
    first: int,
    config: GenerationConfig,
    two_step: bool,
    streamer: Any,
) -> Any:
    """`conditions`: none; one; or one and the null one, for guidance. `forced` says what is known of the steps."""
    model = nnx.merge(graphdef, state)
    books, size = model.config.num_codebooks, model.config.vocab_size
    branches: tuple[Condition | None, ...] = conditions or (None,)
    guided, together = len(branches) == 2, len(branches) == 2 and not two_step
    if together:
        branches = (jax.tree.map(lambda *x: jnp.concatenate(x), *conditions),)
    fronts = [None if c is None or model.cross_attention else c.states for c in branches]

    def run(tokens: jax.Array, caches: Any, position: Any, begin: bool) -> tuple[jax.Array, Any]:
        codes = tokens.reshape(-1, books, tokens.shape[1])
        codes = jnp.concatenate([codes, codes]) if together else codes
        logits, after = [], []
        for cache, front in zip(caches, fronts, strict=True):
            shift = 0 if front is None or begin else front.shape[1]
            found, cache = model.feed(codes, cache, position + shift, front if begin else None)
            logits.append(found)
            after.append(cache)
        found = logits[0]
        if guided:
            conditional, unconditional = jnp.split(found, 2) if together else logits
            # l∅ + γ (l_c - l∅)
            found = unconditional + jnp.asarray(scale, found.dtype) * (conditional - unconditional)
        found = found.reshape(-1, size)
        return jnp.pad(found, ((0, 0), (0, 1)), constant_values=-jnp.inf), tuple(after)

    items = len(forced) // books * (2 if together else 1)
    caches = tuple(model.start(c, items, first + config.new_tokens(first)) for c in branches)
    return generate(
        lambda tokens, caches, position: run(tokens, caches, position, False),
        caches,
        forced[:, :first],
        config,
        key=key,
        noise=noise,
        logits_processors=(_Forced(forced),),
        streamer=streamer,
        prefill=lambda prompt, caches: run(prompt, caches, 0, True),
        max_new_tokens=wanted,
        temperature=temperature,
    )


def shift_right(labels: Int[Array, "batch steps codebooks"], special: int) -> Int[Array, "batch codebooks steps"]:
    """§2.4, teacher forcing: the labels one step later, the special token in front and where there is no label."""
    shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=special)
    return jnp.where(shifted == IGNORED_LABEL, special, shifted).swapaxes(1, 2)


def codebook_loss(
    logits: Float[Array, "batch codebooks time vocabulary"], labels: Int[Array, "batch codebooks time"]
) -> Float[Array, " codebooks"]:
    """§3.1: cross-entropy of each codebook, over its labels that are not -100."""
    return jax.vmap(cross_entropy, in_axes=1)(logits, labels)


# --- §2.3: the whole model -------------------------------------------------------------------------------------------


class MusicgenForConditionalGeneration(nnx.Module):
    """§2: text encoder, decoder and codec; the text is attended to (§2.3)."""

    decoder_class: ClassVar[type[MusicgenForCausalLM]] = MusicgenForCausalLM

    def __init__(self, config: MusicgenConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text_encoder = T5EncoderModel(config.text_encoder, **kwargs)
        self.audio_encoder = EncodecModel(config.audio_encoder, **kwargs)
        self.decoder = self.decoder_class(config, **kwargs)
        same = config.text_encoder.d_model == config.hidden_size
        projection = None if same else Linear(config.text_encoder.d_model, config.hidden_size, **kwargs)
        self.enc_to_dec_proj = projection
        self.config, self.dtype = config, dtype

    @property
    def generation_config(self) -> MusicgenGenerationConfig:
        """How codes are drawn by default: the decoder's."""
        return self.decoder.generation_config

    @generation_config.setter
    def generation_config(self, value: MusicgenGenerationConfig) -> None:
        """The decoder's."""
        self.decoder.generation_config = value

    # --- conditions ---

    def encode_text(
        self,
        input_ids: Int[Array, "batch tokens"] | None,
        attention_mask: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: Any = None,
        **asked: Any,
    ) -> tuple[Float[Array, "batch tokens width"], BaseModelOutput]:
        """§2.3: the text's vectors, zero for padding, and what the text encoder returned."""
        if encoder_outputs is None:
            if input_ids is None:
                raise UsageError("Give the model a text (input_ids), or encoder_outputs of an earlier call.")
            check_mask(attention_mask, np.shape(input_ids))
            encoder_outputs = self.text_encoder(input_ids, attention_mask, **asked)
        states = encoder_outputs["last_hidden_state"]
        if self.enc_to_dec_proj is not None:
            states = self.enc_to_dec_proj(states)
        if attention_mask is not None:
            check_mask(attention_mask, states.shape[:2])
            states = states * attention_mask[..., None].astype(states.dtype)
        return states, encoder_outputs

    def condition(
        self,
        input_ids: Int[Array, "batch tokens"] | None = None,
        attention_mask: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: Any = None,
        mask_text: bool | None = None,
    ) -> Condition:
        """§2.3: what the decoder attends to.

        Args:
            input_ids: tokens of the texts.
            attention_mask: 1 for real tokens; all 0 for no text.
            encoder_outputs: an earlier encoding of them instead.
            mask_text: hide padding, or let zeros be seen; by default as `config` has it. It makes a difference for
                texts of several lengths in one batch.
        """
        hide = self.config.mask_text if mask_text is None else mask_text
        states, _ = self.encode_text(input_ids, attention_mask, encoder_outputs)
        return Condition(states, attention_mask != 0 if hide and attention_mask is not None else None)

    def null_condition(self, condition: Condition, alone: bool = False) -> Condition:
        """§3.1: no text, in the shape of `condition`; `alone`, as it is without what others are padded to."""
        return condition.null()

    def get_unconditional_inputs(self, num_samples: int = 1) -> dict[str, Any]:
        """What `generate` takes for music without a text; guidance would be of no use."""
        dtype = self.dtype or self.text_encoder.shared.embedding.dtype
        states = jnp.zeros((num_samples, 1, self.config.text_encoder.d_model), dtype)
        mask = jnp.zeros((num_samples, 1), jnp.int32)
        return {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask, "guidance_scale": 1.0}

    # --- §2.1: sound and codes ---

    def audio_to_codes(
        self, input_values: Float[Array, "batch channels samples"], padding_mask: Any = None
    ) -> Int[Array, "batch codebooks frames"]:
        """§2.1: the streams of codes of a waveform; in stereo those of left and right in turn, of mono each twice."""
        config = self.config
        if input_values.ndim != 3:
            raise UsageError(f"input_values has shape {input_values.shape}; (batch, channels, samples) is expected.")
        batch, channels, _ = input_values.shape
        if channels != 1 and channels != config.audio_channels:
            raise UsageError(f"The waveform has {channels} channels; this model has {config.audio_channels}.")
        mono = self.audio_encoder.masked(input_values, padding_mask).reshape(batch * channels, 1, -1)
        bandwidth = config.audio_encoder.target_bandwidths[-1]
        codes = self.audio_encoder.encode(mono, bandwidth=bandwidth).audio_codes
        if len(codes) != 1:
            raise UsageError("The codec cuts recordings into chunks, which the model cannot continue.")
        codes = codes[0].reshape(batch, channels, *codes.shape[2:])
        if channels < config.audio_channels:
            codes = jnp.repeat(codes, config.audio_channels, axis=1)
        # (batch, channels, K, frames) -> streams L0, R0, L1, R1, ...
        return codes.swapaxes(1, 2).reshape(batch, config.num_codebooks, -1)

    def codes_to_audio(self, codes: Int[Array, "batch codebooks frames"]) -> Float[Array, "batch channels samples"]:
        """§2.1: the waveform of codes."""
        batch, _, frames = codes.shape
        channels = self.config.audio_channels
        apart = codes.reshape(batch, -1, channels, frames).swapaxes(1, 2).reshape(batch * channels, -1, frames)
        values = self.audio_encoder.decode(apart[None], [None]).audio_values
        return values.reshape(batch, channels, -1)

    # --- forward ---

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"] | None = None,
        attention_mask: Int[Array, "batch tokens"] | None = None,
        input_values: Float[Array, "batch channels samples"] | None = None,
        padding_mask: Any = None,
        decoder_input_ids: Int[Array, "streams steps"] | None = None,
        decoder_attention_mask: Int[Array, "batch steps"] | None = None,
        encoder_outputs: Any = None,
        labels: Int[Array, "batch steps codebooks"] | None = None,
        *,
        mask_text: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits after every step, and with `labels` their mean cross-entropy; see `MusicgenForCausalLM`.

        Args:
            input_ids: tokens of the texts.
            attention_mask: 1 for real tokens.
            input_values: waveform, whose codes are the decoder's input where there are neither codes nor labels.
            padding_mask: 1 where there is sound.
            decoder_input_ids: codes as a pattern lays them out.
            decoder_attention_mask: 1 for steps to be seen.
            encoder_outputs: an earlier encoding of the texts.
            labels: wanted codes, laid out.
            mask_text: see `condition`.
            output_attentions: return attention weights.
            output_hidden_states: return the states between layers.
            key: switches dropout on.
        """
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        keys: Any = (None, None) if key is None else jax.random.split(key)
        states, text = self.encode_text(input_ids, attention_mask, encoder_outputs, key=keys[0], **asked)
        hide = self.config.mask_text if mask_text is None else mask_text
        if decoder_input_ids is None and labels is None:
            if input_values is None:
                raise UsageError("Give the model codes (decoder_input_ids), labels, or a waveform (input_values).")
            codes = self.audio_to_codes(input_values, padding_mask)
            decoder_input_ids = codes.reshape(-1, codes.shape[-1])
        out = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            states,
            attention_mask if hide else None,
            labels,
            key=keys[1],
            **asked,
        )
        return Seq2SeqLMOutput(
            loss=out.loss,
            logits=out.logits,
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=text["last_hidden_state"],
            encoder_hidden_states=text["hidden_states"],
            encoder_attentions=text["attentions"],
        )

    # --- §3.1: training ---

    def training_loss(
        self,
        codes: Int[Array, "batch codebooks frames"],
        *,
        code_mask: Bool[Array, "batch codebooks frames"] | None = None,
        condition_dropout: float = 0.3,
        key: jax.Array | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, ""], Float[Array, " codebooks"]]:
        """§3.1: mean over the codebooks of their cross-entropy, and that of each.

        Codes are laid out by the model's pattern here, and those whose context is cut off do not count. Text encoder
        and codec stay as they are: no gradient reaches them.

        Args:
            codes: of the codec (`audio_to_codes`), in the order of time.
            code_mask: False for padding: such codes are hidden from the model and not counted.
            condition_dropout: probability that an item loses its conditions, which guidance needs.
            key: switches dropouts on.
            inputs: of `condition`: `input_ids`, `attention_mask` …
        """
        keys: Any = (None, None) if key is None else jax.random.split(key)
        condition = self._training_condition(keys[0], condition_dropout, len(codes), **inputs)
        shown = codes if code_mask is None else jnp.where(code_mask, codes, self.config.special_token_id)
        predicted = self.decoder.predict(shown, condition, key=keys[1])
        counted = predicted.mask[None] if code_mask is None else predicted.mask[None] & code_mask
        losses = codebook_loss(predicted.logits, jnp.where(counted, codes, IGNORED_LABEL))
        return losses.mean(), losses

    def _training_condition(self, key: Any, rate: float, batch: int, **inputs: Any) -> Condition:
        """The condition of `condition`, or the null one where an item loses it."""
        if inputs.get("encoder_outputs") is None and inputs.get("input_ids") is not None:
            encoded = self.text_encoder(inputs["input_ids"], inputs.get("attention_mask"))
            inputs |= {"input_ids": None, "encoder_outputs": jax.lax.stop_gradient(encoded)}
        condition = self.condition(**inputs)
        if key is None:
            return condition
        kept = jax.random.bernoulli(key, 1.0 - rate, (batch,))
        return jax.tree.map(
            lambda x, none: jnp.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x, none),
            condition,
            self.null_condition(condition),
        )

    # --- §3.1: generation ---

    def generate_codes(
        self,
        input_ids: Int[Any, "batch tokens"] | None = None,
        attention_mask: Int[Any, "batch tokens"] | None = None,
        decoder_input_ids: Int[Any, "streams frames"] | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "batch codebooks frames"] | MusicgenGenerateOutput:
        """§3.1: `generate` up to the codes, of which `decoder_input_ids` are to be continued."""
        names = ("encoder_outputs", "input_features", "mask_text")
        given = {n: options.pop(n) for n in names if n in options}
        hide = given.pop("mask_text", None)
        if self.decoder.cross_attention and given.pop("input_features", None) is not None:
            raise UsageError("This model follows no melody; take one of the melody models.")
        alone = bool(options.get("two_step_cfg"))
        if input_ids is not None:
            check_ids(input_ids, self.config.text_encoder.vocab_size)
        condition, null = _conditions(*nnx.split(self), input_ids, attention_mask, given, hide=hide, alone=alone)
        return self.decoder.generate(
            decoder_input_ids,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            null_condition=null,
            **options,
        )

    def generate(
        self,
        input_ids: Int[Any, "batch tokens"] | None = None,
        attention_mask: Int[Any, "batch tokens"] | None = None,
        *,
        input_values: Float[Any, "batch channels samples"] | None = None,
        padding_mask: Any = None,
        decoder_input_ids: Int[Any, "streams frames"] | None = None,
        duration: float | None = None,
        **options: Any,
    ) -> Float[np.ndarray, "batch channels samples"] | MusicgenGenerateOutput:
        """§3.1: music for texts, for melodies, or without either, as a waveform.

        Args:
            input_ids: tokens of the texts.
            attention_mask: 1 for real tokens.
            input_values: music to continue.
            padding_mask: 1 where it sounds.
            decoder_input_ids: its codes instead.
            duration: seconds in all, the music to continue included; exact to the sample.
            options: of `condition` (`input_features`, `encoder_outputs`, `mask_text`) and of
                `MusicgenForCausalLM.generate` (`max_new_tokens`, `frames`, `guidance_scale`, `key` …).

        Returns:
            The waveform; with `return_dict_in_generate=True` a `MusicgenGenerateOutput`, which also holds the codes.

        Raises:
            UsageError: for options that contradict each other.
        """
        codec = self.config.audio_encoder
        if duration is not None:
            if options.get("frames") is not None:
                raise UsageError("Give duration or frames, not both.")
            options["frames"] = frames_for(duration, codec)
        if input_values is not None and decoder_input_ids is None:
            codes = _call(self, "audio_to_codes", jnp.asarray(input_values), padding_mask)
            decoder_input_ids = np.asarray(codes).reshape(-1, codes.shape[-1])
        found = self.generate_codes(input_ids, attention_mask, decoder_input_ids, **options)
        codes = found if isinstance(found, np.ndarray) else found.audio_codes
        audio = np.asarray(_call(self, "codes_to_audio", jnp.asarray(codes)))
        if duration is not None:
            audio = audio[..., : round(duration * codec.sampling_rate)]
        if isinstance(found, np.ndarray):
            return audio
        return MusicgenGenerateOutput(audio, codes, found.scores, found.logits)


class MusicgenMelodyForConditionalGeneration(MusicgenForConditionalGeneration):
    """§2.3, melody: chroma and text, both projected, stand in front of the steps."""

    decoder_class: ClassVar[type[MusicgenForCausalLM]] = MusicgenMelodyForCausalLM

    def __init__(self, config: MusicgenConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        same = config.num_chroma == config.hidden_size
        self.audio_enc_to_dec_proj = None if same else Linear(config.num_chroma, config.hidden_size, **kwargs)

    def encode_melody(
        self, input_features: Float[Array, "batch frames chroma"]
    ) -> Float[Array, "batch chroma_length width"]:
        """§2.3: the melody's vectors: projected, and repeated or cut to `chroma_length` frames."""
        check_frames(input_features, self.config.num_chroma)
        states = input_features if self.audio_enc_to_dec_proj is None else self.audio_enc_to_dec_proj(input_features)
        length = self.config.chroma_length
        repeated = jnp.tile(at_least_float32(states), (1, -(-length // states.shape[1]), 1))
        return repeated[:, :length].astype(states.dtype)

    def no_melody(self, batch: int, dtype: Any) -> Float[Array, "batch 1 chroma"]:
        """What stands for no melody, as in the released code: the first pitch class throughout."""
        return jnp.zeros((batch, 1, self.config.num_chroma), dtype).at[:, :, 0].set(1)

    def condition(
        self,
        input_ids: Int[Array, "batch tokens"] | None = None,
        attention_mask: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: Any = None,
        mask_text: bool | None = None,
        input_features: Float[Array, "batch frames chroma"] | None = None,
    ) -> Condition:
        """§2.3: what stands in front: the melody, then the text, whose padding is zero and is seen.

        Args:
            input_ids: tokens of the texts.
            attention_mask: 1 for real tokens; all 0 for no text.
            encoder_outputs: an earlier encoding of them instead.
            mask_text: of no use here.
            input_features: chromagrams of the processor.
        """
        text = None
        if input_ids is not None or encoder_outputs is not None:
            text, _ = self.encode_text(input_ids, attention_mask, encoder_outputs)
        if input_features is None:
            if text is None:
                raise UsageError("Give the model a text (input_ids), a melody (input_features), or both.")
            input_features = self.no_melody(len(text), text.dtype)
        if text is not None and len(text) != len(input_features):
            raise UsageError(f"There are {len(text)} texts and {len(input_features)} melodies.")
        melody = self.encode_melody(input_features.astype(self.dtype or self.decoder.lm_heads.kernel.dtype))
        return Condition(melody if text is None else jnp.concatenate([melody, text.astype(melody.dtype)], axis=1))

    def null_condition(self, condition: Condition, alone: bool = False) -> Condition:
        """§3.1: no melody, and zeros for the text, in the shape of `condition`; `alone`, for a text without words."""
        batch, length, _ = condition.states.shape
        length = min(length, self.config.chroma_length + 1) if alone else length
        melody = self.encode_melody(self.no_melody(batch, condition.states.dtype)).astype(condition.states.dtype)
        return Condition(jnp.pad(melody, ((0, 0), (0, length - melody.shape[1]), (0, 0))))

    def training_loss(
        self,
        codes: Int[Array, "batch codebooks frames"],
        *,
        code_mask: Bool[Array, "batch codebooks frames"] | None = None,
        condition_dropout: float = 0.2,
        melody_dropout: float = 0.5,
        key: jax.Array | None = None,
        input_features: Float[Array, "batch frames chroma"] | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, ""], Float[Array, " codebooks"]]:
        """§3.1, as in text models; of an item whose conditions are kept, the melody may still go.

        Args:
            codes: see `MusicgenForConditionalGeneration.training_loss`.
            code_mask: likewise.
            condition_dropout: probability that an item loses text and melody.
            melody_dropout: probability that an item loses its melody (not in the paper; in the released code).
            key: switches dropouts on.
            input_features: chromagrams of the processor.
            inputs: the text's, of `condition`.
        """
        if key is not None and input_features is not None:
            key, own = jax.random.split(key)
            kept = jax.random.bernoulli(own, 1.0 - melody_dropout, (len(codes), 1, 1))
            input_features = jnp.where(kept, input_features, self.no_melody(len(codes), input_features.dtype))
        return super().training_loss(
            codes,
            code_mask=code_mask,
            condition_dropout=condition_dropout,
            key=key,
            input_features=input_features,
            **inputs,
        )

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch tokens"] | None = None,
        attention_mask: Int[Array, "batch tokens"] | None = None,
        input_features: Float[Array, "batch frames chroma"] | None = None,
        decoder_input_ids: Int[Array, "streams steps"] | None = None,
        decoder_attention_mask: Int[Array, "batch steps"] | None = None,
        encoder_hidden_states: Float[Array, "batch conditions width"] | None = None,
        labels: Int[Array, "batch steps codebooks"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> MusicgenMelodyOutputWithPast:
        """Logits after every condition and step, and with `labels` the mean cross-entropy; see `MusicgenForCausalLM`.

        Args:
            input_ids: tokens of the texts.
            attention_mask: 1 for real tokens.
            input_features: chromagrams.
            decoder_input_ids: codes as a pattern lays them out.
            decoder_attention_mask: 1 for steps to be seen.
            encoder_hidden_states: an earlier call's conditions instead of texts and chromagrams.
            labels: wanted codes, laid out.
            output_attentions: return attention weights.
            output_hidden_states: return the states between layers.
            key: switches dropout on.
        """
        if encoder_hidden_states is None:
            encoder_hidden_states = self.condition(input_ids, attention_mask, input_features=input_features).states
        out = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states,
            None,
            labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            key=key,
        )
        return MusicgenMelodyOutputWithPast(
            loss=out.loss,
            logits=out.logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            encoder_hidden_states=encoder_hidden_states,
        )


@partial(jax.jit, static_argnames=("graphdef", "hide", "alone"))
def _conditions(
    graphdef: Any,
    state: Any,
    input_ids: Any,
    attention_mask: Any,
    given: Mapping[str, Any],
    *,
    hide: bool | None,
    alone: bool,
) -> tuple[Condition, Condition]:
    model = nnx.merge(graphdef, state)
    condition = model.condition(input_ids, attention_mask, mask_text=hide, **given)
    return condition, model.null_condition(condition, alone)


@partial(jax.jit, static_argnames=("graphdef", "method"))
def _compiled(graphdef: Any, state: Any, method: str, *arguments: Any) -> Any:
    return getattr(nnx.merge(graphdef, state), method)(*arguments)


def _call(model: nnx.Module, method: str, *arguments: Any) -> Any:
    """A method, compiled for the arguments' shapes."""
    return _compiled(*nnx.split(model), method, *arguments)


def frames_for(duration: float, codec: EncodecConfig) -> int:
    """§2.1: frames of the codec that cover a duration in seconds.

    Raises:
        UsageError: if there is none.
    """
    samples = round(duration * codec.sampling_rate) if math.isfinite(duration) else 0
    if samples < 1:
        raise UsageError(f"A duration of {duration:g} s is no music; ask for another.")
    return -(-samples // codec.hop_length)


# --- use: longer than the model has learnt ---------------------------------------------------------------------------


def windows(total: int, given: int, longest: int, stride: int) -> Iterator[tuple[int, int]]:
    """Not in the paper; in the released code: (first frame, frames) of each window that a long piece is made of.

    A window continues the one before it, of which it sees all but the first `stride` frames.

    Args:
        total: frames of the piece.
        given: frames that there are to begin with.
        longest: frames that the model has learnt.
        stride: frames from one window's beginning to the next one's.
    """
    if not 0 < stride < longest:
        raise UsageError(f"Windows of {longest} frames move on by 1 to {longest - 1} frames, not by {stride}.")
    known, start = given, 0 if given < longest else given - (longest - stride)
    while known < total:
        size = min(total - start, longest)
        yield start, size
        known, start = start + size, start + stride


class _Progress:
    """Told of every step by the compiled loop; one object for all windows, so that they share a program."""

    def __init__(self, tell: Callable[[int, int], None], total: int):
        self.tell, self.total, self.start, self.end = tell, total, 0, total

    def __call__(self, tokens: np.ndarray, position: int) -> None:
        self.tell(min(self.start + position, self.end), self.total)  # the last steps of a pattern add no frame


def compose(
    model: MusicgenForConditionalGeneration,
    processor: Any,
    text: str | None = None,
    *,
    duration: float = 8.0,
    melody: Float[np.ndarray, "*channels samples"] | None = None,
    prompt: Float[np.ndarray, "*channels samples"] | None = None,
    longest: float | None = None,
    extend_stride: float | None = None,
    key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Float[np.ndarray, "channels samples"]:
    """§4, a piece of music of any length: what is longer than the model has learnt by a sliding window.

    Args:
        model: the model.
        processor: of the same checkpoint.
        text: what it should sound like; None, or nothing, leaves that to the model.
        duration: seconds, those of `prompt` included; exact to the sample.
        melody: waveform at the model's rate whose melody to follow, from its beginning again if it is shorter.
        prompt: waveform at the model's rate to continue.
        longest: seconds that the model has learnt; by default as `config.segment_duration` says.
        extend_stride: seconds from one window's beginning to the next one's; the rest of a window is its context. By
            default 18 of 30.
        key: randomness, unless `do_sample=False`.
        progress: called with the frames done and the frames in all.
        options: of `generate`.

    Raises:
        UsageError: for a melody that the model cannot follow, a prompt as long as the piece, or several pieces.
    """
    codec = model.config.audio_encoder
    follows = isinstance(model, MusicgenMelodyForConditionalGeneration)
    if melody is not None and not follows:
        raise UsageError("This model follows no melody; take one of the melody models.")
    if options.get("return_dict_in_generate") or options.get("num_return_sequences", 1) != 1:
        raise UsageError("compose returns one waveform; generate also returns several, and what else it found.")
    total = frames_for(duration, codec)
    per_second = codec.sampling_rate / codec.hop_length
    longest = model.config.segment_duration if longest is None else longest
    extend_stride = 0.6 * longest if extend_stride is None else extend_stride
    window, stride = round(longest * per_second), round(extend_stride * per_second)
    inputs: dict[str, Any] = dict(processor(text=[text])) if text else model.get_unconditional_inputs()
    codes = np.zeros((1, model.config.num_codebooks, 0), np.int32)
    if prompt is not None:
        values = np.asarray(prompt, np.float32).reshape(1, -1, np.shape(prompt)[-1])
        codes = np.asarray(_call(model, "audio_to_codes", jnp.asarray(values)))
    if codes.shape[2] >= total:
        raise UsageError(
            f"The music to continue has {codes.shape[2] / per_second:.2f} s, and the piece is to have {duration:g} s "
            "in all; ask for more."
        )
    told = None if progress is None else _Progress(progress, total)
    long = total > window
    for index, (start, size) in enumerate(windows(total, codes.shape[2], window, stride) if long else [(0, total)]):
        if melody is not None:
            at = start * codec.hop_length + np.arange(int(longest * codec.sampling_rate))
            heard = melody[..., at % melody.shape[-1]] if long else melody
            inputs["input_features"] = processor.melody(heard, codec.sampling_rate)
            inputs.pop("guidance_scale", None)
        if told is not None:
            told.start, told.end = start, start + size
        context = codes[0, :, start:]
        found = model.generate_codes(
            decoder_input_ids=context,
            frames=size,
            key=None if key is None else jax.random.fold_in(key, index),
            streamer=told,
            **(inputs | options),
        )
        assert isinstance(found, np.ndarray)
        codes = np.concatenate([codes, found[..., context.shape[1] :]], axis=2)
    audio = _call(model, "codes_to_audio", jnp.asarray(codes))
    return np.asarray(audio)[0, :, : round(duration * codec.sampling_rate)]


# --- §3.1: training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MusicgenRecipe:
    """§3.1: how the released models were trained."""

    updates: int = 1_000_000  # steps
    batch_size: int = 192  # excerpts
    seconds: float = 30.0  # of an excerpt
    learning_rate: float = 1e-4  # of AdamW
    warmup: int = 4_000  # steps, before a cosine to zero
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.1  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.99  # of the average of the weights that is released; of every tenth, in the authors' code
    d_adaptation: bool = True  # let the optimiser find its rate (arXiv 2301.07733): the 300M model's
    condition_dropout: float = 0.3  # how often an item loses its conditions
    melody_dropout: float = 0.5  # released code: how often a melody model hears none
    word_dropout: float = 0.3  # of the text's words
    merge: float = 0.25  # how often tags are added to the description
    drop_description: float = 0.5  # of the descriptions that tags are added to, and of the tags

    @classmethod
    def melody(cls) -> MusicgenRecipe:
        """§3.1: of models that follow melodies; the words' dropout is the released code's."""
        return cls(condition_dropout=0.2, word_dropout=0.2)

    def schedule(self) -> optax.Schedule:
        """§3.1: linear to the rate, then a cosine; relative to the optimiser's own with D-Adaptation."""
        peak = 1.0 if self.d_adaptation else self.learning_rate
        first = peak / self.warmup  # optax's D-Adaptation divides by it: it may not be 0
        return optax.warmup_cosine_decay_schedule(first, peak, self.warmup, self.updates)

    def optimizer(self) -> optax.GradientTransformation:
        """§3.1: AdamW, or AdamW with D-Adaptation."""
        if self.d_adaptation:
            adam = optax.contrib.dadapt_adamw(self.schedule(), betas=self.betas, weight_decay=self.weight_decay)
        else:
            adam = optax.adamw(self.schedule(), *self.betas, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


def augmented(
    description: str | None, tags: Mapping[str, str], rng: np.random.Generator, recipe: MusicgenRecipe | None = None
) -> str | None:
    """§3.1, text preprocessing: now and then tags (`genre: rock`) join the description, and words are left out.

    Args:
        description: of the music, if there is one.
        tags: such as key, tempo and genre.
        rng: randomness.
        recipe: how often.
    """
    recipe = recipe or MusicgenRecipe()
    words = [] if description is None else description.split()
    if rng.random() < recipe.merge:
        chosen = [f"{name}: {value}" for name, value in tags.items() if rng.random() >= recipe.drop_description]
        rng.shuffle(chosen)
        if description is None or rng.random() < recipe.drop_description:
            words = []
        text = ". ".join(filter(None, [" ".join(words).rstrip("."), *chosen]))
        words = text.split()
    kept = [word for word in words if rng.random() >= recipe.word_dropout]
    return " ".join(kept) or None
