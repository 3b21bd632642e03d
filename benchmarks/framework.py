"""Timing that can be believed.

All contenders of a case run in one process on the same threads, in turn (`A B C A B C …`), so that what else the
machine does hits all alike. The first call, which compiles, is timed apart; then come warm calls, of which the median
counts and the quartiles are shown. What they return is compared first: a fast wrong answer is no result.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

OURS = "audiozoo"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "transformers",
    "openai-whisper",
    "faster-whisper",
    "ctranslate2",
    "onnxruntime",
)

Run = Callable[[], Any]  # one timed call, which returns only when its result is there
Factory = Callable[[], Run]  # loads the weights, prepares the input


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is done.
        ours: makes our call.
        references: makes the originals' calls, by name; the first is the one that the target is about.
        target: how many times as fast as the first reference ours should be.
        agreement: how well our result agrees with a reference's, in words; raises if it does not.
        repeats: warm calls of each contender.
    """

    name: str
    ours: Factory
    references: Mapping[str, Factory]
    target: float | None = None
    agreement: Callable[[Any, Any], str] | None = None
    repeats: int = 10

    @property
    def contenders(self) -> dict[str, Factory]:
        """Ours first, then the originals."""
        return {OURS: self.ours, **self.references}


# --- both sides in one dtype -----------------------------------------------------------------------------------------


def dtype() -> str:
    """The dtype of both sides' weights and computation: float32, or what `--dtype` says."""
    return os.environ.get("AUDIOZOO_BENCHMARK_DTYPE", "float32")


def random_model(cls: Any, config: Any, table: Any = None, seed: int = 0) -> Any:
    """`tests.models.random_model`, its weights on the device: those of the host would be copied there in every call."""
    import jax
    from flax import nnx

    from tests.models import random_model as drawn

    kind = jax.numpy.dtype(dtype())
    model = drawn.random_model(lambda rngs: cls(config, dtype=kind, param_dtype=kind, rngs=rngs), table, seed)
    jax.block_until_ready(nnx.state(model))
    return model


def randomised(module: Any, seed: int = 0) -> Any:
    """An original with the weights that `random_model` gives ours, on as many threads."""
    import torch

    from tests.parity.harness import randomise

    torch.set_num_threads(threads())
    return randomise(module, seed, torch.float32).to(getattr(torch, dtype()))


def tensor(array: Any) -> Any:
    """PyTorch's own of an array of NumPy's, in the dtype of the models if it is not of integers."""
    import torch

    found = torch.from_numpy(array)
    return found.to(getattr(torch, dtype())) if found.is_floating_point() else found


# --- how well two results agree --------------------------------------------------------------------------------------


def within(tolerance: float) -> Callable[[Any, Any], str]:
    """The largest difference is at most `tolerance` of what the values are, or 1; in bfloat16 a tenth of their size.

    In bfloat16, whose rounding is a 256th, two correct programs part by a few hundredths after many layers: there it
    is the root mean square of the difference that counts.
    """

    def close(ours: Any, theirs: Any) -> str:
        a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        size = np.sqrt(np.mean(b**2))
        narrow = dtype() != "float32"
        apart = np.sqrt(np.mean((a - b) ** 2)) if narrow else np.max(np.abs(a - b))
        if not apart <= (0.1 * size if narrow else tolerance * max(size, 1.0)):
            raise AssertionError(f"ours and the original differ by {apart:.3g} where values are {size:.3g}")
        return f"{apart / size:.1%} apart" if narrow else f"max diff {apart:.1e}"

    return close


def same_tokens(ours: Any, theirs: Any) -> str:
    """The same tokens; in bfloat16 as many, since there a near tie parts what follows."""
    a, b = np.asarray(ours).ravel(), np.asarray(theirs).ravel()
    same = int(np.sum(a == b)) if len(a) == len(b) else -1
    if same < (len(a) if dtype() == "float32" else 0):
        raise AssertionError(f"different tokens: {a.tolist()} and {b.tolist()}")
    return f"{len(a)} equal tokens" if same == len(a) else f"{same} of {len(a)} tokens equal"


@dataclass
class Timing:
    """What was measured of one contender; seconds and bytes."""

    first: float
    warm: list[float] = field(default_factory=list)
    agreement: str = ""
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        """The warm call in the middle."""
        return statistics.median(self.warm)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the warm calls is faster than the first, a quarter slower than the second."""
        if len(self.warm) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.warm, n=4, method="inclusive")
        return low, high

    def record(self, ratio: float | None) -> dict[str, Any]:
        """For the JSON file; `ratio` is how many times as fast ours is."""
        low, high = self.quartiles
        return {
            "median_s": self.median,
            "quartiles_s": [low, high],
            "repeats": len(self.warm),
            "first_call_s": self.first,
            "compile_s": max(0.0, self.first - self.median),
            "agreement": self.agreement,
            "peak_memory_bytes": self.peak_memory,
            "ours_is_times_as_fast": ratio,
        }


def limit_threads(count: int) -> None:
    """Give this process, JAX, PyTorch and CTranslate2 alike `count` cores. Before any of them is imported."""
    loaded = {"jax", "torch", "ctranslate2"} & set(sys.modules)
    if loaded:
        raise RuntimeError(f"threads must be limited before {', '.join(sorted(loaded))} is imported")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ["AUDIOZOO_BENCHMARK_THREADS"] = str(count)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def threads() -> int:
    """The number of threads that every contender gets."""
    return int(os.environ.get("AUDIOZOO_BENCHMARK_THREADS", os.cpu_count() or 1))


def _timed(run: Run) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(case: Case, repeats: int | None = None, enough: float = math.inf) -> dict[str, Timing]:
    """Time all contenders of a case, interleaved; after `enough` seconds three rounds of warm calls will do."""
    runs, timings, results = {}, {}, {}
    for name, factory in case.contenders.items():
        runs[name] = factory()
        first, results[name] = _timed(runs[name])
        timings[name] = Timing(first)
    for name in case.references:
        if case.agreement is not None:
            timings[name].agreement = case.agreement(results[OURS], results[name])
    results.clear()
    for run in runs.values():
        run()
    gc.collect()
    start = time.perf_counter()
    for done in range(repeats or case.repeats):
        if done >= 3 and time.perf_counter() - start > enough:
            break
        for name, run in runs.items():
            timings[name].warm.append(_timed(run)[0])
    return timings


def peak_memory(paper: str, case: str, contender: str) -> int:
    """Bytes that one contender needs at most while it runs, imports and weights included, in a process of its own."""
    program = f"from benchmarks.framework import _measure_memory; _measure_memory({paper!r}, {case!r}, {contender!r})"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{paper}, {case}, {contender}: {done.stderr[-2000:]}")
    return int(done.stdout.strip().rsplit("\n", 1)[-1])


def _measure_memory(paper: str, case: str, contender: str) -> None:
    (found,) = [c for c in cases_of(paper) if c.name == case]
    run = found.contenders[contender]()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.is_file():
        for _ in range(2):
            run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        return
    # Linux's ru_maxrss begins with what the parent had; and what drawing random weights took is given back first.
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    reset.write_text("5")  # the peak begins anew
    for _ in range(2):
        run()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    print(int(peak) * 1024)


def cases_of(paper: str) -> Sequence[Case]:
    """The cases of `benchmarks/<paper>.py`, or of a module with dots in its name."""
    return importlib.import_module(paper if "." in paper else f"benchmarks.{paper}").CASES


def papers() -> list[str]:
    """The papers that have benchmarks."""
    own = {"__init__", "__main__", "framework", "results"}
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in own)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def surroundings() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": threads(),
        "dtype": dtype(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "versions": versions,
    }


def write_whole(text: str, path: Path) -> None:
    """Write a file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
