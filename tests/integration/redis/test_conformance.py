"""The conformance suite on Redis."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from tests.brokers import Server

from msgbus.contract.adapter import Adapter
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus_redis import RedisAdapter

pytestmark = pytest.mark.broker("redis")


async def die(adapter: Adapter) -> None:
    """What kill -9 of a process does to its connections."""
    cast(RedisAdapter, adapter).abandon()


@pytest.fixture
def broker(running: Server) -> Broker:
    """Where the suite runs."""

    async def restart() -> None:
        await asyncio.to_thread(running.restart)

    return Broker(running.url, crash=die, restart=restart)
