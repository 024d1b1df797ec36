"""`python -m benchmarks [name …]`: runs the benchmarks named, or all; exit code 1 when one is over its limit, or below it."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks import Options, Result


def names() -> list[str]:
    """The benchmarks that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_"))


def show(results: Sequence[Result]) -> None:
    """The results of one benchmark, for people."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title in dict.fromkeys(result.name for result in results):
        table = Table(title=title, title_justify="left")
        for heading in ("what", "contender", "median", "ratio", "from – to", "limit", ""):
            table.add_column(heading, justify="right" if heading in ("median", "ratio", "from – to", "limit") else "left")
        for result in results:
            if result.name == title:
                rows(table, result)
        console.print(table)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        console.print(note, markup=False, highlight=False)


def rows(table: Table, result: Result) -> None:
    """One result: a row a contender, and the ratio beside the first."""
    limit = "" if result.limit is None else f"{'≥' if result.at_least else '≤'} {result.limit:g}"
    spread = f"{min(result.ratios):.2f} – {max(result.ratios):.2f}" if result.ratios else ""
    rounds = "one run" if result.rounds == 1 else f"{result.rounds} rounds"
    verdict = "" if result.limit is None else "kept" if result.kept else "NOT KEPT"
    beside = [f"{result.ratio:.2f}", spread, limit, verdict]
    for number, (contender, value) in enumerate(result.measures.items()):
        first = number == 0
        what = f"{result.what} ({rounds})" if first else ""
        table.add_row(what, contender, f"{value:,.1f} {result.unit}", *(beside if first else [""] * len(beside)))
    table.add_section()


def main() -> int:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios, measured side by side in one run.")
    parser.add_argument("name", nargs="*", help=f"which to run (default: all): {', '.join(names())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--rounds", type=int, help="rounds of each, in place of its own number")
    parser.add_argument("--broker", action="append", default=[], help="throughput: this broker alone; may be said again")
    parser.add_argument("--database", action="append", default=[], help="relay: this database in place of postgresql; may be said again")
    parser.add_argument("--count", type=int, help="throughput, relay: messages a run (default 10,000; 30,000)")
    parser.add_argument("--work", type=float, default=0.0, metavar="MS", help="throughput: a handler waits so long (default: not at all)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.name) - set(names()))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are: {', '.join(names())}")
    if any(number is not None and number < 1 for number in (arguments.rounds, arguments.count)):
        parser.error("--rounds and --count are at least 1")
    options = Options(arguments.rounds, arguments.count, arguments.broker, arguments.database, arguments.work / 1000)
    results: list[Result] = []
    for name in arguments.name or names():
        found = importlib.import_module(f"benchmarks.{name}").run(options)
        show(found)
        results += found
    if arguments.json is not None:
        report = {"python": platform.python_version(), "system": platform.platform(), "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result.kept for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
