"""`python -m examples.flights [--rows N] [--input FILE.csv]`: exit code 1 unless every departure is accounted for."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.flights import data, demo
from examples.flights.reconcile import punctuality, reconciliation
from examples.flights.results import Results
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from msgbus.errors import MsgbusError
from msgbus.settings import load
from msgbus.urls import hide_secrets


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.flights", description="A year of departures through one service.")
    parser.add_argument("--rows", type=_positive, metavar="N", help="only the first N departures")
    parser.add_argument("--input", type=Path, metavar="FILE.csv", help="other data, with the same columns")
    parser.add_argument("--patience", type=_positive, default=60, metavar="S", help="give up after so many seconds without progress")
    told = parser.parse_args(arguments)
    console = Console()
    _log_to(console)
    whole_year = told.rows is None and told.input is None
    url = os.environ.get("MSGBUS_URL", "memory://flights")
    results = Results()
    started = time.monotonic()
    try:
        task = demo.Run(url, demo.own_namespace(load()), data.WHOLE_YEAR.rows if whole_year else told.rows, told.patience)
        outcome = asyncio.run(demo.run(task, data.departures(told.input, told.rows), results, console))
    except (data.InputError, MsgbusError) as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        return 1
    took = time.monotonic() - started
    console.print(punctuality(results.carriers))
    title = f"{outcome.expected.rows:,} departures of {len(results.planes):,} planes, {took:.1f} s, {escape(hide_secrets(url))}"
    console.print(reconciliation(outcome, title))
    problems = outcome.problems(data.WHOLE_YEAR if whole_year else None)
    for problem in problems:
        console.print(f"[bold red]✗[/] {escape(problem)}", highlight=False)
    if not problems:
        console.print("[green]✓[/] every departure is accounted for", highlight=False)
    return 1 if problems else 0


def _log_to(console: Console) -> None:
    """Warnings and errors go above the progress bars.

    Each dead letter is an error in the log of a real service. Here thousands are meant to be, and the table counts them.
    """
    logging.getLogger("msgbus.dead_letters").setLevel(logging.CRITICAL)
    handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
