"""What `declare` makes, noted instead of made: definitions for `rabbitmqctl import_definitions`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

from aiormq.exceptions import ChannelNotFoundEntity

from msgbus.errors import BrokerUnavailable


class Counted(NamedTuple):
    """The answer to a question about a queue."""

    message_count: int = 0


class Notebook:
    """Stands for `Asking`, and for its channel, at a broker that has nothing but what is noted here."""

    def __init__(self, vhost: str) -> None:
        self._vhost = vhost
        self._noted: dict[str, dict[str, dict[str, object]]] = {"exchanges": {}, "queues": {}, "bindings": {}}

    @asynccontextmanager
    async def __call__(self, doing: str) -> AsyncGenerator[Notebook, None]:
        """As `Asking`."""
        yield self

    async def exchange_declare(self, name: str, *, exchange_type: str = "", passive: bool = False, **more: object) -> None:
        """Of a channel."""
        self._note("exchanges", name, passive, {"type": exchange_type, "internal": False, **more})

    async def queue_declare(self, name: str, *, passive: bool = False, exclusive: bool = False, **more: object) -> Counted:
        """Of a channel. An exclusive one is nobody's to make beforehand."""
        if not exclusive:
            self._note("queues", name, passive, more)
        return Counted()

    async def queue_delete(self, name: str) -> None:
        """Of a channel: it goes with its bindings."""
        self._noted["queues"].pop(name, None)
        bindings = self._noted["bindings"]
        self._noted["bindings"] = {text: one for text, one in bindings.items() if one["destination"] != name}

    async def queue_bind(self, queue: str, exchange: str, routing_key: str = "") -> None:
        """Of a channel."""
        self._bind(exchange, "queue", queue, routing_key)

    async def exchange_bind(self, destination: str, source: str, routing_key: str = "") -> None:
        """Of a channel."""
        self._bind(source, "exchange", destination, routing_key)

    async def basic_publish(self, *message: object, **more: object) -> None:
        """Of a channel: messages are no definitions."""

    def text(self) -> str:
        """All that is noted."""
        return json.dumps({kind: [*noted.values()] for kind, noted in self._noted.items()}, indent=1)

    def _note(self, kind: str, name: str, passive: bool, facts: dict[str, object]) -> None:
        if not passive:
            self._noted[kind][name] = {"name": name, "vhost": self._vhost, "auto_delete": False, "arguments": {}, **facts}
        elif name not in self._noted[kind]:
            raise BrokerUnavailable(f"{name!r} is not noted") from ChannelNotFoundEntity()

    def _bind(self, source: str, kind: str, destination: str, routing_key: str) -> None:
        self._noted["bindings"][f"{source} {kind} {destination} {routing_key}"] = {
            "source": source, "vhost": self._vhost, "destination": destination, "destination_type": kind, "routing_key": routing_key,
            "arguments": {},
        }  # fmt: skip
