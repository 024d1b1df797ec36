"""`msgbus run`: what it opens with, how it ends, and what it exits with. A process of its own each time, as in production."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.unit.cli.conftest import Invoke, Write

DEADLINE = 30.0

AT_WORK = """
    import asyncio
    import pathlib
    from contextlib import asynccontextmanager
    from pydantic import BaseModel
    from msgbus import Bus, Topic

    here = pathlib.Path(__file__).parent

    class Order(BaseModel):
        number: int

    orders = Topic("orders", Order)

    @asynccontextmanager
    async def lifespan(bus):
        await bus.publish(orders, Order(number=1))
        yield
        (here / "lifespan-left").touch()

    bus = Bus(service="billing", lifespan=lifespan)

    @bus.subscribe(orders)
    async def invoice(order: Order) -> None:
        (here / "started").touch()
        for _ in range(1000):
            if (here / "go-on").exists():
                break
            await asyncio.sleep(0.01)
        (here / "finished").touch()
"""

BUG = """
    from contextlib import asynccontextmanager
    from msgbus import Bus, Topic
    from msgbus_memory import MemoryAdapter

    class Broken(MemoryAdapter):
        async def open_receiver(self, spec):
            raise RuntimeError("a bug of the adapter")

    bus = Bus(service="billing", adapter=Broken())

    @bus.subscribe(Topic("orders", dict))
    async def invoice(order: dict) -> None: ...
"""

AWAY = """
    from msgbus import Bus, Topic
    from msgbus.errors import BrokerUnavailable
    from msgbus_memory import MemoryAdapter

    class Away(MemoryAdapter):
        async def open(self):
            raise BrokerUnavailable("nobody answers at broker.example:5672")

    bus = Bus(service="billing", adapter=Away())

    @bus.subscribe(Topic("orders", dict))
    async def invoice(order: dict) -> None: ...
"""

LIFESPAN = """
    from contextlib import asynccontextmanager
    from msgbus import Bus, Topic

    @asynccontextmanager
    async def lifespan(bus):
        raise RuntimeError("no database")
        yield

    bus = Bus(service="billing", lifespan=lifespan)

    @bus.subscribe(Topic("orders", dict))
    async def invoice(order: dict) -> None: ...
"""


@contextmanager
def running(*arguments: str, here: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process that does not outlive the test."""
    command = [sys.executable, "-m", "msgbus", "run", *arguments]
    environment = {**os.environ, "COLUMNS": "140", **variables}
    with subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number: signal.Signals, here: Path, write: Write) -> None:
    """The handler that runs may finish, the lifespan is left, and what ran was told at the start on stdout; words are on stderr."""
    write("app", AT_WORK)
    with running("app:bus", "--url", "memory://", here=here) as process:
        wait_for(here / "started")
        process.send_signal(number)
        (here / "go-on").touch()
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert (here / "finished").exists()
    assert (here / "lifespan-left").exists()
    lines = out.splitlines()  # stdout is no terminal: a line for each thing, no tables
    assert "billing on memory://" in lines[0]
    assert "orders → billing: app.invoice" in lines[1]
    assert "orders.billing.dead" in lines[1]
    assert all(line.startswith("! ") for line in lines[2:])
    assert "│" not in out
    assert "INFO msgbus: stopping: what runs may finish" in err
    assert err.endswith("stopped\n")


def test_a_terminal_is_shown_tables(here: Path, write: Write) -> None:
    """What runs, and with which guarantees."""
    write("app", AT_WORK)
    (here / "go-on").touch()
    with running("app:bus", "--url", "memory://", here=here, FORCE_COLOR="1") as process:
        wait_for(here / "finished")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert "app.invoice" in out
    assert "orders.billing.dead" in out
    assert "Guarantees on this broker" in out


def test_a_second_signal_ends_it_now(here: Path, write: Write) -> None:
    """The handler that does not come to an end is cut off; that is no failure."""
    write("app", AT_WORK)
    with running("app", "--url", "memory://", "--log-level", "info", here=here) as process:
        wait_for(here / "started")
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while "stopping" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert not (here / "finished").exists()


def test_json_says_what_runs_in_one_line(here: Path, write: Write) -> None:
    """The description alone is on stdout, before anything runs; --log-level error leaves stderr to what matters."""
    write("app", AT_WORK)
    (here / "go-on").touch()
    with running("app:bus", "--url", "memory://", "--json", "--log-level", "error", here=here) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        wait_for(here / "finished")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, "", "stopped\n")
    assert [subscription["handler"] for subscription in told["subscriptions"]] == ["app.invoice"]
    assert told["broker"] == "memory://"


def test_a_bug_ends_it_with_exit_1_and_one_traceback(here: Path, write: Write) -> None:
    """A subscription that ended for good takes the process with it; its traceback is logged once."""
    write("app", BUG)
    with running("app", here=here) as process:
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "error: it ended by an error that is a bug: RuntimeError: a bug of the adapter" in err
    assert err.count("Traceback (most recent call last)") == 1


def test_a_lifespan_that_fails_is_exit_1_with_its_traceback(here: Path, write: Write) -> None:
    """Nobody has logged it before, so it is."""
    write("app", LIFESPAN)
    with running("app", "--url", "memory://", here=here) as process:
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "RuntimeError: no database" in err
    assert err.count("Traceback (most recent call last)") == 1


def test_a_broker_that_is_away_is_exit_1_in_one_line(here: Path, write: Write, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `publish_timeout`; no traceback, no table."""
    monkeypatch.setenv("MSGBUS_PUBLISH_TIMEOUT", "0.2")
    write("app", AWAY)
    for command in ("run", "check", "explain"):
        said = invoke(command, "app")
        assert (said.code, said.out) == (1, "")
        assert said.err == "error: nobody answers at broker.example:5672\n"


def test_without_a_broker_it_refuses(shop: None, invoke: Invoke) -> None:
    """A service that forgets everything is never what is meant by accident; the message says what to write."""
    said = invoke("run", "shop")
    assert (said.code, said.out) == (1, "")
    assert "export MSGBUS_URL=" in said.err
    assert "--url memory://" in said.err


def test_what_cannot_be_promised_is_refused_before_it_runs(write: Write, invoke: Invoke) -> None:
    """Exit 1, with the place."""
    write("app", 'from msgbus import Bus\nbus = Bus()\n@bus.subscribe("orders")\nasync def handle(order: dict) -> None: ...\n')
    said = invoke("run", "app", "--url", "memory://")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: handler app.handle")
