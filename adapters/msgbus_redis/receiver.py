"""What every receiver has: a buffer that one task fills on demand, what is handed out, and acks that travel in batches.

A read is never cancelled: what the server had given and nobody saw would stay pending. So the reading is a task's own, `receive` only
waits for it, and a read that must end early is ended by the server (CLIENT UNBLOCK). It reads when somebody waits in `receive`, so that
a paused subscription takes nothing from its peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from redis import exceptions as client

from msgbus.contract.adapter import Received, Receiver, ReceiverSpec, Tenure
from msgbus.errors import BrokerError, BrokerUnavailable
from msgbus_redis import names, scripts
from msgbus_redis.connections import CALL_TIMEOUT, Command, Link, script
from msgbus_redis.errors import call_error, is_group_gone
from msgbus_redis.names import Layout
from msgbus_redis.sending import trim
from msgbus_redis.services import Services
from msgbus_redis.wire import envelope_of

BLOCK = 1.0
"""Seconds that a read waits at the server; at most 2, or a client's time-outs and ours get into each other's way."""
TICK = 0.5
"""Seconds between looks at what is due, at what others of the group do, and at who has died."""
ACK_DELAY = 0.002
"""Seconds that acks wait for the next read to take them along."""

BUFFERED, HANDED_OUT, SETTLED, GONE = range(4)


class Entry(Tenure):
    """One entry of a stream in our hands: the token of a `Received`, and its tenure where the group has no order."""

    __slots__ = ("count", "id", "received", "since", "state", "stream")

    received: Received

    def __init__(self, stream: int, id_: bytes, count: int, since: float) -> None:
        self.draining = self.lost = False
        self.stream = stream
        """The number of its stream, the receiver's own numbering."""
        self.id = id_
        self.count = count
        self.since = since
        """When it was last sure to be ours, by the monotonic clock."""
        self.state = BUFFERED


class RedisReceiver(Receiver):
    """The part that all three kinds share. `streams` are numbered from 0; the second half are the group's own (retries)."""

    def __init__(
        self, services: Services, reader: Link, layout: Layout, spec: ReceiverSpec, on_close: Callable[[RedisReceiver], None]
    ) -> None:
        self.spec = spec
        self.services = services
        self.lease = services.settings.lease
        self.lease_ms = int(self.lease * 1000)
        self.links = services.links
        self.reader = reader
        self.layout = layout
        self.base = layout.base
        self.window = 1 if spec.quarantine else max(spec.window, 1)
        self.streams: list[str] = []
        self.stale_acks = 0
        self.held: set[Entry] = set()
        self.buffer: deque[Entry] = deque()
        self.acks: list[Entry] = []
        self.draining = False
        self.closed = False
        self.problem: BrokerError | None = None
        self.acked = 0
        """Since the last trim."""
        self._on_close = on_close
        self._demand = 0
        self._look_at = 0.0
        self._asked_at = time.monotonic()
        self._waiter: asyncio.Future[None] | None = None
        self._work = asyncio.Event()
        self._tick = asyncio.Event()
        self._blocked = False
        self._loop = asyncio.get_running_loop()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._interrupting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        state = "closed" if self.closed else "draining" if self.draining else "lost" if self.problem else "open"
        return f"<{type(self).__name__} topic={self.spec.topic!r} group={self.spec.group!r} held={len(self.held)} {state}>"

    def start(self) -> None:
        """Begins to work."""
        self._tasks = [self._spawn(self._read_on_demand(), "reader"), self._spawn(self._keep_up(), "upkeep")]

    # ------------------------------------------------------------ the contract's words

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """As the contract says; what is buffered comes at once and without suspending."""
        self._check()
        self._asked_at = time.monotonic()
        taken = self._hand_out(limit)
        if taken or limit <= 0 or timeout <= 0 or self.draining:
            if not taken and limit > 0 and not self.draining:
                self._ask(limit)
            return taken
        deadline = self._loop.time() + timeout
        while not taken and not self.draining:
            left = deadline - self._loop.time()
            if left <= 0:
                break
            self._ask(limit)
            waiter = self._waiter = self._loop.create_future()
            timer = self._loop.call_later(left, _resolve, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
            self._check()
            self._asked_at = time.monotonic()
            taken = self._hand_out(limit)
        self._demand = 0
        return taken

    def ack(self, received: Received) -> None:
        """As the contract says."""
        entry: Entry = received.token
        state, entry.state = entry.state, SETTLED
        if state == HANDED_OUT:
            self.held.discard(entry)
            if self.problem is None and not self.closed:
                self._settle(entry)
                if self._demand:
                    self._work.set()
            else:
                self.stale_acks += 1
        elif state == GONE:
            self.stale_acks += 1

    async def release(self, received: Received) -> None:
        """As the contract says."""
        entry: Entry = received.token
        if entry.state != HANDED_OUT or self.closed:
            return
        entry.state = SETTLED
        self.held.discard(entry)
        if self.problem is None:
            await self._guarded(self._release(entry))
        if self._demand:
            self._work.set()

    async def drain(self) -> None:
        """As the contract says."""
        if not self.draining:
            self.draining = True
            self._wake_receive()
            self._tick.set()
            await self._stop_reading()
            if self.problem is None and not self.closed:
                await self._guarded(self._drained())

    async def close(self) -> None:
        """As the contract says: at most a few seconds, also where the server is away."""
        if self._closing is None:
            self._closing = self._spawn(self._close(), "closing")
        await asyncio.shield(self._closing)

    def abandon(self) -> None:
        """What the death of the process would do: nothing is flushed, acked or given back."""
        self.fail(BrokerUnavailable("the connection to Redis was aborted"))
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------ what the kinds differ in

    @abstractmethod
    async def _read(self, room: int) -> None:
        """One read of at most about `room` entries into the buffer, waiting `BLOCK` at most."""

    @abstractmethod
    async def _upkeep(self, now: float) -> float:
        """Renews what must be, looks at what is due; seconds until it wants to be called again."""

    @abstractmethod
    def _settle(self, entry: Entry) -> None:
        """The group is done with it."""

    @abstractmethod
    async def _release(self, entry: Entry) -> None:
        """Gives back what was handed out."""

    @abstractmethod
    async def _drained(self) -> None:
        """Nothing is read any more: gives back what is buffered, where that may go back before `close`."""

    @abstractmethod
    async def _leave(self) -> None:
        """The last words: acks are sent, everything else goes back."""

    @abstractmethod
    def _ack_commands(self, entries: Sequence[Entry]) -> list[Command]:
        """What settles them."""

    @abstractmethod
    def _count_stale(self, entries: Sequence[Entry], replies: Sequence[Any]) -> int:
        """How many of them came too late, by the answers."""

    async def _chores(self) -> None:
        """What must not happen while a read is under way."""

    # ------------------------------------------------------------ the buffer

    def take_in(self, entry: Entry, flat: list[bytes], tenure: Tenure) -> None:
        """An entry has come."""
        streams = self.streams
        spec = self.spec
        own = spec.group if entry.stream * 2 >= len(streams) and spec.group is not None else None
        envelope = envelope_of(spec.topic, own, streams[entry.stream], entry.id, flat)
        entry.received = Received(envelope, entry, tenure, entry.count - 1 if entry.count > 1 else 0)
        self.buffer.append(entry)

    def _hand_out(self, limit: int) -> list[Received]:
        count = min(limit, self.window - len(self.held), len(self.buffer))
        taken: list[Received] = []
        while count > 0 and self.buffer:
            entry = self.buffer.popleft()
            if entry.state != BUFFERED:
                continue
            entry.state = HANDED_OUT
            self.held.add(entry)
            taken.append(entry.received)
            count -= 1
        return taken

    def _ask(self, limit: int) -> None:
        self._demand = limit
        self._work.set()

    def _check(self) -> None:
        if self.problem is not None:
            raise self.problem
        if self.closed:
            raise BrokerUnavailable("the receiver is closed")

    def _wake_receive(self) -> None:
        if self._waiter is not None:
            _resolve(self._waiter)

    def fail(self, error: BrokerError) -> None:
        """The link is gone: `receive` says so from now on, and acks are too late."""
        if self.problem is None:
            self.problem = error
            self._wake_receive()
            self._work.set()
            self._tick.set()

    def reads(self) -> bool:
        """Whether there is anything more to be read."""
        return not self.draining and self.problem is None

    # ------------------------------------------------------------ the tasks

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        return self._loop.create_task(work, name=f"msgbus redis {self.spec.topic} {self.spec.group} {what}")

    async def _read_on_demand(self) -> None:
        while self.reads():
            await self._guarded(self._chores())
            room = min(self._demand, self.window - len(self.held)) - len(self.buffer)
            if room <= 0 or not self.reads():
                self._work.clear()
                if self.reads():
                    await self._work.wait()
                continue
            await self._guarded(self._read(room))
            if self._waiter is None:
                self._demand = 0
            elif self.buffer:
                self._wake_receive()

    async def _guarded(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What goes wrong on the way to the server ends the receiver: the core opens another one."""
        try:
            return await work
        except BrokerError as error:
            self.fail(error)
        except (client.RedisError, OSError, TimeoutError) as error:
            problem = call_error(error, f"receiving from {self.spec.topic!r}")
            self.fail(problem if isinstance(problem, BrokerError) else BrokerUnavailable(str(problem)))
        return None

    async def _keep_up(self) -> None:
        while True:
            wait = await self._guarded(self._upkeep(time.monotonic()))
            if wait is None:
                return
            if self.closed:
                return
            self._tick.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min(wait, TICK))):
                    await self._tick.wait()

    async def read_call(self, commands: Sequence[Command], acks: Sequence[Entry], *, block: bool = True) -> list[Any]:
        """Answers to what the reader asks; acks travel in front."""
        first = self._ack_commands(acks) if acks else []
        self._blocked = block
        try:
            replies = await self.reader.call([*first, *commands], BLOCK + CALL_TIMEOUT)
        except BaseException:
            self.stale_acks += len(acks)
            raise
        finally:
            self._blocked = False
        if acks:
            self._acks_done(acks, replies[: len(first)])
        return replies[len(first) :]

    def interrupt(self) -> None:
        """Ends the wait of a read, soon: something has changed."""
        self._work.set()
        if self._blocked and self.problem is None and not self.closed:
            self._blocked = False
            self._interrupting = self._spawn(self._unblock(), "interrupt")

    async def _unblock(self) -> None:
        with contextlib.suppress(BrokerError, client.RedisError, OSError, TimeoutError):
            await self.links.call(self.base, ("CLIENT", "UNBLOCK", self.reader.id))

    async def _stop_reading(self) -> None:
        """Lets the reader come to its end, without cutting off a read."""
        self._work.set()
        reader = self._tasks[0]
        deadline = self._loop.time() + BLOCK + 1.0
        while not reader.done() and self.problem is None and self._loop.time() < deadline:
            if self._blocked:
                await self._unblock()
            await asyncio.wait([reader], timeout=0.05)

    # ------------------------------------------------------------ acks

    def queue_ack(self, entry: Entry) -> None:
        """It travels with the next read, or soon."""
        self.acks.append(entry)
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(ACK_DELAY, self._flush_later)

    def take_acks(self) -> list[Entry]:
        """What the caller is about to send."""
        acks, self.acks = self.acks, []
        return acks

    def _flush_later(self) -> None:
        self._flush_timer = None
        if self.acks and self.problem is None and (self._flushing is None or self._flushing.done()):
            self._flushing = self._spawn(self.flush_acks(), "acks")

    async def flush_acks(self) -> None:
        """Sends what waits to be acked."""
        while self.acks:
            acks = self.take_acks()
            try:
                replies = await self.links.call(self.base, *self._ack_commands(acks))
            except (BrokerError, client.RedisError, OSError, TimeoutError) as error:
                self.stale_acks += len(acks)
                self.fail(error if isinstance(error, BrokerError) else BrokerUnavailable(f"acks had no answer: {error}"))
                return
            except asyncio.CancelledError:
                self.stale_acks += len(acks)
                raise
            self._acks_done(acks, replies)

    def _acks_done(self, acks: Sequence[Entry], replies: Sequence[Any]) -> None:
        self.acked += len(acks)
        self.stale_acks += self._count_stale(acks, replies)

    # ------------------------------------------------------------ the end

    async def _close(self) -> None:
        was_draining, self.draining = self.draining, True
        self._wake_receive()
        self._tick.set()
        if not was_draining:
            await self._stop_reading()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        if self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing], timeout=CALL_TIMEOUT)
        if self.problem is None:
            with contextlib.suppress(BrokerError, client.RedisError, OSError, TimeoutError):  # it comes again when the lease is over
                async with asyncio.timeout(CALL_TIMEOUT / 2):
                    await self.flush_acks()
                    await self._leave()
        self.closed = True
        self._tick.set()
        self.stale_acks += len(self.acks)
        self.acks.clear()
        for entry in [*self.held, *self.buffer]:
            entry.state = GONE
            entry.lost = True
        self.held.clear()
        self.buffer.clear()
        tasks = [task for task in [*self._tasks, self._interrupting, self._flushing] if task is not None]
        if tasks and self.problem is None:
            await asyncio.wait(tasks, timeout=0.5)  # a call that is cut off costs its connection
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        self.links.drop(self.reader)
        self._on_close(self)

    # ------------------------------------------------------------ what groups share

    def note_lost(self, lost: int) -> None:
        """Entries were pending and are no longer in their stream: somebody deleted or trimmed them."""
        if lost:
            self.services.data_loss(f"{lost} messages of topic {self.spec.topic!r} are gone that group {self.spec.group!r} had not settled")

    def tidy(self) -> list[Command]:
        """Drops from the topic's streams what all groups are done with, when it is time."""
        if not self.services.is_time_to_tidy(self.spec.topic, self.spec.group, self.acked > 0):
            return []
        self.acked = 0
        return [trim(self.layout, self.spec.group, self.services.settings)]

    async def see_group(self) -> None:
        """Who reads is told when the group is gone; who has no room must look. `BrokerUnavailable` where it was dropped."""
        now = time.monotonic()
        group = self.spec.group
        if (self._demand and self.window > len(self.held)) or now < self._look_at or group is None:
            return
        self._look_at = now + 1.0
        (answer,) = await self.links.call(self.base, ("XINFO", "GROUPS", self.streams[0]))
        gone = is_group_gone(answer) if isinstance(answer, client.RedisError) else group.encode() not in [flat[1] for flat in answer]
        if gone:
            await self.services.revive(self.layout, self.spec)

    def move(self) -> Command:
        """Moves what is due to where it is read."""
        topic, group = self.layout.topic, self.spec.group
        keys = [names.delayed(topic, None)] + ([names.delayed(topic, group)] if group is not None else [])
        return script(scripts.MOVE, keys, [200])


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
