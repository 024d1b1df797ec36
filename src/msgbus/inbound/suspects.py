"""Suspects: messages that were in hand when processes died. Says when a subscription must take them one at a time, and when no more."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from msgbus.contract.adapter import Received
from msgbus.contract.envelope import Priority
from msgbus.inbound.job import Source

SUSPECT = 2
"""Deaths from which a delivery puts its subscription in quarantine."""
CALM = 3
"""Good deliveries in a row, from each source, that end a quarantine, once every suspect has come again."""
ELSEWHERE = 64
"""Good deliveries in a row after which a suspect that has not come again is taken to be with a peer."""
SILENCE = 60
"""Receives without a message, of half a second each, after which nothing is expected any more from where a suspect came: a peer has it.
Not one: a new receiver may have to wait for its shards."""
DOUBT = 120.0
"""Seconds after a lost link in which a process believes no count: to the broker each lost link of it or its peers may look like a death.
One that is really killed loses no link before, and who comes after it starts without a doubt."""
REMEMBERED = 10_000
"""Messages whose first count of crashes a process remembers."""


class Suspects:
    """Of one subscription in one process. Pure bookkeeping."""

    __slots__ = ("_clock", "_doubts_until", "_first_counts", "_levels", "_wanted", "quarantine")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._doubts_until = -math.inf
        self.quarantine = False
        """One at a time: only so is a death the fault of one message."""
        self._levels: set[Priority] = set()
        """Where suspects came from."""
        self._wanted: set[str] = set()
        """Those that began the quarantine and have not come again in it."""
        self._first_counts: OrderedDict[str, int] = OrderedDict()

    def link_lost(self) -> None:
        """The link broke, and this process lives."""
        self._doubts_until = self._clock() + DOUBT

    def deaths(self, received: Received) -> int:
        """Deaths of processes that held it: the broker's count at this process's first sight of it, if it had no doubts then. The rest
        are lost links, ours or others'."""
        if not received.crashes:
            return 0
        seen = self._first_counts
        first = seen.setdefault(received.envelope.id, 0 if self._clock() < self._doubts_until else received.crashes)
        if len(seen) > REMEMBERED:
            seen.popitem(last=False)
        return first

    def turn(self, source: Source, sources: Sequence[Source], batch: Sequence[Received]) -> bool:
        """Looks at what came. True: the quarantine has just begun, or just ended, and the batch must not be handled the old way."""
        suspects: set[str] = set()
        for one in batch:  # each one is to be counted
            if one.crashes and self.deaths(one) >= SUSPECT:
                suspects.add(one.envelope.id)
                self._levels.add(source.level)
        if not self.quarantine:
            self.quarantine, self._wanted = bool(suspects), suspects
            return self.quarantine
        self._wanted -= suspects
        if batch:
            source.calm = 0 if suspects else source.calm + 1
            source.silent = SILENCE
        else:
            source.silent += 1
            if source.silent >= SILENCE or source.level not in self._levels:
                source.calm = ELSEWHERE
        if all(other.calm >= (ELSEWHERE if self._wanted else CALM) for other in sources):
            self.quarantine = False
            self._levels.clear()
            return True
        return False
