"""Runs a coroutine in a `contextvars` context of its own, inside the task that awaits it: what one message sets, the next never sees.

A task a message would do the same at several times the price; and a handler that never waits runs here without a switch.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar

from msgbus.contract.envelope import Envelope
from msgbus.publishing import handling

R = TypeVar("R")


class Isolated(Generic[R]):
    """Awaitable once. Cancelling the task that awaits it cancels the coroutine.

    `on_wait` is called before the coroutine waits for the first time; `waited` says whether it did.
    """

    __slots__ = ("_context", "_coroutine", "_on_wait", "waited")

    def __init__(self, coroutine: Coroutine[Any, Any, R], envelope: Envelope, on_wait: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._on_wait = on_wait
        self._context: Context = copy_context()
        self._context.run(handling.set, envelope)
        self.waited = False

    def __await__(self) -> Generator[Any, Any, R]:
        run, send = self._context.run, self._coroutine.send
        try:
            waits_for = run(send, None)
            self.waited = True
            self._on_wait()
            while True:
                try:
                    answer = yield waits_for
                except BaseException as error:
                    waits_for = run(self._coroutine.throw, error)
                else:
                    waits_for = run(send, answer)
        except StopIteration as stop:
            result: R = stop.value
            return result
