"""Live parity runs in float64 against PyTorch, and only where PyTorch is installed."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest

_MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


class _WithoutReference(pytest.Module):
    """A test module that is not imported, because the originals it compares with are not installed."""

    def collect(self):
        raise pytest.skip.Exception(
            f"live parity needs the extra `reference` ({' and '.join(_MISSING)} not installed)", allow_module_level=True
        )


def pytest_pycollect_makemodule(module_path, parent):
    """Skip, at collection and without importing anything, when the originals are missing."""
    if _MISSING:
        return _WithoutReference.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="module", autouse=True)
def _double_precision():
    """float64 on both sides for the whole module; `harness.precision("float32")` goes back for a while."""
    from tests.parity.harness import precision

    with precision("float64"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _files_are_taken_for_what_they_are():
    """A file that a test opens by a paper's own reader is one that `audiozoo.load` takes for that paper's.

    `loading.paper_of` asks the papers in turn, and one before may be content with less.
    """
    from audiozoo import loading
    from audiozoo.registry import PAPERS

    def checked(name, open_checkpoint):
        @functools.wraps(open_checkpoint)
        def opened(path, *arguments, **options):
            foreign = open_checkpoint(path, *arguments, **options)
            if Path(path).is_file():
                assert loading.paper_of(Path(path)).name == name
            return foreign

        return opened

    with pytest.MonkeyPatch.context() as patch:
        for entry in PAPERS:
            if entry.name == "mms":  # nothing is its own: its files are wav2vec 2.0's
                continue
            patch.setattr(entry.conversion, "open_checkpoint", checked(entry.name, entry.conversion.open_checkpoint))
        yield
