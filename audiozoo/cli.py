"""The command line: `audiozoo list | show | transcribe | translate | align | identify | units | speak | convert | …`.

Results go to standard output, progress and messages to standard error. The exit code is 0 if all went well, 1 if
something could not be done (one sentence says what), 2 for a command that makes no sense.
"""

from __future__ import annotations

import errno
import io
import json
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from audiozoo import packaged, registry
from audiozoo.commands import (
    arranging,
    codec,
    evaluation,
    hearing,
    music,
    planning,
    recognition,
    speech,
    training,
    transcription,
    translation,
)
from audiozoo.commands.terminal import keep_compiled_programs, megabytes, progress_bar, say
from audiozoo.errors import AudiozooError, CheckpointError, SourceError, UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        import audiozoo

        print(f"audiozoo {audiozoo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Audio papers in JAX, running the real checkpoints."""


def main() -> None:
    """Run a command; every expected error becomes one sentence and the exit code 1, and a warning is one sentence.

    An interruption ends it with 130, and a pipe that nobody reads any more with 1; Typer sees to both. A scheduler's
    SIGTERM ends it with 143, as tidily: nothing half-written stays, and what is nearly written becomes whole.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shown = warnings.showwarning

    def told(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):  # for whoever gave the command, and not for a programmer
            say(str(message), "yellow")
        else:
            shown(message, category, *place, **more)

    warnings.showwarning = told
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a letter shows ? for it
    try:
        app()
    except AudiozooError as error:
        say(f"audiozoo: {error}", "red")
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        say(f"audiozoo: what was to be written cannot be ({error.strerror}).", "red")
        sys.exit(1)


# --- list and show ---------------------------------------------------------------------------------------------------


@app.command("list")
def list_papers(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the README's table")] = False,
) -> None:
    """List the papers: sizes, tasks, checkpoints and licences."""
    if markdown:
        print(registry.markdown_table(), end="")
        return
    if as_json:
        import dataclasses

        print(json.dumps([dataclasses.asdict(entry) for entry in registry.PAPERS], indent=2))
        return
    for entry in registry.PAPERS:
        print(f"{entry.name}  ({entry.title}, {entry.year}" + (f", arXiv {entry.arxiv})" if entry.arxiv else ")"))
        print(f"  sizes        {', '.join(entry.sizes)}")
        print(f"  tasks        {', '.join(entry.tasks)}")
        print(f"  checkpoints  {len(entry.checkpoints)}: audiozoo show {entry.name}")
        print(f"  licences     {', '.join(sorted({c.licence for c in entry.checkpoints}))}")


@app.command()
def show(
    paper: Annotated[str, typer.Argument(help="a paper's name, such as whisper")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show one paper: classes, sizes, checkpoints and licences."""
    entry = registry.paper(paper)
    if as_json:
        import dataclasses

        print(json.dumps(dataclasses.asdict(entry), indent=2))
        return
    console = Console()
    console.print(f"{entry.title}: {entry.paper} ({entry.year}" + (f", arXiv {entry.arxiv})" if entry.arxiv else ")"))
    console.print(f"classes: {', '.join(entry.classes)}")
    console.print(f"sizes:   {', '.join(entry.sizes)}")
    console.print(f"tasks:   {', '.join(entry.tasks)}")
    console.print(f"file:    audiozoo/models/{entry.name}.py")
    table = Table("checkpoint", "size", "licence")
    for checkpoint in entry.checkpoints:
        table.add_row(checkpoint.name, checkpoint.size, checkpoint.licence)
    console.print(table)


# --- conversion ------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="hub id, directory or file")],
    out: Annotated[Path, typer.Argument(help="directory to write")],
    model_class: Annotated[str | None, typer.Option(help="the class, where the checkpoint leaves a choice")] = None,
    param_dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="replace OUT if it exists")] = False,
) -> None:
    """Convert a checkpoint of any form into a native one (Orbax). The files of its processor come along."""
    _convert(source, out, model_class, param_dtype, overwrite, to_hugging_face=False)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="hub id, directory or file")],
    out: Annotated[Path, typer.Argument(help="directory to write")],
    model_class: Annotated[str | None, typer.Option(help="the class, where the checkpoint leaves a choice")] = None,
    language: Annotated[str | None, typer.Option(help="of the recogniser to write, of those that MMS has")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace OUT if it exists")] = False,
) -> None:
    """Write a checkpoint of any form for PyTorch (Hugging Face)."""
    _convert(source, out, model_class, "float32", overwrite, to_hugging_face=True, language=language)


def _convert(
    source: str,
    out: Path,
    model_class: str | None,
    param_dtype: str,
    overwrite: bool,
    *,
    to_hugging_face: bool,
    language: str | None = None,
) -> None:
    import tempfile

    import audiozoo
    from audiozoo import checkpoints, hub, loading

    if param_dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise UsageError(f"{param_dtype!r} is no dtype for parameters; take float32, bfloat16, float16 or float64.")
    checkpoints.check_place(out, overwrite, "--overwrite")
    if param_dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    path = hub.resolve(source)
    if path.resolve().is_relative_to(out.resolve()):
        raise SourceError(f"{path} lies in {out} and would be lost; give another place.")
    with progress_bar("reading", None, "MB") as update:
        model: Any = audiozoo.load(path, model_class=model_class, param_dtype=param_dtype, progress=megabytes(update))
    directory = path if path.is_dir() else path.parent
    with tempfile.TemporaryDirectory() as made:
        if to_hugging_face and (language is not None or hasattr(model, "speaking")):
            if getattr(model.config, "adapter_attn_dim", None) is None:
                raise UsageError(f"{source} has no adapters of languages; leave --language out.")
            model, processor = loading.speak_language(model, loading.processor_of(path), language, source)
        else:
            try:
                processor = loading.processor_of_file(path, loading.paper_of_class(type(model).__name__))
            except (SourceError, CheckpointError) as problem:
                processor = None
                say(
                    f"{out} will have no tokenizer, and reads no texts until one is put there: {problem}",
                    style="yellow",
                )
        if processor is not None:
            processor.save(made)
            directory = Path(made)
            if not getattr(processor, "reads_text", True):
                say(f"{out} will have no tokenizer, and reads no texts until one is put there", style="yellow")
        if to_hugging_face:
            with progress_bar("writing", None, "MB") as update:
                audiozoo.export(model, out, processor_from=directory, overwrite=overwrite, progress=megabytes(update))
        else:
            audiozoo.save(model, out, processor_from=directory, overwrite=overwrite)
    say(f"wrote {type(model).__name__} to {out}")


# --- speech to text --------------------------------------------------------------------------------------------------

app.command()(transcription.transcribe)
app.command()(recognition.align)
app.command()(recognition.identify)
app.command()(recognition.units)
app.command()(translation.translate)


# --- speech synthesis ------------------------------------------------------------------------------------------------

app.command()(speech.speak)
app.command("convert-voice")(speech.convert_voice)


# --- what is heard ---------------------------------------------------------------------------------------------------

app.command()(hearing.classify)
app.command()(hearing.embed)
app.command()(hearing.search)


# --- tokens of sound -------------------------------------------------------------------------------------------------

app.add_typer(codec.app, name="codec")
app.command()(arranging.piano)
app.command()(music.music)


# --- training --------------------------------------------------------------------------------------------------------

app.command()(training.recipes)
app.command()(training.train)
app.command()(planning.plan)
app.command()(evaluation.evaluate)


# --- the demo --------------------------------------------------------------------------------------------------------


@app.command()
def demo() -> None:
    """Convert real weights, transcribe speech, speak a sentence. What was spoken is written down again."""
    started = time.perf_counter()
    keep_compiled_programs()
    import jax

    import audiozoo
    from audiozoo import audio

    weights, recording = packaged.TINY_EN.verified(), packaged.SPEECH.verified()
    model, _ = _converted(packaged.TINY_EN, weights.parent)
    processor = audiozoo.load_processor(weights.parent)
    waveform = audio.read(recording)
    print(f"speech    {packaged.SPEECH.content}")
    heard = _heard(model, processor, waveform, packaged.SPEECH_TEXT)
    if packaged.JOE.find() is not None:
        from audiozoo.decoding.synthesis import Synthesizer

        voice, rate = _converted(packaged.JOE, packaged.JOE.verified())
        before = time.perf_counter()
        phonemes = packaged.SENTENCE_PHONEMES
        ids = audiozoo.load_processor(packaged.voice())(phonemes, is_phonemes=True)["input_ids"]
        said = Synthesizer(voice)(ids, key=jax.random.key(0)).waveform
        seconds = time.perf_counter() - before
        print(f"said      {said.size / rate:.1f} s of speech, in {seconds:.1f} s, compilation included")
        heard = min(heard, _heard(model, processor, audio.resample(said, rate, 16_000), packaged.SENTENCE))
    print(f"in all    {time.perf_counter() - started:.1f} s on {jax.devices()[0].platform}")
    if heard < 0.9:
        raise AudiozooError("What was heard is not what was said; this installation does not work as it should.")


def _converted(package: packaged.Packaged, source: Path) -> tuple[Any, int]:
    """A packaged model and its sampling rate; says what it is."""
    import audiozoo
    from audiozoo.loading import variables

    print(f"weights   {package.content}, from the package {package.package}")
    before = time.perf_counter()
    model: Any = audiozoo.load(source)
    parameters = variables(model)
    count = sum(p.size for p in parameters.values())
    seconds = time.perf_counter() - before
    print(f"          {len(parameters)} arrays, {count / 1e6:.1f} M parameters, converted to JAX in {seconds:.1f} s")
    return model, getattr(model.config, "sampling_rate", 16_000)


def _heard(model: Any, processor: Any, waveform: Any, said: str) -> float:
    """Transcribe, compare with what was said, and say both; returns the part of the words that agree."""
    from audiozoo.decoding import long_form
    from audiozoo.text.metrics import word_error_rate
    from audiozoo.text.normalizers import EnglishTextNormalizer

    before = time.perf_counter()
    heard = long_form.transcribe(model, processor, waveform)["text"].strip()
    seconds = time.perf_counter() - before
    normalise = EnglishTextNormalizer()
    agreement = 1 - float(word_error_rate(normalise(said), normalise(heard)))
    print(f"heard     {heard}")
    print(f"in fact   {said}")
    print(
        f"agreement {100 * agreement:.0f} % of {len(normalise(said).split())} words; {len(waveform) / 16_000:.1f} s of",
        end="",
    )
    print(f" speech transcribed in {seconds:.1f} s, compilation included")
    return agreement


if __name__ == "__main__":
    main()
