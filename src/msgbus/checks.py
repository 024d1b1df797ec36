"""Options of the wrong type are refused where they are written: not everyone runs a type checker."""

from __future__ import annotations

from msgbus.errors import ConfigurationError


def takes(option: str, given: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raises `ConfigurationError` that names the option, and its place, unless what is given is of this kind. A bool is no int."""
    if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
        raise ConfigurationError(f"{option}={given!r}: takes {words}")


def each_takes(place: str, *options: tuple[str, object, type | tuple[type, ...], str]) -> None:
    """`takes` for options of one place that may be left out: those that are None are."""
    for option, given, kind, words in options:
        if given is not None:
            takes(f"{place}: {option}", given, kind, words)
