"""The tables: the plain SQL of the documentation is what the code says, and what is missing is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Dialect, MetaData, create_engine, text
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable
from tests.unit.sql.databases import Database

from msgbus.stores.sql import SqlStore, make_outbox_tables

SQL = Path(__file__).parents[3] / "docs" / "sql"
DIALECTS: dict[str, Dialect] = {"postgresql": postgresql.dialect(), "mysql": mysql.dialect(), "sqlite": sqlite.dialect()}  # type: ignore[no-untyped-call]  # so they are


def written(dialect: Dialect) -> str:
    """The tables as plain SQL. `PYTHONPATH=. python -m tests.unit.sql.test_schema` writes the files."""
    tables = make_outbox_tables()
    parts: list[str] = []
    for table in (tables.outbox, tables.inbox, tables.shards):
        parts.append(str(CreateTable(table).compile(dialect=dialect)))
        parts += [str(CreateIndex(index).compile(dialect=dialect)) for index in sorted(table.indexes, key=lambda one: str(one.name))]
    lines = [line.rstrip().replace("\t", "    ") for part in parts for line in f"{part.strip()};".splitlines()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", DIALECTS)
def test_the_documented_sql_is_what_the_code_says(name: str) -> None:
    """A change of the tables is a change of the files that operators use."""
    assert (SQL / f"{name}.sql").read_text() == written(DIALECTS[name])


async def test_the_documented_sql_makes_what_the_store_needs(place: Database) -> None:
    """Run by hand, it leaves nothing for `msgbus outbox check` to find."""
    engine = create_engine(place._with(1))
    prefix = place.prefix
    with engine.begin() as connection:
        for statement in (SQL / f"{place.url.get_backend_name()}.sql").read_text().replace("msgbus_", prefix).split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
    engine.dispose()
    made = place.engine()
    try:
        store = SqlStore(place.sessions(made), tables=make_outbox_tables(MetaData(), prefix=prefix))
        assert await store.problems() == []
        await store.open()
    finally:
        await made.dispose()


async def test_what_is_missing_is_named(place: Database) -> None:
    """Tables, columns, indexes and what makes ids unique, a line each."""
    async with place.opened() as store:
        assert await store.problems() == []
        prefix, dialect = place.prefix, place.url.get_backend_name()
        of_table = f" ON {prefix}outbox" if dialect == "mysql" else ""
        async with store.engine.begin() as connection:
            await connection.execute(text(f"DROP INDEX {prefix}outbox_due{of_table}"))
            await connection.execute(text(f"ALTER TABLE {prefix}inbox DROP COLUMN result"))
            await connection.execute(text(f"DROP TABLE {prefix}relay_shard"))
        assert await store.problems() == [
            f"index {prefix}outbox_due on {prefix}outbox (shard, status, available_at, id) is missing",
            f"column {prefix}inbox.result is missing",
            f"table {prefix}relay_shard is missing",
        ]


if __name__ == "__main__":
    for own, dialect in DIALECTS.items():
        (SQL / f"{own}.sql").write_text(written(dialect))
