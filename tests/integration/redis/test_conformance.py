"""The conformance suite on Redis: at `MSGBUS_TEST_REDIS_URL`. Restarts need `MSGBUS_TEST_REDIS_CONTAINER`, a container of its own."""

from __future__ import annotations

import asyncio
import os
from typing import cast

import pytest

from msgbus.contract.adapter import Adapter
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus_redis import RedisAdapter

URL = "MSGBUS_TEST_REDIS_URL"
CONTAINER = "MSGBUS_TEST_REDIS_CONTAINER"


async def die(adapter: Adapter) -> None:
    """What kill -9 of a process does to its connections."""
    cast(RedisAdapter, adapter).abandon()


async def restart() -> None:
    """What a power cut does, as far as a container shows it."""
    container = os.environ.get(CONTAINER)
    if container is None:
        pytest.skip(f"{CONTAINER} names no container to kill and start")
    for verb in ("kill", "start"):
        process = await asyncio.create_subprocess_exec("docker", verb, container, stdout=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0


@pytest.fixture
def broker() -> Broker:
    """Where the suite runs."""
    url = os.environ.get(URL)
    if url is None:
        if "MSGBUS_TEST_REQUIRE_BROKERS" in os.environ:
            pytest.fail(f"{URL} is not set")
        pytest.skip(f"{URL} is not set")
    return Broker(url, crash=die, restart=restart)
