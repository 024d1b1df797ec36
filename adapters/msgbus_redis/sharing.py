"""A receiver of a group without order: whoever of the group is free takes the next message.

What it holds is kept from the others by a lease, the idle time of the pending entry: renewed while it is here, by a script that looks
whether it is still ours (a bare XCLAIM would steal it back). Who is dead, or has given something back, is found by the sweep.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

from redis import exceptions as client

from msgbus.contract.adapter import Received, SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus_redis import names, scripts
from msgbus_redis.connections import Command, script
from msgbus_redis.errors import call_error, is_group_gone
from msgbus_redis.receiver import BLOCK, BUFFERED, GONE, HANDED_OUT, SETTLED, TICK, Entry, RedisReceiver
from msgbus_redis.services import went_back

SWEEP = 1.0
"""Seconds between looks for what is free, or held by the dead."""
PATIENCE = 2.0
"""Seconds without a `receive` after which what is buffered goes back."""


class SharedReceiver(RedisReceiver):
    """Implements `Receiver` and `Forwarding`. `consumer` is its own name in the group; what is pending under it is read first."""

    consumer: str
    group: str

    def prepare(self, consumer: str, group: str) -> None:
        """Before `start`."""
        self.consumer = consumer
        self.group = group
        parts = self.layout.parts(self.spec.priority)
        self.streams = [*parts, *(names.retry(part, group) for part in parts)]
        self._own: dict[int, str] = dict.fromkeys(range(len(self.streams)), "-")
        self._sweep_at = 0.0
        self._renew_at = time.monotonic() + self.lease / 3
        self._tidy_at = 0.0

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        """As the contract says: one script, which writes before it acks."""
        entry: Entry = received.token
        if entry.state != HANDED_OUT or self.problem is not None or self.closed:
            return went_back(envelope)
        outcome = await self.services.sender.forward(
            envelope, self.streams[entry.stream], None, self.group, self.consumer, entry.id, "", timeout
        )
        if outcome is None:
            entry.state = SETTLED
            self.held.discard(entry)
            self.acked += 1
            if self._demand:
                self._work.set()
        return outcome

    # ------------------------------------------------------------ reading

    async def _read(self, room: int) -> None:
        now = time.monotonic()
        if self._own:
            await self._read_own(room)
            if self.buffer or self._own:
                return
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP
            (answer,) = await self._asked([script(scripts.SWEEP, self.streams, [self.group, self.consumer, self.lease_ms, room])])
            if answer is None:
                return
            self.note_lost(answer[0])
            if len(answer) > room or answer[0]:
                self._sweep_at = 0.0  # there may be more
            for number, id_, flat, count in answer[1:]:
                self.take_in(entry := Entry(number - 1, id_, count, now), flat, entry)
            if self.buffer:
                return
        count = room if len(self.streams) == 2 else max(1, room // len(self.streams))
        wait = max(1, int(min(BLOCK, self._sweep_at - now) * 1000))
        command = ("XREADGROUP", "GROUP", self.group, self.consumer, "COUNT", count, "BLOCK", wait, "STREAMS", *self.streams)
        (answer,) = await self._asked([(*command, *[">"] * len(self.streams))], block=True)
        if answer is None:
            return
        now = time.monotonic()
        for stream, entries in answer:
            number = self.streams.index(stream.decode()) if stream != self.streams[0].encode() else 0
            for id_, flat in entries:
                self.take_in(entry := Entry(number, id_, 1, now), flat, entry)
        if self.spec.quarantine and len(self.buffer) > room:  # it must not be in hand at a death that it is not to blame for
            surplus = [self.buffer.pop() for _ in range(len(self.buffer) - room)]
            await self._give_back(surplus)

    async def _read_own(self, room: int) -> None:
        """What an earlier receiver of this process was given, and perhaps never saw: nobody has died."""
        number = next(iter(self._own))
        arguments = [self.group, self.consumer, room, self._own[number]]
        (answer,) = await self._asked([script(scripts.OWN, [self.streams[number]], arguments)])
        if answer is None:
            return
        self.note_lost(answer[0])
        if answer[1]:
            self._own[number] = answer[1].decode()
        else:
            del self._own[number]
        now = time.monotonic()
        for _, id_, flat, count in answer[2:]:
            self.take_in(entry := Entry(number, id_, count, now), flat, entry)

    async def _asked(self, commands: Sequence[Command], *, block: bool = False) -> list[Any]:
        """Answers, acks in front; [None] where the group had vanished, and was made again."""
        replies = await self.read_call(commands, self.take_acks(), block=block)
        for reply in replies:
            if isinstance(reply, client.RedisError):
                if is_group_gone(reply):
                    await self.services.revive(self.layout, self.spec)
                    return [None]
                raise reply
        return replies

    # ------------------------------------------------------------ upkeep

    async def _upkeep(self, now: float) -> float:
        commands = [self.move()]
        renewed: list[Entry] = []
        if now >= self._renew_at:
            self._renew_at = now + self.lease / 3
            renewed = [entry for entry in [*self.held, *self.buffer] if entry.since < now - self.lease / 6]
            if renewed:
                commands.append(self._held("renew", renewed))
        commands += self.tidy()
        if self.buffer and now - self._asked_at > PATIENCE and not self.draining:
            await self._give_back(self._take_buffer())
        replies = await self.links.call(self.base, *commands)
        for reply in replies:
            if isinstance(reply, client.RedisError) and not is_group_gone(reply):
                raise call_error(reply, f"upkeep of {self.spec.topic!r}") from reply
        if renewed and isinstance(replies[1], list):
            self._renewed(renewed, set(cast(list[int], replies[1])), now)
        await self.see_group()
        wait = replies[0]
        return TICK if not isinstance(wait, int) or wait < 0 else wait / 1000 + 0.001

    def _renewed(self, entries: Sequence[Entry], gone: set[int], now: float) -> None:
        for index, entry in enumerate(entries):
            if index not in gone:
                entry.since = now
            elif entry.state in (BUFFERED, HANDED_OUT):
                entry.state = GONE
                entry.lost = True
                self.held.discard(entry)
        self.buffer = type(self.buffer)(entry for entry in self.buffer if entry.state == BUFFERED)

    # ------------------------------------------------------------ settling

    def _settle(self, entry: Entry) -> None:
        self.queue_ack(entry)

    def _ack_commands(self, entries: Sequence[Entry]) -> list[Command]:
        """A plain XACK settles what is another's, too: what may be, is looked at first."""
        sure = time.monotonic() - self.lease * 0.8
        ids: dict[int, list[bytes]] = {}
        unsure: list[Entry] = []
        for entry in entries:
            if entry.since > sure:
                ids.setdefault(entry.stream, []).append(entry.id)
            else:
                unsure.append(entry)
        commands: list[Command] = [("XACK", self.streams[stream], self.group, *those) for stream, those in ids.items()]
        return [*commands, self._held("ack", unsure)] if unsure else commands

    def _count_stale(self, entries: Sequence[Entry], replies: Sequence[Any]) -> int:
        return len(entries) - sum(reply for reply in replies if isinstance(reply, int))

    def _held(self, verb: str, entries: Sequence[Entry]) -> Command:
        arguments: list[Any] = [verb, self.group, self.consumer]
        for entry in entries:
            arguments += (entry.stream + 1, entry.id, max(0, entry.count - 1))
        return script(scripts.HELD, self.streams, arguments)

    async def _release(self, entry: Entry) -> None:
        await self._give_back([entry])

    async def _give_back(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            entry.state = SETTLED
        if entries:
            await self.links.run(self.base, self._held("free", entries), what="giving messages back")
            self._sweep_at = 0.0
            self.interrupt()

    def _take_buffer(self) -> list[Entry]:
        entries = [entry for entry in self.buffer if entry.state == BUFFERED]
        self.buffer.clear()
        return entries

    async def _drained(self) -> None:
        await self._give_back(self._take_buffer())

    async def _leave(self) -> None:
        back = [*self.held, *self._take_buffer()]
        commands = [self._held("free", back)] if back else []
        commands.append(script(scripts.QUIT, self.streams, [self.group, self.consumer]))
        await self.links.run(self.base, *commands, what="closing a receiver")
