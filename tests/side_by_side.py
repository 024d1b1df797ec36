"""Runs all tests, those of each broker in a process of its own beside the others: they wait more than they work.

`PYTEST_ADDOPTS` reaches all of them. Each process's output is shown when it has ended, and at the end how every broker went.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import HOUSES, SUMMARY
from tests.differential.seed import SEED, drawn

LIMIT = 25 * 60.0
"""Seconds after which what still runs is interrupted, and has failed."""
NO_TESTS = 5
"""pytest's word for it, and no failure: `PYTEST_ADDOPTS` may have chosen tests of one broker."""


def main(limit: float = LIMIT) -> int:
    """Zero where no test failed, and one ran."""
    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        summary = folder / "summary"
        variables = {SEED: str(drawn()), **os.environ, SUMMARY: str(summary)}
        running = {house: started(house, folder, variables) for house in HOUSES}
        codes: dict[str, int] = {}
        try:
            while running:
                for house in [house for house, run in running.items() if run.poll() is not None]:
                    codes[house] = running.pop(house).returncode
                    print(f"\n==== {house}\n{(folder / house).read_text(encoding='utf-8', errors='replace')}", flush=True)
                if time.monotonic() > deadline:
                    print(f"after {limit:g} s these are interrupted: {', '.join(running)}", flush=True)
                    break
                time.sleep(0.1)
        finally:
            for house, run in running.items():
                codes[house] = interrupted(run)
                print(f"\n==== {house}\n{(folder / house).read_text(encoding='utf-8', errors='replace')}", flush=True)
        if summary.exists():
            print(summary.read_text(encoding="utf-8"), end="", flush=True)
    failed = [house for house, code in codes.items() if code not in (0, NO_TESTS)]
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return int(bool(failed) or all(code == NO_TESTS for code in codes.values()))


def started(house: str, folder: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """The process with the tests of a house."""
    with (folder / house).open("wb") as log:
        return subprocess.Popen(command(house), env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def command(house: str) -> list[str]:
    """What it runs; without pytest's cache, which is for one process at a time."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--house", house, "--pyargs", "tests", "msgbus.testing"]


def interrupted(run: subprocess.Popen[bytes]) -> int:
    """A process told to end, as by a person at a terminal, and ended where it does not."""
    run.send_signal(signal.SIGINT)
    try:
        return run.wait(30) or 1
    except subprocess.TimeoutExpired:
        run.kill()
        return run.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended too
    sys.exit(main())
