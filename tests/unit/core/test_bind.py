"""A handler's signature is read once: through partials, methods, callable objects and decorators; and its model must fit the topic's."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, NewType, Protocol, TypedDict, TypeVar

import pytest
from pydantic import BaseModel, Field

from msgbus import Batch, Bus, Context, SyncContext, Topic
from msgbus.errors import ConfigurationError
from msgbus.inbound.subscription import Subscription, bind, handler_name, place_of, register
from msgbus.testing.stage import eventually


class Order(BaseModel):
    id: str


class Urgent(Order):
    hours: int = 1


class Other(BaseModel):
    id: str


class Reading(TypedDict):
    id: str


class Measure(TypedDict):
    id: str


class HasId(Protocol):
    id: str


AnyOrder = TypeVar("AnyOrder", bound=Order)
Number = NewType("Number", int)


def registered(handler: Callable[..., Any], topic: Topic[Any] | str = "orders", **options: Any) -> Subscription:
    return register(topic, handler, options)


# ---------------------------------------------------------------- every kind of callable


async def plain(order: Order, context: Context) -> None: ...


async def with_more(order: Order, limit: int, context: Context, *rest: int, note: str = "", **others: int) -> None: ...


def sync(order: Order, context: SyncContext) -> None: ...


async def optional(order: Order, context: Context | None = None) -> None: ...


def optional_sync(order: Order, *, context: SyncContext | None = None) -> None: ...


async def optional_wrong(order: Order, context: SyncContext | None = None) -> None: ...


class Service:
    async def method(self, order: Order, context: Context) -> None: ...

    @classmethod
    async def of_class(cls, order: Order, context: Context) -> None: ...

    @staticmethod
    async def static(order: Order, context: Context) -> None: ...

    async def __call__(self, order: Order, context: Context) -> None: ...


class SyncService:
    def __call__(self, order: Order, context: SyncContext) -> None: ...


class Command:
    """A class whose construction is the handling."""

    def __init__(self, order: Order, context: SyncContext) -> None: ...


def traced(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> None:
        await function(*args, **kwargs)

    return wrapper


@traced
async def decorated(order: Order, context: Context) -> None: ...


@pytest.mark.parametrize(
    ("handler", "name", "is_async"),
    [
        (plain, "plain", True),
        (sync, "sync", False),
        (optional, "optional", True),
        (optional_sync, "optional_sync", False),
        (functools.partial(with_more, limit=3), "with_more", True),
        (functools.partial(functools.partial(with_more, note="a"), limit=3), "with_more", True),
        (functools.partial(sync), "sync", False),
        (Service().method, "method", True),
        (Service.of_class, "of_class", True),
        (Service.static, "static", True),
        (Service(), "Service", True),
        (SyncService(), "SyncService", False),
        (functools.partial(Service()), "Service", True),
        (Command, "Command", False),
        (decorated, "decorated", True),
    ],
)
def test_every_kind_of_callable_is_bound(handler: Callable[..., Any], name: str, is_async: bool) -> None:
    """Model, context and whether it is async are found behind partials, methods, objects, classes and decorators; so are name and place."""
    subscription = registered(handler)
    assert subscription.name == name
    assert f".{name}" in subscription.place or f"{name} (" in subscription.place
    signature = bind(subscription, None)
    assert (signature.model, signature.is_async, signature.context) == (Order, is_async, "context")


def test_places_and_names_are_said_of_anything() -> None:
    """An error about a handler without code or name still says something."""
    assert "len" in place_of(len)
    assert handler_name(functools.partial(functools.partial(len))) == "len"
    assert "test_bind.py:" in place_of(plain)
    assert "test_bind.py:" in place_of(decorated)


@pytest.mark.parametrize(
    "handler",
    [optional_wrong, functools.partial(with_more), functools.partial(plain, Order(id="1")), len, dict, print, object(), "plain", 3],
)
def test_what_cannot_be_bound_is_refused_with_its_place(handler: Any) -> None:
    """A parameter left over, a message already given, builtins and what is no function: `ConfigurationError`, never anything else."""
    with pytest.raises(ConfigurationError, match="handler "):
        bind(registered(handler), None)


def test_a_batch_asks_for_lists() -> None:
    """With `batch=` the model is the list's member and the contexts are a list."""

    async def handler(batch: list[Order], contexts: list[Context]) -> None: ...

    signature = bind(registered(handler, batch=Batch()), None)
    assert (signature.model, signature.context) == (Order, "contexts")


# ---------------------------------------------------------------- which annotation takes which model


def annotated(hint: Any) -> Callable[..., Any]:
    async def handler(message: Any) -> None: ...

    handler.__annotations__["message"] = hint
    return handler


@pytest.mark.parametrize(
    ("hint", "model"),
    [
        (Order, Order),
        (Order, Urgent),
        (Any, Order),
        (object, list[Order]),
        (BaseModel, Order),
        (AnyOrder, Order),
        (HasId, Order),
        (Order | Other, Order),
        (Order | Other, Urgent),
        (Order | None, Order),
        (Order | Other, Other | Order),
        (Order | Other | None, Urgent | Other),
        (Order, Annotated[Order, Field(description="x")]),
        (Annotated[Order, Field(description="x")], Order),
        (Order | Other, Annotated[Order | Other, Field(union_mode="left_to_right")]),
        (list[Order], list[Order]),
        (list, list[Order]),
        (list[Any], list[Order]),
        (Mapping[str, int], dict[str, int]),
        (Reading, Reading),
        (Reading, Measure),
        (dict, Reading),
        (Mapping[str, object], Reading),
        (Number, Number),
        (bytes, bytes),
        (int | None, int),
    ],
)
def test_an_annotation_that_takes_the_topics_model_is_accepted(hint: Any, model: Any) -> None:
    """What type checkers accept is not refused at run time: wider classes, unions, protocols, `Annotated`, generics."""
    signature = bind(registered(annotated(hint)), Topic("orders", model))
    assert signature.model == model


@pytest.mark.parametrize(
    ("hint", "model"),
    [
        (Other, Order),
        (Urgent, Order),
        (Order, Order | Other),
        (Urgent | Other, Order),
        (Other | None, Order),
        (Order, Annotated[Other, Field(description="x")]),
        (Annotated[Other, Field(description="x")], Order),
        (list[Order], Order),
        (Order, list[Order]),
        (Reading, Order),
        (Order, Reading),
        (str, bytes),
        (dict, Order),
        (int, int | None),
    ],
)
def test_an_annotation_that_does_not_take_the_topics_model_is_refused(hint: Any, model: Any) -> None:
    """Both are named, and the place."""
    with pytest.raises(ConfigurationError, match=r"handler.*takes .*, but topic 'orders' carries"):
        bind(registered(annotated(hint)), Topic("orders", model))


# ---------------------------------------------------------------- a function that only looks sync


async def test_a_function_that_returns_a_coroutine_is_a_failure_and_never_done() -> None:
    """A wrapper that forgot `async` hands back a coroutine that nobody awaits: its message must not count as handled."""
    ran: list[str] = []

    async def inner(order: Order) -> None:
        ran.append(order.id)

    def forgot_async(order: Order) -> Any:
        return inner(order)

    orders = Topic("orders", Order)
    bus = Bus("memory://", service="shop")
    bus.subscribe(orders, retry=_one_run())(forgot_async)
    async with bus.running():
        await bus.publish(orders, Order(id="1"))
        await eventually(lambda: sum(bus.runners[0].counts.values()), what="the message to end")
        letters = [letter async for letter in bus.dead_letters(orders, group="shop").list()]
    assert ran == []
    assert [letter.body for letter in letters] == [b'{"id":"1"}']
    assert "async def" in letters[0].error


def _one_run() -> Any:
    from msgbus import Retry

    return Retry.none()
