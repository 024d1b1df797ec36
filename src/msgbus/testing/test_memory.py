"""The conformance suite on the memory adapter: also the example of a third party's whole test file."""

from __future__ import annotations

from typing import cast

import pytest

from msgbus.contract.adapter import Adapter
from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker
from msgbus_memory import MemoryAdapter


async def die(adapter: Adapter) -> None:
    """What kill -9 of a process does: here the adapter has a method for it."""
    cast(MemoryAdapter, adapter).abandon()


@pytest.fixture
def broker() -> Broker:
    """Where the suite runs."""
    return Broker("memory://suite", crash=die, many=100)
