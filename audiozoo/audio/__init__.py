"""Waveforms in and out: files, resampling, spectrograms and the features of the papers."""

from audiozoo.audio.features import (
    frame,
    hann_window,
    hertz_to_mel,
    kaldi_fbank,
    kaldi_window,
    log_mel_spectrogram,
    long_log_mel_spectrogram,
    mel_filterbank,
    mel_to_hertz,
    spectrogram,
    stft,
)
from audiozoo.audio.files import AudioInfo, blocks, check_waveform, in_channels, info, read, resample, write
from audiozoo.audio.speech import speech_regions
from audiozoo.audio.streams import SampleFormat, read_stream, to_pcm, wav_header

__all__ = [
    "AudioInfo",
    "SampleFormat",
    "blocks",
    "check_waveform",
    "frame",
    "hann_window",
    "hertz_to_mel",
    "in_channels",
    "info",
    "kaldi_fbank",
    "kaldi_window",
    "log_mel_spectrogram",
    "long_log_mel_spectrogram",
    "mel_filterbank",
    "mel_to_hertz",
    "read",
    "read_stream",
    "resample",
    "spectrogram",
    "speech_regions",
    "stft",
    "to_pcm",
    "wav_header",
    "write",
]
