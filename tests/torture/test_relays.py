"""Three relay processes, one killed each second while rows are written: nothing is lost, every key has its order, no row is stuck."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr
from tests.brokers import Server
from tests.unit.sql.databases import NAMES, Database, database

from msgbus import Bus, Topic
from msgbus.outbound.relay import BATCH, STREAMS
from msgbus.settings import Settings
from msgbus.stores.sql import SqlStore
from msgbus.testing.stage import eventually

ROWS, ROLLED_BACK, KEYS, RELAYS = 5000, 500, 200, 3
KILLS, EACH = 15, 1.0
"""How many, and how many seconds apart."""
TRANSACTIONS = 150
LEASE, DRAINED = 5, 30
"""Seconds."""
BACK = "rolled back"

pytestmark = [pytest.mark.broker("redis"), pytest.mark.timeout(200)]


class Step(BaseModel):
    key: str
    n: int
    note: str = ""


STEPS = Topic("steps", Step, key="key")

APP = """
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
    from msgbus import Bus
    from msgbus.stores.sql import SqlStore, make_outbox_tables

    store = SqlStore(async_sessionmaker(create_async_engine({url!r})), tables=make_outbox_tables(MetaData(), prefix={prefix!r}))
    bus = Bus({broker!r}, service="relay", store=store)
"""


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each database in turn, its test's tables dropped afterwards."""
    found = database(request.param, tmp_path)
    yield found
    found.drop()


class Writer:
    """Writes rows in transactions of its own, one of eleven rolled back."""

    def __init__(self, store: SqlStore, bus: Bus) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        """Rows committed, of each key."""
        self._store = store
        self._bus = bus

    async def commit(self, count: int) -> None:
        """So many rows."""
        steps: list[Step] = []
        for _ in range(count):
            key = f"k{random.randrange(KEYS)}"
            steps.append(Step(key=key, n=self.counts[key]))
            self.counts[key] += 1
        async with self._store.engine.begin() as connection:
            await self._bus.outbox(connection).publish_many(STEPS, steps)

    async def roll_back(self, count: int) -> None:
        """So many rows, which nobody must ever see."""
        steps = [Step(key=f"k{random.randrange(KEYS)}", n=-1, note=BACK) for _ in range(count)]
        async with self._store.engine.connect() as connection, connection.begin() as transaction:
            await self._bus.outbox(connection).publish_many(STEPS, steps)
            await transaction.rollback()

    async def all(self) -> None:
        """All rows but the one that was written before, spread over the time of the kills."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in range(TRANSACTIONS):
            if number % 10 == 9:
                await self.roll_back(ROLLED_BACK * 10 // TRANSACTIONS + 1)
            await self.commit(ROWS * (number + 1) // TRANSACTIONS - sum(self.counts.values()))
            await asyncio.sleep(began + (number + 1) * KILLS * EACH / TRANSACTIONS - loop.time())


class Relays:
    """The processes; they are killed and started again."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        """One more."""
        command = (sys.executable, "-m", "msgbus", "outbox", "relay", "app")
        self.processes.append(await asyncio.create_subprocess_exec(*command, env=self.environment, stderr=asyncio.subprocess.DEVNULL))

    async def kill(self) -> None:
        """Any one of them, by kill -9."""
        victim = self.processes.pop(random.randrange(len(self.processes)))
        assert victim.returncode is None, f"a relay ended by itself: {victim.returncode}"
        victim.kill()
        await victim.wait()


async def test_relays_that_are_killed(place: Database, running: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5,000 committed and 500 rolled back rows of 200 keys, three relays, one killed each second for 15 s: drained within 30 s after the
    last kill; what arrives is what was committed, of each key first in order, at most a relay's rows in hand a kill twice."""
    namespace = f"t{os.urandom(4).hex()}."
    (tmp_path / "app.py").write_text(textwrap.dedent(APP).format(url=place.async_url, prefix=place.prefix, broker=running.url))
    relays = Relays(
        {
            **{name: value for name, value in os.environ.items() if not name.startswith("MSGBUS_")},
            "MSGBUS_LEASE": str(LEASE),
            "MSGBUS_NAMESPACE": namespace,
            "PYTHONPATH": str(tmp_path),
        }
    )
    settings = Settings(url=SecretStr(running.url), namespace=namespace)
    first: dict[str, list[int]] = defaultdict(list)
    received = met = 0
    backs: list[Step] = []

    async with place.opened() as store:
        bus = Bus(settings=settings, service="collect")
        writer = Writer(store, Bus(settings=settings, service="web", store=store))

        @bus.subscribe(STEPS, concurrency=64)
        async def collect(step: Step) -> None:
            nonlocal received
            received += 1
            if step.note == BACK:
                backs.append(step)
            elif step.n not in first[step.key]:
                first[step.key].append(step.n)

        async with bus.running():
            try:
                for _ in range(RELAYS):
                    await relays.start()
                await writer.commit(1)
                await eventually(lambda: received, 60, "a relay at work")  # interpreters start slowly where all start at once
                writing = asyncio.create_task(writer.all())
                for _ in range(KILLS):
                    await asyncio.sleep(EACH)
                    met += (await store.glance()).oldest is not None
                    await relays.kill()
                    await relays.start()
                await writing
                began = time.monotonic()
                await eventually(lambda: sum(map(len, first.values())) == ROWS, DRAINED, "all messages")
                async with asyncio.timeout(began + DRAINED - time.monotonic()):
                    while (await store.status()).sent < ROWS:  # noqa: ASYNC110 the database tells nobody that rows are marked
                        await asyncio.sleep(0.1)
                took = time.monotonic() - began
            finally:
                for relay in relays.processes:
                    if relay.returncode is None:
                        relay.kill()
                    await relay.wait()
        status = await store.status()
        assert (status.due, status.delayed, status.parked, status.sent) == (0, 0, 0, ROWS)
        assert backs == [], "what was rolled back was sent"
        assert {key: sorted(numbers) for key, numbers in first.items()} == {key: [*range(count)] for key, count in writer.counts.items()}
        assert all(numbers == sorted(numbers) for numbers in first.values()), "an inversion"
        twice = received - ROWS
        assert twice <= KILLS * BATCH * STREAMS
    with capsys.disabled():
        where = place.url.get_backend_name()
        print(f"\n{where}: {KILLS} kills, {met} with rows due; drained {took:.1f} s after the last; {twice} twice, no inversion")
