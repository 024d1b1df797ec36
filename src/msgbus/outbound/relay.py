"""Relay: sends the outbox's due rows, any number of relays side by side. No transaction is open while it publishes.

What may have been sent and could not be marked is sent again, with the same id. Rows of a key are sent one after the other, each after
the confirm of the one before, so that a key's order is that of its rows, whatever fails.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from msgbus.contract.adapter import SendOutcome, TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus.contract.outbox import Claimed, Refusal, Row, TransactionalStore
from msgbus.errors import BrokerError, ConfigurationError, MessageError, PublishRejected, StoreError

log = logging.getLogger("msgbus")

BATCH = 500
"""Rows that one claim takes at most."""
ATTEMPTS = 10
"""How often the broker may refuse a row until it is parked."""
FIRST_POLL, LONGEST_POLL = 0.2, 1.0
"""Seconds between two looks while nothing is due and nobody wakes it."""
LONGEST_PAUSE = 5.0
"""Seconds between two tries, at most, while the database or the broker is away."""
KEEP = 86400.0
"""Seconds that a sent row is kept."""
CARE = 60.0
"""Seconds between two cleanings."""

Deliver = Callable[[Sequence[Envelope], float], Awaitable[list[SendOutcome]]]
"""Envelopes and a deadline of the loop's clock → an outcome each."""


class Relay:
    """One process's relay. `run` until `stop`; everything is on one event loop."""

    def __init__(
        self,
        store: TransactionalStore,
        deliver: Deliver,
        declare: Callable[[TopicSpec], Awaitable[None]],
        *,
        publish_timeout: float,
        lease: float,
    ) -> None:
        self.problem: str | None = None
        """What keeps rows from being sent just now."""
        self.parked = 0
        """Rows that wait for a person, when last counted."""
        self.sent = 0
        """Rows sent by this relay."""
        self._store = store
        self._deliver = deliver
        self._declare = declare
        self._known: set[tuple[object, ...]] = set()
        self._publish_timeout = publish_timeout
        self._lease = lease
        self._loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()
        self._stopping = False
        self._care_at = self._loop.time()

    def stop(self) -> None:
        """`run` returns once the rows under way are settled. Twice is once."""
        self._stopping = True
        self._awake.set()

    def problems(self) -> list[str]:
        """What health says."""
        found = [] if self.problem is None else [f"outbox: {self.problem}"]
        return found + ([f"outbox: {self.parked} messages are parked: msgbus outbox status shows them"] if self.parked else [])

    async def run(self) -> None:
        """Sends what is due until `stop`, through outages of database and broker. Raises only what is a bug."""
        pause = FIRST_POLL
        async with self._store.listen(self._awake.set):
            while not self._stopping:
                self._awake.clear()
                try:
                    settled = await self.round()
                    if not settled:
                        await self._care()
                except StoreError as error:
                    self._note(f"the database is away: {error}")
                    settled = 0
                if settled:
                    pause = FIRST_POLL
                    continue
                away = self.problem is not None
                await self._wait(pause * random.uniform(0.7, 1.0), wakes=not away)
                pause = min(pause * 2, LONGEST_PAUSE if away else LONGEST_POLL)

    async def round(self) -> int:
        """Claims rows, sends them and settles them; how many were sent or refused. Raises `StoreError`."""
        began = self._loop.time()
        claimed = await self._store.claim(BATCH, self._lease)
        if not claimed.rows and not claimed.shards:
            self._note(None)
            return 0
        sent: list[int] = []
        refused: dict[int, Refusal] = {}
        try:
            await self._send(claimed.rows, began + min(self._publish_timeout, self._lease / 3), sent, refused)
        finally:
            await self._settle(claimed, sent, refused, began + self._lease)
        return len(sent) + len(refused)

    # ------------------------------------------------------------ sending

    async def _send(self, rows: Sequence[Row], deadline: float, sent: list[int], refused: dict[int, Refusal]) -> None:
        """Sends the rows in waves: of each key one at a time. Notes what became of them; what is in neither list is still due."""
        problem: str | None = None
        lanes: dict[tuple[str, str | int], deque[Row]] = {}
        for row in rows:
            lanes.setdefault(_lane(row), deque()).append(row)
        while lanes and self._loop.time() < deadline:
            wave: list[Row] = []
            for place, waiting in list(lanes.items()):
                while waiting and waiting[0].expired:
                    sent.append(waiting.popleft().id)
                if not waiting:
                    del lanes[place]
                    continue
                try:
                    await self._know(waiting[0].topic)
                except (BrokerError, ConfigurationError) as error:
                    problem = self._judge(waiting[0], error, refused) or problem
                    del lanes[place]
                    continue
                wave.append(waiting.popleft())
            if not wave:
                continue
            for row, outcome in zip(wave, await self._deliver([row.envelope for row in wave], deadline), strict=True):
                if outcome is None:
                    sent.append(row.id)
                    self.sent += 1
                else:
                    problem = self._judge(row, outcome, refused) or problem
                    del lanes[_lane(row)]
        self._note(problem)

    async def _know(self, topic: TopicSpec) -> None:
        """Declares a topic, once."""
        marker = topic.name, topic.keyed, topic.shards, topic.priorities, topic.retain
        if marker not in self._known:
            await self._declare(topic)
            self._known.add(marker)

    def _judge(self, row: Row, error: BaseException, refused: dict[int, Refusal]) -> str | None:
        """Counts a refusal. What says nothing of the row itself leaves it due, and is returned: the broker's trouble."""
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, PublishRejected | ConfigurationError | MessageError):
            final = isinstance(error, MessageError) or row.attempts + 1 >= ATTEMPTS
            refused[row.id] = Refusal(said, None if final else min(300.0, 2.0**row.attempts) * random.uniform(0.5, 1.0))
            log.log(
                logging.ERROR if final else logging.WARNING,
                "outbox: message %r of topic %r was refused, %s: %s",
                row.envelope.id,
                row.envelope.topic,
                "and is parked" if final else "and waits for another try",
                said,
            )
            return None
        if isinstance(error, BrokerError):
            return f"the broker: {error}"
        raise error

    # ------------------------------------------------------------ the database

    async def _settle(self, claimed: Claimed, sent: Sequence[int], refused: dict[int, Refusal], until: float) -> None:
        """Marks what was done, while the lease lasts: what is not marked would be sent again."""
        pause = 0.05
        while True:
            try:
                lost = await self._store.settle(claimed, sent, refused)
            except StoreError:
                if self._loop.time() + pause > until or self._stopping:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if lost:
                log.warning("outbox: %d rows were no longer this relay's when they were done: they may be sent twice", lost)
            if any(refusal.after is None for refusal in refused.values()):
                self._care_at = self._loop.time()
            return

    async def _care(self) -> None:
        """Deletes what is over, a chunk a time, and counts what is parked."""
        now = self._loop.time()
        if now < self._care_at:
            return
        if await self._store.clean(KEEP):
            return
        self.parked = (await self._store.status(0)).parked
        self._care_at = now + CARE * random.uniform(0.8, 1.2)

    # ------------------------------------------------------------ inside

    def _note(self, problem: str | None) -> None:
        if (problem is None) != (self.problem is None):
            log.log(logging.INFO if problem is None else logging.WARNING, "outbox: %s", problem or "rows are sent again")
        self.problem = problem

    async def _wait(self, seconds: float, *, wakes: bool) -> None:
        """Until somebody wakes it, or the time is over. While something is away only a stop wakes it."""
        deadline = self._loop.time() + seconds
        while not self._stopping:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._awake.wait()
            except TimeoutError:
                return
            if wakes:
                return
            self._awake.clear()


def _lane(row: Row) -> tuple[str, str | int]:
    """What must be sent one after the other: the rows of a topic's key; a row without a key is alone."""
    return row.envelope.topic, row.id if row.envelope.key is None else row.envelope.key
