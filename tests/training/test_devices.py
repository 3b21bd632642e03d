"""Eight devices train as one does: a step of every paper in float64, on a mesh of eight and on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.training.on_devices import MESHES, chosen

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if jax.__version_info__ < (0, 11):  # compiles in half the time; later versions do not know it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """By recipe and mesh: what is furthest apart after a step, in units of the tolerance; or an error."""
    out = tmp_path_factory.mktemp("devices") / "differences.json"
    environment = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.on_devices", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", chosen(), ids=lambda row: row.name)
def test_eight_devices_equal_one(differences, row):
    """Loss, metrics, every gradient, every parameter, statistic and moment of the optimiser after a step."""
    assert row.name not in differences, differences[row.name]
    for mesh, wanted in MESHES.items():
        if wanted(row):
            name, apart = differences[f"{row.name} {mesh}"]
            assert apart < 1, f"{name} is {apart:.3g} times the tolerance away on {mesh}"
