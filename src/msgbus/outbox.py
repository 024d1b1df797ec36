"""What `bus.outbox(session)` returns: publishing that is rows of the caller's transaction, sent by a relay once it is committed."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast, overload

from typing_extensions import Unpack

from msgbus.codecs import codec_for
from msgbus.contract.adapter import Adapter, Capability
from msgbus.contract.envelope import Envelope, check_topic
from msgbus.contract.outbox import NewRow, SyncWrites, Writes
from msgbus.errors import ConfigurationError, MessageError, OutboxError, PublishManyError
from msgbus.inbound.plan import check_topics
from msgbus.middleware.base import Middleware, compose_publish
from msgbus.outbound.writer import Writer
from msgbus.publishing import Publishes, PublishManyOptions, PublishOptions, Receipt, SyncPublishes
from msgbus.topic import Topic

M = TypeVar("M")

CHUNK = 500
"""Rows of `publish_many` in one statement."""


class Scribe:
    """Writes the rows of a bus. It needs the broker's adapter for its limits, and no connection. Safe to use from several threads."""

    def __init__(
        self, adapter: Adapter, *, namespace: str, service: str | None, topics: dict[str, Topic[Any]], middleware: Sequence[Middleware]
    ) -> None:
        self._adapter = adapter
        self._namespace = namespace
        self._source = service or "msgbus"
        self._topics = dict(topics)
        self._writers: dict[str, Writer[Any]] = {}
        # A row may wait for any time, whatever the broker can do.
        self._limits = replace(adapter.limits, delay=None)
        self._capabilities = adapter.capabilities | Capability.DELAY
        self._through = compose_publish(middleware, _nothing_more)

    async def row(self, topic: Topic[Any] | str, message: Any, options: PublishOptions) -> NewRow:
        """The row of a message, after publish middleware. Raises as `Publishes.publish` does before any I/O."""
        writer = self.writer(topic)
        envelope = writer.write(message, options)
        return NewRow(envelope if self._through is None else await self._through(envelope), writer.spec)

    def row_now(self, topic: Topic[Any] | str, message: Any, options: PublishOptions) -> NewRow:
        """As `row`, without an event loop: a publish middleware that waits for something is refused."""
        writing = self.row(topic, message, options)
        try:
            writing.send(None)
        except StopIteration as stop:
            return cast(NewRow, stop.value)
        writing.close()
        raise OutboxError("a publish middleware waits for something, and the outbox of a synchronous session cannot: use an AsyncSession")

    def writer(self, topic: Topic[Any] | str) -> Writer[Any]:
        """The topic's writer. A plain name means the bus's Topic of that name, else one of any JSON."""
        if not isinstance(topic, str | Topic):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
            raise TypeError(f"publish() takes a Topic, or the name of one, first, and then the message; not {topic!r}")
        name = topic if isinstance(topic, str) else topic.name
        known = self._writers.get(name)
        if known is not None and (isinstance(topic, str) or known.topic is topic or known.topic == topic):
            return known
        if isinstance(topic, Topic) and self._topics.setdefault(name, topic) != topic:
            raise ConfigurationError(f"another Topic({name!r}) of this bus differs from this one; declare it in one place")
        found = self._topics.get(name)
        meant: Topic[Any] = Topic(name, Any) if found is None else found
        check_topic(self._namespace + name)
        check_topics([meant], self._adapter)
        try:
            codec = codec_for(meant.model, meant.content_type)
        except TypeError as error:
            raise ConfigurationError(f"Topic({name!r}): {error}") from error
        made = Writer(
            meant,
            codec,
            namespace=self._namespace,
            source=self._source,
            adapter_name=self._adapter.name,
            limits=self._limits,
            capabilities=self._capabilities,
            typed=found is not None,
        )
        self._writers[name] = made
        return made


async def _nothing_more(envelope: Envelope) -> None:
    """What comes out of the middleware is written, with others, by who asked for the row."""


class Outbox(Publishes):
    """Publishing to the transaction of an `AsyncSession` or `AsyncConnection`. It neither commits nor flushes; a rollback takes it back.

    Nothing is sent before the commit. Of one key, messages are sent in the order of their rows: that of the commits only where the
    application lets one transaction at a time write for a key.
    """

    __slots__ = ("_scribe", "_writes")

    def __init__(self, scribe: Scribe, writes: Writes) -> None:
        self._scribe = scribe
        self._writes = writes

    @overload
    async def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    async def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    async def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """Inserts one row. The receipt's state is "stored"; an id that is there already is no error, and no second row.

        `delay` and `deliver_at` may be of any length. Raises `OutboxError` without an active transaction or a table, `MessageError`,
        `ValueError`: the transaction is as it was.
        """
        row = await self._scribe.row(topic, message, options)
        await self._writes.insert([row])
        return _receipt(row, topic)

    async def publish_many(
        self, topic: Topic[M], messages: Iterable[M] | AsyncIterable[M], /, **options: Unpack[PublishManyOptions]
    ) -> int:
        """Inserts every message, some hundreds a statement; returns how many. At the first bad message those before it are inserted,
        and it raises `PublishManyError`."""
        one, stored = _of_many(options), 0
        rows: list[NewRow] = []
        try:
            if isinstance(messages, AsyncIterable):
                async for message in messages:
                    rows.append(await self._scribe.row(topic, message, one))
                    if len(rows) == CHUNK:
                        await self._writes.insert(rows)
                        stored, rows = stored + len(rows), []
            else:
                for message in messages:
                    rows.append(await self._scribe.row(topic, message, one))
                    if len(rows) == CHUNK:
                        await self._writes.insert(rows)
                        stored, rows = stored + len(rows), []
        except MessageError as error:
            await self._writes.insert(rows)
            stored += len(rows)
            raise PublishManyError(stored, 1, stored) from error
        await self._writes.insert(rows)
        return stored + len(rows)


class SyncOutbox(SyncPublishes):
    """As `Outbox`, of a `Session` or `Connection`: plain calls, from any thread."""

    __slots__ = ("_scribe", "_writes")

    def __init__(self, scribe: Scribe, writes: SyncWrites) -> None:
        self._scribe = scribe
        self._writes = writes

    @overload
    def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Outbox.publish`."""
        row = self._scribe.row_now(topic, message, options)
        self._writes.insert([row])
        return _receipt(row, topic)

    def publish_many(self, topic: Topic[M], messages: Iterable[M], /, **options: Unpack[PublishManyOptions]) -> int:
        """As `Outbox.publish_many`."""
        one, stored = _of_many(options), 0
        rows: list[NewRow] = []
        try:
            for message in messages:
                rows.append(self._scribe.row_now(topic, message, one))
                if len(rows) == CHUNK:
                    self._writes.insert(rows)
                    stored, rows = stored + len(rows), []
        except MessageError as error:
            self._writes.insert(rows)
            stored += len(rows)
            raise PublishManyError(stored, 1, stored) from error
        self._writes.insert(rows)
        return stored + len(rows)


def _receipt(row: NewRow, topic: Topic[Any] | str) -> Receipt:
    return Receipt(row.envelope.id, topic if isinstance(topic, str) else topic.name, "stored")


def _of_many(options: PublishManyOptions) -> PublishOptions:
    naming = {"id", "key", "idempotency_key"} & options.keys()
    if naming:
        raise TypeError(f"publish_many() has no option {', '.join(sorted(naming))}: it names one message")
    return cast(PublishOptions, options)  # the same keys, and none of those that name one message
