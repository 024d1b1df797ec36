"""Faults between the core and an adapter: the same on every broker, and exactly when a test wants them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from msgbus.contract.adapter import (
    Adapter,
    AdapterSettings,
    Capability,
    Forwarding,
    Limits,
    Received,
    Receiver,
    ReceiverSpec,
    SendOutcome,
    TopicSpec,
)
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable

Fault = Callable[[Envelope], SendOutcome]


class FaultyAdapter(Adapter):
    """An adapter before another one. While `away`, every call is `BrokerUnavailable`. `on_send(envelope)` may give an outcome in place
    of sending; `before_send` is awaited first (to stall). It claims what the real one claims, less `hidden`. Receivers are
    `FaultyReceiver`s; the optional protocols are the real one's."""

    schemes: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = "faulty"

    def __init__(self, real: Adapter) -> None:
        self.real = real
        self.away = False
        self.hidden = Capability.NONE
        self.on_send: Fault | None = None
        self.before_send: Callable[[Sequence[Envelope]], Awaitable[None]] | None = None
        self.sent: list[Envelope] = []
        """What reached the real adapter and was confirmed, by `send` or `forward`."""
        self.receivers: list[FaultyReceiver] = []
        self.make_receiver: type[FaultyReceiver] = FaultyReceiver
        for method in ("depth", "peek", "purge", "replay", "groups", "drop_group"):
            if hasattr(real, method) and not hasattr(type(self), method):  # isinstance asks no __getattr__ from Python 3.12 on
                setattr(self, method, getattr(real, method))

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """Not by URL: it takes the real adapter."""
        raise NotImplementedError("FaultyAdapter(real)")

    def __getattr__(self, name: str) -> Any:  # Any: whatever else the real one has
        return getattr(self.real, name)

    @property
    def capabilities(self) -> Capability:
        return self.real.capabilities & ~self.hidden

    @property
    def limits(self) -> Limits:
        return self.real.limits

    async def open(self) -> None:
        self.check()
        await self.real.open()

    async def close(self) -> None:
        await self.real.close()

    async def ping(self) -> None:
        self.check()
        await self.real.ping()

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        self.check()
        await self.real.declare(topics, receivers, create=create)

    async def shards(self, topic: str) -> int | None:
        self.check()
        return await self.real.shards(topic)

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        if self.before_send is not None:
            await self.before_send(envelopes)
        outcomes: list[SendOutcome] = [self.fault(envelope) for envelope in envelopes]
        good = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if good:
            real = await self.real.send([envelopes[index] for index in good], timeout=timeout)
            for index, outcome in zip(good, real, strict=True):
                outcomes[index] = outcome
                if outcome is None:
                    self.sent.append(envelopes[index])
        return outcomes

    def fault(self, envelope: Envelope) -> SendOutcome:
        """The outcome that a fault gives an envelope; None: it goes to the real adapter."""
        if self.away:
            return BrokerUnavailable("the broker is away (a test)")
        return self.on_send(envelope) if self.on_send is not None else None

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        self.check()
        receiver = self.make_receiver(self, await self.real.open_receiver(spec), spec)
        self.receivers.append(receiver)
        return receiver

    async def explain(self) -> Mapping[str, str]:
        return await self.real.explain()

    def check(self) -> None:
        """Raises while the broker is away."""
        if self.away:
            raise BrokerUnavailable("the broker is away (a test)")


class FaultyReceiver(Receiver):
    """A receiver before another one: passes everything on, sees the faults of its adapter. Override what a test sabotages."""

    def __init__(self, adapter: FaultyAdapter, real: Receiver, spec: ReceiverSpec) -> None:
        self.adapter = adapter
        self.real = real
        self.spec = spec
        self.acked: list[str] = []
        self.released: list[str] = []
        self.received: list[Received] = []

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        self.adapter.check()
        batch = await self.real.receive(limit, timeout)
        self.received += batch
        return batch

    def ack(self, received: Received) -> None:
        self.acked.append(received.envelope.id)
        self.real.ack(received)
        self.stale_acks = self.real.stale_acks

    async def release(self, received: Received) -> None:
        self.adapter.check()
        self.released.append(received.envelope.id)
        await self.real.release(received)

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        """As the real one where it can; else a send, then an ack, as the core would."""
        outcome = self.adapter.fault(envelope)
        if outcome is not None:
            return outcome
        if isinstance(self.real, Forwarding):
            outcome = await self.real.forward(received, envelope, timeout=timeout)
        else:
            outcome = (await self.adapter.real.send([envelope], timeout=timeout))[0]
            if outcome is None:
                self.real.ack(received)
        if outcome is None:
            self.adapter.sent.append(envelope)
        return outcome

    async def drain(self) -> None:
        await self.real.drain()

    async def close(self) -> None:
        await self.real.close()
