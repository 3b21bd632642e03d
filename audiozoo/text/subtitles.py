"""Transcripts as files: plain text, SubRip, WebVTT, tab-separated values and JSON, as `openai-whisper` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from audiozoo.errors import UsageError

Result = Mapping[str, Any]


def timestamp(seconds: float, *, mark: str = ".", hours: bool = False) -> str:
    """`[hh:]mm:ss.mmm`; the hours always, or only from one hour on."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hour, minutes = divmod(minutes, 60)
    whole, rest = divmod(milliseconds, 1000)
    return (f"{hour:02d}:" if hours or hour else "") + f"{minutes:02d}:{whole:02d}{mark}{rest:03d}"


def _cues(result: Result) -> Iterator[tuple[float, float, str]]:
    for segment in result["segments"]:
        yield segment["start"], segment["end"], segment["text"].strip().replace("-->", "->")


def txt(result: Result) -> str:
    """One segment a line."""
    return "".join(segment["text"].strip() + "\n" for segment in result["segments"])


def srt(result: Result) -> str:
    """SubRip: numbered cues, `hh:mm:ss,mmm`."""

    def time(seconds: float) -> str:
        return timestamp(seconds, mark=",", hours=True)

    return "".join(f"{i}\n{time(a)} --> {time(b)}\n{text}\n\n" for i, (a, b, text) in enumerate(_cues(result), 1))


def vtt(result: Result) -> str:
    """WebVTT: a header and cues, `[hh:]mm:ss.mmm`."""
    return "WEBVTT\n\n" + "".join(f"{timestamp(a)} --> {timestamp(b)}\n{text}\n\n" for a, b, text in _cues(result))


def tsv(result: Result) -> str:
    """Start and end in whole milliseconds, and the text, between tabs."""
    rows = (
        f"{round(1000 * s['start'])}\t{round(1000 * s['end'])}\t{s['text'].strip().replace(chr(9), ' ')}\n"
        for s in result["segments"]
    )
    return "start\tend\ttext\n" + "".join(rows)


def as_json(result: Result) -> str:
    """The whole result, on one line."""
    return json.dumps(result, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Result], str]] = {"txt": txt, "srt": srt, "vtt": vtt, "tsv": tsv, "json": as_json}


def render(result: Result, form: str) -> str:
    """A transcript in one of `FORMATS`.

    Raises:
        UsageError: for another format.
    """
    if form not in FORMATS:
        raise UsageError(f"There is no format {form!r}; there are {', '.join(FORMATS)}.")
    return FORMATS[form](result)
