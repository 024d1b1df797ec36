"""MemoryStore: idempotency for one process. What it knows is gone with the process; it says so."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, IdempotencyStore, InProgress, New


@dataclass(slots=True)
class _Entry:
    fingerprint: str
    token: str | None
    """None: done."""
    until: float
    result: bytes | None = None


class MemoryStore(IdempotencyStore):
    """Remembers the newest `capacity` keys of this process, each for its time to live. Safe for use from several threads.

    Claims under way are never pushed out by newer keys, effects that are done may be: choose `capacity` above what can come again.
    """

    def __init__(self, capacity: int = 100_000, clock: Callable[[], float] = time.monotonic) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()

    async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
        now = self._clock()
        with self._lock:
            entry = self._entries.get((group, key))
            if entry is not None and entry.until > now:
                if entry.fingerprint != fingerprint:
                    return Conflict()
                if entry.token is None:
                    return AlreadyDone(entry.result)
                return InProgress(entry.until - now)
            token = uuid.uuid4().hex
            self._entries[group, key] = _Entry(fingerprint, token, now + lease)
            self._entries.move_to_end((group, key))
            self._make_room(now)
            return New(token)

    async def complete(self, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
        now = self._clock()
        with self._lock:
            entry = self._held(group, key, token)
            if entry is None:
                return False
            entry.token, entry.result, entry.until = None, result, now + ttl
            return True

    async def renew(self, group: str, key: str, token: str, lease: float) -> bool:
        now = self._clock()
        with self._lock:
            entry = self._held(group, key, token)
            if entry is None:
                return False
            entry.until = now + lease
            return True

    async def abandon(self, group: str, key: str, token: str) -> bool:
        with self._lock:
            if self._held(group, key, token) is None:
                return False
            del self._entries[group, key]
            return True

    def __len__(self) -> int:
        return len(self._entries)

    def _held(self, group: str, key: str, token: str) -> _Entry | None:
        entry = self._entries.get((group, key))
        return entry if entry is not None and entry.token == token else None

    def _make_room(self, now: float) -> None:
        """Forgets the oldest that are done, or whose time is over, beyond the capacity; looks at a few a call."""
        looked = 0
        while len(self._entries) > self._capacity and looked < 8:
            oldest = next(iter(self._entries))
            entry = self._entries[oldest]
            if entry.token is None or entry.until <= now:
                del self._entries[oldest]
            else:
                self._entries.move_to_end(oldest)
            looked += 1
