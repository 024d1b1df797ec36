"""The conformance suite on Apache Kafka: a broker that `MSGBUS_TEST_KAFKA_URL` names."""

from __future__ import annotations

import asyncio
import os
import time
from typing import cast

import pytest

from msgbus.contract.adapter import Adapter, AdapterSettings
from msgbus.errors import BrokerUnavailable
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus.urls import adapter_from_url
from msgbus_kafka import KafkaAdapter
from msgbus_kafka.records import partition_of

pytestmark = pytest.mark.timeout(300)
"""A dead member's partitions are free when its session has ended: six seconds at least, some tests wait for that many times."""


async def die(adapter: Adapter) -> None:
    """Its sockets close; nothing is committed, and no group is left."""
    cast(KafkaAdapter, adapter).abandon()


async def restart() -> None:
    """kill -9 of the broker's container, and its start; back when it answers again."""
    container = os.environ.get("MSGBUS_TEST_KAFKA_CONTAINER")
    if not container:
        if "MSGBUS_TEST_REQUIRE_BROKERS" in os.environ:
            pytest.fail("MSGBUS_TEST_KAFKA_CONTAINER is not set: in CI the broker is restarted")
        pytest.skip("MSGBUS_TEST_KAFKA_CONTAINER is not set: the container of the broker, which this test kills and starts again")
    for command in ("kill", "start"):
        process = await asyncio.create_subprocess_exec("docker", command, container, stdout=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0
    deadline = time.monotonic() + 100  # it recovers every partition that it ever had
    while True:
        adapter = adapter_from_url(os.environ["MSGBUS_TEST_KAFKA_URL"], AdapterSettings())
        try:
            await adapter.open()
            return
        except BrokerUnavailable:
            assert time.monotonic() < deadline, "the broker does not come back"
            await asyncio.sleep(0.5)
        finally:
            await adapter.close()


@pytest.fixture
def broker() -> Broker:
    """Where the suite runs."""
    url = os.environ.get("MSGBUS_TEST_KAFKA_URL")
    if not url:
        if "MSGBUS_TEST_REQUIRE_BROKERS" in os.environ:
            pytest.fail("MSGBUS_TEST_KAFKA_URL is not set")
        pytest.skip("MSGBUS_TEST_KAFKA_URL is not set: kafka://host:port of a broker for tests")
    return Broker(url, crash=die, shard_of=partition_of, restart=restart)
