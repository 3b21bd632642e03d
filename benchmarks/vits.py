"""VITS against `transformers` (eager) at MMS' size, and a real Piper voice against `onnxruntime`.

The forward decodes given noise at the published size with random weights; its durations are those that the weights
predict, brought to about 3 s by the speaking rate. The voice speaks as a user has it speak: ids in, waveform
out, compiled in buckets, noise switched off so that both speak the same.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, tensor, threads

SEED, SYMBOLS = 0, 101
# The phonemes of "The quick brown fox jumps over the lazy dog."
FOX = "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ."
LONG = (
    "ænd sˈoʊ, maɪ fˈɛloʊ ɐmˈɛɹɪkənz, ˈæsk nˌɑːt wʌt jʊɹ kˈʌntɹi kæn dˈuː fɔːɹ juː, "
    "ˈæsk wʌt juː kæn dˈuː fɔːɹ jʊɹ kˈʌntɹi."
)


def ids() -> np.ndarray:
    """A text's symbols, `(1, time)`."""
    return np.random.default_rng(1).integers(0, 38, (1, SYMBOLS))


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model of MMS' size with its own initialisation, float32, which speaks without noise."""
    import torch
    import transformers

    torch.set_num_threads(threads())
    torch.manual_seed(SEED)
    model = transformers.VitsModel(transformers.VitsConfig(noise_scale=0.0, noise_scale_duration=0.0)).eval()
    return model


@functools.lru_cache(maxsize=1)
def synthesizer() -> Any:
    """Ours with the same weights, compiled."""
    import torch
    from flax import nnx

    from audiozoo.decoding.synthesis import Synthesizer
    from audiozoo.models.vits import VitsModel
    from tests.parity.harness import ported
    from weights_conversion.vits import config_from_hugging_face, hugging_face_table

    theirs = original()
    config = config_from_hugging_face(theirs.config.to_dict())
    with torch.no_grad():
        return Synthesizer(ported(theirs, lambda: VitsModel(config, rngs=nnx.Rngs(0)), hugging_face_table(config)))


def speaking_rate() -> float:
    """That makes about 190 frames, 3 s, of the symbols."""
    from audiozoo.decoding.synthesis import Synthesizer

    voice: Synthesizer = synthesizer()
    frames = int(voice(ids(), noise_scale=0, noise_scale_duration=0).durations.sum()) // 256
    return max(frames / 190, 1e-3)


def our_synthesis() -> Run:
    voice, text, rate = synthesizer(), ids(), speaking_rate()
    return lambda: voice(text, noise_scale=0, noise_scale_duration=0, speaking_rate=rate).waveform


def their_synthesis() -> Run:
    import torch

    model, text, rate = original(), tensor(ids()), speaking_rate()

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(text, speaking_rate=rate).waveform[0].float().numpy()

    return run


def voice_file() -> Any:
    """The real voice's file."""
    from audiozoo import packaged

    return packaged.JOE.verified()


@functools.lru_cache(maxsize=1)
def our_voice() -> Any:
    import audiozoo
    from audiozoo.decoding.synthesis import Synthesizer
    from audiozoo.models.vits import VitsModel

    model = audiozoo.load(str(voice_file()))
    assert isinstance(model, VitsModel)
    return Synthesizer(model)


def symbols(phonemes: str) -> np.ndarray:
    """The voice's ids of a sentence."""
    from audiozoo.processors.vits import PiperTokenizer

    return np.asarray(PiperTokenizer.from_file(f"{voice_file()}.json").encode(phonemes))


def our_speech(phonemes: str) -> Run:
    voice, text = our_voice(), symbols(phonemes)
    return lambda: voice(text, noise_scale=0, noise_scale_duration=0).waveform


def onnx_speech(phonemes: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(str(voice_file()), options)
    text = symbols(phonemes).astype(np.int64)
    feed = {"input": text[None], "input_lengths": np.array([len(text)]), "scales": np.array([0, 1, 0], np.float32)}
    return lambda: session.run(None, feed)[0].reshape(-1)


def close(ours: Any, theirs: Any) -> str:
    """The largest difference; the lengths must be equal, the waveforms within 1e-4."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"{ours.shape} samples here, {theirs.shape} there")
    apart = float(np.max(np.abs(ours - theirs)))
    if apart > 1e-4:
        raise AssertionError(f"the waveforms differ by {apart:.3g}")
    return f"max diff {apart:.1e}, {len(ours)} samples"


CASES = (
    Case(
        "synthesis, 3 s, MMS size",
        our_synthesis,
        {"transformers": their_synthesis},
        target=1.5,
        agreement=close,
    ),
    Case(
        "Piper joe, medium, 2.8 s",
        functools.partial(our_speech, FOX),
        {"onnxruntime": functools.partial(onnx_speech, FOX)},
        target=1.0,
        agreement=close,
        repeats=20,
    ),
    Case(
        "Piper joe, medium, 5.7 s",
        functools.partial(our_speech, LONG),
        {"onnxruntime": functools.partial(onnx_speech, LONG)},
        target=1.0,
        agreement=close,
    ),
)
