"""Live parity runs in float64 against PyTorch, and only where PyTorch is installed."""

from __future__ import annotations

import importlib.util

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
