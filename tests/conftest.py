"""Tests on brokers: which broker a test is on, its server, and the end of a run, which says in a line a broker how it went.

A test says by `@pytest.mark.broker("redis")` which broker it needs, and has it by the fixture `running`. Where several processes run the
tests (`--dist loadgroup`) all tests of a broker are done by one of them: one after the other, so that each may stop the broker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from typing import NoReturn

import pytest
from tests import brokers

SUITE_ON_MEMORY = "test_memory.py"
"""Of `msgbus.testing`: it has no mark, being also the example of a third party's test file."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "broker(name): needs the broker of this name; the fixture `running` is it")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = broker_of(item)
        if name is not None:
            item.add_marker(pytest.mark.xdist_group(name))
            item.user_properties.append(("broker", name))


def broker_of(item: pytest.Item) -> str | None:
    """The name of the broker that a test is on."""
    mark = item.get_closest_marker("broker")
    if mark is None:
        return "memory" if item.path.name == SUITE_ON_MEMORY else None
    (name,) = mark.args
    return str(name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Starts the broker before the clock of the first test that needs it; what comes of it is told by the fixture."""
    name = broker_of(item)
    if name in brokers.RECIPES:
        with suppress(brokers.Unavailable):
            brokers.server(name)
    return (yield)


@pytest.fixture
def running(request: pytest.FixtureRequest) -> brokers.Server:
    """The broker that the test is marked with, running. Without it the test fails in CI, and is skipped elsewhere."""
    name = broker_of(request.node)
    assert name is not None, "a test that needs a broker is marked with its name: pytest.mark.broker"
    try:
        found = brokers.server(name)
    except brokers.Unavailable as why:
        missing(str(why))
    request.node.user_properties.append(("server", found.what))
    return found


def missing(why: str) -> NoReturn:
    """A test cannot be: no broker, or one that it would have to kill and may not."""
    if brokers.required():
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


# ------------------------------------------------------------------------------------------------------- the summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line a broker: passed, failed, and skipped with the reason."""
    reports = [report for kind in ("passed", "failed", "error", "skipped") for report in terminalreporter.stats.get(kind, ())]
    lines = list(by_broker([report for report in reports if isinstance(report, pytest.TestReport)]))
    if lines:
        terminalreporter.section("brokers")
    for line in lines:
        terminalreporter.write_line(line)


def by_broker(reports: list[pytest.TestReport]) -> Generator[str, None, None]:
    """How the tests of each broker went, in a line, or one more for each reason to skip."""
    told: dict[str, list[pytest.TestReport]] = {}
    servers: dict[str, str] = {}
    for report in reports:
        properties = dict(report.user_properties)
        if "broker" in properties:
            name = str(properties["broker"])
            told.setdefault(name, []).append(report)
            if "server" in properties:
                servers[name] = f" ({properties['server']})"
    for name, its in sorted(told.items()):
        passed = sum(report.passed and report.when == "call" for report in its)
        failed = len({report.nodeid for report in its if report.failed})
        skipped = Counter(reason(report) for report in its if report.skipped)
        yield f"{name}{servers.get(name, '')}: {passed} passed, {failed} failed, {skipped.total()} skipped"
        for why, count in sorted(skipped.items()):
            yield f"    {count} skipped: {why}"


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return "expected to fail"
