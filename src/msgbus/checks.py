"""Options of the wrong type are refused where they are written: not everyone runs a type checker."""

from __future__ import annotations

from msgbus.errors import ConfigurationError


def takes(option: str, given: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raises `ConfigurationError` that names the option, and its place, unless what is given is of this kind. A bool is no int."""
    if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
        raise ConfigurationError(f"{option}={given!r}: takes {words}")
