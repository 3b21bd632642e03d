"""Features that several papers share, live against transformers' NumPy implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import audio_utils

from audiozoo import audio
from tests.parity.harness import assert_close, precision


@pytest.fixture(autouse=True)
def _torch_in_single_precision():
    with precision("float32"):
        yield


@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize(
    ("scale", "norm", "in_mel"), [("slaney", "slaney", False), ("htk", None, False), ("kaldi", None, True)]
)
def test_filterbanks(n_mels, scale, norm, in_mel):
    expected = audio_utils.mel_filter_bank(
        257, n_mels, 20.0, 7_800.0, 16_000, norm, scale, triangularize_in_mel_space=in_mel
    )
    ours = audio.mel_filterbank(
        257, n_mels, 16_000, f_min=20.0, f_max=7_800.0, scale=scale, norm=norm, triangles_in_mel=in_mel
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def speech(recordings) -> np.ndarray:
    return audio.read(recordings / "jfk.flac")[:64_123]


def test_filterbank_energies_of_speech_to_text(recordings):
    waveform = speech(recordings)
    extractor = transformers.Speech2TextFeatureExtractor()
    expected = extractor._extract_fbank_features(waveform)
    with jax.enable_x64(True):
        ours = audio.kaldi_fbank(jnp.asarray(waveform, jnp.float64) * 2**15)
    assert ours.shape == expected.shape == (1 + (len(waveform) - 400) // 160, 80)
    assert_close(np.asarray(ours, np.float32), expected.astype(np.float32), kind="features")
    # In float32 the mean, the preemphasis and the transform round what is 80 dB below the rest of the frame: 7e-3 at
    # most on this recording, where the same steps in PyTorch's float32 are off by 1.5e-2.
    single = audio.kaldi_fbank(jnp.asarray(waveform) * 2**15)
    assert single.dtype == np.float32
    ours_off, torch_off = np.abs(single - expected), np.abs(torch_fbank(waveform) - expected)
    assert ours_off.max() <= torch_off.max()
    assert np.sqrt(np.mean(ours_off**2)) <= np.sqrt(np.mean(torch_off**2)) < 1e-3


def torch_fbank(waveform: np.ndarray) -> np.ndarray:
    """Kaldi's default features, step by step in PyTorch's float32."""
    frames = (torch.from_numpy(waveform) * 2**15).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = frames * torch.hann_window(400, periodic=False).pow(0.85)
    energies = torch.fft.rfft(frames, 512).abs().pow(2)
    filters = audio_utils.mel_filter_bank(
        257, 80, 20.0, 8_000.0, 16_000, None, "kaldi", triangularize_in_mel_space=True
    )
    mel = energies @ torch.from_numpy(filters).float()
    return torch.clamp(mel, min=1.1920928955078125e-07).log().numpy()


@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
def test_filterbank_energies_of_the_spectrogram_transformer(recordings):
    waveform = speech(recordings)
    expected = transformers.ASTFeatureExtractor()._extract_fbank_features(waveform, max_length=399)
    with jax.enable_x64(True):
        ours = audio.kaldi_fbank(jnp.asarray(waveform, jnp.float64), 128, window="hanning")
    assert_close(np.asarray(ours, np.float32), np.asarray(expected, np.float32), kind="features")
