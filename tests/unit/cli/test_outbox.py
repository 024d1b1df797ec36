"""`msgbus outbox`: what waits, what is parked, the schema, and a relay of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.brokers import Server
from tests.unit.cli.conftest import Invoke, Write

SHOP = """
    import asyncio
    from pydantic import BaseModel
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
    from msgbus import Bus, Topic
    from msgbus.contract.outbox import Refusal
    from msgbus.stores.sql import SqlStore

    class Order(BaseModel):
        order_id: str

    orders = Topic("orders", Order, key="order_id")
    engine = create_async_engine("sqlite+aiosqlite:///shop.db")
    store = SqlStore(async_sessionmaker(engine))
    bus = Bus(service="billing", store=store)
    bare = Bus(service="billing")

    async def fill():
        await store.create_tables()
        await store.open()
        async with engine.begin() as connection:
            for number in range(3):
                await bus.outbox(connection).publish(orders, Order(order_id=str(number)))
        claimed = await store.claim(10, 60)
        await store.settle(claimed, [], {1: Refusal("PublishRejected: no [bold]such[/bold] thing", None)})
        await engine.dispose()
"""


def test_status_check_and_retry(invoke: Invoke, write: Write) -> None:
    """A schema that lacks something is exit 1 and a line each; parked rows are shown with their reason, and made due again by number."""
    write("shop", SHOP)
    missing = invoke("outbox", "check", "shop")
    assert missing.code == 1
    assert "table msgbus_outbox is missing" in missing.err
    assert json.loads(invoke("outbox", "check", "shop", "--json").out)["ok"] is False

    subprocess.run([sys.executable, "-c", "import asyncio, shop; asyncio.run(shop.fill())"], check=True, env=_environment())
    assert invoke("outbox", "check", "shop").code == 0
    found = json.loads(invoke("outbox", "status", "shop", "--json").out)
    assert (found["due"], found["parked"], found["sent"], found["delayed"]) == (2, 1, 0, 0)
    assert found["parked_rows"][0]["last_error"] == "PublishRejected: no [bold]such[/bold] thing"
    assert "[bold]such[/bold]" in invoke("outbox", "status", "shop").out

    assert invoke("outbox", "retry", "shop").code == 2
    assert invoke("outbox", "retry", "shop", "2").code == 1
    assert json.loads(invoke("outbox", "retry", "shop", "1", "--json").out) == {"due_again": 1}
    assert json.loads(invoke("outbox", "retry", "shop", "--all", "--json").out) == {"due_again": 0}


def test_a_program_without_an_outbox(invoke: Invoke, write: Write) -> None:
    """It is said, with what to write."""
    write("shop", SHOP)
    said = invoke("outbox", "status", "shop:bare")
    assert said.code == 1
    assert "SqlStore" in said.err


@pytest.mark.broker("redis")
def test_a_relay_of_its_own(write: Write, running: Server) -> None:
    """It sends what is due until it is told to stop, and says how many."""
    write("shop", SHOP)
    environment = {**_environment(), "MSGBUS_NAMESPACE": f"t{os.urandom(4).hex()}."}
    subprocess.run([sys.executable, "-c", "import asyncio, shop; asyncio.run(shop.fill())"], check=True, env=environment)
    command = [sys.executable, "-m", "msgbus", "outbox", "relay", "shop", "--url", running.url]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as relay:
        count = [sys.executable, "-m", "msgbus", "outbox", "status", "shop", "--json"]
        while json.loads(subprocess.run(count, check=True, env=environment, capture_output=True).stdout)["due"]:
            assert relay.poll() is None
        relay.send_signal(signal.SIGTERM)
        _, said = relay.communicate(timeout=30)
    assert relay.returncode == 0
    assert "relaying to redis://" in said
    assert "stopped; 2 messages sent" in said


@pytest.mark.parametrize("url", [["--url", "memory://shop"], []])
def test_a_relay_to_nobody(invoke: Invoke, write: Write, url: list[str]) -> None:
    """In memory, which is also what no URL means, messages would be gone and count as sent: it is refused, and they stay due."""
    write("shop", SHOP)
    subprocess.run([sys.executable, "-c", "import asyncio, shop; asyncio.run(shop.fill())"], check=True, env=_environment())
    refused = invoke("outbox", "relay", "shop", *url)
    assert refused.code == 1
    assert "reaches nobody" in refused.err
    assert json.loads(invoke("outbox", "status", "shop", "--json").out)["due"] == 2


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path.cwd())}
