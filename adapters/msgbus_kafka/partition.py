"""Where a receiver stands in a partition: what is un-settled, up to where the group is done, and who may have died over what.

Kafka keeps one number a partition and group: everything before it is done. So only the contiguous head is committed. Beside the number a
commit carries a text. It says what is done above the head, as far as there is room, so that whoever takes over does not do it again. And it
counts deaths: a holder that ends well says so, and where it did not, what may have been in its hands is suspect of having killed it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from aiokafka import TopicPartition

from msgbus.contract.adapter import Received, Tenure

State = Literal["clean", "open", "alone"]
Suspects = tuple[tuple[int, int], ...]
"""(end, deaths): the records before the first end that is higher than their offset."""

Ranges = tuple[tuple[int, int], ...]
"""(first, end): the records from the first to before the end, in order."""

_VERSION = "msgbus3"
_STEPS = 16
"""So many steps of suspicion are told apart; a commit's text has its limits."""
_RANGES = 100
"""So many ranges above the head are told; what is done above these comes again."""


class Mark(NamedTuple):
    """The text of a commit.

    `state`: "clean", nobody has it in hand; "open", it is in use: if nobody says more, what was in hand died with its holder; "alone", the
    record before `upto` alone is in hand. `upto`: before it everything had been handed out. `replayed`: the last replay carried out.
    `settled`: what is done above the head; offsets from the head on, for they are short.
    """

    state: str = "clean"
    upto: int = 0
    suspects: Suspects = ()
    replayed: str = ""
    settled: Ranges = ()

    def text(self) -> str:
        """As it is committed."""
        return json.dumps([_VERSION, *self], separators=(",", ":"))


def read_mark(text: str) -> Mark:
    """The mark of a commit; of another tool's commit: nobody has it in hand."""
    try:
        version, state, upto, suspects, replayed, settled = json.loads(text)
        if version == _VERSION:
            return Mark(str(state), int(upto), _pairs(suspects), str(replayed), _pairs(settled))
    except (ValueError, TypeError):
        pass
    return Mark()


def _pairs(found: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(one), int(other)) for one, other in found)


def suspects_of(mark: Mark, head: int, end: int, window: int) -> Suspects:
    """Who is suspect when a partition is taken over at `head`: `end` is where it ends now, `window` how far a holder reads ahead."""
    known = [step for step in mark.suspects if step[0] > head]
    found: dict[int, int] = {}
    if mark.state != "clean":
        # Before any suspicion commits follow what is handed out; with it, they go before it, and `upto` is exact.
        reach = mark.upto if mark.suspects or mark.state == "alone" else min(end, head + window)
        died = known[:1] if mark.state == "alone" else known  # a death in quarantine counts for that one alone
        for until, deaths in (*died, (reach, 0)) if reach > head else ():
            found.setdefault(min(until, reach), deaths + 1)
    for until, deaths in known:
        found.setdefault(until, deaths)
    return tuple(sorted(found.items())[:_STEPS])


@dataclass(slots=True, eq=False)
class Partition:
    """A partition that is ours, from its assignment to its end."""

    place: TopicPartition
    position: int
    """The offset to be read next."""
    own: bool = False
    """Of the group's own topic: what is in it came to this group alone."""
    suspects: Suspects = ()
    settled: Ranges = ()
    """What others had done before it came to us, and is to be passed over."""
    replayed: str = ""
    upto: int = 0
    """Before it everything was handed out."""
    committed: tuple[int, str] | None = None
    tenure: Tenure = field(default_factory=Tenure)
    """While it is draining, another waits for us."""
    unsettled: dict[int, Received] = field(default_factory=dict[int, Received])
    """By offset, in order: what was read and is not settled."""
    ready: deque[Received] = field(default_factory=deque[Received])
    """Of these, what can be handed out."""
    later: list[tuple[float, int, Received]] = field(default_factory=list[tuple[float, int, Received]])
    """A heap of what is not due yet: moment, offset."""
    held: set[int] = field(default_factory=set[int])
    """What is handed out and not settled."""

    def head(self) -> int:
        """Everything before it is settled."""
        return next(iter(self.unsettled), self.position)

    def deaths(self, offset: int) -> int:
        """How many holders died with this record in hand."""
        return next((deaths for end, deaths in self.suspects if offset < end), 0)

    def passes(self, offset: int) -> bool:
        """Whether a record that is about to be read was done before it came to us."""
        while self.settled and self.settled[0][1] <= offset:
            self.settled = self.settled[1:]
        return bool(self.settled) and self.settled[0][0] <= offset

    def mark(self, state: State) -> tuple[int, str]:
        """What to commit now."""
        head = self.head()
        if self.suspects and self.suspects[0][0] <= head:
            self.suspects = tuple(step for step in self.suspects if step[0] > head)
        settled = tuple((first - head, end - head) for first, end in islice(self._above(), _RANGES))
        return head, Mark(state, max(self.upto, head), self.suspects, self.replayed, settled).text()

    def _above(self) -> Iterator[tuple[int, int]]:
        """What is done above the head: what we have read and do not know as un-settled; beyond, what was done before us."""
        end = self.head()
        for offset in self.unsettled:
            if offset > end:
                yield end, offset
            end = offset + 1
        if end < self.position:
            yield end, self.position
        yield from ((max(first, self.position), end) for first, end in self.settled if end > self.position)
