"""Tensors that stay on disk, and the mapping of them that every reader returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError
from weights_conversion.readers.checks import quoted


class LazyTensor:
    """A tensor in a file: `shape` and `dtype` are known, `read()` returns its values as a fresh NumPy array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Read the values from disk; raises `CheckpointError` if the file ended or vanished since it was opened."""
        return self._values()

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _values(self) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


@dataclass(frozen=True, repr=False)
class Slab(LazyTensor):
    """A contiguous run of bytes in a file, in C order."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def _values(self) -> np.ndarray:
        return _fresh(self.path, self.offset, self.nbytes).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, repr=False)
class Strided(LazyTensor):
    """A view of an array in a file: `strides` count elements, the view begins at byte `offset` of the file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    conjugate: bool = False
    negate: bool = False

    def _values(self) -> np.ndarray:
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        stored = _fresh(self.path, self.offset, span(self.shape, self.strides) * self.dtype.itemsize)
        if self.strides == c_strides(self.shape):
            values = stored.view(self.dtype).reshape(self.shape)
        else:
            byte_strides = [stride * self.dtype.itemsize for stride in self.strides]
            values = np.ndarray(self.shape, self.dtype, stored.data, 0, byte_strides).copy()
        if self.conjugate:
            values = np.conj(values)
        return np.negative(values) if self.negate else values


class InMemory(LazyTensor):
    """A small array that was part of the header itself (a NumPy array in a pickle, `float_data` in ONNX)."""

    def __init__(self, values: np.ndarray):
        self.array = values
        self.shape, self.dtype = values.shape, values.dtype

    def _values(self) -> np.ndarray:
        return self.array.copy()


def _fresh(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """`nbytes` bytes at `offset` of a file, as an array of bytes that owns its memory."""
    buffer = np.empty(nbytes, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view, done = buffer.data, 0
            while done < nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} ends at byte {offset + done}, inside a tensor; copy it again.")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return buffer


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array in C order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements between the first and the last element of a strided view, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class TensorSource(Mapping[str, LazyTensor]):
    """The tensors of one checkpoint, by name, in the order of the file.

    A read-only mapping from name to `LazyTensor`, and a context manager. `metadata` holds all that is not a weight:
    OpenAI's `dims`, fairseq's `cfg` or `args`, CTranslate2's scalars, an ONNX graph.

    Attributes:
        path: the file or directory that was opened.
        format: "safetensors", "pytorch", "ctranslate2" or "onnx".
        root: for a PyTorch file, the dotted path of the dictionary that the names are relative to.
        metadata: everything in the checkpoint that is not one of the tensors.
    """

    def __init__(
        self, path: Path, format: str, tensors: Mapping[str, LazyTensor], metadata: dict[str, Any], root: str = ""
    ):
        self.path = path
        self.format = format
        self.metadata = metadata
        self.root = root
        self._tensors = tensors
        self._closed = False

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, without reading it; bfloat16 and float8 are those of `ml_dtypes`."""
        return self[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, a fresh array at each call.

        Raises:
            CheckpointError: no tensor has this name, the source is closed, or the file has changed.
        """
        if self._closed:
            raise CheckpointError(f"{self.path} was closed; open it again with open_tensors.")
        return self[name].read()

    @property
    def nbytes(self) -> int:
        """Size of all tensors together, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def close(self) -> None:
        """End the reading. No file is held open between reads, so this only forbids further ones."""
        self._closed = True

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise _NoSuchTensor(f"{self.path} holds no tensor named {quoted(name)}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TensorSource({str(self.path)!r}, format={self.format!r}, tensors={len(self)})"


class _NoSuchTensor(CheckpointError, KeyError):
    """Also a `KeyError`, so that `in` and `get` work as for any mapping."""

    __str__ = Exception.__str__


def below(tensors: TensorSource, start: str) -> TensorSource:
    """Those tensors of a checkpoint whose names begin with `start`, without it; the metadata is that of the whole."""
    inside = {name.removeprefix(start): tensors[name] for name in tensors if name.startswith(start)}
    return TensorSource(tensors.path, tensors.format, inside, tensors.metadata, tensors.root)
