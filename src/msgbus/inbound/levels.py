"""Levels: the open receivers of a pull consumer, one a priority level, taken from as one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from msgbus.contract.adapter import Adapter, Received, Receiver, ReceiverSpec
from msgbus.contract.envelope import PRIORITIES
from msgbus.inbound.ready import ByWeight, share_of_window

Taken = tuple[Receiver, Received]


class Levels:
    """One receiver, or three that share the window. While every level has something, each gets its share, so that none starves."""

    def __init__(self, receivers: Sequence[Receiver]) -> None:
        self._receivers = tuple(receivers)
        self._spare: deque[Taken] = deque()
        """Taken from a receiver, and not handed out yet: the caller was cancelled, or had asked for less."""
        self._turns: ByWeight[Receiver] = ByWeight()

    @classmethod
    async def open(cls, adapter: Adapter, spec: ReceiverSpec, *, priorities: bool) -> Levels:
        """Opens them. Raises `BrokerError`, with none left open."""
        specs = [spec]
        if priorities:
            specs = [replace(spec, priority=level, window=share_of_window(level, spec.window)) for level in PRIORITIES]
        opened = cls([])
        try:
            for one in specs:
                opened._receivers += (await adapter.open_receiver(one),)
        except BaseException:
            await opened.close()
            raise
        return opened

    async def receive(self, limit: int, timeout: float) -> list[Taken]:
        """As `Receiver.receive`, of whichever level has something. Cancelling loses nothing: what came is handed out next time."""
        if not self._spare:
            if len(self._receivers) == 1:
                receiver = self._receivers[0]
                return [(receiver, received) for received in await receiver.receive(limit, timeout)]
            for receiver in self._in_turn():
                self._keep(receiver, await receiver.receive(limit - len(self._spare), 0.0))
                if len(self._spare) >= limit:
                    break
            if not self._spare:
                await self._wait(limit, timeout)
        return [self._spare.popleft() for _ in range(min(limit, len(self._spare)))]

    def _in_turn(self) -> list[Receiver]:
        """The level whose turn it is by weight, then the others, the highest first."""
        for level, receiver in zip(PRIORITIES, self._receivers, strict=True):
            queue = self._turns.level(level)
            if not queue:
                queue.append(receiver)
        first = self._turns.take()
        return [first, *(receiver for receiver in self._receivers if receiver is not first)]

    async def _wait(self, limit: int, timeout: float) -> None:
        """Until a level has something. What several bring at once is kept."""
        tasks = {asyncio.create_task(receiver.receive(limit, timeout)): receiver for receiver in self._receivers}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task, receiver in tasks.items():
                if not task.cancelled() and task.exception() is None:
                    self._keep(receiver, task.result())
        if not self._spare:
            for task in tasks:
                if not task.cancelled():
                    task.result()  # raises what ended it

    def _keep(self, receiver: Receiver, batch: Sequence[Received]) -> None:
        self._spare.extend((receiver, received) for received in batch)

    async def drain(self) -> None:
        """Fetches no more."""
        for receiver in self._receivers:
            await receiver.drain()

    async def close(self) -> None:
        """What is un-settled returns to the group. Twice is once."""
        self._spare.clear()
        await asyncio.gather(*(receiver.close() for receiver in self._receivers))
