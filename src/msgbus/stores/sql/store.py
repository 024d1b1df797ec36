"""SqlStore: connections, sessions and transactions around the statements of `inbox` and `outbox`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import Pool, QueuePool, StaticPool

from msgbus.contract.idempotency import Claim
from msgbus.contract.outbox import Claimed, Glance, OutboxStatus, Refusal, SyncWrites, Transaction, TransactionalStore, Writes
from msgbus.errors import ConfigurationError, OutboxError, StoreError
from msgbus.stores.sql import inbox, outbox, schema
from msgbus.stores.sql.errors import is_database_error, is_transient, shown
from msgbus.stores.sql.listening import listening
from msgbus.stores.sql.schema import OutboxTables, make_outbox_tables
from msgbus.stores.sql.writing import AsyncTransaction, AsyncWrites, PlainWrites, ThreadTransaction

log = logging.getLogger("msgbus")

P = ParamSpec("P")
R = TypeVar("R")

CALL_TIMEOUT = 10.0
"""Seconds that the database has for one of the store's own transactions, repetitions among them."""
CANCEL_TIMEOUT = 1.0
"""Seconds that a transaction under way has to end when its caller is cancelled."""
TRIES = 6
"""How often a transaction is run that the database asks to run again."""
CHUNK = 1000
"""Rows that one cleaning deletes at most."""


class SqlStore(TransactionalStore):
    """Inbox, outbox and idempotency in the application's database: PostgreSQL, MySQL ≥ 8.0.13, MariaDB ≥ 10.6 or SQLite.

    `sessions` makes what async handlers are given, and names the engine; `sync_sessions`, of the same database, what handlers in threads
    are given. `tables`: those of `make_outbox_tables`, where prefix or schema are your own. `create_tables=True` makes them when a bus
    starts: for tests and development; elsewhere a migration does.
    """

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        *,
        sync_sessions: sessionmaker[Session] | None = None,
        tables: OutboxTables | None = None,
        create_tables: bool = False,
    ) -> None:
        engine: object = sessions.kw.get("bind")
        if not isinstance(engine, AsyncEngine):
            raise ConfigurationError(
                f"SqlStore(sessions): async_sessionmaker(create_async_engine(...)), with the engine; this one is bound to {engine!r}"
            )
        sync_engine: object = None if sync_sessions is None else sync_sessions.kw.get("bind")
        if sync_sessions is not None and not isinstance(sync_engine, Engine):
            raise ConfigurationError(f"SqlStore(sync_sessions): a sessionmaker with its engine; bound to {sync_engine!r}")
        if engine.dialect.name not in ("postgresql", "mysql", "mariadb", "sqlite"):
            raise ConfigurationError(f"SqlStore: PostgreSQL, MySQL, MariaDB or SQLite, not {engine.dialect.name}")
        self.tables = make_outbox_tables() if tables is None else tables
        self.engine = engine
        self._sessions = sessions
        self._sync_sessions = sync_sessions
        self._sync_engine = sync_engine if isinstance(sync_engine, Engine) else None
        # InnoDB's locks between rows, which its default level brings, make deadlocks of relays and of the inbox's own transactions.
        self._own = engine.execution_options(isolation_level="READ COMMITTED") if engine.dialect.name in schema.MYSQL else engine
        self._create = create_tables
        self._owner = f"{socket.gethostname()}:{os.getpid()}"[:255]
        self._wakes: set[Callable[[], None]] = set()
        self.checked = False
        """The tables were seen to be there."""

    def __repr__(self) -> str:
        return f"SqlStore({self.engine.url.render_as_string(hide_password=True)!r})"

    # ------------------------------------------------------------ idempotency

    async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
        return await self.run(inbox.begin, self.tables.inbox, group, key, fingerprint, lease, done=False)

    async def complete(self, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
        return await self.run(inbox.complete, self.tables.inbox, group, key, token, result, ttl)

    async def renew(self, group: str, key: str, token: str, lease: float) -> bool:
        return await self.run(inbox.renew, self.tables.inbox, group, key, token, lease)

    async def abandon(self, group: str, key: str, token: str) -> bool:
        return await self.run(inbox.abandon, self.tables.inbox, group, key, token)

    # ------------------------------------------------------------ handlers and users

    async def open(self) -> None:
        if await self._run(schema.autocommits, self.engine):
            raise ConfigurationError(f'{self!r}: with isolation_level="AUTOCOMMIT" nothing is a transaction; give it an engine without')
        if self._create:
            await self.create_tables()
        found = await self.problems()
        if found:
            raise ConfigurationError(
                f"{self!r}: {'; '.join(found)}. Make the tables by a migration (docs/outbox.md has the SQL); "
                "SqlStore(..., create_tables=True) makes them in tests and development"
            )
        await self.run(outbox.make_shards, self.tables)
        self.checked = True

    async def close(self) -> None:
        await self.engine.dispose()
        if self._sync_engine is not None:
            await asyncio.to_thread(self._sync_engine.dispose)

    async def create_tables(self) -> None:
        """Makes what is missing of the tables. Several processes at once may do so."""
        try:
            await self.run(self._make_tables)
        except StoreError:
            if await self.problems():  # else somebody else was just doing the same
                raise

    def _make_tables(self, connection: Connection) -> None:
        tables = self.tables
        tables.metadata.create_all(connection, tables=[tables.outbox, tables.inbox, tables.shards])

    def refuses_handler(self, concurrency: int, *, is_async: bool) -> str | None:
        if not is_async and self._sync_sessions is None:
            return "a sync handler's session needs SqlStore(..., sync_sessions=sessionmaker(create_engine(...)))"
        pool = self.engine.pool if is_async or self._sync_engine is None else self._sync_engine.pool
        holds = _capacity(pool)
        if holds is not None and concurrency > holds:
            return (
                f"concurrency is {concurrency}, but the engine's pool holds {holds} connections; each running handler has one: "
                f"create_async_engine(..., pool_size={concurrency}) or concurrency={holds}"
            )
        return None

    @asynccontextmanager
    async def transaction(self, *, is_async: bool) -> AsyncGenerator[Transaction, None]:
        if is_async:
            async with self._sessions() as session:
                yield AsyncTransaction(self, session)
            return
        assert self._sync_sessions is not None  # refuses_handler asked
        transaction = ThreadTransaction(self, self._sync_sessions())
        try:
            yield transaction
        except asyncio.CancelledError:
            raise  # the handler's thread may still use the session; with its last reference the connection is rolled back
        except BaseException:
            await transaction.close()
            raise
        await transaction.close()

    def writes_to(self, session: object) -> Writes | SyncWrites:
        if isinstance(session, AsyncSession | AsyncConnection):
            self._check(_bind_of(session.sync_session if isinstance(session, AsyncSession) else session, self.tables))
            return AsyncWrites(self, session)
        if isinstance(session, Session | Connection):
            self._check(_bind_of(session, self.tables))
            return PlainWrites(self, session)
        raise OutboxError(
            f"outbox() takes an AsyncSession, AsyncConnection, Session or Connection of SQLAlchemy, not {type(session).__name__}"
        )

    def worth_repeating(self, error: BaseException) -> bool:
        return is_transient(error)

    def _check(self, engine: Engine) -> None:
        known = [self.engine.sync_engine, *([self._sync_engine] if self._sync_engine is not None else [])]
        if engine not in known and not any(_same_database(engine, one) for one in known):
            raise OutboxError(
                f"the session is of {engine.url.render_as_string()}, and the relay reads {self.engine.url.render_as_string()}: "
                "a row there would never be sent"
            )

    # ------------------------------------------------------------ the relay's view

    def wake(self) -> None:
        for wake in tuple(self._wakes):
            wake()

    def wake_after(self, session: Session) -> None:
        """Relays of this process look once this session has committed."""
        if self._wakes and not session.info.get(_WAKES):
            session.info[_WAKES] = True
            event.listen(session, "after_commit", self._committed)

    def _committed(self, session: Session) -> None:
        self.wake()

    @asynccontextmanager
    async def listen(self, wake: Callable[[], None]) -> AsyncGenerator[None, None]:
        loop = asyncio.get_running_loop()

        def from_any_thread() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)

        self._wakes.add(from_any_thread)
        try:
            async with listening(self.engine, outbox.channel(self.tables), wake):
                yield
        finally:
            self._wakes.discard(from_any_thread)

    async def claim(self, limit: int, lease: float) -> Claimed:
        return await self.run(outbox.claim, self.tables, limit, lease, self._owner)

    async def settle(self, claimed: Claimed, sent: Sequence[int], refused: Mapping[int, Refusal]) -> int:
        return await self.run(outbox.settle, self.tables, claimed.token, sent, refused)

    async def clean(self, keep: float) -> int:
        return await self.run(outbox.clean, self.tables, keep, CHUNK) + await self.run(inbox.clean, self.tables.inbox, CHUNK)

    async def glance(self) -> Glance:
        return await self.run(outbox.glance, self.tables)

    async def status(self, limit: int = 10) -> OutboxStatus:
        return await self.run(outbox.status, self.tables, limit)

    async def retry(self, ids: Sequence[int] | None = None) -> int:
        count = await self.run(outbox.retry, self.tables, ids)
        self.wake()
        return count

    async def problems(self) -> list[str]:
        return await self.run(schema.problems, self.tables)

    # ------------------------------------------------------------ inside

    async def run(self, work: Callable[Concatenate[Connection, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs statements in a transaction of their own, again where the database asks for it. Raises `StoreError`.

        A caller that is cancelled still waits for its end a while: a driver that is cancelled midway loses its connection.
        """
        task = asyncio.create_task(self._run(lambda connection: work(connection, *args, **kwargs), self._own), name="msgbus store")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=CANCEL_TIMEOUT)
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_TIMEOUT)
            raise

    async def _run(self, work: Callable[[Connection], R], engine: AsyncEngine) -> R:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CALL_TIMEOUT
        tries = 1
        while True:
            try:
                async with asyncio.timeout_at(deadline), engine.begin() as connection:
                    return await connection.run_sync(work)
            except Exception as error:
                if not is_database_error(error):
                    raise
                if tries == TRIES or loop.time() >= deadline or not is_transient(error):
                    raise StoreError(f"{self!r}: {shown(error)}") from error
            await asyncio.sleep(random.uniform(0, 0.02 * 2**tries))
            tries += 1


_WAKES = "msgbus_wakes_relays"


def _capacity(pool: Pool) -> int | None:
    """How many connections it holds at most; None: any number."""
    if isinstance(pool, QueuePool):
        overflow: int = getattr(pool, "_max_overflow", 0)  # SQLAlchemy tells it by no other name
        return None if overflow < 0 else pool.size() + overflow
    return 1 if isinstance(pool, StaticPool) else None


def _bind_of(session: AsyncConnection | Session | Connection, tables: OutboxTables) -> Engine:
    if not isinstance(session, Session):
        return session.engine.sync_engine if isinstance(session, AsyncConnection) else session.engine
    try:
        return session.get_bind(clause=tables.outbox).engine
    except SQLAlchemyError as error:
        raise OutboxError(f"the session has no engine for {tables.outbox.fullname}: {error}") from error


def _same_database(one: Engine, other: Engine) -> bool:
    """By what the URLs say: drivers and users may differ."""
    first, second = one.url, other.url
    if one.dialect.name == "sqlite":
        names = [url.database for url in (first, second)]
        return (
            other.dialect.name == "sqlite"
            and None not in names
            and len({os.path.abspath(name or "") for name in names}) == 1
            and names[0] != ":memory:"
        )
    family = [name.replace("mariadb", "mysql") for name in (one.dialect.name, other.dialect.name)]
    return family[0] == family[1] and (first.host, first.port, first.database) == (second.host, second.port, second.database)
