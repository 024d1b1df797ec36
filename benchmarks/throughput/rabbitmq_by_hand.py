"""aio-pika by hand, as its documentation shows: a durable quorum queue, persistent messages, confirms, `message.process()`."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from aio_pika import DeliveryMode, Message, connect_robust
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue, AbstractRobustConnection

from benchmarks.throughput.measuring import IN_FLIGHT, Handled, Order, Run, Task, Took, order, publish_all


async def drain(task: Task) -> Run:
    """aio-pika runs the callback in a task a message; the prefetch count bounds them."""
    handled = Handled(task)
    connection = await connect_robust(task.url)
    channel = await connection.channel()
    queue = await _declare(channel, task)
    numbers = iter(range(task.count))

    async def fill() -> None:
        for number in numbers:
            await channel.default_exchange.publish(_message(order(number)), routing_key=task.topic)

    await asyncio.gather(*(fill() for _ in range(IN_FLIGHT)))
    await channel.set_qos(prefetch_count=IN_FLIGHT)

    async def on_message(message: AbstractIncomingMessage) -> None:
        async with message.process(requeue=True):
            await handled.handle(Order.model_validate_json(message.body))

    await queue.consume(on_message)
    took = await handled.all()
    await connection.close()  # what is not acked goes back to the queue
    return await _end(task, took, expected=0, missing=handled.missing)


async def publish(task: Task) -> Run:
    """Each publish waits for its own confirm."""
    connection = await connect_robust(task.url)
    channel = await connection.channel()
    await _declare(channel, task)
    exchange = channel.default_exchange
    took = await publish_all(task, lambda one: exchange.publish(_message(one), routing_key=task.topic))
    await connection.close()
    return await _end(task, took, expected=task.count, missing=0)


def _message(one: Order) -> Message:
    return Message(one.model_dump_json().encode(), content_type="application/json", delivery_mode=DeliveryMode.PERSISTENT)


async def _declare(channel: AbstractChannel, task: Task) -> AbstractQueue:
    return await channel.declare_queue(task.topic, durable=True, arguments={"x-queue-type": "quorum"})


async def _end(task: Task, took: Took, *, expected: int, missing: int) -> Run:
    """Counts what is in the queue, on a connection of its own, and deletes it."""
    connection: AbstractRobustConnection = await connect_robust(task.url)
    async with connection:
        channel = await connection.channel()
        queue = await _declare(channel, task)
        for _ in range(50):  # a quorum queue counts what its consumers gave back a moment later
            there = queue.declaration_result.message_count or 0
            if there == expected:
                break
            await asyncio.sleep(0.1)
            queue = await _declare(channel, task)
        await queue.delete(if_unused=False, if_empty=False)
        return Run(took, missing + abs(expected - there), {"aio-pika": version("aio-pika"), "aiormq": version("aiormq")})
