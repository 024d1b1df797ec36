"""Lanes: per-key order inside a process. One message of a key is out at a time; the rest wait behind it in the order they came."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Lanes(Generic[T]):
    """Pure bookkeeping: `enter` every keyed message, `leave` when it is finished."""

    __slots__ = ("_lanes",)

    def __init__(self) -> None:
        self._lanes: dict[str, deque[T] | None] = {}  # key → who waits; None: the lane is taken and nobody waits

    def enter(self, key: str, item: T) -> bool:
        """True: the lane was free and is the item's now. False: it waits, and `leave` will hand it out."""
        lanes = self._lanes
        if key not in lanes:
            lanes[key] = None
            return True
        waiting = lanes[key]
        if waiting is None:
            lanes[key] = deque((item,))
        else:
            waiting.append(item)
        return False

    def leave(self, key: str) -> T | None:
        """The item out on this lane is finished: the next one, which has the lane now, or None, and the lane is free."""
        waiting = self._lanes.get(key)
        if not waiting:
            self._lanes.pop(key, None)
            return None
        return waiting.popleft()

    def clear(self) -> list[T]:
        """Forgets all lanes; returns who waited."""
        left = [item for waiting in self._lanes.values() if waiting for item in waiting]
        self._lanes.clear()
        return left

    def __len__(self) -> int:
        """How many keys have something out."""
        return len(self._lanes)
