"""`audiozoo speak` and `audiozoo convert-voice`, run in this process with a tiny voice, once as a user runs them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import audiozoo
from audiozoo import cli
from audiozoo.commands import speech
from audiozoo.decoding.synthesis import Synthesizer, speak
from audiozoo.loading import variables
from audiozoo.models.vits import spectrogram_of
from audiozoo.processors.vits import PiperTokenizer, VitsProcessor, VitsTokenizer
from audiozoo.recipes import run as recipes
from tests import processes
from tests.models.tiny_vits import PLAIN, build
from tests.test_cli import Run, assert_refused
from tests.weights_conversion.pytorch_files import write_pt
from weights_conversion.vits import original_table, processor_of_file

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Hello there. How are you?"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `audiozoo …` in this process, without the compilation cache on disk."""
    monkeypatch.setattr(speech, "keep_compiled_programs", lambda: None)

    def command(*arguments: str | Path, stdin: bytes = b"") -> Run:
        monkeypatch.setattr(sys, "argv", ["audiozoo", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
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
def voice(tmp_path_factory) -> Path:
    """A voice of three speakers that reads letters; it has learnt nothing."""
    directory = tmp_path_factory.mktemp("voice")
    letters = {symbol: index for index, symbol in enumerate("_ abcdefghijklmnopqrstuvwxyz")}
    VitsTokenizer(letters, phonemize=False, pad_token="_").save(directory / "text")
    audiozoo.save(build(PLAIN), directory / "model", processor_from=directory / "text")
    return directory / "model"


def read(path: Path) -> np.ndarray:
    waveform, rate = soundfile.read(path, dtype="float32")
    assert rate == 16_000
    return waveform


def test_speaks_what_the_library_speaks(run, voice, tmp_path):
    """Sentence by sentence, with the voice's own noise; what is said when stands beside it."""
    out, said = tmp_path / "out.wav", tmp_path / "out.json"
    options = ("--speaker", "1", "--seed", "3", "--speed", "0.2", "--noise-scale", "0.5")
    done = run("speak", TEXT, "-o", out, "--model", voice, *options, "--subtitles", said, "--pause", "0.25")
    assert (done.code, done.out) == (0, "")
    assert str(out) in done.err
    processor = audiozoo.load_processor(voice)
    synthesizer = Synthesizer(audiozoo.load(voice))
    spoken = list(
        speak(synthesizer, processor.sentences(TEXT), speaker_id=1, seed=3, speaking_rate=0.2, noise_scale=0.5)
    )
    assert [s.text for s in spoken] == ["Hello there.", "How are you?"]
    first, second = (s.waveform for s in spoken)
    expected = np.concatenate([first, np.zeros(4000), second])
    np.testing.assert_allclose(read(out), expected, atol=1.5 / 2**15)  # 16 bits
    assert np.abs(first).max() > 0.01
    segments = json.loads(said.read_text(encoding="utf-8"))["segments"]
    assert [s["text"] for s in segments] == [s.text for s in spoken]
    assert segments[0]["end"] == first.size / 16_000
    assert segments[1]["start"] == pytest.approx(first.size / 16_000 + 0.25)
    for segment in segments:
        times = [segment["start"], *(s["end"] for s in segment["symbols"])]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(segment["end"])
    assert "".join(s["symbol"] for s in segments[1]["symbols"]).replace("_", "") in "how are you"
    assert sorted(os.listdir(tmp_path)) == ["out.json", "out.wav"]


def test_text_from_a_file_and_noise_switched_off(run, voice, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT + "\n", encoding="utf-8-sig")
    still = ("--noise-scale", "0", "--noise-scale-duration", "0", "--model", voice, "--speed", "0.2")
    a, b = tmp_path / "a.flac", tmp_path / "b.wav"
    run("speak", "-f", tmp_path / "text.txt", "-o", a, *still, "--normalize")
    run("speak", "-", "-o", b, *still, "--seed", "5", "--subtitles", tmp_path / "b.srt", stdin=TEXT.encode())
    loud, plain = read(a), read(b)
    assert loud.size == plain.size > 0
    assert np.abs(loud).max() == pytest.approx(1, abs=1e-3)
    cues = (tmp_path / "b.srt").read_text(encoding="utf-8")
    assert cues.startswith("1\n00:00:00,000 --> ")
    assert "How are you?" in cues
    # One sentence, brought to full scale: the same waveform but for its loudness.
    half = loud[: round(loud.size / 4)]
    np.testing.assert_allclose(
        half / np.abs(half).max(), plain[: half.size] / np.abs(plain[: half.size]).max(), atol=0.02
    )


@pytest.mark.slow
def test_as_a_user_runs_it(voice, tmp_path):
    """The installed program, standard input to standard output, with its cache of compiled programs."""
    done = subprocess.run(
        [sys.executable, "-m", "audiozoo.cli", "speak", "-", "-o", "-", "--model", str(voice), "--speed", "0.2"],
        input=TEXT.encode(),
        capture_output=True,
        cwd=ROOT,
        env=processes.of_a_user(tmp_path),
    )
    assert done.returncode == 0, done.stderr.decode()
    waveform, rate = soundfile.read(io.BytesIO(done.stdout))
    assert rate == 16_000
    assert waveform.size > 0
    assert b"s of speech" in done.stderr
    assert list((tmp_path / "jax").iterdir())


def test_mistakes_get_a_sentence(run, voice, tmp_path, monkeypatch):
    kept = tmp_path / "kept.wav"
    kept.write_bytes(b"as it was")
    for arguments, sentence in (
        ((), "nothing to say"),
        (("a", "-f", "text.txt"), "not both"),
        (("-f", tmp_path / "nowhere.txt"), "nowhere.txt"),
        (("-f", kept.parent), "cannot be read"),
        (("?!",), "no symbol that this voice knows"),
        (("a", "--speed", "0"), "above 0"),
        (("a", "--noise-scale", "-1"), "at least 0"),
        (("a", "--pause", "nan"), "at least 0"),
        (("a", "--noise-scale", "inf"), "at least 0"),
        (("a", "--speaker", "3"), "voices 0 to 2"),
        (("a", "--speaker", "Alice"), "'Alice'"),
        (("a", "--vocoder", "hifigan"), "--vocoder is for SpeechT5"),
        (("a", "--subtitles", "said.pdf"), "'pdf'"),
        (("a", "--subtitles", tmp_path / "no" / "said.srt"), "no directory"),
        (("a", "--model", tmp_path / "nowhere"), "nowhere"),
    ):
        done = run("speak", *arguments, *(() if "--model" in arguments else ("--model", voice)), "-o", kept)
        assert_refused(done, sentence)
    for out, sentence in (
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "out.wav", "no directory"),
        (tmp_path / "out", "its ending"),
        (tmp_path / "out.xyz", "xyz"),
    ):
        assert_refused(run("speak", "a", "-o", out, "--model", voice), sentence)
    assert kept.read_bytes() == b"as it was"
    assert os.listdir(tmp_path) == ["kept.wav"]
    assert_refused(run("speak", "-", "--model", voice, "-o", kept, stdin=b"\xff\xfe\x00"), "UTF-8")
    one = audiozoo.load(voice)
    one.config = dataclasses.replace(one.config, num_speakers=1, speaker_embedding_size=0)
    monkeypatch.setattr(audiozoo, "load", lambda source: one)
    assert_refused(run("speak", "a", "--speaker", "0", "--model", voice, "-o", kept), "has one voice")


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "tones.wav"
    time = np.arange(9_001) / 22_050
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 1300 * time), 22_050)
    return path


def test_convert_voice(run, voice, recording, tmp_path):
    out = tmp_path / "out.wav"
    done = run(
        "convert-voice", recording, "--from", "0", "--to", "2", "--model", voice, "-o", out, "--noise-scale", "0"
    )
    assert (done.code, done.out) == (0, "")
    model = audiozoo.load(voice)
    waveform = audiozoo.audio.read(recording, 16_000)
    spectrogram = spectrogram_of(model.config, jnp.asarray(waveform[None, : waveform.size // 8 * 8]))
    expected = jax.jit(lambda m, x: m.voice_conversion(x, 0, 2, noise_scale=0.0).waveform[0])(model, spectrogram)
    np.testing.assert_allclose(read(out), expected, atol=1.5 / 2**15)  # 16 bits
    assert np.abs(expected).max() > 0.01


def test_voices_that_cannot_be_converted(run, voice, recording, tmp_path):
    out = tmp_path / "out.wav"
    short = tmp_path / "short.wav"
    soundfile.write(short, np.full(20, 0.1), 16_000)
    for source, start, end, sentence, *more in (
        (tmp_path / "nowhere.wav", "0", "1", "nowhere.wav"),
        (recording, "0", "3", "voices 0 to 2"),
        (recording, "-1", "1", "voices 0 to 2"),
        (recording, "0", "Bob", "'Bob'"),
        (short, "0", "1", "too short"),
        (short, "0", "1", "at least 0", "--noise-scale", "nan"),
        (recording, "0", "1", "are for SpeechT5", "--vocoder", "hifigan"),
        (recording, "0", "1", "are for SpeechT5", "--speaker-embedding", "ann.npy"),
    ):
        done = run("convert-voice", source, "--from", start, "--to", end, "--model", voice, "-o", out, *more)
        assert_refused(done, sentence)
    assert not out.exists()


PIPER = {
    "phoneme_id_map": {"_": [0], "^": [1], "$": [2], "a": [3], "b": [4, 5], " ": [6]},
    "phoneme_type": "text",
    "phoneme_map": {"c": ["a", "b"]},
    "espeak": {"voice": "de"},
    "speaker_id_map": {"Ann": 0, "Bob": 2},
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> Path:
    """A voice of MMS' that reads romanised text, one of the authors' that reads phonemes, one of two of Piper's."""
    root = tmp_path_factory.mktemp("projects")
    for name in ("ron", "authors", "piper"):
        (root / name).mkdir()
    model = build(dataclasses.replace(PLAIN, decoder_weight_norm=True))
    values = {name: leaf[...] for name, leaf in variables(model).items()}
    sizes = {"upsample_rates": [4, 2], "resblock_dilation_sizes": [[1, 2]], "n_heads": 2}
    for name, file, data in (
        ("ron", "G_100000.pth", {"training_files": "train.uroman", "add_blank": False}),
        ("authors", "pretrained_vctk.pth", {"text_cleaners": ["english_cleaners2"]}),
    ):
        write_pt(root / name / file, dict(original_table(model.config).write(values)), root="model")
        (root / name / "config.json").write_text(json.dumps({"model": sizes, "data": data}))
    (root / "ron" / "vocab.txt").write_text("\n".join("k abcdefghilmnoprstuvzâăîşţ") + "\n", encoding="utf-8")
    weights = dict(original_table(model.config, prefix="model_g.").write(values))
    write_pt(root / "piper" / "ann.ckpt", weights, root="state_dict", hyper_parameters=sizes)
    for name in ("ann", "bob"):
        (root / "piper" / f"{name}.json").write_text(json.dumps(PIPER | {"espeak": {"voice": name}}))
    return root


@pytest.mark.parametrize("source", ["ron", "authors/pretrained_vctk.pth", "piper/ann.ckpt"])
def test_a_voice_reads_as_before_when_it_is_converted(run, projects, tmp_path, source):
    """What lies beside the weights says how texts are read."""
    done = run("convert", projects / source, tmp_path / "out")
    assert (done.code, done.out) == (0, "")
    before, after = (audiozoo.load_processor(path) for path in (projects / source, tmp_path / "out"))
    assert vars(after.tokenizer) == vars(before.tokenizer)
    assert after.speakers == before.speakers
    if source == "ron":
        assert (before.tokenizer.is_uroman, before.tokenizer.language) == (True, "ron")


def test_a_trained_voice_reads(tmp_path):
    """The processor is kept with the model, whichever kind it is; and of several voices in a directory its own."""
    letters = VitsProcessor(VitsTokenizer({"_": 0, "a": 1}, phonemize=False, pad_token="_", unk_token=None))
    piper = VitsProcessor(PiperTokenizer(PIPER["phoneme_id_map"], "de", "text"), {"Ann": 0})
    for name, processor in (("letters", letters), ("piper", piper)):
        recipes._save(build(PLAIN), processor, tmp_path / name)
        again = audiozoo.load_processor(tmp_path / name)
        assert vars(again.tokenizer) == vars(processor.tokenizer)
        assert again.speakers == processor.speakers
    for name in ("de", "fr"):
        (tmp_path / f"{name}.onnx.json").write_text(json.dumps(PIPER | {"espeak": {"voice": name}}))
    assert processor_of_file(tmp_path / "fr.onnx").tokenizer.voice == "fr"
