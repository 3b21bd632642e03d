"""The settings of a feature extractor, as files have them."""

from __future__ import annotations

import json

import pytest

import audiozoo
from audiozoo.errors import CheckpointError
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.clap import ClapFeatureExtractor
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor
from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor
from audiozoo.processors.speecht5 import SpeechT5FeatureExtractor
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor
from audiozoo.processors.whisper import WhisperFeatureExtractor


def written(folder, settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("cls", "wrong", "told"),
    [
        (Wav2Vec2FeatureExtractor, {"padding_value": "x"}, "has padding_value 'x', which is no float"),
        (Wav2Vec2FeatureExtractor, {"sampling_rate": True}, "has sampling_rate True, which is no int"),
        (SpeechT5FeatureExtractor, {"num_mel_bins": None}, "has num_mel_bins None, which is no int"),
        (ASTFeatureExtractor, {"mean": None}, "has mean None, which is no float"),
        (ASTFeatureExtractor, {"sampling_rate": 0}, "has a sampling rate of 0 Hz"),
        (ClapFeatureExtractor, {"top_db": []}, r"has top_db \[\], which is no int \| None"),
        (EncodecFeatureExtractor, {"overlap": float("nan")}, r"has overlap nan, which is no float \| None"),
        (WhisperFeatureExtractor, {"chunk_length": 30.5}, "has chunk_length 30.5, which is no int"),
        (MusicgenMelodyFeatureExtractor, {"stem_indices": 3}, "has stem_indices 3, which is no tuple"),
        (Speech2TextFeatureExtractor, {"global_cmvn": "x"}, "has global_cmvn 'x', which is no Mapping"),
        (
            ASTFeatureExtractor,
            {"feature_extractor_type": "A"},
            "holds the settings of a A, not of a ASTFeatureExtractor",
        ),
    ],
)
def test_what_is_of_another_type_is_named(cls, wrong, told, tmp_path):
    with pytest.raises(CheckpointError, match=told):
        cls.from_directory(written(tmp_path, wrong))


def test_json_has_no_tuples_and_one_kind_of_number(tmp_path):
    melody = MusicgenMelodyFeatureExtractor.from_directory(written(tmp_path, {"stem_indices": [3, 2], "unknown": {}}))
    assert tuple(melody.stem_indices) == (3, 2)
    codec = EncodecFeatureExtractor.from_directory(written(tmp_path, {"chunk_length_s": 1, "overlap": None}))
    assert (codec.chunk_length, codec.chunk_stride) == (24_000, None)
    assert SpeechT5FeatureExtractor.from_directory(written(tmp_path, {"num_mel_bins": 40})).num_mel_bins == 40


def test_files_of_which_no_processor_can_be_made(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": None}))
    with pytest.raises(CheckpointError, match="No processor can be made of the settings in"):
        audiozoo.load_processor(written(tmp_path, {}))
