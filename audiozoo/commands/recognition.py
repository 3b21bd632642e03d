"""Speech to text with CTC models, and what else wav2vec 2.0's family hears: `audiozoo align`, `identify`, `units`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo.commands import terminal
from audiozoo.commands.terminal import check_file, check_text, progress_bar, say
from audiozoo.errors import SourceError, UsageError

RECOGNISER = "facebook/wav2vec2-base-960h"
IDENTIFIER = "facebook/mms-lid-126"
ENCODER = "facebook/hubert-base-ls960"

Progress = Callable[[float, float], None]


def refuse_whispers(model: Any, options: dict[str, Any], used: set[str]) -> None:
    """Options of `audiozoo transcribe` have Whisper's defaults; refuse those that were changed and are not `used`.

    Raises:
        UsageError: if there is one.
    """
    from audiozoo.decoding.long_form import TranscriptionOptions

    default = TranscriptionOptions()
    for name, value in options.items():
        if name not in used and value != getattr(default, name):
            raise UsageError(f"--{name.replace('_', '-')} is Whisper's; {type(model).__name__} transcribes without it.")


@dataclass(frozen=True)
class Fusion:
    """What helps a model to find words: options of `audiozoo transcribe`."""

    language_model: str | None = None  # of words, an ARPA file; for SpeechT5 a checkpoint that writes its tokens
    hotwords: tuple[str, ...] = ()
    lexicon: Path | None = None
    lm_weight: float | None = None
    word_bonus: float | None = None
    ctc_weight: float = 0.0  # share of the CTC head of SpeechT5

    def refuse(self, name: str, source: str) -> None:
        """Refuse what a class of models cannot be helped by.

        Raises:
            UsageError: if there is any.
        """
        ctc, joint = name.endswith("ForCTC"), name == "SpeechT5ForSpeechToText"
        if self.language_model is not None and not (ctc or joint):
            raise UsageError(f"--language-model is for CTC models and SpeechT5; {source} holds a {name}.")
        if (self.hotwords or self.lexicon) and not ctc:
            raise UsageError(f"--hotword and --lexicon are for CTC models; {source} holds a {name}.")
        if self.ctc_weight and not joint:
            raise UsageError(f"--ctc-weight is for SpeechT5; {source} holds a {name}.")
        if self.lm_weight is not None and self.language_model is None:
            raise UsageError("--lm-weight is of a --language-model, and none is given.")
        if self.word_bonus is not None and not (ctc and (self.language_model or self.lexicon)):
            raise UsageError("--word-bonus is for CTC models with a --language-model or a --lexicon.")

    def weights(self, **names: str) -> dict[str, Any]:
        """Those that were given, under the names of what they are for."""
        given = {name: getattr(self, own) for own, name in names.items()}
        return {name: weight for name, weight in given.items() if weight is not None}


def ctc_transcriber(
    model: Any, processor: Any, options: dict[str, Any], fusion: Fusion = Fusion()
) -> Callable[[Any, Progress], dict[str, Any]]:
    """What transcribes recordings with a CTC model for `audiozoo transcribe`: `(path or bytes, progress) -> result`.

    Args:
        model: a …ForCTC.
        processor: its processor.
        options: those of the command.
        fusion: with what words are found.

    Raises:
        UsageError: for an option that only Whisper has.
    """
    from audiozoo import audio
    from audiozoo.decoding.ctc import NgramModel, read_lexicon, transcribe_ctc

    refuse_whispers(model, options, {"language", "word_timestamps", "beam_size", "batch_size", "vad"})
    ngrams = None if fusion.language_model is None else NgramModel.from_arpa(fusion.language_model)
    lexicon = None
    if fusion.lexicon is not None:
        lexicon = read_lexicon(fusion.lexicon, processor.tokenizer.word_delimiter_token or "|")

    def hear(recording: Any, progress: Progress) -> dict[str, Any]:
        rate = processor.feature_extractor.sampling_rate
        wave = audio.read(recording, rate)
        seconds = len(wave) / rate
        heard = transcribe_ctc(
            model,
            processor,
            wave,
            batch_size=options["batch_size"],
            beam_width=options["beam_size"],
            language_model=ngrams,
            hotwords=fusion.hotwords,
            lexicon=lexicon,
            vad=options["vad"],
            progress=lambda done, pieces: progress(seconds * done / pieces, seconds),
            **fusion.weights(lm_weight="alpha", word_bonus="beta"),
        )
        segments = heard.segments()
        for segment in segments:
            words = segment.pop("words")
            if options["word_timestamps"]:
                named = ({"word": w["text"], "start": w["start"], "end": w["end"]} for w in words)
                segment["words"] = [n | {"probability": w["score"]} for n, w in zip(named, words, strict=True)]
        return {"text": heard.text, "segments": segments, "language": options["language"]}

    return hear


def writer(
    model: Any, processor: Any, options: dict[str, Any], language: str | None = None, fusion: Fusion = Fusion()
) -> Callable[[Any, Progress], dict[str, Any]]:
    """The same with an encoder-decoder that writes what it hears (fairseq S2T, SpeechT5).

    Args:
        model: a Speech2TextForConditionalGeneration or a SpeechT5ForSpeechToText.
        processor: its processor.
        options: those of the command.
        language: of the text, for checkpoints of several.
        fusion: with what SpeechT5 finds words.

    Raises:
        UsageError: for an option that only Whisper has.
    """
    from audiozoo import audio
    from audiozoo.decoding.pieces import in_language, write_pieces

    refuse_whispers(model, options, {"language", "length_penalty", "beam_size", "batch_size", "vad"})
    chosen = {"num_beams": options["beam_size"], "length_penalty": options["length_penalty"]}
    chosen |= in_language(model, processor, language, "This checkpoint", "--language")
    if hasattr(model, "speecht5"):
        chosen |= {"masked_group_norm": True, "ctc_weight": fusion.ctc_weight}
        chosen["fusion"] = _language_model(fusion, processor)
    else:
        chosen["batch_invariant"] = True
        if model.generation_config.max_length is None:
            chosen["max_new_tokens"] = 200
    chosen = {name: value for name, value in chosen.items() if value is not None}

    def hear(recording: Any, progress: Progress) -> dict[str, Any]:
        wave = audio.read(recording, processor.feature_extractor.sampling_rate)
        how = {name: options[name] for name in ("batch_size", "vad")}
        found = write_pieces(model, processor, wave, progress=progress, **how, **chosen)
        return found | {"language": language}

    return hear


def _language_model(fusion: Fusion, processor: Any) -> Any:
    """The language model of a `Fusion` beside SpeechT5, whose tokens have to be the processor's."""
    if fusion.language_model is None:
        return None
    import audiozoo
    from audiozoo.models.speech_to_text_2 import LanguageModelFusion, Speech2Text2ForCausalLM
    from audiozoo.models.speecht5 import SpeechT5LanguageModel

    model = audiozoo.load(fusion.language_model)
    if not isinstance(model, SpeechT5LanguageModel | Speech2Text2ForCausalLM):
        raise UsageError(
            f"{fusion.language_model} holds a {type(model).__name__}; beside SpeechT5 goes a SpeechT5LanguageModel or "
            "a Speech2Text2ForCausalLM."
        )
    if isinstance(model, SpeechT5LanguageModel):
        pairs = zip(model.config.tokens, processor.tokenizer.tokens, strict=False)
        for index, (theirs, ours) in enumerate(pairs):
            if theirs != ours:
                raise UsageError(
                    f"{fusion.language_model} is over other tokens than the recogniser: number {index} is {theirs!r} "
                    f"there, and {ours!r} in the recogniser's vocabulary."
                )
    return LanguageModelFusion(model, **fusion.weights(lm_weight="weight"))


def _load(source: str, wanted: str | tuple[str, ...], does: str) -> tuple[Any, Any]:
    terminal.keep_compiled_programs()
    import audiozoo

    model = audiozoo.load(source)
    if not (name := type(model).__name__).endswith(wanted):
        needed = " or a …".join((wanted,) if isinstance(wanted, str) else wanted)
        raise UsageError(f"{source} holds a {name}, which does not {does}; that needs a …{needed}.")
    return model, audiozoo.load_processor(source)


def align(
    file: Annotated[str, typer.Argument(help="a sound file; - is standard input")],
    text: Annotated[str | None, typer.Argument(help="what is said in it; <star> stands for anything")] = None,
    text_file: Annotated[Path | None, typer.Option("--file", help="read the text from a file")] = None,
    model: Annotated[str, typer.Option(help="hub id, directory or file of a CTC model, or of Whisper")] = RECOGNISER,
    language: Annotated[str | None, typer.Option(help="of the text: for Whisper, or for MMS its adapters")] = None,
    star: Annotated[bool, typer.Option("--star", help="other things may be said before and after")] = False,
    output_format: Annotated[str, typer.Option("--format", help="tsv, json, srt or vtt")] = "tsv",
) -> None:
    """Say when each word of a known text is said."""
    from audiozoo.text import subtitles

    if output_format not in ("tsv", "json", "srt", "vtt"):
        raise UsageError(f"There is no format {output_format!r}; there are tsv, json, srt, vtt.")
    if (text is None) == (text_file is None):
        raise UsageError("Give the text either as an argument or with --file.")
    check_file(file)
    check_text(text or "")
    if text_file is not None:
        check_file(str(text_file))
        try:
            text = text_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise SourceError(f"{text_file} cannot be read as UTF-8 text.") from None
    from audiozoo import audio
    from audiozoo.decoding import ctc
    from audiozoo.loading import speak_language

    recogniser, processor = _load(model, ("ForCTC", "WhisperForConditionalGeneration"), "align")
    wave = audio.read(file, processor.feature_extractor.sampling_rate)
    if type(recogniser).__name__.endswith("ForCTC"):
        recogniser, processor = speak_language(recogniser, processor, language, model)
        with progress_bar(Path(file).name, None, "pieces") as update:
            words = ctc.align(recogniser, processor, wave, text or "", star=star, progress=update)
    else:
        if star or "<star>" in (text or ""):
            raise UsageError("<star> needs a CTC model; Whisper aligns what is said from beginning to end.")
        from audiozoo.models import whisper

        found = whisper.align(recogniser, processor, wave, text or "", language=language)
        words = [
            {"text": w["word"].strip(), "start": w["start"], "end": w["end"], "score": w["probability"]} for w in found
        ]
    if output_format == "json":
        print(json.dumps({"words": words}, ensure_ascii=False))
    elif output_format == "tsv":
        print("start\tend\tscore\ttext")
        for word in words:
            print(f"{word['start']:.3f}\t{word['end']:.3f}\t{word['score']:.3f}\t{word['text']}")
    else:
        sys.stdout.write(subtitles.render({"segments": words}, output_format))


def identify(
    file: Annotated[str, typer.Argument(help="a sound file; - is standard input")],
    model: Annotated[str, typer.Option(help="hub id, directory or file of a classifier, or of Whisper")] = IDENTIFIER,
    top: Annotated[int, typer.Option(help="how many classes to name")] = 5,
    crops: Annotated[int, typer.Option(help="listen to that many pieces and average, instead of the whole")] = 1,
    crop_length: Annotated[float | None, typer.Option(help="seconds a piece, with --crops; by default 10")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say which language, speaker or keyword is heard. The model's classes decide what is asked.

    A long recording is heard in pieces, of a minute at most, and they are averaged. Whisper's classifiers hear windows
    of 30 s, AST's of what they were trained on, and what is shorter with silence behind it. Whisper itself says the
    language of the first 30 s.
    """
    if top < 1 or crops < 1:
        raise UsageError("--top and --crops count from 1.")
    if crop_length is not None and crops == 1:
        raise UsageError("--crop-length is of the pieces that --crops counts; say how many.")
    check_file(file)
    from audiozoo import audio
    from audiozoo.decoding import encoders, long_form

    others = ("WhisperForConditionalGeneration", "ASTForAudioClassification")
    classifier, processor = _load(model, (*encoders.CLASSIFIERS, *others), "identify")
    wave = audio.read(file, getattr(processor, "feature_extractor", processor).sampling_rate)
    if (name := type(classifier).__name__) == "WhisperForConditionalGeneration":
        if crops > 1:
            raise UsageError("Whisper tells the language of the first 30 s; leave --crops out.")
        languages = long_form.detect_language(classifier, processor, wave)
        found = sorted(languages.items(), key=lambda language: -language[1])[:top]
    elif name == "ASTForAudioClassification":
        if crops > 1:
            raise UsageError("AST hears a whole recording, window by window; leave --crops out.")
        from audiozoo.models import audio_spectrogram_transformer as ast

        found = ast.classify(classifier, processor, wave, top, sampling_rate=processor.sampling_rate)
    else:
        length = 10.0 if crop_length is None else crop_length
        found = encoders.identify(classifier, processor, wave, top_k=top, crops=crops, crop_length_s=length)
    if as_json:
        print(json.dumps([{"label": label, "probability": round(p, 6)} for label, p in found], ensure_ascii=False))
        return
    for label, probability in found:
        print(f"{100 * probability:5.1f} %  {label}")
    if found and found[0][1] < 0.5:
        say("no class is more probable than not", "yellow")


def units(
    file: Annotated[str, typer.Argument(help="a sound file; - is standard input")],
    clusters: Annotated[Path, typer.Option(help="centroids: .npz, .npy, or scikit-learn's k-means in a joblib file")],
    model: Annotated[str, typer.Option(help="hub id, directory or file of a speech encoder")] = ENCODER,
    layer: Annotated[int, typer.Option(help="whose frames were clustered; 0 is the Transformer's input")] = 9,
    every_frame: Annotated[bool, typer.Option("--every-frame", help="do not merge runs of the same unit")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: units, and how many frames each lasts")] = False,
) -> None:
    """Write speech down as discrete units (HuBERT). They are the clusters of its frames."""
    check_file(file)
    from audiozoo import audio
    from audiozoo.decoding.units import KMeans, deduplicate
    from audiozoo.decoding.units import units as units_of
    from weights_conversion.hubert import read_kmeans

    if not clusters.is_file():
        raise SourceError(f"There is no file {clusters}.")
    numpy = clusters.suffix in (".npz", ".npy")
    kmeans = KMeans.load(clusters) if numpy else KMeans(read_kmeans(clusters))
    encoder, processor = _load(model, "", "listen")
    if not hasattr(getattr(encoder, "backbone", encoder), "frame_lengths"):
        raise UsageError(f"{model} holds a {type(encoder).__name__}; units are clusters of a speech encoder's frames.")
    wave = audio.read(file, getattr(processor, "feature_extractor", processor).sampling_rate)
    found = units_of(encoder, processor, wave, kmeans, layer=layer)
    frames = [1] * len(found)
    if not every_frame:
        found, lasting = deduplicate(found)
        frames = lasting.tolist()
    print(json.dumps({"units": found.tolist(), "frames": frames}) if as_json else " ".join(map(str, found)))
