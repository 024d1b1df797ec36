"""A receiver: aiokafka's consumer read on demand, what is un-settled tracked a partition, the contiguous heads committed in batches.

No task polls: aiokafka fetches ahead by itself and keeps its membership alive by heartbeats of its own; its limit on the time between
polls, which would take the partitions from a receiver that is not read just now, is set out of the way. Nor is a partition ever paused:
one that has its `ack_window` un-settled is left out of what is asked for, so there is nothing for a rebalance to forget.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush, merge
from itertools import count
from typing import Any, cast

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition

from msgbus.contract.adapter import AdapterSettings, Received, Receiver, ReceiverSpec
from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_kafka.cluster import BEGINNING, END, Cluster, abort_client
from msgbus_kafka.errors import CLIENT_ERRORS, translate
from msgbus_kafka.names import SOON, group_id, orders_id, stream
from msgbus_kafka.records import Record, read
from msgbus_kafka.sharing import Places, Sharing
from msgbus_kafka.tracking import Entry, Partition, State, read_mark, suspects_of

COMMIT_EVERY = 0.05
"""Seconds that an ack may wait for others to be committed with it."""
COMMIT_DEADLINE = 3.0
LEAVE_AFTER = 1.0
"""Seconds without a `receive`, and with nothing handed out, after which the partitions are left to others: it is paused."""
LAST_COMMIT_DEADLINE = 0.5
STOP_DEADLINE = 0.6
ORDERS_EVERY = 0.5
"""Seconds after which a receiver looks whether an operator purged or replayed its group."""
CALL_AFTER = 0.05
"""Seconds that a partition which was let go of waits for others to be let go of with it."""
POLL_INTERVAL = 2**31 - 1
"""Milliseconds between two polls after which aiokafka leaves its group: never."""
FETCH_WAIT = 100
"""Milliseconds that a fetch waits at the broker; also how long a partition that was left out may wait to be fetched again."""


class KafkaReceiver(Receiver):
    """Of a group, or private. Made by `KafkaAdapter.open_receiver`, then opened."""

    def __init__(
        self,
        spec: ReceiverSpec,
        cluster: Cluster,
        settings: AdapterSettings,
        options: Mapping[str, Any],
        instance: str | None,
        on_close: Callable[[KafkaReceiver], None],
    ) -> None:
        self.stale_acks = 0
        self._spec = spec
        self._cluster = cluster
        self._settings = settings
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._stream = stream(spec.topic, spec.priority)
        self._group = None if spec.group is None else group_id(spec.topic, spec.group, spec.priority)
        self._window = 1 if spec.quarantine else max(spec.window, 1)
        self._ack_window = max(settings.ack_window, self._window)
        self._partitions: dict[TopicPartition, Partition] = {}
        self._ready: deque[Received] = deque()  # read, or given back, and not handed out
        self._later: list[tuple[float, int, Received]] = []  # not due yet
        self._ties = count()
        self._held = 0
        self._settled = 0  # since the last commit
        self._rebalancing = True
        self._tenures_changed = False
        self._stopped = False  # it drains, or is closed
        self._closed = False
        self._failure: MsgbusError | None = None
        self._look_at_orders = 0.0
        self._receiving = False
        self._away = False  # from its group, until somebody receives again
        self._last_received = self._loop.time()
        self._waker: asyncio.Future[None] | None = None
        self._in_hand: Places = set()
        self._let_go_of: Places = set()
        self._calling: asyncio.TimerHandle | None = None
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        self._one_commit = asyncio.Lock()
        self._committer: asyncio.Task[None] | None = None
        session = int(settings.session_timeout * 1000)
        grouped: dict[str, Any] = {}
        if self._group is not None:
            grouped = {
                "group_id": self._group,
                "group_instance_id": instance,
                "session_timeout_ms": session,
                "rebalance_timeout_ms": session,
                "heartbeat_interval_ms": max(1, min(int(settings.heartbeat * 1000), session // 3)),
                "partition_assignment_strategy": (Sharing(self),),
                "max_poll_interval_ms": POLL_INTERVAL,
            }
        self._consumer = AIOKafkaConsumer(
            **options,
            **grouped,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT,
            max_partition_fetch_bytes=2 * cluster.max_bytes + 65536,
            request_timeout_ms=session + 10_000,  # joining takes as long as a rebalance may
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else "draining" if self._stopped else "open"
        return f"<KafkaReceiver topic={self._spec.topic!r} group={self._spec.group!r} held={self._held} {state}>"

    # ------------------------------------------------------------ opening

    async def open(self) -> None:
        """Connects; a group is joined in the background. Closes what it opened where it fails."""
        try:
            async with asyncio.timeout(COMMIT_DEADLINE + self._settings.session_timeout):
                await self._consumer.start()
                if self._group is None:
                    await self._assign_privately()
                else:
                    self._join(self._group)
        except BaseException as error:
            self._abort()
            if isinstance(error, CLIENT_ERRORS):
                raise translate(error, f"opening a receiver of {self._spec.topic!r}") from error
            raise
        if self._group is not None:
            self._committer = self._loop.create_task(self._committing(), name=f"msgbus kafka commits {self._group}")

    def _join(self, group: str) -> None:
        self._away = False
        topics = [self._stream, self._stream + SOON, group + SOON]
        self._consumer.subscribe(topics, listener=_Listener(self._revoked, self._assigned))

    async def _assign_privately(self) -> None:
        led = await self._cluster.leaders([self._stream, self._stream + SOON])
        if self._stream not in led:
            raise BrokerUnavailable(f"there is no Kafka topic {self._stream!r}: declare it first")
        places = [TopicPartition(topic, number) for topic, leaders in led.items() for number in range(len(leaders))]
        ends = await self._cluster.offsets(dict.fromkeys(places, END))
        self._consumer.assign(places)
        for place, end in ends.items():
            self._consumer.seek(place, end)
            self._partitions[place] = Partition(place, end, delayed=place.topic != self._stream)
        self._rebalancing = False

    # ------------------------------------------------------------ receiving

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """As the contract says. An empty list comes early where partitions are about to be taken from us: the core looks at its tenures."""
        deadline = self._loop.time() + timeout
        self._receiving = True
        try:
            if self._away and self._group is not None and not self._stopped:
                self._join(self._group)
            return await self._receive(limit, deadline)
        finally:
            self._receiving = False
            self._last_received = self._loop.time()

    async def _receive(self, limit: int, deadline: float) -> list[Received]:
        while True:
            if self._failure is not None:
                await self.close()
                raise self._failure
            if self._stopped or self._tenures_changed:
                self._tenures_changed = False
                return []
            room = min(limit, self._window - self._held)
            if room > 0 and not self._rebalancing:
                if self._group is not None and self._loop.time() >= self._look_at_orders:
                    await self._carry_out_orders()
                if len(self._ready) < room:
                    await self._read(room - len(self._ready), 0.0)
                taken = self._take(room)
                if taken:
                    if not self._must_note_first() or await self._noted(taken):
                        return taken
                    continue
            left = deadline - self._loop.time()
            if left <= 0:
                return []
            if self._later:
                left = min(left, max(0.0, self._later[0][0] - time.time()) + 0.001)
            if room > 0 and not self._rebalancing:
                await self._read(room, left)
            else:
                await self._wait(left)

    async def _read(self, records: int, timeout: float) -> None:
        """Reads what has been fetched; else waits for it, or for anything else that happens. Cancelling it loses nothing."""
        window = self._ack_window
        places = [place for place, partition in self._partitions.items() if not partition.leaving and not partition.full(window)]
        try:
            if not places:
                if timeout > 0:
                    await self._wait(timeout)
            elif timeout <= 0:
                self._keep(await self._consumer.getmany(*places, timeout_ms=0, max_records=records))
            else:
                await self._read_or_wait(places, records, timeout)
        except CLIENT_ERRORS as error:
            self._failure = self._failure or translate(error, f"receiving from {self._spec.topic!r}")

    async def _read_or_wait(self, places: Sequence[TopicPartition], records: int, timeout: float) -> None:
        reading = self._loop.create_task(
            self._consumer.getmany(*places, timeout_ms=int(timeout * 1000) + 1, max_records=records), name="msgbus kafka reading"
        )
        waker = self._waker = self._loop.create_future()
        try:
            await asyncio.wait({reading, waker}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waker = None
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled() and reading.exception() is None:
                self._keep(reading.result())
        if not reading.cancelled():
            reading.result()

    async def _wait(self, timeout: float) -> None:
        waker = self._waker = self._loop.create_future()
        try:
            await asyncio.wait({waker}, timeout=timeout)
        finally:
            self._waker = None

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def _keep(self, batches: Mapping[TopicPartition, Sequence[Record]]) -> None:
        """Notes what was read. Records of partitions that are no longer ours are nothing to us."""
        spec, ready = self._spec, self._ready
        several = len(batches) > 1
        for place, records in batches.items():
            partition = self._partitions.get(place)
            if partition is None:
                continue
            group = spec.group if partition.own_way else None
            tenure, entries, suspects = partition.tenure, partition.entries, bool(partition.suspects)
            for record in records:
                offset = record.offset
                if offset < partition.position:
                    continue
                partition.position = offset + 1
                if offset < partition.purged:
                    continue
                entry = Entry(partition, offset)
                entries.append(entry)
                envelope, due_at = read(record, spec.topic, group, spec.priority)
                received = Received(envelope, entry, tenure, partition.deaths(offset) if suspects else 0, record)
                if partition.delayed and due_at > time.time():
                    heappush(self._later, (due_at, next(self._ties), received))
                else:
                    ready.append(received)
            self._dirty.set()
        if several:  # as they came, as far as time stamps say it without turning round a partition's order
            lists: dict[Partition, list[Received]] = {}
            for received in ready:
                lists.setdefault(received.token.partition, []).append(received)
            self._ready = deque(merge(*lists.values(), key=_stamp))

    def _take(self, room: int) -> list[Received]:
        ready = self._ready
        if self._later:
            now = time.time()
            while self._later and self._later[0][0] <= now:
                ready.append(heappop(self._later)[2])
        taken: list[Received] = []
        while ready and len(taken) < room:
            received = ready.popleft()
            entry: Entry = received.token
            partition = entry.partition
            if partition.gone or entry.settled:
                continue
            if partition.upto <= entry.offset < partition.purged:
                entry.settled = True
                self._dirty.set()
                continue
            if partition.leaving:
                partition.parked.append(received)
                continue
            entry.held = True
            partition.held += 1
            if entry.offset >= partition.upto:
                partition.upto = entry.offset + 1
            taken.append(received)
        self._held += len(taken)
        return taken

    # ------------------------------------------------------------ settling

    def ack(self, received: Received) -> None:
        """Committed with others within a twentieth of a second, once all before it in its partition are settled too."""
        entry: Entry = received.token
        if entry.settled:
            return
        if entry.partition.gone:
            self.stale_acks += 1
            return
        entry.settled = True
        self._let_go(entry)
        self._settled += 1
        if not self._dirty.is_set():
            self._dirty.set()
        if self._settled * 2 >= self._ack_window:
            self._urgent.set()

    async def release(self, received: Received) -> None:
        """Back to this receiver's own queue: nobody else may read the partition. Nothing waits."""
        entry: Entry = received.token
        if entry.settled or not entry.held or entry.partition.gone:
            return
        self._let_go(entry)
        if not self._stopped:
            self._ready.appendleft(received)
            self._wake()

    def _let_go(self, entry: Entry) -> None:
        if entry.held:
            entry.held = False
            partition = entry.partition
            partition.held -= 1
            self._held -= 1
            if self._waker is not None and self._held + 1 >= self._window:
                self._wake()
            if partition.leaving and not partition.held:
                self._left_one()

    async def _committing(self) -> None:
        while True:
            if not await self._came(self._dirty, LEAVE_AFTER):
                if self._unread() and not self._away:
                    await self._leave_to_others()
                continue
            await self._came(self._urgent, COMMIT_EVERY)
            self._dirty.clear()
            self._urgent.clear()
            self._settled = 0
            if not self._rebalancing:
                await self._commit(self._partitions.values(), COMMIT_DEADLINE)

    async def _came(self, event: asyncio.Event, within: float) -> bool:
        if not event.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await event.wait()
        return event.is_set()

    def _unread(self) -> bool:
        return not (self._receiving or self._held or self._rebalancing) and self._loop.time() - self._last_received >= LEAVE_AFTER

    async def _leave_to_others(self) -> None:
        self._rebalancing = True
        self._away = True
        mine = list(self._partitions.values())
        await self._commit(mine, COMMIT_DEADLINE, "clean")
        self._lose(mine)
        if self._away:  # nobody received meanwhile
            self._consumer.unsubscribe()

    async def _commit(self, partitions: Iterable[Partition], deadline: float, state: State | None = None) -> bool:
        """Commits the heads that moved. False: it could not; what was acked since comes again unless a later commit can."""
        try:
            async with asyncio.timeout(deadline), self._one_commit:
                marks: dict[TopicPartition, tuple[Partition, tuple[int, str]]] = {}
                for partition in list(partitions):
                    mark = partition.mark(state or self._state_of(partition))
                    if mark != partition.committed and not partition.gone:
                        marks[partition.tp] = (partition, mark)
                if not marks:
                    return True
                if not is_member(self._consumer):  # a commit of somebody who is no member any more counts where the group is empty
                    return False
                await self._consumer.commit({place: OffsetAndMetadata(*mark) for place, (_, mark) in marks.items()})
                for partition, mark in marks.values():
                    partition.committed = mark
        except CLIENT_ERRORS:  # after a rebalance that is no error: the partition is another's, or comes back with a new tenure
            return False
        return True

    def _state_of(self, partition: Partition) -> State:
        if not self._spec.quarantine:
            return "open"
        return "alone" if partition.held else "clean"

    def _must_note_first(self) -> bool:
        """While anything is suspect, what is handed out is written down before: a death then counts for that alone."""
        return self._group is not None and (self._spec.quarantine or any(partition.suspects for partition in self._partitions.values()))

    async def _noted(self, taken: Sequence[Received]) -> bool:
        noted = False
        try:
            noted = await self._commit(self._partitions.values(), COMMIT_DEADLINE)  # all: what was alone before is not any more
        finally:
            if not noted:
                for received in reversed(taken):
                    await self.release(received)
        return noted

    # ------------------------------------------------------------ coming and going of partitions

    async def _revoked(self) -> None:
        """The group is about to share out anew. What is not in hand is committed, for it may go; what is stays ours, and runs on."""
        self._rebalancing = True
        self._wake()
        mine = list(self._partitions.values())
        if self._closed or not is_member(self._consumer):  # thrown out: others have them
            self._lose(mine)
            self._tenures_changed = bool(mine)
            return
        in_hand = {partition for partition in mine if partition.held}
        if not await self._commit(mine, COMMIT_DEADLINE, "clean"):
            in_hand.update(mine)
        self._in_hand = {partition.tp for partition in in_hand}

    def claims(self) -> tuple[int, Places, Places]:
        """For who shares out. After `_revoked`."""
        generation = generation_of(self._consumer)
        if generation <= 0:
            return 0, set(), set()
        return generation, {place for place, partition in self._partitions.items() if not partition.leaving}, self._in_hand

    def told(self, let_go: Places) -> None:
        """By who shared out. Before `_assigned`."""
        self._let_go_of = let_go

    def _lose(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            partition.lose()
            self._held -= partition.held
            self._partitions.pop(partition.tp, None)

    async def _assigned(self, assigned: Iterable[TopicPartition]) -> None:
        places = set(assigned)
        if self._closed or self._group is None:
            return
        if not is_member(self._consumer):
            self._lose(list(self._partitions.values()))
        for place, partition in list(self._partitions.items()):
            if place not in places:
                self._lose([partition])
                self._tenures_changed = True
            else:
                self._consumer.seek(place, partition.position)
                self._stay(partition, place in self._let_go_of)
        try:
            for partition in await self._take_over([place for place in places if place not in self._partitions]):
                self._partitions[partition.tp] = partition
        except MsgbusError as error:
            self._fail(error)
            return
        await self._commit(self._partitions.values(), COMMIT_DEADLINE)  # from now on a death without a word is one; tried again if it fails
        self._dirty.set()
        self._rebalancing = False
        self._look_at_orders = 0.0
        self._left_one()
        self._wake()

    def _stay(self, partition: Partition, leaving: bool) -> None:
        """A partition that was ours before: nothing is lost; but another may wait for it."""
        if leaving != partition.leaving:
            self._tenures_changed = True
        partition.leaving = partition.tenure.draining = leaving
        if not leaving and partition.parked:
            self._ready.extendleft(sorted(partition.parked, key=lambda received: received.token.offset, reverse=True))
            partition.parked.clear()

    def _left_one(self) -> None:
        """When we have let go of partitions that others wait for, the group shares out anew."""
        if self._rebalancing or self._calling is not None:
            return
        if any(partition.leaving and not partition.held for partition in self._partitions.values()):
            self._calling = self._loop.call_later(CALL_AFTER, self._call_for_a_round)

    def _call_for_a_round(self) -> None:
        self._calling = None
        if not self._closed and not self._rebalancing:
            request_rebalance(self._consumer)

    async def _take_over(self, places: Sequence[TopicPartition]) -> list[Partition]:
        """Where each partition that comes to us stands, by what was committed last."""
        group = self._group or ""
        committed = await self._cluster.committed(group)
        if not committed:
            raise BrokerUnavailable(f"group {self._spec.group!r} of topic {self._spec.topic!r} was dropped")
        marks = {place: read_mark(committed[place][1]) for place in places if place in committed}
        new = dict.fromkeys((place for place in places if place not in committed), BEGINNING)
        died_over = dict.fromkeys((place for place, mark in marks.items() if mark.state != "clean"), END)
        found = await self._cluster.offsets({**new, **died_over}) if new or died_over else {}
        partitions: list[Partition] = []
        for place in places:
            partition = Partition(place, 0, own_way=place.topic == group + SOON, delayed=place.topic != self._stream)
            if place in new:  # a partition that was added since
                partition.position = found[place]
                self._consumer.seek(place, partition.position)
            else:
                head, mark = committed[place][0], marks[place]
                partition.position = head
                partition.committed = committed[place]
                partition.replayed = mark.replayed
                partition.suspects = suspects_of(mark, head, found.get(place, head), self._settings.ack_window)
            partition.upto = partition.position
            partitions.append(partition)
        return partitions

    def _fail(self, error: MsgbusError) -> None:
        self._failure = self._failure or error
        self._wake()

    # ------------------------------------------------------------ what operators ask for

    async def _carry_out_orders(self) -> None:
        """Looks at the commits of the group that nobody joins: purges and replays of a group that is at work."""
        group = self._group or ""
        self._look_at_orders = self._loop.time() + ORDERS_EVERY
        try:
            orders = await self._cluster.committed(orders_id(group))
        except MsgbusError:
            return
        for place, (offset, order) in orders.items():
            partition = self._partitions.get(place)
            if partition is None:
                continue
            if order == "purge":
                partition.purged = max(partition.purged, offset)
            elif order != partition.replayed:
                self._replay(partition, offset, order)

    def _replay(self, partition: Partition, offset: int, order: str) -> None:
        """Reads again from an offset on; what is handed out of the partition comes again too."""
        held = partition.held
        partition.lose()
        again = Partition(partition.tp, offset, own_way=partition.own_way, delayed=partition.delayed, replayed=order, upto=offset)
        self._partitions[partition.tp] = again
        self._held -= held
        self._consumer.seek(partition.tp, offset)
        self._tenures_changed = bool(held)
        self._dirty.set()

    # ------------------------------------------------------------ the end

    async def drain(self) -> None:
        """Hands out nothing more. The partitions stay ours until `close`: what runs can still be settled."""
        self._stopped = True
        self._wake()

    async def close(self) -> None:
        """Commits what is settled, and that nobody died; leaves the group, so that a peer has the partitions at once."""
        if self._closed:
            return
        self._closed = self._stopped = True
        self._on_close(self)
        self._wake()
        if self._calling is not None:
            self._calling.cancel()
        try:
            if self._committer is not None:
                self._committer.cancel()
                await asyncio.wait({self._committer})
            if self._group is not None:
                await self._commit(list(self._partitions.values()), LAST_COMMIT_DEADLINE, "clean")
            async with asyncio.timeout(STOP_DEADLINE):
                await self._consumer.stop()
        except CLIENT_ERRORS:
            member = getattr(getattr(self._consumer, "_coordinator", None), "member_id", "")
            if member and self._group is not None:  # it waits in a rebalance; others should not wait for its session's end
                with contextlib.suppress(MsgbusError, TimeoutError):
                    async with asyncio.timeout(LAST_COMMIT_DEADLINE):
                        await self._cluster.dismiss(self._group, member)
        finally:
            self._abort()

    def abandon(self) -> None:
        """What the death of the process would do: the sockets close, nothing is committed, nobody leaves."""
        self._failure = self._failure or BrokerUnavailable("the Kafka adapter was abandoned")
        if not self._closed:
            self._closed = self._stopped = True
            self._on_close(self)
        self._abort()
        self._wake()

    def _abort(self) -> None:
        if self._committer is not None:
            self._committer.cancel()
        self._lose(list(self._partitions.values()))
        abort_consumer(self._consumer)


def _stamp(received: Received) -> int:
    return cast(Record, received.native).timestamp


class _Listener(ConsumerRebalanceListener):
    """aiokafka tells of rebalances here; what it calls must not raise."""

    def __init__(self, revoked: Callable[[], Awaitable[None]], assigned: Callable[[Iterable[TopicPartition]], Awaitable[None]]) -> None:
        self._revoked = revoked
        self._assigned = assigned

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._revoked()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._assigned(assigned)


def generation_of(consumer: Any) -> int:
    """The consumer's generation in its group; nothing above 0 where it is no member, as far as it knows itself."""
    return int(getattr(getattr(consumer, "_coordinator", None), "generation", -1))


def is_member(consumer: Any) -> bool:
    """Whether the consumer is a member of its group, as far as it knows itself."""
    return generation_of(consumer) > 0


def request_rebalance(consumer: Any) -> None:
    """Makes the group share out anew."""
    coordinator = getattr(consumer, "_coordinator", None)
    if coordinator is not None:
        coordinator.request_rejoin()


def abort_consumer(consumer: Any) -> None:
    """Ends a consumer's tasks and sockets at once, without leaving its group: there is no public way to do so."""
    consumer._closed = True  # noqa: SLF001  or its __del__ complains
    coordinator = getattr(consumer, "_coordinator", None)
    fetcher = getattr(consumer, "_fetcher", None)
    for owner, names in (
        (coordinator, ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task")),
        (fetcher, ("_fetch_task",)),
    ):
        for name in names:
            task = getattr(owner, name, None)
            if task is not None:
                task.cancel()
    for task in getattr(fetcher, "_pending_tasks", ()):
        task.cancel()
    abort_client(getattr(consumer, "_client", None))
