"""`msgbus check` and `msgbus explain`: what is promised, what is refused, and that neither declares anything."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.unit.cli.conftest import Invoke, Write

from msgbus import Bus, Topic
from msgbus_memory import MemoryAdapter

EVERYTHING = """
    from datetime import timedelta
    from pydantic import BaseModel
    from tenacity import wait_fixed
    from msgbus import Batch, Bus, Context, Retry, Router, Topic
    from msgbus.stores import MemoryStore

    class Order(BaseModel):
        order_id: str

    class Invoice(BaseModel):
        order_id: str

    orders = Topic("orders", Order, key="order_id", native={"rabbitmq": {"lazy": True}})
    invoices = Topic("invoices", Invoice, version=2)
    jobs = Topic("jobs", Order, priorities=True, retain=timedelta(days=3))
    router = Router()
    bus = Bus(service="billing", routers=[router])

    @bus.subscribe(orders, publish_to=invoices)
    async def invoice(order: Order) -> Invoice: ...

    @router.subscribe("orders", name="audit", ordered=False, idempotency=MemoryStore(), retry=Retry(attempts=3, wait=wait_fixed(2)))
    def audit(order: Order) -> None: ...

    @router.subscribe(jobs, batch=Batch(50), concurrency=2, timeout=timedelta(seconds=30))
    async def work(batch: list[Order]) -> None: ...

    @router.subscribe(jobs, broadcast=True)
    async def refresh(job: Order, context: Context) -> None: ...
"""

WRONG = """
    from msgbus import Bus, Topic

    orders = Topic("orders", dict[str, int])
    bus = Bus()

    @bus.subscribe(orders)
    async def first(order: dict[str, int]) -> None: ...

    @bus.subscribe(orders, group="second", ordered=True)
    async def second(order: dict[str, int]) -> None: ...
"""


SPREAD = """
    from msgbus import Bus, Topic

    bus = Bus(service="billing")

    @bus.subscribe(Topic("orders", dict[str, str], key="order_id", shards=4))
    async def handle(order: dict[str, str]) -> None: ...
"""


async def standing(url: str) -> tuple[list[str], int | None]:
    """What the broker has of the topic `orders`."""
    adapter = MemoryAdapter(url.removeprefix("memory://"))
    await adapter.open()
    try:
        return list(await adapter.groups("orders")), await adapter.shards("orders")
    finally:
        await adapter.close()


def test_explain_tells_every_subscription_topic_and_guarantee(write: Write, invoke: Invoke, url: str) -> None:
    """In JSON: every default filled in, every broker fact, what is unclaimed and what is not durable."""
    write("everything", EVERYTHING)
    said = invoke("explain", "everything", "--url", url, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["broker"], told["adapter"], told["service"]) == (url, "memory", "billing")
    one = {subscription["name"]: subscription for subscription in told["subscriptions"]}
    assert one["invoice"] | {"place": ""} == {
        "name": "invoice",
        "topic": "orders",
        "group": "billing",
        "handler": "everything.invoice",
        "place": "",
        "model": "Order",
        "runs_in": "event loop",
        "order": "order_id",
        "on_failure": "block",
        "concurrency": 16,
        "window": 32,
        "batch": None,
        "timeout": None,
        "attempts": 8,
        "retry": "8 runs, random exponential to 1 min",
        "dead_letters": "orders.billing.dead",
        "idempotency": None,
        "publish_to": "invoices",
        "begins": "at its declaration (the topic's first group: before it)",
    }
    assert (one["audit"]["group"], one["audit"]["order"], one["audit"]["on_failure"]) == ("billing-audit", None, None)
    assert (one["audit"]["runs_in"], one["audit"]["idempotency"], one["audit"]["retry"]) == ("threads", "MemoryStore", "3 runs, 2 s apart")
    assert (one["work"]["batch"], one["work"]["window"], one["work"]["timeout"]) == (50, 200, 30.0)
    assert (one["refresh"]["group"], one["refresh"]["dead_letters"]) == (None, None)
    topics = {topic["name"]: topic for topic in told["topics"]}
    assert list(topics) == ["invoices", "jobs", "orders"]
    assert (topics["jobs"]["priorities"], topics["jobs"]["retain"]) == (True, 3 * 86400.0)
    assert topics["orders"]["native"] == {"rabbitmq": {"lazy": True}}
    assert told["unclaimed"] == ["invoices"]
    kept_by = {guarantee["name"]: guarantee["kept_by"] for guarantee in told["guarantees"]}
    assert (kept_by["durable"], kept_by["shared"], kept_by["delay"], kept_by["dead letters"]) == ("nobody", "nobody", "broker", "msgbus")
    assert any("not durable" in warning for warning in told["warnings"])
    assert any("idempotency is off for invoice, refresh, work" in warning for warning in told["warnings"])
    assert "durability" in told["broker_facts"]


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_the_tables_fit_the_terminal_and_lose_no_word(width: int, write: Write, invoke: Invoke, url: str) -> None:
    """At any usual width no line is longer than the terminal, and every name can be read whole."""
    write("everything", EVERYTHING)
    said = invoke("explain", "everything", "--url", url, width=width)
    assert said.code == 0, said.err
    assert max(map(len, said.out.splitlines())) <= width
    for name in ("billing-audit", "everything.invoice", "orders.billing-audit.dead", "MemoryStore", "invoices"):
        assert name in said.out


def test_explain_and_check_declare_nothing(write: Write, invoke: Invoke, url: str) -> None:
    """A look leaves the broker as it was: no topic, no group that would gather messages nobody takes."""
    write("everything", EVERYTHING)
    assert invoke("explain", "everything", "--url", url).code == 0
    assert invoke("check", "everything", "--url", url).code == 0
    assert asyncio.run(standing(url)) == ([], None)


def test_check_lists_native_options_and_what_will_be_made(write: Write, invoke: Invoke, url: str) -> None:
    """Exit 0; in words and in JSON."""
    write("everything", EVERYTHING)
    said = invoke("check", "everything", "--url", url, "--json")
    told = json.loads(said.out)
    assert (said.code, told["ok"], told["problems"]) == (0, True, [])
    assert told["native"] == [{"topic": "orders", "broker": "rabbitmq", "options": {"lazy": True}, "in_use": False}]
    assert "topic 'orders'" in told["not_yet_declared"]
    assert "group 'billing-audit' of topic 'orders'" in told["not_yet_declared"]
    words = invoke("check", "everything", "--url", url)
    assert "lazy=True" in words.out
    assert "ok: 4 subscriptions" in words.out


def test_check_says_every_problem_at_once(write: Write, invoke: Invoke) -> None:
    """Exit 1, each place with its way out, on stderr; in JSON too."""
    write("wrong", WRONG)
    said = invoke("check", "wrong", "--url", "memory://")
    assert said.code == 1
    assert "wrong.first" in said.err
    assert 'write Bus(service="...")' in said.err
    assert "wrong.second" in said.err
    assert "has no key; give it key=" in said.err
    assert "Traceback" not in said.err
    told = json.loads(invoke("check", "wrong", "--url", "memory://", "--json").out)
    assert (told["ok"], len(told["problems"])) == (False, 2)


def test_check_refuses_a_broker_that_differs(shop: None, invoke: Invoke, url: str, write: Write) -> None:
    """What stands there with another number of shards is a problem that names both; `--offline` does not look."""

    async def declare() -> None:
        async with Bus(url, service="other") as bus:
            await bus.publish(Topic("orders", dict[str, str], key="order_id", shards=3), {"order_id": "1"})

    asyncio.run(declare())
    write("spread", SPREAD)
    said = invoke("check", "spread", "--url", url)
    assert said.code == 1
    assert "topic 'orders': expected 4 shards, found 3" in said.err
    assert invoke("check", "spread", "--url", url, "--offline").code == 0


def test_with_topology_check_what_is_missing_is_a_problem(shop: None, invoke: Invoke, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program would not start, so it is not fine."""
    monkeypatch.setenv("MSGBUS_TOPOLOGY", "check")
    said = invoke("check", "shop", "--url", url)
    assert said.code == 1
    assert "topic 'orders': is not at the broker, and topology=check makes nothing" in said.err


def test_check_says_nothing_is_missing_where_the_program_has_run(shop: None, invoke: Invoke, url: str) -> None:
    """After a run, topic, group and dead letters stand at the broker."""
    from msgbus.cli.loading import load_bus

    async def run_once() -> None:
        bus = load_bus("shop")
        bus.use_url(url)
        async with bus.running():
            pass

    asyncio.run(run_once())
    told = json.loads(invoke("check", "shop", "--url", url, "--json").out)
    assert (told["ok"], told["not_yet_declared"]) == (True, [])


def test_a_missing_adapter_is_one_line_that_says_so(shop: None, invoke: Invoke) -> None:
    """Exit 1, no traceback, and no password in it."""
    said = invoke("explain", "shop", "--url", "pulsar://guest:s3cret@broker.example:5672/shop")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: ")
    assert "no adapter for pulsar://" in said.err
    assert "s3cret" not in said.err


def test_wrong_settings_are_one_line(shop: None, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped variable is named."""
    monkeypatch.setenv("MSGBUS_SHARD", "3")
    said = invoke("check", "shop")
    assert said.code == 1
    assert "unknown setting MSGBUS_SHARD" in said.err
