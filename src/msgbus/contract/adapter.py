"""The seam: what msgbus asks of a broker, and all it asks.

The core owns what is portable: retry, dead letters, idempotency, lanes, priorities, batches, back-off, deadlines. An adapter owns six
facts of its broker: connect, declare, send, receive, settle, and what its errors mean.

Who retries: the core, always. An adapter tries once, and says in one of msgbus's errors what became of it. It connects in `open`, and
again, once, whenever a call finds no connection; it never loops.

Who may block: every `async` method, as long as the deadline it is given says, or `close` a few seconds. `ack` never.

Names: an adapter gets logical names (`TopicSpec.name`, `ReceiverSpec.group`), with the namespace already in front, and spells the
broker's own from them. Durations are float seconds, moments are seconds since the epoch.

An adapter is used from one event loop at a time: all calls between `open` and `close` come from the loop that called `open`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from msgbus.contract.envelope import Envelope, Priority
from msgbus.errors import BrokerError, ConfigurationError, MessageError

SendOutcome = MessageError | BrokerError | None
"""None: durably confirmed. `PublishUnknown`: may be stored. Any other error: stored nowhere."""


class Capability(Flag):
    """What the core must branch on in meaning. Each claimed flag has a test in the conformance suite that fails if the claim is false."""

    NONE = 0
    DELAY = auto()
    """Honours `Envelope.delay`, up to `Limits.delay`."""
    PRIORITIES = auto()
    """Keeps the levels of a topic with priorities apart: a receiver gets one level."""
    SHARDS = auto()
    """Keeps a key's order, and gives a shard of a keyed topic to one exclusive receiver at a time."""
    BROADCAST = auto()
    """Opens private receivers (`ReceiverSpec.group` None)."""
    RETAIN = auto()
    """Keeps a topic's history for `TopicSpec.retain` and gives it to a later group that starts at the earliest."""
    CRASH_COUNT = auto()
    """`Received.crashes` counts the deaths of receivers that held a message."""
    DURABLE = auto()
    """A confirmed message outlives the process, and the broker's own restart."""
    SHARED = auto()
    """Several processes can share the broker."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker can hold. Read after `open`."""

    body: int
    """Bytes that a body may have on the wire. The core lets users publish `HEADROOM` less."""
    delay: float | None = None
    """The longest delay in seconds; None: any."""
    unsettled: float | None = None
    """How long, in seconds, a received message may stay un-settled before the broker takes it back; None: any."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What the bus's settings say to an adapter. The same name in the URL's query wins. Seconds."""

    heartbeat: float = 10.0
    session_timeout: float = 15.0
    lease: float = 60.0
    first_group_retention: float = 7 * 86400.0
    dead_letter_retention: float | None = None
    durability: Literal["broker", "fsync", "replicated"] = "broker"
    require_durable: bool = False
    ack_window: int = 1000
    shards: int = 8
    """How many shards a keyed topic gets that does not say and does not exist yet."""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """What an adapter knows of a topic: never the user's model.

    `shards`: how many a keyed topic must have; None: as many as the broker's copy has, else `AdapterSettings.shards` where `keyed`, else 1.
    `keyed` says whether order a key is asked for; a spec that is not keyed adopts what is there.
    `kind` "dead": the destination of one group's dead letters. It has one group, `DEAD_GROUP`, declared with it, keeps what it gets
    until it is settled, one by one in any order, and has room for a body and 64 KiB of headers.
    `native`: what the user's `Topic(native=...)` says for this adapter's name, and nothing else.
    """

    name: str
    keyed: bool = False
    shards: int | None = None
    priorities: bool = False
    retain: float | None = None
    kind: Literal["work", "dead"] = "work"
    native: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class ReceiverSpec:
    """Which messages a receiver takes, and how many at once.

    `group` None: a private receiver: it gets a copy of what is sent from now on, and leaves nothing behind.
    `priority`: the level it takes, on a topic with priorities. `window`: how many it may have handed out and not settled.
    `start`, for a group that is declared for the first time. `exclusive`: one active receiver a shard: ordered work.
    `quarantine`: one message at a time, whatever the window, which stays that of the group's other receivers; and a death must count for
    that one alone.
    """

    topic: str
    group: str | None
    window: int = 32
    priority: Priority = "normal"
    start: Literal["earliest", "latest"] = "earliest"
    exclusive: bool = False
    quarantine: bool = False


class Tenure:
    """Our hold on a channel, partition or shard: one object for all the messages that came by it. The adapter alone writes it; the core
    reads it before each start.

    `draining`: others wait for it; finish what runs, start nothing, release the rest. `lost`: it is no longer ours; settling is moot.
    """

    __slots__ = ("draining", "lost")

    def __init__(self) -> None:
        self.draining = False
        self.lost = False


@dataclass(slots=True, eq=False)
class Received:
    """An envelope handed to us, to be settled. `token` is the adapter's; `native` is the client library's message, for those who need it.

    `crashes`: how many receivers died, by the broker's count, while they held it; 0 where the broker does not count.
    """

    envelope: Envelope
    token: Any  # opaque to the core: only the adapter that made it reads it
    tenure: Tenure
    crashes: int = 0
    native: object = None


@dataclass(frozen=True, slots=True)
class Depth:
    """How much of a group is left. None where the broker cannot say."""

    ready: int | None
    in_flight: int | None
    delayed: int | None
    approximate: bool = False


class Receiver(ABC):
    """One source of messages for one subscription. Its methods are called by one task at a time, except `ack`, `release` and `forward`."""

    @abstractmethod
    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """0 to `limit` messages; none after `timeout` seconds, or as soon as the receiver drains.

        Never hands out more than `window` un-settled ones. Cancelling it loses nothing. Leases, sessions and heartbeats of what is
        handed out stay alive while nobody calls: the subscription is paused, its circuit open, or its window full; the receiver is not
        told which. One of which nothing is handed out may then leave its shards to others, from a second on; the next call brings it
        back. Raises `BrokerUnavailable` when the link is gone: the core closes this receiver and opens another, with back-off; what was
        un-settled comes again.
        """

    @abstractmethod
    def ack(self, received: Received) -> None:
        """The group is done with it. Returns at once and never raises; acks may travel in batches, at most 100 ms later, and at `close`.

        Any order; twice is once. A stale token (the link or the lease was lost) is counted in `stale_acks`. A broker that settles by
        position commits only up to the first un-settled message.
        """

    @abstractmethod
    async def release(self, received: Received) -> None:
        """Give it back now, not counted as an attempt or a crash: a peer, or this receiver, may have it at once. Never a retry loop.

        Twice, or after the link was lost: nothing happens.
        """

    @abstractmethod
    async def drain(self) -> None:
        """Fetch no more and give back what was not handed out; an exclusive receiver gives back only in `close`, after what it handed
        out is settled, so that order holds. What was handed out can still be settled. Twice is once."""

    @abstractmethod
    async def close(self) -> None:
        """Flushes acks; what is un-settled returns to the group as soon as the broker allows: where it has drained, nobody died over that;
        else the process ends by a handler, and it may count as a death. Twice is once; bounded in time; safe on a dead connection."""

    stale_acks: int = 0
    """How many acks came too late: the message was, or will be, delivered again."""


class Adapter(ABC):
    """One broker. Constructed by `from_url` without I/O; reusable after `close`, on another event loop too."""

    schemes: ClassVar[tuple[str, ...]]
    """URL schemes it serves."""
    name: ClassVar[str]
    """The broker's name in messages to people, and the key of `Topic(native=…)`."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """No I/O. `options` is the URL's query; one that it does not know is a `ConfigurationError` that names it. No secret in any
        `repr` or error."""

    @property
    @abstractmethod
    def capabilities(self) -> Capability:
        """What holds here. May depend on the server's version, then final after `open`."""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """What the broker can hold. Final after `open`."""

    @abstractmethod
    async def open(self) -> None:
        """Connects. Raises `BrokerUnavailable`, `AuthenticationFailed` or `ConfigurationError`; does not retry."""

    @abstractmethod
    async def close(self) -> None:
        """Ends every receiver and connection. Idempotent, bounded in time, safe on a dead connection."""

    @abstractmethod
    async def ping(self) -> None:
        """One round trip, or `BrokerUnavailable`."""

    @abstractmethod
    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """Makes topics, and the groups of `receivers`, exist. Afterwards a declared group misses nothing. Idempotent.

        Never alters or deletes: what is there and differs is a `TopologyMismatch`. `create=False` declares nothing, and what is
        missing is a `TopologyMismatch` that names it and found "none". The topic's first group gets what was kept for it.
        """

    @abstractmethod
    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """One outcome an envelope, in order, at most about `timeout` seconds from now: what has no answer by then is `PublishUnknown`.

        Many calls at once. Envelopes of one key in one call, and of calls made one after the other, keep their order. No retry inside:
        what is `BrokerUnavailable` the core sends again, same id. Honours `delay`, and `group`: that group's own retry destination.
        Never raises for an envelope; a cancelled call leaves all of its envelopes unknown.
        """

    @abstractmethod
    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """A receiver of a declared topic and group. Raises `BrokerUnavailable`, also where they are not there; does not retry."""

    async def shards(self, topic: str) -> int | None:
        """How many shards a keyed topic has at the broker; None where it is not keyed, or not there."""
        return None

    async def explain(self) -> Mapping[str, str]:
        """Facts of this broker worth knowing before one trusts it (version, durability, retention): name → sentence."""
        return {}


# ---------------------------------------------------------------- optional: an extra method, not another meaning


@runtime_checkable
class Forwarding(Protocol):
    """A receiver that can send and ack as one atomic step. Otherwise the core sends, waits for the confirm, then acks."""

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        """None: `envelope` is stored and `received` is acked. Any error: as for `send`, and `received` is not acked.

        Where the receiver's link is gone, the tenure of `received` is `lost` too: while copies cannot be stored nobody calls `receive`.
        """
        ...


@runtime_checkable
class HasDepth(Protocol):
    """An adapter that can count what is left of a group."""

    async def depth(self, topic: str, group: str) -> Depth: ...


@runtime_checkable
class Peekable(Protocol):
    """An adapter that can look at what waits in a group without taking it."""

    def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """What waits (ready, not handed out), oldest first. Settles nothing, counts nothing."""
        ...


@runtime_checkable
class Purgeable(Protocol):
    """An adapter that can empty a group. Raises `NotFound` where there is no such topic or group, like the protocols beside it."""

    async def purge(self, topic: str, group: str) -> int:
        """Discards what waits (not what is handed out) for this group alone; how many it was."""
        ...


@runtime_checkable
class Replayable(Protocol):
    """An adapter that can hand a retained topic's history to a group again."""

    async def replay(self, topic: str, group: str, since: float) -> int:
        """Puts everything published since that moment before the group again; how many messages it was, 0 where nothing was kept."""
        ...


@runtime_checkable
class HasGroups(Protocol):
    """An adapter that can list a topic's groups, and drop one."""

    async def groups(self, topic: str) -> Sequence[str]: ...

    async def drop_group(self, topic: str, group: str) -> bool:
        """Forgets a group and all that it held, dead letters aside; its running receivers see `BrokerUnavailable`. False: it was not."""
        ...


@runtime_checkable
class HasWarnings(Protocol):
    """An adapter that knows of things which still work, and at which someone should look."""

    async def warnings(self, groups: Sequence[tuple[str, str]]) -> Sequence[str]:
        """Of these groups (topic, group), or where none are given of the broker itself: each a sentence that names the thing and the way
        out, and stays the same while the thing does. A group that is not there has none. Asked every few seconds of the broker, which must
        cost next to nothing, and twice a minute of each group that the process handles."""
        ...


@runtime_checkable
class Exportable(Protocol):
    """An adapter that can say in its broker's own words what `declare` would make, for operators who make it themselves."""

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """A file for the broker's own tools, to be carried out as often as one likes; "": nothing needs to be made.

        Afterwards `declare` of the same with `create=False` finds all it needs. Changes nothing. Works on a closed adapter too: then the
        broker is taken to be empty, and its limits to be those that it has by default.
        """
        ...


def check_options(url: str, options: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuses the first option of a URL that an adapter does not know, naming it and those it knows."""
    for name in options:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise ConfigurationError(f"unknown option {name!r} in the URL {url}; known: {listed}")
