"""Whisper's features, tokens and normalised text, live against openai-whisper and transformers."""

from __future__ import annotations

import functools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import audiozoo
from audiozoo import audio
from audiozoo.errors import SourceError
from audiozoo.processors.whisper import WhisperFeatureExtractor, WhisperProcessor
from audiozoo.text import (
    LANGUAGE_CODES,
    LANGUAGES,
    BasicTextNormalizer,
    EnglishTextNormalizer,
    WhisperTokenizer,
    normalizers,
)
from tests.parity.harness import assert_close, precision
from tests.text.vocabularies import TEXTS, real_directory
from tests.weights_conversion import make_whisper_pt

openai = pytest.importorskip("whisper", reason="the package openai-whisper (extra `reference`) is not installed")

openai_normalizers = pytest.importorskip("whisper.normalizers", reason="openai-whisper is not installed")

VOCABULARIES = {"multilingual": (True, 99), "large-v3": (True, 100), "english": (False, 99)}


@pytest.fixture(autouse=True)
def _single_precision():
    """The original's extractor works in float32 whatever PyTorch's default is."""
    with precision("float32"):
        yield


# ------------------------------------------------------------------------------------------------------------- features


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_features_of_real_recordings(recordings, n_mels):
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
    ours = WhisperFeatureExtractor(n_mels)
    for path in sorted(recordings.glob("*.*")):
        if path.suffix in (".wav", ".flac", ".ogg", ".mp3"):
            waveform = audio.read(path)
            features = ours(waveform, 16_000)["input_features"]
            thirty = np.pad(waveform, (0, max(0, 480_000 - len(waveform))))[:480_000]
            exact = extractor._np_extract_fbank_features([thirty], "cpu").astype(np.float32)
            assert_close(features, exact, kind="features", name=path.name)
            by_torch = extractor(waveform, sampling_rate=16_000, return_tensors="np").input_features
            assert_close(features, by_torch, kind="features by torch.stft", name=path.name)
            compiled = audio.log_mel_spectrogram(thirty[None], n_mels)
            assert_close(compiled, exact, kind="features in float32", name=path.name)
            whole = openai.log_mel_spectrogram(torch.from_numpy(waveform), n_mels, padding=480_000).numpy()
            long = audio.long_log_mel_spectrogram(audio.blocks(path, seconds=7.0), n_mels, padding=480_000)
            assert_close(long, whole, kind="features by torch.stft", name=path.name)


def test_filters_are_the_published_ones():
    with np.load(Path(openai.__file__).parent / "assets" / "mel_filters.npz") as published:
        for n_mels in (80, 128):
            ours = audio.mel_filterbank(201, n_mels, 16_000).T.astype(np.float32)
            np.testing.assert_allclose(ours, published[f"mel_{n_mels}"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "longest"},
        {"padding": "longest", "truncation": False},
        {"padding": "longest", "truncation": False, "pad_to_multiple_of": 1_000},
        {"max_length": 48_000},
        {"do_normalize": True},
        {"padding": "longest", "truncation": False, "do_normalize": True},
    ],
    ids=str,
)
def test_batches_and_options(options):
    theirs, ours = transformers.WhisperFeatureExtractor(), WhisperFeatureExtractor()
    batch = [noise(16_001), noise(500_000, 1), noise(777, 2)]
    for raw in (batch, batch[0], batch[2].tolist(), np.stack([noise(900), noise(900, 3)]), batch[0].astype(np.float64)):
        expected = theirs(raw, sampling_rate=16_000, return_tensors="np", return_attention_mask=True, **options)
        inputs = ours(raw, 16_000, return_attention_mask=True, **options)
        assert set(inputs) == set(expected)
        assert_close(inputs["input_features"], expected["input_features"], kind="features by torch.stft")
        assert inputs["attention_mask"].dtype == expected["attention_mask"].dtype
        np.testing.assert_array_equal(inputs["attention_mask"], expected["attention_mask"])


# --------------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module", params=VOCABULARIES)
def pair(request):
    """Our tokenizer and OpenAI's."""
    multilingual, languages = VOCABULARIES[request.param]
    ours = WhisperTokenizer.from_openai_package(multilingual, languages)
    return ours, openai.tokenizer.get_tokenizer(multilingual, num_languages=languages)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """Our tokenizer, and transformers' on the files that ours wrote."""
    directory = tmp_path_factory.mktemp("saved")
    pair[0].save(directory)
    return pair[0], transformers.WhisperTokenizer.from_pretrained(directory), directory


def some_ids(tokenizer: WhisperTokenizer, seed: int) -> list[int]:
    """Text, broken characters, special tokens and timestamps in any order."""
    draw = random.Random(seed)
    ranges = [(0, tokenizer.eot), (0, tokenizer.eot), (tokenizer.eot, tokenizer.timestamp_begin)]
    ranges += [(0, 256), (tokenizer.timestamp_begin, tokenizer.vocabulary_size)]
    ids = [draw.randrange(*draw.choice(ranges)) for _ in range(draw.randrange(1, 24))]
    return [tokenizer.sot_prev, *ids] if draw.random() < 0.2 else ids


letters = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t'aeiouéß你好ありがとう안녕ไทйض🎉👩‍👧🇩🇪²½"),
    max_size=60,
)


def test_special_ids_are_openais(pair):
    ours, theirs = pair
    names = "eot sot sot_prev sot_lm no_speech no_timestamps timestamp_begin transcribe translate non_speech_tokens"
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.vocabulary_size == theirs.encoding.n_vocab
    assert ours.sot_sequence() == tuple(theirs.sot_sequence)
    assert dict(zip(ours.all_language_codes, ours.all_language_tokens, strict=True)) == dict(
        zip(theirs.all_language_codes, theirs.all_language_tokens, strict=True)
    )
    assert len(ours.non_speech_tokens) == (82 if ours.multilingual else 84)
    assert openai.tokenizer.LANGUAGES == LANGUAGES
    assert openai.tokenizer.TO_LANGUAGE_CODE == LANGUAGE_CODES


@settings(max_examples=200)
@given(letters)
def test_any_text_has_openais_tokens(pair, text):
    ours, theirs = pair
    ids = ours.encode_ordinary(text)
    assert ids == theirs.encode(text, disallowed_special=())
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, allowed_special="all")
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_words_are_openais(pair, language):
    ours, theirs = pair
    before, theirs.language = theirs.language, language
    try:
        for seed in range(400):
            ids = some_ids(ours, seed)
            assert ours.decode_with_timestamps(ids) == theirs.decode_with_timestamps(ids)
            text = [token for token in ids if token < ours.timestamp_begin]
            assert ours.decode(text) == theirs.decode(ids)
            assert ours.split_to_word_tokens(ids, language) == theirs.split_to_word_tokens(ids)
    finally:
        theirs.language = before


@settings(max_examples=200)
@given(letters)
def test_any_text_has_transformers_tokens(saved, text):
    ours, theirs, _ = saved
    for add in (True, False):
        assert ours.encode(text, add) == theirs.encode(text, add_special_tokens=add)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_special_tokens": True},
        {"decode_with_timestamps": True},
        {"decode_with_timestamps": True, "skip_special_tokens": True},
        {"output_offsets": True},
        {"output_offsets": True, "skip_special_tokens": True},
        {"normalize": True, "skip_special_tokens": True},
        {"basic_normalize": True},
        {"basic_normalize": True, "remove_diacritics": True},
    ],
    ids=str,
)
def test_decoding_is_transformers(saved, options):
    ours, theirs, _ = saved
    batch = [some_ids(ours, seed) for seed in range(300)]
    for ids in batch:
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)
    if "output_offsets" in options:
        return  # transformers 5.23 computes no offsets for a batch
    rows = [ids for ids in batch if ids[0] != ours.sot_prev]
    assert ours.batch_decode(rows, **options) == theirs.batch_decode(rows, **options)


def test_prompts_are_stripped_in_batches_too(saved):
    """transformers 5.23 looks for a prompt in the first row as if it were the first token, and so keeps all prompts."""
    ours, theirs, _ = saved
    row = [ours.sot_prev, *ours.encode_ordinary("past"), ours.sot, *ours.encode_ordinary("now")]
    assert ours.batch_decode([row], skip_special_tokens=True) == ["now"]
    assert theirs.decode(row, skip_special_tokens=True) == "now"
    assert theirs.batch_decode([row], skip_special_tokens=True) == ["pastnow"]


def test_texts_from_every_kind_of_file(saved, tmp_path):
    ours, theirs, directory = saved
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        shutil.copy(directory / name, tmp_path)
    pieces = WhisperTokenizer.from_directory(tmp_path)
    whole = WhisperTokenizer.from_directory(directory)
    for text in [*TEXTS, "<|1.00|>"]:
        expected = theirs.encode(text)
        assert expected == ours.encode(text) == pieces.encode(text) == whole.encode(text)


def test_prompts(saved):
    ours, theirs, directory = saved
    for task, language, silent in [("translate", "german", True), ("transcribe", "yo", False), (None, None, True)]:
        arguments = {"task": task, "language": language, "no_timestamps": silent}
        ours = WhisperTokenizer.from_directory(directory)
        theirs = transformers.WhisperTokenizer.from_pretrained(directory)
        assert ours.get_decoder_prompt_ids(**arguments) == theirs.get_decoder_prompt_ids(**arguments)
        assert ours.encode("Hello") == theirs.encode("Hello")
    np.testing.assert_array_equal(ours.get_prompt_ids(" Dr. Who "), theirs.get_prompt_ids(" Dr. Who "))


def test_the_files_of_a_converted_checkpoint():
    directory = real_directory()
    ours = WhisperTokenizer.from_directory(directory)
    theirs = transformers.WhisperTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)


def test_the_whole_processor_on_the_same_directory(tmp_path):
    tokenizer = WhisperTokenizer.from_openai_package()
    WhisperProcessor(WhisperFeatureExtractor(128), tokenizer).save(tmp_path)
    ours = WhisperProcessor.from_directory(tmp_path)
    theirs = transformers.WhisperProcessor.from_pretrained(tmp_path)
    batch = [noise(16_000), noise(32_000, 1)]
    inputs = ours(batch, sampling_rate=16_000, text=["Hello.", "Guten Tag!"])
    expected = theirs(batch, sampling_rate=16_000, text=["Hello.", "Guten Tag!"])
    assert set(inputs) == set(expected)
    labels = [row[row != -100].tolist() for row in inputs["labels"]]
    assert labels == expected["labels"]
    assert_close(inputs["input_features"], expected["input_features"], kind="features by torch.stft")
    assert ours.batch_decode(labels, skip_special_tokens=True) == theirs.batch_decode(
        expected["labels"], skip_special_tokens=True
    )
    # What transformers writes today, we read.
    theirs.save_pretrained(tmp_path / "new")
    again = WhisperProcessor.from_directory(tmp_path / "new")
    assert vars(again.feature_extractor) == vars(ours.feature_extractor)
    for text in TEXTS:
        assert again.tokenizer.encode(text) == theirs.tokenizer.encode(text)


def test_the_processor_of_an_openai_file(tmp_path):
    """Its `dims` say which vocabulary is its, with how many languages."""
    dims = make_whisper_pt.DIMS | {"n_mels": 128, "n_vocab": 51866}
    state = {"encoder.positional_embedding": torch.zeros(7, 8)}
    file = tmp_path / "turbo.pt"
    torch.save({"dims": dims, "model_state_dict": state}, file)
    theirs = openai.tokenizer.get_tokenizer(True, num_languages=100)
    assets = Path(openai.__file__).parent / "assets"
    for beside in ((), ("gpt2.tiktoken", "multilingual.tiktoken")):
        for name in beside:
            shutil.copy(assets / name, tmp_path)
        ours = audiozoo.load_processor(file)
        assert ours.feature_extractor.feature_size == 128
        assert sorted(ours.tokenizer.all_language_tokens) == sorted(theirs.all_language_tokens)
        assert (ours.tokenizer.transcribe, ours.tokenizer.timestamp_begin) == (
            theirs.transcribe,
            theirs.timestamp_begin,
        )
    real = real_directory() / "tokenizer.json"
    (tmp_path / "multilingual.tiktoken").unlink()
    shutil.copy(real, tmp_path)
    assert audiozoo.load_processor(file).tokenizer.vocabulary_size == 51864  # one that lies beside is taken as it is
    torch.save({"dims": dims | {"n_vocab": 51990}, "model_state_dict": state}, file)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="tokens and the model 51990; they do not belong together"):
        audiozoo.load_processor(file)


# ---------------------------------------------------------------------------------------------------------- normalisers

OTHER_WORDS = """cat the a half and_a_half 1 2 10 3.14 1,000 1,2,3 $5 $2 ¢7 €20 0.07 £0.5 $0.07 -3 +4 20% % $ . 1. 100 0
    1s 4th th 2nd st 1960s a1b2 x.y colour theatre mr mr. dr st. jr won't it's he'd_been don't gonna 's 'tis y'all uh
    hmm [x] (y_z) <z> café Œuvre ß Þór ٣ ½ ² co-op — … 10000.50"""
WORDS = [*sorted(normalizers._NUMBER_WORDS), *(word.replace("_", " ") for word in OTHER_WORDS.split())]


@functools.lru_cache
def references():
    spellings = normalizers.english_spellings()
    return (
        openai_normalizers.EnglishTextNormalizer(),
        transformers.models.whisper.english_normalizer.EnglishTextNormalizer(spellings),
    )


@settings(max_examples=2_000)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([" ", " ", "", "-", ", "]), st.booleans())
def test_spelled_numbers_and_contractions(words, between, capital):
    text = between.join(words)
    text = text.title() if capital else text
    for reference in references():
        assert EnglishTextNormalizer()(text) == reference(text)


@settings(max_examples=500)
@given(letters, st.booleans(), st.booleans())
def test_any_text_normalised(text, diacritics, split):
    theirs = openai_normalizers.BasicTextNormalizer(diacritics, split)
    assert BasicTextNormalizer(diacritics, split)(text) == theirs(text)
    for reference in references():
        assert EnglishTextNormalizer()(text) == reference(text)
