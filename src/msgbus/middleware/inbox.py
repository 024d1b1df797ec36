"""The inbox: a handler's transaction, with the row that says its effect has happened first in it. Innermost, around decode and call."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable

from msgbus.context import Context
from msgbus.contract.idempotency import AlreadyDone, Conflict, InProgress
from msgbus.contract.outbox import Transaction, TransactionalStore, Writes
from msgbus.contract.outcome import REPEATED, Dead, Done, Dropped, Outcome, RetryAfter
from msgbus.errors import IdempotencyConflict, StoreError
from msgbus.middleware.base import Middleware
from msgbus.middleware.idempotency import STORE_AWAY, TTL, look_again
from msgbus.publishing import Publishes

TRIES = 5
"""How often a handler is run, uncounted, because its database asks for the transaction again (a deadlock, a serialisation failure)."""


class Inbox(Middleware):
    """Effect exactly once: the inbox row, what the handler writes by its session, and what it publishes are one transaction.

    Committed when the handler is done or drops the message, rolled back otherwise. Fails closed: while the database is away nothing is run.
    """

    def __init__(
        self, store: TransactionalStore, group: str, lease: float, *, is_async: bool, publisher: Callable[[Writes], Publishes]
    ) -> None:
        self._store = store
        self._group = group
        self._lease = lease
        self._is_async = is_async
        self._publisher = publisher

    async def consume(self, context: Context, call_next: Callable[[Context], Awaitable[Outcome]], /) -> Outcome:
        """Runs the handler in a transaction of its own, unless the inbox knows the message."""
        tries = 1
        while True:
            try:
                async with self._store.transaction(is_async=self._is_async) as transaction:
                    return await self._in(transaction, context, call_next)
            except Exception as error:
                if not self._store.worth_repeating(error):
                    if isinstance(error, _Away):
                        return RetryAfter(STORE_AWAY * random.uniform(0.5, 1.5), error.__cause__, counted=False)
                    raise
                if tries == TRIES:
                    if isinstance(error, _Away):
                        return RetryAfter(random.uniform(0.1, 1.0), error.__cause__, counted=False)
                    raise
            await asyncio.sleep(random.uniform(0, 0.01 * 4**tries))
            tries += 1

    async def _in(self, transaction: Transaction, context: Context, call_next: Callable[[Context], Awaitable[Outcome]]) -> Outcome:
        key = context.idempotency_key
        fingerprint = hashlib.sha256(context.envelope.body).hexdigest()
        try:
            claim = await transaction.remember(self._group, key, fingerprint, TTL)
        except StoreError as error:
            raise _Away from error
        match claim:
            case InProgress(remaining):
                return look_again(remaining, self._lease)
            case AlreadyDone():
                return REPEATED
            case Conflict():
                return Dead("idempotency_conflict", IdempotencyConflict(f"idempotency key {key!r} came before, with another body"))
            case _:
                pass
        outcome = await call_next(context.within(transaction.session, self._publisher(transaction)))
        if isinstance(outcome, Done | Dropped):
            try:
                await transaction.commit()
            except StoreError as error:  # perhaps committed: the inbox knows when the message comes again
                raise _Away from error
        return outcome


class _Away(Exception):
    """The store's own failure, which is no failure of the handler; its cause says which."""
