"""The delivery as its handler sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar, overload

from typing_extensions import Unpack

from msgbus.contract.envelope import (
    CE_CAUSATION,
    CE_CORRELATION,
    CE_IDEMPOTENCY_KEY,
    CE_TIME,
    HIDDEN,
    OWN,
    Envelope,
    parse_utc,
)
from msgbus.errors import BusNotEntered
from msgbus.publishing import Publishes, PublishManyOptions, PublishOptions, Receipt, SyncPublishes, handling
from msgbus.topic import Topic

M = TypeVar("M")
R = TypeVar("R")


class Facts:
    """What a handler can know of its delivery. Read from the envelope when asked."""

    __slots__ = ("_published_at", "_publisher", "attempt", "deadline", "envelope", "group", "session", "topic")

    def __init__(
        self,
        envelope: Envelope,
        publisher: Publishes,
        *,
        topic: str,
        group: str,
        attempt: int,
        deadline: datetime | None = None,
    ) -> None:
        self.envelope = envelope
        """What travelled, untouched: for middleware and for those who need the body."""
        self._publisher = publisher
        self._published_at: datetime | None = None
        self.topic = topic
        """The topic's name, without the namespace."""
        self.group = group
        self.attempt = attempt
        """Which run of the handler for this message this is, from 1."""
        self.deadline = deadline
        """When the handler's `timeout` ends this run; None without one."""

    @property
    def id(self) -> str:
        return self.envelope.id

    @property
    def key(self) -> str | None:
        """The ordering key."""
        return self.envelope.key

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that the publisher gave; msgbus's own are facts of their own."""
        return {name: value for name, value in self.envelope.headers.items() if name not in HIDDEN and not name.startswith(OWN)}

    @property
    def published_at(self) -> datetime:
        """When it was first published, by the publisher's clock; when this process first looked, where the message does not say."""
        if self._published_at is None:
            self._published_at = parse_utc(self.envelope.headers.get(CE_TIME)) or datetime.now(UTC)
        return self._published_at

    @property
    def idempotency_key(self) -> str:
        """Names the one effect intended; the publisher's, else the id."""
        return self.envelope.headers.get(CE_IDEMPOTENCY_KEY) or self.envelope.id

    @property
    def correlation_id(self) -> str:
        """The conversation; the first message's id, handed on by all that follow from it."""
        return self.envelope.headers.get(CE_CORRELATION) or self.envelope.id

    @property
    def causation_id(self) -> str | None:
        """The id of the message whose handling published this one."""
        return self.envelope.headers.get(CE_CAUSATION)

    session: object
    """The session of the handler's transaction: there for a handler that takes one, inside of `within`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(topic={self.topic!r}, group={self.group!r}, id={self.id!r}, attempt={self.attempt})"


class Context(Facts, Publishes):
    """The delivery in an async handler. What it publishes carries on correlation and causation.

    It is sent at once; in a handler that takes a session it is a row of its transaction.
    """

    __slots__ = ()

    @overload
    async def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    async def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    async def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """Sent at once and confirmed, as `Publishes.publish`; again if the handler is run again."""
        previous = handling.set(self.envelope)
        try:
            return await self._publisher.publish(topic, message, **options)
        finally:
            handling.reset(previous)

    async def publish_many(
        self, topic: Topic[M], messages: Iterable[M] | AsyncIterable[M], /, **options: Unpack[PublishManyOptions]
    ) -> int:
        """Sent at once and confirmed, as `Publishes.publish_many`; again if the handler is run again."""
        previous = handling.set(self.envelope)
        try:
            return await self._publisher.publish_many(topic, messages, **options)
        finally:
            handling.reset(previous)

    def within(self, session: object, publisher: Publishes) -> Context:
        """The same delivery inside a transaction: what it publishes there is stored in it."""
        inside = Context(self.envelope, publisher, topic=self.topic, group=self.group, attempt=self.attempt, deadline=self.deadline)
        inside.session = session
        return inside

    def in_thread(self, loop: asyncio.AbstractEventLoop) -> SyncContext:
        """The same delivery for a handler in a thread; `loop` is ours."""
        return SyncContext(self.envelope, self._publisher, loop, topic=self.topic, group=self.group, attempt=self.attempt)


class SyncContext(Facts, SyncPublishes):
    """The delivery in a sync handler, which runs in a thread. Publishing is a plain call that blocks this thread until the confirm."""

    __slots__ = ("_loop",)

    def __init__(
        self,
        envelope: Envelope,
        publisher: Publishes,
        loop: asyncio.AbstractEventLoop,
        *,
        topic: str,
        group: str,
        attempt: int,
    ) -> None:
        super().__init__(envelope, publisher, topic=topic, group=group, attempt=attempt)
        self._loop = loop

    @overload
    def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Context.publish`; call it from the handler's thread."""
        return self._wait(self._publisher.publish(topic, message, **options))

    def publish_many(self, topic: Topic[M], messages: Iterable[M], /, **options: Unpack[PublishManyOptions]) -> int:
        """As `Context.publish_many`; call it from the handler's thread."""
        return self._wait(self._publisher.publish_many(topic, messages, **options))

    def _wait(self, publishing: Coroutine[Any, Any, R]) -> R:
        if self._loop.is_closed():  # a thread that outlasted the drain, and the program around it
            publishing.close()
            raise BusNotEntered("the bus was left while this handler ran on: nothing was sent")
        previous = handling.set(self.envelope)  # of a batch, this member; the loop's task starts with a copy of our context
        try:
            waiting = asyncio.run_coroutine_threadsafe(publishing, self._loop)
        finally:
            handling.reset(previous)
        return waiting.result()
