"""Conformance: dead letters. C8 and C9 of the contract: what is given up, its record, and its way back."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from datetime import datetime, timedelta

import pytest
from tenacity import wait_fixed

from msgbus.bus import Bus
from msgbus.context import Context
from msgbus.contract.adapter import Peekable
from msgbus.contract.address import dead_topic
from msgbus.dead_letters import MAX_REDRIVES, DeadLetter
from msgbus.errors import BrokerUnavailable, PublishRejected, Reject, UnsupportedFeature
from msgbus.inbound.intake import POLL
from msgbus.retry import Retry
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import Order, Seen, Stage, conformance, eventually
from msgbus.testing.steps import EARLY, QUICK, counted, state_of
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)


@conformance()
async def invalid_payload_to_dlq_bytes_identical(stage: Stage) -> None:
    """C8: a body that does not fit the model, whoever sent it, never reaches the handler, is not retried, and is kept as a dead letter
    byte for byte, with the reason; the good message behind it is not held up."""
    worker, seen = await stage.collect(ORDERS, retry=Retry(attempts=5, wait=wait_fixed(30)))
    adapter = await stage.open_adapter()
    bodies = [
        b"",
        b"{",
        b"\x00\xff\xfe binary \r\n\x00",
        b'{"id": "a", "n": "many"}',
        b'{"id": "\xe4", "n": 1}',
        b'["id"]',
        b"null",
        b'{"n":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"n": 1' + b"0" * 5000 + b"}",
        bytes(range(256)) * 64,
    ]
    sending = [stage.envelope(body=body) for body in bodies]
    sending.append(stage.envelope(body=b'{"id": "a"}', headers={"content-type": "application/x-python-serialize"}))
    sending.append(stage.envelope(body=b'{"id": "good"}'))
    assert await adapter.send(sending, timeout=5) == [None] * len(sending)
    await seen.wait_for(1)
    letters = {letter.id: letter for letter in await stage.dead_letters(len(sending) - 1)}
    for envelope in sending[:-1]:
        letter = letters[envelope.id]
        assert letter.body == envelope.body
        assert letter.reason == ("unsupported" if envelope.headers else "invalid")
        assert letter.error.startswith("DecodeError")
        assert letter.attempts == 0, "the handler was not run"
    assert [order.id for order in seen.items] == ["good"]
    assert counted(worker.bus, "retried") == 0


@conformance()
async def dlq_headers_complete(stage: Stage) -> None:
    """4.5: a dead letter has the message as it came (id, body, headers of its publisher), and the whole record of its death: why, where,
    whose handler, which error, after how many runs, and the times. The same failure has the same digest, another one another."""
    bus = stage.bus(retry=Retry(attempts=3, wait=wait_fixed(0.1)))
    bodies: Seen[bytes] = Seen()
    moments: dict[str, list[float]] = defaultdict(list)

    @bus.subscribe(ORDERS, name="billing", group="accounts")
    async def bill(order: Order, context: Context) -> None:
        await bodies.add(context.envelope.body)
        moments[context.id].append(time.time())
        if order.text == "elsewhere":
            raise ZeroDivisionError("another place")
        raise ValueError("a long\nstory \u2603 " + "x" * 5000)

    await stage.start(bus)
    publisher = await stage.publisher()
    published = time.time()
    ids = [
        (await publisher.publish(ORDERS, Order(text=text), headers={"tenant": "acme", "place": "\u00fc"}, idempotency_key=f"key{place}")).id
        for place, text in enumerate(["", "", "elsewhere"])
    ]
    letters = {letter.id: letter for letter in await stage.dead_letters(3, group="accounts")}
    assert letters.keys() == set(ids)
    letter, same, other = (letters[id] for id in ids)
    assert (letter.reason, letter.attempts, letter.deliveries, letter.redrives) == ("exhausted", 3, 3, 0)
    assert letter.headers == {"tenant": "acme", "place": "\u00fc"}
    assert letter.body == bodies.items[0]
    assert letter.error.startswith("ValueError: a long story \u2603 xxx")
    record = letter.record
    assert record["reason"] == "exhausted"
    assert record["topic"] == stage.name("orders")
    assert record["group"] == "accounts"
    assert record["handler"] == "billing"
    assert record["error-type"] == "builtins.ValueError"
    assert len(record["error-message"].encode()) <= 1024
    assert (record["attempts"], record["deliveries"], record["source-id"]) == ("3", "3", letter.id)
    assert record["host"]
    assert record["version"]
    assert len(record["traceback-digest"]) == 64
    assert same.record["traceback-digest"] == record["traceback-digest"] != other.record["traceback-digest"]
    first_published, failed, dead = (
        datetime.fromisoformat(record[name]).timestamp() for name in ("first-published-at", "first-failed-at", "dead-at")
    )
    assert published - 1 <= first_published <= failed
    first, second, third = moments[letter.id]
    assert first - EARLY <= failed <= second + EARLY, "first-failed-at is the end of the first run, not of the last one"
    assert third - EARLY <= dead == letter.dead_at.timestamp() <= time.time() + EARLY


@conformance(seconds=60)
async def dlq_write_failure_keeps_source(stage: Stage) -> None:
    """C9: a message whose dead letter cannot be stored is not acked: it stays with its source, its handler is not run again for it, and
    the subscription takes nothing more meanwhile, and says so. Once it can be stored it is; if the process dies first, another has it."""
    dead = dead_topic(stage.name("orders"), "suite")
    faulty = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=faulty)
    runs: Seen[int] = Seen()

    def consume(bus: Bus) -> None:
        @bus.subscribe(ORDERS, concurrency=2)
        async def handle(order: Order) -> None:
            await runs.add(order.n)
            raise Reject("never")

    async def fails_to_bury(n: int, error: type[PublishRejected] | type[BrokerUnavailable]) -> str:
        faulty.on_send = lambda envelope: error("a test") if envelope.topic == dead else None
        receipt = await publisher.publish(ORDERS, Order(n=n))
        await runs.wait_until(lambda items: n in items, 10, f"the run of {n}")
        await eventually(lambda: state_of(bus).intake_stopped, what="the end of the intake")
        assert receipt.id not in [id for receiver in faulty.receivers for id in receiver.acked]
        return receipt.id

    consume(bus)
    worker = await stage.start(bus)
    publisher = await stage.publisher()
    first = await fails_to_bury(1, PublishRejected)
    await asyncio.sleep(POLL + 0.1)  # a receive that was under way may still have taken something
    await publisher.publish(ORDERS, Order(n=2))
    assert await stage.dead_letters(0) == []
    assert runs.items == [1]
    assert bus.health().status != "ok"
    faulty.on_send = None
    letters = await stage.dead_letters(2)
    assert letters[0].id == first
    assert runs.items == [1, 2]

    third = await fails_to_bury(3, BrokerUnavailable)
    await worker.kill()
    again = stage.bus()
    consume(again)
    await stage.start(again)
    letters = await stage.dead_letters(3)
    assert third in {letter.id for letter in letters}
    assert runs.items == [1, 2, 3, 3]


@conformance(seconds=60)
async def redrive_preserves_id_and_body(stage: Stage) -> None:
    """4.6: a dead letter that is sent back comes to the group that gave it up, and to no other, as it was: id, body, key, headers and the
    time of its publishing; its attempts are counted anew. Where it fails again, the record says how often it was sent back."""
    _, others = await stage.collect(ORDERS, service="others")
    bus = stage.bus(retry=Retry(attempts=2, wait=QUICK))
    runs: Seen[Context] = Seen()
    mended = False

    @bus.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await runs.add(context)
        if not mended:
            raise ValueError("broken")

    await stage.start(bus)
    publisher = await stage.publisher()
    receipt = await publisher.publish(
        ORDERS, Order(text="\u2603"), id="order-17", key="k", headers={"tenant": "acme"}, idempotency_key="once"
    )
    (letter,) = await stage.dead_letters(1)
    letters = publisher.dead_letters(ORDERS, group="suite")
    assert await letters.redrive(limit=1) == 1
    (letter,) = await stage.dead_letters(1)
    assert (letter.redrives, letter.attempts, letter.reason) == (1, 2, "exhausted")
    mended = True
    assert await letters.redrive() == 1
    await runs.wait_for(5)
    await publisher.publish(ORDERS, Order(text="last"))
    await runs.wait_for(6)
    await others.wait_for(2)
    assert [context.attempt for context in runs.items] == [1, 2, 1, 2, 1, 1]
    first = runs.items[0]
    for context in runs.items[1:5]:
        assert context.id == receipt.id == "order-17"
        assert (context.key, context.headers, context.idempotency_key) == ("k", {"tenant": "acme"}, "once")
        assert context.published_at == first.published_at
        assert context.correlation_id == first.correlation_id
        assert context.envelope.body == first.envelope.body == letter.body
    assert [order.text for order in others.items] == ["\u2603", "last"]
    assert await stage.dead_letters(0) == []


@conformance(seconds=60)
async def redrive_filter_limit_dry_run(stage: Stage) -> None:
    """4.6: `where`, `limit` and `dry_run` send back what they say, and leave all else as it is. What cannot be sent stays a dead letter,
    its error is raised, and nothing after it is touched. What was sent back three times is refused without `force`."""
    bus = stage.bus(retry=Retry.none())
    runs: Seen[int] = Seen()
    mended = False

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await runs.add(order.n)
        if not mended or order.n == 99:
            raise ValueError("broken")

    def even(letter: DeadLetter) -> bool:
        return int(letter.headers["n"]) % 2 == 0

    async def left(count: int) -> list[str]:
        return sorted(letter.headers["n"] for letter in await stage.dead_letters(count))

    worker = await stage.start(bus)
    faulty = FaultyAdapter(stage.new_adapter())
    publisher = await stage.entered(
        stage.bus(adapter=faulty, service="publisher", settings=stage.settings(publish_timeout=timedelta(seconds=1)))
    )
    for n in range(6):
        await publisher.publish(ORDERS, Order(n=n), headers={"n": str(n)})
        await eventually(lambda: counted(worker.bus, "dead") == n + 1, what="one after the other")  # noqa: B023  at once
    assert await left(6) == ["0", "1", "2", "3", "4", "5"]
    mended = True
    letters = publisher.dead_letters(ORDERS, group="suite")
    if isinstance(faulty.real, Peekable):
        assert await letters.redrive(dry_run=True) == 6
        assert await letters.redrive(dry_run=True, where=even) == 3
        assert await letters.redrive(dry_run=True, where=even, limit=2) == 2
        listed = [letter.headers["n"] async for letter in letters.list(where=even)]
        assert sorted(listed) == ["0", "2", "4"]  # without a key they may have died in any order
        assert [letter.headers["n"] async for letter in letters.list(where=even, limit=2)] == listed[:2]
    else:
        with pytest.raises(UnsupportedFeature):
            await letters.redrive(dry_run=True)
    assert len(runs.items) == 6

    faulty.on_send = lambda envelope: PublishRejected("a test") if envelope.group == "suite" else None
    with pytest.raises(PublishRejected) as refused:
        await letters.redrive()
    faulty.on_send = None
    if isinstance(faulty.real, Peekable):
        assert len([letter async for letter in letters.list()]) == 6, f"all are back when it is said: {refused.value}"
    assert await left(6) == ["0", "1", "2", "3", "4", "5"]
    assert len(runs.items) == 6

    assert await letters.redrive(where=even, limit=2) == 2
    await runs.wait_for(8)
    assert sorted(runs.items[6:]) == [0, 2]
    assert await left(4) == ["1", "3", "4", "5"]
    assert await letters.redrive(where=even) == 1
    assert await letters.redrive(limit=0) == 0
    assert await left(3) == ["1", "3", "5"]
    assert await letters.redrive(rate=1000, limit=3) == 3
    await runs.wait_for(12)
    assert sorted(runs.items[6:]) == [0, 1, 2, 3, 4, 5]

    await publisher.publish(ORDERS, Order(n=99), headers={"n": "99"})
    for _ in range(MAX_REDRIVES):
        assert await left(1) == ["99"]
        assert await letters.redrive(limit=1) == 1
    assert await left(1) == ["99"]
    assert await letters.redrive() == 0
    assert await letters.redrive(force=True, limit=1) == 1
    assert await left(1) == ["99"]
    assert runs.items[12:] == [99] * (2 + MAX_REDRIVES)
