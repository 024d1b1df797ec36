"""The outbox: rows written, claimed, settled and cleaned, as statements on a connection whose transaction the caller ends.

Never by a cursor ("ids above the last one seen"): of two transactions the one with the higher id may commit first.
"""

from __future__ import annotations

import functools
import json
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from pydantic_core import from_json
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Connection,
    Insert,
    and_,
    any_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    insert,
    literal_column,
    not_,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import CONTENT_TYPE, Envelope, Priority
from msgbus.contract.outbox import Claimed, Glance, NewRow, OutboxStatus, Refusal, Row
from msgbus.errors import OutboxError
from msgbus.stores.sql.schema import MYSQL, PARKED, PENDING, SENT, SHARDS, OutboxTables, now_ms

SHARDS_AT_ONCE = SHARDS // 4
"""How many shards one claim takes at most, so that other relays find some."""
NO_SHARD = -1
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
    loose = random.randrange(SHARDS)  # rows without keys may be in any; those that lie side by side are read and marked together
    values = [_values(row, loose) for row in rows]
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


def _values(row: NewRow, loose: int) -> dict[str, Any]:  # Any: values of SQL
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
        "shard": loose if envelope.key is None else shard_of(envelope.key, SHARDS),
        "content_type": content_type,
        "headers": json.dumps(headers),
        "payload": envelope.body,
        "options": options,
        "delay_ms": round(envelope.delay * 1000),
        "expires_at": None if envelope.expires_at is None else round(envelope.expires_at * 1000),
    }


# ---------------------------------------------------------------- a relay


def claim(connection: Connection, tables: OutboxTables, limit: int, lease: float, owner: str) -> Claimed:
    """Takes some of the free shards that have due rows, and reads the first of them. Where there are none, it writes nothing."""
    outbox, shards = tables.outbox, tables.shards
    free = shards.c.lease_until <= now_ms()
    due = exists().where(outbox.c.shard == shards.c.shard, *_due(tables))
    some = list(connection.scalars(select(shards.c.shard).where(free, due)))
    if not some:
        return Claimed("")
    token = str(uuid.uuid4())
    held = random.sample(some, min(len(some), SHARDS_AT_ONCE))
    # Before any row is read: of two relays that found the same shards one waits here, and finds them taken.
    taking = update(shards).where(shards.c.shard.in_(held), free)
    taken = connection.execute(taking.values(token=token, owner=owner, lease_until=now_ms() + round(lease * 1000))).rowcount
    if taken < len(held):
        held = list(connection.scalars(select(shards.c.shard).where(shards.c.token == token)))
        if not held:
            return Claimed("")
    places = 1 if len(held) == 1 else SHARDS_AT_ONCE  # two statements, for a database that prepares them, and not one a number
    asked = {f"shard{number}": shard for number, shard in enumerate(held + [NO_SHARD] * (places - len(held)))}
    rows = connection.execute(_first_rows(tables, connection.dialect.name, places), asked | {"most": max(1, limit // len(held))}).all()
    if not rows:
        _give_back(connection, tables, token)
        return Claimed("")
    return Claimed(token, sorted(map(_read, rows), key=attrgetter("id")))


def settle(connection: Connection, tables: OutboxTables, token: str, sent: Sequence[int], refused: Mapping[int, Refusal]) -> int:
    """Gives the shards back and marks what became of rows in those that were still ours; how many rows were in others."""
    outbox, shards = tables.outbox, tables.shards
    _give_back(connection, tables, token)  # first: it locks them, on SQLite the database, so that nobody takes them before the end
    ours = outbox.c.shard.in_(list(connection.scalars(select(shards.c.shard).where(shards.c.token == token))))
    changed = 0
    if sent:
        marked = update(outbox).where(_among(connection, outbox.c.id, sent), ours)
        changed += connection.execute(marked.values(status=SENT, sent_at=now_ms())).rowcount
    for one, refusal in refused.items():
        values: dict[str, Any] = {"attempts": outbox.c.attempts + 1, "last_error": refusal.error[:MAX_ERROR]}
        if refusal.after is None:
            values["status"] = PARKED
        else:
            values["available_at"] = now_ms() + round(refusal.after * 1000)
        changed += connection.execute(update(outbox).where(outbox.c.id == one, ours).values(**values)).rowcount
    return len(sent) + len(refused) - changed


def _give_back(connection: Connection, tables: OutboxTables, token: str) -> None:
    """From now on anybody may take the shards. The token stays until somebody does: a `settle` that is repeated still knows its own."""
    shards = tables.shards
    connection.execute(update(shards).where(shards.c.token == token).values(lease_until=now_ms()))


@functools.lru_cache(64)  # what is made anew is taken apart anew, which costs as much as all else here
def _first_rows(tables: OutboxTables, dialect: str, shards: int) -> CompoundSelect[Any]:  # Any: the row's columns
    """The first due rows, at most `most`, of each of so many shards, `shard0` and so on: `_READ`, and whether they are expired.

    By the index that has them in this order: the other one would sort all that are due.
    """
    outbox = tables.outbox
    pending, due = _due(tables)
    if dialect == "sqlite":
        due = outbox.c.available_at + 0 <= now_ms()  # which says nothing new, but no other index can be used for it
    expired = and_(outbox.c.expires_at.is_not(None), outbox.c.expires_at <= now_ms())
    wanted = select(*(outbox.c[name] for name in _READ), expired.label("expired"))
    wanted = wanted.where(pending, due, _first_of_key(tables)).order_by(outbox.c.id).limit(bindparam("most"))
    if dialect in MYSQL:
        wanted = wanted.with_hint(outbox, f"FORCE INDEX ({outbox.name}_shard)")
    return union_all(*(select(wanted.where(outbox.c.shard == bindparam(f"shard{number}")).subquery()) for number in range(shards)))


def clean(connection: Connection, tables: OutboxTables, keep: float, limit: int) -> int:
    """Deletes at most `limit` rows that were sent more than `keep` seconds ago; how many."""
    outbox = tables.outbox
    old = [outbox.c.status == SENT, outbox.c.sent_at < now_ms() - round(keep * 1000)]
    ids = list(connection.scalars(select(outbox.c.id).where(*old).limit(limit)))
    return connection.execute(delete(outbox).where(outbox.c.id.in_(ids))).rowcount if ids else 0


# ---------------------------------------------------------------- people


def glance(connection: Connection, tables: OutboxTables) -> Glance:
    """By the indexes of what is not sent: of each shard the first due row."""
    outbox, shards = tables.outbox, tables.shards
    of_shard = select(outbox.c.available_at).where(outbox.c.shard == shards.c.shard, *_due(tables)).order_by(outbox.c.available_at).limit(1)
    firsts = select(of_shard.scalar_subquery().label("first"), shards.c.lease_until, now_ms().label("now")).subquery()
    looked = select(func.min(firsts.c.first), func.max(firsts.c.lease_until), func.max(firsts.c.now))
    first, last, now = connection.execute(looked).one()
    # MySQL has no partial indexes, but those that begin with shard and status; the others have one of what is not sent.
    parked = select(func.count()).where(outbox.c.shard.in_(range(SHARDS)), outbox.c.status == _PARKED, outbox.c.status != _ONE)
    return Glance(
        parked=connection.execute(parked).scalar_one(),
        oldest=None if first is None else (now - first) / 1000,
        idle=max(0, now - last) / 1000 if last else None,
    )


def status(connection: Connection, tables: OutboxTables, limit: int) -> OutboxStatus:
    """Counts, and the oldest parked rows."""
    outbox = tables.outbox
    glanced = glance(connection, tables)
    late = outbox.c.available_at <= now_ms()
    counts: dict[int, int] = {row[0]: row[1] for row in connection.execute(select(outbox.c.status, func.count()).group_by(outbox.c.status))}
    delayed = connection.execute(select(func.count()).where(outbox.c.status == _PENDING, not_(late))).scalar_one()
    shown = (outbox.c.id, outbox.c.message_id, outbox.c.topic, outbox.c.key, outbox.c.attempts, outbox.c.last_error)
    parked = connection.execute(select(*shown).where(outbox.c.status == PARKED).order_by(outbox.c.id).limit(limit)).mappings()
    return OutboxStatus(
        due=counts.get(PENDING, 0) - delayed,
        delayed=delayed,
        parked=counts.get(PARKED, 0),
        sent=counts.get(SENT, 0),
        oldest=glanced.oldest,
        idle=glanced.idle,
        problems=glanced.problems(),
        parked_rows=[{str(name): value for name, value in row.items()} for row in parked],
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


def _first_of_key(tables: OutboxTables) -> ColumnElement[bool]:
    """No earlier row of the same key is parked or waits for another try.

    Asked for each row by itself, whose key's index answers at once. Without the OR databases make a join of it, and read all rows.
    """
    outbox, earlier = tables.outbox, tables.outbox.alias("earlier")
    blocking = select(_ONE).where(
        earlier.c.key == outbox.c.key,
        earlier.c.status.in_([_PENDING, _PARKED]),
        earlier.c.status != _ONE,  # says nothing new, but to SQLite, which needs the index's own words to use it
        earlier.c.id < outbox.c.id,
        earlier.c.topic == outbox.c.topic,
        or_(earlier.c.status == _PARKED, and_(earlier.c.attempts > 0, earlier.c.available_at > now_ms())),
    )
    for dialect in MYSQL:  # which would rather read all rows before it by their ids
        blocking = blocking.with_hint(earlier, f"FORCE INDEX ({outbox.name}_key)", dialect)
    return or_(outbox.c.key.is_(None), not_(blocking.exists()))


def _among(connection: Connection, column: ColumnElement[Any], numbers: Sequence[int]) -> ColumnElement[bool]:  # Any: as above
    """Whether it is one of many. PostgreSQL takes them as one value, which spares some hundred parameters."""
    if connection.dialect.name == "postgresql":
        return column == any_(cast(bindparam("numbers", list(numbers)), postgresql.ARRAY(BigInteger)))
    return column.in_(numbers)


_READ = ("id", "message_id", "topic", "key", "content_type", "headers", "payload", "options", "expires_at", "attempts")


def _read(row: Sequence[Any]) -> Row:  # Any: the row's columns
    number, message_id, topic, key, content_type, written, payload, options, expires_at, attempts, expired = row
    headers: dict[str, str] = from_json(written)
    if content_type:
        headers[CONTENT_TYPE] = content_type
    spec, priority = _read_options(topic, options)
    until = None if expires_at is None else expires_at / 1000
    return Row(number, Envelope(message_id, topic, bytes(payload), headers, key, None, priority, 0.0, until), spec, attempts, bool(expired))


@functools.lru_cache(256)  # few topics have many rows
def _read_options(topic: str, options: str) -> tuple[TopicSpec, Priority]:
    read = json.loads(options)
    return TopicSpec(topic, **read["topic"]), read["priority"]
