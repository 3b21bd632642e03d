"""EnCodec without PyTorch: streams, files that are damaged, training, and the command line."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import struct
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from flax import nnx
from hypothesis import given, settings
from typer.testing import CliRunner

import audiozoo
from audiozoo import cli, codec
from audiozoo.audio import to_pcm, wav_header
from audiozoo.codec import ecdc
from audiozoo.commands import codec as commands
from audiozoo.errors import AudioError, AudiozooError, CheckpointError, UsageError
from audiozoo.loading import variables
from audiozoo.models import encodec
from audiozoo.models.encodec import Balancer, EncodecConfig, EncodecLanguageModel, EncodecModel
from audiozoo.processors.encodec import EncodecFeatureExtractor
from tests.models.random_model import random_model
from tests.shapes import enforce
from tests.weights_conversion.pytorch_files import write_pt
from weights_conversion.encodec import original_table

TINY = EncodecConfig(
    target_bandwidths=(1.2, 2.4),
    sampling_rate=800,
    hidden_size=6,
    num_filters=4,
    upsampling_ratios=(2,),
    codebook_size=8,
    language_model_size=16,
    language_model_layers=1,
    language_model_context_s=6 / 400,
)
# Two stages, dilated convolutions, two layers of LSTM, as at 24 kHz.
DEEPER = dataclasses.replace(TINY, sampling_rate=2400, upsampling_ratios=(3, 2), num_residual_layers=2)
STEREO = dataclasses.replace(
    TINY,
    audio_channels=2,
    normalize=True,
    chunk_length_s=0.05,
    overlap=0.1,
    norm_type="time_group_norm",
    use_causal_conv=False,
)


@functools.cache
def tiny(config: EncodecConfig = TINY) -> EncodecModel:
    return random_model(lambda rngs: EncodecModel(config, rngs=rngs))


@functools.cache
def both(config: EncodecConfig) -> ecdc.Compiled:
    return ecdc.Compiled(tiny(config), random_model(lambda rngs: EncodecLanguageModel(config, rngs=rngs)))


def compiled(config: EncodecConfig = TINY, lm: bool = False) -> ecdc.Compiled:
    """With or without a language model, the codec's programs in common."""
    program = copy.copy(both(config))
    program.language_model = program.language_model if lm else None
    return program


def sound(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.8, 0.8, shape).astype(np.float32)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mirrored", "silent"])
def test_a_stream_equals_the_whole_recording(mode):
    """Sample for sample: encoded and decoded in pieces of a few frames, the last one not even a whole frame."""
    config = DEEPER if mode == "mirrored" else dataclasses.replace(TINY, pad_mode="constant")
    hop = config.hop_length
    with jax.enable_x64(True):
        model = random_model(lambda rngs: EncodecModel(config, param_dtype=jnp.float64, rngs=rngs))
        x = jnp.asarray(sound(2, 1, 17 * hop + 1), jnp.float64)
        codes = audiozoo.jit(model, "encode")(x, bandwidth=2.4).audio_codes
        values = audiozoo.jit(model, "decode")(codes, [None]).audio_values
        assert model.shortest_start() == (7 * hop if mode == "mirrored" else hop)
        encode, last = audiozoo.jit(model, "encode_chunk"), audiozoo.jit(model, "encode_last_chunk")
        decode = audiozoo.jit(model, "decode_chunk")
        start = {"encoder": None, "decoder": None} if mode == "mirrored" else model.initial_state(2, jnp.float64)
        state, streamed = start["encoder"], []
        sizes = (15, 1, 1) if mode == "mirrored" else (1, 1, 1, 7, 7)
        for frames, position in zip(sizes, np.cumsum((0, *sizes)), strict=False):
            piece, state = encode(x[..., hop * position : hop * (position + frames)], state, bandwidth=2.4)
            streamed.append(piece)
        streamed.append(last(x[..., 17 * hop :], state, bandwidth=2.4)[0])
        np.testing.assert_array_equal(np.concatenate(streamed, axis=-1), codes[0])
        assert len(np.unique(codes)) > 4
        state, parts = start["decoder"], []
        for piece in (np.concatenate(streamed[:1], -1), *streamed[1:]):
            part, state = decode(jnp.asarray(piece), state)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, axis=-1), values, rtol=0, atol=1e-12)


def test_streams_that_cannot_be():
    model = tiny()
    with pytest.raises(AudioError, match="needs 14 samples"):
        model.encode_chunk(jnp.zeros((1, 1, 12)))
    with pytest.raises(AudioError, match="multiple of 2"):
        model.encode_chunk(jnp.zeros((1, 1, 43)))
    for changes in ({}, {"normalize": True}, {"chunk_length_s": 0.05, "overlap": 0.1}):
        other = tiny(dataclasses.replace(TINY, **changes) if changes else STEREO)
        with pytest.raises(UsageError, match="looks ahead, normalises, or cuts into chunks"):
            other.initial_state()
    silence = model.initial_state()
    with pytest.raises(AudioError, match=r"shape \(1, 2, 40\); \(batch, 1, samples\)"):
        model.encode_chunk(jnp.zeros((1, 2, 40)), silence["encoder"])
    with pytest.raises(AudioError, match=r"shape \(1, 41\)"):
        model.encode_last_chunk(jnp.zeros((1, 41)), silence["encoder"])
    with pytest.raises(UsageError, match=r"shape \(2, 40\); \(batch, quantizers, frames\)"):
        model.decode_chunk(jnp.zeros((2, 40), jnp.int32), silence["decoder"])
    with pytest.raises(UsageError, match="none of this model's encoder for a batch of 2"):
        model.encode_chunk(jnp.zeros((2, 1, 40)), silence["encoder"])
    for state in (silence, silence["encoder"], model.initial_state(2)["decoder"]):
        with pytest.raises(UsageError, match="none of this model's decoder for a batch of 1"):
            model.decode_chunk(jnp.zeros((1, 2, 20), jnp.int32), state)
    for shape in ((2, 60), (1, 59), (60,)):
        with pytest.raises(UsageError, match="does not fit input_values of"):
            model.encode(jnp.zeros((1, 1, 60)), np.ones(shape))
    with pytest.raises(AudioError, match="2 channels"):
        model.encode(jnp.zeros((1, 2, 60)))
    with pytest.raises(UsageError, match=r"1\.2, 2\.4 kbit/s, not at 6"):
        model.encode(jnp.zeros((1, 1, 60)), bandwidth=6)
    with pytest.raises(UsageError, match=r"shape \(1, 2, 3\); \(chunks"):
        model.decode(jnp.zeros((1, 2, 3), jnp.int32), [None])
    with pytest.raises(UsageError, match="codes of 3 codebooks; this model has 2"):
        model.decode(jnp.zeros((1, 1, 3, 3), jnp.int32), [None])
    with pytest.raises(UsageError, match="needs an overlap"):
        EncodecConfig.encodec_24khz(chunk_length_s=1.0)
    with pytest.raises(UsageError, match="go together"):
        model(audio_codes=jnp.zeros((1, 1, 2, 3), jnp.int32))


# --- bytes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 16), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_packed_bits_come_back(bits, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, count)
    packed = codec.pack_bits(values, bits)
    assert len(packed) == -(-bits * count // 8)
    np.testing.assert_array_equal(codec.BitReader(packed).integers(count, bits), values)


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(1, 80), st.floats(0.0, 30.0), st.integers(0, 2**32 - 1))
def test_the_range_coder_comes_back_and_is_short(symbols, count, sharpness, seed):
    """What it spends is the message's information, and little more."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.standard_normal((count, symbols))
    pdf = np.exp(logits - logits.max(-1, keepdims=True))
    pdf = (pdf / pdf.sum(-1, keepdims=True)).astype(np.float32)
    message = [int(rng.choice(symbols, p=p / p.sum())) for p in pdf.astype(np.float64)]
    cdf = codec.quantized_cdf(pdf)
    encoder = codec.RangeEncoder()
    for symbol, row in zip(message, cdf, strict=True):
        encoder.push(symbol, row)
    content = encoder.finish()
    decoder = codec.RangeDecoder(codec.BitReader(content))
    assert [decoder.pull(row) for row in cdf] == message
    width = np.diff(np.concatenate([np.zeros((count, 1)), cdf], axis=1))[np.arange(count), message]
    # Rounding inwards costs a symbol of width 2 two bits at most, a wide one next to nothing.
    assert 8 * len(content) <= np.sum(24 - np.log2(width) + np.where(width < 64, 2.1, 0.05)) + 32


@pytest.mark.parametrize("config", [TINY, STEREO], ids=["causal", "stereo"])
@pytest.mark.parametrize("lm", [False, True], ids=["plain", "language model"])
def test_files_come_back(config, lm):
    """The codes of a file are those of the model, and its waveform is theirs, with a language model and without."""
    program = compiled(config, lm)
    x = sound(config.audio_channels, 115)
    seen: list[tuple[float, float]] = []
    content = codec.compress(program, x, 2.4, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == ((58, 58) if config is TINY else (20 * 3 + 4, 20 * 3 + 4))
    header = codec.read_header(codec.BitReader(content))
    assert dataclasses.astuple(header) == ("encodec", 115, 2, lm)
    values = codec.decompress(content, program)
    assert values.shape == x.shape
    plain = compiled(config)
    np.testing.assert_array_equal(values, codec.decompress(codec.compress(plain, x, 2.4), plain))
    if config is TINY:
        codes, _ = program.run("encode_frame", x[None], bandwidth=2.4)
        np.testing.assert_array_equal(values, program.run("decode_frame", np.asarray(codes))[0, :, :115])
        if not lm:
            kept = codec.BitReader(content[-44:]).integers(116, 3).reshape(58, 2).T
            np.testing.assert_array_equal(kept, codes[0])


@pytest.mark.slow
def test_long_recordings_go_in_pieces(monkeypatch):
    """The causal codec streams, the chunked one takes groups; the bytes stay the same."""
    for config in (TINY, STEREO):
        x = sound(config.audio_channels, 187)
        whole = codec.compress(compiled(config), x)
        values = codec.decompress(whole, compiled(config))
        with monkeypatch.context() as patch:
            patch.setattr(ecdc, "SECONDS", 0.1)  # 40 frames
            patch.setattr(ecdc, "CHUNKS", 3)
            assert codec.compress(compiled(config), x) == whole
            np.testing.assert_allclose(codec.decompress(whole, compiled(config)), values, atol=1e-5)


@functools.cache
def a_file(lm: bool = False) -> bytes:
    return codec.compress(compiled(lm=lm), sound(1, 30), 2.4)


@pytest.mark.parametrize("lm", [False, True], ids=["plain", "language model"])
def test_cut_files_are_refused(lm):
    content = a_file(lm)
    for length in (0, 3, 8, 20, len(content) // 2, len(content) - 1):
        with pytest.raises(CheckpointError, match=r"cut short|JSON"):
            codec.decompress(content[:length], compiled(lm=lm))
    with pytest.raises(CheckpointError, match="1 bytes more"):
        codec.decompress(content + b"\0", compiled(lm=lm))


def header(**changes) -> bytes:
    content = json.dumps({"m": "encodec", "al": 30, "nc": 2, "lm": False} | changes).encode()
    return struct.pack("!4sBI", b"ECDC", 0, len(content)) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF" + bytes(60), r"^This is no \.ecdc file: it does not begin with ECDC"),
        (b"ECDC\1" + bytes(60), r"^This \.ecdc file has version 1"),
        (b"ECDC\0\xff\xff\xff\xff" + bytes(60), "damaged: its header would be 4294967295 bytes long"),
        (b"ECDC\0\0\0\0\2[]" + bytes(60), "no str 'm'"),
        (b"ECDC\0\0\0\xea\x60" + b"[" * 60_000, "60000 bytes long"),
        (b"ECDC\0\0\0\0\xfa" + b"[" * 250, "its header is not JSON"),
        (header(m="\x1b[2J"), "no name"),
        (header(m="\ud800"), "no name"),
        (header(al=-3), "-3 samples"),
        (header(al="90"), "no int 'al'"),
        (header(lm=1), "no bool 'lm'"),
        (header(nc=3) + bytes(90), "3 codebooks; encodec has 2"),
        (header(m="encodec_24khz") + bytes(90), "made with encodec_24khz"),
        (header(al=10**9) + bytes(90), "cut short"),
        (header(al=10**30), "samples"),
        (header(nc=0), "30 samples in 0 codebooks"),
        (header(al=0, lm=True), "0 samples in 2 codebooks"),
    ],
    ids=itertools.count(),
)
def test_damaged_headers_get_a_sentence(content, message):
    with pytest.raises(CheckpointError, match=message):
        codec.decompress(content, compiled())


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damaged_files_never_crash(place, change, lm):
    """A file has no checksum: one byte changed gives one sentence, or other sound."""
    content = bytearray(a_file(lm))
    content[place % len(content)] ^= change
    values = np.zeros(0)
    with contextlib.suppress(AudiozooError):
        values = codec.decompress(bytes(content), compiled(lm=lm))
    assert np.isfinite(values).all()


def test_waveforms_that_have_no_file():
    for x, message in ((sound(2, 30), "expected"), (sound(1, 0), "empty"), (np.full((1, 30), np.nan), "NaN")):
        with pytest.raises(AudioError, match=message):
            codec.compress(compiled(), x)
    with pytest.raises(UsageError, match="language model"):
        codec.decompress(a_file(lm=True), compiled())
    larger = dataclasses.replace(TINY, codebook_size=16)
    other = random_model(lambda rngs: EncodecLanguageModel(larger, rngs=rngs))
    with pytest.raises(UsageError, match="codebooks of 16 entries"):
        ecdc.Compiled(tiny(), other)


def pieces_of(x: np.ndarray, *sizes: int):
    return np.split(x, np.cumsum(sizes), axis=1)


class Dripping(io.BytesIO):
    """A pipe without a buffer: it gives what is there."""

    def read(self, size=-1):
        return super().read(min(size, 5))


@pytest.mark.parametrize("samples", [9, 35, 200], ids=lambda n: f"{n} samples")
def test_a_stream_is_written_and_read_as_it_comes(samples):
    """In pieces of any size the codes are those of the whole; nothing is read before it is needed."""
    program, x = compiled(), sound(1, samples)
    whole = codec.compress(program, x, 2.4)
    parts = list(codec.compress_stream(program, pieces_of(x, 1, 3, 30, 7), 2.4))
    content = b"".join(parts)
    assert content[-len(whole) + len(header(al=samples)) :] == whole[len(header(al=samples)) :]
    assert codec.read_header(codec.BitReader(content)).samples == 0
    assert len(parts) > samples // 64 + 1
    values = codec.decompress(whole, program)
    np.testing.assert_allclose(codec.decompress(content, program)[:, :samples], values, atol=1e-5)
    for data in (content, whole):
        source = Dripping(data)
        reader = codec.StreamReader(source)
        came = codec.decompress_stream(codec.read_header(reader), reader, program)
        streamed = [next(came)]
        first = source.tell()
        streamed += came
        assert samples < 200 or first < 0.7 * len(data)
        assert np.concatenate(streamed, axis=1).shape[1] == (samples + samples % 2 if data is content else samples)
        np.testing.assert_allclose(np.concatenate(streamed, axis=1)[:, :samples], values, atol=1e-5)


def test_a_stream_with_a_language_model_can_be_read_as_it_comes():
    program = compiled(lm=True)
    reader = codec.StreamReader(io.BytesIO(a_file(lm=True)))
    streamed = np.concatenate(list(codec.decompress_stream(codec.read_header(reader), reader, program)), axis=1)
    np.testing.assert_allclose(streamed, codec.decompress(a_file(lm=True), program), atol=1e-5)


def test_streams_that_are_cut_or_cannot_be():
    content = b"".join(codec.compress_stream(compiled(), [sound(1, 36)], 2.4))
    start = content[: -(18 * 6 // 8 + 1)]
    for data, message in (
        (start, "cut short after 0 frames"),
        (a_file()[:-1], "cut short after 14 of 15"),
        (a_file() + b"x", "more than its header says"),
    ):
        reader = codec.StreamReader(io.BytesIO(data))
        with pytest.raises(CheckpointError, match=message):
            list(codec.decompress_stream(codec.read_header(reader), reader, compiled()))
    with pytest.raises(CheckpointError, match="cut short after 0 frames"):
        codec.decompress(start, compiled())
    # Frames of 12 bits: of eleven ten are left and a whole byte, which does not fill up what was written last.
    larger = compiled(dataclasses.replace(TINY, codebook_size=64, target_bandwidths=(4.8,)))
    data = b"".join(codec.compress_stream(larger, [sound(1, 22)]))
    assert codec.decompress(data, larger).shape == (1, 22)
    with pytest.raises(CheckpointError, match="cut short after 10 frames"):
        codec.decompress(data[:-1], larger)
    reader = codec.StreamReader(io.BytesIO(data[:-1]))
    with pytest.raises(CheckpointError, match="cut short after 10 frames"):
        list(codec.decompress_stream(codec.read_header(reader), reader, larger))
    for program, pieces, message in (
        (compiled(lm=True), [sound(1, 30)], "without a language model"),
        (compiled(STEREO), [sound(2, 30)], "looks ahead"),
        (compiled(), [sound(2, 30)], "2 channels"),
        (compiled(), [sound(1, 9) * np.nan], "NaN"),
        (compiled(), [], "empty"),
    ):
        with pytest.raises(AudiozooError, match=message):
            list(codec.compress_stream(program, pieces))
    with pytest.raises(CheckpointError, match="which encodec cannot code"):
        codec.decompress(content, compiled(STEREO))


@pytest.mark.slow
def test_through_a_pipe_sound_comes_out_before_it_ends(tmp_path):
    """`audiozoo codec encode … | audiozoo codec decode …`: half of the input, its end open, and there is output."""
    audiozoo.save(tiny(), tmp_path / "model")
    command = [sys.executable, "-m", "audiozoo.cli", "codec"]
    pipe, model = {"stdout": subprocess.PIPE, "bufsize": 0}, ["-", "-", "--model", str(tmp_path / "model")]
    environment = os.environ | {"AUDIOZOO_CACHE": str(tmp_path / "cache")}
    encode = [*command, "encode", *model, "--stream", "--raw", "800", "--bandwidth", "2.4"]
    with (
        subprocess.Popen(encode, stdin=subprocess.PIPE, env=environment, **pipe) as first,
        subprocess.Popen([*command, "decode", *model], stdin=first.stdout, env=environment, **pipe) as second,
    ):
        samples = to_pcm(sound(1, 800))
        first.stdin.write(samples[:800])
        begin = second.stdout.read(44)
        assert begin == wav_header(800, 1)
        early = b""
        while len(early) < 600:  # of 800 bytes that went in
            early += second.stdout.read(600 - len(early))
        assert first.poll() is second.poll() is None
        first.stdin.write(samples[800:])
        first.stdin.close()
        rest = b"".join(iter(lambda: second.stdout.read(1 << 16), b""))
        assert (first.wait(), second.wait()) == (0, 0)
    x = np.frombuffer(samples, "<i2")[None] / np.float32(32768)
    whole = codec.decompress(codec.compress(compiled(), x, 2.4), compiled())
    got = np.frombuffer(early + rest, "<i2")
    assert np.abs(got - np.frombuffer(to_pcm(whole), "<i2")).max() <= 1


# --- quantiser and training ------------------------------------------------------------------------------------------


def test_dead_entries_stay_replaced():
    """As the paper has it, an unused entry becomes a row of the batch and stays; the released code loses it at once."""
    quantizer = random_model(lambda rngs: EncodecModel(TINY, rngs=rngs)).quantizer
    quantizer.inited[...] = jnp.zeros((2, 1))
    z = jnp.asarray(sound(1, 30, 6))
    rows = jnp.asarray(np.stack([[np.zeros(8, int)] * 2, [np.arange(8) + 5] * 2]))
    train = jax.jit(
        lambda q, released: q.train_step(z, 1, rows=rows, kmeans_iterations=1, released=released), static_argnums=1
    )
    # All means start at one row, so that all but one are dead after the first batch; the second stands for that row.
    output = train(quantizer, False)
    np.testing.assert_allclose(output.commitment_loss, jnp.square(z - output.quantized).mean(), rtol=1e-5)
    books = output.codebooks
    placed = np.isclose(books.embed[0][2:], z[0, 7:13], atol=1e-3).all(axis=-1)
    assert placed.all()
    released = train(quantizer, True).codebooks
    assert not np.isclose(released.embed[0][2:], z[0, 7:13], atol=1e-3).all(axis=-1).any()
    np.testing.assert_array_equal(books.inited[:, 0], [1, 0])  # the second codebook was not used
    np.testing.assert_array_equal(books.embed[1], quantizer.embed[1])


def test_entries_stay_where_k_means_placed_them():
    """After the first batch and the next one like it, entries are the means; as released, they have shrunk."""
    quantizer = random_model(lambda rngs: EncodecModel(TINY, rngs=rngs)).quantizer
    rng = np.random.default_rng(0)
    centres = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    z = jnp.tile(centres, (50, 1))[None]
    rows = jnp.asarray(np.tile(np.arange(8), (2, 2, 1)))
    for released, size in ((False, 1.0), (True, (0.99 + 0.01 * 50) / 50)):
        quantizer.inited[...] = jnp.zeros((2, 1))
        options = {"rows": rows, "kmeans_iterations": 3, "released": released}
        quantizer.replace(quantizer.train_step(z, 1, **options).codebooks)
        np.testing.assert_allclose(quantizer.embed[0], size * centres, rtol=1e-4)
        if not released:
            np.testing.assert_allclose(quantizer.train_step(z, 1, **options).codebooks.embed[0], centres, rtol=1e-4)


def test_rows_are_drawn_once_where_there_are_enough():
    rows = np.asarray(encodec._draw_rows(jax.random.key(0), (2, 3, 8), 9)).reshape(6, 8)
    assert all(len(set(row)) == 8 for row in rows)
    assert len({tuple(row) for row in rows}) == 6
    few = np.asarray(encodec._draw_rows(jax.random.key(0), (2, 3, 8), 4))
    assert set(few.ravel()) == set(range(4))


def test_random_bandwidths():
    drawn = {int(encodec.random_quantizers(jax.random.key(i), EncodecConfig())) for i in range(40)}
    assert drawn == {2, 4, 8, 16, 32}


def test_kmeans_finds_clusters():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 10, (4, 3))
    x = jnp.asarray(np.repeat(centres, 25, axis=0) + rng.normal(0, 0.01, (100, 3)), jnp.float32)
    means, counts = encodec.kmeans(x, x[jnp.asarray([0, 30, 60, 90])], 5)
    np.testing.assert_array_equal(counts, [25] * 4)
    np.testing.assert_allclose(means, centres, atol=0.02)


def test_balancer_gives_each_loss_its_share():
    balancer = Balancer({"a": 1.0, "b": 3.0}, decay=0.5, total_norm=2.0)
    state = balancer.init()
    gradients = {"a": jnp.asarray([[1000.0, 0.0]]), "b": jnp.asarray([[0.0, 0.01]])}
    combined, state = balancer(gradients, state)
    np.testing.assert_allclose(combined, [[0.5, 1.5]], rtol=1e-5)
    combined, _ = balancer(gradients | {"a": 3 * gradients["a"]}, state)
    np.testing.assert_allclose(combined, [[0.5 * 3 / ((0.5 + 3) / 1.5), 1.5]], rtol=1e-5)


@pytest.mark.slow
def test_a_few_training_steps_make_the_codec_better():
    """Encoder, decoder, codebooks and discriminator learn two tones: the reconstruction's error falls by half."""
    config = dataclasses.replace(TINY, hidden_size=8, num_filters=8, codebook_size=16, target_bandwidths=(1.6, 3.2))
    model = random_model(lambda rngs: EncodecModel(config, rngs=rngs))
    model.quantizer.inited[...] = jnp.zeros_like(model.quantizer.inited[...])
    judge = random_model(lambda rngs: encodec.MultiScaleSTFTDiscriminator((32, 16), filters=4, rngs=rngs))
    balancer = Balancer({"time": 1.0, "frequency": 1.0, "adversarial": 0.1, "feature": 0.1})
    optimiser, judge_optimiser = optax.adam(3e-3, b1=0.5, b2=0.9), optax.adam(3e-4, b1=0.5, b2=0.9)
    graph, params, books = nnx.split(model, nnx.Param, ...)
    judge_graph, judge_params = nnx.split(judge)

    @jax.jit
    def step(params, books, judge_params, states, key):
        state, judge_state, balance = states
        keys = jax.random.split(key, 4)
        pitch = jax.random.uniform(keys[0], (4, 1, 1), minval=30.0, maxval=70.0)
        x = 0.5 * jnp.sin(2 * jnp.pi * pitch * jnp.arange(160) / 800)
        model, judge = nnx.merge(graph, params, books), nnx.merge(judge_graph, judge_params)
        count = encodec.random_quantizers(keys[1], config)
        gradient, balance, losses, output = encodec.codec_gradients(
            model, x, balancer, balance, discriminator=judge, num_quantizers=count, key=keys[2],
            frequency_options={"exponents": (5, 6)}, kmeans_iterations=10,
        )  # fmt: skip
        update, state = optimiser.update(gradient, state)
        params = optax.apply_updates(params, update)
        fixed = jax.lax.stop_gradient(output.audio_values)

        def loss(judge_params):
            judge = nnx.merge(judge_graph, judge_params)
            return encodec.discriminator_loss(judge(x)[0], judge(fixed)[0])

        judge_update, judge_state = judge_optimiser.update(jax.grad(loss)(judge_params), judge_state)
        model.quantizer.replace(output.codebooks)
        books = nnx.split(model, nnx.Param, ...)[2]
        return params, books, optax.apply_updates(judge_params, judge_update), (state, judge_state, balance), losses

    states = (optimiser.init(params), judge_optimiser.init(judge_params), balancer.init())
    errors = []
    for index in range(120):
        key = jax.random.key(index)
        params, books, judge_params, states, losses = step(params, books, judge_params, states, key)
        errors.append(float(losses["time"]))
    assert np.isfinite(errors).all()
    assert np.mean(errors[-10:]) < 0.5 * np.mean(errors[:3])


@pytest.mark.slow
def test_a_language_model_learns_and_makes_files_smaller():
    """Codes that follow from the frame before, but for one in ten: less than half the bits, and they come back."""
    rng, codes = np.random.default_rng(0), np.zeros((2, 400), np.int32)
    for t in range(1, 400):
        codes[:, t] = rng.integers(0, 8, 2) if rng.random() < 0.1 else (3 * codes[:, t - 1] + [1, 2]) % 8
    graph, params = nnx.split(random_model(lambda rngs: EncodecLanguageModel(TINY, rngs=rngs)))
    optimiser = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            where, offset = jax.random.randint(key, (2, 8), 0, 400 - 40)
            batch = jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(jnp.asarray(codes), s, 40, axis=1))(where)
            loss, gradient = jax.value_and_grad(
                lambda p: encodec.language_model_loss(nnx.merge(graph, p), batch, offset[0])
            )(params)
            update, state = optimiser.update(gradient, state)
            return (optax.apply_updates(params, update), state), loss

        return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(jax.random.key(0), 150))

    (params, _), losses = train(params)
    assert losses[-30:].mean() < 0.5 * losses[0]
    program = ecdc.Compiled(tiny(), nnx.merge(graph, params))
    encoder, predictions = codec.RangeEncoder(), program.predictions(2)
    for frame in codes.T:
        for code, cdf in zip(frame, predictions.next(), strict=True):
            encoder.push(int(code), cdf)
        predictions.tell(frame)
    content = encoder.finish()
    assert len(content) < 0.5 * len(codec.pack_bits(codes, 3))
    decoder, predictions = codec.RangeDecoder(codec.BitReader(content)), program.predictions(2)
    for frame in codes.T:
        pulled = [decoder.pull(cdf) for cdf in predictions.next()]
        predictions.tell(np.asarray(pulled))
        assert pulled == frame.tolist()


def test_the_annotations_hold(monkeypatch):
    assert {"EncodecModel.encode_chunk", "codec_gradients"} <= set(enforce(monkeypatch, encodec))
    x, model, stereo = jnp.zeros((2, 1, 60)), tiny(), tiny(STEREO)
    judge = random_model(lambda rngs: encodec.MultiScaleSTFTDiscriminator((32,), filters=4, rngs=rngs))
    lm = random_model(lambda rngs: EncodecLanguageModel(TINY, rngs=rngs))

    def calls(key):
        whole, both = model(x, jnp.ones((2, 60), jnp.int32)), stereo(jnp.zeros((1, 2, 90)), bandwidth=2.4)
        codes, state = model.encode_chunk(x, None)
        values, _ = model.decode_chunk(codes, model.initial_state(2)["decoder"])
        _, _, losses, output = encodec.codec_gradients(
            model, x, Balancer.encodec_24khz(), Balancer.encodec_24khz().init(), discriminator=judge, key=key,
            frequency_options={"exponents": (5,)},
        )  # fmt: skip
        less = Balancer({"time": 1.0, "feature": 1.0})  # of what the discriminator gives
        encodec.codec_gradients(model, x, less, less.init(), discriminator=judge, key=key)
        pdf, _ = lm.step(codes[:, :, 0], lm.initial_state(2))
        loss = encodec.language_model_loss(lm, output.audio_codes)
        return whole, both, codes, values, losses, output, pdf, loss, encodec.random_quantizers(key, TINY), state

    whole, both, codes, values, losses, output, pdf, *_ = jax.eval_shape(calls, jax.random.key(0))
    assert (whole.audio_codes.shape, whole.audio_values.shape) == ((1, 2, 1, 30), (2, 1, 60))
    assert (both.audio_codes.shape, both.audio_values.shape) == ((3, 1, 2, 20), (1, 2, 90))
    assert (codes.shape, values.shape, pdf.shape) == ((2, 1, 30), (2, 1, 60), (2, 1, 8))
    assert set(losses) == {"time", "frequency", "adversarial", "feature", "commitment"}
    assert output.codebooks.embed.shape == (2, 8, 6)


def test_half_precision_and_vmap():
    model = tiny()
    x = jnp.asarray(sound(2, 1, 60))
    codes = audiozoo.jit(model, "encode")(x).audio_codes
    values = audiozoo.jit(model, "decode")(codes, [None]).audio_values
    half = random_model(lambda rngs: EncodecModel(TINY, dtype=jnp.bfloat16, rngs=rngs))
    low = audiozoo.jit(half, "decode")(codes, [None]).audio_values
    assert low.dtype == jnp.bfloat16
    assert np.abs(low.astype(jnp.float32) - values).max() < 0.05 * np.abs(values).max()
    # Of the language model, probabilities that add up to 1; of one sound in two dtypes, no difference.
    language_model = random_model(lambda rngs: EncodecLanguageModel(TINY, dtype=jnp.bfloat16, rngs=rngs))
    state = language_model.initial_state()
    assert jax.eval_shape(language_model.step, jnp.zeros((1, 2), jnp.int32), state)[0].dtype == jnp.float32
    rough = x.astype(jnp.bfloat16)
    options = {"exponents": (5,), "n_mels": 4}
    assert encodec.frequency_loss(rough.astype(jnp.float32), rough, 800, **options) == 0
    graph, state = nnx.split(model)
    each = jax.jit(jax.vmap(lambda v: nnx.merge(graph, state).encode(v[None]).audio_codes[0, 0]))(x)
    np.testing.assert_array_equal(each, codes[0])


# --- processor and command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (sound(0), {}, "empty"),
        ([sound(9), sound(0)], {}, "Item 1 of the batch"),
        (np.full(9, np.nan, np.float32), {}, "NaN"),
        (sound(9), {"sampling_rate": 16_000}, "16000 Hz"),
        (np.zeros(9, np.int16), {}, "integers"),
        (sound(2, 9), {}, "2 channels"),
        (sound(9), {"padding": "most"}, "no padding"),
        (sound(9), {"padding": True, "truncation": True}, "exclude"),
        ([sound(9), sound(8)], {"padding": False}, "do not make one array"),
    ],
)
def test_input_that_gets_a_sentence(audio, options, message):
    with pytest.raises(AudiozooError, match=message):
        EncodecFeatureExtractor()(audio, **({"sampling_rate": 24_000} | options))


def test_mono_for_a_stereo_model():
    with pytest.raises(AudioError, match=r"\(2, samples\) is expected"):
        EncodecFeatureExtractor(feature_size=2)(sound(9), 24_000)


def test_the_processor_of_an_authors_file(tmp_path):
    """A `.th` file says nothing of it: sampling rate, channels and chunks are those of the model that it holds."""
    config = dataclasses.replace(EncodecConfig.encodec_48khz(), num_filters=2, hidden_size=4, codebook_size=8)
    model = random_model(lambda rngs: EncodecModel(config, rngs=rngs))
    values = {name: leaf[...] for name, leaf in variables(model).items()}
    path = write_pt(tmp_path / "encodec_48khz.th", dict(original_table(config).write(values)))
    assert audiozoo.load(path).config == config
    found = audiozoo.load_processor(path)
    assert (found.sampling_rate, found.feature_size, found.chunk_length, found.chunk_stride) == (
        48_000,
        2,
        48_000,
        47_520,
    )
    found.sampling_rate = 800
    found.save(tmp_path)
    assert audiozoo.load_processor(path).sampling_rate == 800


@pytest.mark.slow
def test_codec_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    assert commands.app in [group.typer_instance for group in cli.app.registered_groups]
    audiozoo.save(tiny(), tmp_path / "model")
    audiozoo.save(random_model(lambda rngs: EncodecLanguageModel(TINY, rngs=rngs)), tmp_path / "lm")
    assert audiozoo.load_processor(tmp_path / "model").sampling_rate == 800
    soundfile.write(tmp_path / "in.wav", sound(400, 2), 1600)
    runner, where = CliRunner(), {"model": str(tmp_path / "model"), "lm": str(tmp_path / "lm")}
    sound_file, small, back = (str(tmp_path / n) for n in ("in.wav", "out.ecdc", "back.wav"))

    def run(*arguments: str, stdin: bytes | None = None):
        return runner.invoke(commands.app, list(arguments), input=stdin, catch_exceptions=True)

    done = run("encode", sound_file, small, "--model", where["model"], "--bandwidth", "2.4")
    assert done.exit_code == 0, done.output
    content = (tmp_path / "out.ecdc").read_bytes()
    assert len(content) == len(header(al=200)) + 100 * 2 * 3 // 8
    told = json.loads(run("info", small, "--json").stdout)
    assert told == {"model": "encodec", "samples": 200, "codebooks": 2, "language_model": False, "bytes": len(content)}
    assert "codebooks       2" in run("info", small).stdout
    second = header(m="encodec_24khz", al=24_000, nc=4)  # 75 frames of 40 bits
    told = json.loads(run("info", "-", "--json", stdin=second + bytes(375)).stdout)
    assert (told["seconds"], "missing_bytes" in told) == (1.0, False)
    assert "missing bytes   5" in run("info", "-", stdin=second + bytes(370)).stdout
    # Mono is the same in both channels of a stereo model, and of many channels the first two are taken.
    audiozoo.save(tiny(dataclasses.replace(TINY, audio_channels=2)), tmp_path / "two")
    for channels in (1, 3):
        soundfile.write(tmp_path / "other.wav", sound(200, channels), 800)
        one, other = (
            run("encode", str(tmp_path / "other.wav"), "-", "--model", str(tmp_path / "two"), *how).stdout_bytes
            for how in ([], ["--stream"])
        )
        assert other[-75 // 2 :] == one[-75 // 2 :] != b""
    streamed = run("encode", sound_file, "-", "--model", where["model"], "--bandwidth", "2.4", "--stream").stdout_bytes
    assert streamed[-len(content) + len(header(al=200)) :] == content[len(header(al=200)) :]
    piped = run("decode", "-", "-", "--model", where["model"], "--raw", stdin=streamed)
    assert len(piped.stdout_bytes) == 2 * 200
    assert run("decode", small, back, "--model", where["model"]).exit_code == 0
    samples, rate = soundfile.read(back)
    assert (samples.shape, rate) == ((200,), 800)

    # Through standard input and output, with the language model.
    piped = run(
        "encode", "-", "-", "--model", where["model"], "--lm", where["lm"], stdin=(tmp_path / "in.wav").read_bytes()
    )
    assert piped.exit_code == 0
    assert codec.read_header(codec.BitReader(piped.stdout_bytes)).language_model
    wav = run("decode", "-", "-", "--model", where["model"], "--lm", where["lm"], stdin=piped.stdout_bytes)
    samples, rate = soundfile.read(io.BytesIO(wav.stdout_bytes))
    assert (samples.shape, rate) == ((200,), 800)

    soundfile.write(tmp_path / "nan.wav", np.full(90, np.nan, np.float32), 800, subtype="FLOAT")
    # A name in a file is no path: what lies at the end of this one is a model.
    (tmp_path / "path.ecdc").write_bytes(header(m="encodec_/../../model"))
    (tmp_path / "facebook" / "encodec_").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.ecdc").write_bytes(content[: len(content) // 2 + len(header(al=200)) // 2])
    for arguments, message in (
        (["decode", small, back], "say which with --model"),
        (["decode", "path.ecdc", back], "no model of facebook's; say which with --model"),
        (["decode", sound_file, back], "does not begin with ECDC"),
        (["info", str(tmp_path / "no.ecdc")], "does not exist"),
        (["encode", "no.wav", small, "--model", "no model"], "There is no file no.wav"),
        (["encode", sound_file, small, "--model", where["model"], "--bandwidth", "6"], "kbit/s, not at 6"),
        (["encode", sound_file, small, "--model", where["lm"]], "is a EncodecLanguageModel"),
        (["encode", sound_file, str(tmp_path / "no" / "x.ecdc"), "--model", where["model"]], "no directory"),
        (["encode", sound_file, small, "--model", where["model"], "--raw", "0"], "1 Hz or more"),
        (["encode", sound_file, "-", "--model", where["model"], "--lm", where["lm"], "--stream"], "where they end"),
        (["encode", str(tmp_path / "nan.wav"), small, "--model", where["model"]], "NaN or infinite"),
        (["encode", "-", "-", "--model", where["model"]], "Standard input is empty"),
        (["encode", "-", "-", "--model", where["model"], "--stream"], "not WAV"),
        (["encode", "-", "-", "--model", where["model"], "--stream", "--raw", "800"], "no samples"),
        (["decode", "-", "-", "--model", where["model"]], "cut short within its header"),
        (["decode", str(tmp_path / "half.ecdc"), back, "--model", where["model"]], "cut short"),
        (["decode", str(tmp_path / "half.ecdc"), "-", "--model", where["model"]], "cut short after 49 of 100 frames"),
        (["decode", small, str(tmp_path / "back.xyz"), "--model", where["model"]], "no format 'xyz'"),
        (["decode", small, str(tmp_path / "back"), "--model", where["model"]], "its ending says the format"),
        (["info", "-"], "cut short within its header"),
        (["encode", sound_file, small, "--model", where["model"], "--lm", where["model"]], "is a EncodecModel"),
    ):
        failed = run(*arguments)
        assert failed.exit_code == 1
        assert message in str(failed.exception), arguments
    assert (tmp_path / "out.ecdc").read_bytes() == content
    # Whoever reads what is written may stop; that is not the source's fault.
    with pytest.raises(BrokenPipeError), commands._opened(small):
        raise BrokenPipeError
