"""The pipeline, on a small adapter whose answers each test decides: batching, what is sent again, order, time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgbus import Middleware
from msgbus.contract.adapter import Adapter, AdapterSettings, Capability, Limits, Receiver, ReceiverSpec, SendOutcome, TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerError, BrokerUnavailable, PublishRejected, PublishUnknown
from msgbus.outbound import pipeline as module
from msgbus.outbound.pipeline import EACH, FEW, MANY, MAX_BATCH, Pipeline
from msgbus.testing.stage import eventually

Answer = Callable[[Sequence[Envelope]], Awaitable[list[SendOutcome]]]


class Scripted(Adapter):
    """Answers each send as the test says; remembers what it was given. `stored` is what a broker would have, in order."""

    schemes = ("scripted",)
    name = "scripted"

    def __init__(self, *answers: Answer) -> None:
        self.sends: list[list[str]] = []
        self.stored: list[Envelope] = []
        self.timeouts: list[float] = []
        self.answers = list(answers)
        self.sending = 0
        self.most_at_once = 0

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        self.sends.append([envelope.id for envelope in envelopes])
        self.timeouts.append(timeout)
        answer = self.answers.pop(0) if self.answers else confirmed
        self.sending += 1
        self.most_at_once = max(self.most_at_once, self.sending)
        try:
            outcomes = await answer(envelopes)
        finally:
            self.sending -= 1
        self.stored += [envelope for envelope, outcome in zip(envelopes, outcomes, strict=True) if outcome is None]
        return outcomes

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        return cls()

    @property
    def capabilities(self) -> Capability:
        return Capability.NONE

    @property
    def limits(self) -> Limits:
        return Limits(body=1_000_000)

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def ping(self) -> None: ...

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None: ...

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        raise BrokerUnavailable("no receivers here")


async def confirmed(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
    return [None] * len(envelopes)


async def away(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
    return [BrokerUnavailable("away")] * len(envelopes)


async def silent(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
    await asyncio.sleep(3600)
    raise AssertionError("nobody waits so long")


def when(gate: asyncio.Event, then: Answer = confirmed) -> Answer:
    """Answers when the gate opens."""

    async def answer(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
        await gate.wait()
        return await then(envelopes)

    return answer


def after(seconds: float) -> Answer:
    """Confirms after this time."""

    async def answer(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
        await asyncio.sleep(seconds)
        return await confirmed(envelopes)

    return answer


def each(*outcomes: SendOutcome) -> Answer:
    """One outcome an envelope."""

    async def answer(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
        assert len(envelopes) == len(outcomes)
        return list(outcomes)

    return answer


def failing(error: Exception) -> Answer:
    """An adapter that raises, which it should not."""

    async def answer(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
        raise error

    return answer


def envelope(name: str, key: str | None = None, topic: str = "orders") -> Envelope:
    return Envelope(name, topic, b"{}", {}, key)


async def publish(pipeline: Pipeline, sent: Envelope) -> None:
    """As a bus does it."""
    await pipeline.publish(sent)


@asynccontextmanager
async def several(*coroutines: Awaitable[Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Tasks that have run as far as they can."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    yield tasks
    await asyncio.wait(tasks)


async def test_who_publishes_alone_goes_at_once_and_who_comes_meanwhile_joins() -> None:
    """The first is sent alone and at once; all that come while it is on the way go together after it, without a timer."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(6))) as tasks:
        assert adapter.sends == [["0"]]
        gate.set()
    assert [task.result() for task in tasks] == [None] * 6
    assert adapter.sends == [["0"], ["1", "2", "3", "4", "5"]]
    await pipeline.publish(envelope("later"))
    assert adapter.sends[-1] == ["later"]
    assert adapter.most_at_once == 1


async def test_topics_do_not_wait_for_each_other() -> None:
    """A batch is of one topic, and a slow topic holds up none but itself."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate))
    pipeline = Pipeline(adapter, (), 5)
    async with several(publish(pipeline, envelope("slow"))):
        await pipeline.publish(envelope("quick", topic="other"))
        assert [sent.id for sent in adapter.stored] == ["quick"]
        gate.set()


async def test_a_batch_has_a_limit() -> None:
    """More than 500 waiting publishes of a key go in several sends, in order."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate))
    pipeline = Pipeline(adapter, (), 5)
    total = 2 * MAX_BATCH + 7
    async with several(*(publish(pipeline, envelope(str(number), "k")) for number in range(1 + total))):
        gate.set()
    assert [len(send) for send in adapter.sends] == [1, MAX_BATCH, MAX_BATCH, 7]
    assert [sent.id for sent in adapter.stored] == [str(number) for number in range(1 + total)]


async def test_many_without_keys_go_while_one_batch_is_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that broker and publishers work side by side: a half of them goes, the other half is behind it. But no third batch, and no second
    one once the topic has had a key: then all go together."""
    first, second = asyncio.Event(), asyncio.Event()
    adapter = Scripted(when(first), when(second))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(1 + 3 * MANY))):
        await eventually(lambda: len(adapter.sends) == 2)
        half = (3 * MANY + 1) // 2
        assert adapter.sends == [["0"], [str(number) for number in range(1, 1 + half)]]
        async with several(*(publish(pipeline, envelope(f"later-{number}")) for number in range(MANY))):
            assert len(adapter.sends) == 2
            async with several(publish(pipeline, envelope("keyed", "k"))):
                first.set()
                await asyncio.sleep(0)
                second.set()
    assert len(adapter.sends) == 3
    behind = [str(number) for number in range(1 + half, 1 + 3 * MANY)]
    assert adapter.sends[2] == [*behind, *(f"later-{number}" for number in range(MANY)), "keyed"]
    monkeypatch.setattr("msgbus.outbound.pipeline.EACH", 1e9)
    await publish(pipeline, envelope("quick"))
    gate = asyncio.Event()
    adapter.answers = [when(gate)]
    async with several(*(publish(pipeline, envelope(f"last-{number}")) for number in range(1 + MANY))):
        assert adapter.sends[4:] == [["last-0"]]
        gate.set()
    assert adapter.most_at_once == 2


async def test_a_few_go_beside_each_other_where_a_confirm_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more for each millisecond that the last one took, and at most `FEW`; never two of one key. Where a confirm is there at once
    the next batch is the faster way: then who comes meanwhile joins it."""
    gate = asyncio.Event()
    adapter = Scripted(after(2.5 * EACH), when(gate))
    pipeline = Pipeline(adapter, (), 5)
    await publish(pipeline, envelope("slow"))
    async with several(*(publish(pipeline, envelope(str(number), f"k{number // 2}")) for number in range(6))):
        assert adapter.sends == [["slow"], ["0"]]
        gate.set()
    assert adapter.sends[2:] == [["1", "2", "3", "4", "5"]]
    adapter.answers = [after(2.5 * EACH)]
    await publish(pipeline, envelope("slow again"))
    gate, before = asyncio.Event(), len(adapter.sends)
    adapter.answers = [when(gate)] * FEW
    async with several(*(publish(pipeline, envelope(str(number), f"k{number}")) for number in range(FEW + 5))):
        alone = [len(send) for send in adapter.sends[before:]]
        gate.set()
    assert alone == [1] * len(alone)
    assert 3 <= len(alone) <= FEW
    assert adapter.most_at_once == len(alone)
    monkeypatch.setattr("msgbus.outbound.pipeline.EACH", 1e9)
    await publish(pipeline, envelope("quick"))
    gate, before = asyncio.Event(), len(adapter.sends)
    adapter.answers = [when(gate)]
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(3))):
        assert adapter.sends[before:] == [["0"]]
        gate.set()
    assert adapter.sends[before + 1 :] == [["1", "2"]]


async def test_callers_without_keys_stay_in_two_halves() -> None:
    """Who publishes again and again beside others: two batches of equal size, one on the way while the other one's publishers are awake."""
    callers, rounds = 4 * MANY, 5

    async def slowly(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
        for _ in range(20):
            await asyncio.sleep(0)
        return [None] * len(envelopes)

    adapter = Scripted(*[slowly] * 100)
    pipeline = Pipeline(adapter, (), 5)

    async def caller(name: int) -> None:
        for number in range(rounds):
            await pipeline.publish(envelope(f"{name}-{number}"))

    await asyncio.gather(*map(caller, range(callers)))
    assert len(adapter.stored) == callers * rounds
    sizes = [len(send) for send in adapter.sends]
    assert sizes[:3] == [1, callers // 2, callers // 2]
    assert max(sizes) <= callers // 2
    assert len(sizes) <= 2 * rounds + 2
    assert adapter.most_at_once == 2


async def test_what_was_stored_nowhere_is_sent_again_with_the_same_id() -> None:
    """`BrokerUnavailable` is tried again with back-off until it works; the publisher sees only the confirm."""
    adapter = Scripted(away, away, confirmed)
    pipeline = Pipeline(adapter, (), 5)
    await pipeline.publish(envelope("one"))
    assert adapter.sends == [["one"]] * 3
    assert adapter.timeouts == sorted(adapter.timeouts, reverse=True)


async def test_until_the_publish_timeout() -> None:
    """A broker that stays away is `BrokerUnavailable`, after `publish_timeout` and not long after; the last try has time for its answer."""
    adapter = Scripted(*[away] * 1000)
    pipeline = Pipeline(adapter, (), 0.3)
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(BrokerUnavailable, match="away"):
        await pipeline.publish(envelope("one"))
    assert 0.28 <= loop.time() - started < 1.0
    assert 3 <= len(adapter.sends) < 20
    assert min(adapter.timeouts) > 0.005


@pytest.mark.parametrize("error", [PublishRejected("full"), PublishUnknown("one", "no answer"), PublishUnknown("one", "lost link")])
async def test_nothing_else_is_sent_again(error: BrokerError) -> None:
    """What was refused, or may be stored, is the publisher's to decide about."""
    adapter = Scripted(each(error))
    pipeline = Pipeline(adapter, (), 5)
    with pytest.raises(type(error)):
        await pipeline.publish(envelope("one"))
    assert adapter.sends == [["one"]]


async def test_silence_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that gives no outcome in time is answered for: `PublishUnknown` with the id, a grace after the timeout."""
    monkeypatch.setattr(module, "GRACE", 0.1)
    adapter = Scripted(silent)
    pipeline = Pipeline(adapter, (), 0.1)
    async with several(*(publish(pipeline, envelope(name)) for name in ("a", "b", "c"))) as tasks:
        pass
    errors = [task.exception() for task in tasks]
    assert isinstance(errors[0], PublishUnknown)
    assert errors[0].message_id == "a"
    assert all(isinstance(error, PublishUnknown | BrokerUnavailable) for error in errors)
    await pipeline.publish(envelope("next"))  # and the topic goes on
    assert adapter.stored[-1].id == "next"


@pytest.mark.parametrize("error", [BrokerUnavailable("gone"), PublishRejected("no")])
async def test_an_adapter_that_raises_is_taken_at_its_word(error: Exception) -> None:
    """It should return outcomes; what it raised holds for all of the batch."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate), failing(error), confirmed)
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(name)) for name in ("a", "b", "c"))) as tasks:
        gate.set()
    raised = [task.exception() for task in tasks]
    assert raised == [None] * 3 if isinstance(error, BrokerUnavailable) else raised == [None, error, error]


async def test_a_bug_in_an_adapter_is_raised_on_its_publishers_and_the_topic_goes_on() -> None:
    """What is no broker's error propagates as the bug it is, to every publisher of the batch; nobody waits for ever."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate), failing(ZeroDivisionError()))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(name)) for name in ("a", "b", "c"))) as tasks:
        gate.set()
    assert tasks[0].exception() is None
    assert all(isinstance(task.exception(), ZeroDivisionError) for task in tasks[1:])
    await asyncio.wait_for(publish(pipeline, envelope("next")), 1)


async def test_who_is_cancelled_before_anything_was_sent_is_not_sent() -> None:
    """A publish that still waits for its batch is taken out of it."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(4))) as tasks:
        tasks[2].cancel()
        await asyncio.sleep(0)
        gate.set()
    assert tasks[2].cancelled()
    assert [sent.id for sent in adapter.stored] == ["0", "1", "3"]


async def test_all_of_a_batch_cancelled_and_the_topic_goes_on() -> None:
    """Nothing is sent for them, and nothing hangs."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(4))) as tasks:
        for task in tasks[1:]:
            task.cancel()
        await asyncio.sleep(0)
        gate.set()
    await asyncio.wait_for(publish(pipeline, envelope("next")), 1)
    assert adapter.sends == [["0"], ["next"]]


async def test_the_one_on_the_way_is_cancelled_and_those_behind_it_go_on() -> None:
    """Whether it is stored is unknown to its publisher; the others do not notice."""
    gate = asyncio.Event()
    adapter = Scripted(when(gate))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(3))) as tasks:
        tasks[0].cancel()
    assert tasks[0].cancelled()
    assert [task.exception() for task in tasks[1:]] == [None, None]
    assert adapter.sends == [["0"], ["1", "2"]]


async def test_one_of_a_batch_on_the_way_is_cancelled_and_the_others_are_confirmed() -> None:
    """The batch goes on."""
    first, second = asyncio.Event(), asyncio.Event()
    adapter = Scripted(when(first), when(second))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(4))) as tasks:
        first.set()
        await eventually(lambda: len(adapter.sends) == 2)
        tasks[2].cancel()
        await asyncio.sleep(0)
        second.set()
    assert tasks[2].cancelled()
    assert [task.cancelled() for task in tasks] == [False, False, True, False]


async def test_a_publish_that_came_later_has_its_own_time() -> None:
    """Who joins a batch whose oldest is almost out of time still waits its own `publish_timeout` for the broker to come back."""
    back = asyncio.Event()

    async def away_until_back(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
        return [None if back.is_set() else BrokerUnavailable("away")] * len(envelopes)

    adapter = Scripted(*[away_until_back] * 1000)
    pipeline = Pipeline(adapter, (), 0.6)
    loop = asyncio.get_running_loop()
    early = [asyncio.ensure_future(publish(pipeline, envelope("first")))]
    await asyncio.sleep(0.1)  # deadlines that are a tenth of a second apart
    early.append(asyncio.ensure_future(publish(pipeline, envelope("second"))))
    await asyncio.sleep(0.4)  # when it is over, the first one's time is and the late one's is not
    late = asyncio.ensure_future(publish(pipeline, envelope("late")))
    loop.call_later(0.35, back.set)
    await asyncio.wait([*early, late])
    assert all(isinstance(task.exception(), BrokerUnavailable) for task in early)
    assert late.exception() is None
    assert [sent.id for sent in adapter.stored] == ["late"]


outcome_words = st.sampled_from(["ok", "away", "away", "rejected", "unknown", "raise"])


@settings(max_examples=60, deadline=None)
@given(
    publishes=st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 3)), min_size=1, max_size=25),
    words=st.lists(st.lists(outcome_words, min_size=1, max_size=4), max_size=12),
    many=st.booleans(),
    slow=st.booleans(),
)
def test_a_keys_messages_never_overtake_each_other(
    publishes: list[tuple[str | None, int]], words: list[list[str]], many: bool, slow: bool
) -> None:
    """Whatever the broker answers, and however slow it is, by one message and batches or `publish_many`: a key's messages are stored in the
    order given, each at most once, and whoever was told that it is stored is stored."""

    def answer(script: list[str]) -> Answer:
        async def answers(envelopes: Sequence[Envelope]) -> list[SendOutcome]:
            await asyncio.sleep(0)
            if script[0] == "raise":
                raise BrokerUnavailable("away")
            by_word: dict[str, SendOutcome] = {"ok": None, "away": BrokerUnavailable("away"), "rejected": PublishRejected("no")}
            found = [by_word.get(script[index % len(script)], PublishUnknown(one.id, "?")) for index, one in enumerate(envelopes)]
            gone: set[str] = set()  # as brokers do: behind one that could not be sent, nothing of its key is stored in this send
            for index, one in enumerate(envelopes):
                if one.key is not None and one.key in gone and found[index] is None:
                    found[index] = BrokerUnavailable("behind one that was not sent")
                if isinstance(found[index], BrokerUnavailable) and one.key is not None:
                    gone.add(one.key)
            return found

        return answers

    async def scenario() -> None:
        adapter = Scripted(*(answer(script) for script in words))
        pipeline = Pipeline(adapter, (), 2)
        envelopes = [envelope(f"{number:03}", key) for number, (key, _) in enumerate(publishes)]
        if many:
            outcomes: list[BaseException | None] = await pipeline.send_many(envelopes)
        else:
            tasks: list[asyncio.Task[None]] = []
            for one, (_, pause) in zip(envelopes, publishes, strict=True):
                tasks.append(asyncio.ensure_future(publish(pipeline, one)))
                for _ in range(pause):
                    await asyncio.sleep(0)
            await asyncio.wait(tasks)
            outcomes = [task.exception() for task in tasks]
        stored = [one.id for one in adapter.stored]
        assert len(stored) == len(set(stored))
        assert set(stored) == {one.id for one, outcome in zip(envelopes, outcomes, strict=True) if outcome is None}
        for key in ("a", "b"):
            of_key = [one.id for one in adapter.stored if one.key == key]
            assert of_key == sorted(of_key)

    with pytest.MonkeyPatch.context() as patch:  # the pauses between tries, a thousandth as long
        patch.setattr("msgbus.outbound.pipeline.random.uniform", lambda *_: 0.001)
        patch.setattr("msgbus.outbound.pipeline.EACH", 1e-9 if slow else 1e9)
        asyncio.run(scenario())


class Tagging(Middleware):
    async def publish(self, envelope: Envelope, call_next: Callable[[Envelope], Awaitable[None]], /) -> None:
        if envelope.id == "skipped":
            return
        if envelope.id == "refused":
            raise ValueError("refused")
        await call_next(replace(envelope, headers={"tag": "x"}))


async def test_middleware_is_around_each_message_also_of_many() -> None:
    """It may change what is sent, or raise; one that forgets `call_next` is no confirm. With `send_many` the order of a key
    holds, and behind a failure its key ends."""
    adapter = Scripted()
    pipeline = Pipeline(adapter, [Tagging()], 5)
    await pipeline.publish(envelope("one"))
    with pytest.raises(PublishRejected, match="call_next"):
        await pipeline.publish(envelope("skipped"))
    with pytest.raises(ValueError, match="refused"):
        await pipeline.publish(envelope("refused"))
    outcomes = await pipeline.send_many(
        [envelope("a1", "a"), envelope("b1", "b"), envelope("refused", "a"), envelope("a2", "a"), envelope("b2", "b"), envelope("free")]
    )
    assert [isinstance(outcome, ValueError) for outcome in outcomes] == [False, False, True, True, False, False]
    assert all(sent.headers == {"tag": "x"} for sent in adapter.stored)
    assert {sent.id for sent in adapter.stored} == {"one", "a1", "b1", "b2", "free"}
    of_b = [sent.id for sent in adapter.stored if sent.key == "b"]
    assert of_b == ["b1", "b2"]


async def test_close_waits_for_what_is_on_the_way_and_then_no_longer() -> None:
    """Within its time batches get their outcome; what has none then is unknown to its publisher."""
    gate, never = asyncio.Event(), asyncio.Event()
    adapter = Scripted(when(gate), when(never))
    pipeline = Pipeline(adapter, (), 5)
    async with several(*(publish(pipeline, envelope(str(number))) for number in range(3))) as tasks:
        gate.set()
        await eventually(lambda: len(adapter.sends) == 2)
        await pipeline.close(0.05)
    assert tasks[0].exception() is None
    assert all(isinstance(task.exception(), PublishUnknown) for task in tasks[1:])
