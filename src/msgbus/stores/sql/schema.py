"""The tables, and what a live database lacks of them. Times are milliseconds since the epoch, by the database's clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    inspect,
    text,
)
from sqlalchemy.dialects.mysql import LONGBLOB, LONGTEXT, VARBINARY
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

PENDING, SENT, PARKED = 0, 1, 2
"""What `status` says of an outbox row."""
CLAIMED, DONE = 0, 1
"""What `state` says of an inbox row."""
SHARDS = 32
"""How many batches can be under way at once, of all relays."""
MYSQL = ("mysql", "mariadb")


class now_ms(FunctionElement[int]):
    """The database's clock when the statement began, in milliseconds since the epoch."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms, "postgresql")
def _now_postgresql(element: now_ms, compiler: SQLCompiler, **options: Any) -> str:  # Any: the compiler's own
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000 AS BIGINT)"  # stable, so that an index can be used


@compiles(now_ms, "mysql")
@compiles(now_ms, "mariadb")
def _now_mysql(element: now_ms, compiler: SQLCompiler, **options: Any) -> str:  # Any: the compiler's own
    return "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000)"  # UNIX_TIMESTAMP() jumps with summer time


@compiles(now_ms, "sqlite")
def _now_sqlite(element: now_ms, compiler: SQLCompiler, **options: Any) -> str:  # Any: the compiler's own
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


class _AsBytes(TypeDecorator[str]):
    """Text as MySQL's bytes: its own text ignores case, accents and spaces at the end."""

    impl = VARBINARY(255)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        return None if value is None else value.encode()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        return None if value is None else bytes(value).decode()


_Exact = String(255).with_variant(_AsBytes(), *MYSQL)
"""Text that is equal only to itself."""
_Bytes = LargeBinary().with_variant(LONGBLOB(), *MYSQL)
_Text = Text().with_variant(LONGTEXT(), *MYSQL)
_Number = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by themselves only as INTEGER


@dataclass(frozen=True, slots=True)
class OutboxTables:
    """The three tables of one store. `metadata` is for Alembic's `target_metadata`."""

    metadata: MetaData
    outbox: Table
    inbox: Table
    shards: Table


def make_outbox_tables(metadata: MetaData | None = None, *, prefix: str = "msgbus_", schema: str | None = None) -> OutboxTables:
    """The tables, in a `MetaData` of their own or in yours; nothing is created. `prefix` begins every name."""
    metadata = MetaData() if metadata is None else metadata
    pending, unsent = text("status = 0"), text("status <> 1")
    outbox = Table(
        f"{prefix}outbox",
        metadata,
        Column("id", _Number, primary_key=True, autoincrement=True),
        Column("message_id", _Exact, nullable=False),
        Column("topic", _Exact, nullable=False),
        Column("key", _Exact),
        Column("shard", SmallInteger, nullable=False),
        Column("content_type", String(255), nullable=False),
        Column("headers", _Text, nullable=False),
        Column("payload", _Bytes, nullable=False),
        Column("options", _Text, nullable=False),
        Column("created_at", BigInteger, nullable=False),
        Column("available_at", BigInteger, nullable=False),
        Column("expires_at", BigInteger),
        Column("status", SmallInteger, nullable=False, server_default=text("0")),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("last_error", String(2000)),
        Column("sent_at", BigInteger),
        UniqueConstraint("message_id", name=f"{prefix}outbox_message_id"),
        Index(f"{prefix}outbox_due", "shard", "status", "available_at", "id", postgresql_where=pending, sqlite_where=pending),
        Index(f"{prefix}outbox_shard", "shard", "status", "id", "available_at", postgresql_where=pending, sqlite_where=pending),
        Index(f"{prefix}outbox_key", "key", "status", "id", postgresql_where=unsent, sqlite_where=unsent),
        Index(f"{prefix}outbox_sent_at", "sent_at"),
        schema=schema,
    )
    inbox = Table(
        f"{prefix}inbox",
        metadata,
        Column("consumer", _Exact, primary_key=True),
        Column("message_id", _Exact, primary_key=True),
        Column("state", SmallInteger, nullable=False),
        Column("token", String(36)),
        Column("fingerprint", String(64), nullable=False),
        Column("result", _Bytes),
        Column("created_at", BigInteger, nullable=False),
        Column("completed_at", BigInteger),
        Column("expires_at", BigInteger, nullable=False),
        Index(f"{prefix}inbox_expires_at", "expires_at"),
        schema=schema,
    )
    shards = Table(
        f"{prefix}relay_shard",
        metadata,
        Column("shard", SmallInteger, primary_key=True, autoincrement=False),
        Column("owner", String(255)),
        Column("token", String(36)),
        Column("lease_until", BigInteger, nullable=False, server_default=text("0")),
        schema=schema,
    )
    return OutboxTables(metadata, outbox, inbox, shards)


def problems(connection: Connection, tables: OutboxTables) -> list[str]:
    """What the live schema lacks, a line each. Reads the catalogue only, so it harms no transaction."""
    found: list[str] = []
    live = inspect(connection)
    for table in (tables.outbox, tables.inbox, tables.shards):
        if not live.has_table(table.name, table.schema):
            found.append(f"table {table.fullname} is missing")
            continue
        columns = {column["name"] for column in live.get_columns(table.name, table.schema)}
        found += [f"column {table.fullname}.{column.name} is missing" for column in table.columns if column.name not in columns]
        keyed = [str(name) for name in live.get_pk_constraint(table.name, table.schema)["constrained_columns"]]
        if sorted(keyed) != sorted(column.name for column in table.primary_key):
            found.append(f"the primary key of {table.fullname} is ({', '.join(keyed)})")
        indexes = live.get_indexes(table.name, table.schema)
        indexed = {tuple(map(str, index["column_names"])) for index in indexes}
        unique = {tuple(map(str, one["column_names"])) for one in live.get_unique_constraints(table.name, table.schema)}
        unique |= {tuple(map(str, index["column_names"])) for index in indexes if index["unique"]}
        for index in table.indexes:
            if (names := tuple(column.name for column in index.columns)) not in indexed:
                found.append(f"index {index.name} on {table.fullname} ({', '.join(names)}) is missing")
        for constraint in table.constraints:
            if isinstance(constraint, UniqueConstraint) and (names := tuple(constraint.columns.keys())) not in unique:
                found.append(f"{table.fullname} ({', '.join(names)}) is not unique")
    return found


def autocommits(connection: Connection) -> bool:
    """Whether each statement commits itself, whatever a session believes. No I/O."""
    pooled = connection.connection
    if connection.dialect.name == "sqlite":  # whose drivers are told to leave transactions alone also by programs that begin them by hand
        driver: Any = pooled.driver_connection  # sqlite3's connection, or aiosqlite's
        return not driver.in_transaction and driver.isolation_level is None
    try:
        return connection.dialect.detect_autocommit_setting(pooled.dbapi_connection)  # type: ignore[arg-type]  # it is connected
    except NotImplementedError:
        return False
