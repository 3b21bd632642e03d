r"""# Bark

Suno, 2023; there is no paper. Bark follows AudioLM (Borsos et al., 2022, arXiv 2209.03143), and "§" below is AudioLM's.

A text becomes speech, laughter or song in three language models of one architecture, each of which reads the tokens of
the one before. Semantic tokens say *what* is said, 49.9 a second; coarse ones, the first two codebooks of EnCodec
(arXiv 2210.13438) in turns, *how it roughly sounds*, 75 a second each; fine ones are the other six codebooks. What was
said before (a voice preset, or the sentence before) stands in front of each: so a voice is kept.

    text, WordPiece ids ──┐ added
    semantic history ─────┴─> [256 positions][infer] ── GPT, causal ──> semantic tokens, until end of speech
      ── some 256 of them [infer] last 630 coarse ones ── GPT, causal, 60 at a time ──> coarse tokens, 2 codebooks
      ── 1024 frames, each the sum of its codebooks' embeddings ── not causal, codebook by codebook ──> 8 codebooks
      ── EnCodec's decoder ──> waveform, 24 kHz

| AudioLM | here |
| --- | --- |
| §III-C, semantic modelling; Bark's is given a text | `BarkSemanticModel`, `semantic_loss` |
| §III-C, coarse acoustic modelling, codebooks in turns | `BarkCoarseModel`, `AlternatingCodebooks`, `coarse_loss` |
| §III-C, fine acoustic modelling; Bark's is not autoregressive | `BarkFineModel`, `fine_loss` |
| §III-D, generation and continuation: history prompts | `BarkModel.generate`, `speak` |
| not in the paper: end of speech by its probability | `EosPrioritizer` |
| not in the paper: the Transformer, GPT-2's by way of nanoGPT | `BarkCausalModel`, `BarkBlock`, `BarkMLP` |

How Bark was trained is not published; the three losses are our reconstruction from what the stages read and write.

**Two samplers.** `sampling="transformers"` is that of `transformers`: the options of the checkpoint's
`generation_config`, greedy unless that says otherwise, temperature before top-k before top-p. `sampling="original"` is
Suno's: always drawn, at temperatures 0.7, 0.7 and 0.5, after top-p, then top-k; end of speech is taken once its
probability reaches 0.2.

**Where `transformers` departs from Suno's code.** Not followed, with a test that shows both: it ignores the
checkpoint's `min_eos_p`; in the fine stage, padding alters the rows of a batch that are shorter than the longest; a
history of fewer than two semantic tokens is taken whole instead of not at all, as in Suno's code too. Followed with
`sampling="transformers"`, for else the tokens would differ: the second codebook may choose tokens that belong to no
codebook, and the fine stage is greedy at temperature 1. Options with a prefix are obeyed in the fine stage too
(`fine_do_sample`, `fine_top_k`, …); of those without, the temperature reaches it, as in `transformers`.

Checkpoints: `suno/bark`, `suno/bark-small`; Suno's `text.pt`, `coarse.pt`, `fine.pt` (small) and `text_2.pt`,
`coarse_2.pt`, `fine_2.pt` in one directory with EnCodec's `encodec_24khz-d7cc33bc.th`, or each alone.

    import audiozoo
    import jax
    model, processor = audiozoo.load("suno/bark-small"), audiozoo.load_processor("suno/bark-small")
    inputs = processor("Hello, my dog is [laughs] cute.", voice_preset="v2/en_speaker_6")
    waveform = model.generate(**inputs, sampling="original", key=jax.random.key(0))
    audiozoo.audio.write("dog.wav", waveform[0], model.generation_config.sample_rate)
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from audiozoo.configs import restore_parts
from audiozoo.decoding import GenerateOutput, GenerationConfig, Growing, LogitsProcessor, generate, while_loop
from audiozoo.decoding.generate import argmax, invert_cdf, row_keys
from audiozoo.decoding.processors import SuppressTokens, Temperature, TopK, TopP, apply, warpers_from_config
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
    check_ids,
    check_mask,
    gelu,
)
from audiozoo.layers.basic import at_least_float32, matmul, promote, spread
from audiozoo.layers.losses import IGNORED_LABEL, cross_entropy
from audiozoo.layers.stacking import unseen
from audiozoo.models.encodec import EncodecConfig, EncodecModel
from audiozoo.outputs import CausalLMOutput

History = Mapping[str, Any]  # semantic_prompt (X,), coarse_prompt (2, Y), fine_prompt (8, Y)

# --- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BarkSubModelConfig:
    """Sizes of one of the three Transformers; not in the paper. The defaults are those of `transformers`."""

    block_size: int = 1024  # positions
    input_vocab_size: int = 10_048  # tokens that it reads
    output_vocab_size: int = 10_048  # tokens that it writes
    num_layers: int = 12  # blocks
    num_heads: int = 12  # heads
    hidden_size: int = 768  # width
    dropout: float = 0.0  # everywhere
    bias: bool = True  # in linear maps, and in the causal models' LayerNorms; the released ones have none
    initializer_range: float = 0.02  # standard deviation that weights start from


@dataclass(frozen=True)
class BarkFineConfig(BarkSubModelConfig):
    """Sizes of the fine model; not in the paper."""

    n_codes_total: int = 8  # codebooks in all
    n_codes_given: int = 1  # codebooks without a head; the released model can predict all but the first
    tie_word_embeddings: bool = True  # the head of a codebook is its embedding


_SEMANTIC = BarkSubModelConfig(input_vocab_size=129_600)
_COARSE = BarkSubModelConfig(input_vocab_size=12_096, output_vocab_size=12_096)
_FINE = BarkFineConfig(input_vocab_size=1056, output_vocab_size=1056)


@dataclass(frozen=True)
class BarkConfig:
    """The three models and the codec; not in the paper."""

    semantic_config: BarkSubModelConfig = _SEMANTIC  # text to semantic tokens
    coarse_acoustics_config: BarkSubModelConfig = _COARSE  # semantic to coarse tokens
    fine_acoustics_config: BarkFineConfig = _FINE  # coarse tokens to all codebooks
    codec_config: EncodecConfig = field(default_factory=EncodecConfig)  # codebooks to sound

    def __post_init__(self) -> None:
        restore_parts(
            self,
            semantic_config=BarkSubModelConfig,
            coarse_acoustics_config=BarkSubModelConfig,
            fine_acoustics_config=BarkFineConfig,
            codec_config=EncodecConfig,
        )

    @classmethod
    def _size(cls, **sizes: int) -> BarkConfig:
        parts: Any = [dataclasses.replace(c, bias=False, **sizes) for c in (_SEMANTIC, _COARSE, _FINE)]
        return cls(*parts)

    @classmethod
    def bark(cls) -> BarkConfig:
        """`suno/bark` and the files `*_2.pt`: three times 24 blocks of width 1024."""
        return cls._size(num_layers=24, num_heads=16, hidden_size=1024)

    @classmethod
    def bark_small(cls) -> BarkConfig:
        """`suno/bark-small` and the files `text.pt`, `coarse.pt`, `fine.pt`: three times 12 blocks of width 768."""
        return cls._size(num_layers=12, num_heads=12, hidden_size=768)


# --- options of generation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BarkSemanticGenerationConfig:
    """What `generation_config.json` says of the semantic stage; not in the paper."""

    eos_token_id: int = 10_000  # end of speech; also pads the history
    text_encoding_offset: int = 10_048  # added to the tokenizer's ids
    text_pad_token: int = 129_595  # pads the text
    semantic_infer_token: int = 129_599  # "now go on"
    semantic_vocab_size: int = 10_000  # semantic tokens
    max_input_semantic_length: int = 256  # positions of text and history
    semantic_rate_hz: float = 49.9  # semantic tokens a second
    min_eos_p: float | None = None  # probability from which on end of speech is taken
    # Further options by name, as of `audiozoo.decoding.GenerationConfig`.
    options: tuple[tuple[str, Any], ...] = (("renormalize_logits", True), ("max_new_tokens", 768))


@dataclass(frozen=True)
class BarkCoarseGenerationConfig:
    """What `generation_config.json` says of the coarse stage; not in the paper."""

    coarse_semantic_pad_token: int = 12_048  # pads the semantic tokens
    coarse_infer_token: int = 12_050  # "now go on"
    coarse_rate_hz: float = 75.0  # frames a second
    n_coarse_codebooks: int = 2  # codebooks that take turns
    max_coarse_input_length: int = 256  # semantic tokens that a window reads
    max_coarse_history: int = 630  # coarse tokens that a window reads
    sliding_window_len: int = 60  # coarse tokens that a window writes
    options: tuple[tuple[str, Any], ...] = (("renormalize_logits", True),)  # further options by name


@dataclass(frozen=True)
class BarkFineGenerationConfig:
    """What `generation_config.json` says of the fine stage; not in the paper."""

    temperature: float | None = 1.0  # None is greedy, and so is 1 with `transformers`
    max_fine_history_length: int = 512  # frames of history, and frames from one window to the next
    max_fine_input_length: int = 1024  # frames of a window
    n_fine_codebooks: int = 8  # codebooks in all


@dataclass(frozen=True)
class BarkGenerationConfig:
    """What `generation_config.json` says; not in the paper."""

    semantic_config: BarkSemanticGenerationConfig = BarkSemanticGenerationConfig()  # first stage
    coarse_acoustics_config: BarkCoarseGenerationConfig = BarkCoarseGenerationConfig()  # second stage
    fine_acoustics_config: BarkFineGenerationConfig = BarkFineGenerationConfig()  # third stage
    sample_rate: int = 24_000  # Hz
    codebook_size: int = 1024  # entries of a codebook

    def __post_init__(self) -> None:
        restore_parts(
            self,
            semantic_config=BarkSemanticGenerationConfig,
            coarse_acoustics_config=BarkCoarseGenerationConfig,
            fine_acoustics_config=BarkFineGenerationConfig,
        )

    @property
    def frames_per_token(self) -> float:
        """Frames of codes for one semantic token: 75 / 49.9."""
        return self.coarse_acoustics_config.coarse_rate_hz / self.semantic_config.semantic_rate_hz

    @property
    def coarse_per_token(self) -> float:
        """Coarse tokens for one semantic token."""
        return self.frames_per_token * self.coarse_acoustics_config.n_coarse_codebooks

    def frames(self, semantic_tokens: int) -> int:
        """Frames of codes for so many semantic tokens."""
        books = self.coarse_acoustics_config.n_coarse_codebooks
        return math.floor(semantic_tokens * self.coarse_per_token / books)


SAMPLINGS = ("transformers", "original")


def _check_sampling(sampling: str) -> None:
    if sampling not in SAMPLINGS:
        raise UsageError(f"There is no sampling {sampling!r}; there are {' and '.join(SAMPLINGS)}.")


@dataclass(frozen=True)
class EosPrioritizer:
    """Not in the paper: end of speech is certain once its probability passes `min_eos_p`.

    The softmax is over what the processors before left: in `transformers` the whole vocabulary at temperature 1, in the
    original what top-p, top-k and temperature made of it. The original also takes equality for passing.
    """

    eos_token_id: int
    min_eos_p: float
    or_equal: bool = False

    def __call__(
        self, logits: Float[Array, "batch vocab"], tokens: Int[Array, "batch buffer"], length: Int[Array, ""]
    ) -> Float[Array, "batch vocab"]:
        """`logits`, or nothing but end of speech."""
        probability = jax.nn.softmax(logits, axis=-1)[:, self.eos_token_id]
        over = probability >= self.min_eos_p if self.or_equal else probability > self.min_eos_p
        others = jnp.arange(logits.shape[-1]) != self.eos_token_id
        return jnp.where(over[:, None] & others, jnp.asarray(-jnp.inf, logits.dtype), logits)


@dataclass(frozen=True)
class AlternatingCodebooks:
    """§III-C: coarse tokens are those of the first codebook and of the second in turns.

    `transformers` forbids the second codebook nothing above it (`exact=False`), the original everything.
    """

    prompt_length: int
    semantic_vocab_size: int
    codebook_size: int
    exact: bool = False

    def __call__(
        self, logits: Float[Array, "batch vocab"], tokens: Int[Array, "batch buffer"], length: Int[Array, ""]
    ) -> Float[Array, "batch vocab"]:
        """`logits` of the codebook whose turn it is."""
        token = jnp.arange(logits.shape[-1]) - self.semantic_vocab_size
        first, second = token < self.codebook_size, token >= self.codebook_size
        if self.exact:
            second &= token < 2 * self.codebook_size
        turn = jnp.where((length - self.prompt_length) % 2 == 0, first & (token >= 0), second)
        return jnp.where(turn, logits, jnp.asarray(-jnp.inf, logits.dtype))


def _sampler(
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    sampling: str,
    temperature: float,
    eos: int | None = None,
    min_eos_p: float | None = None,
) -> tuple[GenerationConfig, tuple[LogitsProcessor, ...]]:
    """The options for the search, and what shapes the distribution before it, in the order of either code."""
    _check_sampling(sampling)
    if min_eos_p is not None and not min_eos_p > 0:
        raise UsageError(f"min_eos_p must be above 0, or None; it is {min_eos_p}.")
    if eos is not None:
        defaults = {**defaults, "eos_token_id": eos, "pad_token_id": eos}
    if sampling == "transformers":
        config = GenerationConfig.from_dict({**defaults, **options})
        return config, () if min_eos_p is None or eos is None else (EosPrioritizer(eos, min_eos_p),)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": None, "top_p": None}
    kept = {n: v for n, v in defaults.items() if n in ("max_new_tokens", "eos_token_id", "pad_token_id")}
    config = GenerationConfig(**{**kept, **drawn, **options})
    shaping: list[LogitsProcessor] = []
    if config.top_p is not None:
        shaping.append(TopP(config.top_p))
    if config.top_k:
        shaping.append(TopK(config.top_k))
    shaping.append(Temperature(config.temperature))
    if min_eos_p is not None and eos is not None:
        shaping.append(EosPrioritizer(eos, min_eos_p, or_equal=True))
    return config.replace(temperature=1.0, top_k=None, top_p=None), tuple(shaping)


# --- the Transformer -------------------------------------------------------------------------------------------------


class BarkMLP(nnx.Module):
    r"""Not in the paper: $W_2\,\mathrm{GELU}(W_1 x)$, four times as wide inside; the GELU is exact."""

    def __init__(self, config: BarkSubModelConfig, **kwargs: Any):
        width, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        self.in_proj = Linear(width, 4 * width, use_bias=config.bias, kernel_init=init, **kwargs)
        self.out_proj = Linear(4 * width, width, use_bias=config.bias, kernel_init=init, **kwargs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Each position by itself."""
        return self.out_proj(gelu(self.in_proj(x)))


class BarkBlock(nnx.Module):
    r"""Not in the paper: GPT-2's block, $y = x + \text{Attention}(\text{LN}(x))$ and $y + \text{MLP}(\text{LN}(y))$."""

    def __init__(self, config: BarkSubModelConfig, *, is_causal: bool, **kwargs: Any):
        width, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        norm_bias = config.bias or not is_causal
        self.layernorm_1 = LayerNorm(width, use_bias=norm_bias, **kwargs)
        self.layernorm_2 = LayerNorm(width, use_bias=norm_bias, **kwargs)
        self.attn = MultiHeadAttention(
            width, config.num_heads, use_bias=config.bias, dropout=config.dropout, kernel_init=init, **kwargs
        )
        self.mlp = BarkMLP(config, **kwargs)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        dropout: Dropout,
        mask: Mask | None,
        past: KeyValues | None = None,
        position: int | Int[Array, ""] = 0,
        need_weights: bool = True,
    ) -> tuple[Float[Array, "batch time width"], KeyValues, jax.Array | None]:
        """One block: its output, its keys and values with those of `past`, and attention weights if needed."""
        y = self.layernorm_1(x)
        key_values = self.attn.key_values(y)
        if past is not None:
            key_values = past.write(key_values, position)
        attention, weights = self.attn(y, key_values, mask=mask, dropout=dropout, need_weights=need_weights)
        x = x + dropout(attention, self.dropout_rate)
        return x + dropout(self.mlp(self.layernorm_2(x)), self.dropout_rate), key_values, weights


class _Transformer(nnx.Module):
    """Position embeddings, blocks and a last LayerNorm; what all three models share."""

    def __init__(self, config: BarkSubModelConfig, *, is_causal: bool, **kwargs: Any):
        self.init = nnx.initializers.normal(config.initializer_range)
        self.position_embeds_layer = Embed(config.block_size, config.hidden_size, embedding_init=self.init, **kwargs)
        blocks = [BarkBlock(config, is_causal=is_causal, **kwargs) for _ in range(config.num_layers)]
        self.layers = nnx.List(blocks)
        self.layernorm_final = LayerNorm(config.hidden_size, use_bias=config.bias or not is_causal, **kwargs)
        self.config, self.is_causal = config, is_causal

    def blocks(
        self,
        x: Float[Array, "batch time width"],
        attention_mask: Int[Array, "batch keys"] | None = None,
        position_ids: Int[Array, "#batch time"] | None = None,
        past: tuple[KeyValues, ...] | None = None,
        position: int | Int[Array, ""] = 0,
        *,
        output_attentions: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KeyValues, ...], list[jax.Array], list[Any]]:
        """From embedded tokens to the last LayerNorm: output, cache, states before each block, attention weights."""
        config, time = self.config, x.shape[1]
        if time > config.block_size:
            raise UsageError(f"{time} tokens are too many: this model has {config.block_size} positions.")
        dropout = Dropout(key)
        if position_ids is None:
            # What a chunk of a prompt holds beyond the prompt is never looked at; any position will do for it.
            position_ids = jnp.minimum(position + jnp.arange(time), config.block_size - 1)[None]
        x = dropout(x + spread(self.position_embeds_layer(position_ids), x), config.dropout)
        seen = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        mask: Mask | None = seen
        if self.is_causal:
            mask = Causal(seen) if past is None else Causal(seen).written_out(time, past[0].key.shape[2], position)
        states, attentions, cache = [], [], []
        for i, block in enumerate(self.layers):
            states += [x, *unseen(block)]
            x, key_values, weights = block(
                x, dropout, mask, None if past is None else past[i], position, output_attentions
            )
            cache.append(key_values)
            attentions.append(weights)
        return self.layernorm_final(x), tuple(cache), states, attentions


class BarkCausalModel(_Transformer):
    """§III-C: a decoder-only Transformer that predicts the next token; Bark's is GPT-2's (not in the paper)."""

    config_class = BarkSubModelConfig

    def __init__(
        self, config: BarkSubModelConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, is_causal=True, **kwargs)
        self.input_embeds_layer = Embed(config.input_vocab_size, config.hidden_size, embedding_init=self.init, **kwargs)
        self.lm_head = Linear(
            config.hidden_size, config.output_vocab_size, use_bias=False, kernel_init=self.init, **kwargs
        )
        self.generation_config = BarkGenerationConfig()

    def __call__(
        self,
        input_ids: Int[Array, "batch time"] | None = None,
        past_key_values: tuple[KeyValues, ...] | None = None,
        attention_mask: Int[Array, "batch keys"] | None = None,
        position_ids: Int[Array, "#batch time"] | None = None,
        labels: Int[Array, "batch time"] | None = None,
        inputs_embeds: Float[Array, "batch time width"] | None = None,
        *,
        cache_position: int | Int[Array, ""] = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> CausalLMOutput:
        r"""Logits of each next token and, with `labels`, $-\frac1{|M|}\sum_{t \in M} \log p(y_{t+1} \mid x_{\le t})$.

        Args:
            input_ids: tokens.
            past_key_values: cache from `start` or from the last call; returned with these tokens added.
            attention_mask: 1 where a key is real, for all of the cache if there is one.
            position_ids: rows of the position table; by default counted from `cache_position`.
            labels: tokens aligned with the input, of which each predicts the next; -100 where there is none.
                `transformers` has no loss here.
            inputs_embeds: embedded tokens instead of `input_ids`.
            cache_position: where in the cache the first of these tokens stands.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout on.

        Raises:
            UsageError: for more tokens than positions; unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("Give the model input_ids or inputs_embeds, and not both.")
        x: Any = self.input_embeds_layer(input_ids) if input_ids is not None else inputs_embeds
        x, cache, states, attentions = self.blocks(
            x,
            attention_mask,
            position_ids,
            past_key_values,
            cache_position,
            output_attentions=output_attentions,
            key=key,
        )
        logits = self.lm_head(x)
        return CausalLMOutput(
            loss=None if labels is None else cross_entropy(logits[:, :-1], labels[:, 1:]),
            logits=logits,
            past_key_values=None if past_key_values is None else cache,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def start(self, batch: int, length: int) -> tuple[KeyValues, ...]:
        """An empty cache for `length` tokens."""
        config = self.config
        dtype = self.input_embeds_layer(jnp.zeros((1,), jnp.int32)).dtype
        size = config.hidden_size // config.num_heads
        return tuple(KeyValues.empty(batch, config.num_heads, length, size, dtype) for _ in self.layers)

    def step(
        self, tokens: Int[Array, "rows 1"], cache: Any, position: Int[Array, ""]
    ) -> tuple[Float[Array, "rows vocabulary"], Any]:
        """Logits of the token after the one at `position`; see `audiozoo.decoding`."""
        x, filled, _, _ = self.blocks(
            self.input_embeds_layer(tokens), past=_unmarked(cache), position=position, output_attentions=True
        )
        return self.lm_head(x[:, -1]), _marked(filled)


def _marked(cache: tuple[KeyValues, ...]) -> Any:
    """Tell the search that the arrays of the cache grow with the tokens."""
    mark: Any = Growing
    return tuple(KeyValues(mark(kv.key, 2), mark(kv.value, 2)) for kv in cache)


def _unmarked(cache: Any) -> tuple[KeyValues, ...]:
    return tuple(KeyValues(kv.key.value, kv.value.value) for kv in cache)


# --- §III-C, first stage: text to semantic tokens --------------------------------------------------------------------


class BarkSemanticModel(BarkCausalModel):
    """§III-C, semantic modelling, here given a text: text and history are added, then the tokens follow."""

    def prompt(
        self,
        input_ids: Int[Array, "batch text"],
        history: Int[Array, "#batch text"],
        ids: BarkSemanticGenerationConfig,
    ) -> Float[Array, "batch positions width"]:
        """What the semantic tokens are predicted from: the sum of text and history, and "now go on".

        Args:
            input_ids: text, as `numbered_text` gives it.
            history: semantic tokens before, padded.
            ids: numbers of special tokens.
        """
        infer = jnp.full((len(input_ids), 1), ids.semantic_infer_token, jnp.int32)
        text = self.input_embeds_layer(input_ids)
        merged = text + spread(self.input_embeds_layer(history), text)
        return jnp.concatenate([merged, self.input_embeds_layer(infer)], axis=1)

    def generate(
        self,
        input_ids: Int[Array | np.ndarray, "batch text"],
        semantic_generation_config: BarkSemanticGenerationConfig | None = None,
        history_prompt: History | None = None,
        attention_mask: Int[Array | np.ndarray, "batch text"] | None = None,
        *,
        sampling: str = "transformers",
        key: jax.Array | None = None,
        noise: Float[Array, "new rows vocab"] | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "batch tokens"] | GenerateOutput:
        """Semantic tokens of a text, in one compiled loop.

        Args:
            input_ids: the tokenizer's ids; what is beyond 256 is not read.
            semantic_generation_config: numbers and defaults; those of the model if not given.
            history_prompt: what was said before; of it `semantic_prompt`.
            attention_mask: 1 for text, 0 for padding.
            sampling: "transformers" or "original".
            key: randomness.
            noise: standard Gumbel noise to sample with, instead of `key`.
            options: `min_eos_p`, and those of `audiozoo.decoding.GenerationConfig`. As in `transformers`, the
                checkpoint's `max_new_tokens` is stronger than `max_length`: give another `max_new_tokens`.

        Returns:
            Tokens up to and with the end of speech, padded with it; with `return_dict_in_generate=True` a
            `GenerateOutput` whose sequences begin with the (meaningless) prompt.

        Raises:
            UsageError: for unknown options, and histories of the wrong shape.
        """
        ids = semantic_generation_config or self.generation_config.semantic_config
        length, eos = ids.max_input_semantic_length, ids.eos_token_id
        if np.ndim(input_ids) != 2 or not np.size(input_ids):
            shape = np.shape(input_ids)
            raise UsageError(f"The text's ids have shape {shape}; (batch, tokens), at least one, is expected.")
        text = numbered_text(input_ids, attention_mask, ids)
        if text.min() < 0 or text.max() >= self.config.input_vocab_size:
            raise UsageError(f"The text has ids that this model's vocabulary of {self.config.input_vocab_size} lacks.")
        check_ids([ids.semantic_infer_token], self.config.input_vocab_size)
        check_ids([eos], min(self.config.input_vocab_size, self.config.output_vocab_size))
        history = np.full((1, length), eos)
        if history_prompt is not None:
            history = _padded(_semantic(history_prompt, ids)[None, -length:], length, eos)
        min_eos_p = options.pop("min_eos_p", 0.2 if sampling == "original" else ids.min_eos_p)
        config, shaping = _sampler(dict(ids.options), options, sampling, 0.7, eos, min_eos_p)
        config = config.replace(max_new_tokens=config.new_tokens(length + 1), max_length=None)
        # The last token is never fed, hence one position less.
        if length + (config.max_new_tokens or 0) > self.config.block_size:
            room = self.config.block_size - length
            raise UsageError(
                f"max_new_tokens is {config.max_new_tokens}; this model has positions for {room} semantic tokens."
            )
        allowed = (*range(ids.semantic_vocab_size), eos)
        forbidden = tuple(sorted(set(range(self.config.output_vocab_size)) - set(allowed)))
        processors = (SuppressTokens(forbidden), *shaping)
        output = _generate_semantic(
            *nnx.split(self),
            jnp.asarray(text),
            jnp.asarray(history),
            key,
            noise,
            ids=ids,
            config=config,
            processors=processors,
        ).trim()
        return output if config.return_dict_in_generate else np.asarray(output.sequences)[:, length + 1 :]


@partial(jax.jit, static_argnames=("graphdef", "ids", "config", "processors"))
def _generate_semantic(
    graphdef: Any,
    state: Any,
    text: jax.Array,
    history: jax.Array,
    key: jax.Array | None,
    noise: jax.Array | None,
    *,
    ids: BarkSemanticGenerationConfig,
    config: GenerationConfig,
    processors: tuple[LogitsProcessor, ...],
) -> GenerateOutput:
    model = nnx.merge(graphdef, state)
    batch, length = text.shape[0], text.shape[1] + 1

    def prefill(_: jax.Array, cache: Any) -> Any:
        x, filled, _, _ = model.blocks(model.prompt(text, history, ids), past=_unmarked(cache))
        return model.lm_head(x[:, -1]), _marked(filled)

    cache = _marked(model.start(batch, length + (config.max_new_tokens or 0)))
    # The prompt is embeddings; for processors that look at tokens it is ones, as in `transformers`.
    prompt = jnp.ones((batch, length), jnp.int32)
    return generate(
        model.step, cache, prompt, config, key=key, noise=noise, logits_processors=processors, prefill=prefill
    )


def numbered_text(
    input_ids: Int[Any, "batch tokens"],
    attention_mask: Int[Any, "batch tokens"] | None,
    ids: BarkSemanticGenerationConfig,
) -> Int[np.ndarray, "batch text"]:
    """The tokenizer's ids as the semantic model reads them: with their offset, cut or padded to one length."""
    text, length = np.asarray(input_ids) + ids.text_encoding_offset, ids.max_input_semantic_length
    if attention_mask is not None:
        check_mask(attention_mask, text.shape)
        text = np.where(np.asarray(attention_mask) != 0, text, ids.text_pad_token)
    return _padded(text[:, :length], length, ids.text_pad_token)


def _array(x: Any, name: str, *axes: str) -> np.ndarray:
    """As NumPy's, checked to have these axes."""
    if np.ndim(x) != len(axes):
        raise UsageError(f"{name} has shape {np.shape(x)}; ({', '.join(axes)}) is expected.")
    return np.asarray(x)


def _padded(x: np.ndarray, length: int, value: int) -> np.ndarray:
    """The last axis filled up to `length` on the right."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, length - x.shape[-1]))], constant_values=value)


def _part(history: History, name: str, shape: tuple[int | None, ...], limit: int) -> np.ndarray:
    """One array of a history prompt, checked."""
    if name not in history:
        raise UsageError(f"The history prompt has no {name}; it has {', '.join(history) or 'nothing'}.")
    x = np.asarray(history[name])
    wanted = "(" + ", ".join("time" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
    if x.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
        raise UsageError(f"The history's {name} has shape {x.shape}; {wanted} is expected.")
    if x.dtype.kind not in "iu" or (x.size and not 0 <= x.min() <= x.max() < limit):
        raise UsageError(f"The history's {name} must hold whole numbers from 0 to {limit - 1}.")
    return x.astype(np.int32)


def _semantic(history: History, ids: BarkSemanticGenerationConfig) -> np.ndarray:
    return _part(history, "semantic_prompt", (None,), ids.semantic_vocab_size)


# --- §III-C, second stage: semantic to coarse tokens -----------------------------------------------------------------

CHUNK = 64  # tokens of a prompt that are fed at once


class BarkCoarseModel(BarkCausalModel):
    """§III-C, coarse acoustic modelling: two codebooks in turns, a window of 60 tokens at a time.

    A window reads semantic tokens around its place, "now go on", and the last 630 coarse tokens. The keys and values of
    the window before are used again as far as the two contexts begin alike, which is to the end until 630 tokens are
    passed; then positions shift with every window, and all of them are computed anew.
    """

    def histories(
        self, history_prompt: History | None, ids: BarkGenerationConfig
    ) -> tuple[Int[np.ndarray, " semantic"], Int[np.ndarray, " coarse"]]:
        """What of a history a window can read: semantic and interleaved coarse tokens that end at the same time."""
        if history_prompt is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        books, size = ids.coarse_acoustics_config.n_coarse_codebooks, ids.codebook_size
        semantic = _semantic(history_prompt, ids.semantic_config)
        coarse = _part(history_prompt, "coarse_prompt", (books, None), size)
        # codebook k's entry c is token 10000 + 1024 k + c; (books, frames) -> frame by frame
        coarse = (coarse + size * np.arange(books)[:, None]).T.ravel() + ids.semantic_config.semantic_vocab_size
        ratio = ids.coarse_per_token
        count = min(
            math.floor(ids.coarse_acoustics_config.max_coarse_history / ratio),
            len(semantic) - len(semantic) % 2,
            math.floor(len(coarse) / ratio),
        )
        semantic = semantic[len(semantic) - count :]
        coarse = coarse[len(coarse) - round(count * ratio) :]
        return semantic, coarse[:-2].astype(np.int32)  # one frame less, which Suno's code says sounds better

    def generate(
        self,
        semantic_output: Int[Array | np.ndarray, "batch tokens"],
        semantic_generation_config: BarkSemanticGenerationConfig | None = None,
        coarse_generation_config: BarkCoarseGenerationConfig | None = None,
        codebook_size: int = 1024,
        history_prompt: History | None = None,
        return_output_lengths: bool = False,
        *,
        sampling: str = "transformers",
        key: jax.Array | None = None,
        noise: Float[Array, "new rows vocab"] | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "batch coarse"] | tuple[Int[np.ndarray, "batch coarse"], Int[np.ndarray, " batch"]]:
        """Coarse tokens of semantic ones: all windows in one compiled loop.

        Args:
            semantic_output: semantic tokens, padded with the end of speech.
            semantic_generation_config: numbers of the stage before; those of the model if not given.
            coarse_generation_config: numbers and defaults.
            codebook_size: entries of a codebook.
            history_prompt: what was said before; of it `semantic_prompt` and `coarse_prompt`.
            return_output_lengths: return the number of tokens of each row as well.
            sampling: "transformers" or "original".
            key: randomness.
            noise: standard Gumbel noise to sample with, instead of `key`.
            options: those of `audiozoo.decoding.GenerationConfig`.

        Returns:
            Tokens of the two codebooks in turns, from 10 000 on, as many as the longest row has.

        Raises:
            UsageError: for unknown options, sizes that do not fit, and histories of the wrong shape.
        """
        own = self.generation_config
        ids = dataclasses.replace(
            own,
            semantic_config=semantic_generation_config or own.semantic_config,
            coarse_acoustics_config=coarse_generation_config or own.coarse_acoustics_config,
            codebook_size=codebook_size,
        )
        stage, ratio = ids.coarse_acoustics_config, ids.coarse_per_token
        window, inputs, most = stage.sliding_window_len, stage.max_coarse_input_length, stage.max_coarse_history
        if stage.n_coarse_codebooks != 2 or window % 2 or most % 2:
            raise UsageError("Two coarse codebooks take turns: sliding_window_len and max_coarse_history must be even.")
        if inputs + most + window > self.config.block_size:
            raise UsageError(
                f"{inputs} semantic tokens, {most} of history and a window of {window} do not fit into this model's "
                f"{self.config.block_size} positions."
            )
        config, shaping = _sampler(dict(stage.options), options, sampling, 0.7)
        if "max_new_tokens" in options or "max_length" in options:
            raise UsageError("The coarse stage speaks as long as its semantic tokens do; it takes no length.")
        if config.num_return_sequences != 1:
            raise UsageError("The coarse stage returns one sequence; num_return_sequences must be 1.")
        config = config.replace(max_new_tokens=window, max_length=None, return_dict_in_generate=False)
        semantic = _array(semantic_output, "semantic_output", "batch", "tokens")
        batch = len(semantic)
        spoken = semantic != ids.semantic_config.eos_token_id
        lengths = np.array([2 * ids.frames(int(n)) for n in spoken.sum(axis=1)], np.int32)
        semantic = np.where(spoken, semantic, stage.coarse_semantic_pad_token)
        check_ids(semantic, self.config.input_vocab_size)
        last = ids.semantic_config.semantic_vocab_size + stage.n_coarse_codebooks * codebook_size - 1
        check_ids([stage.coarse_semantic_pad_token, stage.coarse_infer_token, last], self.config.input_vocab_size)
        before, coarse = self.histories(history_prompt, ids)
        # Buffers for as many semantic tokens as fill a number of windows that many lengths share.
        windows = 8 * math.ceil(lengths.max(initial=0) / window / 8)
        if not lengths.max(initial=0):
            empty = np.zeros((batch, 0), np.int32)
            return (empty, lengths) if return_output_lengths else empty
        semantic = np.concatenate([np.broadcast_to(before, (batch, len(before))), semantic], axis=1)
        # Where the semantic tokens of each window begin.
        furthest = math.floor(most / ratio)
        starts = [max(0, len(before) + round(w * window / ratio) - furthest) for w in range(windows)]
        semantic = _padded(semantic, max(starts) + inputs, stage.coarse_semantic_pad_token)
        semantic = semantic[:, : max(starts) + inputs]
        result = _generate_coarse(
            *nnx.split(self),
            jnp.asarray(semantic, jnp.int32),
            jnp.asarray(np.broadcast_to(coarse, (batch, len(coarse)))),
            jnp.asarray(starts, jnp.int32),
            jnp.int32(lengths.max()),
            key,
            noise,
            ids=ids,
            config=config,
            exact=sampling == "original",
            shaping=shaping,
        )
        tokens = np.asarray(result)[:, : lengths.max()]
        return (tokens, lengths) if return_output_lengths else tokens


@partial(jax.jit, static_argnames=("graphdef", "ids", "config", "exact", "shaping"))
def _generate_coarse(
    graphdef: Any,
    state: Any,
    semantic: jax.Array,
    history: jax.Array,
    starts: jax.Array,
    total: jax.Array,
    key: jax.Array | None,
    noise: jax.Array | None,
    *,
    ids: BarkGenerationConfig,
    config: GenerationConfig,
    exact: bool,
    shaping: tuple[LogitsProcessor, ...],
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    stage, (batch, had) = ids.coarse_acoustics_config, history.shape
    window = stage.sliding_window_len
    room = window * starts.shape[0]  # coarse tokens that the buffers hold
    most = min(stage.max_coarse_history, had + room)
    prompt_length = stage.max_coarse_input_length + 1 + most
    chunk = min(CHUNK, prompt_length)
    slots = prompt_length + max(window, chunk)
    processors: tuple[LogitsProcessor, ...] = (
        AlternatingCodebooks(prompt_length, ids.semantic_config.semantic_vocab_size, ids.codebook_size, exact),
        *shaping,
    )
    keys = None if key is None or not config.do_sample else row_keys(key, batch)
    reusable = config.num_beams == 1

    def one_window(carry: Any) -> Any:
        index, coarse, cache, held = carry
        made = index * window
        context, length = _window_context(semantic, coarse, starts[index], had + made, stage, most, slots)
        # For the search it stands at the right end of a prompt of fixed length.
        padding = prompt_length - length
        seen = jnp.arange(prompt_length) >= padding
        prompt = jnp.where(seen, jnp.roll(context, padding, axis=1)[:, :prompt_length], -1)
        alike = jnp.all(held == context, axis=0)
        unchanged = jnp.argmin(jnp.append(alike, False)).astype(jnp.int32)

        def step(tokens: jax.Array, cache: Any, position: jax.Array) -> Any:
            return model.step(tokens, cache, position - padding)

        output = generate(
            step,
            cache,
            prompt,
            config,
            prompt_mask=jnp.broadcast_to(seen, prompt.shape),
            key=None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index),
            noise=None if noise is None else lax.dynamic_slice_in_dim(noise, made, window),
            logits_processors=processors,
            prefill=lambda _, cache: _read_context(model, context, length, unchanged, chunk, cache),
            max_new_tokens=jnp.minimum(window, total - made),
            return_cache=reusable,
        )
        new = output.sequences[:, prompt_length:]
        coarse = lax.dynamic_update_slice_in_dim(coarse, new, had + made, axis=1)
        if reusable:
            cache = output.cache
            held = lax.dynamic_update_slice_in_dim(context, new, length, axis=1)
            held = jnp.where(jnp.arange(slots) < length + window - 1, held, -1)
        return index + 1, coarse, cache, held

    coarse = jnp.concatenate([history, jnp.zeros((batch, room), jnp.int32)], axis=1)
    carry = (jnp.int32(0), coarse, _marked(model.start(batch, slots)), jnp.full((batch, slots), -1, jnp.int32))
    _, coarse, _, _ = while_loop(lambda carry: carry[0] * window < total, one_window, carry)
    return coarse[:, had:]


def _window_context(
    semantic: Int[Array, "batch semantic"],
    coarse: Int[Array, "batch coarse"],
    start: Int[Array, ""],
    end: Int[Array, ""],
    stage: BarkCoarseGenerationConfig,
    most: int,
    slots: int,
) -> tuple[Int[Array, "batch slots"], Int[Array, ""]]:
    """What a window reads: semantic tokens from `start`, "now go on", and up to `most` coarse tokens before `end`.

    Returns:
        The tokens with zeros behind them, and how many they are.
    """
    inputs, recent = stage.max_coarse_input_length, jnp.minimum(end, most)
    part = lax.dynamic_slice_in_dim(semantic, start, inputs, axis=1)
    infer = jnp.full((len(part), 1), stage.coarse_infer_token, jnp.int32)
    past = lax.dynamic_slice_in_dim(coarse, end - recent, most, axis=1)
    context = jnp.concatenate([part, infer, past], axis=1)
    length = inputs + 1 + recent
    context = jnp.pad(context, ((0, 0), (0, slots - context.shape[1])))
    return jnp.where(jnp.arange(slots) < length, context, 0), length


def _read_context(
    model: BarkCoarseModel,
    context: Int[Array, "batch slots"],
    length: Int[Array, ""],
    unchanged: Int[Array, ""],
    chunk: int,
    cache: Any,
) -> tuple[Float[Array, "batch vocab"], Any]:
    """Feed what the cache does not hold yet, chunk by chunk, and the last token by itself."""

    def feed(state: Any) -> Any:
        position, cache = state
        x = model.input_embeds_layer(lax.dynamic_slice_in_dim(context, position, chunk, axis=1))
        return position + chunk, model.blocks(x, past=cache, position=position)[1]

    state = (jnp.minimum(unchanged, length - 1), _unmarked(cache))
    cache = while_loop(lambda state: state[0] < length - 1, feed, state)[1]
    last = lax.dynamic_slice_in_dim(context, length - 1, 1, axis=1)
    return model.step(last, _marked(cache), length - 1)


# --- §III-C, third stage: coarse tokens to all codebooks -------------------------------------------------------------


class BarkFineModel(_Transformer):
    """§III-C, fine acoustic modelling; Bark's sees all frames, and predicts one codebook of all of them at once.

    A frame is the sum of the embeddings of its codebooks up to the wanted one, in whose place stands 1024 where it is
    not known yet.
    """

    config_class = BarkFineConfig

    def __init__(self, config: BarkFineConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, is_causal=False, **kwargs)
        width, heads = config.hidden_size, config.n_codes_total - config.n_codes_given
        tables = [
            Embed(config.input_vocab_size, width, embedding_init=self.init, **kwargs)
            for _ in range(config.n_codes_total)
        ]
        self.input_embeds_layers = nnx.List(tables)
        if not config.tie_word_embeddings:
            self.lm_heads = nnx.List(
                [
                    Linear(width, config.output_vocab_size, use_bias=False, kernel_init=self.init, **kwargs)
                    for _ in range(heads)
                ]
            )
        self.config: BarkFineConfig = config
        self.generation_config = BarkGenerationConfig()

    def embed(
        self, input_ids: Int[Array, "batch frames codebooks"], codebook_idx: int | Int[Array, ""]
    ) -> Float[Array, "batch frames width"]:
        r"""$\sum_{k \le i} E_k[c_k]$ for codebook $i$."""
        embedded = [table(input_ids[:, :, k]) for k, table in enumerate(self.input_embeds_layers)]
        if isinstance(codebook_idx, int):
            return sum(embedded[1 : codebook_idx + 1], embedded[0])
        read = (jnp.arange(len(embedded)) <= codebook_idx).astype(embedded[0].dtype)
        return jnp.einsum("k,kbtd->btd", read, jnp.stack(embedded))

    def heads(self) -> Float[Array, "heads width vocabulary"]:
        """The heads of all codebooks that can be predicted: their embeddings, as in GPT-2, or kernels of their own."""
        if self.config.tie_word_embeddings:
            tied = list(self.input_embeds_layers)[1 : 1 + self.config.n_codes_total - self.config.n_codes_given]
            return jnp.stack([table.embedding[...].T for table in tied])
        return jnp.stack([head.kernel[...] for head in self.lm_heads])

    def __call__(
        self,
        codebook_idx: int | Int[Array, ""],
        input_ids: Int[Array, "batch frames codebooks"] | None = None,
        attention_mask: Int[Array, "batch frames"] | None = None,
        position_ids: Int[Array, "#batch frames"] | None = None,
        labels: Int[Array, "batch frames"] | None = None,
        inputs_embeds: Float[Array, "batch frames width"] | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> CausalLMOutput:
        """Logits of one codebook for every frame and, with `labels`, their mean cross-entropy.

        Args:
            codebook_idx: the codebook, counted from 0; inside `jax.jit` it may be traced, and is then not checked.
            input_ids: all codebooks of every frame; those after `codebook_idx` are not looked at.
            attention_mask: 1 where a frame is real.
            position_ids: rows of the position table.
            labels: the wanted entries of this codebook, -100 where there is none; `transformers` has no loss here.
            inputs_embeds: embedded frames instead of `input_ids`.
            output_attentions: return attention weights.
            output_hidden_states: return the input of every block, and the output.
            key: switches dropout on.

        Raises:
            UsageError: for a codebook that has no head, and unless exactly one kind of input is given.
        """
        given, total = self.config.n_codes_given, self.config.n_codes_total
        traced = isinstance(codebook_idx, jax.core.Tracer)
        codebook_idx = codebook_idx if traced else operator.index(codebook_idx)
        if not traced and not max(given, 1) <= codebook_idx < total:
            raise UsageError(f"This model predicts codebooks {max(given, 1)} to {total - 1}, not {codebook_idx}.")
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("Give the model input_ids or inputs_embeds, and not both.")
        x: Any = inputs_embeds
        if input_ids is not None:
            if input_ids.ndim != 3 or input_ids.shape[-1] != total:
                raise UsageError(f"The codes have shape {input_ids.shape}; (batch, frames, {total}) is expected.")
            x = self.embed(input_ids, codebook_idx)
        x, _, states, attentions = self.blocks(
            x, attention_mask, position_ids, output_attentions=output_attentions, key=key
        )
        index: Any = codebook_idx - given
        if traced:
            logits = matmul(*promote(x, self.heads()[index], dtype=x.dtype))
        else:
            tied = self.config.tie_word_embeddings
            logits = self.input_embeds_layers[index + 1].attend(x) if tied else self.lm_heads[index](x)
        return CausalLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def generate(
        self,
        coarse_output: Int[Array | np.ndarray, "batch coarse"],
        semantic_generation_config: BarkSemanticGenerationConfig | None = None,
        coarse_generation_config: BarkCoarseGenerationConfig | None = None,
        fine_generation_config: BarkFineGenerationConfig | None = None,
        codebook_size: int = 1024,
        history_prompt: History | None = None,
        output_lengths: Int[Array | np.ndarray, " batch"] | None = None,
        *,
        sampling: str = "transformers",
        key: jax.Array | None = None,
        noise: Float[Array, "windows codebooks batch frames entries"] | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "batch codebooks frames"]:
        """All codebooks of coarse tokens: every window and codebook in one compiled loop.

        Args:
            coarse_output: tokens of the coarse codebooks in turns.
            semantic_generation_config: numbers of the first stage; those of the model if not given.
            coarse_generation_config: numbers of the second stage.
            fine_generation_config: numbers and defaults.
            codebook_size: entries of a codebook.
            history_prompt: what was said before; of it `fine_prompt`.
            output_lengths: frames of each row, which then is what it would be alone; what is beyond is 0. Without, all
                rows are as long as the array, as in `transformers`.
            sampling: "transformers" (greedy at temperature 1) or "original" (drawn at 0.5 unless it is None).
            key: randomness.
            noise: standard Gumbel noise to sample with, instead of `key`.
            options: `temperature`, and what `transformers` ignores: `do_sample`, `top_k`, `top_p`, `min_p`,
                `typical_p`, `epsilon_cutoff` and `eta_cutoff`.

        Raises:
            UsageError: for unknown options, sizes that do not fit, and histories of the wrong shape.
        """
        own = self.generation_config
        semantic, coarse = (
            semantic_generation_config or own.semantic_config,
            coarse_generation_config or own.coarse_acoustics_config,
        )
        ids = fine_generation_config or own.fine_acoustics_config
        window, hop, books = ids.max_fine_input_length, ids.max_fine_history_length, ids.n_fine_codebooks
        if not 0 < hop <= window <= self.config.block_size or books > self.config.n_codes_total:
            raise UsageError(
                f"Windows of {window} frames every {hop}, of {books} codebooks, do not fit this model's "
                f"{self.config.block_size} positions and {self.config.n_codes_total} codebooks."
            )
        config = _fine_sampler(ids, options, sampling)
        if config.do_sample and key is None and noise is None:
            raise UsageError("Sampling in the fine stage needs a key (jax.random.key(seed)) or noise.")
        given = coarse.n_coarse_codebooks
        codes = _array(coarse_output, "coarse_output", "batch", "coarse")
        check_ids([codebook_size], self.config.input_vocab_size)  # stands for a code that is not known
        codes = codes.reshape(len(codes), -1, given)  # (batch, frames, coarse codebooks)
        codes = (codes - semantic.semantic_vocab_size) % codebook_size
        batch, frames = codes.shape[:2]
        lengths = np.full(batch, frames) if output_lengths is None else np.asarray(output_lengths)
        before = np.zeros((0, books), np.int32)
        if history_prompt is not None:
            before = _part(history_prompt, "fine_prompt", (books, None), codebook_size).T[-hop:]
        # (batch, history + frames + padding, codebooks), 1024 where nothing is known
        size = max(window, hop * math.ceil((len(before) + frames) / hop))
        buffer = np.full((batch, size, books), codebook_size, np.int32)
        buffer[:, : len(before)] = before
        for row, length in enumerate(lengths):
            buffer[row, len(before) : len(before) + length, :given] = codes[row, :length]
        result = _generate_fine(
            *nnx.split(self),
            jnp.asarray(buffer),
            jnp.int32(len(before)),
            jnp.asarray(lengths, jnp.int32),
            key,
            noise,
            ids=ids,
            given=given,
            codebook_size=codebook_size,
            config=config,
        )
        result = np.array(result)[:, len(before) : len(before) + frames].swapaxes(1, 2)
        return np.where(np.arange(frames) < lengths[:, None, None], result, 0)


_SHAPING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_FINE_OPTIONS = ("do_sample", *_SHAPING, "renormalize_logits")


def _fine_sampler(ids: BarkFineGenerationConfig, options: Mapping[str, Any], sampling: str) -> GenerationConfig:
    """The fine stage's options: greedy or drawn by the temperature, unless `do_sample` says so."""
    _check_sampling(sampling)
    temperature = options.get("temperature", 0.5 if sampling == "original" else ids.temperature)
    drawn = temperature is not None and (sampling == "original" or temperature != 1.0)
    rest = {name: value for name, value in options.items() if name != "temperature"}
    defaults: dict[str, Any] = {"do_sample": drawn, "top_k": None}
    config = GenerationConfig(**(defaults | rest), temperature=1.0 if temperature is None else temperature)
    if unread := sorted(rest.keys() - _FINE_OPTIONS):
        raise UsageError(
            f"The fine stage chooses each code by itself; of options it takes {', '.join(_FINE_OPTIONS)}, and not "
            f"{', '.join(unread)}."
        )
    return config


@partial(jax.jit, static_argnames=("graphdef", "ids", "given", "codebook_size", "config"))
def _generate_fine(
    graphdef: Any,
    state: Any,
    codes: jax.Array,
    had: jax.Array,
    lengths: jax.Array,
    key: jax.Array | None,
    noise: jax.Array | None,
    *,
    ids: BarkFineGenerationConfig,
    given: int,
    codebook_size: int,
    config: GenerationConfig,
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    batch = codes.shape[0]
    window, hop = ids.max_fine_input_length, ids.max_fine_history_length
    heads, first_head = model.heads(), model.config.n_codes_given
    total = jnp.maximum(window, had + lengths)  # frames of each row, with history, filled up to one window
    # 1 + max(0, ceil((frames - (1024 - history)) / 512)) windows
    windows = 1 + jnp.maximum(0, -(-(lengths - (window - had)) // hop))
    warpers = warpers_from_config(config)
    keys: Any = None if key is None else row_keys(key, batch)

    def choose(logits: jax.Array, index: jax.Array, book: jax.Array) -> jax.Array:
        """One entry for every frame of the window."""
        if not config.do_sample:
            return argmax(logits)
        scores = logits.reshape(batch * window, codebook_size)
        scores = apply(warpers, scores, jnp.zeros((batch * window, 1), jnp.int32), jnp.int32(1))
        if noise is not None:
            drawn = noise[index, book - given]
            return argmax(scores + drawn.reshape(scores.shape)).reshape(batch, window)

        def draw(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, index), book)
            return jax.random.uniform(key, (window,), scores.dtype)

        return invert_cdf(scores, jax.vmap(draw)(keys).reshape(-1)).reshape(batch, window)

    def one_window(carry: Any) -> Any:
        index, codes = carry
        start = jnp.minimum(index * hop, total - window)  # each row's own
        fill = jnp.minimum(had + index * hop, total - hop) - start  # frames before are known
        unknown = (jnp.arange(window) >= fill[:, None]) & (index < windows)[:, None]
        part = jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, window))(codes, start)

        def one_codebook(book: jax.Array, part: jax.Array) -> jax.Array:
            x = model.blocks(model.embed(part, book))[0]
            logits = x @ heads[book - first_head].astype(x.dtype)
            logits = at_least_float32(logits[..., :codebook_size])
            old = lax.dynamic_index_in_dim(part, book, axis=2, keepdims=False)
            new = jnp.where(unknown, choose(logits, index, book), old)
            return lax.dynamic_update_index_in_dim(part, new, book, axis=2)

        part = lax.fori_loop(given, ids.n_fine_codebooks, one_codebook, part)
        codes = jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, 0))(codes, part, start)
        return index + 1, codes

    _, codes = lax.while_loop(lambda carry: carry[0] < windows.max(), one_window, (jnp.int32(0), codes))
    return codes


# --- the whole -------------------------------------------------------------------------------------------------------


class BarkModel(nnx.Module):
    """§III-D: text to waveform, the three stages and EnCodec's decoder in a row."""

    def __init__(self, config: BarkConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.semantic = BarkSemanticModel(config.semantic_config, **kwargs)
        self.coarse_acoustics = BarkCoarseModel(config.coarse_acoustics_config, **kwargs)
        self.fine_acoustics = BarkFineModel(config.fine_acoustics_config, **kwargs)
        self.codec_model = EncodecModel(config.codec_config, **kwargs)
        self.config = config

    @property
    def generation_config(self) -> BarkGenerationConfig:
        """What `generation_config.json` says; one for all stages, which also learn by it and run alone by it."""
        return self.semantic.generation_config

    @generation_config.setter
    def generation_config(self, value: BarkGenerationConfig) -> None:
        """Every stage's."""
        for stage in (self.semantic, self.coarse_acoustics, self.fine_acoustics):
            stage.generation_config = value

    def codec_decode(
        self,
        fine_output: Int[Array | np.ndarray, "batch codebooks frames"],
        output_lengths: Int[Array | np.ndarray, " batch"] | None = None,
    ) -> tuple[Float[np.ndarray, "batch samples"], Int[np.ndarray, " batch"]]:
        """The waveform of codes, silence after the end of each row, and the samples of each row.

        EnCodec's decoder at 24 kHz looks back only, so what stands behind a row's end does not change the row: rows of
        several lengths are decoded together, and their length is rounded up so that many compile once.
        """
        codes = _array(fine_output, "fine_output", "batch", "codebooks", "frames")
        frames = codes.shape[-1]
        lengths = np.full(len(codes), frames) if output_lengths is None else np.asarray(output_lengths)
        config, hop = self.config.codec_config, self.config.codec_config.hop_length
        samples, longest = lengths * hop, int(lengths.max(initial=0))
        dtype = jnp.promote_types(self.codec_model.quantizer.embed.dtype, jnp.float32)
        waveform = np.zeros((len(codes), longest * hop), dtype)
        # A row shorter than a convolution's padding reflects what is behind it; a codec that looks ahead sees it.
        apart = not config.can_stream or (samples < self.codec_model.shortest_start()).any()
        rows = [[i] for i in range(len(codes))] if apart else [list(range(len(codes)))]
        graphdef, state = nnx.split(self.codec_model)
        for group in rows:
            length = int(lengths[group].max())
            if not length:
                continue
            part = codes[group, :, :length]
            if not apart:
                part = _padded(part, 64 * math.ceil(length / 64), 0)
            decoded = np.asarray(_decode(graphdef, state, jnp.asarray(part)))[:, 0, : length * hop]
            waveform[group, : length * hop] = decoded
        return np.where(np.arange(waveform.shape[1]) < samples[:, None], waveform, 0), samples

    def generate(
        self,
        input_ids: Int[Array | np.ndarray, "batch text"],
        history_prompt: History | None = None,
        return_output_lengths: bool = False,
        *,
        attention_mask: Int[Array | np.ndarray, "batch text"] | None = None,
        return_history: bool = False,
        sampling: str = "transformers",
        key: jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Speech of a text.

        Args:
            input_ids: the tokenizer's ids.
            history_prompt: what was said before, one for all rows: its voice is kept.
            return_output_lengths: return the samples of each row as well.
            attention_mask: 1 for text, 0 for padding.
            return_history: return what each row said, to go on from: a dictionary each, as `history_prompt`.
            sampling: "transformers" or "original".
            key: randomness of all stages; a row's does not depend on the others'.
            options: of all stages, or of one with a prefix, `semantic_`, `coarse_` or `fine_`, which goes before; see
                the stages.

        Returns:
            Waveforms `(batch, samples)`, silent after their ends; with lengths or histories a tuple of what is wanted.

        Raises:
            UsageError: for unknown options, and histories of the wrong shape.
        """
        ids = self.generation_config
        stages = _by_stage(options)
        keys: Any = (None,) * 3 if key is None else jax.random.split(key, 3)
        common: dict[str, Any] = {"history_prompt": history_prompt, "sampling": sampling}
        semantic = self.semantic.generate(
            input_ids,
            ids.semantic_config,
            attention_mask=attention_mask,
            key=keys[0],
            **common,
            **stages["semantic_"],
        )
        if isinstance(semantic, GenerateOutput):
            semantic = np.asarray(semantic.sequences)[:, semantic.prompt_length :]
        waveform, samples, histories = self.semantic_to_waveform(semantic, keys=keys[1:], stages=stages, **common)
        found = (waveform, samples, histories)
        wanted = (True, return_output_lengths, return_history)
        asked = tuple(x for x, want in zip(found, wanted, strict=True) if want)
        return asked if len(asked) > 1 else waveform

    def semantic_to_waveform(
        self,
        semantic_output: Int[Array | np.ndarray, "batch tokens"],
        history_prompt: History | None = None,
        *,
        sampling: str = "transformers",
        keys: Any = (None, None),
        stages: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[Float[np.ndarray, "batch samples"], Int[np.ndarray, " batch"], list[dict[str, np.ndarray]]]:
        """The second and third stage and the codec: waveforms, their lengths, and what each row said.

        Args:
            semantic_output: semantic tokens, padded with the end of speech.
            history_prompt: what was said before.
            sampling: "transformers" or "original".
            keys: randomness of the two stages.
            stages: options under "coarse_" and "fine_".
        """
        ids = self.generation_config
        stages = stages or {"coarse_": {}, "fine_": {}}
        size = ids.codebook_size
        common: dict[str, Any] = {"codebook_size": size, "history_prompt": history_prompt, "sampling": sampling}
        coarse, lengths = self.coarse_acoustics.generate(
            semantic_output,
            ids.semantic_config,
            ids.coarse_acoustics_config,
            return_output_lengths=True,
            key=keys[0],
            **common,
            **stages["coarse_"],
        )
        books = ids.coarse_acoustics_config.n_coarse_codebooks
        frames = np.asarray(lengths) // books
        codes = np.zeros((len(frames), ids.fine_acoustics_config.n_fine_codebooks, 0), np.int32)
        if frames.max(initial=0):
            codes = self.fine_acoustics.generate(
                coarse,
                ids.semantic_config,
                ids.coarse_acoustics_config,
                ids.fine_acoustics_config,
                output_lengths=frames,
                key=keys[1],
                **common,
                **stages["fine_"],
            )
        waveform, samples = self.codec_decode(codes, frames)
        histories = [
            {
                "semantic_prompt": row[row != ids.semantic_config.eos_token_id].astype(np.int32),
                "coarse_prompt": code[:books, :length],
                "fine_prompt": code[:, :length],
            }
            for row, code, length in zip(np.asarray(semantic_output), codes, frames, strict=True)
        ]
        return waveform, samples, histories


@partial(jax.jit, static_argnames="graphdef")
def _decode(graphdef: Any, state: Any, codes: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).decode_frame(codes)


def _by_stage(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each stage: those with its prefix go before those without, which the fine stage takes one of."""
    prefixes = ("semantic_", "coarse_", "fine_")
    stages: dict[str, dict[str, Any]] = {}
    for prefix in prefixes:
        common = {name: value for name, value in options.items() if not name.startswith(prefixes)}
        if prefix != "semantic_":
            common.pop("min_eos_p", None)  # an end of speech is the semantic stage's alone
            for length in ("max_new_tokens", "max_length"):
                common.pop(length, None)  # how long the others speak follows from the first
        if prefix == "fine_":
            common = {name: value for name, value in common.items() if name == "temperature"}
        own = {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}
        stages[prefix] = common | own
    return stages


# --- training: our reconstruction ------------------------------------------------------------------------------------


def semantic_loss(
    model: BarkSemanticModel,
    input_ids: Int[Array, "batch text"],
    targets: Int[Array, "batch tokens"],
    history: Int[Array, "#batch text"] | None = None,
    *,
    key: jax.Array | None = None,
) -> Float[Array, ""]:
    r"""Our reconstruction of the first stage's training: $-\frac1N\sum_n \log p(s_n \mid s_{<n}, \text{text}, h)$.

    Args:
        model: the semantic model.
        input_ids: text, as `numbered_text` gives it.
        targets: semantic tokens with the end of speech after them, -100 as padding.
        history: semantic tokens before, padded with the end of speech; none by default.
        key: switches dropout on.
    """
    ids = model.generation_config.semantic_config
    if history is None:
        history = jnp.full((1, input_ids.shape[1]), ids.eos_token_id, jnp.int32)
    prompt = model.prompt(input_ids, history, ids)
    spoken = model.input_embeds_layer(jnp.where(targets == IGNORED_LABEL, ids.eos_token_id, targets)[:, :-1])
    logits = model(inputs_embeds=jnp.concatenate([prompt, spoken], axis=1), key=key).logits
    return cross_entropy(logits[:, prompt.shape[1] - 1 :], targets)


def coarse_loss(
    model: BarkCoarseModel,
    semantic: Int[Array, "batch tokens"],
    targets: Int[Array, "batch coarse"],
    *,
    key: jax.Array | None = None,
) -> Float[Array, ""]:
    r"""Our reconstruction of the second stage's training: $-\frac1N\sum_n \log p(c_n \mid c_{<n}, \text{semantic})$.

    Args:
        model: the coarse model.
        semantic: semantic tokens that a window reads, padded with 12 048.
        targets: coarse tokens of the two codebooks in turns, from 10 000 on, -100 as padding.
        key: switches dropout on.
    """
    ids = model.generation_config.coarse_acoustics_config
    infer = jnp.full((len(semantic), 1), ids.coarse_infer_token, semantic.dtype)
    spoken = jnp.where(targets == IGNORED_LABEL, ids.coarse_semantic_pad_token, targets)[:, :-1]
    logits = model(jnp.concatenate([semantic, infer, spoken], axis=1), key=key).logits
    return cross_entropy(logits[:, semantic.shape[1] :], targets)


def fine_loss(
    model: BarkFineModel,
    codes: Int[Array, "batch frames codebooks"],
    codebook_idx: int,
    known: Int[Array, " batch"] | int = 0,
    lengths: Int[Array, " batch"] | None = None,
    *,
    key: jax.Array | None = None,
) -> Float[Array, ""]:
    r"""Our reconstruction of the third stage's training: $-\frac1N\sum_t \log p(c_{i,t} \mid c_{<i}, \text{history})$.

    A step draws a codebook $i$ from 2 to 7 (`draw_codebook`) and predicts it in all frames at once. The first `known`
    frames are a history: all their codebooks are given.

    Args:
        model: the fine model.
        codes: entries of all codebooks.
        codebook_idx: the codebook to predict.
        known: frames at the beginning whose entries are given.
        lengths: frames of each row; what is beyond is padding. All by default.
        key: switches dropout on.
    """
    padding = model.generation_config.codebook_size
    frame = jnp.arange(codes.shape[1])
    asked = jnp.broadcast_to(frame >= jnp.reshape(jnp.asarray(known), (-1, 1)), codes.shape[:2])
    real = jnp.full(codes.shape[:2], True) if lengths is None else frame < lengths[:, None]
    labels = jnp.where(asked & real, codes[:, :, codebook_idx], IGNORED_LABEL)
    book = jnp.arange(codes.shape[2])
    unknown = (asked[:, :, None] & (book >= codebook_idx)) | ~real[:, :, None]
    logits = model(codebook_idx, jnp.where(unknown, padding, codes), key=key).logits
    return cross_entropy(logits, labels)


def draw_codebook(rng: np.random.Generator, ids: BarkGenerationConfig) -> int:
    """Our reconstruction: the codebook that a step of training predicts, each of 2 to 7 equally often."""
    return int(rng.integers(ids.coarse_acoustics_config.n_coarse_codebooks, ids.fine_acoustics_config.n_fine_codebooks))


# --- long texts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BarkSpeech:
    """One sentence of a long text; not in the paper.

    Attributes:
        text: what was said.
        waveform: float32 samples.
        sampling_rate: Hz.
        history: what was said, to go on from.
        complete: whether it came to its end by itself; else what is left of the text is not said.
    """

    text: str
    waveform: np.ndarray
    sampling_rate: int
    history: dict[str, np.ndarray]
    complete: bool = True


def joined(before: History | None, after: History, ids: BarkGenerationConfig) -> dict[str, np.ndarray]:
    """Two histories one after the other, cut at the front to what the stages can read.

    The fine stage reads most, 512 frames, and these are 341 semantic tokens; the arrays stay as long as each other.
    """
    frames = ids.fine_acoustics_config.max_fine_history_length
    tokens = max(ids.semantic_config.max_input_semantic_length, math.ceil(frames / ids.frames_per_token))
    frames = math.floor(tokens * ids.frames_per_token)
    last = {"semantic_prompt": tokens, "coarse_prompt": frames, "fine_prompt": frames}
    parts = [after] if before is None else [before, after]
    return {name: np.concatenate([np.asarray(p[name]) for p in parts], axis=-1)[..., -n:] for name, n in last.items()}


def speak(
    model: BarkModel,
    processor: Any,
    text: str | Sequence[str],
    voice_preset: str | History | None = None,
    *,
    rolling: bool = True,
    key: jax.Array | None = None,
    **options: Any,
) -> Iterator[BarkSpeech]:
    """§III-D, continuation: a text of any length, sentence by sentence.

    A call of `generate` speaks up to some 15 seconds, and the processor cuts sentences that would take longer. Each
    sentence goes on from a history: from all that was said so far, the preset in front (`rolling`), so that voice, room
    and tone carry over; or from the preset alone, so that no drift adds up. Without a preset the first sentence makes
    up the voice for the others in both cases.

    Args:
        model: the model.
        processor: of the same checkpoint.
        text: a text, cut into sentences by the processor, or sentences.
        voice_preset: a name, an `.npz` file or a history.
        rolling: whether a sentence goes on from the one before.
        key: randomness.
        options: of `BarkModel.generate`.

    Yields:
        Each sentence as it is done; one in which nothing is said has no samples, and no history goes on from it.

    Raises:
        UsageError: for several sequences of one text.
    """
    ids = model.generation_config
    sentences = processor.sentences(text) if isinstance(text, str) else list(text)
    history = None if voice_preset is None else processor.voice_preset(voice_preset)
    asked = dict(ids.semantic_config.options) | _by_stage(options)["semantic_"]
    if asked.get("num_return_sequences", 1) != 1:
        raise UsageError("speak says a text once; BarkModel.generate says it several times.")
    longest = asked.get("max_new_tokens", math.inf)
    for index, sentence in enumerate(sentences):
        inputs = processor(sentence)
        waveform, samples, (said,) = model.generate(
            **inputs,
            history_prompt=history,
            return_output_lengths=True,
            return_history=True,
            key=None if key is None else jax.random.fold_in(key, index),
            **options,
        )
        complete = len(said["semantic_prompt"]) < longest
        yield BarkSpeech(sentence, waveform[0, : samples[0]], ids.sample_rate, said, complete)
        if len(said["semantic_prompt"]) and (rolling or history is None):
            history = joined(history, said, ids)
