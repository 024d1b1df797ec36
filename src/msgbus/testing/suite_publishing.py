"""Conformance: publishing. C1 of the contract: what a returned, a raised and a cancelled publish mean."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import pytest
from tenacity import wait_fixed

from msgbus.bus import Bus
from msgbus.context import Context
from msgbus.contract.adapter import Adapter, Capability, ReceiverSpec, SendOutcome
from msgbus.contract.envelope import HEADROOM, MAX_HEADERS, MAX_HEADERS_TOTAL, MAX_ID, Envelope
from msgbus.errors import (
    BrokerError,
    BrokerUnavailable,
    BusNotEntered,
    EncodeError,
    MessageTooLarge,
    PublishManyError,
    PublishRejected,
    PublishUnknown,
)
from msgbus.publishing import Receipt
from msgbus.retry import Retry
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import QUIET, Order, Seen, Stage, conformance, eventually, patient, take
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
KEYED = Topic("keyed", Order, key="id")
BILLS = Topic("bills", Order)
BLOBS = Topic("blobs", bytes)

SEND_TIMEOUT = 10.0


class LateReplies(FaultyAdapter):
    """Stores at once and answers when the `gate` is open."""

    def __init__(self, real: Adapter) -> None:
        super().__init__(real)
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        outcomes = await super().send(envelopes, timeout=timeout)
        await self.gate.wait()
        return outcomes


async def _ids_seen(stage: Stage, *topics: Topic[Order], service: str = "suite") -> Seen[tuple[str, Order]]:
    """What a worker of these topics is given, with the ids."""
    bus = stage.bus(service=service)
    seen: Seen[tuple[str, Order]] = Seen()

    async def handle(order: Order, context: Context) -> None:
        await seen.add((context.id, order))

    for topic in topics:
        bus.subscribe(topic)(handle)
    await stage.start(bus)
    return seen


def _number(envelope: Envelope) -> int:
    return Order.model_validate_json(envelope.body).n


@conformance(seconds=60)
async def publish_returns_after_confirm(stage: Stage) -> None:
    """C1: when `publish` returns, the message is kept: a process that dies right after it loses nothing."""
    bus = stage.bus()
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    worker = await stage.start(bus)
    publisher = stage.bus(service="publisher")
    async with publisher:
        receipt = await publisher.publish(ORDERS, Order(n=1))
        assert receipt.state == "confirmed"
        adapter = publisher.given_adapter
        assert adapter is not None
        await stage.crash(adapter)
    await seen.wait_for(1)
    await worker.stop()
    assert seen.items == [1]


@conformance(seconds=60)
async def publish_before_any_group_is_kept_for_the_first(stage: Stage) -> None:
    """C1: publishing to a topic that no group has ever claimed is no error: what is confirmed waits for the first group, whoever sent it
    may be gone by then."""
    async with stage.bus(service="publisher") as publisher:
        receipts = [await publisher.publish(ORDERS, Order(n=n)) for n in range(5)]
    assert [receipt.state for receipt in receipts] == ["confirmed"] * 5
    seen = await _ids_seen(stage, ORDERS)
    await seen.wait_for(5, 30)
    assert sorted((order.n, message_id) for message_id, order in seen.items) == [(n, receipt.id) for n, receipt in enumerate(receipts)]


@conformance()
async def publish_too_large_rejected(stage: Stage) -> None:
    """C1: a message over the limit is `MessageTooLarge`, which names the limit, before anything is sent; the next message is not in its
    way."""
    adapter = FaultyAdapter(stage.new_adapter())
    asked: list[Envelope] = []

    async def note(envelopes: Sequence[Envelope]) -> None:
        asked.extend(envelopes)

    adapter.before_send = note
    _, seen = await stage.collect(BLOBS)
    publisher = await stage.entered(stage.bus(adapter=adapter, service="publisher"))
    limit = adapter.limits.body - HEADROOM
    with pytest.raises(MessageTooLarge, match=str(limit)):
        await publisher.publish(BLOBS, bytes(limit + 1))
    with pytest.raises(PublishManyError) as caught:
        await publisher.publish_many(BLOBS, [bytes(limit + 1)])
    assert isinstance(caught.value.__cause__, MessageTooLarge)
    assert asked == [], "something was sent"
    await publisher.publish(BLOBS, b"small")
    await seen.wait_for(1)
    assert seen.items == [b"small"]


@conformance()
async def publish_timeout_is_unknown(stage: Stage) -> None:
    """C1: a publish that hears nothing within `publish_timeout` raises `PublishUnknown` with the message's id, at most about a second
    later. The message may be stored, here it is; published again with that id, it is the same message."""
    timeout = patient(0.7)
    settings = stage.settings(publish_timeout=timedelta(seconds=timeout))
    async with stage.bus(service="setup") as setup:  # making topics may take longer than that
        await setup.publish(ORDERS, Order(n=0))
    seen = await _ids_seen(stage, ORDERS)
    adapter = LateReplies(stage.new_adapter(settings))
    publisher = await stage.entered(stage.bus(adapter=adapter, settings=settings, service="publisher"))
    await publisher.publish(ORDERS, Order(n=1))

    adapter.gate.clear()
    began = time.monotonic()
    with pytest.raises(PublishUnknown) as caught:
        await publisher.publish(ORDERS, Order(n=2))
    took = time.monotonic() - began
    assert timeout * 0.9 <= took <= timeout + patient(2.0)
    adapter.gate.set()
    receipt = await publisher.publish(ORDERS, Order(n=2), id=caught.value.message_id)
    assert receipt == Receipt(caught.value.message_id, "orders", "confirmed")
    await seen.wait_until(lambda items: {order.n for _, order in items} == {0, 1, 2})
    assert {message_id for message_id, order in seen.items if order.n == 2} == {caught.value.message_id}


@conformance()
async def publish_cancel_is_unknown_never_swallowed(stage: Stage) -> None:
    """C1: cancelling `publish` leaves the message unknown (it may be stored, here it is), and the cancellation reaches the caller at once;
    publishes that travel with it go on."""
    seen = await _ids_seen(stage, ORDERS)
    adapter = LateReplies(stage.new_adapter())
    publisher = await stage.entered(stage.bus(adapter=adapter, service="publisher"))
    await publisher.publish(ORDERS, Order(n=0))

    def publish(n: int) -> asyncio.Task[Receipt]:
        return asyncio.create_task(publisher.publish(ORDERS, Order(n=n)))

    adapter.gate.clear()
    alone = publish(1)
    await eventually(lambda: len(adapter.sent) == 2, what="the first to be sent")
    together, survivor = publish(2), publish(3)
    await asyncio.sleep(0)
    alone.cancel()
    await asyncio.wait([alone], timeout=patient(1.0))
    assert alone.cancelled()
    await eventually(lambda: len(adapter.sent) == 4, what="the others to be sent")
    together.cancel()
    await asyncio.wait([together], timeout=patient(1.0))
    assert together.cancelled()
    assert not survivor.done()
    adapter.gate.set()
    assert (await survivor).state == "confirmed"

    adapter.gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await publisher.publish(ORDERS, Order(n=4))
    adapter.gate.set()
    await publisher.publish(ORDERS, Order(n=5))
    wanted = {_number(envelope) for envelope in adapter.sent}
    assert wanted >= {0, 1, 2, 3, 5}
    await seen.wait_until(lambda items: {order.n for _, order in items} == wanted, what=f"{wanted}")


@conformance()
async def publish_after_close_raises(stage: Stage) -> None:
    """C1: a bus that was left publishes nothing and says so (`BusNotEntered`); a closed adapter answers `BrokerUnavailable` for each
    envelope: stored nowhere. Both can be opened again."""
    seen = await _ids_seen(stage, ORDERS)
    adapter = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=adapter, service="publisher")
    publisher = bus.publisher(ORDERS)
    async with bus:
        await publisher.publish(Order(n=0))
    for _ in range(2):
        with pytest.raises(BusNotEntered):
            await bus.publish(ORDERS, Order(n=1))
        with pytest.raises(BusNotEntered):
            await bus.publish_many(ORDERS, [Order(n=1)])
        with pytest.raises(BusNotEntered):
            await publisher.publish(Order(n=1))
    outcomes = await adapter.real.send([stage.envelope(), stage.envelope()], timeout=1.0)
    assert [type(outcome) for outcome in outcomes] == [BrokerUnavailable] * 2
    assert len(adapter.sent) == 1
    async with bus:
        await publisher.publish(Order(n=2))
    await seen.wait_until(lambda items: any(order.n == 2 for _, order in items))
    assert [order.n for _, order in seen.items] == [0, 2]


@conformance()
async def publish_before_start_raises(stage: Stage) -> None:
    """C1: a bus that is not entered publishes nothing and opens nothing: `BusNotEntered`, which says how to enter it."""
    adapter = FaultyAdapter(stage.new_adapter())
    adapter.away = True  # whoever touches the broker too early is told so
    bus = stage.bus(adapter=adapter)
    publisher = bus.publisher(ORDERS)
    with pytest.raises(BusNotEntered, match="async with bus"):
        await bus.publish(ORDERS, Order(n=1))
    with pytest.raises(BusNotEntered):
        await bus.publish_many(ORDERS, [Order(n=1)])
    with pytest.raises(BusNotEntered):
        await publisher.publish(Order(n=1))
    adapter.away = False
    seen = await _ids_seen(stage, ORDERS)
    async with bus:
        await publisher.publish(Order(n=2))
    await seen.wait_for(1)
    assert [order.n for _, order in seen.items] == [2]


@conformance(needs=Capability.SHARDS, seconds=60)
async def publish_many_keeps_order_and_reports_the_first_unconfirmed(stage: Stage) -> None:
    """C4, C1: `publish_many` keeps the order of its iterable within a key. At the first failure it stops reading, waits for what is under
    way, and raises `PublishManyError`: how many are confirmed, how many are not, and where the first of those stood."""
    seen = await _ids_seen(stage, KEYED)
    adapter = FaultyAdapter(stage.new_adapter())
    publisher = await stage.entered(stage.bus(adapter=adapter, service="publisher"))
    orders = [Order(id=f"key-{n % 7}", n=n) for n in range(700)]
    assert await publisher.publish_many(KEYED, orders) == 700
    await seen.wait_for(700, 30)
    for key in {order.id for order in orders}:
        numbers = list(dict.fromkeys(order.n for _, order in seen.items if order.id == key))  # the first time of each
        assert numbers == [order.n for order in orders if order.id == key]

    adapter.sent.clear()
    adapter.on_send = lambda envelope: PublishRejected("full") if _number(envelope) == 1300 else None
    read: list[int] = []

    def endless() -> Iterator[Order]:
        for n in range(1000, 101_000):
            read.append(n)
            yield Order(id=f"key-{n % 7}", n=n)

    with pytest.raises(PublishManyError) as caught:
        await publisher.publish_many(KEYED, endless())
    error = caught.value
    assert isinstance(error.__cause__, PublishRejected)
    assert (error.first_unconfirmed, error.failed) == (300, 1)
    assert "full" in str(error)
    assert error.confirmed == len(adapter.sent)
    assert len(read) < 5000, "it went on reading after the failure"
    stored = {_number(envelope) for envelope in adapter.sent}
    await seen.wait_until(lambda items: {order.n for _, order in items if order.n >= 1000} == stored, 30, "what was confirmed")

    misfit = cast(Order, {"id": "a"})  # a type checker refuses it, and so does msgbus
    with pytest.raises(PublishManyError) as caught:
        await publisher.publish_many(KEYED, [Order(n=1), Order(n=2), misfit, Order(n=3)])
    assert (caught.value.confirmed, caught.value.first_unconfirmed) == (2, 2)
    assert isinstance(caught.value.__cause__, EncodeError)


@conformance()
async def send_gives_one_outcome_an_envelope(stage: Stage) -> None:
    """The seam, `Adapter.send`: one outcome for each envelope, in order, whatever topics they go to and however many calls are made at
    once; None means that it arrives, once, with what it carried. An envelope for one group reaches that group alone."""
    adapter = await stage.open_adapter()
    receivers = [stage.receiver_spec(topic, group, window=100) for topic in ("orders", "bills") for group in ("workers", "others")]
    await adapter.declare([stage.topic_spec("orders"), stage.topic_spec("bills")], receivers)
    assert await adapter.send([], timeout=SEND_TIMEOUT) == []
    envelopes = [stage.envelope("orders" if n % 3 else "bills", b"%d" % n) for n in range(60)]
    calls = [adapter.send(envelopes[start : start + 20], timeout=SEND_TIMEOUT) for start in (0, 20, 40)]
    for outcomes in await asyncio.gather(*calls):
        assert outcomes == [None] * 20
    only = stage.envelope("orders", b"only", group="workers")
    assert await adapter.send([only], timeout=SEND_TIMEOUT) == [None]

    async def check(spec: ReceiverSpec) -> None:
        receiver = await stage.receiver(adapter, spec)
        wanted = [envelope for envelope in envelopes if envelope.topic == spec.topic]
        if (spec.topic, spec.group) == (only.topic, only.group):
            wanted.append(only)
        taken = await take(receiver, len(wanted), 30)
        taken += await receiver.receive(10, patient(QUIET))
        got = sorted((received.envelope.id, received.envelope.body, received.envelope.topic) for received in taken)
        assert got == sorted((envelope.id, envelope.body, envelope.topic) for envelope in wanted)
        for received in taken:
            receiver.ack(received)

    await asyncio.gather(*(check(spec) for spec in receivers))


@conformance(seconds=60)
async def a_bad_envelope_does_not_fail_its_batch_mates_wrongly(stage: Stage) -> None:
    """C1: of messages that travel together, one that is refused is the only one that is: its mates are stored where they are confirmed,
    and nothing that is reported as stored nowhere is ever delivered."""
    adapter = await stage.open_adapter()
    await adapter.declare([stage.topic_spec()], [stage.receiver_spec(window=200)])
    refused: set[str] = set()
    confirmed: set[str] = set()
    unknown: set[str] = set()
    for position in (0, 5, 9):
        batch = [stage.envelope(body=b"good") for _ in range(10)]
        bad = batch[position] = stage.envelope(body=bytes(adapter.limits.body + 1))
        outcomes = await adapter.send(batch, timeout=SEND_TIMEOUT)
        assert len(outcomes) == 10
        for envelope, outcome in zip(batch, outcomes, strict=True):
            into = confirmed if outcome is None else unknown if isinstance(outcome, PublishUnknown) else refused
            into.add(envelope.id)
        assert bad.id in refused, f"{adapter.limits.body + 1} bytes: {outcomes[position]!r}"
    assert refused.isdisjoint(confirmed)
    good = stage.envelope(body=b"good")
    assert await adapter.send([good], timeout=SEND_TIMEOUT) == [None]
    confirmed.add(good.id)
    receiver = await stage.receiver(adapter, stage.receiver_spec(window=200))
    taken = await take(receiver, len(confirmed), 30)
    taken += await receiver.receive(100, patient(QUIET))
    arrived = {received.envelope.id for received in taken}
    assert confirmed <= arrived <= confirmed | unknown

    faulty = FaultyAdapter(stage.new_adapter())
    faulty.on_send = lambda envelope: PublishRejected("this one") if _number(envelope) % 10 == 3 else None
    faulty.before_send = lambda _: asyncio.sleep(0.001)  # so that the others gather behind the first
    publisher = await stage.entered(stage.bus(adapter=faulty, service="publisher"))
    results = await asyncio.gather(*(publisher.publish(BILLS, Order(n=n)) for n in range(100)), return_exceptions=True)
    for n, result in enumerate(results):
        assert isinstance(result, PublishRejected if n % 10 == 3 else Receipt), f"number {n}: {result!r}"


@conformance(seconds=60)
async def dead_letter_copy_fits_at_the_size_limit(stage: Stage) -> None:
    """C9: the largest message that can be published, with the most headers, fits into every copy that msgbus makes of it: those of its
    retries, and its dead letter, which has its bytes and headers unchanged beside the record of its death."""
    bus = stage.bus(retry=Retry(attempts=5, wait=wait_fixed(0)))  # more than are made without a copy
    runs: Seen[int] = Seen()

    @bus.subscribe(BLOBS)
    async def handle(blob: bytes, context: Context) -> None:
        await runs.add(context.attempt)
        raise ValueError("no, " * 5000)

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    largest = bytes(range(256)) * ((worker.adapter.limits.body - HEADROOM) // 256)
    largest += b"." * (worker.adapter.limits.body - HEADROOM - len(largest))
    headers = {f"h{n:02}": "v" * (MAX_HEADERS_TOTAL // MAX_HEADERS - 3) for n in range(MAX_HEADERS)}
    receipt = await publisher.publish(BLOBS, largest, headers=headers, id="i" * MAX_ID, key="k" * MAX_ID)
    await runs.wait_for(5, 30)
    [letter] = await stage.dead_letters(1, "blobs")
    assert runs.items == [1, 2, 3, 4, 5]
    assert letter.id == receipt.id
    assert letter.body == largest
    assert letter.headers == headers
    assert (letter.reason, letter.attempts) == ("exhausted", 5)


@conformance(seconds=60)
async def publish_concurrent_1000_all_confirmed(stage: Stage) -> None:
    """C1: a thousand publishes at once are each confirmed, each its own message, and all arrive, once."""
    seen = await _ids_seen(stage, ORDERS)
    publisher = await stage.publisher()
    receipts = await asyncio.gather(*(publisher.publish(ORDERS, Order(n=n)) for n in range(1000)))
    assert {receipt.state for receipt in receipts} == {"confirmed"}
    await seen.wait_for(1000, 30)
    assert sorted((order.n, message_id) for message_id, order in seen.items) == [(n, receipt.id) for n, receipt in enumerate(receipts)]


@conformance(seconds=60)
async def close_flushes_pending_publishes(stage: Stage) -> None:
    """C10: leaving the bus waits for the publishes that are under way, `close_timeout` at most: they are confirmed, and arrive. Those that
    have no answer by then end too, with an error that says what became of them; none hangs."""
    seen = await _ids_seen(stage, ORDERS)
    gate = asyncio.Event()
    asked: list[Envelope] = []

    async def hold(envelopes: Sequence[Envelope]) -> None:
        asked.extend(envelopes)
        await gate.wait()

    def publishes(bus: Bus, start: int) -> list[asyncio.Task[Any]]:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(bus.publish(ORDERS, Order(n=n))) for n in range(start, start + 20)]
        return [*tasks, asyncio.create_task(bus.publish_many(ORDERS, [Order(n=n) for n in range(start + 20, start + 50)]))]

    adapter = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=adapter, service="publisher")
    async with bus:
        await bus.publish(ORDERS, Order(n=-1))
        adapter.before_send = hold
        pending = publishes(bus, 0)
        await eventually(lambda: len(asked) >= 31, what="publishes under way")
        asyncio.get_running_loop().call_later(0.2, gate.set)
    assert [type(result) for result in await asyncio.gather(*pending)] == [Receipt] * 20 + [int]
    await seen.wait_for(51, 30)
    assert sorted(order.n for _, order in seen.items) == list(range(-1, 50))

    gate.clear()
    asked.clear()
    adapter.before_send = None
    settings = stage.settings(close_timeout=timedelta(seconds=1), publish_timeout=timedelta(seconds=patient(1)))
    adapter = FaultyAdapter(stage.new_adapter(settings))
    bus = stage.bus(adapter=adapter, settings=settings, service="publisher")
    async with bus:
        await bus.publish(ORDERS, Order(n=50))
        adapter.before_send = hold
        pending = publishes(bus, 1000)
        await eventually(lambda: len(asked) >= 31, what="publishes under way")
        began = time.monotonic()
    assert time.monotonic() - began <= 1.0 + patient(1.0)
    async with asyncio.timeout(patient(4.0)):
        results = await asyncio.gather(*pending, return_exceptions=True)
    for result in results:
        assert isinstance(result, BrokerError), repr(result)


@conformance(seconds=60)
async def same_message_id_concurrently_no_cross_talk(stage: Stage) -> None:
    """C1: publishes under way with one id do not mix up their outcomes: who is confirmed is stored, whatever becomes of the other."""
    seen = await _ids_seen(stage, ORDERS, BILLS)
    faulty = FaultyAdapter(stage.new_adapter())
    publisher = await stage.entered(stage.bus(adapter=faulty, service="publisher"))
    for n in range(10):
        pair = (
            publisher.publish(ORDERS, Order(n=n, text="order"), id=f"same-{n}"),
            publisher.publish(BILLS, Order(n=n, text="bill"), id=f"same-{n}"),
        )
        assert [receipt.id for receipt in await asyncio.gather(*pair)] == [f"same-{n}"] * 2
    await seen.wait_for(20, 30)
    wanted = sorted((f"same-{n}", n, text) for n in range(10) for text in ("order", "bill"))
    assert sorted((message_id, order.n, order.text) for message_id, order in seen.items) == wanted

    faulty.on_send = lambda envelope: PublishRejected("bills") if envelope.topic == stage.name("bills") else None
    for n in range(10, 20):
        pair = publisher.publish(ORDERS, Order(n=n), id=f"same-{n}"), publisher.publish(BILLS, Order(n=n), id=f"same-{n}")
        good, bad = await asyncio.gather(*pair, return_exceptions=True)
        assert isinstance(good, Receipt)
        assert isinstance(bad, PublishRejected)
    await seen.wait_for(30, 30)

    adapter = await stage.open_adapter()
    for n in range(20, 40):  # the broker's own refusal: nowhere to go, as the group does not exist
        envelope = stage.envelope(body=Order(n=n).model_dump_json().encode(), id=f"same-{n}")
        lost = stage.envelope("nowhere", id=f"same-{n}", group="nobody")
        first, second = (envelope, lost) if n % 2 else (lost, envelope)
        outcomes = await asyncio.gather(adapter.send([first], timeout=SEND_TIMEOUT), adapter.send([second], timeout=SEND_TIMEOUT))
        assert outcomes[0 if n % 2 else 1] == [None]
    await seen.wait_until(lambda items: {order.n for _, order in items} == set(range(40)), 30)
