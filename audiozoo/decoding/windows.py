r"""One window of Whisper: what is asked of the model, and the compiled functions that answer (paper §2.3, §4.5).

Three functions are compiled for a model: one encodes windows, one decodes (prompt and loop in one call; the host sees
nothing before the last token), one aligns tokens with frames. Prompts are padded on the left to a few lengths, batches
to powers of two, so that neither another prompt nor another batch compiles anew. The weights are arguments.

`WindowDecoder.decode` also repeats a decoding that went wrong at the next temperature, for each window of a batch by
itself. The loop over windows is in `audiozoo.decoding.long_form`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from audiozoo.audio.speech import SpeechOptions
from audiozoo.decoding.cache import Growing, Shared
from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.generate import generate
from audiozoo.decoding.timestamps import (
    APPENDED,
    PREPENDED,
    SECONDS_PER_TIMESTAMP,
    TimestampRules,
    WordTiming,
    alignment_matrix,
    token_times,
    word_timings,
)
from audiozoo.errors import UsageError, check_names
from audiozoo.layers import KeyValues, check_ids
from audiozoo.layers.basic import at_least_float32
from audiozoo.text.whisper_tokenizer import language_code

FRAMES_PER_SECOND = 100  # of the log-mel spectrogram
FRAMES_PER_TIMESTAMP = 2
_SHORT_FRAMES = 500  # with `allow_short`, windows last multiples of 5 s
_PROMPT_LENGTHS = (8, 64, 256, 448)
_ALIGNMENT_LENGTHS = (32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class TranscriptionOptions:
    """What a user may ask of `transcribe`: the names and defaults of `openai-whisper`, and below them our own.

    The search that a checkpoint's `generation_config.json` asks for (`num_beams`, `repetition_penalty`, …) is left to
    `generate`. OpenAI's procedure has other remedies: what repeats itself is decoded again at the next temperature. And
    its `length_penalty` is another formula under the same name.
    """

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
    batch_size: int = 1  # windows decoded together; above 1, a recording is cut into pieces with prompts of their own
    # Instead of seeking, cut the recording into chunks that overlap (`audiozoo.decoding.overlaps`), as the pipeline of
    # `transformers` does under these names. With temperature=0 and no_speech_threshold=None the texts are those of the
    # pipeline with num_beams=1 and force_unique_generate_call=True, had it the same spectrogram: its own is one of each
    # chunk, ours one of the whole recording. With word_timestamps the texts are those of return_timestamps="word".
    chunk_length_s: float | None = None  # s, at most 30
    stride_length_s: float | tuple[float, float] | None = None  # s shared with the chunk before and after; a sixth each
    # Hear only where somebody is speaking, and so write nothing in long silences and noises: True, or what differs from
    # the defaults of `audiozoo.audio.speech.SpeechOptions`. Times stay those of the whole recording.
    # Each region is heard in windows of its own: where pauses are many, a longer min_silence_s or a batch saves time.
    vad: bool | Mapping[str, float] = False
    seed: int = 0  # of the sampling at temperatures above 0
    # Encode what is shorter than 30 s in a window of 5, 10 … s: faster, but only the recipe `whisper_short` trains so.
    allow_short: bool = False

    def __post_init__(self) -> None:
        def require(holds: bool, sentence: str) -> None:
            if not holds:
                raise UsageError(sentence)

        given = self.temperature
        with suppress(TypeError, ValueError):
            temperatures = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
            object.__setattr__(self, "temperature", tuple(float(t) for t in temperatures))
        require(
            isinstance(self.temperature, tuple)
            and bool(self.temperature)
            and all(0 <= t < math.inf for t in self.temperature),
            f"temperature={given} must be one or more numbers of at least 0.",
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
        chunk = self.chunk_length_s
        require(chunk is not None or self.stride_length_s is None, "stride_length_s needs a chunk_length_s.")
        if chunk is not None:
            require(
                self.hallucination_silence_threshold is None,
                "hallucination_silence_threshold hears windows again, chunks are heard once; leave chunk_length_s out.",
            )
            fits = False
            with suppress(TypeError, ValueError):
                left, right = self.strides
                fits = min(left, right) >= 0 and left + right < chunk < math.inf
            require(
                fits,
                f"chunk_length_s={chunk} must be longer than its two strides, stride_length_s={self.stride_length_s}.",
            )
        latest = self.max_initial_timestamp
        require(latest is None or latest >= 0, f"max_initial_timestamp={latest} must be at least 0.")
        require(-(2**31) <= self.seed < 2**31, f"seed={self.seed} must be a number of 32 bits.")
        self.clips(0)
        SpeechOptions.meant_by(self.vad)
        if self.language is not None:
            object.__setattr__(self, "language", language_code(self.language))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TranscriptionOptions:
        """From keyword arguments; an unknown name is an error that says the nearest one."""
        check_names(options, [field.name for field in dataclasses.fields(cls)], "transcribe has no option '{}'")
        return cls(**options)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures to try, in order."""
        assert isinstance(self.temperature, tuple)
        return self.temperature

    @property
    def strides(self) -> tuple[float, float]:
        """Seconds that a chunk shares with the one before and with the one after."""
        given = self.stride_length_s
        if given is None:
            given = (self.chunk_length_s or 0.0) / 6
        return (given, given) if isinstance(given, (int, float)) else given

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
        if not all(0 <= point < math.inf for point in points):
            raise UsageError(f"clip_timestamps={self.clip_timestamps!r} must be seconds of at least 0.")
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


def short_window(frames: int, most: int) -> int:
    """The frames of the window in which `frames` are heard with `allow_short`; `most` are those of 30 s."""
    return min(most, -(-frames // _SHORT_FRAMES) * _SHORT_FRAMES)


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
        self.align = jax.jit(self._align, static_argnames=("heads", "width", "text_end"))

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
        return jax.nn.softmax(at_least_float32(model.head(hidden)[:, 0, np.asarray(tokens)]), axis=-1)

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
        logits = at_least_float32(logits)
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
        width: int,
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
            width: of the median filter.
            text_end: smaller ids are text.
        """
        model = nnx.merge(self._graphdef, state)
        output = model.model.decoder(tokens, past_key_values=_with_room(cache, tokens.shape[1]), output_attentions=True)
        weights = jnp.stack([output.cross_attentions[layer][:, head] for layer, head in heads], axis=1)
        weights = at_least_float32(weights)
        matrices = jax.vmap(partial(alignment_matrix, width=width))(weights, count, frames)
        logits = at_least_float32(model.head(output.last_hidden_state[:, :-1])[..., :text_end])
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

    def key(seed: Array, sample: Array) -> Array:
        made = jax.random.key(seed[0])
        for part in (seed[1], seed[2], sample):
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

    def with_options(self, **changes: Any) -> WindowDecoder:
        """The same model with some options changed."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, **changes)
        return other

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

    def width(self, frames: int) -> int:
        """The frames of the window in which `frames` are heard: those of 30 s, unless shorter ones are wanted."""
        return short_window(frames, self.window_frames) if self.options.allow_short else self.window_frames

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
        length = min(length, self.config.max_target_positions)
        prompt = np.full((rows, length), tokens.eot, np.int32)
        for line, window in zip(prompt, windows, strict=True):
            line[length - len(window.prompt) :] = window.prompt
        check_ids(prompt, self.config.vocab_size)
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
                temperature,
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
        options, tokens, positions = self.options, self.tokenizer, self.config.max_target_positions
        common: dict[str, Any] = {
            "max_new_tokens": min(options.sample_len or positions // 2, positions),
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

    def align(self, requests: Sequence[Alignment]) -> list[list[WordTiming]]:
        """The words of texts that are said in encoded windows, with times from the start of the window."""
        eot = self.tokenizer.eot
        answers = []
        for request, (times, probabilities) in zip(requests, self.align_tokens(requests), strict=True):
            words, parts = self.tokenizer.split_to_word_tokens([*request.text_tokens, eot], request.language)
            answers.append(word_timings(words, parts, times[:-1], times[1:], probabilities))
        return answers

    def align_tokens(self, requests: Sequence[Alignment]) -> list[tuple[np.ndarray, np.ndarray]]:
        """When each token begins, in seconds from the start of the window, and after them all when the last one ends;
        and each token's probability.
        """
        tokens, width = self.tokenizer, self.config.median_filter_width
        if not self.ids.alignment_heads:
            raise UsageError("The generation_config of this model names no alignment_heads, which words are timed by.")
        if width < 1 or width % 2 == 0:
            raise UsageError(f"This model's median_filter_width is {width}; it must be an odd number of frames.")
        answers = [(np.zeros(1), np.zeros(0)) for _ in requests]
        wanted = [i for i, r in enumerate(requests) if r.text_tokens]
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
                count[row], frames[row] = len(sequences[row]), max(1, requests[i].frames // FRAMES_PER_TIMESTAMP)
            matrices, probabilities = jax.device_get(
                self.programs.align(
                    self.state,
                    cache,
                    batch,
                    count,
                    frames,
                    heads=self.ids.alignment_heads,
                    width=width,
                    text_end=tokens.eot,
                )
            )
            for row, i in enumerate(group):
                begin, end = len(requests[i].sot_sequence), len(sequences[row]) - 1
                times = token_times(matrices[row, begin:end, : frames[row]])
                answers[i] = times, probabilities[row, begin : end - 1]
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
