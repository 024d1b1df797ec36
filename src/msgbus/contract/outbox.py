"""What a store gives beyond idempotency so that effects happen exactly once: transactions, an inbox, an outbox, and a relay's view of it.

A row of the outbox is an envelope that a transaction has stored and a relay is to send. Each belongs to a shard, with all others of its
key; a relay that has a shard's lease is the only one that sends its rows, those of a key in the order of their ids. All times are
durations in seconds: the store adds its database's clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus.contract.idempotency import Claim, IdempotencyStore


@dataclass(frozen=True, slots=True)
class NewRow:
    """What is written: `envelope.delay` becomes the row's due time. `topic` says how the relay declares its topic."""

    envelope: Envelope
    topic: TopicSpec


@dataclass(frozen=True, slots=True)
class Row:
    """A row that is due. `attempts`: how often the broker has refused it."""

    id: int
    envelope: Envelope
    topic: TopicSpec
    attempts: int
    expired: bool = False
    """Its `expires_at` is over: it is not to be sent any more."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """Rows that are this relay's to send until the lease is over, by their ids. None: nothing is claimed, nothing to settle."""

    token: str
    rows: Sequence[Row] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row was not sent, and after how many seconds it is due again. None: never by itself, it is parked."""

    error: str
    after: float | None


NOBODY = 30.0
"""Seconds that a row may be due, with no relay at work, until it is said that nobody relays: a relay looks every second."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What health asks of an outbox."""

    parked: int
    oldest: float | None
    """How many seconds the longest overdue row has been waiting; None: none is due."""
    idle: float | None
    """How many seconds ago a relay, of any process, last had rows in its hands; 0: one has some now; None: none ever had."""

    def problems(self) -> list[str]:
        """What somebody should look at, a line each."""
        found: list[str] = []
        if self.oldest is not None and self.oldest > NOBODY and (self.idle is None or self.idle > NOBODY):
            last = "none ever has" if self.idle is None else f"the last one did {self.idle:.0f} s ago"
            found.append(
                f"nobody relays this store: a row is due for {self.oldest:.0f} s, and no relay takes any ({last}): "
                "run `msgbus outbox relay`, or the bus with run() or running()"
            )
        if self.parked:
            found.append(f"{self.parked} messages are parked: msgbus outbox status shows them")
        return found


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """How many rows there are, and what `glance` tells. `due`, `delayed` and `parked` rows are not sent, `sent` ones are kept a while."""

    due: int
    delayed: int
    parked: int
    sent: int
    oldest: float | None
    idle: float | None
    problems: Sequence[str] = ()
    parked_rows: Sequence[Mapping[str, object]] = ()
    """The oldest parked rows: id, message_id, topic, key, attempts, last_error."""


class Writes(ABC):
    """A transaction that somebody else ends."""

    @abstractmethod
    async def insert(self, rows: Sequence[NewRow]) -> None:
        """Stores rows by one statement; an id that is there already is left as it is. Never commits or flushes. Raises `OutboxError`."""


class SyncWrites(ABC):
    """As `Writes`, of a synchronous session."""

    @abstractmethod
    def insert(self, rows: Sequence[NewRow]) -> None:
        """As `Writes.insert`."""


class Transaction(Writes):
    """The transaction of one run of a handler. Ended without `commit`, it is rolled back."""

    session: object
    """What the handler is given."""

    @abstractmethod
    async def remember(self, group: str, key: str, fingerprint: str, ttl: float) -> Claim:
        """The first statement: the inbox row. `New`: the effect is this transaction's. Raises `StoreError`."""

    @abstractmethod
    async def commit(self) -> None:
        """Raises `StoreError`: whether it was committed may then be unknown; the inbox knows when the message comes again."""


class TransactionalStore(IdempotencyStore):
    """Inbox, outbox and idempotency in one database, safe for the use of many processes at once."""

    @abstractmethod
    async def open(self) -> None:
        """Checks that the tables are there; makes them only where it was told so.

        Raises `ConfigurationError` for what is missing, `StoreError` where the database is away.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends the connections that nobody uses, for a program that ends. It can be used again afterwards."""

    @abstractmethod
    def refuses_handler(self, concurrency: int, *, is_async: bool) -> str | None:
        """Why so many handlers at once cannot have a session each; None: they can. No I/O."""

    @abstractmethod
    def transaction(self, *, is_async: bool) -> AbstractAsyncContextManager[Transaction]:
        """A transaction with a session for an async handler, or for one in a thread. Entering raises `StoreError`."""

    @abstractmethod
    def writes_to(self, session: object) -> Writes | SyncWrites:
        """The user's own transaction. Raises `OutboxError`: not active, another database, or no session at all. No I/O."""

    @abstractmethod
    def worth_repeating(self, error: BaseException) -> bool:
        """Whether the database only asks for the transaction to be run again: a deadlock, a serialisation failure, a lock not got."""

    @abstractmethod
    def wake(self) -> None:
        """Rows were committed: the relays of this process look at once. From any thread."""

    # ------------------------------------------------------------ a relay's view

    @abstractmethod
    def listen(self, wake: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Calls `wake` on its event loop as soon as rows are known to be committed. Only a hint: what it misses, polling finds."""

    @abstractmethod
    async def claim(self, limit: int, lease: float) -> Claimed:
        """Due rows for `lease` seconds, at most about `limit`; of a key none behind one that is parked or waits for another try.

        Raises `StoreError`.
        """

    @abstractmethod
    async def settle(self, claimed: Claimed, sent: Sequence[int], refused: Mapping[int, Refusal]) -> int:
        """Marks what became of rows, by id, and gives all others and the shards back; how many were no longer this relay's.

        Raises `StoreError`: nothing is marked, and the lease's end gives everything back.
        """

    @abstractmethod
    async def clean(self, keep: float) -> int:
        """Deletes a bounded number of rows sent more than `keep` seconds ago, and of inbox rows whose time is over; how many."""

    @abstractmethod
    async def glance(self) -> Glance:
        """What health asks now and then. It costs the same however many rows were sent. Raises `StoreError`, as do those below."""

    @abstractmethod
    async def status(self, limit: int = 10) -> OutboxStatus:
        """Counts the rows, and shows at most `limit` parked ones."""

    @abstractmethod
    async def retry(self, ids: Sequence[int] | None = None) -> int:
        """Makes parked rows due again, with no attempts counted: those of these ids, or all; how many."""

    @abstractmethod
    async def problems(self) -> list[str]:
        """What the live schema lacks, a line each; empty: nothing."""
