"""Speech to text: `audiozoo transcribe`, with any model of the zoo that writes down what is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo import packaged
from audiozoo.commands import recognition, terminal
from audiozoo.commands.terminal import COMPUTED_IN, check_dtype, progress_bar, say, seed_option, write_whole
from audiozoo.commands.translation import TRANSLATORS
from audiozoo.errors import AudiozooError, SourceError, UsageError
from audiozoo.text import subtitles


def _number_or_none(text: Any) -> float | None:
    return None if str(text).lower() == "none" else float(text)


def _threshold(text: str) -> Any:
    return typer.Option(help=f"{text}; none switches it off", parser=_number_or_none, metavar="NUMBER|none")


def transcribe(
    files: Annotated[list[str], typer.Argument(help="sound files; - is standard input")],
    model: Annotated[str | None, typer.Option(help="hub id, directory or file; by default Whisper tiny.en")] = None,
    language: Annotated[str | None, typer.Option(help="code or name; detected if not given")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate (into English)")] = "transcribe",
    output_format: Annotated[str, typer.Option("--format", help="txt, srt, vtt, tsv, json, or all of them")] = "txt",
    output_dir: Annotated[
        Path | None, typer.Option(help="write FILE.FORMAT there instead of to standard output")
    ] = None,
    word_timestamps: Annotated[bool, typer.Option("--word-timestamps", help="time every word")] = False,
    beam_size: Annotated[int | None, typer.Option(help="beams, at temperature 0")] = None,
    best_of: Annotated[int | None, typer.Option(help="samples, at temperatures above 0")] = None,
    patience: Annotated[float | None, typer.Option(help="of the beam search")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="of the beam search, 0 to 1")] = None,
    temperature: Annotated[str, typer.Option(help="one, or several tried in turn")] = "0,0.2,0.4,0.6,0.8,1",
    compression_ratio_threshold: Annotated[Any, _threshold("text that zlib shrinks more is refused")] = 2.4,
    logprob_threshold: Annotated[Any, _threshold("mean log-probability below which text is refused")] = -1.0,
    no_speech_threshold: Annotated[Any, _threshold("probability of silence above which text is dropped")] = 0.6,
    initial_prompt: Annotated[str | None, typer.Option(help="text that comes before the audio")] = None,
    carry_initial_prompt: Annotated[
        bool, typer.Option("--carry-initial-prompt", help="repeat it at every window")
    ] = False,
    prefix: Annotated[str | None, typer.Option(help="how the text of every window begins")] = None,
    condition_on_previous_text: Annotated[bool, typer.Option(help="prompt each window with the text so far")] = True,
    sample_len: Annotated[int | None, typer.Option(help="tokens a window at most")] = None,
    suppress_tokens: Annotated[str, typer.Option(help="token ids, -1 for all that is not speech")] = "-1",
    suppress_blank: Annotated[bool, typer.Option(help="no space and no end as the first token")] = True,
    max_initial_timestamp: Annotated[Any, _threshold("seconds until a window's first word")] = 1.0,
    without_timestamps: Annotated[bool, typer.Option("--without-timestamps", help="text only")] = False,
    clip_timestamps: Annotated[str, typer.Option(help="start,end,start,… in seconds")] = "0",
    hallucination_silence_threshold: Annotated[
        float | None, typer.Option(help="skip silence longer than this around doubtful text (needs --word-timestamps)")
    ] = None,
    prepend_punctuations: Annotated[str | None, typer.Option(help="marks that belong to the word after them")] = None,
    append_punctuations: Annotated[str | None, typer.Option(help="marks that belong to the word before them")] = None,
    max_line_width: Annotated[
        int | None, typer.Option(help="letters a line of srt and vtt (needs --word-timestamps)")
    ] = None,
    max_line_count: Annotated[int | None, typer.Option(help="lines a cue (needs --word-timestamps)")] = None,
    max_words_per_line: Annotated[int | None, typer.Option(help="words a cue (needs --word-timestamps)")] = None,
    highlight_words: Annotated[
        bool, typer.Option("--highlight-words", help="underline each word as it is said (needs --word-timestamps)")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="windows decoded together")] = 1,
    vad: Annotated[bool, typer.Option("--vad", help="hear only where somebody is speaking")] = False,
    chunk_length_s: Annotated[
        float | None, typer.Option(help="seconds; cut into chunks that overlap, and join their texts and words")
    ] = None,
    stride_length_s: Annotated[
        float | None, typer.Option(help="seconds that a chunk shares with each neighbour; a sixth of it if not given")
    ] = None,
    padding: Annotated[str, typer.Option(help="of the last window: silence or zeros")] = "silence",
    allow_short: Annotated[
        bool, typer.Option("--allow-short", help="windows shorter than 30 s: sooner, as whisper_short trains")
    ] = False,
    seed: Annotated[int, seed_option("of the sampling")] = 0,
    language_model: Annotated[
        str | None,
        typer.Option(help="of words, an ARPA file, for CTC models; of tokens, a checkpoint, for SpeechT5"),
    ] = None,
    hotwords: Annotated[
        list[str] | None, typer.Option("--hotword", help="a word that is likely to be said; for CTC models")
    ] = None,
    lexicon: Annotated[
        Path | None, typer.Option(help="the only words there are: one and its letters a line; for CTC models")
    ] = None,
    lm_weight: Annotated[
        float | None, typer.Option(help="of the language model; if not given 0.5, or 0.3 for SpeechT5")
    ] = None,
    word_bonus: Annotated[
        float | None, typer.Option(help="with a language model or a lexicon, 1.5 if not given; for CTC models")
    ] = None,
    ctc_weight: Annotated[float, typer.Option(help="share of its CTC head, 0 to 1; for SpeechT5")] = 0.0,
    dtype: Annotated[str, typer.Option(help=COMPUTED_IN)] = "float32",
) -> None:
    """Transcribe sound files. Whisper, CTC models, fairseq S2T and SpeechT5 can."""
    # What is wrong with the call is said before the model is read.
    forms = _forms(output_format, output_dir)
    layout = subtitles.Layout(max_line_width, max_line_count, max_words_per_line, highlight_words)
    if layout != subtitles.Layout() and not word_timestamps:
        raise UsageError("How words become lines and cues can be said with --word-timestamps only.")
    check_dtype(dtype)
    try:
        temperatures = tuple(float(t) for t in temperature.split(","))
    except ValueError:
        raise UsageError(f"--temperature {temperature!r} must be numbers with commas between them.") from None
    options: dict[str, Any] = {
        "language": language,
        "task": task,
        "temperature": temperatures,
        "compression_ratio_threshold": compression_ratio_threshold,
        "logprob_threshold": logprob_threshold,
        "no_speech_threshold": no_speech_threshold,
        "condition_on_previous_text": condition_on_previous_text,
        "initial_prompt": initial_prompt,
        "carry_initial_prompt": carry_initial_prompt,
        "prefix": prefix,
        "word_timestamps": word_timestamps,
        "clip_timestamps": clip_timestamps,
        "hallucination_silence_threshold": hallucination_silence_threshold,
        "sample_len": sample_len,
        "best_of": best_of,
        "beam_size": beam_size,
        "patience": patience,
        "length_penalty": length_penalty,
        "suppress_tokens": suppress_tokens,
        "suppress_blank": suppress_blank,
        "without_timestamps": without_timestamps,
        "max_initial_timestamp": max_initial_timestamp,
        "padding": padding,
        "batch_size": batch_size,
        "vad": vad,
        "chunk_length_s": chunk_length_s,
        "stride_length_s": stride_length_s,
        "seed": seed,
        "allow_short": allow_short,
    }
    marks = {"prepend_punctuations": prepend_punctuations, "append_punctuations": append_punctuations}
    options |= {name: value for name, value in marks.items() if value is not None}
    outputs = _outputs(files, output_dir)
    terminal.keep_compiled_programs()
    from audiozoo.audio.speech import silero
    from audiozoo.decoding.long_form import TranscriptionOptions

    # Which languages there are, and what a length penalty is, differs between models.
    TranscriptionOptions.of(options if model is None else options | {"language": None, "length_penalty": None})
    if vad:
        silero()
    fusion = recognition.Fusion(language_model, tuple(hotwords or ()), lexicon, lm_weight, word_bonus, ctc_weight)
    hear = _recogniser(model or packaged.whisper(), options, dtype, fusion)
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
        for form in forms:
            text = subtitles.render(result, form, layout)
            if output is None:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                write_whole(output.with_name(f"{output.name}.{form}"), text)
    if failed:
        raise SourceError(f"{failed} of {len(files)} files could not be transcribed.")


def _recogniser(
    source: str, options: dict[str, Any], dtype: str, fusion: recognition.Fusion
) -> Callable[..., dict[str, Any]]:
    """What transcribes a recording: `(path or bytes, progress) -> result`."""
    import audiozoo
    from audiozoo.decoding import long_form
    from audiozoo.loading import speak_language

    model: Any = audiozoo.load(source, dtype=dtype if dtype != "float32" else None)
    name = type(model).__name__
    writes = name in ("Speech2TextForConditionalGeneration", "SpeechT5ForSpeechToText")
    if name in TRANSLATORS and not writes:
        raise UsageError(f"{source} holds a {name}, which audiozoo translate takes.")
    if not (writes or name.endswith("ForCTC") or name == "WhisperForConditionalGeneration"):
        raise UsageError(f"{source} holds a {name}, which does not transcribe.")
    fusion.refuse(name, source)
    processor = audiozoo.load_processor(source)
    if name.endswith("ForCTC"):
        model, processor = speak_language(model, processor, options["language"], source)
        return recognition.ctc_transcriber(model, processor, options, fusion)
    if writes:
        return recognition.writer(model, processor, options, options["language"], fusion)
    long_form.TranscriptionOptions.of(options)
    return partial(long_form.transcribe, model, processor, **options)


def _forms(wanted: str, directory: Path | None) -> list[str]:
    """The formats to write."""
    if wanted == "all":
        if directory is None:
            raise UsageError("--format all writes several files: say where with --output-dir.")
        return list(subtitles.FORMATS)
    if wanted not in subtitles.FORMATS:
        raise UsageError(f"There is no format {wanted!r}; there are {', '.join(subtitles.FORMATS)}, and all.")
    return [wanted]


def _outputs(files: list[str], directory: Path | None) -> list[Path | None]:
    """Where each file's transcript goes, without the format; None is standard output. Every file must be there."""
    for file in files:
        terminal.check_file(file)
    if directory is None:
        return [None] * len(files)
    outputs = [directory / ("stdin" if file == "-" else Path(file).stem) for file in files]
    for i, output in enumerate(outputs):
        if output in outputs[:i]:
            first = files[outputs.index(output)]
            raise UsageError(f"{first} and {files[i]} would both be written to {output}.*; give them one at a time.")
    return list(outputs)
