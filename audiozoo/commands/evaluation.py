"""`audiozoo evaluate`: how well a model does what it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from audiozoo.commands import terminal
from audiozoo.commands.terminal import progress_bar, say, seed_option, write_whole
from audiozoo.errors import SourceError, UsageError


def evaluate(
    model: Annotated[str, typer.Argument(help="hub id, directory or file")],
    data: Annotated[str, typer.Option(help="a folder, a .tsv or .jsonl manifest, a .tar; a .txt of texts to speak")],
    task: Annotated[
        str | None, typer.Option(help="what is measured; by default what the model does and the data allow")
    ] = None,
    model_class: Annotated[str | None, typer.Option(help="the class, where the checkpoint leaves a choice")] = None,
    language: Annotated[str | None, typer.Option(help="that is spoken, or written by a translator")] = None,
    batch_size: Annotated[int, typer.Option(help="recordings, or pieces of one, at a time")] = 8,
    limit: Annotated[int | None, typer.Option(help="hear only the first so many recordings")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write predictions as JSON lines")] = None,
    normalise: Annotated[
        str | None, typer.Option("--normalize", "--normalise", help="of texts: english or basic as Whisper's, or none")
    ] = None,
    beams: Annotated[int | None, typer.Option("--beam-size", "--beams", help="of the search")] = None,
    tokenize: Annotated[str | None, typer.Option(help="sacrebleu's tokenizer of BLEU, such as zh or flores200")] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", help="what CLAP chooses from; repeated")] = None,
    template: Annotated[str | None, typer.Option(help="sentence that a label is put into, at {}")] = None,
    crops: Annotated[int | None, typer.Option(help="pieces of 10 s that a classifier hears and averages")] = None,
    trials: Annotated[Path | None, typer.Option(help="pairs of speakers: lines of 1 or 0 and two recordings")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="kbit/s of a codec")] = None,
    clusters: Annotated[Path | None, typer.Option(help="centroids of units: .npz, .npy or joblib")] = None,
    layer: Annotated[int | None, typer.Option(help="whose frames were clustered")] = None,
    judge: Annotated[str | None, typer.Option(help="Whisper that listens to speech, or CLAP to music")] = None,
    speaker: Annotated[int | None, typer.Option(help="voice of a VITS with several")] = None,
    speaker_embedding: Annotated[Path | None, typer.Option(help="x-vector of a voice, .npy; for SpeechT5")] = None,
    vocoder: Annotated[str | None, typer.Option(help="for SpeechT5; by default microsoft's")] = None,
    voice_preset: Annotated[str | None, typer.Option(help="of Bark")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds of music")] = None,
    seed: Annotated[int | None, seed_option("of what is drawn when speech or music is made")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, an option of the decoding")] = None,
    dtype: Annotated[str, typer.Option(help=terminal.COMPUTED_IN)] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure a model: error rates, BLEU, mAP, …, by its task."""
    terminal.check_dtype(dtype)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise SourceError(f"{output} cannot be written: it is a directory, or lies in none.")
    terminal.keep_compiled_programs()
    import audiozoo
    from audiozoo import evaluation

    items = _items(data)
    subject: Any = audiozoo.load(model, model_class=model_class, dtype=dtype if dtype != "float32" else None)
    evaluation.task_for(subject, items, task)  # what cannot be done is said before more is read
    processor = audiozoo.load_processor(model)
    options: dict[str, Any] = {
        "source": model,
        "language": language,
        "normalise": normalise,
        "beams": beams,
        "tokenize": tokenize,
        "labels": labels,
        "template": template,
        "crops": crops,
        "trials": trials,
        "bandwidth": bandwidth,
        "layer": layer,
        "speaker": speaker,
        "voice_preset": voice_preset,
        "duration": duration,
        "seed": seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if set_:
        from audiozoo.commands.training import values_of

        options["generate"] = values_of(set_)
    if clusters is not None:
        options["clusters"] = _clusters(clusters)
    if judge is not None:
        options["judge"] = audiozoo.load(judge), audiozoo.load_processor(judge)
    if type(subject).__name__ == "SpeechT5ForTextToSpeech":
        from audiozoo.commands import speech

        options["speaker_embedding"] = speech.x_vector(speaker_embedding, subject)
        options["vocoder"] = speech.load_vocoder(vocoder or speech.VOCODER)
    elif speaker_embedding is not None or vocoder is not None:
        raise UsageError(
            f"--speaker-embedding and --vocoder are for SpeechT5; {model} holds a {type(subject).__name__}."
        )
    with progress_bar("evaluating", len(items[:limit]), "recordings") as update:
        result = evaluation.evaluate(
            subject, processor, items, task, limit=limit, batch_size=batch_size, progress=update, **options
        )
    if output is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in result.predictions)
        write_whole(output, "".join(lines))
    if result.unreadable:
        say(f"{len(result.unreadable)} of {len(items[:limit])} recordings were left out:", "yellow")
        for name, reason in result.unreadable.items():
            say(f"  {name}: {reason}", "yellow")
    if as_json:
        shown = {name: value if value == value else None for name, value in result.metrics.items()}
        print(
            json.dumps(
                {"task": result.task, "recordings": result.count, "metrics": shown, "unreadable": result.unreadable}
            )
        )
        return
    table = Table(result.task, f"{result.count} recordings", box=None)
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console(highlight=False, soft_wrap=True).print(table)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _items(data: str) -> list[Any]:
    from audiozoo.training.data import Item, find_items, lines_of

    path = Path(data)
    if path.suffix != ".txt" or not path.is_file():
        return find_items(data)
    lines = enumerate(lines_of(path), 1)
    items = [Item(f"{path}:{number}", path, None, {"text": line}) for number, line in lines if line.strip()]
    if not items:
        raise SourceError(f"{path} holds no text.")
    return items


def _clusters(path: Path) -> Any:
    from audiozoo.decoding.units import KMeans
    from weights_conversion.hubert import read_kmeans

    if not path.is_file():
        raise SourceError(f"There is no file {path}.")
    return KMeans.load(path) if path.suffix in (".npz", ".npy") else KMeans(read_kmeans(path))
