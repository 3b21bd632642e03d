"""The tolerance table cannot be loosened in silence."""

from __future__ import annotations

import pytest

from tests.tolerances import TABLE, tolerance

USUAL = {"float64": 1e-9, "float32": 1e-4}


@pytest.mark.parametrize("key", TABLE, ids="-".join)
def test_looser_entries_say_why(key):
    entry = TABLE[key]
    usual = USUAL.get(key[1], 0.0)
    if max(entry.rtol, entry.atol) > usual:
        assert len(entry.reason.split()) >= 8, f"{key} is looser than {usual:g} and gives no reason"


def test_what_parity_claims_is_what_the_table_holds():
    for kind in ("tap", "output", "gradient"):
        assert tolerance(kind, "float64").rtol == 1e-9
    assert tolerance("output", "float32").rtol == 1e-4
    assert tolerance("golden", "float64", "cpu").rtol == 1e-9


def test_a_backend_falls_back_to_any_and_an_unknown_kind_is_an_error():
    assert tolerance("golden", "float32", "gpu") is tolerance("golden", "float32")
    assert tolerance("golden", "float32", "tpu") is not tolerance("golden", "float32")
    with pytest.raises(KeyError):
        tolerance("golden", "float64", "tpu")
