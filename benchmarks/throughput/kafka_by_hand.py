"""aiokafka by hand, as its documentation shows: `acks="all"`, `getmany`, and a manual commit after a batch of handlers."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks.throughput.measuring import IN_FLIGHT, Handled, Order, Run, Task, Took, order, publish_all

GROUP = "bench"


async def drain(task: Task) -> Run:
    """So many handlers at once as a batch has; it is committed when all of them are done, or a crash would lose what was not."""
    handled = Handled(task)
    await _create(task)
    async with _producer(task) as producer:
        confirms = [await producer.send(task.topic, order(number).model_dump_json().encode()) for number in range(task.count)]
        await asyncio.gather(*confirms)
    async with _consumer(task) as consumer:
        consuming = asyncio.create_task(_consume(consumer, handled))
        took = await handled.all()
        await consuming
        ends = await _ends(consumer, task)
        left = sum([end - (await consumer.committed(place) or 0) for place, end in ends.items()])
    return await _end(task, took, handled.missing + left)


async def _consume(consumer: AIOKafkaConsumer, handled: Handled) -> None:
    while handled.missing:
        batches = await consumer.getmany(timeout_ms=1000, max_records=IN_FLIGHT)
        records = [record for batch in batches.values() for record in batch]
        if records:
            await asyncio.gather(*(handled.handle(Order.model_validate_json(record.value or b"")) for record in records))
            await consumer.commit()


async def publish(task: Task) -> Run:
    """Each `send_and_wait` returns when the broker has the record."""
    await _create(task)
    async with _producer(task) as producer:
        took = await publish_all(task, lambda one: producer.send_and_wait(task.topic, one.model_dump_json().encode()))
    async with _consumer(task) as consumer:
        stored = sum((await _ends(consumer, task)).values())
    return await _end(task, took, task.count - stored)


def _servers(task: Task) -> str:
    return urlsplit(task.url).netloc


def _producer(task: Task) -> AIOKafkaProducer:
    return AIOKafkaProducer(bootstrap_servers=_servers(task), acks="all")


def _consumer(task: Task) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        task.topic,
        bootstrap_servers=_servers(task),
        group_id=f"{task.topic}-{GROUP}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )


async def _ends(consumer: AIOKafkaConsumer, task: Task) -> dict[TopicPartition, int]:
    ends = await consumer.end_offsets([TopicPartition(task.topic, number) for number in range(task.shards or 1)])
    return {place: end for place, end in ends.items() if end}


async def _create(task: Task) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=_servers(task))
    await admin.start()
    await admin.create_topics([NewTopic(task.topic, task.shards or 1, 1)])
    await admin.close()


async def _end(task: Task, took: Took, left: int) -> Run:
    admin = AIOKafkaAdminClient(bootstrap_servers=_servers(task))
    await admin.start()
    await admin.delete_topics([task.topic])
    await admin.close()
    return Run(took, left, {"aiokafka": version("aiokafka")})
