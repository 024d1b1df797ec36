"""A URL and its options, read and checked, and what they mean for the client library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from yarl import URL

from msgbus.contract.adapter import AdapterSettings
from msgbus.contract.options import Read, boolean, durability, misshapen, positive, read_options, read_reach, seconds
from msgbus.errors import ConfigurationError, UnsupportedFeature

_SHAPE = "amqp://user:password@host:port/vhost, one host"
TLS = ("cafile", "capath", "certfile", "keyfile", "no_verify_ssl")


@dataclass(frozen=True, slots=True, repr=False)
class Place:
    """Where the broker is and how one gets in. No repr: it holds a password."""

    scheme: str
    host: str
    port: int
    user: str
    password: str
    vhost: str
    connection_timeout: float = 10.0
    consumer_timeout: float = 1800.0  # RabbitMQ's own default
    max_body: int = 1024 * 1024
    tls: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def shown(self) -> str:
        """The URL without what is secret."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{self.user}:***@{host}:{self.port}" + ("" if self.vhost == "/" else f"/{self.vhost}")

    def client_url(self, heartbeat: float, name: str) -> URL:
        """aiormq reads its options from it."""
        path = "/" + ("" if self.vhost == "/" else self.vhost)
        query = {"heartbeat": str(max(1, math.ceil(heartbeat))), "name": name, **self.tls}
        return URL.build(scheme=self.scheme, user=self.user, password=self.password, host=self.host, port=self.port, path=path, query=query)


def read_url(url: str, options: Mapping[str, str], settings: AdapterSettings) -> tuple[Place, AdapterSettings]:
    """`amqp://user:password@host[:port][/vhost]`, and `amqps://` for TLS. Raises `ConfigurationError` without the password."""
    reach = read_reach(url, 5671 if url.startswith("amqps:") else 5672, _SHAPE)
    if len(reach.hosts) != 1 or len(reach.path) > 1:
        raise misshapen(_SHAPE)
    host, port = reach.hosts[0]
    vhost = reach.path[0] if reach.path else "/"
    user, password = ("guest", "guest") if reach.user is None else (reach.user, reach.password)
    place = Place(reach.scheme, host, port, user, password, vhost)
    known: dict[str, Read] = dict.fromkeys(("dead_letter_retention", "first_group_retention", "heartbeat"), seconds)
    known |= dict.fromkeys(("connection_timeout", "consumer_timeout"), seconds)
    known |= {"durability": durability, "require_durable": boolean, "shards": positive, "max_body": positive}
    known |= {**dict.fromkeys(TLS, str), "no_verify_ssl": boolean}
    read = read_options(place.shown, options, known)
    tls = {option: str(int(value)) if isinstance(value, bool) else value for option in TLS if (value := read.pop(option, None)) is not None}
    if tls and reach.scheme != "amqps":
        raise ConfigurationError(f"option {min(tls)!r} of {place.shown}: TLS is amqps://")
    own = {option: read.pop(option) for option in list(read) if option in Place.__slots__}
    settings = replace(settings, **read)
    if settings.durability == "replicated":  # how many nodes a queue has AMQP does not say; on one node a majority is one
        instead = "a cluster of three nodes, where a confirm means two disks, and durability 'broker' or 'fsync'"
        raise UnsupportedFeature("durability 'replicated'", "RabbitMQ", instead)
    return replace(place, tls=tls, **own), settings
