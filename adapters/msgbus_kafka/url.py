"""A URL's options, read and checked, and what they mean for the client library."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from msgbus.contract.adapter import AdapterSettings
from msgbus.contract.options import Reach, Read, boolean, durability, misshapen, positive, read_options, read_reach, seconds
from msgbus.errors import ConfigurationError, UnsupportedFeature

DEFAULT_PORT = 9092
_SHAPE = "kafka://user:password@host:port,host:port, nothing behind"


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
    """Where the brokers are, how one gets in, and the options that are no settings."""

    reach: Reach
    options: Mapping[str, Any]  # Any: each has a type of its own

    @property
    def shown(self) -> str:
        """The URL without what is secret."""
        return f"{self.reach.scheme}://{f'{self.reach.user}:***@' if self.reach.user else ''}{self.reach.shown}"

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments of every client of aiokafka. Reads the certificates' files."""
        reach, tls = self.reach, self.reach.scheme == "kafkas"
        options: dict[str, Any] = {
            "bootstrap_servers": reach.shown.split(","),
            "client_id": self.options.get("client_id", "msgbus"),
            "security_protocol": ("SASL_" if reach.user else "") + ("SSL" if tls else "PLAINTEXT"),
        }
        if reach.user:
            options["sasl_mechanism"] = self.options.get("mechanism", "PLAIN")
            options |= {"sasl_plain_username": reach.user, "sasl_plain_password": reach.password}
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
    reach = read_reach(url, DEFAULT_PORT, _SHAPE)
    if reach.path:
        raise misshapen(_SHAPE)
    shown = f"{reach.scheme}://{reach.shown}"
    read = read_options(shown, options, _KNOWN)
    if reach.scheme != "kafkas" and (tls := read.keys() & {*_TLS}):
        raise ConfigurationError(f"option {min(tls)!r} of {shown}: TLS is kafkas://")
    if "mechanism" in read and not reach.user:
        raise ConfigurationError(f"option 'mechanism' of {shown}: there is no user in the URL")
    settings = replace(settings, **{name: read.pop(name) for name in [*read] if hasattr(settings, name)})
    if settings.durability == "fsync":
        raise UnsupportedFeature("durability 'fsync'", "Kafka", "durability 'replicated', or flush.messages=1 in Topic(native=…)")
    return Place(reach, read), settings
