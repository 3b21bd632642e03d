"""Sound files: every container, rate and channel count; blocks; what cannot be read."""

from __future__ import annotations

import io
import os
import sys
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import soundfile
import soxr

from audiozoo import audio
from audiozoo.errors import AudioError, AudiozooError, SourceError, UsageError


def tone(rate: int, seconds: float, hertz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def sentence(error: pytest.ExceptionInfo[AudiozooError]) -> str:
    """The message, which must be one clear sentence."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert text[0].isupper() or text[0] == "'"
    return text


@pytest.mark.parametrize(
    ("name", "rate", "subtype", "off"),
    [
        ("a.wav", 16_000, "PCM_16", 2**-15),
        ("a.wav", 48_000, "PCM_24", 2**-23),
        ("a.wav", 44_100, "PCM_32", 2**-24),
        ("a.wav", 8_000, "FLOAT", 0),
        ("a.flac", 44_100, "PCM_24", 2**-23),
        ("a.aiff", 22_050, "PCM_16", 2**-15),
        ("a.ogg", 44_100, None, 2e-2),
        ("a.opus", 48_000, None, 5e-2),
        ("a.mp3", 44_100, None, 2e-2),
    ],
)
def test_containers_and_codings_round_trip(tmp_path, name, rate, subtype, off):
    stereo = np.stack([tone(rate, 0.5), tone(rate, 0.5, 660.0)])
    audio.write(tmp_path / name, stereo, rate, subtype)
    header = audio.info(tmp_path / name)
    assert (header.sampling_rate, header.channels) == (rate, 2)
    assert subtype is None or header.format.endswith(subtype)
    assert header.seconds == pytest.approx(0.5, abs=0.06)  # mp3 pads to whole frames
    both = audio.read(tmp_path / name, sampling_rate=None, mono=False)
    assert both.dtype == np.float32
    inner = slice(1_000, min(both.shape[1], stereo.shape[1]) - 1_000)  # lossy codings ring at an abrupt start and end
    np.testing.assert_allclose(both[:, inner], stereo[:, inner], rtol=0, atol=off)
    mixed = audio.read(tmp_path / name, sampling_rate=None)
    np.testing.assert_allclose(mixed, both.mean(axis=0), rtol=0, atol=1e-7)


def test_other_rates_are_resampled_by_soxr(tmp_path):
    samples = tone(44_100, 1.0)
    audio.write(tmp_path / "a.wav", samples, 44_100, "FLOAT")
    resampled = audio.read(tmp_path / "a.wav")
    np.testing.assert_array_equal(resampled, soxr.resample(samples, 44_100, 16_000))
    np.testing.assert_allclose(resampled[1000:-1000], tone(16_000, 1.0)[1000:-1000], atol=1e-4)
    np.testing.assert_array_equal(audio.resample(samples, 44_100, 16_000), resampled)
    stereo = audio.resample(np.stack([samples, -samples]), 44_100, 16_000)
    np.testing.assert_array_equal(stereo, np.stack([resampled, -resampled]))
    for rates in ((0, 16_000), (16_000, -1)):
        with pytest.raises(UsageError, match="sampling rates are positive"):
            audio.resample(samples, *rates)
    assert audio.resample(samples[:0], 44_100, 16_000).shape == (0,)
    with pytest.raises(AudioError, match="Cannot resample int64 samples"):
        audio.resample(np.ones(9, np.int64), 16_000, 8_000)


def test_the_source_may_be_bytes_a_file_a_pipe_or_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    audio.write(path, tone(16_000, 0.1), 16_000)
    expected = audio.read(path)
    content = path.read_bytes()

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    class Stdin:
        buffer = Pipe(content)

    monkeypatch.setattr(sys, "stdin", Stdin)
    for source in (content, io.BytesIO(content), Pipe(content), str(path), "-"):
        np.testing.assert_array_equal(audio.read(source), expected)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(audio.read(file), expected)
    behind = io.BytesIO(content)
    behind.read()
    with pytest.raises(AudioError, match="is empty"):
        audio.read(behind)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "named")
        threading.Thread(target=(tmp_path / "named").write_bytes, args=(content,), daemon=True).start()
        np.testing.assert_array_equal(audio.read(tmp_path / "named"), expected)
    if sys.platform == "linux":  # where a name is any bytes: an old one in Latin-1
        old = path.rename(tmp_path / os.fsdecode(b"caf\xe9.flac"))
        np.testing.assert_array_equal(audio.read(old), expected)


@pytest.mark.parametrize("mono", [True, False])
@pytest.mark.parametrize(("rate", "target"), [(16_000, 16_000), (44_100, 16_000), (8_000, 16_000), (22_050, None)])
def test_blocks_put_together_are_the_file(tmp_path, rate, target, mono):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, round(3.3 * rate))).astype(np.float32)
    audio.write(tmp_path / "a.wav", noise, rate, "FLOAT")
    whole = audio.read(tmp_path / "a.wav", target, mono)
    pieces = list(audio.blocks(tmp_path / "a.wav", target, seconds=0.7, mono=mono))
    assert [p.shape[-1] for p in pieces[:-1]] == [round(0.7 * (target or rate))] * (len(pieces) - 1)
    joined = np.concatenate(pieces, axis=-1)
    assert joined.shape == whole.shape
    np.testing.assert_allclose(joined, whole, rtol=0, atol=1e-6)


def test_a_whole_number_of_blocks_has_no_empty_last_one(tmp_path):
    audio.write(tmp_path / "a.wav", tone(16_000, 2.0), 16_000)
    assert [len(block) for block in audio.blocks(tmp_path / "a.wav", seconds=1.0)] == [16_000, 16_000]
    with pytest.raises(UsageError, match="holds no sample at 16000 Hz"):
        next(audio.blocks(tmp_path / "a.wav", seconds=1e-5))


def test_blocks_of_a_long_file_need_no_more_memory_than_of_a_short_one(tmp_path):
    peaks = []
    for minutes in (2, 32):
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", 8_000, 1) as file:
            for _ in range(minutes):
                file.write(tone(8_000, 60.0))
        tracemalloc.start()
        total = sum(len(block) for block in audio.blocks(path, seconds=30.0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == minutes * 60 * 16_000
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 10e6


def test_real_recordings(recordings):
    for name, rate, channels, seconds in [
        ("jfk.flac", 44_100, 2, 11.0),
        ("LJ050-0131.wav", 22_050, 1, 7.658),
        ("librispeech_198-209-0000.ogg", 16_000, 1, 13.91),
        ("nabucasa_en_US-joe.mp3", 48_000, 2, 8.437),
    ]:
        header = audio.info(recordings / name)
        assert (header.sampling_rate, header.channels) == (rate, channels)
        assert header.seconds == pytest.approx(seconds, abs=0.001)
        samples = audio.read(recordings / name)
        assert len(samples) == pytest.approx(seconds * 16_000, abs=400 if name.endswith("mp3") else 20)
        assert 0.02 < samples.std() < 0.3
    # Another resampler made the 16 kHz copy.
    np.testing.assert_allclose(audio.read(recordings / "jfk.flac"), audio.read(recordings / "jfk_16k.wav"), atol=5e-3)


def test_containers_that_libsndfile_does_not_know(tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="the optional package av reads m4a")
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone(44_100, 1.0)] * 2), format="fltp", layout="stereo")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    header = audio.info(path)
    assert (header.sampling_rate, header.channels) == (44_100, 2)
    assert header.seconds == pytest.approx(1.0, abs=0.1)
    samples = audio.read(path)
    start = 4_000
    spectrum = np.abs(np.fft.rfft(samples[start : start + 8_000]))
    assert spectrum.argmax() * 2 == 440
    np.testing.assert_allclose(np.concatenate(list(audio.blocks(path, seconds=0.3))), samples, atol=1e-6)
    np.testing.assert_array_equal(audio.read(path.read_bytes()), samples)

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match="install the package `av`") as error:
        audio.read(path)
    sentence(error)


@pytest.mark.parametrize("without_av", [True, False])
def test_what_cannot_be_read_gets_one_sentence(tmp_path, monkeypatch, without_av):
    if without_av:
        monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "notes.wav").write_text("Dear diary, this is no sound.\n" * 50)
    soundfile.write(tmp_path / "silent.wav", np.zeros(0, np.float32), 16_000)
    bad = np.zeros(160_000, np.float32)
    bad[104_000:] = np.nan  # not among the first that are decoded at a time
    soundfile.write(tmp_path / "nan.wav", bad, 16_000, subtype="FLOAT")
    for name, kind, words in [
        ("missing.wav", SourceError, "no file"),
        (".", SourceError, "is a directory"),
        ("empty.wav", AudioError, "empty"),
        ("notes.wav", AudioError, "not a sound file"),
        ("silent.wav", AudioError, "no samples"),
        ("nan.wav", AudioError, "first at 6.500 s"),
    ]:
        for reader in (audio.read, lambda path: list(audio.blocks(path))):
            with pytest.raises(kind, match=words) as error:
                reader(tmp_path / name)
            assert name == "." or name in sentence(error)
    for source, kind in [(b"", AudioError), (b"RIFF but no more", AudioError), (3, UsageError)]:
        with pytest.raises(kind) as error:
            audio.read(source)
        sentence(error)


def test_a_truncated_file_is_read_as_far_as_it_goes_or_named(tmp_path):
    audio.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 160_000), 16_000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(content[: len(content) // 2])
    try:
        samples = audio.read(tmp_path / "half.flac")
    except AudioError as problem:
        assert "half.flac" in str(problem)  # noqa: PT017
    else:
        assert 40_000 < len(samples) < 100_000


def test_lengths_that_headers_do_not_tell(tmp_path, monkeypatch):
    """FLAC, WAV and webm as written to a pipe, Ogg and MP3 files one behind the other; and a rate that blows up."""
    av = pytest.importorskip("av", reason="the optional package av reads webm and chained ogg")
    whole = tone(48_000, 1.5)
    audio.write(tmp_path / "a.flac", whole, 48_000)
    flac = bytearray((tmp_path / "a.flac").read_bytes())
    flac[21] &= 0xF0  # STREAMINFO's 36 bits for the number of samples
    flac[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(flac)
    np.testing.assert_array_equal(audio.read(tmp_path / "piped.flac"), audio.read(tmp_path / "a.flac"))
    assert audio.info(tmp_path / "piped.flac").seconds == 1.5

    pipe = io.BytesIO()
    pipe.seekable = lambda: False
    with av.open(pipe, "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((whole[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert audio.info(pipe.getvalue()).seconds == pytest.approx(1.5, abs=0.05)

    audio.write(tmp_path / "a.ogg", whole, 48_000)
    one = (tmp_path / "a.ogg").read_bytes()
    assert audio.info(one + one).seconds == pytest.approx(3.0, abs=0.02)
    assert len(audio.read(io.BytesIO(one + one))) == pytest.approx(48_000, abs=320)
    monkeypatch.setitem(sys.modules, "av", None)
    assert audio.info(one).seconds == 1.5
    with pytest.raises(AudioError, match="several Ogg streams") as error:
        audio.read(one + one)
    sentence(error)

    for form, subtype in (("WAV", "PCM_16"), ("WAVEX", "PCM_24"), ("WAV", "FLOAT")):
        soundfile.write(tmp_path / "a.wav", np.stack([whole, -whole], 1), 48_000, format=form, subtype=subtype)
        wav = bytearray((tmp_path / "a.wav").read_bytes())
        known = audio.read(bytes(wav), None, mono=False)
        at = wav.index(b"data") + 4
        wav[4:8] = wav[at : at + 4] = bytes(4)
        (tmp_path / "piped.wav").write_bytes(wav)
        for source in (tmp_path / "piped.wav", bytes(wav)):
            np.testing.assert_array_equal(audio.read(source, None, mono=False), known)
        assert audio.info(bytes(wav)).seconds == 1.5
    soundfile.write(tmp_path / "a.wav", whole[:0], 48_000)
    with pytest.raises(AudioError, match="holds no samples"):
        audio.read(tmp_path / "a.wav")

    audio.write(tmp_path / "a.mp3", whole, 48_000)
    one, tags = (tmp_path / "a.mp3").read_bytes(), (b"ID3\3\0\0\0\0\2\1" + bytes(257), b"TAG" + bytes(125))
    decoded = audio.read(one, None)
    (tmp_path / "three.mp3").write_bytes(tags[0] + one + tags[1] + tags[0] + one + one)
    np.testing.assert_array_equal(audio.read(tmp_path / "three.mp3", None), np.tile(decoded, 3))
    assert audio.info(one + one).seconds == 2 * audio.info(one).seconds
    for rest in (tags[1], bytes(9000), tags[1] + bytes(9000)):
        np.testing.assert_array_equal(audio.read(one + rest, None), decoded)
    for other, rate in ((whole, 44_100), (np.stack([whole, whole]), 48_000)):
        audio.write(tmp_path / "b.mp3", other, rate)
        with pytest.raises(AudioError, match="several MP3 files in one: one of 1 channels at 48000 Hz") as error:
            audio.read(one + (tmp_path / "b.mp3").read_bytes())
        sentence(error)

    soundfile.write(tmp_path / "slow.wav", whole, 100)
    assert len(audio.read(tmp_path / "slow.wav", None)) == len(whole)
    with (tmp_path / "slow.wav").open("rb") as file:
        assert next(audio.streams.read_stream(file, 100)).shape == (1, 8)
    soundfile.write(tmp_path / "slow.wav", whole, 1)
    with pytest.raises(AudioError, match="says that it is at 1 Hz"):
        audio.read(tmp_path / "slow.wav")
    with pytest.raises(AudioError, match="at 1 Hz"), (tmp_path / "slow.wav").open("rb") as file:
        next(audio.streams.read_stream(file, 16_000))


def test_streams_that_begin_together_are_one():
    """An Ogg file may hold several streams side by side, as of a video, which is not one behind the other."""

    def pages(*flags: int) -> io.BytesIO:
        return io.BytesIO(b"".join(b"OggS\0" + bytes([flag]) + bytes(20) + b"\1\3abc" for flag in flags))

    assert not audio.files._is_chained_ogg(pages(2, 2, 0, 0, 4))
    assert audio.files._is_chained_ogg(pages(2, 2, 0, 4, 2))


def test_writing_leaves_no_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    audio.write(path, tone(16_000, 0.1), 16_000)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        args[0].write_bytes(b"half a fi")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(UsageError, match="the disk is full"):
        audio.write(path, tone(16_000, 0.2), 16_000)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_writing_clips_and_refuses(tmp_path):
    audio.write(tmp_path / "a.wav", np.array([0.0, 2.0, -2.0]), 16_000)
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav"), [0, 1, -1], atol=1e-4)
    audio.write(tmp_path / "a.wav", np.zeros((2, 2)), 16_000)
    audio.write(tmp_path / "a.opus", tone(48_000, 0.1), 48_000, "VORBIS")
    assert audio.info(tmp_path / "a.opus").format == "OGG/VORBIS"
    for path, samples, kind, words in [
        ("a.xyz", tone(16_000, 0.1), UsageError, "no format 'xyz'"),
        ("a.raw", tone(16_000, 0.1), UsageError, "no format 'raw'"),
        ("none/a.wav", tone(16_000, 0.1), SourceError, "no directory"),
        ("b.wav", np.zeros((2, 2, 2)), AudioError, "shape"),
        ("b.wav", np.zeros((100, 2)), AudioError, "channels come first"),
        ("b.wav", np.array([np.inf]), AudioError, "infinite"),
        ("b.mp3", tone(44_100, 0.1), UsageError, r"b\.mp3' as MP3 at 44101 Hz: Error : MPEG"),
    ]:
        with pytest.raises(kind, match=words) as error:
            audio.write(tmp_path / path, samples, 44_101)
        sentence(error)
        assert not (tmp_path / path).exists()


@pytest.mark.parametrize("rate", [22_050, 44_100, 96_000])
def test_opus_of_rates_that_it_does_not_have(tmp_path, rate):
    stereo = np.stack([tone(rate, 0.5), 0.5 * tone(rate, 0.5)])
    audio.write(tmp_path / "a.opus", stereo, rate)
    found = audio.info(tmp_path / "a.opus")
    assert (found.sampling_rate, found.channels, found.format) == (48_000, 2, "OGG/OPUS")
    assert found.seconds == pytest.approx(0.5, abs=1e-4)
    heard, inside = audio.read(tmp_path / "a.opus", rate, mono=False), slice(rate // 50, -rate // 50)
    np.testing.assert_allclose(heard[:, inside], stereo[:, inside], atol=5e-2)


@pytest.mark.parametrize(
    ("waveform", "rate", "words"),
    [
        ([], 16_000, "empty"),
        (np.zeros(0), 16_000, "empty"),
        (np.array([0.0, np.nan, 0.0]), 16_000, "1 NaN or infinite samples, the first at index 1"),
        (np.array([0.0, 0.0, -np.inf]), 16_000, "first at index 2"),
        (np.zeros(4_000, np.int16), 16_000, "integers .int16.; scale it"),
        (np.zeros((2, 4_000)), 16_000, "2 channels"),
        (np.zeros((4_000, 2)), 16_000, "2 channels"),
        (np.zeros((1, 4_000)), 16_000, "one dimension"),
        (np.float32(1.0), 16_000, "one dimension"),
        (np.zeros(4_000), 44_100, "44100 Hz, but this model expects 16000 Hz"),
        (np.zeros(160), 16_000, "too short: 160 samples .0.010 s., at least 400 .0.025 s."),
        (np.zeros(4_000, bool), 16_000, "integers .bool.; scale it"),
        (np.zeros(4_000, np.complex64), 16_000, "complex64"),
        (["a", "b"], 16_000, "values; floats"),
        ([[0.0], [0.0, 1.0]], 16_000, "ragged"),
    ],
)
def test_waveforms_that_cannot_be_used(waveform, rate, words):
    with pytest.raises(AudioError, match=words) as error:
        audio.check_waveform(waveform, rate, 16_000, minimum_samples=400)
    sentence(error)


def test_a_good_waveform_keeps_its_precision():
    """float32 at least, also in a file or at another rate: what a model in bfloat16 gives can be used."""
    for dtype, expected in [
        (ml_dtypes.bfloat16, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ]:
        assert audio.check_waveform(np.zeros(500, dtype), 16_000, 16_000).dtype == expected
        assert audio.resample(np.zeros(500, dtype), 16_000, 8_000).dtype == expected
    assert audio.check_waveform([0.0] * 500, minimum_samples=500).shape == (500,)


def test_as_many_channels_as_a_model_has():
    rows = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(audio.files.in_channels(rows, 2), rows[:2])
    np.testing.assert_array_equal(audio.files.in_channels(rows[0], 1), rows[:1])
    for waveform in (rows[0], rows[:2]):
        np.testing.assert_array_equal(audio.files.in_channels(waveform, 3), rows[[0, 0, 0]])
