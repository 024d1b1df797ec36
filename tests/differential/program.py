"""Programs as plain data: what a user does with a topic and its groups, step by step; and a strategy that draws them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from hypothesis import strategies as st

Kind = Literal["keyed", "plain", "ranked"]
Failure = Literal["error", "later", "later by policy"]
End = Literal["done", "drop", "reject", "give up", "too late"]
Handling = Literal["ordered", "skipping", "unordered"]
Expiry = Literal["never", "at once", "in a minute"]
Level = Literal["high", "normal", "low"]

MOST_KILLS = 3
"""Of one group in a program: fewer than make a message a suspect of killing its process for good (`max_deliveries` is 5)."""

GROUP_NAMES = ("billing", "audit")


@dataclass(frozen=True)
class Plan:
    """What one group's handler does with one message: the first runs fail, in these ways, the next one ends it."""

    failures: tuple[Failure, ...] = ()
    end: End = "done"
    takes_ms: int = 0
    """How long each run takes: 0 does not even wait."""

    def __str__(self) -> str:
        return " ".join([*(f"{failure}," for failure in self.failures), self.end]) + (f" ({self.takes_ms} ms)" if self.takes_ms else "")


@dataclass(frozen=True)
class Message:
    """One message: a number that names it, its key, and what each group will do with it; or a body that fits no model."""

    plans: tuple[Plan, ...]
    key: str | None = None
    readable: bool = True
    n: int = 0

    def __str__(self) -> str:
        key = "" if self.key is None else f" key {self.key}"
        return f"{self.n}{key}: " + (" | ".join(map(str, self.plans)) if self.readable else "unreadable")


@dataclass(frozen=True)
class Group:
    """How one group subscribes. `batch` 0: message by message."""

    name: str
    handling: Handling = "unordered"
    attempts: int = 3
    concurrency: int = 4
    batch: int = 0

    def __str__(self) -> str:
        batch = f", in batches of {self.batch}" if self.batch else ""
        return f"group {self.name}: {self.handling}, {self.attempts} attempts, concurrency {self.concurrency}{batch}"


@dataclass(frozen=True)
class Publish:
    """Publishes messages, one after the other or by `publish_many`."""

    messages: tuple[Message, ...]
    many: bool = False
    delay_ms: int = 0
    expires: Expiry = "never"
    priority: Level = "normal"

    def __str__(self) -> str:
        said = [
            "publish_many" if self.many else "publish",
            *([f"in {self.delay_ms} ms"] if self.delay_ms else []),
            *([f"expires {self.expires}"] if self.expires != "never" else []),
            *([self.priority] if self.priority != "normal" else []),
        ]
        return " ".join(said) + "".join(f"\n        {message}" for message in self.messages)


@dataclass(frozen=True)
class Start:
    """Starts a process of a group: its first one declares the group, a second one shares its work."""

    group: int

    def __str__(self) -> str:
        return f"start a process of {GROUP_NAMES[self.group]}"


@dataclass(frozen=True)
class Halt:
    """Ends the oldest process of a group, if it has one, once its group has begun `after` more runs: by a drain, or by kill -9."""

    group: int
    kill: bool
    after: int = 0

    def __str__(self) -> str:
        return f"{'kill' if self.kill else 'stop'} a process of {GROUP_NAMES[self.group]} after {self.after} more runs"


@dataclass(frozen=True)
class Settle:
    """Waits until all groups that have a process are done with all they owe."""

    def __str__(self) -> str:
        return "wait until all is settled"


@dataclass(frozen=True)
class Redrive:
    """Waits like `Settle`, then sends a group's dead letters back to it; nothing where the group has no process."""

    group: int

    def __str__(self) -> str:
        return f"settle, then redrive the dead letters of {GROUP_NAMES[self.group]}"


Step = Publish | Start | Halt | Settle | Redrive


@dataclass(frozen=True, repr=False)
class Program:
    """Steps on one topic. What every program ends with is not written: each group without a process gets one, and all is settled."""

    kind: Kind
    groups: tuple[Group, ...]
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        lines = [f"a {self.kind} topic", *map(str, self.groups), *(f"{number:2}. {step}" for number, step in enumerate(self.steps, 1))]
        return "\n".join(["", *(f"    {line}" for line in lines), ""])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows it: as its steps."""
        printer.text(repr(self))


# ---------------------------------------------------------------- drawing them


def _plans(expires: Expiry) -> st.SearchStrategy[Plan]:
    ends: tuple[End, ...] = ("done", "drop", "reject", "give up")
    if expires == "in a minute":  # a next run in an hour comes too late for these alone
        ends = (*ends, "too late")
    failures: st.SearchStrategy[Failure] = st.sampled_from(("error", "later", "later by policy"))
    mostly_good: st.SearchStrategy[tuple[Failure, ...]] = st.one_of(st.just(()), st.lists(failures, max_size=5).map(tuple))
    return st.builds(Plan, mostly_good, st.one_of(st.just("done"), st.sampled_from(ends)), st.sampled_from((0, 1, 4)))


@st.composite
def _publishes(draw: st.DrawFn, kind: Kind, groups: int) -> Publish:
    expires: Expiry = draw(st.sampled_from(("never", "never", "never", "in a minute", "at once")))
    keys = st.sampled_from((*"aaabb", None)) if kind == "keyed" else st.none()
    message = st.builds(Message, st.tuples(*[_plans(expires)] * groups), keys, st.integers(0, 9).map(lambda drawn: drawn < 9))
    return Publish(
        tuple(draw(st.lists(message, min_size=1, max_size=8))),
        many=draw(st.booleans()),
        delay_ms=draw(st.sampled_from((0, 0, 0, 0, 20, 60))),
        expires=expires,
        priority=draw(st.sampled_from(("normal", "high", "low"))) if kind == "ranked" else "normal",
    )


def _steps(kind: Kind, groups: int) -> st.SearchStrategy[Step | None]:
    """One step; None, the simplest one, is left out."""
    group = st.integers(0, groups - 1)
    publish = _publishes(kind, groups)
    halt = st.builds(Halt, group, st.booleans(), st.integers(0, 6))
    start = st.builds(Start, group)
    rest = st.one_of(st.builds(Settle), st.builds(Redrive, group))
    return st.one_of(st.none(), publish, start, publish, start, publish, start, halt, halt, rest)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program. Its simplest form has one group, and no step."""
    kind: Kind = draw(st.sampled_from(("plain", "keyed", "keyed", "keyed", "ranked")))
    handling: tuple[Handling, ...] = ("unordered", "ordered", "ordered", "skipping") if kind == "keyed" else ("unordered",)
    groups = tuple(
        Group(
            name,
            draw(st.sampled_from(handling)),
            attempts=draw(st.integers(1, 5)),
            concurrency=draw(st.sampled_from((4, 1, 1, 16))),
            batch=draw(st.sampled_from((0, 0, 3))),
        )
        for name in GROUP_NAMES[: draw(st.integers(1, len(GROUP_NAMES)))]
    )
    return Program(kind, groups, _sensible(draw(st.lists(_steps(kind, len(groups)), min_size=8, max_size=16)), calm=draw(st.booleans())))


def _sensible(drawn: list[Step | None], *, calm: bool) -> tuple[Step, ...]:
    """Gives each message its number, starts what is to be ended and is not there, leaves out third processes and too many kills.

    `calm`: processes come and go only by drains and while all is settled, so that nothing at all may be repeated.
    """
    kept: list[Step] = []
    count = 0
    kills: Counter[int] = Counter()
    processes: Counter[int] = Counter()
    for step in drawn:
        match step:
            case Publish(messages):
                kept.append(replace(step, messages=tuple(replace(message, n=count + i) for i, message in enumerate(messages))))
                count += len(messages)
            case Halt(group, kill) if processes[group]:
                kill = kill and not calm and kills[group] < MOST_KILLS
                processes[group] -= 1
                kills[group] += kill
                kept += [Settle()] * calm + [replace(step, kill=kill)]
            case Start(group) | Halt(group) | Redrive(group) if processes[group] < (2 if isinstance(step, Start) else 1):
                processes[group] += 1
                kept += [Settle()] * calm + [Start(group)]
            case Settle() | Redrive():
                kept.append(step)
            case _:
                pass
    return tuple(kept)
