"""A group's receiver: which partitions it has, the contiguous heads committed in batches, deaths counted, operators obeyed.

aiokafka keeps the membership alive by heartbeats of its own; its limit on the time between polls, which would take the partitions from a
receiver that is not read just now, is set out of the way. Who shares out is `sharing`. Commits and goodbyes go by the cluster's connection:
on aiokafka's they would wait behind its request to join, which is answered when all members have joined.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiokafka import ConsumerRebalanceListener, TopicPartition

from msgbus.contract.adapter import AdapterSettings, Received, ReceiverSpec
from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_kafka.cluster import BEGINNING, END, Cluster, ended
from msgbus_kafka.errors import CLIENT_ERRORS, translate
from msgbus_kafka.names import SOON, group_id, orders_id
from msgbus_kafka.partition import Partition, State, read_mark, suspects_of
from msgbus_kafka.receiver import CALL_DEADLINE, GOODBYE_DEADLINE, LAST_COMMIT_DEADLINE, KafkaReceiver
from msgbus_kafka.sharing import Claims, Sharing

LEAVE_AFTER = 1.0
"""Seconds without a `receive`, and with nothing handed out, after which the partitions are left to others: it is paused."""
ORDERS_EVERY = 0.5
"""Seconds after which a receiver looks whether an operator purged or replayed its group."""
DROPPED_EVERY = 2.0
"""Seconds after which it looks whether the group is still there: a heartbeat may take longer."""
CALL_AFTER = 0.05
"""Seconds that a partition which was let go of waits for others to be let go of with it."""
PURGE = "purge"
_NEVER = 2**31 - 1
"""Milliseconds between two polls after which aiokafka leaves its group."""


class GroupReceiver(KafkaReceiver, ConsumerRebalanceListener):
    """aiokafka tells it of rebalances as its listener; what it calls there must not raise."""

    def __init__(
        self, spec: ReceiverSpec, cluster: Cluster, settings: AdapterSettings, peers: set[KafkaReceiver], instance: str | None
    ) -> None:
        self._group = group_id(spec.topic, spec.group or "", spec.priority)
        self._sharing = Sharing(self._claims)
        session = int(settings.session_timeout * 1000)
        super().__init__(
            spec,
            cluster,
            settings,
            peers,
            group_id=self._group,
            group_instance_id=instance,
            session_timeout_ms=session,
            rebalance_timeout_ms=session,
            heartbeat_interval_ms=max(1, min(int(settings.heartbeat * 1000), session // 3)),
            partition_assignment_strategy=(self._sharing,),
            max_poll_interval_ms=_NEVER,
            request_timeout_ms=session + 10_000,  # joining takes as long as a rebalance may
        )
        self._instance = instance
        self._member_id, self._generation = "", -1  # by which our partitions came to us: a commit of an older one is refused
        self._suspended = True
        self._away = False  # from its group, until somebody receives again
        self._look_at_orders = self._look_at_group = 0.0
        self._receiving_until = self._loop.time()
        self._in_hand: set[TopicPartition] = set()  # when the group began to share out
        self._calling: asyncio.TimerHandle | None = None
        self._one_commit = asyncio.Lock()

    async def _begin(self) -> None:
        self._away = False
        self._consumer.subscribe([self._stream, self._stream + SOON, self._group + SOON], listener=self)

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """As the contract says; who receives again after a pause joins the group again."""
        self._receiving_until = float("inf")
        try:
            if self._away and not self._stopped:
                await self._begin()
            return await super().receive(limit, timeout)
        finally:
            self._receiving_until = self._loop.time()

    async def _prepare(self) -> None:
        try:
            self._coordinator.check_errors()
        except CLIENT_ERRORS as error:
            self._fail(translate(error, f"in group {self._group!r}"))
        now = self._loop.time()
        try:
            if not self._suspended and now >= self._look_at_orders:
                self._look_at_orders = now + ORDERS_EVERY
                self._carry_out(await self._cluster.committed(orders_id(self._group)))
            if not self._suspended and now >= self._look_at_group:
                self._look_at_group = now + DROPPED_EVERY
                ours = {place for place, partition in self._partitions.items() if partition.committed is not None}
                committed = await self._cluster.committed(self._group)
                if not (ours <= committed.keys() and any(place.topic == self._stream for place in committed)):
                    self._forget()
        except MsgbusError:
            return  # who is away says so by other ways

    @property
    def _coordinator(self) -> Any:
        """aiokafka's part that knows whether we are a member, which has no public name."""
        return vars(self._consumer)["_coordinator"]

    def _is_member(self) -> bool:
        """As far as it knows itself."""
        return bool(self._coordinator.generation > 0)

    # ------------------------------------------------------------ committing

    async def _settle(self) -> None:
        if not self._suspended:
            await self._commit()
            if not self._held() and self._loop.time() - self._receiving_until >= LEAVE_AFTER:
                await self._leave_to_others()

    async def _commit(self, state: State | None = None, deadline: float = CALL_DEADLINE) -> bool:
        """Commits the heads that moved. False: it could not; what was acked since comes again unless a later commit can."""
        try:
            async with asyncio.timeout(deadline), self._one_commit:
                for place, partition in [*self._partitions.items()]:  # what transactions leave at the end of a log is no record
                    partition.position = max(partition.position, await self._consumer.position(place))
                marks = {partition: partition.mark(state or self._state_of(partition)) for partition in self._partitions.values()}
                moved = {partition: mark for partition, mark in marks.items() if mark != partition.committed}
                if not moved or not self._is_member():  # a commit of one who is no member any more counts where the group is empty
                    return not moved
                offsets = {partition.place: mark for partition, mark in moved.items()}
                member = self._generation, self._member_id  # by which we have these; it may change while we ask
                before = [partition.place for partition in moved if partition.committed is not None]
                if len(await self._cluster.committed(self._group, before)) < len(before):
                    self._forget()  # a commit would pass over what is in the one that was made since
                    return False
                if not await self._cluster.commit(self._group, offsets, *member):
                    return False
                for partition, mark in moved.items():
                    partition.committed = mark
        except (MsgbusError, *CLIENT_ERRORS):  # between two generations that is no error: the partitions may be another's
            return False
        return True

    def _state_of(self, partition: Partition) -> State:
        if not self._spec.quarantine:
            return "open"
        return "alone" if partition.held else "clean"

    async def _may_go(self, taken: Sequence[Received]) -> bool:
        """While anything is suspect, what is handed out is written down before: a death then counts for that alone."""
        noted = not (self._spec.quarantine or any(partition.suspects for partition in self._partitions.values()))
        try:
            noted = noted or await self._commit()  # all partitions: what was alone before is not any more
        finally:
            for received in () if noted else reversed(taken):
                await self.release(received)
        return noted

    async def _leave_to_others(self) -> None:
        self._suspended = self._away = True
        await self._commit("clean")
        self._lose(self._partitions.values())
        if self._away:  # nobody received meanwhile
            self._consumer.unsubscribe()

    async def _end(self) -> None:
        if self._calling is not None:
            self._calling.cancel()
        # What is in hand was not given back: the process ends over it, by a handler's SystemExit or so, and that is a death as well.
        died = self._held() and not self._drained
        await self._commit(None if died else "clean", LAST_COMMIT_DEADLINE)
        if self._instance is None and (member := self._coordinator.member_id):
            await ended(self._cluster.dismiss(self._group, member), GOODBYE_DEADLINE)

    # ------------------------------------------------------------ coming and going of partitions

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """The group is about to share out anew. What is not in hand is committed, for it may go; what is stays ours, and runs on."""
        self._suspended = True
        self._wake()
        if self._closed or not self._is_member():  # thrown out: others have them
            self._lose(self._partitions.values())
            return
        await self._commit("clean")
        partitions = self._partitions.items()  # what was acked meanwhile was not in the commit
        self._in_hand = {place for place, partition in partitions if partition.held or partition.committed != partition.mark("clean")}

    def _claims(self) -> Claims:
        if not self._is_member():
            return 0, {}
        claims = {place: (not partition.tenure.draining, place in self._in_hand) for place, partition in self._partitions.items()}
        return self._coordinator.generation, claims

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """What was ours and is so again runs on; what another waits for drains; what is new is taken over."""
        if self._closed:
            return
        places = set(assigned)
        thrown_out, self._member_id = self._member_id not in ("", self._coordinator.member_id), self._coordinator.member_id
        self._generation = self._coordinator.generation
        self._lose([partition for place, partition in self._partitions.items() if thrown_out or place not in places])
        for place, partition in self._partitions.items():
            self._consumer.seek(place, partition.position)
            if partition.tenure.draining != (place in self._sharing.let_go):
                partition.tenure.draining = place in self._sharing.let_go
                self._interrupted = True
        try:
            for partition in await self._take_over(places - self._partitions.keys()):
                self._partitions[partition.place] = partition
        except (MsgbusError, *CLIENT_ERRORS) as error:
            self._fail(translate(error, f"taking over partitions of group {self._group!r}"))
            return
        await self._commit()  # from now on a death without a word is one; tried again if it fails
        self._dirty.set()
        self._suspended = False
        self._look_at_orders = 0.0
        self._call_for_a_round()
        self._wake()

    async def _take_over(self, places: Iterable[TopicPartition]) -> list[Partition]:
        """Where each partition that comes to us stands, by what was committed last."""
        committed = await self._cluster.committed(self._group)
        if not committed:
            raise self._dropped()
        marks = {place: read_mark(committed[place][1]) for place in places if place in committed}
        new = dict.fromkeys((place for place in places if place not in committed), BEGINNING)  # a partition that was added since
        died_over = dict.fromkeys((place for place, mark in marks.items() if mark.state != "clean"), END)
        found = await self._cluster.offsets({**new, **died_over}) if new or died_over else {}
        partitions = [Partition(place, found[place]) for place in new]
        for place, mark in marks.items():
            head = committed[place][0]
            suspects = suspects_of(mark, head, found.get(place, head), self._settings.ack_window)
            settled = tuple((head + first, head + end) for first, end in mark.settled)
            partitions.append(Partition(place, head, False, suspects, settled, mark.replayed, committed=committed[place]))
        for partition in partitions:
            partition.own = partition.place.topic == self._group + SOON
            partition.upto = partition.position
            self._consumer.seek(partition.place, partition.position)
        return partitions

    def _forget(self) -> None:
        """Ends us: what was committed is gone, and our offsets mean nothing in what may be made of that name."""
        self._lose(self._partitions.values())
        self._instance = None  # it leaves: whoever came back as it would have the old share, without what is made since
        self._fail(self._dropped())

    def _dropped(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"group {self._spec.group!r} of topic {self._spec.topic!r} was dropped, or the topic was deleted")

    def _let_go(self, partition: Partition, offset: int) -> None:
        super()._let_go(partition, offset)
        if partition.tenure.draining and not partition.held:
            self._call_for_a_round()

    def _call_for_a_round(self) -> None:
        """When we have let go of partitions that others wait for, the group shares out anew, in a moment: there may be more of them."""
        if self._calling is None and any(one.tenure.draining and not one.held for one in self._partitions.values()):
            self._calling = self._loop.call_later(CALL_AFTER, self._share_out_anew)

    def _share_out_anew(self) -> None:
        self._calling = None
        if not self._closed and not self._suspended:
            self._coordinator.request_rejoin()

    # ------------------------------------------------------------ what operators ask for

    def _carry_out(self, orders: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Purges and replays of a group that is at work, committed for a group that nobody joins."""
        for place, (offset, order) in orders.items():
            partition = self._partitions.get(place)
            if partition is None:
                continue
            if order == PURGE:
                gone = range(partition.upto, offset)  # read or not, it was not handed out
                partition.ready = deque(received for received in partition.ready if received.token[1] not in gone)
                for one in [one for one in partition.unsettled if one in gone]:
                    del partition.unsettled[one]
                if partition.position < offset:
                    partition.position = offset
                    self._consumer.seek(place, offset)
                    self._dirty.set()
            elif order != partition.replayed:  # what is handed out of the partition comes again too
                self._lose([partition])
                self._partitions[place] = Partition(place, offset, partition.own, replayed=order, upto=offset)
                self._consumer.seek(place, offset)
                self._dirty.set()
