"""The suite of idempotency stores on MemoryStore: also the example of a third party's whole test file."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from msgbus.contract.idempotency import IdempotencyStore
from msgbus.stores import MemoryStore
from msgbus.testing.store_suite import *  # noqa: F403
from msgbus.testing.store_suite import Stores


@asynccontextmanager
async def opened() -> AsyncGenerator[IdempotencyStore, None]:
    """A store of this process."""
    yield MemoryStore()


@pytest.fixture
def stores() -> Stores:
    """Where the suite runs."""
    return Stores(opened, shared=False)
