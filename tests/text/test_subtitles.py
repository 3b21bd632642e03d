"""Transcripts as files, letter by letter; `tests/parity/test_subtitles.py` compares them with the original's."""

from __future__ import annotations

import pytest

from audiozoo.errors import UsageError
from audiozoo.text.subtitles import Layout, render

PLAIN = {
    "text": " One --> two. Three\tfour",
    "segments": [
        {"start": 0.0, "end": 1.5, "text": " One --> two."},
        {"start": 3599.9996, "end": 3723.004, "text": " Three\tfour"},
    ],
    "language": "en",
}
WORDS = {
    "segments": [
        {
            "start": 0.0,
            "end": 2.0,
            "text": " Ever tried. Ever failed.",
            "words": [
                {"word": " Ever", "start": 0.0, "end": 0.4},
                {"word": " tried.", "start": 0.4, "end": 0.8},
                {"word": " Ever", "start": 1.0, "end": 1.5},
                {"word": " failed.", "start": 1.5, "end": 2.0},
            ],
        },
        {"start": 2.0, "end": 2.0, "text": "", "words": []},
        {"start": 7.0, "end": 8.0, "text": " No", "words": [{"word": " No", "start": 7.0, "end": 8.0}]},
    ]
}


def cues(form: str, **options) -> list[tuple[str, str]]:
    """Time and text of every cue."""
    blocks = render(WORDS, form, Layout(**options)).removeprefix("WEBVTT\n\n").strip("\n").split("\n\n")
    lines = [block.split("\n")[form == "srt" :] for block in blocks]
    return [(first, "|".join(rest)) for first, *rest in lines]


def test_segments():
    assert render(PLAIN, "txt") == "One --> two.\nThree\tfour\n"
    assert render(PLAIN, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne -> two.\n\n2\n01:00:00,000 --> 01:02:03,004\nThree\tfour\n\n"
    )
    assert render(PLAIN, "vtt") == (
        "WEBVTT\n\n00:00.000 --> 00:01.500\nOne -> two.\n\n01:00:00.000 --> 01:02:03.004\nThree\tfour\n\n"
    )
    assert render(PLAIN, "tsv") == "start\tend\ttext\n0\t1500\tOne --> two.\n3600000\t3723004\tThree four\n"
    half = {"segments": [*PLAIN["segments"], *WORDS["segments"]]}  # words, but not of all
    assert render(half, "srt", Layout(max_words_per_line=1)).count("-->") == 5
    with pytest.raises(UsageError, match=r"no format 'pdf'; there are txt, srt"):
        render(PLAIN, "pdf")


def test_words_in_cues_and_lines():
    whole = [("00:00.000 --> 00:02.000", "Ever tried. Ever failed."), ("00:07.000 --> 00:08.000", "No")]
    assert cues("vtt") == whole
    assert render({"segments": [{"start": 0.0, "end": 1.0, "text": "", "words": []}]}, "srt") == ""
    assert [text for _, text in cues("srt", max_line_width=12)] == ["Ever tried.|Ever failed.", "No"]
    assert [text for _, text in cues("srt", max_words_per_line=3)] == ["Ever tried. Ever", "failed.", "No"]
    assert [text for _, text in cues("srt", max_line_width=12, max_line_count=1)] == [
        "Ever tried.",
        "Ever failed.",
        "No",
    ]
    # Filled cues end at a pause of more than three seconds, not with the segment.
    assert cues("vtt", max_line_width=40, max_line_count=2) == whole
    words = [{"word": " a", "start": 0.0, "end": 0.5}, {"word": " b", "start": 3.0, "end": 3.5}]
    result = {"segments": [{"start": w["start"], "end": w["end"], "text": w["word"], "words": [w]} for w in words]}
    assert "\na b\n" in render(result, "srt", Layout(max_line_width=40, max_line_count=2))
    with pytest.raises(UsageError, match="max_line_width=0 must be at least 1"):
        Layout(max_line_width=0)


def test_the_word_that_is_said_is_underlined():
    assert cues("vtt", highlight_words=True) == [
        ("00:00.000 --> 00:00.400", "<u>Ever</u> tried. Ever failed."),
        ("00:00.400 --> 00:00.800", "Ever <u>tried.</u> Ever failed."),
        ("00:00.800 --> 00:01.000", "Ever tried. Ever failed."),
        ("00:01.000 --> 00:01.500", "Ever tried. <u>Ever</u> failed."),
        ("00:01.500 --> 00:02.000", "Ever tried. Ever <u>failed.</u>"),
        ("00:07.000 --> 00:08.000", "<u>No</u>"),
    ]
    words = [{"word": " a", "start": 0.0, "end": 0.3}, {"word": " b", "start": 0.1 + 0.2, "end": 0.5}]
    result = {"segments": [{"start": 0.0, "end": 0.5, "text": " a b", "words": words}]}
    assert render(result, "srt", Layout(highlight_words=True)).count("-->") == 2  # none for a pause of no length


def test_words_without_spaces_get_those_of_the_text():
    words = [{"word": "AB", "start": 0.0, "end": 1.0}, {"word": "CD", "start": 1.0, "end": 2.0}]
    spaced = {"segments": [{"start": 0.0, "end": 2.0, "text": "AB CD", "words": words}]}
    dense = {"segments": [{"start": 0.0, "end": 2.0, "text": "ABCD", "words": words}]}
    assert "\nAB CD\n" in render(spaced, "srt")
    assert "\nABCD\n" in render(dense, "srt")
    other = {
        "segments": [{"start": 0.0, "end": 2.0, "text": "A B C D", "words": [words[0] | {"word": " AB"}, words[1]]}]
    }
    assert "\nABCD\n" in render(other, "srt")  # they have spaces of their own
    assert words[0]["word"] == "AB"
