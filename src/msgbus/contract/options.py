"""An adapter's URL, read one way on every broker: where the broker is and how one gets in, and its options: text → value.

An adapter says which options it knows, and by which function of this module (or of its own) each is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from msgbus.contract.adapter import check_options
from msgbus.errors import ConfigurationError

Read = Callable[[str], Any]  # Any: each option has a type of its own
"""Text → value; ValueError says what was expected."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What a URL says before its options: `scheme://user:password@host:port,host:port/path`. Its repr shows no password."""

    scheme: str
    user: str | None
    """None: the URL has none; '' where there is only a password."""
    password: str = field(repr=False)
    hosts: tuple[tuple[str, int], ...]
    path: tuple[str, ...]
    """What is between slashes; `%2F` is a slash in it."""

    @property
    def shown(self) -> str:
        """The hosts as a URL has them, IPv6 addresses in brackets."""
        return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)


def read_reach(url: str, port: int, shape: str, *, host: str = "") -> Reach:
    """A URL without its options, taken apart. `port` where a host names none; `host` where the URL names none, if there may be none.

    Raises `misshapen(shape)` for what is none.
    """
    try:
        parts = urlsplit(url)
        secret, at, netloc = parts.netloc.rpartition("@")
        user, _, password = secret.partition(":")
        found = [urlsplit(f"//{text}") for text in (netloc or host).split(",")]
        hosts = tuple((each.hostname or "", each.port or port) for each in found)
        if parts.fragment or "@" in parts.path or not all(name for name, _ in hosts):
            raise ValueError
    except ValueError:
        raise misshapen(shape) from None
    path = tuple(unquote(part) for part in parts.path.split("/") if part)
    return Reach(parts.scheme, unquote(user) if at else None, unquote(password), hosts, path)


def misshapen(shape: str) -> ConfigurationError:
    """Says what shape a URL has, and nothing of what it is: any part of it may be the rest of a password that was not percent-encoded."""
    return ConfigurationError(f"the URL of the broker is {shape}; a port is a number up to 65535, and % escapes '/', '@' and '#'")


def read_options(shown: str, options: Mapping[str, str], known: Mapping[str, Read]) -> dict[str, Any]:
    """The values of the options that are given. `shown` is the URL without what is secret.

    Raises `ConfigurationError` for the first that is not known, or whose text does not fit, naming it.
    """
    check_options(shown, options, tuple(known))
    read: dict[str, Any] = {}
    for option, text in options.items():
        try:
            read[option] = known[option](text)
        except ValueError as error:
            raise ConfigurationError(f"option {option!r} of {shown}: {error}, not {text!r}") from None
    return read


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("expected a whole number from 1 on")
    return int(text)


def seconds(text: str) -> float:
    """A time that passes: more than 0 seconds."""
    value = seconds_or_none(text)
    if value == 0:
        raise ValueError("expected seconds")
    return value


def seconds_or_none(text: str) -> float:
    """A time that may be no time: 0 seconds or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("expected seconds")
    return value


def boolean(text: str) -> bool:
    """true, false, 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("expected true or false")
    return text.lower() in ("true", "1")


def durability(text: str) -> str:
    """One of `AdapterSettings.durability`."""
    if text not in ("broker", "fsync", "replicated"):
        raise ValueError("expected broker, fsync or replicated")
    return text
