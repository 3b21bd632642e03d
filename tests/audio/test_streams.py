"""Sound through pipes: WAV of every kind front to back, bare samples, headers without a length."""

import io
import struct

import numpy as np
import pytest
import soundfile

from audiozoo.audio import SampleFormat, read, read_stream, to_pcm, wav_header
from audiozoo.audio.streams import read_wav_header
from audiozoo.errors import AudioError

SOUND = (0.5 * np.sin(np.arange(4000)[:, None] * [[0.05, 0.11]])).astype(np.float32)


class Pipe(io.RawIOBase):
    """It cannot be gone back in, and gives no more than is there."""

    def __init__(self, content):
        self.content = io.BytesIO(content)

    def read(self, size=-1):
        return self.content.read(min(size, 777))


def wav(subtype, form="WAV"):
    file = io.BytesIO()
    soundfile.write(file, SOUND, 8000, subtype=subtype, format=form)
    return file.getvalue()


KINDS = {"PCM_16": 3.1e-5, "PCM_24": 2e-7, "PCM_32": 1e-7, "FLOAT": 0, "DOUBLE": 0}  # libsndfile cuts off


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize(("subtype", "error"), KINDS.items())
def test_wav_is_read_front_to_back(subtype, error, form):
    pieces = list(read_stream(Pipe(wav(subtype, form)), 8000, mono=False, seconds=0.05))
    assert [p.shape for p in pieces] == [(2, 400)] * 10
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), SOUND.T, atol=error)


def test_what_stands_before_the_samples_is_passed_over():
    content = wav("PCM_16")
    odd = content[:12] + b"JUNK" + struct.pack("<I", 3) + b"abc\0" + content[12:]  # filled up to an even length
    for found in (odd, content + b"\0\0"):
        pieces = list(read_stream(Pipe(found), 8000, mono=False))
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), SOUND.T, atol=KINDS["PCM_16"])


def test_the_end_may_come_within_a_moment():
    bare = wav("PCM_16")[44:][:-1]
    for content, raw in ((wav("PCM_16")[:-1], None), (bare, SampleFormat(8000, 2))):
        pieces = list(read_stream(Pipe(content), 8000, mono=False, raw=raw, seconds=0))
        assert [piece.shape for piece in pieces] == [(2, 1)] * 3999


def test_rates_and_channels_are_brought_to_the_models():
    found = np.concatenate(list(read_stream(Pipe(wav("FLOAT")), 16_000)), axis=1)[0]
    np.testing.assert_allclose(found, read(wav("FLOAT"), 16_000), atol=1e-5)


@pytest.mark.parametrize("size", [None, 500, 1 << 40])
def test_what_is_written_is_read(size):
    """Also of a length that is not known, or that no header can say."""
    content = wav_header(8000, 2, size) + to_pcm(SOUND[:500].T) + (b"LIST...." if size == 500 else b"")
    found = np.concatenate(list(read_stream(Pipe(content), 8000, mono=False)), axis=1)
    np.testing.assert_allclose(found, SOUND[:500].T, atol=2e-5)
    if size == 500:
        samples, rate = soundfile.read(io.BytesIO(content))
        assert (samples.shape, rate) == ((500, 2), 8000)
    assert read_wav_header(io.BytesIO(content))[1] == (2000 if size == 500 else None)
    assert size == 500 or content[:8] == b"RIFF\xff\xff\xff\xff"
    unfinished = content[:40] + bytes(4) + content[44:2044]  # by a writer that did not come back
    again = np.concatenate(list(read_stream(Pipe(unfinished), 8000, mono=False)), axis=1)
    np.testing.assert_array_equal(again, found)
    raw = SampleFormat(8000, 2)
    bare = np.concatenate(list(read_stream(Pipe(content[44:2044]), 8000, mono=False, raw=raw)), axis=1)
    np.testing.assert_array_equal(bare, found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fLaC" + bytes(40), "not WAV"),
        (b"", "not WAV"),
        (wav("PCM_16")[:30], "within its header"),
        (wav("PCM_U8"), "kind 1 with 8 bits"),
        (b"RIFF....WAVEfmt " + struct.pack("<IHHIIHH", 16, 0xFFFE, 1, 8000, 16000, 2, 16), "kind 65534 with 16 bits"),
        (b"RIFF....WAVEfmt " + struct.pack("<IHH", 4, 1, 1) + b"data....", "how its samples lie"),
        (wav("PCM_16")[:44], "no samples"),
        (b"RIFF....WAVEdata....", "how its samples lie"),
        (wav_header(8000, 0), "0 channels"),
    ],
)
def test_what_cannot_be_read_gets_a_sentence(content, message):
    with pytest.raises(AudioError, match=message):
        list(read_stream(Pipe(content), 8000))


def test_what_is_too_loud_is_clipped():
    assert np.frombuffer(to_pcm(np.array([[1.5, 1.0, -1.0, -1.5]])), "<i2").tolist() == [32767, 32767, -32768, -32768]


def test_no_number():
    with pytest.raises(AudioError, match="NaN"):
        list(read_stream(Pipe(np.full(9, np.nan, "<f4").tobytes()), 8000, raw=SampleFormat(8000, 1, 32, floats=True)))
