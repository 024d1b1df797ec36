"""Retry: how often a handler is run, how long between, and when to give up. The decision is pure; the waits are tenacity's."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from tenacity import RetryCallState, wait_random_exponential
from tenacity.retry import retry_base
from tenacity.wait import wait_base

from msgbus.checks import each_takes
from msgbus.contract.outcome import Dead, Dropped, Outcome, RetryAfter
from msgbus.errors import BrokerError, ConfigurationError, DecodeError, Drop, Reject, RetryLater, StoreError

log = logging.getLogger("msgbus")

_DEFAULT_WAIT = wait_random_exponential(multiplier=1, max=60)


@dataclass(frozen=True, slots=True, repr=False)
class Retry:
    """A retry policy: immutable, safe to share between subscriptions, tasks and threads.

    `attempts` counts every run of the handler, the first among them, and those that ended in `RetryLater`. `wait` is one of
    tenacity's (default: full jitter, from up to 1 s to up to 60 s). `retry_on`: one of tenacity's predicates; what it does not match
    is given up at once. `give_up_on`: so are these errors. `max_age`: so is a message whose next run would be this long after it was
    first published. What is given up is a dead letter.
    """

    attempts: int = 8
    wait: wait_base = _DEFAULT_WAIT
    retry_on: retry_base | None = None
    give_up_on: tuple[type[BaseException], ...] = ()
    max_age: timedelta | None = None

    def __post_init__(self) -> None:
        attempts, wait, retry_on, give_up_on, max_age = self.attempts, self.wait, self.retry_on, self.give_up_on, self.max_age
        if type(attempts) is not int or attempts < 1:
            raise ConfigurationError(f"Retry(attempts={attempts!r}): the first run counts, so an int, at least 1")
        if not isinstance(wait, wait_base):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
            raise ConfigurationError(
                f"Retry(wait={wait!r}): one of tenacity's waits, such as wait_fixed(2) or wait_random_exponential(max=60)"
            )
        if retry_on is not None and not isinstance(retry_on, retry_base):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"Retry(retry_on={retry_on!r}): one of tenacity's predicates, such as retry_if_exception_type(OSError)"
            )
        if not _are_exceptions(give_up_on):
            raise ConfigurationError(f"Retry(give_up_on={give_up_on!r}): a tuple of exception classes, such as (ValueError,)")
        each_takes("Retry(...)", ("max_age", max_age, timedelta, "a timedelta"))
        if max_age is not None and max_age <= timedelta(0):
            raise ConfigurationError(f"Retry(max_age={max_age}): must be positive")

    @classmethod
    def none(cls) -> Retry:
        """One run: the first failure makes a dead letter."""
        return cls(attempts=1)

    def __repr__(self) -> str:
        return f"Retry(attempts={self.attempts}, wait={type(self.wait).__name__})"

    def next_action(self, attempt: int, error: BaseException, age: float = 0.0) -> Outcome:
        """What becomes of a message whose run number `attempt` (from 1) ended in `error`, `age` seconds after it was first published.

        Pure but for the wait's own draw from `random`. Looks along the rules in order: the handler's words; a body that does not fit;
        `give_up_on` and `retry_on`; attempts; age.
        """
        if isinstance(error, Drop):
            return Dropped(error.reason)
        if isinstance(error, Reject):
            return Dead("rejected", error)
        if isinstance(error, DecodeError):
            return Dead("unsupported" if error.reason == "unsupported" else "invalid", error)
        if self._gives_up(error):
            return Dead("rejected", error)
        if attempt >= self.attempts:
            return Dead("exhausted", error)
        asked = error.after if isinstance(error, RetryLater) else None
        delay = self._wait(attempt, error) if asked is None else asked.total_seconds()
        if self.max_age is not None and age + delay > self.max_age.total_seconds():
            return Dead("exhausted", error)
        return RetryAfter(delay, error)

    def _gives_up(self, error: BaseException) -> bool:
        if isinstance(error, RetryLater):
            return False
        if isinstance(error, Reject | DecodeError):  # in a group; alone they were answered before
            return True
        leaves = _leaves(error)
        if leaves:
            return all(self._gives_up(leaf) for leaf in leaves)
        if isinstance(error, self.give_up_on):
            return True
        return not self._retries(error)

    def _retries(self, error: BaseException) -> bool:
        """Whether `retry_on` matches. One that breaks decides nothing: the message is retried, and the subscription lives on."""
        try:
            return self.retry_on is None or self.retry_on(_state(1, error))
        except Exception:
            log.exception("%r: retry_on failed on %s; the message is retried", self, type(error).__name__)
            return True

    def _wait(self, attempt: int, error: BaseException) -> float:
        """Seconds until the next run. A wait that breaks, or has no end, is answered by the default one."""
        try:
            delay = float(self.wait(_state(attempt, error)))
            if math.isfinite(delay):
                return max(0.0, delay)
            log.error("%r: wait gave %r; the default wait is used", self, delay)
        except Exception:
            log.exception("%r: wait failed; the default wait is used", self)
        return float(_DEFAULT_WAIT(_state(attempt, error)))


def _are_exceptions(given: object) -> bool:
    """Asked of what a type checker would have refused: with anything else the first failure would end the subscription."""
    kinds = cast("tuple[object, ...]", given) if isinstance(given, tuple) else (None,)
    return all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)


def _state(attempt: int, error: BaseException) -> RetryCallState:
    """The state that tenacity's waits and predicates read, built a call: a shared one gives wrong outcomes."""
    nothing: Any = None  # tenacity's waits read neither the retry object nor the function
    state = RetryCallState(nothing, nothing, (), {})
    state.attempt_number = attempt
    state.set_exception((type(error), error, error.__traceback__))
    return state


def _leaves(error: BaseException) -> tuple[BaseException, ...]:
    """What an exception group holds; nothing for an error that is no group."""
    return cast("BaseExceptionGroup[BaseException]", error).exceptions if isinstance(error, BaseExceptionGroup) else ()


_DEPENDENCY_NAMES = frozenset({"OperationalError", "InterfaceError", "InternalClientError"})


def is_dependency_failure(error: BaseException) -> bool:
    """Whether an error says that something the handler needs is away: what opens a circuit breaker.

    Connections, time-outs, brokers, stores, and a database's operational errors (DB-API's names, whatever the driver).
    """
    leaves = _leaves(error)
    if leaves:
        return any(is_dependency_failure(leaf) for leaf in leaves)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, BrokerError | StoreError):
        return error.retryable
    return any(kind.__name__ in _DEPENDENCY_NAMES for kind in type(error).__mro__)
