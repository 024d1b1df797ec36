"""Departures for tests of the example on flight data, the same ones every time."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from examples.flights.data import COLUMNS, Expected


def write(path: Path, rows: int) -> Expected:
    """Writes departures of 40 planes, of which some were cancelled, with or without a plane; what must become of them."""
    chance = random.Random(2013)
    expected = Expected(rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["year", *COLUMNS])
        for _ in range(rows):
            cancelled = chance.random() < 0.1
            delay = chance.randint(-10, 120)
            plane = "NA" if cancelled and chance.random() < 0.3 else f"N{chance.randint(100, 139)}"
            writer.writerow(
                [2013, chance.choice(["UA", "DL"]), chance.randint(1, 9999), plane, "JFK", "SEA"]
                + (["NA", ""] if cancelled else [chance.randint(1, 2400), delay])
            )
            expected.dead += cancelled
            expected.handled += not cancelled
            expected.late += not cancelled and delay > 60
    return expected
