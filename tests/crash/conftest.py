"""Where the points are tried, and the table at the end: `make crash` fills it, and fails where a cell is empty."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.brokers import Server, Unavailable, server
from tests.conftest import missing, reason
from tests.crash.points import ASKED_FOR, PLACES, POINTS
from tests.crash.scene import Scene
from tests.unit.sql.databases import database

from msgbus.testing.stage import Broker, Stage

Came = Callable[[str], None]

_cells: dict[tuple[str, str], str] = {}
_seconds: dict[tuple[str, str], float] = {}


def _name(place: tuple[str, str]) -> str:
    return "-".join(place)


@pytest.fixture(
    params=[pytest.param(place, id=_name(place), marks=pytest.mark.broker(place[1])) for place in (PLACES if ASKED_FOR else PLACES[:1])]
)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Database and broker."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
async def scene(place: tuple[str, str], running: Server, tmp_path: Path) -> AsyncIterator[Scene]:
    """Tables, a namespace, and everything that is stored on the broker under it, on one place."""
    try:
        redis = server("redis").url
    except Unavailable as why:
        missing(str(why))
    stage = Stage(Broker(running.url))
    found = database(place[0], tmp_path)
    if place[0] == "sqlite":  # seconds that a statement waits for a lock
        found = replace(found, url=found.url.update_query_dict({"timeout": "0.2"}))
    try:
        async with Scene(stage, found, place, tmp_path, redis) as made:
            yield made
    finally:
        await stage.close()
        found.drop()


@pytest.fixture
def came(request: pytest.FixtureRequest) -> Came:
    """Says in a few words what came of the point here, for the table."""

    def note(words: str) -> None:
        request.node.user_properties.append(("came", words))

    return note


# ------------------------------------------------------------ the table


def _cell(nodeid: str) -> tuple[str, str] | None:
    """Point and place of a test, where it is one of the fourteen: `test_p1...[postgresql-redis]`."""
    name, _, place = nodeid.rpartition("::")[2].rstrip("]").partition("[")
    point = name.split("_")[1].upper() if name.count("_") else ""
    return (point, place) if point in POINTS and place in map(_name, PLACES) else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cell = _cell(report.nodeid) if "tests/crash/" in report.nodeid else None
    if cell is None:
        return
    _seconds[cell] = _seconds.get(cell, 0.0) + report.duration
    if report.failed:
        _cells[cell] = "FAILED"
    elif report.skipped:
        _cells[cell] = f"not run: {reason(report)}"
    elif report.when == "call":
        _cells[cell] = str(dict(report.user_properties)["came"])


def _whole() -> bool:
    """Whether every cell has passed."""
    return all((point, _name(place)) in _seconds and _passed(_cells[point, _name(place)]) for point in POINTS for place in PLACES)


def _passed(words: str) -> bool:
    return words != "FAILED" and not words.startswith("not run")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that was asked to fill the table has failed where it did not."""
    if ASKED_FOR and not session.config.option.collectonly and session.exitstatus == 0 and not _whole():
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A point a row, a place a column: what came of it, and the seconds that it took."""
    if not _cells:
        return
    names = list(map(_name, PLACES)) if ASKED_FOR else [_name(PLACES[0])]
    rows = [["", *names]]
    missed: dict[str, None] = {}
    for point in POINTS:
        row = [point]
        for name in names:
            words = _cells.get((point, name), "not run: it was left out")
            head, _, why = words.partition(": ")
            if head == "not run":
                missed[f"{name}: {why}"] = None
                words = head
            seconds = _seconds.get((point, name))
            row.append(words if seconds is None else f"{words} {seconds:.1f} s")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    terminalreporter.section("crash points")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in missed:
        terminalreporter.write_line(f"not run on {line}")
    passed = sum(_passed(words) for words in _cells.values())
    terminalreporter.write_line(f"{passed} of {len(POINTS) * len(names)} as they must be")
