"""What every contender has in common: the message, the handler, the clock, and what one run found."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal

from pydantic import BaseModel

IN_FLIGHT = 100
"""Handlers at once."""
PUBLISHERS = 256
"""Publishes at once."""
PATIENCE = 120.0
"""Seconds after which a run has failed."""


class Line(BaseModel):
    sku: str
    quantity: int
    price: Decimal


class Order(BaseModel):
    """About 400 bytes of JSON."""

    number: int
    customer: str
    email: str
    street: str
    city: str
    note: str
    express: bool
    total: float
    lines: list[Line]


def order(number: int) -> Order:
    """One of many, none like another."""
    return Order(
        number=number,
        customer=f"Customer Number {number % 977}",
        email=f"customer.{number % 977}@example.org",
        street=f"{number % 89} Harbour Street, Warehouse Yard",
        city="Southampton",
        note="leave it with the neighbours when nobody is at home, and ring twice before you go",
        express=number % 3 == 0,
        total=number * 0.25,
        lines=[Line(sku=f"sku-{number % 31}-{line}", quantity=line + 1, price=Decimal("19.90")) for line in range(2)],
    )


@dataclass(frozen=True)
class Task:
    """What a contender is to do: `count` messages at the broker of `url`, on a topic that nobody has used, of `shards` where it matters."""

    url: str
    topic: str
    count: int
    work: float
    shards: int | None = None


@dataclass(frozen=True)
class Took:
    """How long something took: `seconds` by the clock, `cpu` seconds of this process's own work."""

    seconds: float
    cpu: float

    @classmethod
    def until_now(cls, start: Took | None = None) -> Took:
        """Since the start, which is what this returns without one: then all is collected first that was made before, or one of the
        contenders would pay for that in its time."""
        if start is None:
            gc.collect()
        now = cls(time.perf_counter(), time.process_time())
        return now if start is None else cls(now.seconds - start.seconds, now.cpu - start.cpu)


@dataclass(frozen=True)
class Run:
    """What it found: how long it took, how many messages were left behind, and the versions of what took part."""

    took: Took
    left: int
    versions: dict[str, str] = field(default_factory=dict[str, str])


class Handled:
    """The handler's part: notes every order; the clock runs from the first one's start to the last one's end."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._missing = set(range(task.count))
        self._start: Took | None = None
        self._all: asyncio.Future[Took] = asyncio.get_running_loop().create_future()

    async def handle(self, handled: Order) -> None:
        """What is done with an order: next to nothing, or a wait for something else."""
        if self._start is None:
            self._start = Took.until_now()
        if self._task.work:
            await asyncio.sleep(self._task.work)
        self._missing.discard(handled.number)
        if not self._missing and not self._all.done():
            self._all.set_result(Took.until_now(self._start))

    async def all(self) -> Took:
        """How long all of them took."""
        async with asyncio.timeout(PATIENCE):
            return await self._all

    @property
    def missing(self) -> int:
        """How many were never handled."""
        return len(self._missing)


async def publish_all(task: Task, publish: Callable[[Order], Awaitable[object]]) -> Took:
    """How long it took with `PUBLISHERS` callers side by side, each of which waits for its confirm before its next one."""
    orders = iter([order(number) for number in range(task.count)])

    async def publisher() -> None:
        for one in orders:
            await publish(one)

    start = Took.until_now()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as publishers:
        for _ in range(PUBLISHERS):
            publishers.create_task(publisher())
    return Took.until_now(start)
