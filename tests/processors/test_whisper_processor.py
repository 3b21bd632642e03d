"""Whisper's processor without the original: shapes, files, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

import audiozoo
from audiozoo import audio
from audiozoo.errors import AudioError, AudiozooError, CheckpointError, SourceError, UsageError
from audiozoo.processors.whisper import WhisperFeatureExtractor, WhisperProcessor
from audiozoo.text import WhisperTokenizer
from tests.models.tiny_whisper import build
from tests.text.vocabularies import SMALL_SPECIALS, real_directory, small_backend


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def sentence(error: pytest.ExceptionInfo[AudiozooError]) -> str:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    backend = small_backend()
    backend.add_special_tokens(SMALL_SPECIALS)
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    backend.save(str(path))
    return WhisperProcessor(WhisperFeatureExtractor(), WhisperTokenizer.from_tokenizer_file(path))


def test_one_waveform_is_30_seconds_of_features(processor):
    x = noise(16_000)
    inputs = processor(x, sampling_rate=16_000)
    assert list(inputs) == ["input_features"]
    assert inputs["input_features"].shape == (1, 80, 3_000)
    assert inputs["input_features"].dtype == np.float32
    expected = audio.long_log_mel_spectrogram(np.pad(x, (0, 464_000)))
    np.testing.assert_array_equal(inputs["input_features"][0], expected)


def test_a_padded_batch_equals_its_items(processor):
    batch = [noise(16_000), noise(500_000, 1), noise(401, 2)]
    together = processor(batch, 16_000, return_attention_mask=True)
    assert together["input_features"].shape == (3, 80, 3_000)
    assert together["attention_mask"].sum(axis=1).tolist() == [100, 3_000, 3]
    assert together["attention_mask"].dtype == np.int32
    for i, waveform in enumerate(batch):
        alone = processor(waveform, 16_000)["input_features"][0]
        np.testing.assert_array_equal(together["input_features"][i], alone)
    for form in ([list(map(float, batch[0][:500])), batch[2].tolist()], np.stack([noise(500), noise(500, 1)])):
        assert processor(form, 16_000)["input_features"].shape == (2, 80, 3_000)


def test_padding_and_truncation(processor):
    batch = [noise(16_000), noise(24_000)]
    assert processor(batch, 16_000, padding="longest")["input_features"].shape == (2, 80, 150)
    assert processor(batch, 16_000, padding=True, pad_to_multiple_of=16_000)["input_features"].shape == (2, 80, 200)
    assert processor(batch, 16_000, max_length=8_000)["input_features"].shape == (2, 80, 50)
    assert processor(batch[0], 16_000, padding=False)["input_features"].shape == (1, 80, 100)
    long = processor(noise(600_000), 16_000, truncation=False, padding="longest", return_attention_mask=True)
    assert long["input_features"].shape == (1, 80, 3_750)
    assert long["attention_mask"].shape == (1, 3_750)
    ragged = processor(noise(1_001), 16_000, padding=False, return_attention_mask=True)
    assert ragged["attention_mask"].shape == (1, ragged["input_features"].shape[-1]) == (1, 6)
    with pytest.raises(UsageError, match="do not make one array") as error:
        processor(batch, 16_000, padding=False)
    sentence(error)
    with pytest.raises(UsageError, match="no padding 'left'") as error:
        processor(batch, 16_000, padding="left")
    sentence(error)


def test_normalised_waveforms_do_not_depend_on_their_level(processor):
    x = noise(16_000)
    loud, quiet = (processor(0.2 + gain * x, 16_000, do_normalize=True)["input_features"] for gain in (1.0, 0.1))
    np.testing.assert_allclose(loud, quiet, atol=1e-4)


def test_dither_is_explicit():
    extractor = WhisperFeatureExtractor(dither=1e-3)
    silence = np.zeros(1_000, np.float32)
    a, b = (extractor(silence, 16_000, rng=np.random.default_rng(0))["input_features"] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.std() > 0


@pytest.mark.parametrize(
    ("waveform", "rate", "words"),
    [
        ([], 16_000, "empty"),
        (np.zeros(0, np.float32), 16_000, "empty"),
        (np.zeros((0, 500), np.float32), 16_000, "batch is empty"),
        (np.full(16_000, np.nan, np.float32), 16_000, "NaN"),
        (np.zeros(160, np.float32), 16_000, "too short: 160 samples"),
        (np.zeros(16_000, np.int16), 16_000, "integers"),
        (np.zeros((16_000, 2), np.float32), 16_000, "looks like .time, channels."),
        (np.zeros((1, 2, 16_000), np.float32), 16_000, "shape"),
        (np.zeros(48_000, np.float32), 48_000, "48000 Hz, but this model expects 16000 Hz"),
        ([np.zeros(500, np.float32), np.zeros((2, 500), np.float32)], 16_000, "Item 1 of the batch: .*2 channels"),
        ([np.zeros(500, np.float32), np.zeros(3, np.float32)], 16_000, "Item 1 of the batch: .*too short"),
    ],
)
def test_audio_that_cannot_be_used(processor, waveform, rate, words):
    with pytest.raises(AudioError, match=words) as error:
        processor(waveform, sampling_rate=rate)
    sentence(error)


def test_a_missing_sampling_rate_is_warned_about(processor):
    with pytest.warns(UserWarning, match="taken to be at 16000 Hz"):
        processor(noise(500))


def test_text_and_both(processor):
    assert processor(text="hello")["input_ids"] == processor.tokenizer.encode("hello")
    both = processor(noise(500), 16_000, text=["hello"])
    assert both["labels"].tolist() == [processor.tokenizer.encode("hello")]
    long, short = processor([noise(500)] * 2, 16_000, text=["hello", ""])["labels"].tolist()
    nothing = processor.tokenizer.encode("")
    assert short == nothing + [-100] * (len(long) - len(nothing))
    assert "input_features" in both
    for call, words in [
        (lambda: processor(), "audio, text, or both"),
        (lambda: processor(noise(500), 16_000, return_tensors="pt"), "NumPy"),
    ]:
        with pytest.raises(UsageError, match=words) as error:
            call()
        sentence(error)


def test_saving_and_loading(processor, tmp_path):
    WhisperProcessor(WhisperFeatureExtractor(128), processor.tokenizer, {"is_multilingual": False}).save(tmp_path)
    again = WhisperProcessor.from_directory(tmp_path)
    assert vars(again.feature_extractor) == vars(WhisperFeatureExtractor(128))
    assert not again.tokenizer.multilingual
    assert again.generation_config == {"is_multilingual": False}
    ids = again.tokenizer.encode("hello")
    assert again.decode(ids, skip_special_tokens=True) == "hello"
    assert again.batch_decode([ids], skip_special_tokens=True) == ["hello"]
    assert again.get_decoder_prompt_ids() == [(1, again.tokenizer.no_timestamps)]
    assert again.get_prompt_ids("a")[0] == again.tokenizer.sot_prev
    # transformers 5 writes one file for the whole processor.
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": config}))
    assert WhisperFeatureExtractor.from_directory(tmp_path).feature_size == 128
    (tmp_path / "processor_config.json").unlink()
    assert WhisperFeatureExtractor.from_directory(tmp_path).feature_size == 80
    for config in ('{"num_mel_bins": 128}', '{"audiozoo": {}, "config": {"num_mel_bins": 128}}'):
        (tmp_path / "config.json").write_text(config)
        assert WhisperFeatureExtractor.from_directory(tmp_path).feature_size == 128


def test_the_real_directory_of_another_project():
    processor = WhisperProcessor.from_directory(real_directory())
    assert processor.feature_extractor.feature_size == 80
    assert processor.tokenizer.vocabulary_size == 51_864


def test_what_a_hub_holds_of_it_without_the_weights(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((real_directory() / name).read_bytes())
    assert audiozoo.load_processor(tmp_path).tokenizer.vocabulary_size == 51_864


@pytest.mark.parametrize("write", [audiozoo.save, audiozoo.export])
def test_a_classifier_needs_no_tokenizer(write, tmp_path):
    write(build("WhisperForAudioClassification"), tmp_path / "made")
    processor = audiozoo.load_processor(tmp_path / "made")
    assert processor(noise(500), 16_000)["input_features"].shape == (1, 8, 3000)
    processor.save(tmp_path / "again")
    with pytest.raises(UsageError, match="has no text") as error:
        processor.decode([1])
    sentence(error)


def test_directories_that_hold_something_else(tmp_path):
    for content, kind, words in [
        (None, SourceError, "no Whisper tokenizer"),
        ("{", CheckpointError, "truncated"),
        ("[]", CheckpointError, "JSON object"),
        ('{"feature_extractor_type": "Wav2Vec2FeatureExtractor"}', CheckpointError, "Wav2Vec2FeatureExtractor"),
        ('{"hop_length": 320}', CheckpointError, "every 320"),
    ]:
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(kind, match=words) as error:
            WhisperProcessor.from_directory(tmp_path)
        sentence(error)
    with pytest.raises(SourceError, match="no directory"):
        WhisperProcessor.from_directory(tmp_path / "nowhere")
