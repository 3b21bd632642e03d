"""Benchmarks in one go: rows that fail, hang or take their process with them cost no other row."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from benchmarks import framework, results
from benchmarks.framework import Case

PAPER = "tests.test_benchmarks"


def value(x: float, wait: float = 0.0):
    def factory():
        def run():
            time.sleep(wait)
            return np.float32(x)

        return run

    return factory


def dies():
    os._exit(7)


def refuses():
    raise ValueError("no such weights | none")


CASES = (
    Case("dies", dies, {"original": value(1.0)}, target=1.0),
    Case("half", value(1.0, 0.01), {"original": value(1.0, 0.03)}, 1.5, framework.within(1e-6), repeats=5),
    Case("refuses", refuses, {"original": value(1.0)}, target=1.0),
    Case("hangs", value(1.0, 60.0), {}, target=None),
    Case("differs", value(1.0), {"original": value(2.0)}, 1.0, framework.within(1e-6)),
    Case("alone", value(1.0), {}),
)


def test_every_row_is_kept_as_it_comes(tmp_path):
    file = tmp_path / "RESULTS.md"
    kept, order = results.Results(file), []

    def on_row(paper, name, row):
        kept.add(paper, name, row)
        order.append(name)
        assert len(json.loads(file.with_suffix(".json").read_text())["rows"]) == len(order)

    results.run(results.select([PAPER]), on_row, limit=4.0)
    rows = {name: row for (_, name), row in kept.rows.items()}
    assert order == ["dies", "half", "refuses", "differs", "hangs", "alone"]
    assert rows["dies"]["error"] == "its process ended with 7"
    assert rows["hangs"]["error"] == "took more than 4 s"
    assert rows["refuses"]["error"] == "ValueError: no such weights | none"
    assert "ours and the original differ by 1" in rows["differs"]["error"]
    ours, theirs = (rows["half"]["contenders"][name] for name in ("audiozoo", "original"))
    assert theirs["ours_is_times_as_fast"] == theirs["median_s"] / ours["median_s"] > 1.5
    assert theirs["repeats"] == 5
    assert rows["alone"]["contenders"].keys() == {"audiozoo"}
    assert sum("error" in row for row in rows.values()) == 4
    table = file.read_text()
    assert "1 of 1 rows reach their target" in table
    assert "ValueError: no such weights / none" in table
    assert all(len(line.replace("×", "").split("|")) == 12 for line in table.split("\n") if line.startswith("|"))

    # A later run replaces its own rows and keeps the others; one that fails does not replace what was measured.
    again = results.Results(file)
    assert again.rows == kept.rows
    again.add(PAPER, "half", {"error": results.NO_TIME})
    assert "contenders" in again.rows[PAPER, "half"]

    # A record is of one machine.
    record = json.loads(file.with_suffix(".json").read_text())
    record["surroundings"]["memory_bytes"] += 8192  # as after another start
    file.with_suffix(".json").write_text(json.dumps(record))
    assert results.Results(file).rows == again.rows
    record["surroundings"]["processor"] = "another"
    file.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="rows measured with other processor; save to another file"):
        results.Results(file)


def test_papers_share_the_time_and_no_row_begins_after_it():
    found = {}
    selected = results.select([PAPER], "half,alone")
    results.run(selected, lambda _, name, row: found.update({name: row}), minutes=1e-9)
    assert found == {name: {"error": results.NO_TIME} for name in ("half", "alone")}


def test_papers_and_cases_are_chosen_by_name():
    assert list(results.select(framework.papers(), "whisper,hifigan")) == ["hifigan", "whisper"]
    assert results.in_order(["training", "hifigan", "whisper"]) == ["whisper", "hifigan", "training"]
    assert [c.name for c in results.select(["vits", "encodec"], "Piper")["vits"]] == [
        "Piper joe, medium, 2.8 s",
        "Piper joe, medium, 5.7 s",
    ]
    assert not results.select(framework.papers(), "no such row")


@pytest.mark.parametrize("paper", framework.papers())
def test_rows_have_names_of_their_own(paper):
    names = [case.name for case in framework.cases_of(paper)]
    assert names
    assert len(set(names)) == len(names)
    assert not any("|" in name for name in names)


def test_the_readme_says_what_was_measured():
    def rows(name):
        return json.loads((results.ROOT / "benchmarks" / name).read_text(encoding="utf-8"))["rows"]

    text = (results.ROOT / "README.md").read_text(encoding="utf-8")
    _, rest = text.split("<!-- speeds: benchmarks/RESULTS.json, RESULTS-amd.json -->\n")
    measured = results.summary({"Xeon": rows("RESULTS.json"), "EPYC": rows("RESULTS-amd.json")})
    assert rest.split("<!-- end of speeds -->")[0] == measured
