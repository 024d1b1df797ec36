"""The demo: the shop at work, its parts killed meanwhile, watched until everything that was sold is shipped."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from examples.shop import places
from examples.shop.books import Books, Line
from examples.shop.customers import Told, go_shopping
from examples.shop.messages import OrderPlaced, orders_placed
from examples.shop.parts import Part, ShopError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from msgbus import Bus
from msgbus.settings import load

LOOK = 0.2
"""Seconds between two looks at the books."""
REPLAYED = 10
"""Orders whose messages are published once more when all is shipped, as somebody might who restores a backup."""
REPEATED = "came again, and its effect was there already"
"""What msgbus logs of a message that the inbox knows."""


@dataclass(frozen=True)
class Run:
    """What one run is told."""

    url: str | None = None
    """The broker. None: a Redis of the shop's own, which is killed like the rest."""
    database: str | None = None
    """A PostgreSQL server, where each service gets a database. None: a file of SQLite each."""
    orders: int = 100
    kills: int = 2
    """How often each part is killed."""
    seconds: float = 20.0
    """How long customers take to buy, about."""
    patience: float = 60.0
    """Seconds without progress after which the rest is given up as lost."""
    folder: Path | None = None
    """Where logs and files of the databases are kept, in a folder of the run's own. None: nowhere."""


@dataclass(frozen=True)
class Outcome:
    """What customers were told, what is in the books, and what the parts went through."""

    told: Told
    books: Mapping[str, Sequence[Line]]
    killed: Mapping[str, int]
    repeated: Mapping[str, int]
    """Messages that the inbox of each service knew already."""
    left: int
    """Rows of the outboxes and messages that nobody has done, dead letters among them."""


@dataclass(frozen=True)
class Shop:
    """A shop that runs."""

    url: str
    parts: Sequence[Part]
    books: Books
    variables: Mapping[str, Mapping[str, str]]
    """The environment of each service."""
    told: Told = field(default_factory=Told)


async def run(task: Run, console: Console) -> Outcome:
    """Sells, kills, and waits until what was sold is shipped. What does not arrive is no error here: the outcome says so.

    Raises `ShopError` where the shop cannot be run, or a part ends by itself or cannot be stopped.
    """
    run_id = secrets.token_hex(4)
    async with AsyncExitStack() as stack:
        folder = _folder(task.folder, run_id, stack)
        url, own_broker = places.broker(task.url, folder)
        databases = await stack.enter_async_context(places.databases(task.database, run_id, folder))
        # Every run has names of its own at the broker: what an earlier one left there is not counted.
        common = {**os.environ, **places.SILENCE, "MSGBUS_URL": url, "MSGBUS_NAMESPACE": f"{load().namespace}shop-{run_id}."}
        variables = {service: {**common, "DATABASE_URL": database} for service, database in databases.items()}
        port = places.free_port()
        parts = places.parts(variables, port, folder)
        if own_broker is not None:
            parts.append(own_broker)
        books = Books(databases)
        stack.push_async_callback(books.close)
        for part in parts:
            stack.push_async_callback(part.kill)
            await part.start()
        return await _day(task, Shop(f"http://127.0.0.1:{port}", parts, books, variables), console)


def _folder(kept: Path | None, run_id: str, stack: AsyncExitStack) -> Path:
    """Of this run: one that is kept, or one that is deleted in the end."""
    if kept is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="msgbus-shop-")))
    folder = kept.resolve() / f"shop-{run_id}"
    folder.mkdir(parents=True)
    return folder


async def _day(task: Run, shop: Shop, console: Console) -> Outcome:
    """Opens, sells and ships, replays, closes, counts."""
    with console.status("opening ..."):
        if await _until_none(shop.books.missing, shop, task.patience):
            raise ShopError("\n".join(f"{part.name} does not open:\n{part.tail()}" for part in shop.parts))
    selling = asyncio.create_task(_sell(task, shop, console))
    try:
        with _Bars(console, task.orders) as bars:

            async def unshipped() -> int:
                if selling.done():
                    selling.result()
                shipped = len(await shop.books.read("shipping"))
                bars.show(len(shop.told.accepted), len(await shop.books.read("billing")), shipped)
                return task.orders - shipped + (not selling.done())

            await _until_none(unshipped, shop, task.patience)
    finally:
        selling.cancel()
        await asyncio.gather(selling, return_exceptions=True)
    with console.status("replaying some orders, and waiting until nothing is left to be done ..."):
        await _replay(shop)
        left = await _until_none(lambda: _left(shop), shop, task.patience)
        killed = {part.name: part.killed for part in shop.parts}
        for part in shop.parts:
            await part.stop()
    books = {service: await shop.books.read(service) for service in places.SERVICES}
    return Outcome(shop.told, books, killed, {part.name: part.said(REPEATED) for part in shop.parts}, left)


async def _until_none(count: Callable[[], Awaitable[int]], shop: Shop, patience: float) -> int:
    """Returns when the count is zero, or has not changed for too long; the last one. Raises `ShopError` where a part has ended."""
    clock = asyncio.get_running_loop().time
    before, changed = -1, clock()
    while True:
        for part in shop.parts:
            part.check()
        now = await count()
        if now != before:
            before, changed = now, clock()
        if now == 0 or clock() - changed > patience:
            return now
        await asyncio.sleep(LOOK)


async def _sell(task: Run, shop: Shop, console: Console) -> None:
    """Customers buy, and the parts are killed meanwhile."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(go_shopping(shop.url, task.orders, task.seconds, shop.told))
            group.create_task(_kill(task, shop, console))
    except* ShopError as errors:
        raise errors.exceptions[0] from None


async def _kill(task: Run, shop: Shop, console: Console) -> None:
    """kill -9 for each part as often as told, in any order, spread over the time in which customers buy."""
    began = time.monotonic()
    for _ in range(task.kills):
        for part in random.sample(shop.parts, len(shop.parts)):
            await asyncio.sleep(task.seconds / (task.kills * len(shop.parts)))
            await part.kill()
            await part.start()
            console.print(f"[dim]{time.monotonic() - began:5.1f} s[/]  kill -9 {part.name}", highlight=False)


async def _replay(shop: Shop) -> None:
    """Publishes the messages of some orders once more, past the outbox. They name the same effect, so nothing must come of them."""
    environment = shop.variables["orders"]
    settings = load().model_copy(update={"namespace": environment["MSGBUS_NAMESPACE"]})
    async with Bus(environment["MSGBUS_URL"], service="replay", settings=settings) as bus:
        for line in shop.told.accepted[:REPLAYED]:
            again = OrderPlaced(order_id=line.order_id, customer=line.customer, item=line.item, cents=line.cents)
            await bus.publish(orders_placed, again, idempotency_key=line.order_id)


async def _left(shop: Shop) -> int:
    """What is not done yet: rows of the outboxes, and what the groups have, as the command line tells an operator."""
    command = ("msgbus", "groups", "list", "examples.shop.billing:bus", "--json")  # billing knows both topics
    asked = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command), env=shop.variables["billing"], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, words = await asked.communicate()
    if asked.returncode:
        raise ShopError(f"{' '.join(command)} failed:\n{words.decode()}")
    waiting = sum(group[what] or 0 for group in json.loads(said) for what in ("ready", "in_flight", "delayed", "dead"))
    return waiting + await shop.books.unsent()


class _Bars:
    """How far it is: a bar for what is accepted, invoiced and shipped."""

    def __init__(self, console: Console, orders: int) -> None:
        columns = (TextColumn("{task.description:<9}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._bars = [self._progress.add_task(name, total=orders) for name in ("accepted", "invoiced", "shipped")]

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, *done: int) -> None:
        """Draws them."""
        for bar, count in zip(self._bars, done, strict=True):
            self._progress.update(bar, completed=count)
        self._progress.refresh()
