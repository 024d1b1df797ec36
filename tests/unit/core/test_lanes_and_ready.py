"""Lanes keep a key's order; what is ready is taken first come first served, or by weight. Both against plain models."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from msgbus.contract.envelope import PRIORITIES, Priority
from msgbus.inbound.lanes import Lanes
from msgbus.inbound.ready import WEIGHTS, ByWeight, OneLevel, share_of_window

KEYS = st.sampled_from(["a", "b", "c", ""])


class LanesMachine(RuleBasedStateMachine):
    """Random entering and leaving: one out a key, the others behind it in the order they came."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: Lanes[int] = Lanes()
        self.waiting: dict[str, list[int]] = {}
        self.out: dict[str, int] = {}
        self.finished: defaultdict[str, list[int]] = defaultdict(list)
        self.next = 0

    @rule(key=KEYS)
    def enter(self, key: str) -> None:
        number = self.next
        self.next += 1
        free = self.lanes.enter(key, number)
        assert free == (key not in self.out)
        if free:
            self.out[key] = number
            self.waiting[key] = []
        else:
            self.waiting[key].append(number)

    @precondition(lambda self: self.out)
    @rule(choice=st.integers(0, 3))
    def leave(self, choice: int) -> None:
        key = sorted(self.out)[choice % len(self.out)]
        self.finished[key].append(self.out.pop(key))
        following = self.lanes.leave(key)
        waiting = self.waiting[key]
        if waiting:
            assert following == waiting[0]
            self.out[key] = waiting.pop(0)
        else:
            assert following is None

    @rule()
    def clear(self) -> None:
        left = self.lanes.clear()
        assert sorted(left) == sorted(number for waiting in self.waiting.values() for number in waiting)
        self.out.clear()
        self.waiting.clear()

    @invariant()
    def one_out_a_key_in_order(self) -> None:
        assert len(self.lanes) == len(self.out)
        for finished in self.finished.values():
            assert finished == sorted(finished)


LanesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLanes = LanesMachine.TestCase


def test_leaving_a_lane_that_nobody_entered_is_nothing() -> None:
    """After `clear`, those that were out still leave."""
    lanes: Lanes[int] = Lanes()
    assert lanes.leave("a") is None
    assert len(lanes) == 0


def test_no_lane_is_left_behind() -> None:
    """Millions of keys cost nothing once they are handled."""
    lanes: Lanes[int] = Lanes()
    for number in range(1_000):
        assert lanes.enter(f"key {number}", number)
        assert not lanes.enter(f"key {number}", number)
        assert lanes.leave(f"key {number}") == number
        assert lanes.leave(f"key {number}") is None
    assert len(lanes) == 0


def filled(**sizes: int) -> ByWeight[Priority]:
    ready: ByWeight[Priority] = ByWeight()
    for level in PRIORITIES:
        ready.level(level).extend([level] * sizes.get(level, 0))
    return ready


def test_while_every_level_has_work_the_shares_are_8_4_1() -> None:
    """Of every 13 that start, 8 are high, 4 normal and 1 low, smoothly: high never runs 8 in a row."""
    ready = filled(high=800, normal=800, low=800)
    for _ in range(20):
        taken = [ready.take() for _ in range(13)]
        assert Counter(taken) == {"high": 8, "normal": 4, "low": 1}
        assert taken[:4] != ["high"] * 4


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ({"high": 99, "normal": 99}, {"high": 8, "normal": 4}),
        ({"normal": 99, "low": 99}, {"normal": 4, "low": 1}),
        ({"low": 9}, {"low": 5}),
    ],
)
def test_a_level_without_work_leaves_its_share_to_the_others(sizes: dict[str, int], shares: dict[str, int]) -> None:
    """The weights are among those that have something."""
    ready = filled(**sizes)
    assert Counter(ready.take() for _ in range(sum(shares.values()))) == shares


@given(st.lists(st.one_of(st.sampled_from(PRIORITIES), st.none()), max_size=300))
def test_nothing_starves_nothing_is_lost_and_a_level_keeps_its_order(steps: list[Priority | None]) -> None:
    """Items come out once, in order within their level; a level with work waits at most 12 others' turns."""
    ready: ByWeight[tuple[Priority, int]] = ByWeight()
    model: dict[Priority, list[tuple[Priority, int]]] = {level: [] for level in PRIORITIES}
    passed_over: Counter[Priority] = Counter()
    for number, step in enumerate([*steps, *[None] * len(steps)]):
        if step is not None:
            ready.level(step).append((step, number))
            model[step].append((step, number))
            continue
        if not any(model.values()):
            with pytest.raises(IndexError):
                ready.take()
            continue
        level, taken = ready.take()
        assert model[level].pop(0) == (level, taken)
        passed_over[level] = 0
        for other in PRIORITIES:
            if other != level and model[other]:
                passed_over[other] += 1
                assert passed_over[other] <= 2 * sum(WEIGHTS.values())
            elif not model[other]:
                passed_over[other] = 0
        assert len(ready) == sum(map(len, model.values()))
    assert sorted(ready.take_all()) == sorted(item for items in model.values() for item in items)
    assert len(ready) == 0


def test_one_level_is_first_come_first_served() -> None:
    """Without priorities: a queue."""
    ready: OneLevel[int] = OneLevel()
    for number in range(5):
        ready.level("normal").append(number)
    assert [ready.take(), ready.take()] == [0, 1]
    assert ready.take_all() == [2, 3, 4]
    with pytest.raises(IndexError):
        ready.take()


@pytest.mark.parametrize("window", [1, 2, 13, 32, 1000])
def test_every_level_has_a_share_of_the_window(window: int) -> None:
    """By weight, at least one each, so that no level shuts another out."""
    shares = {level: share_of_window(level, window) for level in PRIORITIES}
    assert all(share >= 1 for share in shares.values())
    assert shares["high"] >= shares["normal"] >= shares["low"]
    assert sum(shares.values()) <= window + 3
