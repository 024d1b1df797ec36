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
_SHAPE = "the URL of Kafka is kafka://user:password@host:port,host:port, nothing behind; % escapes '/' and '@'"


def _mechanism(text: str) -> str:
    if text not in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        raise ValueError("expected PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512")
    return text


_TLS = ("cafile", "certfile", "keyfile")
_KNOWN: dict[str, Read] = {
    **dict.fromkeys(("dead_letter_retention", "heartbeat", "session_timeout"), seconds),
    **dict.fromkeys(("ack_window", "replication", "shards"), positive),
    **dict.fromkeys((*_TLS, "client_id", "instance"), str),
    "durability": durability,
    "mechanism": _mechanism,
    "require_durable": boolean,
}


@dataclass(frozen=True, slots=True, repr=False)
class Place:
    """Where the brokers are and how one gets in. No repr: it holds a password."""

    scheme: str
    servers: tuple[str, ...]
    user: str
    password: str
    options: Mapping[str, Any]  # Any: each has a type of its own

    @property
    def shown(self) -> str:
        """The URL without what is secret."""
        return f"{self.scheme}://{f'{self.user}:***@' if self.user else ''}{','.join(self.servers)}"

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments of every client of aiokafka. Reads the certificates' files."""
        tls = self.scheme == "kafkas"
        options: dict[str, Any] = {
            "bootstrap_servers": [*self.servers],
            "client_id": self.options.get("client_id", "msgbus"),
            "security_protocol": ("SASL_" if self.user else "") + ("SSL" if tls else "PLAINTEXT"),
        }
        if self.user:
            options["sasl_mechanism"] = self.options.get("mechanism", "PLAIN")
            options |= {"sasl_plain_username": self.user, "sasl_plain_password": self.password}
        if tls:
            try:
                options["ssl_context"] = context = ssl.create_default_context(cafile=self.options.get("cafile"))
                if "certfile" in self.options:
                    context.load_cert_chain(self.options["certfile"], self.options.get("keyfile"))
            except OSError as error:
                raise ConfigurationError(f"{self.shown}: cafile, certfile or keyfile cannot be read: {error}") from error
        return options


def read_url(url: str, options: Mapping[str, str], settings: AdapterSettings) -> tuple[Place, AdapterSettings]:
    """`kafka://[user:password@]host[:port][,host[:port]…]`, and `kafkas://` for TLS. Raises `ConfigurationError` without the password."""
    parts = urlsplit(url)
    secret, _, netloc = parts.netloc.rpartition("@")
    user, _, password = secret.partition(":")
    if parts.path not in ("", "/") or parts.fragment:  # what is there may be the rest of a password, and the host its beginning
        raise ConfigurationError(_SHAPE)
    shown = f"{parts.scheme}://{netloc}"
    read = read_options(shown, options, _KNOWN)
    if parts.scheme != "kafkas" and (tls := read.keys() & {*_TLS}):
        raise ConfigurationError(f"option {min(tls)!r} of {shown}: TLS is kafkas://")
    if "mechanism" in read and not user:
        raise ConfigurationError(f"option 'mechanism' of {shown}: there is no user in the URL")
    settings = replace(settings, **{name: read.pop(name) for name in [*read] if hasattr(settings, name)})
    if settings.durability == "fsync":
        raise UnsupportedFeature("durability 'fsync'", "Kafka", "durability 'replicated', or flush.messages=1 in Topic(native=…)")
    return Place(parts.scheme, tuple(map(_server, netloc.split(","))), unquote(user), unquote(password), read), settings


def _server(text: str) -> str:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        raise ConfigurationError(f"{_SHAPE}; a port is a number up to 65535") from None
    if not host:
        raise ConfigurationError("the URL of Kafka names no host: kafka://host:9092")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
