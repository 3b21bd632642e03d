"""The tasks, one class each: what a recording must be known by, what the model makes of it, and how that is counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from audiozoo.audio import files as audio
from audiozoo.decoding.ctc import transcribe_ctc
from audiozoo.decoding.encoders import CLASSIFIERS, embed, identify, without_padding
from audiozoo.decoding.pieces import in_language
from audiozoo.decoding.synthesis import Synthesizer, speak, speak_spectrograms
from audiozoo.errors import AudioError, SourceError, UsageError
from audiozoo.loading import speak_language
from audiozoo.processors.mms import AlignmentTokenizer
from audiozoo.text.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from audiozoo.training import metrics
from audiozoo.training.data import Item, labels_of

MATCHER = "laion/clap-htsat-unfused"
Row = dict[str, Any]  # of a prediction; names that begin with _ are for scoring only


class Heard(NamedTuple):
    """One recording: its name, its samples, and what should come of it."""

    name: str
    waveform: Any
    reference: Any


@dataclass
class Task:
    """Base. The fields of a task are its options.

    Attributes:
        model: what is measured.
        processor: its processor.
        batch_size: recordings at a time.
        source: where the model is from, if a command loaded it: its messages name it, and its adapters lie there.
    """

    name: ClassVar[str] = ""
    known_by: ClassVar[tuple[str, ...]] = ()  # one of these fields says what should come
    hears: ClassVar[bool] = True  # whether recordings are read

    model: Any
    processor: Any
    batch_size: int = field(default=8, kw_only=True)
    source: str | None = field(default=None, kw_only=True)

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Whether a model does this."""
        raise NotImplementedError

    @property
    def sampling_rate(self) -> int:
        """Hz that recordings are brought to."""
        for owner in (getattr(self.processor, "feature_extractor", None), self.processor, self.model.config):
            if (rate := getattr(owner, "sampling_rate", None)) is not None:
                return int(rate)
        return 16_000

    @property
    def mono(self) -> bool:
        """Whether recordings are brought to one channel."""
        return True

    def reference(self, item: Item) -> Any:
        """What should come of a recording.

        Raises:
            UsageError: if that is not known.
        """
        for name in self.known_by:
            if item.fields.get(name) not in (None, "", []):
                return item.fields[name]
        raise UsageError(f"{item.name} has no {' or '.join(self.known_by)}, which {self.name} is measured by.")

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """Look at all that is wanted before the first recording is heard."""

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """A row for each recording."""
        raise NotImplementedError

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """Numbers of all rows."""
        raise NotImplementedError

    def predictions(self, rows: Sequence[Row]) -> list[Row]:
        """What is shown of the rows."""
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def _kind(model: Any) -> str:
    return type(model).__name__


def check_options(model: Any, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse what a function has no default for, before anything is computed.

    Raises:
        UsageError: naming the first such option.
    """
    known = {p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"{unknown[0]!r} is no option of the decoding of a {_kind(model)}.")


def _named(task: Task) -> tuple[str, str]:
    """Where a model is from, and what chooses its language there, for messages."""
    return ("The model", "language") if task.source is None else (task.source, "--language")


def _speak(task: Task, language: str | None) -> None:
    """Let a CTC model of several languages, or one that is told how texts are read, speak one."""
    model, tokenizer = task.model, task.processor.tokenizer
    reads = isinstance(tokenizer, AlignmentTokenizer) or getattr(tokenizer, "phonemizer_lang", None) is not None
    if reads or hasattr(model, "speaking") or getattr(model.config, "adapter_attn_dim", None) is not None:
        task.model, task.processor = speak_language(model, task.processor, language, task.source, _named(task)[1])


def _is_encoder(model: Any) -> bool:
    return hasattr(getattr(model, "backbone", model), "frame_lengths")


# --- texts -----------------------------------------------------------------------------------------------------------

NORMALISERS = ("english", "basic", "none")
# Written in letters only, which Whisper, Appendix C, counts: its codes and names, and SeamlessM4T's codes.
_WITHOUT_SPACES = (
    *("zh", "ja", "th", "lo", "my", "yue"),
    *("chinese", "mandarin", "japanese", "thai", "lao", "myanmar", "burmese", "cantonese"),
    *("cmn", "cmn_hant", "jpn", "tha", "lao", "mya"),
)
_WRITERS = ("Speech2TextForConditionalGeneration", "SpeechT5ForSpeechToText", "SpeechEncoderDecoderModel")
_ENGLISH = ("en", "eng", "english")


def normaliser(name: str, language: str | None) -> Callable[[str], str]:
    """Whisper's normalisation of English or of any language (Appendix C there), or none.

    Raises:
        UsageError: there is no such one.
    """
    if name not in NORMALISERS:
        raise UsageError(f"There is no normalisation {name!r}; there are {', '.join(NORMALISERS)}.")
    if name == "english":
        return EnglishTextNormalizer()
    if name == "basic":
        return BasicTextNormalizer(split_letters=str(language).lower() in _WITHOUT_SPACES)
    return lambda text: text


def _reads_speech(model: Any) -> bool:
    return _kind(model).startswith("SeamlessM4T") and "speech_encoder" in type(model).parts


def _written(
    model: Any,
    processor: Any,
    waveforms: Sequence[np.ndarray],
    *,
    task: str,
    language: str | None,
    beams: int | None,
    batch_size: int,
    options: Mapping[str, Any],
) -> list[tuple[str, str | None]]:
    """What a model writes of recordings of any length, and in which language, if it says so."""
    from audiozoo.decoding.long_form import transcribe
    from audiozoo.decoding.pieces import write_pieces

    kind, chosen = _kind(model), dict(options)
    if kind == "WhisperForConditionalGeneration":
        chosen |= {"task": "transcribe" if task == "transcription" else "translate", "language": language}
        found = transcribe(model, processor, list(waveforms), beam_size=beams, **chosen)
        return [(result["text"].strip(), result["language"]) for result in found]
    if kind.endswith("ForCTC"):
        chosen = {"batch_size": batch_size, "beam_width": beams} | chosen
        return [(transcribe_ctc(model, processor, wave, **chosen).text, None) for wave in waveforms]
    if beams is not None:
        chosen["num_beams"] = beams
    if kind == "SpeechEncoderDecoderModel":
        chosen = model.generation_config.for_sentences() | without_padding(model.config.encoder) | chosen
    elif kind == "SpeechT5ForSpeechToText":
        chosen = {"masked_group_norm": True} | chosen
    elif kind == "Speech2TextForConditionalGeneration":
        most = {} if model.generation_config.max_length is not None else {"max_new_tokens": 200}
        chosen = {"batch_invariant": True} | most | chosen
    elif kind.startswith("SeamlessM4T"):
        given = {"tgt_lang": language, "batch_invariant": True} | chosen
        chosen = {"generate": lambda **heard: model.generate_text(**heard, **given).sequences}
    texts = [write_pieces(model, processor, wave, batch_size=batch_size, **chosen)["text"] for wave in waveforms]
    return [(text, None) for text in texts]


@dataclass
class Transcription(Task):
    """Speech as text: word and character error rates.

    Attributes:
        language: of the speech; None lets the model find out.
        normalise: of both texts: "english" or "basic" as Whisper does, or "none"; by default by each text's language.
        beams: of the search.
        generate: options of the decoding.
    """

    name: ClassVar[str] = "transcription"
    known_by: ClassVar[tuple[str, ...]] = ("text",)

    language: str | None = None
    normalise: str | None = None
    beams: int | None = None
    generate: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        kind = _kind(model)
        return (
            kind in ("WhisperForConditionalGeneration", *_WRITERS[:2])
            or kind.endswith("ForCTC")
            or (_reads_speech(model) and kind.endswith(("ForSpeechToText", "Model")))
        )

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        if self.normalise is not None:
            normaliser(self.normalise, self.language)
        self.choose_language()
        if _kind(self.model).endswith("ForCTC"):
            check_options(self.model, self.generate, transcribe_ctc)

    def choose_language(self) -> None:
        """A model of several languages hears, or writes, the one that is asked for.

        Raises:
            UsageError: if it does not know it, or none is asked for.
        """
        kind, given, tokenizer = _kind(self.model), _named(self), getattr(self.processor, "tokenizer", None)
        if kind.endswith("ForCTC"):
            _speak(self, self.language)
        elif kind in _WRITERS and getattr(tokenizer, "lang_code_to_id", {}):
            if "forced_bos_token_id" not in self.generate:
                self.generate = in_language(self.model, self.processor, self.language, *given) | dict(self.generate)
        elif kind.startswith("SeamlessM4T") and not {"tgt_lang", "decoder_input_ids"} & set(self.generate):
            if self.language is None:
                raise UsageError(f"{given[0]} writes many languages; say which with {given[1]}.")
            self.model.generation_config.text_language(self.language)

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        found = _written(
            self.model,
            self.processor,
            [heard.waveform for heard in batch],
            task=self.name,
            language=self.language,
            beams=self.beams,
            batch_size=self.batch_size,
            options=self.generate,
        )
        return [
            {"reference": str(heard.reference), "hypothesis": text} | ({"language": spoken} if spoken else {})
            for heard, (text, spoken) in zip(batch, found, strict=True)
        ]

    def normalised(self, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
        """References and hypotheses as they are compared."""
        languages = [self.language or row.get("language") for row in rows]
        normals = {language: self._normaliser(language) for language in set(languages)}

        def normal(name: str) -> list[str]:
            return [normals[language](row[name]) for language, row in zip(languages, rows, strict=True)]

        return normal("reference"), normal("hypothesis")

    def _normaliser(self, language: str | None) -> Callable[[str], str]:
        chosen = "english" if str(language).lower() in _ENGLISH else "basic"
        return normaliser(self.normalise or chosen, language)

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        references, hypotheses = self.normalised(rows)
        for row, reference, hypothesis in zip(rows, references, hypotheses, strict=True):
            if reference.split():
                row["wer"] = round(metrics.error_rates([reference], [hypothesis])["wer"], 4)
        return metrics.error_rates(references, hypotheses)


@dataclass
class Translation(Transcription):
    """Speech as text of another language: BLEU and chrF.

    Attributes:
        tokenize: sacrebleu's tokenizer of BLEU.
    """

    name: ClassVar[str] = "translation"
    known_by: ClassVar[tuple[str, ...]] = ("translation",)

    tokenize: str = "13a"

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        kind = _kind(model)
        if kind == "WhisperForConditionalGeneration":
            return bool(model.generation_config.is_multilingual)
        return kind in (_WRITERS[0], _WRITERS[2]) or _reads_speech(model)

    def reference(self, item: Item) -> Any:
        """See `Task`; where there is no `translation`, the `text` is one."""
        given = item.fields.get("translation") or item.fields.get("text")
        return given if given else super().reference(item)

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        if self.normalise not in (None, "none"):
            raise UsageError("Translations are compared as they are written; leave the normalisation out.")
        self.choose_language()
        metrics.translation_scores(["a"], ["a"], tokenize=self.tokenize)  # what is missing is missed now

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        wanted, came = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
        return metrics.translation_scores(wanted, came, tokenize=self.tokenize)


# --- classes ---------------------------------------------------------------------------------------------------------


@dataclass
class Classification(Task):
    """One class of several: accuracy, and mAP over the classes.

    Attributes:
        crops: pieces of ten seconds that are heard instead of the whole; of classifiers of speech.
    """

    name: ClassVar[str] = "classification"
    known_by: ClassVar[tuple[str, ...]] = ("label", "labels")

    crops: int = 1

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        kind = _kind(model)
        if kind == "WhisperForConditionalGeneration":
            return Translation.fits(model)  # which language is spoken
        if kind == "ASTForAudioClassification":
            return not Tagging.fits(model)
        return kind == "WhisperForAudioClassification" or (
            kind.endswith("ForSequenceClassification") and _is_encoder(model)
        )

    def names(self) -> list[str]:
        """The classes."""
        if _kind(self.model) == "WhisperForConditionalGeneration":
            return list(self.processor.tokenizer.all_language_codes)
        return list(self.model.config.id2label)

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        kind = _kind(self.model)
        if self.crops != 1 and (self.crops < 1 or not kind.endswith(CLASSIFIERS)):
            raise UsageError(f"crops is {self.crops}: a classifier of speech hears one or more, and {kind} the whole.")
        self._names = self.names()
        for item, given in zip(items, wanted, strict=True):
            labels = labels_of(given, self._names)
            if unknown := [label for label in labels if label not in self._names]:
                few = f"it has {len(self._names)}, from {self._names[0]} to {self._names[-1]}"
                raise UsageError(f"The model has no label {unknown[0]!r}, which {item.name} is of; {few}.")
            if len(labels) > 1 and self.name != "tagging":
                raise UsageError(f"{item.name} is of {len(labels)} classes, and the model chooses one.")

    def scores(self, waveform: np.ndarray) -> Mapping[str, float]:
        """How likely each class is."""
        from audiozoo.decoding.long_form import detect_language
        from audiozoo.models import audio_spectrogram_transformer as ast

        kind = _kind(self.model)
        if kind == "ASTForAudioClassification":
            return dict(ast.classify(self.model, self.processor, waveform, len(self._names)))
        if kind == "WhisperForConditionalGeneration":
            return detect_language(self.model, self.processor, waveform)
        found = identify(self.model, self.processor, waveform, top_k=len(self._names), crops=self.crops)
        return dict(found)

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        rows = []
        for heard in batch:
            found = self.scores(heard.waveform)
            scores = np.asarray([found[name] for name in self._names])
            best = np.argsort(-scores, kind="stable")[:5]
            rows.append(
                {"label": heard.reference, "predicted": self._names[best[0]]}
                | {"scores": {self._names[i]: round(float(scores[i]), 6) for i in best}, "_scores": scores}
            )
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        scores = np.stack([row["_scores"] for row in rows])
        labels = [labels_of(row["label"], self._names) for row in rows]
        targets = np.asarray([[name in given for name in self._names] for given in labels])
        found = {"map": metrics.mean_average_precision(targets, scores)}
        if self.name == "tagging":
            return found
        index = targets.argmax(axis=1)
        result = {"accuracy": metrics.accuracy(index, scores)}
        if len(self._names) > 5:
            result["top5"] = metrics.accuracy(index, scores, 5)
        return result | found


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@dataclass
class Tagging(Classification):
    """Any number of classes: mAP, as AudioSet is scored (AST, §3.1)."""

    name: ClassVar[str] = "tagging"
    known_by: ClassVar[tuple[str, ...]] = ("labels", "label")

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        from audiozoo.models import audio_spectrogram_transformer as ast

        if _kind(model) != "ASTForAudioClassification":
            return False
        # Sigmoids of logits 0 are a half each; a softmax shares 1 among them.
        return abs(float(ast.scores(jnp.zeros(3), model.config)[0]) - 0.5) < 1e-6


# --- sounds and words ------------------------------------------------------------------------------------------------


@dataclass
class ZeroShot(Classification):
    """Which of the labels of all recordings fits, by their words (CLAP, §4.3): accuracy and mAP.

    Attributes:
        template: the sentence that a label is put into, at {}.
        labels: what to choose from; by default the labels of the recordings.
    """

    name: ClassVar[str] = "zero-shot"

    template: str = "This is a sound of {}."
    labels: Sequence[str] | None = None

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model) == "ClapModel"

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        from audiozoo.models.clap import embed_text, sentences

        found = {label for given in wanted for label in labels_of(given, [str(given)])}
        self._given = sorted(found) if self.labels is None else [str(label) for label in self.labels]
        super().prepare(items, wanted)
        words = sentences(self._given, self.template)
        self._words = embed_text(self.model, self.processor, words).astype(np.float64)

    def names(self) -> list[str]:
        """See `Classification`."""
        return self._given

    def scores(self, waveform: np.ndarray) -> Mapping[str, float]:
        """See `Classification`."""
        from audiozoo.models.clap import embed_audio

        sound = embed_audio(self.model, self.processor, waveform, sampling_rate=self.sampling_rate)
        scale = float(np.exp(np.float64(self.model.logit_scale_a[...])))
        return dict(zip(self._given, _softmax(scale * (self._words @ sound.astype(np.float64))), strict=True))


@dataclass
class Retrieval(Task):
    """Sounds found by texts, and texts by sounds (CLAP, §4.2): recall among the best k, and mAP among the best 10."""

    name: ClassVar[str] = "retrieval"
    known_by: ClassVar[tuple[str, ...]] = ("captions", "text")

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model) == "ClapModel"

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        from audiozoo.models.clap import embed_audio, embed_text

        rows = []
        for heard in batch:
            texts = heard.reference if isinstance(heard.reference, list) else [str(heard.reference)]
            sound = embed_audio(self.model, self.processor, heard.waveform, sampling_rate=self.sampling_rate)
            words = embed_text(self.model, self.processor, texts)
            rows.append({"captions": texts, "_sound": sound, "_words": words})
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        sounds = np.stack([row["_sound"] for row in rows]).astype(np.float64)
        words = np.concatenate([row["_words"] for row in rows]).astype(np.float64)
        owners = np.repeat(np.arange(len(rows)), [len(row["captions"]) for row in rows])
        similarity, mine = words @ sounds.T, owners[:, None] == np.arange(len(rows))
        captions = [caption for row in rows for caption in row["captions"]]
        for row, best in zip(rows, similarity.argmax(axis=0), strict=True):
            row["nearest"] = captions[int(best)]
        found = metrics.recalls(similarity, mine)
        back = metrics.recalls(similarity.T, mine.T)
        return {f"text_to_audio_{n}": v for n, v in found.items()} | {f"audio_to_text_{n}": v for n, v in back.items()}


# --- voices ----------------------------------------------------------------------------------------------------------


@dataclass
class Verification(Task):
    """Whether two recordings are of one speaker, by the cosine of their vectors: the equal error rate.

    Attributes:
        trials: a file of lines `1 first.wav second.wav` (VoxCeleb's form; 0 for two speakers); all pairs by default.
    """

    name: ClassVar[str] = "verification"
    known_by: ClassVar[tuple[str, ...]] = ("speaker", "speaker_id", "label")

    trials: str | Path | None = None

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model).endswith(("ForXVector", "ForSpeakerVerification"))

    def reference(self, item: Item) -> Any:
        """See `Task`; with trials nobody need be known."""
        return None if self.trials is not None else super().reference(item)

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        if self.trials is not None:
            self._trials = _read_trials(Path(self.trials), [item.name for item in items])

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        rows = []
        for heard in batch:
            found = embed(self.model, self.processor, heard.waveform)
            rows.append({"speaker": heard.reference, "_vector": found.get("embedding", found["mean"])})
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        vectors = np.stack([row["_vector"] for row in rows]).astype(np.float64)
        cosines = (vectors := vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ vectors.T
        if self.trials is None:
            first, second = np.triu_indices(len(rows), 1)
            speakers = np.asarray([str(row["speaker"]) for row in rows])
            same = speakers[first] == speakers[second]
        else:
            place = {row["audio"]: index for index, row in enumerate(rows)}
            heard = [(s, place[a], place[b]) for s, a, b in self._trials if a in place and b in place]
            if not heard:
                raise AudioError(f"No pair of {self.trials} can be heard.")
            same, first, second = map(np.asarray, zip(*heard, strict=True))
        scores = cosines[first, second]
        names = [row["audio"] for row in rows]
        self._pairs = [
            {"first": names[int(a)], "second": names[int(b)], "same": bool(s), "score": round(float(score), 6)}
            for a, b, s, score in zip(first, second, same, scores, strict=True)
        ]
        rate, threshold = metrics.equal_error_rate(same, scores)
        return {"eer": rate, "threshold": threshold, "pairs": len(scores)}

    def predictions(self, rows: Sequence[Row]) -> list[Row]:
        """See `Task`: the pairs."""
        return self._pairs


def _read_trials(path: Path, names: Sequence[str]) -> list[tuple[bool, str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SourceError(f"{path} cannot be read as UTF-8 text.") from None
    ending: dict[str, set[str]] = {}  # names by their last parts
    for name in names:
        parts = Path(name).parts
        for start in range(len(parts)):
            ending.setdefault("/".join(parts[start:]), set()).add(name)
    ending |= {name: {name} for name in names}
    trials = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 3 or words[0] not in ("0", "1"):
            raise UsageError(f"{path}:{number} is no trial; write 1 or 0 and two recordings.")
        for word in words[1:]:
            if len(named := ending.get(word, ())) != 1:
                which = "several recordings are called" if named else "is not among the recordings"
                raise UsageError(f"{path}:{number} names {word}, which {which}.")
        trials.append((words[0] == "1", *(name for word in words[1:] for name in ending[word])))
    if not trials:
        raise UsageError(f"{path} holds no trial.")
    return trials  # type: ignore[return-value]


# --- waveforms -------------------------------------------------------------------------------------------------------


@jax.jit
def _log_mel_at_24khz(waveform: jax.Array) -> jax.Array:
    from audiozoo.models.hifigan import log_mel

    return log_mel(waveform, 24_000, f_max=None)


def mel_distance(x: np.ndarray, y: np.ndarray, sampling_rate: int) -> float:
    """Mean difference of two waveforms' log-mel spectrograms, as HiFi-GAN's loss has them, at 24 kHz."""
    rows = []
    for waveform in (x, y):
        wave = audio.resample(np.atleast_2d(waveform), sampling_rate, 24_000, axis=1)
        # Up to whole seconds, so that few lengths are compiled.
        rows.append(np.pad(wave, ((0, 0), (0, -wave.shape[1] % 24_000))).astype(np.float32))
    frames = max(1, round(x.shape[-1] * 24_000 / sampling_rate) // 256)
    a, b = (np.asarray(_log_mel_at_24khz(jnp.asarray(row)))[:, :frames] for row in rows)
    return float(np.abs(a - b).mean())


@dataclass
class Vocoding(Task):
    """A recording made again of its own spectrogram: the mean difference of log-mel spectrograms."""

    name: ClassVar[str] = "vocoding"

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model) in ("HifiGanGenerator", "SpeechT5HifiGan")

    def reference(self, item: Item) -> Any:
        """See `Task`: the recording itself."""
        return

    def again(self, waveform: np.ndarray) -> tuple[np.ndarray, Row]:
        """The recording made again, and what else there is to say of it."""
        features = self.processor(waveform, self.sampling_rate)["spectrogram"]
        return np.asarray(_vocoded(self.model, jnp.asarray(features)))[0], {}

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        rows = []
        for heard in batch:
            made, more = self.again(heard.waveform)
            length = min(made.shape[-1], heard.waveform.shape[-1])
            x, y = heard.waveform[..., :length], made[..., :length]
            distance = mel_distance(x, y, self.sampling_rate)
            rows.append({"seconds": length / self.sampling_rate, "mel_distance": round(distance, 6)} | more)
            if "bytes" in more:
                rows[-1]["si_snr"] = round(metrics.si_snr(*_broadcast(x, y)), 4)
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`; silence, which has no ratio to noise, is left out of its mean."""
        result = {}
        if "bytes" in rows[0]:
            ratios = np.asarray([row["si_snr"] for row in rows])
            result["si_snr"] = float(ratios[np.isfinite(ratios)].mean()) if np.isfinite(ratios).any() else float("nan")
            seconds = sum(row["seconds"] for row in rows)
            result["kbps"] = sum(row["bytes"] for row in rows) * 8 / 1000 / seconds
        return result | {"mel_distance": float(np.mean([row["mel_distance"] for row in rows]))}


def _broadcast(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.broadcast_to(x, y.shape), y


@jax.jit
def _vocoded(model: Any, spectrogram: jax.Array) -> jax.Array:
    return model(spectrogram)


@dataclass
class Coding(Vocoding):
    """A recording through a file of codes (EnCodec, §4): SI-SNR, log-mel distance, and the file's kbit/s.

    Attributes:
        bandwidth: kbit/s, one of the model's; its smallest by default.
    """

    name: ClassVar[str] = "coding"

    bandwidth: float | None = None

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model) == "EncodecModel"

    @property
    def mono(self) -> bool:
        """See `Task`."""
        return self.model.config.audio_channels == 1

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        from audiozoo.codec import Compiled

        self.model.config.quantizers_for(self.bandwidth)
        self._compiled = Compiled(self.model)

    def again(self, waveform: np.ndarray) -> tuple[np.ndarray, Row]:
        """See `Vocoding`."""
        from audiozoo.codec import compress, decompress

        samples = audio.in_channels(waveform, self.model.config.audio_channels)
        content = compress(self._compiled, samples, self.bandwidth)
        return decompress(content, self._compiled), {"bytes": len(content)}


# --- speech and music made -------------------------------------------------------------------------------------------


@dataclass
class Synthesis(Transcription):
    """Texts spoken, and written down again by Whisper: how many words are not understood.

    Attributes:
        judge: Whisper and its processor; tiny.en by default.
        speaker: number of the voice, of a VITS with several.
        speaker_embedding: of SpeechT5.
        vocoder: of SpeechT5.
        voice_preset: of Bark.
        seed: of all that is drawn.
    """

    name: ClassVar[str] = "synthesis"
    hears: ClassVar[bool] = False

    judge: tuple[Any, Any] | None = None
    speaker: int | None = None
    speaker_embedding: Any = None
    vocoder: Any = None
    voice_preset: Any = None
    seed: int = 0

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model) in ("VitsModel", "SpeechT5ForTextToSpeech", "BarkModel")

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        super().prepare(items, wanted)
        if _kind(self.model) == "SpeechT5ForTextToSpeech" and (self.speaker_embedding is None or self.vocoder is None):
            raise UsageError("SpeechT5 speaks with a speaker_embedding and a vocoder; give both.")
        if self.judge is None:
            import audiozoo
            from audiozoo import packaged

            self.judge = audiozoo.load(packaged.whisper()), audiozoo.load_processor(packaged.whisper())
        if _kind(self.model) != "BarkModel":
            check_options(self.model, self.generate, speak if _kind(self.model) == "VitsModel" else speak_spectrograms)
        self._voice = Synthesizer(self.model) if _kind(self.model) == "VitsModel" else self.model

    def said(self, text: str) -> tuple[np.ndarray, int]:
        """A text as a waveform, and its rate."""
        from audiozoo.models import bark

        kind = _kind(self.model)
        pieces: list[Any]
        sentences = self.processor.sentences(text)
        if kind == "VitsModel":
            options: dict[str, Any] = {"speaker_id": self.speaker, "seed": self.seed} | dict(self.generate)
            pieces = list(speak(self._voice, sentences, **options))
        elif kind == "BarkModel":
            options = {"sampling": "original", "key": jax.random.key(self.seed)} | dict(self.generate)
            pieces = list(bark.speak(self.model, self.processor, sentences, self.voice_preset, **options))
        else:
            options = {"speaker_embedding": self.speaker_embedding, "seed": self.seed} | dict(self.generate)
            pieces = list(speak_spectrograms(self.model, self.vocoder, sentences, **options))
        return np.concatenate([piece.waveform for piece in pieces]), pieces[0].sampling_rate

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        assert self.judge is not None
        waves = [audio.resample(*self.said(str(heard.reference)), 16_000) for heard in batch]
        # What is too short to be words is a silence to the judge.
        long = [np.pad(wave, (0, max(0, 1600 - len(wave)))).astype(np.float32) for wave in waves]
        options: dict[str, Any] = {"task": "transcription", "beams": self.beams, "batch_size": self.batch_size}
        found = _written(*self.judge, long, language=self.language, options={}, **options)
        return [
            {"reference": str(heard.reference), "hypothesis": text, "seconds": round(len(wave) / 16_000, 3)}
            | {"language": spoken}
            for heard, wave, (text, spoken) in zip(batch, waves, found, strict=True)
        ]


@dataclass
class Composition(Task):
    """Music of texts: how well the two fit, by the cosine of their vectors in CLAP's space.

    Attributes:
        judge: a CLAP and its processor; LAION's by default.
        duration: seconds.
        seed: of all that is drawn.
        generate: options of MusicGen's `compose`.
    """

    name: ClassVar[str] = "composition"
    known_by: ClassVar[tuple[str, ...]] = ("text",)
    hears: ClassVar[bool] = False

    judge: tuple[Any, Any] | None = None
    duration: float = 10.0
    seed: int = 0
    generate: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model).startswith("Musicgen") and hasattr(model, "audio_encoder")

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        if self.judge is None:
            import audiozoo

            self.judge = audiozoo.load(MATCHER), audiozoo.load_processor(MATCHER)

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        from audiozoo.models.clap import embed_audio, embed_text
        from audiozoo.models.musicgen import compose

        assert self.judge is not None
        matcher, processor = self.judge
        rate, rows = processor.feature_extractor.sampling_rate, []
        for heard in batch:
            text = str(heard.reference)
            options: dict[str, Any] = {"duration": self.duration, "key": jax.random.key(self.seed)}
            options |= self.generate
            made = np.asarray(compose(self.model, self.processor, text, **options)).mean(axis=0)
            wave = audio.resample(made, self.model.config.audio_encoder.sampling_rate, rate).astype(np.float32)
            fit = embed_text(matcher, processor, [text])[0] @ embed_audio(matcher, processor, wave, sampling_rate=rate)
            rows.append({"text": text, "clap": round(float(fit), 6)})
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        return {"clap": float(np.mean([row["clap"] for row in rows]))}


# --- times and units -------------------------------------------------------------------------------------------------


@dataclass
class Alignment(Task):
    """When the words of a known text are said: how far beginnings and ends are off, in seconds.

    Attributes:
        language: of the text, for Whisper and for a recogniser of several languages.
    """

    name: ClassVar[str] = "alignment"
    known_by: ClassVar[tuple[str, ...]] = ("words",)

    language: str | None = None

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _kind(model).endswith("ForCTC") or _kind(model) == "WhisperForConditionalGeneration"

    def reference(self, item: Item) -> Any:
        """See `Task`: words with `text`, `start` and `end`."""
        return _spans(super().reference(item), item.name, "words")

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        if _kind(self.model).endswith("ForCTC"):
            _speak(self, self.language)

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        from audiozoo.decoding import ctc
        from audiozoo.models import whisper

        rows = []
        for heard in batch:
            wanted, text = heard.reference, " ".join(word["text"] for word in heard.reference)
            if _kind(self.model) == "WhisperForConditionalGeneration":
                words = whisper.align(self.model, self.processor, heard.waveform, text, language=self.language)
                found = [{"text": w["word"].strip(), "start": w["start"], "end": w["end"]} for w in words]
            else:
                found = ctc.align(self.model, self.processor, heard.waveform, text)
                # Words without a letter that the model knows are not looked for.
                wanted = [word for word in wanted if self.processor.tokenizer.word_ids(word["text"])]
            if len(found) != len(wanted):
                raise AudioError(f"{heard.name} has {len(wanted)} words, of which {len(found)} were found.")
            off = metrics.boundary_errors(wanted, found)
            rows.append({"words": found, "error": round(float(off.mean()), 4), "_off": off})
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`."""
        off = np.concatenate([row["_off"] for row in rows])
        shares = {f"within_{ms}ms": float((off <= ms / 1000 + 1e-9).mean()) for ms in (50, 100, 200)}
        return {"boundary_error": float(off.mean()), "median_boundary_error": float(np.median(off)), **shares}


@dataclass
class Units(Task):
    """How well a speech encoder's units stand for phones (HuBERT, §IV-E): purities and mutual information.

    Attributes:
        clusters: centroids of one layer's frames, a `KMeans`.
        layer: whose frames.
    """

    name: ClassVar[str] = "units"
    known_by: ClassVar[tuple[str, ...]] = ("phones",)

    clusters: Any = None
    layer: int = 9

    @classmethod
    def fits(cls, model: Any) -> bool:
        """See `Task`."""
        return _is_encoder(model) and not _kind(model).endswith("ForSequenceClassification")

    def reference(self, item: Item) -> Any:
        """See `Task`: phones with `text`, `start` and `end`."""
        return _spans(super().reference(item), item.name, "phones")

    def prepare(self, items: Sequence[Item], wanted: Sequence[Any]) -> None:
        """See `Task`."""
        if self.clusters is None:
            raise UsageError("Units are clusters of frames: give the clusters.")

    def predict(self, batch: Sequence[Heard]) -> list[Row]:
        """See `Task`."""
        rows = []
        for heard in batch:
            found = embed(self.model, self.processor, heard.waveform, layer=self.layer)
            units, times = self.clusters(found["frames"]), found["times"]
            centres = times + (times[1] if len(times) > 1 else 0.0) / 2
            starts = np.asarray([phone["start"] for phone in heard.reference])
            index = np.searchsorted(starts, centres, side="right") - 1
            phones = [
                heard.reference[i]["text"] if i >= 0 and t < heard.reference[i]["end"] else None
                for i, t in zip(index, centres, strict=True)
            ]
            rows.append({"units": np.asarray(units).tolist(), "phones": phones})
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Task`; frames outside every phone are not counted."""
        pairs = [(p, u) for row in rows for p, u in zip(row["phones"], row["units"], strict=True) if p is not None]
        return metrics.unit_quality([p for p, _ in pairs], [u for _, u in pairs]) | {"frames": len(pairs)}


def _spans(given: Any, name: str, what: str) -> list[dict[str, Any]]:
    try:
        spans = [{"text": str(s["text"]), "start": float(s["start"]), "end": float(s["end"])} for s in given]
    except (TypeError, KeyError, ValueError):
        raise UsageError(f"The {what} of {name} are no list of objects with text, start and end.") from None
    return sorted(spans, key=lambda span: span["start"])


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Translation,
        Transcription,
        Synthesis,
        Tagging,
        Classification,
        Retrieval,
        ZeroShot,
        Verification,
        Coding,
        Vocoding,
        Composition,
        Alignment,
        Units,
    )
}
