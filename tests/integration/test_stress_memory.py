"""Load and deaths on the memory broker, judged by the history checker; and the proof that the checker sees what is wrong."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.suite.brokers import behind
from tests.unit.suite.sabotaged import AcksFirst, ForgetsSome, ReordersAKey, SharesItsShards

from msgbus.contract.adapter import HasDepth
from msgbus.errors import BrokerUnavailable, PublishRejected, PublishUnknown
from msgbus.testing.history import Event, History, How, Report, What, check
from msgbus.testing.stage import Broker, Order, Stage, Worker, opened
from msgbus.topic import Topic

KEYED = Topic("orders", Order, key="id")
GROUP = "suite"
CONCURRENCY = 16
WINDOW = 32


class Load:
    """Three workers of one group that die and drain, a publisher of numbered messages on many keys, and the history of it all."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.history = History()
        self.incidents = 0
        self._stage = stage
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._workers: list[tuple[str, Worker]] = []
        self._dead: set[str] = set()
        self._finished: set[str] = set()

    def note(self, pid: str, f: What, order: Order, how: How = "ok", *, group: str | None = GROUP) -> None:
        """An event of now."""
        self.history.note(Event(time.monotonic(), pid, f, how, f"{order.id}-{order.n}", order.id, order.n, group))
        if f == "done":
            self._finished.add(f"{order.id}-{order.n}")

    async def start_worker(self) -> None:
        """One more process of the group. A dead one notes nothing more, though its coroutines take a moment to end."""
        pid = f"worker{next(self._numbers)}"
        bus = self._stage.bus()

        @bus.subscribe(KEYED, concurrency=CONCURRENCY, window=WINDOW)
        async def handle(order: Order) -> None:
            if pid in self._dead:
                return
            self.note(pid, "start", order)
            try:
                await asyncio.sleep(self._random.uniform(0, 0.01))
            except asyncio.CancelledError:
                if pid not in self._dead:
                    self.note(pid, "fail", order, "info")
                raise
            if pid not in self._dead:
                self.note(pid, "done", order)
                await asyncio.sleep(self._random.uniform(0, 0.002))  # a death between the effect and the ack is what repeats it

        self._workers.append((pid, await self._stage.start(bus)))

    async def replace_a_worker(self, *, kill: bool) -> None:
        """One dies, or drains, and another takes its place."""
        pid, worker = self._workers.pop(self._random.randrange(len(self._workers)))
        if kill:
            self._dead.add(pid)
            self.incidents += 1
            await worker.kill()
        else:
            await worker.stop()
        await self.start_worker()

    async def publish(self, keys: int, each: int) -> None:
        """0 to `each` of every key; one publisher a key, one message after the other. An unknown one is published again, same id."""
        publisher = await self._stage.publisher()

        async def one_key(key: str) -> None:
            for n in range(each):
                order = Order(id=key, n=n)
                while True:
                    self.note("publisher", "publish", order, "invoke", group=None)
                    try:
                        await publisher.publish(KEYED, order, id=f"{key}-{n}")
                    except (PublishRejected, BrokerUnavailable):
                        self.note("publisher", "publish", order, "fail", group=None)
                        break
                    except PublishUnknown:
                        self.note("publisher", "publish", order, "info", group=None)
                        continue
                    self.note("publisher", "publish", order, "ok", group=None)
                    break

        await asyncio.gather(*(one_key(f"key{number}") for number in range(keys)))

    async def done(self, count: int, patience: float) -> None:
        """Returns when so many are done, or nothing has happened for `patience` seconds: the checker will say what is missing."""
        seen, since = -1, time.monotonic()
        while len(self._finished) < count and time.monotonic() < since + patience:
            if len(self.history) != seen:
                seen, since = len(self.history), time.monotonic()
            await asyncio.sleep(0.001)

    async def end(self) -> int:
        """Drains the workers; what the broker still has then."""
        for _, worker in self._workers:
            await worker.stop()
        adapter = await self._stage.open_adapter()
        assert isinstance(adapter, HasDepth)
        depth = await adapter.depth(self._stage.name("orders"), GROUP)
        return (depth.ready or 0) + (depth.in_flight or 0) + (depth.delayed or 0)


async def run(
    broker: Broker, *, keys: int, each: int, kills: int, drains: int, seed: int, patience: float = 10.0
) -> tuple[History, Report]:
    """Publishes while workers die and drain, evenly over the messages; the history, and what it shows."""
    async with opened(broker) as stage:
        load = Load(stage, seed)
        for _ in range(3):
            await load.start_worker()
        publishing = asyncio.create_task(load.publish(keys, each))
        ends = random.Random(seed).sample([True] * kills + [False] * drains, kills + drains)
        for number, kill in enumerate(ends, 1):
            await load.done(number * keys * each // (len(ends) + 1), patience)
            await load.replace_a_worker(kill=kill)
        await publishing
        await load.done(keys * each, patience)
        remaining = await load.end()
    report = check(
        load.history, groups=[GROUP], incidents=load.incidents, window=WINDOW, consumers=1, publish_window=0, remaining=remaining
    )
    print(report)
    return load.history, report


async def test_nothing_is_lost_or_out_of_order_when_workers_die(tmp_path: Path) -> None:
    """C2, C4, C6: 2,000 messages of 50 keys, 3 workers, of whom 5 are killed and 3 drained on the way: every message is completed, each
    key in order, no two runs of a key at once in a process, and a death repeats at most its window."""
    history, report = await run(behind(), keys=50, each=40, kills=5, drains=3, seed=4)
    path = tmp_path / "history.jsonl"
    history.write(path)
    assert report.ok, report.problems
    assert (report.confirmed, report.done) == (2000, 2000)
    assert report.unknown == report.dead == 0
    assert check(History.read(path), groups=[GROUP], incidents=5, window=WINDOW) == report


@pytest.mark.parametrize(
    ("broker", "wrong"),
    [
        (lambda: behind(receiver=AcksFirst), "lost"),
        (lambda: behind(ForgetsSome), "lost"),
        (lambda: behind(receiver=ReordersAKey), "inversions"),
        (lambda: behind(SharesItsShards), "inversions"),
    ],
    ids=["acks first", "forgets some", "reorders a key", "shares its shards"],
)
async def test_the_checker_sees_sabotage(broker: Callable[[], Broker], wrong: str) -> None:
    """The same load on an adapter that breaks the contract: the checker names what it did."""
    _, report = await run(broker(), keys=20, each=20, kills=3, drains=1, seed=4, patience=1.0)
    assert not report.ok
    assert len(getattr(report, wrong)) > 0
