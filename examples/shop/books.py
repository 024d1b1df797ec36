"""The books of the services, read from outside: they do not know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from examples.shop.database import engine_of
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import async_sessionmaker

from msgbus.stores.sql import SqlStore

BOOKS = {"orders": "orders", "billing": "invoices", "shipping": "shipments"}
"""Each service's table with a row for each order."""


class Line(NamedTuple):
    """One order, as a customer knows it and as each service must have it."""

    order_id: str
    customer: str
    item: str
    cents: int


class Books:
    """What the services have written so far, oldest first."""

    def __init__(self, databases: Mapping[str, str]) -> None:
        self._engines = {service: engine_of(url) for service, url in databases.items()}

    async def read(self, service: str) -> list[Line]:
        """All lines of a service's book."""
        rows = text(f"SELECT order_id, customer, item, cents FROM {BOOKS[service]} ORDER BY number")
        async with self._engines[service].connect() as connection:
            return [Line(*row) for row in await connection.execute(rows)]

    async def missing(self) -> int:
        """How many services have not begun a book yet: they are just starting."""
        count = 0
        for service, engine in self._engines.items():
            async with engine.connect() as connection:
                tables = await connection.run_sync(lambda connection: inspect(connection).get_table_names())
            count += BOOKS[service] not in tables
        return count

    async def unsent(self) -> int:
        """Rows of the outboxes that no relay has sent, those among them that a broker refused."""
        found = [await SqlStore(async_sessionmaker(engine)).status() for engine in self._engines.values()]
        return sum(one.due + one.delayed + one.parked for one in found)

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.dispose()
