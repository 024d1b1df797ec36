"""The circuit breaker, by a clock that is handed in."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msgbus.inbound.breaker import FIRST_PAUSE, LEAST_RUNS, LONGEST_PAUSE, WINDOW, Breaker


def run(steps: list[tuple[float, bool]]) -> tuple[Breaker, list[float]]:
    """Runs that ended at these moments, well (True) or on a dependency; the breaker, and when it opened."""
    breaker = Breaker()
    opened: list[float] = []
    clock = -0.5
    for runs, (now, good) in enumerate(steps, 1):
        while clock < now:  # as the runner does: each time it asks for messages, at least twice a second
            breaker.sample(clock, runs - 1)
            clock += 0.5
        if good:
            breaker.succeeded()
        elif breaker.failed(now, runs):
            opened.append(now)
    return breaker, opened


@pytest.mark.parametrize(
    ("steps", "opens_at"),
    [
        ([(float(second), False) for second in range(9)], None),
        ([(float(second), False) for second in range(10)], 9.0),
        ([(second * 0.1, second % 2 == 0) for second in range(20)], 0.9),
        ([(second * 0.1, second % 3 != 0) for second in range(60)], None),
        ([(second * 4.0, False) for second in range(40)], None),  # never ten runs in 30 s
        ([(second * 0.01, True) for second in range(1000)] + [(10 + second * 0.01, False) for second in range(900)], None),
        ([(second * 0.01, True) for second in range(1000)] + [(60 + second * 0.1, False) for second in range(12)], 60.9),
    ],
    ids=["nine", "ten", "half", "a third", "too slow", "many good before", "good long ago"],
)
def test_it_opens_when_half_of_at_least_ten_runs_in_30_s_failed_on_a_dependency(
    steps: list[tuple[float, bool]], opens_at: float | None
) -> None:
    """At least 10 runs, at least half of them, in the last 30 seconds: then, and once."""
    breaker, opened = run(steps)
    assert opened == ([] if opens_at is None else [pytest.approx(opens_at)])
    assert breaker.state == ("closed" if opens_at is None else "open")


def opened_at(now: float) -> Breaker:
    breaker = Breaker()
    for number in range(LEAST_RUNS):
        breaker.failed(now, number + 1)
    assert breaker.state == "open"
    return breaker


def test_a_failure_while_it_is_open_changes_nothing() -> None:
    """Runs that were under way when it opened end one by one."""
    breaker = opened_at(100.0)
    reopens_at = breaker.reopens_at
    assert not breaker.failed(101.0, 11)
    breaker.succeeded()
    assert (breaker.state, breaker.reopens_at) == ("open", reopens_at)


def test_one_good_run_closes_it_and_one_bad_run_opens_it_for_twice_as_long() -> None:
    """Half-open: one run decides. The pause doubles each time up to a minute, and begins anew after it was closed."""
    breaker = opened_at(100.0)
    now, pause = 100.0, FIRST_PAUSE
    for _ in range(8):
        assert 0.8 * pause <= breaker.reopens_at - now <= 1.2 * pause
        now = breaker.reopens_at
        breaker.try_again()
        assert breaker.state == "half_open"
        assert breaker.failed(now, 0)
        pause = min(2 * pause, LONGEST_PAUSE)
    breaker.try_again()
    breaker.succeeded()
    assert breaker.state == "closed"
    for number in range(LEAST_RUNS):
        opened = breaker.failed(now + 100, number + 1)
    assert opened
    assert breaker.reopens_at - (now + 100) <= 1.2 * FIRST_PAUSE


def test_trying_again_while_closed_is_nothing() -> None:
    """A timer that comes late does no harm."""
    breaker = Breaker()
    breaker.try_again()
    assert breaker.state == "closed"


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from(["good", "bad", "try"])), max_size=200))
def test_any_run_of_events(events: list[tuple[float, Literal["good", "bad", "try"]]]) -> None:
    """Whatever comes: it opens only with enough failures in the window, and says until when; closed never follows open at once."""
    breaker = Breaker()
    now, runs = 1000.0, 0
    failures: list[float] = []
    for wait, event in events:
        now += wait
        breaker.sample(now, runs)
        before = breaker.state
        if event == "try":
            breaker.try_again()
            assert breaker.state == ("half_open" if before == "open" else before)
            continue
        runs += 1
        if event == "good":
            breaker.succeeded()
            assert breaker.state == ("closed" if before == "half_open" else before)
            continue
        failures.append(now)
        if breaker.failed(now, runs):
            assert before != "open"
            assert now < breaker.reopens_at <= now + 1.2 * LONGEST_PAUSE
            if before == "closed":
                assert len([moment for moment in failures if moment > now - WINDOW]) * 2 >= LEAST_RUNS
            failures.clear()
