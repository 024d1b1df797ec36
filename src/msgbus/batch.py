"""Batch: a handler that takes many messages at once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from msgbus.checks import each_takes, takes
from msgbus.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Batch:
    """The handler takes `list[M]` of 1 to `size` messages. `wait`: how long a batch that is not full waits for more (default: not at all).

    `concurrency` counts batches; the window is 2 × concurrency × size. In an ordered subscription a batch holds one message of a key.
    """

    size: int = 100
    wait: timedelta | None = None

    def __post_init__(self) -> None:
        takes("Batch(...): size", self.size, int, "an int")
        each_takes("Batch(...)", ("wait", self.wait, timedelta, "a timedelta"))
        if self.size < 1:
            raise ConfigurationError(f"Batch(size={self.size}): at least 1")
        if self.wait is not None and self.wait < timedelta(0):
            raise ConfigurationError(f"Batch(wait={self.wait}): must not be negative")
