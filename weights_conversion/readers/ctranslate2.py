"""CTranslate2's `model.bin`: version, specification name, variables, aliases; little-endian, unaligned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from weights_conversion.readers.checks import Damaged, checked_shape, parsing, quoted
from weights_conversion.readers.tensors import LazyTensor, Slab, TensorSource

_DTYPES = (
    np.dtype(np.float32),
    np.dtype(np.int8),
    np.dtype(np.int16),
    np.dtype(np.int32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)
_BY_SIZE = {4: np.dtype(np.float32), 2: np.dtype(np.int16), 1: np.dtype(np.int8)}  # before version 4
_VERSION = 6
_INT16_SCALE = np.array(1000, np.float32)  # of int16 models that store none


class _Dequantised(LazyTensor):
    r"""An integer weight and its scale: $W_{ij} = Q_{ij} / s_i$ (int8, a scale per row) or $Q_{ij} / s$ (int16)."""

    def __init__(self, quantised: LazyTensor, scale: np.ndarray):
        self.quantised, self.scale = quantised, scale
        self.shape, self.dtype = quantised.shape, np.dtype(np.float32)

    def _values(self) -> np.ndarray:
        scale = self.scale.reshape(self.scale.shape + (1,) * (len(self.shape) - self.scale.ndim))
        return np.divide(self.quantised.read(), scale, dtype=np.float32)


class _Stream:
    """Little-endian values from a file of known size."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise Damaged(f"it ends at byte {self.size}, in the middle of its table of variables; it is truncated")
        return data

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        """A u16 length that counts the closing NUL, then the bytes."""
        data = self.take(self.unsigned(2))
        if not data.endswith(b"\0"):
            raise Damaged("a name in it does not end in NUL")
        return data[:-1].decode()


def open_ctranslate2(path: Path) -> TensorSource:
    """`model.bin`. Scalars, which are settings rather than weights, go to `metadata["scalars"]`."""
    with parsing(path, "CTranslate2"), path.open("rb") as file:
        stream = _Stream(file, path.stat().st_size)
        version = stream.unsigned(4)
        if not 1 <= version <= _VERSION:
            raise Damaged(f"it has the binary version {version}, and versions 1 to {_VERSION} are known")
        spec, revision = (stream.string(), stream.unsigned(4)) if version >= 2 else ("TransformerBase", 1)
        variables = _variables(stream, version, path)
        aliases = _aliases(stream, variables) if version >= 3 else {}
        if file.tell() != stream.size:
            raise Damaged(f"{stream.size - file.tell()} bytes at its end belong to no variable")

        tensors: dict[str, LazyTensor] = {}
        scalars: dict[str, int | float] = {}
        quantisation: dict[str, str] = {}
        for name, variable in variables.items():
            base = name.removesuffix("_scale")
            if base != name and base in variables and variables[base].dtype.kind == "i":
                continue
            if not variable.shape:
                scalars[name] = variable.read().item()
            elif variable.dtype.kind == "i":
                tensors[name] = _dequantised(name, variable, variables.get(name + "_scale"))
                quantisation[name] = variable.dtype.name
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


def _variables(stream: _Stream, version: int, path: Path) -> dict[str, Slab]:
    """Where the variables lie: a u32 number of them, and for each name, shape, dtype, size and values."""
    variables: dict[str, Slab] = {}
    for _ in range(stream.unsigned(4)):
        name = stream.string()
        rank = stream.unsigned(1)
        shape = checked_shape([stream.unsigned(4) for _ in range(rank)], f"variable {quoted(name)}")
        if version >= 4:
            kind = stream.unsigned(1)
            if kind >= len(_DTYPES):
                raise Damaged(f"variable {quoted(name)} has the unknown dtype number {kind}")
            dtype, nbytes = _DTYPES[kind], stream.unsigned(4)
        else:
            itemsize = stream.unsigned(1)
            if itemsize not in _BY_SIZE:
                raise Damaged(f"variable {quoted(name)} has items of {itemsize} bytes")
            dtype, nbytes = _BY_SIZE[itemsize], stream.unsigned(4) * itemsize
        if name in variables:
            raise Damaged(f"the variable {quoted(name)} occurs twice")
        variables[name] = variable = Slab(path, stream.file.tell(), shape, dtype)
        # The size is a u32 and wraps around in tensors of 4 GiB and more.
        if nbytes != variable.nbytes & 0xFFFFFFFF:
            raise Damaged(f"variable {quoted(name)} has {nbytes} bytes, which is not its shape times its dtype")
        end = variable.offset + variable.nbytes
        if end > stream.size:
            raise Damaged(f"it ends at byte {stream.size}, inside the variable {quoted(name)}; it is truncated")
        stream.file.seek(end)
    return variables


def _aliases(stream: _Stream, variables: Mapping[str, Slab]) -> dict[str, str]:
    """Other names of variables: a u32 number of them, and pairs of alias and variable."""
    aliases: dict[str, str] = {}
    for _ in range(stream.unsigned(4)):
        alias, target = stream.string(), stream.string()
        if target not in variables:
            raise Damaged(f"its alias {quoted(alias)} points to {quoted(target)}, which it does not hold")
        aliases[alias] = target
    return aliases


def _dequantised(name: str, variable: Slab, scale: Slab | None) -> LazyTensor:
    if variable.dtype == np.int16 and scale is None:
        return _Dequantised(variable, _INT16_SCALE)
    if variable.dtype == np.int32 or scale is None:
        raise Damaged(f"variable {quoted(name)} is quantised in a way that is not int8 or int16 with a scale")
    if scale.dtype.kind == "i" or scale.shape not in ((), (1,), variable.shape[:1]):
        raise Damaged(f"the scale of {quoted(name)} has shape {scale.shape} for a weight of shape {variable.shape}")
    values = scale.read().astype(np.float32)
    if not np.all(np.isfinite(values) & (values != 0)):
        raise Damaged(f"the scale of {quoted(name)} is zero or not finite")
    return _Dequantised(variable, values.reshape(()) if values.size == 1 else values)
