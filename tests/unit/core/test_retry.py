"""`Retry.next_action` is a pure function: what becomes of a message after a run that failed."""

from __future__ import annotations

import random
import threading
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from tenacity import (
    retry_if_exception,
    retry_if_exception_message,
    retry_if_exception_type,
    retry_if_not_exception_type,
    wait_exponential,
    wait_fixed,
    wait_incrementing,
    wait_random,
    wait_random_exponential,
)

from msgbus import Bus, Dead, Drop, Dropped, Reject, Retry, RetryAfter, RetryLater, Topic
from msgbus.contract.outcome import Outcome
from msgbus.errors import BrokerUnavailable, DecodeError, PublishRejected, StoreError
from msgbus.retry import is_dependency_failure
from msgbus.testing.stage import eventually


class CardStolen(Exception): ...


class StolenToday(CardStolen): ...


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("several", errors)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Drop("not ours"), Dropped("not ours")),
        (Reject("never"), "rejected"),
        (RetryLater(timedelta(seconds=7)), 7.0),
        (RetryLater(), 3.0),
        (RetryLater(timedelta(0)), 0.0),
        (DecodeError("t", "1", "no JSON"), "invalid"),
        (DecodeError("t", "1", "version 9", "unsupported"), "unsupported"),
        (ValueError("x"), 3.0),
        (CardStolen(), "rejected"),
        (StolenToday(), "rejected"),
        (ConnectionError(), 3.0),
        (TimeoutError(), 3.0),
        (BrokerUnavailable("x"), 3.0),
        (group(CardStolen(), StolenToday()), "rejected"),
        (group(CardStolen(), ValueError()), 3.0),
        (group(group(CardStolen()), CardStolen()), "rejected"),
        (group(group(CardStolen(), ValueError()), CardStolen()), 3.0),
        (group(Reject("never"), CardStolen()), "rejected"),
        (group(Reject("never"), ValueError()), 3.0),
        (group(RetryLater(timedelta(1)), CardStolen()), 3.0),
        (BaseExceptionGroup("x", [KeyboardInterrupt(), CardStolen()]), 3.0),
    ],
)
def test_what_an_error_means(error: BaseException, expected: object) -> None:
    """The handler's words win, a body that does not fit is never retried, a group is given up only if all of it is."""
    outcome = Retry(attempts=5, wait=wait_fixed(3), give_up_on=(CardStolen,)).next_action(1, error)
    match outcome:
        case Dead(reason, why):
            assert reason == expected
            assert why is error
        case RetryAfter(delay, why, counted):
            assert delay == expected
            assert why is error
            assert counted
        case _:
            assert outcome == expected


@pytest.mark.parametrize(
    ("retry_on", "error", "given_up"),
    [
        (retry_if_exception_type(OSError), ConnectionError(), False),
        (retry_if_exception_type(OSError), ValueError(), True),
        (retry_if_not_exception_type(ValueError), ValueError(), True),
        (retry_if_exception_message(match="busy"), ValueError("busy now"), False),
        (retry_if_exception_message(match="busy"), ValueError("gone"), True),
        (retry_if_exception_type(OSError) | retry_if_exception_type(KeyError), KeyError(), False),
        (retry_if_exception(lambda error: error.args == ("a",)), ValueError("a"), False),
        (retry_if_exception(lambda error: error.args == ("a",)), ValueError("b"), True),
        (retry_if_exception_type(OSError), RetryLater(), False),
        (retry_if_exception_type(OSError), group(ValueError(), ConnectionError()), False),
        (retry_if_exception_type(OSError), group(ValueError(), KeyError()), True),
    ],
)
def test_tenacitys_predicates_decide(retry_on: Any, error: BaseException, given_up: bool) -> None:
    """What `retry_on` does not match is given up at once; `RetryLater` is a word, not an error to be matched."""
    outcome = Retry(attempts=3, wait=wait_fixed(1), retry_on=retry_on).next_action(1, error)
    assert isinstance(outcome, Dead if given_up else RetryAfter)


@pytest.mark.parametrize(
    ("wait", "attempt", "expected"),
    [
        (wait_fixed(2), 1, 2),
        (wait_exponential(multiplier=1, max=60), 1, 1),
        (wait_exponential(multiplier=1, max=60), 4, 8),
        (wait_exponential(multiplier=1, max=60), 50, 60),
        (wait_incrementing(start=1, increment=2), 3, 5),
        (wait_fixed(1) + wait_fixed(2), 1, 3),
        (wait_fixed(-5), 1, 0),
    ],
)
def test_tenacitys_waits_are_asked_for_the_attempt(wait: Any, attempt: int, expected: float) -> None:
    """The number of the attempt is tenacity's: exponential waits grow with it. A wait is never negative."""
    outcome = Retry(attempts=100, wait=wait).next_action(attempt, ValueError())
    assert isinstance(outcome, RetryAfter)
    assert outcome.delay == expected


@pytest.mark.parametrize(("age", "dead"), [(0.0, False), (49.0, False), (51.0, True), (10_000.0, True)])
def test_max_age_looks_at_the_next_run(age: float, dead: bool) -> None:
    """A message whose next run would be later than `max_age` after its first publish is given up now, not then."""
    outcome = Retry(attempts=100, wait=wait_fixed(10), max_age=timedelta(minutes=1)).next_action(1, ValueError(), age)
    assert isinstance(outcome, Dead) == dead
    if isinstance(outcome, Dead):
        assert outcome.reason == "exhausted"


errors = st.sampled_from(
    [ValueError("x"), ConnectionError(), RetryLater(), RetryLater(timedelta(seconds=1)), group(ValueError(), OSError()), StoreError("x")]
)


@given(attempts=st.integers(1, 30), failures=st.lists(errors, min_size=31, max_size=31))
@settings(deadline=None)
def test_never_more_runs_than_attempts(attempts: int, failures: list[BaseException]) -> None:
    """However a handler fails, it runs `attempts` times, and then its message is a dead letter of its last error."""
    policy = Retry(attempts=attempts, wait=wait_fixed(0))
    runs = 0
    outcome: Outcome = RetryAfter(0)
    for error in failures:
        runs += 1
        outcome = policy.next_action(runs, error)
        if not isinstance(outcome, RetryAfter):
            break
    assert runs == attempts
    assert isinstance(outcome, Dead)
    assert outcome.reason == "exhausted"
    assert outcome.error is failures[runs - 1]


@given(seed=st.integers(0, 2**32), attempt=st.integers(1, 7))
@settings(deadline=None)
def test_the_default_wait_has_full_jitter_from_one_second_to_a_minute(seed: int, attempt: int) -> None:
    """0 to 2**(attempt-1) seconds, never above 60; the same seed gives the same wait."""

    def delay() -> float:
        random.seed(seed)
        outcome = Retry().next_action(attempt, ValueError())
        assert isinstance(outcome, RetryAfter)
        return outcome.delay

    state = random.getstate()
    try:
        assert delay() == delay()
        assert 0 <= delay() <= min(60, 2 ** (attempt - 1))
    finally:
        random.setstate(state)


@given(age=st.floats(0, 1e9), limit=st.floats(1, 1e6), attempt=st.integers(1, 7))
@settings(deadline=None)
def test_no_run_begins_after_max_age(age: float, limit: float, attempt: int) -> None:
    """Whatever the wait, age and wait together stay within `max_age`, or the message is given up."""
    outcome = Retry(wait=wait_random(0, 1e5), max_age=timedelta(seconds=limit)).next_action(attempt, ValueError(), age)
    if isinstance(outcome, RetryAfter):
        assert age + outcome.delay <= timedelta(seconds=limit).total_seconds()
    else:
        assert outcome == Dead("exhausted", outcome.error) if isinstance(outcome, Dead) else False


def test_a_policy_shared_by_many_threads_answers_each_rightly() -> None:
    """One `Retry` for subscriptions and threads: nothing of one decision shows in another's."""
    policy = Retry(attempts=50, wait=wait_incrementing(start=0, increment=1), retry_on=retry_if_exception_message(match="keep"))
    wrong: list[object] = []
    start = threading.Barrier(4)

    def decide(number: int) -> None:
        start.wait()
        for turn in range(2_000):
            attempt = 1 + (turn * 7 + number) % 49
            error = ValueError("keep" if turn % 2 else "give up")
            outcome = policy.next_action(attempt, error)
            right = (
                isinstance(outcome, RetryAfter) and outcome.delay == attempt - 1 and outcome.error is error
                if turn % 2
                else isinstance(outcome, Dead) and outcome.error is error
            )
            if not right:
                wrong.append((attempt, error, outcome))

    threads = [threading.Thread(target=decide, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_none_is_one_run() -> None:
    """`Retry.none()`: the first failure makes a dead letter."""
    outcome = Retry.none().next_action(1, ValueError())
    assert isinstance(outcome, Dead)
    assert outcome.reason == "exhausted"


class OperationalError(Exception):
    """What DB-API drivers call a database that is away."""


class DriversOwn(OperationalError): ...


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ConnectionError(), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (BrokerUnavailable("x"), True),
        (PublishRejected("x"), False),
        (StoreError("x"), True),
        (OperationalError(), True),
        (DriversOwn(), True),
        (ValueError(), False),
        (OSError("disk"), False),
        (group(ValueError(), ConnectionError()), True),
        (group(ValueError(), KeyError()), False),
    ],
)
def test_what_counts_as_a_dependency_that_is_away(error: BaseException, away: bool) -> None:
    """Connections, time-outs, retryable broker and store errors, a database's operational errors by name: what feeds the breaker."""
    assert is_dependency_failure(error) == away


class Order(BaseModel):
    id: str


def _asks_for_code(error: BaseException) -> bool:
    return bool(error.code)  # type: ignore[attr-defined]


class UnsaidError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (Retry(attempts=1, retry_on=retry_if_exception(_asks_for_code)), ValueError("has no code")),
        (Retry(attempts=1), UnsaidError()),
        (Retry(attempts=2, wait=wait_fixed(0)), UnsaidError()),
        (Retry(attempts=1), group(UnsaidError())),
        (Retry(attempts=2, wait=wait_random_exponential(max=0.01)), ValueError("\ud800\x00")),
    ],
)
async def test_a_policy_or_an_error_that_breaks_does_not_end_the_subscription(policy: Retry, error: Exception) -> None:
    """A predicate that raises, an error without words: the message is a dead letter all the same, and the next one is handled."""
    handled: list[str] = []
    orders = Topic("orders", Order)
    bus = Bus("memory://", service="shop")

    @bus.subscribe(orders, retry=policy)
    async def handle(order: Order) -> None:
        if order.id == "bad":
            raise error
        handled.append(order.id)

    async with bus.running():
        await bus.publish(orders, Order(id="bad"))
        await bus.publish(orders, Order(id="good"))
        await eventually(lambda: handled == ["good"], what="the good one")
        counts = bus.runners[0].counts
        await eventually(lambda: counts["dead"] == 1, seconds=15, what="the dead letter")
        letters = [letter async for letter in bus.dead_letters(orders, group="shop").list()]
    assert [letter.body for letter in letters] == [b'{"id":"bad"}']
    assert letters[0].reason == "exhausted"


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("error", [StopIteration("empty"), StopAsyncIteration(), RuntimeError()])
async def test_an_error_that_python_itself_uses_is_a_failure_like_any_other(error: Exception, in_thread: bool) -> None:
    """`next()` of an empty iterator, in an async handler and in a thread: a dead letter, and the slot is free again."""
    orders = Topic("orders", Order)
    bus = Bus("memory://", service="shop", retry=Retry.none())
    handled: list[str] = []

    def handle_in_thread(order: Order) -> None:
        if order.id == "bad":
            raise error
        handled.append(order.id)

    async def handle(order: Order) -> None:
        handle_in_thread(order)

    bus.subscribe(orders, concurrency=1)(handle_in_thread if in_thread else handle)
    async with bus.running():
        await bus.publish(orders, Order(id="bad"))
        await bus.publish(orders, Order(id="good"))
        await eventually(lambda: handled == ["good"], seconds=3, what="the good one")
        counts = bus.runners[0].counts
        await eventually(lambda: counts["dead"] == 1, seconds=3, what="the dead letter")


def test_a_policy_cannot_be_changed() -> None:
    """It is shared between subscriptions, so it is frozen; equal ones are equal."""
    with pytest.raises(AttributeError):
        Retry().attempts = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  what is refused
    assert Retry.none() == Retry(attempts=1)
