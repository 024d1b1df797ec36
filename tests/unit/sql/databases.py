"""Where SQL tests run: SQLite always, PostgreSQL and MySQL where they can be had (see `tests/brokers.py`)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, MetaData, create_engine, inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from tests.brokers import Unavailable, server
from tests.conftest import missing

from msgbus.stores.sql import SqlStore, make_outbox_tables

NAMES = ("sqlite", "postgresql", "mysql")
SERVERS = {"postgresql": "postgres", "mysql": "mysql"}
DRIVERS = {"sqlite": ("aiosqlite", "pysqlite"), "postgresql": ("asyncpg", "psycopg"), "mysql": ("aiomysql", "pymysql")}


@dataclass(frozen=True)
class Database:
    """A database, and the prefix of one test's own tables in it."""

    url: URL
    prefix: str

    def engine(self, **options: object) -> AsyncEngine:
        return create_async_engine(self._with(0), pool_size=20, **options)

    def sessions(self, engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=False)

    def sync_sessions(self) -> sessionmaker[Session]:
        return sessionmaker(create_engine(self._with(1), pool_size=20), expire_on_commit=False)

    def store(self, engine: AsyncEngine, **options: object) -> SqlStore:
        tables = make_outbox_tables(MetaData(), prefix=self.prefix)
        return SqlStore(self.sessions(engine), tables=tables, create_tables=True, **options)  # type: ignore[arg-type]  # a test's own

    def _with(self, which: int) -> URL:
        return self.url.set(drivername=f"{self.url.get_backend_name()}+{DRIVERS[self.url.get_backend_name()][which]}")

    @property
    def async_url(self) -> str:
        """For an engine of another process."""
        return self._with(0).render_as_string(hide_password=False)

    def drop(self) -> None:
        """The test's tables go; a file goes with its folder."""
        if self.url.get_backend_name() == "sqlite":
            return
        engine = create_engine(self._with(1))
        with engine.begin() as connection:
            for table in inspect(connection).get_table_names():
                if table.startswith(self.prefix):
                    connection.execute(text(f"DROP TABLE {table}"))
        engine.dispose()

    @asynccontextmanager
    async def opened(self, **options: object) -> AsyncGenerator[SqlStore, None]:
        """A store with an engine of its own, its tables made."""
        engine = self.engine()
        try:
            store = self.store(engine, **options)
            await store.open()
            yield store
        finally:
            await engine.dispose()


def database(name: str, place: Path) -> Database:
    """The database of this name, or a skip that says what is missing; in CI a failure."""
    prefix = f"t{uuid.uuid4().hex[:10]}_"
    if name == "sqlite":
        return Database(make_url(f"sqlite:///{place / 'test.db'}"), prefix)
    try:
        return Database(make_url(server(SERVERS[name]).url), prefix)
    except Unavailable as why:
        missing(str(why))
