"""What may start now, in the order to start it: first come first served, or by weight where a topic has priorities."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from msgbus.contract.envelope import PRIORITIES, Priority

T = TypeVar("T")

WEIGHTS: dict[Priority, int] = {"high": 8, "normal": 4, "low": 1}
"""Shares of the running slots while every level has work: no level starves."""


class OneLevel(deque[T]):
    """First come, first served."""

    take = deque[T].popleft  # the next item, or IndexError; deque's own, so that it costs a message no call of ours

    def level(self, level: Priority) -> deque[T]:
        """Where what is ready on a level is appended."""
        return self

    def take_all(self) -> list[T]:
        """Empties it."""
        left = list(self)
        self.clear()
        return left


class ByWeight(Generic[T]):
    """Smooth weighted round-robin over the levels that have something: 8 high, 4 normal, 1 low of 13."""

    __slots__ = ("_credit", "_levels")

    def __init__(self) -> None:
        self._levels: dict[Priority, deque[T]] = {level: deque() for level in PRIORITIES}
        self._credit: dict[Priority, int] = dict.fromkeys(PRIORITIES, 0)

    def level(self, level: Priority) -> deque[T]:
        """Where what is ready on a level is appended."""
        return self._levels[level]

    def take(self) -> T:
        """The next item. IndexError when there is none."""
        total = 0
        best: Priority | None = None
        for level, items in self._levels.items():
            if items:
                total += WEIGHTS[level]
                self._credit[level] += WEIGHTS[level]
                if best is None or self._credit[level] > self._credit[best]:
                    best = level
            else:
                self._credit[level] = 0
        if best is None:
            raise IndexError("nothing is ready")
        self._credit[best] -= total
        return self._levels[best].popleft()

    def __len__(self) -> int:
        return sum(len(items) for items in self._levels.values())

    def take_all(self) -> list[T]:
        """Empties it."""
        left = [item for items in self._levels.values() for item in items]
        for items in self._levels.values():
            items.clear()
        return left


def share_of_window(level: Priority, window: int) -> int:
    """How much of a subscription's window one level may hold un-settled: by weight, at least one; together no more than it, from 3 on."""
    total = sum(WEIGHTS.values())
    normal, low = (max(1, window * WEIGHTS[other] // total) for other in ("normal", "low"))
    return {"high": max(1, window - normal - low), "normal": normal, "low": low}[level]
