"""A URL's options, read and checked, and what they mean for the client library."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from msgbus.contract.adapter import AdapterSettings
from msgbus.contract.options import Read, boolean, durability, positive, read_options, seconds
from msgbus.errors import ConfigurationError, UnsupportedFeature

DEFAULT_PORT = 9092
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True, slots=True, repr=False)
class Place:
    """Where the brokers are and how one gets in. No repr: it holds a password."""

    servers: tuple[str, ...]
    tls: bool
    user: str | None
    password: str | None
    mechanism: str
    cafile: str | None
    certfile: str | None
    keyfile: str | None
    client_id: str
    instance: str | None
    replication: int | None

    @property
    def shown(self) -> str:
        """The URL without what is secret."""
        user = f"{self.user}:***@" if self.user else ""
        return f"{'kafkas' if self.tls else 'kafka'}://{user}{','.join(self.servers)}"

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments of every client of aiokafka. Reads the certificates' files."""
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.servers),
            "client_id": self.client_id,
            "security_protocol": ("SASL_" if self.user else "") + ("SSL" if self.tls else "PLAINTEXT"),
        }
        if self.tls:
            options["ssl_context"] = self._ssl_context()
        if self.user:
            options.update(sasl_mechanism=self.mechanism, sasl_plain_username=self.user, sasl_plain_password=self.password or "")
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.cafile)
            if self.certfile is not None:
                context.load_cert_chain(self.certfile, self.keyfile)
        except OSError as error:
            raise ConfigurationError(f"{self.shown}: cafile, certfile or keyfile cannot be read: {error}") from error
        return context


def read_url(url: str, options: Mapping[str, str], settings: AdapterSettings) -> tuple[Place, AdapterSettings]:
    """`kafka://[user:password@]host[:port][,host[:port]…]`, and `kafkas://` for TLS. Raises `ConfigurationError` without the password."""
    parts = urlsplit(url)
    secret, _, netloc = parts.netloc.rpartition("@")
    user, _, password = secret.partition(":")
    tls = parts.scheme == "kafkas"
    if parts.path not in ("", "/") or parts.fragment:  # what is there may be the rest of a password, and the host its beginning
        raise ConfigurationError("the URL of Kafka is kafka://user:password@host:port,host:port, nothing behind; % escapes '/' and '@'")
    servers = tuple(_server(server) for server in netloc.split(","))
    shown = f"{parts.scheme}://{netloc}"
    known: dict[str, Read] = {
        "ack_window": positive,
        "dead_letter_retention": seconds,
        "durability": durability,
        "heartbeat": seconds,
        "require_durable": boolean,
        "session_timeout": seconds,
        "shards": positive,
        "cafile": str,
        "certfile": str,
        "client_id": str,
        "instance": str,
        "keyfile": str,
        "mechanism": _mechanism,
        "replication": positive,
    }
    read = read_options(shown, options, known)
    if not tls and (needs := {"cafile", "certfile", "keyfile"} & read.keys()):
        raise ConfigurationError(f"option {min(needs)!r} of {shown}: TLS is kafkas://")
    if "mechanism" in read and not user:
        raise ConfigurationError(f"option 'mechanism' of {shown}: there is no user in the URL")
    place = Place(
        servers,
        tls,
        unquote(user) or None,
        unquote(password) or None,
        read.pop("mechanism", "PLAIN"),
        read.pop("cafile", None),
        read.pop("certfile", None),
        read.pop("keyfile", None),
        read.pop("client_id", "msgbus"),
        read.pop("instance", None),
        read.pop("replication", None),
    )
    settings = replace(settings, **read)
    if settings.durability == "fsync":
        raise UnsupportedFeature("durability 'fsync'", "Kafka", "durability 'replicated', or flush.messages=1 in Topic(native=…)")
    return place, settings


def _server(text: str) -> str:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError("the URL of Kafka is kafka://host:port,host:port: a port is a number up to 65535") from None
    if not host:
        raise ConfigurationError("the URL of Kafka names no host: kafka://host:9092")
    return f"{f'[{host}]' if ':' in host else host}:{port or DEFAULT_PORT}"


def _mechanism(text: str) -> str:
    if text not in _MECHANISMS:
        raise ValueError(f"expected {', '.join(_MECHANISMS)}")
    return text
