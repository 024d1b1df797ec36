"""Relay: sends the outbox's due rows, any number of relays side by side. No transaction is open while it publishes.

What may have been sent and could not be marked is sent again, with the same id. Rows of a key are sent one after the other, each after
the confirm of the one before, so that a key's order is that of its rows, whatever fails.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from msgbus.contract.adapter import SendOutcome, TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus.contract.outbox import Claimed, Refusal, Row, TransactionalStore
from msgbus.errors import BrokerError, ConfigurationError, MessageError, PublishRejected, StoreError

log = logging.getLogger("msgbus")

BATCH = 1000
"""Rows that one claim takes at most."""
MUCH = BATCH // 2
"""After so many rows there are more."""
STREAMS = 2
"""Batches that a relay has under way where there is much to send."""
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
MORE_CARE = 0.5
"""Seconds between two of their chunks."""

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
        self.sent = 0
        """Rows sent by this relay."""
        self._store = store
        self._deliver = deliver
        self._declare = declare
        self._declared: dict[str, TopicSpec] = {}
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

    async def run(self) -> None:
        """Sends what is due until `stop`, through outages of database and broker. Raises only what is a bug."""
        pause = FIRST_POLL
        async with self._store.listen(self._awake.set):
            while not self._stopping:
                self._awake.clear()
                settled = await self._try(self.round)
                if settled >= MUCH:
                    async with asyncio.TaskGroup() as streams:
                        for _ in range(STREAMS):
                            streams.create_task(self._stream())
                if self._loop.time() >= self._care_at:
                    await self._try(self._care)
                if settled:
                    pause = FIRST_POLL
                    continue
                away = self.problem is not None
                await self._wait(pause * random.uniform(0.7, 1.0), wakes=not away)
                pause = min(pause * 2, LONGEST_PAUSE if away else LONGEST_POLL)

    async def _stream(self) -> None:
        """Rounds for as long as there is much to send. Two streams side by side: one reads and marks rows while the other sends."""
        while not self._stopping and await self._try(self.round) >= MUCH:
            pass

    async def _try(self, work: Callable[[], Awaitable[int]]) -> int:
        """What it returns; 0 while the database is away."""
        try:
            return await work()
        except StoreError as error:
            self._note(f"the database is away: {error}")
            return 0

    async def round(self) -> int:
        """Claims rows, sends them and settles them; how many were sent or refused. Raises `StoreError`."""
        began = self._loop.time()
        claimed = await self._store.claim(BATCH, self._lease)
        if not claimed.rows:
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
        stuck: set[tuple[str, str | None]] = set()  # keys whose next row did not go through: what follows it waits
        undeclared: dict[str, BrokerError | ConfigurationError] = {}
        latest = deadline - (deadline - self._loop.time()) / 3  # what is sent with hardly any time left is unknown, and sent twice
        for wave in _waves(rows, sent):
            if self._loop.time() >= latest:
                break
            going: list[Row] = []
            for row in wave:
                if stuck and row.envelope.key is not None and (row.envelope.topic, row.envelope.key) in stuck:
                    continue
                if self._declared.get(row.topic.name) is not row.topic:
                    await self._know(row.topic, undeclared)
                    if row.topic.name in undeclared:
                        problem = self._judge(row, undeclared[row.topic.name], refused) or problem
                        stuck.add((row.envelope.topic, row.envelope.key))
                        continue
                going.append(row)
            if not going:
                continue
            if self._loop.time() >= latest:  # declaring took it; the next round need not
                break
            for row, outcome in zip(going, await self._deliver([row.envelope for row in going], deadline), strict=True):
                if outcome is None:
                    sent.append(row.id)
                    self.sent += 1
                else:
                    problem = self._judge(row, outcome, refused) or problem
                    stuck.add((row.envelope.topic, row.envelope.key))
        self._note(problem)

    async def _know(self, topic: TopicSpec, undeclared: dict[str, BrokerError | ConfigurationError]) -> None:
        """Declares a topic, unless it is as it was the last time. Notes why it could not be."""
        if topic.name not in undeclared and self._declared.get(topic.name) != topic:
            try:
                await self._declare(topic)
            except (BrokerError, ConfigurationError) as error:
                undeclared[topic.name] = error
                return
        self._declared[topic.name] = topic

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
            except StoreError as error:
                if self._loop.time() + pause > until or self._stopping:
                    raise
                self._note(f"the database is away: {error}")
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if lost:
                log.warning("outbox: %d rows were no longer this relay's when they were done: they may be sent twice", lost)
            return

    async def _care(self) -> int:
        """Deletes what is over, a chunk a time; how many rows."""
        deleted = await self._store.clean(KEEP)
        self._care_at = self._loop.time() + (MORE_CARE if deleted else CARE * random.uniform(0.8, 1.2))
        return deleted

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


def _waves(rows: Sequence[Row], expired: list[int]) -> list[list[Row]]:
    """What may be sent together, in order: the first row of each key and all without one, then the second of each key, and so on.

    What is not to be sent any more goes to `expired`.
    """
    waves: list[list[Row]] = [[]]
    before: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.expired:
            expired.append(row.id)
        elif row.envelope.key is None:
            waves[0].append(row)
        else:
            lane = row.envelope.topic, row.envelope.key
            number = before[lane] = before.get(lane, -1) + 1
            if number == len(waves):
                waves.append([])
            waves[number].append(row)
    return waves
