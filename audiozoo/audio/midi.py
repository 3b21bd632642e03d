"""How MIDI sounds: on sine waves, or on a soundfont by FluidSynth; and beside the song that it was made of."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jaxtyping import Float

from audiozoo.errors import SourceError, UsageError

PEDAL = 64  # number and middle of the sustaining pedal's controller
LOUDEST = 0.8  # peak of what is played


def table_of(notes: Any) -> Float[np.ndarray, "notes 4"]:
    """Notes as rows of onset, offset, pitch and velocity.

    Raises:
        UsageError: for anything else.
    """
    try:
        table = np.asarray(notes, np.float64)
    except (TypeError, ValueError):
        table = np.full(1, np.nan)
    if table.size and (table.ndim != 2 or table.shape[1] != 4 or not np.isfinite(table).all()):
        raise UsageError("Each note is four numbers: onset, offset, pitch and velocity.")
    return table.reshape(-1, 4)


def notes_of(midi: Any) -> Float[np.ndarray, "notes 4"]:
    """The notes of a `pretty_midi.PrettyMIDI`: onset, offset, pitch, velocity; times in seconds, in order of onset.

    A note that is let go while the pedal is down ends with the pedal, or where the same key is struck again. Drums,
    whose numbers are no pitches, are left out.
    """
    rows: list[list[float]] = []
    for instrument in midi.instruments:
        if instrument.is_drum:
            continue
        struck = sorted(instrument.notes, key=lambda note: note.start)
        changes = [(c.time, c.value >= PEDAL) for c in instrument.control_changes if c.number == PEDAL]
        for index, note in enumerate(struck):
            down = [pressed for time, pressed in changes if time <= note.end]
            end = note.end
            if down and down[-1]:
                lifted = [time for time, pressed in changes if time > note.end and not pressed]
                again = [other.start for other in struck[index + 1 :] if other.pitch == note.pitch]
                end = max(note.end, min([*lifted[:1], *again[:1]], default=note.end))
            rows.append([note.start, end, note.pitch, note.velocity])
    return np.array(sorted(rows), np.float64).reshape(-1, 4)


def played(
    midi: Any, sampling_rate: int = 44_100, soundfont: str | os.PathLike[str] | None = None
) -> Float[np.ndarray, " time"]:
    """A `pretty_midi.PrettyMIDI` as sound, its peak at `LOUDEST`; without notes a second of silence.

    Args:
        midi: what to play.
        sampling_rate: Hz.
        soundfont: an .sf2 file, played by FluidSynth, which has to be installed; sine waves by default.

    Raises:
        SourceError: if there is no such soundfont.
        UsageError: without FluidSynth.
    """
    if soundfont is not None and not os.path.isfile(soundfont):
        raise SourceError(f"There is no soundfont {os.fspath(soundfont)}.")
    if not any(instrument.notes for instrument in midi.instruments):
        return np.zeros(sampling_rate, np.float32)
    if soundfont is None:
        with np.errstate(invalid="ignore"):  # drums alone, which it leaves out, are 0 / 0 there
            sound = np.nan_to_num(midi.synthesize(fs=sampling_rate))
    else:
        try:
            sound = midi.fluidsynth(fs=sampling_rate, synthesizer=os.fspath(soundfont))
        except ImportError:
            raise UsageError(
                "A soundfont is played by FluidSynth: install it, and pip install pyfluidsynth; or leave it out."
            ) from None
    return (LOUDEST * sound / max(float(np.abs(sound).max()), 1e-9)).astype(np.float32)


def beside(
    left: Float[np.ndarray, " time"], right: Float[np.ndarray, " time"], share: float = 0.5
) -> Float[np.ndarray, "2 samples"]:
    """Two sounds in stereo, the right one at `share` of its loudness, the shorter one followed by silence."""
    length = max(len(left), len(right))
    channels = [np.pad(x, (0, length - len(x))) for x in (left, share * right)]
    return np.stack(channels).astype(np.float32)
