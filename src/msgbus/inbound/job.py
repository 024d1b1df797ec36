"""Job: a received message on its way through a subscription, until it is settled; and the source that it came from."""

from __future__ import annotations

import asyncio
from collections import deque

from msgbus.contract.adapter import Received, Receiver
from msgbus.contract.envelope import ATTEMPT, Envelope, Priority
from msgbus.contract.outcome import Outcome


class Source:
    """An open receiver of a subscription, one a priority level, and how much of its window is taken."""

    __slots__ = (
        "acked",
        "active",
        "asked",
        "calm",
        "closed",
        "held",
        "level",
        "ready",
        "receiver",
        "room",
        "share",
        "siblings",
        "silent",
        "window",
    )

    def __init__(self, receiver: Receiver, level: Priority, window: int, share: int, ready: deque[Job]) -> None:
        self.receiver = receiver
        self.level: Priority = level
        self.ready = ready
        """Where its jobs wait for a free slot."""
        self.window = window
        """The most it may hold un-settled, when no other level has anything."""
        self.share = share
        """What it may hold while every level has something."""
        self.siblings: tuple[Source, ...] = ()
        """The sources of the other levels, the next one first."""
        self.asked = 0
        """Messages that a receive which is under way may bring."""
        self.active = False
        """Its last receive brought something."""
        self.held = 0
        """Messages handed out by it and not settled."""
        self.room: asyncio.Future[bool] | None = None
        """Set while its pump waits for room."""
        self.acked: deque[tuple[float, str]] = deque(maxlen=max(window, 1))
        """When, by the loop's clock, and which ids were acked last. Such an ack may be lost with the link."""
        self.closed = False
        """Its receiver is closed, or about to be: what it handed out and is not settled comes again, here or elsewhere."""
        self.calm = 0
        """In quarantine: deliveries in a row that were no suspects."""
        self.silent = 0
        """In quarantine: receives that brought nothing, before anything came."""


class Job:
    """What the runner knows of an un-settled message. `received` and `source` are those of the newest copy that came."""

    __slots__ = ("attempt", "envelope", "failed_at", "outcome", "received", "since", "source", "tries", "twins", "waited")

    def __init__(self, received: Received, source: Source, now: float) -> None:
        envelope = received.envelope
        self.received = received
        self.source = source
        self.envelope: Envelope = envelope
        self.since = now
        """When it came, by the loop's clock."""
        self.attempt = 1 if envelope.group is None else runs_before(envelope) + 1
        """Which run of the handler comes next, or is under way, from 1."""
        self.tries = 0
        """Runs in this process that a wait in this process followed."""
        self.waited = 0.0
        """Seconds of those waits together."""
        self.twins: list[tuple[Source, Received]] | None = None
        """Other copies of the same message that came while this one was un-settled: settled with it."""
        self.failed_at: float | None = None
        """When a run in this process failed first, in seconds since the epoch."""
        self.outcome: Outcome | None = None
        """What is decided and could not be carried out yet: the handler is not run again for it."""

    @property
    def lost(self) -> bool:
        """It comes again, here or elsewhere: it must not start, and settling it is moot."""
        return self.received.tenure.lost or self.source.closed


def runs_before(envelope: Envelope) -> int:
    """How often the handler ran for it before, by the bookkeeping of a group's own copy; 0 for what makes no sense."""
    text = envelope.headers.get(ATTEMPT)
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        return 0
    return int(text)
