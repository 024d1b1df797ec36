"""Outcome → broker: the copies that retries and dead letters are, and how a copy and the ack of its original go together.

A message is in its source or at its new place at every instant, maybe in both, never in neither: the copy is confirmed before the
original is acked. What settles a delivery passes no user's middleware.
"""

from __future__ import annotations

import asyncio
import hashlib
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from msgbus.contract.adapter import Forwarding, Received, Receiver, SendOutcome
from msgbus.contract.address import dead_topic
from msgbus.contract.envelope import ATTEMPT, CE_TIME, DEAD, FIRST_FAILED_AT, NOT_BEFORE, OWN, Envelope, utc_text
from msgbus.contract.outcome import Dead
from msgbus.errors import BrokerError, DecodeError, MsgbusError, PublishUnknown
from msgbus.outbound.pipeline import GRACE, Pipeline

MAX_ERROR = 1024


@dataclass(frozen=True, slots=True)
class Settler:
    """Settles for one subscription. `topic` is the physical name; `handler` the subscription's name in records."""

    pipeline: Pipeline
    topic: str
    group: str
    handler: str
    max_delay: float | None

    async def retry(self, receiver: Receiver, received: Received, *, runs: int, delay: float, failed_at: float | None) -> SendOutcome:
        """A copy for this group alone, not before `delay` seconds from now; `runs` of the handler are behind it."""
        source = received.envelope
        headers = _kept(source)
        headers.pop(NOT_BEFORE, None)
        headers[ATTEMPT] = str(runs)
        if failed_at is not None:  # None: the handler was not run
            headers.setdefault(FIRST_FAILED_AT, utc_text(failed_at))
        if self.max_delay is not None and delay > self.max_delay:  # it goes round again with the rest of its time
            headers[NOT_BEFORE] = repr(time.time() + delay)
            delay = self.max_delay
        copy = Envelope(
            source.id,
            source.topic,
            source.body,
            headers,
            source.key,
            group=self.group,
            priority=source.priority,
            delay=delay,
            expires_at=source.expires_at,
        )
        return await self._forward(receiver, received, copy)

    async def bury(
        self, receiver: Receiver, received: Received, dead: Dead, *, attempt: int, deliveries: int, failed_at: float
    ) -> SendOutcome:
        """A dead letter: body and headers as they came, and the record of why. `attempt`: the run of the handler it died at, or before."""
        source = received.envelope
        never_ran = dead.reason in ("poison", "idempotency_conflict") or isinstance(dead.error, DecodeError)
        record = self._record(source, dead, runs=attempt - never_ran, deliveries=deliveries, failed_at=failed_at)
        copy = Envelope(
            source.id,
            dead_topic(self.topic, self.group),
            source.body,
            {**_kept(source), **record},
            source.key,
            priority=source.priority,
            expires_at=source.expires_at,
        )
        return await self._forward(receiver, received, copy)

    async def _forward(self, receiver: Receiver, received: Received, copy: Envelope) -> SendOutcome:
        timeout = self.pipeline.publish_timeout
        if isinstance(receiver, Forwarding):
            try:
                async with asyncio.timeout(timeout + GRACE):
                    return await receiver.forward(received, copy, timeout=timeout)
            except TimeoutError:
                return PublishUnknown(copy.id, f"no confirm within {timeout:.3g} s")
            except BrokerError as error:
                return error
        outcome = (await self.pipeline.deliver([copy], asyncio.get_running_loop().time() + timeout))[0]
        if outcome is None:
            receiver.ack(received)
        return outcome

    def _record(self, source: Envelope, dead: Dead, *, runs: int, deliveries: int, failed_at: float) -> Mapping[str, str]:
        error = dead.error
        text = error if isinstance(error, str) else words_of(error) or type(error).__name__
        record = {
            "reason": dead.reason,
            "topic": self.topic,
            "group": self.group,
            "handler": self.handler,
            "error-type": "" if isinstance(error, str) else f"{type(error).__module__}.{type(error).__qualname__}",
            "error-message": _header_text(text, MAX_ERROR),
            "traceback-digest": "" if isinstance(error, str) else _digest(error),
            "attempts": str(runs),
            "deliveries": str(deliveries),
            "first-published-at": source.headers.get(CE_TIME, ""),
            "first-failed-at": _kept(source).get(FIRST_FAILED_AT) or utc_text(failed_at),
            "dead-at": utc_text(time.time()),
            "source-id": source.id,
            "host": platform.node(),
            "version": _VERSION,
        }
        return {sys.intern(DEAD + name): value for name, value in record.items()}  # one name for all: they are kept with each letter


_VERSION = version("msgbus")


def _kept(source: Envelope) -> dict[str, str]:
    """The headers that a copy keeps. In a fresh message none that is called `msgbus-...` is ours, whatever it claims."""
    not_kept = OWN if source.group is None else DEAD
    return {name: value for name, value in source.headers.items() if not name.startswith(not_kept)}


def words_of(error: BaseException) -> str:
    """The error's text. One whose `__str__` fails says nothing, and costs nobody more than that."""
    try:
        return str(error)
    except Exception:
        return ""


def _header_text(text: str, limit: int) -> str:
    """Text that any broker carries in a header: one line, at most `limit` bytes of UTF-8."""
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(character for character in line if character.isprintable())
    return line.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")


def _digest(error: BaseException) -> str:
    """The same for failures at the same place: a hash of the frames, without the text of the lines."""
    cause = error.__cause__ if isinstance(error, MsgbusError) and error.__cause__ is not None else error
    frames = "\n".join(
        f"{frame.f_code.co_filename}:{frame.f_code.co_name}:{line}" for frame, line in traceback.walk_tb(cause.__traceback__)
    )
    return hashlib.sha256(frames.encode()).hexdigest()
