"""The jaxtyping annotations of a module, enforced: every public function and method checks its shapes and dtypes."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
from beartype import beartype
from jaxtyping import jaxtyped


def enforce(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """Wrap what a module defines for the length of a test; returns the names of what is checked.

    Constructors are left alone. Shapes are known while JAX traces, so `jax.eval_shape` is enough to check a call.
    """
    checked = []
    for owner_name, owner in vars(module).copy().items():
        if getattr(owner, "__module__", None) != module.__name__ or owner_name.startswith("_"):
            continue
        if inspect.isfunction(owner):
            monkeypatch.setattr(module, owner_name, jaxtyped(typechecker=beartype)(owner))
            checked.append(owner_name)
        elif inspect.isclass(owner):
            for name, method in vars(owner).copy().items():
                if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                    monkeypatch.setattr(owner, name, jaxtyped(typechecker=beartype)(method))
                    checked.append(f"{owner_name}.{name}")
    return checked
