"""What a bus is, as plain records: what runs, on which topics, which promises hold and who keeps them. Tables and JSON render them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tenacity.wait import (
    wait_base,
    wait_chain,
    wait_combine,
    wait_exponential,
    wait_exponential_jitter,
    wait_fixed,
    wait_incrementing,
    wait_random,
    wait_random_exponential,
)

from msgbus.contract.adapter import (
    Adapter,
    Capability,
    Depth,
    HasDepth,
    HasGroups,
    Peekable,
    Purgeable,
    Replayable,
)
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import HEADROOM
from msgbus.errors import NotFound
from msgbus.inbound.plan import Plan
from msgbus.inbound.subscription import handler_name
from msgbus.retry import Retry
from msgbus.runtime import Runtime
from msgbus.settings import Settings
from msgbus.topic import Topic

KeptBy = Literal["broker", "msgbus", "process", "nobody"]
"""Who keeps a promise: the broker, as its adapter says; msgbus on top of it; msgbus in this process's memory; nobody: it is refused."""


@dataclass(frozen=True, slots=True)
class SubscriptionFacts:
    """One subscription, every default filled in. Durations are seconds."""

    name: str
    topic: str
    group: str | None
    """None: broadcast."""
    handler: str
    place: str
    model: str
    runs_in: Literal["event loop", "threads"]
    order: str | None
    """What the key is; None: not ordered."""
    on_failure: Literal["block", "skip"] | None
    concurrency: int
    window: int
    batch: int | None
    timeout: float | None
    attempts: int
    retry: str
    dead_letters: str | None
    """The topic that keeps them; None: a broadcast has none."""
    idempotency: str | None
    """The store; None: off."""
    publish_to: str | None
    begins: str
    """With which messages the group begins."""


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """One topic of the program, and what the broker has of it."""

    name: str
    physical: str
    model: str
    version: int
    key: str | None
    shards: int | None
    """As the program says; None: as the broker has, else the setting."""
    shards_at_broker: int | None
    priorities: bool
    retain: float | None
    native: Mapping[str, Mapping[str, object]]
    later_groups: str
    """Where a group begins that is not the topic's first one; that gets all that was kept for it."""
    groups: tuple[str, ...] | None
    """At the broker; None: it was not asked, or cannot say."""


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One promise on this broker, and who keeps it."""

    name: str
    kept_by: KeptBy
    says: str


@dataclass(frozen=True, slots=True)
class Description:
    """A bus on its broker."""

    broker: str
    """The URL, without secrets."""
    adapter: str
    service: str | None
    namespace: str
    subscriptions: tuple[SubscriptionFacts, ...]
    topics: tuple[TopicFacts, ...]
    guarantees: tuple[Guarantee, ...]
    broker_facts: Mapping[str, str]
    """What the adapter says of itself."""
    unclaimed: tuple[str, ...]
    """Topics that no group has claimed, and none of this program's will: what is published there is kept for the first one, for a while."""
    warnings: tuple[str, ...]


async def describe(runtime: Runtime, broker: str, *, asked: bool) -> Description:
    """All there is to say of a bus. `asked`: the broker is connected, and asked what it has. Raises `BrokerError`."""
    topics = [await describe_topic(runtime, topic, asked=asked) for topic in topics_of(runtime)]
    facts = dict(await runtime.adapter.explain()) if asked else {}
    promised = [in_the_adapters_words(promise, facts) for promise in guarantees(runtime.adapter, runtime.settings)]
    claimed = {plan.topic.name for plan in runtime.plans if plan.group is not None}
    return Description(
        broker=broker,
        adapter=runtime.adapter.name,
        service=runtime.service,
        namespace=runtime.namespace,
        subscriptions=tuple(describe_subscription(plan) for plan in runtime.plans),
        topics=tuple(topics),
        guarantees=tuple(promised),
        broker_facts=facts,
        unclaimed=tuple(topic.name for topic in topics if topic.groups is not None and not topic.groups and topic.name not in claimed),
        warnings=tuple(warnings(runtime)),
    )


def topics_of(runtime: Runtime) -> list[Topic[Any]]:
    """Every topic that the program subscribes to, or publishes to by `publish_to`, sorted by name."""
    found = {plan.topic.name: plan.topic for plan in runtime.plans} | runtime.topics
    return [found[name] for name in sorted(found)]


async def describe_topic(runtime: Runtime, topic: Topic[Any], *, asked: bool) -> TopicFacts:
    """A topic, with what the broker has of it."""
    physical = runtime.namespace + topic.name
    adapter = runtime.adapter
    return TopicFacts(
        name=topic.name,
        physical=physical,
        model=model_shown(topic.model),
        version=topic.version,
        key=key_shown(topic),
        shards=topic.shards,
        shards_at_broker=await adapter.shards(physical) if asked else None,
        priorities=topic.priorities,
        retain=None if topic.retain is None else topic.retain.total_seconds(),
        native={broker: dict(options) for broker, options in topic.native.items()},
        later_groups="at their declaration" if topic.retain is None else f"with the last {duration(topic.retain.total_seconds())}",
        groups=tuple(await adapter.groups(physical)) if asked and isinstance(adapter, HasGroups) else None,
    )


def describe_subscription(plan: Plan) -> SubscriptionFacts:
    """A plan in words."""
    return SubscriptionFacts(
        name=plan.name,
        topic=plan.topic.name,
        group=plan.group,
        handler=f"{getattr(plan.handler, '__module__', '?')}.{getattr(plan.handler, '__qualname__', handler_name(plan.handler))}",
        place=plan.place,
        model=model_shown(plan.signature.model),
        runs_in="event loop" if plan.signature.is_async else "threads",
        order=(key_shown(plan.topic) or "the publisher's key") if plan.ordered else None,
        on_failure=plan.on_failure if plan.ordered else None,
        concurrency=plan.concurrency,
        window=plan.window,
        batch=None if plan.batch is None else plan.batch.size,
        timeout=plan.timeout,
        attempts=plan.retry.attempts,
        retry=retry_shown(plan.retry),
        dead_letters=None if plan.group is None else dead_topic(plan.physical, plan.group),
        idempotency=None if plan.store is None else type(plan.store).__name__,
        publish_to=None if plan.publish_to is None else plan.publish_to.name,
        begins=_begins(plan),
    )


def _begins(plan: Plan) -> str:
    if plan.group is None:
        return "with what is published while it runs"
    if plan.start == "latest":
        return "with what is published after its declaration"
    if plan.topic.retain is not None:
        return f"with the topic's history of {duration(plan.topic.retain.total_seconds())}"
    return "at its declaration (the topic's first group: before it)"


def guarantees(adapter: Adapter, settings: Settings) -> list[Guarantee]:
    """The promises of the contract on this broker, and who keeps each."""
    has, limits = adapter.capabilities, adapter.limits
    delay = "any delay" if limits.delay is None else f"up to {duration(limits.delay)}; a retry's wait may be longer, a delayed publish not"

    first = duration(settings.first_group_retention.total_seconds())

    def by(capability: Capability, yes: str, no: str, otherwise: KeptBy = "nobody", kept_by: KeptBy = "broker") -> tuple[KeptBy, str]:
        return (kept_by, yes) if capability in has else (otherwise, no)

    found: list[tuple[str, tuple[KeptBy, str]]] = [
        ("at least once", ("broker", "what was confirmed is handled, or becomes a dead letter, in every group")),
        (
            "durable",
            by(
                Capability.DURABLE,
                f"a confirmed message outlives the broker's restart (durability={settings.durability})",
                "a confirmed message does not outlive the broker's process",
            ),
        ),
        (
            "shared",
            by(Capability.SHARED, "processes and hosts share it", "one process: others do not see it", kept_by="broker"),
        ),
        (
            "order of a key",
            by(
                Capability.SHARDS,
                "one process of a group has a shard at a time (broker); a key's messages run one after the other in it (msgbus)",
                "refused: ordered=False only",
                kept_by="msgbus",
            ),
        ),
        ("delay", by(Capability.DELAY, delay, "a delayed publish is refused")),
        (
            "retry",
            by(
                Capability.DELAY,
                "short waits, and those of an ordered key, in the process; longer ones by the broker's delay, free of a slot",
                "every wait in the process, which holds a place in the window",
                otherwise="process",
                kept_by="msgbus",
            ),
        ),
        (
            "dead letters",
            ("msgbus", f"confirmed before the original is settled; kept {dead_letters_kept(settings)}"),
        ),
        (
            "poison",
            by(
                Capability.CRASH_COUNT,
                f"the broker counts processes that died with a message; after {settings.max_deliveries} it is a dead letter",
                "deaths of processes are not counted: a message that kills its process comes again",
            ),
        ),
        (
            "priorities",
            by(
                Capability.PRIORITIES,
                "the broker keeps levels apart; slots are filled by weight, so that none starves (msgbus)",
                "refused: a topic a priority",
                kept_by="msgbus",
            ),
        ),
        (
            "history",
            ("broker", f"a topic's first group gets all that was kept for it, up to {first}; a later one begins at its declaration"),
        ),
        ("broadcast", by(Capability.BROADCAST, "every running instance, from now on", "refused")),
        ("retain", by(Capability.RETAIN, "the history of a topic that says retain=, for later groups", "refused")),
        ("expiry", ("msgbus", "looked at before each run")),
        ("idempotency", ("msgbus", "by the store, where there is one: see each subscription")),
        (
            "un-settled",
            (
                "broker",
                "as long as a handler takes"
                if limits.unsettled is None
                else f"{duration(limits.unsettled)}, then it comes again: a longer wait under on_failure='block' ends as a dead letter",
            ),
        ),
        (
            "message size",
            (
                "broker",
                f"at most {max(limits.body - HEADROOM, 0):,} bytes published ({limits.body:,} with room for a dead letter's record)",
            ),
        ),
    ]
    tools = [
        (isinstance(adapter, HasDepth), "depth"),
        (isinstance(adapter, HasGroups), "groups"),
        (isinstance(adapter, Peekable), "look at dead letters"),
        (isinstance(adapter, Purgeable), "purge"),
        (isinstance(adapter, Replayable), "replay"),
    ]
    can = ", ".join(name for able, name in tools if able)
    cannot = ", ".join(name for able, name in tools if not able)
    found.append(("tools", ("broker", (can or "none") + (f"; not: {cannot}" if cannot else ""))))
    return [Guarantee(name, kept_by, says) for name, (kept_by, says) in found]


def in_the_adapters_words(promise: Guarantee, facts: dict[str, str]) -> Guarantee:
    """Where the adapter has a fact of a promise's name ("native: ...", "emulated: ..."), it is taken out of `facts` and said with it."""
    fact = facts.pop(promise.name, None)
    return promise if fact is None else replace(promise, says=f"{promise.says} ({fact})")


def dead_letters_kept(settings: Settings) -> str:
    """How long dead letters stay."""
    limit = settings.dead_letter_retention
    return "until someone acts" if limit is None else f"for {duration(limit.total_seconds())}"


def warnings(runtime: Runtime) -> list[str]:
    """What someone should know before trusting this."""
    found: list[str] = []
    has = runtime.adapter.capabilities
    if Capability.DURABLE not in has:
        found.append(f"not durable: {runtime.adapter.name} loses what it holds, confirmed or not, when its process ends")
    without = sorted({plan.name for plan in runtime.plans if plan.store is None})
    if without:
        found.append(f"idempotency is off for {', '.join(without)}: a message that comes twice has its effect twice")
    skipping = sorted({plan.name for plan in runtime.plans if plan.ordered and plan.on_failure == "skip"})
    if skipping:
        found.append(f"on_failure='skip' for {', '.join(skipping)}: a message that failed loses its place in its key's order")
    broadcasts = sorted({plan.name for plan in runtime.plans if plan.group is None})
    if broadcasts:
        found.append(f"broadcast {', '.join(broadcasts)}: what is given up is logged and gone, there are no dead letters")
    if not runtime.plans:
        found.append("nothing is subscribed: this bus only publishes")
    return found


@dataclass(frozen=True, slots=True)
class NativeUse:
    """A use of what only one broker has."""

    topic: str
    broker: str
    options: Mapping[str, object]
    in_use: bool
    """Whether that is the broker here; elsewhere the options mean nothing."""


def native_uses(runtime: Runtime) -> list[NativeUse]:
    """Each `Topic(native=...)` of the program."""
    return [
        NativeUse(topic.name, broker, dict(options), broker == runtime.adapter.name)
        for topic in topics_of(runtime)
        for broker, options in sorted(topic.native.items())
    ]


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """A group of a topic. None where the broker cannot say, or the group is not there yet."""

    topic: str
    group: str
    ours: bool
    """One of this program's subscriptions."""
    declared: bool
    """The broker has it."""
    ready: int | None
    in_flight: int | None
    delayed: int | None
    dead: int | None
    approximate: bool


async def groups_of(runtime: Runtime, topic: Topic[Any]) -> list[GroupFacts]:
    """The broker's groups of a topic, where it can list them, and those of this program."""
    adapter = runtime.adapter
    physical = runtime.namespace + topic.name
    ours = {plan.group for plan in runtime.plans if plan.topic.name == topic.name and plan.group is not None}
    there = set(await adapter.groups(physical)) if isinstance(adapter, HasGroups) else None
    found: list[GroupFacts] = []
    for group in sorted(ours | (there or set())):
        depth = await _depth(adapter, physical, group)
        dead = await _depth(adapter, dead_topic(physical, group), DEAD_GROUP)
        found.append(
            GroupFacts(
                topic=topic.name,
                group=group,
                ours=group in ours,
                declared=group in there if there is not None else depth is not None,
                ready=None if depth is None else depth.ready,
                in_flight=None if depth is None else depth.in_flight,
                delayed=None if depth is None else depth.delayed,
                dead=None if dead is None or dead.ready is None else dead.ready + (dead.in_flight or 0),
                approximate=depth is not None and depth.approximate,
            )
        )
    return found


async def _depth(adapter: Adapter, topic: str, group: str) -> Depth | None:
    """None where the broker cannot say, or has no such group. A broker that is away is an error all the same."""
    if not isinstance(adapter, HasDepth):
        return None
    try:
        return await adapter.depth(topic, group)
    except NotFound:
        return None


# ---------------------------------------------------------------- in words


def model_shown(model: Any) -> str:  # Any: a class or a type form
    """A model as its user writes it."""
    if isinstance(model, type) and not getattr(model, "__args__", None):
        return model.__name__
    return str(model).replace("typing.", "")


def key_shown(topic: Topic[Any]) -> str | None:
    """A key's field, or the name of its function."""
    if topic.key is None or isinstance(topic.key, str):
        return topic.key
    return f"{handler_name(topic.key)}()"


def duration(seconds: float) -> str:
    """`90` → `1 min 30 s`: the two largest units that say something."""
    if seconds < 60:
        return f"{seconds:g} s"
    left, parts = round(seconds), list[str]()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def retry_shown(retry: Retry) -> str:
    """A policy in a few words."""
    if retry.attempts == 1:
        return "none"
    words = [f"{retry.attempts} runs, {wait_shown(retry.wait)}"]
    if retry.max_age is not None:
        words.append(f"within {duration(retry.max_age.total_seconds())}")
    if retry.retry_on is not None:
        words.append(f"on {type(retry.retry_on).__name__.removeprefix('retry_if_')}")
    if retry.give_up_on:
        words.append(f"not on {', '.join(error.__name__ for error in retry.give_up_on)}")
    return "; ".join(words)


def wait_shown(wait: wait_base) -> str:
    """One of tenacity's waits in a few words; of another, its class's name."""
    longest = getattr(wait, "max", None)
    upper = f" to {duration(longest)}" if isinstance(longest, int | float) and longest < 1e9 else ""
    if isinstance(wait, wait_fixed):
        return f"{duration(wait.wait_fixed)} apart" if wait.wait_fixed else "at once"
    if isinstance(wait, wait_random):
        return f"{duration(wait.wait_random_min)} to {duration(wait.wait_random_max)} apart"
    if isinstance(wait, wait_random_exponential):
        return f"random exponential{upper}"
    if isinstance(wait, wait_exponential):
        return f"exponential{upper}"
    if isinstance(wait, wait_exponential_jitter):
        return f"exponential with jitter{upper}"
    if isinstance(wait, wait_incrementing):
        return f"{duration(wait.start)}, {duration(wait.increment)} longer each time{upper}"
    if isinstance(wait, wait_combine):
        return " + ".join(wait_shown(one) if isinstance(one, wait_base) else "a function" for one in wait.wait_funcs)
    if isinstance(wait, wait_chain):
        return ", then ".join(_distinct([wait_shown(one) for one in wait.strategies]))
    return type(wait).__name__


def _distinct(texts: Sequence[str]) -> list[str]:
    return [text for number, text in enumerate(texts) if number == 0 or text != texts[number - 1]]
