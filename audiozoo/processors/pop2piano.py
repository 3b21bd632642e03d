"""Pop2Piano's processor: a song's beat-aligned spectrograms, and notes to tokens and back to MIDI."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from audiozoo.audio import beats as tracking
from audiozoo.audio.features import hann_window, mel_filterbank
from audiozoo.audio.files import check_waveform, resample
from audiozoo.audio.midi import table_of
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    read_json,
    read_vocabulary,
    settings_of,
    write_json,
)

SPECIAL, NOTE, VELOCITY, TIME = "TOKEN_SPECIAL", "TOKEN_NOTE", "TOKEN_VELOCITY", "TOKEN_TIME"
KINDS = {SPECIAL: 4, NOTE: 128, VELOCITY: 2, TIME: 100}  # how many of each, in the order of their numbers
QUIETEST = 1e-6  # energy of silence, below which no band falls
STEPS_PER_BAR = 4  # half beats that a "bar" of num_bars has: two bars are eight of them


def vocabulary() -> dict[str, int]:
    """The released checkpoint's vocabulary: special tokens, notes, velocities, time shifts."""
    names = [f"{value}_{kind}" for kind, count in KINDS.items() for value in range(count)]
    return {name: index for index, name in enumerate(names)}


class Pop2PianoFeatureExtractor(FeatureExtractor):
    r"""Songs to segments of `num_bars` bars; the arguments are the fields of `preprocessor_config.json`.

    Beats are tracked, the half-beat times between them interpolated, and the song is cut every eight of those. Each
    segment, padded with silence to the longest, becomes $\ln \max(M |X|^2, 10^{-6})$.

    Args:
        sampling_rate: Hz that the model hears at.
        padding_value: of a batch of songs.
        window_size: samples under a frame.
        hop_length: samples between frames.
        min_frequency: lower edge of the lowest band, Hz.
        feature_size: mel bands.
        num_bars: bars of a segment, of four half beats each.
        tracker: of the beats; see `audiozoo.audio.beats`.
    """

    def __init__(
        self,
        sampling_rate: int = 22_050,
        padding_value: float = 0,
        window_size: int = 4096,
        hop_length: int = 1024,
        min_frequency: float = 10.0,
        feature_size: int = 512,
        num_bars: int = 2,
        tracker: str = "librosa",
    ) -> None:
        if min(sampling_rate, window_size, hop_length, feature_size, num_bars) < 1:
            raise CheckpointError("Pop2Piano's features need a rate, a window, a hop, bands and bars of at least 1.")
        self.sampling_rate = sampling_rate
        self.padding_value = padding_value
        self.window_size = window_size
        self.hop_length = hop_length
        self.min_frequency = min_frequency
        self.feature_size = feature_size
        self.num_bars = num_bars
        self.tracker = tracker

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Pop2PianoFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`; without, the released checkpoint's.

        Raises:
            SourceError: if there is no such directory.
            CheckpointError: if the files are another model's.
        """
        folder = Path(directory)
        return cls.of_settings(extractor_settings(folder) or {}, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {"processor_class": "Pop2PianoProcessor"}

    def log_mel(self, waveform: Float[np.ndarray, " time"]) -> Float[np.ndarray, "frames mels"]:
        """The spectrogram of one segment, in double precision; float32."""
        size, hop = self.window_size, self.hop_length
        padded = np.pad(np.asarray(waveform, np.float64), size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
        power = np.abs(np.fft.rfft(frames * hann_window(size))) ** 2
        filters = mel_filterbank(
            size // 2 + 1,
            self.feature_size,
            self.sampling_rate,
            f_min=self.min_frequency,
            f_max=float(self.sampling_rate // 2),
            scale="htk",
            norm=None,
        )
        return np.log(np.maximum(power @ filters, QUIETEST)).astype(np.float32)

    def segments(
        self, samples: np.ndarray, beat_times: np.ndarray, steps_per_beat: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One song at the model's rate: features `(segments, frames, mels)`, half-beat times, and those with more.

        The extrapolated times begin at 0 and go on for three bars after the end, for notes that hang over.
        """
        count = len(beat_times)
        steps = tracking.interpolated(beat_times, np.linspace(0, count, count * steps_per_beat + 1))
        begin, end = (int(steps[i] * self.sampling_rate) for i in (0, -1))
        samples, relative = samples[begin:end], steps - steps[0]
        more = (self.num_bars + 1) * STEPS_PER_BAR + 1
        extrapolated = tracking.interpolated(relative, np.arange(len(steps) + more, dtype=np.float64))
        stride = self.num_bars * STEPS_PER_BAR
        pieces = []
        for first in range(0, len(steps), stride):
            last = min(first + stride, len(steps))
            start, stop = (int(extrapolated[i] * self.sampling_rate) for i in (first, last))
            pieces.append((start, stop))
        longest = max(stop - start for start, stop in pieces)
        features = []
        for start, stop in pieces:
            piece = samples[start:stop]
            features.append(self.log_mel(np.pad(piece, (0, longest - len(piece)))))
        return np.stack(features), steps, extrapolated

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | Sequence[int] | None = None,
        steps_per_beat: int = 2,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        *,
        beats: Any = None,
    ) -> dict[str, np.ndarray]:
        """Segments of one song or of several.

        Args:
            audio: float waveform `(time,)`, or a list of them.
            sampling_rate: Hz of `audio`, one for all songs or one for each; other rates than the model's are resampled.
            steps_per_beat: time steps of a beat; the model writes half beats.
            return_attention_mask: also return which frames and times are a song's; always for several songs.
            return_tensors: "np" or `None`; results are NumPy arrays.
            beats: times of the beats in seconds, of each song if there are several; tracked where not given.

        Returns:
            `input_features` float32 `(segments, frames, feature_size)`, `beatsteps` and `extrapolated_beatstep`
            `(songs, times)` in seconds. For several songs, as in `transformers`, the segments of all follow each other,
            a row of zeros after each song's, with `attention_mask`, `attention_mask_beatsteps` and
            `attention_mask_extrapolated_beatstep`.

        Raises:
            AudioError: empty, not finite, integer, stereo, or without a beat.
            UsageError: without a sampling rate, or for beats that do not fit the songs.
        """
        check_return_tensors(return_tensors)
        several = isinstance(audio, list | tuple) and bool(audio) and np.ndim(audio[0]) > 0
        songs = list(audio) if several else [audio]
        if sampling_rate is None:
            raise UsageError("Pop2Piano needs the sampling_rate of the song, to find its beats.")
        if steps_per_beat < 1:
            raise UsageError(f"steps_per_beat is {steps_per_beat}; a beat has at least one, and two for this model.")
        rated: Any = sampling_rate
        rates = list(rated) if np.ndim(rated) else [rated] * len(songs)
        known = (list(beats) if several else [beats]) if beats is not None else [None] * len(songs)
        if len(rates) != len(songs) or len(known) != len(songs):
            raise UsageError(
                f"There are {len(songs)} songs, {len(rates)} sampling rates and {len(known)} lists of beats."
            )
        found = []
        for song, rate, times in zip(songs, rates, known, strict=True):
            waveform = check_waveform(song, rate, rate, minimum_samples=rate // 2)
            if times is None:
                times = tracking.beats(waveform, rate, self.tracker)
            times = np.asarray(times, np.float64)
            gaps = np.diff(times) * rate if times.ndim == 1 and np.isfinite(times).all() else np.zeros(1)
            if not len(gaps) or gaps.min() < 1 or times[0] < 0:  # in samples
                raise UsageError(
                    "The beats of a song are at least two times in seconds, from 0 on, each after the last."
                )
            if times[0] * rate >= len(waveform):
                raise UsageError(
                    f"The beats begin at {times[0]:.1f} s; the song is over after {len(waveform) / rate:.1f} s."
                )
            if gaps.max() > len(waveform):
                apart, length = gaps.max() / rate, len(waveform) / rate
                raise UsageError(f"Two beats are {apart:.1f} s apart; the song is over after {length:.1f} s.")
            samples = waveform if rate == self.sampling_rate else resample(waveform, rate, self.sampling_rate)
            found.append(self.segments(np.asarray(samples, np.float32), times, steps_per_beat))
        masked = several if return_attention_mask is None else return_attention_mask
        return _joined(found, masked or several, float(self.padding_value))


def _joined(
    songs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], separated: bool, padding: float
) -> dict[str, np.ndarray]:
    """Songs as one batch: segments one after the other, with a row of zeros after each song's if `separated`."""
    result: dict[str, np.ndarray] = {}
    frames = max(features.shape[1] for features, _, _ in songs)
    rows, masks = [], []
    for features, _, _ in songs:
        more = frames - features.shape[1]
        rows.append(np.pad(features, ((0, 0), (0, more), (0, 0)), constant_values=padding))
        masks.append(np.pad(np.ones(features.shape[:2], np.int64), ((0, 0), (0, more))))
        if separated:
            rows.append(np.zeros((1, frames, features.shape[2]), np.float32))
            masks.append(np.zeros((1, frames), np.int64))
    result["input_features"] = np.concatenate(rows).astype(np.float32)
    if separated:
        result["attention_mask"] = np.concatenate(masks)
    for index, name in ((1, "beatsteps"), (2, "extrapolated_beatstep")):
        longest = max(len(song[index]) for song in songs)
        values = [np.pad(song[index], (0, longest - len(song[index])), constant_values=padding) for song in songs]
        result[name] = np.stack(values).astype(np.float32)
        if separated:
            lengths = np.array([len(song[index]) for song in songs])
            result[f"attention_mask_{name}"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return result


class Pop2PianoTokenizer:
    """Notes to tokens and back. A note is `(onset, offset, pitch, velocity)`, times in half beats.

    Tokens are events in order: how many half beats have passed since the last event, then, where it changes, whether
    notes begin (velocity 1) or end (velocity 0), then their pitches.

    Args:
        vocab: number of each token, named as in `vocab.json`.
        default_velocity: of every note that is decoded.
        num_bars: bars of a segment.
    """

    def __init__(self, vocab: Mapping[str, int] | None = None, default_velocity: int = 77, num_bars: int = 2) -> None:
        self.encoder = dict(vocabulary() if vocab is None else vocab)
        self.decoder: dict[int, tuple[str, int]] = {}
        for name, number in self.encoder.items():
            value, _, kind = name.partition("_")
            if kind not in KINDS or not value.lstrip("-").isdigit():
                raise CheckpointError(f"The vocabulary has a token {name!r}, which is none of Pop2Piano's.")
            self.decoder[number] = (kind, int(value))
        self.default_velocity, self.num_bars = default_velocity, num_bars
        shifts = {value: number for number, (kind, value) in self.decoder.items() if kind == TIME}
        if 0 not in shifts:
            raise CheckpointError("The vocabulary has no token for time 0, on which Pop2Piano's others are built.")
        self.longest_shift, self.first_shift = max(shifts), shifts[0]

    pad_token_id, eos_token_id, bos_token_id = 0, 1, 2

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Pop2PianoTokenizer:
        """From `vocab.json` and `tokenizer_config.json`; without, the released checkpoint's."""
        folder = Path(directory)
        settings = folder / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        vocab = read_vocabulary(folder / "vocab.json") if (folder / "vocab.json").is_file() else None
        known: dict[str, Any] = {name: config[name] for name in ("default_velocity", "num_bars") if name in config}
        return cls(vocab, **settings_of(cls, known, settings))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `tokenizer_config.json` as `transformers` reads them."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", self.encoder)
        settings = {"default_velocity": self.default_velocity, "num_bars": self.num_bars}
        names = {"pad_token": "0", "eos_token": "1", "bos_token": "2", "unk_token": "-1"}
        write_json(folder / "tokenizer_config.json", settings | names | {"tokenizer_class": "Pop2PianoTokenizer"})

    def encode(
        self, notes: Any, offset: int = 0, *, add_eos: bool = False, relative: bool = True
    ) -> Int[np.ndarray, " tokens"]:
        """The tokens of notes.

        Args:
            notes: `(notes, 4)`: onset, offset, pitch, velocity; times are rounded to half beats, of which a note lasts
                one at least, as in the training data, and at most until its key is struck again.
            offset: the half beat at which the segment begins.
            add_eos: end with the end token, as labels do.
            relative: write the time since the last event, as the model was trained; `transformers` writes the time
                since the beginning, which its own decoder does not read back.

        Raises:
            UsageError: for notes that are not of that form, or begin before `offset`.
        """
        table = np.round(table_of(notes)).astype(int)
        if len(table) and (table[:, 0].min() < offset or (table[:, 1] < table[:, 0]).any()):
            raise UsageError(f"A note begins before the segment, at half beat {offset}, or ends before it begins.")
        table[:, 1] = np.maximum(table[:, 1], table[:, 0] + 1)
        for pitch in np.unique(table[:, 2]) if relative else ():
            of_key = table[:, 2] == pitch
            strikes = np.append(np.unique(table[of_key, 0]), table[:, 1].max())
            following = strikes[np.searchsorted(strikes, table[of_key, 0], side="right")]
            table[of_key, 1] = np.minimum(table[of_key, 1], following)
        events: dict[int, list[tuple[int, int]]] = {}
        for onset, end, pitch, velocity in table.tolist():
            events.setdefault(onset - offset, []).append((pitch, int(velocity > 0)))
            events.setdefault(end - offset, []).append((pitch, 0))
        tokens, now, loud = [], 0, 0
        for time in sorted(events):
            shift = time - now if relative else time
            if relative:
                now = time
                while shift > self.longest_shift:
                    tokens.append(self._number(TIME, self.longest_shift))
                    shift -= self.longest_shift
            tokens.append(self._number(TIME, shift))
            for pitch, velocity in events[time]:
                if velocity != loud:
                    loud = velocity
                    tokens.append(self._number(VELOCITY, velocity))
                tokens.append(self._number(NOTE, pitch))
        return np.array([*tokens, *([self.eos_token_id] if add_eos else [])], np.int64)

    def _number(self, kind: str, value: int) -> int:
        if f"{value}_{kind}" not in self.encoder:
            raise UsageError(f"The vocabulary has no token for {kind.removeprefix('TOKEN_').lower()} {value}.")
        return self.encoder[f"{value}_{kind}"]

    def decode(self, tokens: Any, start: int = 0, cutoff: int | None = None) -> Int[np.ndarray, "notes 4"]:
        """The notes of one segment's tokens, in order of onset.

        What sounds when the segment ends is ended by force. The end of a note that never began is passed over, as in
        the authors' code; `transformers` begins a note there. Numbers beyond the vocabulary's are longer shifts of
        time, as in the authors' code; `transformers` goes back by one half beat, and out of the song.

        Args:
            tokens: up to the end token, or all of them.
            start: the half beat at which the segment begins.
            cutoff: the half beat beyond which no event goes.
        """
        now, loud = start, 0
        sounding: dict[int, int] = {}
        notes = []
        for token in np.asarray(tokens).reshape(-1).tolist():
            kind, value = self.decoder.get(token, (TIME, max(token - self.first_shift, 0)))
            if kind == SPECIAL and value == 1:
                break
            if kind == TIME:
                now = max(now + value, 0) if cutoff is None else min(max(now + value, 0), cutoff)
            elif kind == VELOCITY:
                loud = value
            elif kind == NOTE and value in sounding:
                if sounding[value] < now:
                    notes.append((sounding[value], now, value, self.default_velocity))
                    if loud:
                        sounding[value] = now
                    else:
                        del sounding[value]
            elif kind == NOTE and loud:
                sounding[value] = now
        for pitch in sorted(sounding):
            last = sounding[pitch] + 1 if cutoff is None else max(cutoff, sounding[pitch] + 1)
            notes.append((sounding[pitch], max(now, last), pitch, self.default_velocity))
        table = np.array(notes, int).reshape(-1, 4)
        return table[np.argsort(table[:, 0] * 128 + table[:, 1], kind="stable")]

    def decode_segments(self, tokens: Int[np.ndarray, "segments tokens"]) -> Int[np.ndarray, "notes 4"]:
        """The notes of a whole song, each segment `num_bars` bars after the last; notes may hang over by one bar."""
        stride, hang = self.num_bars * STEPS_PER_BAR, (self.num_bars + 1) * STEPS_PER_BAR
        parts = [self.decode(row, index * stride, index * stride + hang) for index, row in enumerate(tokens)]
        return np.concatenate(parts) if parts else np.zeros((0, 4), int)

    def to_midi(self, notes: Int[np.ndarray, "notes 4"], times: Float[np.ndarray, " steps"], shift: float = 0.0) -> Any:
        """Notes as a `pretty_midi.PrettyMIDI` of one piano.

        Args:
            notes: `(onset, offset, pitch, velocity)`.
            times: seconds of each half beat.
            shift: seconds added to all.

        Raises:
            UsageError: without the package `pretty_midi`.
        """
        try:
            import pretty_midi
        except ImportError:
            raise UsageError("MIDI is written by the package pretty_midi; pip install pretty_midi.") from None
        midi = pretty_midi.PrettyMIDI(resolution=384, initial_tempo=120.0)
        piano = pretty_midi.Instrument(program=0)
        for onset, end, pitch, velocity in notes.tolist():
            begin, finish = float(times[onset]) + shift, float(times[min(end, len(times) - 1)]) + shift
            piano.notes.append(pretty_midi.Note(velocity=velocity, pitch=pitch, start=begin, end=finish))
        midi.instruments.append(piano)
        midi.remove_invalid_notes()
        return midi

    def batch_decode(
        self, token_ids: Any, feature_extractor_output: Mapping[str, Any], return_midi: bool = True
    ) -> dict[str, list[Any]]:
        """The MIDI of one song or of several.

        Args:
            token_ids: of every segment, `(segments, tokens)`, as `generate` returns them.
            feature_extractor_output: what the feature extractor gave, the masks included if there are several songs.
            return_midi: also return the MIDI objects.

        Returns:
            `notes`, all songs' `pretty_midi.Note`s, and `pretty_midi_objects`, one a song. Times are the song's.

        Raises:
            UsageError: for tokens that do not fit the features, or several songs without masks.
        """
        tokens = np.asarray(token_ids)
        steps = np.asarray(feature_extractor_output["beatsteps"], np.float64)
        times = np.asarray(feature_extractor_output["extrapolated_beatstep"], np.float64)
        mask = feature_extractor_output.get("attention_mask")
        if mask is None and len(steps) > 1:
            raise UsageError("Several songs need the masks of the feature extractor: return_attention_mask=True.")
        rows = -(-steps.shape[1] // (self.num_bars * STEPS_PER_BAR)) if mask is None else len(mask)
        if len(tokens) != rows:
            raise UsageError(f"There are tokens of {len(tokens)} segments and features of {rows}.")
        ends = [rows] if mask is None else np.flatnonzero(np.asarray(mask)[:, 0] == 0).tolist()
        if len(ends) != len(steps):
            raise UsageError(f"There are {len(ends)} songs in the mask and {len(steps)} in the beats.")
        midis, begin = [], 0
        for song, end in enumerate(ends):
            line = times[song]
            kept = feature_extractor_output.get("attention_mask_extrapolated_beatstep")
            if kept is not None:
                line = line[: int(np.asarray(kept)[song].sum())]
            midis.append(self.to_midi(self.decode_segments(tokens[begin:end]), line, shift=float(steps[song, 0])))
            begin = end + 1  # the row of zeros
        notes = [note for midi in midis for note in midi.instruments[0].notes]
        return {"notes": notes, "pretty_midi_objects": midis} if return_midi else {"notes": notes}


class Pop2PianoProcessor:
    """Feature extractor and tokenizer of one checkpoint, called as the `transformers` class is.

    Attributes:
        feature_extractor: songs to segments.
        tokenizer: notes to tokens and back.
    """

    def __init__(self, feature_extractor: Pop2PianoFeatureExtractor, tokenizer: Pop2PianoTokenizer) -> None:
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Pop2PianoProcessor:
        """From the files of a checkpoint directory."""
        features = Pop2PianoFeatureExtractor.from_directory(directory)
        return cls(features, Pop2PianoTokenizer.from_directory(directory))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        self.feature_extractor.save(directory)
        self.tokenizer.save(directory)

    def __call__(
        self,
        audio: Any = None,
        sampling_rate: int | Sequence[int] | None = None,
        *,
        notes: Any = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Model inputs of a song, tokens of notes, or both.

        Args:
            audio: see `Pop2PianoFeatureExtractor.__call__`, which takes `options` too.
            sampling_rate: Hz of `audio`.
            notes: see `Pop2PianoTokenizer.encode`.
            options: passed on with the audio.

        Raises:
            UsageError: without audio and notes, or for an option of audio that is not there.
        """
        if audio is None and notes is None:
            raise UsageError("Give the processor audio, notes, or both.")
        if audio is None and options:
            raise UsageError(f"{next(iter(options))!r} is an option of audio, and no audio was given.")
        result = {} if audio is None else self.feature_extractor(audio, sampling_rate, **options)
        if notes is not None:
            result["token_ids"] = self.tokenizer.encode(notes)
        return result

    def batch_decode(
        self, token_ids: Any, feature_extractor_output: Mapping[str, Any], return_midi: bool = True
    ) -> dict[str, list[Any]]:
        """See `Pop2PianoTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(token_ids, feature_extractor_output, return_midi)
