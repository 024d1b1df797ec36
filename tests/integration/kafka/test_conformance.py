"""The conformance suite on Apache Kafka."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from tests.brokers import Server

from msgbus.contract.adapter import Adapter
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus_kafka import KafkaAdapter
from msgbus_kafka.records import partition_of

pytestmark = [pytest.mark.broker("kafka"), pytest.mark.timeout(300)]
"""A dead member's partitions are free when its session has ended: six seconds at least, some tests wait for that many times."""


async def die(adapter: Adapter) -> None:
    """Its sockets close; nothing is committed, and no group is left."""
    cast(KafkaAdapter, adapter).abandon()


@pytest.fixture
def broker(running: Server) -> Broker:
    """Where the suite runs."""

    async def restart() -> None:
        await asyncio.to_thread(running.restart)

    return Broker(running.url, crash=die, shard_of=partition_of, restart=restart, patience=2.0)
