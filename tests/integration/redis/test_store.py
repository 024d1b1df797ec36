"""RedisStore keeps what every idempotency store promises, on Redis."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from tests.brokers import Server

from msgbus.contract.idempotency import IdempotencyStore
from msgbus.testing.store_suite import *  # noqa: F403
from msgbus.testing.store_suite import Stores
from msgbus_redis import RedisStore

pytestmark = pytest.mark.broker("redis")


@pytest.fixture
def stores(running: Server) -> Stores:
    """Where the suite runs."""
    url = running.url

    @asynccontextmanager
    async def opened() -> AsyncGenerator[IdempotencyStore, None]:
        store = RedisStore(url)
        try:
            yield store
        finally:
            await store.close()

    return Stores(opened)
