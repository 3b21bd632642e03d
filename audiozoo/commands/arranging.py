"""`audiozoo piano`: a song as a piano score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands import terminal
from audiozoo.commands.terminal import check_file, progress_bar, say, written_whole
from audiozoo.errors import SourceError, UsageError

ARRANGER = "sweetcocoa/pop2piano"


def piano(
    song: Annotated[str, typer.Argument(help="sound file")],
    output: Annotated[Path, typer.Option("--output", "-o", help="MIDI file to write")] = Path("piano.mid"),
    composer: Annotated[str, typer.Option(help="whose style: composer1 … composer21")] = "composer1",
    model: Annotated[str | None, typer.Option(help=f"hub id, directory or file; by default {ARRANGER}")] = None,
    tracker: Annotated[str | None, typer.Option(help="of the beats: librosa, essentia or madmom")] = None,
    batch_size: Annotated[int, typer.Option(help="segments of two bars at a time")] = 16,
    sound: Annotated[Path | None, typer.Option(help="also write how it sounds, on sine waves")] = None,
) -> None:
    """Arrange a song for the piano."""
    check_file(song)
    if batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; at least one segment has to be arranged at a time.")
    if output.suffix not in (".mid", ".midi"):
        raise UsageError(f"{output} should end in .mid.")
    if not output.absolute().parent.is_dir():
        raise SourceError(f"There is no directory {output.absolute().parent} to write {output.name} to.")
    terminal.keep_compiled_programs()
    import numpy as np

    import audiozoo
    from audiozoo import audio
    from audiozoo.models.pop2piano import arrange

    source = model or ARRANGER
    arranger: Any = audiozoo.load(source)
    if (name := type(arranger).__name__) != "Pop2PianoForConditionalGeneration":
        raise UsageError(f"{source} holds a {name}, which does not arrange songs.")
    arranger.generation_config.row(composer)  # says so if there is no such style
    processor = audiozoo.load_processor(source)
    if tracker is not None:
        processor.feature_extractor.tracker = tracker
    with progress_bar(Path(song).name, None, "segments") as update:
        midi = arrange(
            arranger,
            processor,
            audio.read(song, 44_100),
            sampling_rate=44_100,
            composer=composer,
            batch_size=batch_size,
            progress=update,
        )
    with written_whole(output) as temporary:
        midi.write(str(temporary))
    if sound is not None:
        played = midi.synthesize(fs=44_100)
        audio.write(sound, (0.8 * played / max(float(np.abs(played).max()), 1e-9)).astype(np.float32), 44_100)
    count = len(midi.instruments[0].notes)
    say(f"{count} notes in {midi.get_end_time():.1f} s: {output}")
