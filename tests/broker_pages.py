"""The tables of docs/brokers, made from what the adapters claim and the options they know. `python -m tests.broker_pages` writes them.

What an adapter says of itself decides which rows are refused and which options there are; how something is done is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from msgbus.contract.adapter import (
    Adapter,
    AdapterSettings,
    Capability,
    Exportable,
    HasDepth,
    HasGroups,
    Peekable,
    Purgeable,
    Replayable,
)
from msgbus.errors import ConfigurationError
from msgbus.urls import adapter_from_url

PAGES = Path(__file__).parents[1] / "docs" / "brokers"
URLS = {
    "memory": "memory://",
    "redis": "redis://localhost:6379/0",
    "kafka": "kafka://localhost:9092",
    "rabbitmq": "amqp://guest:guest@localhost:5672/",
}
"""Brokers, and a URL of each, which nobody opens."""

FEATURES: Mapping[str, Capability | type | None] = {
    "what is confirmed outlives a restart": Capability.DURABLE,
    "several processes and hosts": Capability.SHARED,
    "delay": Capability.DELAY,
    "expiry (`expires_in=`)": None,
    "order of a key, shards": Capability.SHARDS,
    "priorities": Capability.PRIORITIES,
    "broadcast": Capability.BROADCAST,
    "`retain=`, history for a later group": Capability.RETAIN,
    "deaths of processes are counted": Capability.CRASH_COUNT,
    "retries, dead letters, redrive": None,
    "depth": HasDepth,
    "looking without taking": Peekable,
    "purge": Purgeable,
    "replay": Replayable,
    "listing and dropping groups": HasGroups,
    "`msgbus topics export`": Exportable,
    "patterns in subscribed names": None,
}
"""What is asked of a broker, and what its adapter claims where it can."""

_TTL = "emulated: looked at when it is received, and before each retry"
_PATTERNS = "refused: one subscription a topic"
HOW: Mapping[str, Mapping[str, str]] = {
    "memory": {
        "what is confirmed outlives a restart": "refused: a broker that stores what it confirms",
        "several processes and hosts": "refused: one of the other brokers",
        "delay": "native: a heap, to the millisecond, of any length",
        "expiry (`expires_in=`)": _TTL,
        "order of a key, shards": "native: a shard is with one receiver at a time",
        "priorities": "native: a queue a level; the core fills its slots by weight",
        "broadcast": "native: private receivers",
        "`retain=`, history for a later group": "native: what is kept is bounded by `limit`",
        "deaths of processes are counted": "native: of receivers that vanished, as tests make them",
        "retries, dead letters, redrive": "native: sending and settling are one step",
        "depth": "native: exact",
        "looking without taking": "native",
        "purge": "native: what is ready",
        "replay": "native",
        "listing and dropping groups": "native",
        "`msgbus topics export`": "native: there is nothing to create",
        "patterns in subscribed names": _PATTERNS,
    },
    "redis": {
        "what is confirmed outlives a restart": "native: `appendonly yes`; claimed where the server has it",
        "several processes and hosts": "native",
        "delay": "emulated: a sorted set and Lua, by the server's clock, of any length",
        "expiry (`expires_in=`)": _TTL,
        "order of a key, shards": "emulated: a stream a shard, owned by a lease",
        "priorities": "emulated: a stream a level; the core fills its slots by weight",
        "broadcast": "native: `XREAD` from the last id",
        "`retain=`, history for a later group": "native: streams, trimmed by time",
        "deaths of processes are counted": "native: the delivery count of a pending entry; what is given back is not counted",
        "retries, dead letters, redrive": "emulated: Lua that writes, then acks, in one step",
        "depth": "native: `XINFO GROUPS`; approximate",
        "looking without taking": "native: `XRANGE`",
        "purge": "emulated: Lua; what is ready",
        "replay": "native: `XGROUP SETID`",
        "listing and dropping groups": "native: `XINFO GROUPS`, `XGROUP DESTROY`",
        "`msgbus topics export`": "native: a shell script for `redis-cli`",
        "patterns in subscribed names": _PATTERNS,
    },
    "kafka": {
        "what is confirmed outlives a restart": "native: `acks=all`, and as many replicas as the topic has",
        "several processes and hosts": "native",
        "delay": "emulated: the topic `….soon`, which receivers read beside the topic, up to 2 minutes; longer: refused at the call",
        "expiry (`expires_in=`)": _TTL,
        "order of a key, shards": "native: partitions; lanes of a key within a process",
        "priorities": "emulated: a topic a level; the core fills its slots by weight",
        "broadcast": "native: partitions assigned without a group, from their ends on",
        "`retain=`, history for a later group": "native: `retention.ms`",
        "deaths of processes are counted": "emulated: in the texts of offset commits",
        "retries, dead letters, redrive": "emulated: the topics `….GROUP.soon` and `….GROUP.dead`; confirmed there, then committed here",
        "depth": "native: ends less committed offsets",
        "looking without taking": "emulated: dead letters only, read from their topic",
        "purge": "emulated: the group's offsets go to the ends",
        "replay": "native: offsets by time",
        "listing and dropping groups": "native: groups that have committed",
        "`msgbus topics export`": "native: a shell script for `kafka-topics.sh` and `kafka-consumer-groups.sh`",
        "patterns in subscribed names": _PATTERNS,
    },
    "rabbitmq": {
        "what is confirmed outlives a restart": "native: quorum queues, persistent messages, publisher confirms",
        "several processes and hosts": "native",
        "delay": "emulated: 28 quorum queues whose times are powers of two, up to 310 days",
        "expiry (`expires_in=`)": _TTL + "; the broker's own expiration spares it the work",
        "order of a key, shards": "emulated: a queue a shard with a single active consumer; members share them out",
        "priorities": "emulated: a queue a level; the core fills its slots by weight",
        "broadcast": "native: an exclusive queue, which ends with its connection",
        "`retain=`, history for a later group": "refused: Kafka or Redis, or leave retain= out",
        "deaths of processes are counted": "native: `x-delivery-count`, from RabbitMQ 4.3 on; before, they are not counted",
        "retries, dead letters, redrive": "emulated: confirmed in the group's own queue, then acked; never by the broker's dead-lettering",
        "depth": "native: what is ready",
        "looking without taking": "emulated: got and given back; queues of a keyed topic refuse it",
        "purge": "native: what is ready",
        "replay": "refused: Kafka or Redis",
        "listing and dropping groups": "emulated: a topic's groups are named in a queue of its own",
        "`msgbus topics export`": "native: definitions for `rabbitmqctl import_definitions`",
        "patterns in subscribed names": _PATTERNS,
    },
}
"""native, emulated (by msgbus on the broker), refused (with what to do instead); and how."""

_AS = "as the setting of that name"
MEANS: Mapping[str, str] = {
    "ack_window": "records that may be fetched beyond the slowest one under way, a partition",
    "cafile": "certificates of authorities that are trusted",
    "capath": "a folder of such certificates",
    "certfile": "our own certificate",
    "client_id": "how the brokers' logs and quotas call us (`msgbus`)",
    "connection_timeout": "seconds until a connection must stand (10)",
    "consumer_timeout": "seconds a message may stay un-settled: as the broker has it (1800)",
    "dead_letter_retention": _AS,
    "durability": _AS,
    "first_group_retention": _AS,
    "heartbeat": _AS,
    "instance": "static membership, a name a process: a restart within `session_timeout` moves no partition, nor does a clean stop",
    "keyfile": "its key",
    "lease": _AS,
    "limit": "messages a topic may hold that its slowest group has not settled, that wait for a first group, or that are retained (32768)",
    "max_body": "bytes of a body, headers of dead letters aside (1048576)",
    "mechanism": "`PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`, where the URL has a user (`PLAIN`)",
    "no_verify_ssl": "true: any certificate will do, for tests",
    "replicas": "how many must have a message under `durability=replicated` (1)",
    "replication": "replicas of topics that msgbus creates (the brokers' `default.replication.factor`)",
    "require_durable": _AS,
    "sentinel_password": "the Sentinels' own, where they ask for one: that of the URL is for the servers",
    "sentinel_user": "and the user",
    "session_timeout": _AS,
    "shards": _AS,
    "ssl_ca_certs": "certificates of authorities that are trusted",
    "ssl_certfile": "our own certificate",
    "ssl_check_hostname": "false: a certificate of another host will do",
    "ssl_keyfile": "its key",
    "tls": "true: TLS, where the scheme does not say so (Sentinel, Cluster)",
}
"""What an option of a URL means."""


def adapter_of(broker: str) -> Adapter | None:
    """Its adapter, not opened; None where it is not installed."""
    if URLS[broker].partition(":")[0] not in entry_points(group="msgbus.adapters").names:
        return None
    return adapter_from_url(URLS[broker], AdapterSettings())


def has(adapter: Adapter, feature: str) -> bool:
    """Whether the adapter claims it."""
    claim = FEATURES[feature]
    if isinstance(claim, Capability):
        return claim in adapter.capabilities
    if claim is None:
        return not HOW[adapter.name][feature].startswith("refused")
    return isinstance(adapter, claim)


def features_table(broker: str) -> str:
    """What is native, emulated and refused."""
    lines = ["| feature | | how |", "| --- | --- | --- |"]
    for feature in FEATURES:
        kind, _, how = HOW[broker][feature].partition(": ")
        lines.append(f"| {feature} | {kind} | {'instead: ' if kind == 'refused' else ''}{how} |")
    return "\n".join(lines)


def options_of(broker: str) -> list[str]:
    """The options of its URL: an adapter names them all to whoever gives it another one."""
    url = URLS[broker]
    try:
        adapter_from_url(url + ("&" if "?" in url else "?") + "no_such_option=1", AdapterSettings())
    except ConfigurationError as error:
        return str(error).rpartition("known: ")[2].split(", ")
    raise AssertionError(f"{broker} takes any option")


def options_table(broker: str) -> str:
    """The options of its URL."""
    lines = ["| option | means |", "| --- | --- |"]
    return "\n".join(lines + [f"| `{option}` | {MEANS[option]} |" for option in options_of(broker)])


def with_tables(broker: str, page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in (("features", features_table(broker)), ("options", options_table(broker))):
        begin, end = f"<!-- {name}: made by tests/broker_pages.py -->", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"docs/brokers/{broker}.md has no place for its {name}")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return page


def write() -> None:
    """Writes the tables of every broker whose adapter is installed."""
    for broker in URLS:
        if adapter_of(broker) is not None:
            path = PAGES / f"{broker}.md"
            path.write_text(with_tables(broker, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
