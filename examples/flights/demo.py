"""The demo: the service and its feed on one broker, watched until every departure is accounted for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

from examples.flights import feed
from examples.flights.data import Expected, Row
from examples.flights.reconcile import GroupOutcome, Outcome
from examples.flights.results import Results, Seen
from examples.flights.service import departures, flights, late_departures
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from msgbus import Bus, Router
from msgbus.dead_letters import DeadLetter
from msgbus.settings import Settings

LOOK = 0.1
"""Seconds between two looks at how far it is."""


@dataclass(frozen=True)
class Run:
    """What one run is told. Every run has names of its own at the broker: what an earlier one left there is not counted."""

    url: str
    settings: Settings
    total: int | None = None
    """Rows to expect, for the progress bars; None: unknown until they are read."""
    patience: float = 60.0
    """Seconds without anything happening after which the rest is given up as lost."""
    service: Callable[[Results], Router] = flights
    """Whose handlers run."""


def own_namespace(settings: Settings) -> Settings:
    """The settings with a namespace that no other run has, behind the one that they name."""
    return settings.model_copy(update={"namespace": f"{settings.namespace}flights-{secrets.token_hex(4)}."})


async def run(task: Run, rows: Iterable[Row], results: Results, console: Console) -> Outcome:
    """Runs the service, feeds it, and asks the broker what became of every departure.

    Raises what the feed raises. What does not arrive is no error here: the outcome says so.
    """
    expected = Expected()
    service = Bus(task.url, service="flights", settings=task.settings, routers=[task.service(results)])
    upstream = Bus(task.url, service="airports", settings=task.settings)
    async with service.running(), upstream:
        feeding = asyncio.create_task(feed.publish_all(upstream, rows, expected.count))
        try:
            with _Bars(console, task.total, results.handled()) as bars:
                await _until_all_are_somewhere(service, task, feeding, expected, results, bars)
            published = feeding.result() if feeding.done() else 0
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
        groups = {name: await _group_outcome(service, name, seen) for name, seen in results.handled().items()}
        late = await _late(service, expected.late, task.patience)
    return Outcome(expected, published, groups, late, results.planes.out_of_order)


async def _until_all_are_somewhere(
    service: Bus, task: Run, feeding: asyncio.Task[int], expected: Expected, results: Results, bars: _Bars
) -> None:
    """Returns when every group has handled, or given up, all that was published, or when nothing has happened for too long."""
    clock = asyncio.get_running_loop().time
    before: object = None
    changed = clock()
    while True:
        fed = feeding.done()
        if fed:
            feeding.result()
        done = {name: seen.count + await _dead(service, name) for name, seen in results.handled().items()}
        bars.show(expected.rows, fed, done)
        if fed and min(done.values()) >= expected.rows:
            return
        now = (expected.rows, fed, done)
        if now != before:
            before, changed = now, clock()
        elif clock() - changed > task.patience:
            return
        await asyncio.sleep(LOOK)


async def _dead(service: Bus, group: str) -> int:
    """How many dead letters the broker holds; where it cannot count them, how many the service has sent there."""
    held = await service.dead_letters(departures, group=group).count()
    if held is not None:
        return held
    return sum(one.counts.get("dead", 0) for one in service.health().subscriptions if one.group == group)


async def _group_outcome(service: Bus, group: str, seen: Seen) -> GroupOutcome:
    explained = 0
    async for _ in service.dead_letters(departures, group=group).list(where=_lacks_departure_time):
        explained += 1
    return GroupOutcome(seen.count, await _dead(service, group), explained, seen.again)


def _lacks_departure_time(letter: DeadLetter) -> bool:
    return letter.reason == "invalid" and "dep_time Field required" in letter.error


async def _late(service: Bus, expected: int, patience: float) -> int:
    """How many different messages `late-departures` kept while nobody claimed it: its first group gets them all."""
    seen = Seen()
    async with service.consumer(late_departures, group="audit", window=500) as consumer:
        wait = patience  # for the first ones, which may take a broker its time; then for what should not be there
        while batch := await consumer.receive(500, timedelta(seconds=wait if expected > seen.count else 0.5)):
            for delivery in batch:
                seen.first_time(delivery.message.number)
                await delivery.ack()
    return seen.count


class _Bars:
    """The progress bars: one for the feed, one for each group."""

    def __init__(self, console: Console, total: int | None, groups: Iterable[str]) -> None:
        columns = (TextColumn("{task.description:<12}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._feed = self._progress.add_task("published", total=total)
        self._groups: dict[str, TaskID] = {name: self._progress.add_task(name, total=total) for name in groups}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, published: int, fed: bool, done: dict[str, int]) -> None:
        """Draws them."""
        if fed:  # however many rows were expected, this is how many there are
            for bar in self._progress.task_ids:
                self._progress.update(bar, total=published)
        self._progress.update(self._feed, completed=published)
        for name, number in done.items():
            self._progress.update(self._groups[name], completed=number)
        self._progress.refresh()
