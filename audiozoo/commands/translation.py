"""From one language into another: `audiozoo translate`, of speech here, and of whatever else a model can read or say.

A kind of model adds itself to `TRANSLATORS`: its class, and a function that takes the model, its processor and what was
asked for, and gives segments of text, a waveform, or both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands import terminal
from audiozoo.commands.terminal import check_output, check_sound, progress_bar, say, write_sound, write_whole
from audiozoo.errors import AudioError, SourceError, UsageError

MODEL = "facebook/s2t-medium-mustc-multilingual-st"


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        file: a sound file, or "-" for standard input; None for text.
        text: what to translate, if it is text.
        target: the language to translate into, as the user calls it.
        source: the language to translate from.
        speak: whether the translation is to be spoken.
        beams: of the search; None for the model's own choice.
        batch_size: pieces at a time.
        speaker: whose voice speaks; -1 for one of the language.
        vad: whether only what is spoken is to be heard.
    """

    file: str | None
    text: str | None
    target: str | None
    source: str | None
    speak: bool
    beams: int | None
    batch_size: int
    speaker: int = -1
    vad: bool = False


@dataclass(frozen=True)
class Translation:
    """What came of it.

    Attributes:
        text: the whole translation.
        segments: with `start`, `end` and `text` each.
        waveform: it, spoken.
        sampling_rate: Hz of the waveform.
    """

    text: str
    segments: list[dict[str, Any]]
    waveform: Any = None
    sampling_rate: int = 16_000


Translator = Callable[[Any, Any, Request, Callable[[float, float], None]], Translation]


def speech_to_text(
    model: Any, processor: Any, request: Request, progress: Callable[[float, float], None]
) -> Translation:
    """Translate speech into text with fairseq S2T, Speech2Text2 or XLS-R."""
    from audiozoo import audio
    from audiozoo.decoding.encoders import without_padding
    from audiozoo.decoding.pieces import in_language, write_pieces

    name = type(model).__name__
    if request.file is None:
        raise UsageError(f"A {name} translates speech; give it a sound file, not text.")
    if request.speak:
        raise UsageError(f"A {name} writes its translation and does not speak it; leave --speech out.")
    if request.source is not None:
        raise UsageError(f"A {name} hears the language it was trained on; leave --from out.")
    options: dict[str, Any] = {}
    options |= in_language(model, processor, request.target, "This checkpoint", "--to")
    if request.beams is not None:
        options["num_beams"] = request.beams
    if name == "SpeechEncoderDecoderModel":
        options = model.generation_config.for_sentences() | without_padding(model.config.encoder) | options
    elif model.generation_config.max_length is None:
        options["max_new_tokens"] = 200
    if name == "Speech2TextForConditionalGeneration":
        options["batch_invariant"] = True
    wave = audio.read(request.file, processor.feature_extractor.sampling_rate)
    options |= {"batch_size": request.batch_size, "vad": request.vad}
    result = write_pieces(model, processor, wave, progress=progress, **options)
    return Translation(result["text"], result["segments"])


def seamless(model: Any, processor: Any, request: Request, progress: Callable[[float, float], None]) -> Translation:
    """Translate speech or text into text or speech with either SeamlessM4T; long recordings piece by piece."""
    import numpy as np

    from audiozoo import audio
    from audiozoo.decoding.pieces import translate_pieces, write_pieces

    name, parts = type(model).__name__, type(model).parts
    if request.target is None:
        raise UsageError(f"A {name} translates into many languages; say which with --to.")
    if request.speak and "vocoder" not in parts:
        raise UsageError(f"A {name} writes its translation and does not speak it; leave --speech out.")
    wanted = "speech_encoder" if request.file is not None else "text_encoder"
    if wanted not in parts:
        given = "text, not speech" if request.file is not None else "speech; give it a sound file, not text"
        raise UsageError(f"A {name} translates {given}.")
    options: dict[str, Any] = {"tgt_lang": request.target, "batch_invariant": True}
    if request.beams is not None:
        options["num_beams"] = request.beams
    spoken: list[Any] = []

    def generate(**inputs: Any) -> Any:
        if not request.speak:  # a model that speaks also writes languages that it has no voice for
            return model.generate_text(**inputs, **options).sequences
        found = model.generate(**inputs, **options, speaker_id=request.speaker, return_intermediate_token_ids=True)
        spoken.extend(w[:n] for w, n in zip(found.waveform, found.waveform_lengths, strict=True))
        return found.sequences

    if request.file is not None:
        if request.source is not None:
            raise UsageError(f"A {name} hears which language is spoken; leave --from out.")
        wave = audio.read(request.file, processor.feature_extractor.sampling_rate)
        heard: dict[str, Any] = {"batch_size": request.batch_size, "vad": request.vad}
        result = write_pieces(model, processor, wave, progress=progress, generate=generate, **heard)
        if request.speak and not spoken:
            raise AudioError(f"Nobody is speaking in {request.file}, so there is nothing to say.")
        text, segments = result["text"], result["segments"]
    else:
        if request.source is None:
            raise UsageError(f"A {name} has to know the language of a text; say it with --from.")
        texts = translate_pieces(
            processor, request.text or "", generate, batch_size=request.batch_size, progress=progress,
            src_lang=request.source,
        )  # fmt: skip
        # A text has times when it is spoken.
        ends = np.cumsum([len(w) / model.config.sampling_rate for w in spoken[: len(texts)]] or [0.0] * len(texts))
        starts = [0.0, *ends[:-1].tolist()]
        timed = zip(starts, ends.tolist(), texts, strict=True)
        segments = [{"start": start, "end": end, "text": piece} for start, end, piece in timed]
        text = " ".join(filter(None, texts))
    # The last batch may be filled up with repetitions.
    waveform = np.concatenate(spoken[: len(segments)]) if spoken else None
    return Translation(text, segments, waveform, model.config.sampling_rate)


def while_speaking(
    model: Any, processor: Any, request: Request, wait_k: int, cmvn: Path | None, write: Callable[[str], None]
) -> Translation:
    """Translate a recording as someone would who hears it for the first time, `wait_k` pieces of 280 ms behind.

    Args:
        model: fairseq S2T.
        processor: its.
        request: a file, or "-" for WAV on standard input, as it comes.
        wait_k: k.
        cmvn: statistics that features are normalised by; by default those of the checkpoint's corpus or, which a
            speaker would not know, of the file.
        write: called with each word, and the space before it, as soon as it is whole.
    """
    from audiozoo import audio
    from audiozoo.audio import read_stream
    from audiozoo.decoding.pieces import in_language
    from audiozoo.models.speech_to_text import average_lagging, simultaneous
    from audiozoo.processors.speech_to_text import GlobalCMVN, stream_filterbanks

    extractor, rate, piece = processor.feature_extractor, processor.feature_extractor.sampling_rate, 0.28
    statistics = extractor.of_corpus if cmvn is None else GlobalCMVN.from_npz(cmvn)
    own = statistics is None and extractor.do_ceptral_normalize
    if request.file == "-":
        if own:
            raise UsageError("What is said next is not known yet: give statistics to normalise by with --cmvn.")
        blocks: Any = (block[0] for block in read_stream(sys.stdin.buffer, rate, seconds=piece))
    else:
        blocks = [audio.read(str(request.file), rate)] if own else audio.blocks(str(request.file), rate, piece)
    pieces: Any = stream_filterbanks(blocks, statistics, extractor.num_mel_bins, rate)
    if own:
        pieces = map(extractor.normalised, pieces)
    token = in_language(model, processor, request.target, "This checkpoint", "--to")
    tokens: list[int] = []
    segments: list[dict[str, Any]] = []
    done, heard, lags = "", 0.0, []
    limit = model.generation_config.max_length or 200
    for found in simultaneous(model, pieces, wait_k, **token, max_new_tokens=limit):
        tokens.append(found.token)
        before, heard = heard, found.frames / 100
        lags.append(heard)
        text = processor.decode(tokens, skip_special_tokens=True)
        whole = text[: text.rfind(" ") + 1].rstrip()  # the last word may go on
        if len(whole) > len(done):
            write(whole[len(done) :])
            segments.append({"start": before, "end": heard, "text": whole[len(done) :].strip()})
            done = whole
    text = processor.decode(tokens, skip_special_tokens=True)
    if len(text) > len(done):
        write(text[len(done) :])
        segments.append({"start": heard, "end": heard, "text": text[len(done) :].strip()})
    if lags:
        say(f"{average_lagging(lags, heard):.1f} s behind the speaker on average")
    return Translation(text, segments)


TRANSLATORS: dict[str, Translator] = {
    **{
        f"SeamlessM4T{version}{kind}": seamless
        for version in ("", "v2")
        for kind in ("Model", "ForTextToText", "ForSpeechToText", "ForTextToSpeech", "ForSpeechToSpeech")
    },
    "Speech2TextForConditionalGeneration": speech_to_text,
    "SpeechEncoderDecoderModel": speech_to_text,
}


def what_is_meant(source: str) -> tuple[str | None, str | None]:
    """A sound file, or a text: what the user wrote, or what the file that is named holds.

    Raises:
        SourceError: if it is the name of something that is not there or cannot be translated.
    """
    from audiozoo.audio.files import SUFFIXES

    if not source.strip():
        raise SourceError("There is nothing to translate.")
    path = Path(source)
    try:
        is_there, is_directory = path.exists(), path.is_dir()
    except OSError:  # a text may be too long for a name
        return None, source
    if is_directory:
        raise SourceError(f"{source} is a directory; name a file inside it.")
    if is_there and path.suffix.lower() == ".txt":
        try:
            return None, path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise SourceError(f"{source} cannot be read as UTF-8 text.") from None
    if is_there:  # a named pipe, too
        return source, None
    if path.suffix.lower() in (*SUFFIXES, ".txt"):
        raise SourceError(f"There is no file {source}.")
    return None, source


def translate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|TEXT",
            help="a sound file, - is standard input; for models that read also a text, or a .txt file",
        ),
    ],
    to: Annotated[str | None, typer.Option("--to", help="language to translate into, as the model calls it")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="language to translate from, if the model asks")] = None,
    model: Annotated[str, typer.Option(help="hub id, directory or file of a translator")] = MODEL,
    speech: Annotated[Path | None, typer.Option(help="speak the translation into this sound file")] = None,
    speaker: Annotated[
        int | None, typer.Option(min=0, help="whose voice speaks it, by number; by default a speaker of the language")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="write the text there instead of to standard output")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="txt, srt, vtt, tsv or json")] = "txt",
    beams: Annotated[
        int | None, typer.Option("--beam-size", "--beams", help="of the search; by default the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="pieces of a long recording translated together")] = 4,
    vad: Annotated[bool, typer.Option("--vad", help="hear only where somebody is speaking")] = False,
    wait_k: Annotated[
        int | None,
        typer.Option(
            help="write while someone speaks, that many pieces of 280 ms behind; FILE may be -, WAV as it comes"
        ),
    ] = None,
    cmvn: Annotated[
        Path | None,
        typer.Option(
            help="for --wait-k: .npz with the mean and std of each band, by default the model's or the file's own"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=terminal.COMPUTED_IN)] = "float32",
) -> None:
    """Translate speech or text, into text and into speech. Not every model reads texts, or speaks."""
    from audiozoo.text import subtitles

    if output_format not in subtitles.FORMATS:
        raise UsageError(f"There is no format {output_format!r}; there are {', '.join(subtitles.FORMATS)}.")
    terminal.check_dtype(dtype)
    if beams is not None and beams < 1:
        raise UsageError("--beam-size counts from 1.")
    if batch_size < 1:
        raise UsageError("--batch-size counts from 1.")
    if speaker is not None and speech is None:
        raise UsageError("--speaker says who speaks the translation; say with --speech where to.")
    if wait_k is not None and (beams or speech or from_ or vad or wait_k < 1):
        raise UsageError("--wait-k counts from 1, and goes without --beam-size, --speech, --from and --vad.")
    if cmvn is not None and wait_k is None:
        raise UsageError("--cmvn belongs to --wait-k.")
    file, text = ("-", None) if source == "-" else what_is_meant(source)
    if vad:
        if file is None:
            raise UsageError("--vad is for recordings; in a text nobody is speaking.")
        from audiozoo.audio.speech import silero

        silero()
    if speech is not None:
        check_sound(speech, source)
    if output is not None:
        check_output(output, source)
    terminal.keep_compiled_programs()
    import audiozoo

    translator = audiozoo.load(model, dtype=dtype if dtype != "float32" else None)
    name = type(translator).__name__
    if name.startswith("Whisper"):
        raise UsageError(f"{model} holds a {name}; it translates into English by audiozoo transcribe --task translate.")
    if name not in TRANSLATORS:
        raise UsageError(f"{model} holds a {name}, which does not translate; {', '.join(TRANSLATORS)} do.")
    if wait_k is not None and name != "Speech2TextForConditionalGeneration":
        raise UsageError(f"--wait-k is for fairseq S2T; {model} holds a {name}.")
    processor = audiozoo.load_processor(model)
    voice = -1 if speaker is None else speaker
    request = Request(file, text, to, from_, speech is not None, beams, batch_size, voice, vad)
    if wait_k is not None:
        if file is None:
            raise UsageError(f"A {name} translates speech; give it a sound file, not text.")
        at_once = output is None and output_format == "txt"

        def write(words: str) -> None:
            if at_once:
                sys.stdout.write(words)
                sys.stdout.flush()

        result = while_speaking(translator, processor, request, wait_k, cmvn, write)
        write("\n")
        if at_once:
            return
    else:
        label, unit = ("translating", "pieces") if file is None else (Path(file).name, "s")
        with progress_bar(label, None, unit) as update:
            result = TRANSLATORS[name](translator, processor, request, update)
    written = subtitles.render({"text": result.text, "segments": result.segments, "language": to}, output_format)
    if output is not None:
        write_whole(output, written)
    elif speech is None or str(speech) != "-":
        sys.stdout.write(written)
        sys.stdout.flush()
    if speech is not None:
        write_sound(speech, result.waveform, result.sampling_rate)
        say(f"{len(result.waveform) / result.sampling_rate:.1f} s of speech in {speech}")
