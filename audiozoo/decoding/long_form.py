r"""Transcription of recordings of any length with Whisper (paper §4.5, and what OpenAI's released code made of it).

The model hears 30 s at a time. A window is decoded, its timestamps cut it into segments, and the next window begins
where the last complete segment ended (**seeking**). Decoding that goes wrong shows in two numbers, the mean
log-probability of the tokens and how well the text compresses; it is then repeated at a higher **temperature**. The
**text so far** is the prompt of the next window. A window that the model takes for silence is passed over. **Word
times**, where wanted, come from `audiozoo.decoding.timestamps`. With `vad` it hears only where somebody is speaking,
by another network (`audiozoo.audio.speech`).

    recording ── log-mel of the whole ──> windows ──> encode ──> decode, again if need be ──> segments ──> words
                                             ^                                                   │
                                             └───────────────── seek, prompt ────────────────────┘

`transcribe` gives what `openai-whisper` gives, token for token, and its result has the same form. One choice differs by
default, see `TranscriptionOptions.padding`.

**Batches.** The loop above is a generator, which asks for windows to be decoded and gets results (`_Stream.run`).
Several of them advance together, their windows side by side in one batch: several recordings, or (with `batch_size`)
the pieces of a long one, cut where it is quiet. Temperature fallback is per window.

With `chunk_length_s` a recording is cut into chunks that overlap instead, and their texts are joined where they match:
see `audiozoo.decoding.overlaps`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import jax
import numpy as np
from jaxtyping import Float

from audiozoo.audio import files
from audiozoo.audio.features import WHISPER_CHUNK_SAMPLES, WHISPER_HOP, long_log_mel_spectrogram
from audiozoo.audio.speech import SpeechListener, SpeechOptions
from audiozoo.decoding import overlaps
from audiozoo.decoding.timestamps import (
    APPENDED,
    PREPENDED,
    SECONDS_PER_TIMESTAMP,
    WordTiming,
    add_words,
    merge_punctuation,
    word_timings,
)
from audiozoo.decoding.windows import (
    FRAMES_PER_SECOND,
    FRAMES_PER_TIMESTAMP,
    Alignment,
    Decoded,
    TranscriptionOptions,
    Window,
    WindowDecoder,
)
from audiozoo.errors import AudioError, UsageError

__all__ = ["Recording", "TranscriptionOptions", "align", "detect_language", "quiet_pieces", "transcribe"]

SHORTEST_FRAMES = 3  # the spectrogram looks through windows of 25 ms

Audio = str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | Iterable[np.ndarray]
Progress = Callable[[float, float], None]


# -------------------------------------------------------------------------------------------------------- the recording


@dataclasses.dataclass
class Recording:
    """The spectrogram of a whole recording, followed by 30 s of silence, and what is known about it."""

    features: Float[np.ndarray, "mels frames"]
    frames: int  # without the silence
    language: str = "en"
    sot_sequence: tuple[int, ...] = ()
    speech: list[tuple[int, int]] | None = None  # frames in which somebody is speaking, where that was asked

    @classmethod
    def of(cls, audio: Audio, mels: int, speech: SpeechOptions | None = None) -> Recording:
        """From a file, a 16 kHz waveform, or its consecutive blocks; the waveform of a file is never held whole.

        Args:
            audio: the recording.
            mels: bands of the spectrogram.
            speech: how to look for speech; by default it is not looked for.
        """
        source: Any
        if isinstance(audio, (str, os.PathLike, bytes)) or hasattr(audio, "read"):
            source = files.blocks(audio)  # type: ignore[arg-type]
        elif isinstance(audio, (np.ndarray, jax.Array)):
            source = files.check_waveform(audio)
        elif isinstance(audio, Iterable):
            source = (files.check_waveform(block) for block in audio)
        else:
            raise UsageError(
                f"A recording is a file, an array, or an iterator of arrays, not a {type(audio).__name__}; "
                "a list is a list of recordings."
            )
        listener = None if speech is None else SpeechListener(speech)
        if listener is not None:
            source = listener.passing([source] if isinstance(source, np.ndarray) else source)
        features = long_log_mel_spectrogram(source, mels, padding=WHISPER_CHUNK_SAMPLES)
        frames = features.shape[1] - WHISPER_CHUNK_SAMPLES // WHISPER_HOP
        if frames < SHORTEST_FRAMES:
            name = os.fspath(audio) if isinstance(audio, (str, os.PathLike)) else "The recording"
            raise AudioError(
                f"{name} lasts {frames / FRAMES_PER_SECOND:.2f} s: too short to hold speech "
                f"(at least {SHORTEST_FRAMES / FRAMES_PER_SECOND:.2f} s are needed)."
            )
        recording = cls(features, frames)
        if listener is not None:
            regions = listener.regions()
            recording.speech = [(round(a * FRAMES_PER_SECOND), round(b * FRAMES_PER_SECOND)) for a, b in regions]
        return recording

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.frames / FRAMES_PER_SECOND

    def clips(self, options: TranscriptionOptions) -> list[tuple[int, int]]:
        """Start and end of the parts to transcribe, in frames; where speech was looked for, those that hold it."""
        asked = options.clips(self.frames)
        if self.speech is None:
            return asked
        heard = ((max(a, start), min(b, end)) for a, b in asked for start, end in self.speech)
        return [(start, end) for start, end in heard if start < end]

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
    if end - start <= longest:
        return [(start, end)]
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
    """Whether the first words of a segment that has some look like a hallucination."""
    if segment is None:
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
        self.heard = min(clips[0][0], recording.frames) if clips else 0  # frames that are done
        self.ended = False  # after the last clip, which need not be the latest one
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

    def segment(self, seek: int, start: float, end: float, tokens: Sequence[int], result: Decoded) -> dict[str, Any]:
        """A segment as `openai-whisper` writes it."""
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
                segments.append(self.segment(seek, first, last, part, result))
            if complete:
                return segments, seek + size, True
            return segments, seek + (tokens[cuts[-1] - 1] - zero) * FRAMES_PER_TIMESTAMP, False
        duration = size / FRAMES_PER_SECOND
        stamps = [token for token in tokens if token >= zero]
        if stamps and stamps[-1] != zero:
            duration = (stamps[-1] - zero) * SECONDS_PER_TIMESTAMP
        return [self.segment(seek, offset, offset + duration, tokens, result)], seek + size, complete

    def initial_prompt(self) -> list[int]:
        """The tokens of the text before the recording."""
        text = self.options.initial_prompt
        return [] if text is None else self.tokenizer.encode_ordinary(" " + text.strip())

    def window(self, seek: int, size: int, previous: Sequence[int]) -> Window:
        """The request to decode `size` frames from `seek` on, after the `previous` text."""
        options, positions = self.options, self.decoder.config.max_target_positions
        prompt, start = self._prompt(previous)
        limit = min(options.sample_len or positions // 2, positions + 1 - len(prompt))
        if limit < 1:
            raise UsageError(
                f"The prompt has {len(prompt)} tokens, and this model has {positions} positions in all; "
                "give a shorter prefix."
            )
        features = self.recording.window(seek, size, self.decoder.width(size), options.padding)
        return Window(features, prompt, start, limit, seek)

    def run(self) -> Generator[Window | Alignment, Any, None]:
        """Ask for windows and alignments, one at a time, and collect segments from the answers."""
        recording, options = self.recording, self.options
        initial = self.initial_prompt()
        self.tokens, self.prompted = list(initial), len(initial)
        room = self.decoder.config.max_target_positions // 2 - 1 - len(initial)  # for text after the initial prompt
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
                result: Decoded = yield self.window(seek, size, previous)
                if self.is_silence(result):
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
        self.ended = True

    def is_silence(self, result: Decoded) -> bool:
        """Whether the model takes the window for silence."""
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
        with `word`, `start`, `end` and `probability`. With `chunk_length_s`, `tokens` are those of the text alone,
        `seek` and the numbers are those of the chunk in which a segment ends, and words and segments do not correct
        each other's times.

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
    speech = SpeechOptions.meant_by(chosen.vad)
    recordings = [Recording.of(source, model.config.num_mel_bins, speech) for source in sources]
    _set_languages(recordings, decoder)

    how = _transcribe if chosen.chunk_length_s is None else _transcribe_chunks
    results = how(recordings, decoder, progress, on_segment)
    return results if several else results[0]


def _transcribe(
    recordings: Sequence[Recording],
    decoder: WindowDecoder,
    progress: Progress | None = None,
    on_segment: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """`transcribe` for spectrograms whose languages are known."""
    chosen, tokenizer = decoder.options, decoder.tokenizer
    streams: list[_Stream] = []
    owners: list[int] = []
    for owner, recording in enumerate(recordings):
        clips = recording.clips(chosen)
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
    batch = max(chosen.batch_size, len(recordings))
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
            if not stream.ended:
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
    return results


def _transcribe_chunks(
    recordings: Sequence[Recording],
    decoder: WindowDecoder,
    progress: Progress | None = None,
    on_segment: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """`_transcribe` by chunks that overlap."""
    chosen = decoder.options
    size, left, right = (round(s * FRAMES_PER_SECOND) for s in (chosen.chunk_length_s or 0, *chosen.strides))
    if not left + right < size <= decoder.window_frames:
        raise UsageError(
            f"chunk_length_s={chosen.chunk_length_s} must be longer than its strides by 10 ms, and at most the "
            f"{decoder.window_frames / FRAMES_PER_SECOND:g} s that the model hears at once."
        )
    streams = [_Stream(recording, [], decoder) for recording in recordings]
    cuts = [
        [overlaps.cut(start, min(end, recording.frames), size, left, right) for start, end in recording.clips(chosen)]
        for recording in recordings
    ]
    windows = [
        (stream, chunk) for stream, clips in zip(streams, cuts, strict=True) for chunks in clips for chunk in chunks
    ]
    total = sum(recording.seconds for recording in recordings)

    def decoded() -> Iterator[tuple[Decoded, list[overlaps.Token]]]:
        batch = max(chosen.batch_size, len(recordings))
        for first in range(0, len(windows), batch):
            part = windows[first : first + batch]
            found = decoder.decode(
                [stream.window(chunk.start, chunk.size, stream.initial_prompt()) for stream, chunk in part]
            )
            yield from zip(found, _heard(part, found, decoder), strict=True)
            if progress is not None:
                progress(total * (first + len(part)) / len(windows), total)

    answers = decoded()
    results = []
    for stream, clips in zip(streams, cuts, strict=True):
        segments: list[dict[str, Any]] = []
        for chunks in clips:
            for segment in _joined(stream, chunks, answers):
                segments.append({"id": len(segments), **segment})
                if on_segment is not None:
                    on_segment(segments[-1])
        text = "".join(segment["text"] for segment in segments)
        results.append({"text": text, "segments": segments, "language": stream.recording.language})
    for _ in answers:  # to the end, for the last word on progress
        pass
    return results


def _heard(
    part: Sequence[tuple[_Stream, overlaps.Chunk]], found: Sequence[Decoded], decoder: WindowDecoder
) -> list[list[overlaps.Token]]:
    """The tokens of chunks, with their times where words are to be timed."""
    eot = decoder.tokenizer.eot
    tokens = [
        [] if stream.is_silence(result) else result.tokens for (stream, _), result in zip(part, found, strict=True)
    ]
    if not decoder.options.word_timestamps:
        return [[overlaps.Token(id) for id in ids] for ids in tokens]
    requests = [
        Alignment(
            result.audio,
            tuple(id for id in ids if id < eot),
            stream.recording.sot_sequence,
            chunk.size,
            stream.recording.language,
        )
        for (stream, chunk), result, ids in zip(part, found, tokens, strict=True)
    ]
    timed = []
    for (_, chunk), ids, (times, probabilities) in zip(part, tokens, decoder.align_tokens(requests), strict=True):
        frames = [chunk.start + round(time * FRAMES_PER_SECOND) for time in times.tolist()]
        spans = zip(frames, frames[1:], probabilities.tolist(), strict=False)
        timed.append([overlaps.Token(id, *next(spans)) if id < eot else overlaps.Token(id) for id in ids])
    return timed


def _joined(
    stream: _Stream,
    chunks: Sequence[overlaps.Chunk],
    answers: Iterator[tuple[Decoded, list[overlaps.Token]]],
) -> Iterator[dict[str, Any]]:
    """The segments of chunks, as soon as enough answers are there."""
    result: Decoded  # of the chunk heard last; that is where a piece ends

    def heard() -> Iterator[tuple[overlaps.Chunk, list[overlaps.Token]]]:
        nonlocal result
        for chunk in chunks:
            result, tokens = next(answers)
            yield chunk, tokens

    before = chunks[0].start if chunks else 0
    for piece in overlaps.join(heard(), stream.tokenizer.timestamp_begin):
        chunk = chunks[piece.chunk]
        start = before if piece.start is None else piece.start
        before = chunk.start + chunk.size if piece.end is None else piece.end
        times = start / FRAMES_PER_SECOND, before / FRAMES_PER_SECOND
        segment = stream.segment(chunk.start, *times, [token.id for token in piece.tokens], result)
        if stream.options.word_timestamps:
            segment["words"] = _words(stream, piece.tokens)
        yield segment


def _words(stream: _Stream, tokens: Sequence[overlaps.Token]) -> list[dict[str, Any]]:
    """The words of a joined text, at the times of their tokens."""
    tokenizer, options = stream.tokenizer, stream.options
    text = [token for token in tokens if token.id < tokenizer.eot]
    words, parts = tokenizer.split_to_word_tokens(
        [*(token.id for token in text), tokenizer.eot], stream.recording.language
    )
    starts, ends = (np.array([token[i] for token in text]) / FRAMES_PER_SECOND for i in (1, 2))
    timings = word_timings(words, parts, starts, ends, np.array([token.probability for token in text]))
    merge_punctuation(timings, options.prepend_punctuations, options.append_punctuations)
    return [timing.written(0.0) for timing in timings if timing.word]


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
    """Set the language of each recording: the one asked for, or the most probable one in its first 30 s (of speech)."""
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
        start = recording.speech[0][0] if recording.speech else 0
        beginning = recording.features[:, start : start + decoder.width(recording.frames - start)]
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


def align(model: Any, processor: Any, audio: Audio, text: str, **options: Any) -> list[dict[str, Any]]:
    """When are the words of a known text said? Word times of `text` in `audio`, of any length.

    Up to 30 s the text is read against the audio in one pass (cross-attention and dynamic time warping, see
    `audiozoo.decoding.timestamps`). A longer recording is transcribed first, only to learn which part of the text
    belongs to which 30 s: the words that were heard as they are written anchor the others.

    Args:
        model: a `WhisperForConditionalGeneration`.
        processor: its processor, or its tokenizer.
        audio: as for `transcribe`.
        text: what is said.
        options: see `TranscriptionOptions`: `language`, `task` (of the text: its translation can be aligned too),
            `batch_size`, and what bears on the first transcription.

    Returns:
        A dictionary for each word: `word`, `start` and `end` (seconds), `probability`.

    Raises:
        UsageError: for an empty text, or one too long for 30 s.
    """
    chosen = TranscriptionOptions.of(options)
    tokenizer = getattr(processor, "tokenizer", processor)
    decoder = WindowDecoder(model, tokenizer, chosen)
    recording = Recording.of(audio, model.config.num_mel_bins, SpeechOptions.meant_by(chosen.vad))
    _set_languages([recording], decoder)
    if not text.strip():
        raise UsageError("There is no text to align.")
    ids = tokenizer.encode_ordinary(" " + text.strip())
    words, groups = tokenizer.split_to_word_tokens(ids, recording.language)
    pieces = quiet_pieces(recording, 0, recording.frames, decoder.window_frames)
    owner = np.zeros(len(words), int)
    if len(pieces) > 1:
        wanted = {"word_timestamps": True, "language": recording.language if tokenizer.multilingual else None}
        wanted |= {"chunk_length_s": None, "stride_length_s": None}
        heard = [
            word
            for segment in _transcribe([recording], decoder.with_options(**wanted))[0]["segments"]
            for word in segment["words"]
        ]
        ends = [end / FRAMES_PER_SECOND for _, end in pieces[:-1]]
        owner = np.searchsorted(ends, _anchor(words, heard, recording.seconds), side="right")

    found: list[dict[str, Any]] = []
    for first in range(0, len(pieces), chosen.batch_size):
        part = [
            (start, end, [token for i in np.flatnonzero(owner == k) for token in groups[i]])
            for k, (start, end) in enumerate(pieces[first : first + chosen.batch_size], start=first)
        ]
        part = [piece for piece in part if piece[2]]
        if not part:
            continue
        width = decoder.width(max(end - start for start, end, _ in part))
        features = [recording.window(start, end - start, width, "silence") for start, end, _ in part]
        requests = [
            Alignment(encoded, tuple(tokens), recording.sot_sequence, end - start, recording.language)
            for encoded, (start, end, tokens) in zip(decoder.encode(features), part, strict=True)
        ]
        for (start, _, _), timings in zip(part, decoder.align(requests), strict=True):
            merge_punctuation(timings, chosen.prepend_punctuations, chosen.append_punctuations)
            offset = start / FRAMES_PER_SECOND
            found += [timing.written(offset) for timing in timings if timing.word]
    return found


def _anchor(words: Sequence[str], heard: Sequence[Mapping[str, Any]], seconds: float) -> Float[np.ndarray, " words"]:
    """About when each word is said: when the same word was heard, or between such words."""

    def key(word: str, index: int) -> str:
        letters = "".join(letter for letter in word.lower() if letter.isalnum())
        return letters or f"\0{index}"  # punctuation alone is like nothing else

    written = [key(word, i) for i, word in enumerate(words)]
    spoken = [key(word["word"], -1 - i) for i, word in enumerate(heard)]
    matcher = difflib.SequenceMatcher(None, written, spoken, autojunk=False)
    anchors = {-1: 0.0, len(words): seconds}
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            word = heard[block.b + i]
            anchors[block.a + i] = (word["start"] + word["end"]) / 2
    places = sorted(anchors)
    return np.interp(np.arange(len(words)), places, np.maximum.accumulate([anchors[place] for place in places]))
