"""What the tests of the memory adapter share: short ways to say what they mean, all through the adapter's contract."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from msgbus.contract.adapter import AdapterSettings, Received, Receiver, ReceiverSpec, SendOutcome, TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus_memory import MemoryAdapter
from msgbus_memory.receiver import MemoryReceiver

T = "orders"
_numbers = itertools.count()


def envelope(topic: str = T, **facts: Any) -> Envelope:
    """An envelope with a fresh id; `facts` are its fields."""
    base = Envelope(id=f"id-{next(_numbers)}", topic=topic, body=b"{}", headers={})
    return replace(base, **facts)


def numbered(count: int, **facts: Any) -> list[Envelope]:
    """Envelopes with the bodies b"0", b"1", ..."""
    return [envelope(body=str(number).encode(), **facts) for number in range(count)]


@asynccontextmanager
async def opened(
    *groups: str, topic: TopicSpec | None = None, limit: int = 1000, settings: AdapterSettings | None = None
) -> AsyncIterator[MemoryAdapter]:
    """An open adapter with one topic and these groups."""
    adapter = MemoryAdapter(limit=limit, settings=settings)
    await adapter.open()
    spec = topic or TopicSpec(T)
    await adapter.declare([spec], [ReceiverSpec(spec.name, group) for group in groups])
    try:
        yield adapter
    finally:
        await adapter.close()


async def receiver(adapter: MemoryAdapter, group: str | None, *, topic: str = T, **facts: Any) -> MemoryReceiver:
    """A receiver; `facts` are its spec's fields."""
    made = await adapter.open_receiver(replace(ReceiverSpec(topic, group), **facts))
    assert isinstance(made, MemoryReceiver)
    return made


async def sent(adapter: MemoryAdapter, envelopes: Iterable[Envelope]) -> None:
    """Sends, and every one must be confirmed."""
    listed = list(envelopes)
    assert await adapter.send(listed, timeout=5) == [None] * len(listed)


async def outcome(adapter: MemoryAdapter, one: Envelope, timeout: float = 0) -> SendOutcome:
    """What became of one."""
    (result,) = await adapter.send([one], timeout=timeout)
    return result


async def ready(source: Receiver, limit: int = 1000) -> list[Received]:
    """What is there without waiting."""
    return await source.receive(limit, 0)


def bodies(received: Sequence[Received | Envelope]) -> list[str]:
    """The bodies, as text."""
    return [(one if isinstance(one, Envelope) else one.envelope).body.decode() for one in received]
