"""The inbox: claims and effects by consumer and key, as statements on a connection whose transaction the caller ends."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from sqlalchemy import Connection, Insert, Table, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, InProgress, New
from msgbus.stores.sql.schema import CLAIMED, DONE, MYSQL, now_ms


def begin(connection: Connection, inbox: Table, group: str, key: str, fingerprint: str, seconds: float, *, done: bool) -> Claim:
    """Claims a key for so long, or, with `done`, remembers its effect: of many at once, one gets `New`.

    Where another transaction is just doing so, it waits for that one's end.
    """
    token = uuid.uuid4().hex
    until = now_ms() + round(seconds * 1000)
    values: dict[str, Any] = {  # Any: values and expressions of SQL
        "state": DONE if done else CLAIMED,
        "token": None if done else token,
        "fingerprint": fingerprint,
        "result": None,
        "created_at": now_ms(),
        "completed_at": now_ms() if done else None,
        "expires_at": until,
    }
    if _insert(connection, inbox, {"consumer": group, "message_id": fitting(key), **values}):
        return New(token)
    over = update(inbox).where(*_row(inbox, group, key), inbox.c.expires_at <= now_ms()).values(**values)
    if connection.execute(over).rowcount:
        return New(token)
    found = connection.execute(
        select(inbox.c.state, inbox.c.fingerprint, inbox.c.result, inbox.c.expires_at - now_ms()).where(*_row(inbox, group, key))
    ).one_or_none()
    if found is None:  # given up just now
        return InProgress(0.0)
    state, known, result, left = found
    if known != fingerprint:
        return Conflict()
    return AlreadyDone(result) if state == DONE else InProgress(max(left, 0) / 1000)


def _insert(connection: Connection, inbox: Table, row: dict[str, Any]) -> bool:
    """Whether the row was not there yet."""
    name = connection.dialect.name
    if name in MYSQL:  # INSERT IGNORE would ignore every other error too; a duplicate key undoes the statement, not the transaction
        try:
            connection.execute(insert(inbox).values(**row))
        except IntegrityError:
            return False
        return True
    statement: Insert
    if name == "postgresql":
        statement = postgresql.insert(inbox).values(**row).on_conflict_do_nothing()
    else:
        statement = sqlite.insert(inbox).values(**row).on_conflict_do_nothing()
    # SQLAlchemy asks a driver only after UPDATE and DELETE by itself: without the option some say that they do not know.
    inserted = connection.execute(statement.execution_options(preserve_rowcount=True)).rowcount
    if inserted not in (0, 1):
        raise RuntimeError(f"the driver {connection.dialect.driver} does not say how many rows were inserted: {inserted}")
    return inserted == 1


def complete(connection: Connection, inbox: Table, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
    """The claim becomes an effect that is remembered for `ttl` seconds. False: the token does not hold it."""
    values: dict[str, Any] = {
        "state": DONE,
        "token": None,
        "result": result,
        "completed_at": now_ms(),
        "expires_at": now_ms() + round(ttl * 1000),
    }
    return bool(connection.execute(update(inbox).where(*_held(inbox, group, key, token)).values(**values)).rowcount)


def renew(connection: Connection, inbox: Table, group: str, key: str, token: str, lease: float) -> bool:
    """The claim holds for `lease` seconds from now. False: the token does not hold it."""
    renewed = update(inbox).where(*_held(inbox, group, key, token)).values(expires_at=now_ms() + round(lease * 1000))
    return bool(connection.execute(renewed).rowcount)


def abandon(connection: Connection, inbox: Table, group: str, key: str, token: str) -> bool:
    """The claim is gone. False: the token did not hold it."""
    return bool(connection.execute(delete(inbox).where(*_held(inbox, group, key, token))).rowcount)


def clean(connection: Connection, inbox: Table, limit: int) -> int:
    """Deletes at most `limit` rows whose time is over; how many."""
    over = inbox.c.expires_at <= now_ms()
    rows = connection.execute(select(inbox.c.consumer, inbox.c.message_id).where(over).limit(limit)).all()
    deleted = 0
    for consumer, message_id in rows:  # each by its key: a range would lock what others insert beside it
        deleted += connection.execute(delete(inbox).where(inbox.c.consumer == consumer, inbox.c.message_id == message_id, over)).rowcount
    return deleted


def _row(inbox: Table, group: str, key: str) -> tuple[Any, Any]:  # Any: SQLAlchemy's conditions
    return inbox.c.consumer == group, inbox.c.message_id == fitting(key)


def _held(inbox: Table, group: str, key: str, token: str) -> tuple[Any, ...]:  # Any: SQLAlchemy's conditions
    return (*_row(inbox, group, key), inbox.c.state == CLAIMED, inbox.c.token == token)


def fitting(key: str) -> str:
    """The key, or a digest of one that no column can hold: foreign messages may name anything."""
    raw = key.encode("utf-8", "surrogatepass")
    if len(raw) <= 255 and "\0" not in key and raw.decode("utf-8", "replace") == key:
        return key
    return "sha256:" + hashlib.sha256(raw).hexdigest()
