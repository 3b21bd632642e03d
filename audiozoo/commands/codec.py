"""`audiozoo codec encode | decode | info`: sound to `.ecdc` files and back, also through pipes while it goes on."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from audiozoo.commands.terminal import (
    check_file,
    check_output,
    check_sound,
    keep_compiled_programs,
    progress_bar,
    say,
    written_whole,
)
from audiozoo.errors import SourceError, UsageError

app = typer.Typer(no_args_is_help=True, help="Compress sound with a neural codec (EnCodec).", rich_markup_mode=None)

Model = Annotated[str | None, typer.Option(help="hub id, directory or file of the codec; by default facebook's")]
LanguageModel = Annotated[str | None, typer.Option("--lm", help="file or directory of the codec's language model")]


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    """Standard input, or a file."""
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        with open(source, "rb") as file:
            yield file
    except BrokenPipeError:  # of standard output
        raise
    except FileNotFoundError:
        raise SourceError(f"{source} does not exist.") from None
    except OSError as error:
        raise SourceError(f"{source} cannot be read ({error.strerror}).") from None


def _write_on(out: str, parts: Iterable[bytes]) -> int:
    """Parts as they come, to standard output, or to a file that is renamed at the end; returns how many bytes."""
    written = 0
    if out == "-":
        for part in parts:
            written += sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
        return written
    with written_whole(Path(out)) as temporary, open(temporary, "wb") as file:
        for part in parts:
            written += file.write(part)
    return written


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
    stream: Annotated[bool, typer.Option("--stream", help="write while sound still comes; causal models")] = False,
    raw: Annotated[int | None, typer.Option(help="the source is bare 16-bit samples at this rate (Hz)")] = None,
) -> None:
    """Compress a sound file. It is brought to the model's rate and channels first.

    With --stream, WAV or bare samples are coded as they arrive. Such a file does not say how long it is, and other
    programs cannot read it.
    """
    check_file(source)
    check_output(Path(out), source)
    if raw is not None and raw < 1:
        raise UsageError(f"--raw is {raw}; a sampling rate is 1 Hz or more.")
    if language_model is not None and stream:
        raise UsageError("--stream codes without a language model (--lm): its bytes would not say where they end.")
    keep_compiled_programs()
    import numpy as np

    from audiozoo.audio import SampleFormat, in_channels, read, read_stream
    from audiozoo.codec import compress, compress_stream

    compiled = _open(model or "facebook/encodec_24khz", language_model)
    config = compiled.config
    config.quantizers_for(bandwidth)  # refused before the sound is read
    mono = config.audio_channels == 1
    layout = None if raw is None else SampleFormat(raw, config.audio_channels)

    if stream:
        with _opened(source) as file:
            pieces = read_stream(file, config.sampling_rate, mono=mono, raw=layout)
            fitted = (in_channels(piece, config.audio_channels) for piece in pieces)
            size = _write_on(out, compress_stream(compiled, fitted, bandwidth))
        say(f"{size} bytes")
        return
    if layout is not None:
        with _opened(source) as file:
            samples = np.concatenate(list(read_stream(file, config.sampling_rate, mono=mono, raw=layout)), axis=1)
        samples = samples[0] if mono else samples
    else:
        samples = read(source, config.sampling_rate, mono=mono)
    samples = in_channels(samples, config.audio_channels)
    with progress_bar("encoding", None, "frames") as update:
        content = compress(compiled, samples, bandwidth, progress=update)
    _write_on(out, [content])
    seconds = samples.shape[1] / config.sampling_rate
    say(f"{seconds:.2f} s in {len(content)} bytes, {len(content) * 8 / seconds / 1000:.2f} kbit/s")


@app.command()
def decode(
    source: Annotated[str, typer.Argument(help=".ecdc file; - is standard input")],
    out: Annotated[str, typer.Argument(help="sound file to write; - is standard output, as WAV")],
    model: Model = None,
    language_model: LanguageModel = None,
    raw: Annotated[bool, typer.Option("--raw", help="write bare 16-bit samples")] = False,
) -> None:
    """Decompress an .ecdc file. To standard output, sound is written as soon as it is decoded, if the model allows."""
    (check_output if raw else check_sound)(Path(out), source)
    keep_compiled_programs()
    import soundfile

    from audiozoo.audio import to_pcm, wav_header, write
    from audiozoo.codec import StreamReader, decompress, decompress_stream, read_header
    from audiozoo.codec.ecdc import MODELS

    with _opened(source) as file:
        reader = StreamReader(file)
        header = read_header(reader)
        if model is None:
            # A name is looked up, so that no file chooses a directory to load.
            if header.model not in MODELS or not header.model.startswith("encodec_"):
                raise UsageError(f"{source} is from {header.model}, no model of facebook's; say which with --model.")
            model = f"facebook/{header.model}"
        if header.language_model and language_model is None:
            raise UsageError(f"{source} was written with a language model; give the same one with --lm.")
        compiled = _open(model, language_model)
        rate, channels = compiled.config.sampling_rate, compiled.config.audio_channels
        begin = b"" if raw else wav_header(rate, channels, header.samples or None)
        if out == "-" and compiled.config.can_stream:

            def parts() -> Iterator[bytes]:
                for number, values in enumerate(decompress_stream(header, reader, compiled)):
                    yield (b"" if number else begin) + to_pcm(values)

            _write_on(out, parts())
            return
        data = header.to_bytes() + file.read()
    with progress_bar("decoding", None, "frames") as update:
        samples = decompress(data, compiled, progress=update)
    if raw:
        _write_on(out, [to_pcm(samples)])
    elif out != "-":
        write(out, samples, rate)
    else:
        buffer = io.BytesIO()
        soundfile.write(buffer, samples.T, rate, format="WAV", subtype="PCM_16")
        _write_on(out, [buffer.getvalue()])


@app.command()
def info(
    source: Annotated[str, typer.Argument(help=".ecdc file; - is standard input")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what an .ecdc file holds; no model is needed."""
    import dataclasses
    import json

    from audiozoo.codec import StreamReader, body_bytes, read_header
    from audiozoo.codec.ecdc import MODELS
    from audiozoo.models.encodec import EncodecConfig

    with _opened(source) as file:
        reader = StreamReader(file)
        header = read_header(reader)
        size = file.seek(0, 2) if file.seekable() else reader.position + len(file.read())
    fields: dict[str, Any] = {**dataclasses.asdict(header), "bytes": size}
    if header.samples and header.model in MODELS:
        config = getattr(EncodecConfig, header.model)()
        fields["seconds"] = header.samples / config.sampling_rate
        fields["kbps"] = size * 8 / fields["seconds"] / 1000
        missing = 0 if header.language_model else reader.position + body_bytes(header, config) - size
        if missing > 0:
            fields["missing_bytes"] = missing
    if as_json:
        print(json.dumps(fields))
        return
    for name, value in fields.items():
        print(f"{name.replace('_', ' '):15}", f"{value:.3f}" if isinstance(value, float) else value)
