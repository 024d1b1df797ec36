"""Fixtures of the SQL tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text
from tests.unit.sql.databases import NAMES, Database, database


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each database in turn, its test's tables dropped afterwards."""
    found = database(request.param, tmp_path)
    yield found
    if request.param != "sqlite":
        engine = create_engine(found._with(1))
        with engine.begin() as connection:
            for table in inspect(connection).get_table_names():
                if table.startswith(found.prefix):
                    connection.execute(text(f"DROP TABLE {table}"))
        engine.dispose()
