"""SqlStore keeps what every idempotency store promises, on each database."""

from __future__ import annotations

import pytest
from tests.unit.sql.databases import Database

from msgbus.testing.store_suite import *  # noqa: F403
from msgbus.testing.store_suite import Stores


@pytest.fixture
def stores(place: Database) -> Stores:
    """Where the suite runs."""
    return Stores(place.opened)
