"""The outbox: rows written, claimed, settled and cleaned, as statements on a connection whose transaction the caller ends.

Never by a cursor ("ids above the last one seen"): of two transactions the one with the higher id may commit first.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Insert,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy import Row as SqlRow
from sqlalchemy.dialects import mysql, postgresql, sqlite

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import CONTENT_TYPE, Envelope
from msgbus.contract.outbox import Claimed, NewRow, OutboxStatus, Refusal, Row
from msgbus.errors import OutboxError
from msgbus.stores.sql.schema import MYSQL, PARKED, PENDING, SENT, SHARDS, OutboxTables, now_ms

SHARDS_AT_ONCE = SHARDS // 2
"""How many shards one claim takes at most, so that other relays find some."""
MAX_ERROR = 2000

# Written out and not bound: only so can a partial index be used.
_PENDING: ColumnElement[Any] = literal_column(str(PENDING))  # Any: a column's value in SQL
_ONE: ColumnElement[Any] = literal_column("1")
_PARKED: ColumnElement[Any] = literal_column(str(PARKED))

_TOPIC_DEFAULTS = asdict(TopicSpec(""))


def channel(tables: OutboxTables) -> str:
    """What PostgreSQL calls the wake-up: NOTIFY by the insert, LISTEN by relays."""
    return tables.outbox.name


# ---------------------------------------------------------------- writing


def insert_rows(connection: Connection, tables: OutboxTables, rows: Sequence[NewRow]) -> None:
    """One statement (an executemany for several). An id that is there already is left alone: an error would abort the transaction."""
    values = [_values(row) for row in rows]
    if values:
        connection.execute(_insert(connection, tables), values[0] if len(values) == 1 else values)


def _insert(connection: Connection, tables: OutboxTables) -> Insert:
    outbox, name = tables.outbox, connection.dialect.name
    times = {"created_at": now_ms(), "available_at": now_ms() + bindparam("delay_ms", type_=BigInteger)}
    if name == "postgresql":
        waking = func.pg_notify(channel(tables), "")  # within the transaction: sent when it commits, once however many rows
        return postgresql.insert(outbox).values(times).on_conflict_do_nothing().returning(waking)
    if name in MYSQL:
        same = mysql.insert(outbox).values(times)
        return same.on_duplicate_key_update(message_id=outbox.c.message_id)
    if name == "sqlite":
        return sqlite.insert(outbox).values(times).on_conflict_do_nothing()
    return insert(outbox).values(times)


def _values(row: NewRow) -> dict[str, Any]:  # Any: values of SQL
    envelope, topic = row.envelope, row.topic
    spec = {name: value for name, value in asdict(topic).items() if name != "name" and value != _TOPIC_DEFAULTS[name]}
    headers = dict(envelope.headers)
    content_type = headers.pop(CONTENT_TYPE, "")
    try:
        options = json.dumps({"topic": spec, "priority": envelope.priority}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OutboxError(f"Topic({topic.name!r}, native=...) holds what cannot be stored in a row: {error}") from error
    return {
        "message_id": envelope.id,
        "topic": envelope.topic,
        "key": envelope.key,
        "shard": None if envelope.key is None else shard_of(envelope.key, SHARDS),
        "content_type": content_type,
        "headers": json.dumps(headers),
        "payload": envelope.body,
        "options": options,
        "delay_ms": round(envelope.delay * 1000),
        "expires_at": None if envelope.expires_at is None else round(envelope.expires_at * 1000),
    }


# ---------------------------------------------------------------- a relay


def candidates(connection: Connection, tables: OutboxTables) -> tuple[bool, list[int]]:
    """Whether rows without a key are due, and the free shards that have due rows. Reads only: an idle relay writes nothing."""
    outbox, shards = tables.outbox, tables.shards
    due = _due(tables)
    loose = exists().where(outbox.c.shard.is_(None), *due, _free(tables))
    some = connection.execute(select(loose)).scalar_one()
    keyed = select(shards.c.shard).where(shards.c.lease_until <= now_ms(), exists().where(outbox.c.shard == shards.c.shard, *due))
    return bool(some), list(connection.scalars(keyed))


def claim(connection: Connection, tables: OutboxTables, loose: bool, free: Sequence[int], limit: int, lease: float, owner: str) -> Claimed:
    """Takes what `candidates` found, as far as nobody else did meanwhile."""
    outbox, shards = tables.outbox, tables.shards
    token = str(uuid.uuid4())
    until = now_ms() + round(lease * 1000)
    chosen = random.sample(list(free), min(len(free), SHARDS_AT_ONCE))
    # First, even where it changes nothing: on SQLite it takes the write lock, which keeps others from claiming the same rows.
    taking = update(shards).where(shards.c.shard.in_(chosen or [-1]), shards.c.lease_until <= now_ms())
    connection.execute(taking.values(token=token, owner=owner, lease_until=until))
    held = list(connection.scalars(select(shards.c.shard).where(shards.c.token == token))) if chosen else []
    due = _due(tables)
    found: list[SqlRow[Any]] = []  # Any: the row's columns
    if loose:
        unkeyed = _rows(tables).where(outbox.c.shard.is_(None), *due, _free(tables)).order_by(outbox.c.available_at, outbox.c.id)
        share = limit if not held else limit // 2
        found += connection.execute(unkeyed.limit(share).with_for_update(skip_locked=True)).all()
        if found:
            leased = update(outbox).where(outbox.c.id.in_([row.id for row in found])).values(lease_token=token, lease_until=until)
            connection.execute(leased)
    for shard in held:
        keyed = _rows(tables).where(outbox.c.shard == shard, *due, _first_of_key(tables)).order_by(outbox.c.id)
        found += connection.execute(keyed.limit(max(1, (limit - len(found)) // len(held)))).all()
    return Claimed(token, [_read(row) for row in found], frozenset(held))


def settle(connection: Connection, tables: OutboxTables, claimed: Claimed, sent: Sequence[int], refused: Mapping[int, Refusal]) -> int:
    """Marks what became of the rows that are still ours, and gives all back; how many were not."""
    outbox, shards = tables.outbox, tables.shards
    ours = shards.c.token == claimed.token
    connection.execute(update(shards).where(ours).values(lease_until=shards.c.lease_until))  # locks them; on SQLite, the database
    held = set(connection.scalars(select(shards.c.shard).where(ours)))
    settled = [*sent, *refused]
    keyed = {row.id: shard_of(row.envelope.key, SHARDS) for row in claimed.rows if row.envelope.key is not None}
    loose = update(outbox).where(outbox.c.lease_token == claimed.token)
    changed = 0
    for rows, mine in (
        ([one for one in sent if one not in keyed], loose),
        ([one for one in sent if keyed.get(one) in held], update(outbox).where(outbox.c.status == PENDING)),
    ):
        if rows:
            marked = mine.where(outbox.c.id.in_(rows)).values(status=SENT, sent_at=now_ms(), lease_token=None, lease_until=None)
            changed += connection.execute(marked).rowcount
    for one, refusal in refused.items():
        if one in keyed and keyed[one] not in held:
            continue
        mine = update(outbox).where(outbox.c.status == PENDING) if one in keyed else loose
        values: dict[str, Any] = {
            "attempts": outbox.c.attempts + 1,
            "last_error": refusal.error[:MAX_ERROR],
            "lease_token": None,
            "lease_until": None,
        }
        if refusal.after is None:
            values["status"] = PARKED
        else:
            values["available_at"] = now_ms() + round(refusal.after * 1000)
        changed += connection.execute(mine.where(outbox.c.id == one).values(**values)).rowcount
    if any(row.id not in keyed and row.id not in settled for row in claimed.rows):
        connection.execute(loose.values(lease_token=None, lease_until=None))
    if claimed.shards:
        connection.execute(update(shards).where(ours).values(token=None, owner=None, lease_until=0))
    return len(settled) - changed


def clean(connection: Connection, tables: OutboxTables, keep: float, limit: int) -> int:
    """Deletes at most `limit` rows that were sent more than `keep` seconds ago; how many."""
    outbox = tables.outbox
    old = [outbox.c.status == SENT, outbox.c.sent_at < now_ms() - round(keep * 1000)]
    ids = list(connection.scalars(select(outbox.c.id).where(*old).limit(limit)))
    return connection.execute(delete(outbox).where(outbox.c.id.in_(ids))).rowcount if ids else 0


# ---------------------------------------------------------------- people


def status(connection: Connection, tables: OutboxTables, limit: int) -> OutboxStatus:
    """Counts, and the oldest parked rows."""
    outbox = tables.outbox
    late = outbox.c.available_at <= now_ms()
    counts: dict[int, int] = {row[0]: row[1] for row in connection.execute(select(outbox.c.status, func.count()).group_by(outbox.c.status))}
    delayed = connection.execute(select(func.count()).where(outbox.c.status == PENDING, not_(late))).scalar_one()
    measured = select(func.count(), func.min(outbox.c.available_at), func.max(now_ms())).where(outbox.c.status == PENDING, late)
    due, first, now = connection.execute(measured).one()
    shown = (outbox.c.id, outbox.c.message_id, outbox.c.topic, outbox.c.key, outbox.c.attempts, outbox.c.last_error)
    parked = connection.execute(select(*shown).where(outbox.c.status == PARKED).order_by(outbox.c.id).limit(limit)).mappings()
    return OutboxStatus(
        due=due,
        delayed=delayed,
        parked=counts.get(PARKED, 0),
        sent=counts.get(SENT, 0),
        oldest=(now - first) / 1000 if due else None,
        parked_rows=tuple({str(name): value for name, value in row.items()} for row in parked),
    )


def retry(connection: Connection, tables: OutboxTables, ids: Sequence[int] | None) -> int:
    """Parked rows are due again."""
    outbox = tables.outbox
    again = update(outbox).where(outbox.c.status == PARKED)
    if ids is not None:
        again = again.where(outbox.c.id.in_(ids))
    return connection.execute(again.values(status=PENDING, attempts=0, available_at=now_ms())).rowcount


def make_shards(connection: Connection, tables: OutboxTables) -> None:
    """The rows of the shards that are not there yet."""
    there = set(connection.scalars(select(tables.shards.c.shard)))
    missing = [{"shard": shard} for shard in range(SHARDS) if shard not in there]
    if missing:
        connection.execute(insert(tables.shards), missing)


# ---------------------------------------------------------------- inside


def _due(tables: OutboxTables) -> tuple[Any, Any]:  # Any: SQLAlchemy's conditions
    outbox = tables.outbox
    return outbox.c.status == _PENDING, outbox.c.available_at <= now_ms()


def _first_of_key(tables: OutboxTables) -> Any:  # Any: SQLAlchemy's condition, here and below
    """No earlier row of the same key is parked or waits for another try. The limit keeps a database from reading all rows for it."""
    outbox, earlier = tables.outbox, tables.outbox.alias("earlier")
    blocking: Select[Any] = select(_ONE).where(
        earlier.c.key == outbox.c.key,
        earlier.c.status.in_([_PENDING, _PARKED]),
        earlier.c.status != _ONE,  # says nothing new, but to SQLite, which needs the index's own words to use it
        earlier.c.id < outbox.c.id,
        earlier.c.topic == outbox.c.topic,
        or_(earlier.c.status == _PARKED, and_(earlier.c.attempts > 0, earlier.c.available_at > now_ms())),
    )
    for dialect in MYSQL:  # which would rather read all rows before it by their ids
        blocking = blocking.with_hint(earlier, f"FORCE INDEX ({outbox.name}_key)", dialect)
    return blocking.limit(1).scalar_subquery().is_(None)


def _free(tables: OutboxTables) -> Any:  # Any: SQLAlchemy's condition
    until = tables.outbox.c.lease_until
    return or_(until.is_(None), until <= now_ms())


def _rows(tables: OutboxTables) -> Select[Any]:  # Any: the row's columns
    outbox = tables.outbox
    expired = and_(outbox.c.expires_at.is_not(None), outbox.c.expires_at <= now_ms())
    return select(*(column for column in outbox.columns if column.name in _READ), expired.label("expired"))


_READ = frozenset({"id", "message_id", "topic", "key", "content_type", "headers", "payload", "options", "expires_at", "attempts"})


def _read(row: SqlRow[Any]) -> Row:  # Any: the row's columns
    options = json.loads(row.options)
    headers: dict[str, str] = json.loads(row.headers)
    if row.content_type:
        headers[CONTENT_TYPE] = row.content_type
    envelope = Envelope(
        row.message_id,
        row.topic,
        bytes(row.payload),
        headers,
        row.key,
        priority=options["priority"],
        expires_at=None if row.expires_at is None else row.expires_at / 1000,
    )
    return Row(row.id, envelope, TopicSpec(row.topic, **options["topic"]), row.attempts, bool(row.expired))
