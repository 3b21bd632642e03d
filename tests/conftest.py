"""What every test shares: exact matrix products, a hypothesis profile, and the test recordings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.processes import QUICKLY_COMPILED

os.environ.setdefault("XLA_FLAGS", QUICKLY_COMPILED)  # tests run thousands of tiny programs once each
# Threads belong to the machine, not to each of several pytest-xdist workers. Set before JAX is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Eager float64 models are a thousand tiny programs; compiled once, they serve every process and every later run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network's protocol brings its own server

import jax
from hypothesis import HealthCheck, settings

settings.register_profile("audiozoo", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("audiozoo")

# Accelerators round the factors of a float32 product unless asked not to.
jax.config.update("jax_default_matmul_precision", "highest")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_compiled():
    """Let go of a module's programs when it is done: those of all modules together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The public recordings that `notebooks/README.md` lists; without them the test is skipped."""
    for directory in (os.environ.get("AUDIOZOO_RECORDINGS"), ROOT / "recordings", ROOT.parent / "shared" / "audio"):
        if directory and Path(directory).is_dir():
            return Path(directory)
    pytest.skip("the recordings are not there: notebooks/README.md says where they are from")
