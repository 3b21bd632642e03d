"""A checkpoint in several files: `*.index.json` with a `weight_map` from tensor names to the files beside it."""

from __future__ import annotations

import json
from pathlib import Path

from audiozoo.errors import CheckpointError, SourceError
from weights_conversion.readers.checks import Damaged, is_plain_file_name, json_object, parsing, quoted
from weights_conversion.readers.files import open_file
from weights_conversion.readers.safetensors import MAX_HEADER
from weights_conversion.readers.tensors import LazyTensor, TensorSource


def open_sharded(index: Path) -> TensorSource:
    """Open all files that an index names, as one source."""
    with parsing(index, "checkpoint index"):
        if index.stat().st_size > MAX_HEADER:
            raise Damaged("it is larger than any index")
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=json_object)
        weight_map, metadata = content["weight_map"], content.get("metadata") or {}
        if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
            raise Damaged("its weight_map is not a JSON object")
        for file in weight_map.values():
            if not is_plain_file_name(file):
                raise Damaged(f"its weight_map names {quoted(file)}, which is not a plain file name")
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise SourceError(f"{index} needs {len(files)} files, and these are not beside it: {', '.join(absent[:8])}.")

    shards = {file: open_file(index.parent / file) for file in files}
    tensors: dict[str, LazyTensor] = {}
    for file, shard in shards.items():
        for name, tensor in shard.items():
            if weight_map.get(name, file) == file:
                if name in tensors:
                    raise CheckpointError(f"{index}: the tensor {quoted(name)} is in two files and not in the index.")
                tensors[name] = tensor
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{index} lists {len(missing)} tensors that their files do not hold, the first being {quoted(missing[0])}."
        )
    formats = {shard.format for shard in shards.values()} or {"safetensors"}
    if len(formats) > 1:
        raise CheckpointError(f"{index} mixes files of different formats ({', '.join(sorted(formats))}).")
    for shard in shards.values():
        metadata = {**shard.metadata, **metadata}
    return TensorSource(index, formats.pop(), tensors, metadata)
