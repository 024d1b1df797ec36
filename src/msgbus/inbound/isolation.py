"""Runs a coroutine in a `contextvars` context of its own, inside the task that awaits it: what one message sets, the next never sees.

A task a message would do the same at several times the price; and a handler that never waits runs here without a switch.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import copy_context
from typing import Any, TypeVar

from msgbus.contract.envelope import Envelope
from msgbus.publishing import handling

R = TypeVar("R")


@types.coroutine
def isolated(
    coroutine: Coroutine[Any, Any, R], envelope: Envelope, on_wait: Callable[[], None], on_end: Callable[[], None]
) -> Generator[Any, Any, R]:
    """Awaits the coroutine; cancelling the task that awaits cancels it. In its context, `envelope` is the message being handled.

    `on_wait` is called before it waits for the first time, if it does, and `on_end` when it has then ended, in whatever way.
    """
    context = copy_context()
    context.run(handling.set, envelope)
    run, send = context.run, coroutine.send
    waited = False
    try:
        waits_for = run(send, None)
        waited = True
        on_wait()
        while True:
            try:
                answer = yield waits_for
            except BaseException as error:
                waits_for = run(coroutine.throw, error)
            else:
                waits_for = run(send, answer)
    except StopIteration as stop:
        result: R = stop.value
        return result
    finally:
        if waited:
            on_end()
