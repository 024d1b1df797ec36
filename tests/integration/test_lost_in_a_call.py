"""A link that is lost in the midst of any call of an adapter, at any of its steps: a `BrokerError`, never a wrong answer, and the next try
finds the broker again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast
from uuid import uuid4

import pytest
from tests.brokers import Server
from tests.torture.proxy import Proxy, proxy_before

from msgbus.contract.adapter import Adapter, AdapterSettings, ReceiverSpec, TopicSpec
from msgbus.contract.envelope import Envelope, new_id
from msgbus.errors import BrokerError
from msgbus.testing.stage import eventually
from msgbus.urls import adapter_from_url

pytestmark = pytest.mark.timeout(300)

SETTINGS = AdapterSettings(heartbeat=2.0, session_timeout=6.0, lease=5.0)
CALL = 30.0
"""Seconds within which a call must have an end, whatever happens to its link."""
MOST = 60
"""More words than any call has."""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.broker(name)) for name in ("redis", "rabbitmq", "kafka")])
def name(request: pytest.FixtureRequest) -> str:
    """Of the broker."""
    return str(request.param)


@pytest.fixture
async def proxy(name: str, running: Server) -> AsyncIterator[Proxy]:
    """Before the broker."""
    async with proxy_before(running.port) as proxy:
        yield proxy


@pytest.fixture
def adapter(proxy: Proxy, running: Server) -> Adapter:
    """Behind the proxy; closed."""
    return adapter_from_url(running.url.replace(str(running.port), str(proxy.port)), SETTINGS)


class Calls:
    """The calls of an open adapter, each with what it answers where nothing is lost. `topic` has a group `g`, for which nothing waits."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.operated = cast(Any, adapter)
        """Any: also what only some adapters have."""
        self.topic = TopicSpec(f"lost{uuid4().hex[:10]}", keyed=True, shards=2)
        self.receiver = ReceiverSpec(self.topic.name, "g", exclusive=True)

    async def declare(self, create: bool = True) -> None:
        await self.adapter.declare([self.topic], [self.receiver], create=create)

    async def found_again(self) -> None:
        """All is as it was. Every connection was lost, and each may notice it at a call of its own."""
        async with asyncio.timeout(CALL):
            while True:
                with contextlib.suppress(BrokerError):
                    await self.adapter.open()
                    await self.declare()
                    await self.purge()
                    return

    async def check(self) -> None:
        await self.declare(create=False)

    async def receive(self) -> None:
        receiver = await self.adapter.open_receiver(self.receiver)
        try:
            await receiver.receive(1, 0.1)
        finally:
            await receiver.close()

    async def send(self) -> None:
        (outcome,) = await self.adapter.send([Envelope(new_id(), self.topic.name, b"{}", {}, key="a")], timeout=10)
        if outcome is not None:
            raise outcome

    async def shards(self) -> object:
        return await self.adapter.shards(self.topic.name)

    async def groups(self) -> object:
        return [*await self.operated.groups(self.topic.name)]

    async def depth(self) -> object:
        return (await self.operated.depth(self.topic.name, "g")).ready

    async def purge(self) -> object:
        return await self.operated.purge(self.topic.name, "g")

    async def drop(self) -> object:
        return await self.operated.drop_group(self.topic.name, "g")

    async def ping(self) -> None:
        await self.adapter.ping()

    async def open(self) -> None:
        await self.adapter.close()
        await self.adapter.open()


ANSWERS: dict[Callable[[Calls], Awaitable[object]], object] = {
    Calls.ping: None,
    Calls.declare: None,
    Calls.check: None,
    Calls.shards: 2,
    Calls.groups: ["g"],
    Calls.depth: 0,
    Calls.purge: 0,
    Calls.send: None,
    Calls.receive: None,
    Calls.open: None,
    Calls.drop: True,
}


@pytest.mark.parametrize("call", ANSWERS, ids=lambda call: call.__name__)
async def test_a_call_whose_link_is_lost(call: Callable[[Calls], Awaitable[object]], adapter: Adapter, proxy: Proxy) -> None:
    """However many words of it came through: it is over in time, with a `BrokerError` or the right answer."""
    calls = Calls(adapter)
    failures: list[BrokerError] = []
    await adapter.open()
    try:
        for spared in itertools.count():
            assert spared < MOST
            await calls.found_again()
            proxy.spares = spared
            try:
                async with asyncio.timeout(CALL):
                    assert await call(calls) == ANSWERS[call]
            except BrokerError as error:
                failures.append(error)
            if proxy.spares is not None:  # nothing was lost: it has no more words
                break
        assert failures or spared == 0
    finally:
        proxy.spares = None
        await adapter.close()


async def test_a_close_that_is_cut_off(adapter: Adapter, proxy: Proxy) -> None:
    """A bus does not wait long for the close of a broker that is silent: no connection is left behind all the same."""
    calls = Calls(adapter)
    await adapter.open()
    await calls.found_again()
    receiver = await adapter.open_receiver(calls.receiver)
    await receiver.receive(1, 0.1)
    await calls.send()
    assert proxy.connections
    proxy.hears_nothing = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            await adapter.close()
    await eventually(lambda: not proxy.connections, 10, "the connections to end")
