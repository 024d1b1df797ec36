"""Fixtures of the SQL tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.sql.databases import NAMES, Database, database


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each database in turn, its test's tables dropped afterwards."""
    found = database(request.param, tmp_path)
    yield found
    found.drop()
