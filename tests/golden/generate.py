"""Write golden files with the originals: `python -m tests.golden.generate [NAME…]`, all of them by default.

Needs the extra `reference`; by default what needs yet another version of it is left out. The weights are random ones
that `tests/random_weights.py` can make again; that our model, filled without PyTorch, holds exactly the original's
weights is checked before a file is written.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import numpy as np

from tests.golden import golden
from tests.parity import harness


def versions() -> dict[str, str]:
    """What makes the file."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "openai-whisper", "numpy", "jax", "flax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _has(requirement: str) -> bool:
    """Is `package==version` installed?"""
    package, _, version = requirement.partition("==")
    return versions().get(package) == version


def generate(case: golden.Case) -> None:
    """Write one file, and check that our model agrees with it."""
    import torch

    with harness.precision("float64"):
        reference = harness.randomise(case.reference(), case.seed)
        ported = harness.parameters(harness.port(reference, case.build("float64"), case.table))
        for path, array in harness.parameters(golden.randomised(case, "float64")).items():
            assert np.array_equal(array, ported[path]), f"{path} differs when made without the original"
        with torch.no_grad():
            outputs = case.run_reference(reference, case.inputs())
        golden.write(case, {name: harness.as_numpy(value) for name, value in outputs.items()}, versions())
        golden.compare(case, golden.read(case.path), "float64", "cpu")


def main(names: list[str]) -> int:
    """Write the files named, or all."""
    known = {case.name: case for case in golden.cases()}
    if unknown := [name for name in names if name not in known]:
        print(f"There is no golden case {', '.join(unknown)}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    for name in names or [name for name, case in known.items() if case.needs is None or _has(case.needs)]:
        generate(known[name])
        print(f"{known[name].path.name}: {known[name].path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
