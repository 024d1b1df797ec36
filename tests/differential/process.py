"""A process of a group, as a bus: it handles messages, or asks for them, as their plans have it, and notes each run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from tenacity import wait_fixed
from tests.differential.program import Group, Plan
from tests.differential.trace import Run

from msgbus import Batch, BatchFailed, Bus, Context, Drop, Reject, Retry, RetryLater, Topic
from msgbus.consumer import Consumer, Delivery
from msgbus.errors import DecodeError
from msgbus.testing.stage import Stage

SHORT = 0.01
"""Seconds between two runs."""
ASK_AGAIN = timedelta(milliseconds=50)
"""How long a process that asks for messages waits for one before it looks whether it is to end."""


class Sent(BaseModel):
    """A message as the publisher sees it: it can write what no handler can read."""

    n: int
    key: str | None
    plans: tuple[Plan, ...] | str


class Work(BaseModel):
    """A message as handlers see it."""

    n: int
    key: str | None
    plans: tuple[Plan, ...]


class GivenUp(Exception):
    """What the groups' policy gives up on at once."""


@dataclass
class Log:
    """What handlers of one group have seen, all its processes together."""

    ended: list[tuple[Run, str | None, bool]] = field(default_factory=list[tuple[Run, str | None, bool]])
    """Runs in the order they ended: message and attempt, key, whether it was the message's last."""
    started: int = 0
    first_start: dict[int, float] = field(default_factory=dict[int, float])
    rounds: Counter[int] = field(default_factory=Counter[int])
    """By message: how often a run ended it."""
    overlaps: list[str] = field(default_factory=list[str])
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, true: Callable[[], bool], seconds: float) -> bool:
        """Waits for `true` to become so, at most so long; whether it has."""
        try:
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(true)
        except TimeoutError:
            return true()  # both may have come together
        return True

    async def tell(self) -> None:
        """Something has changed."""
        async with self.changed:
            self.changed.notify_all()


@dataclass
class Handler:
    """A group's handler in one process."""

    index: int
    group: Group
    log: Log
    running: dict[str, int] = field(default_factory=dict[str, int])

    async def one(self, message: Work, context: Context) -> None:
        """Message by message."""
        error = await self._run(message, context)
        if error is not None:
            raise error

    async def many(self, messages: list[Work], contexts: list[Context]) -> None:
        """In batches, whose members run side by side."""
        found = await asyncio.gather(*(self._run(message, context) for message, context in zip(messages, contexts, strict=True)))
        errors = {index: error for index, error in enumerate(found) if error is not None}
        if errors:
            raise BatchFailed(errors)

    async def pull(self, consumer: Consumer[Work], leaving: asyncio.Event) -> None:
        """One by one, for a group that asks for them: it says the word that the plan's error stands for."""
        while not leaving.is_set():
            for delivery in await consumer.receive(3, timeout=ASK_AGAIN):
                if leaving.is_set():
                    break
                try:
                    message = delivery.message
                except DecodeError:  # it is a dead letter
                    continue
                await _say(delivery, await self._run(message, delivery.context))

    async def _run(self, message: Work, context: Context) -> Exception | None:
        """One run, as the message's plan for this group has it: what the handler raises, if anything."""
        log, plan, attempt, key = self.log, message.plans[self.index], context.attempt, message.key
        log.started += 1
        log.first_start.setdefault(message.n, asyncio.get_running_loop().time())
        if key is not None and self.group.handling != "unordered":
            if key in self.running:
                log.overlaps.append(f"{message.n} of key {key} began while {self.running[key]} ran")
            self.running[key] = message.n
        try:
            if plan.takes_ms:
                await asyncio.sleep(plan.takes_ms / 1000)
        finally:
            if key is not None:
                self.running.pop(key, None)
        last = attempt > len(plan.failures) or attempt >= self.group.attempts
        log.ended.append(((message.n, attempt), key, last))
        log.rounds[message.n] += last
        await log.tell()
        return _error(plan, attempt)


def _error(plan: Plan, attempt: int) -> Exception | None:
    match plan.failures[attempt - 1] if attempt <= len(plan.failures) else plan.end:
        case "done":
            return None
        case "drop":
            return Drop("nothing to do")
        case "reject":
            return Reject("never")
        case "give up":
            return GivenUp("no more")
        case "too late":
            return RetryLater(timedelta(hours=2))
        case "error":
            return RuntimeError("failed")
        case "later":
            return RetryLater(timedelta(seconds=2 * SHORT))
        case "later by policy":
            return RetryLater()


async def _say(delivery: Delivery[Work], error: Exception | None) -> None:
    match error:
        case None | Drop():
            await delivery.ack()
        case Reject() | GivenUp():
            await delivery.reject("never")
        case RetryLater(after=after):
            await delivery.retry(after)
        case _:
            await delivery.retry()


def process(stage: Stage, topic: Topic[Work], index: int, group: Group, log: Log, *, listens: bool = False) -> Bus:
    """Not entered. `listens`: as a process of no group, which is told everything."""
    handler = Handler(index, group, log)
    retry = Retry(attempts=group.attempts, wait=wait_fixed(SHORT), give_up_on=(GivenUp,))
    if group.handling == "pulled":

        @asynccontextmanager
        async def pulling(bus: Bus) -> AsyncGenerator[None, None]:
            consumer = bus.consumer(topic, group=group.name, start=group.start, window=2 * group.concurrency)
            leaving = asyncio.Event()
            async with consumer, asyncio.TaskGroup() as tasks:
                tasks.create_task(handler.pull(consumer, leaving))
                yield
                leaving.set()

        return stage.bus(service=group.name, retry=retry, lifespan=pulling)
    bus = stage.bus(service="listener" if listens else group.name, retry=retry)
    options: dict[str, Any] = {"concurrency": group.concurrency, "ordered": group.handling != "unordered"}
    options |= {"broadcast": True} if listens else {"start": group.start}
    if group.handling == "skipping":
        options["on_failure"] = "skip"
    if group.batch:
        bus.subscribe(topic, batch=Batch(group.batch), **options)(handler.many)
    else:
        bus.subscribe(topic, **options)(handler.one)
    return bus
