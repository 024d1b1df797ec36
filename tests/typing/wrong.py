"""Wrong uses of the public interface. Read by type checkers, never run.

Every line that ends in a mark (`type: ignore[...]` for mypy, `pyright: ignore[...]` for pyright) is a mistake that both refuse: a mark
that is not needed is an error to them, and so is a mistake without one. `tests/unit/typing/test_typing.py` runs both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypedDict

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from msgbus import (
    Batch,
    BatchFailed,
    Bus,
    Context,
    Publisher,
    Publishes,
    PublishOptions,
    Reject,
    Retry,
    RetryLater,
    Router,
    SyncContext,
    Topic,
)
from msgbus.consumer import Consumer


class Order(BaseModel):
    id: str
    amount: int


class UrgentOrder(Order):
    hours: int = 1


class Invoice(BaseModel):
    order_id: str


@dataclass
class Parcel:
    id: str


class Reading(TypedDict):
    sensor: str


orders = Topic("orders", Order, key="id")
urgent = Topic("urgent", UrgentOrder)
invoices = Topic("invoices", Invoice)
parcels = Topic("parcels", Parcel)
readings = Topic("readings", Reading)
lists = Topic("lists", list[Order])
either: Topic[Order | Invoice] = Topic("either", Order | Invoice)
raw = Topic("raw", bytes)
bus = Bus("memory://", service="shop")
router = Router()
order = Order(id="1", amount=1)
invoice = Invoice(order_id="1")


async def publishing(context: Context, sync: SyncContext, domain: Publishes) -> None:
    await bus.publish(orders, invoice)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, {"id": "1", "amount": 1})  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, [order])  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.outbox(AsyncSession()).publish(orders, invoice)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.outbox(Session()).publish(orders, invoice)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.outbox("session")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, None)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(urgent, order)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(parcels, order)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(readings, Parcel("1"))  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(lists, order)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(lists, [invoice])  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(either, Parcel("1"))  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(raw, "text")  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(raw, order)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(Order, order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await bus.publish(orders, order, order)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await bus.publish(topic=orders, message=order)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await context.publish(orders, invoice)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await domain.publish(orders, invoice)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    sync.publish(orders, invoice)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    sync.publish(orders, order, delay=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, dellay=timedelta(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await bus.publish(orders, order, delay=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, deliver_at="2030-01-01T00:00:00Z")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, headers={"attempts": 1})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, headers=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, headers=[("a", "b")])  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, priority="urgent")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, priority=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, key=17)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, id=17)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, idempotency_key=17)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish(orders, order, expires_in=60)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await bus.publish("orders", order, retries=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    wrong_options: PublishOptions = {"delai": timedelta(1)}  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportAssignmentType]
    await bus.publish(orders, order, **wrong_options)


async def publishing_many(context: Context, sync: SyncContext, stream: AsyncIterator[Invoice]) -> None:
    await bus.publish_many(orders, [invoice])  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    await bus.publish_many(orders, [order, invoice])  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    await bus.publish_many(orders, order)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    await bus.publish_many(orders, stream)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    await bus.publish_many(orders, (invoice for _ in range(3)))  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    await bus.publish_many("orders", [order])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.publish_many(orders, [order], id="1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bus.publish_many(orders, [order], key="1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bus.publish_many(orders, [order], idempotency_key="1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bus.publish_many(orders, [order], batch=100)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await context.publish_many(orders, [invoice])  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    sync.publish_many(orders, [invoice])  # type: ignore[misc]  # pyright: ignore[reportArgumentType]


async def publishers(of_orders: Publisher[Order]) -> None:
    await of_orders.publish(invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await of_orders.publish_many([invoice])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    await of_orders.publish(order, when="now")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bus.publisher(orders).publish(invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    of_invoices: Publisher[Invoice] = bus.publisher(orders)  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    bus.publisher("orders")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await of_invoices.publish_many([invoice], key="1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def consuming() -> None:
    of_invoices: Consumer[Invoice] = bus.consumer(orders, group="export")  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    bus.consumer("orders", group="export")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.consumer(orders)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bus.consumer(orders, group=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.consumer(orders, group="export", start="now")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.consumer(orders, group="export", prefetch=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    async with of_invoices as consumer:
        await consumer.receive(limit=1, timeout=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        async for delivery in consumer:
            _text: str = delivery.message  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
            await delivery.reject()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
            await delivery.retry(after=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            await delivery.ack("done")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bus.dead_letters(orders)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bus.dead_letters(orders, group="export").redrive(where="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.dead_letters(orders, group="export").show(17)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def topics() -> None:
    Topic("orders")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Topic(Order, "orders")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Topic("orders", Order, key=1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Topic("orders", Order, key=lambda order: order.amount)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Topic("orders", Order, key=lambda order: order.name)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownLambdaType, reportUnknownMemberType]
    Topic("orders", Order, shards="8")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Topic("orders", Order, retain=7)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Topic("orders", Order, priority=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Topic("orders", Order, native={"rabbitmq": 1})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    _wider: Topic[Order] = urgent  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    _narrower: Topic[UrgentOrder] = orders  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    orders.name = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def policies() -> None:
    Retry(attempts="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Retry(wait=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Retry(give_up_on=[ValueError])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Retry(give_up_on=(ValueError(),))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Retry(max_age=3600)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Retry(retries=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Retry(retry_on=ValueError)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Batch(size="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Batch(wait=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RetryLater(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Reject()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    BatchFailed([ValueError()])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def buses() -> None:
    Bus(17)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Bus("memory://", broker="memory")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Bus(service=17)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Bus(store="memory")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Bus(middleware=[print])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    Bus(routers=[bus.publish])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    Bus(settings={"concurrency": 8})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.pause(orders)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def takes_order(message: Order) -> None: ...


async def takes_invoice(message: Invoice) -> None: ...


async def takes_urgent(message: UrgentOrder) -> None: ...


async def takes_nothing() -> None: ...


async def takes_orders(batch: list[Order]) -> None: ...


async def gives_invoice(message: Order) -> Invoice:
    return invoice


async def maybe_gives_invoice(message: Order) -> Invoice | None: ...


async def gives_order(message: Order) -> Order:
    return message


def gives_order_in_a_thread(message: Order) -> Order:
    return message


def maybe_gives_invoice_in_a_thread(message: Order) -> Invoice | None: ...


def subscribing() -> None:
    bus.subscribe(orders)(takes_invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(orders)(takes_urgent)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(orders)(takes_nothing)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(orders)(takes_orders)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(orders)("takes_order")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(either)(takes_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(lists)(takes_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(raw)(takes_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    router.subscribe(orders)(takes_invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe()(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    bus.subscribe(topic=orders)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    bus.subscribe(orders, batch=Batch())(takes_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.subscribe(orders, batch=100)(takes_orders)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, batch=Batch(), publish_to=invoices)(takes_orders)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe("orders", batch=Batch(), publish_to=invoices)(takes_orders)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to=invoices)(takes_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to=invoices)(maybe_gives_invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to=invoices)(maybe_gives_invoice_in_a_thread)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to=invoices)(gives_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to=invoices)(gives_order_in_a_thread)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe("orders", publish_to=invoices)(gives_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe("orders", publish_to=invoices)(maybe_gives_invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(invoices, publish_to=invoices)(gives_invoice)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to=urgent)(gives_order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, publish_to="invoices")(gives_invoice)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, concurency=4)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    bus.subscribe("orders", concurency=4)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    bus.subscribe(orders, concurrency="4")(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, concurrency=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, window=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, group=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, name=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, retry=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, retry=5)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, retry=Retry)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, timeout=30)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, timeout=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, ordered=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, on_failure="stop")(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, start="now")(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, broadcast="yes")(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, idempotency=True)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.subscribe(orders, idempotency=None)(takes_order)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    by_position_only = bus.subscribe(orders)(takes_order)
    by_position_only(message=order)  # type: ignore[call-arg, unused-coroutine]  # pyright: ignore[reportCallIssue]
