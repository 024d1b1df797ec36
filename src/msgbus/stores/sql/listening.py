"""PostgreSQL's LISTEN: relays hear of rows when they are committed. Elsewhere, and where it fails, polling finds them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from msgbus.stores.sql.errors import is_database_error, shown

log = logging.getLogger("msgbus")

RECONNECT = 5.0
"""Seconds between two tries to listen again."""


@asynccontextmanager
async def listening(engine: AsyncEngine, channel: str, wake: Callable[[], None]) -> AsyncGenerator[None, None]:
    """Calls `wake` whenever the channel is notified. By a connection of its own, outside the pool; asyncpg's only."""
    if engine.driver != "asyncpg":
        yield
        return
    task = asyncio.create_task(_listen(engine, channel, wake), name="msgbus outbox listen")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _listen(engine: AsyncEngine, channel: str, wake: Callable[[], None]) -> None:
    while True:
        try:
            await _session(engine, channel, wake)
        except Exception as error:
            if not is_database_error(error):
                raise
            log.debug("LISTEN %s: %s", channel, shown(error))
        await asyncio.sleep(RECONNECT)


async def _session(engine: AsyncEngine, channel: str, wake: Callable[[], None]) -> None:
    connection = await engine.raw_connection()
    driver: Any = connection.driver_connection  # asyncpg's, which has no types
    connection.detach()

    ended = asyncio.Event()

    def heard(*_: object) -> None:
        wake()

    def over(*_: object) -> None:
        ended.set()

    try:
        driver.add_termination_listener(over)
        await driver.add_listener(channel, heard)
        wake()  # what was committed before we listened
        await ended.wait()
    finally:
        driver.terminate()
