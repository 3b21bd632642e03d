r"""Transcription of recordings of any length with Whisper (paper §4.5, and what OpenAI's released code made of it).

The model hears 30 s at a time. A window is decoded, its timestamps cut it into segments, and the next window begins
where the last complete segment ended (**seeking**). Decoding that goes wrong shows in two numbers, the mean
log-probability of the tokens and how well the text compresses; it is then repeated at a higher **temperature**. The
**text so far** is the prompt of the next window. A window that the model takes for silence is passed over. **Word
times**, where wanted, come from `audiozoo.decoding.timestamps`.

    recording ── log-mel of the whole ──> windows ──> encode ──> decode, again if need be ──> segments ──> words
                                             ^                                                   │
                                             └───────────────── seek, prompt ────────────────────┘

`transcribe` gives what `openai-whisper` gives, token for token, and its result has the same form. One choice differs by
default, see `TranscriptionOptions.padding`.

**Batches.** The loop above is a generator, which asks for windows to be decoded and gets results (`_Stream.run`).
Several of them advance together, their windows side by side in one batch: several recordings, or (with `batch_size`)
the pieces of a long one, cut where it is quiet. Temperature fallback is per window.

**Compilation.** Three functions are compiled: one encodes windows, one decodes (prompt and loop in one call; the
host sees nothing before the last token), one aligns. Prompts are padded on the left to a few lengths, batches to powers
of two.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from audiozoo.audio import files
from audiozoo.audio.features import WHISPER_CHUNK_SAMPLES, long_log_mel_spectrogram
from audiozoo.decoding.cache import Growing, Shared
from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.generate import generate
from audiozoo.decoding.timestamps import (
    APPENDED,
    PREPENDED,
    SECONDS_PER_TIMESTAMP,
    TimestampRules,
    WordTiming,
    add_words,
    alignment_matrix,
    token_times,
    word_timings,
)
from audiozoo.errors import UsageError
from audiozoo.layers import KeyValues
from audiozoo.text.whisper_tokenizer import language_code

FRAMES_PER_SECOND = 100  # of the log-mel spectrogram
FRAMES_PER_TIMESTAMP = 2
_PROMPT_LENGTHS = (8, 64, 256, 448)
_ALIGNMENT_LENGTHS = (32, 64, 128, 256, 512)
_SHORT_WINDOW_FRAMES = 500  # with `allow_short`, windows are padded to multiples of 5 s

Audio = str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | Iterable[np.ndarray]
Progress = Callable[[float, float], None]


@dataclasses.dataclass(frozen=True)
class TranscriptionOptions:
    """What a user may ask of `transcribe`: the names and defaults of `openai-whisper`, and below them our own."""

    language: str | None = None  # of the speech, code or name; detected in the first 30 s if not given
    task: str = "transcribe"  # or "translate", into English
    temperature: float | tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # one after the other, until decoding works
    compression_ratio_threshold: float | None = (
        2.4  # text that zlib shrinks by more is too repetitive: next temperature
    )
    logprob_threshold: float | None = -1.0  # mean log-probability below: next temperature
    no_speech_threshold: float | None = 0.6  # above, and below logprob_threshold: silence
    condition_on_previous_text: bool = True  # the text so far is the prompt
    initial_prompt: str | None = None  # the text before the recording, so to speak
    carry_initial_prompt: bool = False  # repeat it before every window
    prefix: str | Sequence[int] | None = None  # how the text of every window begins
    word_timestamps: bool = False
    prepend_punctuations: str = PREPENDED  # belong to the word after them
    append_punctuations: str = APPENDED  # belong to the word before them
    clip_timestamps: str | tuple[float, ...] = "0"  # seconds: start, end, start, end …; the last end may be left out
    hallucination_silence_threshold: float | None = None  # s of silence around what may be a hallucination, to skip it
    sample_len: int | None = None  # tokens a window; half of the model's positions if not given
    best_of: int | None = None  # samples, where the temperature is above 0
    beam_size: int | None = None  # beams, where the temperature is 0
    patience: float | None = None  # of the beams: Kasai et al., arXiv 2204.05424
    length_penalty: float | None = None  # GNMT's alpha (arXiv 1609.08144, Eq. 14); None ranks by mean log-probability
    suppress_tokens: str | Sequence[int] | None = "-1"  # -1 stands for the tokens of what is not speech
    suppress_blank: bool = True  # neither a space nor the end as the first token
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0  # s

    # How the last, shorter window is filled up to 30 s. "silence": with the spectrogram of silence, which is what the
    # model was trained on, and what `openai-whisper` did up to 2023. "zeros": with zeros in the spectrogram, which is a
    # moderate noise; `openai-whisper` does so since it knows clips, and faster-whisper. Texts differ now and then in
    # the last window; take "zeros" to get exactly those of today's `openai-whisper`.
    padding: str = "silence"
    batch_size: int = (
        1  # windows decoded together. Above 1, a recording is cut into pieces, each with prompts of its own
    )
    seed: int = 0  # of the sampling at temperatures above 0
    allow_short: bool = False  # encode a last, shorter window as it is (in steps of 5 s): faster, but not as trained

    def __post_init__(self) -> None:
        def require(holds: bool, sentence: str) -> None:
            if not holds:
                raise UsageError(sentence)

        temperatures = self.temperature if isinstance(self.temperature, Iterable) else (self.temperature,)
        object.__setattr__(self, "temperature", tuple(float(t) for t in temperatures))
        require(
            bool(self.temperatures) and min(self.temperatures) >= 0,
            f"temperature={self.temperature} must be one or more numbers of at least 0.",
        )
        require(
            self.task in ("transcribe", "translate"),
            f"Whisper has no task '{self.task}'; choose transcribe or translate.",
        )
        require(self.padding in ("silence", "zeros"), f"padding={self.padding!r} must be 'silence' or 'zeros'.")
        for name in ("beam_size", "best_of", "sample_len", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1.")
        require(
            self.patience is None or (self.beam_size or 1) > 1,
            "patience needs beam search: give a beam_size of at least 2.",
        )
        require(
            self.length_penalty is None or 0 <= self.length_penalty <= 1,
            f"length_penalty={self.length_penalty} must be between 0 and 1.",
        )
        require(
            self.hallucination_silence_threshold is None or self.word_timestamps,
            "hallucination_silence_threshold needs word_timestamps=True.",
        )
        if self.language is not None:
            object.__setattr__(self, "language", language_code(self.language))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TranscriptionOptions:
        """From keyword arguments; an unknown name is an error that says the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise UsageError(
                    f"transcribe has no option '{name}'"
                    + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}.")
                )
        return cls(**options)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures to try, in order."""
        assert isinstance(self.temperature, tuple)
        return self.temperature

    def clips(self, content_frames: int) -> list[tuple[int, int]]:
        """Start and end of the parts to transcribe, in frames."""
        points = self.clip_timestamps
        if isinstance(points, str):
            try:
                points = tuple(float(point) for point in points.split(",")) if points else ()
            except ValueError:
                raise UsageError(
                    f"clip_timestamps={self.clip_timestamps!r} must be seconds separated by commas, such as '0,12.5'."
                ) from None
        frames = [round(point * FRAMES_PER_SECOND) for point in points] or [0]
        if len(frames) % 2:
            frames.append(content_frames)
        return list(zip(frames[::2], frames[1::2], strict=True))


# ------------------------------------------------------------------------------------------- what is asked and answered


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One row of the encoder's output for a batch of windows: the decoder's cache, with the audio's keys and values."""

    cache: Any
    row: int


@dataclasses.dataclass(frozen=True)
class Window:
    """A request: decode these 30 s after that prompt."""

    features: Float[np.ndarray, "mels frames"]
    prompt: tuple[int, ...]
    start: int  # index of <|startoftranscript|> in the prompt
    limit: int  # new tokens
    seek: int  # where the window begins, in frames; also tells the randomness of windows apart


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The answer: tokens, text, and the numbers that say how far to trust them."""

    audio: Encoded
    tokens: list[int]
    text: str
    avg_logprob: float
    no_speech_prob: float
    temperature: float
    compression_ratio: float


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A request: when are these words said in that window? The answer is a list of `WordTiming`."""

    audio: Encoded
    text_tokens: tuple[int, ...]
    sot_sequence: tuple[int, ...]
    frames: int  # spectrogram frames of the window that hold audio
    language: str | None


def compression_ratio(text: str) -> float:
    """How many times zlib makes the text's bytes shorter."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


# --------------------------------------------------------------------------------------------------- compiled functions


class _Programs:
    """What is compiled for one model structure; weights are arguments."""

    def __init__(self, graphdef: Any) -> None:
        self._graphdef = graphdef
        self.encode = jax.jit(self._encode)
        self.languages = jax.jit(self._languages, static_argnames="tokens")
        self.decode = jax.jit(self._decode, static_argnames=("config", "rules", "no_speech_token_id"))
        self.align = jax.jit(self._align, static_argnames=("heads", "text_end"))

    def _encode(self, state: Any, features: Float[Array, "batch mels frames"]) -> Any:
        """The decoder's cache, with the keys and values of the audio and no room for tokens yet."""
        model = nnx.merge(self._graphdef, state)
        hidden = model.model.encoder(features, allow_short=True).last_hidden_state
        return model.model.decoder.start(hidden, 0)

    def _languages(self, state: Any, cache: Any, start: Array, *, tokens: tuple[int, ...]) -> Array:
        """Probabilities of the language tokens after <|startoftranscript|>."""
        model = nnx.merge(self._graphdef, state)
        prompt = jnp.broadcast_to(start, (_batch(cache), 1))
        hidden = model.model.decoder(prompt, past_key_values=_with_room(cache, 1)).last_hidden_state
        return jax.nn.softmax(model.head(hidden)[:, 0, np.asarray(tokens)], axis=-1)

    def _decode(
        self,
        state: Any,
        cache: Any,
        prompt: Int[Array, "batch prompt"],
        padding: Int[Array, " batch"],
        start: Int[Array, " batch"],
        limit: Int[Array, ""],
        temperature: Float[Array, ""],
        seeds: Int[Array, "batch 3"],
        *,
        config: GenerationConfig,
        rules: TimestampRules | None,
        no_speech_token_id: int,
    ) -> tuple[Array, Array, Array, Array]:
        """New tokens `(rows, new)`, their number, their log-probabilities' sum, and the no-speech probability.

        Args:
            state: the model's parameters.
            cache: of `encode`.
            prompt: padded on the left.
            padding: how many tokens of each row are padding.
            start: index of <|startoftranscript|> in each row.
            limit: new tokens.
            temperature: of sampling.
            seeds: what each row's randomness is made from.
            config: how to search.
            rules: for timestamps.
            no_speech_token_id: whose probability after <|startoftranscript|> is wanted.
        """
        model = nnx.merge(self._graphdef, state)
        length = prompt.shape[1]
        slots = length + config.new_tokens(length)

        def feed(tokens: Array, cache: Any, padding: Array, position: Array | int) -> tuple[Array, Any]:
            real = jnp.arange(slots) >= padding[:, None]
            places = jnp.maximum(position + jnp.arange(tokens.shape[1]) - padding[:, None], 0)
            output = model.model.decoder(
                tokens, real, past_key_values=cache, cache_position=position, position_ids=places
            )
            return output.last_hidden_state, output.past_key_values

        def step(tokens: Array, carried: Any, position: Array) -> tuple[Array, Any]:
            own, cross, padding = carried
            own = tuple(KeyValues(kv.key.value, kv.value.value) for kv in own)
            hidden, after = feed(
                tokens, dataclasses.replace(cache, self_attention=own, cross_attention=cross.value), padding, position
            )
            return model.head(hidden)[:, 0], (_growing(after.self_attention), cross, padding)

        hidden, filled = feed(prompt, _with_room(cache, slots), padding, 0)
        at_start = jnp.take_along_axis(hidden, start[:, None, None], axis=1)
        logits = model.head(jnp.concatenate([at_start, hidden[:, -1:]], axis=1))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        no_speech = jax.nn.softmax(logits[:, 0], axis=-1)[:, no_speech_token_id]
        carried = (_growing(filled.self_attention), Shared(cache.cross_attention), padding)
        output = generate(
            step,
            carried,
            prompt,
            config,
            prefill=lambda prompt, carried: (logits[:, 1], carried),
            key=_row_keys(seeds, config.num_return_sequences) if config.do_sample else None,
            logits_processors=() if rules is None else (rules,),
            max_new_tokens=limit,
            temperature=temperature if config.do_sample else None,
        )
        assert output.sum_log_probs is not None
        return output.sequences[:, length:], output.lengths - length, output.sum_log_probs, no_speech

    def _align(
        self,
        state: Any,
        cache: Any,
        tokens: Int[Array, "batch tokens"],
        count: Int[Array, " batch"],
        frames: Int[Array, " batch"],
        *,
        heads: tuple[tuple[int, int], ...],
        text_end: int,
    ) -> tuple[Array, Array]:
        """The alignment matrix of each window, and the probability of every token among the text tokens.

        Args:
            state: the model's parameters.
            cache: of `encode`.
            tokens: the whole sequence, padded on the right.
            count: how many are real.
            frames: encoder frames that hold audio.
            heads: (layer, head) of the alignment heads.
            text_end: smaller ids are text.
        """
        model = nnx.merge(self._graphdef, state)
        output = model.model.decoder(tokens, past_key_values=_with_room(cache, tokens.shape[1]), output_attentions=True)
        weights = jnp.stack([output.cross_attentions[layer][:, head] for layer, head in heads], axis=1)
        weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        matrices = jax.vmap(alignment_matrix)(weights, count, frames)
        logits = model.head(output.last_hidden_state[:, :-1])[..., :text_end]
        chosen = jnp.take_along_axis(logits, jnp.minimum(tokens[:, 1:], text_end - 1)[..., None], axis=-1)[..., 0]
        return matrices, jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


@lru_cache(maxsize=8)
def _programs(graphdef: Any) -> _Programs:
    return _Programs(graphdef)


def _batch(cache: Any) -> int:
    return int(cache.cross_attention[0].key.shape[0])


def _with_room(cache: Any, slots: int) -> Any:
    """The cache of `encode` with room for tokens."""

    def room(empty: Array) -> Array:
        return jnp.zeros((*empty.shape[:2], slots, empty.shape[3]), empty.dtype)

    return dataclasses.replace(cache, self_attention=jax.tree.map(room, cache.self_attention))


def _growing(own: Iterable[KeyValues]) -> tuple[KeyValues, ...]:
    """Tell the search which arrays grow with the tokens."""
    return tuple(KeyValues(Growing(kv.key, 2), Growing(kv.value, 2)) for kv in own)  # type: ignore[arg-type]


def _row_keys(seeds: Int[Array, "batch 3"], copies: int) -> Array:
    """A key for each sample of each window, which depends on seed, window and attempt, and not on the batch."""

    def key(seed: Array, copy: Array) -> Array:
        made = jax.random.key(seed[0])
        for part in (seed[1], seed[2], copy):
            made = jax.random.fold_in(made, part)
        return made

    return jax.vmap(lambda seed: jax.vmap(partial(key, seed))(jnp.arange(copies)))(seeds).reshape(-1)


def _bucket(size: int, sizes: Iterable[int]) -> int:
    return next((bucket for bucket in sizes if bucket >= size), size)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class WindowDecoder:
    """A model with its compiled functions, which answers `Window` and `Alignment` requests, several in one batch.

    Args:
        model: has `model.encoder`, `model.decoder`, `head`, `config` and `generation_config`, as
            `WhisperForConditionalGeneration` has.
        tokenizer: of the model.
        options: of the transcription.
    """

    def __init__(self, model: Any, tokenizer: Any, options: TranscriptionOptions) -> None:
        graphdef, self.state = nnx.split(model)
        self.programs = _programs(graphdef)
        self.config, self.ids = model.config, model.generation_config
        self.tokenizer, self.options = tokenizer, options
        self.window_frames = FRAMES_PER_TIMESTAMP * self.config.max_source_positions
        self._suppressed = self._suppressed_tokens()
        self._blank = (*tokenizer.encode(" ", add_special_tokens=False), tokenizer.eot)

    def _suppressed_tokens(self) -> tuple[int, ...]:
        wanted, tokens = self.options.suppress_tokens, self.tokenizer
        if not wanted:
            return ()
        try:
            listed = [int(t) for t in (wanted.split(",") if isinstance(wanted, str) else wanted)]
        except ValueError:
            raise UsageError(
                f"suppress_tokens={wanted!r} must be token ids separated by commas; -1 stands for what is not speech."
            ) from None
        found = {token for token in listed if token >= 0}
        if -1 in listed:
            found |= set(tokens.non_speech_tokens)
        found |= {tokens.transcribe, tokens.translate, tokens.sot, tokens.sot_prev, tokens.sot_lm, tokens.no_speech}
        return tuple(sorted(found))

    # -------------------------------------------------------------------------------------------------------- encoding

    def encode(self, features: Sequence[Float[np.ndarray, "mels frames"]]) -> list[Encoded]:
        """Encode windows of equal length in one call."""
        rows = _power_of_two(len(features))
        batch = np.stack([*features, *[features[0]] * (rows - len(features))])
        cache = self.programs.encode(self.state, batch)
        return [Encoded(cache, row) for row in range(len(features))]

    def language_probabilities(self, audio: Sequence[Encoded]) -> list[dict[str, float]]:
        """§2.3: the probability of each language, by code, for each window."""
        tokens = self.tokenizer
        if not tokens.multilingual:
            raise UsageError("This model is English-only, so it cannot tell languages apart.")
        cache = _gather(audio)
        probabilities = self.programs.languages(
            self.state, cache, np.int32(tokens.sot), tokens=tuple(tokens.all_language_tokens)
        )
        codes = tokens.all_language_codes
        rows = np.asarray(probabilities)[: len(audio)]
        return [{code: float(p) for code, p in zip(codes, row, strict=True)} for row in rows]

    # -------------------------------------------------------------------------------------------------------- decoding

    def decode(self, windows: Sequence[Window]) -> list[Decoded]:
        """Encode and decode windows; those that fail, again at the next temperature (§4.5)."""
        found: dict[int, Decoded] = {}
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, window in enumerate(windows):
            by_shape.setdefault((window.features.shape[1], window.limit), []).append(i)
        for group in by_shape.values():
            audio = dict(zip(group, self.encode([windows[i].features for i in group]), strict=True))
            waiting = group
            for attempt, temperature in enumerate(self.options.temperatures):
                answers = self.decode_at(
                    temperature, [windows[i] for i in waiting], [audio[i] for i in waiting], attempt
                )
                found |= dict(zip(waiting, answers, strict=True))
                waiting = [i for i in waiting if self._failed(found[i])]
                if not waiting:
                    break
        return [found[i] for i in range(len(windows))]

    def _failed(self, result: Decoded) -> bool:
        options = self.options
        improbable = options.logprob_threshold is not None and result.avg_logprob < options.logprob_threshold
        repetitive = (
            options.compression_ratio_threshold is not None
            and result.compression_ratio > options.compression_ratio_threshold
        )
        silent = (
            options.no_speech_threshold is not None
            and result.no_speech_prob > options.no_speech_threshold
            and improbable
        )
        return (repetitive or improbable) and not silent

    def decode_at(
        self, temperature: float, windows: Sequence[Window], audio: Sequence[Encoded], attempt: int = 0
    ) -> list[Decoded]:
        """Decode windows of the same token limit at one temperature: 0 is greedy or beam search, else sampling."""
        tokens, options = self.tokenizer, self.options
        cache = _gather(audio)
        rows = _batch(cache)
        windows = [*windows, *[windows[0]] * (rows - len(windows))]
        length = _bucket(max(len(window.prompt) for window in windows), _PROMPT_LENGTHS)
        prompt = np.full((rows, length), tokens.eot, np.int32)
        for line, window in zip(prompt, windows, strict=True):
            line[length - len(window.prompt) :] = window.prompt
        padding = np.array([length - len(window.prompt) for window in windows], np.int32)
        start = padding + np.array([window.start for window in windows], np.int32)
        seeds = np.array([(options.seed, window.seek, attempt) for window in windows], np.int32)
        config = self._search(temperature)
        rules = None
        if not options.without_timestamps:
            latest = options.max_initial_timestamp
            rules = TimestampRules(
                begin=length,
                timestamp_begin=tokens.timestamp_begin,
                eos_token_id=tokens.eot,
                no_timestamps_token_id=tokens.no_timestamps,
                max_initial=round(latest / SECONDS_PER_TIMESTAMP) if latest else None,
            )
        sequences, lengths, sums, no_speech = jax.device_get(
            self.programs.decode(
                self.state,
                cache,
                prompt,
                padding,
                start,
                np.int32(windows[0].limit),
                np.float32(temperature),
                seeds,
                config=config,
                rules=rules,
                no_speech_token_id=tokens.no_speech,
            )
        )
        copies = config.num_return_sequences
        answers = []
        for i, encoded in enumerate(audio):
            candidates = []
            for row in range(i * copies, (i + 1) * copies):
                new = sequences[row, : lengths[row]].tolist()
                candidates.append((new[: new.index(tokens.eot)] if tokens.eot in new else new, float(sums[row])))
            best, total = max(candidates, key=self._rank)
            text = tokens.decode(best).strip()
            answers.append(
                Decoded(
                    audio=encoded,
                    tokens=best,
                    text=text,
                    avg_logprob=total / (len(best) + 1),
                    no_speech_prob=float(no_speech[i]),
                    temperature=temperature,
                    compression_ratio=compression_ratio(text),
                )
            )
        return answers

    def _rank(self, candidate: tuple[list[int], float]) -> float:
        tokens, log_prob = candidate
        alpha = self.options.length_penalty
        return log_prob / (max(len(tokens), 1) if alpha is None else ((5 + len(tokens)) / 6) ** alpha)

    def _search(self, temperature: float) -> GenerationConfig:
        options, tokens = self.options, self.tokenizer
        common: dict[str, Any] = {
            "max_new_tokens": options.sample_len or self.config.max_target_positions // 2,
            "eos_token_id": tokens.eot,
            "pad_token_id": tokens.eot,
            "suppress_tokens": self._suppressed or None,
            "begin_suppress_tokens": self._blank if options.suppress_blank else None,
        }
        if temperature > 0:
            samples = options.best_of or 1
            return GenerationConfig(
                **common, do_sample=True, top_k=None, num_return_sequences=samples, output_log_probs=True
            )
        beams = options.beam_size or 1
        if beams == 1:
            return GenerationConfig(**common, output_log_probs=True)
        patience = options.patience or 1.0
        return GenerationConfig(
            **common,
            num_beams=beams,
            patience=patience,
            num_return_sequences=max(beams, round(beams * patience)),
            renormalize_logits=True,
        )

    # ------------------------------------------------------------------------------------------------------- alignment

    def align(self, requests: Sequence[Alignment], median_filter_width: int = 7) -> list[list[WordTiming]]:
        """The words of texts that are said in encoded windows, with times from the start of the window."""
        tokens = self.tokenizer
        answers: list[list[WordTiming]] = [[] for _ in requests]
        wanted = [i for i, r in enumerate(requests) if r.text_tokens and r.frames >= FRAMES_PER_TIMESTAMP]
        by_length: dict[int, list[int]] = {}
        for i in wanted:
            by_length.setdefault(requests[i].audio.cache.cross_attention[0].key.shape[2], []).append(i)
        for group in by_length.values():
            cache = _gather([requests[i].audio for i in group])
            rows = _batch(cache)
            sequences = [
                [*r.sot_sequence, tokens.no_timestamps, *r.text_tokens, tokens.eot]
                for r in (requests[i] for i in group)
            ]
            for sequence in sequences:
                if len(sequence) > self.config.max_target_positions:
                    raise UsageError(
                        f"A text of {len(sequence)} tokens is too long to align in one window; "
                        f"{self.config.max_target_positions} is the most."
                    )
            length = _bucket(max(map(len, sequences)), _ALIGNMENT_LENGTHS)
            length = min(length, self.config.max_target_positions)
            batch = np.full((rows, length), tokens.eot, np.int32)
            count, frames = np.full(rows, 2, np.int32), np.full(rows, 1, np.int32)
            for row, i in enumerate(group):
                batch[row, : len(sequences[row])] = sequences[row]
                count[row], frames[row] = len(sequences[row]), requests[i].frames // FRAMES_PER_TIMESTAMP
            matrices, probabilities = jax.device_get(
                self.programs.align(
                    self.state, cache, batch, count, frames, heads=self.ids.alignment_heads, text_end=tokens.eot
                )
            )
            for row, i in enumerate(group):
                request = requests[i]
                begin, end = len(request.sot_sequence), len(sequences[row]) - 1
                words, parts = tokens.split_to_word_tokens([*request.text_tokens, tokens.eot], request.language)
                times = token_times(matrices[row, begin:end, : frames[row]])
                answers[i] = word_timings(words, parts, times, probabilities[row, begin : end - 1])
        return answers


def _gather(audio: Sequence[Encoded]) -> Any:
    """One cache with these rows, filled up to a power of two by repeating the first."""
    cache = audio[0].cache
    rows = [encoded.row for encoded in audio]
    together = all(encoded.cache is cache for encoded in audio)
    rows += [rows[0]] * (_power_of_two(len(rows)) - len(rows))
    if together and len(rows) == _batch(cache) and rows[: len(audio)] == list(range(len(audio))):
        return cache
    if together:
        return jax.tree.map(lambda x: x[np.asarray(rows)], cache)
    caches = [encoded.cache for encoded in audio]
    caches += [caches[0]] * (len(rows) - len(caches))
    return jax.tree.map(lambda *leaves: jnp.stack([x[row] for x, row in zip(leaves, rows, strict=True)]), *caches)


# -------------------------------------------------------------------------------------------------------- the recording


@dataclasses.dataclass
class Recording:
    """The spectrogram of a whole recording, followed by 30 s of silence, and what is known about it."""

    features: Float[np.ndarray, "mels frames"]
    frames: int  # without the silence
    language: str = "en"
    sot_sequence: tuple[int, ...] = ()

    @classmethod
    def of(cls, audio: Audio, mels: int) -> Recording:
        """From a file, a 16 kHz waveform, or its consecutive blocks; the waveform of a file is never held whole."""
        source: Any
        if isinstance(audio, (str, os.PathLike, bytes)) or hasattr(audio, "read"):
            source = files.blocks(audio)  # type: ignore[arg-type]
        elif isinstance(audio, (np.ndarray, jax.Array)):
            source = files.check_waveform(audio)
        else:
            source = (files.check_waveform(block) for block in audio)
        features = long_log_mel_spectrogram(source, mels, padding=WHISPER_CHUNK_SAMPLES)
        return cls(features, features.shape[1] - WHISPER_CHUNK_SAMPLES // 160)

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.frames / FRAMES_PER_SECOND

    def window(self, start: int, size: int, width: int, padding: str) -> Float[np.ndarray, "mels width"]:
        """`size` frames from `start` on, filled up to `width`."""
        if padding == "zeros":
            window = np.zeros((len(self.features), width), self.features.dtype)
            window[:, :size] = self.features[:, start : start + size]
            return window
        silence = self.features[0, -1]
        window = np.full((len(self.features), width), silence, self.features.dtype)
        # At the end of the recording the spectrogram goes on with the silence that was appended to it.
        size = width if start + size >= self.frames else size
        part = self.features[:, start : start + min(size, width)]
        window[:, : part.shape[1]] = part
        return window


def quiet_pieces(recording: Recording, start: int, end: int, longest: int) -> list[tuple[int, int]]:
    """Cut `start … end` into pieces of at most `longest` frames, each cut at the quietest 0.2 s of the last third."""
    loudness = recording.features[:, :end].mean(axis=0)
    smooth = np.convolve(loudness, np.full(20, 1 / 20), mode="same")
    pieces = []
    while end - start > longest:
        first = start + 2 * longest // 3
        cut = first + int(np.argmin(smooth[first : start + longest]))
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, end)]


# -------------------------------------------------------------------------------------------------- the sequential loop


def _anomaly(word: Mapping[str, Any]) -> float:
    """How unlike a spoken word: improbable, too short, too long."""
    duration = word["end"] - word["start"]
    return float(word.get("probability", 0.0) < 0.15) + max(0.0, 0.133 - duration) * 15 + max(0.0, duration - 2.0)


def _is_anomalous(segment: Mapping[str, Any] | None) -> bool:
    """Whether a segment's first words look like a hallucination."""
    if segment is None or not segment["words"]:
        return False
    words = [word for word in segment["words"] if word["word"] not in PREPENDED + APPENDED][:8]
    score = sum(map(_anomaly, words))
    return score >= 3 or score + 0.01 >= len(words)


def _with_words(segments: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return next((segment for segment in segments if segment["words"]), None)


def _speech_end(segments: Sequence[Mapping[str, Any]]) -> float | None:
    """The end of the last word; of the last segment, if no segment has words."""
    for segment in reversed(segments):
        if segment["words"]:
            return float(segment["words"][-1]["end"])
    return float(segments[-1]["end"]) if segments else None


class _Stream:
    """The loop of §4.5 over some clips of one recording."""

    def __init__(
        self,
        recording: Recording,
        clips: Sequence[tuple[int, int]],
        decoder: WindowDecoder,
        *,
        last_speech: float = 0.0,
    ) -> None:
        self.recording, self.clips, self.decoder = recording, clips, decoder
        self.tokenizer, self.options = decoder.tokenizer, decoder.options
        self.segments: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.prompted = 0  # tokens of the initial prompt
        self.heard = clips[0][0] if clips else 0  # frames that are done
        self.last_speech = last_speech

    def text_tokens(self) -> list[int]:
        """All tokens of all segments."""
        return self.tokens[self.prompted :]

    def _prompt(self, previous: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """§2.3, Figure 1: previous text, the task, and how the text begins; and where <|startoftranscript|> stands."""
        tokens, options, positions = self.tokenizer, self.options, self.decoder.config.max_target_positions
        task = list(self.recording.sot_sequence)
        if options.without_timestamps:
            task.append(tokens.no_timestamps)
        if options.prefix:
            prefix = options.prefix
            ids = tokens.encode_ordinary(" " + prefix.strip()) if isinstance(prefix, str) else list(prefix)
            room = positions // 2 - (options.sample_len or positions // 2)
            task += ids[-room:]  # with the default sample_len there is no room, and all of it is taken
        if not previous:
            return tuple(task), 0
        kept = list(previous)[-(positions // 2 - 1) :]
        return (tokens.sot_prev, *kept, *task), len(kept) + 1

    def _segment(self, seek: int, start: float, end: float, tokens: Sequence[int], result: Decoded) -> dict[str, Any]:
        return {
            "seek": seek,
            "start": start,
            "end": end,
            "text": self.tokenizer.decode([token for token in tokens if token < self.tokenizer.eot]),
            "tokens": list(tokens),
            "temperature": result.temperature,
            "avg_logprob": result.avg_logprob,
            "compression_ratio": result.compression_ratio,
            "no_speech_prob": result.no_speech_prob,
        }

    def _cut(self, result: Decoded, seek: int, size: int) -> tuple[list[dict[str, Any]], int, bool]:
        """Cut a window's tokens at pairs of timestamps; also where to go on, and whether all of the window is done."""
        tokens, zero = result.tokens, self.tokenizer.timestamp_begin
        offset = seek / FRAMES_PER_SECOND
        stamped = [token >= zero for token in tokens]
        complete = stamped[-2:] == [False, True]  # one timestamp at the end: nothing is said after it
        cuts = [i for i in range(1, len(tokens)) if stamped[i - 1] and stamped[i]]
        if cuts:
            if complete:
                cuts.append(len(tokens))
            segments = []
            for begin, end in zip([0, *cuts], cuts, strict=False):
                part = tokens[begin:end]
                first, last = (offset + (token - zero) * SECONDS_PER_TIMESTAMP for token in (part[0], part[-1]))
                segments.append(self._segment(seek, first, last, part, result))
            if complete:
                return segments, seek + size, True
            return segments, seek + (tokens[cuts[-1] - 1] - zero) * FRAMES_PER_TIMESTAMP, False
        duration = size / FRAMES_PER_SECOND
        stamps = [token for token in tokens if token >= zero]
        if stamps and stamps[-1] != zero:
            duration = (stamps[-1] - zero) * SECONDS_PER_TIMESTAMP
        return [self._segment(seek, offset, offset + duration, tokens, result)], seek + size, complete

    def run(self) -> Generator[Window | Alignment, Any, None]:
        """Ask for windows and alignments, one at a time, and collect segments from the answers."""
        recording, options, tokens = self.recording, self.options, self.tokenizer
        positions = self.decoder.config.max_target_positions
        initial: list[int] = []
        if options.initial_prompt is not None:
            initial = tokens.encode_ordinary(" " + options.initial_prompt.strip())
        self.tokens, self.prompted = list(initial), len(initial)
        room = positions // 2 - 1 - len(initial)  # for text after the initial prompt
        forgotten = 0  # tokens that are no longer part of the prompt
        seek = 0
        for clip_start, clip_end in self.clips:
            seek = clip_start
            clip_end = min(clip_end, recording.frames)
            while seek < clip_end:
                size = min(self.decoder.window_frames, clip_end - seek)
                if options.carry_initial_prompt:
                    previous = initial + self.tokens[max(len(initial), forgotten) :][-room:]
                else:
                    previous = self.tokens[forgotten:]
                prompt, start = self._prompt(previous)
                limit = min(options.sample_len or positions // 2, positions + 1 - len(prompt))
                if limit < 1:
                    raise UsageError(
                        f"The prompt has {len(prompt)} tokens, and this model has {positions} positions in all; "
                        "give a shorter prefix."
                    )
                width = self.decoder.window_frames
                if options.allow_short:
                    width = min(width, -(-size // _SHORT_WINDOW_FRAMES) * _SHORT_WINDOW_FRAMES)
                features = recording.window(seek, size, width, options.padding)
                result: Decoded = yield Window(features, prompt, start, limit, seek)
                if self._is_silence(result):
                    seek += size
                    self.heard = min(seek, recording.frames)
                    continue
                segments, following, complete = self._cut(result, seek, size)
                if options.word_timestamps:
                    following, segments = yield from self._add_words(result, segments, seek, size, following, complete)
                if segments is not None:
                    self._keep(segments)
                    if not options.condition_on_previous_text or result.temperature > 0.5:
                        forgotten = len(self.tokens)
                seek = following
                self.heard = min(seek, recording.frames)

    def _is_silence(self, result: Decoded) -> bool:
        options = self.options
        if options.no_speech_threshold is None or result.no_speech_prob <= options.no_speech_threshold:
            return False
        return options.logprob_threshold is None or result.avg_logprob <= options.logprob_threshold

    def _keep(self, segments: list[dict[str, Any]]) -> None:
        for segment in segments:
            if segment["start"] == segment["end"] or not segment["text"].strip():
                segment |= {"text": "", "tokens": [], "words": []}
            self.segments.append({"id": len(self.segments), **segment})
            self.tokens += segment["tokens"]

    def _add_words(
        self, result: Decoded, segments: list[dict[str, Any]], seek: int, size: int, following: int, complete: bool
    ) -> Generator[Alignment, list[WordTiming], tuple[int, Any]]:
        """Word times, and where to go on in their light; no segments (None) if the window is to be heard again."""
        recording, options, eot = self.recording, self.options, self.tokenizer.eot
        offset = seek / FRAMES_PER_SECOND
        text = tuple(token for segment in segments for token in segment["tokens"] if token < eot)
        timings = yield Alignment(result.audio, text, recording.sot_sequence, size, recording.language)
        add_words(
            segments,
            timings,
            is_text=lambda token: token < eot,
            time_offset=offset,
            last_speech=self.last_speech,
            prepended=options.prepend_punctuations,
            appended=options.append_punctuations,
        )
        end = _speech_end(segments)
        if not complete and end is not None and end > offset:
            following = round(end * FRAMES_PER_SECOND)
        threshold = options.hallucination_silence_threshold
        if threshold is not None:
            window_end = (seek + self.decoder.window_frames) / FRAMES_PER_SECOND
            if not complete and end is not None and end > offset:
                rest_is_silent = window_end - end > threshold
                following = round(end * FRAMES_PER_SECOND) if rest_is_silent else seek + size
            first = _with_words(segments)
            if first is not None and _is_anomalous(first) and first["start"] - offset > threshold:
                return seek + round((first["start"] - offset) * FRAMES_PER_SECOND), None
            following = self._drop_hallucinations(segments, seek, size, following, threshold)
        end = _speech_end(segments)
        if end is not None:
            self.last_speech = end
        return following, segments

    def _drop_hallucinations(
        self, segments: list[dict[str, Any]], seek: int, size: int, following: int, threshold: float
    ) -> int:
        """Drop the segments from the first one that looks hallucinated and stands between silences; where to go on."""
        offset, window_end = seek / FRAMES_PER_SECOND, (seek + self.decoder.window_frames) / FRAMES_PER_SECOND
        last_end = self.last_speech
        for i, segment in enumerate(segments):
            if not segment["words"]:
                continue
            if _is_anomalous(segment):
                later = _with_words(segments[i + 1 :])
                next_start = offset + size / FRAMES_PER_SECOND if later is None else later["words"][0]["start"]
                silence_before = (
                    segment["start"] - last_end > threshold
                    or segment["start"] < threshold
                    or segment["start"] - offset < 2.0
                )
                silence_after = (
                    next_start - segment["end"] > threshold or _is_anomalous(later) or window_end - segment["end"] < 2.0
                )
                if silence_before and silence_after:
                    following = round(max(offset + 1, segment["start"]) * FRAMES_PER_SECOND)
                    if self.recording.seconds - segment["end"] < threshold:
                        following = self.recording.frames
                    del segments[i:]
                    break
            last_end = segment["end"]
        return following


# -------------------------------------------------------------------------------------------------------- the front end


def _advance(streams: Sequence[_Stream], decoder: WindowDecoder, batch_size: int) -> Iterator[None]:
    """Run streams to their ends, `batch_size` of them at a time and in step; yields after every round of answers."""
    waiting = iter(streams)
    running: list[tuple[Generator[Any, Any, None], Any]] = []  # with what each is asking for

    def send(generator: Generator[Any, Any, None], answer: Any) -> None:
        with suppress(StopIteration):
            running.append((generator, generator.send(answer)))

    while True:
        while len(running) < batch_size and (stream := next(waiting, None)) is not None:
            send(stream.run(), None)
        if not running:
            return
        # Alignments first: they refer to windows just decoded, whose encodings can then be let go.
        kind = Alignment if any(isinstance(request, Alignment) for _, request in running) else Window
        asking = [(generator, request) for generator, request in running if isinstance(request, kind)]
        running = [(generator, request) for generator, request in running if not isinstance(request, kind)]
        requests: list[Any] = [request for _, request in asking]
        answers: Sequence[Any] = decoder.align(requests) if kind is Alignment else decoder.decode(requests)
        for (generator, _), answer in zip(asking, answers, strict=True):
            send(generator, answer)
        yield


def transcribe(
    model: Any,
    processor: Any,
    audio: Audio | Sequence[Audio],
    *,
    progress: Progress | None = None,
    on_segment: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Any:
    """Transcribe or translate recordings of any length.

    Args:
        model: a `WhisperForConditionalGeneration`.
        processor: its processor, or its tokenizer.
        audio: a file (path, bytes, open file), a 16 kHz waveform `(time,)`, or the consecutive blocks of one (any
            iterator, such as `audiozoo.audio.blocks(path)`); or a list of such recordings, for one batch.
        progress: called with the seconds of audio that are done and the seconds in all, whenever they change.
        on_segment: called with every segment as soon as it, and all before it, are certain.
        options: see `TranscriptionOptions`.

    Returns:
        A dictionary, or a list of them for a list of recordings, as `openai-whisper` writes it: `text`, `language`, and
        `segments`, each with `id`, `seek` (frames of 10 ms), `start` and `end` (seconds), `text`, `tokens`,
        `temperature`, `avg_logprob`, `compression_ratio`, `no_speech_prob` and, with `word_timestamps`, `words`, each
        with `word`, `start`, `end` and `probability`.

    Raises:
        UsageError: for an option, language or task that does not exist.
        AudioError: for audio that cannot be used.
    """
    several = isinstance(audio, (list, tuple))
    sources: Sequence[Any] = audio if several else [audio]  # type: ignore[assignment]
    chosen = TranscriptionOptions.of(options)
    tokenizer = getattr(processor, "tokenizer", processor)
    decoder = WindowDecoder(model, tokenizer, chosen)
    if chosen.language is not None or not tokenizer.multilingual:
        tokenizer.sot_sequence(chosen.language, chosen.task)  # an error comes before the work
    recordings = [Recording.of(source, model.config.num_mel_bins) for source in sources]
    _set_languages(recordings, decoder)

    streams: list[_Stream] = []
    owners: list[int] = []
    for owner, recording in enumerate(recordings):
        clips = chosen.clips(recording.frames)
        parts = [clips]
        if chosen.batch_size > 1:
            pieces = [
                piece
                for start, end in clips
                for piece in quiet_pieces(recording, start, min(end, recording.frames), decoder.window_frames)
            ]
            parts = [[piece] for piece in pieces]
        for i, part in enumerate(parts):
            last_speech = part[0][0] / FRAMES_PER_SECOND if i else 0.0
            streams.append(_Stream(recording, part, decoder, last_speech=last_speech))
            owners.append(owner)

    total = sum(recording.seconds for recording in recordings)
    told = -1.0
    segments: list[list[dict[str, Any]]] = [[] for _ in recordings]
    emitted = [0] * len(streams)
    batch = max(chosen.batch_size, len(sources)) if several else chosen.batch_size
    finished = 0  # streams that are over, and all before them
    rounds = _advance(streams, decoder, batch)
    over = False
    while not over:
        over = next(rounds, rounds) is rounds
        done = _seconds_done(streams, owners, recordings) if not over else total
        # Segments come out in the order of the recordings.
        while finished < len(streams):
            stream, own = streams[finished], segments[owners[finished]]
            for segment in stream.segments[emitted[finished] :]:
                own.append(segment | {"id": len(own)})
                if on_segment is not None:
                    on_segment(own[-1])
            emitted[finished] = len(stream.segments)
            if not over and stream.heard < min(stream.clips[-1][1], stream.recording.frames):
                break
            finished += 1
        if progress is not None and done > told:
            progress(done, total)
            told = done

    results = []
    for owner, recording in enumerate(recordings):
        tokens = [
            token for stream, o in zip(streams, owners, strict=True) if o == owner for token in stream.text_tokens()
        ]
        results.append({"text": tokenizer.decode(tokens), "segments": segments[owner], "language": recording.language})
    return results if several else results[0]


def _seconds_done(streams: Sequence[_Stream], owners: Sequence[int], recordings: Sequence[Recording]) -> float:
    """Seconds of audio behind the streams; a clip's skipped surroundings count as done once it is over."""
    done = 0.0
    for owner in range(len(recordings)):
        own = [stream for stream, o in zip(streams, owners, strict=True) if o == owner]
        for stream in own:
            start = stream.clips[0][0] if stream.clips else 0
            done += max(0, stream.heard - (0 if len(own) == 1 else start)) / FRAMES_PER_SECOND
    return done


def _set_languages(recordings: Sequence[Recording], decoder: WindowDecoder) -> None:
    """Set the language of each recording: the one asked for, or the most probable one in its first 30 s."""
    options, tokenizer = decoder.options, decoder.tokenizer
    if options.language is not None or not tokenizer.multilingual:
        languages = [options.language or "en"] * len(recordings)
    else:
        languages = [max(p, key=p.__getitem__) for p in _language_probabilities(recordings, decoder)]
    for recording, language in zip(recordings, languages, strict=True):
        recording.language = language
        recording.sot_sequence = tokenizer.sot_sequence(language, options.task)


def _language_probabilities(recordings: Sequence[Recording], decoder: WindowDecoder) -> list[dict[str, float]]:
    # One at a time: a batch would gain little, and here every recording may be the only one.
    found = []
    for recording in recordings:
        beginning = recording.features[:, : decoder.window_frames]
        found += decoder.language_probabilities(decoder.encode([beginning]))
    return found


def detect_language(model: Any, processor: Any, audio: Audio) -> dict[str, float]:
    """The probability of each language, by code, in the first 30 s of a recording (§2.3).

    Args:
        model: a multilingual `WhisperForConditionalGeneration`.
        processor: its processor, or its tokenizer.
        audio: as for `transcribe`.

    Raises:
        UsageError: for an English-only model.
    """
    decoder = WindowDecoder(model, getattr(processor, "tokenizer", processor), TranscriptionOptions())
    return _language_probabilities([Recording.of(audio, model.config.num_mel_bins)], decoder)[0]
