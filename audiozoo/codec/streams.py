"""Sound coded as it comes: pieces of a waveform to bytes of an `.ecdc` file, and such bytes to pieces of a waveform.

The header of a file says how many samples it holds. A stream that has not ended cannot say so: its header says 0, and
frames follow to the end of the file, the last one whole. Such files are audiozoo's own; the original `encodec` package
takes them for empty. They need a causal model (arXiv 2210.13438, §3.1, streamable), whose state goes from one piece to
the next, and no language model, whose range coder would have to know where to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int

from audiozoo.audio.streams import read_all
from audiozoo.codec.ecdc import Compiled, Header, checked_header, model_name
from audiozoo.codec.range_coder import BitReader, EndOfStream, RangeDecoder
from audiozoo.errors import AudioError, CheckpointError, UsageError

PIECE = 0.08  # seconds that go through the model at once


class StreamReader(BitReader):
    """A `BitReader` over an open file, which is read no further than is asked for.

    Attributes:
        ended: whether there is nothing left.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(b"")
        self._file, self.ended = file, False

    def some(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        content = read_all(self._file, count)
        self.position += len(content)
        self.ended = len(content) < count
        return content

    def take(self, count: int) -> bytes:
        """See `BitReader`."""
        content = self.some(count)
        if self.ended:
            raise EndOfStream(f"the data end after {self.position} bytes.")
        return content


class _Bits:
    """Integers to bytes and back, over the borders of pieces: what does not fill a byte waits for the next."""

    def __init__(self) -> None:
        self._waiting = np.zeros(0, np.uint8)

    def pack(self, values: Int[np.ndarray, ...], bits: int, *, last: bool = False) -> bytes:
        """As `pack_bits` would have packed all values at once."""
        digits = (np.asarray(values, np.int64).reshape(-1, 1) >> np.arange(bits)) & 1
        found = np.concatenate([self._waiting, digits.astype(np.uint8).reshape(-1)])
        whole = len(found) if last else len(found) // 8 * 8
        self._waiting = found[whole:]
        return np.packbits(found[:whole], bitorder="little").tobytes()

    def unpack(self, content: bytes, count: int, bits: int) -> Int[np.ndarray, "rows count"]:
        """All whole rows of `count` values that have arrived."""
        fresh = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
        found = np.concatenate([self._waiting, fresh])
        rows = len(found) // (count * bits)
        self._waiting = found[rows * count * bits :]
        digits = found[: rows * count * bits].reshape(rows, count, bits).astype(np.int64)
        return digits @ (1 << np.arange(bits, dtype=np.int64))

    @property
    def waiting(self) -> int:
        """Bits that wait."""
        return len(self._waiting)


def _check_stream(compiled: Compiled) -> None:
    if not compiled.config.can_stream:
        raise UsageError("This model looks ahead, normalises, or cuts into chunks; a causal one can code a stream.")


def compress_stream(
    model: Any, pieces: Iterable[Float[np.ndarray, "channels samples"]], bandwidth: float | None = None
) -> Iterator[bytes]:
    """The bytes of an `.ecdc` file, as far as they are settled by the pieces of a waveform that have come.

    Args:
        model: a causal EnCodec, or `Compiled`.
        pieces: float32 in [-1, 1] at the model's rate, of any length.
        bandwidth: kbit/s, one of the model's.

    Raises:
        AudioError: for pieces that the model cannot take, and if there is none.
        UsageError: for a model that cannot stream, or has a language model.
    """
    compiled = model if isinstance(model, Compiled) else Compiled(model)
    config, hop = compiled.config, compiled.config.hop_length
    _check_stream(compiled)
    if compiled.language_model is not None:
        raise UsageError("A stream is coded without a language model: its bytes would not say where they end.")
    bandwidth = config.target_bandwidths[0] if bandwidth is None else bandwidth
    yield Header(model_name(config), 0, config.quantizers_for(bandwidth), False).to_bytes()
    size = max(1, round(PIECE * config.frame_rate)) * hop
    wanted, state, bits = -(-compiled.shortest_start // size) * size, None, _Bits()
    waiting = np.zeros((config.audio_channels, 0), np.float32)
    for piece in pieces:
        if piece.shape[0] != config.audio_channels:
            raise AudioError(f"The waveform has {piece.shape[0]} channels; this model codes {config.audio_channels}.")
        if not np.isfinite(piece).all():
            raise AudioError("The waveform holds NaN or infinite samples.")
        waiting = np.concatenate([waiting, piece], axis=1)
        while waiting.shape[1] >= wanted:
            codes, state = compiled.run("encode_chunk", waiting[None, :, :wanted], state, bandwidth=bandwidth)
            waiting, wanted = waiting[:, wanted:], size
            yield bits.pack(np.asarray(codes[0]).T, config.bits_per_codebook)
    rest = np.zeros((0, 1), np.int64)
    if state is None:
        if not waiting.shape[1]:
            raise AudioError("The waveform is empty (0 samples).")
        rest = np.asarray(compiled.run("encode_frame", waiting[None], bandwidth=bandwidth)[0][0]).T
    elif waiting.shape[1]:
        rest = np.asarray(compiled.run("encode_last_chunk", waiting[None], state, bandwidth=bandwidth)[0][0]).T
    yield bits.pack(rest, config.bits_per_codebook, last=True)


def decompress_stream(
    header: Header, reader: StreamReader, model: Any, *, language_model: Any = None
) -> Iterator[Float[np.ndarray, "channels samples"]]:
    """The waveform of an `.ecdc` file or stream, as far as it is settled by the bytes that have come.

    Args:
        header: what `read_header` found.
        reader: which stands behind it.
        model: the causal EnCodec that the header names, or `Compiled`.
        language_model: the one that the file was written with, if it was.

    Raises:
        CheckpointError: if the data are damaged, cut short, or of another model; what came before has been returned.
        UsageError: for a model that cannot stream, or if a language model is needed.
    """
    compiled = model if isinstance(model, Compiled) else Compiled(model, language_model)
    config, books = compiled.config, header.codebooks
    _check_stream(compiled)
    checked_header(header, compiled)
    size = max(1, round(PIECE * config.frame_rate))
    wanted, state = -(-compiled.shortest_start // (size * config.hop_length)) * size, None
    left = header.samples or None  # None: to the end of the stream
    waiting = np.zeros((books, 0), np.int32)
    for codes in _codes(header, reader, compiled, size):
        waiting = np.concatenate([waiting, codes.astype(np.int32)], axis=1)
        while waiting.shape[1] >= wanted:
            values, state = compiled.run("decode_chunk", waiting[None, :, :wanted], state)
            waiting, wanted = waiting[:, wanted:], size
            found = np.asarray(values[0])[:, :left]
            left = None if left is None else left - found.shape[1]
            yield found
    if waiting.shape[1]:
        if state is None:
            values = compiled.run("decode_frame", waiting[None])
        else:
            values, _ = compiled.run("decode_chunk", waiting[None], state)
        yield np.asarray(values[0])[:, :left]


def _codes(
    header: Header, reader: StreamReader, compiled: Compiled, size: int
) -> Iterator[Int[np.ndarray, "codebooks frames"]]:
    """Codes in pieces of about `size` frames."""
    config, books, width = compiled.config, header.codebooks, compiled.config.bits_per_codebook
    total = -(-header.samples // config.hop_length) if header.samples else None
    done, bits = 0, _Bits()
    try:
        if header.language_model:
            decoder, predictions = RangeDecoder(reader), compiled.predictions(books)
            while total is not None and done < total:
                frame = np.asarray([decoder.pull(cdf) for cdf in predictions.next()])
                predictions.tell(frame)
                done += 1
                yield frame[:, None]
        while total is None or done < total:
            frames = size if total is None else min(size, total - done)
            content = reader.some(-(-(frames * books * width - bits.waiting) // 8))
            codes = bits.unpack(content, books, width)[: None if total is None else total - done]
            done += len(codes)
            if len(codes):
                yield codes.T
            if reader.ended and (total is None or done < total):
                if total is not None or not done or bits.waiting >= 8:
                    raise EndOfStream(f"the data end after {reader.position} bytes, within a frame.")
                return
        if reader.some(1):
            raise CheckpointError("This .ecdc file holds more than its header says; it is damaged.")
    except EndOfStream as problem:
        of = "" if total is None else f" of {total}"
        raise CheckpointError(f"This .ecdc file is cut short after {done}{of} frames: {problem}") from None


__all__ = ["StreamReader", "compress_stream", "decompress_stream"]
