"""Conformance: retries. C8 and C11 of the contract, and the retry policy's own rules."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from tenacity import retry_if_not_exception_type, wait_fixed, wait_random_exponential

from msgbus.bus import Bus
from msgbus.context import Context
from msgbus.contract.adapter import Adapter, Capability, Limits
from msgbus.contract.idempotency import Claim, InProgress
from msgbus.contract.outcome import RetryAfter
from msgbus.errors import Reject, RetryLater, StoreError
from msgbus.inbound import breaker
from msgbus.middleware import idempotency
from msgbus.retry import Retry
from msgbus.settings import Settings
from msgbus.stores.memory import MemoryStore
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import Order, Seen, Stage, Waits, Worker, conformance, eventually, patient
from msgbus.testing.steps import EARLY, QUICK, counted, state_of, topics_of
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)

LATENESS = 2.0
"""Seconds that a retry may be late on an idle broker."""


# ---------------------------------------------------------------- retries


@conformance(seconds=60)
async def retry_count_exact(stage: Stage) -> None:
    """4: a message that always fails is run exactly `attempts` times, whether its retries wait in the process or at the broker, and
    however they are asked for; then it is a dead letter. Its neighbours do not feel it: 20 good ones around it are done in a second."""
    publisher = await stage.publisher()
    for topic in await topics_of(stage):
        good: Seen[int] = Seen()
        runs: Seen[tuple[str, int]] = Seen()
        bus = stage.bus(retry=Retry(attempts=8, wait=wait_fixed(0.02)))

        @bus.subscribe(topic)
        async def handle(order: Order, context: Context, good: Seen[int] = good, runs: Seen[tuple[str, int]] = runs) -> None:
            if order.text == "good":
                await good.add(order.n)
                return
            await runs.add((order.text, context.attempt))
            if order.text == "later":
                raise RetryLater(timedelta(seconds=0.03))
            raise ValueError("it always fails")

        await stage.start(bus)
        neighbours = [Order(id=f"good{n}", n=n, text="good") for n in range(21)]
        failing = [Order(id=text, text=text) for text in ("bad", "later")]
        await publisher.publish_many(topic, [*neighbours[:10], *failing, *neighbours[10:20]])
        await good.wait_for(20, 1.0)
        letters = await stage.dead_letters(2, topic.name)
        assert [(letter.reason, letter.attempts) for letter in letters] == [("exhausted", 8)] * 2
        await publisher.publish(topic, neighbours[20])
        await good.wait_for(21)
        for text in ("bad", "later"):
            assert [attempt for name, attempt in runs.items if name == text] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert sorted(good.items) == list(range(21))


@conformance(seconds=60)
async def retry_backoff_bounds_with_seed(stage: Stage) -> None:
    """4: the waits between runs are those that the policy draws: within its bounds, the same again for the same seed of `random`, and kept
    by whoever does the waiting: never shorter, and not much longer."""
    policy = Retry(attempts=8, wait=wait_random_exponential(multiplier=0.1, max=0.4))

    def drawn(attempt: int) -> float:
        outcome = policy.next_action(attempt, ValueError())
        assert isinstance(outcome, RetryAfter)
        return outcome.delay

    before = random.getstate()
    try:
        sequences = [list[float]() for _ in range(2)]
        for sequence in sequences:
            random.seed(20_13)
            sequence += [drawn(attempt) for attempt in range(1, 8)]
        other = [drawn(attempt) for attempt in range(1, 8)]
    finally:
        random.setstate(before)
    assert sequences[0] == sequences[1]
    assert sequences[0] != other
    for sequence in (sequences[0], other):
        assert all(0 <= wait <= min(0.4, 0.1 * 2**place) for place, wait in enumerate(sequence)), sequence

    waits = Waits(drawn)
    runs: Seen[tuple[float, float]] = Seen()
    bus = stage.bus(retry=Retry(attempts=8, wait=waits))

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        started = time.time()
        await runs.add((started, time.time()))
        raise ValueError("it always fails")

    await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order())
    await runs.wait_for(8, 20)
    gaps = [after[0] - before[1] for before, after in zip(runs.items, runs.items[1:], strict=False)]
    assert len(waits.drawn) == 7
    for gap, wait in zip(gaps, waits.drawn, strict=True):
        assert wait - EARLY <= gap <= wait + patient(LATENESS), f"waits {waits.drawn}, gaps {gaps}"


@conformance(seconds=60)
async def retry_scoped_to_group(stage: Stage) -> None:
    """C2, 4: what one group retries no other group sees again, however often and by whichever way."""
    publisher = await stage.publisher()
    one = stage.bus(service="one", retry=Retry(attempts=8, wait=QUICK))
    runs: Seen[tuple[int, int]] = Seen()

    @one.subscribe(ORDERS)
    async def fails(order: Order, context: Context) -> None:
        await runs.add((order.n, context.attempt))
        if order.n == 1 and context.attempt < 6:
            raise ValueError("not yet")

    await stage.start(one)
    _, two = await stage.collect(ORDERS, service="two")
    await publisher.publish(ORDERS, Order(n=1))
    await runs.wait_until(lambda items: (1, 6) in items, 15, "the sixth run")
    await publisher.publish(ORDERS, Order(n=2))
    await runs.wait_until(lambda items: (2, 1) in items, 10, "the last one")
    await two.wait_for(2)
    assert [order.n for order in two.items] == [1, 2]
    assert runs.items == [*((1, attempt) for attempt in range(1, 7)), (2, 1)]


@conformance()
async def given_up_straight_to_dead_letters(stage: Stage) -> None:
    """4: what a handler rejects, and what the policy gives up on, is a dead letter after this one run, with the error in its record. Of a
    group of errors every one must be given up on."""
    errors: dict[str, Callable[[], Exception]] = {
        "rejected": lambda: Reject("never"),
        "given up on": lambda: KeyError("a kind of LookupError"),
        "not retried on": lambda: ZeroDivisionError("not in retry_on"),
        "all of them": lambda: ExceptionGroup("all", [KeyError("one"), IndexError("two")]),
        "one of them not": lambda: ExceptionGroup("some", [KeyError("one"), ValueError("two")]),
    }
    policy = Retry(attempts=3, wait=QUICK, give_up_on=(LookupError,), retry_on=retry_if_not_exception_type(ArithmeticError))
    bus = stage.bus(retry=policy)
    runs: Seen[str] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await runs.add(order.text)
        raise errors[order.text]()

    await stage.start(bus)
    publisher = await stage.publisher()
    for text in errors:
        await publisher.publish(ORDERS, Order(text=text), headers={"case": text})
    letters = {letter.headers["case"]: letter for letter in await stage.dead_letters(len(errors))}
    assert letters.keys() == errors.keys()
    expected = dict.fromkeys(errors, ("rejected", 1)) | {"one of them not": ("exhausted", 3)}
    assert {case: (letter.reason, letter.attempts) for case, letter in letters.items()} == expected
    assert Counter(runs.items) == {case: attempts for case, (_, attempts) in expected.items()}
    assert "never" in letters["rejected"].error
    assert "ZeroDivisionError" in letters["not retried on"].error


# ---------------------------------------------------------------- deaths, and what is none


@conformance(needs=Capability.CRASH_COUNT, seconds=240)
async def poison_process_killer_dead_lettered_and_its_neighbours_spared(stage: Stage) -> None:
    """C8: a message that kills every process that runs it is a dead letter with the reason `poison` after `max_deliveries` deaths. The
    good ones that were in hand at those deaths are all done, and none of them is a dead letter. When the suspects are through the
    subscription works on as before, also where there is never a pause."""
    deadly = 4
    publisher = await stage.publisher()
    for topic in await topics_of(stage):
        done: Seen[int] = Seen()
        fatal = asyncio.Event()

        def consuming(topic: Topic[Order] = topic, done: Seen[int] = done, fatal: asyncio.Event = fatal) -> Bus:
            bus = stage.bus(settings=stage.settings(max_deliveries=deadly))

            @bus.subscribe(topic, concurrency=4, window=32)
            async def handle(order: Order) -> None:
                if order.text == "killer":
                    fatal.set()
                    await asyncio.Event().wait()
                await asyncio.sleep(0.01)  # its work
                await done.add(order.n)

            return bus

        async def feed(topic: Topic[Order] = topic) -> None:
            """Faster than one at a time can work: whoever waits for a pause waits for ever."""
            for n in range(1000, 3000):
                await publisher.publish(topic, Order(id=f"key{n}", n=n))
                await asyncio.sleep(0.003)

        async def lives(worker: Worker, done: Seen[int] = done, fatal: asyncio.Event = fatal) -> bool:
            """Until the worker dies (False), or all is as it should be."""
            await eventually(
                lambda: fatal.is_set() or (counted(worker.bus, "dead") == 1 and set(range(20)) <= set(done.items)),
                40,
                "a death, or the end of the killer and all of its neighbours",
            )
            return not fatal.is_set()

        await publisher.publish(topic, Order(id="killer", text="killer"), id="the-killer")
        await publisher.publish_many(topic, [Order(id=f"good{n}", n=n) for n in range(20)])
        deaths = 0
        feeding: asyncio.Task[None] | None = None
        try:
            worker = await stage.start(consuming())
            while not await lives(worker):
                await worker.kill()
                deaths += 1
                assert deaths <= deadly + 2, "it kills one process after the other"
                fatal.clear()
                if deaths == deadly:
                    feeding = asyncio.create_task(feed())
                worker = await stage.start(consuming())
            assert deaths >= deadly
            (letter,) = await stage.dead_letters(1, topic.name)
            assert (letter.id, letter.reason) == ("the-killer", "poison")
            assert letter.deliveries >= deadly
            last = worker.bus
            await eventually(lambda: state_of(last).state == "running", what="the end of the quarantine")  # noqa: B023  at once
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait([feeding])
        await publisher.publish(topic, Order(n=5000))
        await done.wait_until(lambda items: 5000 in items, 20, "the last one")
        await worker.stop()


@conformance(seconds=240)
async def resets_and_drains_are_not_deaths(stage: Stage) -> None:
    """C8, C10: a message that comes again and again because the link was lost, or because one process after the other was shut down, has
    killed nobody: no quarantine, no attempt used up, no dead letter, however often. Failures before a shutdown still count."""
    publisher = await stage.publisher()
    patient_drain = stage.settings(max_deliveries=3)
    hasty_drain = stage.settings(max_deliveries=3, drain_timeout=timedelta(0))
    runs: Seen[tuple[str, int]] = Seen()
    goes_on = asyncio.Event()

    def consuming(adapter: Adapter, settings: Settings = hasty_drain) -> Bus:
        bus = stage.bus(adapter=adapter, settings=settings, retry=Retry(attempts=4, wait=wait_fixed(0.5)))

        @bus.subscribe(ORDERS)
        async def handle(order: Order, context: Context) -> None:
            await runs.add((order.text, context.attempt))
            if order.text == "failing":
                raise ValueError("it fails")
            await goes_on.wait()

        return bus

    faulty = FaultyAdapter(stage.new_adapter())
    worker = await stage.start(consuming(faulty))
    await publisher.publish(ORDERS, Order(text="long"), id="long")
    await runs.wait_for(1)
    for times in range(2, 8):
        await stage.crash(faulty)
        await faulty.close()
        await faulty.open()
        await eventually(
            lambda: [received.envelope.id for receiver in faulty.receivers for received in receiver.received].count("long") >= times,  # noqa: B023
            30,
            f"delivery {times}",
        )
        await eventually(lambda: state_of(worker.bus).state == "running", 5, "work as before")
    assert runs.items == [("long", 1)]
    goes_on.set()
    await eventually(lambda: counted(worker.bus, "done") == 1)
    goes_on.clear()

    await publisher.publish(ORDERS, Order(text="drained"))
    for times in range(2, 8):
        await runs.wait_for(times, 15)
        await worker.stop()
        worker = await stage.start(consuming(stage.new_adapter()))
        await eventually(lambda bus=worker.bus: state_of(bus).state == "running", 5, "work as before")  # type: ignore[misc]  # a default binds it
    await runs.wait_for(8)
    goes_on.set()
    await eventually(lambda: counted(worker.bus, "done") == 1)
    assert runs.items[1:] == [("drained", 1)] * 7
    assert await stage.dead_letters(0) == []

    if Capability.DELAY in faulty.capabilities:
        await worker.stop()
        worker = await stage.start(consuming(stage.new_adapter(), patient_drain))
        await publisher.publish(ORDERS, Order(text="failing"))
        for times in range(9, 12):
            await runs.wait_for(times, 15)
            await worker.stop()
            worker = await stage.start(consuming(stage.new_adapter(), patient_drain))
        (letter,) = await stage.dead_letters(1)
        assert (letter.reason, letter.attempts) == ("exhausted", 4)
        assert runs.items[8:] == [("failing", attempt) for attempt in range(1, 5)]


class BusyStore(MemoryStore):
    """A store that answers as `says` tells for a while: a claim, or an error."""

    def __init__(self) -> None:
        super().__init__()
        self.says: list[Claim | StoreError] = []

    async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
        """The next of `says`, then as a store does."""
        if not self.says:
            return await super().begin(group, key, fingerprint, lease)
        answer = self.says.pop(0)
        if isinstance(answer, StoreError):
            raise answer
        return answer


class ShortDelays(FaultyAdapter):
    """A broker whose longest delay is a tenth of a second."""

    @property
    def limits(self) -> Limits:
        return replace(self.real.limits, delay=0.1)


@conformance(seconds=60)
async def tries_that_never_ran_do_not_count(stage: Stage) -> None:
    """4.3: `attempts` counts runs of the handler. Where it is not called, since its idempotency key is in progress, the store is away, or a
    wait longer than the broker's longest delay goes round, no attempt is used up."""
    store = BusyStore()
    bus = stage.bus(
        adapter=ShortDelays(stage.new_adapter()), store=store, retry=Retry(attempts=6, wait=Waits(lambda n: 0.5 if n == 4 else 0.01))
    )
    runs: Seen[tuple[int, float]] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await runs.add((context.attempt, time.time()))
        if context.attempt in (1, 2, 5):
            store.says += [InProgress(0.01), StoreError("away"), StoreError("away"), InProgress(0.01), InProgress(0.01)]
        raise ValueError("it always fails")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idempotency, "STORE_AWAY", 0.05)
        patch.setattr(breaker, "FIRST_PAUSE", 0.2)  # it opens too, and what it holds up is not counted either
        store.says += [*[InProgress(0.01)] * 5, *[StoreError("away")] * 5]
        await stage.start(bus)
        publisher = await stage.publisher()
        await publisher.publish(ORDERS, Order())
        (letter,) = await stage.dead_letters(1, seconds=20)
    assert (letter.reason, letter.attempts) == ("exhausted", 6)
    assert store.says == []
    assert [attempt for attempt, _ in runs.items] == [1, 2, 3, 4, 5, 6]
    assert runs.items[4][1] - runs.items[3][1] >= 0.5 - EARLY


@conformance(seconds=60)
async def a_duplicate_that_arrives_during_the_run_is_settled_with_it(stage: Stage) -> None:
    """C11: when a message comes again while its first run is under way in the process, after a lost link or published again with its id,
    no second run is started, and the one acks them all: nothing of it is left for anybody."""
    faulty = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=faulty)
    runs: Seen[str] = Seen()
    goes_on = asyncio.Event()

    @bus.subscribe(ORDERS, concurrency=4)
    async def handle(order: Order) -> None:
        await runs.add(order.text)
        if order.text == "long":
            await goes_on.wait()

    def times(id: str) -> int:
        return [received.envelope.id for receiver in faulty.receivers for received in receiver.received].count(id)

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order(text="long"), id="long")
    await runs.wait_for(1)
    faulty.away = True
    await eventually(lambda: state_of(bus).state == "waiting for broker", what="the link's loss to be seen")
    faulty.away = False
    await eventually(lambda: times("long") == 2, 20, "the message again, by the new link")
    await publisher.publish(ORDERS, Order(text="long"), id="long")
    for text in ("after", "and after"):
        await publisher.publish(ORDERS, Order(text=text))
    await runs.wait_for(3)
    if times("long") == 2:  # a broker that recognises the id has stored it once; one that does not has handed it out by now, or soon
        await asyncio.sleep(patient(0.5))
    assert runs.items.count("long") == 1
    goes_on.set()
    await eventually(lambda: counted(bus, "done") == 3)
    await worker.stop()
    _, rest = await stage.collect(ORDERS)
    await publisher.publish(ORDERS, Order(text="last"))
    await rest.wait_for(1)
    assert [order.text for order in rest.items] == ["last"]
    assert runs.items.count("long") == 1


# ---------------------------------------------------------------- breaker, shutdown


@conformance(seconds=60)
async def breaker_opens_pauses_probes_closes(stage: Stage) -> None:
    """4.7: when what handlers depend on is away, the subscription stops: after ten runs of which half failed so it starts none for a while,
    then one, which decides: failed, and it waits twice as long; done, and all go on. No attempt is used up by waiting. Meanwhile what is
    not started is there for other processes of the group."""
    publisher = await stage.publisher()
    runs: Seen[tuple[int, int, str, float]] = Seen()
    done: Seen[int] = Seen()
    bus = stage.bus(retry=Retry(attempts=30, wait=QUICK))
    probes = 0

    @bus.subscribe(ORDERS, concurrency=4)
    async def handle(order: Order, context: Context) -> None:
        nonlocal probes
        state = state_of(bus).state
        await runs.add((order.n, context.attempt, state, time.monotonic()))
        probes += state == "circuit open"
        await asyncio.sleep(0.01)  # time for another one to begin, if it may
        if probes < 2:
            raise ConnectionError("the database is away")
        await done.add(order.n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(breaker, "FIRST_PAUSE", 0.5)
        worker = await stage.start(bus)
        await publisher.publish_many(ORDERS, [Order(n=n) for n in range(30)])
        await eventually(lambda: state_of(bus).state == "circuit open", what="the breaker to open")
        assert bus.health().status == "degraded"
        await done.wait_for(30, 20)
        await eventually(lambda: bus.health().status == "ok")
        await worker.stop()
    states = [state for _, _, state, _ in runs.items]
    opened = states.index("circuit open")
    assert breaker.LEAST_RUNS <= opened < breaker.LEAST_RUNS + 4
    assert states[opened:] == ["circuit open"] * 2 + ["running"] * (len(states) - opened - 2), "one probe, then another"
    times = [moment for _, _, _, moment in runs.items]
    assert times[opened] - times[opened - 1] >= 0.8 * 0.5 - EARLY
    assert times[opened + 1] - times[opened] >= 0.8 * 2 * 0.5 - EARLY
    attempts: dict[int, list[int]] = defaultdict(list)
    for n, attempt, _, _ in runs.items:
        attempts[n].append(attempt)
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in attempts.values()), attempts

    failing = stage.bus(retry=Retry(attempts=30, wait=QUICK))
    failed: Seen[int] = Seen()

    @failing.subscribe(ORDERS, concurrency=4)
    async def fail(order: Order) -> None:
        await failed.add(order.n)
        raise ConnectionError("the database is away from here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(breaker, "FIRST_PAUSE", 300.0)
        await stage.start(failing)
        await publisher.publish_many(ORDERS, [Order(n=n) for n in range(100, 130)])
        await eventually(lambda: state_of(failing).state == "circuit open", what="the breaker to open")
        _, elsewhere = await stage.collect(ORDERS)
        await publisher.publish_many(ORDERS, [Order(n=n) for n in range(130, 140)])
        await elsewhere.wait_for(40, 20)
    assert sorted(order.n for order in elsewhere.items) == list(range(100, 140))
    assert len(failed.items) < breaker.LEAST_RUNS + 4
    assert await stage.dead_letters(0) == []


@conformance()
async def shutdown_cancel_not_counted_as_attempt(stage: Stage) -> None:
    """C10, 4.2: a run that a shutdown cancels is no attempt, whatever its handler makes of the cancellation: the message is not settled,
    and its next run is the same attempt, though the policy has no other one left."""
    publisher = await stage.publisher()
    runs: Seen[tuple[str, int]] = Seen()

    def consuming() -> Bus:
        bus = stage.bus(retry=Retry.none(), settings=stage.settings(drain_timeout=timedelta(seconds=0.05)))

        @bus.subscribe(ORDERS)
        async def handle(order: Order, context: Context) -> None:
            await runs.add((order.text, context.attempt))
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if order.text == "raises another":
                    raise ValueError("a rollback failed") from None
                raise

        return bus

    texts = ["lets it pass", "raises another"]
    for text in texts:
        await publisher.publish(ORDERS, Order(text=text))
    for lives in range(1, 3):
        worker = await stage.start(consuming())
        await runs.wait_for(2 * lives)
        await worker.stop()
    assert await stage.dead_letters(0) == []
    _, rest = await stage.collect(ORDERS)
    await rest.wait_for(2)
    assert sorted(order.text for order in rest.items) == texts
    assert sorted(runs.items) == sorted([(text, 1) for text in texts] * 2)
