"""ONNX: a protocol buffer, of which the fields that carry weights and the graph's wiring are decoded."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from audiozoo.errors import SourceError
from weights_conversion.readers.checks import Damaged, checked_shape, is_plain_file_name, parsing, quoted
from weights_conversion.readers.tensors import InMemory, LazyTensor, Slab, TensorSource

_DTYPES = {
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
                raise Damaged("it is not a protocol buffer")
            if position > self.end or number == 0:
                raise Damaged("it is not a protocol buffer, or it is truncated")
            yield number, value

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.file.read(1)
            if not byte:
                raise Damaged("it is truncated")
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise Damaged("it is not a protocol buffer")

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
        inner = _Message(io.BytesIO(self.data()), 0, self.length)
        while inner.file.tell() < self.length:
            yield inner._varint()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _repeated_ints(value: Any) -> list[int]:
    """One entry of a repeated field, or many of a packed one."""
    return [value] if isinstance(value, int) else list(value.varints())


def _repeated_floats(value: Any, code: str) -> list[float]:
    """One entry of a repeated field, or many of a packed one."""
    raw = value if isinstance(value, bytes) else value.data()
    return np.frombuffer(raw, code).tolist()


def _string_entry(message: _Message) -> tuple[str, str]:
    """`StringStringEntryProto`: key 1, value 2."""
    entry = dict(message.fields())
    return entry[1].text(), entry[2].text() if 2 in entry else ""


def _tensor(message: _Message, path: Path) -> tuple[str, LazyTensor]:
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
            typed += _repeated_floats(value, "<f4")
        elif number == 10:
            typed += _repeated_floats(value, "<f8")
        elif number == 13:
            location.update([_string_entry(value)])
        elif number == 14:
            external = value == 1
    what = f"tensor {quoted(name)}"
    if kind not in _DTYPES:
        raise Damaged(f"{what} has the dtype number {kind}, which is not a number type")
    dtype, shape = _DTYPES[kind], checked_shape(dims, what)
    if external:
        return name, _external(path, location, what, shape, dtype)
    if raw is not None:
        slab = Slab(path, raw.begin, shape, dtype)
        if raw.length != slab.nbytes:
            raise Damaged(f"{what} has {raw.length} bytes, which is not its shape times its dtype")
        return name, slab
    values = _from_typed_fields(typed, dtype)
    if values.size != math.prod(shape):
        raise Damaged(f"{what} has {values.size} values, which do not fill its shape")
    return name, InMemory(values.astype(dtype).reshape(shape))


def _from_typed_fields(typed: list[Any], dtype: np.dtype) -> np.ndarray:
    """What stands in `float_data`, `int32_data`, …, as numbers that `dtype` holds."""
    if dtype.kind == "c":
        return np.array(typed, np.float64).view(np.complex128)
    if dtype.kind in "iu":
        return np.array([_signed(item) if dtype.kind == "i" else item for item in typed], object)
    if dtype.kind == "f" and dtype.itemsize >= 4:
        return np.array(typed, np.float64)
    if dtype.kind == "b":
        return np.array(typed, np.uint64)
    # float16, bfloat16 and float8 stand as their bit patterns in int32_data.
    return np.array(typed, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)


def _external(path: Path, location: dict[str, str], what: str, shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
    """A tensor that lies in a file beside this one."""
    file = location.get("location", "")
    if not is_plain_file_name(file):
        raise Damaged(f"{what} lies in {quoted(file)}, which is not a file beside it")
    beside = path.parent / file
    if not beside.is_file():
        raise SourceError(f"{path} keeps its weights in {file}, which is not beside it.")
    slab = Slab(beside, int(location.get("offset", "0")), shape, dtype)
    if slab.offset < 0 or slab.offset + slab.nbytes > beside.stat().st_size:
        raise Damaged(f"{what} reaches beyond the end of {file}")
    return slab


def _attribute(message: _Message, path: Path, depth: int) -> tuple[str, Any]:
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
            value = _tensor(item, path)[1]
        elif number == 6:
            value = _graph(item, path, depth + 1)[0]
        elif number == 7:
            lists.setdefault(7, []).extend(_repeated_floats(item, "<f4"))
        elif number == 8:
            lists.setdefault(8, []).extend(map(_signed, _repeated_ints(item)))
        elif number == 9:
            lists.setdefault(9, []).append(item.data().decode("utf-8", "surrogateescape"))
        elif number == 10:
            lists.setdefault(10, []).append(_tensor(item, path)[1])
        elif number == 20 and item in (6, 7, 8, 9):
            lists.setdefault(item, [])
    if value is None and lists:
        value = [entry for items in lists.values() for entry in items]
    return name, value


def _node(message: _Message, path: Path, depth: int) -> dict[str, Any]:
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
            name, attribute = _attribute(value, path, depth)
            node["attributes"][name] = attribute
    return node


def _graph(message: _Message, path: Path, depth: int = 0) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """`GraphProto`: node 1, name 2, initializer 5, input 11, output 12."""
    if depth > 8:
        raise Damaged("its graphs are nested more than 8 levels deep")
    graph: dict[str, Any] = {"name": "", "nodes": [], "inputs": [], "outputs": []}
    tensors: dict[str, LazyTensor] = {}
    for number, value in message.fields():
        if number == 1:
            graph["nodes"].append(_node(value, path, depth))
        elif number == 2:
            graph["name"] = value.text()
        elif number == 5:
            name, tensor = _tensor(value, path)
            if not name or name in tensors:
                raise Damaged(f"an initializer in it has no name of its own ({quoted(name)})")
            tensors[name] = tensor
        elif number in (11, 12):
            entry = next((item.text() for field_number, item in value.fields() if field_number == 1), "")
            graph["inputs" if number == 11 else "outputs"].append(entry)
    if depth and tensors:
        graph["initializers"] = tensors
    return graph, tensors


def open_onnx(path: Path) -> TensorSource:
    """`ModelProto`: ir_version 1, producer 2 and 3, graph 7, opset_import 8, metadata_props 14."""
    metadata: dict[str, Any] = {"ir_version": 0, "producer": "", "opset": {}, "properties": {}}
    tensors: dict[str, LazyTensor] = {}
    with parsing(path, "ONNX"), path.open("rb") as file:
        for number, value in _Message(file, 0, path.stat().st_size).fields():
            if number == 1:
                metadata["ir_version"] = value
            elif number in (2, 3):
                metadata["producer"] = f"{metadata['producer']} {value.text()}".strip()
            elif number == 7:
                metadata["graph"], tensors = _graph(value, path)
            elif number == 8:
                entry = dict(value.fields())
                metadata["opset"][entry[1].text() if 1 in entry else ""] = entry.get(2, 0)
            elif number == 14:
                metadata["properties"].update([_string_entry(value)])
        if "graph" not in metadata:
            raise Damaged("it holds no graph")
        if not metadata["opset"]:  # mandatory, and written after the graph
            raise Damaged("it names no operator set; it may be truncated")
    return TensorSource(path, "onnx", tensors, metadata)
