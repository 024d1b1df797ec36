"""Dead letters of one group: look at them, send them back to the group they came from, or discard them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from msgbus.contract.adapter import HasDepth, Peekable, Received, Receiver
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import (
    ATTEMPT,
    DEAD,
    FIRST_FAILED_AT,
    HIDDEN,
    NOT_BEFORE,
    OWN,
    REDRIVES,
    Envelope,
    check_group,
    check_topic,
    parse_utc,
)
from msgbus.contract.outcome import Reason
from msgbus.errors import ConfigurationError, MsgbusError, NotFound, TopologyMismatch, UnsupportedFeature
from msgbus.middleware.idempotency import TTL

if TYPE_CHECKING:
    from msgbus.runtime import Runtime

MAX_REDRIVES = 3
"""What came back so often is refused without `force`."""
_WINDOW = 10_000
_SETTLED_BY = 1.0
"""Seconds without a message after which a destination counts as read to its end, if its depth says so too."""
_PATIENCE = 15.0
"""Seconds without a message after which it does in any case: others may hold what is left."""

_EPOCH = datetime.fromtimestamp(0, UTC)

Where = Callable[["DeadLetter"], bool]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up, and the record of why."""

    id: str
    reason: Reason
    error: str
    """The error's type and text."""
    attempts: int
    """Runs of the handler."""
    deliveries: int
    """How often the broker handed it out, deaths of processes among them."""
    dead_at: datetime
    redrives: int
    """How often it was sent back before."""
    headers: Mapping[str, str]
    """The publisher's own."""
    record: Mapping[str, str]
    """The whole record of its death, by its names without `msgbus-dlq-`: topic, group, handler, error-type, traceback-digest, host, ..."""
    body: bytes
    """As it came."""


class DeadLetters:
    """From `bus.dead_letters(topic, group=...)`, while the bus is entered. Raises `NotFound` for a group that never was."""

    def __init__(self, entered: Callable[[], Runtime], topic: str, group: str) -> None:
        check_topic(topic)
        check_group(group)
        self._entered = entered
        self._topic = topic
        self._group = group

    def list(self, *, where: Where | None = None, limit: int | None = None) -> AsyncIterator[DeadLetter]:
        """The dead letters, oldest first, without taking them. `limit` counts those that `where` lets through."""
        return self._list(where, limit)

    async def _list(self, where: Where | None, limit: int | None) -> AsyncIterator[DeadLetter]:
        left = limit
        async for envelope in self._peek():
            letter = read_dead_letter(envelope)
            if where is not None and not where(letter):
                continue
            if left is not None:
                if left <= 0:
                    return
                left -= 1
            yield letter

    async def show(self, id: str, /) -> DeadLetter:
        """One of them. Raises `NotFound`."""
        async for envelope in self._peek():
            if envelope.id == id:
                return read_dead_letter(envelope)
        raise NotFound(f"no dead letter {id!r} of topic {self._topic!r}, group {self._group!r}")

    async def count(self) -> int | None:
        """How many there are; None where the broker cannot say."""
        runtime = await self._declared()
        if not isinstance(runtime.adapter, HasDepth):
            return None
        depth = await runtime.adapter.depth(self._name(runtime), DEAD_GROUP)
        return None if depth.ready is None else depth.ready + (depth.in_flight or 0)

    async def redrive(
        self,
        *,
        where: Where | None = None,
        limit: int | None = None,
        rate: float | None = None,
        dry_run: bool = False,
        force: bool = False,
    ) -> int:
        """Sends them back to the group they came from, with attempts counted anew; returns how many (or, `dry_run`, would be).

        The copy is confirmed before the dead letter is settled, so it may be interrupted at any message: nothing is lost. It keeps its
        id: an idempotency store decides whether the effect has happened. Stops at the first that cannot be sent and raises its error;
        also, with `MsgbusError`, after 10,000 in a row that `where` leaves.
        `rate`: at most so many a second. Left where they are, unless `force`: what was redriven 3 times, what is older than a store
        remembers, and what has expired (with `force` it goes without its expiry).
        """
        if rate is not None and rate <= 0:
            raise ValueError(f"rate must be positive, not {rate}")
        sent = 0
        gone: set[str] = set()  # what dies again meanwhile is the next call's

        def chosen(letter: DeadLetter, envelope: Envelope) -> bool:
            return letter.id not in gone and (where is None or where(letter)) and (force or _may_go(letter, envelope))

        if dry_run:
            async for envelope in self._peek():
                if limit is not None and sent >= limit:
                    break
                sent += chosen(read_dead_letter(envelope), envelope)
            return sent
        runtime = self._entered()
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        async with aclosing(self._take(limit, chosen)) as taking:  # what was not sent is back when an error is raised
            async for receiver, received in taking:
                if rate is not None:
                    await asyncio.sleep(max(0.0, next_at - loop.time()))
                    next_at = max(next_at, loop.time()) + 1.0 / rate
                copy = self._back(runtime, received.envelope)
                problem = (await runtime.pipeline.deliver([copy], loop.time() + runtime.publish_timeout))[0]
                if problem is not None:
                    raise problem
                receiver.ack(received)
                gone.add(copy.id)
                sent += 1
        return sent

    async def purge(self, *, where: Where | None = None) -> int:
        """Discards them for good; returns how many."""
        purged = 0
        async with aclosing(self._take(None, lambda letter, _: where is None or where(letter))) as taking:
            async for receiver, received in taking:
                receiver.ack(received)
                purged += 1
        return purged

    # ------------------------------------------------------------ inside

    def _name(self, runtime: Runtime) -> str:
        return dead_topic(runtime.namespace + self._topic, self._group)

    async def _declared(self) -> Runtime:
        from msgbus.runtime import dead_spec

        runtime = self._entered()
        physical = runtime.namespace + self._topic
        ours = any(plan.physical == physical and plan.group == self._group for plan in runtime.plans)
        try:
            await runtime.declare([dead_spec(physical, self._group)], create=None if ours else False)
        except TopologyMismatch as error:
            if ours:
                raise
            raise NotFound(f"no dead letters of topic {self._topic!r}, group {self._group!r}: no such group was ever declared") from error
        return runtime

    async def _peek(self) -> AsyncIterator[Envelope]:
        runtime = await self._declared()
        if not isinstance(runtime.adapter, Peekable):
            raise UnsupportedFeature("looking at dead letters", runtime.adapter.name, "redrive or purge them")
        async for envelope in runtime.adapter.peek(self._name(runtime), DEAD_GROUP):
            yield envelope

    async def _take(
        self, limit: int | None, chosen: Callable[[DeadLetter, Envelope], bool]
    ) -> AsyncGenerator[tuple[Receiver, Received], None]:
        """Hands out those that are chosen, to be settled; the rest go back untouched when it ends. Each is looked at once."""
        from msgbus.runtime import dead_receiver

        runtime = await self._declared()
        receiver = await runtime.adapter.open_receiver(dead_receiver(runtime.namespace + self._topic, self._group, _WINDOW))
        given = left = 0
        silent = 0.0
        try:
            while limit is None or given < limit:
                room = 100 if limit is None else min(100, limit - given)
                batch = await receiver.receive(room, _SETTLED_BY)
                if not batch:
                    if left >= _WINDOW:
                        raise MsgbusError(f"{left} dead letters that were not chosen lie before the rest, and no more can be looked at")
                    silent += _SETTLED_BY
                    if silent >= _PATIENCE or await self._nothing_waits(runtime):
                        return
                    continue
                silent = 0.0
                for received in batch:
                    letter = read_dead_letter(received.envelope)
                    if chosen(letter, received.envelope):
                        given += 1
                        yield receiver, received
                    else:
                        left += 1
        finally:
            async with asyncio.timeout(runtime.close_timeout):
                await receiver.close()

    async def _nothing_waits(self, runtime: Runtime) -> bool:
        """Whether the destination is read to its end, as far as the broker can say: a receiver may take its time to begin."""
        if not isinstance(runtime.adapter, HasDepth):
            return True
        return not (await runtime.adapter.depth(self._name(runtime), DEAD_GROUP)).ready

    def _back(self, runtime: Runtime, dead: Envelope) -> Envelope:
        """The message as it was, for its group alone, with its attempts forgotten."""
        topic = dead.headers.get(DEAD + "topic", runtime.namespace + self._topic)
        if topic != runtime.namespace + self._topic:
            raise ConfigurationError(
                f"dead letter {dead.id!r} says that it came from {topic!r}, not from {self._topic!r}; it is left where it is"
            )
        gone = (ATTEMPT, FIRST_FAILED_AT, NOT_BEFORE)
        headers = {name: value for name, value in dead.headers.items() if not name.startswith(DEAD) and name not in gone}
        headers[REDRIVES] = str(_number(dead.headers.get(REDRIVES)) + 1)
        expires_at = dead.expires_at if dead.expires_at is not None and dead.expires_at > time.time() else None
        return replace(dead, topic=topic, group=self._group, headers=headers, delay=0.0, expires_at=expires_at)


def read_dead_letter(envelope: Envelope) -> DeadLetter:
    """The record in an envelope's headers. Tolerates what is missing: another tool may have put the message there."""
    headers = envelope.headers
    record = {name.removeprefix(DEAD): value for name, value in headers.items() if name.startswith(DEAD)}
    kind, text = record.get("error-type", ""), record.get("error-message", "")
    return DeadLetter(
        id=envelope.id,
        reason=cast(Reason, record.get("reason", "rejected")),  # a text that msgbus wrote
        error=f"{kind.rpartition('.')[2]}: {text}" if kind else text,
        attempts=_number(record.get("attempts")),
        deliveries=_number(record.get("deliveries")),
        dead_at=parse_utc(record.get("dead-at")) or _EPOCH,
        redrives=_number(headers.get(REDRIVES)),
        headers={name: value for name, value in headers.items() if name not in HIDDEN and not name.startswith(OWN)},
        record=record,
        body=envelope.body,
    )


def _may_go(letter: DeadLetter, envelope: Envelope) -> bool:
    now = time.time()
    if envelope.expires_at is not None and envelope.expires_at <= now:
        return False
    return letter.redrives < MAX_REDRIVES and letter.dead_at.timestamp() > now - TTL


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else 0
