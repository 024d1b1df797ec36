"""The Redis adapter alone, against a server: what redis-py and Redis Streams do to the careless, and what operators do to streams."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from tests.brokers import Server

from msgbus.contract.adapter import AdapterSettings, Forwarding, Received, Receiver, ReceiverSpec, TopicSpec
from msgbus.contract.address import dead_topic
from msgbus.contract.envelope import Envelope, new_id
from msgbus.errors import (
    AuthenticationFailed,
    BrokerUnavailable,
    ConfigurationError,
    PublishRejected,
    PublishUnknown,
    TopologyMismatch,
)
from msgbus.urls import adapter_from_url
from msgbus_redis import RedisAdapter

pytestmark = pytest.mark.broker("redis")

VERSIONED = (
    "test_durability_is_waited_for",  # WAITAOF
    "test_a_flush_is_noticed_and_work_goes_on",  # UNBLOCKED or NOGROUP
    "test_entries_that_others_destroyed_are_reported",  # what XAUTOCLAIM and XCLAIM do with them
    "test_a_server_that_may_lose_is_named",  # INFO
)


class Made(list[RedisAdapter]):
    """Adapters that a test opened, all at one URL."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url


@pytest.fixture
def url(running: Server) -> str:
    """A database of its own: it is emptied here."""
    return running.url.rpartition("/")[0] + "/9"


@pytest.fixture
async def server(url: str) -> AsyncIterator[Redis]:
    """The server, by the plain client; the database is empty."""
    client = Redis.from_url(url)
    await client.flushdb()
    yield client
    await client.flushdb()
    await client.aclose()


@pytest.fixture
async def made(url: str, server: Redis) -> AsyncIterator[Made]:
    """Adapters that a test opened, closed at its end."""
    adapters = Made(url)
    yield adapters
    for adapter in adapters:
        await adapter.close()


async def opened(made: Made, query: str = "lease=2") -> RedisAdapter:
    adapter = adapter_from_url(f"{made.url}?{query}", AdapterSettings())
    assert isinstance(adapter, RedisAdapter)
    await adapter.open()
    made.append(adapter)
    return adapter


async def declared(adapter: RedisAdapter, *groups: str, **topic: Any) -> str:
    name = f"t{uuid.uuid4().hex[:8]}"
    await adapter.declare([TopicSpec(name, **topic)], [ReceiverSpec(name, group) for group in groups])
    return name


def numbered(topic: str, count: int, **facts: Any) -> list[Envelope]:
    return [Envelope(new_id(), topic, b"%d" % n, {}, **facts) for n in range(count)]


async def sent(adapter: RedisAdapter, envelopes: Sequence[Envelope]) -> None:
    assert await adapter.send(envelopes, timeout=5) == [None] * len(envelopes)


async def take(receiver: Receiver, count: int, seconds: float = 5.0) -> list[Received]:
    taken: list[Received] = []
    deadline = time.monotonic() + seconds
    while len(taken) < count and time.monotonic() < deadline:
        taken += await receiver.receive(count - len(taken), 0.5)
    assert len(taken) == count, f"{len(taken)} of {count}"
    return taken


async def until(true: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def _waits(server: Redis) -> bool:
    """Whether a call of somebody waits at the server."""
    return bool((await server.info("clients"))["blocked_clients"])


async def _now(value: bool) -> bool:
    return value


def bodies(taken: Sequence[Received]) -> list[int]:
    return [int(received.envelope.body) for received in taken]


# ---------------------------------------------------------------- sending


async def test_a_send_without_an_answer_is_unknown_and_stored_once(server: Redis, made: Made) -> None:
    """redis-py's client sends again what had no answer; here one try is made, and a second send of the id is recognised."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    (envelope,) = numbered(topic, 1)
    await server.client_pause(60_000, all=False)
    started = time.monotonic()
    (outcome,) = await adapter.send([envelope], timeout=0.3)
    assert isinstance(outcome, PublishUnknown)
    assert time.monotonic() - started < 10
    await server.client_unpause()
    await sent(adapter, [envelope])
    await sent(adapter, [envelope])
    assert await server.xlen(f"{{{topic}}}") == 1


async def test_a_cancelled_send_costs_its_connection_only(server: Redis, made: Made) -> None:
    """The answer of a call that was cancelled is nobody else's."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    await server.client_pause(60_000, all=False)
    sending = asyncio.create_task(adapter.send(numbered(topic, 3), timeout=60))
    await until(lambda: _waits(server))
    sending.cancel()
    await asyncio.wait([sending])
    await server.client_unpause()
    assert await adapter.send(numbered(topic, 2), timeout=5) == [None, None]
    assert await adapter.shards(topic) is None


async def test_out_of_memory_is_a_refusal_and_nothing_is_stored(server: Redis, made: Made) -> None:
    """`OOM` is `PublishRejected`; what is there can still be consumed."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 2))
    await server.config_set("maxmemory", "1mb")
    try:
        outcomes = await adapter.send(numbered(topic, 3), timeout=5)
        receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
        for received in await take(receiver, 2):
            receiver.ack(received)
        await receiver.close()
        assert receiver.stale_acks == 0
    finally:
        await server.config_set("maxmemory", "0")
    assert [type(outcome) for outcome in outcomes] == [PublishRejected] * 3
    assert "OOM" in str(outcomes[0])
    assert (await adapter.depth(topic, "g")).ready == 0


async def test_durability_is_waited_for(server: Redis, made: Made) -> None:
    """`fsync` waits for the append-only file where the server can say so, else it is refused; `replicated` without replicas is unknown."""
    replicated = await opened(made, "durability=replicated")
    topic = await declared(replicated, "g")
    (outcome,) = await replicated.send(numbered(topic, 1), timeout=4)
    assert isinstance(outcome, PublishUnknown)
    assert "0 replicas" in str(outcome)
    info = await server.info()
    if tuple(int(part) for part in info["redis_version"].split(".")[:2]) < (7, 2):
        with pytest.raises(ConfigurationError, match=r"7\.2"):
            await opened(made, "durability=fsync")
    elif info["aof_enabled"]:
        fsync = await opened(made, "durability=fsync")
        await sent(fsync, numbered(topic, 3))


async def test_a_dead_letter_that_cannot_be_written_stays_with_its_source(server: Redis, made: Made) -> None:
    """Scripts do not roll back: the write comes before the ack."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 1))
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    (received,) = await take(receiver, 1)
    await server.set(f"{{{topic}}}.g.dead", "a key of another kind")
    assert isinstance(receiver, Forwarding)
    letter = Envelope(received.envelope.id, dead_topic(topic, "g"), b"0", {})
    assert isinstance(await receiver.forward(received, letter, timeout=2), PublishRejected)
    assert (await server.xpending(f"{{{topic}}}", "g"))["pending"] == 1
    await server.delete(f"{{{topic}}}.g.dead")
    assert await receiver.forward(received, letter, timeout=2) is None
    assert (await server.xpending(f"{{{topic}}}", "g"))["pending"] == 0
    assert isinstance(await receiver.forward(received, letter, timeout=2), BrokerUnavailable)
    assert await server.xlen(f"{{{topic}}}.g.dead") == 1


# ---------------------------------------------------------------- holding


async def test_what_is_held_for_longer_than_a_lease_stays_ours(made: Made) -> None:
    """The lease is renewed while a message is handed out: a peer gets nothing, and no death is counted."""
    one, two = await opened(made, "lease=1"), await opened(made, "lease=1")
    topic = await declared(one, "g")
    await sent(one, numbered(topic, 3))
    first = await one.open_receiver(ReceiverSpec(topic, "g"))
    held = await take(first, 3)
    second = await two.open_receiver(ReceiverSpec(topic, "g"))
    assert await second.receive(10, 3.0) == []
    for received in held[:2]:
        first.ack(received)
    await first.close()
    assert first.stale_acks == 0
    (again,) = await take(second, 1)
    assert (again.envelope.id, again.crashes) == (held[2].envelope.id, 0)


async def test_the_dead_are_found_without_new_traffic_and_counted(made: Made) -> None:
    """After a lease a peer has what a dead process held, each time with one death more."""
    topic = ""
    for deaths in range(3):
        adapter = await opened(made, "lease=1")
        if not topic:
            topic = await declared(adapter, "g")
            await sent(adapter, numbered(topic, 1))
        receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
        (received,) = await take(receiver, 1, 4.0)
        assert received.crashes == deaths
        adapter.abandon()


async def test_own_pending_entries_come_first_and_at_once(server: Redis, made: Made) -> None:
    """What the server had given a read whose answer was lost is there when the process is back, without a wait and without a death."""
    adapter = await opened(made, "lease=60")
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 4))
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g", window=2))
    await take(receiver, 2)
    adapter.abandon()
    await adapter.close()
    await adapter.open()
    started = time.monotonic()
    again = await adapter.open_receiver(ReceiverSpec(topic, "g", window=4))
    taken = await take(again, 4)
    assert bodies(taken) == [0, 1, 2, 3]
    assert time.monotonic() - started < 1.0
    assert {received.crashes for received in taken} == {0}


async def test_a_zombie_neither_settles_nor_steals_back(server: Redis, made: Made) -> None:
    """What another consumer has claimed is lost to us: not renewed, not started, and our ack is late and settles nothing."""
    adapter = await opened(made, "lease=1")
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 2))
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    first, second = await take(receiver, 2)
    key = f"{{{topic}}}"
    pending = await server.xpending_range(key, "g", "-", "+", 10)
    await server.xclaim(key, "g", "another", 0, [pending[0]["message_id"]])
    await until(lambda: _now(first.tenure.lost))
    assert not second.tenure.lost
    receiver.ack(first)
    receiver.ack(second)
    await receiver.close()
    assert receiver.stale_acks == 1
    (left,) = await server.xpending_range(key, "g", "-", "+", 10)
    assert left["consumer"] == b"another"


async def test_consumers_that_hold_nothing_are_forgotten_at_close(server: Redis, made: Made) -> None:
    """A consumer that goes leaves no name behind, and takes no pending entry along."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 2))
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    taken = await take(receiver, 2)
    receiver.ack(taken[0])
    await receiver.close()
    consumers = await server.xinfo_consumers(f"{{{topic}}}", "g")
    assert [(consumer["name"], consumer["pending"]) for consumer in consumers] == [(b"free", 1)]
    depth = await adapter.depth(topic, "g")
    assert (depth.ready, depth.in_flight) == (1, 0)


async def test_closing_does_not_wait_for_a_read(server: Redis, made: Made) -> None:
    """A read that waits at the server is ended by the server, not cut off."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    waiting = asyncio.create_task(receiver.receive(1, 5.0))
    await until(lambda: _waits(server))
    started = time.monotonic()
    await receiver.drain()
    assert await waiting == []
    await receiver.close()
    assert time.monotonic() - started < 0.5


async def test_a_cancelled_drain_or_close_goes_on(server: Redis, made: Made) -> None:
    """Who gives up waiting for a drain or a close does not undo it: what was held goes back, at once and uncounted."""
    one, two = await opened(made, "lease=60"), await opened(made, "lease=60")
    topic = await declared(one, "g")
    await sent(one, numbered(topic, 4))
    receiver = await one.open_receiver(ReceiverSpec(topic, "g"))
    taken = await take(receiver, 4)
    receiver.ack(taken[0])
    await server.client_pause(10_000, all=False)
    for ending in (receiver.drain, receiver.close):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await ending()
    await server.client_unpause()
    again = await take(await two.open_receiver(ReceiverSpec(topic, "g")), 3)
    assert (bodies(again), {received.crashes for received in again}) == ([1, 2, 3], {0})
    await receiver.close()
    assert receiver.stale_acks == 0


async def test_a_cancelled_receive_loses_nothing(made: Made) -> None:
    """However often, at whatever moment."""
    adapter = await opened(made, "lease=60")
    topic = await declared(adapter, "g")
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g", window=100))
    sending = asyncio.create_task(sent(adapter, numbered(topic, 200)))
    got: list[int] = []
    async with asyncio.timeout(10):
        turn = 0
        while len(got) < 200:
            receiving = asyncio.create_task(receiver.receive(3, 1.0))
            turn += 1
            await asyncio.sleep(0.0005 * (turn % 5))
            if turn % 3:
                receiving.cancel()
            await asyncio.wait([receiving])
            if not receiving.cancelled():
                for received in receiving.result():
                    got.append(int(received.envelope.body))
                    receiver.ack(received)
    await sending
    assert sorted(got) == list(range(200))


# ---------------------------------------------------------------- shards


async def test_order_holds_when_a_shard_changes_hands(made: Made) -> None:
    """A joining peer gets half of the shards, each after what the first had in hand was settled; a dead one's come in order, counted."""
    one = await opened(made, "lease=1&shards=4")
    topic = await declared(one, "g", keyed=True)
    spec = ReceiverSpec(topic, "g", window=100, exclusive=True)
    first = await one.open_receiver(spec)
    await sent(one, [Envelope(new_id(), topic, b"%d" % n, {}, key=f"k{n % 8}") for n in range(80)])
    held = await take(first, 80)
    two = await opened(made, "lease=1")
    second = await two.open_receiver(spec)
    waiting = asyncio.create_task(second.receive(10, 3.0))
    async with asyncio.timeout(5):
        while sum(tenure.draining for tenure in {received.tenure for received in held}) < 2:
            await first.receive(1, 0.05)
    assert not waiting.done()
    going = [received for received in held if received.tenure.draining]
    for received in going[: len(going) // 2]:
        first.ack(received)
    for received in going[len(going) // 2 :]:
        await first.release(received)
    got = await waiting
    got += await take(second, len(going) - len(going) // 2 - len(got))
    order: dict[str | None, list[int]] = {}
    for received in got:
        order.setdefault(received.envelope.key, []).append(int(received.envelope.body))
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert {received.crashes for received in got} == {0}
    one.abandon()
    for received in got:
        second.ack(received)
    rest = await take(second, 80 - len(going), 6.0)
    assert {received.crashes for received in rest} == {1}


async def test_a_lost_shard_is_not_read_by_its_former_owner(server: Redis, made: Made) -> None:
    """The read looks at the lease: who was away for longer gets nothing more, and its acks are late."""
    adapter = await opened(made, "lease=2&shards=1")
    topic = await declared(adapter, "g", keyed=True)
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g", window=10, exclusive=True))
    await sent(adapter, numbered(topic, 1))
    (received,) = await take(receiver, 1)
    await server.set(f"{{{topic}}}:lease:g", "another", px=1500)
    await sent(adapter, numbered(topic, 1))
    assert await receiver.receive(1, 0.8) == []
    assert received.tenure.lost
    receiver.ack(received)
    assert receiver.stale_acks == 1
    again = await take(receiver, 2)  # the other never was: its lease ran out
    assert bodies(again) == [0, 0]


# ---------------------------------------------------------------- streams


async def test_nothing_is_trimmed_that_a_group_has_not_done(server: Redis, made: Made) -> None:
    """What all groups are done with goes; what one has pending, or has not read, stays."""
    adapter = await opened(made)
    topic = await declared(adapter, "fast", "slow")
    await sent(adapter, numbered(topic, 10))
    fast = await adapter.open_receiver(ReceiverSpec(topic, "fast"))
    slow = await adapter.open_receiver(ReceiverSpec(topic, "slow"))

    async def holds(count: int) -> bool:
        return bool(await server.xlen(f"{{{topic}}}") == count)

    for received in await take(fast, 10):
        fast.ack(received)
    taken = await take(slow, 4)
    slow.ack(taken[0])
    slow.ack(taken[2])
    await until(lambda: holds(9))
    for received in [taken[1], taken[3], *await take(slow, 6)]:
        slow.ack(received)
    await until(lambda: holds(0))


async def test_a_flush_is_noticed_and_work_goes_on(server: Redis, made: Made, caplog: pytest.LogCaptureFixture) -> None:
    """FLUSHALL, or a deleted stream, under a waiting receiver, ordered or not: the group is made again, at the beginning."""
    adapter = await opened(made)
    for exclusive in (False, True):
        topic = await declared(adapter, "g", keyed=exclusive)
        receiver = await adapter.open_receiver(ReceiverSpec(topic, "g", exclusive=exclusive))
        assert await receiver.receive(1, 0.2) == []
        waiting = asyncio.create_task(receiver.receive(10, 10.0))
        await until(lambda: _waits(server))
        with caplog.at_level(logging.ERROR, "msgbus.redis"):
            await server.flushdb()
            await sent(adapter, numbered(topic, 1, key="k" if exclusive else None))
            assert bodies(await waiting) == [0]
        assert "data loss suspected" in caplog.text
        await receiver.close()


async def test_entries_that_others_destroyed_are_reported(server: Redis, made: Made, caplog: pytest.LogCaptureFixture) -> None:
    """A pending entry whose message somebody trimmed is no message: said, settled, and nothing hangs on it."""
    one, two = await opened(made, "lease=1"), await opened(made, "lease=1")
    topic = await declared(one, "g")
    await sent(one, numbered(topic, 3))
    receiver = await one.open_receiver(ReceiverSpec(topic, "g"))
    await take(receiver, 3)
    one.abandon()
    await server.xtrim(f"{{{topic}}}", maxlen=1, approximate=False)
    peer = await two.open_receiver(ReceiverSpec(topic, "g"))
    with caplog.at_level(logging.ERROR, "msgbus.redis"):
        assert bodies(await take(peer, 1)) == [2]
    assert caplog.text.count("not settled") == 2
    assert (await server.xpending(f"{{{topic}}}", "g"))["pending"] == 1


async def test_foreign_entries_are_tolerated(server: Redis, made: Made) -> None:
    """An XADD by others, with or without our fields, arrives, with an id of the broker's where it has none."""
    adapter = await opened(made)
    topic = await declared(adapter, "g")
    key = f"{{{topic}}}"
    await server.xadd(key, {"a": "1", "b": "zwei"})
    await server.xadd(key, {"data": b"\xff\x00", "tenant": "x", "msgbus-attempt": "7"})
    await server.xadd(key, {"ce_id": "their-id", "ce_type": "t", "ce_datacontenttype": "application/json", "data": "{}"})
    await server.xadd(key, {b"\xff\xfe": b"\xff", b"data": b"x"})
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    plain, raw, event, odd = [received.envelope for received in await take(receiver, 4)]
    assert plain.body == b'{"a": "1", "b": "zwei"}'
    assert plain.headers["content-type"] == "application/json"
    assert topic in plain.id
    assert (raw.body, raw.headers["tenant"], raw.group) == (b"\xff\x00", "x", None)
    assert (event.id, event.headers) == ("their-id", {"ce-type": "t", "content-type": "application/json"})
    assert odd.body == b"x"


async def test_a_key_of_another_kind_is_named(server: Redis, made: Made) -> None:
    """What stands under our name and is no stream fails the declaration, and is not touched."""
    adapter = await opened(made)
    await server.set("{taken}", "text")
    with pytest.raises(TopologyMismatch) as caught:
        await adapter.declare([TopicSpec("taken")], [])
    assert "{taken}" in caught.value.resource
    assert (caught.value.expected, caught.value.actual) == ("a stream", "a string")
    assert await server.get("{taken}") == b"text"
    await server.set("{other}:retry:g", "text")
    with pytest.raises(TopologyMismatch, match="retry"):
        await adapter.declare([TopicSpec("other")], [ReceiverSpec("other", "g")])


async def test_a_private_receiver_is_spared_by_trims(server: Redis, made: Made) -> None:
    """What a group is done with at once is still there for a private reader that is a moment behind."""
    adapter = await opened(made, "lease=10")
    topic = await declared(adapter, "g")
    private = await adapter.open_receiver(ReceiverSpec(topic, None, window=1))
    group = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    await sent(adapter, numbered(topic, 20))
    for received in await take(group, 20):
        group.ack(received)
    await asyncio.sleep(1.6)  # two trims
    for n in range(20):
        (received,) = await take(private, 1)
        assert bodies([received]) == [n]
        private.ack(received)


# ---------------------------------------------------------------- opening


async def test_who_is_not_let_in_is_told_so(url: str) -> None:
    """Wrong credentials, nobody there: a clear error that shows no password."""
    wrong = adapter_from_url(url.replace("redis://", "redis://somebody:hunter2@"), AdapterSettings())
    with pytest.raises(AuthenticationFailed) as refused:
        await wrong.open()
    absent = adapter_from_url("redis://:hunter2@127.0.0.1:1/0", AdapterSettings())
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1") as away:
        await absent.open()
    for text in (str(refused.value), str(away.value), repr(wrong), repr(absent)):
        assert "hunter2" not in text


async def test_a_server_that_may_lose_is_named(server: Redis, made: Made) -> None:
    """`explain` says what the server may lose, and `require_durable` refuses it."""
    await server.config_set("maxmemory-policy", "allkeys-lru")
    try:
        adapter = await opened(made)
        assert "allkeys-lru" in (await adapter.explain())["durability"]
        with pytest.raises(ConfigurationError, match="allkeys-lru"):
            await opened(made, "require_durable=true")
    finally:
        await server.config_set("maxmemory-policy", "noeviction")


async def test_a_lost_connection_is_replaced(server: Redis, made: Made) -> None:
    """CLIENT KILL of all ours: the receiver says so, the next call connects, and nothing is lost or counted as a death."""
    adapter = await opened(made, "lease=60")
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 3))
    receiver = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    await take(receiver, 3)
    for client in await server.client_list():
        if client["name"] == "msgbus":
            await server.client_kill_filter(_id=client["id"])
    with pytest.raises(BrokerUnavailable):
        await take(receiver, 1)
    await receiver.close()
    await adapter.ping()
    again = await adapter.open_receiver(ReceiverSpec(topic, "g"))
    taken = await take(again, 3)
    assert {received.crashes for received in taken} == {0}


async def test_a_call_that_finds_its_connection_broken_leaves_nothing_behind(made: Made) -> None:
    """It raises its own error; asyncio has no second one to complain of."""
    adapter = await opened(made)
    unheard: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context["message"]))
    next(iter(vars(adapter)["_sender"].topology.links._all))._connection._writer.transport.abort()
    with pytest.raises(BrokerUnavailable):
        await adapter.ping()
    await adapter.ping()  # the broken connection is forgotten
    gc.collect()
    assert unheard == []


@pytest.mark.parametrize("exclusive", [False, True])
async def test_what_is_in_hand_is_lost_with_the_connection(server: Redis, made: Made, exclusive: bool) -> None:
    """Also while nobody calls `receive`: a dead letter that cannot be stored keeps its subscription from that, and never could be."""
    adapter = await opened(made, "lease=60")
    topic = await declared(adapter, "g")
    await sent(adapter, numbered(topic, 1))
    (received,) = await take(await adapter.open_receiver(ReceiverSpec(topic, "g", exclusive=exclusive)), 1)
    await server.client_pause(10_000, all=False)  # its calls wait for their answers, and never get them
    try:
        async with asyncio.timeout(10):
            while not received.tenure.lost:
                for client in await server.client_list():
                    if client["name"] == "msgbus":
                        await server.client_kill_filter(_id=client["id"])
                await asyncio.sleep(0.1)
    finally:
        await server.client_unpause()


async def test_a_trim_after_a_replay_drops_nothing_that_waits_again(made: Made) -> None:
    """The id that a replay leaves is one that a trim can count on from: here another group's trims come before anything is read again."""
    adapter = await opened(made)
    topic = await declared(adapter, "again", "other", retain=600.0)
    specs = [ReceiverSpec(topic, group) for group in ("again", "other")]
    await sent(adapter, numbered(topic, 5))
    for spec in specs:
        receiver = await adapter.open_receiver(spec)
        for received in await take(receiver, 5):
            receiver.ack(received)
        await receiver.close()
    assert await adapter.replay(topic, "again", 0.0) == 5
    await sent(adapter, numbered(topic, 1))
    receiver = await adapter.open_receiver(specs[1])
    for received in await take(receiver, 1):
        receiver.ack(received)
    assert await receiver.receive(1, 2.5) == []  # two trims
    assert bodies(await take(await adapter.open_receiver(specs[0]), 6)) == [0, 1, 2, 3, 4, 0]
