"""`audiozoo classify`, `embed` and `search` on small checkpoints written by `audiozoo.export`, random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import audiozoo
from audiozoo import cli
from audiozoo.audio.files import write
from audiozoo.commands import hearing, terminal
from audiozoo.errors import AudioError, CheckpointError
from audiozoo.models import clap
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from tests.models import test_audio_spectrogram_transformer as ast_tests
from tests.models.test_clap import RATE, sound, tiny, tiny_processor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A CLAP and an AST as Hugging Face directories, and a directory of sounds."""
    base = tmp_path_factory.mktemp("hearing")
    for name, model, processor in (
        ("clap", tiny(), tiny_processor()),
        ("ast", ast_tests.tiny(), ASTFeatureExtractor(num_mel_bins=16, max_length=32)),
    ):
        audiozoo.export(model, base / name)
        processor.save(base / name)
    (base / "sounds" / "deep").mkdir(parents=True)
    for index, name in enumerate(("hum.wav", "deep/whistle.flac", "wind.ogg")):
        rate = 8_000 if name.endswith("ogg") else RATE
        write(base / "sounds" / name, np.resize(sound("low", index), 2 * rate), rate)
    (base / "sounds" / "notes.txt").write_text("not a sound")
    (base / "sounds" / "broken.wav").write_bytes(b"RIFF and then nothing")
    return base


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `audiozoo …` in this process; the cache is a directory of the test's."""
    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)
    monkeypatch.setenv("AUDIOZOO_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["audiozoo", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        found = capsys.readouterr()
        return SimpleNamespace(code=code, out=found.out, err=found.err)

    return run


def test_classify_among_words(command, checkpoints):
    file = checkpoints / "sounds" / "hum.wav"
    run = command("classify", file, "--model", checkpoints / "clap", "--labels", "a hum", "rain", "a dog", "--top", 2)
    assert run.code == 0, run.err
    lines = [line.split("  ", 1) for line in run.out.splitlines()]
    assert len(lines) == 2
    assert {label for _, label in lines} < {"a hum", "rain", "a dog"}
    assert 1 > float(lines[0][0]) >= float(lines[1][0]) > 0
    told = json.loads(
        command(
            "classify", file, "--model", checkpoints / "clap", "--labels", "a hum", "--labels", "rain", "--json"
        ).out
    )
    assert sum(entry["score"] for entry in told) == pytest.approx(1.0)
    model, processor = audiozoo.load(checkpoints / "clap"), audiozoo.load_processor(checkpoints / "clap")
    known = clap.zero_shot(
        model, processor, audiozoo.audio.read(file, RATE), ["a_hum", "rain", "rain"], sampling_rate=RATE
    )
    assert [(entry["label"].replace(" ", "_"), pytest.approx(entry["score"])) for entry in told] == known


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (None, "text_config", "roberta"),
        (None, "audio_config", [1]),
        ("text_config", "hidden_size", 0),
        ("audio_config", "depths", ["2", 1]),
        ("audio_config", "patch_size", [4]),
        ("audio_config", "patch_stride", [0, 4]),
    ],
)
def test_sizes_of_no_model_get_a_sentence(checkpoints, tmp_path, part, field, value):
    shutil.copytree(checkpoints / "clap", tmp_path / "clap")
    file = tmp_path / "clap" / "config.json"
    config = json.loads(file.read_text())
    (config if part is None else config[part])[field] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="No model can be made of the sizes in") as caught:
        audiozoo.load(tmp_path / "clap")
    assert "\n" not in str(caught.value)


def test_a_mistake_of_ours_is_none_of_the_sizes(checkpoints, monkeypatch):
    monkeypatch.setattr("weights_conversion.clap.open_checkpoint", lambda path, model_class: path.misspelt)
    with pytest.raises(AttributeError, match="misspelt"):
        audiozoo.load(checkpoints / "clap")


def test_classify_by_tags(command, checkpoints):
    run = command("classify", checkpoints / "sounds" / "hum.wav", "--model", checkpoints / "ast", "--top", 3)
    assert run.code == 0, run.err
    assert {line.split("  ", 1)[1] for line in run.out.splitlines()} == {"low", "high", "noise"}
    # Also by the command that tells keywords, of which there are AST's.
    hears = ("identify", checkpoints / "sounds" / "hum.wav", "--model", checkpoints / "ast")
    told = command(*hears, "--json")
    assert told.code == 0, told.err
    scores = {row["label"]: row["probability"] for row in json.loads(told.out)}
    said = (line.split("  ", 1) for line in run.out.splitlines())
    assert scores == pytest.approx({label: float(score) for score, label in said}, abs=1e-3)
    assert "leave --crops out" in command(*hears, "--crops", 2).err


def test_embed_sounds_and_texts(command, checkpoints, tmp_path):
    file, out = checkpoints / "sounds" / "hum.wav", tmp_path / "all.npz"
    run = command("embed", file, "--text", "a dog", "--model", checkpoints / "clap")
    rows = [json.loads(line) for line in run.out.splitlines()]
    assert [row["name"] for row in rows] == [str(file), "a dog"]
    assert command("embed", file, "--text", "a dog", "--model", checkpoints / "clap", "-o", out).code == 0
    with np.load(out) as kept:
        assert kept["names"].tolist() == [str(file), "a dog"]
        np.testing.assert_allclose(kept["embeddings"], [row["embedding"] for row in rows], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(kept["embeddings"], axis=1), 1, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["all.npz"]
    # What cannot be heard is left out, and named.
    broken = checkpoints / "sounds" / "broken.wav"
    run = command("embed", broken, file, "--model", checkpoints / "clap", "-o", out)
    assert run.code == 1
    first, *_, last = run.err.splitlines()
    assert first.startswith(f"audiozoo: {broken}: ")
    assert last == "audiozoo: 1 of 2 files could not be embedded."
    with np.load(out) as kept:
        assert kept["names"].tolist() == [str(file)]
        np.testing.assert_allclose(kept["embeddings"], [rows[0]["embedding"]], atol=1e-6)


def test_embed_what_the_classifier_of_tags_sees(command, checkpoints):
    """AST's pooled output, of a long recording the mean of its windows."""
    file = checkpoints / "sounds" / "hum.wav"
    row = json.loads(command("embed", file, "--model", checkpoints / "ast").out)
    model, processor = audiozoo.load(checkpoints / "ast"), audiozoo.load_processor(checkpoints / "ast")
    wave = audiozoo.audio.read(file)
    assert len(wave) > 2 * processor.samples
    starts = [*range(0, len(wave) - processor.samples, processor.samples), len(wave) - processor.samples]
    windows = [wave[start : start + processor.samples] for start in starts]
    inputs = processor(windows, sampling_rate=16_000)["input_values"]
    pooled = audiozoo.jit(model.audio_spectrogram_transformer)(inputs).pooler_output
    np.testing.assert_allclose(row["embedding"], np.asarray(pooled).mean(axis=0), atol=1e-5)


def test_search_looks_once(command, checkpoints, monkeypatch, tmp_path):
    """And passes over what may not be looked at."""
    is_file = Path.is_file

    def refused(path, **options):
        if path.name == "locked.wav":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path, **options)

    monkeypatch.setattr(Path, "is_file", refused)
    (checkpoints / "sounds" / "locked.wav").symlink_to(tmp_path / "nowhere.wav")
    arguments = ("search", checkpoints / "sounds", "a low hum", "--model", checkpoints / "clap", "--top", 9)
    first = command(*arguments)
    assert first.code == 0, first.err
    assert "broken.wav" in first.err
    lines = first.out.splitlines()
    assert {line.rsplit("/", 1)[1] for line in lines} == {"hum.wav", "whistle.flac", "wind.ogg"}
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 1

    def refuse(*_, **__):
        raise AudioError("It was embedded before.")

    monkeypatch.setattr(clap, "embed_audio", refuse)
    again = command(*arguments)
    assert again.out == first.out
    told = json.loads(command(*arguments, "--json").out)
    assert [f"{entry['score']:+.3f}  {entry['file']}" for entry in told] == lines
    here, gone = checkpoints / "sounds" / "hum.wav", tmp_path / "gone.wav"  # since the directory was looked through
    found, _ = hearing.embeddings_of([gone, here], lambda file: np.ones(3), tmp_path / "other.npz")
    assert found == [here]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "{hum}", "rain"), "put --labels before 'rain'"),
        (("classify", "{hum}", "--top", "0"), "--top is 0"),
        (("classify", "nowhere.wav"), "no file nowhere.wav"),
        (("classify", "{sounds}"), "is a directory"),
        (("classify", "{hum}", "--model", "{clap}"), "give it some with --labels"),
        (("classify", "{hum}", "--model", "{ast}", "--labels", "rain"), "leave --labels out"),
        (("classify", "{hum}", "--model", "{clap}", "--labels", "rain", "--template", "x"), "no {} where"),
        (("classify", "{hum}", "--model", "{ast}", "--template", "{{}}"), "--template is the sentence"),
        (("embed",), "nothing to embed"),
        (("embed", "--text", "a hum", "--text", " "), "text is empty"),
        (("embed", "{hum}", "-o", "out.txt"), "should end in .npz"),
        (("embed", "{hum}", "-o", "nowhere/out.npz"), "there is no directory nowhere"),
        (("embed", "{hum}", "--model", "{ast}", "--text", "rain"), "embeds sounds, and no --text"),
        (("embed", "{hum}", "--model", "{clap}", "--layer", "1"), "--layer is for speech encoders"),
        (("search", "nowhere", "rain"), "no directory nowhere"),
        (("search", "{clap}", "rain"), "holds no sound files"),
        (("search", "{sounds}", " "), "query is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_get_one_sentence(command, checkpoints, arguments, message):
    places = {"hum": checkpoints / "sounds" / "hum.wav"} | {n: checkpoints / n for n in ("sounds", "clap", "ast")}
    run = command(*(argument.format(**places) if argument[0] == "{" else argument for argument in arguments))
    assert run.code == 1
    assert run.out == ""
    sentence = " ".join(run.err.split())
    assert sentence.startswith("audiozoo: ")
    assert message in sentence
    assert "Traceback" not in run.err
