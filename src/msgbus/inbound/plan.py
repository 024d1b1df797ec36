"""Plan: a subscription with every default filled in and every promise checked against the broker, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msgbus.batch import Batch
from msgbus.codecs import codec_for
from msgbus.contract.adapter import Adapter, Capability, ReceiverSpec
from msgbus.contract.envelope import PRIORITIES, check_group, check_topic
from msgbus.contract.idempotency import IdempotencyStore
from msgbus.contract.outbox import TransactionalStore
from msgbus.errors import ConfigurationError, InvalidName, UnsupportedFeature
from msgbus.inbound.subscription import Signature, Subscription, bind
from msgbus.retry import Retry
from msgbus.topic import Topic


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A subscription with every default filled in: what `explain` shows and a route is made of."""

    name: str
    topic: Topic[Any]
    plain: bool
    """Subscribed under a plain name that the bus has no Topic for: shards and key are what the broker has."""
    physical: str
    """The topic's name with the namespace."""
    group: str | None
    """None: broadcast."""
    handler: Callable[..., Any]
    signature: Signature
    place: str
    retry: Retry
    concurrency: int
    window: int
    ordered: bool
    on_failure: Literal["block", "skip"]
    start: Literal["earliest", "latest"]
    timeout: float | None
    batch: Batch | None
    publish_to: Topic[Any] | None
    store: IdempotencyStore | None

    @property
    def receiver(self) -> ReceiverSpec:
        """What an adapter must declare for it."""
        return ReceiverSpec(topic=self.physical, group=self.group, window=self.window, start=self.start, exclusive=self.exclusive)

    @property
    def exclusive(self) -> bool:
        """One active receiver a shard."""
        return self.ordered and self.group is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the bus says for subscriptions that do not."""

    service: str | None
    namespace: str
    concurrency: int
    retry: Retry
    store: IdempotencyStore | None


def known_topics(subscriptions: Iterable[Subscription], others: Iterable[Topic[Any]] = ()) -> dict[str, Topic[Any]]:
    """The bus's Topics by name. Two unequal ones of one name are refused."""
    found: dict[str, Topic[Any]] = {}
    mentions: list[tuple[Topic[Any], str]] = [(topic, f"bus.publisher({topic.name!r})") for topic in others]
    for subscription in subscriptions:
        if isinstance(subscription.topic, Topic):
            mentions.append((subscription.topic, subscription.place))
        if subscription.options.publish_to is not None:
            mentions.append((subscription.options.publish_to, subscription.place))
    for topic, place in mentions:
        if found.setdefault(topic.name, topic) != topic:
            raise ConfigurationError(f"{place}: another Topic({topic.name!r}) of this bus differs from this one; declare it in one place")
    return found


def plan_all(subscriptions: Iterable[Subscription], topics: Mapping[str, Topic[Any]], defaults: Defaults, adapter: Adapter) -> list[Plan]:
    """Every subscription, resolved. Raises `ConfigurationError` (or one of its kinds) that names the place and the way out."""
    plans: list[Plan] = []
    taken: dict[tuple[str, str], Plan] = {}
    for subscription in subscriptions:
        plan = _plan(subscription, topics, defaults)
        _check_capabilities(plan, adapter)
        _check_session(plan, defaults.store)
        if plan.group is not None:
            other = taken.setdefault((plan.topic.name, plan.group), plan)
            if other is not plan:
                raise ConfigurationError(
                    f"{plan.place}: topic {plan.topic.name!r} and group {plan.group!r} are also {other.place}'s, so each would get only "
                    f"a part of the messages; give one of them a name= or group= of its own"
                )
        plans.append(plan)
    return plans


def _plan(subscription: Subscription, topics: Mapping[str, Topic[Any]], defaults: Defaults) -> Plan:
    options, place = subscription.options, subscription.place
    known = topics.get(subscription.topic_name)
    signature = bind(subscription, known)
    topic = known if known is not None else Topic(subscription.topic_name, signature.model)
    check_topic(defaults.namespace + topic.name)
    for carried in (topic, options.publish_to or topic):
        try:
            codec_for(carried.model, carried.content_type)
        except TypeError as error:
            raise ConfigurationError(f"{place}: topic {carried.name!r}: {error}") from error
    concurrency = options.concurrency or defaults.concurrency
    size = options.batch.size if options.batch is not None else 1
    levels = len(PRIORITIES) if topic.priorities else 1
    window = options.window or max(levels, 2 * concurrency * size)
    if window < levels:
        raise ConfigurationError(f"{place}: window ({window}) on a topic with priorities: at least {levels}, one a level")
    if window < concurrency * size:
        what = f"concurrency ({concurrency})" if size == 1 else f"concurrency × batch size ({concurrency} × {size})"
        raise ConfigurationError(f"{place}: window ({window}) is what runs and what waits: at least {what}")
    ordered = options.ordered if options.ordered is not None else topic.key is not None
    if ordered and topic.key is None and known is not None:
        raise ConfigurationError(f"{place}: ordered=True, but Topic({topic.name!r}) has no key; give it key=")
    if options.on_failure == "skip" and not ordered and known is not None:
        raise ConfigurationError(f"{place}: on_failure='skip' says what becomes of a key's order, and this subscription is not ordered")
    return Plan(
        name=subscription.name,
        topic=topic,
        plain=known is None,
        physical=defaults.namespace + topic.name,
        group=_group(subscription, defaults.service),
        handler=subscription.handler,
        signature=signature,
        place=place,
        retry=options.retry or defaults.retry,
        concurrency=concurrency,
        window=window,
        ordered=ordered,
        on_failure=options.on_failure,
        start=options.start,
        timeout=None if options.timeout is None else options.timeout.total_seconds(),
        batch=options.batch,
        publish_to=options.publish_to,
        store=_store(subscription, defaults.store),
    )


def _store(subscription: Subscription, default: IdempotencyStore | None) -> IdempotencyStore | None:
    """Asked by identity: a store that holds nothing yet may be falsy."""
    chosen = subscription.options.idempotency
    return default if chosen is None else None if chosen is False else chosen


def _group(subscription: Subscription, service: str | None) -> str | None:
    options = subscription.options
    if options.broadcast:
        return None
    if options.group is not None:
        return options.group
    if service is None:
        raise ConfigurationError(
            f'{subscription.place}: no group; write Bus(service="..."), set MSGBUS_SERVICE, or subscribe(..., group="...")'
        )
    try:
        return check_group(service if options.name is None else f"{service}-{options.name}")
    except InvalidName as error:
        error.args = (f"{subscription.place}: {error.args[0]}; it is made of the service's name: give group= instead",)
        raise


def _check_capabilities(plan: Plan, adapter: Adapter) -> None:
    has = adapter.capabilities
    for needed, capability, feature, alternative in (
        (plan.group is None, Capability.BROADCAST, "broadcast=True", "a group= of its own for each instance"),
        (plan.topic.priorities, Capability.PRIORITIES, "priorities=True", "a topic a priority"),
        (plan.ordered, Capability.SHARDS, "ordered handling", "ordered=False"),
        (plan.on_failure == "skip", Capability.DELAY, "on_failure='skip'", "on_failure='block'"),
    ):
        if needed and capability not in has:
            raise UnsupportedFeature(f"{plan.place}: {feature}", adapter.name, alternative)
    longest = adapter.limits.unsettled
    if plan.timeout is not None and longest is not None and plan.timeout >= longest:
        feature, here = f"a timeout of {plan.timeout:g} s", f"{adapter.name}, which takes a message back after {longest:g} s"
        raise UnsupportedFeature(f"{plan.place}: {feature}", here, "a shorter one, or a longer limit at the broker and in its URL")


def _check_session(plan: Plan, store: IdempotencyStore | None) -> None:
    """A handler that takes a session needs a store that gives one, and a connection for each run at once."""
    if plan.signature.session is None:
        return
    if not isinstance(plan.store, TransactionalStore):
        raise ConfigurationError(
            f"{plan.place}: takes a session, and only a SqlStore gives one: Bus(store=SqlStore(...)), of msgbus.stores.sql"
        )
    if plan.store is not store:
        raise ConfigurationError(f"{plan.place}: takes a session of another store than Bus(store=...), whose outbox alone is relayed")
    if plan.group is None:
        raise ConfigurationError(f"{plan.place}: takes a session, with broadcast=True; the inbox lets one instance alone have the effect")
    problem = plan.store.refuses_handler(plan.concurrency, is_async=plan.signature.is_async)
    if problem is not None:
        raise ConfigurationError(f"{plan.place}: {problem}")


def check_topics(topics: Iterable[Topic[Any]], adapter: Adapter) -> None:
    """Refuses what a topic asks and the broker cannot do."""
    for topic in topics:
        if topic.retain is not None and Capability.RETAIN not in adapter.capabilities:
            raise UnsupportedFeature(f"Topic({topic.name!r}, retain=...)", adapter.name, "Kafka or Redis, or leave retain= out")
        if topic.priorities and Capability.PRIORITIES not in adapter.capabilities:
            raise UnsupportedFeature(f"Topic({topic.name!r}, priorities=True)", adapter.name, "a topic a priority")
