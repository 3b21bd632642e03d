"""Every notebook runs from top to bottom, and is stored with its outputs, small enough to read.

By itself each takes about a minute on two cores of a Xeon.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds, beside another notebook, on a slower machine
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
needs_jupyter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "nbformat", "ipykernel", "matplotlib")),
    reason="running notebooks needs the extra `notebooks`",
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_with_outputs_and_small(path):
    assert path.stat().st_size <= 2_000_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert len(code) >= 3, "a walkthrough has steps"
    assert any(cell["cell_type"] == "markdown" for cell in cells)
    assert all(cell["execution_count"] for cell in code), "a cell was never run"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})], "nothing is plotted"


@needs_jupyter
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, tmp_path, recordings, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("AUDIOZOO_RECORDINGS", str(recordings))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A reader's programs are optimised. At LLVM's first level they are as fast, and compiled a tenth to a third sooner.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    client = nbclient.NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    assert time.monotonic() - start < LIMIT
