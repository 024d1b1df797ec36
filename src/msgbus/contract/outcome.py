"""What becomes of a delivery, in five words. Made by the route, the retry policy and middleware; carried out by `inbound/settle.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["exhausted", "invalid", "unsupported", "expired", "poison", "rejected", "idempotency_conflict"]
"""Why a message is a dead letter."""


@dataclass(frozen=True, slots=True)
class Done:
    """Handled. The group will not be sent this message again.

    `repeated`: the store knew its effect from an earlier delivery, so the handler was not called.
    """

    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nothing to do, on purpose: settled like `Done`, counted apart, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Run the handler again, not before `delay` seconds from now.

    `counted=False`: the handler was not called (its idempotency key is in progress, a store is away), so no attempt is used up.
    """

    delay: float
    error: BaseException | None = None
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Dead:
    """Given up: kept as a dead letter with this reason."""

    reason: Reason
    error: BaseException | str


@dataclass(frozen=True, slots=True)
class Released:
    """Given back unfinished, as if it had not been handed out: a shutdown, a lost shard, an open breaker."""


Outcome = Done | Dropped | RetryAfter | Dead | Released

DONE = Done()
REPEATED = Done(repeated=True)
