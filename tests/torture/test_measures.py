"""What holds when real processes are killed, stopped and cut off. Each test prints its figures; `make torture` runs them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from tests.torture.conftest import Figure
from tests.torture.crew import LEASE, SESSION, Crew, loaded
from tests.torture.proxy import proxy_before
from tests.torture.worker import GROUP, Terms, Work

from msgbus.testing.stage import Stage, keys_of_shards

pytestmark = pytest.mark.timeout(500)

SHARDS = 8
WINDOW = 32
TAKEN_OVER = {"redis": LEASE + 5, "kafka": SESSION + 5, "rabbitmq": 5}
"""Seconds from a death until a peer has what was in hand."""
REPEATED = {"redis": WINDOW, "kafka": 2 * WINDOW, "rabbitmq": WINDOW}
"""What one death may repeat: the window; on Kafka also what was done in the twentieth of a second before."""


@pytest.fixture(params=["keyed", "unkeyed"])
def keyed(request: pytest.FixtureRequest) -> bool:
    """Whether the topic has a key: each has its own way in on every broker."""
    return bool(request.param == "keyed")


def good(count: int, seconds: float = 0.0) -> list[Work]:
    """Messages of a key each."""
    return [Work(key=f"good{number}", seconds=seconds) for number in range(count)]


@asynccontextmanager
async def crew_of(stage: Stage, directory: Path, *, url: str | None = None, **terms: object) -> AsyncIterator[Crew]:
    """A crew that is ended with the test."""
    async with Crew(stage, directory, Terms.model_validate({"topic": "works", "window": WINDOW, **terms}), url) as crew:
        yield crew


@pytest.mark.parametrize("wait", [0.2, 2.0], ids=["short", "long"])
async def test_always_fails(stage: Stage, tmp_path: Path, figure: Figure, keyed: bool, wait: float) -> None:
    """A message that always fails, among 20 good ones, is delivered exactly `attempts` times, then it is a dead letter; the good ones are
    done within a second of each other."""
    async with crew_of(stage, tmp_path, keyed=keyed, attempts=6, wait=wait) as crew:
        for hired in [await crew.hire(), await crew.hire()]:
            await hired.up()
        await crew.share()
        works = good(20)
        works.insert(10, bad := Work(key="bad", do="fail"))
        await crew.publish_all(works)
        await crew.until(lambda: crew.done >= {work.id for work in works} - {bad.id}, 30, "the good ones")
        ends = [event.ts for event in crew.events("done") if event.id.startswith("good")]
        figure("spread of the good ones (s)", f"{max(ends) - min(ends):.2f}")
        await crew.until(lambda: len(crew.events("fail", id=bad.id)) >= 6, 60, "the last attempt")
        letters = await stage.dead_letters(1, "works", group=GROUP, seconds=20)
        runs = crew.events("start", id=bad.id)
        figure("runs of the bad one", len(runs))
        assert [event.attempt for event in runs] == [1, 2, 3, 4, 5, 6]
        assert (letters[0].id, letters[0].reason, letters[0].attempts) == (bad.id, "exhausted", 6)
        assert max(ends) - min(ends) <= 1.0
        assert len(ends) == 20


def shares(crew: Crew, shard_of: Callable[[str], int], *, since: float) -> dict[str, set[int]] | None:
    """Which shards each process at work has, by the latest runs; None while some shard has had none since then."""
    owners: dict[int, tuple[float, str]] = {}
    for key, event in crew.last.items():
        if event.ts >= since:
            owners[shard_of(key)] = max(owners.get(shard_of(key), (0.0, "")), (event.ts, event.pid))
    if len(owners) < SHARDS:
        return None
    found: dict[str, set[int]] = {hired.pid: set() for hired in crew.at_work}
    for shard, (_, pid) in owners.items():
        found.setdefault(pid, set()).add(shard)
    return found


def even(found: dict[str, set[int]] | None, processes: int) -> bool:
    """Whether every shard has an owner, and no process has more than two more than another."""
    sizes = [] if found is None else [len(shards) for shards in found.values()]
    return len(sizes) == processes and max(sizes) - min(sizes) <= 2


async def test_shards_change_hands(stage: Stage, tmp_path: Path, figure: Figure, name: str) -> None:
    """Two processes share the 8 shards of a keyed topic out between them within 10 seconds, at most 2 apart. One is killed, and a third
    joins, ten times under load: no key's order is broken, nothing is lost."""
    keys = [key for keys in keys_of_shards(stage.broker, SHARDS, 4) for key in keys]

    def shard(key: str) -> int:
        return stage.broker.shard_of(key, SHARDS)

    pick = random.Random(1)

    async with crew_of(stage, tmp_path, keyed=True, shards=SHARDS) as crew:

        async def all_go_on(since: float) -> float:
            await crew.until(lambda: shares(crew, shard, since=since), 60, "every shard to go on")
            return time.monotonic() - since

        async def shared_out() -> float:
            began = time.monotonic()
            return await crew.until(lambda: even(shares(crew, shard, since=max(began, time.monotonic() - 0.5)), 2), 60, "even shares")

        await (await crew.hire()).up()
        await crew.share()  # what is published while a topic's first group is being declared has no order
        async with loaded(crew, keys, pace=0.1, work=lambda key, n: Work(key=key, n=n, seconds=pick.uniform(0, 0.02))):
            await crew.until(lambda: shares(crew, shard, since=0), 30, "the first process to have every shard")
            await (await crew.hire()).up()
            figure("even after (s)", f"{(shared := await shared_out()):.1f}")
            gaps: list[float] = []
            for _ in range(10):
                killed = await crew.kill(pick.choice(crew.at_work))
                await crew.hire()
                gaps.append(await all_go_on(killed))
                await shared_out()
        await crew.all_done(30)
        for hired in list(crew.at_work):
            await crew.stop(hired)
        report = await crew.report(window=REPEATED[name])
        figure("every shard goes on after a death (s, longest)", f"{max(gaps):.1f}")
        figure("messages", report.done)
        figure("lost", len(report.lost))
        figure("inversions", len(report.inversions))
        figure("repeated", report.duplicates)
        assert report.ok, report.problems
        assert shared <= 10


async def test_kills_its_process(stage: Stage, tmp_path: Path, figure: Figure, keyed: bool) -> None:
    """A message that kills its process, among 20 good ones, is dead-lettered as poison after 5 deaths; the good ones are done."""
    async with crew_of(stage, tmp_path, keyed=keyed) as crew:
        supervisor = asyncio.create_task(crew.supervise())
        try:
            await crew.publish(Work(key="first"))
            await crew.all_done(30)
            works = good(20, seconds=0.02)
            works.insert(10, killer := Work(key="killer", do="die", seconds=0.02))
            began = time.monotonic()
            await crew.publish_all(works)
            await crew.until(lambda: len(crew.done) == 21, 300, "the good ones")
            figure("the good ones are done after (s)", f"{time.monotonic() - began:.1f}")
            letters = await stage.dead_letters(1, "works", group=GROUP, seconds=120)
            figure("dead letter after (s)", f"{time.monotonic() - began:.1f}")
            crew.look()
            figure("deaths", crew.deaths)
            figure("runs of the good ones", len([event for event in crew.events("start") if event.id.startswith("good")]))
            assert (letters[0].id, letters[0].reason) == (killer.id, "poison")
            assert len(crew.events("start", id=killer.id)) == crew.deaths
        finally:
            supervisor.cancel()
            await asyncio.wait([supervisor])


async def test_resets(stage: Stage, tmp_path: Path, figure: Figure, keyed: bool, name: str) -> None:
    """Every connection of the workers is reset every 500 ms for 20 seconds: nothing is lost, nothing good is a dead letter, no
    handler is cancelled."""
    parts = urlsplit(stage.broker.url)
    assert parts.port is not None  # tests name it
    async with proxy_before(parts.port) as proxy:
        netloc = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        url = urlunsplit(parts._replace(netloc=f"{netloc}127.0.0.1:{proxy.port}"))
        async with crew_of(stage, tmp_path, keyed=keyed, shards=SHARDS if keyed else None, url=url) as crew:
            for hired in [await crew.hire(), await crew.hire()]:
                await hired.up()
            await crew.share()
            pick = random.Random(2)
            keys = [f"key{number}" for number in range(16)]
            async with loaded(crew, keys, pace=0.5, work=lambda key, n: Work(key=key, n=n, seconds=pick.choice([0.01, 0.2, 1.0]))):
                before = len(crew.done)
                await proxy.reset_every(0.5, during=20)
                crew.look()
                figure("done while links were reset", len(crew.done) - before)
            figure("the rest is done after (s)", f"{await crew.all_done(60):.1f}")
            cancelled = crew.events("fail", "info")
            for hired in list(crew.at_work):
                await crew.stop(hired)
            report = await crew.report(window=REPEATED[name], incidents=proxy.resets)
            figure("connections reset", proxy.resets)
            figure("messages", report.done)
            figure("lost", len(report.lost))
            figure("repeated", report.duplicates)
            figure("handlers cancelled", len(cancelled))
            assert not cancelled
            assert report.ok, report.problems
            assert await stage.dead_letters(0, "works", group=GROUP) == []


async def test_a_death_is_noticed(stage: Stage, tmp_path: Path, figure: Figure, keyed: bool, name: str) -> None:
    """What a killed process had in hand is run by an idle peer, although nothing new is published: on RabbitMQ within 5 seconds, on Kafka
    within the session and 5, on Redis within the lease and 5."""
    took: list[float] = []
    async with crew_of(stage, tmp_path, keyed=keyed, shards=SHARDS if keyed else None) as crew:
        for number in range(3):
            while len(crew.at_work) < 2:
                await (await crew.hire()).up()
            await crew.share()
            work = Work(key=f"slow{number}", seconds=3.0)
            await crew.publish(work)
            first = await crew.until_runs(work, 1, 30)
            killed = await crew.kill(next(hired for hired in crew.at_work if hired.pid == first.pid))
            took.append((await crew.until_runs(work, 2, 60)).ts - killed)
            await crew.all_done(30)
        figure("run by a peer after (s)", " ".join(f"{seconds:.1f}" for seconds in took))
        assert max(took) <= TAKEN_OVER[name]


async def test_starts_and_stops(stage: Stage, tmp_path: Path, figure: Figure, keyed: bool, name: str) -> None:
    """Processes start and stop under load, 12 times, some before they are up: nothing is lost or repeated, no order is broken."""
    pick = random.Random(3)
    drains: list[float] = []
    async with crew_of(stage, tmp_path, keyed=keyed, shards=SHARDS if keyed else None) as crew:
        await (await crew.hire()).up()
        await crew.share()
        keys = [f"key{number}" for number in range(24)]
        async with loaded(crew, keys, pace=0.1, work=lambda key, n: Work(key=key, n=n, seconds=pick.uniform(0, 0.1))):
            for number in range(12):
                await crew.hire()
                await asyncio.sleep(pick.uniform(0.5, 3.0))  # not a wait for something: the moment of the stop is what varies
                drains.append(await crew.stop(crew.at_work[0 if number % 3 else -1]))
        await crew.all_done(30)
        for hired in list(crew.at_work):
            drains.append(await crew.stop(hired))
        report = await crew.report(window=0, incidents=len(drains))
        cut = Counter(event.pid for event in crew.events("fail", "info"))
        figure("longest stop (s)", f"{max(drains):.1f}")
        figure("messages", report.done)
        figure("lost", len(report.lost))
        figure("repeated", report.duplicates)
        assert report.ok, report.problems
        assert not cut, "handlers of 0.1 s were cancelled by a drain of 5"
