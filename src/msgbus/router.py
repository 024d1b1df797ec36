"""Router: registration only. A module's handlers, without importing the bus."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from typing_extensions import TypedDict, Unpack

from msgbus.batch import Batch
from msgbus.contract.idempotency import IdempotencyStore
from msgbus.errors import ConfigurationError
from msgbus.inbound.subscription import Subscription, register
from msgbus.retry import Retry
from msgbus.topic import Topic

M = TypeVar("M")
R = TypeVar("R")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., object])
Coro = Coroutine[Any, Any, R]
Handler = Callable[Concatenate[M, P], R]


class HandlerOptions(TypedDict, total=False):
    """Options of everything that runs a function. A key left out is the bus's default; None is a type error."""

    name: str
    """What health, `pause` and records call it (default: the function's name); given, it is also appended to the group."""
    group: str
    """Workers that share one copy of the topic (default: the service's name)."""
    retry: Retry
    concurrency: int
    """Runs at once in a process (default 16)."""
    timeout: timedelta
    """Of one run of an async handler."""
    idempotency: IdempotencyStore | Literal[False]
    """Another store than the bus's, or none."""


class SubscribeOptions(HandlerOptions, total=False):
    """Options of a subscription."""

    window: int
    """Messages held un-settled in a process (default: twice the concurrency)."""
    ordered: bool
    """Handle the messages of one key in the order published (default: where the topic has a key)."""
    on_failure: Literal["block", "skip"]
    """In an ordered subscription: the key waits while a failed message is retried, or goes on without it."""
    start: Literal["earliest", "latest"]
    """For a group that is declared for the first time: with the topic's history, where it has one, or from now on."""
    broadcast: bool
    """Every running instance gets every message, from now on."""


class Takes(Protocol[M]):
    """Decorates a handler of one model."""

    def __call__(self, handler: Handler[M, P, R], /) -> Handler[M, P, R]: ...


class TakesAndReturns(Protocol[M, R]):
    """Decorates a handler of one model that returns another."""

    @overload
    def __call__(self, handler: Handler[M, P, Coro[R]], /) -> Handler[M, P, Coro[R]]: ...
    @overload
    def __call__(self, handler: Handler[M, P, R], /) -> Handler[M, P, R]: ...


class Returns(Protocol[R]):
    """Decorates a handler that returns a model."""

    @overload
    def __call__(self, handler: Callable[P, Coro[R]], /) -> Callable[P, Coro[R]]: ...
    @overload
    def __call__(self, handler: Callable[P, R], /) -> Callable[P, R]: ...


class Router:
    """Collects subscriptions; a `Bus` is one, and takes others by `routers=`. Nothing runs and nothing is resolved here."""

    def __init__(self) -> None:
        self.subscriptions: list[Subscription] = []

    @overload
    def subscribe(
        self, topic: str, /, *, batch: Batch | None = None, publish_to: None = None, **options: Unpack[SubscribeOptions]
    ) -> Callable[[F], F]: ...
    @overload
    def subscribe(self, topic: str, /, *, publish_to: Topic[R], **options: Unpack[SubscribeOptions]) -> Returns[R]: ...
    @overload
    def subscribe(self, topic: Topic[M], /, *, publish_to: None = None, **options: Unpack[SubscribeOptions]) -> Takes[M]: ...
    @overload
    def subscribe(self, topic: Topic[M], /, *, publish_to: Topic[R], **options: Unpack[SubscribeOptions]) -> TakesAndReturns[M, R]: ...
    @overload
    def subscribe(
        self, topic: Topic[M], /, *, batch: Batch, publish_to: None = None, **options: Unpack[SubscribeOptions]
    ) -> Takes[list[M]]: ...
    def subscribe(self, topic: Any, /, **options: Any) -> Any:  # Any: the overloads are the interface
        """Registers the decorated function as the handler of a topic; the function is returned exactly as it was.

        The handler takes the message first and, by annotation, a `Context` (`SyncContext` in a sync handler). What it raises is a
        failure, retried by `retry`; returning means done. Raises `ConfigurationError`, naming the place, for what can never work.
        """
        if not isinstance(topic, str) and not _is_topic(topic):  # also `@bus.subscribe` without brackets, which would handle nothing
            raise ConfigurationError(f"subscribe(topic, ...): the topic is a Topic or its name, not {topic!r}")

        def decorate(handler: F) -> F:
            self.subscriptions.append(register(topic, handler, options))
            return handler

        return decorate


def _is_topic(given: object) -> bool:
    return isinstance(given, Topic)
