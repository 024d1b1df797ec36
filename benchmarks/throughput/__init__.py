"""Messages a second: msgbus against the broker's client library by hand, each with the same guarantee.

A broker is the one that `MSGBUS_TEST_<NAME>_URL` names, else one that `tests/brokers.py` starts. Every run is a process of its own.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from tests.brokers import Unavailable, server

from benchmarks import Options, Result
from benchmarks.throughput.measuring import IN_FLIGHT, PATIENCE, PUBLISHERS, Run, Took

ROUNDS = 5
COUNT = 10_000
OURS = "with_msgbus"
BY_HAND = {"redis": "redis-py", "rabbitmq": "aio-pika", "kafka": "aiokafka"}
TARGETS = {
    "redis": {"drain": 3.0, "publish": 3.0},
    "rabbitmq": {"drain": 1.3, "publish": 1.0},
    "kafka": {"drain": 1.0, "publish": 2.0},
}
LAYOUTS: dict[str, tuple[int | None, ...]] = {"kafka": (None, 8, 1)}
"""Partitions of the topic. None: each contender's topic as it comes to be without a word, 8 by msgbus and one by a broker itself; then the
same for both. It matters: aiokafka's batches are a partition's."""
WHAT = {"drain": f"drain, {IN_FLIGHT} in flight", "publish": f"publish, {PUBLISHERS} in flight"}
GUARANTEE = (
    "Guarantee of every contender: durable topic or queue, each publish confirmed by the broker, ack after the handler has returned, "
    "at least once; bodies are read and written by pydantic."
)


def run(options: Options) -> list[Result]:
    """Every broker that there is, or those named. Raises `RuntimeError` when a run fails, or leaves messages behind again and again."""
    for name in options.brokers:
        if name not in BY_HAND:
            raise SystemExit(f"no broker is called {name!r}; there are: {', '.join(BY_HAND)}")
    results: list[Result] = []
    for name in options.brokers or BY_HAND:
        try:
            url = server(name).url
        except Unavailable as why:
            if options.brokers:
                raise SystemExit(f"{name}: {why}") from why
            print(f"throughput: not on {name}: {why}", file=sys.stderr)
            continue
        results += [measure(name, url, what, options, shards) for what in WHAT for shards in LAYOUTS.get(name, (None,))]
    return results


def measure(broker: str, url: str, what: str, options: Options, shards: int | None) -> Result:
    """Rounds of all contenders. One in which a message was left behind, or lost, does not count, and another one is run."""
    rounds, count = options.rounds or ROUNDS, options.count or COUNT
    contenders = {"msgbus": OURS, BY_HAND[broker]: f"{broker}_by_hand"}
    names = list(contenders)
    kept: list[dict[str, Run]] = []
    failed = 0
    while len(kept) < rounds:
        turn = (len(kept) + failed) % len(names)
        found = {
            name: in_process(contenders[name], what, url, count, options.work if what == "drain" else 0.0, shards)
            for name in names[turn:] + names[:turn]
        }
        if any(one.left for one in found.values()):
            failed += 1
            print(f"{broker} {what}: left behind: " + ", ".join(f"{one.left} by {name}" for name, one in found.items()), file=sys.stderr)
            if failed > rounds:
                raise RuntimeError(f"{broker} {what}: messages were left behind in {failed} rounds")
        else:
            kept.append(found)
    ours, theirs = names
    ratios = [one[theirs].took.seconds / one[ours].took.seconds for one in kept]
    cpu = {name: statistics.median(one[name].took.cpu / count * 1e6 for one in kept) for name in names}
    layout = {None: ", partitions by default", 1: ", 1 partition"}.get(shards, f", {shards} partitions") if broker in LAYOUTS else ""
    waits = f", each waits {options.work * 1000:g} ms" if options.work and what == "drain" else ""
    notes = [*versions(broker, kept[0].values()), GUARANTEE]
    notes.append(
        f"{broker} {what}{layout}, CPU a message in the client: " + ", ".join(f"{taken:.0f} µs {name}" for name, taken in cpu.items())
    )
    if failed:
        notes.append(f"{broker} {what}: {failed} more rounds do not count, since messages were left behind.")
    return Result(
        name=f"throughput of {count:,} messages: {broker}",
        what=WHAT[what] + layout + waits,
        unit="/s",
        measures={name: statistics.median(count / one[name].took.seconds for one in kept) for name in names},
        ratio=statistics.median(ratios),
        limit=None if waits else TARGETS[broker][what],
        rounds=rounds,
        at_least=True,
        ratios=ratios,
        notes=notes,
    )


def in_process(contender: str, what: str, url: str, count: int, work: float, shards: int | None) -> Run:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.throughput", contender, what, url, str(count), str(work), str(shards or 0)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender} {what} ended with exit code {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout)
    return Run(Took(**found.pop("took")), **found)


def versions(broker: str, runs: Iterable[Run]) -> list[str]:
    """What took part, in one line."""
    found = {"Python": platform.python_version(), "pydantic": version("pydantic")}
    for one in runs:
        found |= one.versions
    return [f"{broker}: " + "; ".join(f"{name} {text}" for name, text in found.items())]
