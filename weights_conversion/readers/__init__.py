r"""Foreign checkpoint files as `{name: array}`, read one tensor at a time.

| format | recognised by | what it needs |
| --- | --- | --- |
| safetensors | one file, `*.safetensors.index.json`, a directory | NumPy |
| PyTorch pickle | zip archive (PyTorch >= 1.6), the older stream, `*.bin.index.json` | NumPy, no PyTorch |
| CTranslate2 `model.bin` | binary versions 1 to 6 | NumPy |
| ONNX | `ModelProto` | NumPy |

Three promises hold for each of them:

- **Nothing in a file is executed.** A pickle is a program for a small stack machine whose one dangerous instruction
  calls a function by name. Here the program is decoded by `pickletools` and *interpreted as data*: a name stays a name,
  and only the few constructors listed in `_CONSTRUCTORS` have a meaning. Any other name ends the reading.
- **A header is checked before it is believed.** Sizes, offsets and shapes are compared with the length of the file
  before memory is allocated; a file that does not add up raises `CheckpointError` with one sentence. Nor does a small
  file keep the reader busy for ever: what a pickle makes of itself by repetition is counted, and has an end.
- **One tensor at a time.** A tensor is read when it is asked for, into a fresh array, by `seek` and `readinto`. Nothing
  is memory-mapped: pages of a mapped file count as resident memory until the kernel takes them back, which would double
  the memory that a conversion needs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pickletools
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from audiozoo.errors import CheckpointError, SourceError

__all__ = ["LazyTensor", "Record", "TensorSource", "open_tensors", "write_safetensors"]

_MAX_RANK = 32
_MAX_BROADCAST_BYTES = 64 << 20
_MAX_NAMES = 1 << 27  # characters in the names of all tensors, with 64 more for each: some million names
_MAX_COPIES = 64 << 20  # what the objects in a pickle may copy beyond four times its size


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that stay on disk
# ---------------------------------------------------------------------------------------------------------------------


class LazyTensor:
    """A tensor in a file: `shape` and `dtype` are known, `read()` returns its values as a fresh NumPy array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Read the values from disk; raises `CheckpointError` if the file ended or vanished since it was opened."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


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


@dataclass(frozen=True, repr=False)
class _Slab(LazyTensor):
    """A contiguous run of bytes in a file, in C order."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        return _fresh(self.path, self.offset, nbytes).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, repr=False)
class _Strided(LazyTensor):
    """A view into a PyTorch storage: `strides` count elements, the view begins at byte `offset` of the file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    conjugate: bool = False
    negate: bool = False

    def read(self) -> np.ndarray:
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.dtype)
        span = _span(self.shape, self.strides)
        stored = _fresh(self.path, self.offset, span * self.dtype.itemsize)
        if self.strides == _c_strides(self.shape):
            values = stored.view(self.dtype).reshape(self.shape)
        else:
            byte_strides = [stride * self.dtype.itemsize for stride in self.strides]
            values = np.ndarray(self.shape, self.dtype, stored.data, 0, byte_strides).copy()
        if self.conjugate:
            values = np.conj(values)
        return np.negative(values) if self.negate else values


@dataclass(frozen=True, repr=False)
class _InMemory(LazyTensor):
    """A small array that was part of the header itself (a NumPy array in a pickle, `float_data` in ONNX)."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.values.dtype

    def read(self) -> np.ndarray:
        return self.values.copy()


@dataclass(frozen=True, repr=False)
class _Dequantised(LazyTensor):
    r"""An integer weight and its scale: $W_{ij} = Q_{ij} / s_i$ (int8, a scale per row) or $Q_{ij} / s$ (int16)."""

    quantised: LazyTensor
    scale: np.ndarray
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.quantised.shape

    def read(self) -> np.ndarray:
        scale = self.scale.reshape(self.scale.shape + (1,) * (len(self.shape) - self.scale.ndim))
        return np.divide(self.quantised.read(), scale, dtype=np.float32)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements between the first and the last element of a strided view, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _checked_shape(shape: Iterable[Any], name: str) -> tuple[int, ...]:
    """`shape` as a tuple that NumPy can hold, or a `_Damaged` sentence."""
    sizes = tuple(shape)
    if len(sizes) > _MAX_RANK or not all(_is_count(size) for size in sizes):
        raise _Damaged(f"tensor {_quoted(name)} has an impossible shape")
    if math.prod(max(size, 1) for size in sizes) >= 1 << 58:
        raise _Damaged(f"tensor {_quoted(name)} has an impossible shape")
    return sizes


def _quoted(name: Any) -> str:
    """A name out of a file, fit for an error message: short, on one line.

    What is no name is not spelled out: a list that holds itself twice, and so on sixty times, has no end.
    """
    text = repr(str(name)) if isinstance(name, (str, int, _Global)) else f"a {type(name).__name__}"
    return text if len(text) <= 120 else text[:117] + "...'"


class _Damaged(Exception):
    """What is wrong with a file; `_parsing` adds which file and what to do."""


@contextlib.contextmanager
def _parsing(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file does to its parser into one sentence."""
    try:
        yield
    except (CheckpointError, SourceError):
        raise
    except _Damaged as error:
        raise CheckpointError(f"{path} is not a sound {kind} file: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        # A parser fed with random bytes fails in many ways (struct.error, zipfile.BadZipFile, UnicodeDecodeError, ...).
        # They all mean the same to the user; the original stays attached as the cause.
        raise CheckpointError(f"{path} is not a sound {kind} file: it is truncated or damaged.") from error


# ---------------------------------------------------------------------------------------------------------------------
# What a reader returns
# ---------------------------------------------------------------------------------------------------------------------


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
        self, path: Path, format: str, tensors: dict[str, LazyTensor], metadata: dict[str, Any], root: str = ""
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
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self._tensors.values())

    def close(self) -> None:
        """End the reading. No file is held open between reads, so this only forbids further ones."""
        self._closed = True

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise _NoSuchTensor(f"{self.path} holds no tensor named {_quoted(name)}.") from None

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


def open_tensors(path: str | os.PathLike[str], root: str | None = None) -> TensorSource:
    """Open a checkpoint of any known format; the content decides, not the suffix.

    Args:
        path: a file, a `*.index.json` of a sharded checkpoint, or a directory that holds one checkpoint (safetensors is
            taken before a PyTorch pickle, and that before CTranslate2 and ONNX).
        root: for PyTorch files, which dictionary holds the weights, as a dotted path ("model", "best_state.model", ""
            for the file's outermost dictionary). By default it is found: the first of `model_state_dict`, `state_dict`,
            `model`, `generator`, ... that holds tensors, else the outermost dictionary with tensors among its values.

    Raises:
        SourceError: there is no such file, or the directory holds no checkpoint.
        CheckpointError: the file is truncated, damaged, hostile or of an unknown format.
    """
    path = Path(path)
    if path.is_dir():
        path = _checkpoint_in(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist.")
    if not path.is_file():
        raise SourceError(f"{path} is not a file.")
    if path.name.endswith(".index.json"):
        source = _open_sharded(path)
    else:
        source = _open_file(path, root)
    if root is not None and source.format != "pytorch":
        raise CheckpointError(f"root={root!r} was given, but {path} is a {source.format} file, which has no nesting.")
    return source


_PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.bin",
    "model.onnx",
)


def _checkpoint_in(directory: Path) -> Path:
    for name in _PREFERRED:
        if (directory / name).is_file():
            return directory / name
    for pattern in ("*.safetensors", "*.pt", "*.pth", "*.th", "*.bin", "*.ckpt", "*.onnx"):
        found = sorted(p for p in directory.glob(pattern) if p.is_file() and not p.name.startswith("."))
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:8])
            raise SourceError(f"{directory} holds several checkpoints ({names}); name one of them.")
        if found:
            return found[0]
    raise SourceError(f"{directory} holds no checkpoint (looked for {', '.join(_PREFERRED)} and similar files).")


def _open_file(path: Path, root: str | None = None) -> TensorSource:
    with _parsing(path, "checkpoint"):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    if size == 0:
        raise CheckpointError(f"{path} is empty; copy or download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` beside it.")
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        raise CheckpointError(f"{path} is a web page, not a checkpoint; the download went wrong.")
    if head.startswith(b"PK\x03\x04"):
        return _open_torch_zip(path, root)
    if head.startswith(b"\x80") and path.suffix != ".safetensors":
        return _open_torch_legacy(path, root)
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and head[5:8] == b"\0\0\0"):
        return _open_safetensors(path)
    # A CTranslate2 file opens with a small version number and the length of a short string (version 1 has no string).
    if len(head) >= 6 and 1 <= int.from_bytes(head[:4], "little") <= 64:
        return _open_ctranslate2(path)
    if head.startswith(b"\x08") or path.suffix == ".onnx":
        return _open_onnx(path)
    raise CheckpointError(
        f"{path} is none of the known formats (safetensors, a PyTorch pickle, CTranslate2, ONNX); "
        "it may be truncated at its beginning or be something else."
    )


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: u64 length, JSON header, tensors back to back
# ---------------------------------------------------------------------------------------------------------------------

_SAFETENSORS_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
_MAX_SAFETENSORS_HEADER = 100_000_000  # the limit of the safetensors library


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Damaged(f"the name {_quoted(twice)} occurs twice")
    return made


def _open_safetensors(path: Path) -> TensorSource:
    with _parsing(path, "safetensors"):
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _Damaged(f"it has only {size} bytes")
            header_size = int.from_bytes(prefix, "little")
            if header_size > min(size - 8, _MAX_SAFETENSORS_HEADER):
                raise _Damaged(
                    f"its header claims {header_size} bytes and the file has {size}; it is truncated or damaged"
                )
            header = json.loads(file.read(header_size).decode(), object_pairs_hook=_json_object)
        if not isinstance(header, dict):
            raise _Damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise _Damaged("its __metadata__ is not a JSON object")

        begin, data_size = 8 + header_size, size - 8 - header_size
        tensors: dict[str, LazyTensor] = {}
        spans = []
        for name, entry in header.items():
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise _Damaged(f"tensor {_quoted(name)} has the unknown dtype {_quoted(entry['dtype'])}")
            shape = _checked_shape(entry["shape"], name)
            start, end = entry["data_offsets"]
            if not (_is_count(start) and _is_count(end) and start <= end):
                raise _Damaged(f"tensor {_quoted(name)} has impossible offsets")
            if end > data_size:
                raise _Damaged(
                    f"tensor {_quoted(name)} ends at byte {begin + end} and the file has {size}; it is truncated"
                )
            if end - start != math.prod(shape) * dtype.itemsize:
                raise _Damaged(
                    f"tensor {_quoted(name)} has {end - start} bytes, which is not its shape times its dtype"
                )
            spans.append((start, end, name))
            tensors[name] = _Slab(path, begin + start, shape, dtype)
        expected = 0
        for start, end, name in sorted(spans):
            if start != expected:
                raise _Damaged(f"tensor {_quoted(name)} overlaps its neighbour or leaves a gap before it")
            expected = end
        if expected != data_size:
            raise _Damaged(f"{data_size - expected} bytes at its end belong to no tensor")
    return TensorSource(path, "safetensors", tensors, metadata)


def _open_sharded(index: Path) -> TensorSource:
    """A `*.index.json` with a `weight_map` from tensor names to the files beside it."""
    with _parsing(index, "checkpoint index"):
        if index.stat().st_size > _MAX_SAFETENSORS_HEADER:
            raise _Damaged("it is larger than any index")
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_json_object)
        weight_map, metadata = content["weight_map"], content.get("metadata") or {}
        if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
            raise _Damaged("its weight_map is not a JSON object")
        for file in weight_map.values():
            # Only files beside the index: a path could lead anywhere.
            if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
                raise _Damaged(f"its weight_map names {_quoted(file)}, which is not a plain file name")
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise SourceError(f"{index} needs {len(files)} files, and these are not beside it: {', '.join(absent[:8])}.")
    shards = {file: _open_file(index.parent / file) for file in files}
    tensors: dict[str, LazyTensor] = {}
    for file, shard in shards.items():
        for name, tensor in shard.items():
            if weight_map.get(name, file) == file:
                if name in tensors:
                    raise CheckpointError(f"{index}: the tensor {_quoted(name)} is in two files and not in the index.")
                tensors[name] = tensor
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{index} lists {len(missing)} tensors that their files do not hold, the first being {_quoted(missing[0])}."
        )
    formats = {shard.format for shard in shards.values()} or {"safetensors"}
    if len(formats) > 1:
        raise CheckpointError(f"{index} mixes files of different formats ({', '.join(sorted(formats))}).")
    for shard in shards.values():
        metadata = {**shard.metadata, **metadata}
    return TensorSource(index, formats.pop(), tensors, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch: a pickle that describes tensors, and raw storages
# ---------------------------------------------------------------------------------------------------------------------

_TORCH_STORAGES = {
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
_TORCH_DTYPES = {
    "bool": np.dtype(np.bool_),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    **{
        name: np.dtype(name)
        for name in (
            *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
            *("float16", "float32", "float64", "complex64", "complex128"),
        )
    },
}
_ROOTS = ("model_state_dict", "state_dict", "model", "generator", "best_state", "model_state", "module")


@dataclass(frozen=True)
class _Global:
    """A name in a pickle, `module.qualname`. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a foreign class, kept as the data that its pickle holds; it has no behaviour.

    Attributes:
        class_name: "fairseq.data.dictionary.Dictionary".
        arguments: what the class would have been called with.
        state: what its `__setstate__` or `__dict__` would have received.
        elements: the items appended to it, if it was a list; `mapping`: the items set, if it was a dictionary.
    """

    class_name: str
    arguments: tuple = ()
    state: Any = None
    elements: list = field(default_factory=list)
    mapping: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.class_name})"


@dataclass(eq=False)
class _NumpyDtype:
    code: str

    def resolve(self) -> np.dtype:
        if not re.fullmatch(r"[<>|=]?([biufc]\d{1,2}|[SUV]\d{1,6}|\?|[bBhHiIlLqQefdgFD])", self.code):
            raise _Damaged(f"it holds a NumPy array of dtype {_quoted(self.code)}, which is not a plain number")
        return np.dtype(self.code)


@dataclass(eq=False)
class _NumpyArray:
    state: Any = None

    def resolve(self) -> np.ndarray:
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _NumpyDtype) or not isinstance(raw, bytes):
            raise _Damaged("it holds a NumPy array of Python objects")
        kind, sizes = dtype.resolve(), _checked_shape(shape, "a NumPy array")
        if math.prod(sizes) * kind.itemsize != len(raw):
            raise _Damaged("it holds a NumPy array whose bytes do not fill its shape")
        return np.frombuffer(raw, kind).reshape(sizes, order="F" if fortran else "C").copy()


@dataclass(frozen=True)
class _Storage:
    """Where a PyTorch storage lies: `numel` elements of `dtype` from byte `offset` of the file."""

    path: Path
    offset: int
    numel: int
    dtype: np.dtype


# Classes of projects whose checkpoints carry their configuration as objects. They become inert `Record`s.
_INERT_PACKAGES = {
    *("fairseq", "fairseq2", "omegaconf", "hydra", "audiocraft", "dora", "flashy", "pytorch_lightning", "lightning"),
    *("lightning_fabric", "transformers", "speechbrain", "espnet", "espnet2", "TTS", "pathlib", "enum", "datetime"),
}
_INERT_NAMES = {
    *("typing.Any", "typing.Union", "typing.Optional", "typing.List", "typing.Dict", "types.SimpleNamespace"),
    *("builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.bytes", "builtins.list"),
    *("builtins.dict", "builtins.tuple", "builtins.object", "builtins.NoneType", "uuid.UUID"),
    *("builtins.long", "builtins.unicode"),  # Python 2's names, which protocol 2 uses
    *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
}


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None, flags: Any = None
) -> LazyTensor:
    """`torch._utils._rebuild_tensor`: a view of `storage`, `offset` and `strides` counted in elements."""
    if not isinstance(storage, _Storage):
        raise _Damaged("a tensor in it has no storage")
    dtype = dtype or storage.dtype
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or not _is_count(offset):
        raise _Damaged("a tensor in it has an impossible shape")
    sizes = _checked_shape(shape, "in its pickle")
    if len(strides) != len(sizes) or not all(_is_count(stride) for stride in strides):
        raise _Damaged("a tensor in it has impossible strides")
    stored, wanted = storage.numel * storage.dtype.itemsize, math.prod(sizes) * dtype.itemsize
    if wanted and (offset + _span(sizes, strides)) * dtype.itemsize > stored:
        raise _Damaged("a tensor in it reaches beyond its storage")
    if wanted > max(stored, _MAX_BROADCAST_BYTES):
        raise _Damaged(f"a tensor in it blows {stored} bytes up to {wanted}")
    flags = flags if isinstance(flags, dict) else {}
    begin = storage.offset + offset * dtype.itemsize
    # The stride of an axis of length 1 is arbitrary.
    tight = tuple(c if size == 1 else s for s, c, size in zip(strides, _c_strides(sizes), sizes, strict=True))
    return _Strided(storage.path, begin, sizes, tight, dtype, bool(flags.get("conj")), bool(flags.get("neg")))


def _torch_dtype(name: Any) -> np.dtype:
    if not isinstance(name, _Global) or name.module != "torch" or name.name not in _TORCH_DTYPES:
        raise _Damaged(f"a tensor in it has the unknown dtype {_quoted(name)}")
    return _TORCH_DTYPES[name.name]


def _typed_tensor(storage, offset, shape, strides, requires_grad, hooks, dtype, flags=None) -> LazyTensor:
    return _tensor(storage, offset, shape, strides, _torch_dtype(dtype), flags)


def _subclass_tensor(function, kind, arguments, state) -> LazyTensor:
    name = _text(function)
    if name not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        raise _Damaged(f"it would call {_quoted(name)}")
    return _CONSTRUCTORS[name](*arguments)


def _text(value: Any) -> str:
    """What should be a name or a number, spelled."""
    if not isinstance(value, (str, int, _Global)):
        raise _Damaged(f"it has a {type(value).__name__} where a name belongs")
    return str(value)


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    if not isinstance(dtype, _NumpyDtype) or not isinstance(raw, bytes):
        raise _Damaged("it holds a NumPy scalar of a Python object")
    return np.frombuffer(raw, dtype.resolve(), count=1)[0].item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`: how protocol 2, which has no bytes, spells `bytes`."""
    return text.encode({"latin1": "latin-1"}.get(encoding, "utf-8"))


def _plain_list(items: Any = ()) -> list:
    if not isinstance(items, (list, tuple)):
        raise _Damaged("it builds a set from something that is not a list")
    return items if isinstance(items, list) else list(items)


def _pairs(items: Any = ()) -> dict:
    return {_key(key): value for key, value in _plain_list(items)}


# The only names in a pickle that mean something; all of them build plain data.
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda storage, offset, shape, strides: _tensor(storage, offset, shape, strides),
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, grad, hooks, flags=None: _tensor(
        storage, offset, shape, strides, flags=flags
    ),
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, grad, hooks: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
    "torch._tensor._rebuild_from_type_v2": _subclass_tensor,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda kind, index=None: _text(kind) if index is None else f"{_text(kind)}:{_text(index)}",
    "torch.serialization._get_layout": lambda name: name,
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": lambda factory=None, items=(): _pairs(items),
    "collections.Counter": lambda items=None: items if isinstance(items, dict) else _pairs(items or ()),
    "argparse.Namespace": lambda: argparse.Namespace(),
    "types.SimpleNamespace": lambda: argparse.Namespace(),
    "builtins.set": _plain_list,
    "builtins.frozenset": _plain_list,
    "builtins.complex": lambda real=0.0, imag=0.0: complex(float(real), float(imag)),
    "builtins.bytearray": lambda data=b"": bytes(data) if isinstance(data, bytes) else b"",
    "_codecs.encode": _encode,
    "numpy.dtype": lambda code, *_: _NumpyDtype(_text(code)),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda *_: _NumpyArray(),
}
_ALIASES = {"__builtin__.": "builtins.", "numpy._core.": "numpy.core.", "copy_reg.": "copyreg."}


def _canonical(name: _Global) -> str:
    text = str(name)
    for old, new in _ALIASES.items():
        if text.startswith(old):
            return new + text[len(old) :]
    return text


def _refusal(name: _Global) -> _Damaged:
    return _Damaged(
        f"its pickle names {_quoted(name)}, which is not on the list of harmless constructors, so it was not read "
        "(nothing was executed); a state dictionary saved with torch.save holds only tensors and plain values"
    )


def _known(name: _Global) -> _Global:
    """`name` if it may stand in a pickle at all; raises at once otherwise."""
    text = _canonical(name)
    package, _, rest = text.partition(".")
    harmless = (
        text in _CONSTRUCTORS
        or text in _INERT_NAMES
        or package in _INERT_PACKAGES
        or text == "copyreg._reconstructor"
        or text == "numpy.ndarray"
        or (package == "torch" and (rest in _TORCH_STORAGES or rest in _TORCH_DTYPES))
        or (package == "torch" and rest in ("Tensor", "strided", "Size", "device"))
    )
    if not harmless:
        raise _refusal(name)
    return name


def _key(key: Any) -> Any:
    """A dictionary key that hashes without recursion."""
    if isinstance(key, tuple):
        if len(key) > 64 or any(isinstance(part, tuple) for part in key):
            raise _Damaged("it holds a dictionary with nested keys")
        return tuple(_key(part) for part in key)
    if key is None or isinstance(key, (str, int, float, bool, bytes, complex, _Global)):
        return key
    if isinstance(key, Record):
        alone = len(key.arguments) == 1 and isinstance(key.arguments[0], (str, int, float))
        return str(key.arguments[0]) if alone else key.class_name
    raise _Damaged(f"it holds a dictionary whose keys are {type(key).__name__}s")


class _Mark:
    """The stack machine's MARK."""


class _PickleMachine:
    """Interprets a pickle as data. Opcodes are decoded by `pickletools.genops`; their meaning is defined here.

    Every opcode that would import, call or mutate foreign code is replaced by bookkeeping: `GLOBAL` pushes a `_Global`
    (or stops the reading), `REDUCE` and `NEWOBJ` consult `_CONSTRUCTORS` or build a `Record`, `BUILD` stores the state.

    Args:
        persistent: what a persistent id stands for.
        size: bytes of the pickle.
    """

    def __init__(self, persistent: Callable[[Any], Any], size: int):
        self.persistent = persistent
        self.room = 4 * size + _MAX_COPIES
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            handler = getattr(self, "op_" + name, None)
            if handler is not None:
                handler(argument)
            elif name in _LITERALS:
                self.stack.append(argument)
            else:
                raise _Damaged(f"its pickle uses the instruction {name}, which no checkpoint needs")
        raise _Damaged("its pickle does not end")

    def popmark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _Mark:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise _Damaged("its pickle is out of order")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _Damaged(f"its pickle calls {_quoted(type(function).__name__)}, which is not a name")
        name = _canonical(function)
        self.copies(*arguments)
        if name in _CONSTRUCTORS:
            return _CONSTRUCTORS[name](*arguments)
        if name == "copyreg._reconstructor":  # protocol 0 and 1: (class, base, state of the base)
            return self.call(arguments[0], ())
        if name.partition(".")[0] in _INERT_PACKAGES:
            return Record(name, arguments)
        raise _refusal(function)

    def copies(self, *values: Any) -> None:
        """Count what an instruction may copy: an object can be named again and again at a few bytes each time."""
        self.room -= sum(len(value) for value in values if isinstance(value, (str, bytes, list, tuple, dict)))
        if self.room < 0:
            raise _Damaged("it repeats its content without end")

    # Constants, stack and memo.
    def op_PROTO(self, version):
        pass

    op_FRAME = op_PROTO

    def op_NONE(self, _):
        self.stack.append(None)

    def op_NEWTRUE(self, _):
        self.stack.append(True)

    def op_NEWFALSE(self, _):
        self.stack.append(False)

    def op_BYTEARRAY8(self, data):
        self.stack.append(bytes(data))

    def op_MARK(self, _):
        self.stack.append(_Mark)

    def op_POP(self, _):
        self.stack.pop()

    def op_POP_MARK(self, _):
        self.popmark()

    def op_DUP(self, _):
        self.stack.append(self.stack[-1])

    def op_BINPUT(self, index):
        self.memo[index] = self.stack[-1]

    op_LONG_BINPUT = op_PUT = op_BINPUT

    def op_MEMOIZE(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def op_BINGET(self, index):
        self.stack.append(self.memo[index])

    op_LONG_BINGET = op_GET = op_BINGET

    # Containers. Sets become lists: nothing here needs to hash what a stranger wrote.
    def op_EMPTY_LIST(self, _):
        self.stack.append([])

    op_EMPTY_SET = op_EMPTY_LIST

    def op_EMPTY_DICT(self, _):
        self.stack.append({})

    def op_EMPTY_TUPLE(self, _):
        self.stack.append(())

    def op_TUPLE(self, _):
        self.stack.append(tuple(self.popmark()))

    def op_TUPLE1(self, _):
        self.stack[-1:] = [(self.stack[-1],)]

    def op_TUPLE2(self, _):
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_TUPLE3(self, _):
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_LIST(self, _):
        self.stack.append(self.popmark())

    op_FROZENSET = op_LIST

    def op_DICT(self, _):
        items = self.popmark()
        self.stack.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def op_APPEND(self, _):
        item = self.stack.pop()
        self.extend([item])

    def op_APPENDS(self, _):
        self.extend(self.popmark())

    op_ADDITEMS = op_APPENDS

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.elements if isinstance(target, Record) else target
        if not isinstance(target, list):
            raise _Damaged("its pickle is out of order")
        target.extend(items)

    def op_SETITEM(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def op_SETITEMS(self, _):
        self.update(self.popmark())

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.mapping if isinstance(target, Record) else target
        if not isinstance(target, dict):
            raise _Damaged("its pickle is out of order")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    # Names and objects.
    def op_GLOBAL(self, text):
        module, _, name = text.partition(" ")
        self.stack.append(_known(_Global(module, name)))

    def op_STACK_GLOBAL(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Damaged("its pickle is out of order")
        self.stack.append(_known(_Global(module, name)))

    def op_REDUCE(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    op_NEWOBJ = op_REDUCE

    def op_NEWOBJ_EX(self, _):
        keywords, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        made = self.call(function, arguments)
        if isinstance(made, Record):
            made.state = keywords
        self.stack.append(made)

    def op_BUILD(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        self.copies(state)
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise _Damaged("it holds a namespace without names")
            vars(target).update(state)
        elif isinstance(target, _NumpyArray):
            target.state = state
        elif isinstance(target, _NumpyDtype):
            if state[1] in ("<", ">"):
                target.code = state[1] + target.code.lstrip("<>|=")
        elif not isinstance(target, (dict, LazyTensor)):  # attributes of an OrderedDict or a Parameter
            raise _Damaged("its pickle is out of order")

    def op_BINPERSID(self, _):
        self.stack.append(self.persistent(self.stack.pop()))


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}


class _Bounded:
    """The readable rest of a file: never asks for more bytes than there are, whatever length a pickle claims."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def tell(self) -> int:
        return self.file.tell()

    def read(self, count: int) -> bytes:
        return self.file.read(max(0, min(count, self.size - self.file.tell())))

    def readline(self) -> bytes:
        return self.file.readline(1 << 20)


def _plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """Replace the machine's bookkeeping by plain values: NumPy arrays, and OmegaConf's nodes by their content."""
    if depth > 100:
        raise _Damaged("it is nested more than 100 levels deep")
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, (_NumpyArray, _NumpyDtype)):
        seen[id(value)] = made = value.resolve()
        return made
    if isinstance(value, _Global):
        return str(value)
    if isinstance(value, dict):
        seen[id(value)] = table = {}
        table.update({_plain(key): _plain(item, seen, depth + 1) for key, item in value.items()})
        return table
    if isinstance(value, list):
        items: list[Any] = []
        seen[id(value)] = items
        items.extend(_plain(item, seen, depth + 1) for item in value)
        return items
    if isinstance(value, tuple):
        seen[id(value)] = parts = tuple(_plain(item, seen, depth + 1) for item in value)
        return parts
    if isinstance(value, argparse.Namespace):
        seen[id(value)] = value
        for key, item in list(vars(value).items()):
            setattr(value, key, _plain(item, seen, depth + 1))
        return value
    if isinstance(value, Record):
        if value.class_name.startswith("omegaconf.") and isinstance(value.state, dict):
            content = next((value.state[key] for key in ("_content", "_val") if key in value.state), None)
            return _plain(content, seen, depth + 1)
        seen[id(value)] = value
        value.arguments = _plain(value.arguments, seen, depth + 1)
        value.state = _plain(value.state, seen, depth + 1)
        value.elements = _plain(value.elements, seen, depth + 1)
        value.mapping = _plain(value.mapping, seen, depth + 1)
    return value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (LazyTensor, np.ndarray))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(_is_tensor(item) for item in value.values())


def _find_root(tree: dict, seen: set[int] | None = None) -> tuple[str, ...]:
    """The path of the dictionary that holds the weights; see `open_tensors`. What was `seen` is not searched again."""
    seen = set() if seen is None else seen
    if id(tree) in seen:
        raise _NoTensors("it holds no tensor")
    seen.add(id(tree))
    for key in _ROOTS:
        if _has_tensors(tree.get(key)):
            return (key,)
    if _has_tensors(tree):
        return ()
    groups = [key for key, item in tree.items() if _has_tensors(item)]
    if len(groups) == 1:
        return (groups[0],)
    if groups:
        names = ", ".join(map(str, groups[:8]))
        raise _Damaged(f"it holds several groups of tensors ({names}); choose one with root=")
    for key in dict.fromkeys((*_ROOTS, *tree)):
        if isinstance(tree.get(key), dict):
            with contextlib.suppress(_NoTensors):
                return (key, *_find_root(tree[key], seen))
    raise _NoTensors("it holds no tensor")


class _NoTensors(_Damaged):
    pass


def _walk(tree: Any, root: str) -> tuple[Any, ...]:
    """The path of the keys that `root` names; a key may itself contain dots."""
    if root == "":
        return ()
    if isinstance(tree, dict):
        for key, item in tree.items():
            if str(key) == root:
                return (key,)
            if root.startswith(f"{key}."):
                with contextlib.suppress(_Damaged):
                    return (key, *_walk(item, root[len(str(key)) + 1 :]))
    raise _Damaged(f"it holds no dictionary {_quoted(root)}")


def _torch_source(path: Path, tree: Any, root: str | None) -> TensorSource:
    tree = _plain(tree)
    if _is_tensor(tree):
        tree = {"tensor": tree}
    if not isinstance(tree, dict):
        raise _Damaged(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
    keys = _find_root(tree) if root is None else _walk(tree, root)

    weights: Any = tree
    metadata: dict[str, Any] = {}
    level = metadata
    for i, key in enumerate(keys):
        level.update({other: item for other, item in weights.items() if other != key})
        weights = weights[key]
        if i + 1 < len(keys):
            level[key] = level = {}
    if not isinstance(weights, dict):
        raise _Damaged(f"{_quoted(root)} in it is not a dictionary")

    tensors: dict[str, LazyTensor] = {}
    room = _MAX_NAMES

    def flatten(prefix: str, value: Any) -> None:
        nonlocal room
        room -= len(prefix) + 64
        if room < 0:
            raise _Damaged("it repeats its content without end")
        if isinstance(value, LazyTensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
            if prefix in tensors:
                raise _Damaged(f"two tensors in it are named {_quoted(prefix)}")
            tensors[prefix] = value if isinstance(value, LazyTensor) else _InMemory(value)
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            metadata[prefix] = value

    with contextlib.suppress(RecursionError):
        flatten("", weights)
        if not tensors and root is None:
            raise _NoTensors("it holds no tensor")
        return TensorSource(path, "pytorch", tensors, metadata, ".".join(map(str, keys)))
    raise _Damaged("it holds a dictionary that contains itself")


def _storage_key(pid: Any) -> tuple[np.dtype, str, int, Any]:
    """A persistent id: `("storage", type, key, device, numel)`, with a fifth entry in the older format."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        what = _quoted(pid[0]) if isinstance(pid, tuple) and pid else "nothing"
        raise _Damaged(f"its pickle refers to {what} where only tensor storages belong")
    _, kind, key, _, numel = pid[:5]
    key = _text(key)
    name = kind.name.rpartition(".")[2] if isinstance(kind, _Global) else ""
    if name not in _TORCH_STORAGES:
        raise _Damaged(f"it holds a storage of the unknown type {_quoted(kind)}")
    if not _is_count(numel):
        raise _Damaged("it holds a storage of impossible size")
    return _TORCH_STORAGES[name], key, numel, pid[5] if len(pid) == 6 else None


def _open_torch_zip(path: Path, root: str | None) -> TensorSource:
    """`torch.save` since PyTorch 1.6: `NAME/data.pkl`, and one stored record `NAME/data/KEY` per storage."""
    with _parsing(path, "PyTorch"), path.open("rb") as file:
        size = path.stat().st_size
        archive = zipfile.ZipFile(file)
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(records) != len(archive.infolist()):
            raise _Damaged("its archive names one record twice")
        if len(pickles) != 1:
            raise _Damaged("it is a zip archive without the data.pkl that torch.save writes")
        prefix = pickles[0][: -len("data.pkl")]
        if prefix + "constants.pkl" in records:
            raise _Damaged("it is a TorchScript program (torch.jit.save), not a state dictionary")

        def locate(name: str) -> tuple[int, int]:
            """Offset and length of a stored record, from its local header."""
            info = records.get(name)
            if info is None:
                raise _Damaged(f"its archive lacks the record {_quoted(name)}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _Damaged(f"its record {_quoted(name)} is compressed, which torch.save never does")
            file.seek(info.header_offset)
            local = file.read(30)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise _Damaged(f"the header of its record {_quoted(name)} is damaged")
            name_size, extra_size = struct.unpack("<HH", local[26:30])
            offset = info.header_offset + 30 + name_size + extra_size
            if offset + info.file_size > size:
                raise _Damaged(f"its record {_quoted(name)} reaches beyond the end of the file")
            return offset, info.file_size

        def record(name: str) -> bytes:
            offset, length = locate(name)
            file.seek(offset)
            return file.read(length)

        if prefix + "byteorder" in records and record(prefix + "byteorder") != b"little":
            raise _Damaged("it was written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def persistent(pid: Any) -> _Storage:
            dtype, key, numel, _ = _storage_key(pid)
            if key not in storages:
                offset, length = locate(f"{prefix}data/{key}")
                if numel * dtype.itemsize > length:
                    raise _Damaged(f"its storage {_quoted(key)} has {length} bytes instead of {numel * dtype.itemsize}")
                storages[key] = _Storage(path, offset, length // dtype.itemsize, dtype)
            found = storages[key]
            return _Storage(path, found.offset, numel, dtype) if found.dtype != dtype else found

        pickled = record(prefix + "data.pkl")
        tree = _PickleMachine(persistent, len(pickled)).run(io.BytesIO(pickled))
        return _torch_source(path, tree, root)


_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001


def _open_torch_legacy(path: Path, root: str | None) -> TensorSource:
    """`torch.save` before 1.6: magic, protocol, system, object and storage keys as five pickles, then the storages."""
    with _parsing(path, "PyTorch"), path.open("rb") as file:
        size = path.stat().st_size
        stream = _Bounded(file, size)

        def constant() -> Any:
            return _PickleMachine(lambda pid: None, size).run(stream)

        magic = constant()
        if magic != _TORCH_MAGIC:
            raise _Damaged("it is a pickle, but not one that torch.save wrote")
        if constant() != _TORCH_PROTOCOL:
            raise _Damaged("it has an unknown protocol version")
        system = constant()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise _Damaged("it was written on a big-endian machine")

        # The object comes before the storages that it refers to: pass over it once to learn the storages' types,
        # find where they lie, and then read it again with the offsets at hand.
        declared: dict[str, tuple[np.dtype, int]] = {}

        def declare(pid: Any) -> _Storage:
            dtype, key, numel, view = _storage_key(pid)
            if view is not None:
                raise _Damaged("it holds a view of a storage, which PyTorch has not written since version 0.4")
            declared[key] = (dtype, numel)
            return _Storage(path, 0, numel, dtype)

        begin = file.tell()
        _PickleMachine(declare, size).run(stream)
        keys = constant()
        if not isinstance(keys, list):
            raise _Damaged("its list of storages is damaged")
        storages: dict[str, _Storage] = {}
        position = file.tell()
        for key in map(_text, keys):
            if key not in declared:
                raise _Damaged(f"its storage {_quoted(key)} belongs to no tensor")
            dtype, numel = declared[key]
            file.seek(position)
            count = file.read(8)
            if len(count) < 8 or int.from_bytes(count, "little") != numel:
                raise _Damaged(f"its storage {_quoted(key)} does not have the size that its tensors expect")
            storages[key] = _Storage(path, position + 8, numel, dtype)
            position += 8 + numel * dtype.itemsize
            if position > size:
                raise _Damaged(f"it ends inside the storage {_quoted(key)}; it is truncated")

        def persistent(pid: Any) -> _Storage:
            _, key, _, _ = _storage_key(pid)
            if key not in storages:
                raise _Damaged(f"it lacks the storage {_quoted(key)}")
            return storages[key]

        file.seek(begin)
        tree = _PickleMachine(persistent, size).run(stream)
        return _torch_source(path, tree, root)


# ---------------------------------------------------------------------------------------------------------------------
# CTranslate2: version, specification name, variables, aliases; little-endian, unaligned
# ---------------------------------------------------------------------------------------------------------------------

_CTRANSLATE2_DTYPES = (
    np.dtype(np.float32),
    np.dtype(np.int8),
    np.dtype(np.int16),
    np.dtype(np.int32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)
_CTRANSLATE2_BY_SIZE = {4: np.dtype(np.float32), 2: np.dtype(np.int16), 1: np.dtype(np.int8)}  # before version 4
_CTRANSLATE2_VERSION = 6
_CTRANSLATE2_INT16_SCALE = np.array(1000, np.float32)  # of int16 models that store none


class _Stream:
    """Little-endian values from a file of known size."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise _Damaged(f"it ends at byte {self.size}, in the middle of its table of variables; it is truncated")
        return data

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        """A u16 length that counts the closing NUL, then the bytes."""
        data = self.take(self.unsigned(2))
        if not data.endswith(b"\0"):
            raise _Damaged("a name in it does not end in NUL")
        return data[:-1].decode()


def _open_ctranslate2(path: Path) -> TensorSource:
    """`model.bin`. Scalars, which are settings rather than weights, go to `metadata["scalars"]`."""
    with _parsing(path, "CTranslate2"), path.open("rb") as file:
        size = path.stat().st_size
        stream = _Stream(file, size)
        version = stream.unsigned(4)
        if not 1 <= version <= _CTRANSLATE2_VERSION:
            raise _Damaged(f"it has the binary version {version}, and versions 1 to {_CTRANSLATE2_VERSION} are known")
        spec, revision = (stream.string(), stream.unsigned(4)) if version >= 2 else ("TransformerBase", 1)

        variables: dict[str, _Slab] = {}
        for _ in range(stream.unsigned(4)):
            name = stream.string()
            rank = stream.unsigned(1)
            shape = _checked_shape([stream.unsigned(4) for _ in range(rank)], name)
            if version >= 4:
                kind = stream.unsigned(1)
                if kind >= len(_CTRANSLATE2_DTYPES):
                    raise _Damaged(f"variable {_quoted(name)} has the unknown dtype number {kind}")
                dtype, nbytes = _CTRANSLATE2_DTYPES[kind], stream.unsigned(4)
            else:
                itemsize = stream.unsigned(1)
                if itemsize not in _CTRANSLATE2_BY_SIZE:
                    raise _Damaged(f"variable {_quoted(name)} has items of {itemsize} bytes")
                dtype, nbytes = _CTRANSLATE2_BY_SIZE[itemsize], stream.unsigned(4) * itemsize
            # num_bytes is a u32 and wraps around in tensors of 4 GiB and more.
            length = math.prod(shape) * dtype.itemsize
            if nbytes != length & 0xFFFFFFFF:
                raise _Damaged(f"variable {_quoted(name)} has {nbytes} bytes, which is not its shape times its dtype")
            if name in variables:
                raise _Damaged(f"the variable {_quoted(name)} occurs twice")
            offset = file.tell()
            if offset + length > size:
                raise _Damaged(f"it ends at byte {size}, inside the variable {_quoted(name)}; it is truncated")
            variables[name] = _Slab(path, offset, shape, dtype)
            file.seek(offset + length)
        aliases: dict[str, str] = {}
        if version >= 3:
            for _ in range(stream.unsigned(4)):
                alias, target = stream.string(), stream.string()
                if target not in variables:
                    raise _Damaged(f"its alias {_quoted(alias)} points to {_quoted(target)}, which it does not hold")
                aliases[alias] = target
        if file.tell() != size:
            raise _Damaged(f"{size - file.tell()} bytes at its end belong to no variable")

        tensors: dict[str, LazyTensor] = {}
        scalars: dict[str, int | float] = {}
        quantisation: dict[str, str] = {}
        for name, variable in variables.items():
            base = name.removesuffix("_scale")
            if base != name and base in variables and variables[base].dtype.kind == "i":
                continue
            if variable.dtype.kind == "i" and variable.shape:
                tensors[name] = _dequantised(name, variable, variables.get(name + "_scale"))
                quantisation[name] = variable.dtype.name
            elif not variable.shape:
                scalars[name] = variable.read().item()
            else:
                tensors[name] = variable
    metadata = {
        "spec": spec,
        "revision": revision,
        "binary_version": version,
        "scalars": scalars,
        "aliases": aliases,
        "quantization": quantisation,
    }
    return TensorSource(path, "ctranslate2", tensors, metadata)


def _dequantised(name: str, variable: _Slab, scale: _Slab | None) -> LazyTensor:
    if variable.dtype == np.int16 and scale is None:
        return _Dequantised(variable, _CTRANSLATE2_INT16_SCALE)
    if variable.dtype == np.int32 or scale is None:
        raise _Damaged(f"variable {_quoted(name)} is quantised in a way that is not int8 or int16 with a scale")
    if scale.dtype.kind == "i" or scale.shape not in ((), (1,), variable.shape[:1]):
        raise _Damaged(f"the scale of {_quoted(name)} has shape {scale.shape} for a weight of shape {variable.shape}")
    values = scale.read().astype(np.float32)
    if not np.all(np.isfinite(values) & (values != 0)):
        raise _Damaged(f"the scale of {_quoted(name)} is zero or not finite")
    return _Dequantised(variable, values.reshape(()) if values.size == 1 else values)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX: a protocol buffer; only the fields that carry weights and the graph's wiring are decoded
# ---------------------------------------------------------------------------------------------------------------------

_ONNX_DTYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    14: np.dtype(np.complex64),
    15: np.dtype(np.complex128),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    19: np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class _Message:
    """A protocol-buffer message: bytes `begin` to `end` of a file."""

    file: BinaryIO
    begin: int
    end: int

    def fields(self) -> Iterator[tuple[int, Any]]:
        """Field number and value: int for a varint, bytes for a fixed size, a `_Message` for what has a length."""
        position = self.begin
        while position < self.end:
            self.file.seek(position)
            key = self._varint()
            number, wire = key >> 3, key & 7
            if wire == 0:
                value: Any = self._varint()
                position = self.file.tell()
            elif wire in (1, 5):
                value = self.file.read(8 if wire == 1 else 4)
                position = self.file.tell()
            elif wire == 2:
                length = self._varint()
                begin = self.file.tell()
                position = begin + length
                value = _Message(self.file, begin, position)
            else:
                raise _Damaged("it is not a protocol buffer")
            if position > self.end or number == 0:
                raise _Damaged("it is not a protocol buffer, or it is truncated")
            yield number, value

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.file.read(1)
            if not byte:
                raise _Damaged("it is truncated")
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise _Damaged("it is not a protocol buffer")

    @property
    def length(self) -> int:
        return self.end - self.begin

    def data(self) -> bytes:
        self.file.seek(self.begin)
        return self.file.read(self.length)

    def text(self) -> str:
        return self.data().decode()

    def varints(self) -> Iterator[int]:
        """A packed repeated field."""
        self.file.seek(self.begin)
        inner = _Message(io.BytesIO(self.data()), 0, self.length)
        while inner.file.tell() < self.length:
            yield inner._varint()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _repeated_ints(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value.varints())


def _repeated_fixed(value: Any, code: str) -> list[float]:
    raw = value if isinstance(value, bytes) else value.data()
    return np.frombuffer(raw, code).tolist()


def _onnx_tensor(message: _Message, path: Path) -> tuple[str, LazyTensor]:
    """`TensorProto`: dims 1, data_type 2, name 8, values in raw_data 9 or in the typed fields 4, 5, 7, 10, 11."""
    dims: list[int] = []
    kind, name, external = 0, "", False
    raw: _Message | None = None
    location: dict[str, str] = {}
    typed: list[Any] = []
    for number, value in message.fields():
        if number == 1:
            dims += map(_signed, _repeated_ints(value))
        elif number == 2:
            kind = value
        elif number == 8:
            name = value.text()
        elif number == 9:
            raw = value
        elif number in (5, 7, 11):
            typed += _repeated_ints(value)
        elif number == 4:
            typed += _repeated_fixed(value, "<f4")
        elif number == 10:
            typed += _repeated_fixed(value, "<f8")
        elif number == 13:
            entry = dict(value.fields())
            location[entry[1].text()] = entry[2].text()
        elif number == 14:
            external = value == 1
    if kind not in _ONNX_DTYPES:
        raise _Damaged(f"tensor {_quoted(name)} has the dtype number {kind}, which is not a number type")
    dtype, shape = _ONNX_DTYPES[kind], _checked_shape(dims, name)
    nbytes = math.prod(shape) * dtype.itemsize
    if external:
        return name, _onnx_external(path, location, name, shape, dtype)
    if raw is not None:
        if raw.length != nbytes:
            raise _Damaged(f"tensor {_quoted(name)} has {raw.length} bytes, which is not its shape times its dtype")
        return name, _Slab(path, raw.begin, shape, dtype)
    if dtype.kind == "c":
        values = np.array(typed, np.float64).view(np.complex128)
    elif dtype.kind in "iu":
        values = np.array([_signed(item) if dtype.kind == "i" else item for item in typed], object)
    elif dtype.kind == "f" and dtype.itemsize >= 4:
        values = np.array(typed, np.float64)
    elif dtype.kind == "b":
        values = np.array(typed, np.uint64)
    else:  # float16, bfloat16 and float8 stand as their bit patterns in int32_data
        values = np.array(typed, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)
    if values.size != math.prod(shape):
        raise _Damaged(f"tensor {_quoted(name)} has {values.size} values, which do not fill its shape")
    return name, _InMemory(values.astype(dtype).reshape(shape))


def _onnx_external(
    path: Path, location: dict[str, str], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> LazyTensor:
    file = location.get("location", "")
    if file in ("", ".", "..") or re.search(r"[/\\\0]", file):
        raise _Damaged(f"tensor {_quoted(name)} lies in {_quoted(file)}, which is not a file beside it")
    offset, nbytes = int(location.get("offset", "0")), math.prod(shape) * dtype.itemsize
    beside = path.parent / file
    if not beside.is_file():
        raise SourceError(f"{path} keeps its weights in {file}, which is not beside it.")
    if offset < 0 or offset + nbytes > beside.stat().st_size:
        raise _Damaged(f"tensor {_quoted(name)} reaches beyond the end of {file}")
    return _Slab(beside, offset, shape, dtype)


def _onnx_attribute(message: _Message, path: Path, depth: int) -> tuple[str, Any]:
    """`AttributeProto`: name 1, then the value in the field of its type."""
    name, value = "", None
    lists: dict[int, list[Any]] = {}
    for number, item in message.fields():
        if number == 1:
            name = item.text()
        elif number == 2:
            value = struct.unpack("<f", item)[0]
        elif number == 3:
            value = _signed(item)
        elif number == 4:
            value = item.data().decode("utf-8", "surrogateescape")
        elif number == 5:
            value = _onnx_tensor(item, path)[1]
        elif number == 6:
            value = _onnx_graph(item, path, depth + 1)[0]
        elif number == 7:
            lists.setdefault(7, []).extend(_repeated_fixed(item, "<f4"))
        elif number == 8:
            lists.setdefault(8, []).extend(map(_signed, _repeated_ints(item)))
        elif number == 9:
            lists.setdefault(9, []).append(item.data().decode("utf-8", "surrogateescape"))
        elif number == 10:
            lists.setdefault(10, []).append(_onnx_tensor(item, path)[1])
        elif number == 20 and item in (6, 7, 8, 9):
            lists.setdefault(item, [])
    if value is None and lists:
        value = [entry for items in lists.values() for entry in items]
    return name, value


def _onnx_node(message: _Message, path: Path, depth: int) -> dict[str, Any]:
    """`NodeProto`: input 1, output 2, name 3, op_type 4, attribute 5, domain 7."""
    node: dict[str, Any] = {"name": "", "op_type": "", "domain": "", "inputs": [], "outputs": [], "attributes": {}}
    for number, value in message.fields():
        if number == 1:
            node["inputs"].append(value.text())
        elif number == 2:
            node["outputs"].append(value.text())
        elif number in (3, 4, 7):
            node[{3: "name", 4: "op_type", 7: "domain"}[number]] = value.text()
        elif number == 5:
            name, attribute = _onnx_attribute(value, path, depth)
            node["attributes"][name] = attribute
    return node


def _onnx_graph(message: _Message, path: Path, depth: int = 0) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """`GraphProto`: node 1, name 2, initializer 5, input 11, output 12."""
    if depth > 8:
        raise _Damaged("its graphs are nested more than 8 levels deep")
    graph: dict[str, Any] = {"name": "", "nodes": [], "inputs": [], "outputs": []}
    tensors: dict[str, LazyTensor] = {}
    for number, value in message.fields():
        if number == 1:
            graph["nodes"].append(_onnx_node(value, path, depth))
        elif number == 2:
            graph["name"] = value.text()
        elif number == 5:
            name, tensor = _onnx_tensor(value, path)
            if not name or name in tensors:
                raise _Damaged(f"an initializer in it has no name of its own ({_quoted(name)})")
            tensors[name] = tensor
        elif number in (11, 12):
            entry = next((item.text() for field_number, item in value.fields() if field_number == 1), "")
            graph["inputs" if number == 11 else "outputs"].append(entry)
    if depth and tensors:
        graph["initializers"] = tensors
    return graph, tensors


def _open_onnx(path: Path) -> TensorSource:
    """`ModelProto`: ir_version 1, producer 2 and 3, graph 7, opset_import 8, metadata_props 14."""
    metadata: dict[str, Any] = {"ir_version": 0, "producer": "", "opset": {}, "properties": {}}
    tensors: dict[str, LazyTensor] = {}
    with _parsing(path, "ONNX"), path.open("rb") as file:
        for number, value in _Message(file, 0, path.stat().st_size).fields():
            if number == 1:
                metadata["ir_version"] = value
            elif number in (2, 3):
                metadata["producer"] = f"{metadata['producer']} {value.text()}".strip()
            elif number == 7:
                metadata["graph"], tensors = _onnx_graph(value, path)
            elif number == 8:
                entry = dict(value.fields())
                metadata["opset"][entry[1].text() if 1 in entry else ""] = entry.get(2, 0)
            elif number == 14:
                entry = dict(value.fields())
                metadata["properties"][entry[1].text()] = entry[2].text() if 2 in entry else ""
        if "graph" not in metadata:
            raise _Damaged("it holds no graph")
        if not metadata["opset"]:  # mandatory, and written after the graph
            raise _Damaged("it names no operator set; it may be truncated")
    return TensorSource(path, "onnx", tensors, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Writing safetensors
# ---------------------------------------------------------------------------------------------------------------------

_HEADER_ROOM = 1 << 20  # left free at the start of a shard that is being written
_IN_PLACE_BYTES = 64 << 20  # a shard smaller than this is copied behind a header without padding


class _Shard:
    """A safetensors file in the making: tensors are appended as they come, the header is known at the end.

    The first mebibyte of the temporary file is left free, so that the header of a large shard is filled in without
    moving data (its rest is padded with blanks, as the format allows). A small shard, or one in which the order of
    arrival would leave a tensor unaligned, is copied once into its final order.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        handle, name = tempfile.mkstemp(prefix=".model-", suffix=".safetensors.tmp", dir=directory)
        self.path = Path(name)
        self.file = os.fdopen(handle, "w+b", buffering=0)
        self.file.seek(_HEADER_ROOM)
        self.entries: list[tuple[str, str, tuple[int, ...], int, int, int]] = []
        self.nbytes = 0

    def append(self, name: str, values: np.ndarray) -> None:
        array = np.ascontiguousarray(values)
        code = _SAFETENSORS_NAMES[array.dtype]
        view, written = array.reshape(-1).view(np.uint8).data, 0
        while written < array.nbytes:
            written += self.file.write(view[written : written + (256 << 20)])
        self.entries.append((name, code, values.shape, self.nbytes, array.nbytes, array.dtype.itemsize))
        self.nbytes += array.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        aligned = all(start % itemsize == 0 for _, _, _, start, _, itemsize in self.entries)
        header = _safetensors_header(self.entries, metadata)
        if aligned and self.nbytes >= _IN_PLACE_BYTES and len(header) <= _HEADER_ROOM - 8:
            self.file.seek(0)
            self.file.write((_HEADER_ROOM - 8).to_bytes(8, "little") + header.ljust(_HEADER_ROOM - 8))
        else:
            self._copy_in_order(metadata)
        os.fsync(self.file.fileno())
        self.file.close()
        self.path.chmod(0o666 & ~_umask())

    def _copy_in_order(self, metadata: Mapping[str, str]) -> None:
        """Wide dtypes first, then by name, as the safetensors library orders them; this keeps every tensor aligned."""
        order = sorted(self.entries, key=lambda entry: (-entry[5], entry[0]))
        moved, position = [], 0
        for name, code, shape, _, nbytes, itemsize in order:
            moved.append((name, code, shape, position, nbytes, itemsize))
            position += nbytes
        handle, target = tempfile.mkstemp(prefix=".model-", suffix=".safetensors.tmp", dir=self.directory)
        with os.fdopen(handle, "w+b", buffering=0) as copy:
            header = _safetensors_header(moved, metadata)
            copy.write(len(header).to_bytes(8, "little") + header)
            for _, _, _, start, nbytes, _ in order:
                self.file.seek(_HEADER_ROOM + start)
                while nbytes:
                    chunk = self.file.read(min(nbytes, 8 << 20))
                    copy.write(chunk)
                    nbytes -= len(chunk)
        self.file.close()
        Path(target).replace(self.path)
        self.file = self.path.open("r+b", buffering=0)

    def discard(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _safetensors_header(entries: Iterable[tuple], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, code, shape, start, nbytes, _ in entries:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, start + nbytes]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return encoded.ljust(-(-len(encoded) // 8) * 8)


def write_safetensors(
    directory: str | os.PathLike[str],
    items: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors as `save_pretrained` does, one at a time, so that peak memory is one tensor.

    Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` with `model.safetensors.index.json` when the
    tensors need more than one file of `max_shard_bytes`. Files appear under their names only when all of them are
    complete; an error, also one raised by `items`, leaves the directory as it was. Weights of an earlier export are
    replaced.

    Args:
        directory: made if it does not exist.
        items: pairs of name and array; consumed lazily.
        max_shard_bytes: largest file; a single tensor above it gets a file of its own.
        metadata: strings for the header; `{"format": "pt"}`, which `transformers` wants to see, by default.

    Returns:
        The paths written, the index last.

    Raises:
        CheckpointError: a name occurs twice, a dtype has no safetensors name, or there is nothing to write.
    """
    metadata = {"format": "pt"} if metadata is None else metadata
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[_Shard] = []
    names: set[str] = set()
    try:
        for name, values in items:
            values = np.asarray(values)
            if name in names or name == "__metadata__":
                raise CheckpointError(f"The tensor {_quoted(name)} was given twice (or its name is reserved).")
            if values.dtype not in _SAFETENSORS_NAMES:
                raise CheckpointError(f"The tensor {_quoted(name)} has dtype {values.dtype}, unknown to safetensors.")
            names.add(name)
            if not shards or (shards[-1].nbytes and shards[-1].nbytes + values.nbytes > max_shard_bytes):
                if shards:
                    shards[-1].finish(metadata)
                shards.append(_Shard(directory))
            shards[-1].append(name, values)
        if not shards:
            raise CheckpointError(f"There is no tensor to write to {directory}.")
        shards[-1].finish(metadata)
        return _publish(directory, shards)
    finally:
        for shard in shards:
            shard.discard()


def _publish(directory: Path, shards: list[_Shard]) -> list[Path]:
    """Give the finished files their names, the index last, and remove those of an earlier export."""
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    index = directory / "model.safetensors.index.json"
    for shard, name in zip(shards, names, strict=True):
        shard.path.replace(directory / name)
    written = [directory / name for name in names]
    if count > 1:
        weight_map = {entry[0]: name for shard, name in zip(shards, names, strict=True) for entry in shard.entries}
        content = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        temporary = directory / f".{index.name}.tmp"
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(index)
        written.append(index)
    for old in directory.iterdir():
        stale = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name)
        if stale and old not in written:
            old.unlink()
    return written
