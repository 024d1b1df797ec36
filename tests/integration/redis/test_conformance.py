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

pytestmark = [pytest.mark.broker("redis"), pytest.mark.timeout(120)]

VERSIONED = (
    "test_depth_and_lag",  # 7.0 says no lag where it is not sure; before it there is none
    "test_dropped_group_frees_what_it_held",  # a waiting reader hears of it as UNBLOCKED or as NOGROUP
    "test_purge",
    "test_poison_process_killer_dead_lettered_and_its_neighbours_spared",  # how XPENDING counts what its process took down
    "test_confirmed_outlives_its_process_and_a_restart",
)


async def die(adapter: Adapter) -> None:
    """What kill -9 of a process does to its connections."""
    cast(RedisAdapter, adapter).abandon()


@pytest.fixture
def broker(running: Server) -> Broker:
    """Where the suite runs."""

    async def restart() -> None:
        await asyncio.to_thread(running.restart)

    return Broker(running.url, crash=die, restart=restart, patience=2.0)
