"""Bad input through the public interface, in memory: refused before any I/O, or a dead letter with identical bytes; and the next good
message is not held up. What comes from outside is sent through an adapter directly, as a foreign producer would."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tenacity import wait_fixed
from tests.unit.core.bad_bodies import BAD, GOOD, ODD, TOUCHED, Order

from msgbus import Batch, Bus, Context, Reject, Retry, Topic
from msgbus.contract.envelope import Envelope
from msgbus.dead_letters import DeadLetter
from msgbus.errors import DecodeError, MessageError
from msgbus.testing.stage import Seen, eventually
from msgbus_memory import MemoryAdapter

SOON = 5.0
"""Seconds in which a good message must be handled, whatever came before it. Well below any retry's wait."""

numbers = itertools.count()
orders = Topic("orders", Order)
keyed = Topic("keyed", Order, key="id")


def envelope(topic: Topic[Any], body: bytes = GOOD, headers: dict[str, str] | None = None, **facts: Any) -> Envelope:
    """As a foreign producer's: no headers unless given."""
    facts = {"id": f"m{next(numbers)}", **facts}
    return Envelope(topic=topic.name, body=body, headers=headers or {}, **facts)


class Place:
    """A bus at work, what its handler has seen, and a foreign producer on the same broker."""

    def __init__(self, bus: Bus, foreign: MemoryAdapter) -> None:
        self.bus = bus
        self.foreign = foreign
        self.seen: Seen[tuple[Order, Context]] = Seen()

    async def send(self, *envelopes: Envelope) -> None:
        assert await self.foreign.send(envelopes, timeout=5) == [None] * len(envelopes)

    async def dead(self, topic: Topic[Any] = orders) -> dict[str, DeadLetter]:
        return {letter.id: letter async for letter in self.bus.dead_letters(topic, group="shop").list()}

    async def handled(self, count: int) -> list[Order]:
        return [order for order, _ in await self.seen.wait_for(count, SOON)]


@asynccontextmanager
async def place(topic: Topic[Any] = orders, *, batch: bool = False, fails: bool = False, **options: Any) -> AsyncIterator[Place]:
    name = f"bad-input-{next(numbers)}"
    bus, foreign = Bus(f"memory://{name}?max_body=33554432", service="shop"), MemoryAdapter(name, max_body=33554432)
    here = Place(bus, foreign)
    options = {"retry": Retry(attempts=3, wait=wait_fixed(3600)), **options}

    async def one(order: Order, context: Context) -> None:
        await here.seen.add((order, context))
        if fails:
            raise Reject("as asked")

    async def many(orders: list[Order], contexts: list[Context]) -> None:
        for order, context in zip(orders, contexts, strict=True):
            await here.seen.add((order, context))

    if batch:
        bus.subscribe(topic, batch=Batch(10), **options)(many)
    else:
        bus.subscribe(topic, **options)(one)
    await foreign.open()
    try:
        async with bus.running():
            yield here
    finally:
        await foreign.close()


# ---------------------------------------------------------------- bodies


def assert_dead(letter: DeadLetter, sent: Envelope, reason: str) -> None:
    assert letter.body == sent.body
    assert letter.reason == reason
    assert "DecodeError" in letter.error
    assert len(letter.error) < 1200
    assert letter.headers == {name: value for name, value in sent.headers.items() if name not in ("content-type", "ce-type")}


@pytest.mark.parametrize("how", ["unkeyed", "ordered", "batch"])
async def test_every_bad_body_is_a_dead_letter_with_identical_bytes_and_the_next_message_is_not_held_up(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the body: no run of the handler, no retry, a dead letter of the right reason; the good one behind it, of the same key
    where there is a key, comes at once; and nothing that a body names was run."""
    monkeypatch.chdir(tmp_path)
    topic = keyed if how == "ordered" else orders
    key = "k" if how == "ordered" else None
    sent: dict[str, Envelope] = {}
    async with place(topic, batch=how == "batch") as here:
        for count, (name, (body, headers, _)) in enumerate(BAD.items(), 1):
            sent[name] = envelope(topic, body, headers, key=key)
            started = time.monotonic()
            await here.send(sent[name], envelope(topic, key=key))
            await here.handled(count)
            assert time.monotonic() - started < SOON, name
        await eventually(lambda: here.bus.runners[0].counts["dead"] == len(BAD), what="the last dead letter")
        letters = await here.dead(topic)
        assert here.bus.health().subscriptions[0].state == "running"
    assert len(letters) == len(BAD)
    for name, (_, _, reason) in BAD.items():
        assert_dead(letters[sent[name].id], sent[name], reason)
    assert not (tmp_path / TOUCHED).exists()


async def test_every_odd_body_that_fits_is_handled() -> None:
    """Strict about what does not fit, and about nothing else."""
    async with place() as here:
        for name, (body, headers) in ODD.items():
            before = len(here.seen.items)
            await here.send(envelope(orders, body, headers))
            assert len(await here.handled(before + 1)) == before + 1, name
        assert await here.dead() == {}


async def test_a_bad_body_in_the_pull_consumer_is_a_dead_letter_and_the_next_one_comes() -> None:
    """`delivery.message` raises `DecodeError`, each time; the delivery is then a dead letter, with identical bytes."""
    name = f"bad-input-{next(numbers)}"
    foreign = MemoryAdapter(name)
    await foreign.open()
    small = {name: bad for name, bad in BAD.items() if len(bad[0]) < 500_000}
    async with Bus(f"memory://{name}", service="shop") as bus:
        async with bus.consumer(orders, group="pull", window=10) as consumer:
            for body, headers, _ in small.values():
                await foreign.send([envelope(orders, body, headers), envelope(orders)], timeout=5)
                bad, good = (await consumer.receive(timeout=timedelta(seconds=SOON)))[0], None
                for _ in range(2):
                    with pytest.raises(DecodeError):
                        bad.message.amount  # noqa: B018  reading it is the test
                good = (await consumer.receive(timeout=timedelta(seconds=SOON)))[0]
                assert good.message == Order(id="1")
                await good.ack()
        letters = [letter async for letter in bus.dead_letters(orders, group="pull").list()]
    await foreign.close()
    assert sorted(letter.body for letter in letters) == sorted(body for body, _, _ in small.values())


async def test_a_body_as_large_as_the_broker_takes_is_a_dead_letter_all_the_same() -> None:
    """20 MiB, and exactly the limit: the copy with its record fits."""
    async with place() as here:
        bodies = [b"x" * (20 * 1024 * 1024), b"y" * 33554432]
        sent = [envelope(orders, body) for body in bodies]
        await here.send(*sent, envelope(orders))
        await here.handled(1)
        await eventually(lambda: here.bus.runners[0].counts["dead"] == 2, what="two dead letters")
        letters = await here.dead()
    assert [letters[one.id].body == one.body for one in sent] == [True, True]


# ---------------------------------------------------------------- headers from outside


SPOOFS: dict[str, dict[str, str]] = {
    "attempt -1": {"msgbus-attempt": "-1"},
    "attempt 10**9": {"msgbus-attempt": str(10**9)},
    "attempt 2": {"msgbus-attempt": "2"},
    "attempt NaN": {"msgbus-attempt": "NaN"},
    "attempt of 5,000 digits": {"msgbus-attempt": "9" * 5000},
    "not before the year 9999": {"msgbus-not-before": "253402300799.0"},
    "not before NaN": {"msgbus-not-before": "nan"},
    "not before infinity": {"msgbus-not-before": "inf"},
    "not before yesterday, in words": {"msgbus-not-before": "yesterday"},
    "a dead letter's record": {
        "msgbus-dlq-reason": "poison",
        "msgbus-dlq-topic": "other",
        "msgbus-dlq-nonsense": "x",
        "msgbus-dlq-dead-at": "x",
    },
    "redriven 99 times": {"msgbus-redrive-count": "99"},
    "failed in 1999": {"msgbus-first-failed-at": "1999-01-01T00:00:00Z"},
    "unknown ones of ours": {"msgbus-": "", "msgbus-future": "x"},
    "a bad traceparent": {"ce-traceparent": "00-zz", "traceparent": "garbage"},
    "a time that is none": {"ce-time": "yesterday"},
    "a time far ahead": {"ce-time": "9999-12-31T23:59:59Z"},
    "a time long ago": {"ce-time": "0001-01-01T00:00:00Z"},
    "a naive time": {"ce-time": "2030-01-01T00:00:00"},
    "empty attributes": {"ce-correlationid": "", "ce-causationid": "", "ce-idempotencykey": "", "ce-source": "", "ce-specversion": ""},
    "a future specversion": {"ce-specversion": "7.0"},
    "a thousand": {f"h{number}": "x" for number in range(1000)},
    "a megabyte": {"big": "x" * 1_000_000},
    "line ends and NUL": {"a\r\nb": "c\r\nd\x00"},
    "a lone surrogate": {"a": "\ud800"},
}


@pytest.mark.parametrize("topic", [orders, keyed], ids=["unkeyed", "ordered"])
async def test_what_a_fresh_message_claims_of_us_is_not_believed(topic: Topic[Any]) -> None:
    """Headers called `msgbus-…` count only on a group's own copies: a fresh message runs now, as its first attempt, whatever it claims;
    and its dead letter's record is ours alone."""
    sent = {name: envelope(topic, headers=dict(spoof), key=name if topic is keyed else None) for name, spoof in SPOOFS.items()}
    async with place(topic, fails=True) as here:
        for count, one in enumerate(sent.values(), 1):
            await here.send(one)
            await here.handled(count)
        await eventually(lambda: here.bus.runners[0].counts["dead"] == len(SPOOFS), what="the dead letters")
        letters = await here.dead(topic)
        for (name, one), (_, context) in zip(sent.items(), here.seen.items, strict=True):
            assert context.id == one.id
            assert context.attempt == 1, name
            assert not any(header.startswith("msgbus-") for header in context.headers), name
            assert context.correlation_id
            assert context.idempotency_key
            assert context.published_at.tzinfo is not None
        assert await here.bus.dead_letters(topic, group="shop").redrive(dry_run=True) == len(SPOOFS)
    for name, one in sent.items():
        letter = letters[one.id]
        assert (letter.reason, letter.attempts, letter.redrives, letter.record["topic"]) == ("rejected", 1, 0, topic.name), name
        assert "nonsense" not in letter.record
        assert letter.record["first-failed-at"] > "2000", name
        assert letter.body == GOOD


async def test_a_spoof_does_not_become_true_by_a_retry() -> None:
    """The group's own copy carries our bookkeeping, not what the fresh message claimed."""
    seen: list[int] = []
    name = f"bad-input-{next(numbers)}"
    foreign = MemoryAdapter(name)
    bus = Bus(f"memory://{name}", service="shop")

    @bus.subscribe(orders, retry=Retry(attempts=6, wait=wait_fixed(0)))
    async def fails(order: Order, context: Context) -> None:
        seen.append(context.attempt)
        raise ValueError("always")

    async with bus.running():
        await foreign.open()
        spoof = {key: value for headers in list(SPOOFS.values())[:12] for key, value in headers.items()}
        await foreign.send([envelope(orders, headers=spoof)], timeout=5)
        await eventually(lambda: bus.runners[0].counts["dead"] == 1, what="the dead letter")
        letters = [letter async for letter in bus.dead_letters(orders, group="shop").list()]
        await foreign.close()
    assert seen == [1, 2, 3, 4, 5, 6]
    assert (letters[0].reason, letters[0].attempts, letters[0].redrives) == ("exhausted", 6, 0)
    assert letters[0].record["first-failed-at"] > "2000"


@pytest.mark.parametrize(
    ("headers", "attempt"),
    [
        ({"msgbus-attempt": "2"}, 3),
        ({"msgbus-attempt": "999999999"}, 10**9),
        ({"msgbus-attempt": str(10**9)}, 1),
        ({"msgbus-attempt": "-1"}, 1),
        ({"msgbus-attempt": ""}, 1),
        ({"msgbus-not-before": "253402300799.0"}, 1),
        ({"msgbus-not-before": "nan"}, 1),
        ({"msgbus-not-before": "-1e308"}, 1),
        ({"msgbus-not-before": "soon"}, 1),
        ({"msgbus-first-failed-at": "never"}, 1),
        ({"msgbus-redrive-count": "-3"}, 1),
    ],
)
async def test_nonsense_in_a_groups_own_copy_holds_nothing_up(headers: dict[str, str], attempt: int) -> None:
    """Another version, or a hand at the broker, wrote it: it is run now, and can be given up."""
    async with place(fails=True) as here:
        one = envelope(orders, headers=headers, group="shop")
        await here.send(one)
        (_, context) = (await here.seen.wait_for(1, SOON))[0]
        assert context.attempt == attempt
        await eventually(lambda: here.bus.runners[0].counts["dead"] == 1, what="the dead letter")
        assert (await here.dead())[one.id].body == GOOD


async def test_any_foreign_id_and_key_is_handled_or_dead() -> None:
    """An id or a key that we would never give: the message is handled, rejected, found again and redriven by it."""
    ids = ["", "x" * 300, "é" * 200, "a\r\nb\x00", "../../etc/passwd", "\ud800", "{tag}", "'; DROP TABLE x; --"]
    keys = [None, "", "x" * 300, "ключ", "\x00"]
    async with place(keyed, fails=True) as here:
        sent = [envelope(keyed, id=f"{id}{number}" if number else id, key=key) for number, key in enumerate(keys) for id in ids]
        await here.send(*sent)
        await here.handled(len(sent))
        await eventually(lambda: here.bus.runners[0].counts["dead"] == len(sent), what="the dead letters")
        letters = here.bus.dead_letters(keyed, group="shop")
        for one in sent:
            assert (await letters.show(one.id)).id == one.id
        assert await letters.redrive() == len(sent)
        await here.handled(2 * len(sent))


async def test_two_messages_of_one_id_are_both_settled() -> None:
    """A foreign producer that reuses an id: no copy stays behind, whatever its body."""
    async with place() as here:
        await here.send(*(envelope(orders, id="same") for _ in range(50)), envelope(orders, b"{", id="same"), envelope(orders))
        await here.handled(2)
        await eventually(lambda: here.bus.runners[0].running == 0, what="the handlers to end")

    await here.foreign.open()
    depth = await here.foreign.depth("orders", "shop")
    await here.foreign.close()
    assert (depth.ready, depth.in_flight, depth.delayed) == (0, 0, 0)


# ---------------------------------------------------------------- anything


bodies = st.one_of(
    st.binary(max_size=100),
    st.sampled_from([body for body, _, _ in BAD.values() if len(body) < 1000]),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.builds(lambda name: b'{"id":"' + name.encode("utf-8", "surrogatepass") + b'"}', st.text(max_size=5)),
)
ours = [
    "msgbus-attempt",
    "msgbus-not-before",
    "msgbus-dlq-reason",
    "msgbus-redrive-count",
    "ce-type",
    "ce-time",
    "ce-id",
    "ce-correlationid",
]
names = st.sampled_from([*ours, "ce-idempotencykey", "content-type", "content-encoding", "x"])
values = st.one_of(
    st.text(max_size=20), st.sampled_from(["application/json", "gzip", "Order.v2", "-1", "nan", "1e999", "2030-01-01T00:00:00Z"])
)
foreign_messages = st.tuples(
    bodies, st.dictionaries(names, values, max_size=5), st.none() | st.text(st.characters(codec="utf-8"), max_size=5)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=st.lists(foreign_messages, max_size=12), ordered=st.booleans())
def test_anything_from_outside_is_handled_or_dead_and_the_good_one_comes(
    messages: list[tuple[bytes, dict[str, str], str | None]], ordered: bool
) -> None:
    """Random bodies, headers and keys: each message is handled or a dead letter with its bytes; none is lost, none stops the others."""
    topic = keyed if ordered else orders

    async def scenario() -> None:
        async with place(topic) as here:
            sent = [envelope(topic, body, headers, key=key) for body, headers, key in messages]
            good = envelope(topic, id="the good one")
            await here.send(*sent, good)
            counts = here.bus.runners[0].counts
            await eventually(lambda: counts["done"] + counts["dead"] == len(sent) + 1, SOON, "all of them to end")
            letters = await here.dead(topic)
        handled = {context.id for _, context in here.seen.items}
        assert good.id in handled
        assert handled | letters.keys() == {one.id for one in sent} | {good.id}
        assert handled & letters.keys() == set()
        assert all(letters[one.id].body == one.body for one in sent if one.id in letters)

    asyncio.run(scenario())


options = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=5) | st.sampled_from(["x" * 256, "é" * 128, "a\n"]) | st.none() | st.integers() | st.binary(max_size=2),
        "key": st.text(max_size=5) | st.none() | st.integers(),
        "idempotency_key": st.text(max_size=5) | st.none(),
        "headers": st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.none() | st.floats() | st.binary(max_size=2), max_size=3)
        | st.none()
        | st.lists(st.text(), max_size=1),
        "delay": st.sampled_from([timedelta(0), timedelta(-1), timedelta.max, timedelta.min, None, float("nan"), 10**12]),
        "expires_in": st.sampled_from([timedelta(days=1), timedelta(0), timedelta(-1), timedelta.max, None, float("nan")]),
        "priority": st.sampled_from(["normal", "high", "urgent", None, 1]),
    },
)  # fmt: skip
anything = st.one_of(
    st.builds(Order, id=st.text(max_size=5)),
    st.builds(lambda value: Order.model_construct(id=value), st.none() | st.integers() | st.text(max_size=2)),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.none(),
    st.binary(max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(anything, options), min_size=1, max_size=10))
def test_any_publish_is_refused_by_name_or_arrives_as_it_was(publishes: list[tuple[Any, dict[str, Any]]]) -> None:
    """Whatever is published with whatever options: `MessageError`, `ValueError`, `TypeError` or `UnsupportedFeature`, before any I/O,
    or the message arrives with the id, key and headers that were given."""
    from msgbus.errors import UnsupportedFeature

    async def scenario() -> None:
        async with place() as here:
            confirmed: dict[str, tuple[Any, dict[str, Any]]] = {}
            for message, given_options in publishes:
                late = {name: value for name, value in given_options.items() if name != "delay" or value != timedelta.max}
                try:
                    receipt = await here.bus.publish(orders, message, **late)
                except (MessageError, ValueError, TypeError, UnsupportedFeature) as error:
                    assert str(error)  # noqa: PT017
                else:
                    assert receipt.state == "confirmed"
                    confirmed.setdefault(receipt.id, (message, late))
            await eventually(lambda: {context.id for _, context in here.seen.items} >= confirmed.keys(), SOON, "what was confirmed")
            assert {context.id for _, context in here.seen.items} == confirmed.keys()
            for order, context in here.seen.items:
                message, given_options = confirmed[context.id]
                assert order == message
                assert context.headers == (given_options.get("headers") or {})
                assert context.key == given_options.get("key")
                assert given_options.get("id") in (None, context.id)

    asyncio.run(scenario())
