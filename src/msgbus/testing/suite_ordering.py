"""Conformance: order, priority, time. C4, C12 and C2 of the contract, and what a retry does to them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import pytest
from tenacity import wait_fixed

from msgbus.bus import Bus
from msgbus.contract.adapter import Capability
from msgbus.contract.envelope import PRIORITIES
from msgbus.retry import Retry
from msgbus.testing.stage import Order, Seen, Stage, Waits, conformance, eventually, keys_of_shards, patient, take
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
KEYED = Topic("orders", Order, key="id")
RANKED = Topic("orders", Order, priorities=True)

SHARDS = 8
LATENESS = 2.0
"""Seconds that a delayed message may be late on an idle broker before the suite calls it lost; the aim is one second."""


class History:
    """What ran, in which process. Judges order as C4 says it: by first completions, and no two runs of a key at once in a process."""

    def __init__(self) -> None:
        self.completed: Seen[tuple[str, int, str]] = Seen()
        """(key, n, process) in the order that runs ended well."""
        self.overlaps: list[str] = []
        self._running: dict[tuple[str, str], int] = {}

    async def run(self, process: str, order: Order, seconds: float) -> None:
        """A handler's work: takes a while, and is noted when it is over."""
        lane = (process, order.id)
        if lane in self._running:
            self.overlaps.append(f"{process}: {order.id} {order.n} began while {self._running[lane]} ran")
        self._running[lane] = order.n
        try:
            await asyncio.sleep(seconds)
        finally:
            self._running.pop(lane, None)
        await self.completed.add((order.id, order.n, process))

    def first_completions(self) -> dict[str, list[int]]:
        """The numbers of each key, each where it was completed first."""
        found: dict[str, dict[int, None]] = defaultdict(dict)
        for key, n, _ in self.completed.items:
            found[key].setdefault(n)
        return {key: list(numbers) for key, numbers in found.items()}

    async def complete(self, keys: list[str], count: int, seconds: float = 20.0) -> None:
        """Waits until every key has been through 0 ... count-1, then judges."""
        wanted = {(key, n) for key in keys for n in range(count)}
        await self.completed.wait_until(
            lambda items: wanted <= {(key, n) for key, n, _ in items}, seconds, f"{len(keys)} keys with {count} each"
        )
        assert self.overlaps == []
        assert self.first_completions() == {key: list(range(count)) for key in keys}


def ordered_bus(stage: Stage, history: History, process: str, *, longest: float = 0.003, topic: Topic[Order] = KEYED) -> Bus:
    """A bus whose handler takes a random while, so that what may overtake does."""
    bus = stage.bus()
    draw = random.Random(process)

    @bus.subscribe(topic)
    async def handle(order: Order) -> None:
        await history.run(process, order, draw.uniform(0, longest))

    return bus


def by_turns(keys: list[str], count: int) -> list[Order]:
    """0 of every key, then 1 of every key, ..."""
    return [Order(id=key, n=n) for n in range(count) for key in keys]


# ---------------------------------------------------------------- order


@conformance(needs=Capability.SHARDS)
async def per_key_order_single_consumer(stage: Stage) -> None:
    """C4: one process completes the messages of a key in the order published, one at a time, and however long each of them takes:
    published one by one, or by `publish_many`, whose iterable's order it is."""
    history = History()
    await stage.start(ordered_bus(stage, history, "a"))
    publisher = await stage.publisher()
    keys = [f"key{number}" for number in range(10)]
    orders = by_turns(keys, 20)
    for order in orders[:100]:
        await publisher.publish(KEYED, order)
    assert await publisher.publish_many(KEYED, orders[100:]) == 100
    await history.complete(keys, 20)


@conformance(needs=Capability.SHARDS)
async def per_key_order_many_consumers(stage: Stage) -> None:
    """C4: also with several processes of the group at work, each of many handlers at once."""
    history = History()
    for process in "abc":
        await stage.start(ordered_bus(stage, history, process))
    publisher = await stage.publisher()
    keys = [f"key{number}" for number in range(24)]
    await publisher.publish_many(KEYED, by_turns(keys, 20))
    await history.complete(keys, 20)


@conformance(needs=Capability.SHARDS, seconds=120)
async def shards_spread_over_processes_and_come_back(stage: Stage) -> None:
    """C4: the shards of a keyed topic are shared out among a group's processes: each belongs to one of them, and no process has more
    than two more than another. They come back to who is left when a process leaves or dies, and nothing is lost or out of order by that."""
    topic = Topic("orders", Order, key="id", shards=SHARDS)
    keys = keys_of_shards(stage.broker, SHARDS, 3)
    shard_of = {key: shard for shard, mine in enumerate(keys) for key in mine}
    history = History()
    publisher = await stage.publisher()
    rounds = 0

    async def owners() -> dict[int, set[str]]:
        """Which processes complete a shard's messages just now: one message of every key is published to find out."""
        nonlocal rounds
        n, rounds = rounds, rounds + 1
        await publisher.publish_many(topic, [Order(id=key, n=n) for key in shard_of])
        done = await history.completed.wait_until(
            lambda items: {key for key, number, _ in items if number == n} == shard_of.keys(), 30, f"round {n} of every key"
        )
        found: dict[int, set[str]] = defaultdict(set)
        for key, number, process in done:
            if number == n:
                found[shard_of[key]].add(process)
        return found

    async def until_shared_by(*processes: str) -> None:
        """Every shard has one owner, and the processes have as many, give or take two, twice in a row."""
        seen = dict[int, set[str]]()
        try:
            async with asyncio.timeout(patient(20)):
                in_a_row = 0
                while in_a_row < 2:
                    seen = await owners()
                    shares = Counter(process for owner in seen.values() for process in owner)
                    fair = shares.keys() == set(processes) and max(shares.values()) - min(shares.values()) <= 2
                    in_a_row = in_a_row + 1 if fair and all(len(owner) == 1 for owner in seen.values()) else 0
                    if not in_a_row:
                        await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"{SHARDS} shards are not shared by {', '.join(processes)}: {seen}")

    await stage.start(ordered_bus(stage, history, "a", topic=topic))
    await until_shared_by("a")
    second = await stage.start(ordered_bus(stage, history, "b", topic=topic))
    await until_shared_by("a", "b")
    await second.stop()
    await until_shared_by("a")
    third = await stage.start(ordered_bus(stage, history, "c", topic=topic))
    await until_shared_by("a", "c")
    await third.kill()
    await until_shared_by("a")
    await history.complete(list(shard_of), rounds)


@conformance(needs=Capability.SHARDS, seconds=120)
async def order_survives_drain_and_kill(stage: Stage) -> None:
    """C4, C5, C10: the order of first completions of a key holds while processes come, drain and die in the midst of their work; a death
    may repeat what was in hand, and loses nothing."""
    history = History()
    publisher = await stage.publisher()
    keys = [f"key{number}" for number in range(8)]
    count = 50

    async def at(completions: int) -> None:
        await history.completed.wait_until(
            lambda items: len({(key, n) for key, n, _ in items}) >= completions, 30, f"{completions} completions"
        )

    first = await stage.start(ordered_bus(stage, history, "a", longest=0.01))
    await publisher.publish_many(KEYED, by_turns(keys, count))
    await at(40)
    second = await stage.start(ordered_bus(stage, history, "b", longest=0.01))
    await at(90)
    await first.kill()
    await at(140)
    await stage.start(ordered_bus(stage, history, "c", longest=0.01))
    await at(190)
    await second.stop()
    await at(240)
    fourth = await stage.start(ordered_bus(stage, history, "d", longest=0.01))
    await at(280)
    await fourth.kill()
    await history.complete(keys, count, 40)


@conformance(needs=Capability.SHARDS | Capability.CRASH_COUNT, seconds=120)
async def order_survives_a_quarantine(stage: Stage) -> None:
    """C4, C8: messages that were in hand at two deaths are handled one at a time until the suspicion is gone: in the order of their keys,
    and nothing is lost by it."""
    publisher = await stage.publisher()
    keys = [f"key{number}" for number in range(3)]
    await publisher.publish_many(KEYED, by_turns(keys, 30))
    for _ in range(2):
        begun: Seen[str] = Seen()
        bus = stage.bus()

        @bus.subscribe(KEYED)
        async def handle(order: Order, begun: Seen[str] = begun) -> None:
            await begun.add(order.id)
            await asyncio.Event().wait()

        dying = await stage.start(bus)
        await begun.wait_for(1, 30)
        await dying.kill()
    history = History()
    await stage.start(ordered_bus(stage, history, "c"))
    await history.complete(keys, 30, 40)


@conformance(needs=Capability.SHARDS)
async def keys_run_in_parallel(stage: Stage) -> None:
    """C4: order is a key's own: messages of as many keys as `concurrency` says run at once in one process."""
    bus = stage.bus()
    together = asyncio.Barrier(8)
    seen: Seen[str] = Seen()

    @bus.subscribe(KEYED, concurrency=8)
    async def handle(order: Order) -> None:
        await together.wait()
        await seen.add(order.id)

    await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish_many(KEYED, [Order(id=f"key{number}") for number in range(8)])
    await seen.wait_for(8)


@conformance(needs=Capability.SHARDS)
async def slow_key_does_not_block_others(stage: Stage) -> None:
    """C4: a key whose message takes long, or waits for its retry, holds up its own successors and nobody else's, be it in the same
    shard; and what waits for a retry holds no running slot."""
    pause = patient(1.5)
    bus = stage.bus(retry=Retry(attempts=20, wait=wait_fixed(pause)))
    goes_on = asyncio.Event()
    began: Seen[tuple[str, int]] = Seen()
    others: Seen[str] = Seen()
    shard = keys_of_shards(stage.broker, SHARDS, 12)[0]
    slow, failing, quick = shard[0], shard[1], shard[2:]

    @bus.subscribe(Topic("orders", Order, key="id", shards=SHARDS), concurrency=2, window=16)
    async def handle(order: Order) -> None:
        if order.id == slow:
            await began.add((slow, order.n))
            await goes_on.wait()
        elif order.id == failing:
            await began.add((failing, order.n))
            if not goes_on.is_set():
                raise ValueError("not yet")
        else:
            await others.add(order.id)

    await stage.start(bus)
    publisher = await stage.publisher()
    waits = [Order(id=key, n=n) for n in range(2) for key in (slow, failing)]
    await publisher.publish_many(KEYED, waits)
    await began.wait_until(lambda items: {(slow, 0), (failing, 0)} <= set(items), 10, "both keys")
    await publisher.publish_many(KEYED, [Order(id=key) for key in quick])
    await others.wait_for(len(quick), 1.5)  # less than the failed one waits: it has no slot meanwhile
    assert (slow, 1) not in began.items
    assert (failing, 1) not in began.items
    goes_on.set()
    await began.wait_until(lambda items: {(slow, 1), (failing, 1)} <= set(items), 10, "the successors")


# ---------------------------------------------------------------- time


@conformance(needs=Capability.DELAY)
async def delay_not_before(stage: Stage) -> None:
    """C12: `delay` and `deliver_at` mean not before; on an idle broker not much later either."""
    bus = stage.bus()
    arrived: Seen[tuple[int, float]] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await arrived.add((order.n, time.time()))

    await stage.start(bus)
    publisher = await stage.publisher()
    due: dict[int, float] = {}
    for n, seconds in enumerate((0.1, 0.35, 0.5)):
        due[n] = time.time() + seconds
        await publisher.publish(ORDERS, Order(n=n), delay=timedelta(seconds=seconds))
    due[3] = time.time() + 0.4
    await publisher.publish(ORDERS, Order(n=3), deliver_at=datetime.fromtimestamp(due[3], UTC))
    due[4] = time.time()
    await publisher.publish(ORDERS, Order(n=4), deliver_at=datetime.fromtimestamp(due[4] - 60, UTC))  # the past is now
    items = await arrived.wait_for(5)
    assert sorted(n for n, _ in items) == [0, 1, 2, 3, 4]
    late = {n: moment - due[n] for n, moment in items}
    assert min(late.values()) > -0.005, f"early, in seconds: {late}"  # clocks are read in milliseconds
    assert max(late.values()) < patient(LATENESS), f"late, in seconds: {late}"


@conformance(needs=Capability.DELAY)
async def delay_ordering_of_different_delays(stage: Stage) -> None:
    """C12: a message with a long delay holds up none with a shorter one, nor one without: they come as they are due."""
    bus = stage.bus()
    arrived: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await arrived.add(order.n)

    await stage.start(bus)
    publisher = await stage.publisher()
    for n, seconds in ((3, 1.3), (1, 0.3), (2, 0.8)):
        await publisher.publish(ORDERS, Order(n=n), delay=timedelta(seconds=seconds))
    await publisher.publish(ORDERS, Order(n=0))
    assert await arrived.wait_for(4) == [0, 1, 2, 3]


@conformance(needs=Capability.DELAY)
async def delay_survives_restart(stage: Stage) -> None:
    """C2, C12: a delayed message is kept by the broker: it comes, not early, when every process that knew of it has died meanwhile."""
    arrived: Seen[tuple[int, float]] = Seen()

    def consuming() -> Bus:
        bus = stage.bus()

        @bus.subscribe(ORDERS)
        async def handle(order: Order) -> None:
            await arrived.add((order.n, time.time()))

        return bus

    worker = await stage.start(consuming())
    publishing = stage.bus(service="publisher")
    async with publishing:
        due = time.time() + 1.5
        await publishing.publish(ORDERS, Order(n=1), delay=timedelta(seconds=1.5))
        await publishing.publish(ORDERS, Order(n=2))
        await arrived.wait_for(1, 15)
        adapter = publishing.given_adapter
        assert adapter is not None
        await stage.broker.crash(adapter)
    await worker.kill()
    assert [n for n, _ in arrived.items] == [2]
    await stage.start(consuming())
    items = await arrived.wait_until(lambda found: any(n == 1 for n, _ in found), 15, "the delayed one")
    (came,) = [at for n, at in items if n == 1]
    assert came >= due - 0.005


@conformance(needs=Capability.DELAY)
async def delay_scoped_to_group(stage: Stage) -> None:
    """C2: what is delayed for one group, a retry, comes to this group alone, in its time; what is delayed for all comes to all."""
    adapter = await stage.open_adapter()
    specs = {group: stage.receiver_spec(group=group) for group in ("one", "two")}
    await adapter.declare([stage.topic_spec()], list(specs.values()))
    receivers = {group: await stage.receiver(adapter, spec) for group, spec in specs.items()}
    started = time.time()
    own = stage.envelope(body=b"own", group="one", delay=0.3)
    everyones = stage.envelope(body=b"everyone's", delay=0.7)
    assert await adapter.send([own, everyones], timeout=5) == [None, None]
    first, second = await take(receivers["one"], 2)
    assert [first.envelope.body, second.envelope.body] == [b"own", b"everyone's"]
    assert first.envelope.group == "one"
    assert time.time() >= started + 0.7 - 0.005
    (other,) = await take(receivers["two"], 1)
    assert other.envelope.body == b"everyone's"
    for receiver, received in ((receivers["one"], first), (receivers["one"], second), (receivers["two"], other)):
        receiver.ack(received)
    assert await adapter.send([stage.envelope(body=b"last")], timeout=5) == [None]
    for receiver in receivers.values():
        (last,) = await take(receiver, 1)
        assert last.envelope.body == b"last"
        receiver.ack(last)


# ---------------------------------------------------------------- priority


@conformance(needs=Capability.PRIORITIES)
async def priority_preempts_backlog(stage: Stage) -> None:
    """A message of high priority does not queue behind a backlog of lower ones, not even behind what the process has fetched of it."""
    bus = stage.bus()
    started: Seen[Order] = Seen()

    @bus.subscribe(RANKED, concurrency=2, window=52)
    async def handle(order: Order) -> None:
        await started.add(order)
        await asyncio.sleep(0.005)  # its work

    publisher = await stage.publisher()
    await stage.start(bus)
    backlog = 300
    bus.pause("handle")
    await publisher.publish_many(RANKED, [Order(id="normal", n=n) for n in range(backlog // 2)])
    await publisher.publish_many(RANKED, [Order(id="low", n=n) for n in range(backlog // 2)], priority="low")
    bus.resume("handle")
    await started.wait_for(20)
    await publisher.publish(RANKED, Order(id="high"), priority="high")
    before = len(started.items)
    items = await started.wait_until(lambda seen: any(order.id == "high" for order in seen), 20, "the high one")
    waited = next(place for place, order in enumerate(items) if order.id == "high") - before
    assert waited < 60, f"{waited} of a backlog of {backlog} were begun before it"
    await started.wait_for(backlog + 1)


@conformance(needs=Capability.PRIORITIES)
async def priority_no_starvation(stage: Stage) -> None:
    """While there is work of every priority, each has its share: the higher one more, the lowest not nothing."""
    bus = stage.bus()
    started: Seen[str] = Seen()

    @bus.subscribe(RANKED, concurrency=4, window=26)
    async def handle(order: Order) -> None:
        await started.add(order.id)
        await asyncio.sleep(0.01)  # its work

    publisher = await stage.publisher()
    await stage.start(bus)
    bus.pause("handle")
    counts = {"high": 1200, "normal": 240, "low": 60}  # none is done in the moment that a broker hands out another one later
    for priority in PRIORITIES:
        await publisher.publish_many(RANKED, [Order(id=priority) for _ in range(counts[priority])], priority=priority)
    bus.resume("handle")
    items = await started.wait_for(sum(counts.values()), 30)
    places = {priority: [place for place, item in enumerate(items) if item == priority] for priority in PRIORITIES}
    for priority in ("normal", "low"):
        assert places[priority][-1] < places["high"][-1], f"{priority} had to wait until all of high was done"
    begun = max(found[0] for found in places.values())  # a broker may hand out the first one of a priority a moment later
    ended = min(found[-1] for found in places.values())
    shared = Counter(items[begun : ended + 1])
    assert shared["high"] > shared["normal"] > shared["low"] > 0, dict(shared)


# ---------------------------------------------------------------- expiry


@conformance()
async def ttl_expired_not_delivered(stage: Stage) -> None:
    """C2: a message that expired before it was handed out reaches no handler and makes no dead letter; it is counted, and settled."""
    bus = stage.bus()
    seen: Seen[str] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.text)

    worker = await stage.start(bus)
    await worker.stop()  # the group is declared, and nobody is there
    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order(text="too late"), expires_in=timedelta(seconds=0.2))
    await publisher.publish(ORDERS, Order(text="in time"), expires_in=timedelta(seconds=60))
    await publisher.publish(ORDERS, Order(text="for ever"))
    expires = time.time() + 0.2
    await eventually(lambda: time.time() > expires + 0.05)
    again = await stage.start(bus)
    await seen.wait_for(2)
    await publisher.publish(ORDERS, Order(text="last"))
    await seen.wait_for(3)
    assert sorted(seen.items) == ["for ever", "in time", "last"]
    (health,) = again.bus.health().subscriptions
    assert health.counts.get("expired", 0) <= 1  # 0 where the broker throws it away itself
    assert await stage.dead_letters(0) == []


@conformance(seconds=60)
async def ttl_checked_before_retry(stage: Stage) -> None:
    """C2, 4: a failed message that expires before its next run is not kept waiting for it: it is a dead letter with the reason `expired`
    at once, and stays one when its time is over. One whose next run is in time is run."""
    runs: Seen[str] = Seen()
    bus = stage.bus(retry=Retry(attempts=5, wait=Waits(lambda attempt: 30.0 if attempt > 1 else 0.05)))

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await runs.add(order.text)
        raise ValueError("it fails")

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    expires = time.time() + 2
    await publisher.publish(ORDERS, Order(text="perishable"), expires_in=timedelta(seconds=2))
    (letter,) = await stage.dead_letters(1, seconds=1.5)
    assert (letter.reason, letter.attempts) == ("expired", 2)
    assert "it fails" in letter.error
    assert runs.items == ["perishable"] * 2
    await eventually(lambda: time.time() > expires + 0.05)
    (kept,) = await stage.dead_letters(1)
    assert kept.id == letter.id
    assert await worker.bus.dead_letters(ORDERS, group="suite").redrive() == 0
