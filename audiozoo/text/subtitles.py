"""Transcripts as files: plain text, SubRip, WebVTT, tab-separated values and JSON, as `openai-whisper` writes them.

A cue of a subtitle is a segment; where the words have times, it is cut and broken into lines as `Layout` says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from audiozoo.errors import UsageError

Result = Mapping[str, Any]
Cue = tuple[float, float, str]  # start and end in seconds, text

_PAUSE = 3.0  # s between the beginnings of two words, after which filled cues start anew


@dataclasses.dataclass(frozen=True)
class Layout:
    """How words with times become cues: the options of `openai-whisper`.

    With both `max_line_width` and `max_line_count`, cues are filled regardless of the segments, and end at a pause.
    """

    max_line_width: int | None = None  # characters a line
    max_line_count: int | None = None  # lines a cue
    max_words_per_line: int | None = None  # words a cue, unless both of the above are given
    highlight_words: bool = False  # a cue for each word, which is underlined in it

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1.")


def timestamp(seconds: float, *, mark: str = ".", hours: bool = False) -> str:
    """`[hh:]mm:ss.mmm`; the hours always, or only from one hour on."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hour, minutes = divmod(minutes, 60)
    whole, rest = divmod(milliseconds, 1000)
    return (f"{hour:02d}:" if hours or hour else "") + f"{minutes:02d}:{whole:02d}{mark}{rest:03d}"


def _cues(result: Result, layout: Layout) -> Iterator[Cue]:
    segments = result["segments"]
    if not all("words" in segment for segment in segments):
        cues: Iterator[Cue] = ((s["start"], s["end"], s["text"].strip()) for s in segments)
    else:
        laid_out = _lines(segments, layout)
        cues = chain.from_iterable(map(_highlighted, laid_out)) if layout.highlight_words else map(_whole, laid_out)
    return ((start, end, text.replace("-->", "->")) for start, end, text in cues)


def _spaced(segment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A segment's words, each with the space that stands before it in the text."""
    words = [dict(word) for word in segment["words"]]
    joined = "".join(word["word"] for word in words)
    if joined.strip() != segment["text"].strip() and not any(word["word"].startswith(" ") for word in words):
        for word in words:
            word["word"] = " " + word["word"]
    return words


def _lines(segments: Any, layout: Layout) -> Iterator[list[dict[str, Any]]]:
    """The words of each cue; the first of a cue is stripped, and one that begins a line has a line feed before it."""
    width = layout.max_line_width or 1000
    filled = layout.max_line_width is not None and layout.max_line_count is not None
    size = layout.max_words_per_line or 1000
    cue: list[dict[str, Any]] = []
    letters = lines = 0  # in the line, in the cue
    last = 0.0  # when the last word began
    for segment in segments:
        for i, word in enumerate(_spaced(segment)):
            pause = filled and bool(cue) and word["start"] - last > _PAUSE
            cut = not filled and bool(cue) and i % size == 0
            if letters and not pause and not cut and letters + len(word["word"]) <= width:
                letters += len(word["word"])
            else:
                word["word"] = word["word"].strip()
                full = layout.max_line_count is not None and (pause or lines >= layout.max_line_count)
                if cut or full:
                    yield cue
                    cue, lines = [], 0
                elif letters:
                    word["word"] = "\n" + word["word"]
                lines += 1
                letters = len(word["word"].strip())
            cue.append(word)
            last = word["start"]
    if cue:
        yield cue


def _whole(words: list[dict[str, Any]]) -> Cue:
    return words[0]["start"], words[-1]["end"], "".join(word["word"] for word in words)


def _highlighted(words: list[dict[str, Any]]) -> Iterator[Cue]:
    """A cue while each word is said, with that word underlined, and one without underlining for each pause between."""
    before, _, text = _whole(words)
    parts = [word["word"] for word in words]
    for i, word in enumerate(words):
        if round(1000 * before) != round(1000 * word["start"]):
            yield before, word["start"], text
        bare = parts[i].lstrip()
        space = parts[i].removesuffix(bare)
        yield word["start"], word["end"], "".join([*parts[:i], f"{space}<u>{bare}</u>", *parts[i + 1 :]])
        before = word["end"]


def txt(result: Result, layout: Layout = Layout()) -> str:
    """One segment a line."""
    return "".join(segment["text"].strip() + "\n" for segment in result["segments"])


def srt(result: Result, layout: Layout = Layout()) -> str:
    """SubRip: numbered cues, `hh:mm:ss,mmm`."""

    def time(seconds: float) -> str:
        return timestamp(seconds, mark=",", hours=True)

    return "".join(
        f"{i}\n{time(a)} --> {time(b)}\n{text}\n\n" for i, (a, b, text) in enumerate(_cues(result, layout), 1)
    )


def vtt(result: Result, layout: Layout = Layout()) -> str:
    """WebVTT: a header and cues, `[hh:]mm:ss.mmm`."""
    cues = _cues(result, layout)
    return "WEBVTT\n\n" + "".join(f"{timestamp(a)} --> {timestamp(b)}\n{text}\n\n" for a, b, text in cues)


def tsv(result: Result, layout: Layout = Layout()) -> str:
    """Start and end in whole milliseconds, and the text, between tabs."""
    rows = (
        f"{round(1000 * s['start'])}\t{round(1000 * s['end'])}\t{s['text'].strip().replace(chr(9), ' ')}\n"
        for s in result["segments"]
    )
    return "start\tend\ttext\n" + "".join(rows)


def as_json(result: Result, layout: Layout = Layout()) -> str:
    """The whole result, on one line."""
    return json.dumps(result, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Result, Layout], str]] = {"txt": txt, "srt": srt, "vtt": vtt, "tsv": tsv, "json": as_json}


def render(result: Result, form: str, layout: Layout = Layout()) -> str:
    """A transcript in one of `FORMATS`.

    Args:
        result: of `transcribe`.
        form: the format.
        layout: of cues, where words have times.

    Raises:
        UsageError: for another format.
    """
    if form not in FORMATS:
        raise UsageError(f"There is no format {form!r}; there are {', '.join(FORMATS)}.")
    return FORMATS[form](result, layout)
