"""Rows written to a transaction: the user's own, or that of a handler's run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from msgbus.contract.idempotency import Claim
from msgbus.contract.outbox import NewRow, SyncWrites, Transaction, Writes
from msgbus.errors import OutboxError, StoreError
from msgbus.stores.sql import inbox, outbox, schema
from msgbus.stores.sql.errors import is_database_error, shown
from msgbus.stores.sql.schema import OutboxTables

log = logging.getLogger("msgbus")

R = TypeVar("R")

REMEMBER_TIMEOUT = 10.0
"""Seconds to wait for the connection, and for another transaction that just has the same key."""


NO_TRANSACTION = "the outbox writes to a transaction, and this session has none: publish inside `async with session.begin():`"
AUTOCOMMIT = (
    'the outbox writes to a transaction, and on this connection there is none: with isolation_level="AUTOCOMMIT" each statement '
    "commits itself; use an engine without it"
)


class Home(Protocol):
    """What they need of their store."""

    tables: OutboxTables
    checked: bool

    def wake_after(self, session: Session) -> None: ...
    def wake(self) -> None: ...


def _insert(connection: Connection, home: Home, rows: Sequence[NewRow]) -> None:
    """The one statement. Before the first one the catalogue is read: what is missing must not abort the user's transaction."""
    if schema.autocommits(connection):
        raise OutboxError(AUTOCOMMIT)
    if not home.checked:
        found = schema.problems(connection, home.tables)
        if found:
            raise OutboxError(f"nothing was stored: {'; '.join(found)}")
        home.checked = True
    outbox.insert_rows(connection, home.tables, rows)


@contextmanager
def _told() -> Generator[None, None, None]:
    """The database's errors, those of a session that cannot be used among them, are the outbox's."""
    try:
        yield
    except Exception as error:
        if not is_database_error(error):
            raise
        raise OutboxError(f"nothing was stored: {shown(error)}") from error


class AsyncWrites(Writes):
    """The user's AsyncSession or AsyncConnection."""

    def __init__(self, home: Home, session: AsyncSession | AsyncConnection) -> None:
        self._home = home
        self._session = session

    async def insert(self, rows: Sequence[NewRow]) -> None:
        session = self._session
        if not session.in_transaction():
            raise OutboxError(NO_TRANSACTION)
        with _told():
            if isinstance(session, AsyncSession):
                self._home.wake_after(session.sync_session)
                session = await session.connection(bind_arguments={"clause": self._home.tables.outbox})
            await session.run_sync(_insert, self._home, rows)


class PlainWrites(SyncWrites):
    """The user's Session or Connection."""

    def __init__(self, home: Home, session: Session | Connection) -> None:
        self._home = home
        self._session = session

    def insert(self, rows: Sequence[NewRow]) -> None:
        session = self._session
        if not session.in_transaction():
            raise OutboxError(NO_TRANSACTION)
        with _told():
            if isinstance(session, Session):
                self._home.wake_after(session)
                session = session.connection(bind_arguments={"clause": self._home.tables.outbox})
            _insert(session, self._home, rows)


class AsyncTransaction(Transaction):
    """Of an async handler."""

    def __init__(self, home: Home, session: AsyncSession) -> None:
        self.session = session
        self._session = session
        self._home = home
        self._wrote = False

    async def remember(self, group: str, key: str, fingerprint: str, ttl: float) -> Claim:
        try:
            async with asyncio.timeout(REMEMBER_TIMEOUT):
                connection = await self._connection()
                self._begun = self._session.sync_session.get_transaction()
                return await connection.run_sync(inbox.begin, self._home.tables.inbox, group, key, fingerprint, ttl, done=True)
        except Exception as error:
            if isinstance(error, IntegrityError) or not is_database_error(error):
                raise
            raise StoreError(f"the handler's transaction: {shown(error)}") from error

    async def insert(self, rows: Sequence[NewRow]) -> None:
        self._wrote = True
        with _told():
            await (await self._connection()).run_sync(_insert, self._home, rows)

    async def commit(self) -> None:
        if self._session.sync_session.get_transaction() is not self._begun:
            log.error("a handler ended its own transaction: what it did afterwards may happen twice; leave the session's end to msgbus")
        await self._session.flush()  # what fails here is the handler's own
        try:
            async with asyncio.timeout(REMEMBER_TIMEOUT):
                await self._session.commit()
        except Exception as error:
            if isinstance(error, IntegrityError) or not is_database_error(error):
                raise
            raise StoreError(f"the handler's transaction: {shown(error)}") from error
        if self._wrote:
            self._home.wake()

    async def _connection(self) -> AsyncConnection:
        return await self._session.connection(bind_arguments={"clause": self._home.tables.outbox})


class ThreadTransaction(Transaction):
    """Of a handler in a thread: one thread at a time uses the session, not always the same."""

    def __init__(self, home: Home, session: Session) -> None:
        self.session = session
        self._session = session
        self._home = home
        self._wrote = False

    async def remember(self, group: str, key: str, fingerprint: str, ttl: float) -> Claim:
        def first() -> Claim:
            return inbox.begin(self._connection(), self._home.tables.inbox, group, key, fingerprint, ttl, done=True)

        return await self._in_thread(first)

    async def insert(self, rows: Sequence[NewRow]) -> None:
        self._wrote = True
        with _told():
            await asyncio.to_thread(lambda: _insert(self._connection(), self._home, rows))

    async def commit(self) -> None:
        await asyncio.to_thread(self._session.flush)  # what fails here is the handler's own
        await self._in_thread(self._session.commit)
        if self._wrote:
            self._home.wake()

    async def close(self) -> None:
        """Rolls back what was not committed."""
        await asyncio.to_thread(self._session.close)

    def _connection(self) -> Connection:
        return self._session.connection(bind_arguments={"clause": self._home.tables.outbox})

    async def _in_thread(self, work: Callable[[], R]) -> R:
        try:
            return await asyncio.to_thread(work)
        except Exception as error:
            if isinstance(error, IntegrityError) or not is_database_error(error):
                raise
            raise StoreError(f"the handler's transaction: {shown(error)}") from error
