"""Where programs run: in memory, and on each broker that tests are given (see `tests/brokers.py`)."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, cast

import pytest
from tests.brokers import Server

from msgbus.contract.adapter import Adapter
from msgbus.testing.stage import Broker

NAMES = ("memory", "redis", "rabbitmq", "kafka")

_numbers = itertools.count()


async def die(adapter: Adapter) -> None:
    """What kill -9 of its process does to an adapter: each has a method that plays it."""
    result: Any = cast(Any, adapter).abandon()
    if inspect.isawaitable(result):
        await result


def broker_called(name: str, request: pytest.FixtureRequest) -> Broker:
    """The broker of this name, for a test that is marked with it."""
    if name == "memory":
        return Broker(f"memory://differential{next(_numbers)}", crash=die)
    running: Server = request.getfixturevalue("running")
    return Broker(running.url, crash=die, patience=3.0)
