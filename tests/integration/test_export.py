"""`msgbus topics export`: what it prints, carried out by the broker's own tool, is all that `topology=check` asks for."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from importlib.metadata import entry_points
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from tests.brokers import JARS, RECIPES, Server
from tests.integration.shop import Order, bills, orders, shop
from typer.testing import CliRunner

from msgbus.cli.app import app
from msgbus.contract.adapter import HasGroups
from msgbus.errors import TopologyMismatch
from msgbus.testing.stage import Seen
from msgbus.testing.suite_operating import counted

pytestmark = pytest.mark.timeout(240)
"""Each of Kafka's tools starts a virtual machine, one a topic and a group."""

SCRIPT = "cat > export <<'END_OF_EXPORT'\n{text}END_OF_EXPORT\n"
APPLIED = {
    "redis": SCRIPT + "sh export -p {port}",
    "kafka": "command -v kafka-topics.sh > /dev/null || PATH=$PATH:/opt/kafka/bin\n"
    "if ! command -v kafka-topics.sh > /dev/null; then\n"
    '  tool="$(command -v kafka-tool || echo java -cp {jars})"\n'
    '  export KAFKA_TOPICS="$tool org.apache.kafka.tools.TopicCommand"\n'
    '  export KAFKA_CONSUMER_GROUPS="$tool org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"\n'
    "fi\n" + SCRIPT + "sh export --bootstrap-server localhost:{port}",
    "rabbitmq": SCRIPT + 'rabbitmqctl {node} import_definitions "$PWD/export"',
}
"""How an operator carries it out, where the broker runs."""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.broker(name)) for name in APPLIED])
def name(request: pytest.FixtureRequest) -> str:
    """Of the broker."""
    found = str(request.param)
    scheme = urlsplit(RECIPES[found].url).scheme
    if scheme not in entry_points(group="msgbus.adapters").names:
        pytest.skip(f"no adapter for {scheme}:// is installed")
    return found


@pytest.fixture(autouse=True)
def settings(name: str, running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator sets: the program is the same in every environment."""
    monkeypatch.setenv("MSGBUS_URL", running.url)
    monkeypatch.setenv("MSGBUS_NAMESPACE", f"export-{uuid4().hex[:12]}.")
    monkeypatch.setenv("MSGBUS_TOPOLOGY", "check")
    monkeypatch.setenv("MSGBUS_SHARDS", "3")


def exported(*options: str) -> str:
    """What the command prints."""
    said = CliRunner().invoke(app, ["topics", "export", "tests.integration.shop:shop", *options])
    assert said.exit_code == 0, said.stderr
    return said.stdout


def apply(name: str, running: Server, text: str) -> None:
    """Carries it out where the broker runs."""
    inside = running.what.startswith("container")  # there it is at its own ports
    port = {"redis": 6379, "kafka": 9094}.get(name) if inside else urlsplit(running.url).port
    code, output = running.shell(APPLIED[name].format(text=text, port=port, jars=f"'{JARS}/*'", node=node(running)))
    assert code == 0, output


def node(running: Server) -> str:
    """How rabbitmqctl finds a broker that is a process of this machine."""
    return "" if running.what.startswith("container") else f"-n msgbus-{urlsplit(running.url).port}@localhost"


async def groups(topic: str) -> list[str]:
    async with shop() as bus:
        adapter = bus.runtime.adapter
        assert isinstance(adapter, HasGroups)
        return list(await adapter.groups(bus.runtime.namespace + topic))


async def works(count: int) -> None:
    """The program starts, and everything of it works: publishing, consuming, delays, dead letters."""
    seen: Seen[int] = Seen()
    async with shop(seen).running() as bus:
        letters = bus.dead_letters(orders, group="billing")
        for n in range(count):
            await bus.publish(orders, Order(customer=f"c{n}", n=n))
        await bus.publish(orders, Order(customer="late", n=count), delay=timedelta(seconds=0.5))
        await bus.publish(orders, Order(customer="bad", n=-1))
        await seen.wait_until(lambda items: set(items) == set(range(count + 1)), 30)
        await counted(letters.count, 1)
        assert await letters.purge() == 1


async def test_what_is_exported_is_what_check_asks_for(name: str, running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the start is refused and names what is missing; afterwards the program does all it does elsewhere. Carried out again, it
    leaves a group where it is. A topic without a group keeps what it gets for the first one."""
    with pytest.raises(TopologyMismatch, match=r"orders.*found none"):
        async with shop().running():
            pass
    text = await asyncio.to_thread(exported)
    assert await asyncio.to_thread(exported, "--offline") == text, "the same for a broker that is as it was installed"
    with pytest.raises(TopologyMismatch, match="found none"):  # printing it has made nothing
        async with shop().running():
            pass
    await asyncio.to_thread(apply, name, running, text)
    await works(5)
    assert await groups("orders") == ["billing"]
    async with shop() as bus:
        await bus.publish(orders, Order(customer="a", n=7))
    await asyncio.to_thread(apply, name, running, text)
    seen: Seen[int] = Seen()
    async with shop(seen).running():
        await seen.wait_until(lambda items: 7 in items, 30)
    assert seen.items == [7], "what was done is not done again, and what waited is there"
    monkeypatch.setenv("MSGBUS_TOPOLOGY", "create")
    async with shop() as bus, bus.consumer(bills, group="reader") as consumer:
        found = [delivery.message.n for delivery in await consumer.receive(20, timedelta(seconds=20))]
        assert set(found) <= set(range(6)) | {7}
        assert found
