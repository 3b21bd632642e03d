"""Sound that comes and goes through a pipe: samples as they arrive, before the end is known.

`read` and `blocks` need a file that can be gone back in; a microphone's pipe cannot. WAV and bare samples can be read
from front to back:

    arecord -f S16_LE -r 16000 -t raw | audiozoo codec encode - - --stream --raw 16000 …
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soxr

from audiozoo.errors import AudioError

LOWEST_RATE = 100  # Hz; a damaged header may say 1, at which 16,000 samples become a gigabyte
_UNKNOWN = 0x7FFF_F000  # programs that do not know the length write one that is at least this
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True)
class SampleFormat:
    """How samples lie in bytes: little-endian, the channels of one moment side by side."""

    sampling_rate: int
    channels: int = 1
    bits: int = 16  # 16, 24, 32 as integers, 32, 64 as floats
    floats: bool = False

    @property
    def frame(self) -> int:
        """Bytes of one moment."""
        return self.channels * self.bits // 8

    def samples(self, data: bytes) -> np.ndarray:
        """Floats in [-1, 1], `(time, channels)`; what is left of an incomplete moment is dropped."""
        data = data[: len(data) // self.frame * self.frame]
        values: np.ndarray
        if self.floats:
            values = np.frombuffer(data, f"<f{self.bits // 8}").astype(np.float32)
        elif self.bits == 24:
            padded = np.zeros((len(data) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
        else:
            values = np.frombuffer(data, f"<i{self.bits // 8}").astype(np.float32) / 2 ** (self.bits - 1)
        return values.reshape(-1, self.channels)


def read_all(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes, fewer at the end only: a pipe without a buffer gives what is there."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_wav_header(file: BinaryIO) -> tuple[SampleFormat, int | None]:
    """The front of a WAV file up to its first sample: how samples lie, and bytes of them, None if that is not known.

    Raises:
        AudioError: for anything else than WAV with integers of 16, 24 or 32 bits or floats.
    """
    start = read_all(file, 12)
    if start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
        raise AudioError("The stream is not WAV; only WAV and raw samples can be read as they come.")
    layout: SampleFormat | None = None
    while True:
        begin = read_all(file, 8)
        if len(begin) < 8:
            raise AudioError("The WAV stream ends within its header.")
        name, size = begin[:4], struct.unpack("<I", begin[4:])[0]
        if name == b"data":
            break
        content = read_all(file, size + size % 2)
        if name == b"fmt " and len(content) >= 16:
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", content[:16])
            if tag == _EXTENSIBLE and len(content) >= 26:
                (tag,) = struct.unpack("<H", content[24:26])
            if (tag, bits) not in ((_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)):
                raise AudioError(
                    f"The WAV stream has samples of kind {tag} with {bits} bits; integers or floats are read."
                )
            if not channels or rate < LOWEST_RATE:
                raise AudioError(f"The WAV stream says that it has {channels} channels at {rate} Hz.")
            layout = SampleFormat(rate, channels, bits, tag == _FLOAT)
    if layout is None:
        raise AudioError("The WAV stream does not say how its samples lie.")
    return layout, None if size == 0 or size >= _UNKNOWN else size


def wav_header(sampling_rate: int, channels: int, samples: int | None = None) -> bytes:
    """The front of a WAV file of 16 bits; with `samples` None, or too many, of one whose length is not known."""
    size = 0xFFFF_FFFF if samples is None else min(2 * channels * samples, 0xFFFF_FFFF)
    layout = struct.pack("<HHIIHH", _PCM, channels, sampling_rate, 2 * channels * sampling_rate, 2 * channels, 16)
    whole = min(size + 36, 0xFFFF_FFFF)
    return (
        b"RIFF"
        + struct.pack("<I", whole)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + layout
        + b"data"
        + struct.pack("<I", size)
    )


def to_pcm(waveform: np.ndarray) -> bytes:
    """Floats `(channels, time)` as the bytes of 16-bit samples; what lies outside [-1, 1] is clipped."""
    return np.clip(np.round(waveform.T * 32768), -32768, 32767).astype("<i2").tobytes()


def read_stream(
    file: BinaryIO, sampling_rate: int, *, mono: bool = True, seconds: float = 0.08, raw: SampleFormat | None = None
) -> Iterator[np.ndarray]:
    """The samples of a stream, as soon as there are `seconds` of them.

    Args:
        file: open for reading; it is never gone back in.
        sampling_rate: Hz that the samples are brought to.
        mono: average the channels.
        seconds: of sound that are waited for at a time.
        raw: how samples lie where there is no header; without it the stream is WAV.

    Yields:
        float32 `(channels, time)`, of varying length.

    Raises:
        AudioError: if the stream cannot be read, or has no sample.
    """
    layout, left = (raw, None) if raw is not None else read_wav_header(file)
    channels = 1 if mono else layout.channels
    resampler = None
    if layout.sampling_rate != sampling_rate:
        resampler = soxr.ResampleStream(layout.sampling_rate, sampling_rate, channels, dtype="float32")
    size, any_at_all = max(1, round(seconds * layout.sampling_rate)) * layout.frame, False
    while left is None or left > 0:
        data = read_all(file, size if left is None else min(size, left))
        left = None if left is None else left - len(data)
        samples = layout.samples(data)
        if not len(samples):
            break
        if not np.isfinite(samples).all():
            raise AudioError("The stream holds NaN or infinite samples.")
        any_at_all = True
        samples = samples.mean(axis=1, keepdims=True) if mono else samples
        if resampler is not None:
            samples = resampler.resample_chunk(np.ascontiguousarray(samples)).reshape(-1, channels)
        yield samples.T
    if not any_at_all:
        raise AudioError("The stream has no samples.")
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True).reshape(-1, channels).T
