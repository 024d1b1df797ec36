"""The model: what must come of a program, on any broker. This is the specification; it knows nothing of how it is done.

C1, C2: a group is owed everything that was published since it was declared, the topic's first group what was published before, too.
C2, C8: each message is run until a run ends it, at most `attempts` times, and is then done, dropped, or a dead letter with its reason.
C4: an ordered group completes a key's messages in the order published, those with a delay excepted; one that skips, those that do not fail.
C6: nothing is repeated, unless a process is killed, or comes or goes while the group has work in hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.differential.program import Group, Halt, Message, Plan, Program, Publish, Redrive, Settle, Start
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
    rounds: int = 1
    """How often it is taken to its end: once, and once more for each redrive."""

    @property
    def letter(self) -> tuple[str, int, int] | None:
        """Its dead letter, if it has one."""
        return None if self.fate.reason is None else (self.fate.reason, self.fate.runs, self.rounds - 1)


@dataclass
class GroupState:
    """What is known of a group while a program goes on."""

    group: Group
    index: int
    declared: bool = False
    processes: int = 0
    owed: dict[int, Owed] = field(default_factory=dict[int, Owed])
    busy: bool = False
    """It is owed something that it may not have settled yet."""
    killed: bool = False
    disturbed: bool = False
    """A process came or went while it had work in hand."""

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
        self._published: list[tuple[Message, Publish]] = []

    # ------------------------------------------------------------ steps

    def step(self, step: object) -> None:
        """What a step does."""
        match step:
            case Publish(messages):
                for message in messages:
                    self._published.append((message, step))
                    for state in self.states:
                        if state.declared:
                            self._owe(state, message, step)
            case Start(group):
                state = self.states[group]
                if not state.declared:
                    self._declare(state)
                elif state.busy:
                    state.disturbed = True
                state.processes += 1
            case Halt(group, kill):
                state = self.states[group]
                state.processes -= 1
                state.killed |= kill
                state.disturbed |= state.busy
            case Settle():
                for state in self.states:
                    if state.processes:
                        state.busy = False
            case Redrive(group):
                self.step(Settle())
                state = self.states[group]
                if state.processes:
                    for owed in state.owed.values():
                        if owed.letter is not None and owed.rounds <= MAX_REDRIVES:
                            owed.rounds += 1
                            state.busy = True
            case _:
                raise TypeError(step)

    def _declare(self, state: GroupState) -> None:
        first = not any(other.declared for other in self.states)
        state.declared = True
        for message, step in self._published:
            if first:
                self._owe(state, message, step)
            elif step.delay_ms:
                self._owe(state, message, step, maybe=True)

    @staticmethod
    def _owe(state: GroupState, message: Message, step: Publish, *, maybe: bool = False) -> None:
        if step.expires != "at once":
            state.owed[message.n] = Owed(message, fate(message, message.plans[state.index], state.group.attempts), step.delay_ms > 0, maybe)
        state.busy = True

    # ------------------------------------------------------------ what must be seen

    def trace(self, *, exact_moves: bool) -> Trace:
        """What is to be observed when all is settled."""
        return Trace({state.group.name: self._group(state, state.repeats(exact_moves=exact_moves)) for state in self.states})

    def _group(self, state: GroupState, repeats: bool) -> GroupTrace:
        sure = [owed for owed in state.owed.values() if not owed.maybe]
        runs = {
            owed.message.n: tuple(sorted([*range(1, owed.fate.runs + 1)] * (1 if repeats else owed.rounds)))
            for owed in sure
            if owed.fate.runs
        }
        dead = {owed.message.n: ((letter[0], letter[1], -1 if repeats else letter[2]),) for owed in sure if (letter := owed.letter)}
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
        skips = state.group.handling == "skipping"
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
