"""Speech to learn from where there is none: sentences of a small language, said by espeak-ng and by Piper's voice.

    corpus = spoken.make("corpus", clips=6000)        # train.jsonl, train/*.wav, sentences.jsonl, …

A hundred and some common English words stand in sentences of a few patterns. A sentence is said by one of many voices,
at its own speed and pitch, then heard through a small room, a telephone or a noise. What is held out, to judge by:

- `sentences.jsonl`: sentences that are never said in training, by the voices of training;
- `voices.jsonl`: such sentences by voices that are never heard in training;
- `piper.jsonl`: such sentences by Piper's voice, a neural one, where the packages that it needs are installed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import audiozoo
from audiozoo import audio, packaged
from audiozoo.errors import SourceError
from audiozoo.layers.weight_norm import fold_weight_norm
from audiozoo.text import phonemes

RATE = 16_000


@dataclass(frozen=True)
class Language:
    """A small language.

    Attributes:
        words: by kind, with spaces between.
        sentences: patterns, in which a kind in braces stands for one of its words.
        parts: patterns of what is shorter; by default each single word.
    """

    words: Mapping[str, str]
    sentences: tuple[str, ...]
    parts: tuple[str, ...] = ()

    def draw(self, rng: np.random.Generator, *, part: bool = False) -> str:
        """A sentence, or a part of one."""
        patterns = (self.parts or tuple(f"{{{kind}}}" for kind in self.words)) if part else self.sentences
        return " ".join(
            str(rng.choice(self.words[word[1:-1]].split())) if word[0] == "{" else word
            for word in str(rng.choice(np.asarray(patterns))).split()
        )


ENGLISH = Language(
    words={
        "number": "zero one two three four five six seven eight nine ten",
        "det": "the a my your our this",
        "adj": "old new red blue green white black big small good cold warm",
        "noun": "book door bread house car table letter window apple dog cat horse bird fish ship tree",
        "mass": "water money country music paper time",
        "person": "mother father brother sister friend doctor teacher child king americans",
        "who": "i you we they she he",
        "aux": "can will must do",
        "verb": "see find open bring take want hear give make leave ask",
        "place": "garden river city school street kitchen",
        "when": "today now tomorrow tonight again soon",
        "what": "what where when why how",
        "link": "and so but or",
    },
    sentences=(
        "{who} {aux} {verb} {det} {noun}",
        "{who} {aux} not {verb} {when}",
        "{verb} {det} {adj} {noun}",
        "{verb} {det} {person} for {mass}",
        "{what} {aux} {who} {verb} {when}",
        "{what} is {det} {noun} {when}",
        "{det} {adj} {noun} is {adj}",
        "{det} {person} is in {det} {place}",
        "{link} {who} {verb} {number} {noun}",
        "{link} so my fellow {person}",
        "{number} {number} {number} {number}",
        "{verb} not {what} {who} {aux} {verb}",
    ),
    parts=(
        *("{number}", "{det}", "{adj}", "{noun}", "{mass}", "{person}", "{who}"),
        *("{aux}", "{verb}", "{place}", "{when}", "{what}", "{link}"),
        "not",
        "for",
        "is",
        "in",
        "fellow",
        "{number} {number}",
        "{det} {noun}",
        "{adj} {noun}",
        "{who} {aux}",
        "{what} {aux} {who}",
        "is in {place}",
        "for {det} {person}",
        "not {when}",
        "fellow {person}",
    ),
)

LANGUAGES = ("en-us", "en", "en-gb-x-rp", "en-us-nyc")
VARIANTS = ("", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+Andy", "+Annie", "+steph", "+klatt2", "+Michael")
UNHEARD = ("en-us+m2", "en+f3", "en-us+linda", "en+paul", "en-us+klatt4", "en+Alicia")


# --- saying and hearing ----------------------------------------------------------------------------------------------


def trimmed(wave: np.ndarray, quiet: float = 0.01) -> np.ndarray:
    """Without the silence before and after."""
    loud = np.flatnonzero(np.abs(wave) > quiet * np.abs(wave).max(initial=1e-9))
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave


def heard(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A voice at 16 kHz as something heard: silence around it, maybe a room, a telephone, another speed; noise."""
    before, after = rng.integers(RATE // 20, RATE // 6, 2)
    if rng.random() < 0.5:  # played faster or slower: a shorter or a longer vocal tract
        wave = audio.resample(wave, RATE, int(RATE * rng.uniform(0.88, 1.15)))
    wave = np.pad(wave, (before, after))
    if rng.random() < 0.3:  # a room: echoes that die away exponentially
        time = np.arange(int(0.2 * RATE)) / RATE
        echoes = rng.normal(size=len(time)) * np.exp(-time / rng.uniform(0.01, 0.06))
        echoes *= rng.uniform(0.1, 0.6) / np.linalg.norm(echoes)
        echoes[0] = 1.0
        size = len(wave) + len(echoes)
        wave = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(echoes, size), size)[: len(wave)]
    if rng.random() < 0.2:  # a telephone
        wave = audio.resample(audio.resample(wave, RATE, RATE // 2), RATE // 2, RATE)
    # Noise of some colour, 5 to 45 dB below the voice, and a tilt of the whole.
    noise = rng.normal(size=len(wave) + 1)
    noise = noise[1:] + rng.uniform(-0.9, 0.9) * noise[:-1]
    level = np.std(wave) * 10 ** (-rng.uniform(5, 45) / 20)
    wave = wave + level / np.std(noise) * noise
    wave = wave - rng.uniform(-0.5, 0.7) * np.pad(wave[:-1], (1, 0))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def espeak(text: str, voice: str, rng: np.random.Generator) -> np.ndarray:
    """A text said by one of espeak-ng's voices, at 16 kHz, at a speed and a pitch that are drawn."""
    library = phonemes.espeak()
    speed, pitch = int(rng.integers(130, 200)), int(np.clip(rng.normal(50, 18), 5, 95))
    wave = library.speak(text, voice, words_a_minute=speed, pitch=pitch)
    return trimmed(audio.resample(wave, library.sampling_rate, RATE))


class Piper:
    """Piper's voice through our own VITS, several short texts at a time in one compiled program.

    Args:
        symbols: at most, in a text.
        frames: at most, that a text lasts (256 samples at 22,050 Hz each); what is longer is not said at all.
    """

    def __init__(self, batch: int = 8, symbols: int = 112, frames: int = 240):
        source = packaged.JOE.verified()
        model: Any = audiozoo.load(source)
        self.processor = audiozoo.load_processor(source)
        self.config, self.batch, self.symbols, self.frames = model.config, batch, symbols, frames
        graphdef, self._state = nnx.split(fold_weight_norm(model))

        def synthesize(state: Any, ids: jax.Array, mask: jax.Array, rate: jax.Array, key: jax.Array) -> Any:
            noise = jax.random.normal(jax.random.fold_in(key, 7), (batch, frames, self.config.flow_size))
            said = nnx.merge(graphdef, state)(ids, mask, speaking_rate=rate, prior_noise=noise, key=key)
            return said.waveform, said.durations.sum(axis=-1)

        self._synthesize = jax.jit(synthesize)

    @staticmethod
    def available() -> bool:
        """Whether the voice and the phonemes that it reads are there."""
        return packaged.JOE.find() is not None and phonemes.available()

    def speak(self, texts: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
        """Each text with its speech at 16 kHz, at a speed that is drawn for a batch."""
        for start in range(0, len(texts), self.batch):
            some = texts[start : start + self.batch]
            ids, mask = np.zeros((2, self.batch, self.symbols), np.int32)
            for row, text in enumerate(some):
                symbols = self.processor(text + ".")["input_ids"][0][: self.symbols]
                ids[row, : len(symbols)], mask[row, : len(symbols)] = symbols, 1
            key = jax.random.key(int(rng.integers(2**31)))
            waves, lengths = self._synthesize(self._state, ids, mask, rng.uniform(0.9, 1.3), key)
            for text, wave, length in zip(some, np.asarray(waves), np.asarray(lengths), strict=False):
                if length <= self.frames:
                    wave = wave[: int(length) * self.config.hop_length]
                    yield text, trimmed(audio.resample(wave, self.config.sampling_rate, RATE))


# --- the corpus ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Manifests of what is learnt from and of what is held out, by name."""

    train: Path
    held_out: dict[str, Path]


def make(
    directory: Path | str,
    *,
    language: Language = ENGLISH,
    clips: int = 6000,
    held_out: int = 100,
    piper: int = 240,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Write a corpus, or find the one that was written there with the same arguments.

    Half of the clips are sentences; the others are words and parts of sentences, from which letters are learnt sooner.

    Args:
        directory: made if need be.
        language: what is said.
        clips: to learn from.
        held_out: sentences to judge by, for the voices of training and for others each.
        piper: clips by Piper's voice besides, and a sixth as many to judge by; 0 for none.
        seed: of all that is drawn.
        progress: called with the clips that are written and the clips in all.

    Raises:
        PhonemizerMissingError: if espeak-ng is not installed.
        SourceError: if the directory cannot be written to, or Piper's voice is wanted and not installed.
    """
    directory = Path(directory)
    says: dict[str, Any] = {"clips": clips, "held_out": held_out, "piper": piper, "seed": seed}
    says |= {"words": dict(language.words), "sentences": [*language.sentences], "parts": [*language.parts]}
    names = {"sentences": held_out, "voices": held_out, "piper": -(-piper // 6)}
    corpus = Corpus(directory / "train.jsonl", {n: directory / f"{n}.jsonl" for n, count in names.items() if count})
    written = directory / "corpus.json"
    if written.is_file() and json.loads(written.read_text(encoding="utf-8")) == says:
        return corpus
    rng = np.random.default_rng(seed)
    held: dict[str, list[str]] = {}
    secret: set[str] = set()
    for name, count in names.items():
        held[name] = []
        while len(held[name]) < count:
            if (text := language.draw(rng)) not in secret:
                secret.add(text)
                held[name].append(text)

    def learnt(count: int) -> Iterator[str]:
        while count:
            if (text := language.draw(rng, part=count % 2 == 0)) not in secret:
                count -= 1
                yield text

    known = [language + variant for language in LANGUAGES for variant in VARIANTS]

    def robots(texts: Iterable[str], voices: Sequence[str]) -> Iterator[tuple[str, str, np.ndarray]]:
        for text in texts:
            voice = voices[int(rng.integers(len(voices)))]
            yield text, voice, espeak(text, voice, rng)

    parts = {
        "train": robots(learnt(clips), known),
        "sentences": robots(held["sentences"], known),
        "voices": robots(held["voices"], UNHEARD),
    }
    if piper:
        joe = Piper()
        parts["piper"] = ((text, "piper", wave) for text, wave in joe.speak(held["piper"], rng))
        others = ((text, "piper", wave) for text, wave in joe.speak(list(learnt(piper)), rng))
        parts["train"] = itertools.chain(parts["train"], others)
    total, done = clips + piper + sum(names.values()), 0
    try:
        for name, part in parts.items():
            rows: list[dict[str, Any]] = []
            (directory / name).mkdir(parents=True, exist_ok=True)
            for text, voice, wave in part:
                file, wave = f"{name}/{len(rows)}.wav", heard(wave, rng)
                audio.write(directory / file, wave, RATE)
                rows.append({"audio": file, "text": text, "voice": voice, "duration": len(wave) / RATE})
                done += 1
                if progress is not None:
                    progress(done, total)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        written.write_text(json.dumps(says), encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{directory} cannot be written to ({error.strerror}).") from None
    return corpus
