"""What the handlers find out. A broker may deliver a message again, so everything here counts a departure once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from examples.flights.data import LATE


class Seen:
    """Which numbers have come: one byte each."""

    def __init__(self) -> None:
        self.count = 0
        """Different numbers."""
        self.again = 0
        """Repetitions."""
        self._seen = bytearray()

    def first_time(self, number: int) -> bool:
        """Notes a number; False when it has come before."""
        missing = number + 1 - len(self._seen)
        if missing > 0:
            self._seen.extend(bytes(max(missing, len(self._seen))))
        if self._seen[number]:
            self.again += 1
            return False
        self._seen[number] = 1
        self.count += 1
        return True


@dataclass
class Carrier:
    """How punctual a carrier is."""

    flights: int = 0
    minutes: int = 0
    late: int = 0

    def add(self, delay: int) -> None:
        """One more departure, so many minutes behind its schedule."""
        self.flights += 1
        self.minutes += delay
        self.late += delay > LATE


class Planes:
    """Where each plane stands in the order of its departures."""

    def __init__(self) -> None:
        self.out_of_order = 0
        """Departures that came after a later one of the same plane."""
        self._last: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._last)

    def departed(self, plane: str, number: int) -> None:
        """The next departure of a plane."""
        last = self._last.get(plane, -1)
        self.out_of_order += number < last
        self._last[plane] = max(number, last)


@dataclass
class Results:
    """What the three groups have found so far."""

    punctuality: Seen = field(default_factory=Seen)
    rotation: Seen = field(default_factory=Seen)
    alerts: Seen = field(default_factory=Seen)
    carriers: defaultdict[str, Carrier] = field(default_factory=lambda: defaultdict(Carrier))
    planes: Planes = field(default_factory=Planes)

    def handled(self) -> dict[str, Seen]:
        """What each group has handled, by the group's name."""
        return {"punctuality": self.punctuality, "rotation": self.rotation, "alerts": self.alerts}
