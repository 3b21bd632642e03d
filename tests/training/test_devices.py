"""Eight devices train as one does: a step of every paper in float64, on a mesh of eight and on one device."""

import json

import pytest

from tests import processes
from tests.training.on_devices import MESHES, chosen


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """By recipe and mesh: what is furthest apart after a step, in units of the tolerance; or an error."""
    out = tmp_path_factory.mktemp("devices") / "differences.json"
    processes.output("-m", "tests.training.on_devices", out, timeout=1100)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("row", chosen(), ids=lambda row: row.name)
def test_eight_devices_equal_one(differences, row):
    """Loss, metrics, every gradient, every parameter, statistic and moment of the optimiser after a step."""
    assert row.name not in differences, differences[row.name]
    for mesh, wanted in MESHES.items():
        if wanted(row):
            name, apart = differences[f"{row.name} {mesh}"]
            assert apart < 1, f"{name} is {apart:.3g} times the tolerance away on {mesh}"
