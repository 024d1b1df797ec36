"""Runtime: what exists while a bus is entered: settings read, an adapter open, pipelines composed. One a time it is entered."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from msgbus.codecs import codec_for
from msgbus.contract.adapter import Adapter, ReceiverSpec, TopicSpec
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import Envelope, check_group, check_topic
from msgbus.contract.idempotency import IdempotencyStore
from msgbus.contract.outbox import TransactionalStore
from msgbus.errors import BrokerUnavailable, ConfigurationError, InvalidName, MessageError, PublishManyError
from msgbus.health import Monitor
from msgbus.inbound.plan import Defaults, Plan, check_topics, known_topics, plan_all
from msgbus.inbound.settle import Settler
from msgbus.inbound.subscription import Subscription
from msgbus.middleware.base import Middleware
from msgbus.outbound.pipeline import Pipeline
from msgbus.outbound.watch import Watch
from msgbus.outbound.writer import Writer, topic_spec
from msgbus.publishing import PublishManyOptions, PublishOptions, Receipt
from msgbus.retry import Retry
from msgbus.settings import Settings
from msgbus.topic import Topic

log = logging.getLogger("msgbus")

T = TypeVar("T")

CHUNK = 256
"""Messages of `publish_many` sent at once; as many again are made ready meanwhile."""


class Runtime:
    """Made by `open_runtime`. Every method is for the event loop that opened it."""

    def __init__(
        self,
        settings: Settings,
        adapter: Adapter,
        *,
        service: str | None,
        subscriptions: Sequence[Subscription],
        published: Sequence[Topic[Any]] = (),
        retry: Retry,
        store: IdempotencyStore | None,
        middleware: Sequence[Middleware],
    ) -> None:
        if settings.namespace:
            check_topic(settings.namespace.rstrip(".") or settings.namespace)
        if service is not None:
            try:
                check_group(service)
            except InvalidName as error:
                raise InvalidName(f"the service's name is the default group: {error}") from None
        self.settings = settings
        self.adapter = adapter
        self.service = service
        self.retry = retry
        self.middleware = tuple(middleware)
        self.namespace = settings.namespace
        self.publish_timeout = settings.publish_timeout.total_seconds()
        self.close_timeout = settings.close_timeout.total_seconds() / 5  # a step: runs, what they leave, receivers, publishes, adapter
        self.topics = known_topics(subscriptions, published)
        self.defaults = Defaults(service=service, namespace=settings.namespace, concurrency=settings.concurrency, retry=retry, store=store)
        self.subscriptions = tuple(subscriptions)
        self.plans: list[Plan] = []
        self._writers: dict[str, Writer[Any]] = {}
        self._declaring = asyncio.Lock()
        self.pipeline = Pipeline(adapter, middleware, self.publish_timeout)
        self.monitor = Monitor(
            adapter,
            min(2.0, settings.heartbeat.total_seconds()),
            lambda: [writer.spec.name for writer in self._writers.values()],
            lambda: [(plan.physical, plan.group) for plan in self.plans if plan.group is not None],
        )
        self.watch = Watch(store) if isinstance(store, TransactionalStore) else None
        self._watching: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------ opening and closing

    async def open(self) -> None:
        """Connects, checks what the program promises against what the broker can do, and declares the topics it names."""
        await self.patiently(self.adapter.open)
        try:
            check_topics(self.topics.values(), self.adapter)
            self.plans = plan_all(self.subscriptions, self.topics, self.defaults, self.adapter)
            await self.declare([topic_spec(topic, self.namespace, self.adapter.name) for topic in self.topics.values()])
        except BaseException:
            await self._close_adapter()
            raise
        self._watching = [asyncio.create_task(self.monitor.run(), name="msgbus monitor")]
        if self.watch is not None:
            self._watching.append(asyncio.create_task(self.watch.run(), name="msgbus outbox watch"))

    async def close(self) -> None:
        """Publishes under way get their outcome; then the adapter is closed. Bounded by `close_timeout`."""
        for task in self._watching:
            task.cancel()
        if self._watching:
            await asyncio.wait(self._watching, timeout=self.close_timeout)
        await self.pipeline.close(self.close_timeout)
        await self._close_adapter()

    async def _close_adapter(self) -> None:
        try:
            async with asyncio.timeout(self.close_timeout):
                await self.adapter.close()
        except TimeoutError:
            log.warning("the connection to the broker did not close within %.3g s; it is left behind", self.close_timeout)

    async def patiently(self, call: Callable[[], Awaitable[T]], *, bounded: bool = True) -> T:
        """Tries until `publish_timeout` while the broker is away, with back-off; everything else is raised at once. `bounded`: what is on
        its way then is cut off; else it may end, for it consists of many calls, and the adapter bounds each."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.publish_timeout
        pause = 0.1
        problem: BrokerUnavailable | None = None  # of the last try that came to its end
        while True:
            try:
                async with asyncio.timeout_at(deadline if bounded else None):
                    return await call()
            except TimeoutError:
                if problem is not None:
                    raise problem from problem.__cause__
                raise BrokerUnavailable(f"the broker did not answer within {self.publish_timeout:g} s") from None
            except BrokerUnavailable as error:
                problem = error
                if loop.time() + pause >= deadline:
                    raise
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 2.0)

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec] = (), *, create: bool | None = None) -> None:
        """Makes topics and groups exist; with `topology=check`, or `create=False`, fails with what is missing instead.

        May take longer than `publish_timeout`: a first group is given what was kept for it, and that may be much.
        """
        if create is None:
            create = self.settings.topology == "create"
        await self.patiently(lambda: self.adapter.declare(topics, receivers, create=create), bounded=False)

    async def declare_subscriptions(self) -> list[Plan]:
        """Declares every topic and group that this process consumes, with their dead letters; the plans as the broker has them."""
        self.plans = [await self.adopt(plan) for plan in self.plans]
        topics, receivers = self.needs(plan.topic for plan in self.plans)
        await self.declare(topics, receivers)
        return self.plans

    def needs(self, topics: Iterable[Topic[Any]]) -> tuple[list[TopicSpec], list[ReceiverSpec]]:
        """What must be at the broker for these topics and for the groups of `plans`, with their dead letters."""
        specs = {topic.name: topic_spec(topic, self.namespace, self.adapter.name) for topic in topics}
        grouped = [(plan, plan.group) for plan in self.plans if plan.group is not None]
        dead = [dead_spec(plan.physical, group) for plan, group in grouped]
        return [*specs.values(), *dead], [plan.receiver for plan, _ in grouped]

    async def adopt(self, plan: Plan) -> Plan:
        """A plain name's order is what the broker's topic has: ordered where it is keyed."""
        if not plan.plain or plan.ordered:
            return plan
        shards = await self.patiently(lambda: self.adapter.shards(plan.physical))
        return plan if shards is None else replace(plan, ordered=True)

    # ------------------------------------------------------------ publishing

    async def publish(self, topic: Topic[Any] | str, message: Any, options: PublishOptions) -> Receipt:
        """As `Publishes.publish`."""
        try:
            writer = self._writers.get(topic if isinstance(topic, str) else topic.name)
        except AttributeError:
            raise _no_topic(topic) from None
        if writer is None or (writer.topic is not topic and not isinstance(topic, str)) or not writer.declared:
            writer = await self.writer(topic)
        envelope = writer.write(message, options)
        await self.pipeline.publish(envelope)
        return Receipt(envelope.id, writer.topic.name, "confirmed")

    async def publish_many(self, topic: Topic[Any] | str, messages: Iterable[Any] | AsyncIterable[Any], options: PublishManyOptions) -> int:
        """As `Publishes.publish_many`: one chunk is on the way while the next is read and written."""
        writer = await self.writer(topic)
        naming = {"id", "key", "idempotency_key"} & options.keys()
        if naming:
            raise TypeError(f"publish_many() has no option {', '.join(sorted(naming))}: it names one message")
        confirmed = 0
        sending: asyncio.Task[list[BaseException | None]] | None = None
        try:
            async for chunk, problem in _chunks(messages, writer, options):
                if sending is not None:
                    confirmed, sending = _count(await sending, confirmed), None
                if chunk:
                    sending = asyncio.create_task(self.pipeline.send_many(chunk), name="msgbus publish_many")
                if problem is not None:
                    if sending is not None:
                        confirmed, sending = _count(await sending, confirmed), None
                    raise PublishManyError(confirmed, 1, confirmed) from problem
            if sending is not None:
                confirmed = _count(await sending, confirmed)
        except asyncio.CancelledError:
            if sending is not None:
                sending.cancel()
            raise
        finally:
            if sending is not None:
                await asyncio.wait([sending])
        return confirmed

    async def writer(self, topic: Topic[Any] | str) -> Writer[Any]:
        """The topic's writer, its topic declared. A plain name means the bus's Topic of that name, else one of any JSON."""
        if not isinstance(topic, str | Topic):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
            raise _no_topic(topic)
        name = topic if isinstance(topic, str) else topic.name
        known = self._writers.get(name)
        if known is None:
            known = self._writers[name] = self._make_writer(topic, name)
        elif not isinstance(topic, str) and known.topic is not topic and known.topic != topic:
            if known.typed:
                raise ConfigurationError(f"another Topic({name!r}) of this bus differs from this one; declare it in one place")
            known = self._writers[name] = self._make_writer(topic, name)
        if not known.declared:
            async with self._declaring:
                if not known.declared:
                    await self._declare_or_forget(known)
        return known

    async def _declare_or_forget(self, writer: Writer[Any]) -> None:
        """A Topic that does not fit what is at the broker must not stand in the way of the right one."""
        name = writer.topic.name
        try:
            await self.declare([writer.spec])
        except ConfigurationError:
            self._writers.pop(name, None)
            if not any(writer.topic in (plan.topic, plan.publish_to) for plan in self.plans):
                self.topics.pop(name, None)
            raise
        writer.declared = True

    def _make_writer(self, topic: Topic[Any] | str, name: str) -> Writer[Any]:
        typed = True
        if isinstance(topic, str):
            found = self.topics.get(name)
            typed = found is not None
            topic = found if found is not None else Topic(name, Any)
        elif self.topics.setdefault(name, topic) != topic:
            raise ConfigurationError(f"another Topic({name!r}) of this bus differs from this one; declare it in one place")
        check_topic(self.namespace + name)
        check_topics([topic], self.adapter)
        return Writer(
            topic,
            codec_of(topic),
            namespace=self.namespace,
            source=self.service or "msgbus",
            adapter_name=self.adapter.name,
            limits=self.adapter.limits,
            capabilities=self.adapter.capabilities,
            typed=typed,
        )

    def settler(self, physical: str, group: str, handler: str) -> Settler:
        """Who carries out what becomes of a group's deliveries."""
        return Settler(self.pipeline, physical, group, handler, self.adapter.limits.delay)


def _no_topic(given: object) -> TypeError:
    return TypeError(f"publish() takes a Topic, or the name of one, first, and then the message; not {given!r}")


def dead_spec(physical: str, group: str) -> TopicSpec:
    """Where a group's dead letters are kept."""
    return TopicSpec(dead_topic(physical, group), kind="dead")


def dead_receiver(physical: str, group: str, window: int) -> ReceiverSpec:
    """Takes a group's dead letters."""
    return ReceiverSpec(dead_topic(physical, group), DEAD_GROUP, window=window)


def codec_of(topic: Topic[Any]) -> Any:  # Any: a codec of the topic's model, which is known at run time only
    """The codec of a topic's model. Raises `ConfigurationError` when pydantic has no schema for it."""
    try:
        return codec_for(topic.model, topic.content_type)
    except TypeError as error:
        raise ConfigurationError(f"Topic({topic.name!r}): {error}") from error


async def _chunks(
    messages: Iterable[Any] | AsyncIterable[Any], writer: Writer[Any], options: PublishManyOptions
) -> AsyncIterator[tuple[list[Envelope], Exception | None]]:
    """Written envelopes, `CHUNK` at a time; with the last one, what ended the reading early."""
    chunk: list[Envelope] = []
    one = cast(PublishOptions, options)  # the same keys, and none of those that name one message
    try:
        if isinstance(messages, AsyncIterable):
            async for message in messages:
                chunk.append(writer.write(message, one))
                if len(chunk) == CHUNK:
                    yield chunk, None
                    chunk = []
        else:
            for message in messages:
                chunk.append(writer.write(message, one))
                if len(chunk) == CHUNK:
                    yield chunk, None
                    chunk = []
    except MessageError as error:  # one message's; whatever else goes wrong is the caller's own and raised as it is
        yield chunk, error
        return
    if chunk:
        yield chunk, None


def _count(outcomes: Sequence[BaseException | None], before: int) -> int:
    """How many are confirmed by now; raises `PublishManyError` when one of them is not."""
    failures = [index for index, outcome in enumerate(outcomes) if outcome is not None]
    if failures:
        raise PublishManyError(before + len(outcomes) - len(failures), len(failures), before + failures[0]) from outcomes[failures[0]]
    return before + len(outcomes)
