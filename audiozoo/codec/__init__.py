"""Codes as files: a bit packer, a range coder, and EnCodec's `.ecdc` files with and without a language model."""

from audiozoo.codec.ecdc import Compiled, Header, body_bytes, compress, decompress, model_name, read_header
from audiozoo.codec.range_coder import BitReader, RangeDecoder, RangeEncoder, pack_bits, quantized_cdf
from audiozoo.codec.streams import StreamReader, compress_stream, decompress_stream

__all__ = [
    "BitReader",
    "Compiled",
    "Header",
    "RangeDecoder",
    "RangeEncoder",
    "StreamReader",
    "body_bytes",
    "compress",
    "compress_stream",
    "decompress",
    "decompress_stream",
    "model_name",
    "pack_bits",
    "quantized_cdf",
    "read_header",
]
