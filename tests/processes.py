"""Python in a process of its own, with virtual devices: their number is fixed once JAX has started."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Of programs that run once, compiling takes the time: XLA optimises little, and emits loops in its older way, which
# later versions no longer know. That is a quarter of the time.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib") < "0.11":
    QUICKLY_COMPILED += " --xla_cpu_use_fusion_emitters=false"


def environment(devices: int = 8) -> dict[str, str]:
    """This process's environment (with the flags that conftest.py sets) for one of so many devices on a CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    if devices > 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def of_a_user(cache: Path) -> dict[str, str]:
    """The environment of a user, whose programs are optimised; they are kept in `cache` if compiling takes a while."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(ROOT), "AUDIOZOO_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}


def finished(*arguments: object, devices: int = 8, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS…` at its end, however it ended."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(devices),
        timeout=timeout,
    )


def output(*arguments: object, timeout: float = 280, **options: Any) -> str:
    """What `python ARGUMENTS…` printed; its failure is the test's."""
    done = finished(*arguments, timeout=timeout, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
