"""One broker's state and the operations on it: thread-safe, never suspending, with no event loop of its own.

Every public method takes the lock once. Whoever has to wait leaves a `Wakes` behind and calls again when it was woken.
What is due is moved when somebody looks.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from threading import Lock

from msgbus.contract.adapter import Depth, Received, ReceiverSpec, SendOutcome, TopicSpec
from msgbus.contract.address import DEAD_GROUP, shard_of
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable, MessageTooLarge, NotFound, PublishRejected, TopologyMismatch
from msgbus_memory import sharing
from msgbus_memory.state import Entry, Group, Hold, Member, Message, Session, Shard, Terms, Ticket, Topic, Wakes


class Broker:
    """Topics, groups and queues, shared by the sessions of one or several adapters."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._topics: dict[str, Topic] = {}
        self._sessions: dict[Session, None] = {}
        self._ties = count()

    # ------------------------------------------------------------------------------------------- sessions and members

    def begin(self, terms: Terms, dead: Callable[[], bool]) -> Session:
        """A session; `dead` says, from any thread, whether the event loop that it belongs to is closed."""
        session = Session(terms, dead)
        with self._lock:
            self._reap()
            self._sessions[session] = None
        return session

    def end(self, session: Session, *, crashed: bool) -> None:
        """Ends a session and its receivers. `crashed`: as if its process had died. Twice is once."""
        with self._lock:
            self._end(session, crashed)

    def join(self, session: Session, spec: ReceiverSpec) -> Member:
        """A new receiver. `BrokerUnavailable` where the session has ended, or topic or group do not exist."""
        with self._lock:
            self._reap()
            if session.closed:
                raise BrokerUnavailable("the memory adapter is closed")
            topic = self._topics.get(spec.topic)
            if topic is None:
                raise BrokerUnavailable(f"the memory broker has no topic {spec.topic!r}: declare it first")
            if spec.group is None:
                group = Group(topic, None)
                topic.everyone.append(group)
            elif spec.group in topic.groups:
                group = topic.groups[spec.group]
            else:
                raise BrokerUnavailable(f"topic {spec.topic!r} has no group {spec.group!r}: declare it first")
            window = 1 if spec.quarantine else max(spec.window, 1)
            member = Member(session, group, spec.priority, window, spec.exclusive)
            session.members[member] = None
            sharing.join(member)
            return member

    def drain(self, member: Member) -> None:
        """Hands the member nothing more. Its shards stay its own until it leaves, so that order holds."""
        with self._lock:
            if member.gone is None and not member.draining:
                member.draining = True
                if member.exclusive:
                    sharing.balance(member.group, member.level)
                member.wake()

    def leave(self, member: Member) -> None:
        """Ends a receiver; what it has not settled goes back, in order. Twice is once."""
        with self._lock:
            self._leave(member, "the receiver is closed", crashed=False)

    # ------------------------------------------------------------------------------------------------------ declaring

    def declare(self, terms: Terms, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], create: bool) -> None:
        """Makes topics and groups exist, or says with `TopologyMismatch` what differs or is missing."""
        with self._lock:
            self._reap()
            for spec in topics:
                self._declare_topic(terms, spec, create)
            for receiver in receivers:
                topic = self._topics.get(receiver.topic)
                if topic is None:
                    topic = self._declare_topic(terms, TopicSpec(receiver.topic), create)
                if receiver.group is not None and receiver.group not in topic.groups:
                    if not create:
                        raise TopologyMismatch(f"group {receiver.group!r} of topic {topic.name!r}", "a group", "none")
                    self._add_group(terms, topic, receiver.group, receiver.start == "earliest")

    def _declare_topic(self, terms: Terms, spec: TopicSpec, create: bool) -> Topic:
        topic = self._topics.get(spec.name)
        where = f"topic {spec.name!r}"
        if topic is None or not topic.declared:
            if not create:
                raise TopologyMismatch(where, "a topic", "none")
            if topic is None:
                topic = self._topics[spec.name] = Topic(spec.name)
            topic.kind = spec.kind
        elif topic.kind != spec.kind:
            raise TopologyMismatch(where, f"kind {spec.kind!r}", f"kind {topic.kind!r}")
        elif topic.priorities != spec.priorities:
            raise TopologyMismatch(where, _priorities(spec.priorities), _priorities(topic.priorities))
        shards = spec.shards
        if shards is not None and shards != topic.shards and (topic.shards is not None or not create):
            raise TopologyMismatch(where, f"{shards} shards", f"{topic.shards or 1}")
        if spec.retain is not None and spec.retain != topic.retain and (topic.retain is not None or not create):
            raise TopologyMismatch(where, f"retain {spec.retain:g} s", f"{topic.retain or 0:g} s")
        if shards is None and spec.keyed and create:
            shards = topic.shards or terms.shards
        if (shards or topic.shards, spec.priorities) != (topic.shards, topic.priorities):
            topic.shards, topic.priorities = shards or topic.shards, spec.priorities
            for group in topic.everyone:
                group.lay_out()
                sharing.bind(group)
        if spec.retain is not None and topic.retain is None:
            topic.retain = spec.retain
            topic.history.extend(topic.kept)
        topic.declared = True
        if topic.kind == "dead":
            topic.expiry = terms.dead_letter_retention
            if DEAD_GROUP not in topic.groups:
                self._add_group(terms, topic, DEAD_GROUP, earliest=True)
        return topic

    def _add_group(self, terms: Terms, topic: Topic, name: str, earliest: bool) -> None:
        self._look(topic)
        group = topic.groups[name] = Group(topic, name)
        topic.everyone.append(group)
        now = time.time()
        if topic.retain is not None:
            _trim(topic.history, now - topic.retain)
        if not topic.had_group:
            _trim(topic.kept, now - terms.first_group_retention)
        if earliest:
            # While there is no group, both are the end of the same stream: the longer one holds the other.
            messages = topic.history if topic.had_group else max(topic.kept, topic.history, key=len)
            for message in messages:
                group.shard_for(message.envelope).ready.append(message)
            group.pending = len(messages)
        topic.had_group = True
        topic.kept.clear()

    # -------------------------------------------------------------------------------------------------------- sending

    def append(
        self,
        session: Session,
        envelopes: Sequence[Envelope],
        outcomes: list[SendOutcome],
        start: int = 0,
        *,
        ticket: Ticket | None = None,
        last: bool = False,
    ) -> int:
        """Appends from `start` on, writing outcomes; where it stopped: at the end, or at one that finds no room.

        The `ticket` then stands in line and is woken when it is first and there is room. `last`: what finds no room is
        rejected instead.
        """
        with self._lock:
            self._reap()
            return self._append(session, envelopes, outcomes, start, ticket=ticket, last=last)

    def forward(
        self, member: Member, entry: Entry, envelope: Envelope, *, ticket: Ticket | None = None, last: bool = False
    ) -> tuple[bool, SendOutcome]:
        """Appends and settles in one step. Whether it is decided (else the ticket stands in line), and the outcome."""
        with self._lock:
            self._reap()
            if entry not in member.held:
                if entry.settled:
                    return True, PublishRejected("the delivery to forward was settled before")
                return True, BrokerUnavailable("the delivery to forward went back to its group before")
            outcomes: list[SendOutcome] = [None]
            done = self._append(member.session, (envelope,), outcomes, 0, ticket=ticket, last=last)
            if done and outcomes[0] is None:
                self._settle(member, entry)
            return bool(done), outcomes[0]

    def step_out(self, ticket: Ticket) -> None:
        """Takes a ticket out of its line; the next one may have its room."""
        with self._lock:
            self._step_out(ticket)
            ticket.session.tickets.pop(ticket, None)

    def _append(
        self,
        session: Session,
        envelopes: Sequence[Envelope],
        outcomes: list[SendOutcome],
        start: int,
        *,
        ticket: Ticket | None,
        last: bool,
    ) -> int:
        terms = session.terms
        now = time.time()
        topic: Topic | None = None
        room = 0
        for index in range(start, len(envelopes)):
            envelope = envelopes[index]
            if session.closed:
                outcomes[index] = BrokerUnavailable("the memory adapter is closed")
                continue
            if len(envelope.body) > terms.max_body:
                problem = f"body of {len(envelope.body)} bytes: the memory broker takes {terms.max_body} (option max_body)"
                outcomes[index] = MessageTooLarge(f"message {envelope.id!r}, {problem}")
                continue
            if envelope.group is not None:
                outcomes[index] = self._append_to_group(envelope, now)
                topic = None  # its fullest group may have changed
                continue
            if topic is None or topic.name != envelope.topic:
                topic = self._topics.get(envelope.topic)
                if topic is None:
                    topic = self._topics[envelope.topic] = Topic(envelope.topic)
                self._look(topic)
                _trim(topic.kept, now - terms.first_group_retention)
                room = terms.limit - topic.fullest()
            if last:
                if room <= 0:
                    problem = f"holds {terms.limit} messages that are not settled, its limit (option limit)"
                    outcomes[index] = PublishRejected(f"message {envelope.id!r}: topic {topic.name!r} {problem}")
                    continue
            elif (room <= 0 or topic.line) and not (room > 0 and topic.line[0] is ticket):
                if ticket is not None and ticket.topic is not topic:
                    self._step_out(ticket)
                    ticket.topic = topic
                    ticket.session.tickets[ticket] = None
                    topic.line.append(ticket)
                return index
            room -= 1
            if envelope.delay > 0:
                self._delay(topic.delayed, envelope, topic.everyone)
            else:
                self._fan_out(topic, envelope, now)
        return len(envelopes)

    def _fan_out(self, topic: Topic, envelope: Envelope, now: float) -> None:
        topic.seq += 1
        message = Message(topic.seq, envelope, now)
        if topic.everyone:
            shard_count = topic.shards or 1
            place = shard_of(envelope.key, shard_count) if shard_count > 1 else 0
            level = envelope.priority if topic.priorities else "normal"
            for group in topic.everyone:
                group.pending += 1
                shard = group.levels[level][place]
                shard.ready.append(message)
                for member in shard.takers:
                    if member.sleeping is not None and len(member.held) < member.window:
                        member.wake()
        if not topic.had_group:
            topic.kept.append(message)
        if topic.retain is not None:
            topic.history.append(message)

    def _append_to_group(self, envelope: Envelope, now: float) -> SendOutcome:
        topic = self._topics.get(envelope.topic)
        group = topic.groups.get(envelope.group or "") if topic is not None else None
        if group is None:
            return PublishRejected(f"message {envelope.id!r}: topic {envelope.topic!r} has no group {envelope.group!r}")
        group.pending += 1
        if envelope.delay > 0:
            self._delay(group.delayed, envelope, (group,))
        else:
            self._put(group, envelope, now)
        return None

    def _put(self, group: Group, envelope: Envelope, now: float) -> None:
        group.topic.seq += 1
        shard = group.shard_for(envelope)
        shard.ready.append(Message(group.topic.seq, envelope, now))
        for member in shard.takers:
            member.wake()

    def _delay(self, heap: list[tuple[float, int, Envelope]], envelope: Envelope, groups: Sequence[Group]) -> None:
        heappush(heap, (time.monotonic() + envelope.delay, next(self._ties), envelope))
        if heap[0][2] is envelope:  # those who sleep until the first is due must look again
            for group in groups:
                for member in group.members:
                    member.wake()

    # ------------------------------------------------------------------------------------------ receiving and settling

    def take(self, member: Member, limit: int, sleeper: Wakes | None = None) -> list[Received]:
        """Hands out up to `limit`, oldest first. Where it is nothing, `sleeper` is woken when that may have changed."""
        taken: list[Received] = []
        with self._lock:
            self._reap()
            if member.gone is not None:
                raise BrokerUnavailable(member.gone)
            group = member.group
            topic = group.topic
            if topic.delayed or group.delayed or topic.expiry is not None:
                self._look(topic)
            room = min(limit, member.window - len(member.held))
            if room > 0 and not member.draining and not (group.legacy and member.exclusive):
                sources = member.sources
                if len(sources) == 1:
                    sources[0].hand_out(member, taken, room, sys.maxsize)
                else:
                    _merge(member, sources, taken, room)
            if not taken:
                member.sleeping = sleeper
        return taken

    def next_due(self, member: Member) -> float | None:
        """When, on the monotonic clock, something delayed comes to the member's group."""
        with self._lock:
            heaps = member.group.delayed, member.group.topic.delayed
            return min((heap[0][0] for heap in heaps if heap), default=None)

    def settle(self, member: Member, entry: Entry) -> bool:
        """The group is done with it. False: it had gone back."""
        with self._lock:
            if entry in member.held:
                self._settle(member, entry)
                return True
            return entry.settled

    def release(self, member: Member, entry: Entry) -> None:
        """Back to its place in the queue; nothing where it was settled or went back."""
        with self._lock:
            if entry in member.held:
                was_full = len(member.held) >= member.window
                member.held.remove(entry)
                self._return(member.group, entry.message, entry.crashes)
                self._dropped_out(entry.hold)
                if was_full:
                    member.wake()

    def _settle(self, member: Member, entry: Entry) -> None:
        held = member.held
        if member.sleeping is not None and len(held) >= member.window:
            member.wake()
        held.remove(entry)
        entry.settled = True
        self._dropped_out(entry.hold)
        member.group.pending -= 1
        if member.group.topic.line:
            self._room(member.group.topic)

    def _dropped_out(self, hold: Hold) -> None:
        hold.unsettled -= 1
        if hold.draining and not hold.unsettled:
            sharing.settled(hold)

    def _return(self, group: Group, message: Message, crashes: int) -> None:
        shard = group.shard_for(message.envelope)
        heappush(shard.returned, (message.seq, next(self._ties), crashes, message))
        for taker in shard.takers:
            taker.wake()

    # ------------------------------------------------------------------------------------------------------- operating

    def depth(self, topic: str, group: str) -> Depth:
        """An exact count. `NotFound` where there is no such group, as for the methods below."""
        with self._lock:
            found = self._group(topic, group)
            ready = sum(shard.size() for shard in found.shards())
            in_flight = sum(len(member.held) for member in found.members)
            return Depth(ready, in_flight, len(found.delayed) + len(found.topic.delayed))

    def peek(self, topic: str, group: str) -> list[Envelope]:
        """What waits now, oldest first."""
        with self._lock:
            return [message.envelope for message in self._group(topic, group).waiting()]

    def purge(self, topic: str, group: str) -> int:
        """Forgets what waits for one group; how many it was."""
        with self._lock:
            found = self._group(topic, group)
            purged = sum(shard.clear() for shard in found.shards())
            found.pending -= purged
            self._room(found.topic)
            return purged

    def replay(self, topic: str, group: str, since: float) -> int:
        """Puts what a topic keeps from that moment on before the group again; how many that is, what waits included."""
        with self._lock:
            found = self._group(topic, group)
            if found.topic.retain is None:
                return 0
            _trim(found.topic.history, time.time() - found.topic.retain)
            again = [message for message in found.topic.history if message.arrived >= since]
            waiting = {message.seq for message in found.waiting()}
            for message in again:
                if message.seq not in waiting:
                    found.pending += 1
                    self._return(found, message, 0)
            return len(again)

    def shards(self, topic: str) -> int | None:
        """How many shards a topic has; None where nobody has asked for any, or there is no such topic."""
        with self._lock:
            found = self._topics.get(topic)
            return found.shards if found is not None else None

    def groups(self, topic: str) -> list[str]:
        """The names of a topic's groups, sorted; none where there is no such topic."""
        with self._lock:
            found = self._topics.get(topic)
            return sorted(found.groups) if found is not None else []

    def drop_group(self, topic: str, group: str) -> bool:
        """Forgets a group and what only it held; its receivers are gone. False: there was none."""
        with self._lock:
            found = self._topics.get(topic)
            dropped = found.groups.pop(group, None) if found is not None else None
            if found is None or dropped is None:
                return False
            found.everyone.remove(dropped)
            for member in list(dropped.members):
                self._leave(member, f"group {group!r} of topic {topic!r} was dropped", crashed=False)
            self._room(found)
            return True

    def _group(self, topic: str, group: str) -> Group:
        self._reap()
        found = self._topics.get(topic)
        if found is None or group not in found.groups:
            raise NotFound(f"the memory broker has no group {group!r} of topic {topic!r}")
        self._look(found)
        return found.groups[group]

    # -------------------------------------------------------------------------------------------------------- upkeep

    def _look(self, topic: Topic) -> None:
        """Does what time has made due: delayed messages, and the end of retention."""
        wall = time.time()
        now = time.monotonic()
        while topic.delayed and topic.delayed[0][0] <= now:
            self._fan_out(topic, heappop(topic.delayed)[2], wall)
        for group in topic.everyone:
            while group.delayed and group.delayed[0][0] <= now:
                self._put(group, heappop(group.delayed)[2], wall)
            if topic.expiry is not None:
                expired = sum(shard.forget_before(wall - topic.expiry) for shard in group.shards())
                if expired:
                    group.pending -= expired
                    self._room(topic)
        if topic.retain is not None:
            _trim(topic.history, wall - topic.retain)

    def _reap(self) -> None:
        """Ends the sessions whose event loop was closed under them: they crashed."""
        for session in self._sessions:
            if session.dead():
                break
        else:
            return
        for session in list(self._sessions):
            if session.dead():
                self._end(session, crashed=True)

    def _end(self, session: Session, crashed: bool) -> None:
        session.closed = True
        self._sessions.pop(session, None)
        for member in list(session.members):
            self._leave(member, "the memory adapter is closed", crashed)
        for ticket in list(session.tickets):
            self._step_out(ticket)
            ticket.waiter.wake()
        session.tickets.clear()

    def _leave(self, member: Member, reason: str, crashed: bool) -> None:
        if member.gone is not None:
            return
        member.gone = reason
        member.session.members.pop(member, None)
        member.hold.lost = True
        held, member.held = member.held, set[Entry]()
        group = member.group
        for shard in group.shards():
            if shard.hold is not None and shard.hold.member is member:
                shard.hold.lost = True
        for entry in held:
            entry.hold.lost = True
            self._return(group, entry.message, entry.crashes + crashed)
        sharing.leave(member)
        if group.name is None:
            group.topic.everyone.remove(group)
            self._room(group.topic)
        member.wake()

    def _step_out(self, ticket: Ticket) -> None:
        topic, ticket.topic = ticket.topic, None
        if topic is not None:
            topic.line.remove(ticket)
            self._room(topic)

    def _room(self, topic: Topic) -> None:
        if topic.line:
            topic.line[0].waiter.wake()


_named: dict[str, Broker] = {}
_naming = Lock()


def named(name: str) -> Broker:
    """The process's broker of a name; it lives as long as the process."""
    with _naming:
        return _named.setdefault(name, Broker())


def _merge(member: Member, sources: Sequence[Shard], into: list[Received], room: int) -> None:
    """Hands out from several shards, oldest first."""
    heads = [(shard.head(), place) for place, shard in enumerate(sources) if shard.ready or shard.returned]
    heapify(heads)
    while room and heads:
        shard = sources[heads[0][1]]
        bound = min(heads[1:3])[0] if len(heads) > 1 else sys.maxsize
        room -= shard.hand_out(member, into, room, bound)
        if shard.ready or shard.returned:
            heapreplace(heads, (shard.head(), heads[0][1]))
        else:
            heappop(heads)


def _trim(messages: deque[Message], moment: float) -> None:
    while messages and messages[0].arrived < moment:
        messages.popleft()


def _priorities(there: bool) -> str:
    return "priorities" if there else "no priorities"
