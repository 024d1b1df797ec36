"""Kafka where one must prove who one is: TLS, SASL, certificates of clients, and users with few rights."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import warnings
from collections.abc import Generator
from dataclasses import replace
from functools import cache, partial
from typing import Literal
from urllib.parse import quote, urlencode, urlsplit
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaClient
from aiokafka.protocol import admin
from tests.brokers import JARS, RECIPES, Recipe, Server
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

from msgbus.contract.adapter import AdapterSettings
from msgbus.errors import AuthenticationFailed, BrokerUnavailable, PublishRejected
from msgbus.testing.stage import Seen
from msgbus_kafka import KafkaAdapter
from msgbus_kafka.url import read_url

LEFT = "unclosed (transport|<socket)"
"""aiokafka leaves a connection that was refused to take leave by itself, and a test's event loop may end before that."""
pytestmark = [pytest.mark.broker("kafka-secure"), pytest.mark.timeout(120), pytest.mark.filterwarnings(f"ignore:{LEFT}:ResourceWarning")]

LISTENERS = {"OPEN": "SASL_PLAINTEXT", "SECURE": "SASL_SSL", "CERTIFIED": "SSL"}
"""For clients; in the order of their ports."""
MAY_RUN = [("Topic", "Read"), ("Topic", "Write"), ("Topic", "DescribeConfigs"), ("Group", "Read")]
"""What a program must be given for its topics and groups, by the beginning of their names, where all it needs is there."""
TOOL = '$(command -v kafka-tool || ([ -d /opt/kafka/libs ] && echo "java -cp /opt/kafka/libs/*" || echo "java -cp {jars}/*"))'


def _recipe() -> Recipe:
    """Who comes by the brokers' own listener may do all, as may `admin`."""
    plain, server = RECIPES["kafka"], AUTHORITY.issue("kafka")
    inner = {"BROKER": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}
    module = "org.apache.kafka.common.security.{}LoginModule required{};"
    users = "".join(f' user_{name}="{PASSWORD}"' for name in ("admin", "plain"))
    secure = {
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in (LISTENERS | inner).items()),
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        **{f"listener.name.{name}.plain.sasl.jaas.config": module.format("plain.Plain", users) for name in ("open", "secure")},
        **{f"listener.name.{name}.scram-sha-512.sasl.jaas.config": module.format("scram.Scram", "") for name in ("open", "secure")},
        "listener.name.certified.ssl.client.auth": "required",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.key": server.key.replace("\n", " "),
        "ssl.keystore.certificate.chain": server.certificate.replace("\n", " "),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.certificates": AUTHORITY.pem.replace("\n", " "),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:admin;User:ANONYMOUS",
    }

    def at(host: str, *ports: str) -> dict[str, str]:
        told = (*("{port}", "{port1}", "{port2}"), ports[3])
        return secure | {
            "listeners": ",".join(f"{name}://{host}:{port}" for name, port in zip(LISTENERS | inner, ports, strict=True)),
            "advertised.listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in zip([*LISTENERS, "BROKER"], told, strict=True)),
            "controller.quorum.voters": f"1@127.0.0.1:{ports[4]}",
        }

    inside, here = at("", "9092", "9095", "9096", "9094", "9093"), at("127.0.0.1", "{port}", "{port1}", "{port2}", "{port3}", "{port4}")
    variables = {"KAFKA_" + name.replace("-", "___").replace(".", "_").upper(): value for name, value in inside.items()}
    properties = plain.files["server.properties"] + "".join(f"{name}={value}\n" for name, value in here.items())
    image = os.environ.get("MSGBUS_TEST_KAFKA_IMAGE") or plain.image
    return replace(
        plain,
        hello=b"\0\0\0\x0a\0\x12\0\0\0\0\0\1\xff\xff",  # which versions do you speak? More is not answered before one signs in
        welcome=b"\0\0\0\1\0\0",
        image=image,
        ports=(9092, 9095, 9096),
        variables={**plain.variables, **variables},
        files={"server.properties": properties},
    )


RECIPES["kafka-secure"] = _recipe()


# ------------------------------------------------------------------------------------------------------- who is there


@pytest.fixture(scope="module", autouse=True)
def _left_to_nobody() -> Generator[None, None, None]:
    yield
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LEFT, ResourceWarning)
        gc.collect()  # so that no other module's test is told of it


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of certificates."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def place(running: Server, files: dict[str, str]) -> Place:
    """Where the brokers are."""
    _make_scram_user(running)
    return Place(urlsplit(running.url).port or 0, files)


@pytest.fixture
def namespace() -> str:
    """Of a test's own."""
    return f"s{uuid4().hex[:12]}."


@cache
def _make_scram_user(running: Server) -> None:
    port = 9094 if running.what.startswith("container") else (urlsplit(running.url).port or 0) + 3
    given = f"--bootstrap-server 127.0.0.1:{port} --entity-type users --entity-name scram"
    tool = f"{TOOL.format(jars=JARS)} kafka.admin.ConfigCommand {given} --alter --add-config 'SCRAM-SHA-512=[password={PASSWORD}]'"
    code, said = running.shell(f"set -f; {tool}")
    assert code == 0, said


class Place:
    """Of the brokers' listeners."""

    def __init__(self, port: int, files: dict[str, str]) -> None:
        self.port = port
        self._files = files

    def url(self, listener: str, user: str = "", password: str = PASSWORD, *, scheme: str = "", **options: str) -> str:
        """`options`: those named as certificates are take a file's name."""
        port = self.port + [*LISTENERS].index(listener)
        scheme = scheme or ("kafkas" if "SSL" in LISTENERS[listener] else "kafka")
        named = {name: self._files.get(value, value) for name, value in options.items()}
        login = f"{user}:{quote(password, safe='')}@" if user else ""
        return f"{scheme}://{login}127.0.0.1:{port}?{urlencode(named)}"

    def of(self, user: str, tls: bool = True) -> str:
        """How this user comes in."""
        if user == "certified":
            return self.url("CERTIFIED", cafile="ca", certfile="certificate", keyfile="key")
        mechanism = "SCRAM-SHA-512" if user == "scram" else "PLAIN"
        return self.url("SECURE", user, mechanism=mechanism, cafile="ca") if tls else self.url("OPEN", user, mechanism=mechanism)

    async def allow(self, user: str, names: str, *rights: tuple[str, str], exactly: bool = False) -> None:
        """Adds ACLs for the topics and groups whose names begin so; returns when they hold."""
        principal = "User:CN=certified" if user == "certified" else f"User:{user}"
        login = {"sasl_mechanism": "PLAIN", "sasl_plain_username": "admin", "sasl_plain_password": PASSWORD}
        client = AIOKafkaClient(bootstrap_servers=f"127.0.0.1:{self.port}", security_protocol="SASL_PLAINTEXT", **login)
        try:
            async with asyncio.timeout(20):
                await client.bootstrap()
                node = client.get_random_node()
                for kind, right in rights:
                    rule = (_KINDS[kind], names, 3 if exactly else 4, principal, "*", _RIGHTS[right], 3)
                    made = (await client.send(node, admin.CreateAclsRequest(*rule))).to_object()
                    assert not any(one["error_code"] for one in made["creation_responses"]), made
                    found = partial(client.send, node, admin.DescribeAclsRequest(*rule))
                    await until(found, lambda answer: bool(answer.to_object()["resources"]))
        finally:
            await client.close()


_KINDS = {"Topic": 2, "Group": 3, "Cluster": 4}
_RIGHTS = {"Read": 3, "Write": 4, "Create": 5, "Delete": 6, "Describe": 8, "DescribeConfigs": 10}


# ------------------------------------------------------------------------------------------------------- who comes in


@pytest.mark.parametrize(("user", "topology"), [("plain", "create"), ("scram", "check"), ("certified", "check")])
async def test_a_user_with_the_rights_that_are_documented_does_all(
    place: Place, namespace: str, user: str, topology: Literal["create", "check"]
) -> None:
    """By password, in the clear and by TLS, and by certificate: publishing, consuming, retries, dead letters and redrives. With
    `topology=check` the right to create is not needed."""
    await place.allow(user, namespace, *MAY_RUN)
    if topology == "create":
        await place.allow(user, namespace, ("Topic", "Create"))
    else:
        async with program(place.of("admin"), namespace, seen=Seen()).running():
            pass
    seen: Seen[int] = Seen()
    await works(program(place.of(user, tls=user != "plain"), namespace, topology=topology, seen=seen), seen)


@pytest.mark.parametrize("user", ["plain", "scram"])
async def test_a_wrong_password_is_said_at_once(place: Place, namespace: str, user: str) -> None:
    """`AuthenticationFailed` that names the brokers, long before `publish_timeout`, 20 s, and shows no password."""
    url = place.of(user).replace(quote(PASSWORD, safe=""), "wr0ng")
    begun = time.monotonic()
    error = await refusal(program(url, namespace))
    assert isinstance(error, AuthenticationFailed), error
    assert f"{user}:***@127.0.0.1:{place.port + 1}" in str(error)
    assert "wr0ng" not in str(error)
    assert time.monotonic() - begun < 10.0


async def test_a_server_that_cannot_be_trusted_is_none(place: Place, namespace: str) -> None:
    """`AuthenticationFailed` at once where another authority signed for it."""
    begun = time.monotonic()
    error = await refusal(program(place.url("SECURE", "plain", cafile="other"), namespace))
    assert isinstance(error, AuthenticationFailed), error
    assert "certificate verify failed" in str(error)
    assert f"127.0.0.1:{place.port + 1}" in str(error)
    assert time.monotonic() - begun < 10.0


@pytest.mark.parametrize(
    ("listener", "options"),
    [
        ("SECURE", {"scheme": "kafka", "user": "plain"}),
        ("OPEN", {"scheme": "kafkas", "user": "plain", "cafile": "ca"}),
        ("OPEN", {}),
        ("CERTIFIED", {"cafile": "ca"}),
    ],
    ids=["no TLS to TLS", "TLS to none", "no user", "no certificate"],
)
async def test_the_wrong_kind_of_listener(place: Place, namespace: str, listener: str, options: dict[str, str]) -> None:
    """It hangs up as a broker does that is away: so one tries until `publish_timeout`, and then says what it may be."""
    begun = time.monotonic()
    error = await refusal(program(place.url(listener, **options), namespace, timeout=3.0))
    assert isinstance(error, BrokerUnavailable), error
    assert "kafkas:// is for a port with TLS" in str(error)
    assert f"127.0.0.1:{place.port + [*LISTENERS].index(listener)}" in str(error)
    assert time.monotonic() - begun < 10.0


# ------------------------------------------------------------------------------------------------------- rights that are missing


async def test_who_may_not_create_hears_so(place: Place, namespace: str) -> None:
    """`AuthenticationFailed` that names topics and the right."""
    await place.allow("plain", namespace, *MAY_RUN)
    error = await refusal(program(place.of("plain"), namespace, seen=Seen()))
    assert isinstance(error, AuthenticationFailed), error
    assert f"{namespace}orders" in str(error)
    assert "right Create" in str(error)


@pytest.mark.parametrize("missing", [("Topic", "DescribeConfigs"), ("Group", "Read")])
async def test_who_may_not_look_is_not_warned(place: Place, namespace: str, missing: tuple[str, str]) -> None:
    """Nor is that a trouble of the broker."""
    async with program(place.of("admin"), namespace, seen=Seen()).running():
        pass
    await place.allow("plain", namespace, *[right for right in MAY_RUN if right != missing])
    adapter = KafkaAdapter(*read_url(place.url("OPEN", "plain"), {}, AdapterSettings()))
    await adapter.open()
    try:
        assert await adapter.warnings([(f"{namespace}orders", "billing")]) == []
    finally:
        await adapter.close()


async def test_who_may_not_see_a_group_hears_so(place: Place, namespace: str) -> None:
    """`AuthenticationFailed` that names the group and the right."""
    await place.allow("plain", namespace, *MAY_RUN[:-1], ("Topic", "Create"))
    error = await refusal(program(place.of("plain"), namespace, seen=Seen()))
    assert isinstance(error, AuthenticationFailed), error
    assert f"group '{namespace}orders.billing'" in str(error)
    assert "right Describe" in str(error)


async def test_who_may_not_write_hears_so(place: Place, namespace: str) -> None:
    """`PublishRejected` that names the topic and the right, at once; with the right it goes on."""
    await place.allow("plain", namespace, ("Topic", "Describe"), ("Topic", "Create"))
    async with program(place.of("plain"), namespace) as bus:
        with pytest.raises(PublishRejected, match=f"{namespace}orders.*right Write"):
            await bus.publish(orders, Order(n=1))
        await place.allow("plain", namespace, ("Topic", "Write"))
        await bus.publish(orders, Order(n=1))


@pytest.mark.parametrize("missing", [("Topic", "Read"), ("Group", "Read")])
async def test_who_may_not_read_waits_for_the_right(place: Place, namespace: str, missing: tuple[str, str]) -> None:
    """Its health names topic or group and the right; another group is not disturbed; with the right it goes on, and nothing is lost."""
    others: Seen[int] = Seen()
    seen: Seen[int] = Seen()
    theirs = program(place.of("admin"), namespace)

    @theirs.subscribe(orders, group="others", name="others")
    async def other(order: Order) -> None:
        await others.add(order.n)

    await place.allow("plain", namespace, *[right for right in MAY_RUN if right != missing], ("Group", "Describe"))
    for making in (program(place.of("admin"), namespace, seen=Seen()), theirs):
        async with making.running():
            pass
    mine = program(place.of("plain"), namespace, topology="check", seen=seen)
    async with mine.running():
        name = f"{namespace}orders.billing" if missing[0] == "Group" else f"{namespace}orders"
        await until(lambda: problems(mine), lambda said: name in said and "right Read" in said)
        await mine.publish(orders, Order(n=1))
        async with theirs.running():
            await others.wait_for(1, 40)
        assert not seen.items
        await place.allow("plain", namespace, missing)
        await seen.wait_for(1, 40)


async def test_what_cannot_become_a_dead_letter_is_kept(place: Place, namespace: str) -> None:
    """Without the right to write to where dead letters go, a message that is given up stays in its group until there is one."""
    async with program(place.of("admin"), namespace, seen=Seen()).running():
        pass
    await place.allow("plain", namespace, *[right for right in MAY_RUN if right != ("Topic", "Write")])
    await place.allow("plain", f"{namespace}orders", ("Topic", "Write"), exactly=True)
    seen: Seen[int] = Seen()
    async with program(place.of("plain"), namespace, topology="check", seen=seen).running() as bus:
        await bus.publish(orders, Order(n=-1))
        await seen.wait_for(2, 40)
        await until(lambda: problems(bus))
        await place.allow("plain", namespace, ("Topic", "Write"))
        letters = bus.dead_letters(orders, group="billing")
        await until(letters.count)


# ------------------------------------------------------------------------------------------------------- what one reads of it


async def test_a_lost_broker_is_said_once(running: Server, place: Place, namespace: str) -> None:
    """Killed and started again: on stderr are a few lines of msgbus and nothing of the client library."""
    said = await heard_of_a_restart(running, place.of("admin", tls=False), namespace, by_cli=True)
    assert "WARNING msgbus: broker: " in said
    assert len(said.splitlines()) < 12, said
    assert "aiokafka" not in said, said
    assert "Traceback" not in said, said
