"""The conformance suite on Apache Kafka: a broker that `MSGBUS_TEST_KAFKA_URL` names."""

from __future__ import annotations

import os
from typing import cast

import pytest

from msgbus.contract.adapter import Adapter
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus_kafka import KafkaAdapter
from msgbus_kafka.records import partition_of


async def die(adapter: Adapter) -> None:
    """Its sockets close; nothing is committed, and no group is left."""
    cast(KafkaAdapter, adapter).abandon()


@pytest.fixture
def broker() -> Broker:
    """Where the suite runs."""
    url = os.environ.get("MSGBUS_TEST_KAFKA_URL")
    if not url:
        if os.environ.get("CI") == "true":
            pytest.fail("MSGBUS_TEST_KAFKA_URL is not set: in CI the suite runs on Kafka")
        pytest.skip("MSGBUS_TEST_KAFKA_URL is not set: kafka://host:port of a broker for tests")
    return Broker(url, crash=die, shard_of=partition_of)
