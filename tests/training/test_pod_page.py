"""The page `audiozoo/training/README.md`: its commands can be typed, and a row of its tables stands for each."""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from audiozoo.cli import app
from audiozoo.recipes import plan

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "audiozoo" / "training" / "README.md").read_text(encoding="utf-8")
SECTIONS = [text for text in re.split(r"^##+ ", PAGE, flags=re.M) if "| Slice |" in text]
CHIPS = {"v5e-64": "v5e:8x8", "v5p-128": "v5p:4x4x4", "v6e-16": "v6e:4x4"}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.partition("\n")[0])
def test_each_row_has_its_command(section, monkeypatch):
    asked = []

    def record(model, topology, mesh, amount, **how):
        choice = plan.choose(model, how["model_class"])
        asked.append((choice, topology, mesh, amount, how))
        return SimpleNamespace(text=lambda: "")

    monkeypatch.setattr(plan, "plan", record)
    for command in re.findall(r"^audiozoo (plan .*)$", section, re.M):
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, (command, done.output, done.exception)
    rows = re.findall(r"^\| (\S+) \| `(\S+)` \|", section, re.M)
    assert rows
    assert [(CHIPS[name], mesh) for name, mesh in rows] == [(topology, mesh) for _, topology, mesh, _, _ in asked]
    for choice, topology, mesh, amount, how in asked:
        chips = math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2])))
        assert chips == math.prod(map(int, re.findall(r"\d+", mesh)))
        assert how["train"]
        assert how["options"].stack
        assert how["options"].remat == "layers"
        assert f"`{choice.model_class}`" in section
        assert f"{amount.batch} " in section
        assert f"{amount.seconds:g} s, {amount.tokens} tokens" in section
    assert len({choice.name for choice, *_ in asked}) == 1


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "audiozoo" / "training" / target).resolve().is_file(), target
    for target in re.findall(r"`(tests/\S+\.py)`", PAGE):
        assert (ROOT / target).is_file(), target
