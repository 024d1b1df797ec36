"""Conformance: consuming. C2, C3 and C5 to C8 of the contract: who gets what, what settles it, and what comes again."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import pytest
from pydantic import BaseModel
from tenacity import wait_fixed
from typing_extensions import TypedDict

from msgbus.consumer import Delivery
from msgbus.context import Context
from msgbus.contract.adapter import Adapter, Capability, Received, Receiver, SendOutcome
from msgbus.contract.envelope import MAX_HEADER_NAME, MAX_HEADER_VALUE, MAX_HEADERS, Envelope
from msgbus.errors import AlreadySettled, BrokerError, Drop, InvalidHeader, Reject
from msgbus.retry import Retry
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import QUIET, Order, Seen, Stage, Worker, conformance, eventually, patient, take
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
BLOBS = Topic("blobs", bytes)
AT_ONCE = wait_fixed(0)

SEND_TIMEOUT = 10.0
LONG = 30.0
"""Seconds that a redelivery, or joining a group, may take on the slowest broker."""


async def _send(stage: Stage, adapter: Adapter, count: int, topic: str = "orders", start: int = 0) -> None:
    """Messages `start`, `start` + 1, ... as bodies, confirmed."""
    envelopes = [stage.envelope(topic, b"%d" % n) for n in range(start, start + count)]
    assert await adapter.send(envelopes, timeout=SEND_TIMEOUT) == [None] * count


async def _declared(stage: Stage, **receiver: Any) -> tuple[Adapter, Receiver]:
    """An adapter with a topic and a group of it, and a receiver."""
    adapter = await stage.open_adapter()
    spec = stage.receiver_spec(**receiver)
    await adapter.declare([stage.topic_spec()], [spec])
    return adapter, await stage.receiver(adapter, spec)


def _bodies(taken: list[Received]) -> list[int]:
    return sorted(int(received.envelope.body) for received in taken)


# ---------------------------------------------------------------- what arrives


class Price(BaseModel):
    """A model with fields that JSON has no type for."""

    id: UUID
    amount: Decimal
    at: datetime
    note: str | None = None


@dataclass
class Point:
    """A dataclass as a message."""

    x: int
    y: float


class Address(TypedDict):
    """A TypedDict as a message."""

    street: str
    number: int


@conformance(seconds=60)
async def roundtrip_all_content_types(stage: Stage) -> None:
    """C2: what a handler is given equals what was published, whatever the topic's model is (a pydantic model, a dataclass, a TypedDict, a
    list, a union, plain text, bytes) and whatever content type it travels as."""
    price = Price(id=UUID(int=7), amount=Decimal("0.10"), at=datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC))
    cases: list[tuple[Topic[Any], Any, str]] = [
        (Topic("prices", Price), price, "application/json"),
        (Topic("points", Point), Point(-1, 0.1), "application/json"),
        (Topic("addresses", Address), Address(street="Straße", number=2**53 + 1), "application/json"),
        (Topic("lists", list[int]), [1, 2, 3], "application/json"),
        (Topic("unions", int | str | None), "text", "application/json"),  # pyright: ignore[reportArgumentType]
        (Topic("texts", str), "ünïcödé \U0001f600 \u0000 \n", "application/json"),
        (Topic("typed", Order, content_type="application/vnd.shop.order+json"), Order(n=1), "application/vnd.shop.order+json"),
        (Topic("images", bytes, content_type="image/png"), b"\x89PNG\r\n", "image/png"),
        (Topic("octets", bytes), b"\x00\x01", "application/octet-stream"),
    ]
    bus = stage.bus()
    seen: Seen[tuple[str, Any, str | None]] = Seen()

    async def handle(message: Any, context: Context) -> None:
        await seen.add((context.topic, message, context.envelope.headers.get("content-type")))

    for topic, _, _ in cases:
        bus.subscribe(topic)(handle)
    await stage.start(bus)
    publisher = await stage.publisher()
    for topic, message, _ in cases:
        await publisher.publish(topic, message)
    await seen.wait_for(len(cases), LONG)
    assert sorted(seen.items, key=lambda item: item[0]) == sorted(
        [(topic.name, message, content_type) for topic, message, content_type in cases], key=lambda item: item[0]
    )


@conformance()
async def roundtrip_empty_body(stage: Stage) -> None:
    """C2: a message without a byte is a message: it arrives, once, as empty as it was; a group whose model it does not fit keeps it as a
    dead letter."""
    empties = Topic("empties", bytes, content_type="application/json")
    worker, seen = await stage.collect(empties)
    bus = stage.bus(service="other")

    @bus.subscribe("empties")
    async def handle(order: Order) -> None:
        await seen.add(b"an order was made of nothing")

    other = await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish(empties, b"")
    await seen.wait_for(1)
    [letter] = await stage.dead_letters(1, "empties", group="other")
    await worker.stop()
    await other.stop()
    assert seen.items == [b""]
    assert (letter.reason, letter.body) == ("invalid", b"")


@conformance()
async def roundtrip_non_utf8_body(stage: Stage) -> None:
    """C2: a body is bytes: every one of the 256, in any order, arrives as it was sent."""
    _, seen = await stage.collect(BLOBS)
    publisher = await stage.publisher()
    bodies = [bytes(range(256)), b"\xff\xfe\x00", b"\xc3\x28", b"\x00", b"\r\n\r\n", b"\x1f\x8b\x08", bytes(reversed(range(256))) * 300]
    for body in bodies:
        await publisher.publish(BLOBS, body)
    await seen.wait_for(len(bodies))
    assert sorted(seen.items) == sorted(bodies)


@conformance()
async def headers_roundtrip_types_and_unicode(stage: Stage) -> None:
    """C2: headers are text by name: any UTF-8, empty, 8 KiB long, 64 of them, with names of any legal character and length; a handler reads
    them as they were given, beside id, key and the facts of the message. What is no text is refused before it is sent."""
    bus = stage.bus()
    seen: Seen[Context] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await seen.add(context)

    await stage.start(bus)
    adapter = FaultyAdapter(stage.new_adapter())
    publisher = await stage.entered(stage.bus(adapter=adapter, service="publisher"))
    headers = {
        "plain": "text",
        "empty": "",
        "Mixed-Case_and.dots": "1.0",
        "unicode": "ünïcödé ☃ \U0001f600 עברית",
        "number": "42",
        "spaces": "  two  spaces  ",
        "json": '{"a": [1, null]}',
        "percent": "%41 %",
        "n" * MAX_HEADER_NAME: "a long name",
        "long": "x" * MAX_HEADER_VALUE,
    }
    headers |= {f"more-{n}": str(n) for n in range(MAX_HEADERS - len(headers))}
    published: Any = datetime.now(UTC)
    receipt = await publisher.publish(ORDERS, Order(), headers=headers, id="id ☃/1", key="ключ 1", idempotency_key="once ☃")
    await seen.wait_for(1)
    [context] = seen.items
    assert context.headers == headers
    assert context.id == receipt.id == "id ☃/1"
    assert (context.key, context.idempotency_key, context.correlation_id) == ("ключ 1", "once ☃", "id ☃/1")
    assert (context.topic, context.group, context.attempt) == ("orders", "suite", 1)
    assert abs(context.published_at - published) < timedelta(seconds=patient(10))

    sent = len(adapter.sent)
    for value in (42, 1.5, float("nan"), None, b"bytes", ["list"], {"a": "b"}, True, "line\nbreak", "nul\x00", "\ud800"):
        with pytest.raises(InvalidHeader, match="bad-header"):
            await publisher.publish(ORDERS, Order(), headers={"bad-header": cast(str, value)})
    for name in ("", "with space", "ünïcode", "n" * (MAX_HEADER_NAME + 1), "msgbus-attempt", "ce-id"):
        with pytest.raises(InvalidHeader):
            await publisher.publish(ORDERS, Order(), headers={name: "value"})
    assert len(adapter.sent) == sent


# ---------------------------------------------------------------- groups


@conformance(seconds=90)
async def concurrent_consumers_share_group(stage: Stage) -> None:
    """C2: the processes of a group share one copy of the topic: all have a part of the work, and none of it is done twice."""
    seen: Seen[tuple[str, int]] = Seen()
    both = asyncio.Event()

    async def start(process: str) -> Worker:
        bus = stage.bus()

        @bus.subscribe(ORDERS, concurrency=1, window=1)
        async def handle(order: Order) -> None:
            await seen.add((process, order.n))
            if order.n < 0:
                await both.wait()

        return await stage.start(bus)

    workers = [await start("first"), await start("second")]
    publisher = await stage.publisher()
    warming = 0
    async with asyncio.timeout(patient(LONG)):
        while {process for process, _ in seen.items} != {"first", "second"}:  # each has one in hand, so a third waits
            warming += 1
            await publisher.publish(ORDERS, Order(n=-warming))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await seen.wait_for(warming)
    both.set()
    await seen.wait_for(warming, LONG)
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(100)])
    await seen.wait_for(warming + 100, LONG)
    for worker in workers:
        await worker.stop()
    assert sorted(n for _, n in seen.items) == list(range(-warming, 0)) + list(range(100))


@conformance(seconds=60)
async def groups_each_get_all(stage: Stage) -> None:
    """C2: every group gets every message, once."""
    groups = ("first", "second", "third")
    seen = [(await stage.collect(ORDERS, service=group))[1] for group in groups]
    publisher = await stage.publisher()
    for n in range(20):
        await publisher.publish(ORDERS, Order(n=n))
    for items in seen:
        await items.wait_for(20, LONG)
        assert sorted(order.n for order in items.items) == list(range(20))


@conformance(seconds=60)
async def one_groups_retry_and_dead_letter_leave_other_groups_alone(stage: Stage) -> None:
    """C2: what fails in one group is retried and given up in that group alone: another sees the message once, as a first run, and has no
    dead letter of it."""
    bus = stage.bus(service="failing", retry=Retry(attempts=6, wait=AT_ONCE))  # more runs than are made without a copy
    runs: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def fail(order: Order, context: Context) -> None:
        if order.n == 1:
            await runs.add(context.attempt)
            raise ValueError("always")

    await stage.start(bus)
    healthy = stage.bus(service="healthy")
    seen: Seen[tuple[int, int]] = Seen()

    @healthy.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await seen.add((order.n, context.attempt))

    await stage.start(healthy)
    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order(n=1))
    await runs.wait_for(6, LONG)
    [letter] = await stage.dead_letters(1, group="failing")
    assert await stage.dead_letters(0, group="healthy") == []
    await publisher.publish(ORDERS, Order(n=2))
    await seen.wait_until(lambda items: (2, 1) in items)
    assert seen.items == [(1, 1), (2, 1)]
    assert runs.items == [1, 2, 3, 4, 5, 6]
    assert letter.record["group"] == "failing"


@conformance(seconds=60)
async def multi_topic_no_leak(stage: Stage) -> None:
    """C2: a handler gets its own topic's messages and no others, however alike the names are, in one process and one group."""
    names = ("orders", "orders-eu", "orders.eu", "orders.eu.west", "order", "Orders", "eu.orders")
    topics = [Topic(name, Order) for name in names]
    bus = stage.bus()
    seen: Seen[tuple[str, str]] = Seen()

    async def handle(order: Order, context: Context) -> None:
        await seen.add((context.topic, order.text))

    for topic in topics:
        bus.subscribe(topic)(handle)
    await stage.start(bus)
    publisher = await stage.publisher()
    for topic in topics:
        await publisher.publish_many(topic, [Order(text=topic.name)] * 3)
    await seen.wait_for(3 * len(topics), LONG)
    assert sorted(seen.items) == sorted((name, name) for name in names * 3)


# ---------------------------------------------------------------- history


@conformance(seconds=60)
async def first_group_gets_what_came_before_it(stage: Stage) -> None:
    """C2: the topic's first group gets what was confirmed before it, while it was being declared, and after: nothing falls between."""
    publisher = await stage.publisher()
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(20)])
    declared = asyncio.Event()

    async def keep_publishing() -> int:
        n = 20
        while not declared.is_set() or n < 40:
            await publisher.publish(ORDERS, Order(n=n))
            n += 1
            await asyncio.sleep(0.001)
        return n

    publishing = asyncio.create_task(keep_publishing())
    _, seen = await stage.collect(ORDERS)
    declared.set()
    count = await publishing
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(count, count + 20)])
    await seen.wait_until(lambda items: {order.n for order in items} == set(range(count + 20)), LONG, f"all of {count + 20}")


@conformance(needs=Capability.RETAIN, seconds=60)
async def retained_topic_gives_history_to_a_later_group(stage: Stage) -> None:
    """C2: where the topic says `retain=`, a later group starts at its history, though another is done with it; one that starts at the
    latest does not."""
    kept = Topic("kept", Order, retain=timedelta(hours=1))
    _, first = await stage.collect(kept, service="first")
    publisher = await stage.publisher()
    await publisher.publish_many(kept, [Order(n=n) for n in range(5)])
    await first.wait_for(5, LONG)
    _, later = await stage.collect(kept, service="later")
    _, latest = await stage.collect(kept, service="latest", start="latest")
    await later.wait_for(5, LONG)
    await publisher.publish_many(kept, [Order(n=n) for n in range(5, 10)])
    for seen, wanted in ((first, range(10)), (later, range(10)), (latest, range(5, 10))):
        await seen.wait_for(len(wanted), LONG)
        assert sorted(order.n for order in seen.items) == list(wanted)


@conformance(seconds=60)
async def group_misses_nothing_after_it_was_declared(stage: Stage) -> None:
    """C2: a group that was declared once gets everything that is confirmed from then on, also while none of its processes is there."""
    adapter = await stage.open_adapter()
    specs = [stage.receiver_spec(group="first", window=100), stage.receiver_spec(group="second", window=100)]
    await adapter.declare([stage.topic_spec()], specs[:1])
    await adapter.declare([stage.topic_spec()], specs[1:])  # a later group: nothing is kept for it but what follows
    await _send(stage, adapter, 20)
    for spec in specs:
        receiver = await stage.receiver(adapter, spec)
        taken = await take(receiver, 20, LONG)
        assert _bodies(taken) == list(range(20))
        for received in taken:
            receiver.ack(received)
        await receiver.close()
    await _send(stage, adapter, 20, start=20)
    await adapter.close()
    await adapter.open()
    await adapter.declare([stage.topic_spec()], specs)
    for spec in specs:
        receiver = await stage.receiver(adapter, spec)
        taken = await take(receiver, 20, LONG)
        taken += await receiver.receive(10, patient(QUIET))
        assert _bodies(taken) == list(range(20, 40))


@conformance(seconds=60)
async def latest_group_gets_only_new(stage: Stage) -> None:
    """C2: a group that starts at the latest gets what is published after its declaration, all of it, and nothing from before: not even when
    it is the topic's first."""
    publisher = await stage.publisher()
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5)])
    adapter = await stage.open_adapter()
    spec = stage.receiver_spec(group="latest", start="latest")
    await adapter.declare([stage.topic_spec()], [spec])
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5, 10)])  # declared, and nobody is there yet
    await adapter.declare([stage.topic_spec()], [spec])  # a second time changes nothing
    _, seen = await stage.collect(ORDERS, service="latest", start="latest")
    await seen.wait_for(5, LONG)
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(10, 15)])
    await seen.wait_until(lambda items: {order.n for order in items} >= set(range(5, 15)), LONG, "all that is new")
    assert sorted(order.n for order in seen.items) == list(range(5, 15))


@conformance(seconds=60)
async def later_group_starts_at_its_declaration(stage: Stage) -> None:
    """C2: a topic's second group, without `retain=`, starts where it is declared, though it asks for the earliest: what others have, or
    have not yet, handled before is not for it."""
    publisher = await stage.publisher()
    _, first = await stage.collect(ORDERS, service="first")
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5)])
    await first.wait_for(5, LONG)
    adapter = await stage.open_adapter()
    await adapter.declare([stage.topic_spec()], [stage.receiver_spec(group="idle")])
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5, 10)])  # the group "idle" has them before it
    _, later = await stage.collect(ORDERS, service="later", start="earliest")
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(10, 15)])
    await later.wait_until(lambda items: {order.n for order in items} >= set(range(10, 15)), LONG, "all that is new")
    await first.wait_for(15, LONG)
    assert sorted(order.n for order in later.items) == list(range(10, 15))
    assert sorted(order.n for order in first.items) == list(range(15))


@conformance(needs=Capability.SHARDS, seconds=90)
async def plain_name_takes_the_brokers_shards(stage: Stage) -> None:
    """C4: a bus that knows a topic by its plain name, or without key or shards, takes those that the broker has: its handlers are ordered
    as anyone's, and what it publishes with a key goes where that key's messages are."""
    sharded = Topic("orders", Order, key="id", shards=4)
    publisher = await stage.publisher()
    await publisher.publish(sharded, Order(id="key-0", n=-1))
    adapter = await stage.open_adapter()
    assert await adapter.shards(stage.name("orders")) == 4

    bus = stage.bus()
    seen: Seen[tuple[str, int]] = Seen()
    running: set[str] = set()
    overlaps: list[Order] = []

    @bus.subscribe("orders", concurrency=8)
    async def handle(order: Order) -> None:
        if order.id in running:
            overlaps.append(order)
        running.add(order.id)
        await asyncio.sleep(0.001 if order.n % 3 else 0.003)
        running.discard(order.id)
        await seen.add((order.id, order.n))

    worker = await stage.start(bus)
    assert [plan.ordered for plan in worker.bus.plans] == [True]
    plain = await stage.entered(stage.bus(service="plain"))
    raw = await stage.entered(stage.bus(service="raw"))
    other = await stage.entered(stage.bus(service="other"))
    feed = Topic("orders", bytes, content_type="application/json")
    keyed = Topic("orders", Order, key="id")
    for n in range(0, 80, 4):
        for key in ("key-0", "key-1", "key-2"):
            order = Order(id=key, n=n)
            await publisher.publish(sharded, order)
            await plain.publish("orders", order.model_copy(update={"n": n + 1}), key=key)
            await raw.publish(feed, order.model_copy(update={"n": n + 2}).model_dump_json().encode(), key=key)
            await other.publish(keyed, order.model_copy(update={"n": n + 3}))
    await seen.wait_for(241, LONG)
    assert overlaps == [], "two runs of one key at once"
    for key in ("key-0", "key-1", "key-2"):
        numbers = list(dict.fromkeys(n for found, n in seen.items if found == key and n >= 0))
        assert numbers == list(range(80))
    assert await adapter.shards(stage.name("orders")) == 4


# ---------------------------------------------------------------- settling


@conformance(seconds=60)
async def never_more_than_the_window_un_settled(stage: Stage) -> None:
    """C7: a receiver has at most its window of messages un-settled, and gets as many more as are settled, never more at once than it asks
    for; a subscription has no more than its own `window`, and that while its handlers wait."""
    adapter, receiver = await _declared(stage, window=5)
    await _send(stage, adapter, 20)
    held = await take(receiver, 1, LONG)
    asked = await receiver.receive(2, 1.0)
    assert len(asked) <= 2
    held += asked
    held += await take(receiver, 5 - len(held), LONG)
    assert await receiver.receive(10, patient(QUIET)) == []
    receiver.ack(held.pop())
    await receiver.release(held.pop())
    held += await take(receiver, 2, LONG)
    assert await receiver.receive(10, patient(QUIET)) == []
    got = Counter(_bodies(held))
    for received in held:
        receiver.ack(received)
    while len(got) < 18:  # at least: one was acked above, one released
        for received in await take(receiver, 1, LONG):
            got[int(received.envelope.body)] += 1
            receiver.ack(received)

    faulty = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=faulty)
    gate = asyncio.Event()
    most = 0
    seen: Seen[int] = Seen()

    @bus.subscribe(Topic("slow", Order), concurrency=2, window=6)
    async def handle(order: Order) -> None:
        nonlocal most
        received, acked = (sum(len(getattr(source, what)) for source in faulty.receivers) for what in ("received", "acked"))
        most = max(most, received - acked)
        await gate.wait()
        await seen.add(order.n)

    await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish_many(Topic("slow", Order), [Order(n=n) for n in range(50)])
    await eventually(lambda: sum(len(source.received) for source in faulty.receivers) >= 2, LONG)
    await asyncio.sleep(patient(QUIET))
    gate.set()
    await seen.wait_for(50, LONG)
    assert most <= 6
    assert sorted(seen.items) == list(range(50))


@conformance(seconds=60)
async def ack_after_handler_only(stage: Stage) -> None:
    """C3: a message is acked after its handler has returned, and what it returned is published and confirmed; before, it is the group's as
    much as ever: a receiver that ends without a word gives it back."""
    bills = Topic("bills", Order)
    faulty = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=faulty)
    started, gate, sending, confirm = (asyncio.Event() for _ in range(4))

    @bus.subscribe(ORDERS, publish_to=bills)
    async def handle(order: Order) -> Order:
        started.set()
        await gate.wait()
        return order

    worker = await stage.start(bus)
    receivers = faulty.receivers
    publisher = await stage.publisher()
    receipt = await publisher.publish(ORDERS, Order(n=1))
    await asyncio.wait_for(started.wait(), patient(LONG))
    await asyncio.sleep(patient(QUIET))
    assert [receiver.acked for receiver in receivers] == [[]]

    async def hold(_: object) -> None:
        sending.set()
        await confirm.wait()

    faulty.before_send = hold
    gate.set()
    await asyncio.wait_for(sending.wait(), patient(LONG))
    assert [receiver.acked for receiver in receivers] == [[]], "acked before what it returned was confirmed"
    confirm.set()
    await eventually(lambda: receivers[0].acked == [receipt.id])
    await worker.stop()

    adapter, receiver = await _declared(stage, topic="orders", group="seam")
    await _send(stage, adapter, 2)
    first, second = await take(receiver, 2, LONG)
    receiver.ack(first)
    await receiver.close()
    again = await stage.receiver(adapter, stage.receiver_spec(group="seam"))
    taken = await take(again, 1, LONG)
    taken += await again.receive(10, patient(QUIET))
    assert [received.envelope.id for received in taken] == [second.envelope.id]
    again.ack(taken[0])
    await again.close()
    again = await stage.receiver(adapter, stage.receiver_spec(group="seam"))
    assert await again.receive(10, patient(QUIET)) == []


class ConfirmsLate(FaultyReceiver):
    """Stores a copy, and says so only after it may have been handed out: as over a slow link."""

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        [outcome] = await self.adapter.real.send([envelope], timeout=timeout)
        await asyncio.sleep(0.05)
        if outcome is None:
            self.real.ack(received)
        return outcome


@conformance(seconds=60)
async def redeliver_on_handler_error(stage: Stage) -> None:
    """C5: a handler that raises is run again for the same message, with the attempt counted, until it returns; then never again. That the
    confirm of a retry's copy may come after the copy itself changes nothing."""
    for kind in (FaultyReceiver, ConfirmsLate):
        adapter = FaultyAdapter(stage.new_adapter())
        adapter.make_receiver = kind
        bus = stage.bus(adapter=adapter, service=kind.__name__, retry=Retry(attempts=10, wait=AT_ONCE))
        seen: Seen[tuple[int, int, str]] = Seen()

        async def handle(order: Order, context: Context, seen: Seen[tuple[int, int, str]] = seen) -> None:
            await seen.add((order.n, context.attempt, context.id))
            if order.n == 1 and context.attempt < 6:  # more runs than are made without a copy
                raise ValueError("not yet")

        bus.subscribe(ORDERS)(handle)
        worker = await stage.start(bus)
        publisher = await stage.publisher()
        receipt = await publisher.publish(ORDERS, Order(n=1))
        await seen.wait_for(6, LONG)
        last = await publisher.publish(ORDERS, Order(n=2))
        await seen.wait_for(7, LONG)
        await worker.stop()
        assert seen.items == [(1, attempt, receipt.id) for attempt in range(1, 7)] + [(2, 1, last.id)]
        assert await stage.dead_letters(0, group=kind.__name__) == []
        again, left = await stage.collect(ORDERS, service=kind.__name__)
        await asyncio.sleep(patient(QUIET))
        await again.stop()
        assert left.items == []


@conformance(seconds=90)
async def redeliver_on_worker_task_crash(stage: Stage) -> None:
    """C5: what a process had in hand when it died comes to another one, with nothing lost; and a handler whose own task is cancelled has
    failed like any other: it is run again, and the process goes on."""
    bus = stage.bus(retry=Retry(wait=AT_ONCE))
    seen: Seen[tuple[int, int]] = Seen()

    @bus.subscribe(ORDERS, concurrency=2, window=4)
    async def handle(order: Order, context: Context) -> None:
        await seen.add((order.n, context.attempt))
        if order.n == 0 and context.attempt == 1:
            raise asyncio.CancelledError("not from msgbus")
        if order.n > 0:
            await asyncio.Event().wait()  # until the process dies

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order(n=0))
    await seen.wait_for(2, LONG)
    assert seen.items == [(0, 1), (0, 2)]
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(1, 9)])
    await seen.wait_for(4, LONG)
    await worker.kill()
    _, after = await stage.collect(ORDERS)
    await after.wait_until(lambda items: {order.n for order in items} >= set(range(1, 9)), LONG, "all that the dead process had")
    assert Counter(order.n for order in after.items if order.n) == Counter(range(1, 9))


@conformance()
async def receiver_double_ack_is_noop(stage: Stage) -> None:
    """C3: a message that is acked twice is acked once: no error, nothing counted as late, and no other message is settled by it."""
    adapter, receiver = await _declared(stage)
    await _send(stage, adapter, 4)
    taken = sorted(await take(receiver, 4, LONG), key=lambda received: received.envelope.body)
    for _ in range(3):
        receiver.ack(taken[2])
    receiver.ack(taken[1])
    receiver.ack(taken[2])
    await receiver.close()
    assert receiver.stale_acks == 0
    again = await stage.receiver(adapter, stage.receiver_spec())
    left = await take(again, 2, LONG)
    left += await again.receive(10, patient(QUIET))
    got = set(_bodies(left))
    assert got >= {0, 3}, "an ack settled a message that it was not for"
    assert got == {0, 3}


@conformance()
async def a_deliverys_second_word_raises_already_settled(stage: Stage) -> None:
    """C3: of a delivery one word counts: a second one, whichever it is, raises `AlreadySettled`, which names the first, and changes
    nothing."""
    adapter = FaultyAdapter(stage.new_adapter())
    bus = await stage.entered(stage.bus(adapter=adapter))
    words: dict[str, Callable[[Delivery[Order]], Awaitable[None]]] = {
        "ack": lambda delivery: delivery.ack(),
        "retry": lambda delivery: delivery.retry(timedelta(0)),
        "reject": lambda delivery: delivery.reject("never"),
    }
    async with bus.consumer(ORDERS, group="pull") as consumer:
        count = 0
        for first, say_first in words.items():
            for say_second in words.values():
                receipt = await bus.publish(ORDERS, Order(n=count))
                count += 1
                [delivery] = await consumer.receive(timeout=timedelta(seconds=patient(LONG)))
                assert (delivery.context.id, delivery.context.attempt) == (receipt.id, 1)
                await say_first(delivery)
                sent = len(adapter.sent)
                with pytest.raises(AlreadySettled) as caught:
                    await say_second(delivery)
                assert (caught.value.first, caught.value.message_id) == (first, receipt.id)
                assert len(adapter.sent) == sent
                if first == "retry":
                    [again] = await consumer.receive(timeout=timedelta(seconds=patient(LONG)))
                    assert (again.context.id, again.context.attempt) == (receipt.id, 2)
                    await again.ack()
        assert await consumer.receive(10, timedelta(seconds=patient(QUIET))) == []
    assert {letter.error for letter in await stage.dead_letters(3, group="pull")} == {"Reject: never"}


@conformance(seconds=90)
async def ack_stale_is_counted_not_raised(stage: Stage) -> None:
    """C3: an ack that comes too late, because the link was lost and the message goes to another, raises nothing and settles nothing; it is
    counted."""
    adapter, receiver = await _declared(stage)
    await _send(stage, adapter, 3)
    taken = await take(receiver, 3, LONG)
    await stage.crash(adapter)
    peer = await stage.open_adapter()
    other = await stage.receiver(peer, stage.receiver_spec())
    again = await take(other, 3, LONG)
    assert _bodies(again) == [0, 1, 2]
    for received in taken:
        receiver.ack(received)
    await receiver.close()
    await eventually(lambda: receiver.stale_acks == 3, what="three late acks to be counted")
    await other.close()  # un-settled: had a late ack counted, it would not come again
    third = await stage.receiver(peer, stage.receiver_spec())
    assert _bodies(await take(third, 3, LONG)) == [0, 1, 2]


class ReleasesLate(FaultyReceiver):
    """Gives back at once, and returns only after it may have been handed out again: as over a slow link."""

    async def release(self, received: Received) -> None:
        await super().release(received)
        await asyncio.sleep(0.05)


@conformance(seconds=60)
async def release_gives_back_uncounted(stage: Stage) -> None:
    """C10: a message that is given back comes again as if it had not been handed out: no attempt and no death is counted, and once it is
    back it is nobody's: a second word about it changes nothing. Pausing a subscription does that with what has not started."""
    adapter, receiver = await _declared(stage)
    await _send(stage, adapter, 3)
    taken = await take(receiver, 3, LONG)
    for _ in range(8):
        for received in taken:
            await receiver.release(received)
        for received in taken:
            await receiver.release(received)
        taken = await take(receiver, 3, LONG)
        assert _bodies(taken) == [0, 1, 2]
        assert {received.crashes for received in taken} == {0}
        assert {(*received.envelope.headers.items(),) for received in taken} <= {()}
    assert await receiver.receive(10, patient(QUIET)) == []
    for received in taken:
        receiver.ack(received)

    faulty = FaultyAdapter(stage.new_adapter())
    faulty.make_receiver = ReleasesLate
    bus = stage.bus(adapter=faulty, retry=Retry.none())
    gate = asyncio.Event()
    seen: Seen[tuple[int, int]] = Seen()

    @bus.subscribe(Topic("slow", Order), concurrency=1, window=8)
    async def handle(order: Order, context: Context) -> None:
        await gate.wait()
        await seen.add((order.n, context.attempt))

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish_many(Topic("slow", Order), [Order(n=n) for n in range(20)])
    await eventually(lambda: sum(len(source.received) for source in faulty.receivers) >= 2, LONG, "more than runs")
    worker.bus.pause("handle")
    await eventually(lambda: any(source.released for source in faulty.receivers), LONG, "something to be given back")
    worker.bus.resume("handle")
    gate.set()
    await seen.wait_for(20, LONG)
    assert sorted(seen.items) == [(n, 1) for n in range(20)]


@conformance(seconds=60)
async def reject_dead_letters(stage: Stage) -> None:
    """C8: a message that its handler rejects is run once, and is a dead letter with the handler's reason and its own bytes; the group is
    not sent it again. So it is with a delivery that was pulled."""
    bus = stage.bus(retry=Retry(wait=AT_ONCE))
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)
        if order.n == 1:
            raise Reject("card stolen")

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    receipt = await publisher.publish(ORDERS, Order(n=1, text="ü"), headers={"tenant": "a"})
    await publisher.publish(ORDERS, Order(n=2))
    await seen.wait_for(2, LONG)
    [letter] = await stage.dead_letters(1)
    await worker.stop()
    assert sorted(seen.items) == [1, 2]
    assert (letter.id, letter.reason, letter.error, letter.attempts) == (receipt.id, "rejected", "Reject: card stolen", 1)
    assert (letter.body, letter.headers) == (Order(n=1, text="ü").model_dump_json().encode(), {"tenant": "a"})

    async with publisher.consumer(ORDERS, group="pull") as consumer:
        await publisher.publish(ORDERS, Order(n=3))
        [delivery] = await consumer.receive(timeout=timedelta(seconds=patient(LONG)))
        await delivery.reject("torn")
    [letter] = await stage.dead_letters(1, group="pull")
    assert (letter.reason, letter.error, letter.body) == ("rejected", "Reject: torn", Order(n=3).model_dump_json().encode())
    async with publisher.consumer(ORDERS, group="pull") as consumer:
        assert await consumer.receive(10, timedelta(seconds=patient(QUIET))) == []


@conformance(seconds=60)
async def continue_after_errors(stage: Stage) -> None:
    """C8: a subscription goes on after whatever its messages do to it: errors, rejections, drops, bodies that do not fit, exceptions of
    every kind. The good ones among them are all handled, and each bad one ends where it should."""
    bus = stage.bus(retry=Retry(attempts=2, wait=AT_ONCE))
    done: Seen[int] = Seen()
    failed: Counter[int] = Counter()
    errors: list[Callable[[], BaseException]] = [
        lambda: ValueError("wrong"),
        lambda: Reject("no"),
        lambda: Drop("nothing to do"),
        asyncio.CancelledError,
        lambda: ExceptionGroup("several", [KeyError("a"), TypeError("b")]),
        StopAsyncIteration,
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        lambda: RecursionError("deep"),
    ]

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        if order.n % 3 == 1:
            failed[order.n] += 1
            raise errors[order.n // 3 % len(errors)]()
        await done.add(order.n)

    await stage.start(bus)
    publisher = await stage.publisher()
    raw = Topic("orders", bytes, content_type="application/json")
    feed = await stage.entered(stage.bus(service="feed"))
    for n in range(48):
        if n % 3 == 2:
            await feed.publish(raw, b'{"id": "a", "n": "many"' if n % 2 else b'{"n": "many"}')
        else:
            await publisher.publish(ORDERS, Order(n=n))
    await done.wait_for(16, LONG)
    bad = [n for n in range(48) if n % 3 == 1]
    dropped = {n for n in bad if isinstance(errors[n // 3 % len(errors)](), Drop)}
    letters = await stage.dead_letters(16 + len(bad) - len(dropped), seconds=LONG)
    assert sorted(done.items) == [n for n in range(48) if n % 3 == 0]
    assert Counter(letter.reason for letter in letters) == {"invalid": 16, "rejected": 2, "exhausted": len(bad) - len(dropped) - 2}
    once = (Drop, Reject)
    assert failed == {n: 1 if isinstance(errors[n // 3 % len(errors)](), once) else 2 for n in bad}


# ---------------------------------------------------------------- ends


@conformance(seconds=90)
async def continue_after_subscriber_close_no_loss(stage: Stage) -> None:
    """C10, C2: a process that stops in the middle leaves the rest to the next one: all is handled, no attempt is used up by the stop, and
    at most what was un-settled is repeated."""
    seen: Seen[tuple[int, int]] = Seen()

    async def start() -> Worker:
        bus = stage.bus()

        @bus.subscribe(ORDERS, concurrency=4, window=8)
        async def handle(order: Order, context: Context) -> None:
            await asyncio.sleep(0.002)
            await seen.add((order.n, context.attempt))

        return await stage.start(bus)

    publisher = await stage.publisher()
    publishing = asyncio.create_task(publisher.publish_many(ORDERS, [Order(n=n) for n in range(300)]))
    for enough in (30, 90, 150):
        worker = await start()
        await seen.wait_for(enough, LONG)
        await worker.stop()
    await start()
    assert await publishing == 300
    await seen.wait_until(lambda items: {n for n, _ in items} == set(range(300)), LONG, "all of them")
    assert {attempt for _, attempt in seen.items} == {1}
    assert len(seen.items) <= 300 + 3 * 8


@conformance(seconds=90)
async def concurrent_close_safe(stage: Stage) -> None:
    """C10: closing is safe however often and whatever else happens: workers that stop at once, and twice, lose nothing; a receiver or an
    adapter that is closed again, or told a word afterwards, stays closed and raises nothing."""
    seen: Seen[int] = Seen()

    async def start() -> Worker:
        bus = stage.bus()

        @bus.subscribe(ORDERS, concurrency=2)
        async def handle(order: Order) -> None:
            await asyncio.sleep(0.001)
            await seen.add(order.n)

        return await stage.start(bus)

    workers = [await start(), await start()]
    publisher = await stage.publisher()
    publishing = asyncio.create_task(publisher.publish_many(ORDERS, [Order(n=n) for n in range(200)]))
    await seen.wait_for(20, LONG)
    async with asyncio.timeout(patient(15)):
        await asyncio.gather(*(worker.stop() for worker in workers * 3))
    await publishing
    await start()
    await seen.wait_until(lambda items: set(items) == set(range(200)), LONG, "all of them")

    adapter, receiver = await _declared(stage, topic="orders", group="seam")
    await _send(stage, adapter, 5)
    taken = await take(receiver, 3, LONG)
    waiting = asyncio.create_task(receiver.receive(1, 0.0))
    await asyncio.wait([waiting])
    async with asyncio.timeout(patient(15)):
        await receiver.drain()
        await receiver.drain()
        await receiver.close()
        await receiver.close()
        for received in taken:
            receiver.ack(received)
            await receiver.release(received)
        await receiver.drain()
        await asyncio.gather(adapter.close(), adapter.close(), receiver.close())
        await adapter.close()
        with contextlib.suppress(BrokerError):
            assert await receiver.receive(1, 0.1) == []
        with pytest.raises(BrokerError):
            await adapter.open_receiver(stage.receiver_spec(group="seam"))
    await adapter.open()
    again = await stage.receiver(adapter, stage.receiver_spec(group="seam"))
    assert _bodies(await take(again, 5, LONG)) == [0, 1, 2, 3, 4]


@conformance(seconds=90)
async def subscriber_ctx_cancel_stops(stage: Stage) -> None:
    """C10: cancelling what consumes ends it, within `drain_timeout` and `close_timeout`: a handler that will not end is cancelled, its
    message is the group's again, and its attempt is not counted. Cancelling a `receive` loses nothing."""
    settings = stage.settings(drain_timeout=timedelta(seconds=0.3), close_timeout=timedelta(seconds=2))
    bus = stage.bus(settings=settings)
    seen: Seen[tuple[int, int]] = Seen()
    cancelled: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await seen.add((order.n, context.attempt))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await cancelled.add(order.n)
            raise

    async def consume() -> None:
        async with bus.running():
            await asyncio.Event().wait()

    publisher = await stage.publisher()
    consuming = asyncio.create_task(consume())
    await publisher.publish(ORDERS, Order(n=1))
    await seen.wait_for(1, LONG)
    consuming.cancel()
    await asyncio.wait([consuming], timeout=patient(0.3 + 2 + 1))
    assert consuming.cancelled()
    assert cancelled.items == [1]
    assert bus.runners == ()

    pull = await stage.entered(stage.bus(service="suite"))
    async with pull.consumer(ORDERS, group="suite", window=100) as consumer:
        got: dict[int, int] = {}
        [first] = await consumer.receive(timeout=timedelta(seconds=patient(LONG)))
        assert (first.message.n, first.context.attempt) == (1, 1)
        publishing = asyncio.create_task(publisher.publish_many(ORDERS, [Order(n=n) for n in range(2, 52)]))
        async with asyncio.timeout(patient(LONG)):
            for turn in range(10**6):
                receiving = asyncio.create_task(consumer.receive(3))
                for _ in range(turn % 5):
                    await asyncio.sleep(0)
                if turn % 3:
                    await asyncio.wait([receiving], timeout=0.05)
                receiving.cancel()
                await asyncio.wait([receiving])
                if not receiving.cancelled():
                    got |= {delivery.message.n: delivery.context.attempt for delivery in receiving.result()}
                if len(got) == 50:
                    break
        assert await publishing == 50
        assert got == dict.fromkeys(range(2, 52), 1)


_tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


@conformance(seconds=60)
async def message_ctx_isolated_between_messages(stage: Stage) -> None:
    """C4: each message has a context of its own: what a handler sets in a context variable no other run sees, and what it publishes follows
    from its own message, however many run at once."""
    results = Topic("results", Order)
    bus = stage.bus()
    wrong: list[str] = []
    seen: Seen[tuple[int, str, str | None]] = Seen()
    contexts: dict[int, Context] = {}

    async def handle(order: Order, context: Context) -> None:
        if _tenant.get() is not None:
            wrong.append(f"message {order.n} sees {_tenant.get()}")
        _tenant.set(context.id)
        await asyncio.sleep(0.001 * (order.n % 4))
        if _tenant.get() != context.id:
            wrong.append(f"message {order.n} has lost its own")
        contexts[order.n] = context
        await bus.publish(results, order)

    bus.subscribe(ORDERS, name="many", concurrency=16)(handle)
    bus.subscribe(ORDERS, name="one", concurrency=1)(handle)

    @bus.subscribe(results)
    async def collect(order: Order, context: Context) -> None:
        await seen.add((order.n, context.correlation_id, context.causation_id))

    await stage.start(bus)
    publisher = await stage.publisher()
    ids = [(await publisher.publish(ORDERS, Order(n=n))).id for n in range(40)]
    await seen.wait_for(80, LONG)
    assert wrong == []
    assert Counter(seen.items) == {(n, ids[n], ids[n]): 2 for n in range(40)}
    assert {n: context.id for n, context in contexts.items()} == dict(enumerate(ids))
