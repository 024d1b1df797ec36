"""The feed: somebody else's service, which has no model. It publishes JSON as bytes, and knows only what orders it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from examples.flights.data import Row

from msgbus import Bus, Topic


def tail_number(departure: bytes) -> str | None:
    """The ordering key: a plane's departures stay in order. A cancelled flight may have no plane yet, and then no key."""
    plane: str | None = json.loads(departure).get("tailnum")
    return plane


departures = Topic("departures", bytes, content_type="application/json", key=tail_number)


async def publish_all(bus: Bus, rows: Iterable[Row], read: Callable[[Row], None]) -> int:
    """Publishes every row, numbered in the order of the input; returns how many the broker has confirmed."""

    def bodies() -> Iterator[bytes]:
        for number, row in enumerate(rows):
            read(row)
            yield json.dumps({**row, "number": number}).encode()

    return await bus.publish_many(departures, bodies())
