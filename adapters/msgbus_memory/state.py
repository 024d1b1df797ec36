"""What a broker remembers: records without a lock, a clock or an event loop. `broker.py` works on them, under its lock.

A message is one object for all groups. A group has a queue a priority level and shard; what is handed out is an `Entry`
until it is settled. Order is that of `Message.seq`, which rises within a topic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from msgbus.contract.adapter import Received, Tenure
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import PRIORITIES, Envelope, Priority


@dataclass(frozen=True, slots=True)
class Terms:
    """What one adapter's settings say: it sends and declares on these terms, whoever else shares the broker."""

    limit: int
    max_body: int
    first_group_retention: float
    dead_letter_retention: float | None
    shards: int


class Wakes(Protocol):
    """Somebody who waits."""

    def wake(self) -> None:
        """Ends the wait, from any thread."""
        ...


class Message:
    """An envelope that arrived, shared by the groups that wait for it."""

    __slots__ = ("arrived", "envelope", "seq")

    def __init__(self, seq: int, envelope: Envelope, arrived: float) -> None:
        self.seq = seq
        self.envelope = envelope
        self.arrived = arrived


class Hold(Tenure):
    """A member's hold: on a shard where it is exclusive, else on all it takes. `unsettled` counts what came by it."""

    __slots__ = ("member", "shard", "unsettled")

    def __init__(self, member: Member, shard: Shard | None) -> None:
        super().__init__()
        self.member = member
        self.shard = shard
        self.unsettled = 0


class Entry:
    """One handing out: the token of a `Received`. It is settled, or goes back and is handed out as another entry."""

    __slots__ = ("crashes", "hold", "message", "settled")

    def __init__(self, message: Message, hold: Hold, crashes: int) -> None:
        self.message = message
        self.hold = hold
        self.crashes = crashes
        self.settled = False


class Shard:
    """A queue. `ready` came in order and was never handed out.

    `returned` is a heap of what came back: (seq, tie, crashes, message). `takers` may take from it.
    Where they are exclusive, `hold` is the owner's, and the `heir` has the shard once that is settled.
    """

    __slots__ = ("heir", "hold", "ready", "returned", "takers")

    def __init__(self) -> None:
        self.ready: deque[Message] = deque()
        self.returned: list[tuple[int, int, int, Message]] = []
        self.takers: list[Member] = []
        self.hold: Hold | None = None
        self.heir: Member | None = None

    def size(self) -> int:
        """How many wait."""
        return len(self.ready) + len(self.returned)

    def head(self) -> int:
        """The sequence number of the oldest that waits; there must be one."""
        if not self.returned or (self.ready and self.ready[0].seq < self.returned[0][0]):
            return self.ready[0].seq
        return self.returned[0][0]

    def clear(self) -> int:
        """Forgets what waits; how many it was."""
        size = self.size()
        self.ready.clear()
        self.returned.clear()
        return size

    def forget_before(self, moment: float) -> int:
        """Forgets what arrived earlier; how many it was."""
        before = self.size()
        while self.ready and self.ready[0].arrived < moment:
            self.ready.popleft()
        if any(item[3].arrived < moment for item in self.returned):
            self.returned = sorted(item for item in self.returned if item[3].arrived >= moment)
        return before - self.size()

    def waiting(self) -> list[tuple[int, int, int, Message]]:
        """All that waits, oldest first."""
        return sorted([(message.seq, -1, 0, message) for message in self.ready] + self.returned, key=lambda item: item[:2])

    def hand_out(self, member: Member, into: list[Received], count: int, bound: int) -> int:
        """Hands out up to `count`, oldest first, none from `bound` on; how many it was."""
        hold = self.hold if member.exclusive else member.hold
        assert hold is not None, "an exclusive member takes from the shards it holds"
        ready, returned, held = self.ready, self.returned, member.held
        taken = 0
        while taken < count:
            if returned and (not ready or returned[0][0] <= ready[0].seq):
                if returned[0][0] >= bound:
                    break
                _, _, crashes, message = heappop(returned)
            elif ready and ready[0].seq < bound:
                crashes = 0
                message = ready.popleft()
            else:
                break
            entry = Entry(message, hold, crashes)
            held.add(entry)
            into.append(Received(message.envelope, entry, hold, crashes))
            taken += 1
        hold.unsettled += taken
        return taken


class Member:
    """A receiver, as the broker sees it. `sources` are the shards it takes from; `held` is what it has not settled.

    `gone` says why it no longer is one; `sleeping` is there while its `receive` waits.
    """

    __slots__ = (
        "draining",
        "exclusive",
        "gone",
        "group",
        "held",
        "hold",
        "level",
        "session",
        "sleeping",
        "sources",
        "window",
    )

    def __init__(self, session: Session, group: Group, level: Priority, window: int, exclusive: bool) -> None:
        self.session = session
        self.group = group
        self.level: Priority = level
        self.window = window
        self.exclusive = exclusive
        self.hold = Hold(self, None)
        self.held: set[Entry] = set()
        self.sources: list[Shard] = []
        self.sleeping: Wakes | None = None
        self.draining = False
        self.gone: str | None = None

    def wake(self) -> None:
        """Ends its `receive`'s wait, if it waits."""
        waiter = self.sleeping
        if waiter is not None:
            self.sleeping = None
            waiter.wake()


class Session:
    """One `open` of an adapter. `dead` tells whether its event loop is closed; `closed` that the session has ended."""

    __slots__ = ("closed", "dead", "members", "terms", "tickets")

    def __init__(self, terms: Terms, dead: Callable[[], bool]) -> None:
        self.terms = terms
        self.dead = dead
        self.closed = False
        self.members: dict[Member, None] = {}
        self.tickets: dict[Ticket, None] = {}


class Ticket:
    """A `send`'s place in the line for room in a topic."""

    __slots__ = ("session", "topic", "waiter")

    def __init__(self, session: Session, waiter: Wakes) -> None:
        self.session = session
        self.waiter = waiter
        self.topic: Topic | None = None


class Group:
    """A copy of a topic's stream; a private receiver's has no name. `pending`: what waits, is delayed or not settled.

    `legacy`: holds from before the topic's layout changed; exclusive members get nothing until these are settled.
    """

    __slots__ = ("delayed", "legacy", "levels", "members", "name", "pending", "topic")

    def __init__(self, topic: Topic, name: str | None) -> None:
        self.topic = topic
        self.name = name
        self.pending = 0
        self.members: list[Member] = []
        self.delayed: list[tuple[float, int, Envelope]] = []
        self.legacy: set[Hold] = set()
        self.levels: dict[Priority, list[Shard]] = {}
        self.lay_out()

    def lay_out(self) -> None:
        """Makes the queues that the topic's layout asks for; what waited moves over, in order."""
        old = [shard for level in self.levels.values() for shard in level]
        levels = PRIORITIES if self.topic.priorities else ("normal",)
        self.levels = {level: [Shard() for _ in range(self.topic.shards or 1)] for level in levels}
        for item in sorted((item for shard in old for item in shard.waiting()), key=lambda item: item[:2]):
            shard = self.shard_for(item[3].envelope)
            if item[1] < 0:
                shard.ready.append(item[3])
            else:
                heappush(shard.returned, item)
        for shard in old:
            if shard.hold is not None:
                shard.hold.draining = True
                if shard.hold.unsettled:
                    self.legacy.add(shard.hold)

    def shards(self) -> list[Shard]:
        """Every queue of it."""
        return [shard for level in self.levels.values() for shard in level]

    def shard_for(self, envelope: Envelope) -> Shard:
        """The queue where an envelope belongs."""
        topic = self.topic
        shards = self.levels[envelope.priority if topic.priorities else "normal"]
        return shards[shard_of(envelope.key, len(shards))]

    def waiting(self) -> list[Message]:
        """What waits, not handed out, oldest first."""
        return [item[3] for item in sorted((i for s in self.shards() for i in s.waiting()), key=lambda item: item[:2])]


class Topic:
    """A stream. `shards` and `retain` are None, `priorities` is False, until somebody who says so declares it.

    `kept`: what waits for the first group; `history`: what `retain` keeps; `delayed`: what goes to all groups, later.
    `everyone`: its groups and the private ones. `line`: who waits for room. `expiry`: how long a dead letter is kept.
    """

    __slots__ = (
        "declared", "delayed", "everyone", "expiry", "groups", "had_group", "history", "kept", "kind", "line", "name",
        "priorities", "retain", "seq", "shards",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.declared = False
        self.kind = "work"
        self.priorities = False
        self.shards: int | None = None
        self.retain: float | None = None
        self.expiry: float | None = None
        self.seq = 0
        self.groups: dict[str, Group] = {}
        self.everyone: list[Group] = []
        self.had_group = False
        self.kept: deque[Message] = deque()
        self.history: deque[Message] = deque()
        self.delayed: list[tuple[float, int, Envelope]] = []
        self.line: deque[Ticket] = deque()

    def fullest(self) -> int:
        """How many messages count towards the limit."""
        most = max(len(self.kept), len(self.history))
        for group in self.everyone:
            most = max(most, group.pending)
        return most + len(self.delayed)
