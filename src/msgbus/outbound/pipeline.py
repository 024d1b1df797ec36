"""Pipeline: envelope → publish middleware → the adapter. Concurrent publishes are batched by themselves; nothing waits on a timer.

Who publishes alone goes at once. Who publishes to a topic while another is on the way to it joins the next batch, which goes when that one
has landed; or, where many wait and nothing has a key whose order it could break, at once, so that broker and publishers work side by side.
Where the broker takes its time to confirm, a few go alone beside each other.
What was `BrokerUnavailable` (stored nowhere) is sent again, same id, with back-off, until `publish_timeout`; nothing else is.
"""

from __future__ import annotations

import asyncio
import logging
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from operator import itemgetter

from msgbus.contract.adapter import Adapter, SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerError, BrokerUnavailable, PublishUnknown
from msgbus.middleware.base import Middleware, compose_publish

log = logging.getLogger("msgbus")

MAX_BATCH = 500
"""Messages in one `Adapter.send`."""
FEW = 16
"""Messages that are on the way to a topic alone, at most, each in a send of its own."""
EACH = 0.001
"""Seconds that a confirm takes, for each of them beyond the first. A send of its own costs about a tenth of a millisecond, a message of a
batch a fifth of that: where the confirm is there at once, the next batch is the faster way."""
MANY = 64
"""Messages without keys that wait for a topic: so many go while one batch is on the way."""
MAX_SPREAD = 0.1
"""How far apart the deadlines of one batch may be, as a part of `publish_timeout`: a batch has its oldest member's."""
GRACE = 1.0
"""Seconds that an adapter may be late with its outcomes before the core answers in its place."""
LAST = 0.05
"""The part of its time that a last try has at least: one without any would not hear the answer, nor say what is wrong."""


_Waiting = tuple[Envelope, float, asyncio.Future[None]]
"""Who waits: the envelope, its deadline by the loop's clock, and what its publisher awaits. A plain tuple: one is made for each message."""
_deadline = itemgetter(1)


class _Line:
    """Of one topic: who waits, the keys (or None) of those that are on the way alone, how many may be, how many tasks send batches, how
    many batches are on the way just now, and whether a key was ever among them: then nothing goes beside a batch."""

    __slots__ = ("alone", "batches", "few", "flushes", "keyed", "waiting")

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []
        self.alone: list[str | None] = []
        self.few = 1
        self.flushes = 0
        self.batches = 0
        self.keyed = False

    def may_flush(self) -> bool:
        """Whether another task may send batches: beside one other, or what goes alone, where nothing has a key; else beside nothing."""
        return self.flushes + bool(self.alone) < (1 if self.keyed else 2)

    def share(self) -> int:
        """How many of those who wait go now. Of many without a key the first half, where no batch is on the way: if all went together, they
        would all be woken together, and broker and publishers would take turns."""
        if self.keyed or self.batches:
            return MAX_BATCH
        return min(MAX_BATCH, max(MANY, (len(self.waiting) + 1) // 2))


class Pipeline:
    """Sends envelopes. Made when a bus is entered; all calls come from its event loop."""

    def __init__(self, adapter: Adapter, middleware: Sequence[Middleware], publish_timeout: float) -> None:
        self.publish_timeout = publish_timeout
        self._adapter = adapter
        self._loop = asyncio.get_running_loop()
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)
        self._flushes: set[asyncio.Task[None]] = set()
        self._delivering = 0  # calls of `deliver` that have no outcomes yet
        self._quiet: asyncio.Event | None = None  # while `close` waits for them
        self._closed = False  # nothing is sent a second time any more
        through = compose_publish(middleware, self._send)
        self._plain = through is None
        self.publish: Callable[[Envelope], Awaitable[object]] = through or self._send
        """Returns once an envelope is confirmed; raises the outcome otherwise."""

    def _send(self, envelope: Envelope) -> Awaitable[None]:
        """Ends once it is confirmed; raises the outcome otherwise."""
        line, key = self._lines[envelope.topic], envelope.key
        if key is not None:
            line.keyed = True
        deadline = self._loop.time() + self.publish_timeout
        if not (line.flushes or line.waiting or len(line.alone) >= line.few or (key is not None and key in line.alone)):
            return self._send_alone(line, envelope, deadline)
        confirmed: asyncio.Future[None] = self._loop.create_future()
        line.waiting.append((envelope, deadline, confirmed))
        if len(line.waiting) >= MANY and not line.keyed and line.may_flush():
            self._start_flush(line)
        return confirmed

    async def _send_alone(self, line: _Line, envelope: Envelope, deadline: float) -> None:
        line.alone.append(envelope.key)
        try:
            outcome = (await self.deliver([envelope], deadline))[0]
        finally:
            line.alone.remove(envelope.key)
            took = self._loop.time() - deadline + self.publish_timeout
            line.few = max(1, min(FEW, 1 + int(took / EACH)))
            if line.waiting and line.may_flush():  # who came meanwhile goes now, together
                self._start_flush(line)
        if outcome is not None:
            raise outcome

    def _start_flush(self, line: _Line) -> None:
        line.flushes += 1
        task = self._loop.create_task(self._flush(line), name=f"msgbus publish {line.waiting[0][0].topic}")
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _flush(self, line: _Line) -> None:
        while line.waiting and (line.flushes == 1 or not line.keyed):
            batch = self._take(line)
            if not batch:
                continue
            envelopes = [envelope for envelope, _, _ in batch]
            line.batches += 1
            try:
                outcomes = await self.deliver(envelopes, batch[0][1])
            except BaseException as error:
                for envelope, _, confirmed in [*batch, *line.waiting]:
                    if not confirmed.done():
                        confirmed.set_exception(
                            PublishUnknown(envelope.id, "cancelled") if isinstance(error, asyncio.CancelledError) else error
                        )
                line.waiting.clear()
                line.flushes -= 1
                if isinstance(error, asyncio.CancelledError):
                    raise
                return  # raised on the publishers
            finally:
                line.batches -= 1
            if outcomes.count(None) < len(outcomes) and not self._closed:  # the oldest one's time is over: the others keep theirs
                soon = self._loop.time() + 0.05
                again = [index for index in _to_send_again(envelopes, outcomes) if batch[index][1] > soon]
                line.waiting[:0] = [batch[index] for index in again]
                line.waiting.sort(key=_deadline)  # of two batches that failed, the older one's may come second
                for index in reversed(again):
                    del batch[index], outcomes[index]
            for (_, _, confirmed), outcome in zip(batch, outcomes, strict=True):
                if confirmed.done():
                    continue
                if outcome is None:
                    confirmed.set_result(None)
                else:
                    confirmed.set_exception(outcome)
        line.flushes -= 1

    def _take(self, line: _Line) -> list[_Waiting]:
        """Of those who wait, who goes now. Deadlines grow along a line. Whose publisher was cancelled is not sent; whose time is over hears
        so; and who has much more time than the oldest waits for the next batch, which has time that suits it."""
        waiting = line.waiting
        late = bisect_right(waiting, self._loop.time(), key=_deadline)
        for envelope, _, confirmed in waiting[:late]:
            if not confirmed.done():
                confirmed.set_exception(BrokerUnavailable(f"nothing could be sent to {envelope.topic!r} in time"))
        del waiting[:late]
        if not waiting:
            return []
        alike = bisect_right(waiting, waiting[0][1] + self.publish_timeout * MAX_SPREAD, key=_deadline)
        size = min(line.share(), alike)
        batch = [one for one in waiting[:size] if not one[2].done()]
        del waiting[:size]
        return batch

    async def deliver(self, envelopes: Sequence[Envelope], deadline: float) -> list[SendOutcome]:
        """One outcome an envelope. What was stored nowhere, the broker being away, is sent again until the loop's clock says `deadline`."""
        self._delivering += 1
        begun = self._loop.time()
        try:
            outcomes = await self._once(envelopes, deadline)
            if outcomes.count(None) == len(outcomes):
                return outcomes
            pause, last = 0.05, LAST * (deadline - begun)
            while again := _to_send_again(envelopes, outcomes):
                remaining = deadline - last - self._loop.time()
                if remaining <= 0 or self._closed:
                    break
                await asyncio.sleep(min(remaining, pause * random.uniform(0.5, 1.0)))
                pause = min(pause * 2, 1.0)
                for index, outcome in zip(again, await self._once([envelopes[index] for index in again], deadline), strict=True):
                    outcomes[index] = outcome
            return outcomes
        finally:
            self._delivering -= 1
            if self._quiet is not None:
                self._quiet.set()

    async def _once(self, envelopes: Sequence[Envelope], deadline: float) -> list[SendOutcome]:
        timeout = max(0.001, deadline - self._loop.time())
        try:
            async with asyncio.timeout(timeout + GRACE):
                return await self._adapter.send(envelopes, timeout=timeout)
        except BrokerError as error:  # an adapter should not raise; what it raised holds for all of them
            return [error for _ in envelopes]
        except TimeoutError:
            return [PublishUnknown(envelope.id, f"no confirm within {timeout:.3g} s") for envelope in envelopes]

    async def send_many(self, envelopes: Sequence[Envelope]) -> list[BaseException | None]:
        """One outcome an envelope; the order of a key is kept. Where there is middleware, each envelope passes it on its own."""
        if self._plain:
            return [*await self.deliver(envelopes, self._loop.time() + self.publish_timeout)]
        outcomes: list[BaseException | None] = [None] * len(envelopes)
        lanes: dict[str, list[int]] = {}
        for index, envelope in enumerate(envelopes):
            lanes.setdefault(f"k{envelope.key}" if envelope.key is not None else f"n{index}", []).append(index)

        async def send_lane(indexes: list[int]) -> None:
            for position, index in enumerate(indexes):
                try:
                    await self.publish(envelopes[index])
                except Exception as error:  # the publisher's, given to it below
                    for unsent in indexes[position:]:
                        outcomes[unsent] = error
                    return

        async with asyncio.TaskGroup() as group:
            for indexes in lanes.values():
                group.create_task(send_lane(indexes))
        return outcomes

    async def close(self, timeout: float) -> None:
        """Waits for what is on the way; what has no outcome after `timeout` seconds is unknown to its publisher."""
        self._quiet = quiet = asyncio.Event()
        try:
            async with asyncio.timeout(timeout):
                while self._delivering or self._flushes:
                    if self._flushes:
                        await asyncio.wait(self._flushes)
                    else:
                        quiet.clear()
                        await quiet.wait()
        except TimeoutError:
            log.warning("publishes had no answer within %.3g s of closing", timeout)
        self._closed = True
        for task in self._flushes:
            task.cancel()


def _to_send_again(envelopes: Sequence[Envelope], outcomes: Sequence[SendOutcome]) -> list[int]:
    """Which may be sent again without overtaking: those that were unavailable, unless a later one of their key got further."""
    again: list[int] = []
    passed: set[str] = set()
    for index in range(len(outcomes) - 1, -1, -1):
        key = envelopes[index].key
        if not isinstance(outcomes[index], BrokerUnavailable):
            if key is not None:
                passed.add(key)
        elif key is None or key not in passed:
            again.append(index)
    again.reverse()
    return again
