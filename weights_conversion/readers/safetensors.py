"""safetensors: a u64 length, a JSON header of that length, tensors back to back; read, and written in shards."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from audiozoo.errors import CheckpointError
from weights_conversion.readers.checks import Damaged, checked_shape, is_count, json_object, parsing, quoted
from weights_conversion.readers.tensors import Slab, TensorSource

_DTYPES = {
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
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


# --- reading ---------------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> TensorSource:
    """Open one safetensors file."""
    with parsing(path, "safetensors"):
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise Damaged(f"it has only {size} bytes")
            header_size = int.from_bytes(prefix, "little")
            if header_size > min(size - 8, MAX_HEADER):
                raise Damaged(
                    f"its header claims {header_size} bytes and the file has {size}; it is truncated or damaged"
                )
            header = json.loads(file.read(header_size).decode(), object_pairs_hook=json_object)
        if not isinstance(header, dict):
            raise Damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise Damaged("its __metadata__ is not a JSON object")

        begin = 8 + header_size
        tensors = {name: _tensor(name, entry, path, begin, size) for name, entry in header.items()}
        _check_coverage(tensors, begin, size)
    return TensorSource(path, "safetensors", tensors, metadata)


def _tensor(name: str, entry: Mapping[str, Any], path: Path, begin: int, size: int) -> Slab:
    """A tensor from its entry in the header, whose offsets count from byte `begin` of a file of `size` bytes."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise Damaged(f"tensor {quoted(name)} has the unknown dtype {quoted(entry['dtype'])}")
    shape = checked_shape(entry["shape"], f"tensor {quoted(name)}")
    start, end = entry["data_offsets"]
    if not (is_count(start) and is_count(end) and start <= end):
        raise Damaged(f"tensor {quoted(name)} has impossible offsets")
    if begin + end > size:
        raise Damaged(f"tensor {quoted(name)} ends at byte {begin + end} and the file has {size}; it is truncated")
    tensor = Slab(path, begin + start, shape, dtype)
    if end - start != tensor.nbytes:
        raise Damaged(f"tensor {quoted(name)} has {end - start} bytes, which is not its shape times its dtype")
    return tensor


def _check_coverage(tensors: Mapping[str, Slab], begin: int, size: int) -> None:
    """Every byte behind the header must belong to exactly one tensor."""
    position = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes, item[0])):
        if tensor.offset != position:
            raise Damaged(f"tensor {quoted(name)} overlaps its neighbour or leaves a gap before it")
        position += tensor.nbytes
    if position != size:
        raise Damaged(f"{size - position} bytes at its end belong to no tensor")


# --- writing ---------------------------------------------------------------------------------------------------------

_HEADER_ROOM = 1 << 20  # left free at the start of a shard that is being written
_IN_PLACE_BYTES = 64 << 20  # a shard smaller than this is copied behind a header without padding
_WRITE_BYTES = 256 << 20  # at most at once
_COPY_BYTES = 8 << 20


class _Entry(NamedTuple):
    """What the header says of a tensor; `start` counts from the first tensor's first byte."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Shard:
    """A safetensors file in the making: tensors are appended as they come, the header is known at the end.

    The first mebibyte of the temporary file is left free, so that the header of a large shard is filled in without
    moving data (its rest is padded with blanks, as the format allows). A small shard, or one in which the order of
    arrival would leave a tensor unaligned, is copied once into its final order.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        handle, self.path = _temporary(directory)
        self.file = os.fdopen(handle, "w+b", buffering=0)
        self.file.seek(_HEADER_ROOM)
        self.entries: list[_Entry] = []
        self.nbytes = 0

    def append(self, name: str, values: np.ndarray) -> None:
        array = np.ascontiguousarray(values)
        view, written = array.reshape(-1).view(np.uint8).data, 0
        while written < array.nbytes:
            written += self.file.write(view[written : written + _WRITE_BYTES])
        self.entries.append(_Entry(name, array.dtype, values.shape, self.nbytes, array.nbytes))
        self.nbytes += array.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        aligned = all(entry.start % entry.dtype.itemsize == 0 for entry in self.entries)
        header = _header(self.entries, metadata)
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
        order = sorted(self.entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        moved, position = [], 0
        for entry in order:
            moved.append(entry._replace(start=position))
            position += entry.nbytes
        handle, target = _temporary(self.directory)
        with os.fdopen(handle, "w+b", buffering=0) as copy:
            header = _header(moved, metadata)
            copy.write(len(header).to_bytes(8, "little") + header)
            for entry in order:
                self.file.seek(_HEADER_ROOM + entry.start)
                left = entry.nbytes
                while left:
                    chunk = self.file.read(min(left, _COPY_BYTES))
                    copy.write(chunk)
                    left -= len(chunk)
        self.file.close()
        target.replace(self.path)
        self.file = self.path.open("r+b", buffering=0)

    def discard(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


def _temporary(directory: Path) -> tuple[int, Path]:
    handle, name = tempfile.mkstemp(prefix=".model-", suffix=".safetensors.tmp", dir=directory)
    return handle, Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _header(entries: Iterable[_Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, dtype, shape, start, nbytes in entries:
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, start + nbytes]}
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
                raise CheckpointError(f"The tensor {quoted(name)} was given twice (or its name is reserved).")
            if values.dtype not in _CODES:
                raise CheckpointError(f"The tensor {quoted(name)} has dtype {values.dtype}, unknown to safetensors.")
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
        weight_map = {entry.name: name for shard, name in zip(shards, names, strict=True) for entry in shard.entries}
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
