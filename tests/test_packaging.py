"""What is installed: dependencies declared, nothing heavy imported, everything packed."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_house import FILES, MODULES, PACKAGES, imports

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "google": "protobuf", "yaml": "pyyaml", "PIL": "pillow"}


def distribution(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


CORE = {distribution(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {extra: {distribution(r) for r in rs} for extra, rs in PROJECT["optional-dependencies"].items()}


def test_the_extras_are_there():
    assert {"demo", "test", "reference", "notebooks", "dev"} <= EXTRAS.keys()


@pytest.mark.parametrize("extra", ["test", "demo"])
def test_no_pytorch_unless_asked_for(extra):
    assert not (CORE | EXTRAS[extra]) & {"torch", "transformers", "openai-whisper", "torchaudio"}


def test_whatever_is_imported_is_declared():
    """Module-level imports need only what `pip install audiozoo` brings."""
    missing = set()
    for path in FILES:
        for name in imports(path, at_module_level=True):
            root = name.split(".")[0]
            if root in sys.stdlib_module_names or root in PACKAGES:
                continue
            if DISTRIBUTIONS.get(root, root.lower().replace("_", "-")) not in CORE | {"jaxlib"}:
                missing.add(f"{path.relative_to(ROOT)} imports {root}")
    # ml_dtypes is a requirement of JAX itself.
    assert {m for m in missing if not m.endswith(" ml_dtypes")} == set()


def test_every_module_imports_alone_without_pytorch_and_without_a_deprecation_of_ours():
    program = "\n".join(
        [
            "import importlib, sys",
            *(f"importlib.import_module({name!r})" for name in sorted(MODULES) if not name.endswith("__main__")),
            "heavy = {'torch', 'transformers', 'whisper', 'matplotlib', 'onnx'} & set(sys.modules)",
            "sys.exit(f'imported {heavy}' if heavy else 0)",
        ]
    )
    warnings = [
        f"-Werror::{kind}:{package}" for kind in ("DeprecationWarning", "FutureWarning") for package in PACKAGES
    ]
    done = subprocess.run([sys.executable, *warnings, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_front_door_opens_quickly_and_imports_no_model():
    program = "import sys, audiozoo; print([m for m in sys.modules if m.startswith('audiozoo.models.')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_every_directory_of_code_is_a_package():
    bare = {path.parent for path in FILES if not (path.parent / "__init__.py").exists()}
    assert not bare
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


def test_what_is_installed_is_this_version():
    try:
        metadata = importlib.metadata.metadata("audiozoo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("audiozoo is not installed here: the tests run from a bare checkout")
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n", 2)[1].strip() == "Apache License"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="audiozoo")
    assert callable(script.load())
