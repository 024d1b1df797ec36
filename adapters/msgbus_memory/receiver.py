"""A receiver: the contract's words, each a call of the broker; only `receive` and `forward` ever wait."""

from __future__ import annotations

import time

from msgbus.contract.adapter import Received, Receiver, ReceiverSpec, SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus_memory.broker import Broker
from msgbus_memory.state import Member, Session, Ticket
from msgbus_memory.waiting import Waiter

PATIENCE = 0.9
"""The part of a send's timeout that may pass waiting for room; the rest is for the answer."""


class MemoryReceiver(Receiver):
    """Implements `Receiver` and `Forwarding`. Made by `MemoryAdapter.open_receiver`, on the event loop that uses it.

    Nothing is fetched ahead and no lease runs: what is not handed out waits in the broker, and what is un-settled stays
    so until `close`, or until the event loop is closed, which counts as a crash.
    """

    def __init__(self, broker: Broker, session: Session, spec: ReceiverSpec) -> None:
        self._broker = broker
        self._spec = spec
        self._member: Member = broker.join(session, spec)
        self._waiter = Waiter()
        self.stale_acks = 0

    def __repr__(self) -> str:
        member = self._member
        state = member.gone or ("draining" if member.draining else "open")
        return f"<MemoryReceiver topic={self._spec.topic!r} group={self._spec.group!r} held={len(member.held)} {state}>"

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """What is ready, at once and without suspending; else the first that comes within `timeout`."""
        member, take = self._member, self._broker.take
        taken = take(member, limit)
        if taken or limit <= 0 or timeout <= 0:
            return taken
        deadline = time.monotonic() + timeout
        try:
            while True:
                taken = take(member, limit, self._waiter)
                now = time.monotonic()
                if taken or member.draining or now >= deadline:
                    return taken
                due = self._broker.next_due(member)
                await self._waiter.wait((deadline if due is None else min(deadline, due)) - now)
        finally:
            member.sleeping = None

    def ack(self, received: Received) -> None:
        """Settled before this returns."""
        if not self._broker.settle(self._member, received.token):
            self.stale_acks += 1

    async def release(self, received: Received) -> None:
        """Back at its place in the queue before this returns; never suspends."""
        self._broker.release(self._member, received.token)

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        """Stored and acked under one lock. Suspends only where a topic is full: without room it is `PublishRejected`.

        A delivery that went back is `BrokerUnavailable`, one settled before is `PublishRejected`: nothing is stored.
        """
        member, token = self._member, received.token
        decided, outcome = self._broker.forward(member, token, envelope, last=timeout <= 0)
        if decided:
            return outcome
        deadline = time.monotonic() + timeout * PATIENCE
        waiter = Waiter()
        ticket = Ticket(member.session, waiter)
        try:
            while True:
                left = deadline - time.monotonic()
                decided, outcome = self._broker.forward(member, token, envelope, ticket=ticket, last=left <= 0)
                if decided:
                    return outcome
                await waiter.wait(left)
        finally:
            self._broker.step_out(ticket)

    async def drain(self) -> None:
        """Hands out nothing from now on; a waiting `receive` returns."""
        self._broker.drain(self._member)

    async def close(self) -> None:
        """What is un-settled is back in its queue, in order, before this returns; a waiting `receive` raises."""
        self._broker.leave(self._member)
