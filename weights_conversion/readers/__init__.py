r"""Foreign checkpoint files as `{name: array}`, read one tensor at a time.

| format | recognised by | file |
| --- | --- | --- |
| safetensors | one file, `*.safetensors.index.json`, a directory | `safetensors.py` |
| PyTorch pickle | zip archive (PyTorch >= 1.6), the older stream, `*.bin.index.json` | `pytorch.py` |
| CTranslate2 `model.bin` | binary versions 1 to 6 | `ctranslate2.py` |
| ONNX | `ModelProto` | `onnx.py` |

None of them needs more than NumPy. What happens between a path and its tensors:

    open_tensors           a directory, an index or a file
      -> sharded.py        the files of an index
      -> files.py          one file: which format is it?
      -> a format's file   its header, checked (`checks.py`); a pickle is interpreted as data (`pickles.py`)
      => TensorSource      {name: LazyTensor} and the metadata (`tensors.py`)

Three promises hold for each of them:

- **Nothing in a file is executed.** A pickle is a program for a small stack machine whose one dangerous instruction
  calls a function by name. Here the program is decoded by `pickletools` and *interpreted as data*: a name stays a name,
  and only the few constructors listed in `pickles.py` and `pytorch.py` have a meaning. Any other name ends the reading.
- **A header is checked before it is believed.** Sizes, offsets and shapes are compared with the length of the file
  before memory is allocated; a file that does not add up raises `CheckpointError` with one sentence. Nor does a small
  file keep the reader busy for ever: what a pickle makes of itself by repetition is counted, and has an end.
- **One tensor at a time.** A tensor is read when it is asked for, into a fresh array, by `seek` and `readinto`. Nothing
  is memory-mapped: pages of a mapped file count as resident memory until the kernel takes them back, which would double
  the memory that a conversion needs.
"""

from __future__ import annotations

import os
from pathlib import Path

from audiozoo.errors import CheckpointError, SourceError
from weights_conversion.readers.files import open_file
from weights_conversion.readers.pickles import Record
from weights_conversion.readers.safetensors import write_safetensors
from weights_conversion.readers.sharded import open_sharded
from weights_conversion.readers.tensors import LazyTensor, TensorSource, below

__all__ = ["LazyTensor", "Record", "TensorSource", "below", "open_tensors", "write_safetensors"]


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
        source = open_sharded(path)
    else:
        source = open_file(path, root)
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
