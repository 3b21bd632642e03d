"""`audiozoo codec encode | decode | info`: sound to `.ecdc` files and back."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands.terminal import keep_compiled_programs, progress_bar, say, written_whole
from audiozoo.errors import SourceError, UsageError

app = typer.Typer(no_args_is_help=True, help="Compress sound with a neural codec (EnCodec).", rich_markup_mode=None)

Model = Annotated[str | None, typer.Option(help="hub id, directory or file of the codec; by default facebook's")]
LanguageModel = Annotated[str | None, typer.Option("--lm", help="file or directory of the codec's language model")]


def _read(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise SourceError(f"{source} does not exist.") from None
    except OSError as error:
        raise SourceError(f"{source} cannot be read ({error.strerror}).") from None


def _write(out: str, content: bytes) -> None:
    """To standard output, or to a file under a temporary name that is then renamed."""
    if out == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    with written_whole(Path(out)) as temporary:
        temporary.write_bytes(content)


def _open(model: str, language_model: str | None) -> Any:
    """The codec, compiled, with its language model."""
    import audiozoo
    from audiozoo.codec import Compiled

    loaded = audiozoo.load(model)
    if type(loaded).__name__ != "EncodecModel":
        raise UsageError(f"{model} is a {type(loaded).__name__}; an EncodecModel is wanted.")
    extra = None
    if language_model is not None:
        extra = audiozoo.load(language_model)
        if type(extra).__name__ != "EncodecLanguageModel":
            raise UsageError(f"{language_model} is a {type(extra).__name__}; an EncodecLanguageModel is wanted.")
    return Compiled(loaded, extra)


@app.command()
def encode(
    source: Annotated[str, typer.Argument(help="sound file; - is standard input")],
    out: Annotated[str, typer.Argument(help=".ecdc file to write; - is standard output")],
    model: Model = "facebook/encodec_24khz",
    bandwidth: Annotated[float | None, typer.Option(help="kbit/s, one of the model's; by default its smallest")] = None,
    language_model: LanguageModel = None,
) -> None:
    """Compress a sound file. It is brought to the model's rate and channels first."""
    keep_compiled_programs()
    from audiozoo.audio import read
    from audiozoo.codec import compress

    compiled = _open(model or "facebook/encodec_24khz", language_model)
    config = compiled.config
    config.quantizers_for(bandwidth)  # refused before the sound is read
    samples = read(source, config.sampling_rate, mono=config.audio_channels == 1)
    samples = samples[None] if samples.ndim == 1 else samples[: config.audio_channels]
    if len(samples) < config.audio_channels:
        samples = samples.repeat(config.audio_channels, axis=0)
    with progress_bar("encoding", None, "frames") as update:
        content = compress(compiled, samples, bandwidth, progress=update)
    _write(out, content)
    seconds = samples.shape[1] / config.sampling_rate
    say(f"{seconds:.2f} s in {len(content)} bytes, {len(content) * 8 / seconds / 1000:.2f} kbit/s")


@app.command()
def decode(
    source: Annotated[str, typer.Argument(help=".ecdc file; - is standard input")],
    out: Annotated[str, typer.Argument(help="sound file to write; - is standard output, as WAV")],
    model: Model = None,
    language_model: LanguageModel = None,
) -> None:
    """Decompress an .ecdc file."""
    keep_compiled_programs()
    import soundfile

    from audiozoo.audio import write
    from audiozoo.codec import BitReader, decompress, read_header

    data = _read(source)
    header = read_header(BitReader(data))
    if model is None:
        if not header.model.startswith("encodec_"):
            raise UsageError(f"{source} was made with a model that has no name; say which with --model.")
        model = f"facebook/{header.model}"
    if header.language_model and language_model is None:
        raise UsageError(f"{source} was written with a language model; give the same one with --lm.")
    compiled = _open(model, language_model)
    with progress_bar("decoding", None, "frames") as update:
        samples = decompress(data, compiled, progress=update)
    rate = compiled.config.sampling_rate
    if out != "-":
        write(out, samples, rate)
        return
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, format="WAV", subtype="PCM_16")
    _write(out, buffer.getvalue())


@app.command()
def info(
    source: Annotated[str, typer.Argument(help=".ecdc file; - is standard input")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what an .ecdc file holds; no model is needed."""
    import dataclasses
    import json

    from audiozoo.codec import BitReader, read_header
    from audiozoo.models.encodec import EncodecConfig

    data = _read(source)
    header = read_header(BitReader(data))
    fields: dict[str, Any] = {**dataclasses.asdict(header), "bytes": len(data)}
    if callable(size := getattr(EncodecConfig, header.model, None)):
        config = size()
        fields["seconds"] = header.samples / config.sampling_rate
        fields["kbps"] = len(data) * 8 / fields["seconds"] / 1000
    if as_json:
        print(json.dumps(fields))
        return
    for name, value in fields.items():
        print(f"{name.replace('_', ' '):15}", f"{value:.3f}" if isinstance(value, float) else value)
