"""`python -m benchmarks [name …] [--json FILE]`: runs the benchmarks named, or all; exit code 1 when one is over its limit."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import benchmarks
from benchmarks import Result


def names() -> list[str]:
    """The benchmarks that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_"))


def show(result: Result) -> None:
    """One benchmark's result, for people."""
    rounds = "one run" if result.rounds == 1 else f"{result.rounds} rounds, medians"
    print(f"{result.name}: {result.what} ({rounds})")
    for contender, value in result.measures.items():
        print(f"  {contender:<40} {value:10.1f} {result.unit}")
    limit = "" if result.limit is None else f", limit {result.limit:g}: {'kept' if result.kept else 'NOT KEPT'}"
    print(f"  ratio {result.ratio:.3f}{limit}")


def main() -> int:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios, measured side by side in one run.")
    parser.add_argument("name", nargs="*", help=f"which to run (default: all): {', '.join(names())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.name) - set(names()))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are: {', '.join(names())}")
    results: list[Result] = []
    for name in arguments.name or names():
        results.append(importlib.import_module(f"benchmarks.{name}").run())
        show(results[-1])
    if arguments.json is not None:
        report = {"python": platform.python_version(), "system": platform.platform(), "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result.kept for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
