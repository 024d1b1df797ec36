"""Idempotency: a delivery whose effect has happened, or is happening, is not run again. Innermost, around decode and call."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable

from msgbus.context import Context
from msgbus.contract.idempotency import AlreadyDone, Conflict, IdempotencyStore, InProgress, New
from msgbus.contract.outcome import REPEATED, Dead, Done, Dropped, Outcome, RetryAfter
from msgbus.errors import IdempotencyConflict, StoreError
from msgbus.middleware.base import Middleware

log = logging.getLogger("msgbus")

TTL = 7 * 86400.0
"""How long an effect is remembered, in seconds: longer than retries, redeliveries and a redrive take."""
STORE_AWAY = 5.0
"""How long a delivery waits, about, while the store is away."""

FIRST_LOOK = 0.05
"""The shortest time, in seconds, after which a delivery looks again whether its key is still in progress."""


def look_again(remaining: float, lease: float) -> RetryAfter:
    """What a delivery does whose key is in progress: it comes again, uncounted, after about as long as that has been so, and when the
    claim ends at the latest. So it waits no longer than the other run took, and asks but a few times however long that takes.

    `remaining`: seconds until the claim ends. `lease`: what it was made with; where that was longer, another process's, it is unknown
    how long ago that was.
    """
    held = lease - remaining if remaining <= lease else lease
    return RetryAfter(max(FIRST_LOOK, min(held * random.uniform(0.5, 1.0), remaining)), counted=False)


class Idempotency(Middleware):
    """Fails closed: while the store is away nothing is run. The key is (namespace and group, idempotency key)."""

    def __init__(self, store: IdempotencyStore, group: str, lease: float) -> None:
        self._store = store
        self._group = group
        self._lease = lease

    async def consume(self, context: Context, call_next: Callable[[Context], Awaitable[Outcome]], /) -> Outcome:
        """Runs the handler only with a claim on its key; remembers the effect when it is done."""
        key = context.idempotency_key
        fingerprint = hashlib.sha256(context.envelope.body).hexdigest()
        try:
            claim = await self._store.begin(self._group, key, fingerprint, self._lease)
        except StoreError as error:
            return RetryAfter(STORE_AWAY * random.uniform(0.5, 1.5), error, counted=False)
        match claim:
            case New(token):
                return await self._run(context, call_next, key, token)
            case InProgress(remaining):
                return look_again(remaining, self._lease)
            case AlreadyDone():
                return REPEATED
            case Conflict():
                return Dead(
                    "idempotency_conflict",
                    IdempotencyConflict(f"idempotency key {key!r} came before, with another body"),
                )

    async def _run(self, context: Context, call_next: Callable[[Context], Awaitable[Outcome]], key: str, token: str) -> Outcome:
        loop = asyncio.get_running_loop()
        renewal: list[asyncio.Task[None]] = []  # most handlers are done before a third of the lease is over: no task a message
        timer = loop.call_later(self._lease / 3, lambda: renewal.append(loop.create_task(self._renew(key, token))))
        try:
            outcome = await call_next(context)
        except BaseException:
            await self._abandon(key, token)
            raise
        finally:
            timer.cancel()
            for task in renewal:
                task.cancel()
        if not isinstance(outcome, Done | Dropped):
            await self._abandon(key, token)
            return outcome
        try:
            if not await self._store.complete(self._group, key, token, None, TTL):
                log.warning("%s: the claim on %r was lost while its handler ran: the effect may happen twice", self._group, key)
        except StoreError as error:  # the effect has happened: not acking would make it happen again for certain
            log.error("%s: the effect of %r is done but could not be remembered: %s", self._group, key, error)
        return outcome

    async def _renew(self, key: str, token: str) -> None:
        held = True
        while held:
            try:
                held = await self._store.renew(self._group, key, token, self._lease)
            except StoreError as error:
                log.warning("%s: the claim on %r could not be renewed: %s", self._group, key, error)
            await asyncio.sleep(self._lease / 3)

    async def _abandon(self, key: str, token: str) -> None:
        try:
            await self._store.abandon(self._group, key, token)
        except StoreError as error:  # the claim ends with its lease
            log.warning("%s: the claim on %r ends with its lease: %s", self._group, key, error)
