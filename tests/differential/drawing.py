"""A strategy that draws programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from tests.differential.program import (
    GROUP_NAMES,
    Discard,
    End,
    Expiry,
    Failure,
    Forget,
    Group,
    Halt,
    Handling,
    Kind,
    Leave,
    Listen,
    Message,
    Pause,
    Plan,
    Program,
    Publish,
    Purge,
    Redrive,
    Replay,
    Settle,
    Start,
    Step,
)

MOST_KILLS = 3
"""Of one group in a program: fewer than make a message a suspect of killing its process for good (`max_deliveries` is 5)."""

MOST_LISTENERS = 2


@dataclass(frozen=True)
class AtRest:
    """A group is brought to rest, messages are published or not, and an operator does something with it."""

    publish: Publish | None
    then: Purge | Replay | Forget


def _plans(expires: Expiry) -> st.SearchStrategy[Plan]:
    ends: tuple[End, ...] = ("done", "drop", "reject", "give up")
    if expires == "in an hour":  # a next run in two hours comes too late for these alone
        ends = (*ends, "too late")
    failures: st.SearchStrategy[Failure] = st.sampled_from(("error", "later", "later by policy"))
    mostly_good: st.SearchStrategy[tuple[Failure, ...]] = st.one_of(st.just(()), st.lists(failures, max_size=5).map(tuple))
    return st.builds(Plan, mostly_good, st.one_of(st.just("done"), st.sampled_from(ends)), st.sampled_from((0, 1, 4)))


@st.composite
def _publishes(draw: st.DrawFn, kind: Kind, groups: int) -> Publish:
    expires: Expiry = draw(st.sampled_from(("never", "never", "never", "in an hour", "at once")))
    keys = st.sampled_from((*"aaabb", None)) if kind == "keyed" else st.none()
    message = st.builds(
        Message,
        st.tuples(*[_plans(expires)] * len(GROUP_NAMES)).map(lambda plans: plans[:groups]),
        keys,
        st.integers(0, 9).map(lambda drawn: drawn < 9),
    )
    return Publish(
        tuple(draw(st.lists(message, min_size=1, max_size=8))),
        many=draw(st.booleans()),
        delay_ms=draw(st.sampled_from((0, 0, 0, 0, 20, 60))),
        expires=expires,
        priority=draw(st.sampled_from(("normal", "high", "low"))) if kind == "ranked" else "normal",
    )


def _steps(kind: Kind, groups: int, retain: bool) -> st.SearchStrategy[Step | AtRest | None]:
    """One step; None, the simplest one, is left out."""
    group = st.integers(0, len(GROUP_NAMES) - 1).map(lambda drawn: drawn % groups)
    publish = _publishes(kind, groups)
    start = st.builds(Start, group)
    halt = st.builds(Halt, group, st.booleans(), st.integers(0, 6))
    rest: st.SearchStrategy[Step] = st.builds(Settle) | st.builds(Pause, group)
    listener: st.SearchStrategy[Step] = st.builds(Listen) | st.builds(Leave)
    redrive = st.builds(Redrive, group, st.booleans())
    discard = st.builds(Discard, group, st.booleans())
    operators: list[st.SearchStrategy[Purge | Replay | Forget]] = [st.builds(Purge, group)]
    operators += [st.builds(Replay, group, st.integers(1, 4))] * 2 * retain + [st.builds(Forget, group)] * (groups > 1)
    at_rest = st.builds(AtRest, st.none() | publish, _any(operators))
    steps = [st.none(), *[publish] * 3, *[start] * 2, *[halt] * 2, rest, listener, _any([redrive, redrive, redrive, discard]), at_rest]
    return _any(steps)


def _any(strategies: Sequence[st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of them, each as often as it stands there; `one_of` takes no notice of that."""
    return st.sampled_from(strategies).flatmap(lambda drawn: drawn)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program. Its simplest form has one group, and no step."""
    kind: Kind = draw(st.sampled_from(("plain", "keyed", "keyed", "keyed", "ranked")))
    handling: tuple[Handling, ...] = ("unordered", "ordered", "ordered", "skipping") if kind == "keyed" else ("unordered", "unordered")
    group = st.builds(
        Group,
        st.just(""),
        st.sampled_from((*handling, "pulled")),
        attempts=st.integers(1, 5),
        concurrency=st.sampled_from((4, 1, 1, 16)),
        batch=st.sampled_from((0, 0, 3)),
        start=st.sampled_from(("earliest", "earliest", "latest")),
    )
    drawn = draw(st.lists(group, min_size=1, max_size=len(GROUP_NAMES)))
    groups = tuple(replace(one, name=name) for one, name in zip(drawn, GROUP_NAMES, strict=False))
    retain = draw(st.booleans())
    steps = draw(st.lists(_steps(kind, len(groups), retain), min_size=8, max_size=16))
    return Program(kind, groups, _sensible(steps, len(groups), calm=draw(st.booleans())), retain)


def _sensible(drawn: list[Step | AtRest | None], groups: int, *, calm: bool) -> tuple[Step, ...]:
    """Gives each message its number, starts what is to be ended and is not there, leaves out third processes, too many kills,
    and all purges of dead letters but one, which take a second each.

    `calm`: processes come and go only by drains and while all is settled, so that nothing at all may be repeated.
    """
    kept: list[Step] = []
    count = 0
    kills: Counter[int] = Counter()
    processes: Counter[int] = Counter()
    declared: set[int] = set()
    listeners = 0

    def start(group: int) -> None:
        kept.extend([*[Settle()] * calm, Start(group)])
        processes[group] += 1
        declared.add(group)

    def publish(step: Publish) -> None:
        nonlocal count
        kept.append(replace(step, messages=tuple(replace(message, n=count + i) for i, message in enumerate(step.messages))))
        count += len(step.messages)

    for step in drawn:
        match step:
            case None:
                pass
            case Publish():
                publish(step)
            case Halt(group, kill) if processes[group]:
                kill = kill and not calm and kills[group] < MOST_KILLS
                processes[group] -= 1
                kills[group] += kill
                kept += [Settle()] * calm + [replace(step, kill=kill)]
            case Start(group) | Halt(group):
                if processes[group] < 2:
                    start(group)
            case Listen() | Leave():
                starts = not listeners or (isinstance(step, Listen) and listeners < MOST_LISTENERS)
                listeners += 1 if starts else -1
                kept.append(Listen() if starts else Leave())
            case AtRest(messages, then):
                for group in range(groups):
                    if group not in declared or (group == then.group and not processes[group]):
                        start(group)
                kept += [Settle(), *[Halt(then.group, kill=False)] * processes[then.group]]
                processes[then.group] = 0
                if messages is not None:
                    publish(messages)
                kept.append(then)
            case Redrive(group) | Discard(group):
                if isinstance(step, Redrive) or not any(isinstance(one, Discard) for one in kept):
                    if not processes[group]:
                        start(group)
                    kept.append(step)
            case _:
                kept.append(step)
    return tuple(kept)
