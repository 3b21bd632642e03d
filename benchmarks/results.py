"""Many rows in one go, each kept as soon as it is there: no row that fails, hangs or is killed takes another with it.

A paper's rows run in a process of their own, in turn. The process notes each row as it begins and as it ends; one that
dies, or stays at a row for too long, is started again behind that row. Papers share the time there is: what one leaves
over goes to the next, and rows for which no time was left are named as such.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import framework

ROOT = Path(__file__).resolve().parents[1]
ROW_SECONDS = 1200.0  # no row takes longer: four times five seconds of music take ten minutes in all
WARM_SECONDS = 6.0  # of warm calls; at least three rounds are made
NO_TIME = "not run: the time was up"

Row = dict[str, Any]  # what is known of a case: "contenders" by name with times and ratios, or "error"
Key = tuple[str, str]  # paper and case


def seconds(value: float) -> str:
    """A time with three digits and a unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


# --- the process of one paper ----------------------------------------------------------------------------------------


def _busy() -> float:
    """Seconds of processor time that the whole machine has spent, on Linux."""
    with contextlib.suppress(OSError, ValueError):
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return sum(os.times()[:4])


def measure_row(case: framework.Case, paper: str, repeats: int | None, memory: bool) -> Row:
    """One case's row; `elsewhere` is the share of the cores that other processes took meanwhile."""
    row: Row = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "target": case.target}
    start, busy, own = time.perf_counter(), _busy(), sum(os.times()[:4])
    try:
        timings = framework.measure(case, repeats, WARM_SECONDS)
        if memory:
            for name, timing in timings.items():
                timing.peak_memory = framework.peak_memory(paper, case.name, name)
    except Exception as error:
        traceback.print_exc()
        return row | {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    took = time.perf_counter() - start
    others = (_busy() - busy) - (sum(os.times()[:4]) - own)
    ours = timings[framework.OURS].median
    ratios = {name: None if name == framework.OURS else timing.median / ours for name, timing in timings.items()}
    contenders = {name: timing.record(ratios[name]) for name, timing in timings.items()}
    elsewhere = max(0.0, others / (took * (os.cpu_count() or 1)))
    return row | {"took_s": round(took, 1), "elsewhere": round(elsewhere, 3), "contenders": contenders}


def _write_rows(paper: str, names: Sequence[str], file: str, until: float, repeats: int | None, memory: bool) -> None:
    """Run the named cases, as long as it is not `until` yet, and append what is found to `file`, a line each."""
    wanted = {case.name: case for case in framework.cases_of(paper)}
    with Path(file).open("a", encoding="utf-8") as lines:
        for name in names:
            if time.time() >= until:
                break
            for entry in ({"begins": name}, {"case": name}):
                if "case" in entry:
                    entry["row"] = measure_row(wanted[name], paper, repeats, memory)
                lines.write(json.dumps(entry) + "\n")
                lines.flush()


def run_rows(
    paper: str,
    names: Sequence[str],
    on_row: Callable[[str, Row], None],
    *,
    until: float = float("inf"),
    limit: float = ROW_SECONDS,
    repeats: int | None = None,
    memory: bool = False,
) -> None:
    """A paper's cases, in a process that is replaced where it dies or hangs.

    Args:
        paper: its module name.
        names: of its cases.
        on_row: called with each case's name and row as soon as it is known.
        until: no case is begun after this, in seconds of `time.time()`.
        limit: seconds after which a case is given up.
        repeats: warm calls, instead of each case's own number.
        memory: also measure peak memory, each contender in a process of its own.
    """
    left = list(names)
    while left and time.time() < until:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "rows.jsonl"
            file.touch()
            call = (paper, left, str(file), until, repeats, memory)
            program = f"from benchmarks.results import _write_rows; inf = float('inf'); _write_rows{call!r}"
            # What compiles is timed: a cache of earlier compilations would hide it.
            environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
            process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
            begun, since, seen, end = None, time.time(), 0, None
            try:
                while end is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        end = process.wait(0.2)
                    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
                    for entry in entries[seen:]:
                        since = time.time()
                        begun = entry.get("begins")
                        if "case" in entry:
                            left.remove(entry["case"])
                            on_row(entry["case"], entry["row"])
                    seen = len(entries)
                    if end is None and time.time() - since > limit:
                        break
            finally:
                process.kill()
                process.wait()
        if end == 0:
            return
        name = begun or left[0]
        reason = f"took more than {limit:.0f} s" if end is None else f"its process ended with {end}"
        left.remove(name)
        on_row(name, {"error": reason})


# --- all papers ------------------------------------------------------------------------------------------------------


def in_order(papers: Iterable[str]) -> list[str]:
    """In the order of the README's table, so that it is the last of its papers for which time may be short."""
    from audiozoo import registry

    order = [paper.name for paper in registry.PAPERS]
    return sorted(papers, key=lambda paper: order.index(paper) if paper in order else len(order))


def select(papers: Iterable[str], only: str | None = None) -> dict[str, list[framework.Case]]:
    """The cases of papers, or those in whose name or whose paper's one of the words of `only` stands."""
    words = [word.strip() for word in (only or "").split(",") if word.strip()]

    def wanted(paper: str, case: framework.Case) -> bool:
        return not words or any(word == paper or word in case.name for word in words)

    found = {paper: [case for case in framework.cases_of(paper) if wanted(paper, case)] for paper in papers}
    return {paper: cases for paper, cases in found.items() if cases}


def run(
    selected: Mapping[str, Sequence[framework.Case]],
    on_row: Callable[[str, str, Row], None],
    *,
    minutes: float | None = None,
    **options: Any,
) -> None:
    """Rows with a target first, then the others and those that had to wait.

    Args:
        selected: papers and their cases.
        on_row: called with paper, case and row as soon as one is known.
        minutes: no row is begun after these.
        **options: of `run_rows`.
    """
    ends = time.time() + 60 * minutes if minutes else float("inf")
    left = {paper: [case.name for case in cases] for paper, cases in selected.items()}
    targets = {(paper, case.name) for paper, cases in selected.items() for case in cases if case.target}
    for first in (True, False):
        turns = {paper: [n for n in names if not first or (paper, n) in targets] for paper, names in left.items()}
        waiting = sum(map(len, turns.values()))
        for paper, names in turns.items():
            share = (ends - time.time()) * len(names) / max(waiting, 1)
            waiting -= len(names)

            def done(name: str, row: Row, paper: str = paper) -> None:
                left[paper].remove(name)
                on_row(paper, name, row)

            run_rows(paper, names, done, until=time.time() + share, **options)
    for paper, names in left.items():
        for name in names:
            on_row(paper, name, {"error": NO_TIME})


# --- keeping them ----------------------------------------------------------------------------------------------------


def _told(name: str, value: object) -> object:
    """A fact of the surroundings as the table tells it: a machine's memory differs by pages after each start."""
    return round(value / 2**30) if name == "memory_bytes" and isinstance(value, int) else value


class Results:
    """The rows of a run, and those that the file held already of the same machine, versions and dtype.

    They are kept twice: whole as JSON, and as a table in Markdown. Both are written anew with every row.

    Raises:
        ValueError: the file holds rows of another machine, other versions or another dtype.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.surroundings = framework.surroundings()
        self.rows: dict[Key, Row] = {}
        if file is not None and file.with_suffix(".json").is_file():
            kept = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            other = [
                name
                for name, value in kept["surroundings"].items()
                if name != "date" and _told(name, value) != _told(name, self.surroundings.get(name))
            ]
            if other:
                raise ValueError(f"{file} keeps rows measured with other {', '.join(other)}; save to another file.")
            self.rows = {(row["paper"], row["case"]): row for row in kept["rows"]}

    def add(self, paper: str, case: str, row: Row) -> None:
        """One more row; what could not be measured does not replace what once was."""
        if "error" not in row or "error" in self.rows.get((paper, case), {"error": ""}):
            self.rows[paper, case] = {"paper": paper, "case": case, **row}
        if self.file is not None:
            record = {"surroundings": self.surroundings, "rows": list(self.rows.values())}
            framework.write_whole(json.dumps(record, indent=1) + "\n", self.file.with_suffix(".json"))
            framework.write_whole(self.markdown(), self.file)

    def markdown(self) -> str:
        """The table, and above it what the numbers depend on."""
        at = self.surroundings
        versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
        measured = [row for row in self.rows.values() if "contenders" in row]
        days = sorted({row["date"][:10] for row in measured}) or [at["date"][:10]]
        targets = [row for row in measured if row["target"]]
        met = sum(_ratio(row) >= row["target"] for row in targets)
        busy = sum(row["elsewhere"] > 0.05 for row in measured)
        memory = f", {_told('memory_bytes', at['memory_bytes'])} GB" if at["memory_bytes"] else ""
        lines = [
            "# Ours against the originals",
            "",
            f"`python -m benchmarks`, {' to '.join(dict.fromkeys((days[0], days[-1])))}: {at['processor']}, "
            f"{at['cores']} cores{memory}, {at['threads']} threads for every contender; {at['dtype']}; "
            f"Python {at['python']}, {versions}.",
            "",
            "All contenders of a row ran in one process, in turn; what they return was compared first. Times are "
            f"medians of warm calls, compilation apart. {met} of {len(targets)} rows reach their target. "
            f"Other programs took more than 5 % of the cores during {busy} of {len(measured)} rows.",
            "",
            "| paper | case | audiozoo | original | | ours is | target | calls | compilation | agreement |",
            "| --- | --- | --: | --- | --: | --: | --: | --: | --: | --- |",
        ]
        papers = list(dict.fromkeys(paper for paper, _ in self.rows))
        for (paper, case), row in sorted(self.rows.items(), key=lambda item: papers.index(item[0][0])):
            if "error" in row:
                lines.append(f"| {paper} | {case} | {row['error'].replace('|', '/')} | | | | | | | |")
                continue
            contenders = dict(row["contenders"])
            ours = contenders.pop(framework.OURS)
            own = [seconds(ours["median_s"]), str(ours["repeats"]), seconds(ours["compile_s"])]
            for index, (name, theirs) in enumerate(contenders.items() or [("", None)]):
                ratio, target = "", ""
                if theirs:
                    ratio = f"{theirs['ours_is_times_as_fast']:.2f}×"
                    target = f"{row['target']:g}×" if row["target"] and not index else ""
                cells = [paper, case, own[0], name, seconds(theirs["median_s"]) if theirs else "", ratio, target]
                lines.append(f"| {' | '.join([*cells, *own[1:], theirs['agreement'] if theirs else ''])} |")
        return "\n".join(lines) + "\n"


def summary(records: Mapping[str, Iterable[Row]]) -> str:
    """A table in Markdown with a line for each paper: between what ratios its rows with a target lie, by machine."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for machine, rows in records.items():
        for row in rows:
            if "contenders" in row and row["target"]:
                ratios.setdefault(row["paper"], {}).setdefault(machine, []).append(_ratio(row))

    def cell(found: Sequence[float]) -> str:
        if not found:
            return ""
        low, high = (f"{ratio:.2f}" for ratio in (min(found), max(found)))
        return f"{low if low == high else f'{low} to {high}'} ({len(found)})"

    lines = [f"| times as fast as the original (rows) | {' | '.join(records)} |", "| --- |" + " --- |" * len(records)]
    lines += [f"| {paper} | {' | '.join(cell(on.get(name, [])) for name in records)} |" for paper, on in ratios.items()]
    return "\n".join(lines) + "\n"


def _ratio(row: Row) -> float:
    """How many times as fast ours is as the original that the target is about."""
    return next(c["ours_is_times_as_fast"] for name, c in row["contenders"].items() if name != framework.OURS)
