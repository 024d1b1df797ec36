"""Programs as plain data: what a user does with a topic and its groups, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["keyed", "plain", "ranked"]
Failure = Literal["error", "later", "later by policy"]
End = Literal["done", "drop", "reject", "give up", "too late"]
Handling = Literal["ordered", "skipping", "unordered", "pulled"]
Beginning = Literal["earliest", "latest"]
Expiry = Literal["never", "at once", "in an hour"]
Level = Literal["high", "normal", "low"]

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
    """How one group subscribes. `batch` 0: message by message. `pulled`: it has no handler, and asks for messages."""

    name: str
    handling: Handling = "unordered"
    attempts: int = 3
    concurrency: int = 4
    batch: int = 0
    start: Beginning = "earliest"

    def __str__(self) -> str:
        batch = f", in batches of {self.batch}" if self.batch else ""
        start = ", from the latest" if self.start == "latest" else ""
        return f"group {self.name}: {self.handling}, {self.attempts} attempts, concurrency {self.concurrency}{batch}{start}"


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
class Pause:
    """Pauses the oldest process of a group, if it has one and handles messages, until the next time that all is to be settled."""

    group: int

    def __str__(self) -> str:
        return f"pause a process of {GROUP_NAMES[self.group]}"


@dataclass(frozen=True)
class Redrive:
    """Waits like `Settle`, then sends a group's dead letters back to it; nothing where it has no process, or two of one message."""

    group: int
    even: bool = False
    """Only those of messages of an even number."""

    def __str__(self) -> str:
        return f"settle, then redrive {_letters(self.even)} of {GROUP_NAMES[self.group]}"


@dataclass(frozen=True)
class Discard:
    """Waits like `Settle`, then purges a group's dead letters; nothing where it has no process, or where some may come again."""

    group: int
    even: bool = False

    def __str__(self) -> str:
        return f"settle, then purge {_letters(self.even)} of {GROUP_NAMES[self.group]}"


def _letters(even: bool) -> str:
    return "the even dead letters" if even else "the dead letters"


@dataclass(frozen=True)
class Purge:
    """Purges a group that is at rest: it has no process, and all was settled when the last one was stopped. Else nothing."""

    group: int

    def __str__(self) -> str:
        return f"purge {GROUP_NAMES[self.group]}, if it is at rest"


@dataclass(frozen=True)
class Replay:
    """Puts what the last so many publishes sent before a group at rest again."""

    group: int
    publishes: int

    def __str__(self) -> str:
        return f"replay the last {self.publishes} publishes to {GROUP_NAMES[self.group]}, if it is at rest"


@dataclass(frozen=True)
class Forget:
    """Drops a group at rest; nothing where the topic has no other one."""

    group: int

    def __str__(self) -> str:
        return f"drop {GROUP_NAMES[self.group]}, if it is at rest and another one is there"


@dataclass(frozen=True)
class Listen:
    """Starts a process that is told everything from now on (`broadcast=True`), and does with it what the first group does."""

    def __str__(self) -> str:
        return "start a listener"


@dataclass(frozen=True)
class Leave:
    """Waits like `Settle`, then ends the oldest listener; nothing where there is none."""

    def __str__(self) -> str:
        return "settle, then stop a listener"


Step = Publish | Start | Halt | Listen | Leave | Settle | Pause | Redrive | Discard | Purge | Replay | Forget


@dataclass(frozen=True, repr=False)
class Program:
    """Steps on one topic. What every program ends with is not written: each group without a process gets one, and all is settled."""

    kind: Kind
    groups: tuple[Group, ...]
    steps: tuple[Step, ...]
    retain: bool = False
    """Whether the topic keeps its history."""

    def __repr__(self) -> str:
        topic = f"a {self.kind} topic{' with history' if self.retain else ''}"
        lines = [topic, *map(str, self.groups), *(f"{number:2}. {step}" for number, step in enumerate(self.steps, 1))]
        return "\n".join(["", *(f"    {line}" for line in lines), ""])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows it: as its steps."""
        printer.text(repr(self))
