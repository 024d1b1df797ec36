"""The Kafka adapter beside the conformance suite: what only Kafka has, and what its client library gets wrong by itself."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from tests.brokers import Server

from msgbus.contract.adapter import AdapterSettings, Received, Receiver, ReceiverSpec, TopicSpec
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import PRIORITIES, Envelope, new_id
from msgbus.errors import BrokerUnavailable, ConfigurationError, PublishRejected, PublishUnknown, TopologyMismatch
from msgbus_kafka import KafkaAdapter
from msgbus_kafka.cluster import BEGINNING, END, Cluster, Committed, NewTopic, places_of
from msgbus_kafka.partition import read_mark
from msgbus_kafka.url import read_url

SETTINGS = AdapterSettings(heartbeat=2.0, session_timeout=6.0)


pytestmark = pytest.mark.broker("kafka")


@pytest.fixture
def url(running: Server) -> str:
    """The broker."""
    return running.url


@contextlib.asynccontextmanager
async def opened(url: str, options: Mapping[str, str] | None = None, **settings: Any) -> AsyncGenerator[KafkaAdapter, None]:
    place, read = read_url(url, options or {}, AdapterSettings(**{"heartbeat": 2.0, "session_timeout": 6.0, **settings}))
    adapter = KafkaAdapter(place, read)
    await adapter.open()
    try:
        yield adapter
    finally:
        await adapter.close()


def fresh() -> str:
    return f"t{uuid4().hex[:12]}.orders"


def envelope(topic: str, body: bytes = b"{}", **fields: Any) -> Envelope:
    return Envelope(new_id(), topic, body, {}, **fields)


async def take(receiver: Receiver, count: int, seconds: float = 15.0) -> list[Received]:
    taken: list[Received] = []
    deadline = time.monotonic() + seconds
    while len(taken) < count:
        assert time.monotonic() < deadline, f"{len(taken)} of {count} came"
        taken += await receiver.receive(count - len(taken), 0.5)
    return taken


async def work(receiver: Receiver) -> None:
    while True:
        for received in await receiver.receive(10, 0.5):
            receiver.ack(received)


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def delete_records(url: str, ends: Mapping[TopicPartition, int]) -> None:
    """What lies before these offsets, as retention does."""
    admin: Any = importlib.import_module("aiokafka.admin")  # Any: typed by nobody
    client = admin.AIOKafkaAdminClient(bootstrap_servers=urlsplit(url).netloc)
    await client.start()
    try:
        await client.delete_records({place: admin.RecordsToDelete(before_offset=end) for place, end in ends.items()})
    finally:
        await client.close()


async def test_a_slow_head_is_never_committed_over(url: str) -> None:
    """Committing the highest finished offset would lose the slow record; committing the head alone would repeat what is done above it."""
    topic = fresh()
    async with opened(url, shards=1) as adapter:
        spec = ReceiverSpec(topic, "workers", window=10)
        await adapter.declare([TopicSpec(topic)], [spec])
        sent = [envelope(topic, b"%d" % number) for number in range(5)]
        await adapter.send(sent, timeout=5)
        receiver = await adapter.open_receiver(spec)
        taken = await take(receiver, 5)
        for received in taken[1:]:
            receiver.ack(received)
        await receiver.close()
        last = envelope(topic)
        await adapter.send([last], timeout=5)
        again = await adapter.open_receiver(spec)
        assert [received.envelope.id for received in await take(again, 2)] == [sent[0].id, last.id]


async def test_a_receiver_that_nobody_reads_keeps_what_is_in_hand(url: str) -> None:
    """aiokafka leaves its group when it is not polled; here, only when nothing is in hand, and another receive brings it back."""
    topic = fresh()
    async with opened(url) as adapter:
        spec = ReceiverSpec(topic, "workers", window=10)
        await adapter.declare([TopicSpec(topic)], [spec])
        receiver = await adapter.open_receiver(spec)
        await adapter.send([envelope(topic)], timeout=5)
        (first,) = await take(receiver, 1)
        await asyncio.sleep(2.5)  # it would leave, had it nothing in hand
        receiver.ack(first)
        assert receiver.stale_acks == 0
        await asyncio.sleep(2.5)  # it leaves
        await adapter.send([envelope(topic)], timeout=5)
        (second,) = await take(receiver, 1)
        assert second.envelope.id != first.envelope.id


async def test_what_runs_through_a_rebalance_runs_once(url: str) -> None:
    """A joiner takes only what is not in hand; what is moves when it is settled, and nothing comes twice."""
    topic = fresh()
    async with opened(url) as first, opened(url) as second:
        spec, one, running = await forty_in_hand(first, topic)
        two = await second.open_receiver(spec)
        await until_shared(one, two, running)
        for received in running:
            one.ack(received)
        assert one.stale_acks == 0
        await shared_and_once(first, topic, one, two)


async def test_what_is_acked_while_the_group_shares_out_runs_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are committed when a rebalance begins. What is acked before that commit is answered is not in it, so its partition stays."""
    topic = fresh()
    commit = Cluster.commit
    running: list[Received] = []

    async def acked_meanwhile(self: Cluster, group: str, offsets: Committed, generation: int = -1, member: str = "") -> bool:
        done = await commit(self, group, offsets, generation, member)
        if any(read_mark(text).state == "clean" for _, text in offsets.values()):
            for received in running:
                one.ack(received)
            running.clear()
        return done

    monkeypatch.setattr(Cluster, "commit", acked_meanwhile)
    async with opened(url) as first, opened(url) as second:
        spec, one, taken = await forty_in_hand(first, topic)
        running += taken
        two = await second.open_receiver(spec)
        deadline = time.monotonic() + 15
        while running:
            assert time.monotonic() < deadline
            await one.receive(1, 0.1)
        await shared_and_once(first, topic, one, two)


async def forty_in_hand(adapter: KafkaAdapter, topic: str) -> tuple[ReceiverSpec, Receiver, list[Received]]:
    """A new keyed topic's only receiver, with all of its messages un-settled."""
    spec = ReceiverSpec(topic, "workers", window=100, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])
    receiver = await adapter.open_receiver(spec)
    await adapter.send([envelope(topic, key=f"key{number}") for number in range(40)], timeout=5)
    return spec, receiver, await take(receiver, 40)


async def shared_and_once(adapter: KafkaAdapter, topic: str, one: Receiver, two: Receiver) -> None:
    """What is sent now comes to both, each message once, and nothing else comes."""
    later = [envelope(topic, key=f"key{number}") for number in range(40)]
    deadline = time.monotonic() + 15
    found: dict[str, str] = {}
    while {*found.values()} != {"one", "two"} or len(found) < 40:
        assert time.monotonic() < deadline, found
        if not found:
            await adapter.send(later, timeout=5)
        for name, receiver in (("one", one), ("two", two)):
            for received in await receiver.receive(100, 0.2):
                assert received.envelope.id not in found, "it came twice"
                found[received.envelope.id] = name
                receiver.ack(received)
    assert set(found) == {sent.id for sent in later}


async def until_shared(one: Receiver, two: Receiver, running: list[Received]) -> None:
    """Until the first is told to let go of some of what it has in hand."""
    deadline = time.monotonic() + 15
    while not any(received.tenure.draining for received in running):
        assert time.monotonic() < deadline
        assert await two.receive(1, 0.1) == []
        await one.receive(1, 0.1)
    assert not any(received.tenure.lost for received in running)


async def test_records_of_other_programs_are_received(url: str) -> None:
    """No headers, null bodies, headers twice and in any bytes; the topic may be there already, with partitions of its own."""
    topic = fresh()
    producer = AIOKafkaProducer(bootstrap_servers=urlsplit(url).netloc)
    async with opened(url) as adapter:
        await adapter.declare([TopicSpec(topic)], [])
        await producer.start()
        try:
            await producer.send_and_wait(topic, b"\xff", key=b"\xfe", headers=[("a", b"1"), ("a", b"\xff")])
            await producer.send_and_wait(topic, None, key=b"tomb")
        finally:
            await producer.stop()
        spec = ReceiverSpec(topic, "workers")
        await adapter.declare([TopicSpec(topic)], [spec])
        receiver = await adapter.open_receiver(spec)
        taken = {received.envelope.body: received for received in await take(receiver, 2)}
        strange = taken[b"\xff"]
        assert strange.envelope.headers["a"].encode("utf-8", "surrogateescape") == b"\xff"
        assert strange.envelope.id.startswith(f"{topic}/")
        assert taken[b""].envelope.key == "tomb"
        back = Envelope("x", topic, b"", strange.envelope.headers, strange.envelope.key, "workers")
        assert await adapter.send([back], timeout=5) == [None]
        (again,) = await take(receiver, 1)
        assert again.envelope.headers == strange.envelope.headers


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_others_compressed_is_received(url: str, codec: str) -> None:
    """The extra brings the codecs: a receiver without one would be stuck at the first such batch."""
    topic = fresh()
    producer = AIOKafkaProducer(bootstrap_servers=urlsplit(url).netloc, compression_type=codec)
    async with opened(url, shards=1) as adapter:
        spec = ReceiverSpec(topic, "workers")
        await adapter.declare([TopicSpec(topic)], [spec])
        await producer.start()
        try:
            await producer.send_and_wait(topic, b"x" * 1000)
        finally:
            await producer.stop()
        (received,) = await take(await adapter.open_receiver(spec), 1)
        assert received.envelope.body == b"x" * 1000


async def test_no_topic_is_made_by_being_named(url: str) -> None:
    """The brokers would make a missing topic with their own defaults; here it is refused, stored nowhere."""
    topic = fresh()
    async with opened(url) as adapter:
        for one in (envelope(topic), envelope(topic, group="workers")):
            (outcome,) = await adapter.send([one], timeout=5)
            assert isinstance(outcome, PublishRejected)
        with pytest.raises(BrokerUnavailable):
            await adapter.open_receiver(ReceiverSpec(topic, "workers"))
        assert await adapter.shards(topic) is None


async def test_a_broker_that_does_not_answer_leaves_the_message_unknown_and_the_next_one_well(url: str) -> None:
    """aiokafka's idempotent producer would wait for ever: here at most `timeout`, and the dead link is not used again."""
    topic = fresh()
    async with opened(url) as adapter:
        await adapter.declare([TopicSpec(topic)], [])
        assert await adapter.send([envelope(topic)], timeout=5) == [None]
        client = vars(vars(adapter)["_opened"].cluster)["_client"]
        for connection in vars(client)["_conns"].values():
            vars(connection)["_writer"].transport.pause_reading()
        began = time.monotonic()
        (outcome,) = await adapter.send([envelope(topic)], timeout=0.7)
        assert isinstance(outcome, PublishUnknown)
        assert time.monotonic() - began < 2.0
        assert await adapter.send([envelope(topic)], timeout=5) == [None]


async def test_nobody_there(url: str) -> None:
    """`BrokerUnavailable`, without the password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place, settings = read_url(f"kafka://me:pa55word@127.0.0.1:{free.getsockname()[1]}", {}, SETTINGS)
        adapter = KafkaAdapter(place, settings)
        with pytest.raises(BrokerUnavailable) as raised:
            await adapter.open()
        assert "pa55word" not in str(raised.value)
        await adapter.close()


async def test_a_later_group_begins_at_its_declaration_and_a_retained_topics_at_its_beginning(url: str) -> None:
    """Whether a topic has had a group is read from the broker, also when its last one was dropped."""
    plain, kept = fresh(), fresh()
    async with opened(url) as adapter:
        specs = [TopicSpec(plain), TopicSpec(kept, retain=3600.0)]
        await adapter.declare(specs, [ReceiverSpec(plain, "first"), ReceiverSpec(kept, "first")])
        await adapter.send([envelope(plain), envelope(kept)], timeout=5)
        assert await adapter.drop_group(plain, "first")
        await adapter.declare(specs, [ReceiverSpec(plain, "later"), ReceiverSpec(kept, "later")])
        assert (await adapter.depth(plain, "later")).ready == 0
        assert (await adapter.depth(kept, "later")).ready == 1
        with pytest.raises(TopologyMismatch):
            await adapter.declare([TopicSpec(kept, retain=60.0)], [])


async def test_the_first_group_gets_what_came_before_it_on_every_priority(url: str) -> None:
    """Its priorities are declared one after the other: the later ones are a first group's as well."""
    topic = fresh()
    async with opened(url) as adapter:
        await adapter.declare([TopicSpec(topic, priorities=True)], [])
        assert not any(await adapter.send([envelope(topic, priority=level) for level in PRIORITIES], timeout=5))
        specs = [ReceiverSpec(topic, "workers", priority=level) for level in PRIORITIES]
        await adapter.declare([TopicSpec(topic, priorities=True)], specs[:1])
        for spec in specs:
            (received,) = await take(await adapter.open_receiver(spec), 1)
            assert received.envelope.priority == spec.priority


async def test_replay_of_a_group_at_rest_and_of_one_at_work(url: str) -> None:
    """Everything from a moment on comes again; of a group at work, to those who work."""
    topic = fresh()
    async with opened(url) as adapter, opened(url) as operator:
        spec = ReceiverSpec(topic, "workers", window=20)
        await adapter.declare([TopicSpec(topic, retain=3600.0)], [spec])
        since = time.time() - 1
        sent = [envelope(topic) for _ in range(10)]
        await adapter.send(sent, timeout=5)
        receiver = await adapter.open_receiver(spec)
        for received in await take(receiver, 10):
            receiver.ack(received)
        assert await operator.replay(topic, "workers", since) == 10
        again = await take(receiver, 10)
        assert {received.envelope.id for received in again} == {one.id for one in sent}
        for received in again:
            receiver.ack(received)
        assert await receiver.receive(1, 1.0) == [], "once"
        await receiver.close()
        assert await operator.replay(topic, "workers", since) == 10
        receiver = await adapter.open_receiver(spec)
        for received in await take(receiver, 10):
            receiver.ack(received)
        assert await receiver.receive(1, 1.0) == [], "not what was ordered before, too"


async def test_a_replay_passes_nothing_over_that_still_waits(url: str) -> None:
    """What is older than the moment, and was not handed out yet, comes as it would have."""
    topic = fresh()
    async with opened(url, shards=1) as adapter:
        spec = ReceiverSpec(topic, "workers")
        await adapter.declare([TopicSpec(topic, retain=3600.0)], [spec])
        older, younger = envelope(topic), envelope(topic)
        await adapter.send([older], timeout=5)
        assert await adapter.replay(topic, "workers", time.time() + 60) == 0
        await adapter.send([younger], timeout=5)
        taken = await take(await adapter.open_receiver(spec), 2)
        assert [received.envelope.id for received in taken] == [older.id, younger.id]


async def test_dead_letters_in_hand_do_not_wait(url: str) -> None:
    """Or whoever redrives some of them would wait for the rest, which it holds itself, to be handed out."""
    topic = dead_topic(fresh(), "workers")
    async with opened(url) as adapter:
        spec = ReceiverSpec(topic, DEAD_GROUP, window=10)
        await adapter.declare([TopicSpec(topic, kind="dead")], [spec])
        assert await adapter.send([envelope(topic) for _ in range(3)], timeout=5) == [None] * 3
        receiver = await adapter.open_receiver(spec)
        first, *others = await take(receiver, 2)
        depth = await adapter.depth(topic, DEAD_GROUP)
        assert (depth.ready, depth.in_flight) == (1, 2)
        receiver.ack(first)
        for received in others:
            await receiver.release(received)
        await receiver.close()
        depth = await adapter.depth(topic, DEAD_GROUP)
        assert (depth.ready, depth.in_flight) == (2, 0), "what was settled is gone when it is closed, nothing else"


async def test_a_dropped_group_is_noticed_long_before_a_heartbeat(url: str) -> None:
    """The receivers look at their group twice a second."""
    topic = fresh()
    async with opened(url, heartbeat=30.0, session_timeout=30.0) as adapter, opened(url) as operator:
        spec = ReceiverSpec(topic, "workers")
        await adapter.declare([TopicSpec(topic)], [spec])
        receiver = await adapter.open_receiver(spec)
        await adapter.send([envelope(topic)], timeout=5)
        for received in await take(receiver, 1):
            receiver.ack(received)
        assert await operator.drop_group(topic, "workers")
        with pytest.raises(BrokerUnavailable):
            await take(receiver, 1, seconds=5)


async def test_what_is_deleted_before_it_was_read_is_said(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Kafka deletes what is old, whoever has not had it: the log says how many, and the group goes on with what there is."""
    topic = fresh()
    async with opened(url, shards=1) as adapter:
        spec = ReceiverSpec(topic, "workers", window=10)
        await adapter.declare([TopicSpec(topic)], [spec])
        sent = [envelope(topic) for _ in range(10)]
        await adapter.send(sent, timeout=5)
        await delete_records(url, {TopicPartition(topic, 0): 4})
        receiver = await adapter.open_receiver(spec)
        taken = await take(receiver, 6)
        assert [received.envelope.id for received in taken] == [one.id for one in sent[4:]]
        for received in taken:
            receiver.ack(received)
        await receiver.close()
        assert (await adapter.depth(topic, "workers")).ready == 0
    (said,) = [record.message for record in caplog.records if "data loss suspected" in record.message]
    assert "4 messages of" in said
    assert topic in said
    assert "workers" in said


async def test_every_partition_goes_on_at_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """aiokafka says of one after the other that it lost messages: the next is not left until something else happens."""
    topic = fresh()
    async with opened(url, shards=8) as adapter:
        spec = ReceiverSpec(topic, "workers", window=10)
        await adapter.declare([TopicSpec(topic)], [spec])
        await adapter.send([envelope(topic, key=f"key{number}") for number in range(100)], timeout=5)
        await delete_records(url, await adapter._open().cluster.offsets(dict.fromkeys(places_of({topic: range(8)}), END)))
        receiver = await adapter.open_receiver(spec)

        async def receive() -> None:
            while True:
                assert await receiver.receive(10, 60.0) == []

        receiving = asyncio.create_task(receive())
        try:
            await until(lambda: sum("data loss suspected" in record.message for record in caplog.records) == 8)
        finally:
            receiving.cancel()
            await asyncio.wait({receiving})


async def test_a_partition_that_goes_away_while_its_loss_is_looked_at_is_the_others(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it by then goes on with it; the one that looked goes on without."""
    topic = fresh()
    kept, moving = places_of({topic: range(2)})
    looking, gone = asyncio.Event(), asyncio.Event()
    offsets = Cluster.offsets
    async with opened(url) as first, opened(url) as second:
        spec = ReceiverSpec(topic, "workers", window=100)
        await first.declare([TopicSpec(topic, shards=2)], [spec])
        await first.send([envelope(topic, key=f"key{number}") for number in range(100)], timeout=5)
        await delete_records(url, {moving: 4})
        mine = first._open().cluster
        left = (await mine.offsets({moving: END}))[moving] - 4

        async def slow(cluster: Cluster, moments: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
            if cluster is mine and BEGINNING in moments.values():
                looking.set()
                await gone.wait()
            return await offsets(cluster, moments)

        monkeypatch.setattr(Cluster, "offsets", slow)
        one = await first.open_receiver(spec)

        async def receive() -> None:
            while not gone.is_set():
                for received in await one.receive(100, 30.0):
                    one.ack(received)

        receiving = asyncio.create_task(receive())
        async with asyncio.timeout(30):
            await looking.wait()
            two = await second.open_receiver(spec)
            await until(lambda: not vars(one)["_suspended"] and {moving, kept} & vars(one)["_partitions"].keys() == {kept})
            gone.set()
            await receiving
            await take(two, left)


async def test_a_topic_that_is_made_again_under_what_is_in_hand_is_read_from_its_beginning(url: str) -> None:
    """What is acked of the old one is not committed to the new one, of which it would pass as much over."""
    topic = fresh()
    async with opened(url, shards=1) as adapter, opened(url) as operator:
        spec = ReceiverSpec(topic, "workers", window=10)
        await adapter.declare([TopicSpec(topic)], [spec])
        await adapter.send([envelope(topic) for _ in range(20)], timeout=5)
        receiver = await adapter.open_receiver(spec)
        taken = await take(receiver, 10)  # aiokafka has the others, so it asks for no more, and hears nothing
        cluster = operator._open().cluster
        await cluster.delete([topic])
        await cluster.create([NewTopic(topic, 1, 1, {})])
        sent = [envelope(topic) for _ in range(30)]
        async with asyncio.timeout(15):
            while any(await operator.send(sent, timeout=5)):
                pass
            for received in taken:
                receiver.ack(received)
            with pytest.raises(BrokerUnavailable, match="deleted"):
                await work(receiver)
        again = await adapter.open_receiver(replace(spec, window=30))
        assert [received.envelope.id for received in await take(again, 30)] == [one.id for one in sent]


async def test_what_transactions_leave_in_a_topic_is_not_waiting(url: str) -> None:
    """A transaction of another program ends with a mark that is no message: a group that has done all has nothing left."""
    topic = fresh()
    producer = AIOKafkaProducer(bootstrap_servers=urlsplit(url).netloc, transactional_id=topic)
    async with opened(url, shards=1) as adapter:
        spec = ReceiverSpec(topic, "workers")
        await adapter.declare([TopicSpec(topic)], [spec])
        receiver = await adapter.open_receiver(spec)
        async with asyncio.timeout(60):
            await producer.start()
            try:
                async with producer.transaction():
                    await producer.send_and_wait(topic, b"{}")
            finally:
                await producer.stop()
            for received in await take(receiver, 1):
                receiver.ack(received)
            while (await adapter.depth(topic, "workers")).ready:
                await receiver.receive(1, 0.2)


@pytest.mark.parametrize("options", [{}, {"instance": "one"}], ids=["dynamic", "static"])
async def test_a_topic_that_is_deleted_and_made_again_is_read(url: str, options: Mapping[str, str]) -> None:
    """Its receivers end within seconds, where aiokafka would look after minutes; who opens one then gets all of the new one, and not, where
    members are static, what its last share was."""
    topic = fresh()
    async with opened(url, options, shards=1) as adapter, opened(url) as operator:
        spec = ReceiverSpec(topic, "workers", window=10)
        await adapter.declare([TopicSpec(topic)], [spec])
        await adapter.send([envelope(topic) for _ in range(5)], timeout=5)
        receiver = await adapter.open_receiver(spec)
        for received in await take(receiver, 5):
            receiver.ack(received)
        cluster = operator._open().cluster
        await cluster.delete([topic])
        with pytest.raises(BrokerUnavailable, match="deleted"):
            await take(receiver, 1)
        await cluster.create([NewTopic(topic, 1, 1, {})])
        again = await adapter.open_receiver(spec)
        sent = [envelope(topic) for _ in range(3)]
        async with asyncio.timeout(15):
            while any(await adapter.send(sent[:1], timeout=5)):  # it looks anew who leads
                pass
        assert await adapter.send(sent[1:], timeout=5) == [None, None]
        assert [received.envelope.id for received in await take(again, 3)] == [one.id for one in sent]


async def test_who_is_about_to_lose_messages_is_warned(url: str) -> None:
    """A group is named while its oldest message has waited for half of the time after which Kafka deletes it."""
    topic = fresh()
    group = topic, "workers"
    async with opened(url, shards=2) as adapter:
        spec = ReceiverSpec(*group)
        await adapter.declare([TopicSpec(topic, retain=4.0)], [spec, ReceiverSpec(topic, "others")])
        assert await adapter.warnings([group, (topic, "nobody")]) == []
        await adapter.send([envelope(topic)], timeout=5)
        await asyncio.sleep(2.1)  # half of it, by the clock of the record
        (warning,) = await adapter.warnings([group])
        assert topic in warning
        assert "'workers'" in warning
        assert "4 s" in warning
        receiver = await adapter.open_receiver(spec)
        for received in await take(receiver, 1):
            receiver.ack(received)
        await receiver.close()
        assert await adapter.warnings([group]) == []
        assert await adapter.warnings([]) == []
        assert len(await adapter.warnings([(topic, "others")])) == 1


async def test_nobody_is_warned_of_what_is_kept_for_ever(url: str) -> None:
    """Also where that is said by the longest time that Kafka knows: half of it ago, there were no time stamps."""
    topic = fresh()
    async with opened(url) as adapter:
        await adapter.declare([TopicSpec(topic, native={"retention.ms": str(2**63 - 1)})], [ReceiverSpec(topic, "workers")])
        await adapter.send([envelope(topic)], timeout=5)
        assert await adapter.warnings([(topic, "workers")]) == []


async def test_many_topics_are_made_a_few_at_a_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has a deadline, whatever it asks for: 200 subscriptions' topics in one were too much for a slow broker."""
    made: list[int] = []
    create = Cluster.create

    async def counted(self: Cluster, topics: Sequence[NewTopic]) -> None:
        made.append(len(topics))
        await create(self, topics)

    monkeypatch.setattr(Cluster, "create", counted)
    base = fresh()
    specs = [TopicSpec(f"{base}{number}", keyed=True, shards=1) for number in range(25)]
    async with opened(url) as adapter:
        await adapter.declare(specs, [])
        await adapter.declare(specs, [], create=False)
    assert sum(made) == 50  # a topic, and one for what is delayed
    assert max(made) <= 20


@pytest.mark.parametrize("session", [5.0, 7200.0])
async def test_a_session_that_the_brokers_do_not_allow_is_named(url: str, session: float) -> None:
    """At the start, by the setting's name and with what they allow: else it would be the end of every subscription, later."""
    with pytest.raises(ConfigurationError, match=rf"session_timeout of {session:g} s .* 6 to 1800 s"):
        async with opened(url, session_timeout=session):
            pass


async def test_time_without_end(url: str) -> None:
    """Who waits for years for a confirm gets it."""
    topic = fresh()
    async with opened(url) as adapter:
        await adapter.declare([TopicSpec(topic)], [])
        assert await adapter.send([envelope(topic)], timeout=300 * 86400.0) == [None]
