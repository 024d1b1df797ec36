"""RedisStore keeps what every idempotency store promises, on Redis."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from redis import Redis
from tests.brokers import Server

from msgbus.contract.idempotency import IdempotencyStore, New
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


async def test_scripts_go_by_their_digests(running: Server) -> None:
    """A call does not carry its script; a server that has forgotten its scripts (SCRIPT FLUSH, a failover) is told them anew."""
    store, admin = RedisStore(running.url), Redis.from_url(running.url)
    key = uuid.uuid4().hex
    try:
        admin.config_resetstat()
        claim = await store.begin("g", key, "f", 5.0)
        assert isinstance(claim, New)
        for _ in range(2):
            admin.script_flush()
            assert await store.renew("g", key, claim.token, 5.0)
        assert await store.complete("g", key, claim.token, b"done", 5.0)
        assert "cmdstat_eval" not in admin.info("commandstats")
    finally:
        await store.close()
        admin.close()
