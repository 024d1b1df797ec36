"""Where programs run: in memory always; on each other broker whose adapter is installed and whose URL is in the environment."""

from __future__ import annotations

import inspect
import itertools
import os
from importlib.metadata import entry_points
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from msgbus.contract.adapter import Adapter
from msgbus.testing.stage import Broker

NAMES = ("memory", "redis", "rabbitmq", "kafka")

_numbers = itertools.count()


async def die(adapter: Adapter) -> None:
    """What kill -9 of its process does to an adapter: each has a method that plays it."""
    result: Any = cast(Any, adapter).abandon()
    if inspect.isawaitable(result):
        await result


def broker_called(name: str) -> Broker:
    """The broker of this name; skips, saying why, where it is not to be had."""
    if name == "memory":
        return Broker(f"memory://differential{next(_numbers)}", crash=die)
    variable = f"MSGBUS_TEST_{name.upper()}_URL"
    url = os.environ.get(variable)
    if not url:
        pytest.skip(f"{variable} is not set")
    scheme = urlsplit(url).scheme
    if scheme not in entry_points(group="msgbus.adapters").names:
        pytest.skip(f"no adapter for {scheme}:// is installed")
    return Broker(url, crash=die, patience=3.0)
