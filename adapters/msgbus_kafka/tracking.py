"""Where a receiver stands in a partition: what is un-settled, up to where the group is done, and who may have died over what.

Kafka keeps one number a partition and group: everything before it is done. So only the contiguous head is committed; what is done above it
is known here alone, until the head is done too. Beside the number a commit carries a text, and that counts deaths: a holder that ends well
says so, and where it did not, what may have been in its hands is suspect of having killed it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from aiokafka import TopicPartition

from msgbus.contract.adapter import Received, Tenure

State = Literal["clean", "open", "alone"]

_VERSION = "msgbus1"
_RANGES = 16
"""So many steps of suspicion are told apart; a commit's text has its limits."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The text of a commit.

    `state`: "clean", nobody has it in hand; "open", it is in use: if nobody says more, what was in hand died with its holder; "alone", the
    record at `offset` alone is in hand. `upto`: before it everything had been handed out. `suspects`: (end, deaths), the records before the
    first end that is higher than their offset. `replayed`: the replay that was carried out last.
    """

    state: State = "clean"
    upto: int = 0
    suspects: tuple[tuple[int, int], ...] = ()
    replayed: str = ""

    def text(self) -> str:
        """As it is committed."""
        parts = [_VERSION, self.state, str(self.upto), ",".join(f"{end}:{deaths}" for end, deaths in self.suspects), self.replayed]
        return ";".join(parts)


def read_mark(text: str) -> Mark:
    """The mark of a commit; of another tool's commit: nobody has it in hand."""
    parts = text.split(";")
    if len(parts) != 5 or parts[0] != _VERSION or parts[1] not in ("clean", "open", "alone"):
        return Mark()
    try:
        steps = [step.split(":") for step in parts[3].split(",") if step]
        suspects = tuple((int(end), int(deaths)) for end, deaths in steps)
        state: State = "open" if parts[1] == "open" else "alone" if parts[1] == "alone" else "clean"
        return Mark(state, int(parts[2]), suspects, parts[4])
    except ValueError:
        return Mark()


def suspects_of(mark: Mark, head: int, end: int, window: int) -> tuple[tuple[int, int], ...]:
    """Who is suspect when a partition is taken over at `head`: `end` is where it ends now, `window` how far a holder reads ahead."""
    known = [(until, deaths) for until, deaths in mark.suspects if until > head]
    if mark.state == "clean":
        return tuple(known)
    if mark.state == "alone":  # a death in quarantine counts for that one alone
        own = known[0][1] if known else 0
        return ((mark.upto, own + 1), *(step for step in known if step[0] > mark.upto)) if mark.upto > head else tuple(known)
    # Before any suspicion commits follow what is handed out; with it, they go before it, and `upto` is exact.
    reach = mark.upto if mark.suspects else min(end, head + window)
    found: list[tuple[int, int]] = []
    for until, deaths in known:
        if until <= reach:
            found.append((until, deaths + 1))
        else:
            if reach > (found[-1][0] if found else head):
                found.append((reach, deaths + 1))
            found.append((until, deaths))
    if reach > (found[-1][0] if found else head):
        found.append((reach, 1))
    return tuple(found[:_RANGES])


class Entry:
    """A record that was read and is not yet below the committed head: the token of what is handed out."""

    __slots__ = ("held", "offset", "partition", "settled")

    def __init__(self, partition: Partition, offset: int) -> None:
        self.partition = partition
        self.offset = offset
        self.settled = False
        self.held = False


@dataclass(slots=True, eq=False)
class Partition:
    """A partition that is ours, from its assignment to its end."""

    tp: TopicPartition
    position: int
    """The offset to be read next."""
    own_way: bool = False
    """Of the group's own topic: what is in it came to this group alone."""
    delayed: bool = False
    """Of a topic whose records may be due later."""
    suspects: tuple[tuple[int, int], ...] = ()
    replayed: str = ""
    upto: int = 0
    """Before it everything was handed out."""
    purged: int = 0
    """What was not handed out before it is discarded."""
    committed: tuple[int, str] | None = None
    held: int = 0
    """How many are handed out and not settled."""
    leaving: bool = False
    """It is another's as soon as nothing of it is handed out."""
    parked: list[Received] = field(default_factory=list[Received])
    """Read, or given back, while it was leaving: for when it stays after all."""
    gone: bool = False
    """No longer ours. The tenure says so too, but the core may say so there before it is."""
    tenure: Tenure = field(default_factory=Tenure)
    entries: deque[Entry] = field(default_factory=deque[Entry])

    def lose(self) -> None:
        """It is no longer ours."""
        self.gone = self.tenure.lost = True

    def head(self) -> int:
        """Everything before it is settled."""
        entries = self.entries
        while entries and entries[0].settled:
            entries.popleft()
        return entries[0].offset if entries else self.position

    def full(self, ack_window: int) -> bool:
        """Whether reading goes too far beyond the slowest record."""
        if len(self.entries) < ack_window:
            return False
        self.head()
        return len(self.entries) >= ack_window

    def deaths(self, offset: int) -> int:
        """How many holders died with this record in hand."""
        for end, deaths in self.suspects:
            if offset < end:
                return deaths
        return 0

    def mark(self, state: State) -> tuple[int, str]:
        """What to commit now."""
        head = self.head()
        if self.suspects and self.suspects[0][0] <= head:
            self.suspects = tuple(step for step in self.suspects if step[0] > head)
        return head, Mark(state, max(self.upto, head), self.suspects, self.replayed).text()
