"""How long `import msgbus` takes, against the libraries that it cannot do without. Each import in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks import Options, Result

ROUNDS = 31
LIMIT = 1.25
OURS = "import msgbus"
THEIRS = "import pydantic, asyncio, tenacity"
_PROGRAM = "import time; started = time.perf_counter(); {statement}; print(time.perf_counter() - started)"


def seconds(statement: str) -> float:
    """How long a fresh interpreter takes for the statement alone, its own start not counted."""
    program = [sys.executable, "-c", _PROGRAM.format(statement=statement)]
    return float(subprocess.run(program, capture_output=True, check=True, text=True).stdout)


def run(options: Options) -> list[Result]:
    """Interleaved, the order turned round each time; the first round, which fills the caches of files, does not count."""
    rounds = options.rounds or ROUNDS
    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for number in range(rounds + 1):
        for statement in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
            taken = seconds(statement)
            if number:
                times[statement].append(taken)
    medians = {statement: statistics.median(taken) * 1000 for statement, taken in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(times[OURS], times[THEIRS], strict=True)]
    what = "time of an import in a fresh interpreter"
    return [Result("imports", what, "ms", medians, statistics.median(ratios), LIMIT, rounds, ratios=ratios)]
