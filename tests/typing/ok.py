"""Right uses of the public interface: mypy --strict and pyright strict accept every line. Read by type checkers, never run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypedDict, assert_type

from pydantic import BaseModel, Field
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session
from tenacity import retry_if_exception_type, stop_after_attempt, wait_fixed, wait_random_exponential

from msgbus import (
    Batch,
    BatchFailed,
    Bus,
    Context,
    Dead,
    Done,
    Drop,
    Dropped,
    Envelope,
    Middleware,
    MsgbusError,
    Outcome,
    Publisher,
    Publishes,
    PublishManyOptions,
    PublishOptions,
    Receipt,
    Reject,
    Released,
    Retry,
    RetryAfter,
    RetryLater,
    Router,
    SyncContext,
    SyncPublishes,
    Topic,
)
from msgbus.consumer import Consumer, Delivery
from msgbus.contract.adapter import Adapter
from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, IdempotencyStore, InProgress, New
from msgbus.dead_letters import DeadLetter, DeadLetters
from msgbus.errors import PublishManyError, PublishUnknown
from msgbus.health import Health
from msgbus.settings import Settings
from msgbus.stores import MemoryStore

# ---------------------------------------------------------------- models and topics


class Order(BaseModel):
    id: str
    amount: int


class UrgentOrder(Order):
    deadline: datetime


class Invoice(BaseModel):
    order_id: str


@dataclass
class Parcel:
    id: str
    weight: float


class Reading(TypedDict):
    sensor: str
    value: float


class Created(BaseModel):
    kind: Literal["created"] = "created"


class Deleted(BaseModel):
    kind: Literal["deleted"] = "deleted"


orders = Topic("orders", Order, key="id")
invoices = Topic("invoices", Invoice, key=lambda invoice: invoice.order_id, version=2, shards=16)
parcels = Topic("parcels", Parcel, priorities=True)
readings = Topic("readings", Reading, key="sensor", retain=timedelta(days=1))
many_orders = Topic("many-orders", list[Order])
changes: Topic[Created | Deleted] = Topic("changes", Created | Deleted)
tagged: Topic[Created | Deleted] = Topic("tagged", Annotated[Created | Deleted, Field(discriminator="kind")])
counts: Topic[dict[str, int]] = Topic("counts", dict[str, int])
raw = Topic("raw", bytes, content_type="image/png", key=lambda body: body[:1].hex() or None)
native = Topic("native", Order, native={"rabbitmq": {"x-max-length": 10}})

assert_type(orders, Topic[Order])
assert_type(parcels, Topic[Parcel])
assert_type(readings, Topic[Reading])
assert_type(many_orders, Topic[list[Order]])
assert_type(raw, Topic[bytes])
assert_type(orders.name, str)

# ---------------------------------------------------------------- policies

patient = Retry(
    attempts=3,
    wait=wait_random_exponential(multiplier=1, max=10) + wait_fixed(1),
    retry_on=retry_if_exception_type(OSError),
    give_up_on=(KeyError, ValueError),
    max_age=timedelta(hours=1),
)
once = Retry.none()
assert_type(once, Retry)
assert_type(patient.next_action(1, ValueError()), Outcome)

# ---------------------------------------------------------------- a bus


class Timing(Middleware):
    async def consume(self, context: Context, call_next: Callable[[Context], Awaitable[Outcome]], /) -> Outcome:
        outcome = await call_next(context)
        match outcome:
            case Done() | Released():
                return outcome
            case Dropped(reason):
                assert_type(reason, str)
            case RetryAfter(delay, error, counted):
                assert_type((delay, error, counted), tuple[float, BaseException | None, bool])
            case Dead(_, why):
                assert_type(why, BaseException | str)
        return outcome

    async def publish(self, envelope: Envelope, call_next: Callable[[Envelope], Awaitable[None]], /) -> None:
        await call_next(replace(envelope, headers={**envelope.headers, "tenant": "a"}))


class OnlyPublishing(Middleware):
    async def publish(self, envelope: Envelope, call_next: Callable[[Envelope], Awaitable[None]], /) -> None:
        await call_next(envelope)


class RemembersNothing(IdempotencyStore):
    async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
        claims: list[Claim] = [New("token"), InProgress(1.0), AlreadyDone(None), Conflict()]
        return claims[0]

    async def complete(self, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
        return True

    async def renew(self, group: str, key: str, token: str, lease: float) -> bool:
        return True

    async def abandon(self, group: str, key: str, token: str) -> bool:
        return True


@asynccontextmanager
async def lifespan(bus: Bus) -> AsyncGenerator[None, None]:
    await bus.publish(orders, Order(id="1", amount=1))
    yield


def another_lifespan(bus: Bus) -> AbstractAsyncContextManager[object]:
    return lifespan(bus)


router = Router()
bus = Bus(
    "memory://",
    service="shop",
    settings=Settings(concurrency=8, publish_timeout=timedelta(seconds=2)),
    store=MemoryStore(capacity=10),
    retry=patient,
    middleware=[Timing(), OnlyPublishing()],
    routers=[router],
    lifespan=lifespan,
)
plain = Bus()
minimal = Bus(service="shop", lifespan=another_lifespan, store=RemembersNothing())


def with_adapter(adapter: Adapter) -> Bus:
    return Bus(adapter=adapter, service="shop")


# ---------------------------------------------------------------- handlers


@bus.subscribe(orders)
async def on_order(order: Order) -> None:
    assert_type(order, Order)


@bus.subscribe(orders, group="audit", start="latest")
async def on_order_with_context(order: Order, context: Context) -> None:
    assert_type(context.id, str)
    assert_type(context.key, str | None)
    assert_type(context.attempt, int)
    assert_type(context.published_at, datetime)
    assert_type(context.deadline, datetime | None)
    assert_type(context.causation_id, str | None)
    assert_type(context.headers["tenant"], str)
    assert_type(await context.publish(invoices, Invoice(order_id=order.id)), Receipt)
    assert_type(await context.publish_many(invoices, [Invoice(order_id=order.id)]), int)


@bus.subscribe(
    orders,
    name="everything",
    retry=Retry(attempts=2),
    concurrency=4,
    timeout=timedelta(seconds=30),
    idempotency=False,
    window=16,
    ordered=True,
    on_failure="skip",
    start="earliest",
)
async def all_options(order: Order) -> None: ...


@bus.subscribe(orders, broadcast=True, ordered=False, idempotency=MemoryStore())
async def on_every_instance(order: Order) -> None: ...


@router.subscribe(orders, group="sync")
def in_a_thread(order: Order, context: SyncContext) -> None:
    assert_type(context.publish(invoices, Invoice(order_id=order.id), delay=timedelta(1)), Receipt)
    assert_type(context.publish_many(invoices, (Invoice(order_id=order.id) for _ in range(3))), int)
    note_from_a_thread(context)


@bus.subscribe(orders, group="wider")
async def takes_more(message: Order | Invoice) -> None: ...


@bus.subscribe(orders, group="anything")
async def takes_anything(message: object) -> None: ...


@bus.subscribe(orders, group="keyword")
async def keyword_only_context(order: Order, *, context: Context) -> None: ...


@bus.subscribe(orders, publish_to=invoices)
async def to_invoice(order: Order) -> Invoice:
    return Invoice(order_id=order.id)


@bus.subscribe(orders, group="sync-to", publish_to=invoices)
def to_invoice_in_a_thread(order: Order, context: SyncContext) -> Invoice:
    return Invoice(order_id=order.id)


@bus.subscribe(invoices, publish_to=orders)
async def to_subclass(invoice: Invoice, context: Context) -> UrgentOrder:
    return UrgentOrder(id=invoice.order_id, amount=1, deadline=datetime.now(UTC))


@bus.subscribe("orders", name="plain")
async def by_name(order: Order) -> None: ...


@bus.subscribe("orders", name="plain-to", publish_to=invoices, concurrency=2)
async def by_name_to(order: Order, context: Context) -> Invoice:
    return Invoice(order_id=order.id)


@bus.subscribe("orders", name="plain-to-sync", publish_to=invoices)
def by_name_to_sync(order: Order) -> Invoice:
    return Invoice(order_id=order.id)


@bus.subscribe("orders", name="plain-batch", batch=Batch(10))
async def by_name_in_batches(batch: list[Order]) -> None: ...


@bus.subscribe("orders", name="plain-sync")
def by_name_in_a_thread(order: Order) -> None: ...


@bus.subscribe(orders, batch=Batch(size=50, wait=timedelta(seconds=1)), group="batches")
async def in_batches(batch: list[Order], contexts: list[Context]) -> None:
    failed: dict[int, Exception] = {index: ValueError(context.id) for index, context in enumerate(contexts)}
    if failed:
        raise BatchFailed(failed)


@bus.subscribe(orders, batch=Batch(), group="batches-sync")
def in_batches_in_a_thread(batch: list[Order]) -> None: ...


@bus.subscribe(parcels)
async def on_parcel(parcel: Parcel) -> None: ...


@bus.subscribe(readings)
async def on_reading(reading: Reading) -> None:
    assert_type(reading["value"], float)


@bus.subscribe(many_orders)
async def on_many(batch: list[Order]) -> None: ...


@bus.subscribe(many_orders, batch=Batch())
async def on_many_many(batch: list[list[Order]]) -> None: ...


@bus.subscribe(changes)
async def on_change(change: Created | Deleted) -> None: ...


@bus.subscribe(tagged)
async def on_tagged(change: Created | Deleted) -> None: ...


@bus.subscribe(raw)
async def on_raw(body: bytes) -> None: ...


@bus.subscribe(orders, group="words")
async def words(order: Order) -> None:
    if order.amount == 1:
        raise Reject("never")
    if order.amount == 2:
        raise RetryLater(timedelta(minutes=1))
    if order.amount == 3:
        raise RetryLater
    raise Drop("not ours")


class Handlers:
    async def method(self, order: Order, context: Context) -> None: ...

    async def __call__(self, order: Order) -> None: ...


handlers = Handlers()
bus.subscribe(orders, group="method")(handlers.method)
bus.subscribe(orders, group="object")(handlers)

# A decorated handler can still be called: by position where a Topic is subscribed, exactly as written under a plain name.
in_test: Coroutine[Any, Any, None] = on_order(Order(id="1", amount=1))
invoice_in_test: Coroutine[Any, Any, Invoice] = to_invoice(Order(id="1", amount=1))
as_written: Coroutine[Any, Any, None] = by_name(order=Order(id="1", amount=1))

# ---------------------------------------------------------------- domain code


async def domain(publishes: Publishes) -> None:
    await publishes.publish(orders, Order(id="1", amount=1))


def note_from_a_thread(publishes: SyncPublishes) -> None:
    publishes.publish("notes", {"any": "thing"}, headers={"a": "b"})


async def one_kind(publisher: Publisher[Order]) -> None:
    await publisher.publish(Order(id="1", amount=1), delay=timedelta(1), headers={"a": "b"}, priority="low")
    await publisher.publish_many([Order(id="1", amount=1)])


async def only_urgent(publisher: Publisher[UrgentOrder]) -> None:
    await publisher.publish(UrgentOrder(id="1", amount=1, deadline=datetime.now(UTC)))


# ---------------------------------------------------------------- publishing


def some_orders() -> Iterator[Order]:
    yield Order(id="1", amount=1)


async def streamed_orders() -> AsyncIterator[Order]:
    yield Order(id="1", amount=1)


async def publishing(context: Context) -> None:
    assert_type(await bus.publish(orders, Order(id="1", amount=1)), Receipt)
    assert_type(
        (await bus.publish(orders, UrgentOrder(id="1", amount=1, deadline=datetime.now(UTC)))).state, Literal["confirmed", "stored"]
    )
    await bus.publish("orders", Order(id="1", amount=1))
    await bus.publish("orders", {"id": "1", "amount": 1}, key="1")
    await bus.publish(parcels, Parcel("1", 2.0), priority="high")
    await bus.publish(readings, Reading(sensor="s", value=1.0))
    await bus.publish(many_orders, [Order(id="1", amount=1)])
    await bus.publish(changes, Created())
    await bus.publish(tagged, Deleted())
    await bus.publish(counts, {"a": 1})
    await bus.publish(raw, b"\x00")
    await bus.publish(
        orders,
        Order(id="1", amount=1),
        id="fixed",
        key="other",
        idempotency_key="request-17",
        headers={"tenant": "a"},
        delay=timedelta(minutes=1),
        expires_in=timedelta(hours=1),
    )
    await bus.publish(orders, Order(id="1", amount=1), deliver_at=datetime.now(UTC), delay=None, id=None, key=None)
    options: PublishOptions = {"id": "1", "priority": "normal"}
    await bus.publish(orders, Order(id="1", amount=1), **options)
    for_many: PublishManyOptions = {"headers": {"a": "b"}}
    assert_type(await bus.publish_many(orders, [Order(id="1", amount=1)], **for_many), int)
    await bus.publish_many(orders, some_orders())
    await bus.publish_many(orders, streamed_orders(), expires_in=timedelta(1))
    await bus.publish_many(orders, (UrgentOrder(id="1", amount=1, deadline=datetime.now(UTC)) for _ in range(2)))
    publisher = bus.publisher(orders)
    assert_type(publisher, Publisher[Order])
    await one_kind(publisher)
    await only_urgent(publisher)
    await domain(bus)
    await domain(context)
    try:
        await bus.publish_many(orders, some_orders())
    except PublishManyError as error:
        assert_type((error.confirmed, error.failed, error.first_unconfirmed), tuple[int, int, int])
    except PublishUnknown as error:
        await bus.publish(orders, Order(id="1", amount=1), id=error.message_id)
    except MsgbusError:
        raise


# ---------------------------------------------------------------- consuming by hand, and operating


async def pulling() -> None:
    async with bus.consumer(orders, group="export", start="latest", window=10) as consumer:
        assert_type(consumer, Consumer[Order])
        async for delivery in consumer:
            assert_type(delivery.message, Order)
            assert_type(delivery.context, Context)
            await delivery.ack()
        for delivery in await consumer.receive(limit=10, timeout=timedelta(seconds=1)):
            wider: Delivery[Order | Invoice] = delivery
            await wider.retry(after=timedelta(seconds=5))
            await wider.retry()
            await wider.reject("never")


async def storing(session: AsyncSession, connection: AsyncConnection, plain: Session, sync_connection: Connection) -> None:
    for outbox in (bus.outbox(session), bus.outbox(connection)):
        assert_type(outbox, Publishes)
        assert_type(await outbox.publish(orders, Order(id="1", amount=1), delay=timedelta(days=400)), Receipt)
        assert_type(await outbox.publish_many(orders, [Order(id="1", amount=1)]), int)
    for sync_outbox in (bus.outbox(plain), bus.outbox(sync_connection)):
        assert_type(sync_outbox, SyncPublishes)
        assert_type(sync_outbox.publish(orders, Order(id="1", amount=1)), Receipt)


@bus.subscribe(orders, name="in-a-transaction", publish_to=invoices)
async def in_a_transaction(order: Order, session: AsyncSession) -> Invoice:
    return Invoice(order_id=order.id)


async def operating() -> None:
    async with bus as entered:
        assert_type(entered, Bus)
        assert_type(bus.health(), Health)
        letters = bus.dead_letters(orders, group="audit")
        assert_type(letters, DeadLetters)
        async for letter in letters.list(where=lambda letter: letter.attempts > 1, limit=3):
            assert_type(letter, DeadLetter)
            assert_type(letter.body, bytes)
        assert_type(await letters.show("1"), DeadLetter)
        assert_type(await letters.redrive(limit=1, rate=10.0, dry_run=True, force=False), int)
        assert_type(await bus.dead_letters("orders", group="audit").purge(where=lambda letter: letter.reason == "rejected"), int)
    async with bus.running() as entered:
        assert_type(entered, Bus)
        bus.pause("audit")
        bus.resume("audit")
        bus.stop()
    await bus.run()


if __name__ == "__main__":
    stop_after_attempt(1)
    asyncio.run(bus.run())
