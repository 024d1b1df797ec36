"""The outbox's relay: messages a second against `publish_many` of the same ones, and what a pending row costs beside many sent ones.

Broker Redis. The database is the one that `MSGBUS_TEST_POSTGRES_URL` names, else one that `tests/brokers.py` starts; `--database` names
others: mysql, sqlite. Every run is a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.brokers import Unavailable, server

from benchmarks import Options, Result
from benchmarks.throughput.measuring import PATIENCE

ROUNDS = 5
COUNT = 30_000
"""What happens once, such as preparing statements, is to count for little."""
DATABASES = {"postgresql": "postgres", "mysql": "mysql", "sqlite": None}
LEAST = 0.4
"""Of `publish_many`, rows without keys; with keys the ratio is only told: a key's rows go one after the other."""
FEW, MANY = 10_000, 1_000_000
"""Sent rows in the table."""
MOST = 1.2
PENDING = 2000
"""Pending rows that are sent together, beside so many sent ones."""
GUARANTEE = "Guarantee of both: each message confirmed by the broker; the relay's rows were committed before, and are marked afterwards."


def run(options: Options) -> list[Result]:
    """PostgreSQL, or the databases that are named. Raises `RuntimeError` when a run fails, or leaves something behind."""
    for name in options.databases:
        if name not in DATABASES:
            raise SystemExit(f"no database is called {name!r}; there are: {', '.join(DATABASES)}")
    results: list[Result] = []
    for name in options.databases or ("postgresql",):
        with tempfile.TemporaryDirectory() as folder:
            started = DATABASES[name]
            try:
                broker = server("redis").url
                database = f"sqlite:///{folder}/outbox.db" if started is None else server(started).url
            except Unavailable as why:
                if options.databases:
                    raise SystemExit(f"{name}: {why}") from why
                print(f"relay: not measured: {why}", file=sys.stderr)
                continue
            ask = _Asking(database, broker)
            results += [_throughput(name, ask, options, keyed) for keyed in (False, True)]
            results += _beside_sent_rows(name, ask, options)
    return results


class _Asking:
    """Runs in processes of their own."""

    def __init__(self, database: str, broker: str) -> None:
        self._places = database, broker

    def __call__(self, what: str, count: int, *words: str) -> dict[str, Any]:  # Any: JSON
        command = [sys.executable, "-m", "benchmarks.relay", what, *self._places, str(count), *words]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
        if done.returncode:
            raise RuntimeError(f"relay: {what} {' '.join(words)} ended with exit code {done.returncode}:\n{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def _throughput(database: str, ask: Callable[..., dict[str, Any]], options: Options, keyed: bool) -> Result:
    """Rounds of `publish_many` and the relay, in turns."""
    rounds, count = options.rounds or ROUNDS, options.count or COUNT
    names = ["relay", "publish_many"]
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        found.append({name: ask(name, count, "keyed" if keyed else "loose") for name in (names if number % 2 else names[::-1])})
    ratios = [one["publish_many"]["seconds"] / one["relay"]["seconds"] for one in found]
    cpu = {name: statistics.median(one[name]["cpu"] / count * 1e6 for one in found) for name in names}
    what = f"{database}, {'977 keys' if keyed else 'no keys'}"
    return Result(
        name=f"relay: {count:,} rows to Redis",
        what=what,
        unit="/s",
        measures={name: statistics.median(count / one[name]["seconds"] for one in found) for name in names},
        ratio=statistics.median(ratios),
        limit=None if keyed else LEAST,
        rounds=rounds,
        at_least=True,
        ratios=ratios,
        notes=[found[0]["relay"]["versions"], GUARANTEE, f"{what}, CPU a message: " + ", ".join(f"{cpu[n]:.0f} µs {n}" for n in names)],
    )


def _beside_sent_rows(database: str, ask: Callable[..., dict[str, Any]], options: Options) -> list[Result]:
    """Two outboxes side by side, one with few and one with many sent rows: the same pending rows are sent from each in turns."""
    rounds = options.rounds or ROUNDS
    tables = {f"{sent:,} sent rows": (f"b{uuid.uuid4().hex[:8]}_", sent) for sent in (FEW, MANY)}
    few, many = tables
    try:
        for prefix, sent in tables.values():
            ask("fill", sent, prefix)
        found: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            order = (few, many) if number % 2 else (many, few)
            found.append({name: ask("pending", options.count or PENDING, tables[name][0]) for name in order})
    finally:
        for prefix, _ in tables.values():
            ask("drop", 0, prefix)
    results: list[Result] = []
    for kind in ("together", "keyed", "lone"):
        ratios = [one[many][kind] / one[few][kind] for one in found]
        what = {
            "together": f"{PENDING:,} rows, no keys",
            "keyed": f"{PENDING:,} rows, 977 keys",
            "lone": "a row that is alone, from claim to mark",
        }[kind]
        results.append(
            Result(
                name="relay: what a pending row costs beside sent ones",
                what=f"{database}, {what}",
                unit="µs",
                measures={name: statistics.median(one[name][kind] for one in found) * 1e6 for name in tables},
                ratio=statistics.median(ratios),
                limit=MOST,
                rounds=rounds,
                ratios=ratios,
            )
        )
    return results
