"""The options of an adapter's URL, read: text → value, one way on every broker.

An adapter says which it knows, and by which function of this module (or of its own) each is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgbus.contract.adapter import check_options
from msgbus.errors import ConfigurationError

Read = Callable[[str], Any]  # Any: each option has a type of its own
"""Text → value; ValueError says what was expected."""


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
