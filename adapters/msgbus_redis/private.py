"""A private receiver: a copy of what is sent from now on, and nothing left behind.

It reads the streams itself, from the last id at its opening. A trim spares what is younger than a lease while such a reader is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from redis import exceptions as client

from msgbus_redis import names, scripts
from msgbus_redis.connections import Command, script
from msgbus_redis.receiver import BLOCK, BUFFERED, TICK, Entry, RedisReceiver


class PrivateReceiver(RedisReceiver):
    """Implements `Receiver`. Nothing is settled at the broker: acks only free the window."""

    async def prepare(self) -> None:
        """Before `start`: what is sent after this is received."""
        self._me = os.urandom(8).hex()
        self.streams = self.layout.parts(self.spec.priority)
        (ids,) = await self.links.run(self.base, self._watch(), what=f"a private receiver of {self.spec.topic!r}")
        self._last: list[bytes] = list(ids)

    def _watch(self) -> Command:
        return script(scripts.WATCH, [names.private(self.layout.topic), *self.streams], [self._me, self.lease_ms])

    async def _read(self, room: int) -> None:
        count = max(1, room // len(self.streams))
        command = ("XREAD", "COUNT", count, "BLOCK", int(BLOCK * 1000), "STREAMS", *self.streams, *self._last)
        (answer,) = await self.read_call([command], [])
        if isinstance(answer, client.RedisError):
            raise answer
        now = time.monotonic()
        for stream, entries in answer or ():
            number = self.streams.index(stream.decode())
            for id_, flat in entries:
                self._last[number] = id_
                self.take_in(entry := Entry(number, id_, 1, now), flat, entry)

    async def _upkeep(self, now: float) -> float:
        commands = [self.move(), self._watch(), *self.tidy()]
        wait, *_ = await self.links.run(self.base, *commands, what=f"upkeep of {self.spec.topic!r}")
        return TICK if wait < 0 else wait / 1000 + 0.001

    def _settle(self, entry: Entry) -> None:
        self.acked += 1

    async def _release(self, entry: Entry) -> None:
        entry.state = BUFFERED
        self.buffer.appendleft(entry)
        self._wake_receive()

    async def _drained(self) -> None:
        """What was not handed out is nobody else's."""

    async def _leave(self) -> None:
        await self.links.run(self.base, ("ZREM", names.private(self.layout.topic), self._me), what="closing a receiver")

    def _ack_commands(self, entries: Sequence[Entry]) -> list[Command]:
        return []

    def _count_stale(self, entries: Sequence[Entry], replies: Sequence[Any]) -> int:
        return 0
