"""Three relay processes, one of them killed each half second: nothing is lost, and every key has its order. On demand, like all torture."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr
from sqlalchemy import create_engine, text
from tests.brokers import Server
from tests.unit.sql.databases import NAMES, Database, database

from msgbus import Bus, Topic
from msgbus.settings import Settings

ROWS, KEYS, RELAYS = 5000, 200, 3

pytestmark = [
    pytest.mark.broker("redis"),
    pytest.mark.timeout(400),
]


class Step(BaseModel):
    key: str
    n: int


STEPS = Topic("steps", Step, key="key")

APP = """
    import sys
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
    from msgbus import Bus
    from msgbus.stores.sql import SqlStore, make_outbox_tables

    store = SqlStore(async_sessionmaker(create_async_engine({url!r})), tables=make_outbox_tables(MetaData(), prefix={prefix!r}))
    bus = Bus({broker!r}, service="relay", store=store)
"""


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    return database(request.param, tmp_path)


async def test_relays_that_are_killed(place: Database, running: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5,000 rows of 200 keys, three relays, one killed each half second until all is sent: all arrive, of each key first in order."""
    namespace = f"t{os.urandom(4).hex()}."
    url = place._with(0).render_as_string(hide_password=False)
    (tmp_path / "app.py").write_text(textwrap.dedent(APP).format(url=url, prefix=place.prefix, broker=running.url))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MSGBUS_")},
        "MSGBUS_LEASE": "2",
        "MSGBUS_NAMESPACE": namespace,
        "PYTHONPATH": str(tmp_path),
    }
    settings = Settings(url=SecretStr(running.url), namespace=namespace)
    seen: dict[str, list[int]] = defaultdict(list)
    everything: list[tuple[str, int]] = []
    all_here = asyncio.Event()

    async with place.opened() as store:
        bus = Bus(settings=settings, service="collect")
        writer = Bus(settings=settings, service="collect", store=store)

        @bus.subscribe(STEPS, concurrency=64)
        async def collect(step: Step) -> None:
            everything.append((step.key, step.n))
            if step.n not in seen[step.key]:
                seen[step.key].append(step.n)
                if sum(len(numbers) for numbers in seen.values()) == ROWS:
                    all_here.set()

        counts: dict[str, int] = defaultdict(int)
        for _ in range(50):
            async with store.engine.begin() as connection:
                steps: list[Step] = []
                for _ in range(ROWS // 50):
                    key = f"k{random.randrange(KEYS)}"
                    steps.append(Step(key=key, n=counts[key]))
                    counts[key] += 1
                await writer.outbox(connection).publish_many(STEPS, steps)

        async def start() -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "msgbus", "outbox", "relay", "app", env=environment, stderr=asyncio.subprocess.DEVNULL
            )

        began, killed = time.monotonic(), 0
        async with bus.running():
            relays = [await start() for _ in range(RELAYS)]
            try:
                async with asyncio.timeout(300):
                    while not all_here.is_set():
                        await asyncio.wait([asyncio.ensure_future(all_here.wait())], timeout=0.5)
                        if not all_here.is_set() and everything:  # they have begun: no relay starts in a second here
                            victim = random.randrange(RELAYS)
                            relays[victim].send_signal(signal.SIGKILL)
                            await relays[victim].wait()
                            relays[victim] = await start()
                            killed += 1
            finally:
                for relay in relays:
                    if relay.returncode is None:
                        relay.kill()
                    await relay.wait()
        took = time.monotonic() - began
        assert all(numbers == sorted(numbers) for numbers in seen.values()), "an inversion"
        assert {key: len(numbers) for key, numbers in seen.items()} == dict(counts)
    with capsys.disabled():
        twice = len(everything) - ROWS
        print(f"\n{place.url.get_backend_name()}: {ROWS} rows in {took:.1f} s, {killed} kills, {twice} received twice, 0 inversions")
    if place.url.get_backend_name() != "sqlite":
        engine = create_engine(place._with(1))
        with engine.begin() as plain:
            for table in ("outbox", "inbox", "relay_shard"):
                plain.execute(text(f"DROP TABLE {place.prefix}{table}"))
        engine.dispose()
