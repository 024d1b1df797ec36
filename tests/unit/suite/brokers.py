"""Brokers for tests of the suite itself: the memory adapter behind something that a real adapter could get wrong."""

from __future__ import annotations

import itertools
from typing import cast

from msgbus.contract.adapter import Adapter, AdapterSettings, Capability
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import Broker
from msgbus_memory import MemoryAdapter

_numbers = itertools.count()


async def die(adapter: Adapter) -> None:
    """The death of a process with a memory adapter."""
    cast(MemoryAdapter, adapter).abandon()


async def come_back_as_it_was() -> None:
    """The restart of a broker that keeps everything, here by never having ended."""


def behind(
    adapter: type[FaultyAdapter] = FaultyAdapter,
    receiver: type[FaultyReceiver] = FaultyReceiver,
    hidden: Capability = Capability.NONE,
    *,
    patience: float = 1.0,
) -> Broker:
    """A memory broker of its own; each adapter on it is an `adapter` that hands out `receiver`s and claims less `hidden`."""
    name = f"sabotage{next(_numbers)}"

    def make(settings: AdapterSettings) -> Adapter:
        made = adapter(MemoryAdapter(name, settings=settings))
        made.make_receiver = receiver
        made.hidden = hidden
        return made

    return Broker(f"memory://{name}", crash=die, make=make, patience=patience, many=10, restart=come_back_as_it_was)
