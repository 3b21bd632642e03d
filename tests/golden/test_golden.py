"""Every golden file agrees with our model, without PyTorch, on the backend at hand."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from tests import processes
from tests.golden import golden
from tests.tolerances import TABLE

CASES = {case.name: case for case in golden.cases()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize(
    "dtype", ["float64", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "bfloat16"))]
)
def test_agrees(case, dtype):
    backend = jax.default_backend()
    if dtype == "float64" and ("golden", "float64", backend) not in TABLE:
        pytest.skip(f"a {backend} has no float64")
    with jax.enable_x64(dtype == "float64"):
        assert golden.compare(case, golden.read(case.path), dtype, backend) >= 1


@each_case
def test_a_changed_weight_shows(case):
    """The mutation test without PyTorch: other weights give other outputs."""
    other, backend = dataclasses.replace(case, seed=case.seed + 1), jax.default_backend()
    kept = dataclasses.replace(golden.read(case.path), seed=other.seed)
    dtype = "float64" if ("golden", "float64", backend) in TABLE else "float32"
    with jax.enable_x64(dtype == "float64"), pytest.raises(AssertionError, match=r"x the tolerance|not equal"):
        golden.compare(other, kept, dtype, backend)


@each_case
def test_is_small_and_says_what_made_it(case):
    assert case.path.stat().st_size < 100_000
    found = golden.read(case.path)
    assert {"torch", "numpy"} <= found.versions.keys()
    assert found.inputs


@pytest.fixture(scope="module")
def on_eight_devices():
    return json.loads(processes.output("-m", "tests.golden.on_devices", timeout=1100).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@each_case
def test_agrees_on_eight_devices(case, on_eight_devices):
    """The original's numbers in float64, with parameters divided over eight devices."""
    divided, problem = on_eight_devices[case.name]
    assert not problem, problem
    assert divided
