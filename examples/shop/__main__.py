"""`python -m examples.shop [--orders N] [--kills N]`: exit code 1 unless every order is invoiced and shipped, once, in order."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.shop import demo
from examples.shop.parts import ShopError
from examples.shop.reconcile import problems, reconciliation
from rich.console import Console
from rich.markup import escape

from msgbus.errors import MsgbusError
from msgbus.urls import hide_secrets


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.shop", description="A shop whose parts are killed while it sells.")
    parser.add_argument("--orders", type=_positive, default=100, metavar="N", help="how much customers buy (100)")
    parser.add_argument("--kills", type=_natural, default=2, metavar="N", help="how often each part is killed (2)")
    parser.add_argument("--seconds", type=_positive, default=20, metavar="S", help="how long customers take for it, about (20)")
    parser.add_argument("--patience", type=_positive, default=60, metavar="S", help="give up after so many seconds without progress (60)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep logs, and SQLite's files, in a new folder in this one")
    told = parser.parse_args(arguments)
    console = Console()
    task = demo.Run(
        url=os.environ.get("MSGBUS_URL") or None,
        database=os.environ.get("DATABASE_URL") or None,
        orders=told.orders,
        kills=told.kills,
        seconds=told.seconds,
        patience=told.patience,
        folder=told.folder,
    )
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parts are ended, whoever ends the demo
    try:
        outcome = asyncio.run(demo.run(task, console))
    except (ShopError, MsgbusError, ValueError, OSError) as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    broker = "a Redis of its own" if task.url is None else hide_secrets(task.url)
    database = "SQLite" if task.database is None else "PostgreSQL"
    title = f"{task.orders:,} orders, {broker}, {database}, {time.monotonic() - started:.1f} s"
    console.print(reconciliation(outcome, escape(title)))
    found = problems(outcome, task.orders, task.kills)
    for problem in found:
        console.print(f"[bold red]✗[/] {escape(problem)}", highlight=False)
    if not found:
        console.print("[green]✓[/] every order is invoiced and shipped, once, in the order bought", highlight=False)
    return 1 if found else 0


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _positive(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
