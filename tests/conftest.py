"""Tests on brokers: which broker a test is on, its server, and the end of a run, which says in a line a broker how it went.

A test says by `@pytest.mark.broker("redis")` which broker it needs, and has it by the fixture `running`. The tests of a broker run one
after the other, so that each may stop it; `--house` chooses brokers, for several processes that run beside each other.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import NoReturn

import pytest
from tests import brokers
from tests.differential.seed import draw_seed, seed_of

SUITE_ON_MEMORY = "test_memory.py"
"""Of `msgbus.testing`: it has no mark, being also the example of a third party's test file."""
HOUSES = ("here", "redis", "rabbitmq", "kafka")
"""What may run side by side: a process for each. `here` has what needs no broker."""
HOUSE = {
    "memory": "here",
    "postgres": "here",
    "mysql": "here",
    "valkey": "redis",
    "redis-packaged": "redis",
    "redis-tls": "redis",
    "redis-sentinel": "redis",
    "redis-cluster": "redis",
    "rabbitmq-packaged": "rabbitmq",
    "rabbitmq-secure": "rabbitmq",
    "kafka-secure": "kafka",
}
"""Of a broker, where it has none of its own name."""
SUMMARY = "MSGBUS_TEST_SUMMARY"
"""Names a file that the lines of the summary are added to, for who runs several processes."""


OLDER = {"redis": ("redis-packaged", "valkey"), "rabbitmq": ("rabbitmq-packaged",)}
"""Where the tests that a module lists in `VERSIONED` run as well: those whose code asks which version it has before it."""


TIMED = {f"msgbus.testing.suite_{part}" for part in ("consuming", "lifecycle", "operating", "ordering", "retrying")}
"""Parts of the suite whose tests depend on time; `make repeat` runs them again and again."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--house", choices=HOUSES, help="only the tests that are done in this process when several run side by side")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "broker(name): needs the broker of this name; the fixture `running` is it")
    config.addinivalue_line("markers", "timed: of the suite, and depends on time")
    draw_seed(config)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's way with what it starts in the background; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs what a module lists in `VERSIONED` on its broker and on the older ones."""
    versioned: Iterable[str] = getattr(metafunc.module, "VERSIONED", ())
    unknown = [name for name in versioned if not hasattr(metafunc.module, name)]
    assert not unknown, f"VERSIONED of {metafunc.module.__name__} names what is no test: {unknown}"
    if metafunc.function.__name__ in versioned:
        mark = metafunc.definition.get_closest_marker("broker")
        assert mark is not None, f"{metafunc.module.__name__} has VERSIONED and no mark that names its broker"
        (name,) = mark.args
        each = [pytest.param(one, marks=pytest.mark.broker(one)) for one in (name, *OLDER[name])]
        metafunc.parametrize("running", each, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        name = broker_of(item)
        if name is not None:
            item.user_properties.append(("broker", name))
        if isinstance(item, pytest.Function) and item.function.__module__ in TIMED:
            item.add_marker("timed")
    house = config.getoption("--house")
    if house is not None:
        others = [item for item in items if house_of(item) != house]
        items[:] = [item for item in items if house_of(item) == house]
        config.hook.pytest_deselected(items=others)


def house_of(item: pytest.Item) -> str:
    """Which process runs a test when several do."""
    name = broker_of(item)
    return "here" if name is None else HOUSE.get(name, name)


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A line a broker: passed, failed, and skipped with the reason; and how to have the same random programs again."""
    reports = [report for kind in ("passed", "failed", "error", "skipped") for report in terminalreporter.stats.get(kind, ())]
    lines = list(by_broker([report for report in reports if isinstance(report, pytest.TestReport)]))
    if lines:
        terminalreporter.section("brokers")
    for line in lines:
        terminalreporter.write_line(line)
    if SUMMARY in os.environ:
        with open(os.environ[SUMMARY], "a", encoding="utf-8") as summary:
            summary.writelines(f"{line}\n" for line in lines)
    if any(report.nodeid.startswith("tests/differential/") for report in reports):
        seed = seed_of(config)
        terminalreporter.write_line(
            f"differential: seed {seed} (the same programs again: make differential SEED={seed}, or --hypothesis-seed)"
        )


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
