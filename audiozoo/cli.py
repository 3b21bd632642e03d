"""The command line: `audiozoo list | show | transcribe | translate | align | identify | units | speak | convert | …`.

Results go to standard output, progress and messages to standard error. The exit code is 0 if all went well, 1 if
something could not be done (one sentence says what), 2 for a command that makes no sense.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
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
    translation,
)
from audiozoo.commands.terminal import (
    COMPUTED_IN,
    check_dtype,
    keep_compiled_programs,
    megabytes,
    progress_bar,
    say,
    write_whole,
)
from audiozoo.errors import AudiozooError, SourceError, UsageError

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
    """Run a command; every expected error becomes one sentence and the exit code 1."""
    try:
        app()
    except AudiozooError as error:
        say(f"audiozoo: {error}", "red")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        say("audiozoo: interrupted.", "red")
        sys.exit(130)


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
    overwrite: Annotated[bool, typer.Option(help="replace OUT if it exists")] = False,
) -> None:
    """Write a checkpoint of any form for PyTorch (Hugging Face)."""
    _convert(source, out, model_class, "float32", overwrite, to_hugging_face=True)


def _convert(
    source: str, out: Path, model_class: str | None, param_dtype: str, overwrite: bool, *, to_hugging_face: bool
) -> None:
    import tempfile

    import audiozoo
    from audiozoo import hub, loading

    if param_dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise UsageError(f"{param_dtype!r} is no dtype for parameters; take float32, bfloat16, float16 or float64.")
    if out.exists() and not overwrite:
        raise SourceError(f"{out} exists already; give another place, or --overwrite.")
    if param_dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    path = hub.resolve(source)
    with progress_bar("reading", None, "MB") as update:
        model = audiozoo.load(path, model_class=model_class, param_dtype=param_dtype, progress=megabytes(update))
    directory = path if path.is_dir() else path.parent
    with tempfile.TemporaryDirectory() as made:
        # Some authors' files hold no processor: what it is can be told from the model, and from what lies beside them.
        conversion = loading.paper_of_class(type(model).__name__).conversion
        make = getattr(conversion, "processor_for", None)
        of_file = getattr(conversion, "processor_of_file", None)
        try:
            processor = make(model, path) if make else of_file(path) if of_file and path.is_file() else None
        except SourceError as problem:
            processor = None
            say(f"{out} will have no tokenizer, and reads no texts until one is put there: {problem}", style="yellow")
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


# --- transcription ---------------------------------------------------------------------------------------------------


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(help="sound files; - is standard input")],
    model: Annotated[str | None, typer.Option(help="hub id, directory or file; by default Whisper tiny.en")] = None,
    language: Annotated[str | None, typer.Option(help="code or name; detected if not given")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate (into English)")] = "transcribe",
    output_format: Annotated[str, typer.Option("--format", help="txt, srt, vtt, tsv or json")] = "txt",
    output_dir: Annotated[
        Path | None, typer.Option(help="write FILE.FORMAT there instead of to standard output")
    ] = None,
    word_timestamps: Annotated[bool, typer.Option("--word-timestamps", help="time every word")] = False,
    beam_size: Annotated[int | None, typer.Option(help="beams, at temperature 0")] = None,
    best_of: Annotated[int | None, typer.Option(help="samples, at temperatures above 0")] = None,
    patience: Annotated[float | None, typer.Option(help="of the beam search")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="of the beam search, 0 to 1")] = None,
    temperature: Annotated[str, typer.Option(help="one, or several tried in turn")] = "0,0.2,0.4,0.6,0.8,1",
    compression_ratio_threshold: Annotated[float, typer.Option(help="text that zlib shrinks more is refused")] = 2.4,
    logprob_threshold: Annotated[float, typer.Option(help="mean log-probability below which text is refused")] = -1.0,
    no_speech_threshold: Annotated[
        float, typer.Option(help="probability of silence above which text is dropped")
    ] = 0.6,
    initial_prompt: Annotated[str | None, typer.Option(help="text that comes before the audio")] = None,
    carry_initial_prompt: Annotated[
        bool, typer.Option("--carry-initial-prompt", help="repeat it at every window")
    ] = False,
    condition_on_previous_text: Annotated[bool, typer.Option(help="prompt each window with the text so far")] = True,
    suppress_tokens: Annotated[str, typer.Option(help="token ids, -1 for all that is not speech")] = "-1",
    clip_timestamps: Annotated[str, typer.Option(help="start,end,start,… in seconds")] = "0",
    hallucination_silence_threshold: Annotated[
        float | None, typer.Option(help="skip silence longer than this around doubtful text (needs --word-timestamps)")
    ] = None,
    without_timestamps: Annotated[bool, typer.Option("--without-timestamps", help="text only")] = False,
    batch_size: Annotated[int, typer.Option(help="windows decoded together")] = 1,
    padding: Annotated[str, typer.Option(help="of the last window: silence or zeros")] = "silence",
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    language_model: Annotated[Path | None, typer.Option(help="of words, an ARPA file; for CTC models")] = None,
    hotwords: Annotated[
        list[str] | None, typer.Option("--hotword", help="a word that is likely to be said; for CTC models")
    ] = None,
    lexicon: Annotated[
        Path | None, typer.Option(help="the only words there are: one and its letters a line; for CTC models")
    ] = None,
    lm_weight: Annotated[float, typer.Option(help="of the language model; for CTC models")] = 0.5,
    word_bonus: Annotated[float, typer.Option(help="with a language model or a lexicon; for CTC models")] = 1.5,
    dtype: Annotated[str, typer.Option(help=COMPUTED_IN)] = "float32",
) -> None:
    """Transcribe sound files. Whisper, CTC models, fairseq S2T and SpeechT5 can."""
    from audiozoo.text import subtitles

    if output_format not in subtitles.FORMATS:
        raise UsageError(f"There is no format {output_format!r}; there are {', '.join(subtitles.FORMATS)}.")
    check_dtype(dtype)
    try:
        temperatures = tuple(float(t) for t in temperature.split(","))
    except ValueError:
        raise UsageError(f"--temperature {temperature!r} must be numbers with commas between them.") from None
    options: dict[str, Any] = {
        "language": language,
        "task": task,
        "word_timestamps": word_timestamps,
        "beam_size": beam_size,
        "best_of": best_of,
        "patience": patience,
        "length_penalty": length_penalty,
        "temperature": temperatures,
        "compression_ratio_threshold": compression_ratio_threshold,
        "logprob_threshold": logprob_threshold,
        "no_speech_threshold": no_speech_threshold,
        "initial_prompt": initial_prompt,
        "carry_initial_prompt": carry_initial_prompt,
        "condition_on_previous_text": condition_on_previous_text,
        "suppress_tokens": suppress_tokens,
        "clip_timestamps": clip_timestamps,
        "hallucination_silence_threshold": hallucination_silence_threshold,
        "without_timestamps": without_timestamps,
        "batch_size": batch_size,
        "padding": padding,
        "seed": seed,
    }
    keep_compiled_programs()
    import audiozoo
    from audiozoo.decoding import long_form

    # What is wrong with the call is said before the model is read. Another model's languages may not be Whisper's.
    long_form.TranscriptionOptions.of(options | {"language": language if model is None else None})
    outputs = _outputs(files, output_dir, output_format)
    source = model or packaged.whisper()
    recogniser = audiozoo.load(source, dtype=dtype if dtype != "float32" else None)
    name = type(recogniser).__name__
    writes = name in ("Speech2TextForConditionalGeneration", "SpeechT5ForSpeechToText")
    if not writes and not name.endswith(("WhisperForConditionalGeneration", "ForCTC")):
        raise UsageError(f"{source} holds a {name}, which does not transcribe.")
    processor = audiozoo.load_processor(source)
    fusion = recognition.Fusion(language_model, tuple(hotwords or ()), lexicon, lm_weight, word_bonus)
    if not name.endswith("ForCTC") and fusion.asked:
        raise UsageError(f"--language-model, --hotword and --lexicon are for CTC models; {source} holds a {name}.")
    if name == "WhisperForConditionalGeneration":
        hear: Any = partial(long_form.transcribe, recogniser, processor, **options)
    elif writes:
        hear = recognition.writer(recogniser, processor, options, language)
    else:
        recogniser = recognition.speak_language(recogniser, processor, source, language)
        hear = recognition.ctc_transcriber(recogniser, processor, options, fusion)
    if output_dir is not None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{output_dir} cannot be made ({error.strerror}).") from None
    failed = 0
    for file, output in zip(files, outputs, strict=True):
        recording: Any = sys.stdin.buffer.read() if file == "-" else file
        name = "standard input" if file == "-" else file
        try:
            with progress_bar(Path(name).name, None, "s") as update:
                result = hear(recording, progress=update)
        except AudiozooError as error:
            if len(files) == 1:
                raise
            say(f"audiozoo: {name}: {error}", "red")
            failed += 1
            continue
        text = subtitles.render(result, output_format)
        if output is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            write_whole(output, text)
    if failed:
        raise SourceError(f"{failed} of {len(files)} files could not be transcribed.")


def _outputs(files: list[str], directory: Path | None, suffix: str) -> list[Path | None]:
    """Where each file's transcript goes, None being standard output; raises if an input is not there."""
    for file in files:
        if file != "-" and not Path(file).exists():
            raise SourceError(f"There is no file {file}.")
        if Path(file).is_dir():
            raise SourceError(f"{file} is a directory; name the sound files inside it.")
    if directory is None:
        return [None] * len(files)
    outputs = [directory / f"{'stdin' if file == '-' else Path(file).stem}.{suffix}" for file in files]
    for i, output in enumerate(outputs):
        if output in outputs[:i]:
            first = files[outputs.index(output)]
            raise UsageError(f"{first} and {files[i]} would both be written to {output}; give them one at a time.")
    return list(outputs)


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
