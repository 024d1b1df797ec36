"""What other programs do at a broker, by its own client library: messages that know nothing of msgbus, and things under our names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

Odd = Mapping[str, Any]  # Any: what a header holds is the broker's own


class Stranger(ABC):
    """Of one broker."""

    odd_headers: ClassVar[Odd]
    """Headers that msgbus would never write."""
    taken: ClassVar[tuple[str, ...]]
    """What `take` can occupy."""
    elsewhere: ClassVar[str | None] = None
    """What stands behind the host for a part of the broker that is not there."""

    def __init__(self, url: str) -> None:
        self.url = url

    def with_user(self, user: str, password: str) -> str:
        """The URL with other credentials."""
        parts = urlsplit(self.url)
        return self.url.replace(parts.netloc, f"{user}:{password}@{parts.netloc.rpartition('@')[2]}")

    @abstractmethod
    async def publish(self, topic: str, body: bytes, headers: Odd) -> None:
        """A message to a topic that is there, as a program without msgbus writes it."""

    @abstractmethod
    async def take(self, what: str, topic: str, group: str) -> tuple[str, object]:
        """Puts something else where msgbus would put what is called so; the resource's name at the broker, and how it is."""

    @abstractmethod
    async def look(self, what: str, topic: str, group: str) -> object:
        """How that is now."""


class RedisStranger(Stranger):
    odd_headers: ClassVar[Odd] = {
        "msgbus-attempt": "-1",
        "msgbus-not-before": "9999-12-31T23:59:59Z",
        "ce_time": "yesterday",
        "empty": "",
        "\udcff": b"\xff\x00",
    }
    taken = ("stream", "facts", "retries")
    elsewhere = "/99"

    def _key(self, what: str, topic: str, group: str) -> str:
        return {"stream": f"{{{topic}}}", "facts": f"{{{topic}}}:meta", "retries": f"{{{topic}}}:retry:{group}"}[what]

    async def publish(self, topic: str, body: bytes, headers: Odd) -> None:
        from redis.asyncio import Redis

        fields: dict[Any, Any] = {name.encode("utf-8", "surrogateescape"): value for name, value in headers.items()}  # bytes or text
        async with Redis.from_url(self.url) as server:
            await server.xadd(f"{{{topic}}}", {b"data": body, **fields})

    async def take(self, what: str, topic: str, group: str) -> tuple[str, object]:
        from redis.asyncio import Redis

        key = self._key(what, topic, group)
        async with Redis.from_url(self.url) as server:
            await server.set(key, "theirs")
        return key, await self.look(what, topic, group)

    async def look(self, what: str, topic: str, group: str) -> object:
        from redis.asyncio import Redis

        async with Redis.from_url(self.url) as server:
            return await server.get(self._key(what, topic, group))


class KafkaStranger(Stranger):
    odd_headers: ClassVar[Odd] = {"msgbus-attempt": b"1000000000", "a": b"\xff\xfe", "ce_time": b"", "ce_id\xff": b"x", "none": None}
    taken = ("partitions", "dead letters")

    def _name(self, what: str, topic: str, group: str) -> str:
        return topic if what == "partitions" else f"{topic}.{group}.dead"

    async def publish(self, topic: str, body: bytes, headers: Odd) -> None:
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(bootstrap_servers=urlsplit(self.url).netloc)
        await producer.start()
        try:
            pairs = [(name, value) for name, value in headers.items()]
            await producer.send_and_wait(topic, body, headers=[*pairs, ("twice", b"1"), ("twice", b"2")] if headers else None)
        finally:
            await producer.stop()

    async def take(self, what: str, topic: str, group: str) -> tuple[str, object]:
        from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped]  # no types there

        admin = AIOKafkaAdminClient(bootstrap_servers=urlsplit(self.url).netloc)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(self._name(what, topic, group), 2, 1)])
        finally:
            await admin.close()
        return self._name(what, topic, group), await self.look(what, topic, group)

    async def look(self, what: str, topic: str, group: str) -> object:
        from aiokafka.admin import AIOKafkaAdminClient
        from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType  # type: ignore[import-untyped]  # no types there

        name = self._name(what, topic, group)
        admin = AIOKafkaAdminClient(bootstrap_servers=urlsplit(self.url).netloc)
        await admin.start()
        try:
            (found,) = await admin.describe_topics([name])
            (configs,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
            return len(found["partitions"]), str(configs.resources)
        finally:
            await admin.close()


class RabbitmqStranger(Stranger):
    odd_headers: ClassVar[Odd] = {
        "msgbus-attempt": -1,
        "nested": {"a": [1, None]},
        "number": 2**40,
        "none": None,
        "cloudEvents_time": 7,
    }
    taken = ("queue", "exchange")
    elsewhere = "/nowhere"

    async def publish(self, topic: str, body: bytes, headers: Odd) -> None:
        from aio_pika import Message, connect

        async with await connect(self.url) as connection:
            exchange = await (await connection.channel()).get_exchange(topic)
            await exchange.publish(Message(body, headers=dict(headers)), "anything")

    async def take(self, what: str, topic: str, group: str) -> tuple[str, object]:
        from aio_pika import connect

        async with await connect(self.url) as connection:
            channel = await connection.channel()
            if what == "exchange":
                await channel.declare_exchange(topic, "fanout", durable=True)
                return topic, await self.look(what, topic, group)
            await channel.declare_queue(f"{topic}.{group}", durable=True)
        return f"{topic}.{group}", await self.look(what, topic, group)

    async def look(self, what: str, topic: str, group: str) -> object:
        """Declaring it as it was made fails where it was altered."""
        from aio_pika import connect

        async with await connect(self.url) as connection:
            channel = await connection.channel()
            if what == "exchange":
                return str(await channel.declare_exchange(topic, "fanout", durable=True))
            queue = await channel.declare_queue(f"{topic}.{group}", durable=True)
            return queue.declaration_result.message_count


STRANGERS: Mapping[str, type[Stranger]] = {"redis": RedisStranger, "kafka": KafkaStranger, "rabbitmq": RabbitmqStranger}
