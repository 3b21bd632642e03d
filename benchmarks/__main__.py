"""The command `python -m benchmarks PAPER… [--dtype bfloat16] [--threads 2] [--only NAME] [--memory] [--save]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import framework


def seconds(value: float) -> str:
    """A time with three digits and a unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=framework.__doc__.split("\n")[0])
    parser.add_argument("papers", nargs="+", choices=framework.papers(), metavar="PAPER", help="one of %(choices)s")
    parser.add_argument("--only", help="run the cases whose names contain this")
    parser.add_argument("--threads", type=int, default=2, help="for every contender (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' models")
    parser.add_argument("--repeats", type=int, help="warm calls, instead of each case's own number")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in a process each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--save", action="store_true", help="keep a dated record under benchmarks/records/")
    options = parser.parse_args(arguments)
    framework.limit_threads(options.threads)
    os.environ["AUDIOZOO_BENCHMARK_DTYPE"] = options.dtype

    from rich.console import Console
    from rich.table import Table

    console, records = Console(), []
    if not console.is_terminal:
        console = Console(width=160)
    for paper in options.papers:
        table = Table(title=f"{paper}, {options.dtype}, {options.threads} threads; warm median, compilation apart")
        columns = ["case", "contender", "time", "quartiles", "compile", "ours is", "agreement"]
        for column in columns + (["peak memory"] if options.memory else []):
            table.add_column(column, justify="left" if column in ("case", "contender", "agreement") else "right")

        def show(case: framework.Case, timings: dict[str, framework.Timing], table: Table = table) -> None:
            ours = timings[framework.OURS].median
            for index, (name, timing) in enumerate(timings.items()):
                low, high = timing.quartiles
                ratio = ""
                if name != framework.OURS:
                    speed = timing.median / ours
                    ratio = f"{speed:.2f}x"
                    if case.target and index == 1:
                        good = speed >= case.target
                        ratio = f"[{'green' if good else 'red'}]{ratio}[/] (target {case.target:g}x)"
                row = [case.name if not index else "", name, seconds(timing.median)]
                row += [f"{seconds(low)} – {seconds(high)}", seconds(max(0.0, timing.first - timing.median)), ratio]
                row += [timing.agreement]
                row += [f"{timing.peak_memory / 1e6:,.0f} MB"] if timing.peak_memory else []
                table.add_row(*row)
            table.add_section()
            print(f"{case.name}: {', '.join(f'{n} {seconds(t.median)}' for n, t in timings.items())}", file=sys.stderr)

        record = framework.run_paper(
            paper, only=options.only, repeats=options.repeats, memory=options.memory, on_case=show
        )
        if not record["cases"]:
            print(f"{paper} has no case named {options.only!r}.", file=sys.stderr)
            return 2
        console.print(table)
        records.append(record)
        if options.save:
            kind = "" if options.dtype == "float32" else f"-{options.dtype}"
            path = framework.RECORDS / f"{record['date'][:10]}-{paper}{kind}.json"
            framework.write_json(record, path)
            console.print(f"kept as {path.relative_to(framework.RECORDS.parents[1])}")
    if options.json:
        framework.write_json(records, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
