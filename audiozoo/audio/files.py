"""Sound files in and out: any container that libsndfile knows, any rate, any number of channels.

libsndfile (through `soundfile`) reads wav, flac, ogg (Vorbis, Opus) and mp3. What it does not know (m4a, aac, webm,
mp4, chained ogg …) is handed to `av`, whose wheels carry FFmpeg's libraries, if that package is installed. Samples are
floats in $[-1, 1]$. Rates are converted by soxr at its "HQ" quality, all at once (`read`) or as a stream (`blocks`),
with the same result.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike

from audiozoo.audio.streams import LOWEST_RATE, read_wav_header
from audiozoo.errors import AudioError, SourceError, UsageError

Source = str | os.PathLike[str] | bytes | BinaryIO
"""A path, `"-"` for standard input, the file's bytes, or an open binary file."""

# How the names of sound files end, for whoever looks for them; what is named is read whatever its name is.
SUFFIXES: tuple[str, ...] = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".aif", ".aiff")
SUFFIXES += (".au", ".caf", ".amr", ".wma", ".webm")

_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz
_DECODE_FRAMES = 1 << 16  # frames decoded at a time
_UNKNOWN_FRAMES = (1 << 63) - 1  # libsndfile's number for a FLAC file whose writer did not know
_SEVERAL_FRAMES = 4096  # bytes; an MP3 frame has 1441 at most


@dataclass(frozen=True)
class AudioInfo:
    """What a sound file's header says."""

    sampling_rate: int  # Hz
    channels: int
    seconds: float
    format: str  # container and coding, such as "FLAC/PCM_24"


class _FromFrontToBack(soundfile.SoundFile):
    """Read without `soundfile`'s seek after each block, which a FLAC file of unknown length does not survive."""

    def seekable(self) -> bool:
        return False


@dataclass
class _Decoder:
    """An open sound file: its header, and its samples as a stream of float32 `(frames, channels)`."""

    name: str
    info: AudioInfo
    chunks: Iterator[np.ndarray]


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return f"The given {len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        return "Standard input" if os.fspath(source) == "-" else f"'{os.fspath(source)}'"
    return f"'{source.name}'" if isinstance(getattr(source, "name", None), str) else "The given file object"


def _seekable(source: Source, name: str) -> str | io.BytesIO | BinaryIO:
    """Something that libsndfile can seek in; streams that cannot seek are read into memory."""
    if isinstance(source, bytes):
        content: str | io.BytesIO | BinaryIO = io.BytesIO(source)
        empty = not source
    elif isinstance(source, str | os.PathLike):
        if os.fspath(source) == "-":
            return _seekable(sys.stdin.buffer.read(), name)
        path = Path(source)
        if not os.path.exists(path):
            raise SourceError(f"There is no file {name}.")
        if path.is_dir():
            raise SourceError(f"{name} is a directory; name a sound file inside it.")
        if not path.is_file():  # a named pipe
            return _seekable(path.read_bytes(), name)
        content, empty = str(path), path.stat().st_size == 0
    elif not hasattr(source, "read"):
        raise UsageError(
            f"Cannot read audio from an object of type {type(source).__name__}; "
            "give a path, bytes or an open binary file."
        )
    elif not (hasattr(source, "seekable") and source.seekable()):
        return _seekable(source.read(), name)
    else:
        content = source
        here = source.tell()
        empty = source.seek(0, os.SEEK_END) == here
        source.seek(here)
    if empty:
        raise AudioError(f"{name} is empty (0 bytes); expected a sound file.")
    return content


def _is_chained_ogg(content: str | io.BytesIO | BinaryIO) -> bool:
    """Whether a file is several Ogg streams one after the other, of which libsndfile reads the first alone."""
    if isinstance(content, str):
        with open(content, "rb") as file:
            return _is_chained_ogg(file)
    here, begun = content.tell(), False
    try:
        while len(page := content.read(27)) == 27 and page.startswith(b"OggS"):
            begins = bool(page[5] & 2)
            if begins and begun:
                return True
            begun = begun or not begins
            content.seek(sum(content.read(page[26])), os.SEEK_CUR)
        return False
    finally:
        content.seek(here)


@contextmanager
def _open(source: Source) -> Iterator[_Decoder]:
    """Open a file by libsndfile, or by `av` what that cannot read; seconds are `inf` where no header tells them."""
    name = _name(source)
    content = _seekable(source, name)
    try:
        chained = _is_chained_ogg(content)
    except OSError as problem:
        raise SourceError(f"{name} cannot be read: {problem.strerror or problem}.") from None
    file, reason = None, "it is several Ogg streams in one file"
    if not chained:
        try:
            # A file's name is bytes, which need be no letters; on Windows it is letters.
            named = isinstance(content, str) and sys.platform != "win32"
            file = _FromFrontToBack(os.fsencode(str(content)) if named else content)
        except soundfile.LibsndfileError as problem:
            reason = str(problem.error_string)
            if not isinstance(content, str):
                content.seek(0)
    opened = _open_with_av(content, name, reason) if file is None else _open_with_libsndfile(file, name, content)
    with opened as decoder:
        if chained:
            decoder.info = replace(decoder.info, seconds=math.inf)
        if decoder.info.sampling_rate < LOWEST_RATE:
            raise AudioError(f"{name} says that it is at {decoder.info.sampling_rate} Hz; its header is damaged.")
        yield decoder


@contextmanager
def _open_with_libsndfile(
    file: soundfile.SoundFile, name: str, content: str | io.BytesIO | BinaryIO
) -> Iterator[_Decoder]:
    with file:
        known, chunks = file.frames != _UNKNOWN_FRAMES, _sndfile_chunks(file, name)
        if not file.frames and file.format in ("WAV", "WAVEX"):
            known, chunks = False, _unfinished_chunks(content)
        elif file.format == "MP3" and (rest := _behind_first_mp3(content)):
            known, chunks = False, itertools.chain(chunks, _joined_chunks(rest, file, name))
        seconds = file.frames / file.samplerate if known else math.inf
        info = AudioInfo(file.samplerate, file.channels, seconds, f"{file.format}/{file.subtype}")
        yield _Decoder(name, info, chunks)


def _sndfile_chunks(file: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    while True:
        try:
            chunk = file.read(_DECODE_FRAMES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as problem:
            raise AudioError(f"{name} is damaged: {problem.error_string}") from None
        if not len(chunk):
            return
        yield chunk


def _unfinished_chunks(content: str | io.BytesIO | BinaryIO) -> Iterator[np.ndarray]:
    """All that follows the header of a WAV file whose writer did not come back to say how much it is."""
    if isinstance(content, str):
        with open(content, "rb") as file:
            yield from _unfinished_chunks(file)
        return
    size = content.seek(0, os.SEEK_END)
    content.seek(4)
    if struct.unpack("<I", content.read(4)) == (size - 8,):  # it is finished, and empty
        return
    content.seek(0)
    layout, _ = read_wav_header(content)
    while len(samples := layout.samples(content.read(_DECODE_FRAMES * layout.frame))):
        yield samples


def _behind_first_mp3(content: str | io.BytesIO | BinaryIO) -> bytes:
    """What follows the frames that the Xing header in the first one counts, where libsndfile stops; if it is MP3."""
    if isinstance(content, str):
        with open(content, "rb") as file:
            return _behind_first_mp3(file)
    here = content.tell()
    try:
        content.seek(0)
        start, tag = 0, content.read(10)
        if tag.startswith(b"ID3") and len(tag) == 10:
            start = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(tag[6:])))
        content.seek(start)
        first = content.read(64)
        place = max(first.find(b"Xing"), first.find(b"Info"))
        if place < 0 or len(first) < 64:
            return b""
        flags, *numbers = struct.unpack_from(">3I", first, place + 4)  # of frames with flag 1, of bytes with flag 2
        if not flags & 2:
            return b""
        content.seek(start + numbers[flags & 1])
        rest = content.read(_SEVERAL_FRAMES)
        after = rest[128:] if rest.startswith(b"TAG") else rest  # ID3v1
        begins = after.startswith(b"ID3") or (after[:1] == b"\xff" and after[1:2] >= b"\xe0")
        return after + content.read() if begins and len(rest) == _SEVERAL_FRAMES else b""
    finally:
        content.seek(here)


def _joined_chunks(rest: bytes, first: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    """The samples of MP3 files that follow the first."""
    while rest:
        content = io.BytesIO(rest)
        try:
            file = _FromFrontToBack(content)
        except soundfile.LibsndfileError:  # frames by chance
            return
        with file:
            if (file.samplerate, file.channels) != (first.samplerate, first.channels):
                raise AudioError(
                    f"{name} is several MP3 files in one: one of {first.channels} channels at {first.samplerate} Hz, "
                    f"another of {file.channels} at {file.samplerate} Hz; separate them."
                )
            rest = _behind_first_mp3(content)
            yield from _sndfile_chunks(file, name)


@contextmanager
def _open_with_av(content: Any, name: str, reason: str) -> Iterator[_Decoder]:
    try:
        import av
    except ImportError:
        raise AudioError(
            f"{name} is not a sound file that libsndfile can read ({reason.rstrip('.')}); convert it to wav or flac, "
            "or install the package `av`, which reads m4a, aac, webm and the like."
        ) from None
    try:
        container = av.open(content)
    except (av.FFmpegError, ValueError):
        raise AudioError(
            f"{name} is not a sound file: neither libsndfile nor FFmpeg recognises it ({reason.rstrip('.')})."
        ) from None
    with container:
        if not container.streams.audio:
            raise AudioError(f"{name} holds no audio stream.")
        stream = container.streams.audio[0]
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = container.duration / av.time_base if container.duration else math.inf
        form = f"{container.format.name.upper()}/{stream.codec_context.name.upper()}"
        info = AudioInfo(int(stream.rate), int(stream.channels), seconds, form)
        yield _Decoder(name, info, _av_chunks(container, stream, name))


def _av_chunks(container: Any, stream: Any, name: str) -> Iterator[np.ndarray]:
    import av

    to_float = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
    try:
        for frame in container.decode(stream):
            for piece in to_float.resample(frame):
                yield piece.to_ndarray().T
        for piece in to_float.resample(None):
            yield piece.to_ndarray().T
    except av.FFmpegError as problem:
        raise AudioError(f"{name} is damaged: {problem.strerror}.") from None


def _check_finite(chunk: np.ndarray, start: int, rate: int, name: str) -> None:
    if not np.isfinite(chunk).all():
        first = start + int(np.argmin(np.isfinite(chunk).all(axis=1)))
        raise AudioError(f"{name} holds NaN or infinite samples, the first at {first / rate:.3f} s.")


def read(source: Source, sampling_rate: int | None = 16_000, mono: bool = True) -> np.ndarray:
    """A whole sound file as float32 samples.

    Args:
        source: path, `"-"` (standard input), bytes, or open binary file.
        sampling_rate: Hz to resample to; `None` keeps the file's rate (see `info`).
        mono: average the channels.

    Returns:
        float32 `(time,)`, or `(channels, time)` if not `mono`.

    Raises:
        SourceError: there is no such file.
        AudioError: not audio, damaged, without samples, or with samples that are not finite.
    """
    with _open(source) as decoder:
        rate = decoder.info.sampling_rate
        chunks, frames = [], 0
        for chunk in decoder.chunks:
            _check_finite(chunk, frames, rate, decoder.name)
            frames += len(chunk)
            chunks.append(chunk.mean(axis=1, keepdims=True) if mono else chunk)
        if not frames:
            raise AudioError(f"{decoder.name} holds no samples.")
    samples = np.concatenate(chunks)
    if sampling_rate is not None:
        samples = resample(samples, rate, sampling_rate, axis=0)
    return np.ascontiguousarray(samples[:, 0] if mono else samples.T, dtype=np.float32)


def blocks(
    source: Source, sampling_rate: int | None = 16_000, seconds: float = 30.0, mono: bool = True
) -> Iterator[np.ndarray]:
    """The samples of `read`, as consecutive blocks of `seconds`, in memory that does not grow with the file.

    Yields:
        float32 `(time,)` (or `(channels, time)`) with `round(seconds * sampling_rate)` samples; the last block may be
        shorter. Errors are those of `read`.
    """
    with _open(source) as decoder:
        native = decoder.info.sampling_rate
        target = native if sampling_rate is None else sampling_rate
        size = round(seconds * target)
        if size < 1:
            raise UsageError(f"A block of {seconds} s holds no sample at {target} Hz; ask for longer blocks.")
        channels = 1 if mono else decoder.info.channels
        stream = None if target == native else soxr.ResampleStream(native, target, channels, dtype="float32")
        waiting: list[np.ndarray] = []
        ready = 0

        def cut(final: bool) -> Iterator[np.ndarray]:
            nonlocal waiting, ready
            if ready < size and not final:
                return
            samples = np.concatenate(waiting) if waiting else np.zeros((0, channels), np.float32)
            whole = len(samples) // size * size
            for start in range(0, len(samples) if final else whole, size):
                block = samples[start : start + size]
                yield np.ascontiguousarray(block[:, 0] if mono else block.T)
            waiting = [samples[whole:].copy()]
            ready = len(samples) - whole

        frames = 0
        for chunk in decoder.chunks:
            _check_finite(chunk, frames, native, decoder.name)
            frames += len(chunk)
            samples = chunk.mean(axis=1, keepdims=True) if mono else chunk
            if stream is not None:
                samples = stream.resample_chunk(np.ascontiguousarray(samples)).reshape(-1, channels)
            waiting.append(samples)
            ready += len(samples)
            yield from cut(final=False)
        if not frames:
            raise AudioError(f"{decoder.name} holds no samples.")
        if stream is not None:
            waiting.append(stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).reshape(-1, channels))
        yield from cut(final=True)


def info(source: Source) -> AudioInfo:
    """Rate, channels, length and coding of a sound file, from its header (of mp3, the length to 0.03 s).

    Where the header does not tell the length, as in what was written to a pipe, the samples are counted.
    """
    with _open(source) as decoder:
        header = decoder.info
        if math.isinf(header.seconds):
            return replace(header, seconds=sum(map(len, decoder.chunks)) / header.sampling_rate)
        return header


def in_channels(waveform: np.ndarray, channels: int) -> np.ndarray:
    """A recording, `(time,)` or `(channels, time)`, in as many channels as a model has: mono is the same in all."""
    rows = np.atleast_2d(waveform)[:channels]
    return np.repeat(rows[:1], channels, axis=0) if len(rows) < channels else rows


def resample(waveform: ArrayLike, from_rate: int, to_rate: int, axis: int = -1) -> np.ndarray:
    """`waveform` at another rate (Hz), by soxr's HQ polyphase filter; same dtype, of half precision float32.

    `axis` is time.
    """
    samples = np.asarray(waveform)
    if samples.dtype.name in ("float16", "bfloat16"):
        samples = samples.astype(np.float32)
    if from_rate <= 0 or to_rate <= 0:
        raise UsageError(f"Cannot resample from {from_rate} Hz to {to_rate} Hz; sampling rates are positive.")
    if from_rate == to_rate or not samples.size:
        return samples
    if samples.dtype.name not in ("float32", "float64", "int16", "int32"):
        raise AudioError(f"Cannot resample {samples.dtype} samples; give float32, float64, int16 or int32.")
    time_first = np.moveaxis(samples, axis, 0)
    flat = np.ascontiguousarray(time_first.reshape(len(time_first), -1))
    converted = soxr.resample(flat, from_rate, to_rate)
    return np.moveaxis(converted.reshape(-1, *time_first.shape[1:]), 0, axis)


def container_of(path: Path) -> str:
    """libsndfile's name of the container that a path's suffix stands for.

    Raises:
        UsageError: if it can write none.
    """
    suffix = path.suffix.lower().lstrip(".")
    container = "OGG" if suffix == "opus" else suffix.upper()
    if container not in soundfile.available_formats() or soundfile.default_subtype(container) is None:
        raise UsageError(f"Cannot write '{path}': libsndfile knows no format '{suffix}'; use wav, flac, ogg or mp3.")
    return container


def write(path: str | os.PathLike[str], waveform: ArrayLike, sampling_rate: int, subtype: str | None = None) -> None:
    """Write a sound file under a temporary name and then rename it, so that no half-written file is ever left.

    Args:
        path: the suffix chooses the container: wav, flac, ogg, opus, mp3, aiff …. For Opus, a rate that it does not
            have is resampled to 48 kHz.
        waveform: floats in [-1, 1], `(time,)` or `(channels, time)`; integer codings clip what lies outside.
        sampling_rate: Hz.
        subtype: libsndfile's name of the coding, such as "PCM_24" or "FLOAT"; the container's default if not given.
    """
    path = Path(path)
    samples = np.asarray(waveform)
    if samples.ndim not in (1, 2):
        raise AudioError(f"Cannot write an array of shape {samples.shape}; give (time,) or (channels, time).")
    if samples.ndim == 2 and samples.shape[0] > samples.shape[1]:
        raise AudioError(
            f"Cannot write {samples.shape[0]} channels of {samples.shape[1]} samples; channels come first."
        )
    for channel in np.atleast_2d(samples):
        check_waveform(channel, minimum_samples=1)
    container = container_of(path)
    if path.suffix.lower() == ".opus" and subtype is None:
        subtype = "OPUS"
    if subtype == "OPUS" and sampling_rate not in _OPUS_RATES:
        samples, sampling_rate = resample(samples, sampling_rate, max(_OPUS_RATES)), max(_OPUS_RATES)
    if not path.parent.is_dir():
        raise SourceError(f"Cannot write '{path}': there is no directory '{path.parent}'.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            soundfile.write(temporary, samples.T.astype(np.float32), sampling_rate, format=container, subtype=subtype)
        except (soundfile.LibsndfileError, ValueError, RuntimeError) as problem:
            reason = getattr(problem, "error_string", problem)  # without the temporary name
            form = f"{container} {subtype or ''}".strip()
            raise UsageError(f"Cannot write '{path}' as {form} at {sampling_rate} Hz: {reason}") from None
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_waveform(
    waveform: ArrayLike,
    sampling_rate: int | None = None,
    expected_rate: int | None = None,
    *,
    minimum_samples: int = 1,
) -> np.ndarray:
    """One mono waveform, checked: floats, one dimension, finite, long enough, at the expected rate.

    Args:
        waveform: float `(time,)`.
        sampling_rate: Hz of `waveform`, where the caller said so.
        expected_rate: Hz that the model was trained with.
        minimum_samples: the fewest samples that can be used.

    Returns:
        the waveform as a float32 or float64 array `(time,)`.

    Raises:
        AudioError: one sentence that says what is wrong and what to do.
    """
    try:
        samples = np.asarray(waveform)
    except ValueError:
        raise AudioError("The waveform is a ragged list; give one flat array of floats a waveform.") from None
    if samples.dtype.name == "bfloat16":  # which a model may compute in, and which to NumPy is no float
        samples = samples.astype(np.float32)
    if sampling_rate is not None and expected_rate is not None and sampling_rate != expected_rate:
        raise AudioError(
            f"The waveform is at {sampling_rate} Hz, but this model expects {expected_rate} Hz; read the file with "
            f"audiozoo.audio.read(path, {expected_rate}) or use audiozoo.audio.resample."
        )
    if samples.size == 0:
        raise AudioError("The waveform is empty (0 samples).")
    if samples.ndim == 2 and min(samples.shape) > 1:
        raise AudioError(
            f"The waveform has shape {samples.shape}, which looks like {min(samples.shape)} channels, but one channel "
            "is expected; average them, or read the file with audiozoo.audio.read(path, mono=True)."
        )
    if samples.ndim != 1:
        raise AudioError(f"The waveform has shape {samples.shape}; one dimension, (time,), is expected.")
    if np.issubdtype(samples.dtype, np.integer) or samples.dtype == bool:
        raise AudioError(
            f"The waveform holds integers ({samples.dtype}); scale it to floats in [-1, 1], "
            "for 16-bit samples by dividing by 32768."
        )
    if not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"The waveform holds {samples.dtype} values; floats in [-1, 1] are expected.")
    if samples.dtype not in (np.float32, np.float64):
        samples = samples.astype(np.float32)
    finite = np.isfinite(samples)
    if not finite.all():
        raise AudioError(
            f"The waveform holds {int((~finite).sum())} NaN or infinite samples, the first at index "
            f"{int(np.argmin(finite))}."
        )
    if len(samples) < minimum_samples:
        rate = expected_rate or sampling_rate
        seconds = f" ({len(samples) / rate:.3f} s)" if rate else ""
        least = f" ({minimum_samples / rate:.3f} s)" if rate else ""
        raise AudioError(
            f"The waveform is too short: {len(samples)} samples{seconds}, at least {minimum_samples}{least} are needed."
        )
    return samples
