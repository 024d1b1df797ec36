"""What a database's errors mean. In one place."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.exc import SQLAlchemyError

TRANSIENT_STATES = frozenset({"40001", "40P01"})
"""PostgreSQL: serialisation failure, deadlock."""
TRANSIENT_NUMBERS = frozenset({1205, 1213, 1020})
"""MySQL and MariaDB: lock wait timeout, deadlock, record changed since the snapshot."""
TRANSIENT_SQLITE = frozenset({5, 6})
"""SQLITE_BUSY, SQLITE_LOCKED: the last byte of its extended codes."""
DRIVERS = frozenset({"asyncpg", "psycopg", "psycopg2", "pymysql", "aiomysql", "asyncmy", "MySQLdb", "sqlite3", "aiosqlite"})
"""Whose errors reach us as they are where SQLAlchemy does not wrap them, as when a connection is made."""


def is_database_error(error: BaseException) -> bool:
    """Whether it says that the database, or the way to it, failed."""
    return isinstance(error, SQLAlchemyError | OSError | TimeoutError) or type(error).__module__.partition(".")[0] in DRIVERS


def is_transient(error: BaseException) -> bool:
    """Whether the database only asks for the same transaction again: nothing of it has happened."""
    return any(_is_transient(one) for one in _chain(error))


def _is_transient(error: BaseException) -> bool:
    if type(error).__module__.partition(".")[0] not in DRIVERS and not hasattr(error, "sqlstate"):
        return False
    if getattr(error, "sqlstate", None) in TRANSIENT_STATES:
        return True
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in TRANSIENT_SQLITE
    number = error.args[0] if error.args else None
    return isinstance(number, int) and number in TRANSIENT_NUMBERS


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it wraps, and what it was raised from."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop()
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, getattr(one, "orig", None)]


def shown(error: BaseException) -> str:
    """The error in a line, without the statement and its values, which may be secret."""
    inner = getattr(error, "orig", None) or error
    return " ".join(f"{type(inner).__name__}: {inner}".split())[:500]
