"""PyTorch: a pickle that describes tensors, and their raw storages; as a zip archive, or in one older stream."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from weights_conversion.readers import pickles
from weights_conversion.readers.checks import Damaged, checked_shape, is_count, parsing, quoted
from weights_conversion.readers.pickles import Global, Machine, plain, quoted_object, spelled
from weights_conversion.readers.tensors import InMemory, LazyTensor, Strided, TensorSource, c_strides, span

_MAX_BROADCAST_BYTES = 64 << 20  # of a tensor that is larger than its storage
_MAX_NAMES = 1 << 27  # characters in the names of all tensors, with 64 more for each: some million names


# --- tensors as views of storages ------------------------------------------------------------------------------------

_STORAGES = {
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
_DTYPES = {
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


@dataclass(frozen=True)
class _Storage:
    """Where a PyTorch storage lies: `numel` elements of `dtype` from byte `offset` of the file."""

    path: Path
    offset: int
    numel: int
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None, flags: Any = None
) -> LazyTensor:
    """`torch._utils._rebuild_tensor`: a view of `storage`, `offset` and `strides` counted in elements."""
    if not isinstance(storage, _Storage):
        raise Damaged("a tensor in it has no storage")
    dtype = dtype or storage.dtype
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or not is_count(offset):
        raise Damaged("a tensor in it has an impossible shape")
    sizes = checked_shape(shape, "a tensor in it")
    if len(strides) != len(sizes) or not all(map(is_count, strides)):
        raise Damaged("a tensor in it has impossible strides")
    flags = flags if isinstance(flags, dict) else {}
    begin = storage.offset + offset * dtype.itemsize
    # The stride of an axis of length 1 is arbitrary.
    tight = tuple(c if size == 1 else s for s, c, size in zip(strides, c_strides(sizes), sizes, strict=True))
    view = Strided(storage.path, begin, sizes, tight, dtype, bool(flags.get("conj")), bool(flags.get("neg")))
    if view.nbytes and (offset + span(sizes, strides)) * dtype.itemsize > storage.nbytes:
        raise Damaged("a tensor in it reaches beyond its storage")
    if view.nbytes > max(storage.nbytes, _MAX_BROADCAST_BYTES):
        raise Damaged(f"a tensor in it blows {storage.nbytes} bytes up to {view.nbytes}")
    return view


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, Global) or name.module != "torch" or name.name not in _DTYPES:
        raise Damaged(f"a tensor in it has the unknown dtype {quoted_object(name)}")
    return _DTYPES[name.name]


def _typed_tensor(storage, offset, shape, strides, requires_grad, hooks, dtype, flags=None) -> LazyTensor:
    return _tensor(storage, offset, shape, strides, _dtype(dtype), flags)


def _subclass_tensor(function, kind, arguments, state) -> LazyTensor:
    name = spelled(function)
    if name not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        raise Damaged(f"it would call {quoted(name)}")
    return _CONSTRUCTORS[name](*arguments)


# Names with a meaning beside those of `pickles.py`; all of them build plain data.
_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    **pickles.CONSTRUCTORS,
    "torch._utils._rebuild_tensor": lambda storage, offset, shape, strides: _tensor(storage, offset, shape, strides),
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, grad, hooks, flags=None: _tensor(
        storage, offset, shape, strides, flags=flags
    ),
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, grad, hooks: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
    "torch._tensor._rebuild_from_type_v2": _subclass_tensor,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda kind, index=None: spelled(kind) if index is None else f"{spelled(kind)}:{spelled(index)}",
    "torch.serialization._get_layout": lambda name: name,
}
_NAMES = {
    *pickles.NAMES,
    *(f"torch.{name}" for name in (*_STORAGES, *_DTYPES, "Tensor", "strided")),
    *("torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
}


def _machine(persistent: Callable[[_StorageId], Any], size: int) -> Machine:
    """The machine for a pickle of `size` bytes, in which persistent ids stand for storages alone."""
    return Machine(lambda pid: persistent(_storage_id(pid)), size, _CONSTRUCTORS, _NAMES)


class _StorageId(NamedTuple):
    """What a pickle says of a storage that it refers to."""

    dtype: np.dtype
    key: str
    numel: int
    view: Any  # of the older format: which part of another storage


def _storage_id(pid: Any) -> _StorageId:
    """A persistent id: `("storage", type, key, device, numel)`, with a fifth entry in the older format."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        what = quoted_object(pid[0]) if isinstance(pid, tuple) and pid else "nothing"
        raise Damaged(f"its pickle refers to {what} where only tensor storages belong")
    _, kind, key, _, numel = pid[:5]
    key = spelled(key)
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    if name not in _STORAGES:
        raise Damaged(f"it holds a storage of the unknown type {quoted_object(kind)}")
    if not is_count(numel):
        raise Damaged("it holds a storage of impossible size")
    return _StorageId(_STORAGES[name], key, numel, pid[5] if len(pid) == 6 else None)


# --- the dictionary that holds the weights ---------------------------------------------------------------------------

_ROOTS = ("model_state_dict", "state_dict", "model", "generator", "best_state", "model_state", "module")


class _NoTensors(Damaged):
    """There is no tensor in a part of the tree, or in all of it."""


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (LazyTensor, np.ndarray))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(_is_tensor(item) for item in value.values())


def _find_root(tree: dict, seen: set[int] | None = None) -> tuple[Any, ...]:
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
        raise Damaged(
            f"it holds several groups of tensors ({names}), none by a name of a model's ({', '.join(_ROOTS)})"
        )
    for key in dict.fromkeys((*_ROOTS, *tree)):
        if isinstance(tree.get(key), dict):
            with contextlib.suppress(_NoTensors):
                return (key, *_find_root(tree[key], seen))
    raise _NoTensors("it holds no tensor")


def _path_to(tree: Any, root: str) -> tuple[Any, ...]:
    """The path of the keys that `root` names; a key may itself contain dots."""
    if root == "":
        return ()
    if isinstance(tree, dict):
        for key, item in tree.items():
            if str(key) == root:
                return (key,)
            if root.startswith(f"{key}."):
                with contextlib.suppress(Damaged):
                    return (key, *_path_to(item, root.removeprefix(f"{key}.")))
    raise Damaged(f"it holds no dictionary {quoted(root)}")


def _cut_out(tree: dict, path: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """What lies at a path in nested dictionaries, and the dictionaries without it."""
    found: Any = tree
    rest: dict[Any, Any] = {}
    level = rest
    for depth, key in enumerate(path, 1):
        level.update({other: item for other, item in found.items() if other != key})
        found = found[key]
        if depth < len(path):
            level[key] = level = {}
    return found, rest


def _flattened(weights: dict) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The tensors in nested dictionaries by dotted path, and by theirs the values that are none."""
    tensors: dict[str, LazyTensor] = {}
    others: dict[str, Any] = {}
    room = _MAX_NAMES

    def flatten(prefix: str, value: Any) -> None:
        nonlocal room
        room -= len(prefix) + 64
        if room < 0:
            raise Damaged("it repeats its content without end")
        if isinstance(value, LazyTensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
            if prefix in tensors:
                raise Damaged(f"two tensors in it are named {quoted(prefix)}")
            tensors[prefix] = value if isinstance(value, LazyTensor) else InMemory(value)
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            others[prefix] = value

    with contextlib.suppress(RecursionError):
        flatten("", weights)
        return tensors, others
    raise Damaged("it holds a dictionary that contains itself")


def _source(path: Path, tree: Any, root: str | None) -> TensorSource:
    tree = plain(tree)
    if _is_tensor(tree):
        tree = {"tensor": tree}
    if not isinstance(tree, dict):
        raise Damaged(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
    keys = _find_root(tree) if root is None else _path_to(tree, root)
    weights, metadata = _cut_out(tree, keys)
    if not isinstance(weights, dict):
        raise Damaged(f"{quoted(root)} in it is not a dictionary")
    tensors, others = _flattened(weights)
    if not tensors and root is None:
        raise _NoTensors("it holds no tensor")
    return TensorSource(path, "pytorch", tensors, metadata | others, ".".join(map(str, keys)))


# --- the two forms of a file -----------------------------------------------------------------------------------------


class _Archive:
    """A zip file whose records are stored as they are, so that one can be read where it lies."""

    def __init__(self, file: BinaryIO, size: int):
        entries = zipfile.ZipFile(file).infolist()
        self.file, self.size = file, size
        self.records = {entry.filename: entry for entry in entries}
        if len(self.records) != len(entries):
            raise Damaged("its archive names one record twice")

    def locate(self, name: str) -> tuple[int, int]:
        """Offset and length of a record, from its local header."""
        entry = self.records.get(name)
        if entry is None:
            raise Damaged(f"its archive lacks the record {quoted(name)}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Damaged(f"its record {quoted(name)} is compressed, which torch.save never does")
        self.file.seek(entry.header_offset)
        local = self.file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise Damaged(f"the header of its record {quoted(name)} is damaged")
        name_size, extra_size = struct.unpack("<HH", local[26:30])
        offset = entry.header_offset + 30 + name_size + extra_size
        if offset + entry.file_size > self.size:
            raise Damaged(f"its record {quoted(name)} reaches beyond the end of the file")
        return offset, entry.file_size

    def read(self, name: str) -> bytes:
        offset, length = self.locate(name)
        self.file.seek(offset)
        return self.file.read(length)


def open_torch_zip(path: Path, root: str | None) -> TensorSource:
    """`torch.save` since PyTorch 1.6: `NAME/data.pkl`, and one stored record `NAME/data/KEY` per storage."""
    with parsing(path, "PyTorch"), path.open("rb") as file:
        archive = _Archive(file, path.stat().st_size)
        programs = [name for name in archive.records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise Damaged("it is a zip archive without the data.pkl that torch.save writes")
        prefix = programs[0].removesuffix("data.pkl")
        if prefix + "constants.pkl" in archive.records:
            raise Damaged("it is a TorchScript program (torch.jit.save), not a state dictionary")
        if prefix + "byteorder" in archive.records and archive.read(prefix + "byteorder") != b"little":
            raise Damaged("it was written on a big-endian machine")
        places: dict[str, tuple[int, int]] = {}

        def storage(wanted: _StorageId) -> _Storage:
            if wanted.key not in places:
                places[wanted.key] = archive.locate(f"{prefix}data/{wanted.key}")
            offset, length = places[wanted.key]
            found = _Storage(path, offset, wanted.numel, wanted.dtype)
            if found.nbytes > length:
                raise Damaged(f"its storage {quoted(wanted.key)} has {length} bytes instead of {found.nbytes}")
            return found

        pickled = archive.read(programs[0])
        return _source(path, _machine(storage, len(pickled)).run(io.BytesIO(pickled)), root)


_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def open_torch_legacy(path: Path, root: str | None) -> TensorSource:
    """`torch.save` before 1.6: magic, protocol, system, object and storage keys as five pickles, then the storages."""
    with parsing(path, "PyTorch"), path.open("rb") as file:
        size = path.stat().st_size
        stream = _Bounded(file, size)

        def unpickled(persistent: Callable[[_StorageId], Any] = lambda wanted: None) -> Any:
            return _machine(persistent, size).run(stream)

        if unpickled() != _MAGIC:
            raise Damaged("it is a pickle, but not one that torch.save wrote")
        if unpickled() != _PROTOCOL:
            raise Damaged("it has an unknown protocol version")
        system = unpickled()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Damaged("it was written on a big-endian machine")

        # The object comes before the storages that it refers to: pass over it once to learn the storages' types,
        # find where they lie, and then read it again with the offsets at hand.
        declared: dict[str, _StorageId] = {}

        def declare(wanted: _StorageId) -> _Storage:
            if wanted.view is not None:
                raise Damaged("it holds a view of a storage, which PyTorch has not written since version 0.4")
            declared[wanted.key] = wanted
            return _Storage(path, 0, wanted.numel, wanted.dtype)

        begin = file.tell()
        unpickled(declare)
        keys = unpickled()
        if not isinstance(keys, list):
            raise Damaged("its list of storages is damaged")
        storages = _legacy_storages(path, file, size, map(spelled, keys), declared)

        def storage(wanted: _StorageId) -> _Storage:
            if wanted.key not in storages:
                raise Damaged(f"it lacks the storage {quoted(wanted.key)}")
            return storages[wanted.key]

        file.seek(begin)
        return _source(path, unpickled(storage), root)


def _legacy_storages(
    path: Path, file: BinaryIO, size: int, keys: Iterable[str], declared: Mapping[str, _StorageId]
) -> dict[str, _Storage]:
    """Where the storages lie, which follow one another from here: for each a u64 number of elements, and these."""
    storages: dict[str, _Storage] = {}
    position = file.tell()
    for key in keys:
        if key not in declared:
            raise Damaged(f"its storage {quoted(key)} belongs to no tensor")
        file.seek(position)
        count = file.read(8)
        if len(count) < 8 or int.from_bytes(count, "little") != declared[key].numel:
            raise Damaged(f"its storage {quoted(key)} does not have the size that its tensors expect")
        storages[key] = _Storage(path, position + 8, declared[key].numel, declared[key].dtype)
        position += 8 + storages[key].nbytes
        if position > size:
            raise Damaged(f"it ends inside the storage {quoted(key)}; it is truncated")
    return storages


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
