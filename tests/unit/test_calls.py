"""A message's path through the core is short: how many of our own functions are called for it, and through how many classes.

Counted are the `call` events of `sys.setprofile` with a code file under `src/msgbus`, over many messages, divided by their number.
Unlike times, counts are the same on every machine.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from pydantic import BaseModel

import msgbus
from msgbus import Bus, Topic

MESSAGES = 10_000
MOST_IN = 20
MOST_OUT = 12
MOST_CLASSES = 6
HALF = 0.5
"""Calls a message from which a class is on the path: less is once a batch, or once a start."""

SOURCE = str(Path(msgbus.__file__).parent)


class Order(BaseModel):
    id: str
    number: int


class Calls:
    """How often our functions were called while `counting`, by qualified name."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self._known: dict[object, tuple[str, str | None] | None] = {}

    @contextmanager
    def counting(self) -> Generator[None, None, None]:
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in self._known:
            ours = code.co_filename.startswith(SOURCE)
            self._known[code] = (f"{frame.f_globals['__name__']}.{code.co_qualname}", class_of(frame)) if ours else None
        known = self._known[code]
        if known is not None:
            name, owner = known
            self.names[name] += 1
            if owner is not None:
                self.classes[owner] += 1

    def a_message(self) -> float:
        return sum(self.names.values()) / MESSAGES

    def on_the_path(self) -> set[str]:
        return {owner for owner, calls in self.classes.items() if calls >= HALF * MESSAGES}

    def __str__(self) -> str:
        lines = [f"{calls / MESSAGES:8.3f}  {name}" for name, calls in self.names.most_common() if calls >= MESSAGES / 100]
        return "\n".join([f"{self.a_message():.2f} calls a message, classes {sorted(self.on_the_path())}", *lines])


def class_of(frame: FrameType) -> str | None:
    """The class that a method's code was written in; None for a plain function."""
    parts = frame.f_code.co_qualname.split(".<locals>")[0].split(".")
    return f"{frame.f_globals['__name__']}.{parts[0]}" if len(parts) > 1 else None


@pytest.fixture(params=["unkeyed", "keyed"])
def topic(request: pytest.FixtureRequest) -> Topic[Order]:
    return Topic("orders", Order, key="id" if request.param == "keyed" else None)


def order(number: int) -> Order:
    return Order(id=f"{number % 100}", number=number)


async def test_the_way_out(topic: Topic[Order]) -> None:
    """Publishing a message calls at most 12 functions of ours."""
    calls = Calls()
    async with Bus("memory://", service="shop") as bus:
        await bus.publish(topic, order(0))  # makes the topic's writer
        with calls.counting():
            for number in range(MESSAGES):
                await bus.publish(topic, order(number))
    assert calls.a_message() <= MOST_OUT, str(calls)
    assert len(calls.on_the_path()) <= MOST_CLASSES, str(calls)


async def test_the_way_in(topic: Topic[Order]) -> None:
    """Handling a message, from receive to ack, with the default middleware, calls at most 20 functions of ours, of at most 6 classes."""
    calls = Calls()
    bus = Bus("memory://", service="shop")
    left = MESSAGES
    done = asyncio.Event()

    @bus.subscribe(topic)
    async def handle(_: Order) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async with bus:
        await bus.publish_many(topic, map(order, range(MESSAGES)))
    async with asyncio.timeout(50), bus.running():
        assert left == MESSAGES  # nothing is handled before we count
        with calls.counting():
            await done.wait()
    assert calls.a_message() <= MOST_IN, str(calls)
    assert len(calls.on_the_path()) <= MOST_CLASSES, str(calls)
