"""Every form of a transcript, byte by byte, against the writers of `openai-whisper`."""

from __future__ import annotations

import io
import itertools
import json
import random

import pytest

from audiozoo.text import subtitles

utils = pytest.importorskip("whisper.utils", reason="the package openai-whisper (extra `reference`) is not installed")

WIDTHS, COUNTS, SIZES = (None, 1, 8, 21), (None, 1, 2), (None, 1, 3)


def transcript(seed: int, with_words: bool) -> dict:
    """Segments of random words at random times, with pauses, empty segments and characters that mean something."""
    draw = random.Random(seed)
    segments, now = [], draw.choice((0.0, 0.0, 3590.0))
    for _ in range(draw.randrange(8)):
        words = []
        for _ in range(draw.randrange(9)):
            now += draw.choice((0.0, 0.0, 0.12, 1.3, 3.01, 6.0))
            end = now + draw.choice((0.0, 0.26, 1.994))
            text = " " + draw.choice(("a", "word", "ongoing", "supercalifragilistic", "né", "\u3042", "x\ty", "1,2."))
            words.append({"word": text, "start": round(now, 2), "end": round(end, 2), "probability": 0.5})
            now = end
        text = "".join(word["word"] for word in words)
        start, end = (words[0]["start"], words[-1]["end"]) if words else (now, now)
        segments.append({"start": start, "end": end, "text": text} | ({"words": words} if with_words else {}))
    return {"text": "".join(s["text"] for s in segments), "segments": segments, "language": "en"}


def original(result: dict, form: str, options: dict) -> str:
    file = io.StringIO()
    utils.get_writer(form, ".").write_result(result, file=file, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["txt", "srt", "vtt", "tsv"])
def test_segments(form):
    for seed in range(50):
        result = transcript(seed, with_words=False)
        assert subtitles.render(result, form) == original(result, form, {})


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_words(form):
    for width, count, size, highlight in itertools.product(WIDTHS, COUNTS, SIZES, (False, True)):
        options = {
            "max_line_width": width,
            "max_line_count": count,
            "max_words_per_line": size,
            "highlight_words": highlight,
        }
        for seed in range(20):
            result = transcript(seed, with_words=True)
            assert subtitles.render(result, form, subtitles.Layout(**options)) == original(result, form, options)


def test_json():
    result = transcript(1, with_words=True)
    assert json.loads(subtitles.render(result, "json")) == json.loads(original(result, "json", {}))
