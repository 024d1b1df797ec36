"""What operators and other programs do to us on real brokers: each ends in an error that names the resource, nothing is lost or altered,
and who works beside it notices nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from pydantic import BaseModel
from tenacity import wait_fixed
from tests.brokers import Server
from tests.integration.strangers import STRANGERS, Stranger

from msgbus import Bus, Retry, Topic
from msgbus.contract.envelope import HEADROOM, MAX_GROUP, MAX_ID, MAX_TOPIC
from msgbus.errors import (
    AuthenticationFailed,
    BrokerUnavailable,
    ConfigurationError,
    InvalidName,
    MessageTooLarge,
    MsgbusError,
    TopologyMismatch,
)
from msgbus.settings import Settings
from msgbus.testing.stage import Seen
from msgbus.testing.suite_operating import counted

pytestmark = pytest.mark.timeout(120)

SECRET = "hunter2"
PATIENCE = timedelta(seconds=2)


class Order(BaseModel):
    """What is bought."""

    n: int
    text: str = ""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.broker(name)) for name in STRANGERS])
def name(request: pytest.FixtureRequest) -> str:
    """Of the broker."""
    return str(request.param)


@pytest.fixture
def stranger(name: str, running: Server) -> Stranger:
    """Another program on the broker."""
    return STRANGERS[name](running.url)


@pytest.fixture
def settings(running: Server) -> Settings:
    """Ours: names of this test alone."""
    return Settings.model_validate(
        {"url": running.url, "namespace": f"bad-{uuid4().hex[:12]}.", "publish_timeout": PATIENCE, "topology": "create"}
    )


@pytest.fixture
async def neighbour(stranger: Stranger, settings: Settings) -> AsyncIterator[None]:
    """Somebody whose handler runs all the while: it is not cut, its message is not delivered twice, and the next one comes."""
    orders = Topic("neighbours", Order)
    bus = Bus(service="neighbour", settings=settings)
    seen: Seen[int] = Seen()
    begun, enough = asyncio.Event(), asyncio.Event()

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        if order.n == 0:
            begun.set()
            await enough.wait()
        await seen.add(order.n)

    async with asyncio.timeout(100), bus.running():
        await bus.publish(orders, Order(n=0))
        await begun.wait()
        yield
        enough.set()
        await bus.publish(orders, Order(n=1))
        await seen.wait_until(lambda items: {0, 1} <= set(items))
    assert sorted(seen.items) == [0, 1]


def service(settings: Settings, topic: Topic[Order], seen: Seen[int]) -> Bus:
    """A program with one group, `workers`."""
    bus = Bus(settings=settings, retry=Retry.none())

    @bus.subscribe(topic, group="workers")
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    return bus


async def refused(url: str, settings: Settings) -> tuple[MsgbusError, float]:
    """What entering a bus at this URL raises, and after how long."""
    begun = time.monotonic()
    with pytest.raises(MsgbusError) as caught:
        async with Bus(url, settings=settings):
            pass
    return caught.value, time.monotonic() - begun


# ---------------------------------------------------------------- the way to the broker


async def test_a_broker_that_is_not_there(settings: Settings, stranger: Stranger) -> None:
    """It is waited for as long as `publish_timeout`, then `BrokerUnavailable` says where nobody is, and no password."""
    with socket.socket() as reserved:  # bound, and nobody listens
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        parts = urlsplit(stranger.with_user("somebody", SECRET))
        url = parts._replace(netloc=f"somebody:{SECRET}@127.0.0.1:{port}").geturl()
        error, took = await refused(url, settings)
    assert isinstance(error, BrokerUnavailable), error
    assert f"127.0.0.1:{port}" in str(error)
    assert SECRET not in str(error)
    assert took < PATIENCE.total_seconds() + 3


async def test_a_host_that_has_no_address(settings: Settings, stranger: Stranger) -> None:
    """Its name is in the error."""
    parts = urlsplit(stranger.url)
    error, took = await refused(parts._replace(netloc="nobody.invalid:1234").geturl(), settings)
    assert isinstance(error, BrokerUnavailable), error
    assert "nobody.invalid" in str(error)
    assert took < PATIENCE.total_seconds() + 3


@pytest.mark.usefixtures("neighbour")
async def test_wrong_credentials_fail_at_once(settings: Settings, stranger: Stranger) -> None:
    """Trying again would not help: `AuthenticationFailed`, long before the time for a broker that is away is over; no password in it."""
    error, took = await refused(stranger.with_user("somebody", SECRET), settings)
    assert isinstance(error, AuthenticationFailed), error
    assert SECRET not in str(error)
    assert took < PATIENCE.total_seconds()


@pytest.mark.usefixtures("neighbour")
async def test_a_part_of_the_broker_that_is_not_there(settings: Settings, stranger: Stranger) -> None:
    """A virtual host or a database that does not exist is a mistake in the URL, named, and no outage."""
    if stranger.elsewhere is None:
        pytest.skip("the broker has no parts of its own")
    parts = urlsplit(stranger.url)
    error, took = await refused(parts._replace(path=stranger.elsewhere).geturl(), settings)
    assert isinstance(error, ConfigurationError | AuthenticationFailed), error
    assert stranger.elsewhere.strip("/") in str(error)
    assert took < PATIENCE.total_seconds()


# ---------------------------------------------------------------- under our names


@pytest.mark.usefixtures("neighbour")
async def test_something_else_stands_under_our_name(settings: Settings, stranger: Stranger) -> None:
    """The start fails, each time, and names it; it stays as it was."""
    for number, what in enumerate(stranger.taken):
        topic = (
            Topic(f"orders{number}", Order, key=lambda order: str(order.n), shards=5)
            if what == "partitions"
            else Topic(f"o{number}", Order)
        )
        physical = settings.namespace + topic.name
        resource, before = await stranger.take(what, physical, "workers")
        for _ in range(2):
            with pytest.raises(TopologyMismatch) as caught:
                async with service(settings, topic, Seen()).running():
                    pass
            assert resource in str(caught.value), what
            assert not caught.value.missing
            assert await stranger.look(what, physical, "workers") == before, what


async def test_other_programs_messages(settings: Settings, stranger: Stranger) -> None:
    """Without our headers, or with headers that we would never write: what fits is handled, what does not is a dead letter with its very
    bytes, and the good message behind it is not held up."""
    topic = Topic("foreign", Order)
    physical = settings.namespace + topic.name
    seen: Seen[int] = Seen()
    garbage = [b"", b"{", b"\xff\x00\xfe", b'{"n": "one"}', b"[" * 5000]
    async with service(settings, topic, seen).running() as bus:
        letters = bus.dead_letters(topic, group="workers")
        await stranger.publish(physical, b'{"n": 1}', {})
        for body in garbage:
            await stranger.publish(physical, body, {})
        await stranger.publish(physical, b'{"n": 2}', stranger.odd_headers)
        await bus.publish(topic, Order(n=3))
        await seen.wait_until(lambda items: {1, 2, 3} <= set(items), 20)
        await counted(letters.count, len(garbage))
        found = [letter async for letter in letters.list()]
        assert sorted(letter.body for letter in found) == sorted(garbage)
        assert {letter.reason for letter in found} == {"invalid"}
    assert sorted(seen.items) == [1, 2, 3]


async def test_the_longest_names_work(settings: Settings, name: str) -> None:
    """What is accepted as a name is one on every broker, with all that is made of it: shards, retries, delays, dead letters."""
    topic = Topic("t" * (MAX_TOPIC - len(settings.namespace)), Order, key=lambda order: "k" * MAX_ID)
    group = "g" * MAX_GROUP
    seen: Seen[int] = Seen()
    bus = Bus(settings=settings, retry=Retry(attempts=2, wait=wait_fixed(0.3)))

    @bus.subscribe(topic, group=group, on_failure="skip")
    async def handle(order: Order) -> None:
        await seen.add(order.n)
        if order.n == 1:
            raise ValueError("again")

    async with bus.running():
        await bus.publish(topic, Order(n=1), id="i" * MAX_ID)
        await bus.publish(topic, Order(n=2), delay=timedelta(seconds=0.3))
        await seen.wait_until(lambda items: sorted(items) == [1, 1, 2], 20)
        letters = bus.dead_letters(topic, group=group)
        await counted(letters.count, 1)
        (letter,) = [letter async for letter in letters.list()]
        assert letter.id == "i" * MAX_ID
    with pytest.raises(InvalidName, match="namespace"):
        await entered_with(settings, Topic(topic.name + "t", Order))


async def entered_with(settings: Settings, topic: Topic[Order]) -> None:
    async with service(settings, topic, Seen()).running():
        pass


@pytest.mark.usefixtures("neighbour")
async def test_two_names_that_the_broker_takes_for_one(settings: Settings, name: str) -> None:
    """Kafka holds `a.b` or `a_b`, not both: the second is refused by name, at once. Elsewhere they are two topics."""
    await entered_with(settings, Topic("a.b", Order))
    if name != "kafka":
        await entered_with(settings, Topic("a_b", Order))
        return
    begun = time.monotonic()
    with pytest.raises(ConfigurationError, match="a_b"):
        await entered_with(settings, Topic("a_b", Order))
    assert time.monotonic() - begun < PATIENCE.total_seconds()


# ---------------------------------------------------------------- too large


@pytest.mark.usefixtures("neighbour")
async def test_a_message_over_the_limit(settings: Settings, stranger: Stranger) -> None:
    """`MessageTooLarge` before any I/O, with the topic's name; one as large as it may be arrives, also as a dead letter; nobody waits."""
    topic = Topic("large", Order)
    seen: Seen[int] = Seen()
    bus = Bus(settings=settings, retry=Retry.none())

    @bus.subscribe(topic, group="workers")
    async def handle(order: Order) -> None:
        await seen.add(order.n)
        if order.n == 2:
            raise ValueError("no")

    async with bus.running():
        room = bus.runtime.adapter.limits.body - HEADROOM
        empty = len(Order(n=1).model_dump_json().encode())
        for size in (room + 1, 3 * room):
            with pytest.raises(MessageTooLarge, match="large"):
                await bus.publish(topic, Order(n=1, text="x" * (size - empty)))
        for n in (2, 3):
            await bus.publish(topic, Order(n=n, text="x" * (room - empty)))
        await seen.wait_until(lambda items: {2, 3} <= set(items), 20)
        letters = bus.dead_letters(topic, group="workers")
        await counted(letters.count, 1)
        (letter,) = [letter async for letter in letters.list()]
        assert len(letter.body) == room
    assert sorted(seen.items) == [2, 3]
