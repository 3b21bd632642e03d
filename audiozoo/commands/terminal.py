"""What commands share: messages, progress bars, whole files, compiled programs kept between runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from audiozoo.errors import SourceError, UsageError

messages = Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """One message on standard error, as it is: nothing marked up, no line broken."""
    messages.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def cache_directory() -> Path:
    """Where compiled programs are kept between runs: `$AUDIOZOO_CACHE`, else audiozoo's place in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AUDIOZOO_CACHE") or Path(base) / "audiozoo")


def keep_compiled_programs() -> None:
    """Turn on JAX's persistent compilation cache."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextmanager
def progress_bar(description: str, total: float | None, unit: str) -> Iterator[Callable[[float, float], None]]:
    """A bar on standard error; gives `update(done, total)`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit if total or unit else "{task.completed:.0f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done, whole: progress.update(task, completed=done, total=whole)


def megabytes(update: Callable[[float, float], None]) -> Callable[[int, int], None]:
    """A progress callback in bytes, for a bar in megabytes."""
    return lambda done, total: update(done / 1e6, total / 1e6)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name with the same ending, to write the file `path` under; it is renamed at the end of the block.

    Raises:
        SourceError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


COMPUTED_IN = "of the computation: float32, bfloat16 or float16"


def seed_option(of: str) -> Any:
    """An option for the seed of what is drawn: one of those that `jax.random.key` tells apart."""
    return typer.Option(min=0, max=2**32 - 1, help=of)


def check_dtype(dtype: str) -> None:
    """Say before anything is loaded that nothing is computed in this dtype."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"{dtype!r} is no dtype to compute in; take float32, bfloat16 or float16.")


def check_file(file: str) -> None:
    """Say before anything is loaded that there is no such file; - is standard input."""
    if file == "-":
        return
    if os.path.isdir(file):
        raise SourceError(f"{file} is a directory; name the sound files inside it.")
    if not os.path.exists(file):
        raise SourceError(f"There is no file {file}.")


def check_text(text: str) -> None:
    """Say that what was given for a text is the name of a file that holds one."""
    if text.lower().endswith(".txt") and os.path.isfile(text):
        raise UsageError(f"{text} is a file; say --file {text} for the text that it holds.")


def check_output(path: Path, *read: str | Path | None) -> None:
    """Say before anything is computed that a file cannot be written there, or is one of those that are read."""
    if str(path) == "-":
        return
    if path.is_dir():
        raise SourceError(f"{path} is a directory; name the file to write.")
    if not path.parent.is_dir():
        raise SourceError(f"Cannot write {path}: there is no directory {path.parent}.")
    for file in read:
        if file is not None and os.path.exists(file) and path.exists() and path.samefile(file):
            raise SourceError(f"{path} is what is read, and would be lost; name another file to write.")


def check_sound(path: Path, *read: str | Path | None) -> None:
    """The same, and whether it is a sound file by its name."""
    check_output(path, *read)
    if str(path) == "-":
        return
    if not path.suffix:
        raise UsageError(f"Cannot write {path}: its ending says the format; use wav, flac, ogg or mp3.")
    from audiozoo.audio.files import container_of

    container_of(path)


def write_sound(path: Path, waveform: Any, sampling_rate: int) -> None:
    """Write a sound file whole, or a WAV to standard output."""
    from audiozoo import audio

    if str(path) != "-":
        audio.write(path, waveform, sampling_rate)
        return
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.T.clip(-1, 1), sampling_rate, format="WAV")
    sys.stdout.buffer.write(buffer.getvalue())
    sys.stdout.buffer.flush()
