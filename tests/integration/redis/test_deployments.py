"""Redis with TLS, with an ACL user, behind Sentinels, and as a cluster: servers of their own, for real and small."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

import pytest
from redis import Redis
from redis import exceptions as client
from redis.crc import key_slot
from tenacity import wait_fixed
from tests.brokers import Server
from tests.certificates import Authority
from tests.integration.redis.deployments import AUTHORITY, PASSWORD, SENTINELS_PASSWORD

from msgbus.bus import Bus
from msgbus.context import Context
from msgbus.contract.adapter import Adapter, AdapterSettings, ReceiverSpec, TopicSpec
from msgbus.contract.envelope import Envelope, new_id
from msgbus.contract.idempotency import AlreadyDone, InProgress, New
from msgbus.errors import (
    AuthenticationFailed,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    PublishRejected,
    PublishUnknown,
    StoreError,
)
from msgbus.retry import Retry
from msgbus.testing.stage import Broker, Order, Seen, Stage, eventually, opened
from msgbus.topic import Topic
from msgbus.urls import adapter_from_url
from msgbus_redis import RedisAdapter, RedisStore

pytestmark = [pytest.mark.broker("redis"), pytest.mark.timeout(120)]

PAGE = Path(__file__).parents[3] / "docs" / "brokers" / "redis.md"
ORDERS = Topic("orders", Order)
KEYED = Topic("keyed", Order, key="id", shards=8)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files: the authority `ca`, a certificate of it with its `key`; and another authority, with another certificate and key."""
    texts: dict[str, str] = {}
    for which, authority in ("", AUTHORITY), ("other-", Authority("another")):
        issued = authority.issue("client")
        texts |= {f"{which}ca": authority.pem, f"{which}certificate": issued.certificate, f"{which}key": issued.key}
    folder = tmp_path_factory.mktemp("pem")
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: f"{folder / name}" for name in texts}


def url_of(url: str, user: str = "", password: str = PASSWORD, **options: Any) -> str:  # Any: what str() makes a text of
    """The URL of a server, with who comes and how."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{rest}?{urlencode(options)}"


def asked(one: Redis, *command: Any) -> Any:  # Any: text, bytes, numbers; what the server says
    return one.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py says no types here


async def die(adapter: Adapter) -> None:
    cast(RedisAdapter, adapter).abandon()


def stage_at(url: str, **settings: object) -> Any:  # Any: an asynchronous context manager of a Stage
    return opened(Broker(url, crash=die, settings=settings, patience=3.0))


@asynccontextmanager
async def adapter_at(url: str) -> AsyncIterator[RedisAdapter]:
    """An open adapter, closed at the end."""
    adapter = adapter_from_url(url, AdapterSettings())
    assert isinstance(adapter, RedisAdapter)
    try:
        await adapter.open()
        yield adapter
    finally:
        await adapter.close()


async def refused(url: str, kind: type[Exception], *named: str) -> None:
    """Nobody gets in, and the error says why, in words that these patterns find."""
    with pytest.raises(kind) as caught:
        async with adapter_at(url):
            pass
    for pattern in named:
        assert re.search(pattern, str(caught.value)), caught.value
    for secret in (PASSWORD, quote(PASSWORD, safe=""), SENTINELS_PASSWORD):
        assert secret not in str(caught.value)


async def publish_and_handle(url: str, topic: Topic[Order], count: int = 20) -> None:
    """A bus at work there is a bus at work."""
    async with stage_at(url) as stage:
        _, seen = await stage.collect(topic)
        publisher = await stage.publisher()
        await publisher.publish_many(topic, [Order(n=n) for n in range(count)])
        assert sorted(order.n for order in await seen.wait_for(count)) == list(range(count))


async def keep_and_find(url: str) -> None:
    """A `RedisStore` there does what it is for."""
    store = RedisStore(url)
    key, given_up = uuid.uuid4().hex, uuid.uuid4().hex
    try:
        claim, other = await store.begin("g", key, "f", 5.0), await store.begin("g", given_up, "f", 5.0)
        assert isinstance(claim, New)
        assert isinstance(other, New)
        assert isinstance(await store.begin("g", key, "f", 5.0), InProgress)
        assert await store.renew("g", key, claim.token, 5.0)
        assert await store.complete("g", key, claim.token, b"done", 5.0)
        assert await store.begin("g", key, "f", 5.0) == AlreadyDone(b"done")
        assert await store.abandon("g", given_up, other.token)
    finally:
        await store.close()


# ---------------------------------------------------------------- TLS


@pytest.mark.broker("redis-tls")
async def test_tls(running: Server, pem: dict[str, str]) -> None:
    """`rediss://` trusts the authorities of `ssl_ca_certs` and nobody else, and looks at the host; each refusal says why."""
    url, ca = running.url, pem["ca"]
    await publish_and_handle(url_of(url, ssl_ca_certs=ca), ORDERS)
    await keep_and_find(url_of(url, ssl_ca_certs=ca))
    await refused(url_of(url, ssl_ca_certs=pem["other-ca"]), AuthenticationFailed, "certificate verify failed")
    await refused(url_of(url), AuthenticationFailed, "certificate verify failed")
    await refused(url_of(url, ssl_ca_certs="/nowhere/ca.pem"), ConfigurationError, "ssl_ca_certs", "/nowhere/ca.pem")
    await refused(url_of(url.replace("rediss", "redis")), BrokerUnavailable, "Connection (closed|reset)")
    await refused(url_of(url, password="another", ssl_ca_certs=ca), AuthenticationFailed, "invalid username-password pair")
    of_another_name = url.replace("127.0.0.1", "127.1")
    await refused(url_of(of_another_name, ssl_ca_certs=ca), AuthenticationFailed, "not valid for '127.1'")
    async with adapter_at(url_of(of_another_name, ssl_ca_certs=ca, ssl_check_hostname="false")) as adapter:
        await adapter.ping()


@pytest.mark.broker("redis-tls")
async def test_tls_to_a_server_that_is_silent(running: Server, pem: dict[str, str]) -> None:
    """A connection that says goodbye and has no answer is left, with all that served it, when the adapter is closed."""
    adapter = adapter_from_url(url_of(running.url, ssl_ca_certs=pem["ca"]), AdapterSettings())
    before = asyncio.all_tasks()
    await adapter.open()
    await adapter.ping()
    await asyncio.to_thread(running.pause)
    try:
        async with asyncio.timeout(3):
            await adapter.close()
        assert asyncio.all_tasks() <= before
    finally:
        await asyncio.to_thread(running.unpause)


@pytest.mark.broker("redis-tls")
async def test_tls_with_a_client_certificate(running: Server, pem: dict[str, str]) -> None:
    """A server that asks for one lets nobody in without, or with another's; `ssl_certfile` and `ssl_keyfile` are it."""
    url, ca = running.url, pem["ca"]
    own = {"ssl_certfile": pem["certificate"], "ssl_keyfile": pem["key"]}
    admin = Redis.from_url(url, password=PASSWORD, ssl_ca_certs=ca, **own)
    admin.config_set("tls-auth-clients", "yes")
    try:
        hangs_up = "alert|Connection (closed|reset)"  # what it says of TLS 1.3 may be lost in that
        await refused(url_of(url, ssl_ca_certs=ca), BrokerError, hangs_up)
        wrong = url_of(url, ssl_ca_certs=ca, ssl_certfile=pem["other-certificate"], ssl_keyfile=pem["other-key"])
        await refused(wrong, BrokerUnavailable, hangs_up)
        await publish_and_handle(url_of(url, "", PASSWORD, ssl_ca_certs=ca, **own), KEYED)
    finally:
        admin.config_set("tls-auth-clients", "no")
        admin.close()


# ---------------------------------------------------------------- an ACL user


def rights() -> tuple[list[str], list[str]]:
    """What the page says that operators grant: to whoever publishes and consumes, and what is added for a `RedisStore`."""
    section = re.search(r"^## Rights\n(.*?)^## ", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    first, second = re.findall(r"^```text\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    return [word for word in first.split() if word[0] in "+~"], second.split()


@pytest.fixture
def admin(running: Server) -> Iterator[Redis]:
    """The server, by the plain client; afterwards it has no user of ours."""
    plain = Redis.from_url(running.url)
    plain.acl_log_reset()
    yield plain
    plain.acl_deluser("orders")
    plain.close()


def let_in(admin: Redis, *rules: str) -> None:
    """Makes the user anew, with these rules and no others."""
    asked(admin, "ACL", "SETUSER", "orders", "reset", "on", f">{PASSWORD}", *rules)


def url_of_user(running: Server, **options: Any) -> str:
    return url_of(running.url, "orders", **options)


async def all_of_it(stage: Stage) -> None:
    """What a service does with a broker, and an operator: every command is in use that has no twin of its kind."""
    bad = Topic("bad", Order)
    ranked = Topic("ranked", Order, priorities=True)
    kept = Topic("kept", Order, retain=timedelta(hours=1))
    bus = stage.bus(retry=Retry(attempts=2, wait=wait_fixed(0.05)))
    seen, failed, told = Seen[str](), Seen[Context](), Seen[int]()

    @bus.subscribe(bad)
    async def fail(order: Order, context: Context) -> None:
        await failed.add(context)
        raise ValueError("it always fails")

    @bus.subscribe(ORDERS)
    @bus.subscribe(ranked)
    @bus.subscribe(kept)
    @bus.subscribe(KEYED)
    async def handle(order: Order) -> None:
        await seen.add(order.text)

    @bus.subscribe(ORDERS, broadcast=True)
    async def tell(order: Order) -> None:
        await told.add(order.n)

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish(bad, Order())
    await publisher.publish(ORDERS, Order(text="plain"))
    await publisher.publish(ORDERS, Order(text="later"), delay=timedelta(seconds=0.2))
    await publisher.publish(kept, Order(text="kept"))
    await publisher.publish_many(KEYED, [Order(id=f"{n}", text="keyed") for n in range(24)])
    for priority in ("low", "normal", "high"):
        await publisher.publish(ranked, Order(text=priority), priority=priority)
    await failed.wait_for(2)
    await told.wait_for(2)
    await seen.wait_for(30)
    letters = publisher.dead_letters(bad, group="suite")
    await stage.dead_letters(1, "bad")
    assert [letter.reason async for letter in letters.list()] == ["exhausted"]
    assert await letters.redrive() == 1
    await failed.wait_for(4)
    await worker.stop()

    await publisher.publish(ORDERS, Order(n=5))
    operator = cast(RedisAdapter, await stage.open_adapter())
    assert (await operator.depth(stage.name("orders"), "suite")).ready == 1
    assert [envelope.topic async for envelope in operator.peek(stage.name("orders"), "suite")] == [stage.name("orders")]
    assert await operator.purge(stage.name("orders"), "suite") == 1
    assert await operator.replay(stage.name("kept"), "suite", 0.0) == 1
    assert await operator.drop_group(stage.name("kept"), "suite")


async def test_the_rights_of_the_page_suffice(running: Server, admin: Redis) -> None:
    """A user with what the page grants, and with a password full of what a URL gives a meaning, does all that msgbus does, and needs all of
    it; the server noted nothing that was denied."""
    rules, _ = rights()
    let_in(admin, *rules)
    admin.config_resetstat()
    async with stage_at(url_of_user(running)) as stage:
        await all_of_it(stage)
    denied = {entry["object"] for entry in admin.acl_log()}
    assert denied <= {"client|setinfo"}, "the client says its name and version where it may"
    used = {name.removeprefix("cmdstat_") for name in admin.info("commandstats")}
    commands = {rule.removeprefix("+") for rule in rules if rule.startswith("+")}
    assert commands - used == {"srem"}, "which is for a server without memory"


async def test_a_wrong_password(running: Server, admin: Redis) -> None:
    """It is `AuthenticationFailed`; so is a user that is switched off, or that there is not."""
    let_in(admin, *rights()[0])
    await refused(url_of(running.url, "orders", "another"), AuthenticationFailed)
    await refused(url_of(running.url, "nobody"), AuthenticationFailed)
    asked(admin, "ACL", "SETUSER", "orders", "off")
    await refused(url_of(running.url, "orders"), AuthenticationFailed)


UNNAMED = "can't run this command"
"""Redis 7.0 names what a script may not do in its ACL LOG alone."""


@pytest.mark.parametrize(
    ("right", "named"),
    [("+xadd", f"xadd|{UNNAMED}"), ("+sadd", f"sadd|{UNNAMED}"), ("+evalsha", "evalsha"), ("~{*", "key")],
)
async def test_a_right_that_is_missing(right: str, named: str, running: Server, admin: Redis) -> None:
    """Who may not publish hears so at once, by the right that is missing; nothing is stored."""
    rules, _ = rights()
    let_in(admin, *rules)
    topic = f"t{uuid.uuid4().hex[:8]}"
    async with adapter_at(url_of_user(running)) as adapter:
        await adapter.declare([TopicSpec(topic)], [ReceiverSpec(topic, "g")])
        let_in(admin, *(rule for rule in rules if rule != right))
        (outcome,) = await adapter.send([Envelope(new_id(), topic, b"{}", {})], timeout=5)
        assert isinstance(outcome, PublishRejected)
        assert re.search(named, str(outcome)), outcome
        assert admin.xlen(f"{{{topic}}}") == 0


async def test_a_right_that_is_taken_away_from_a_consumer(running: Server, admin: Redis) -> None:
    """Health names it, nothing is lost, and the work goes on by itself once it is given back."""
    let_in(admin, *rights()[0])
    async with stage_at(url_of_user(running)) as stage:
        worker, seen = await stage.collect(KEYED)
        asked(admin, "ACL", "SETUSER", "orders", "-xclaim", "-xreadgroup")
        publisher = await stage.publisher()
        await publisher.publish_many(KEYED, [Order(id=f"{n}", n=n) for n in range(16)])
        named = re.compile(f"xreadgroup|xclaim|{UNNAMED}")
        await eventually(lambda: any(map(named.search, worker.bus.health().problems)), 10, "health to name the right")
        asked(admin, "ACL", "SETUSER", "orders", "+xclaim", "+xreadgroup")
        assert sorted(order.n for order in await seen.wait_for(16)) == [*range(16)]


async def test_the_rights_of_a_store(running: Server, admin: Redis) -> None:
    """A `RedisStore` is content with what the page adds for it, and says so when it has not got that."""
    rules, added = rights()
    let_in(admin, *rules, *added)
    admin.script_flush()
    await keep_and_find(url_of_user(running))
    let_in(admin, *rules)
    with pytest.raises(StoreError, match="permission"):
        await keep_and_find(url_of_user(running))


# ---------------------------------------------------------------- flows


class Flow:
    """A publisher that never stops, and what it knows to be kept; handlers of two groups, and what they completed, in order."""

    GROUPS = ("a", "b")
    KEYS = 4

    def __init__(self, stage: Stage, publisher: Bus) -> None:
        self.confirmed: list[int] = []
        self.unknown: list[int] = []
        self.stage = stage
        self.completed: dict[str, list[int]] = {group: [] for group in self.GROUPS}
        self._publisher = publisher
        self._stop = asyncio.Event()

    @classmethod
    async def begin(cls, stage: Stage) -> Flow:
        flow = cls(stage, await stage.publisher())
        flow.bus = stage.bus()
        for group in cls.GROUPS:

            @flow.bus.subscribe(KEYED, group=group)
            async def handle(order: Order, group: str = group) -> None:
                await asyncio.sleep(0.001)  # its work
                flow.completed[group].append(order.n)

        await stage.start(flow.bus)
        flow._task = asyncio.create_task(flow._publish())
        return flow

    bus: Bus
    _task: asyncio.Task[None]

    async def _publish(self) -> None:
        n = 0
        while not self._stop.is_set():
            try:
                await self._publisher.publish(KEYED, Order(id=f"key{n % self.KEYS}", n=n))
                self.confirmed.append(n)
            except PublishUnknown:
                self.unknown.append(n)
            n += 1

    async def goes_on(self, count: int, what: str) -> None:
        """So many more are confirmed, and the last of them is handled by each group."""
        wanted = len(self.confirmed) + count
        await eventually(lambda: len(self.confirmed) >= wanted or self._task.done(), 15, f"publishing {what}: {len(self.confirmed)}")
        if self._task.done():
            self._task.result()
        last = self.confirmed[-1]
        await eventually(lambda: all(last in done for done in self.completed.values()), 15, f"handling {what}")

    def states(self) -> set[str]:
        return {subscription.state for subscription in self.bus.health().subscriptions}

    async def end(self) -> None:
        """All that was confirmed was handled, by each group, and each key's first runs are in order."""
        self._stop.set()
        await self._task
        for group, done in self.completed.items():
            await eventually(partial(set(self.confirmed).issubset, done), 15, f"all of it in group {group}")
            first: dict[int, list[int]] = defaultdict(list)
            for n in dict.fromkeys(done):
                first[n % self.KEYS].append(n)
            assert all(runs == sorted(runs) for runs in first.values())
            assert set(done) <= {*self.confirmed, *self.unknown}


# ---------------------------------------------------------------- Sentinel


async def shell(server: Server, script: str) -> None:
    code, output = await asyncio.to_thread(server.shell, script)
    assert code == 0, output


async def kill(server: Server, one: Redis) -> None:
    """One of several, by kill -9."""
    await shell(server, f"kill -9 {one.info('server')['process_id']}")


class Watched:
    """A master, its replica, and a Sentinel, each by a plain client."""

    def __init__(self, server: Server, ca: str) -> None:
        self.server = server
        self._ca = ca
        self.master, self.replica = (
            Redis("127.0.0.1", server.port + number, password=PASSWORD, ssl=True, ssl_ca_certs=ca) for number in (0, 1)
        )
        self.sentinels = [
            Redis("127.0.0.1", server.port + number, password=SENTINELS_PASSWORD, ssl=True, ssl_ca_certs=ca) for number in (2, 3, 4)
        ]

    def well(self) -> bool:
        """The Sentinels know each other and the replica, which has what the master has."""
        try:
            states = [asked(sentinel, "SENTINEL MASTER", "main") for sentinel in self.sentinels]
            agreed = all((state["num-other-sentinels"], state["num-slaves"]) == (2, 1) for state in states)
            return agreed and self.replica.info("replication")["master_link_status"] == "up"
        except client.ConnectionError:  # it is not up
            return False

    def named(self) -> int:
        """The port of the master, as the first Sentinel says."""
        _, port = asked(self.sentinels[0], "SENTINEL GET-MASTER-ADDR-BY-NAME", "main")
        return int(port)

    def fails_over(self) -> bool:
        """Whether it begins to, as an operator asks."""
        try:
            return bool(asked(self.sentinels[0], "SENTINEL FAILOVER", "main"))
        except client.ResponseError:  # NOGOODSLAVE
            return False

    def url(self, **options: Any) -> str:
        """With all that it takes to come in."""
        terms = {"tls": "true", "ssl_ca_certs": self._ca, "sentinel_password": SENTINELS_PASSWORD, **options}
        return url_of(self.server.url, "", PASSWORD, **terms)


@pytest.fixture
def sentinel(running: Server, pem: dict[str, str]) -> Iterator[Watched]:
    watched = Watched(running, pem["ca"])
    wait_until(watched.well, "the Sentinels to agree")
    yield watched
    for each in (watched.master, watched.replica, *watched.sentinels):
        each.close()


def wait_until(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


@pytest.mark.broker("redis-sentinel")
async def test_sentinels_say_why_not(sentinel: Watched) -> None:
    """A service that they do not know, a password that is not theirs, no TLS where they have it: each error says so."""
    await publish_and_handle(sentinel.url(), ORDERS)
    await keep_and_find(sentinel.url().replace("@", "@127.0.0.1:1,"))
    await refused(sentinel.url().replace("/main/", "/other/"), BrokerUnavailable, "knows no service 'other'")
    await refused(sentinel.url(sentinel_password="another"), AuthenticationFailed, "invalid username-password pair")
    await refused(url_of(sentinel.server.url, sentinel_password=SENTINELS_PASSWORD), BrokerUnavailable, "Connection (closed|reset)")
    await refused("redis://127.0.0.1:1/0?sentinel_password=x", ConfigurationError, "sentinel_")


@pytest.mark.broker("redis-sentinel")
async def test_failover(sentinel: Watched) -> None:
    """The master is killed, and later an operator makes it the master again: publishing and consuming go on at the new one without a word
    from the program, though the first Sentinel of the URL is away; what was confirmed as replicated is handled, in order a key."""
    async with stage_at(sentinel.url(durability="replicated").replace("@", "@127.0.0.1:1,")) as stage:
        flow = await Flow.begin(stage)
        await flow.goes_on(50, "at first")
        await kill(sentinel.server, sentinel.master)
        await eventually(lambda: sentinel.named() == sentinel.server.port + 1, 15, "the Sentinels to name another")
        await shell(sentinel.server, "touch again")  # or there is nobody to replicate to
        await flow.goes_on(50, "after the failover")
        await eventually(sentinel.fails_over, 30, "the Sentinel to find the replica good enough")
        await eventually(lambda: sentinel.named() == sentinel.server.port, 15, "the Sentinels to name the first one again")
        await flow.goes_on(50, "after the planned failover")
        await flow.end()


# ---------------------------------------------------------------- a cluster


class Nodes:
    """The masters of a cluster, each by a plain client."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.each = [Redis("127.0.0.1", server.port + number) for number in range(3)]

    def well(self) -> bool:
        """All of them see all of them."""
        try:
            told = [asked(node, "CLUSTER INFO") for node in self.each]
            return all((each["cluster_state"], each["cluster_size"]) == ("ok", "3") for each in told)
        except client.RedisError:
            return False

    def owner(self, key: str) -> int:
        """The number of the node that has a key."""
        for number, node in enumerate(self.each):
            try:
                node.exists(key)
            except client.MovedError:
                continue
            return number
        raise AssertionError(f"nobody has {key!r}")

    def namespace(self, topic: str, number: int) -> str:
        """One in which a topic is at a node."""
        return next(space for space in (f"t{uuid.uuid4().hex[:8]}." for _ in range(1000)) if self.owner(f"{{{space}{topic}}}") == number)

    def begin_to_move(self, key: str, to: int) -> tuple[int, int]:
        """Where its slot goes from, and which it is. Half of what is in the slot goes."""
        slot, source = key_slot(key.encode()), self.owner(key)
        self._set(to, slot, "IMPORTING", source)
        self._set(source, slot, "MIGRATING", to)
        keys = self._keys(source, slot)
        self._carry(source, to, keys[: len(keys) // 2])
        return source, slot

    def end_move(self, source: int, slot: int, to: int) -> None:
        """The other half goes, and everybody is told."""
        while keys := self._keys(source, slot):
            self._carry(source, to, keys)
        for number in (to, source, *{0, 1, 2} - {to, source}):
            self._set(number, slot, "NODE", to)

    def _set(self, at: int, slot: int, what: str, other: int) -> None:
        asked(self.each[at], "CLUSTER", "SETSLOT", slot, what, asked(self.each[other], "CLUSTER", "MYID"))

    def _keys(self, at: int, slot: int) -> list[bytes]:
        return sorted(asked(self.each[at], "CLUSTER", "GETKEYSINSLOT", slot, 1000))

    def _carry(self, source: int, to: int, keys: list[bytes]) -> None:
        asked(self.each[source], "MIGRATE", "127.0.0.1", self.server.port + to, "", 0, 5000, "KEYS", *keys)

    def told(self) -> int:
        """How often anybody was told to go elsewhere."""
        stats = [node.info("errorstats").get("errorstat_MOVED", {}) for node in self.each]
        return sum(int(stat.get("count", 0)) for stat in stats)


@pytest.fixture
def cluster(running: Server) -> Iterator[Nodes]:
    nodes = Nodes(running)
    wait_until(nodes.well, "the cluster to be well")
    yield nodes
    for node in nodes.each:
        node.close()


@pytest.mark.broker("redis-cluster")
async def test_a_cluster_does_what_a_server_does(cluster: Nodes) -> None:
    """Keyed topics, delays, retries, dead letters and their redrive, priorities, broadcast, replay, purge, depth: topics on all nodes."""
    async with stage_at(cluster.server.url) as stage:
        names = "orders", "keyed", "ranked", "kept", "bad"
        while {cluster.owner(f"{{{stage.name(name)}}}") for name in names} != {0, 1, 2}:
            stage.namespace = f"t{uuid.uuid4().hex[:8]}."
        await all_of_it(stage)
    for _ in range(6):
        await keep_and_find(cluster.server.url)


@pytest.mark.broker("redis-cluster")
async def test_a_slot_moves_while_messages_flow(cluster: Nodes) -> None:
    """While a topic's slot is on its way to another node, publishing and consuming wait; then they go on there. Nothing is lost, the order
    of a key is kept, and afterwards nobody asks the wrong node any more."""
    async with stage_at(cluster.server.url) as stage:
        stage.namespace = cluster.namespace("keyed", 0)
        base = f"{{{stage.name('keyed')}}}"
        flow = await Flow.begin(stage)
        await flow.goes_on(50, "at first")
        for to, slowly in ((1, True), (2, False), (0, False)):
            source, slot = await asyncio.to_thread(cluster.begin_to_move, base, to)
            if slowly:
                await eventually(lambda: "waiting for broker" in flow.states(), 15, "a subscription to notice")
            await asyncio.to_thread(cluster.end_move, source, slot, to)
            await flow.goes_on(100, f"at node {to}")
        await eventually(lambda: flow.states() == {"running"}, 15, "both subscriptions to run")
        before = cluster.told()
        await flow.goes_on(200, "as if nothing had been")
        assert cluster.told() == before
        await flow.end()


@pytest.mark.broker("redis-cluster")
async def test_a_node_that_is_away_takes_its_topics_along_and_no_others(cluster: Nodes) -> None:
    """What is on other nodes is served, though the dead one is the first of the URL; what is on it waits for it, and goes on."""
    server = cluster.server
    async with stage_at(server.url) as stage:
        stage.namespace = cluster.namespace("keyed", 0)
        flow = await Flow.begin(stage)
        away = Envelope(new_id(), stage.name("keyed"), b"{}", {})
        stage.namespace = cluster.namespace("orders", 1)
        await flow.goes_on(20, "at first")
        await kill(server, cluster.each[0])
        await eventually(lambda: "waiting for broker" in flow.states(), 15, "the subscription to notice")
        _, seen = await stage.collect(ORDERS)
        publisher = await stage.publisher()
        await publisher.publish_many(ORDERS, [Order(n=n) for n in range(20)])
        await seen.wait_for(20)
        adapter = await stage.open_adapter()
        (outcome,) = await adapter.send([away], timeout=2)
        assert isinstance(outcome, BrokerUnavailable)
        assert f"127.0.0.1:{server.port}" in str(outcome)
        await asyncio.to_thread(server.restart)
        await asyncio.to_thread(wait_until, cluster.well, "the cluster to be well")
        await flow.goes_on(20, "after it came back")
        await flow.end()
