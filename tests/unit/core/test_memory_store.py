"""MemoryStore against a model, by a clock of its own; and under threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, InProgress, New
from msgbus.stores import MemoryStore

T = TypeVar("T")

GROUPS = st.sampled_from(["g", "h"])
IDS = st.sampled_from(["1", "2", "3"])
PRINTS = st.sampled_from(["same", "same", "other"])
SECONDS = st.integers(1, 20).map(float)


def now(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call that never waits."""
    try:
        call.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waited")


class StoreMachine(RuleBasedStateMachine):
    """At most one holder a key, until its lease is over; what is done stays done until its time to live is over; another body conflicts."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        self.store = MemoryStore(clock=lambda: self.time)
        self.model: dict[tuple[str, str], dict[str, Any]] = {}
        self.tokens: list[tuple[str, str, str]] = [("g", "1", "never given")]

    def known(self, group: str, key: str) -> dict[str, Any] | None:
        entry = self.model.get((group, key))
        return entry if entry is not None and entry["until"] > self.time else None

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        self.time += seconds

    @rule(group=GROUPS, key=IDS, fingerprint=PRINTS, lease=SECONDS)
    def begin(self, group: str, key: str, fingerprint: str, lease: float) -> None:
        claim: Claim = now(self.store.begin(group, key, fingerprint, lease))
        entry = self.known(group, key)
        if entry is None:
            assert isinstance(claim, New)
            assert claim.token not in [token for _, _, token in self.tokens]
            self.tokens.append((group, key, claim.token))
            self.model[group, key] = {"token": claim.token, "print": fingerprint, "until": self.time + lease, "done": None}
        elif entry["print"] != fingerprint:
            assert claim == Conflict()
        elif entry["done"] is not None:
            assert claim == AlreadyDone(entry["done"])
        else:
            assert claim == InProgress(entry["until"] - self.time)

    def holds(self, group: str, key: str, token: str) -> bool:
        """A claim whose lease is over is held until another one takes the key."""
        entry = self.model.get((group, key))
        return entry is not None and entry["token"] == token and entry["done"] is None

    @rule(number=st.integers(0, 30), lease=SECONDS)
    def renew(self, number: int, lease: float) -> None:
        group, key, token = self.tokens[number % len(self.tokens)]
        held = self.holds(group, key, token)
        assert now(self.store.renew(group, key, token, lease)) == held
        if held:
            self.model[group, key]["until"] = self.time + lease

    @rule(number=st.integers(0, 30), ttl=SECONDS, result=st.binary(max_size=3))
    def complete(self, number: int, ttl: float, result: bytes) -> None:
        group, key, token = self.tokens[number % len(self.tokens)]
        held = self.holds(group, key, token)
        assert now(self.store.complete(group, key, token, result, ttl)) == held
        if held:
            self.model[group, key].update(done=result, until=self.time + ttl)

    @rule(number=st.integers(0, 30))
    def abandon(self, number: int) -> None:
        group, key, token = self.tokens[number % len(self.tokens)]
        held = self.holds(group, key, token)
        assert now(self.store.abandon(group, key, token)) == held
        if held:
            del self.model[group, key]

    @invariant()
    def it_remembers_no_more_than_it_must(self) -> None:
        assert len(self.store) == len(self.model)


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase


async def test_beyond_its_capacity_it_forgets_the_oldest_that_are_done_never_what_is_under_way() -> None:
    """Claims are not pushed out by newer keys; effects are, oldest first."""
    time = 0.0
    store = MemoryStore(capacity=10, clock=lambda: time)
    running = await store.begin("g", "running", "p", 1000)
    assert isinstance(running, New)
    for number in range(100):
        claim = await store.begin("g", str(number), "p", 1000)
        assert isinstance(claim, New)
        assert await store.complete("g", str(number), claim.token, b"r", 1000)
        assert len(store) <= 11
    assert isinstance(await store.begin("g", "running", "p", 1000), InProgress)
    assert isinstance(await store.begin("g", "99", "p", 1000), AlreadyDone)
    assert isinstance(await store.begin("g", "0", "p", 1000), New)
    with pytest.raises(ValueError, match="capacity"):
        MemoryStore(capacity=0)


def test_of_many_threads_one_gets_a_key() -> None:
    """`begin` is atomic: each key has one holder, however many ask at once."""
    store = MemoryStore()
    got: list[tuple[int, Claim]] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        for key in range(200):
            got.append((key, asyncio.run(store.begin("g", str(key), "p", 60)) if key == 0 else now(store.begin("g", str(key), "p", 60))))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for key, claim in got if isinstance(claim, New)) == list(range(200))
    assert len(got) == 1600
