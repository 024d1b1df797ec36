"""RabbitMQ where one must prove who one is: TLS, certificates of clients, virtual hosts, and users with few rights.

RabbitMQ 3.10 says what is refused, and not which right: that word is asked of none.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import time
from dataclasses import replace
from datetime import timedelta
from urllib.parse import quote, urlencode, urlsplit
from uuid import uuid4

import pytest
from tests.brokers import RECIPES, Recipe, Server
from tests.integration.secure import (
    AUTHORITY,
    PASSWORD,
    Order,
    certificates,
    heard_of_a_restart,
    orders,
    problems,
    program,
    refusal,
    until,
    works,
)

from msgbus import Bus, Topic
from msgbus.errors import AuthenticationFailed, BrokerUnavailable, ConfigurationError, PublishRejected
from msgbus.testing.stage import Seen

pytestmark = [pytest.mark.broker("rabbitmq-secure"), pytest.mark.timeout(120)]

VHOST = "shop/orders & bills"
"""Has what a URL must encode."""
MAY_RUN = {
    "configure": r"^(msgbus\.[0-9a-f]{16}|NAMES.*(\.member(\.[0-9]+)?|:lock|:private\..*))$",
    "write": r"^(amq\.default|msgbus\.delay\.[0-9]+|NAMES.*)$",
    "read": r"^NAMES.*$",
}
"""What a program must be given for topics whose names begin so, where all that it needs is there: docs/brokers/rabbitmq.md."""
MAY_CREATE = {"configure": r"^(msgbus\.|NAMES)", "write": r"^(amq\.default$|msgbus\.|NAMES)", "read": r"^(msgbus\.|NAMES)"}
"""And where it makes all that itself."""
ALL = dict.fromkeys(MAY_RUN, ".*")


def _recipe() -> Recipe:
    """Beside the listener without TLS one with it, which asks for a certificate."""
    plain, server = RECIPES["rabbitmq"], AUTHORITY.issue("rabbitmq")
    pems = {"ca.pem": AUTHORITY.pem, "server.pem": server.certificate, "key.pem": server.key}

    def tls(folder: str) -> str:
        files = {"cacertfile": "ca.pem", "certfile": "server.pem", "keyfile": "key.pem"}
        asks = "ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n"
        return asks + "".join(f"ssl_options.{option} = {folder}/{name}\n" for option, name in files.items())

    inside = {f"/etc/rabbitmq/tls/{name}": pem for name, pem in pems.items()}
    inside["/etc/rabbitmq/conf.d/90-tls.conf"] = "listeners.ssl.default = 5671\n" + tls("/etc/rabbitmq/tls")
    here = {"plugins": "[].\n", "rabbitmq.conf": "listeners.tcp.1 = 127.0.0.1:{port}\nlisteners.ssl.1 = 127.0.0.1:{port1}\n"}
    here["rabbitmq.conf"] += tls("{folder}")
    image = os.environ.get("MSGBUS_TEST_RABBITMQ_IMAGE") or plain.image
    return replace(plain, image=image, ports=(5672, 5671), files=here | pems, container_files=inside)


RECIPES["rabbitmq-secure"] = _recipe()


# ------------------------------------------------------------------------------------------------------- who is there


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of certificates."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def place(running: Server, files: dict[str, str]) -> Place:
    """Where the broker is."""
    return Place(running, files)


@pytest.fixture
def namespace() -> str:
    """Of a test's own."""
    return f"s{uuid4().hex[:12]}."


class Place:
    """Of the broker's listeners."""

    def __init__(self, running: Server, files: dict[str, str]) -> None:
        self.port = urlsplit(running.url).port or 0
        self._running = running
        self._files = files

    def url(self, user: str, password: str = PASSWORD, *, tls: bool = False, scheme: str = "", **options: str) -> str:
        """In the virtual host. An option's value may be a certificate's name."""
        named = urlencode({name: self._files.get(value, value) for name, value in options.items()})
        login, port = f"{user}:{quote(password, safe='')}", self.port + tls
        return f"{scheme or ('amqps' if tls else 'amqp')}://{login}@127.0.0.1:{port}/{quote(VHOST, safe='')}?{named}"

    async def user(self, name: str, rights: dict[str, str], namespace: str = "", **instead: str) -> str:
        """A user with these rights in the virtual host, which is made too; returns how it comes in."""
        rights = {right: names.replace("NAMES", re.escape(namespace)) for right, names in (rights | instead).items()}
        await asyncio.to_thread(self._define, name, rights)
        return self.url(name)

    def _define(self, user: str, rights: dict[str, str]) -> None:
        salt = b"salt"
        password = base64.b64encode(salt + hashlib.sha256(salt + PASSWORD.encode()).digest()).decode()
        known = {"name": user, "password_hash": password, "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": ""}
        given = {"user": user, "vhost": VHOST, **rights}
        text = json.dumps({"vhosts": [{"name": VHOST}], "users": [known], "permissions": [given]})
        node = "" if self._running.what.startswith("container") else f"-n msgbus-{self.port}@localhost"
        script = f"cat > definitions <<'END'\n{text}\nEND\nrabbitmqctl {node} import_definitions \"$PWD/definitions\""
        code, said = self._running.shell(script)
        assert code == 0, said


async def make_all(place: Place, namespace: str, *, others: Seen[int] | None = None) -> Bus:
    """What the program needs is there then, as `msgbus topics export` would make it. The bus is an operator's, with another group, if it
    has something to tell it to."""
    url = await place.user("admin", ALL)
    async with program(url, namespace, seen=Seen()).running() as bus:
        await bus.publish(Topic("first", Order), Order(n=0), delay=timedelta(seconds=0.01))  # makes the delays
    theirs = program(url, namespace)
    if others is not None:

        @theirs.subscribe(orders, group="others")
        async def other(order: Order) -> None:
            await others.add(order.n)

        async with theirs.running():
            pass
    return theirs


# ------------------------------------------------------------------------------------------------------- who comes in


@pytest.mark.parametrize("tls", [False, True])
async def test_a_user_that_creates_does_all(place: Place, namespace: str, tls: bool) -> None:
    """With the rights that are documented, in a virtual host whose name must be encoded; by TLS with a certificate of our own too."""
    await place.user("maker", MAY_CREATE, namespace)
    seen: Seen[int] = Seen()
    url = place.url("maker", tls=True, cafile="ca", certfile="certificate", keyfile="key") if tls else place.url("maker")
    await works(program(url, namespace, seen=seen), seen)


async def test_a_user_that_may_create_nothing_that_lasts_does_all(place: Place, namespace: str) -> None:
    """With the rights that are documented for `topology=check`. Nothing in its health says that it lacks any."""
    await make_all(place, namespace)
    url = await place.user("worker", MAY_RUN, namespace)
    seen: Seen[int] = Seen()
    bus = program(url, namespace, topology="check", seen=seen)
    await works(bus, seen)
    async with bus:
        await bus.runtime.adapter.ping()


async def test_a_wrong_password_is_said_at_once(place: Place, namespace: str) -> None:
    """`AuthenticationFailed` that names the broker, long before `publish_timeout`, 20 s, and shows no password."""
    await place.user("admin", ALL)
    begun = time.monotonic()
    error = await refusal(program(place.url("admin", "wr0ng"), namespace))
    assert isinstance(error, AuthenticationFailed), error
    assert f"admin:***@127.0.0.1:{place.port}" in str(error)
    assert "wr0ng" not in str(error)
    assert time.monotonic() - begun < 10.0


@pytest.mark.parametrize("options", [{"cafile": "other", "certfile": "certificate", "keyfile": "key"}, {"cafile": "ca"}])
async def test_who_is_not_certified_is_not_let_in(place: Place, namespace: str, options: dict[str, str]) -> None:
    """`AuthenticationFailed` at once: a server that another authority signed for, or a client with no certificate."""
    begun = time.monotonic()
    error = await refusal(program(place.url("guest", tls=True, **options), namespace))
    assert isinstance(error, AuthenticationFailed), error
    assert "certificate" in str(error)
    assert f"127.0.0.1:{place.port + 1}" in str(error)
    assert time.monotonic() - begun < 10.0


@pytest.mark.parametrize(("tls", "scheme", "options"), [(True, "amqp", {}), (False, "amqps", {"cafile": "ca"})])
async def test_the_wrong_kind_of_port(place: Place, namespace: str, tls: bool, scheme: str, options: dict[str, str]) -> None:
    """It hangs up as a broker does that is away: so one tries until `publish_timeout`, and then says what it may be."""
    begun = time.monotonic()
    error = await refusal(program(place.url("guest", tls=tls, scheme=scheme, **options), namespace, timeout=2.0))
    assert isinstance(error, BrokerUnavailable), error
    assert "amqps:// is for a port with TLS" in str(error)
    assert f"127.0.0.1:{place.port + tls}" in str(error)
    assert time.monotonic() - begun < 10.0


async def test_a_virtual_host_that_is_not_there(place: Place, namespace: str) -> None:
    """`ConfigurationError` that names it."""
    url = await place.user("admin", ALL)
    error = await refusal(program(url.replace("shop%2F", "another%2F"), namespace))
    assert isinstance(error, ConfigurationError), error
    assert "'another/orders & bills'" in str(error)


# ------------------------------------------------------------------------------------------------------- rights that are missing


async def test_who_may_not_create_hears_so(place: Place, namespace: str) -> None:
    """`AuthenticationFailed` that names the topic, what would have been made, and the right."""
    url = await place.user("few", MAY_RUN, namespace)
    error = await refusal(program(url, namespace, seen=Seen()))
    assert isinstance(error, AuthenticationFailed), error
    assert re.search(rf"topic '{re.escape(namespace)}.*(configure )?access to exchange", str(error)), error


async def test_who_may_not_write_hears_so(place: Place, namespace: str) -> None:
    """`PublishRejected` that names the exchange and the right, at once."""
    await make_all(place, namespace)
    url = await place.user("few", MAY_RUN, namespace, write="^$")
    async with program(url, namespace, topology="check") as bus:
        with pytest.raises(PublishRejected, match=rf"(write )?access to exchange '{re.escape(namespace)}orders'"):
            await bus.publish(orders, Order(n=1))


async def test_who_may_not_read_waits_for_the_right(place: Place, namespace: str) -> None:
    """Its health names the queue and the right; another group is not disturbed; with the right it goes on, and nothing is lost."""
    others: Seen[int] = Seen()
    theirs, seen = await make_all(place, namespace, others=others), Seen[int]()
    url = await place.user("few", MAY_RUN, namespace, read=r"^NAMES(accounts.*|orders|orders:groups)$")
    mine = program(url, namespace, topology="check", seen=seen)
    async with mine.running():
        await until(lambda: problems(mine), lambda said: f"access to queue '{namespace}orders.billing'" in said)
        await mine.publish(orders, Order(n=1))
        async with theirs.running():
            await others.wait_for(1, 40)
        assert 1 not in seen.items
        await place.user("few", MAY_RUN, namespace)
        await seen.wait_until(lambda items: 1 in items, 40, "what waited")


async def test_what_cannot_become_a_dead_letter_is_kept(place: Place, namespace: str) -> None:
    """Without the right to write to where dead letters go, a message that is given up stays in its group until there is one."""
    await make_all(place, namespace)
    url = await place.user("few", MAY_RUN, namespace, write=r"^(amq\.default|NAMES(orders|accounts.*))$")
    seen: Seen[int] = Seen()
    async with program(url, namespace, topology="check", seen=seen).running() as bus:
        await bus.publish(orders, Order(n=-1))
        await seen.wait_until(lambda items: items.count(-1) == 2, 40, "two runs")
        await until(lambda: problems(bus))
        await place.user("few", MAY_RUN, namespace)
        await until(bus.dead_letters(orders, group="billing").count)


# ------------------------------------------------------------------------------------------------------- what one reads of it


@pytest.mark.parametrize("by_cli", [False, True])
async def test_a_lost_broker_is_said_once(running: Server, place: Place, namespace: str, by_cli: bool) -> None:
    """Killed and started again: on stderr are a few lines of msgbus and nothing of the client library, whatever runs the program."""
    said = await heard_of_a_restart(running, await place.user("admin", ALL), namespace, by_cli=by_cli)
    assert "cannot receive, trying again" in said
    assert len(said.splitlines()) < 12, said
    assert "aiormq" not in said, said
    assert "Traceback" not in said, said
