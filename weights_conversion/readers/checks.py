"""What a header says is checked before it is believed, and what is wrong with a file becomes one sentence."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError

_MAX_RANK = 32
_MAX_ELEMENTS = 1 << 58  # sizes of zero counted as one


class Damaged(Exception):
    """What is wrong with a file; `parsing` adds which file and what to do."""


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file does to its parser into one sentence."""
    try:
        yield
    except (CheckpointError, SourceError):
        raise
    except Damaged as error:
        raise CheckpointError(f"{path} is not a sound {kind} file: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        # A parser fed with random bytes fails in many ways (struct.error, zipfile.BadZipFile, UnicodeDecodeError, ...).
        # They all mean the same to the user; the original stays attached as the cause.
        raise CheckpointError(f"{path} is not a sound {kind} file: it is truncated or damaged.") from error


def quoted(name: Any) -> str:
    """A name out of a file, fit for an error message: short, on one line.

    What is no name is not spelled out: a list that holds itself twice, and so on sixty times, has no end.
    """
    text = repr(str(name)) if isinstance(name, (str, int)) else f"a {type(name).__name__}"
    return text if len(text) <= 120 else text[:117] + "...'"


def is_count(value: Any) -> bool:
    """Is this an integer that can count bytes or elements? (`True` and `False` are not.)"""
    return type(value) is int and 0 <= value < 1 << 48


def checked_shape(shape: Iterable[Any], what: str) -> tuple[int, ...]:
    """The shape of `what` as a tuple that NumPy can hold; raises `Damaged` if it could not."""
    sizes = tuple(shape)
    possible = len(sizes) <= _MAX_RANK and all(map(is_count, sizes))
    if not possible or math.prod(max(size, 1) for size in sizes) >= _MAX_ELEMENTS:
        raise Damaged(f"{what} has an impossible shape")
    return sizes


def is_plain_file_name(name: Any) -> bool:
    """Does this name a file beside another? A path could lead anywhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads` that refuses a name given twice."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise Damaged(f"the name {quoted(name)} occurs twice")
        table[name] = value
    return table
