"""The command `python -m benchmarks [PAPER…] [--only WORDS] [--save [FILE.md]] [--minutes 20] [--dtype bfloat16] …`."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import date
from pathlib import Path

from benchmarks import framework, results
from benchmarks.results import seconds


def show(console: object, paper: str, rows: dict[str, results.Row], options: argparse.Namespace) -> None:
    """One paper's table."""
    from rich.table import Table

    table = Table(title=f"{paper}, {options.dtype}, {options.threads} threads; warm median, compilation apart")
    columns = ["case", "contender", "time", "quartiles", "compile", "ours is", "agreement"]
    for column in columns + (["peak memory"] if options.memory else []):
        table.add_column(column, justify="left" if column in ("case", "contender", "agreement") else "right")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, f"[red]{row['error']}[/]")
        for index, (contender, found) in enumerate(row.get("contenders", {}).items()):
            ratio, speed = "", found["ours_is_times_as_fast"]
            if speed is not None:
                ratio = f"{speed:.2f}x"
                if row["target"] and index == 1:
                    colour = "green" if speed >= row["target"] else "red"
                    ratio = f"[{colour}]{ratio}[/] (target {row['target']:g}x)"
            low, high = found["quartiles_s"]
            cells = [name if not index else "", contender, seconds(found["median_s"])]
            cells += [f"{seconds(low)} – {seconds(high)}", seconds(found["compile_s"]), ratio, found["agreement"]]
            cells += [f"{found['peak_memory_bytes'] / 1e6:,.0f} MB"] if found["peak_memory_bytes"] else []
            table.add_row(*cells)
        table.add_section()
    console.print(table)  # type: ignore[attr-defined]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=framework.__doc__.split("\n")[0])
    known = framework.papers()
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"all, or some of {', '.join(known)}")
    parser.add_argument("--only", metavar="WORDS", help="papers, or parts of names of cases, with commas between")
    record = Path(__file__).parent / "records" / f"{date.today()}.md"
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=record,
        metavar="FILE.md",
        help="keep a dated table, and a .json beside it; without a name under benchmarks/records/",
    )
    parser.add_argument("--minutes", type=float, help="begin no row later (default: 20 for all papers)")
    parser.add_argument("--threads", type=int, default=2, help="for every contender (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' models")
    parser.add_argument("--repeats", type=int, help="warm calls, instead of each case's own number")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in a process each")
    options = parser.parse_args(arguments)
    if unknown := [paper for paper in options.papers if paper not in known]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    if options.save and options.save.suffix != ".md":
        parser.error("--save names a file that ends in .md")
    framework.limit_threads(options.threads)
    os.environ["AUDIOZOO_BENCHMARK_DTYPE"] = options.dtype
    selected = results.select(options.papers or results.in_order(known), options.only)
    if not selected:
        parser.error(f"no paper and no case is called {options.only!r}")

    from rich.console import Console

    console, rows = Console(), {paper: {} for paper in selected}
    if not console.is_terminal:
        console = Console(width=160)
    if Path("/proc/loadavg").exists() and os.getloadavg()[0] > 0.5:
        print(f"other programs run: the load is {os.getloadavg()[0]:.1f}, and times will be too long", file=sys.stderr)
    try:
        kept = results.Results(options.save)
    except ValueError as error:
        parser.error(str(error))
    total = sum(map(len, selected.values()))

    def on_row(paper: str, name: str, row: results.Row) -> None:
        rows[paper][name] = row
        kept.add(paper, name, row)
        found = row.get("contenders", {}).items()
        told = row.get("error") or ", ".join(f"{n} {seconds(c['median_s'])}" for n, c in found)
        print(f"{sum(map(len, rows.values()))}/{total} {paper}: {name}: {told}", file=sys.stderr, flush=True)

    minutes = options.minutes or (None if options.papers or options.only else 20.0)
    try:
        results.run(selected, on_row, minutes=minutes, repeats=options.repeats, memory=options.memory)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    for paper, found in rows.items():
        if found:
            show(console, paper, found, options)
    if options.save:
        console.print(f"kept as {options.save} and {options.save.with_suffix('.json').name}")
    return (
        1 if any("error" in row and row["error"] != results.NO_TIME for p in rows.values() for row in p.values()) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
