"""A receiver: one task that reads, renews, acks and gives back, in one call to the server after the other.

Three kinds, one mechanism, a script: a receiver of a group without order reads all streams of its level; an exclusive one those of the
shards whose leases it holds, after what is pending there, and the script looks at the lease; a private one from an id of its own.
What is held is kept from others by its idle time, renewed by a script that looks whether it is still ours. Who died, or gave something
back, is found by the same read. Nobody waits in it: a read whose answer is lost has given what nobody saw. So an XREAD, which gives
nothing, wakes; and whoever opens the next receiver of this process goes on under the name of one that could not say goodbye.
It reads when somebody waits in `receive`, so that a paused subscription takes nothing from its peers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from redis import exceptions as client

from msgbus.contract.adapter import Received, Receiver, ReceiverSpec, SendOutcome, Tenure
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable
from msgbus_redis import scripts
from msgbus_redis.connections import CALL_TIMEOUT, Command, Link
from msgbus_redis.errors import CLIENT_ERRORS, call_error, is_group_gone
from msgbus_redis.names import Layout, own
from msgbus_redis.sending import Sender, Source
from msgbus_redis.wire import envelope_of

log = logging.getLogger("msgbus.redis")

TICK = 0.5
"""Seconds between looks at what is due, at what others of the group do, and at who has died."""
SOON = 0.02
"""Seconds until a look that is due at once: there may be more than one look moves."""
SLEEP = 1.0
"""Seconds that an XREAD waits at the server."""
ACK_DELAY = 0.002
"""Seconds that acks wait for others, or for the next read to take them along."""
PATIENCE = 2.0
"""Seconds without a `receive` after which what is buffered goes back."""
TIDY, IDLE_TIDY = 1.0, 30.0
"""Seconds between trims where something was acked, and where nothing was."""

_turns = count()
Step = tuple[Command, Callable[[Any], None]]  # Any: what the server answers


@dataclass(slots=True, eq=False)
class Stream:
    """One that is read."""

    shard: int
    lease: str
    key: str
    group: str | None
    """The one whose retries these are."""
    tenure: Tenure | None
    walk: bytes = b"-"
    """Where what is pending goes on; see the script."""


class Entry(Tenure):
    """The token of a `Received`, and its tenure where the group has no order."""

    __slots__ = ("id", "settled", "since", "stream")

    def __init__(self, stream: Stream, id_: bytes, since: float) -> None:
        self.draining = self.lost = self.settled = False
        self.stream = stream
        self.id = id_
        self.since = since
        """When it was last sure to be ours."""


class RedisReceiver(Receiver):
    """Implements `Receiver` and `Forwarding`. `me` names it among the consumers of the group, and is the value of its leases."""

    def __init__(
        self, sender: Sender, sleeper: Link, layout: Layout, spec: ReceiverSpec, me: str, on_close: Callable[[RedisReceiver], None]
    ) -> None:
        self.spec = spec
        self.me = me
        self.left = False
        """Whether all it had went back to the group."""
        self._sender = sender
        self._topology = sender.topology
        self._sleeper = sleeper
        self._layout = layout
        self._group = spec.group or ""
        self._ordered = spec.exclusive or spec.group is None
        """Whether what is released stays here: its order is kept, or it is nobody else's."""
        self._lease = sender.topology.settings.lease
        self._window = 1 if spec.quarantine else max(spec.window, 1)
        self._on_close = on_close
        self._parts = layout.parts(spec.priority)
        self._members = own(self._parts[0], "members", self._group)
        self._shards: dict[int, Tenure] = {}
        self._streams: list[Stream] = []
        for shard in range(0 if spec.exclusive else len(self._parts)):
            self._gain(shard, None)
        self._held: set[Entry] = set()
        self._buffer: deque[Received] = deque()
        self._acks: set[Entry] = set()
        """Done with, and the server has not answered that it knows."""
        self._back: list[Entry] = []
        self._acked = self._draining = self._closed = False
        self._problem: Exception | None = None
        self._more = False
        """What the dead held has been found: there may be more of it, and it goes first."""
        self._plain = False
        """A look found what is new in a group without order: Lua would take as long again to hand on more of it."""
        self._demand = 0
        self._waiter: asyncio.Future[None] | None = None
        self._asked_at = time.monotonic()
        self._tick_at = 0.0
        self._renew_at = time.monotonic() + self._lease / 3
        self._started, self._work, self._drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._sleeping: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._task = self._loop.create_task(self._run(), name=f"{self!r} works")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "lost" if self._problem else "draining" if self._draining else "open"
        return f"<RedisReceiver topic={self.spec.topic!r} group={self.spec.group!r} held={len(self._held)} {state}>"

    async def start(self) -> None:
        """Returns after a first look, from which on a private receiver misses nothing. Raises what prevented it."""
        await self._started.wait()
        self._check()

    # ------------------------------------------------------------ the contract's words

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """As the contract says; what is buffered comes at once and without suspending."""
        deadline = self._loop.time() + timeout
        while True:
            self._check()
            self._asked_at = time.monotonic()
            most = max(0, min(limit, self._window - len(self._held), len(self._buffer)))
            taken = [self._buffer.popleft() for _ in range(most)]
            self._held.update(received.token for received in taken)
            if taken or limit <= 0 or self._draining:
                return taken
            if self._demand < limit:
                self._demand = limit
                self._work.set()
            left = deadline - self._loop.time()
            if left <= 0:
                return taken
            waiter = self._waiter = self._loop.create_future()
            timer = self._loop.call_later(left, _resolve, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
                self._demand = 0

    def ack(self, received: Received) -> None:
        """As the contract says."""
        entry: Entry = received.token
        if entry.settled:
            return
        entry.settled = True
        if entry not in self._held or self._problem is not None or self._closed:
            self.stale_acks += 1
            return
        self._held.discard(entry)
        self._acked = True
        if self._group:
            if not self._acks:
                self._loop.call_later(0.0 if self._demand else ACK_DELAY, self._work.set)
            self._acks.add(entry)

    async def release(self, received: Received) -> None:
        """As the contract says. What is ordered, or nobody else's, comes again here, unless its shard goes: then it goes along."""
        entry: Entry = received.token
        if entry.settled or entry not in self._held:
            return
        entry.settled = True
        self._held.discard(entry)
        if not self._ordered:
            self._back.append(entry)
        elif not received.tenure.draining:
            entry = Entry(entry.stream, entry.id, entry.since)
            again = Received(received.envelope, entry, entry.stream.tenure or entry, received.crashes)
            self._buffer = deque(sorted([*self._buffer, again], key=_order))
            self._wake()
        self._work.set()

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        """As the contract says: one script, which writes before it acks."""
        entry: Entry = received.token
        if entry not in self._held or self._problem is not None:
            return BrokerUnavailable(f"the delivery of {envelope.id!r} to forward went back to its group before, or was settled")
        outcome = await self._sender.forward(envelope, Source(entry.stream.key, self._group, self.me, entry.id), timeout)
        if outcome is None:
            entry.settled = self._acked = True
            self._held.discard(entry)
            self._work.set()
        return outcome

    async def drain(self) -> None:
        """As the contract says."""
        self._draining = True
        self._wake()
        self._work.set()
        await self._drained.wait()

    async def close(self) -> None:
        """As the contract says: a few seconds at most, also where the server is away."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name=f"{self!r} closes")
        await asyncio.shield(self._closing)

    def abandon(self) -> None:
        """What the death of the process would do: nothing is flushed, acked or given back."""
        self._fail(BrokerUnavailable("the connection to Redis was aborted"))
        self._task.cancel()

    # ------------------------------------------------------------ inside

    def _check(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self._closed:
            raise BrokerUnavailable("the receiver is closed")

    def _pull(self, goes: Callable[[Entry], bool]) -> list[Entry]:
        """Takes some out of the buffer."""
        pulled = [received.token for received in self._buffer if goes(received.token)]
        if pulled:
            self._buffer = deque(received for received in self._buffer if not goes(received.token))
        return pulled

    def _ours(self) -> list[Entry]:
        return [*self._held, *self._acks, *(received.token for received in self._buffer)]

    def _wake(self) -> None:
        if self._waiter is not None:
            _resolve(self._waiter)

    def _fail(self, error: Exception) -> None:
        """`receive` says so from now on, and acks are too late."""
        is_bug = not isinstance(error, CLIENT_ERRORS)
        self._problem = self._problem or (error if is_bug else call_error(error, f"receiving from {self.spec.topic!r}"))
        for tenure in (*self._ours(), *self._shards.values()):  # it may be long until somebody calls `receive`
            tenure.lost = True
        self._started.set()
        self._drained.set()
        self._wake()

    async def _run(self) -> None:
        try:
            while not self._closed:
                await self._go(self._steps())
                self._started.set()
                if self._draining and not self._back and (self._ordered or not self._buffer):
                    self._drained.set()
                timer = self._loop.call_later(max(0.0, self._tick_at - time.monotonic()), self._work.set)
                await self._work.wait()
                timer.cancel()
                self._work.clear()
            goodbye = [(self._leave(self._streams), _nothing), (("ZREM", self._members, self.me), _nothing)] if self._group else []
            await self._go([*self._settling(time.monotonic()), *goodbye])
            self.left = True
        except Exception as error:  # it has an owner: `receive` raises it
            self._fail(error)

    async def _go(self, steps: Sequence[Step]) -> None:
        """One call; each answer to who asked for it."""
        replies = await self._topology.links.call(self._layout.base, *(command for command, _ in steps)) if steps else []
        errors = [reply for reply in replies if isinstance(reply, client.RedisError)]
        for (_, done), reply in zip(steps, replies, strict=True):
            if not isinstance(reply, client.RedisError):
                done(reply)
        for error in errors:
            if not self._group or not is_group_gone(error):
                raise error
        if errors and not self._closed:
            await self._topology.revive(self._layout, self._group)
            for stream in self._streams:  # something may have been given and not seen
                stream.walk = b"-"
            self._work.set()

    async def _sleep(self, last: dict[str, bytes]) -> None:
        """Until something comes. It goes on while other things are done: what is new to it then was new before, or it ends at once."""
        command = ("XREAD", "COUNT", 1, "BLOCK", int(SLEEP * 1000), "STREAMS", *last, *last.values())
        try:
            (reply,) = await self._sleeper.call([command], SLEEP + CALL_TIMEOUT)
            if isinstance(reply, client.RedisError):  # the streams may be at another server by now: it would say so at once, for ever
                raise reply
        except CLIENT_ERRORS as error:
            self._fail(error)
        self._work.set()

    async def _close(self) -> None:
        self._draining = self._closed = True
        self._wake()
        self._work.set()
        await asyncio.wait([self._task], timeout=CALL_TIMEOUT / 2)
        tasks = [task for task in (self._task, self._sleeping) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1.0)
        self._sleeper.abort()
        self._drained.set()
        for entry in self._ours():
            entry.lost = True
        self.stale_acks += len(self._acks)
        self._on_close(self)

    # ------------------------------------------------------------ what it asks, and what becomes of the answers

    def _steps(self) -> list[Step]:
        now = time.monotonic()
        steps = self._settling(now)
        tick = now >= self._tick_at
        if tick:
            self._tick_at = now + TICK
            if self.spec.exclusive:
                keys = [self._members, *(own(part, "lease", self._group) for part in self._parts)]
                arguments = [self.me, int(self._lease * 1000), int(not self._draining)]
                steps.append((scripts.call(scripts.COUNCIL, keys, arguments), self._share_out))
            elif not self._group:
                steps.append((("SET", self._layout.key("private"), 1, "PX", int(self._lease * 1000)), _nothing))
            trims = self._topology.trims(self._layout, self.spec.group, TIDY if self._acked else IDLE_TIDY)
            self._acked = self._acked and not trims
            steps += [(command, _nothing) for command in trims]
        for shard in [shard for shard, tenure in self._shards.items() if tenure.draining]:
            if not any(entry.stream.shard == shard for entry in self._held):
                steps.append((self._leave([stream for stream in self._streams if stream.shard == shard]), _nothing))
                self._lose(shard)
        room = 0 if self._draining else max(0, min(self._demand, self._window - len(self._held)) - len(self._buffer))
        streams = [stream for stream in self._streams if stream.tenure is None or not stream.tenure.draining]
        turn = next(_turns) % max(1, len(streams))  # whoever is first may fill the room; the next receiver goes on from here
        streams = [*streams[turn:], *streams[:turn]]
        if self._plain and room and not tick:
            how = ("XREADGROUP", "GROUP", self._group, self.me, "COUNT", max(1, 2 * room // len(streams)), "STREAMS")
            command = (*how, *(stream.key for stream in streams), *[">"] * len(streams))
            steps.append((command, partial(self._read, streams, now)))
        elif tick or (room and streams):
            delayed = self._layout.key("delayed"), self._layout.key("delayed", self.spec.group)
            keys = [*delayed, *(key for stream in streams for key in (stream.lease, stream.key))]
            arguments = [self._group, self.me, int(self._lease * 1000), room, int(tick or self._more), int(self.spec.exclusive)]
            self._more = self._more and not room
            command = scripts.call(scripts.TAKE, keys, [*arguments, *(stream.walk for stream in streams)])
            steps.append((command, partial(self._taken, streams, now)))
        return steps

    def _settling(self, now: float) -> list[Step]:
        """A plain XACK settles what is another's, too: what may be, is looked at first, and its ack waits for that."""
        steps: list[Step] = []
        acks: dict[str, list[Entry]] = {}
        for entry in self._acks:
            if entry.since > now - self._lease * 0.8:
                acks.setdefault(entry.stream.key, []).append(entry)
            else:
                self._renew_at = 0.0
        for key, entries in acks.items():
            steps.append((("XACK", key, self._group, *(entry.id for entry in entries)), partial(self._settled, entries)))
        if now >= self._renew_at and self._group:
            self._renew_at = now + self._lease / 3
            if old := [entry for entry in self._ours() if entry.since < now - self._lease / 6]:
                steps.append((self._of_mine("renew", old), partial(self._renewed, old, now)))
        back, self._back = self._back, []
        if not self._ordered and (self._draining or (self._waiter is None and now - self._asked_at > PATIENCE)):
            back += self._pull(lambda _: True)
        if back:
            steps.append((self._of_mine("free", back), _nothing))
        return steps

    def _settled(self, entries: Sequence[Entry], done: int) -> None:
        self._acks.difference_update(entries)
        self.stale_acks += len(entries) - done

    def _renewed(self, entries: Sequence[Entry], now: float, gone: Sequence[int]) -> None:
        for entry in entries:
            entry.since = now
        for entry in (entries[number] for number in gone):
            entry.lost = True
            self.stale_acks += entry in self._acks
            self._held.discard(entry)
            self._acks.discard(entry)
        self._pull(lambda entry: entry.lost)
        self._work.set()

    def _of_mine(self, verb: str, entries: Iterable[Entry]) -> Command:
        numbers: dict[str, int] = {}
        arguments: list[Any] = [verb, self._group, self.me]
        for entry in entries:
            arguments += (numbers.setdefault(entry.stream.key, len(numbers) + 1), entry.id)
        return scripts.call(scripts.HELD, [*numbers], arguments)

    def _leave(self, streams: Sequence[Stream]) -> Command:
        return scripts.call(scripts.LEAVE, [key for stream in streams for key in (stream.lease, stream.key)], [self._group, self.me])

    def _read(self, streams: Sequence[Stream], since: float, answer: Sequence[Any] | None) -> None:
        """What came of a plain read. Where it was nothing, a look follows."""
        numbers = {stream.key.encode(): number for number, stream in enumerate(streams, 1)}
        entries = [(numbers[key], id_, flat, 1) for key, found in answer or () for id_, flat in found]
        self._taken(streams, since, [0, -1, [[b""] for _ in streams], *entries])
        if not entries:
            self._work.set()

    def _taken(self, streams: Sequence[Stream], since: float, answer: Sequence[Any]) -> None:
        lost, due, states, *entries = answer
        if lost:
            log.error("data loss suspected: %d messages of %r are gone that %r had not settled", lost, self.spec.topic, self._group)
        if due >= 0:
            self._tick_at = min(self._tick_at, time.monotonic() + max(SOON, due / 1000))
        walked = any(stream.walk for stream in streams) and self._group
        known = {(entry.stream, entry.id) for entry in self._ours()} if walked else ()
        for number, id_, flat, deliveries in entries:
            self._more = self._more or deliveries > 1
            stream = streams[int(number) - 1]
            if (stream, id_) not in known:
                entry = Entry(stream, id_, since)
                envelope = envelope_of(self.spec.topic, stream.group, stream.key, id_, flat)
                self._buffer.append(Received(envelope, entry, stream.tenure or entry, deliveries - 1))
        self._plain = bool(entries) and not self._more and not self._ordered and self._window > 1
        last: dict[str, bytes] = {}
        for stream, state in zip(streams, states, strict=True):
            if not state:
                self._lose(stream.shard)
                continue
            stream.walk = state[0]
            if len(state) > 1:
                last[stream.key] = state[1]
            self._plain = self._plain and not stream.walk
        if last and (self._sleeping is None or self._sleeping.done()):
            self._sleeping = self._loop.create_task(self._sleep(last), name=f"{self!r} sleeps")
        if self._buffer:
            self._wake()
        if self._waiter is None:
            self._demand = 0

    # ------------------------------------------------------------ shards

    def _gain(self, shard: int, tenure: Tenure | None) -> None:
        part = self._parts[shard]
        lease = own(part, "lease", self._group)
        if self._group:
            self._streams.append(Stream(shard, lease, own(part, "retry", self._group), self._group, tenure))
        self._streams.append(Stream(shard, lease, part, None, tenure))

    def _share_out(self, answer: Sequence[int]) -> None:
        """An even share a process. What is too much goes when nothing of it is in hand; in a drain all of it goes at the end."""
        quota, *mine = answer
        for shard in self._shards.keys() - set(mine):
            self._lose(shard)
        for shard in set(mine) - self._shards.keys():
            self._gain(shard, self._shards.setdefault(shard, Tenure()))
        staying = [tenure for tenure in self._shards.values() if not tenure.draining]
        for tenure in staying[quota:] if not self._draining else ():
            tenure.draining = True
        self._pull(lambda entry: entry.stream.tenure is not None and entry.stream.tenure.draining)

    def _lose(self, shard: int) -> None:
        """It went, or another has it: this process was away for longer than its lease."""
        tenure = self._shards.pop(shard, None)
        if tenure is not None:
            tenure.lost = True
            self._streams = [stream for stream in self._streams if stream.shard != shard]
            self._held = {entry for entry in self._held if entry.stream.shard != shard}
            self._pull(lambda entry: entry.stream.shard == shard)


def _order(received: Received) -> tuple[int, ...]:
    return tuple(map(int, received.token.id.split(b"-")))


def _nothing(answer: Any) -> None:
    """Nobody waits for it."""


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
