"""Codes as files: a bit packer, a range coder, and EnCodec's `.ecdc` files with and without a language model."""

from audiozoo.codec.ecdc import Compiled, Header, compress, decompress, model_name, read_header
from audiozoo.codec.range_coder import BitReader, RangeDecoder, RangeEncoder, pack_bits, quantized_cdf

__all__ = [
    "BitReader",
    "Compiled",
    "Header",
    "RangeDecoder",
    "RangeEncoder",
    "compress",
    "decompress",
    "model_name",
    "pack_bits",
    "quantized_cdf",
    "read_header",
]
