"""What publishing has in common wherever it is done: the options of a message, the receipt, and the two interfaces for domain code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeVar, overload

from typing_extensions import TypedDict, Unpack

from msgbus.contract.envelope import Envelope
from msgbus.topic import Topic

M = TypeVar("M")


class PublishManyOptions(TypedDict, total=False):
    """Options of publishing that make sense for many messages at once. A key left out is its default."""

    headers: Mapping[str, str]
    """Text by name: at most 64, 8 KiB each, 32 KiB together."""
    delay: timedelta | None
    """Not before this long from now. Not together with `deliver_at`."""
    deliver_at: datetime | None
    """Not before this moment (with a time zone)."""
    expires_in: timedelta | None
    """After this long from now nobody is sent it any more."""
    priority: Literal["high", "normal", "low"]
    """On a topic with priorities."""


class PublishOptions(PublishManyOptions, total=False):
    """Options of publishing one message: also those that name it."""

    id: str | None
    """The message's own id (default: a fresh one). The same id again is the same message: what to say after `PublishUnknown`."""
    key: str | None
    """The ordering key, in place of what the topic's `key=` finds in the message."""
    idempotency_key: str | None
    """Names the one effect intended (default: the id)."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `publish` returns: proof that the message is kept.

    `state`: "confirmed" by the broker; "stored" in the outbox, until the transaction commits and a relay sends it.
    """

    id: str
    topic: str
    state: Literal["confirmed", "stored"]


class Publishes(ABC):
    """Who can publish: the bus, the context of an async handler. What domain code should take as its parameter."""

    __slots__ = ()

    @overload
    async def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    async def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @abstractmethod
    async def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """Publishes one message; returns once it is durably kept.

        Waits up to `publish_timeout` for a broker that is away. Raises `MessageError` (refused before any I/O), `PublishRejected` or
        `BrokerUnavailable` (stored nowhere), `PublishUnknown` (may be stored; so does cancelling), `ValueError` or
        `UnsupportedFeature` for options that contradict each other or that the broker cannot keep.
        """

    @abstractmethod
    async def publish_many(
        self, topic: Topic[M], messages: Iterable[M] | AsyncIterable[M], /, **options: Unpack[PublishManyOptions]
    ) -> int:
        """Publishes every message, pipelined with a bounded window, in order a key; returns how many were confirmed.

        At the first failure it stops reading, waits for what is under way and raises `PublishManyError`.
        """


class SyncPublishes(ABC):
    """Who can publish from a thread: the context of a sync handler. Blocks the thread, not the event loop."""

    __slots__ = ()

    @overload
    def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @abstractmethod
    def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Publishes.publish`, as a plain call."""

    @abstractmethod
    def publish_many(self, topic: Topic[M], messages: Iterable[M], /, **options: Unpack[PublishManyOptions]) -> int:
        """As `Publishes.publish_many`, as a plain call. The iterable is read in the event loop's thread."""


handling: ContextVar[Envelope | None] = ContextVar("msgbus_handling", default=None)
"""The message being handled in this context, if any: where correlation and causation of what is published come from."""
