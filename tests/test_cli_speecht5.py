"""`audiozoo speak`, `convert-voice`, `transcribe` and `identify` with a tiny SpeechT5, run in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

import audiozoo
from audiozoo import cli
from audiozoo.commands import recognition, speech, terminal
from audiozoo.decoding.synthesis import durations_of, speak_spectrograms
from audiozoo.loading import variables
from audiozoo.models.speech_to_text_2 import LanguageModelFusion, Speech2Text2Config, Speech2Text2ForCausalLM
from audiozoo.models.speecht5 import SpeechT5LanguageModel, SpeechT5LanguageModelConfig
from audiozoo.processors.speecht5 import SpeechT5FeatureExtractor, SpeechT5Processor, SpeechT5Tokenizer
from tests.models.random_model import random_model
from tests.models.tiny_speecht5 import build, train_characters, vocoder, wave
from tests.test_cli import Run, assert_refused
from tests.weights_conversion.pytorch_files import write_pt
from weights_conversion.speecht5 import language_model_table

TEXT = "The fox jumps. 2 dogs sleep!"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `audiozoo …` in this process, without the compilation cache on disk."""
    for module in (cli, speech, terminal):
        monkeypatch.setattr(module, "keep_compiled_programs", lambda: None)
    assert recognition.terminal is terminal

    def command(*arguments: str | Path) -> Run:
        monkeypatch.setattr(sys, "argv", ["audiozoo", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        found = capsys.readouterr()
        return Run(code, found.out, found.err)

    return command


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A voice, a voice changer, a recogniser and a vocoder, each in its directory; and an x-vector and a recording."""
    root = tmp_path_factory.mktemp("zoo")
    tokenizer = SpeechT5Tokenizer(train_characters(root / "characters"))
    SpeechT5Processor(SpeechT5FeatureExtractor(num_mel_bins=8), tokenizer).save(root / "processor")
    for name, head, more in (
        ("voice", "ForTextToSpeech", {}),
        ("changer", "ForSpeechToSpeech", {}),
        ("recogniser", "ForSpeechToText", {}),
        ("teller", "ForSequenceClassification", {"id2label": ("ann", "bob")}),
    ):
        audiozoo.save(build(head, **more), root / name, processor_from=root / "processor")
    audiozoo.save(vocoder(), root / "vocoder")
    np.save(root / "ann.npy", np.random.default_rng(0).standard_normal((1, 6)).astype(np.float32))
    soundfile.write(root / "noise.wav", wave(9_000), 16_000)
    return root


def read(path: Path) -> np.ndarray:
    waveform, rate = soundfile.read(path, dtype="float32")
    assert rate == 16_000
    return waveform


@pytest.mark.slow
def test_speak(run, zoo, tmp_path):
    out, said = tmp_path / "out.wav", tmp_path / "out.json"
    voice = ("--model", zoo / "voice", "--vocoder", zoo / "vocoder", "--speaker-embedding", zoo / "ann.npy")
    done = run("speak", TEXT, "-o", out, *voice, "--seed", "3", "--subtitles", said)
    assert (done.code, done.out) == (0, "")
    processor = audiozoo.load_processor(zoo / "voice")
    spoken = list(
        speak_spectrograms(
            audiozoo.load(zoo / "voice"),
            audiozoo.load(zoo / "vocoder"),
            processor.sentences(TEXT),
            speaker_embedding=np.load(zoo / "ann.npy")[0],
            seed=3,
        )
    )
    assert [s.text for s in spoken] == ["The fox jumps.", "2 dogs sleep!"]
    expected = np.concatenate([s.waveform for s in spoken])
    np.testing.assert_allclose(read(out), expected, atol=1.5 / 2**15)  # 16 bits
    segments = json.loads(said.read_text(encoding="utf-8"))["segments"]
    assert [s["text"] for s in segments] == [s.text for s in spoken]
    for segment in segments:
        times = [segment["start"], *(s["end"] for s in segment["symbols"])]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(segment["end"])
    for arguments, sentence in (
        (voice[:4], "--speaker-embedding FILE.npy"),
        ((*voice, "--speed", "2"), "--speed is for VITS"),
        ((*voice[:4], "--speaker-embedding", zoo / "noise.wav"), "cannot be read as an array"),
        ((*voice[:2], "--vocoder", zoo / "changer", *voice[4:]), "a vocoder is a SpeechT5HifiGan"),
        (("--model", zoo / "changer"), "does not speak"),
    ):
        assert_refused(run("speak", TEXT, "-o", out, *arguments), sentence)
    np.save(tmp_path / "short.npy", np.zeros(5, np.float32))
    np.savez(tmp_path / "several.npz", ann=np.zeros(6, np.float32))
    (tmp_path / "empty.npy").touch()
    for name, sentence in (
        ("short.npy", "of 6 finite numbers"),
        ("several.npz", "holds several arrays; an x-vector is one"),
        ("empty.npy", "cannot be read as an array"),
    ):
        chosen = ("--speaker-embedding", tmp_path / name)
        assert_refused(run("speak", TEXT, "-o", out, *voice[:4], *chosen), sentence)


def test_convert_voice(run, zoo, tmp_path):
    out = tmp_path / "out.wav"
    changer = ("--model", zoo / "changer", "--vocoder", zoo / "vocoder", "-o", out)
    done = run("convert-voice", zoo / "noise.wav", *changer, "--speaker-embedding", zoo / "ann.npy", "--seed", "2")
    assert (done.code, done.out) == (0, "")
    expected = audiozoo.load(zoo / "changer").generate_speech(
        audiozoo.audio.read(zoo / "noise.wav", 16_000)[None],
        np.load(zoo / "ann.npy"),
        vocoder=audiozoo.load(zoo / "vocoder"),
        key=jax.random.key(2),
    )
    np.testing.assert_allclose(read(out), expected, atol=1.5 / 2**15)
    assert_refused(run("convert-voice", zoo / "noise.wav", *changer, "--from", "1", "--to", "2"), "are for VITS")
    assert_refused(run("convert-voice", zoo / "noise.wav", *changer), "--speaker-embedding FILE.npy")
    assert_refused(run("convert-voice", zoo / "noise.wav", *changer, "--noise-scale", "0"), "--noise-scale is for VITS")


def test_transcribe_and_identify(run, zoo, tmp_path):
    done = run("transcribe", zoo / "noise.wav", "--model", zoo / "recogniser", "--format", "json")
    assert done.code == 0
    found = json.loads(done.out)
    assert [s["end"] for s in found["segments"]] == [9_000 / 16_000]
    # What is padded is left out: the text is that of the recording alone.
    model, processor = audiozoo.load(zoo / "recogniser"), audiozoo.load_processor(zoo / "recogniser")
    inputs = processor(audiozoo.audio.read(zoo / "noise.wav", 16_000), sampling_rate=16_000, pad_to_multiple_of=64_000)
    tokens = model.generate(**inputs, masked_group_norm=True)
    assert found["text"] == processor.batch_decode(tokens, True)[0].strip()
    refuse = ("transcribe", zoo / "noise.wav", "--model", zoo / "recogniser")
    assert_refused(run(*refuse, "--language", "en"), "leave --language out")
    assert_refused(run(*refuse, "--word-timestamps"), "--word-timestamps is Whisper's")
    assert_refused(run(*refuse, "--task", "translate"), "is Whisper's")
    assert_refused(run("transcribe", zoo / "noise.wav", "--model", zoo / "voice"), "does not transcribe")
    done = run("identify", zoo / "noise.wav", "--model", zoo / "teller", "--json")
    assert {row["label"] for row in json.loads(done.out)} == {"ann", "bob"}


@pytest.mark.slow
def test_transcribe_with_a_language_model(run, zoo, tmp_path):
    sizes = {"d_model": 12, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    author = random_model(lambda rngs: Speech2Text2ForCausalLM(Speech2Text2Config(vocab_size=81, **sizes), rngs=rngs))
    audiozoo.save(author, tmp_path / "author")
    command = ("transcribe", zoo / "noise.wav", "--model", zoo / "recogniser")
    joint = ("--language-model", tmp_path / "author", "--ctc-weight", "0.3", "--lm-weight")
    done = run(*command, *joint, "3")
    assert done.code == 0, done.err
    model, processor = audiozoo.load(zoo / "recogniser"), audiozoo.load_processor(zoo / "recogniser")
    inputs = processor(audiozoo.audio.read(zoo / "noise.wav", 16_000), sampling_rate=16_000, pad_to_multiple_of=64_000)
    options = {"ctc_weight": 0.3, "masked_group_norm": True}
    tokens = model.generate(**inputs, **options, fusion=LanguageModelFusion(author, 3.0))
    assert done.out.strip() == processor.batch_decode(tokens, True)[0].strip()
    assert run(*command, *joint, "0").out != done.out
    assert_refused(run(*command, "--ctc-weight", "2"), "between 0 and 1")
    assert_refused(run(*command, "--hotword", "fox"), "are for CTC models")
    assert_refused(run(*command, "--word-bonus", "1"), "is for CTC models")
    assert_refused(run(*command, "--language-model", zoo / "vocoder"), "holds a SpeechT5HifiGan; beside SpeechT5 goes")


def test_transcribe_with_the_authors_language_model(run, zoo, tmp_path):
    """A `.pt` file, in a directory with the dictionary that names its tokens."""
    config = SpeechT5LanguageModelConfig(d_model=12, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    author = random_model(lambda rngs: SpeechT5LanguageModel(config, rngs=rngs))
    weights = language_model_table(config).write({name: v[...] for name, v in variables(author).items()})
    settings = {"decoder_attention_heads": 2, "activation_fn": "gelu", "share_decoder_input_output_embed": True}
    write_pt(tmp_path / "lm.pt", dict(weights), root="model", cfg={"model": settings})
    processor = audiozoo.load_processor(zoo / "recogniser")
    tokens = processor.tokenizer.tokens
    unused = (f"madeupword{i:04}" for i in range(79 - len(tokens)))
    dictionary = [f"{token} 9\n" for token in (*tokens[4:], *unused)]
    (tmp_path / "dict.txt").write_text("".join(dictionary), encoding="utf-8")
    audiozoo.save(audiozoo.load(tmp_path), tmp_path / "native")
    assert audiozoo.load(tmp_path / "native").config.tokens[4:] == tuple(line[:-3] for line in dictionary)
    command = ("transcribe", zoo / "noise.wav", "--model", zoo / "recogniser", "--language-model")
    done = run(*command, tmp_path, "--lm-weight", "3")
    assert done.code == 0, done.err
    inputs = processor(audiozoo.audio.read(zoo / "noise.wav", 16_000), sampling_rate=16_000, pad_to_multiple_of=64_000)
    fusion = LanguageModelFusion(author, 3.0)
    written = audiozoo.load(zoo / "recogniser").generate(**inputs, masked_group_norm=True, fusion=fusion)
    assert done.out.strip() == processor.batch_decode(written, True)[0].strip()
    assert run(*command, tmp_path / "lm.pt", "--lm-weight", "0").out != done.out
    (tmp_path / "dict.txt").write_text("".join(dictionary[1::-1] + dictionary[2:]), encoding="utf-8")
    assert_refused(run(*command, tmp_path), f"number 4 is {tokens[5]!r} there, and {tokens[4]!r} in the recogniser's")


def test_durations_by_attention():
    """Each symbol as long as the diagonal says; evenly where there are too few steps for a path."""
    attentions = np.full((2, 1, 8, 3), 0.1, np.float32)
    for step, symbol in enumerate((0, 0, 0, 1, 1, 2, 2, 2)):
        attentions[:, :, step, symbol] = 0.8
    assert durations_of(attentions, 800).tolist() == [300, 200, 300]
    assert durations_of(attentions[:, :, :2], 90).tolist() == [30, 30, 30]
