"""Random programs against a simple model: nothing lost, nothing doubled; order, windows and counts are right."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.unit.memory.helpers import T, envelope

from msgbus.contract.adapter import Depth, Received, ReceiverSpec, TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import Envelope
from msgbus_memory import MemoryAdapter, broker
from msgbus_memory.receiver import MemoryReceiver

SHARDS = 3
SHARED, ORDERED = "shared", "ordered"
"""Two groups: of receivers that share everything, and of exclusive ones."""
GROUPS = (SHARED, ORDERED)
_T = TypeVar("_T")


class Clock:
    """Stands for the module `time` in the broker: it passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        """Seconds since the epoch."""
        return self.now

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@dataclass(eq=False)
class Copy:
    """A group's copy of a message."""

    envelope: Envelope
    due: float
    place: int
    state: Literal["delayed", "ready", "held", "done"]
    crashes: int = 0


@dataclass(eq=False)
class Taker:
    """A receiver and what it holds."""

    group: str
    window: int
    receiver: MemoryReceiver
    held: dict[Received, Copy] = field(default_factory=dict)
    draining: bool = False


class BrokerMachine(RuleBasedStateMachine):
    """A keyed topic with two groups; two buses with receivers of both."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.patched = patch.object(broker, "time", self.clock)
        self.patched.start()
        self.places = 0
        self.copies: dict[str, list[Copy]] = {group: [] for group in GROUPS}
        self.takers: list[Taker] = []
        self.stale: list[tuple[MemoryReceiver, Received]] = []
        self.adapter = MemoryAdapter(limit=10_000)
        self.run(self.begin())

    async def begin(self) -> None:
        """Opens and declares, as a bus does at its start."""
        await self.adapter.open()
        spec = TopicSpec(T, keyed=True, shards=SHARDS)
        await self.adapter.declare([spec], [ReceiverSpec(T, group) for group in GROUPS])

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs to the end."""
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        """Whatever happened, with one receiver each group must get the rest, once, in order."""
        try:
            for taker in list(self.takers):
                self.close(self.takers.index(taker))
            self.pass_time(1000)
            for group in GROUPS:
                self.join(group, 10_000)
                taker = self.takers[-1]
                self.receive(len(self.takers) - 1, 10_000)
                assert all(copy.state in ("held", "done") for copy in self.copies[group])
                while taker.held:
                    self.ack(len(self.takers) - 1, 0)
            self.depths_agree()
            assert all(copy.state == "done" for group in GROUPS for copy in self.copies[group])
            self.run(self.adapter.close())
        finally:
            self.patched.stop()
            self.loop.close()

    def arrive(self, copies: list[Copy]) -> None:
        """They are in the queue now, in this order."""
        for copy in copies:
            self.places += 1
            copy.place = self.places
            copy.state = "ready"

    def went_back(self, taker: Taker, crashes: int) -> None:
        """What a receiver held is ready again, at its old place."""
        for received, copy in taker.held.items():
            copy.state = "ready"
            copy.crashes += crashes
            self.stale.append((taker.receiver, received))
        taker.held.clear()

    @rule(
        batch=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([None, None, *GROUPS]), st.sampled_from([0.0, 0.0, 1.0, 5.0])),
            min_size=1,
            max_size=8,
        )
    )
    def send(self, batch: list[tuple[int, str | None, float]]) -> None:
        """A batch of fresh, delayed and redelivered messages."""
        envelopes = [envelope(key=f"k{key}", group=group, delay=delay) for key, group, delay in batch]
        assert self.run(self.adapter.send(envelopes, timeout=0)) == [None] * len(batch)
        for one in envelopes:
            copies = {group: Copy(one, self.clock.now + one.delay, 0, "delayed") for group in GROUPS}
            for group, copy in copies.items():
                if one.group in (None, group):
                    self.copies[group].append(copy)
                    if not one.delay:
                        self.arrive([copy])

    @rule(group=st.sampled_from(GROUPS), window=st.integers(1, 6))
    def join(self, group: str, window: int) -> None:
        """One more receiver."""
        spec = ReceiverSpec(T, group, window=window, exclusive=group == ORDERED)
        opened = self.run(self.adapter.open_receiver(spec))
        assert isinstance(opened, MemoryReceiver)
        self.takers.append(Taker(group, window, opened))

    @precondition(lambda self: self.takers)
    @rule(index=st.integers(0, 100), limit=st.integers(0, 8))
    def receive(self, index: int, limit: int) -> None:
        """It gets the oldest that it may have, as many as it may have."""
        taker = self.takers[index % len(self.takers)]
        received = self.run(taker.receiver.receive(limit, 0))
        waiting = sorted((copy for copy in self.copies[taker.group] if copy.state == "ready"), key=lambda one: one.place)
        room = max(0, min(limit, taker.window - len(taker.held)))
        assert len(received) <= room
        if taker.draining:
            assert not received
        elif taker.group == SHARED:
            assert [one.envelope for one in received] == [copy.envelope for copy in waiting[:room]]
        else:
            mine = {shard_of(one.envelope.key, SHARDS) for one in received}
            for other in self.takers:
                if other is not taker and other.group == taker.group:
                    assert not mine & {shard_of(copy.envelope.key, SHARDS) for copy in other.held.values()}
            expected = [one.envelope for one in waiting if shard_of(one.envelope.key, SHARDS) in mine][: len(received)]
            assert [one.envelope for one in received] == expected
        by_id = {copy.envelope.id: copy for copy in waiting}
        for one in received:
            copy = by_id[one.envelope.id]
            assert one.crashes == copy.crashes
            assert not one.tenure.draining
            assert not one.tenure.lost
            copy.state = "held"
            taker.held[one] = copy

    @precondition(lambda self: any(taker.held for taker in self.takers))
    @rule(index=st.integers(0, 100), which=st.integers(0, 100))
    def ack(self, index: int, which: int) -> None:
        """Settled, for this group."""
        taker = self.holder(index)
        received = list(taker.held)[which % len(taker.held)]
        taker.receiver.ack(received)
        taker.receiver.ack(received)
        taker.held.pop(received).state = "done"

    @precondition(lambda self: any(taker.held for taker in self.takers))
    @rule(index=st.integers(0, 100), which=st.integers(0, 100))
    def release(self, index: int, which: int) -> None:
        """Back to its place."""
        taker = self.holder(index)
        received = list(taker.held)[which % len(taker.held)]
        self.run(taker.receiver.release(received))
        taker.held.pop(received).state = "ready"
        self.stale.append((taker.receiver, received))

    @precondition(lambda self: any(taker.held for taker in self.takers))
    @rule(index=st.integers(0, 100), which=st.integers(0, 100), delay=st.sampled_from([0.0, 1.0]))
    def retry(self, index: int, which: int, delay: float) -> None:
        """Forwarded to its own group."""
        taker = self.holder(index)
        received = list(taker.held)[which % len(taker.held)]
        again = envelope(key=received.envelope.key, group=taker.group, delay=delay)
        assert self.run(taker.receiver.forward(received, again, timeout=0)) is None
        taker.held.pop(received).state = "done"
        copy = Copy(again, self.clock.now + delay, 0, "delayed")
        self.copies[taker.group].append(copy)
        if not delay:
            self.arrive([copy])

    @precondition(lambda self: self.takers)
    @rule(index=st.integers(0, 100))
    def drain(self, index: int) -> None:
        """It gets no more."""
        taker = self.takers[index % len(self.takers)]
        self.run(taker.receiver.drain())
        taker.draining = True

    @precondition(lambda self: self.takers)
    @rule(index=st.integers(0, 100))
    def close(self, index: int) -> None:
        """One receiver less."""
        taker = self.takers.pop(index % len(self.takers))
        self.run(taker.receiver.close())
        self.went_back(taker, 0)

    @precondition(lambda self: self.takers)
    @rule()
    def crash(self) -> None:
        """The bus dies and starts again."""
        self.adapter.abandon()
        for taker in self.takers:
            self.went_back(taker, 1)
        self.takers.clear()
        self.run(self.begin())

    @precondition(lambda self: self.stale)
    @rule(which=st.integers(0, 100))
    def stale_ack(self, which: int) -> None:
        """It changes nothing and is counted."""
        source, received = self.stale[which % len(self.stale)]
        before = source.stale_acks
        source.ack(received)
        self.run(source.release(received))
        assert source.stale_acks == before + 1

    @rule(group=st.sampled_from(GROUPS))
    def purge(self, group: str) -> None:
        """What is ready is gone."""
        waiting = [copy for copy in self.copies[group] if copy.state == "ready"]
        assert self.run(self.adapter.purge(T, group)) == len(waiting)
        for copy in waiting:
            copy.state = "done"

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def pass_time(self, seconds: float) -> None:
        """What is due arrives: first what was delayed for all, then what was for one group."""
        self.clock.now += seconds
        for group in GROUPS:
            due = [one for one in self.copies[group] if one.state == "delayed" and one.due <= self.clock.now]
            self.arrive(sorted(due, key=lambda one: (one.envelope.group is not None, one.due)))
        self.depths_agree()

    def holder(self, index: int) -> Taker:
        """One of those that hold something."""
        holders = [taker for taker in self.takers if taker.held]
        return holders[index % len(holders)]

    @invariant()
    def depths_agree(self) -> None:
        """Counts are exact, and what waits is in order."""
        for group in GROUPS:
            states = [copy.state for copy in self.copies[group]]
            expected = Depth(states.count("ready"), states.count("held"), states.count("delayed"))
            assert self.run(self.adapter.depth(T, group)) == expected
            assert self.run(self.peeked(group)) == [
                copy.envelope for copy in sorted(self.copies[group], key=lambda one: one.place) if copy.state == "ready"
            ]

    async def peeked(self, group: str) -> list[Envelope]:
        """What waits."""
        return [one async for one in self.adapter.peek(T, group)]


TestBroker = BrokerMachine.TestCase
TestBroker.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
