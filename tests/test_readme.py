"""Every Python block of the README runs, in order of appearance, each in a process and a directory of its own.

A block that needs the originals stands behind the line `<!-- needs: reference -->`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(match["needs"] or "", match["code"], id=f"line {README[: match.start('code')].count(chr(10)) + 1}")
    for match in re.finditer(
        r"(?:<!-- needs: (?P<needs>\w+) -->\n+)?^```python\n(?P<code>.*?)^```$", README, re.M | re.S
    )
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


@pytest.mark.parametrize(("needs", "code"), BLOCKS)
def test_block_runs(needs, code, tmp_path, recordings):
    if needs == "reference" and importlib.util.find_spec("torch") is None:
        pytest.skip("this block needs the extra `reference`")
    for name in ("jfk.flac", "jfk_16k.wav"):
        (tmp_path / name).symlink_to(recordings / name)
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
