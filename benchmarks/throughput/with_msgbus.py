"""msgbus, on any broker, with its default features: a typed model, `@bus.subscribe`, `await publisher.publish(...)`."""

from __future__ import annotations

from importlib.metadata import version

from benchmarks.throughput.measuring import IN_FLIGHT, Handled, Order, Run, Task, order, publish_all
from msgbus import Bus, Topic
from msgbus.contract.adapter import HasDepth, Purgeable
from msgbus.settings import Settings

GROUP = "bench"


async def drain(task: Task) -> Run:
    """A backlog, handled by at most `IN_FLIGHT` handlers at once."""
    bus = bus_of(task)
    orders = Topic(task.topic, Order)
    handled = Handled(task)

    @bus.subscribe(orders, concurrency=IN_FLIGHT)
    async def handle(one: Order) -> None:
        await handled.handle(one)

    async with bus:
        await declare(bus, orders)
        await bus.publish_many(orders, map(order, range(task.count)))
    async with bus.running():
        took = await handled.all()
    async with bus:
        return Run(took, handled.missing + await waiting(bus, orders), await versions(bus))


async def publish(task: Task) -> Run:
    """Everything is confirmed, and there afterwards."""
    bus = bus_of(task)
    orders = Topic(task.topic, Order)
    async with bus:
        await declare(bus, orders)
        took = await publish_all(task, bus.publisher(orders).publish)
        left = task.count - await waiting(bus, orders)
        adapter = bus.runtime.adapter
        if isinstance(adapter, Purgeable):
            await adapter.purge(task.topic, GROUP)
        return Run(took, left, await versions(bus))


def bus_of(task: Task) -> Bus:
    return Bus(task.url, service=GROUP, settings=Settings() if task.shards is None else Settings(shards=task.shards))


async def declare(bus: Bus, orders: Topic[Order]) -> None:
    async with bus.consumer(orders, group=GROUP):
        pass


async def waiting(bus: Bus, orders: Topic[Order]) -> int:
    adapter = bus.runtime.adapter
    if not isinstance(adapter, HasDepth):
        raise TypeError(f"{adapter.name} does not say how many messages wait")
    depth = await adapter.depth(orders.name, GROUP)
    return sum(number or 0 for number in (depth.ready, depth.in_flight, depth.delayed))


async def versions(bus: Bus) -> dict[str, str]:
    facts = await bus.runtime.adapter.explain()
    return {"msgbus": version("msgbus"), "broker": facts.get("broker", ""), "durability": facts.get("durability", "")}
