"""redis-py by hand, as its documentation shows streams: XADD, XREADGROUP, and an XACK after each handler."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.throughput.measuring import IN_FLIGHT, Handled, Order, Run, Task, order, publish_all

GROUP = "bench"


def connect(url: str) -> Redis:
    """A client whose calls wait for a connection where there are more of them than connections; the pool's size is its default."""
    return Redis.from_pool(BlockingConnectionPool.from_url(url, timeout=None))


async def drain(task: Task) -> Run:
    """A task a message, at most `IN_FLIGHT` of them."""
    handled = Handled(task)
    client = connect(task.url)
    await client.xgroup_create(task.topic, GROUP, id="0", mkstream=True)
    for start in range(0, task.count, 1000):
        async with client.pipeline(transaction=False) as pipeline:
            for number in range(start, min(start + 1000, task.count)):
                pipeline.xadd(task.topic, {"data": order(number).model_dump_json()})
            await pipeline.execute()
    free = asyncio.Semaphore(IN_FLIGHT)
    running: set[asyncio.Task[None]] = set()

    async def process(entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        try:
            await handled.handle(Order.model_validate_json(fields[b"data"]))
            await client.xack(task.topic, GROUP, entry_id)
        finally:
            free.release()

    async def consume() -> None:
        while True:
            answer: Any = await client.xreadgroup(GROUP, "consumer", {task.topic: ">"}, count=IN_FLIGHT, block=1000)
            for _, entries in answer:
                for entry_id, fields in entries:
                    await free.acquire()
                    worker = asyncio.create_task(process(entry_id, fields))
                    running.add(worker)
                    worker.add_done_callback(running.discard)

    consuming = asyncio.create_task(consume())
    took = await handled.all()
    if running:
        await asyncio.wait(running)
    consuming.cancel()
    await asyncio.wait([consuming])
    (group,) = await client.xinfo_groups(task.topic)
    left = handled.missing + group["pending"] + (group["lag"] or 0)
    return Run(took, left, await _end(client, task))


async def publish(task: Task) -> Run:
    """Each `xadd` returns when the server has the entry."""
    client = connect(task.url)
    took = await publish_all(task, lambda one: client.xadd(task.topic, {"data": one.model_dump_json()}))
    left = task.count - await client.xlen(task.topic)
    return Run(took, left, await _end(client, task))


async def _end(client: Redis, task: Task) -> dict[str, str]:
    server = (await client.info("server"))["redis_version"]
    await client.delete(task.topic)
    await client.aclose()
    return {"redis-py": version("redis"), "hiredis": version("hiredis"), "server": f"Redis {server}"}
