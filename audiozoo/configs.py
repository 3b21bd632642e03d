"""Configurations inside configurations, as a checkpoint of our own keeps them: in JSON, which has no tuples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def restore_parts(config: Any, **kinds: type) -> None:
    """Make a frozen configuration's parts again what they were: of a dictionary the dataclass of that field.

    Args:
        config: a dataclass; for its `__post_init__`.
        kinds: the dataclass of each field that is one.
    """
    for name, kind in kinds.items():
        value = getattr(config, name)
        if isinstance(value, Mapping):
            object.__setattr__(config, name, kind(**{field: with_tuples(x) for field, x in value.items()}))


def with_tuples(value: Any) -> Any:
    """A value with tuples in place of its lists, at every depth."""
    return tuple(with_tuples(x) for x in value) if isinstance(value, list | tuple) else value
