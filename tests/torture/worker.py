"""A worker process of the torture: one subscription, whose handler does what each message says and notes it in a file.

`python -m tests.torture.worker TERMS`: `TERMS` is JSON; the broker and the settings come from `MSGBUS_…` variables. Says "up" on its
standard output when it consumes, drains on SIGTERM, and can be killed at any point: a line of its file is one write.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel
from tenacity import wait_fixed

from msgbus import Bus, Context, Retry, Topic
from msgbus.testing.history import Event, How, What

GROUP = "crew"


class Work(BaseModel):
    """A message: what its handler is to do, and for how long. `n` counts within the key."""

    key: str
    n: int = 0
    do: Literal["succeed", "fail", "die"] = "succeed"
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """Of the message."""
        return f"{self.key}-{self.n}"


class Terms(BaseModel):
    """What a crew's processes have in common, and the name and file of one."""

    topic: str
    keyed: bool
    shards: int | None = None
    concurrency: int = 16
    window: int = 32
    attempts: int = 8
    wait: float = 0.1
    """Seconds between the runs of a failing message."""
    pid: str = ""
    path: str = ""


def topic_of(terms: Terms) -> Topic[Work]:
    """The topic of these terms, the same in every process."""
    return Topic(terms.topic, Work, key="key", shards=terms.shards) if terms.keyed else Topic(terms.topic, Work)


def line_of(event: Event) -> bytes:
    """As `History.read` reads it."""
    return json.dumps({name: value for name, value in asdict(event).items() if value is not None}).encode() + b"\n"


def bus_of(terms: Terms) -> Bus:
    """The one subscription of a worker."""
    file = os.open(terms.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(f: What, work: Work, context: Context, how: How = "ok") -> None:
        key = work.key if terms.keyed else None
        event = Event(time.monotonic(), terms.pid, f, how, context.id, key, work.n if terms.keyed else None, GROUP, context.attempt)
        os.write(file, line_of(event))

    @asynccontextmanager
    async def lifespan(_: Bus) -> AsyncIterator[None]:
        print("up", flush=True)
        yield

    bus = Bus(service=GROUP, retry=Retry(attempts=terms.attempts, wait=wait_fixed(terms.wait)), lifespan=lifespan)

    @bus.subscribe(topic_of(terms), concurrency=terms.concurrency, window=terms.window, timeout=timedelta(minutes=10))
    async def handle(work: Work, context: Context) -> None:
        note("start", work, context)
        try:
            await asyncio.sleep(work.seconds)
        except asyncio.CancelledError:
            note("fail", work, context, "info")
            raise
        if work.do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if work.do == "fail":
            note("fail", work, context)
            raise ValueError("it always fails")
        note("done", work, context)

    return bus


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(bus_of(Terms.model_validate_json(sys.argv[1])).run())
