"""History: what processes saw, as JSON lines; and the checker that says what was lost, repeated or out of order. Pure: no clock, no I/O
but reading and writing files.

A publisher notes `publish` with `invoke` before the call, and after it `ok` (confirmed), `fail` (stored nowhere) or `info` (unknown). A
handler notes `start`, then `done` or `fail`; who reads dead letters notes `dlq`; what time or an operator took away is `gone`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

What = Literal["publish", "start", "done", "fail", "dlq", "gone"]
How = Literal["invoke", "ok", "fail", "info"]


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a history. `ts` in seconds, by one clock for all; `pid` names a process, and a new one after each death.

    `f` is what happened and `type` how it ended: a `publish` is `invoke`, then `ok`, `fail` or `info`; a `fail` of a run that was cut
    off by a shutdown is `info`; all else is `ok`. `seq` rises within a key, in the order in which its one producer published.
    """

    ts: float
    pid: str
    f: What
    type: How
    id: str
    key: str | None = None
    seq: int | None = None
    group: str | None = None
    attempt: int = 1

    def __post_init__(self) -> None:
        if self.f not in get_args(What) or self.type not in get_args(How):
            raise ValueError(f"no event is f={self.f!r}, type={self.type!r}")


class History:
    """Events, in the order of their `ts`; those of one moment in the order noted."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events: list[Event] = list(events)

    def note(self, event: Event) -> None:
        """Adds one."""
        self.events.append(event)

    def __iter__(self) -> Iterator[Event]:
        return iter(sorted(self.events, key=lambda event: event.ts))

    def __len__(self) -> int:
        return len(self.events)

    def write(self, path: Path) -> None:
        """One JSON object a line; what is None or the default is left out."""
        with path.open("w", encoding="utf-8") as file:
            for event in self:
                line = {name: value for name, value in asdict(event).items() if value is not None and (name, value) != ("attempt", 1)}
                file.write(json.dumps(line) + "\n")

    @classmethod
    def read(cls, *paths: Path) -> Self:
        """The events of several processes' files together. Raises `ValueError` that names file and line for what is no event.

        A last line without an end is left out: its process died while it wrote.
        """
        events: list[Event] = []
        for path in paths:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
                if not line.endswith("\n"):
                    break
                try:
                    values: dict[str, Any] = json.loads(line)  # Any: Event checks what it can
                    events.append(Event(**values))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}:{number}: {error}") from error
        return cls(events)


class InGroup(NamedTuple):
    """A message, as one group had it."""

    group: str
    id: str


class Inversion(NamedTuple):
    """A key's message whose first completion came after that of a later one."""

    group: str
    key: str
    seq: int
    after: int


class Overlap(NamedTuple):
    """Two runs of one key at the same time in one process."""

    pid: str
    group: str
    key: str
    running: str
    started: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a history shows. `ok`: nothing of what the contract forbids. As text, the counts of all."""

    confirmed: int
    """Publishes that returned."""
    unknown: int
    """Publishes whose outcome nobody was told."""
    done: int
    """Messages completed, each once a group."""
    dead: int
    """Messages dead-lettered, each once a group."""
    lost: frozenset[InGroup]
    """Confirmed, and neither done nor dead nor gone. C2."""
    unexpected: frozenset[InGroup]
    """Done or dead, and never published."""
    aborted: frozenset[InGroup]
    """Done or dead, though their publish was refused: stored nowhere. C1."""
    recovered: frozenset[InGroup]
    """Done or dead, their publish having been unknown: it had been stored after all. Allowed."""
    duplicates: int
    """Completions beyond the first of a message in a group, becoming a dead letter included."""
    allowed_duplicates: int
    """How many the incidents explain. C6."""
    inversions: tuple[Inversion, ...] = ()
    """C4."""
    overlaps: tuple[Overlap, ...] = ()
    """C4."""
    remaining: int = 0
    """What the broker still had after the drain."""
    repeated: dict[str, int] = field(default_factory=dict[str, int])
    """How many duplicates each group had."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What the contract forbids and the history shows, a sentence each."""
        found: list[str] = []
        for name in ("lost", "unexpected", "aborted", "inversions", "overlaps"):
            things: Collection[object] = getattr(self, name)
            if things:
                found.append(f"{len(things)} {name}, first: {next(iter(sorted(things, key=repr)))}")
        if self.duplicates > self.allowed_duplicates:
            found.append(f"{self.duplicates} duplicates, {self.allowed_duplicates} allowed: {self.repeated}")
        if self.remaining:
            found.append(f"{self.remaining} messages were left at the broker")
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether the contract held."""
        return not self.problems

    def __str__(self) -> str:
        counts = {
            "confirmed": self.confirmed,
            "unknown": self.unknown,
            "done": self.done,
            "dead": self.dead,
            "lost": len(self.lost),
            "unexpected": len(self.unexpected),
            "aborted": len(self.aborted),
            "recovered": len(self.recovered),
            "duplicates": f"{self.duplicates} of {self.allowed_duplicates} allowed",
            "inversions": len(self.inversions),
            "overlaps": len(self.overlaps),
            "remaining": self.remaining,
        }
        return ", ".join(f"{name} {count}" for name, count in counts.items())


def check(
    history: History,
    *,
    groups: Collection[str] = (),
    incidents: int = 0,
    window: int = 0,
    consumers: int = 1,
    publish_window: int = 0,
    remaining: int = 0,
) -> Report:
    """What a history shows of the contract, each group by itself.

    `groups`: those that must have got everything (default: all that the history names). `incidents`: deaths, lost links, rebalances; each
    may repeat, in each group, what `consumers` of it held, a `window` each (Kafka: the `ack_window` of a partition), and `publish_window`
    publishes on their way. `remaining`: what the broker's depth says after the drain.
    """
    events = list(history)
    published: dict[How, set[str]] = {how: set() for how in get_args(How)}
    ends: dict[str, Counter[str]] = {group: Counter() for group in groups}
    done: set[InGroup] = set()
    dead: set[InGroup] = set()
    gone: set[InGroup] = set()
    for event in events:
        if event.f == "publish":
            published[event.type].add(event.id)
            continue
        group = event.group or ""
        counts = ends.setdefault(group, Counter())
        if event.f in ("done", "dlq"):
            counts[event.id] += 1
            (done if event.f == "done" else dead).add(InGroup(group, event.id))
        elif event.f == "gone":
            gone.add(InGroup(group, event.id))
    finished = done | dead
    refused = published["fail"] - published["ok"] - published["info"]
    unknown = (published["invoke"] | published["info"]) - published["ok"] - refused
    invoked = set[str]().union(*published.values())
    repeated = {group: sum(counts.values()) - len(counts) for group, counts in ends.items()}
    return Report(
        confirmed=len(published["ok"]),
        unknown=len(unknown),
        done=len(done),
        dead=len(dead),
        lost=frozenset({InGroup(group, id) for group in ends for id in published["ok"]} - finished - gone),
        unexpected=frozenset(found for found in finished if found.id not in invoked),
        aborted=frozenset(found for found in finished if found.id in refused),
        recovered=frozenset(found for found in finished if found.id in unknown),
        duplicates=sum(repeated.values()),
        allowed_duplicates=incidents * (window * consumers + publish_window) * max(1, len(ends)),
        inversions=tuple(_inversions(events)),
        overlaps=tuple(_overlaps(events)),
        remaining=remaining,
        repeated={group: count for group, count in repeated.items() if count},
    )


def _inversions(events: Iterable[Event]) -> Iterator[Inversion]:
    """Where the first completions of a key, in a group, are not in the order published."""
    seen: set[InGroup] = set()
    newest: dict[tuple[str, str], int] = {}
    for event in events:
        if event.f != "done" or event.key is None or event.seq is None:
            continue
        group = event.group or ""
        message = InGroup(group, event.id)
        if message in seen:
            continue
        seen.add(message)
        before = newest.get((group, event.key))
        if before is not None and event.seq < before:
            yield Inversion(group, event.key, event.seq, before)
        else:
            newest[group, event.key] = event.seq


def _overlaps(events: Iterable[Event]) -> Iterator[Overlap]:
    """Where a run of a key starts in a process while another one has not ended there."""
    running: dict[tuple[str, str, str], str] = {}
    for event in events:
        if event.key is None or event.f not in ("start", "done", "fail"):
            continue
        lane = (event.pid, event.group or "", event.key)
        if event.f != "start":
            if running.get(lane) == event.id:
                del running[lane]
            continue
        before = running.get(lane)
        if before is not None:
            yield Overlap(*lane, before, event.id)
        running[lane] = event.id
