"""A receiver of an ordered group: it owns shards by leases, and reads them by a script that looks at the lease first.

A lease alone is no fence: a blocked XREADGROUP of one who has lost it would take what belongs to the next. So nobody blocks in one:
XREAD only wakes. The owners of a shard share one consumer name, and a new one takes what is pending first, in the order of ids.
All that touches shards is done by one task, between reads: the council that shares them out, their reading, their handing over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from redis import exceptions as client

from msgbus.contract.adapter import Received, SendOutcome, Tenure
from msgbus.contract.envelope import Envelope
from msgbus_redis import names, scripts
from msgbus_redis.connections import Command, script
from msgbus_redis.errors import is_group_gone
from msgbus_redis.receiver import BUFFERED, GONE, HANDED_OUT, SETTLED, TICK, Entry, RedisReceiver
from msgbus_redis.services import went_back


class Shard:
    """One that is ours. `walks`: where its pending entries, and its retries', go on; '' once they are through."""

    def __init__(self, number: int, keys: Sequence[str], inherited: bool, now: float) -> None:
        self.number = number
        self.keys = keys
        self.inherited = inherited
        self.tenure = Tenure()
        self.handing_over = False
        self.walks: list[bytes] = [b"-", b"-"]
        self.last: list[bytes] = [b"$", b"$"]
        self.renewed = now
        self.back: list[Entry] = []
        """Released while it is being handed over."""


class ExclusiveReceiver(RedisReceiver):
    """Implements `Receiver` and `Forwarding`. `token` is its name in the council and the value of its leases."""

    token: str
    group: str

    def prepare(self, token: str, group: str) -> None:
        """Before `start`."""
        self.token = token
        self.group = group
        self.mains = self.layout.parts(self.spec.priority)
        self.streams = [*self.mains, *(names.retry(part, group) for part in self.mains)]
        self.shards: dict[int, Shard] = {}
        self._members = names.members(self.mains[0], group)
        self._leases = [names.lease(part, group) for part in self.mains]
        self._place = (self.spec.topic, group, self.spec.priority)
        self._before = self.services.lost_tokens.pop(self._place, [])
        self._left = False
        self._rest = min(TICK, self.lease / 6)
        self._council_at = 0.0
        self._turn = 0

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        """As the contract says: one script, which looks at the lease, and writes before it acks."""
        entry: Entry = received.token
        if entry.state != HANDED_OUT or self.problem is not None or self.closed:
            return went_back(envelope)
        number = entry.stream % len(self.mains)
        outcome = await self.services.sender.forward(
            envelope, self.streams[entry.stream], self._leases[number], self.group, scripts.OWNER, entry.id, self.token, timeout
        )
        if outcome is None:
            entry.state = SETTLED
            self.held.discard(entry)
            self.acked += 1
            self._work.set()
        return outcome

    # ------------------------------------------------------------ shards

    async def _chores(self) -> None:
        now = time.monotonic()
        if now >= self._council_at:
            self._council_at = now + self._rest
            await self._sit_in_council(now)
        for shard in list(self.shards.values()):
            if shard.handing_over and not any(entry.stream % len(self.mains) == shard.number for entry in self.held):
                await self._hand_over([shard])
                self._council_at = 0.0

    async def _sit_in_council(self, now: float) -> None:
        handing_over = sum(shard.handing_over for shard in self.shards.values())
        arguments = [self.token, self.lease_ms, int(not self.draining), int(not handing_over), *self._before]
        (answer,) = await self.read_call([script(scripts.COUNCIL, [self._members, *self._leases], arguments)], [], block=False)
        if isinstance(answer, client.RedisError):
            raise answer
        excess, mine, got, inherited = answer
        self._before = []
        for number in self.shards.keys() - set(mine):
            self._lose(self.shards[number])
        for number in mine:
            if number in self.shards:
                self.shards[number].renewed = now
            else:
                self._gain(number, number in inherited, now)
        for number in got:
            self._gain(number, False, now)
        spare = [shard for shard in self.shards.values() if not shard.handing_over]
        for shard in spare[max(0, len(spare) - max(0, excess - handing_over)) :]:
            shard.handing_over = shard.tenure.draining = True
            shard.back += self._pull(shard)

    def _gain(self, number: int, inherited: bool, now: float) -> None:
        keys = (self._leases[number], self.mains[number], self.streams[number + len(self.mains)])
        self.shards[number] = Shard(number, keys, inherited, now)

    def _lose(self, shard: Shard) -> None:
        """Another has it: this process was away for longer than its lease."""
        del self.shards[shard.number]
        shard.tenure.lost = True
        for entry in [*self._pull(shard), *self.held]:
            if entry.stream % len(self.mains) == shard.number:
                entry.state = GONE
                self.held.discard(entry)

    def _pull(self, shard: Shard) -> list[Entry]:
        """Takes a shard's entries out of the buffer."""
        count = len(self.mains)
        pulled = [entry for entry in self.buffer if entry.stream % count == shard.number]
        if pulled:
            self.buffer = deque(entry for entry in self.buffer if entry.stream % count != shard.number)
        return pulled

    async def _hand_over(self, shards: Sequence[Shard]) -> None:
        """Acks first; what was not settled goes back; then the leases are free for whoever lacks a shard."""
        if self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing])
        back = [entry for shard in shards for entry in shard.back]
        (answer,) = await self.read_call([self._owned("give", back, shards)], self.take_acks(), block=False)
        if isinstance(answer, client.RedisError):
            raise answer
        for shard in shards:
            self.shards.pop(shard.number, None)

    def _owned(self, verb: str, entries: Iterable[Entry], shards: Iterable[Shard]) -> Command:
        places: dict[int, int] = {}
        keys: list[str] = []
        for shard in shards:
            places[shard.number] = len(places) + 1
            keys += shard.keys
        count = len(self.mains)
        arguments: list[Any] = [self.group, self.token, verb]
        for entry in entries:
            arguments += (places[entry.stream % count], entry.stream // count + 1, entry.id, max(0, entry.count - 1))
        return script(scripts.OWNED, keys, arguments)

    # ------------------------------------------------------------ reading

    async def _read(self, room: int) -> None:
        shards = [shard for shard in self.shards.values() if not shard.handing_over]
        if not shards:
            self._work.clear()
            await self._work.wait()
            return
        self._turn += 1
        turn = self._turn % len(shards)
        shards = shards[turn:] + shards[:turn]  # whoever is first may fill the room
        arguments: list[Any] = [self.group, self.token, self.lease_ms, room]
        for shard in shards:
            arguments += (*shard.walks, int(shard.inherited))
        keys = [key for shard in shards for key in shard.keys]
        (answer,) = await self.read_call([script(scripts.TAKE, keys, arguments)], self.take_acks(), block=False)
        if isinstance(answer, client.RedisError):
            if not is_group_gone(answer):
                raise answer
            await self._begin_anew()
            return
        self.note_lost(answer[0])
        self._take(shards, answer[1], answer[2:])
        if len(answer) == 2 and not self.acks:
            await self._sleep([shard for shard in shards if shard.number in self.shards and shard.last[0] != b"$"])

    def _take(self, shards: Sequence[Shard], states: Sequence[Sequence[bytes]], entries: Sequence[Sequence[Any]]) -> None:
        now = time.monotonic()
        known: set[tuple[int, bytes]] | None = None
        for shard, state in zip(shards, states, strict=True):
            if not state:
                self._lose(shard)
                continue
            shard.walks = list(state[:2])
            shard.last = list(state[2:]) or [b"$", b"$"]
        for place, stream, id_, flat, count in entries:
            shard = shards[int(place) - 1]
            number = shard.number + (stream - 1) * len(self.mains)
            if shard.inherited:  # pending entries were gone through again: what is in our hands is among them
                known = known if known is not None else {(entry.stream, entry.id) for entry in [*self.held, *self.buffer]}
                if (number, id_) in known:
                    continue
            self.take_in(Entry(number, id_, count, now), flat, shard.tenure)
        for shard in shards:
            if shard.inherited and not any(shard.walks):
                shard.inherited = False

    async def _begin_anew(self) -> None:
        """A stream or group had vanished; of the other shards something may have been given and not seen."""
        await self.services.revive(self.layout, self.spec)
        for shard in self.shards.values():
            shard.walks, shard.inherited = [b"-", b"-"], True

    async def _sleep(self, shards: Sequence[Shard]) -> None:
        """Until something comes, or for a while."""
        streams = [key for shard in shards for key in shard.keys[1:]]
        last = [id_ for shard in shards for id_ in shard.last]
        wait = max(1, int(min(self._rest, self._council_at - time.monotonic()) * 1000))
        if not streams:
            return
        (answer,) = await self.read_call([("XREAD", "COUNT", 1, "BLOCK", wait, "STREAMS", *streams, *last)], [])
        if isinstance(answer, client.RedisError) and not is_group_gone(answer):
            raise answer

    async def _upkeep(self, now: float) -> float:
        self._work.set()
        wait, *_ = await self.links.run(self.base, self.move(), *self.tidy(), what=f"upkeep of {self.spec.topic!r}")
        await self.see_group()
        return self._rest if wait < 0 else min(self._rest, wait / 1000 + 0.001)

    # ------------------------------------------------------------ settling

    def _settle(self, entry: Entry) -> None:
        self.queue_ack(entry)
        self._hurry(entry)

    def _hurry(self, entry: Entry) -> None:
        shard = self.shards.get(entry.stream % len(self.mains))
        if shard is not None and shard.handing_over:
            self.interrupt()

    def _ack_commands(self, entries: Sequence[Entry]) -> list[Command]:
        """A plain XACK settles for whoever has the shard: what may be another's is looked at first."""
        sure = time.monotonic() - self.lease * 0.8
        count = len(self.mains)
        ids: dict[int, list[bytes]] = {}
        unsure: list[Entry] = []
        for entry in entries:
            shard = self.shards.get(entry.stream % count)
            if shard is not None:
                if shard.renewed > sure:
                    ids.setdefault(entry.stream, []).append(entry.id)
                else:
                    unsure.append(entry)
        commands: list[Command] = [("XACK", self.streams[stream], self.group, *those) for stream, those in ids.items()]
        return [*commands, self._owned("ack", unsure, self.shards.values())] if unsure else commands

    def _count_stale(self, entries: Sequence[Entry], replies: Sequence[Any]) -> int:
        return len(entries) - sum(reply for reply in replies if isinstance(reply, int))

    async def _release(self, entry: Entry) -> None:
        """A shard that stays ours keeps its messages here, in their order; one that goes takes them along."""
        shard = self.shards.get(entry.stream % len(self.mains))
        if shard is None:
            return
        if shard.handing_over:
            shard.back.append(entry)
            self.interrupt()
            return
        entry.state = BUFFERED
        self.buffer = deque(sorted([*self.buffer, entry], key=_order))
        self._wake_receive()

    async def _drained(self) -> None:
        """It leaves the council, so that others count without it; its shards stay until `close`."""
        self._tasks.append(self._spawn(self._keep_leases(), "leases"))

    async def _keep_leases(self) -> None:
        while self.problem is None and not self.closed:  # until it is cancelled
            arguments = [self.token, self.lease_ms, 0, 0]
            council = script(scripts.COUNCIL, [self._members, *self._leases], arguments)
            answer = await self._guarded(self.links.run(self.base, council, what="keeping shards"))
            if answer is None:
                return
            for number in self.shards.keys() - set(answer[0][1]):
                self._lose(self.shards[number])
            await asyncio.sleep(self.lease / 3)

    async def _leave(self) -> None:
        for entry in [*self.held, *self.buffer]:
            shard = self.shards.get(entry.stream % len(self.mains))
            if shard is not None:
                shard.back.append(entry)
        await self._hand_over(list(self.shards.values()))
        await self.links.run(self.base, ("ZREM", self._members, self.token), what="closing a receiver")
        self._left = True

    async def _close(self) -> None:
        await super()._close()
        if not self._left:  # its shards could not be given back: the next receiver of this process goes on with them
            self.services.lost_tokens.setdefault(self._place, []).extend([*self._before, self.token])


def _order(entry: Entry) -> tuple[int, int]:
    milliseconds, _, number = entry.id.partition(b"-")
    return int(milliseconds), int(number)
