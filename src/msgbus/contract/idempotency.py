"""What remembers which intended effects have happened: the idempotency store.

A key is (group, idempotency key); the namespace, if any, is part of the group that is handed in. All times are durations in seconds:
the store adds its own clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class New:
    """Nobody has it: run the handler. `token` proves the claim to `complete`, `renew` and `abandon`."""

    token: str


@dataclass(frozen=True, slots=True)
class InProgress:
    """Another delivery has it: do not run. Its claim ends in `remaining` seconds unless it is renewed."""

    remaining: float


@dataclass(frozen=True, slots=True)
class AlreadyDone:
    """The effect has happened: settle the delivery; `result` is what `complete` remembered."""

    result: bytes | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same key came with another payload: one of the two is a mistake; nothing is run."""


Claim = New | InProgress | AlreadyDone | Conflict


class IdempotencyStore(ABC):
    """Safe for concurrent use by the tasks of a process, and by processes where the store is shared.

    Every method may raise `StoreError` (nothing was changed, or it is unknown); the caller then does not run the handler.
    """

    @abstractmethod
    async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
        """Claims a key for `lease` seconds, atomically: of many callers at once, one gets `New`."""

    @abstractmethod
    async def complete(self, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
        """Remembers that the effect has happened, for `ttl` seconds. False: the token no longer holds the key; nothing changed."""

    @abstractmethod
    async def renew(self, group: str, key: str, token: str, lease: float) -> bool:
        """Holds a claim for `lease` seconds more from now. False: it is lost."""

    @abstractmethod
    async def abandon(self, group: str, key: str, token: str) -> bool:
        """Gives a claim up, so that the next `begin` gets `New`. False: the token no longer held it."""
