"""PostgreSQL's LISTEN: relays hear of rows when they are committed. Elsewhere, and where it fails, polling finds them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from msgbus.stores.sql.errors import is_database_error, shown

log = logging.getLogger("msgbus")

RECONNECT = 5.0
"""Seconds between two tries to listen again."""


@asynccontextmanager
async def listening(engine: AsyncEngine, channel: str, wake: Callable[[], None]) -> AsyncGenerator[None, None]:
    """Calls `wake` whenever the channel is notified. By a connection of its own, outside the pool; with asyncpg or psycopg."""
    way = _WAYS.get(engine.driver)
    if way is None:
        yield
        return
    task = asyncio.create_task(_listen(engine, way, channel, wake), name="msgbus outbox listen")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _listen(engine: AsyncEngine, way: _Way, channel: str, wake: Callable[[], None]) -> None:
    while True:
        try:
            connection = await engine.raw_connection()
            driver: Any = connection.driver_connection  # asyncpg's, which has no types, or psycopg's
            connection.detach()
            await way(driver, channel, wake)
        except Exception as error:
            if not is_database_error(error):
                raise
            log.debug("LISTEN %s: %s", channel, shown(error))
        await asyncio.sleep(RECONNECT)


async def _asyncpg(driver: Any, channel: str, wake: Callable[[], None]) -> None:  # Any: as above
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


async def _psycopg(driver: Any, channel: str, wake: Callable[[], None]) -> None:  # Any: as above
    try:
        await driver.set_autocommit(True)
        await driver.execute('LISTEN "{}"'.format(channel.replace('"', '""')))
        wake()
        async for _ in driver.notifies():
            wake()
    finally:
        await driver.close()


_Way = Callable[[Any, str, Callable[[], None]], Awaitable[None]]
"""Listens by a driver's connection until it is lost, and closes it."""
_WAYS: dict[str, _Way] = {"asyncpg": _asyncpg, "psycopg": _psycopg}
