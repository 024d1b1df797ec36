"""Publisher[M]: one topic's sending side, for code that publishes one kind of message."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import Generic, TypeVar

from typing_extensions import Unpack

from msgbus.publishing import Publishes, PublishManyOptions, PublishOptions, Receipt
from msgbus.topic import Topic

M_contra = TypeVar("M_contra", contravariant=True)


class Publisher(Generic[M_contra]):
    """From `bus.publisher(topic)`. Usable while the bus is entered; holds nothing of its own."""

    def __init__(self, bus: Publishes, topic: Topic[M_contra]) -> None:
        self._bus = bus
        self._topic = topic

    async def publish(self, message: M_contra, /, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Publishes.publish`, to this topic."""
        return await self._bus.publish(self._topic, message, **options)

    async def publish_many(self, messages: Iterable[M_contra] | AsyncIterable[M_contra], /, **options: Unpack[PublishManyOptions]) -> int:
        """As `Publishes.publish_many`, to this topic."""
        return await self._bus.publish_many(self._topic, messages, **options)

    def __repr__(self) -> str:
        return f"Publisher({self._topic.name!r})"
