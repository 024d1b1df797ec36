"""Where the torture runs, the figures it prints, and how it is asked for: `make torture`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable

import pytest
from tests.brokers import Server

from msgbus.contract.address import shard_of
from msgbus.testing.stage import Broker, Stage

NAMES = ("redis", "kafka", "rabbitmq")
ASKED = "MSGBUS_TEST_TORTURE"

_figures: list[tuple[str, str, str]] = []

Figure = Callable[[str, object], None]


if not os.environ.get(ASKED):
    collect_ignore_glob = ["test_*.py"]  # half an hour: `make test` is without it


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.broker(name)) for name in NAMES])
def name(request: pytest.FixtureRequest) -> str:
    """Of the broker."""
    return str(request.param)


@pytest.fixture
async def stage(name: str, request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """A stage on the broker; its namespace is the worker processes' too."""
    partition = shard_of
    if name == "kafka":
        from msgbus_kafka.records import partition_of as partition
    running: Server = request.getfixturevalue("running")
    stage = Stage(Broker(running.url, shard_of=partition))
    yield stage
    await stage.close()


@pytest.fixture
def figure(name: str, request: pytest.FixtureRequest) -> Figure:
    """Puts a figure into the table at the end."""

    def note(what: str, value: object) -> None:
        _figures.append((name, f"{request.node.originalname.removeprefix('test_')}: {what}", str(value)))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures, a measure a line and a broker a column."""
    if not _figures:
        return
    named = [name for name in NAMES if any(row[0] == name for row in _figures)]
    rows = list(dict.fromkeys(what for _, what, _ in _figures))
    table = [["", *named]] + [
        [what, *(", ".join(v for b, w, v in _figures if (b, w) == (broker, what)) for broker in named)] for what in rows
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    terminalreporter.section("figures")
    for row in table:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
