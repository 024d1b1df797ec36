"""Watch: looks now and then at an outbox, for health: what is parked, and whether any relay sends its rows. Whoever relays it."""

from __future__ import annotations

import asyncio
import logging

from msgbus.contract.outbox import TransactionalStore
from msgbus.errors import StoreError

log = logging.getLogger("msgbus")

INTERVAL = 5.0
"""Seconds between two looks."""


class Watch:
    """Of one process. `run` until it is cancelled."""

    def __init__(self, store: TransactionalStore) -> None:
        self.problems: tuple[str, ...] = ()
        """What health says of the outbox."""
        self._store = store

    async def run(self) -> None:
        """Until cancelled. The first look comes after a while, when who is to relay has begun."""
        while True:
            await asyncio.sleep(INTERVAL)
            await self.look()

    async def look(self) -> None:
        """One look. A problem is logged when it is new."""
        try:
            found = (await self._store.glance()).problems()
        except StoreError as error:
            found = [f"the database is away, or lacks the tables: {error}"]
        problems = tuple(f"outbox: {problem}" for problem in found)
        if bool(problems) != bool(self.problems):
            log.log(logging.WARNING if problems else logging.INFO, "%s", "; ".join(problems) or "outbox: rows are sent, and none is parked")
        self.problems = problems
