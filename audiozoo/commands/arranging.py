"""`audiozoo piano`: a song as a piano score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands import terminal
from audiozoo.commands.terminal import check_file, check_output, check_sound, progress_bar, say, written_whole
from audiozoo.errors import UsageError

ARRANGER = "sweetcocoa/pop2piano"
RATE = 44_100  # Hz of the sounds that are read and written


def piano(
    song: Annotated[str, typer.Argument(help="sound file; - is standard input")],
    output: Annotated[Path, typer.Option("--output", "-o", help="MIDI file to write")] = Path("piano.mid"),
    composer: Annotated[str, typer.Option(help="whose style: composer1 … composer21")] = "composer1",
    model: Annotated[str | None, typer.Option(help=f"hub id, directory or file; by default {ARRANGER}")] = None,
    tracker: Annotated[str | None, typer.Option(help="beats by librosa (default), essentia or madmom")] = None,
    batch_size: Annotated[int, typer.Option(help="segments of two bars at a time")] = 16,
    sound: Annotated[Path | None, typer.Option(help="also write how it sounds: a sound file")] = None,
    mix: Annotated[Path | None, typer.Option(help="also write it on the left, the song on the right")] = None,
    soundfont: Annotated[
        Path | None, typer.Option(help="an .sf2 file that FluidSynth plays it on; by default sine waves")
    ] = None,
) -> None:
    """Arrange a song for the piano."""
    check_file(song)
    if batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; at least one segment has to be arranged at a time.")
    if output.suffix not in (".mid", ".midi"):
        raise UsageError(f"{output} should end in .mid.")
    from audiozoo.audio.beats import TRACKERS

    check_output(output, song)
    for place in (sound, mix):
        if place is not None:
            check_sound(place, song)
    if sound is not None and sound == mix:
        raise UsageError(f"--sound and --mix would both be written to {sound}.")
    if soundfont is not None:
        check_file(str(soundfont))
        if sound is None and mix is None:
            raise UsageError("--soundfont is what --sound or --mix is played on; say where to write one of them.")
    if tracker not in (None, *TRACKERS):
        raise UsageError(f"There is no beat tracker {tracker!r}; there are {', '.join(TRACKERS)}.")
    terminal.keep_compiled_programs()
    import jax

    import audiozoo
    from audiozoo import audio
    from audiozoo.audio.midi import beside, played
    from audiozoo.models.pop2piano import arrange

    source = model or ARRANGER
    arranger: Any = audiozoo.load(source)
    if (name := type(arranger).__name__) != "Pop2PianoForConditionalGeneration":
        raise UsageError(f"{source} holds a {name}, which does not arrange songs.")
    arranger.generation_config.row(composer)  # says so if there is no such style
    processor = audiozoo.load_processor(source)
    if tracker is not None:
        processor.feature_extractor.tracker = tracker
    heard = audio.read(song, RATE)
    with progress_bar(Path(song).name, None, "segments") as update:
        midi = arrange(
            arranger,
            processor,
            heard,
            sampling_rate=RATE,
            composer=composer,
            batch_size=batch_size,
            progress=update,
            key=jax.random.key(0),  # for a checkpoint that samples
        )
    with written_whole(output) as temporary:
        midi.write(str(temporary))
    if sound is not None or mix is not None:
        performed = played(midi, RATE, soundfont)
        if sound is not None:
            audio.write(sound, performed, RATE)
        if mix is not None:
            audio.write(mix, beside(performed, heard), RATE)
    count = len(midi.instruments[0].notes)
    say(f"{count} notes in {midi.get_end_time():.1f} s: {output}")
