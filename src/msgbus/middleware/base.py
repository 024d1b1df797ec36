"""Middleware: code around every delivery and every publish of a bus. Composed once, at start, and only where overridden.

The order around a handler, outside in:

    the bus's `middleware=`, first to last  →  idempotency (where there is a store)  →  decode, call, publish_to

An exception of the handler passes through middleware as the exception that it is; what comes out of the outermost one is given to
the retry policy. A handler's own words (`Reject`, `RetryLater`, `Drop`) are no errors: middleware sees the outcome they mean.
What settles a delivery (dead letters, retries, acks) passes no middleware.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from msgbus.context import Context
from msgbus.contract.envelope import Envelope
from msgbus.contract.outcome import Outcome
from msgbus.errors import PublishRejected

T = TypeVar("T")
R = TypeVar("R")


class Middleware:
    """Override one or both methods. One object serves all deliveries of a bus at once: keep no state a message in `self`."""

    async def consume(self, context: Context, call_next: Callable[[Context], Awaitable[Outcome]], /) -> Outcome:
        """Around one delivery. Call `call_next(context)` once, or not at all and return an outcome of your own."""
        return await call_next(context)

    async def publish(self, envelope: Envelope, call_next: Callable[[Envelope], Awaitable[None]], /) -> None:
        """Around one publish, also each of `publish_many`. Returns after the confirm; an exception is the publisher's.

        Hand on another envelope (`dataclasses.replace`) to change what is sent. To refuse one, raise: returning without having called
        `call_next` is `PublishRejected` at the publisher, since nothing was sent.
        """
        await call_next(envelope)


def compose(middleware: Sequence[Middleware], method: str, innermost: Callable[[T], Awaitable[R]]) -> Callable[[T], Awaitable[R]]:
    """The innermost call, wrapped by those that override `method`, the first one outermost."""
    chain = innermost
    for layer in reversed(middleware):
        if getattr(type(layer), method) is not getattr(Middleware, method):
            chain = _wrap(getattr(layer, method), chain)
    return chain


_reached: ContextVar[list[Envelope]] = ContextVar("msgbus_reached")
"""Of one publish through middleware: what the innermost call was given, and did not fail with."""


def compose_publish(
    middleware: Sequence[Middleware], innermost: Callable[[Envelope], Awaitable[None]]
) -> Callable[[Envelope], Awaitable[Envelope]] | None:
    """Publishes through those that override `publish`; returns what reached the innermost call. None: no one does.

    A middleware that forgets `call_next` must not make its publisher believe that anything was published: it is `PublishRejected`.
    """

    async def note(envelope: Envelope) -> None:
        await innermost(envelope)
        _reached.get().append(envelope)

    chain = compose(middleware, "publish", note)
    if chain is note:
        return None

    async def publish(envelope: Envelope) -> Envelope:
        reached: list[Envelope] = []
        token = _reached.set(reached)
        try:
            await chain(envelope)
        finally:
            _reached.reset(token)
        if not reached:
            raise PublishRejected(f"message {envelope.id!r} was not published: a publish middleware returned without call_next")
        return reached[-1]

    return publish


def _wrap(
    around: Callable[[Any, Any], Awaitable[R]],  # Any: a bound consume or publish, whose types compose() joins
    call_next: Callable[[T], Awaitable[R]],
) -> Callable[[T], Awaitable[R]]:
    def call(argument: T) -> Awaitable[R]:
        return around(argument, call_next)

    return call
