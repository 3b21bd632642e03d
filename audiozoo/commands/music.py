"""`audiozoo music`: music for a text, along a melody, or from where a recording ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands import terminal
from audiozoo.commands.terminal import check_file, check_sound, progress_bar, say, seed_option, write_sound
from audiozoo.errors import UsageError

COMPOSER, MELODIST = "facebook/musicgen-small", "facebook/musicgen-melody"


def music(
    text: Annotated[str | None, typer.Argument(help="what it should sound like; without, whatever comes")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="sound file to write; - is standard output, as WAV")
    ] = Path("music.wav"),
    melody: Annotated[str | None, typer.Option(help="sound file whose melody to follow; - is standard input")] = None,
    prompt: Annotated[
        str | None, typer.Option("--continue", help="sound file to continue; - is standard input")
    ] = None,
    duration: Annotated[float, typer.Option(help="seconds in all, those of --continue included")] = 8.0,
    guidance: Annotated[float | None, typer.Option(help="how closely to follow text and melody; 1: unguided")] = None,
    temperature: Annotated[float, typer.Option(help="how adventurous: 0 always takes the likeliest code")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="draw from so many of the likeliest codes; 0 is all")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest codes of this probability")] = None,
    stride: Annotated[
        float | None, typer.Option(help="seconds that a window moves on in a piece of more than 30 s; by default 18")
    ] = None,
    seed: Annotated[int, seed_option("another seed, another piece")] = 0,
    model: Annotated[
        str | None, typer.Option(help=f"hub id or directory; by default {COMPOSER}, with --melody {MELODIST}")
    ] = None,
) -> None:
    """Compose music."""
    for file in (melody, prompt):
        if file is not None:
            check_file(file)
    if not 0 < duration < float("inf"):
        raise UsageError(f"--duration is {duration:g}; music lasts longer than 0 seconds, and not for ever.")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature is {temperature:g}; it is 0 or more.")
    if stride is not None and not 0 < stride < float("inf"):
        raise UsageError(f"--stride is {stride:g}; a window moves on by more than 0 seconds.")
    check_sound(output, melody, prompt)
    terminal.keep_compiled_programs()
    import jax

    import audiozoo
    from audiozoo import audio
    from audiozoo.models.musicgen import compose

    source = model or (COMPOSER if melody is None else MELODIST)
    composer: Any = audiozoo.load(source)
    if not (name := type(composer).__name__).startswith("Musicgen") or not hasattr(composer, "audio_encoder"):
        raise UsageError(f"{source} holds a {name}, which does not compose.")
    processor = audiozoo.load_processor(source)
    rate, channels = composer.config.audio_encoder.sampling_rate, composer.config.audio_channels
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature}
    given = {"guidance_scale": guidance, "top_k": top_k, "top_p": top_p}
    options |= {name: value for name, value in given.items() if value is not None}
    with progress_bar(output.name, None, "frames") as update:
        found = compose(
            composer,
            processor,
            text,
            duration=duration,
            melody=None if melody is None else audio.read(melody, rate),
            prompt=None if prompt is None else audio.read(prompt, rate, mono=channels == 1),
            extend_stride=stride,
            key=jax.random.key(seed),
            progress=update,
            **options,
        )
    write_sound(output, found[0] if channels == 1 else found, rate)
    say(f"{found.shape[1] / rate:.2f} s: {output}")
