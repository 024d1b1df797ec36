"""The model: what must come of a program, on any broker. This is the specification; it knows nothing of how it is done.

C1, C2: a group is owed everything that was published since it was declared, the topic's first group what was published before, too,
and a later one as well if the topic keeps its history; not if it begins at the latest.
C2, C8: each message is run until a run ends it, at most `attempts` times, and is then done, dropped, or a dead letter with its reason.
C4: an ordered group completes a key's messages in the order published, those with a delay excepted; one that skips, those that do not fail.
C6: nothing is repeated, unless a process is killed, or comes or goes while the group has work in hand.
A listener is owed what is published while it is there; it has no dead letters, and nothing of it comes twice.
Operators: what is purged, and what waits for a group that is dropped, is not run; what is replayed is run once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.differential.program import (
    Discard,
    Forget,
    Group,
    Halt,
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
)
from tests.differential.trace import GroupTrace, Run, Trace

MAX_REDRIVES = 3
"""A dead letter that was redriven so often stays where it is."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a message in a group: how many runs, and the reason if it dies."""

    runs: int
    reason: str | None


def fate(message: Message, plan: Plan, attempts: int) -> Fate:
    """Of one message that gets through its runs in peace."""
    if not message.readable:
        return Fate(0, "invalid")
    failures = len(plan.failures)
    if failures >= attempts:
        return Fate(attempts, "exhausted")
    runs = failures + 1
    match plan.end:
        case "done" | "drop":
            return Fate(runs, None)
        case "reject" | "give up":
            return Fate(runs, "rejected")
        case "too late":
            return Fate(runs, "exhausted" if runs >= attempts else "expired")


@dataclass
class Owed:
    """One message on its way to one group. `maybe`: whether the group gets it is not promised either way."""

    message: Message
    fate: Fate
    delayed: bool
    maybe: bool = False
    rounds: int = 0
    """How often it is taken to its end: once, and once more for each redrive and replay."""
    settled: bool = False
    """Whether it came to its end as often."""
    letters: list[int] = field(default_factory=list[int])
    """Its dead letters, those that it is going to have among them: how often each was redriven."""

    @property
    def dead(self) -> tuple[tuple[str, int, int], ...]:
        """Its dead letters: reason, attempts, redrives."""
        return tuple((self.fate.reason or "", self.fate.runs, redrives) for redrives in sorted(self.letters))

    def owe(self, redrives: int) -> None:
        """Once more, after so many redrives."""
        self.rounds += 1
        self.settled = False
        if self.fate.reason is not None:
            self.letters.append(redrives)


@dataclass
class GroupState:
    """What is known of a group while a program goes on."""

    group: Group
    index: int
    declared: bool = False
    processes: int = 0
    at_rest: bool = False
    """It has no process, and all was settled when the last one was stopped."""
    owed: dict[int, Owed] = field(default_factory=dict[int, Owed])
    busy: bool = False
    """It is owed something that it may not have settled yet."""
    killed: bool = False
    disturbed: bool = False
    """A process came or went while it had work in hand, or may have."""

    @property
    def ordered(self) -> bool:
        return self.group.handling != "unordered"

    def repeats(self, *, exact_moves: bool) -> bool:
        """Whether something may have been run more than once. `exact_moves`: on this broker not by drains, where there is no order."""
        return self.killed or (self.disturbed and (self.ordered or not exact_moves))


class Model:
    """The state of a program's world. `step` takes it on; the interpreter asks what to wait for, a test what must have been seen."""

    def __init__(self, program: Program) -> None:
        self.states = [GroupState(group, index) for index, group in enumerate(program.groups)]
        self.listeners: list[GroupState] = []
        """Those that have left among them."""
        self._retain = program.retain
        self._had_group = False
        self._published: list[Publish] = []

    # ------------------------------------------------------------ steps

    def may(self, step: Discard | Redrive | Purge | Replay | Forget) -> bool:
        """Whether an operator does this, or leaves it because it could not be said what comes of it."""
        state = self.states[step.group]
        match step:
            case Redrive():  # of two dead letters of one message a call takes one
                return state.processes > 0 and all(len(owed.letters) < 2 for owed in state.owed.values())
            case Discard():
                return state.processes > 0 and not (state.killed or state.disturbed)
            case Purge():
                return state.at_rest
            case Replay():
                return self._retain and state.at_rest
            case Forget():
                return state.at_rest and any(other.declared for other in self.states if other is not state)

    def step(self, step: object) -> None:
        """What a step does."""
        match step:
            case Publish():
                self._published.append(step)
                for state in [*self.states, *self.listeners]:
                    if state.declared:
                        self._owe(state, [step])
            case Listen():
                name = f"listener {len(self.listeners) + 1}"
                self.listeners.append(GroupState(replace(self.states[0].group, name=name, handling="unordered"), 0, declared=True))
                self._owe_delayed(self.listeners[-1])
            case Leave():
                self.step(Settle())
                for state in [state for state in self.listeners if state.declared][:1]:
                    state.declared = False
            case Start(group):
                state = self.states[group]
                state.at_rest = False
                if not state.declared:
                    self._declare(state)
                elif state.busy or (state.ordered and state.processes):  # shards come to it later, perhaps from amid work
                    state.disturbed = True
                state.processes += 1
            case Halt(group, kill):
                state = self.states[group]
                state.processes -= 1
                state.killed |= kill
                state.disturbed |= state.busy
                state.at_rest = not (state.processes or kill or state.busy)
            case Settle():
                for state in self.states:
                    if state.processes:
                        state.busy = False
                        for owed in state.owed.values():
                            owed.settled = True
            case Pause():
                pass
            case Redrive(group) | Discard(group):
                self.step(Settle())
                if self.may(step):
                    self._move_letters(self.states[group], step)
            case Purge(group) if self.may(step):
                self._take_away(self.states[group])
            case Replay(group, publishes) if self.may(step):
                self._owe(self.states[group], self._published[-publishes:])
                for owed in self.states[group].owed.values():  # it may have been due since
                    owed.maybe |= owed.delayed and any(owed.message in one.messages for one in self._published[:-publishes])
            case Forget(group) if self.may(step):
                self._take_away(self.states[group])
                self.states[group].declared = self.states[group].at_rest = False
            case Purge() | Replay() | Forget():
                pass
            case _:
                raise TypeError(step)

    def _declare(self, state: GroupState) -> None:
        earliest = state.group.start == "earliest" and (self._retain or not self._had_group)
        if earliest:
            self._owe(state, self._published)
        if self._had_group or not earliest:
            self._owe_delayed(state)
        state.declared = self._had_group = True

    def _owe_delayed(self, state: GroupState) -> None:
        """Of what was published before, what is delayed may or may not be older."""
        waits = [one for one in self._published if one.delay_ms]
        self._owe(state, waits)
        for message in (message for one in waits for message in one.messages if message.n in state.owed):
            state.owed[message.n].maybe = True

    @staticmethod
    def _owe(state: GroupState, publishes: Iterable[Publish]) -> None:
        """Once more what it has settled, and what it does not have: in the order published, after all that it completed before."""
        done = {n: owed for n, owed in state.owed.items() if owed.settled or owed.rounds > 1}
        for step in publishes:
            state.busy = True
            for message in step.messages:
                owed = state.owed.get(message.n)
                if owed is None and step.expires != "at once":
                    ends = fate(message, message.plans[state.index], state.group.attempts)
                    owed = state.owed[message.n] = Owed(message, ends, step.delay_ms > 0, settled=True)
                if owed is not None and owed.settled:
                    owed.owe(0)
        state.owed = done | dict(sorted(state.owed.items()))

    @staticmethod
    def _move_letters(state: GroupState, step: Redrive | Discard) -> None:
        for owed in state.owed.values():
            if step.even and owed.message.n % 2:
                continue
            if isinstance(step, Discard):
                owed.letters = []
            elif owed.letters and owed.letters[0] < MAX_REDRIVES:
                owed.owe(owed.letters.pop() + 1)
                state.busy = True

    @staticmethod
    def _take_away(state: GroupState) -> None:
        """What waits; what is delayed may be due, and wait, or not."""
        for n, owed in [*state.owed.items()]:
            if not owed.settled:
                owed.maybe |= owed.delayed
                owed.rounds -= 1
                owed.settled = True
                del owed.letters[-1:]
                if not owed.rounds and not owed.maybe:
                    del state.owed[n]

    # ------------------------------------------------------------ what must be seen

    def trace(self, *, exact_moves: bool) -> Trace:
        """What is to be observed when all is settled."""
        groups = {state.group.name: self._group(state, state.repeats(exact_moves=exact_moves)) for state in self.states}
        return Trace(groups | {state.group.name: replace(self._group(state, repeats=False), dead={}) for state in self.listeners})

    def _group(self, state: GroupState, repeats: bool) -> GroupTrace:
        sure = [owed for owed in state.owed.values() if not owed.maybe]
        runs = {
            owed.message.n: tuple(sorted([*range(1, owed.fate.runs + 1)] * (1 if repeats else owed.rounds)))
            for owed in sure
            if owed.fate.runs
        }
        dead = {owed.message.n: owed.dead for owed in sure if owed.dead}
        if repeats:
            dead = {n: tuple((reason, attempts, -1) for reason, attempts, _ in letters[:1]) for n, letters in dead.items()}
        in_order = self.in_order(state)
        order = _by_key((owed.message.key, owed.message.n) for owed in in_order)
        sequence: dict[str, tuple[Run, ...]] = {}
        if self.has_sequence(state, repeats):
            sequence = _by_key((owed.message.key, (owed.message.n, run)) for owed in in_order for run in range(1, owed.fate.runs + 1))
        return GroupTrace(runs, order, sequence, dead)

    @staticmethod
    def has_sequence(state: GroupState, repeats: bool) -> bool:
        """Whether every run of an ordered message has its place."""
        return state.group.handling == "ordered" and not repeats

    @staticmethod
    def in_order(state: GroupState) -> list[Owed]:
        """What must be completed in the order published, a key."""
        if not state.ordered:
            return []
        skips = state.group.handling in ("skipping", "pulled")
        return [
            owed
            for owed in state.owed.values()
            if owed.message.key is not None
            and owed.fate.runs
            and not owed.delayed
            and not (skips and owed.message.plans[state.index].failures)
        ]


def _by_key(pairs: Iterable[tuple[str | None, Any]]) -> dict[str, Any]:
    found: dict[str, tuple[Any, ...]] = {}
    for key, item in pairs:
        assert key is not None
        found[key] = (*found.get(key, ()), item)
    return found


def expected(program: Program, *, exact_moves: bool) -> Trace:
    """The trace of a program. `exact_moves`: a drain repeats nothing on this broker where there is no order."""
    model = Model(program)
    for step in [*program.steps, *last_steps(program)]:
        model.step(step)
    return model.trace(exact_moves=exact_moves)


def last_steps(program: Program) -> list[Start | Settle]:
    """What every program ends with: each group has a process, and all is settled."""
    processes = [0] * len(program.groups)
    for step in program.steps:
        match step:
            case Start(group):
                processes[group] += 1
            case Halt(group):
                processes[group] -= 1
            case _:
                pass
    return [*(Start(index) for index, count in enumerate(processes) if not count), Settle()]
