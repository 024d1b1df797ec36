"""Adapters and receivers that break the contract, each in one way, before one that keeps it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msgbus.contract.adapter import Adapter, Capability, Received, Receiver, ReceiverSpec, SendOutcome, Tenure, TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver

# ---------------------------------------------------------------- receivers


class AcksFirst(FaultyReceiver):
    """Acks what it hands out as it hands it out."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        batch = await super().receive(limit, timeout)
        for received in batch:
            self.real.ack(received)
        return batch

    def ack(self, received: Received) -> None: ...

    async def release(self, received: Received) -> None: ...


class LosesOnRelease(FaultyReceiver):
    """What is given back is gone."""

    async def release(self, received: Received) -> None:
        self.real.ack(received)


class ReordersAKey(FaultyReceiver):
    """Hands out the newest first."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        return (await super().receive(limit, timeout))[::-1]


class DropsOnCancel(FaultyReceiver):
    """Has taken them when it is cancelled, and forgets that it has."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        batch = await super().receive(limit, timeout)
        try:
            await asyncio.sleep(0.01)  # long enough to be cancelled in
        except asyncio.CancelledError:
            for received in batch:
                self.real.ack(received)
            raise
        return batch


class CountsNoCrashes(FaultyReceiver):
    """Nobody ever died with it."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        batch = await super().receive(limit, timeout)
        for received in batch:
            received.crashes = 0
        return batch


class HandsOutMore(FaultyReceiver):
    """Hands out what it has, whatever was asked for."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        return await super().receive(limit * 3, timeout)


# ---------------------------------------------------------------- adapters


class ExceedsTheWindow(FaultyAdapter):
    """Its receivers hold three times what they may."""

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        return await super().open_receiver(replace(spec, window=spec.window * 3))


class ReturnsBeforeTheConfirm(FaultyAdapter):
    """Says that it is stored, and stores it a little later, if nothing comes between."""

    def __init__(self, real: Adapter) -> None:
        super().__init__(real)
        self.later: set[asyncio.Task[Any]] = set()

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        async def store() -> None:
            await asyncio.sleep(0.05)  # after its outcome was told
            await self.real.send(envelopes, timeout=timeout)

        task = asyncio.create_task(store())
        self.later.add(task)
        task.add_done_callback(self.later.discard)
        return [None] * len(envelopes)

    async def close(self) -> None:
        for task in list(self.later):
            task.cancel()
        await super().close()


class ForgetsSome(FaultyAdapter):
    """Says that it is stored, and of every third does nothing."""

    count = 0

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        kept: list[Envelope] = []
        for envelope in envelopes:
            self.count += 1
            if self.count % 3:
                kept.append(envelope)
        await super().send(kept, timeout=timeout)
        return [None] * len(envelopes)


class DelaysNothing(FaultyAdapter):
    """Claims DELAY and delivers at once."""

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        return await super().send([replace(envelope, delay=0.0) for envelope in envelopes], timeout=timeout)


class KeepsNoPriority(FaultyAdapter):
    """Claims PRIORITIES and has one queue for all."""

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        return await super().send([replace(envelope, priority="normal") for envelope in envelopes], timeout=timeout)


class SharesItsShards(FaultyAdapter):
    """Claims SHARDS and gives every receiver of all of them."""

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        return await super().open_receiver(replace(spec, exclusive=False))


class RetainsNothing(FaultyAdapter):
    """Claims RETAIN and keeps no history."""

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        await super().declare([replace(spec, retain=None) for spec in topics], receivers, create=create)


class PrivateIsAGroup(FaultyAdapter):
    """Claims BROADCAST; its private receivers are one group."""

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        if spec.group is None:
            spec = replace(spec, group="everyone")
            await self.real.declare([], [spec])
        return await super().open_receiver(spec)


class PrivateHasHistory(FaultyAdapter):
    """Claims BROADCAST; its private receivers begin with what was sent before they were."""

    ever: dict[str, list[Envelope]] = defaultdict(list)  # noqa: RUF012  shared on purpose: it plays the broker's memory

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        for envelope in envelopes:
            self.ever[envelope.topic].append(envelope)
        return await super().send(envelopes, timeout=timeout)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        receiver = await super().open_receiver(spec)
        if spec.group is None:
            assert isinstance(receiver, BeginsWith)
            receiver.first = [Received(envelope, None, Tenure()) for envelope in self.ever[spec.topic]]
        return receiver


class BeginsWith(FaultyReceiver):
    """Hands out some of its own before what is real."""

    first: list[Received] = []  # noqa: RUF012  replaced, never changed

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        if self.first:
            batch, self.first = self.first[:limit], self.first[limit:]
            return batch
        return await super().receive(limit, timeout)

    def ack(self, received: Received) -> None:
        if received.token is not None:
            super().ack(received)


class ClaimsAll(FaultyAdapter):
    """Claims that it is durable and shared, before a broker that is neither."""

    @property
    def capabilities(self) -> Capability:
        return super().capabilities | Capability.DURABLE | Capability.SHARED
