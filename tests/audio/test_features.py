"""Spectrograms against NumPy in double precision, librosa's filters, and Whisper's published features."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiozoo import audio
from audiozoo.audio import features
from audiozoo.errors import AudioError, UsageError
from tests.golden.whisper_log_mel import waveform as golden_waveform
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "whisper_log_mel.npz"


def exact_log_mel(waveform: np.ndarray, n_mels: int) -> np.ndarray:
    """Whisper's features by NumPy alone, in float64, the frames cut by a sliding window."""
    padded = np.pad(waveform.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][:-1]
    power = np.abs(np.fft.rfft(frames * np.hanning(401)[:-1])) ** 2
    mel = power @ librosa.filters.mel(sr=16_000, n_fft=400, n_mels=n_mels, dtype=np.float64).T
    log_mel = np.log10(np.maximum(mel, 1e-10)).T
    return (np.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0


@settings(max_examples=25)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 200), st.integers(1, 3))
def test_frames_are_a_sliding_window(length, hop, extra, batch):
    x = np.random.default_rng(0).standard_normal((batch, length + extra)).astype(np.float32)
    expected = np.lib.stride_tricks.sliding_window_view(x, length, axis=-1)[:, ::hop]
    np.testing.assert_array_equal(audio.frame(jnp.asarray(x), length, hop), expected)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("n_fft", "hop", "window"), [(400, 160, 400), (1024, 256, 800), (512, 512, 401), (64, 100, 64)]
)
@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_stft_is_the_sum_it_says(n_fft, hop, window, center, mode):
    x = np.random.default_rng(1).standard_normal((2, 3, 3_000))
    weights = audio.hann_window(window)
    padded = np.pad(x, [(0, 0), (0, 0), (n_fft // 2, n_fft // 2)], mode=mode) if center else x
    left = (n_fft - window) // 2
    full = np.pad(weights, (left, n_fft - window - left))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=-1)[..., ::hop, :]
    k, n = np.arange(n_fft // 2 + 1), np.arange(n_fft)
    expected = (frames * full) @ np.exp(-2j * np.pi * np.outer(n, k) / n_fft)
    with jax.enable_x64(True):
        x = jnp.asarray(x)
        ours = audio.stft(x, n_fft, hop, weights, center=center, pad_mode=mode)
        assert ours.dtype == np.complex128
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
        for power in (1.0, 2.0, 0.5):
            magnitude = audio.spectrogram(x, n_fft, hop, weights, power=power, center=center, pad_mode=mode)
            np.testing.assert_allclose(magnitude, np.abs(expected) ** power, rtol=1e-9, atol=1e-7)


def test_short_waveforms_and_wide_windows_get_one_sentence():
    with pytest.raises(AudioError, match="100 samples are too few to mirror 200 at the ends"):
        audio.stft(jnp.zeros(100), 400, 160)
    with pytest.raises(AudioError, match="fewer than one frame"):
        audio.stft(jnp.zeros(100), 400, 160, center=False)
    with pytest.raises(UsageError, match="longer than the frame"):
        audio.stft(jnp.zeros(1_000), 400, 160, np.ones(401))
    with pytest.raises(AudioError, match="too few for a spectrogram"):
        audio.long_log_mel_spectrogram(np.zeros(200, np.float32))


@pytest.mark.filterwarnings("ignore:Empty filters:UserWarning")
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize("htk", [False, True])
@pytest.mark.parametrize(
    ("n_fft", "n_mels", "low", "high"), [(400, 80, 0, 8_000), (400, 128, 0, None), (1024, 64, 50, 7_000)]
)
def test_filterbanks_are_librosas(n_fft, n_mels, low, high, htk, norm):
    expected = librosa.filters.mel(
        sr=16_000, n_fft=n_fft, n_mels=n_mels, fmin=low, fmax=high, htk=htk, norm=norm, dtype=np.float64
    )
    ours = audio.mel_filterbank(
        n_fft // 2 + 1, n_mels, 16_000, f_min=low, f_max=high, scale="htk" if htk else "slaney", norm=norm
    )
    np.testing.assert_allclose(ours, expected.T, rtol=1e-9, atol=1e-12)


@given(st.floats(0, 24_000), st.sampled_from(["slaney", "htk", "kaldi"]))
def test_mel_scales_have_an_inverse(hertz, scale):
    np.testing.assert_allclose(audio.mel_to_hertz(audio.hertz_to_mel(hertz, scale), scale), hertz, rtol=1e-9, atol=1e-9)


def test_unknown_scales_and_norms_are_named():
    with pytest.raises(UsageError, match="no mel scale 'bark'"):
        audio.hertz_to_mel(1.0, "bark")
    with pytest.raises(UsageError, match="no mel scale 'bark'"):
        audio.mel_to_hertz(1.0, "bark")
    with pytest.raises(UsageError, match="no filter norm 'area'"):
        audio.mel_filterbank(201, 80, 16_000, norm="area")


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_in_double_precision_is_exact(n_mels):
    x = golden_waveform()
    expected = exact_log_mel(x, n_mels)
    with jax.enable_x64(True):
        ours = audio.log_mel_spectrogram(jnp.asarray(x, jnp.float64), n_mels)
        assert ours.dtype == np.float64
    assert_close(ours, expected, "output")
    long = audio.long_log_mel_spectrogram(x.astype(np.float64), n_mels)
    assert long.dtype == np.float64
    assert_close(long, expected, "output")


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_equals_the_published_features(n_mels):
    with np.load(GOLDEN) as golden:
        expected, step = golden[f"mel_{n_mels}"], int(golden["every"])
        assert json.loads(str(golden["versions"]))["transformers"]
    ours = audio.long_log_mel_spectrogram(golden_waveform(), n_mels)
    assert ours.dtype == np.float32
    assert_close(ours[:, ::step], expected, "features")
    compiled = audio.log_mel_spectrogram(jnp.asarray(golden_waveform(), jnp.float32), n_mels)
    assert compiled.dtype == np.float32
    assert_close(np.asarray(compiled)[:, ::step], expected, "features in float32")


def test_the_golden_features_notice_a_symmetric_window(monkeypatch):
    with np.load(GOLDEN) as golden:
        expected, step = golden["mel_80"], int(golden["every"])
    original = features.hann_window
    monkeypatch.setattr(features, "hann_window", lambda length: original(length, periodic=False))
    power = features.spectrogram(jnp.asarray(golden_waveform()), 400, 160)[:-1]
    log_mel = features._log10_mel(power, 80)
    wrong = (jnp.maximum(log_mel, log_mel.max() - 8) + 4) / 4
    with pytest.raises(AssertionError, match="off by"):
        assert_close(np.asarray(wrong).T[:, ::step], expected, "features in float32")


def test_batches_and_vmap_equal_single_waveforms():
    batch = np.stack([golden_waveform(), 0.01 * golden_waveform()[::-1]]).astype(np.float32)
    single = np.stack([audio.log_mel_spectrogram(x) for x in batch])
    np.testing.assert_allclose(audio.log_mel_spectrogram(batch), single, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(audio.log_mel_spectrogram)(batch), single, atol=1e-6)
    np.testing.assert_allclose(audio.log_mel_spectrogram(batch[None]), single[None], atol=1e-6)


def test_silence_is_flat_and_finite():
    mel = audio.long_log_mel_spectrogram(np.zeros(16_000, np.float32))
    assert mel.shape == (80, 100)
    np.testing.assert_allclose(mel, (-10 + 4) / 4, atol=1e-6)


def test_the_gradient_reaches_the_waveform():
    x = jnp.asarray(golden_waveform()[:4_000], jnp.float32)
    gradient = jax.grad(lambda x: audio.log_mel_spectrogram(x).mean())(x)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("seconds", [0.0126, 0.5, 29.99, 30.0, 30.01, 60.0, 75.3])
@pytest.mark.parametrize("padding", [0, 480_000])
def test_a_waveform_of_any_length_through_chunks_is_the_whole_at_once(seconds, padding):
    x = np.random.default_rng(2).uniform(-0.5, 0.5, round(16_000 * seconds)).astype(np.float32)
    expected = exact_log_mel(np.pad(x, (0, padding)), 80)
    ours = audio.long_log_mel_spectrogram(x, padding=padding)
    assert_close(ours, expected.astype(np.float32), "features")


@settings(max_examples=15)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=30), st.sampled_from([0, 100, 480_000]))
def test_blocks_of_any_size_make_the_same_spectrogram(sizes, padding):
    total = max(sum(sizes), 400)
    x = np.random.default_rng(3).uniform(-0.5, 0.5, total).astype(np.float32)
    pieces = np.split(x, np.cumsum(sizes)[:-1])
    np.testing.assert_array_equal(
        audio.long_log_mel_spectrogram(iter(pieces), padding=padding),
        audio.long_log_mel_spectrogram(x, padding=padding),
    )


def test_stereo_is_refused():
    with pytest.raises(AudioError, match="one dimension"):
        audio.long_log_mel_spectrogram(np.zeros((2, 16_000), np.float32))


# --------------------------------------------------------------------------------------------------------------- Kaldi


def plain_fbank(x, n_mels, window, snip_edges, remove_dc, preemphasis, low, high, power):
    """Kaldi's features frame by frame, in NumPy."""
    count = 1 + (len(x) - 400) // 160 if snip_edges else (len(x) + 80) // 160
    hertz = np.arange(257) * 16_000 / 512
    mel = 1127 * np.log(1 + hertz / 700)
    edges = np.linspace(1127 * np.log(1 + low / 700), 1127 * np.log(1 + high / 700), n_mels + 2)
    rows = []
    for t in range(count):
        index = np.arange(400) + 160 * t - (0 if snip_edges else 120)
        index = np.where(index < 0, -1 - index, index)
        index = np.where(index >= len(x), 2 * len(x) - 1 - index, index)
        y = x[index] - (x[index].mean() if remove_dc else 0.0)
        y = np.array([y[n] - preemphasis * y[max(n - 1, 0)] for n in range(400)]) * window
        energy = np.abs(np.fft.rfft(y, 512)) ** power
        bands = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            up, down = (mel - left) / (centre - left), (right - mel) / (right - centre)
            bands.append((energy * np.clip(np.minimum(up, down), 0, None)).sum())
        rows.append(np.log(np.maximum(bands, 1.1920928955078125e-07)))
    return np.array(rows)


@pytest.mark.parametrize("snip_edges", [True, False])
@pytest.mark.parametrize("samples", [400, 1_999, 4_000])
@pytest.mark.parametrize(
    ("window", "remove_dc", "preemphasis", "low", "high", "power"),
    [("povey", True, 0.97, 20, 0, 2), ("hanning", False, 0.5, 100, -400, 1), ("hamming", True, 0.0, 20, 7_600, 2)],
)
def test_kaldis_features(samples, window, remove_dc, preemphasis, low, high, power, snip_edges):
    x = np.random.default_rng(4).standard_normal((2, samples)) + 0.3
    shapes = {"povey": np.hanning(400) ** 0.85, "hanning": np.hanning(400), "hamming": np.hamming(400)}
    top = high if high > 0 else 8_000 + high
    expected = [plain_fbank(row, 40, shapes[window], snip_edges, remove_dc, preemphasis, low, top, power) for row in x]
    options = {"window": window, "remove_dc_offset": remove_dc, "preemphasis": preemphasis, "snip_edges": snip_edges}
    with jax.enable_x64(True):
        ours = audio.kaldi_fbank(jnp.asarray(x), 40, f_min=low, f_max=high, power=power, **options)
        assert ours.dtype == np.float64
    assert_close(ours, np.stack(expected), "output")


def test_kaldis_dither_is_explicit_and_bad_input_is_named():
    silence = jnp.zeros(1_000)
    np.testing.assert_allclose(audio.kaldi_fbank(silence), np.log(np.finfo(np.float32).eps), rtol=1e-6)
    a, b = (audio.kaldi_fbank(silence, dither=1.0, key=jax.random.key(0)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert np.std(a) > 0
    with pytest.raises(UsageError, match="give kaldi_fbank a key"):
        audio.kaldi_fbank(silence, dither=1.0)
    with pytest.raises(UsageError, match="no window 'kaiser'"):
        audio.kaldi_fbank(silence, window="kaiser")
    with pytest.raises(AudioError, match="fewer than one frame"):
        audio.kaldi_fbank(silence[:399])
    with pytest.raises(AudioError, match="fewer than half a frame shift"):
        audio.kaldi_fbank(silence[:79], snip_edges=False)
