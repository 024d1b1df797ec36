"""A service's own database: `DATABASE_URL`, of PostgreSQL or SQLite, else a file of SQLite in the working directory."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import MetaData, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

DRIVERS = {"postgresql": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
CONNECTIONS = 20
"""A handler that runs has one, and 16 run at once."""


def connect(service: str) -> AsyncEngine:
    """The service's engine. Nothing is opened yet."""
    return engine_of(os.environ.get("DATABASE_URL", f"sqlite:///shop-{service}.db"))


def engine_of(url: str) -> AsyncEngine:
    """The engine of a URL, whichever driver that names. Raises `ValueError` for a database that the shop has no driver for."""
    parsed = make_url(url)
    name = parsed.get_backend_name()
    if name not in DRIVERS:
        raise ValueError(f"the shop keeps its books in PostgreSQL or SQLite, not in {name}")
    return create_async_engine(parsed.set(drivername=DRIVERS[name]), pool_size=CONNECTIONS)


@asynccontextmanager
async def opened(engine: AsyncEngine, tables: MetaData) -> AsyncGenerator[None, None]:
    """A service's lifespan: its tables are made where they are missing (in production by a migration), its connections closed."""
    async with engine.begin() as connection:
        await connection.run_sync(tables.create_all)
    try:
        yield
    finally:
        await engine.dispose()
