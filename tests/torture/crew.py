"""A crew: worker processes of one group, a publisher beside them, and the history of both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from tests.processes import Hired, hire
from tests.torture.worker import GROUP, Terms, Work, topic_of

from msgbus.bus import Bus
from msgbus.contract.adapter import HasDepth
from msgbus.errors import BrokerUnavailable, PublishRejected, PublishUnknown
from msgbus.testing.history import Event, History, How, Report, check
from msgbus.testing.stage import Stage

HEARTBEAT, SESSION, LEASE, DRAIN = 2, 6, 5, 5
"""Seconds: what the processes are told."""


class Crew:
    """Processes of group `GROUP` on one topic. Their histories and logs are files in `directory`."""

    def __init__(self, stage: Stage, directory: Path, terms: Terms, url: str | None = None) -> None:
        self.terms = terms
        self.topic = topic_of(terms)
        self.history = History()
        self.at_work: list[Hired] = []
        self.deaths = 0
        """Processes that ended in another way than by `stop`."""
        self.done: set[str] = set()
        """Messages completed at least once."""
        self.published: set[str] = set()
        """Messages confirmed."""
        self.last: dict[str, Event] = {}
        """The latest run of each key that began."""
        self._stage = stage
        self._directory = directory
        self._url = url or stage.broker.url
        self._numbers = itertools.count()
        self._rounds = itertools.count()
        self._read: Counter[Path] = Counter()
        self._publisher: Bus | None = None

    async def __aenter__(self) -> Self:
        self._publisher = await self._stage.publisher()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hired in self.at_work:
            await hired.kill()
        self.look()
        self.history.write(self._directory / "all.jsonl")

    # ------------------------------------------------------------ processes

    async def hire(self) -> Hired:
        """One more process; not up yet."""
        pid = f"worker{next(self._numbers)}"
        terms = self.terms.model_copy(update={"pid": pid, "path": str(self._directory / f"{pid}.jsonl")})
        settings = {
            "URL": self._url,
            "NAMESPACE": self._stage.namespace,
            "HEARTBEAT": str(HEARTBEAT),
            "SESSION_TIMEOUT": str(SESSION),
            "LEASE": str(LEASE),
            "DRAIN_TIMEOUT": str(DRAIN),
        }
        hired = await hire(pid, "tests.torture.worker", terms.model_dump_json(), self._directory, settings)
        self.at_work.append(hired)
        return hired

    async def kill(self, hired: Hired) -> float:
        """By kill -9; when it was."""
        self.at_work.remove(hired)
        self.deaths += 1
        await hired.kill()
        return time.monotonic()

    async def stop(self, hired: Hired) -> float:
        """By SIGTERM; how long its drain took."""
        self.at_work.remove(hired)
        return await hired.stop(DRAIN + 5 + 3)  # drain_timeout, close_timeout, and the end of an interpreter

    async def supervise(self) -> None:
        """Keeps one process at work: when it dies another takes its place. Until it is cancelled."""
        while True:
            hired = await self.hire()
            await hired.process.wait()
            self.at_work.remove(hired)
            self.deaths += 1

    # ------------------------------------------------------------ messages

    async def publish(self, work: Work) -> None:
        """Until it is confirmed, under one id."""
        assert self._publisher is not None  # entered
        while True:
            self._note(work, "invoke")
            try:
                await self._publisher.publish(self.topic, work, id=work.id)
            except (PublishRejected, BrokerUnavailable):
                self._note(work, "fail")
            except PublishUnknown:
                self._note(work, "info")
            else:
                self._note(work, "ok")
                self.published.add(work.id)
                return

    async def publish_all(self, works: Iterable[Work]) -> None:
        """All at once."""
        await asyncio.gather(*(self.publish(work) for work in works))

    async def load(self, keys: Sequence[str], enough: asyncio.Event, *, pace: float, work: Callable[[str, int], Work]) -> None:
        """A publisher for each key, one message after the other, `pace` seconds apart, until `enough`."""

        async def of_key(key: str) -> None:
            for n in itertools.count():
                await self.publish(work(key, n))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pace):
                        await enough.wait()
                if enough.is_set():
                    return

        await asyncio.gather(*map(of_key, keys))

    def _note(self, work: Work, how: How) -> None:
        key = (work.key, work.n) if self.terms.keyed else (None, None)
        self.history.note(Event(time.monotonic(), "publisher", "publish", how, work.id, *key))

    async def share(self, seconds: float = 30.0) -> None:
        """Messages are published until every process at work has had some of one round: they share the topic."""
        async with asyncio.timeout(seconds):
            for number in self._rounds:
                await self.publish_all([Work(key=f"warm{key}", n=number, seconds=0.02) for key in range(32)])
                await self.all_done(seconds)
                had = {event.pid for event in self.events("start") if event.id.startswith("warm") and event.id.endswith(f"-{number}")}
                if had == {hired.pid for hired in self.at_work}:
                    return

    # ------------------------------------------------------------ what was seen

    def look(self) -> None:
        """Reads what the processes have noted since the last time."""
        for path in sorted(self._directory.glob("worker*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read[path])
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] += len(whole)
            for line in whole.splitlines():
                event = Event(**json.loads(line))
                self.history.note(event)
                if event.f == "start" and event.key is not None:
                    self.last[event.key] = event
                elif event.f == "done":
                    self.done.add(event.id)

    async def until(self, true: Callable[[], object], seconds: float, what: str) -> float:
        """Waits until `true()` of what was seen; how long it took. Fails after so many seconds."""
        began = time.monotonic()
        while True:
            self.look()
            if true():
                return time.monotonic() - began
            if time.monotonic() > began + seconds:
                pytest.fail(f"waited {seconds:g} s for {what}; {len(self.done)} of {len(self.published)} are done")
            await asyncio.sleep(0.02)  # then it looks again

    async def all_done(self, seconds: float) -> float:
        """Everything confirmed is completed; how long that took. The checker names what is missing when nothing comes any more."""
        began = seen_at = time.monotonic()
        seen = -1
        while True:
            self.look()
            if self.published <= self.done:
                return time.monotonic() - began
            if len(self.done) != seen:
                seen, seen_at = len(self.done), time.monotonic()
            if time.monotonic() > seen_at + seconds:
                missing = sorted(self.published - self.done)
                pytest.fail(f"{len(missing)} are not done, and nothing came for {seconds:g} s: {missing[:10]}")
            await asyncio.sleep(0.05)  # then it looks again

    def events(self, f: str, how: str = "ok", *, id: str | None = None) -> list[Event]:
        """Of one kind, in the order of their time."""
        return [event for event in self.history if event.f == f and event.type == how and id in (None, event.id)]

    def runs(self, work: Work) -> list[Event]:
        """Of a message, as seen so far."""
        return self.events("start", id=work.id)

    async def until_runs(self, work: Work, count: int, seconds: float) -> Event:
        """The latest run of a message, when it has run so often."""
        await self.until(lambda: len(self.runs(work)) >= count, seconds, f"run {count} of {work.id}")
        return self.runs(work)[-1]

    async def left(self) -> int:
        """What the broker still has for the group."""
        adapter = await self._stage.open_adapter()
        assert isinstance(adapter, HasDepth)
        depth = await adapter.depth(self._stage.name(self.terms.topic), GROUP)
        return (depth.ready or 0) + (depth.in_flight or 0) + (depth.delayed or 0)

    async def report(self, *, window: int, incidents: int | None = None) -> Report:
        """What the history shows when all have ended; an incident repeats at most a window."""
        self.look()
        incidents = self.deaths if incidents is None else incidents
        return check(self.history, groups=[GROUP], incidents=incidents, window=window, remaining=await self.left())


@contextlib.asynccontextmanager
async def loaded(crew: Crew, keys: Sequence[str], *, pace: float, work: Callable[[str, int], Work]) -> AsyncGenerator[None, None]:
    """Publishes until it is left; then everything is confirmed."""
    enough = asyncio.Event()
    load = asyncio.create_task(crew.load(keys, enough, pace=pace, work=work))
    try:
        yield
    except BaseException:
        load.cancel()
        await asyncio.wait([load])
        raise
    enough.set()
    await load
