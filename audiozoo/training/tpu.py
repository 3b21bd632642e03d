"""TPUs without a TPU: their compiler runs on any machine (`pip install audiozoo[tpu]`, libtpu) for any number of chips.

    mesh = topology_mesh("v5e:8x8", "data=4,fsdp=16")      # devices that are not there
    report = compile(step, arguments)                      # `jax.jit`'s, of `ShapeDtypeStruct`s with shardings on them
    report.fits, report.temporaries, report.program.collectives, report.roofline(chip("v5e"))

What is compiled is what would run, so memory and collectives are the compiler's own numbers. The time is a bound by
division: operations, bytes and what goes over the wires, each by the chip's peak.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from audiozoo import sharding
from audiozoo.errors import UsageError, first_line
from audiozoo.training import hlo


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip, from the vendor's pages.

    Attributes:
        name: as in a topology.
        flops: bfloat16 operations a second.
        memory: bytes of HBM.
        bandwidth: bytes a second between HBM and the chip.
        link: bytes a second that one of its wires sends one way (the page's bandwidth of the chip, which counts both
            directions of all wires, by twice the wires).
        wires: to neighbours; two for each axis of the torus.
        page: where the numbers are from.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    wires: int
    page: str

    @property
    def ring(self) -> float:
        """Bytes a second that a chip sends along one axis of the torus, both ways at once."""
        return 2 * self.link


_PAGES = "https://docs.cloud.google.com/tpu/docs/"
CHIPS: dict[str, Chip] = {
    "v5e": Chip("v5e", 197e12, 16e9, 819e9, 400e9 / 8, 4, _PAGES + "v5e"),
    "v5p": Chip("v5p", 459e12, 95e9, 2765e9, 1200e9 / 12, 6, _PAGES + "v5p"),
    "v6e": Chip("v6e", 918e12, 32e9, 1638e9, 800e9 / 8, 4, _PAGES + "v6e"),
}


def chip(topology: str) -> Chip:
    """The chip of a topology, `v5e:8x8`.

    Raises:
        UsageError: if its peaks are not known here.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UsageError(f"The topology {topology!r} is not understood; write v5e:8x8, v5p:4x4x4 or v6e:4x4.")
    return CHIPS[name]


# libtpu looks for a TPU's host when it is loaded, waits for its metadata server, and logs into /tmp; none of it is
# wanted where only its compiler is.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compiler_is_there() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: str) -> list[Any]:
    """The chips of a topology, to compile for.

    Raises:
        UsageError: there is no such topology, or libtpu is not installed.
    """
    chip(topology)
    if not compiler_is_there():
        raise UsageError("The TPU's compiler is not installed: pip install 'audiozoo[tpu]'.")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        first = first_line(error)
        raise UsageError(f"There is no topology {topology!r} ({first}); write v5e:8x8, v5p:4x4x4 or v6e:4x4.") from None
    return list(found.devices)


def topology_mesh(topology: str, mesh: str) -> Mesh:
    """A mesh over chips that are not there.

    Args:
        topology: kind and shape, `v5e:8x8`.
        mesh: axes, as `audiozoo train --mesh` takes them.
    """
    return sharding.parse_mesh(mesh, devices(topology))


@dataclass
class Roofline:
    """Seconds of one step if one thing alone were the limit, at the vendor's peaks."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """Which of the three is the longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The longest: a lower bound, as if all three were perfectly at once."""
        return max(self.compute, self.memory, self.network)


@dataclass
class Report:
    """What the compiler says of a program, for one chip. Bytes.

    Attributes:
        fits: whether it compiled for the chip's memory.
        needed: what it needs in all; of a program that does not fit, what the compiler says it would.
        available: what the compiler lets a program have.
        arguments: state and batch.
        outputs: results that are not written over arguments.
        temporaries: activations, gradients and buffers of collectives, at the same time.
        code: the program itself.
        program: operations, bytes and collectives; None of a program that does not fit.
        seconds: that compiling took.
        message: the compiler's, if it does not fit.
    """

    fits: bool
    needed: int
    available: int | None = None
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    program: hlo.Program | None = None
    seconds: float = 0.0
    message: str = ""
    xla: dict[str, float] = field(default_factory=dict)

    def roofline(self, chip: Chip) -> Roofline:
        """The bound of its time on a chip."""
        if self.program is None:
            raise UsageError("A program that does not fit has no time.")
        sent = sum(c.sent for c in self.program.collectives)
        return Roofline(self.program.flops / chip.flops, self.program.bytes / chip.bandwidth, sent / chip.ring)


_REFUSAL = r"([\d.]+)([KMGT]?)\)?(?: of| exceeds available HBM) \(?([\d.]+)([KMGT]?)(?: hbm|\))"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """JAX's persistent cache can keep programs for devices that are not there, but not read them again."""
    from jax.experimental.compilation_cache import compilation_cache

    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile(function: Any, *arguments: Any, **keywords: Any) -> Report:
    """Compile what `jax.jit` returned, for the devices that its arguments' shardings name.

    Args:
        function: with a `lower`.
        arguments: `ShapeDtypeStruct`s with shardings, in the place of arrays.
        keywords: likewise.
    """
    lowered = function.lower(*arguments, **keywords)
    start = time.perf_counter()
    try:
        with _uncached():
            compiled = lowered.compile()
    except Exception as error:
        found = re.search(_REFUSAL, str(error))
        if found is None:
            raise
        used, limit = (int(float(size) * _UNITS[unit]) for size, unit in (found.group(1, 2), found.group(3, 4)))
        took = time.perf_counter() - start
        return Report(False, used, limit, seconds=took, message=first_line(error, most=None))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = (
        memory.argument_size_in_bytes,
        outputs,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    counted = compiled.cost_analysis() or {}
    xla = {name: float(counted[name]) for name in ("flops", "bytes accessed") if name in counted}
    return Report(True, sum(parts), None, *parts, hlo.read(compiled.as_text()), seconds, xla=xla)


def resident(tree: Any) -> int:
    """Bytes of a tree of `ShapeDtypeStruct`s that lie on one chip."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        total += leaf.dtype.itemsize * _product(shape)
    return total


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
