r"""The range coder of EnCodec (arXiv 2210.13438, §3.3; Pasco 1976), and the bit packer that does without.

A message is a number in $[0, 2^B)$. Each symbol cuts the range that is left in proportion to its probability; leading
bits on which both ends of the range agree are written out, and the range is doubled whenever it falls below $2^{24}$.
All of it is exact integer arithmetic, so that the bytes are those of the original `encodec` package for the same
probabilities.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from audiozoo.errors import CheckpointError

RANGE_BITS = 24  # the range never falls below 2 to this power
ROUND_OFF = 1e-8  # probabilities are floored to multiples of this
MINIMUM = 2  # width of the most unlikely symbol


class EndOfStream(CheckpointError, EOFError):
    """More bits were asked for than there are."""


def pack_bits(values: Int[np.ndarray, ...], bits: int) -> bytes:
    """Integers of `bits` bits each, least significant bit first; zeros fill the last byte."""
    shifts = np.arange(bits, dtype=np.int64)
    return np.packbits((np.asarray(values, np.int64).reshape(-1, 1) >> shifts) & 1, bitorder="little").tobytes()


class BitReader:
    """Reads bytes from the front of a buffer, and bits from the least significant one on.

    Attributes:
        position: of the next byte.
    """

    def __init__(self, data: bytes, position: int = 0):
        self.data, self.position = data, position
        self._bits, self._left = 0, 0

    def take(self, count: int) -> bytes:
        """The next whole bytes.

        Raises:
            EndOfStream: if there are not as many.
        """
        if self.position + count > len(self.data):
            raise EndOfStream(
                f"the data end after {len(self.data)} bytes; {self.position + count} are needed at least."
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def bit(self) -> int:
        """The next bit."""
        if not self._left:
            self._bits, self._left = self.take(1)[0], 8
        bit = self._bits & 1
        self._bits >>= 1
        self._left -= 1
        return bit

    def align(self) -> None:
        """Leave out the rest of a byte that was begun."""
        self._left = 0

    def integers(self, count: int, bits: int) -> Int[np.ndarray, " count"]:
        """What `pack_bits` packed, with the byte it ends in."""
        content = np.frombuffer(self.take(-(-count * bits // 8)), np.uint8)
        digits = np.unpackbits(content, bitorder="little")[: count * bits].reshape(count, bits).astype(np.int64)
        return digits @ (1 << np.arange(bits, dtype=np.int64))


def quantized_cdf(pdf: Float[np.ndarray, "*rows symbols"]) -> Int[np.ndarray, "*rows symbols"]:
    r"""Probabilities as upper ends of integer ranges within $2^{24}$, each at least 2 wide.

    Floored to multiples of $10^{-8}$ first, in the probabilities' own precision, as in the original.
    """
    symbols, total = pdf.shape[-1], 2**RANGE_BITS
    share = 1 - MINIMUM * symbols / total
    floored = np.floor(pdf / ROUND_OFF) * ROUND_OFF
    widths = np.floor(share * total * floored).astype(np.int64) + MINIMUM
    # Two or three probabilities that sum to a little more than 1 could pass the end; the original fails then.
    return np.minimum(np.cumsum(widths, axis=-1), total)


class RangeEncoder:
    """Symbols to bytes."""

    def __init__(self) -> None:
        self._low, self._high, self._top = 0, 0, -1
        self._bits: list[int] = []

    def push(self, symbol: int, cdf: Int[np.ndarray, " symbols"]) -> None:
        """Append a symbol, given the `quantized_cdf` that the decoder will have as well."""
        while self._high - self._low + 1 < 2**RANGE_BITS:
            self._low, self._high, self._top = 2 * self._low, 2 * self._high + 1, self._top + 1
        width = self._high - self._low + 1
        lower = int(cdf[symbol - 1]) if symbol else 0
        # Rounded inwards: up for the lower end, down for the upper one.
        self._high = self._low + ((int(cdf[symbol]) - 1) * width >> RANGE_BITS)
        self._low += -(-lower * width >> RANGE_BITS)
        while self._top >= 0 and self._low >> self._top == self._high >> self._top:
            bit = self._low >> self._top
            self._bits.append(bit)
            self._low -= bit << self._top
            self._high -= bit << self._top
            self._top -= 1

    def finish(self) -> bytes:
        """What was pushed; the encoder is new afterwards."""
        rest = [(self._low >> place) & 1 for place in range(self._top, -1, -1)]
        content = np.packbits(np.asarray(self._bits + rest, np.uint8), bitorder="little").tobytes()
        self.__init__()  # type: ignore[misc]
        return content


class RangeDecoder:
    """Bytes back to symbols; it reads exactly as many bits as the encoder wrote."""

    def __init__(self, reader: BitReader):
        self._reader = reader
        self._low, self._high, self._current, self._top = 0, 0, 0, -1

    def pull(self, cdf: Int[np.ndarray, " symbols"]) -> int:
        """The next symbol.

        Raises:
            EndOfStream: if the bytes are at an end.
            CheckpointError: if they stand for no symbol: damaged, or written with other probabilities.
        """
        while self._high - self._low + 1 < 2**RANGE_BITS:
            self._current = 2 * self._current + self._reader.bit()
            self._low, self._high, self._top = 2 * self._low, 2 * self._high + 1, self._top + 1
        width, offset = self._high - self._low + 1, self._current - self._low
        lowers = -((-np.concatenate([[0], cdf[:-1]]) * width) >> RANGE_BITS)
        symbol = int(np.searchsorted(lowers, offset, side="right")) - 1
        upper = (int(cdf[symbol]) - 1) * width >> RANGE_BITS
        if offset > upper:
            raise CheckpointError("the data are damaged, or were written with another language model.")
        self._high = self._low + upper
        self._low += int(lowers[symbol])
        while self._top >= 0 and self._low >> self._top == self._high >> self._top:
            bit = self._low >> self._top
            self._low -= bit << self._top
            self._high -= bit << self._top
            self._current -= bit << self._top
            self._top -= 1
        return symbol


__all__ = ["BitReader", "EndOfStream", "RangeDecoder", "RangeEncoder", "pack_bits", "quantized_cdf"]
