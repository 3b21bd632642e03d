"""One file of any known format: its first bytes say which."""

from __future__ import annotations

from pathlib import Path

from audiozoo.errors import CheckpointError
from weights_conversion.readers.checks import parsing
from weights_conversion.readers.ctranslate2 import open_ctranslate2
from weights_conversion.readers.onnx import open_onnx
from weights_conversion.readers.pytorch import open_torch_legacy, open_torch_zip
from weights_conversion.readers.safetensors import open_safetensors
from weights_conversion.readers.tensors import TensorSource


def open_file(path: Path, root: str | None = None) -> TensorSource:
    """Open one file; `root` is `open_tensors`' and matters to PyTorch's files alone."""
    with parsing(path, "checkpoint"):
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
        return open_torch_zip(path, root)
    if head.startswith(b"\x80") and path.suffix != ".safetensors":
        return open_torch_legacy(path, root)
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and head[5:8] == b"\0\0\0"):
        return open_safetensors(path)
    # A CTranslate2 file opens with a small version number and the length of a short string (version 1 has no string).
    if len(head) >= 6 and 1 <= int.from_bytes(head[:4], "little") <= 64:
        return open_ctranslate2(path)
    if head.startswith(b"\x08") or path.suffix == ".onnx":
        return open_onnx(path)
    raise CheckpointError(
        f"{path} is none of the known formats (safetensors, a PyTorch pickle, CTranslate2, ONNX); "
        "it may be truncated at its beginning or be something else."
    )
