"""How much memory loading takes: a large random checkpoint, and a process that loads it on one device or on eight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from audiozoo import loading
from audiozoo.layers import abstract
from tests import processes
from weights_conversion.readers import write_safetensors

PEAK = """
import re, sys
from pathlib import Path
import audiozoo
from audiozoo.sharding import fsdp, make_mesh
import jax
many = len(jax.devices()) == 8
model = audiozoo.load(sys.argv[1], **({"mesh": make_mesh({"data": 8}), "rules": (fsdp(),)} if many else {}))
from audiozoo.loading import variables
if many:
    total = sum(v[...].nbytes for v in variables(model).values())
    held = [0] * 8
    for v in variables(model).values():
        for shard in v[...].addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert max(held) < 0.15 * total, (held, total)
    split = model.text_decoder.layers[0].fc1.kernel[...]
    assert split.addressable_shards[0].data.size == split.size // 8
elif len(sys.argv) > 2:
    audiozoo.save(model, sys.argv[2])
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def write_checkpoint(directory: Path, create: Callable[[Any], nnx.Module], conversion: Any) -> int:
    """A random float32 checkpoint as `save_pretrained` writes it, tensor by tensor; returns the bytes of its tensors.

    Args:
        directory: where to.
        create: makes the model from `nnx.Rngs`.
        conversion: the paper's module in `weights_conversion`.
    """
    shapes = abstract(create)
    form, expected = conversion.hugging_face(shapes), loading.variables(shapes)
    random, total = np.random.default_rng(0), 0

    def tensors():
        nonlocal total
        for step in form.table.steps_for(expected):
            blank = tuple(np.broadcast_to(np.float32(0), tuple(expected[path].shape)) for path in step.ours)
            for name, array in zip(step.foreign, step.operation.inverse(blank), strict=True):
                total += array.nbytes
                yield name, random.random(array.shape, np.float32)

    write_safetensors(directory, tensors())
    for name, value in form.files.items():
        (directory / name).write_text(json.dumps(value))
    return total


def peak_of(devices: int, *arguments: Path) -> int:
    """The largest resident memory of a process that loads, on so many virtual devices, in bytes."""
    return int(processes.output("-c", PEAK, *arguments, devices=devices).split()[-1])
