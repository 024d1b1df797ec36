"""Conformance: consuming. C3 and C5 to C8 of the contract: what settles a message, and what comes again."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import timedelta

import pytest
from tenacity import wait_fixed

from msgbus.consumer import Delivery
from msgbus.context import Context
from msgbus.contract.adapter import Received, SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus.errors import AlreadySettled, BrokerError, Drop, Reject
from msgbus.retry import Retry
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import QUIET, Order, Seen, Stage, Worker, conformance, eventually, patient, take
from msgbus.testing.steps import LONG, declared, numbers_of, send_numbered
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
AT_ONCE = wait_fixed(0)


# ---------------------------------------------------------------- settling


@conformance(seconds=60)
async def never_more_than_the_window_un_settled(stage: Stage) -> None:
    """C7: a receiver has at most its window of messages un-settled, and gets as many more as are settled, never more at once than it asks
    for; a subscription has no more than its own `window`, and that while its handlers wait."""
    adapter, receiver = await declared(stage, window=5)
    await send_numbered(stage, adapter, 20)
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
    got = Counter(numbers_of(held))
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

    adapter, receiver = await declared(stage, topic="orders", group="seam")
    await send_numbered(stage, adapter, 2)
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
        await asyncio.sleep(0.05)  # the slow link
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
    adapter, receiver = await declared(stage)
    await send_numbered(stage, adapter, 4)
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
    got = set(numbers_of(left))
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
    adapter, receiver = await declared(stage)
    await send_numbered(stage, adapter, 3)
    taken = await take(receiver, 3, LONG)
    await stage.crash(adapter)
    peer = await stage.open_adapter()
    other = await stage.receiver(peer, stage.receiver_spec())
    again = await take(other, 3, LONG)
    assert numbers_of(again) == [0, 1, 2]
    for received in taken:
        receiver.ack(received)
    await receiver.close()
    await eventually(lambda: receiver.stale_acks == 3, what="three late acks to be counted")
    await other.close()  # un-settled: had a late ack counted, it would not come again
    third = await stage.receiver(peer, stage.receiver_spec())
    assert numbers_of(await take(third, 3, LONG)) == [0, 1, 2]


class ReleasesLate(FaultyReceiver):
    """Gives back at once, and returns only after it may have been handed out again: as over a slow link."""

    async def release(self, received: Received) -> None:
        await super().release(received)
        await asyncio.sleep(0.05)  # the slow link


@conformance(seconds=60)
async def release_gives_back_uncounted(stage: Stage) -> None:
    """C10: a message that is given back comes again as if it had not been handed out: no attempt and no death is counted, and once it is
    back it is nobody's: a second word about it changes nothing. Pausing a subscription does that with what has not started."""
    adapter, receiver = await declared(stage)
    await send_numbered(stage, adapter, 3)
    taken = await take(receiver, 3, LONG)
    for _ in range(8):
        for received in taken:
            await receiver.release(received)
        for received in taken:
            await receiver.release(received)
        taken = await take(receiver, 3, LONG)
        assert numbers_of(taken) == [0, 1, 2]
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
            await asyncio.sleep(0.002)  # its work
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
            await asyncio.sleep(0.001)  # its work
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

    adapter, receiver = await declared(stage, topic="orders", group="seam")
    await send_numbered(stage, adapter, 5)
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
    assert numbers_of(await take(again, 5, LONG)) == [0, 1, 2, 3, 4]


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
