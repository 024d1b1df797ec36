"""The program of the tests where one must prove who one is, what all of it needs, and the certificates' files."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

import pytest
from pydantic import BaseModel
from tenacity import wait_fixed
from tests.brokers import Server
from tests.certificates import Authority
from tests.processes import ROOT

from msgbus import Bus, Retry, Topic
from msgbus.errors import MsgbusError
from msgbus.settings import Settings
from msgbus.testing.stage import Seen

T = TypeVar("T")

AUTHORITY = Authority()
PASSWORD = "p@ss/w:rd%?#&"
"""Has what a URL must encode."""


class Order(BaseModel):
    """What is bought."""

    n: int


orders = Topic("orders", Order)
accounts = Topic("accounts", Order, key="n")


def program(
    url: str, namespace: str, *, topology: Literal["create", "check"] = "create", seen: Seen[int] | None = None, timeout: float = 20.0
) -> Bus:
    """Bills orders, and gives up after two runs those that are negative, until they are redriven; keeps accounts in order, and shows them
    to everybody: what is seen there is 100 more. Without `seen` it only publishes."""
    settings = Settings(namespace=namespace, topology=topology, publish_timeout=timedelta(seconds=timeout))
    bus = Bus(url, service="billing", settings=settings, retry=Retry(attempts=2, wait=wait_fixed(0.05)))

    if seen is not None:

        @bus.subscribe(orders)
        async def bill(order: Order) -> None:
            await seen.add(order.n)
            if order.n < 0 and seen.items.count(order.n) <= 2:
                raise ValueError("nothing is bought")

        @bus.subscribe(accounts)
        async def keep(order: Order) -> None:
            await seen.add(order.n)

        @bus.subscribe(accounts, broadcast=True)
        async def show(order: Order) -> None:
            await seen.add(order.n + 100)

    return bus


async def works(bus: Bus, seen: Seen[int]) -> None:
    """Publishing, a delay, consuming, order, a broadcast, a retry, a dead letter and its redrive."""
    async with bus.running():
        await bus.publish(orders, Order(n=1))
        await bus.publish(orders, Order(n=-1))
        await bus.publish(orders, Order(n=2), delay=timedelta(seconds=0.2))
        await bus.publish(accounts, Order(n=3))
        await seen.wait_until(lambda items: sorted(items) == [-1, -1, 1, 2, 3, 103], 40, "all of it")
        letters = bus.dead_letters(orders, group="billing")
        await until(letters.count)
        assert await letters.redrive() == 1
        await seen.wait_until(lambda items: items.count(-1) == 3, 40, "what was redriven")


async def refusal(bus: Bus) -> MsgbusError:
    """Why it cannot run, which is said without the password."""
    with pytest.raises(MsgbusError) as raised:
        async with bus.running():
            pass
    assert PASSWORD not in str(raised.value)
    assert quote(PASSWORD, safe="") not in str(raised.value)
    return raised.value


async def until(ask: Callable[[], Awaitable[T]], enough: Callable[[T], bool] = bool, seconds: float = 40.0) -> None:
    """Asks until the answer is enough."""
    deadline = time.monotonic() + seconds
    while not enough(answer := await ask()):
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(0.02)


async def problems(bus: Bus) -> str:
    """All that its health says."""
    return "; ".join(bus.health().problems)


def certificates(folder: Path) -> dict[str, str]:
    """Files, by what is in them: `ca`, `other` (an authority that is nobody's), a client's `certificate` and `key`."""
    mine = AUTHORITY.issue("certified")
    pems = {"ca": AUTHORITY.pem, "other": Authority("another").pem, "certificate": mine.certificate, "key": mine.key}
    for name, pem in pems.items():
        (folder / name).write_text(pem)
    return {name: str(folder / name) for name in pems}


async def heard_of_a_restart(running: Server, url: str, namespace: str, *, by_cli: bool) -> str:
    """What a program says on stderr, its logging as it comes, while its broker is killed and comes back. It works before and after that."""
    program = "tests.integration.heard"
    command = ["msgbus", "run", f"{program}:bus"] if by_cli else [program]
    variables = {**os.environ, "MSGBUS_URL": url, "MSGBUS_NAMESPACE": namespace}
    pipe = asyncio.subprocess.PIPE
    with tempfile.TemporaryFile("w+") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *command, cwd=ROOT, env=variables, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=stderr
        )
        assert process.stdout is not None  # it is a pipe

        async def seen(stdout: asyncio.StreamReader, n: int) -> None:
            async with asyncio.timeout(60):
                while line := await stdout.readline():
                    if line == f"seen {n}\n".encode():
                        return
            raise AssertionError("it has ended")

        try:
            await seen(process.stdout, 0)
            await asyncio.sleep(2)  # a quorum queue that is younger when its broker is killed may never confirm again, on 3.10
            await asyncio.to_thread(running.restart)
            async with Bus(url, service="other", settings=Settings(namespace=namespace, publish_timeout=timedelta(seconds=60))) as bus:
                await bus.publish(orders, Order(n=1))
            await seen(process.stdout, 1)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        stderr.seek(0)
        return stderr.read()
