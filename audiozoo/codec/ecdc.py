"""`.ecdc` files, EnCodec's own format (arXiv 2210.13438, §3.3), as the original `encodec` package writes them.

    "ECDC" · version 0 (1 byte) · length of the JSON (4 bytes, big-endian) · JSON {m, al, nc, lm} · chunks

`m` names the model, `al` counts the audio's samples, `nc` the codebooks, and `lm` says whether a language model helped.
A chunk begins with its loudness (float32, big-endian) where the model has one; then come the codes, frame by frame, in
as many bits as they take, or through the range coder. Each chunk ends on a whole byte.

With a language model both sides must compute the same probabilities to eight digits. The same compiled step makes them
here when a file is written and when it is read; a file that other software wrote with the same weights may not be
readable, nor ours elsewhere. Without it, files are exchangeable.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from audiozoo.codec.range_coder import BitReader, EndOfStream, RangeDecoder, RangeEncoder, pack_bits, quantized_cdf
from audiozoo.errors import AudioError, CheckpointError, UsageError
from audiozoo.layers.weight_norm import fold_weight_norm

MAGIC = b"ECDC"
_START = struct.Struct("!4sBI")
_LOUDNESS = struct.Struct("!f")
_LONGEST_HEADER, _MOST_SAMPLES = 1 << 8, 1 << 36
MODELS = ("encodec_24khz", "encodec_48khz", "encodec_32khz", "audiogen_16khz")  # published sizes that files can name
SECONDS = 10.0  # of audio that go through the model at once
CHUNKS = 8  # chunks that go through a chunked model at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        model: name of the model, "encodec_24khz" or "encodec_48khz" in files of the original package.
        samples: of each channel; 0 for a stream (`audiozoo.codec.streams`), which goes on to the end of the file.
        codebooks: used.
        language_model: whether the codes went through the range coder.
    """

    model: str
    samples: int
    codebooks: int
    language_model: bool

    def to_bytes(self) -> bytes:
        """The front of a file."""
        fields = {"m": self.model, "al": self.samples, "nc": self.codebooks, "lm": self.language_model}
        content = json.dumps(fields).encode()
        return _START.pack(MAGIC, 0, len(content)) + content


def read_header(reader: BitReader) -> Header:
    """The header, checked; the reader stands behind it afterwards.

    Raises:
        CheckpointError: for data that are no `.ecdc` file, or a damaged one.
    """
    try:
        magic, version, length = _START.unpack(reader.take(_START.size))
        if magic != MAGIC:
            raise CheckpointError("This is no .ecdc file: it does not begin with ECDC.")
        if version != 0:
            raise CheckpointError(f"This .ecdc file has version {version}; only version 0 is known.")
        if length > _LONGEST_HEADER:
            raise CheckpointError(f"This .ecdc file is damaged: its header would be {length} bytes long.")
        content = reader.take(length)
    except EndOfStream as problem:
        raise CheckpointError(f"This .ecdc file is cut short within its header: {problem}") from None
    try:
        fields = json.loads(content.decode())
    except ValueError as problem:  # no UTF-8, no JSON
        raise CheckpointError(f"This .ecdc file is damaged: its header is not JSON ({problem}).") from None
    kinds = {"m": str, "al": int, "nc": int, "lm": bool}
    for name, kind in kinds.items():
        if not isinstance(fields, dict) or type(fields.get(name)) is not kind:
            raise CheckpointError(f"This .ecdc file is damaged: its header has no {kind.__name__} '{name}'.")
    if not fields["m"].isprintable():
        raise CheckpointError("This .ecdc file is damaged: its model's name is no name.")
    if not 0 <= fields["al"] <= _MOST_SAMPLES or fields["nc"] < 1 or (fields["lm"] and not fields["al"]):
        raise CheckpointError(f"This .ecdc file is damaged: {fields['al']} samples in {fields['nc']} codebooks.")
    return Header(fields["m"], fields["al"], fields["nc"], fields["lm"])


def model_name(config: Any) -> str:
    """What a file calls a model of this configuration: the published size that it equals, else "encodec"."""
    for name in MODELS:
        if config == dataclasses.replace(getattr(type(config), name)(), codebook_dim=config.codebook_dim):
            return name
    return "encodec"


class Compiled:
    """A codec, and perhaps its language model, compiled for `compress` and `decompress`; keep it for many files."""

    def __init__(self, model: Any, language_model: Any = None):
        self.config = model.config
        self.shortest_start = model.shortest_start() if model.config.can_stream else 0
        self._model = nnx.split(fold_weight_norm(model))
        self._programs: dict[tuple[str, float | None], Any] = {}
        self.language_model = language_model
        if language_model is not None:
            theirs, ours = language_model.config, self.config
            if (theirs.num_quantizers, theirs.codebook_size) != (ours.num_quantizers, ours.codebook_size):
                raise UsageError(
                    f"The language model is for {theirs.num_quantizers} codebooks of {theirs.codebook_size} entries; "
                    f"this codec has {ours.num_quantizers} of {ours.codebook_size}."
                )
            graphdef, self._weights = nnx.split(language_model)
            self._step = jax.jit(lambda weights, *rest: nnx.merge(graphdef, weights).step(*rest))

    def run(self, method: str, *args: Any, bandwidth: float | None = None) -> Any:
        """A method of the codec, compiled for the shapes of its arguments."""
        graphdef, state = self._model
        extra = {} if bandwidth is None else {"bandwidth": bandwidth}
        key = (method, bandwidth)
        if key not in self._programs:
            self._programs[key] = jax.jit(lambda s, *rest: getattr(nnx.merge(graphdef, s), method)(*rest, **extra))
        return self._programs[key](state, *args)

    def predictions(self, codebooks: int) -> _Predictions:
        """The language model's probabilities, frame by frame, from the beginning."""
        return _Predictions(self, codebooks)


def checked_header(header: Header, compiled: Compiled) -> None:
    """Whether a model can read what has this header.

    Raises:
        CheckpointError: if another model wrote it.
        UsageError: if a language model is needed.
    """
    config = compiled.config
    if header.model != (ours := model_name(config)):
        raise CheckpointError(f"This .ecdc file was made with {header.model}; the model given is {ours}.")
    if header.codebooks > config.num_quantizers:
        raise CheckpointError(f"This .ecdc file has {header.codebooks} codebooks; {ours} has {config.num_quantizers}.")
    if header.language_model and compiled.language_model is None:
        raise UsageError("This .ecdc file was written with a language model; give the same one to read it.")
    if not header.samples and not config.can_stream:
        raise CheckpointError(f"This .ecdc file is damaged: it says that it is a stream, which {ours} cannot code.")


class _Predictions:
    """Cumulative distributions of each frame's codes, given those before it."""

    def __init__(self, compiled: Compiled, codebooks: int):
        self._compiled = compiled
        self._state = compiled.language_model.initial_state(1)
        self._indices = np.zeros((1, codebooks), np.int32)

    def next(self) -> Int[np.ndarray, "codebooks entries"]:
        """Of the next frame."""
        pdf, self._state = self._compiled._step(self._compiled._weights, self._indices, self._state)
        return quantized_cdf(np.asarray(pdf[0], np.float32))

    def tell(self, codes: Int[np.ndarray, " codebooks"]) -> None:
        """What the frame turned out to be."""
        self._indices = 1 + np.asarray(codes, np.int32)[None]


def _chunks(samples: int, config: Any) -> list[tuple[int, int]]:
    """Start and length of each chunk."""
    length, stride = config.chunk_length or samples, config.chunk_stride or samples
    return [(start, min(length, samples - start)) for start in range(0, samples, stride)]


def body_bytes(header: Header, config: Any) -> int:
    """Bytes behind the header, which says their number where there is no language model."""
    bits, loudness = header.codebooks * config.bits_per_codebook, _LOUDNESS.size if config.normalize else 0
    frames = [-(-size // config.hop_length) for _, size in _chunks(header.samples, config)]
    return sum(loudness + -(-count * bits // 8) for count in frames)


def compress(
    model: Any,
    waveform: Float[np.ndarray, "channels samples"],
    bandwidth: float | None = None,
    *,
    language_model: Any = None,
    progress: Progress | None = None,
) -> bytes:
    """A waveform as the bytes of an `.ecdc` file.

    A causal model takes it in pieces of `SECONDS`, a chunked one in groups of `CHUNKS`, so that memory does not grow
    with its length.

    Args:
        model: an EnCodec, or `Compiled`.
        waveform: at the model's rate and with its channels, float32 in [-1, 1].
        bandwidth: kbit/s, one of the model's.
        language_model: an `EncodecLanguageModel`: a quarter fewer bytes, and many times as long.
        progress: called with frames done and frames in all.

    Raises:
        AudioError: for a waveform that the model cannot take.
        UsageError: for a bandwidth that the model does not have.
    """
    compiled = model if isinstance(model, Compiled) else Compiled(model, language_model)
    config = compiled.config
    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 2 or waveform.shape[0] != config.audio_channels:
        raise AudioError(f"The waveform has shape {waveform.shape}; ({config.audio_channels}, samples) is expected.")
    samples = waveform.shape[1]
    if not samples:
        raise AudioError("The waveform is empty (0 samples).")
    if not np.isfinite(waveform).all():
        raise AudioError("The waveform holds NaN or infinite samples.")
    bandwidth = config.target_bandwidths[0] if bandwidth is None else bandwidth
    header = Header(model_name(config), samples, config.quantizers_for(bandwidth), compiled.language_model is not None)
    total = sum(-(-size // config.hop_length) for _, size in _chunks(samples, config))
    parts, done = [header.to_bytes()], 0

    def advance(frames: int) -> None:
        nonlocal done
        done += frames
        if progress is not None:
            progress(done, total)

    for codes, scale in _encoded(compiled, waveform, bandwidth):
        if scale is not None:
            parts.append(_LOUDNESS.pack(scale))
        if compiled.language_model is None:
            parts.append(pack_bits(codes.T, config.bits_per_codebook))
            advance(codes.shape[1])
            continue
        encoder, predictions = RangeEncoder(), compiled.predictions(header.codebooks)
        for frame in codes.T:
            for code, cdf in zip(frame, predictions.next(), strict=True):
                encoder.push(int(code), cdf)
            predictions.tell(frame)
            advance(1)
        parts.append(encoder.finish())
    return b"".join(parts)


def _encoded(
    compiled: Compiled, waveform: Float[np.ndarray, "channels samples"], bandwidth: float
) -> Iterator[tuple[Int[np.ndarray, "codebooks frames"], float | None]]:
    """Codes and loudness of each chunk."""
    config, samples = compiled.config, waveform.shape[1]
    if config.chunk_length is None:
        piece = max(1, round(SECONDS * config.frame_rate)) * config.hop_length
        if not config.can_stream or samples <= piece:
            codes, _ = compiled.run("encode_frame", waveform[None], bandwidth=bandwidth)
            yield np.asarray(codes[0]), None
            return
        state, parts = None, []
        for start in range(0, samples, piece):
            x = waveform[None, :, start : start + piece]
            method = "encode_chunk" if x.shape[-1] % config.hop_length == 0 else "encode_last_chunk"
            codes, state = compiled.run(method, x, state, bandwidth=bandwidth)
            parts.append(np.asarray(codes[0]))
        yield np.concatenate(parts, axis=1), None
        return
    chunks = _chunks(samples, config)
    whole = [start for start, size in chunks if size == config.chunk_length]
    for group in range(0, len(whole), CHUNKS):
        starts = whole[group : group + CHUNKS]
        x = np.stack([waveform[:, s : s + config.chunk_length] for s in starts])
        codes, scales = compiled.run("encode_frame", x, bandwidth=bandwidth)
        for i in range(len(starts)):
            yield np.asarray(codes[i]), None if scales is None else float(scales[i, 0])
    for start, size in chunks[len(whole) :]:
        codes, scales = compiled.run("encode_frame", waveform[None, :, start : start + size], bandwidth=bandwidth)
        yield np.asarray(codes[0]), None if scales is None else float(scales[0, 0])


def decompress(
    data: bytes, model: Any, *, language_model: Any = None, progress: Progress | None = None
) -> Float[np.ndarray, "channels samples"]:
    """The waveform of an `.ecdc` file, at the model's rate.

    Args:
        data: the whole file.
        model: the EnCodec that the file names, or `Compiled`.
        language_model: the one that the file was written with, if it was.
        progress: called with frames done and frames in all.

    Raises:
        CheckpointError: if the data are damaged, cut short, or of another model.
        UsageError: if a language model is needed.
    """
    compiled = model if isinstance(model, Compiled) else Compiled(model, language_model)
    config, reader = compiled.config, BitReader(data)
    header = read_header(reader)
    checked_header(header, compiled)
    if not header.samples:
        # A stream: all whole frames that follow.
        bits = 8 * (len(data) - reader.position)
        frames = bits // (header.codebooks * config.bits_per_codebook)
        if not frames or bits - frames * header.codebooks * config.bits_per_codebook >= 8:
            raise CheckpointError(f"This .ecdc stream is cut short after {frames} frames.")
        header = dataclasses.replace(header, samples=frames * config.hop_length)
    chunks = _chunks(header.samples, config)
    total = sum(-(-size // config.hop_length) for _, size in chunks)
    # A header that promises hours must not make us wait for them.
    whole = reader.position + (0 if header.language_model else body_bytes(header, config))
    if len(data) < whole:
        raise CheckpointError(f"This .ecdc file is cut short: it has {len(data)} bytes of {whole}.")
    frames, done = [], 0
    try:
        for _, size in chunks:
            scale = _LOUDNESS.unpack(reader.take(_LOUDNESS.size))[0] if config.normalize else None
            if scale is not None and not 0.0 < scale < float("inf"):
                raise CheckpointError(f"a chunk's loudness is {scale}.")
            count = -(-size // config.hop_length)
            if not header.language_model:
                flat = reader.integers(count * header.codebooks, config.bits_per_codebook)
                codes = flat.reshape(count, header.codebooks).T
                done += count
            else:
                decoder, predictions, pulled = RangeDecoder(reader), compiled.predictions(header.codebooks), []
                for _ in range(count):
                    pulled.append(np.asarray([decoder.pull(cdf) for cdf in predictions.next()]))
                    predictions.tell(pulled[-1])
                    done += 1
                    if progress is not None:
                        progress(done, total)
                reader.align()
                codes = np.stack(pulled, axis=1)
            frames.append((codes.astype(np.int32), scale))
            if progress is not None:
                progress(done, total)
    except EndOfStream as problem:
        raise CheckpointError(f"This .ecdc file is cut short after {done} of {total} frames: {problem}") from None
    except CheckpointError as problem:
        raise CheckpointError(f"This .ecdc file cannot be read beyond {done} of {total} frames: {problem}") from None
    if rest := len(data) - reader.position:
        raise CheckpointError(f"This .ecdc file holds {rest} bytes more than its header says; it is damaged.")
    return _decoded(compiled, frames)[:, : header.samples]


def _decoded(compiled: Compiled, frames: list[tuple[np.ndarray, float | None]]) -> np.ndarray:
    """The waveform of codes and loudness of each chunk."""
    from audiozoo.models.encodec import overlap_add

    config = compiled.config
    if config.chunk_length is None:
        codes = frames[0][0][None]
        piece = max(1, round(SECONDS * config.frame_rate))
        if not config.can_stream or codes.shape[-1] <= piece:
            return np.asarray(compiled.run("decode_frame", codes)[0])
        state, parts = None, []
        for start in range(0, codes.shape[-1], piece):
            values, state = compiled.run("decode_chunk", codes[..., start : start + piece], state)
            parts.append(np.asarray(values[0]))
        return np.concatenate(parts, axis=1)
    decoded: list[Any] = []
    for size in dict.fromkeys(codes.shape[1] for codes, _ in frames):
        alike = [frame for frame in frames if frame[0].shape[1] == size]
        for group in range(0, len(alike), CHUNKS):
            some = alike[group : group + CHUNKS]
            values = np.asarray(compiled.run("decode_frame", np.stack([codes for codes, _ in some])))
            scales = [1.0 if scale is None else scale for _, scale in some]
            decoded += [v[None] * np.float32(s) for v, s in zip(values, scales, strict=True)]
    return np.asarray(overlap_add([jnp.asarray(d) for d in decoded], config.chunk_stride or 1)[0])


__all__ = ["Compiled", "Header", "body_bytes", "checked_header", "compress", "decompress", "model_name", "read_header"]
