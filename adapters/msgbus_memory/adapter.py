"""The adapter: URL and settings, opening and closing, and the contract's words as calls of a broker in the process."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self
from urllib.parse import urlsplit

from msgbus.contract.adapter import (
    Adapter,
    AdapterSettings,
    Capability,
    Depth,
    Limits,
    Receiver,
    ReceiverSpec,
    SendOutcome,
    TopicSpec,
)
from msgbus.contract.envelope import Envelope
from msgbus.contract.options import Read, boolean, durability, positive, read_options, seconds_or_none
from msgbus.errors import BrokerUnavailable, ConfigurationError, UnsupportedFeature
from msgbus_memory.broker import Broker, named
from msgbus_memory.receiver import PATIENCE, MemoryReceiver
from msgbus_memory.state import Session, Terms, Ticket
from msgbus_memory.waiting import Waiter

LIMIT = 32768
MAX_BODY = 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_DURABLE = "a broker that stores what it confirms: amqp://, kafka:// or redis://"


class MemoryAdapter(Adapter):
    """A broker in the process. Also `HasDepth`, `Peekable`, `Purgeable`, `Replayable`, `HasGroups`,
    `Exportable`; receivers forward.

    Without a name the broker belongs to this object, and is still there when it is opened again; with one it is shared
    by all adapters of the process, on any thread and event loop, and lives as long as the process.
    `limit`: how many messages a topic may hold that the slowest of its groups has not settled. `max_body`: bytes.
    """

    schemes: ClassVar[tuple[str, ...]] = ("memory",)
    name: ClassVar[str] = "memory"

    def __init__(
        self,
        broker_name: str | None = None,
        *,
        limit: int = LIMIT,
        max_body: int = MAX_BODY,
        settings: AdapterSettings | None = None,
    ) -> None:
        self._settings = settings = settings or AdapterSettings()
        self._broker_name = broker_name
        self._broker = Broker() if broker_name is None else named(broker_name)
        self._terms = Terms(limit, max_body, settings.first_group_retention, settings.dead_letter_retention, max(settings.shards, 1))
        self._session: Session | None = None

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """`memory://` or `memory://NAME`. Options: `limit`, `max_body`, and settings that mean something here."""
        parts = urlsplit(url)
        place = parts.netloc
        if place and not _NAME.fullmatch(place):
            raise ConfigurationError(
                "the URL of the memory broker is memory:// or memory://NAME: a name has letters, digits, '.', '_' and "
                "'-', and there is neither user, password nor port"
            )
        shown = f"memory://{place}"
        if parts.scheme != "memory" or parts.path not in ("", "/") or parts.fragment:
            raise ConfigurationError(f"the URL of the memory broker is memory:// or memory://NAME, nothing behind {shown}")
        known: dict[str, Read] = {
            "dead_letter_retention": seconds_or_none,
            "durability": durability,
            "first_group_retention": seconds_or_none,
            "limit": positive,
            "max_body": positive,
            "require_durable": boolean,
            "shards": positive,
        }
        read = read_options(shown, options, known)
        limit, max_body = read.pop("limit", LIMIT), read.pop("max_body", MAX_BODY)
        return cls(place or None, limit=limit, max_body=max_body, settings=replace(settings, **read))

    def __repr__(self) -> str:
        state = "closed" if self._session is None or self._session.closed else "open"
        return f"<MemoryAdapter memory://{self._broker_name or ''} {state}>"

    @property
    def capabilities(self) -> Capability:
        """All but `DURABLE` and `SHARED`: other processes do not see it, and it does not outlive this one."""
        return ~(Capability.DURABLE | Capability.SHARED)

    @property
    def limits(self) -> Limits:
        """Any delay, and any time un-settled; a body of `max_body` bytes."""
        return Limits(body=self._terms.max_body)

    async def open(self) -> None:
        """Begins a session on the running event loop. An open adapter stays as it is.

        One whose event loop was closed under it is first treated as crashed: what it held comes again, counted.
        """
        if self._settings.require_durable:
            raise ConfigurationError(f"require_durable: the memory broker loses its messages with the process; instead: {_DURABLE}")
        if self._settings.durability != "broker":
            raise UnsupportedFeature(f"durability {self._settings.durability!r}", "the memory broker", _DURABLE)
        loop = asyncio.get_running_loop()
        if self._session is not None and not self._session.dead():
            if not self._session.closed:
                return
        elif self._session is not None:
            self._broker.end(self._session, crashed=True)
        self._session = self._broker.begin(self._terms, loop.is_closed)

    async def close(self) -> None:
        """Closes every receiver: what they held goes back, in order, uncounted. Senders get `BrokerUnavailable`."""
        if self._session is not None:
            self._broker.end(self._session, crashed=False)

    def abandon(self) -> None:
        """What the death of the process would do to its broker, for tests: the receivers vanish without a word.

        What they held comes again, with `crashes` one higher; their acks are stale, their `receive` is
        `BrokerUnavailable`, and so is the adapter until it is opened again.
        """
        if self._session is not None:
            self._broker.end(self._session, crashed=True)

    async def ping(self) -> None:
        """`BrokerUnavailable` unless it is open."""
        self._opened()

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """As the contract says. A topic's shards stay open until a spec is keyed or names them: it is spread then."""
        self._opened()
        for spec in topics:
            for option in spec.native:
                raise ConfigurationError(f"topic {spec.name!r}: native option {option!r}: the memory broker knows none")
        self._broker.declare(self._terms, topics, receivers, create)

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """Nothing: what is here, the process itself has made."""
        return ""

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """None: appended. Never `PublishUnknown`. Suspends only where a topic is full.

        What finds no room within nine tenths of `timeout` is `PublishRejected`; what goes to one group, a retry, always
        finds room. Of a cancelled call, what was appended stays.
        """
        session = self._session
        if session is None:
            return [BrokerUnavailable("the memory adapter is not open") for _ in envelopes]
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        index = self._broker.append(session, envelopes, outcomes)
        if index < len(envelopes):
            await self._send_when_room(session, envelopes, outcomes, index, timeout * PATIENCE)
        return outcomes

    async def _send_when_room(
        self, session: Session, envelopes: Sequence[Envelope], outcomes: list[SendOutcome], index: int, patience: float
    ) -> None:
        deadline = time.monotonic() + patience
        waiter = Waiter()
        ticket = Ticket(session, waiter)
        try:
            while True:
                left = deadline - time.monotonic()
                index = self._broker.append(session, envelopes, outcomes, index, ticket=ticket, last=left <= 0)
                if index == len(envelopes):
                    return
                await waiter.wait(left)
        finally:
            self._broker.step_out(ticket)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """`BrokerUnavailable` too where topic or group were not declared, or the group was dropped."""
        return MemoryReceiver(self._broker, self._opened(), spec)

    async def shards(self, topic: str) -> int | None:
        """None where the topic is not keyed, or not there."""
        self._opened()
        return self._broker.shards(topic)

    async def explain(self) -> Mapping[str, str]:
        """What is special about a broker in memory."""
        name = self._broker_name
        shared = "private to this bus" if name is None else f"{name!r}, shared by the buses of this process"
        return {
            "broker": f"in the memory of this process, {shared}",
            "durability": "messages live as long as this process: none outlives it, confirmed or not",
            "limit": f"a topic with {self._terms.limit} messages makes publishers wait, and refuses in the end",
            "body": f"at most {self._terms.max_body} bytes",
        }

    async def depth(self, topic: str, group: str) -> Depth:
        """Exact. `NotFound` where there is no such group."""
        self._opened()
        return self._broker.depth(topic, group)

    async def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """What waited at the first step, oldest first. `NotFound` where there is no such group."""
        self._opened()
        for envelope in self._broker.peek(topic, group):
            yield envelope

    async def purge(self, topic: str, group: str) -> int:
        """Discards what is ready; what is delayed or handed out stays. `NotFound` where there is no such group."""
        self._opened()
        return self._broker.purge(topic, group)

    async def replay(self, topic: str, group: str, since: float) -> int:
        """What waits is counted, not doubled; what is handed out comes again. `NotFound`: there is no such group."""
        self._opened()
        return self._broker.replay(topic, group, since)

    async def groups(self, topic: str) -> Sequence[str]:
        """Sorted, private receivers left out; none where there is no such topic."""
        self._opened()
        return self._broker.groups(topic)

    async def drop_group(self, topic: str, group: str) -> bool:
        """Also frees what only this group held; a group of the same name that is declared again is a later group."""
        self._opened()
        return self._broker.drop_group(topic, group)

    def _opened(self) -> Session:
        if self._session is None or self._session.closed:
            raise BrokerUnavailable("the memory adapter is not open")
        return self._session
