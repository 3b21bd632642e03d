"""Every Python block of the README runs, in order of appearance, each in a process and a directory of its own.

A block that needs the originals stands behind the line `<!-- needs: reference -->`; one behind `<!-- from: FILE -->` is
not run, but stands in that file, word for word. Shell lines are parsed by the commands that they name.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOUND = [
    pytest.param(
        match["note"] or "", match["what"], match["code"], id=f"line {README[: match.start('code')].count(chr(10)) + 1}"
    )
    for match in re.finditer(
        r"(?:<!-- (?P<note>needs|from): (?P<what>\S+) -->\n+)?^```python\n(?P<code>.*?)^```$", README, re.M | re.S
    )
]
BLOCKS = [block for block in FOUND if block.values[0] != "from"]
EXCERPTS = [block for block in FOUND if block.values[0] == "from"]
SHELL = [
    line for block in re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S) for line in block.splitlines() if line
]
COMMANDS = {
    "demo": 'pip install -e ".[demo]" && audiozoo demo',
    "test": 'pip install -e ".[test]" && pytest',
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_two_commands_stand_in_a_fenced_block(command):
    inside = [line for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.M | re.S) for line in block.split("\n")]
    assert inside.count(command) == 1


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("audiozoo ")])
def test_shell_line_is_understood(line):
    """The command is there, and so are its arguments and options; most of the checkpoints are too large to run here."""
    import typer.main

    from audiozoo.cli import app

    command, (_, *words) = typer.main.get_command(app), shlex.split(line, comments=True)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, words)  # parses, and raises for what it does not know
    assert context.params


@pytest.mark.slow
def test_recipes_of_small_models_have_these_options():
    lines = [shlex.split(line, comments=True) for line in SHELL if line.startswith("python -m")]
    assert lines
    for _, _, module, *words in lines:
        told = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert told.returncode == 0, told.stderr
        assert [word for word in words if word.startswith("--") and word not in told.stdout] == []


@pytest.mark.parametrize(("note", "file", "code"), EXCERPTS)
def test_excerpt_stands_in_its_file(note, file, code):
    assert code in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("note", "extra", "code"), BLOCKS)
def test_block_runs(note, extra, code, tmp_path):
    if extra == "reference" and importlib.util.find_spec("torch") is None:
        pytest.skip("this block needs the extra `reference`")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
