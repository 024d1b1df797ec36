"""The conformance suite on RabbitMQ."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from tests.brokers import Server

from msgbus.contract.adapter import Adapter
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus_rabbitmq import RabbitAdapter

pytestmark = [pytest.mark.broker("rabbitmq"), pytest.mark.timeout(120)]

VERSIONED = (  # what is done otherwise before 4.3, or answered in other words
    "test_plain_name_takes_the_brokers_shards",
    "test_topology_mismatch_fails_start",
    "test_per_key_order_many_consumers",
    "test_order_survives_drain_and_kill",
    "test_resets_and_drains_are_not_deaths",
    "test_release_gives_back_uncounted",
    "test_delay_not_before",
    "test_depth_and_lag",
    "test_dropped_group_frees_what_it_held",
    "test_confirmed_outlives_its_process_and_a_restart",
)


async def die(adapter: Adapter) -> None:
    """What kill -9 of a process does to its connections."""
    cast(RabbitAdapter, adapter).abandon()


@pytest.fixture
def broker(running: Server) -> Broker:
    """Where the suite runs."""

    async def restart() -> None:
        await asyncio.sleep(2)  # 4.3 may lose what a quorum queue got in its first second when it is killed
        await asyncio.to_thread(running.restart)

    return Broker(running.url, crash=die, restart=restart, patience=2.0)
