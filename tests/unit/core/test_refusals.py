"""What no type checker sees is refused at run time: when it is registered, when the bus is entered, or at the call.

Every case states where, with which error, and what the message must say: the place, and the way out.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

import pytest
from pydantic import BaseModel

from msgbus import Batch, BatchFailed, Bus, Context, Middleware, Retry, RetryLater, Router, SyncContext, Topic
from msgbus.contract.adapter import Capability, Limits
from msgbus.errors import (
    BusNotEntered,
    ConfigurationError,
    EncodeError,
    InvalidHeader,
    InvalidName,
    MessageTooLarge,
    NotFound,
    PublishManyError,
    UnknownAdapter,
    UnsupportedFeature,
)
from msgbus.settings import Settings
from msgbus_memory import MemoryAdapter

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForCheckers


class Order(BaseModel):
    id: str
    amount: int = 1


class Other(BaseModel):
    name: str


class Unrelated(TypedDict):
    name: str


orders = Topic("orders", Order)
keyed = Topic("keyed", Order, key="id")
others = Topic("others", Other)
levels = Topic("levels", Order, priorities=True)


# ---------------------------------------------------------------- handlers of every wrong kind


async def good(order: Order) -> None: ...


async def good_batch(orders: list[Order]) -> None: ...


async def gives_other(order: Order) -> Other:
    return Other(name=order.id)


async def no_parameters() -> None: ...


async def only_keywords(*, order: Order) -> None: ...


async def no_annotation(order) -> None:  # type: ignore[no-untyped-def]
    ...


async def unresolvable(order: OnlyForCheckers) -> None: ...


async def unresolvable_context(order: Order, context: NoSuchName) -> None:  # type: ignore[name-defined]  # noqa: F821
    ...


async def unknown_parameter(order: Order, database: dict[str, str]) -> None: ...


async def two_contexts(order: Order, context: Context, again: Context) -> None: ...


async def positional_context(order: Order, context: Context, /) -> None: ...


async def sync_context_in_async(order: Order, context: SyncContext) -> None: ...


def context_in_sync(order: Order, context: Context) -> None: ...


def sync(order: Order) -> None: ...


async def async_generator(order: Order) -> AsyncIterator[Order]:
    yield order


def generator(order: Order) -> Iterator[Order]:
    yield order


async def takes_other(other: Other) -> None: ...


async def takes_unrelated(other: Unrelated) -> None: ...


async def not_a_batch(order: Order) -> None: ...


async def batch_with_one_context(orders: list[Order], context: Context) -> None: ...


async def no_model(thing: asyncio.Lock) -> None: ...


# ---------------------------------------------------------------- refused when registered


@dataclass
class Wrong:
    topic: Topic[Any] | str
    handler: Callable[..., Any]
    options: dict[str, Any]
    says: tuple[str, ...]
    error: type[Exception] = ConfigurationError


REGISTERED: dict[str, Wrong] = {
    "a handler without parameters, plain name": Wrong("orders", no_parameters, {}, ("takes the message as its first parameter",)),
    "a handler without parameters, Topic": Wrong(orders, no_parameters, {}, ("takes the message as its first parameter",)),
    "keyword-only message": Wrong("orders", only_keywords, {}, ("takes the message as its first parameter",)),
    "timeout on a sync handler": Wrong(orders, sync, {"timeout": timedelta(seconds=1)}, ("timeout on a sync handler", "make it async")),
    "an async generator": Wrong(orders, async_generator, {}, ("generator", "returns or raises")),
    "a generator": Wrong(orders, generator, {}, ("generator", "returns or raises")),
    "group beside broadcast": Wrong(orders, good, {"group": "g", "broadcast": True}, ("group=", "broadcast=True")),
    "publish_to beside batch": Wrong(orders, good_batch, {"batch": Batch(), "publish_to": others}, ("publish_to", "context.publish")),
    "an unknown option": Wrong(orders, good, {"concurency": 3}, ("concurency", "known: ", "concurrency")),
    "two unknown options": Wrong(orders, good, {"retries": 3, "acks": 1}, ("acks, retries",)),
    "concurrency 0": Wrong(orders, good, {"concurrency": 0}, ("concurrency", "at least 1")),
    "window below concurrency": Wrong(orders, good, {"window": 3, "concurrency": 4}, ("window (3)", "at least concurrency (4)")),
    "window 0": Wrong(orders, good, {"window": 0}, ("window (0)",)),
    "timeout 0": Wrong(orders, good, {"timeout": timedelta(0)}, ("timeout must be positive",)),
    "a group with a dot": Wrong(orders, good, {"group": "a.b"}, ("'a.b'", "no dots"), InvalidName),
    "an empty group": Wrong(orders, good, {"group": ""}, ("group ''", "1 to 60"), InvalidName),
    "a long group": Wrong(orders, good, {"group": "g" * 61}, ("1 to 60",), InvalidName),
    "a reserved group": Wrong(orders, good, {"group": "dead"}, ("'dead'", "uses for its own"), InvalidName),
    "a number as group": Wrong(orders, good, {"group": "42"}, ("'42'",), InvalidName),
    "a name with a dot": Wrong(orders, good, {"name": "a.b"}, ("'a.b'", "no dots"), InvalidName),
    "a pattern": Wrong("orders.*", good, {}, ("'orders.*'", "one subscription a topic"), UnsupportedFeature),
    "a hash pattern": Wrong("orders.#", good, {}, ("'orders.#'",), UnsupportedFeature),
    "a reserved topic": Wrong("orders.dead", good, {}, ("'orders.dead'", "uses for its own"), InvalidName),
    "a broker's topic": Wrong("amq.orders", good, {}, ("amq.",), InvalidName),
    "an unknown on_failure": Wrong(keyed, good, {"on_failure": "stop"}, ("'stop'", "'block' or 'skip'")),
    "an unknown start": Wrong(orders, good, {"start": "now"}, ("'now'", "'earliest' or 'latest'")),
    "retry that is none": Wrong(orders, good, {"retry": 5}, ("retry=", "msgbus.Retry")),
    "timeout as a number": Wrong(orders, good, {"timeout": 30}, ("timeout=30", "timedelta")),
    "concurrency as text": Wrong(orders, good, {"concurrency": "4"}, ("concurrency='4'", "int")),
    "window as a float": Wrong(orders, good, {"window": 3.5}, ("window=3.5", "int")),
    "batch as a number": Wrong(orders, good_batch, {"batch": 100}, ("batch=100", "Batch")),
    "publish_to as a name": Wrong(orders, good, {"publish_to": "others"}, ("publish_to='others'", "Topic")),
    "ordered as text": Wrong(keyed, good, {"ordered": "yes"}, ("ordered='yes'", "bool")),
    "start beside broadcast": Wrong(orders, good, {"broadcast": True, "start": "earliest"}, ("start=", "from now on")),
    "broadcast as text": Wrong(orders, good, {"broadcast": "no"}, ("broadcast='no'", "bool")),
    "idempotency=True": Wrong(orders, good, {"idempotency": True}, ("idempotency=True", "store", "False")),
    **{
        f"{option}=None": Wrong(orders, good, {option: None}, (f"{option}=None", "leave it out"))
        for option in (
            "name",
            "group",
            "retry",
            "concurrency",
            "timeout",
            "window",
            "ordered",
            "idempotency",
            "on_failure",
            "start",
            "broadcast",
        )
    },
}


@pytest.mark.parametrize("name", REGISTERED)
def test_refused_when_registered(name: str) -> None:
    """What can be seen without the bus is refused by the decorator, which names the handler, its file and line, and the way out."""
    wrong = REGISTERED[name]
    router = Router()
    with pytest.raises(wrong.error) as raised:
        router.subscribe(wrong.topic, **wrong.options)(wrong.handler)
    said = str(raised.value)
    place = f"{__name__}.{wrong.handler.__name__} ({inspect.getsourcefile(wrong.handler)}:{wrong.handler.__code__.co_firstlineno})"
    assert place in said
    for part in wrong.says:
        assert part in said
    assert isinstance(raised.value, ConfigurationError)
    assert router.subscriptions == []


@pytest.mark.parametrize("topic", [good, None, 17, Order, b"orders"])
def test_a_topic_that_is_none_is_refused_at_once(topic: Any) -> None:
    """`@bus.subscribe` without a topic would replace the function by a decorator, and nothing would ever be handled."""
    with pytest.raises(ConfigurationError, match=r"subscribe\(topic"):
        Bus().subscribe(topic)


# ---------------------------------------------------------------- refused when the bus is entered


ENTERED: dict[str, Wrong] = {
    "no annotation under a plain name": Wrong("orders", no_annotation, {}, ("'order' has none", "annotation")),
    "an annotation for checkers only": Wrong("orders", unresolvable, {}, ("OnlyForCheckers", "TYPE_CHECKING")),
    "an unresolvable second annotation": Wrong(orders, unresolvable_context, {}, ("NoSuchName",)),
    "an unknown parameter": Wrong(orders, unknown_parameter, {}, ("'database'", "Context")),
    "two contexts": Wrong(orders, two_contexts, {}, ("'context' and 'again'",)),
    "a positional-only context": Wrong(orders, positional_context, {}, ("'context' is positional-only",)),
    "SyncContext in an async handler": Wrong(orders, sync_context_in_async, {}, ("an async handler takes Context, not SyncContext",)),
    "Context in a sync handler": Wrong(orders, context_in_sync, {}, ("a sync handler takes SyncContext, not Context",)),
    "another model than the topic's": Wrong(orders, takes_other, {}, ("takes Other, but topic 'orders' carries Order",)),
    "a TypedDict instead of a class": Wrong(orders, takes_unrelated, {}, ("takes Unrelated", "carries Order")),
    "a batch without a list": Wrong(orders, not_a_batch, {"batch": Batch()}, ("list[Model]", "Order")),
    "a batch's list of another model": Wrong(others, good_batch, {"batch": Batch()}, ("takes Order", "carries Other")),
    "one context for a batch": Wrong(orders, batch_with_one_context, {"batch": Batch()}, ("list[Context]",)),
    "a model that pydantic has no schema for": Wrong("orders", no_model, {}, ("no schema",)),
    "publish_to a model without a schema": Wrong(orders, good, {"publish_to": Topic("locks", asyncio.Lock)}, ("'locks'", "no schema")),
    "ordered without a key": Wrong(orders, good, {"ordered": True}, ("ordered=True", "no key", "give it key=")),
    "on_failure without order": Wrong(orders, good, {"on_failure": "skip"}, ("on_failure='skip'", "not ordered")),
    "on_failure with ordered=False": Wrong(keyed, good, {"on_failure": "skip", "ordered": False}, ("on_failure='skip'",)),
    "window below the default concurrency": Wrong(orders, good, {"window": 3}, ("window (3)", "at least concurrency (16)")),
    "window below a batch": Wrong(orders, good_batch, {"batch": Batch(50), "concurrency": 2, "window": 99}, ("window (99)", "2 × 50")),
    "a group made of too long a name": Wrong(orders, good, {"name": "n" * 58}, ("1 to 60", "give group= instead"), InvalidName),
}


@pytest.mark.parametrize("name", ENTERED)
async def test_refused_when_the_bus_is_entered(name: str) -> None:
    """What needs the bus's topics, settings or broker is refused before anything runs, naming the handler and the way out."""
    wrong = ENTERED[name]
    bus = Bus("memory://", service="shop")
    bus.subscribe(wrong.topic, **wrong.options)(wrong.handler)
    with pytest.raises(wrong.error) as raised:
        async with bus:
            pytest.fail("entered")
    said = str(raised.value)
    assert f"{__name__}.{wrong.handler.__name__} (" in said
    for part in wrong.says:
        assert part in said


async def test_no_service_and_no_group_names_the_line_to_write() -> None:
    """In memory too: a subscription without a group, on a bus without a service, is refused with the line to write."""
    bus = Bus("memory://")
    bus.subscribe(orders)(good)
    with pytest.raises(ConfigurationError, match=r"good .*no group; write Bus\(service=.*MSGBUS_SERVICE.*group="):
        async with bus:
            pytest.fail("entered")


async def test_a_service_that_is_no_group_is_refused() -> None:
    """The service's name is the default group, so what no group can be called is refused."""
    with pytest.raises(InvalidName, match=r"service.*'a\.b'.*no dots"):
        async with Bus("memory://", service="a.b"):
            pytest.fail("entered")


async def test_two_subscriptions_of_one_topic_and_group_are_refused() -> None:
    """They would share the messages; both places are named, and the way out."""
    bus = Bus("memory://", service="shop")
    bus.subscribe(orders)(good)
    bus.subscribe("orders")(sync)
    with pytest.raises(ConfigurationError) as raised:
        async with bus:
            pytest.fail("entered")
    assert "good" in str(raised.value)
    assert "sync" in str(raised.value)
    assert "name= or group=" in str(raised.value)


async def test_one_topic_in_two_groups_is_fine() -> None:
    """`name=` makes another group of the service's name."""
    bus = Bus("memory://", service="shop")
    bus.subscribe(orders)(good)
    bus.subscribe(orders, name="audit")(sync)
    async with bus:
        assert [plan.group for plan in bus.plans] == ["shop", "shop-audit"]


async def test_two_unequal_topics_of_one_name_are_refused() -> None:
    """Where both are subscribed, where one is published to by a handler, and at a later publish: always by name."""
    bus = Bus("memory://", service="shop")
    bus.subscribe(orders)(good)
    bus.subscribe(Topic("orders", Order, version=2), name="again")(sync)
    with pytest.raises(ConfigurationError, match=r"sync .*Topic\('orders'\).*differs"):
        async with bus:
            pytest.fail("entered")
    bus = Bus("memory://", service="shop")
    bus.subscribe(orders, publish_to=Topic("orders", Other))(gives_other)
    with pytest.raises(ConfigurationError, match="differs"):
        async with bus:
            pytest.fail("entered")
    bus = Bus("memory://", service="shop")
    bus.subscribe(orders)(good)
    async with bus:
        await bus.publish(Topic("orders", Order), Order(id="1"))  # equal by value: the same topic
        with pytest.raises(ConfigurationError, match=r"Topic\('orders'\).*differs"):
            await bus.publish(Topic("orders", Other), Other(name="a"))
        with pytest.raises(ConfigurationError, match="differs"):
            await bus.publish_many(Topic("orders", Order, key="id"), [Order(id="1")])
        with pytest.raises(ConfigurationError, match="differs"):
            async with bus.consumer(Topic("orders", Other), group="pull"):
                pytest.fail("entered")


class Poor(MemoryAdapter):
    """A broker that can do next to nothing."""

    name = "poor"

    @property
    def capabilities(self) -> Capability:
        return Capability.NONE


@pytest.mark.parametrize(
    ("topic", "options", "says"),
    [
        (orders, {"broadcast": True}, ("broadcast=True", "group=")),
        (levels, {}, ("priorities=True", "a topic a priority")),
        (keyed, {}, ("ordered handling", "ordered=False")),
        (Topic("kept", Order, retain=timedelta(days=1)), {}, ("retain", "leave retain= out")),
    ],
)
async def test_what_the_broker_cannot_do_is_refused_with_the_alternative(
    topic: Topic[Any], options: dict[str, Any], says: tuple[str, ...]
) -> None:
    """No option is ever ignored: what is neither native nor emulated is `UnsupportedFeature`, with the adapter and another way."""
    bus = Bus(adapter=Poor(), service="shop")
    bus.subscribe(topic, **options)(good)
    with pytest.raises(UnsupportedFeature) as raised:
        async with bus:
            pytest.fail("entered")
    for part in ("poor", *says):
        assert part in str(raised.value)


async def test_a_bus_publishes_on_its_own_event_loop() -> None:
    """Another thread's loop is refused, and told how: what waits for a broker there would never wake."""
    async with Bus("memory://", service="shop") as bus:
        for publish in (lambda: bus.publish(orders, Order(id="1")), lambda: bus.publish_many(orders, [Order(id="1")])):

            async def elsewhere(publish: Callable[[], Coroutine[Any, Any, object]] = publish) -> object:
                return await publish()

            with pytest.raises(ConfigurationError, match=r"another event loop.*run_coroutine_threadsafe"):
                await asyncio.to_thread(asyncio.run, elsewhere())
        loop = asyncio.get_running_loop()
        future = await asyncio.to_thread(asyncio.run_coroutine_threadsafe, bus.publish(orders, Order(id="1")), loop)
        assert (await asyncio.wrap_future(future)).topic == "orders"


class Impatient(MemoryAdapter):
    """A broker that takes a message back after a minute."""

    @property
    def limits(self) -> Limits:
        return replace(super().limits, unsettled=60.0)


async def test_a_handler_may_not_take_longer_than_the_broker_waits() -> None:
    """A timeout as long as the broker's own is refused at start: the message would be run again beside it."""
    for seconds, refused in ((59, False), (60, True)):
        bus = Bus(adapter=Impatient(), service="shop")
        bus.subscribe(orders, timeout=timedelta(seconds=seconds))(good)
        with pytest.raises(UnsupportedFeature, match=r"timeout of 60 s .*after 60 s; instead: a shorter one") if refused else nullcontext():
            async with bus:
                pass


async def test_a_delay_that_the_broker_cannot_keep_is_refused_at_the_call() -> None:
    """A delay on a broker without delays is `UnsupportedFeature` at the call."""
    async with Bus(adapter=Poor(), service="shop") as bus:
        with pytest.raises(UnsupportedFeature, match=r"delay of .*poor.*a shorter delay, or bus\.outbox"):
            await bus.publish(orders, Order(id="1"), delay=timedelta(seconds=1))


# ---------------------------------------------------------------- refused at the call


@dataclass
class WrongCall:
    says: tuple[str, ...]
    error: type[Exception]
    options: dict[str, Any]
    topic: Any = orders
    message: Any = None


CALLS: dict[str, WrongCall] = {
    "delay beside deliver_at": WrongCall(
        ("delay and deliver_at",), ValueError, {"delay": timedelta(1), "deliver_at": datetime.fromisoformat("2030-01-01T00:00:00Z")}
    ),
    "a naive datetime": WrongCall(("no time zone", "tzinfo=UTC"), ValueError, {"deliver_at": datetime(2030, 1, 1)}),  # noqa: DTZ001
    "a negative delay": WrongCall(("must not be negative",), ValueError, {"delay": timedelta(seconds=-1)}),
    "expires_in 0": WrongCall(("expires_in must be positive",), ValueError, {"expires_in": timedelta(0)}),
    "expires_in negative": WrongCall(("expires_in must be positive",), ValueError, {"expires_in": timedelta(-1)}),
    "an unknown priority": WrongCall(("'urgent'", "high, normal, low"), ValueError, {"priority": "urgent"}, levels),
    "priority without priorities": WrongCall(("priority on topic 'orders'", "priorities=True"), UnsupportedFeature, {"priority": "high"}),
    "an unknown option": WrongCall(("dellay", "known: ", "delay"), TypeError, {"dellay": timedelta(1)}),
    "delay as a number": WrongCall(("delay", "timedelta"), TypeError, {"delay": 5}),
    "deliver_at as text": WrongCall(("deliver_at", "datetime"), TypeError, {"deliver_at": "2030-01-01T00:00:00Z"}),
    "expires_in as a number": WrongCall(("expires_in", "timedelta"), TypeError, {"expires_in": 5}),
    "headers as a list": WrongCall(("headers", "mapping"), InvalidHeader, {"headers": [("a", "b")]}),
    "an empty key": WrongCall(("key ''", "1 to 255"), InvalidName, {"key": ""}),
    "an empty id": WrongCall(("id ''", "1 to 255"), InvalidName, {"id": ""}),
    "a number as id": WrongCall(("id: expected text, not int",), InvalidName, {"id": 17}),
    "a number as key": WrongCall(("key: expected text, not int",), InvalidName, {"key": 17}),
    "another model": WrongCall(("'orders'", "expected Order, not Other"), EncodeError, {}, message=Other(name="a")),
    "a dict for a model": WrongCall(("expected Order, not dict",), EncodeError, {}, message={"id": "1"}),
    "text for bytes": WrongCall(("expected bytes, not str",), EncodeError, {}, Topic("raw", bytes), "text"),
    "bytes under a plain name": WrongCall(("bytes under a plain name", 'Topic("plain", bytes)'), EncodeError, {}, "plain", b"x"),
    "too large": WrongCall(("'orders'", "at most", "memory"), MessageTooLarge, {}, message=Order(id="x" * 2_000_000)),
    "a key with no text": WrongCall(("key", "float"), EncodeError, {}, Topic("k", Order, key=lambda order: 0.5), Order(id="1")),  # type: ignore[arg-type,return-value]
    "a key that is no field": WrongCall(("no field 'nope'",), EncodeError, {}, Topic("k2", Order, key="nope"), Order(id="1")),
    "a topic's name with a pattern": WrongCall(("'orders.*'",), InvalidName, {}, "orders.*", {}),
    "a reserved topic's name": WrongCall(("'orders.dead'",), InvalidName, {}, "orders.dead", {}),
}


@pytest.mark.parametrize("many", [False, True], ids=["publish", "publish_many"])
@pytest.mark.parametrize("name", CALLS)
async def test_refused_at_the_call(name: str, many: bool) -> None:
    """Refused before any I/O, by name; and the next call, which is right, is not held up."""
    wrong = CALLS[name]
    naming = {"id", "key", "idempotency_key"} & wrong.options.keys()
    message = Order(id="1") if wrong.message is None else wrong.message
    async with Bus("memory://?max_body=1000000", service="shop") as bus:
        if many:
            with pytest.raises((PublishManyError, ConfigurationError, ValueError, TypeError)) as raised:
                await bus.publish_many(wrong.topic, [message], **wrong.options)
            refused = raised.value.__cause__ if raised.value.__cause__ is not None else raised.value
        else:
            with pytest.raises(wrong.error) as raised:
                await bus.publish(wrong.topic, message, **wrong.options)
            refused = raised.value
        assert isinstance(refused, TypeError if many and naming else wrong.error)
        for part in ("names one message",) if many and naming else wrong.says:
            assert part in str(refused)
        await bus.publish("fine", {"still": "works"})


# ---------------------------------------------------------------- topics, policies and buses


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Topic("a", Order, version=0), "version counts from 1"),
        (lambda: Topic("a", Order, key="id", shards=0), "shards must be 1 to 1024"),
        (lambda: Topic("a", Order, key="id", shards=1025), "shards must be 1 to 1024"),
        (lambda: Topic("a", Order, shards=4), "give it a key="),
        (lambda: Topic("a", Order, key="id", priorities=True), "two topics"),
        (lambda: Topic("a", bytes, key="id"), "a function of the bytes"),
        (lambda: Topic("a", Order, retain=timedelta(0)), "retain must be positive"),
        (lambda: Topic("a", None), "is no model"),
        (lambda: Topic("a", "Order"), "give the class itself"),
        (lambda: Topic("a", Order, version="2"), "version='2': takes an int"),  # type: ignore[call-overload]
        (lambda: Topic("a", Order, key="id", shards="8"), "shards='8': takes an int"),  # type: ignore[call-overload]
        (lambda: Topic("a", Order, retain=60), "retain=60: takes a timedelta"),  # type: ignore[call-overload]
        (lambda: Topic("a", Order, key=5), "key=5: takes the name of a field, or a function"),  # type: ignore[call-overload]
        (lambda: Topic("a", Order, native="kafka"), "native='kafka': takes a mapping"),  # type: ignore[call-overload]
        (lambda: Topic("a", Order, native={"rabbit": {}}), "native['rabbit']: no broker is called so; did you mean 'rabbitmq'"),
        (lambda: Topic("a", Order, native={"RabbitMQ": {}}), "did you mean 'rabbitmq'"),
        (lambda: Topic("a", Order, native={"amqps": {}}), "did you mean 'rabbitmq'"),
        (lambda: Topic("a", Order, native={"kafka": 5}), "native['kafka']=5: takes a mapping"),  # type: ignore[dict-item]
        (lambda: Topic("a", bytes, content_type=5), "content_type=5: takes text"),  # type: ignore[call-overload]
        (lambda: Topic("a", bytes, content_type="png"), "'png': type/subtype"),
        (lambda: Topic("a", bytes, content_type="image/png\nx: y"), "type/subtype"),
        (lambda: Topic("a", bytes, content_type="x/" + "y" * 300), "at most 255"),
        (lambda: Retry(max_age=60), "max_age=60: takes a timedelta"),  # type: ignore[arg-type]
        (lambda: Batch(size="5"), "size='5': takes an int"),  # type: ignore[arg-type]
        (lambda: Batch(wait=3), "wait=3: takes a timedelta"),  # type: ignore[arg-type]
        (lambda: Bus(retry=3), "retry=3: takes msgbus.Retry"),  # type: ignore[arg-type]
        (lambda: Bus(store="redis://"), "store='redis://': takes a store"),  # type: ignore[arg-type]
        (lambda: Bus(middleware=Middleware()), "takes a list of msgbus.Middleware"),  # type: ignore[arg-type]
        (lambda: Bus(middleware=[Middleware]), "takes instances of msgbus.Middleware"),  # type: ignore[list-item]
        (lambda: Bus(routers=Router()), "takes a list of msgbus.Router"),  # type: ignore[arg-type]
        (lambda: Bus(routers=["orders"]), "takes instances of msgbus.Router"),  # type: ignore[list-item]
        (lambda: Bus(lifespan=5), "lifespan=5: takes a function"),  # type: ignore[arg-type]
        (lambda: Bus("memory://").publisher("orders"), "topic='orders': takes a Topic"),  # type: ignore[arg-type]
        (lambda: Bus("memory://").consumer("orders", group="g"), "topic='orders': takes a Topic"),  # type: ignore[arg-type]
        (lambda: Bus("memory://").consumer(orders, group="g", window="3"), "window='3': takes an int"),  # type: ignore[arg-type]
        (lambda: Retry(attempts=0), "at least 1"),
        (lambda: Retry(attempts=True), "attempts=True"),
        (lambda: Retry(attempts="3"), "attempts='3'"),  # type: ignore[arg-type]
        (lambda: Retry(wait=5), "tenacity's waits"),  # type: ignore[arg-type]
        (lambda: Retry(max_age=timedelta(0)), "max_age"),
        (lambda: Retry(give_up_on=ValueError), "give_up_on"),  # type: ignore[arg-type]
        (lambda: Retry(give_up_on=("ValueError",)), "give_up_on"),  # type: ignore[arg-type]
        (lambda: Retry(retry_on=ValueError), "retry_on"),  # type: ignore[arg-type]
        (lambda: Batch(size=0), "at least 1"),
        (lambda: Batch(wait=timedelta(-1)), "must not be negative"),
        (lambda: Bus("memory://", adapter=MemoryAdapter()), "both say which broker"),
        (lambda: Bus("memory://").consumer(orders, group="g", window=0), "at least 1"),
        (lambda: Bus("memory://").consumer(orders, group="g", start="now"), "'earliest' or 'latest'"),  # type: ignore[arg-type]
        (lambda: Bus("memory://").consumer(orders, group="a.b"), "no dots"),
        (lambda: Bus("memory://").dead_letters(orders, group="a.b"), "no dots"),
    ],
)
def test_what_can_never_work_is_refused_when_it_is_made(make: Callable[[], object], says: str) -> None:
    """A `ConfigurationError` where it is written, with the word that is wrong."""
    with pytest.raises(ConfigurationError) as raised:
        make()
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda bus: bus.publish(orders, Order(id="1")),
        lambda bus: bus.publish_many(orders, []),
        lambda bus: bus.publisher(orders).publish(Order(id="1")),
        lambda bus: bus.consumer(orders, group="g").__aenter__(),
        lambda bus: bus.dead_letters(orders, group="g").redrive(),
        lambda bus: bus.dead_letters(orders, group="g").show("1"),
        lambda bus: _plainly(bus.health),
        lambda bus: _plainly(lambda: bus.pause("x")),
        lambda bus: _plainly(lambda: bus.resume("x")),
    ],
)
async def test_a_bus_that_is_not_entered_says_so(use: Callable[[Bus], Awaitable[object]]) -> None:
    """Before it is entered and after it was left: `BusNotEntered`, which says how to enter it."""
    bus = Bus("memory://", service="shop")
    for _ in range(2):
        with pytest.raises(BusNotEntered, match="async with bus"):
            await use(bus)
        async with bus:
            pass


async def _plainly(call: Callable[[], object]) -> object:
    return call()


async def test_entering_twice_and_an_unknown_subscription() -> None:
    """`async with bus` does not nest; `pause` of a name that is none lists those there are."""
    async with Bus("memory://", service="shop") as bus:
        with pytest.raises(ConfigurationError, match="do not nest"):
            await bus.__aenter__()
        with pytest.raises(ConfigurationError, match="do not nest"):
            async with bus.running():
                pytest.fail("entered")
        await bus.publish(orders, Order(id="1"))  # still entered
    bus.subscribe(orders)(good)
    async with bus.running():
        with pytest.raises(NotFound, match=r"'nope'.*good"):
            bus.pause("nope")


async def test_settings_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dict in place of `Settings(...)`; and a mistyped variable, which settings made by hand do not excuse."""
    with pytest.raises(ConfigurationError, match=r"settings=.*takes msgbus\.settings\.Settings"):
        async with Bus("memory://", settings={"shards": 3}):  # type: ignore[arg-type]
            pytest.fail("entered")
    monkeypatch.setenv("MSGBUS_DRIAN_TIMEOUT", "5")
    with pytest.raises(ConfigurationError, match="unknown setting MSGBUS_DRIAN_TIMEOUT"):
        async with Bus("memory://", settings=Settings(shards=3)):
            pytest.fail("entered")


def test_a_handlers_words_say_what_they_take() -> None:
    """A number is no time, a list names no members: the error of the run says so."""
    with pytest.raises(TypeError, match=r"RetryLater\(after=5\): takes a timedelta"):
        RetryLater(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"BatchFailed\(\[1\]\): takes a mapping"):
        BatchFailed([1])  # type: ignore[arg-type]


async def test_a_word_that_cannot_be_said_leaves_the_delivery_as_it_was() -> None:
    """What `receive` and `retry` do not take is refused, and the delivery can still be settled."""
    async with Bus("memory://", service="shop") as bus, bus.consumer(orders, group="g") as consumer:
        await bus.publish(orders, Order(id="1"))
        with pytest.raises(ConfigurationError, match="timeout=5: takes a timedelta"):
            await consumer.receive(timeout=5)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="limit='3': takes an int"):
            await consumer.receive(limit="3")  # type: ignore[arg-type]
        (delivery,) = await consumer.receive(timeout=timedelta(seconds=5))
        with pytest.raises(ValueError, match="must not be negative"):
            await delivery.retry(after=timedelta(seconds=-1))
        with pytest.raises(TypeError, match="takes a timedelta"):
            await delivery.retry(after=5)  # type: ignore[arg-type]
        await delivery.ack()


async def test_a_parameter_without_annotation_is_named() -> None:
    """`no annotation`, and no word of the inspecting library."""

    async def two(order: Order, extra) -> None: ...  # type: ignore[no-untyped-def]

    bus = Bus("memory://", service="shop")
    bus.subscribe(orders)(two)
    with pytest.raises(ConfigurationError, match=r"parameter 'extra' \(no annotation\)"):
        async with bus:
            pytest.fail("entered")


@pytest.mark.parametrize("namespace", ["a b.", "é.", ".", "..", "amq.", "n" * 119 + "."])
async def test_a_namespace_that_no_broker_holds_is_refused(namespace: str) -> None:
    """The namespace is part of every name, so it is checked as one."""
    bus = Bus("memory://", service="shop", settings=Settings(namespace=namespace))
    bus.subscribe(orders)(good)
    with pytest.raises(InvalidName):
        async with bus:
            pytest.fail("entered")


async def test_an_unknown_scheme_and_an_unknown_url_option_are_refused() -> None:
    """When the bus is entered, naming the scheme, or the option and those that are known."""
    with pytest.raises(UnknownAdapter, match="did you mean memory://"):
        async with Bus("memry://"):
            pytest.fail("entered")
    with pytest.raises(UnknownAdapter, match="no scheme"):  # of a variable that is empty, perhaps: no reason to forget everything
        async with Bus(""):
            pytest.fail("entered")
    with pytest.raises(ConfigurationError, match=r"unknown option 'lmit'.*limit"):
        async with Bus("memory://?lmit=3"):
            pytest.fail("entered")


def test_nothing_is_read_or_opened_by_making_a_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Bus()` with a broken environment is fine until it is entered."""
    monkeypatch.setenv("MSGBUS_NO_SUCH_SETTING", "1")
    bus = Bus("nosuch://broker")
    with nullcontext():
        assert isinstance(bus.publisher(orders), object)
