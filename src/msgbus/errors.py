"""Every error that msgbus raises, and a handler's own words.

```
MsgbusError
├── ConfigurationError     the program as written cannot keep its promise; raised at start, names the place and the way out
│   ├── UnknownAdapter     no adapter for the URL's scheme
│   ├── UnsupportedFeature the broker in use cannot do this; names the alternative
│   ├── TopologyMismatch   what stands at the broker differs from what the program says
│   └── BusNotEntered      used before `async with bus`, or after it was left
├── MessageError           our own checks: raised before any I/O, nothing was sent
│   ├── EncodeError        the message does not fit its topic's model
│   ├── DecodeError        a body does not fit the handler's model (the delivery becomes a dead letter)
│   ├── MessageTooLarge    body or headers over the limit
│   ├── InvalidHeader      a header that not every broker can carry
│   └── InvalidName        a topic, group, id or key that not every broker can hold
├── BrokerError            .retryable says whether the same call may succeed later
│   ├── BrokerUnavailable  never reached a socket: stored nowhere
│   ├── AuthenticationFailed
│   ├── PublishRejected    refused by the broker: stored nowhere
│   ├── PublishUnknown     may be stored: publish the same id again, or let the consumer deduplicate
│   └── PublishManyError   how far `publish_many` came
├── AlreadySettled         a delivery was given a second word
├── NotFound               no such dead letter, subscription, topic
└── StoreError             .retryable; a store failed
    ├── OutboxError        a row was not stored: no transaction, another database, a table that is missing
    └── IdempotencyConflict

Reject, RetryLater, Drop, BatchFailed     a handler's own words: raised by handlers, no errors of msgbus
```

Client libraries' exceptions become these in one function an adapter, `raise … from exc`.
What is no broker's error propagates as the bug that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta


class MsgbusError(Exception):
    """Base of everything that msgbus raises itself."""


# ---------------------------------------------------------------- configuration


class ConfigurationError(MsgbusError):
    """The program as written, or its settings, cannot work. Names the place and what to write instead."""


class UnknownAdapter(ConfigurationError):
    """No adapter is installed for a URL's scheme."""


class UnsupportedFeature(ConfigurationError):
    """The broker in use can neither do this nor have it emulated.

    `feature` is what was asked, `adapter` who cannot do it, `alternative` what to do instead.
    """

    def __init__(self, feature: str, adapter: str, alternative: str) -> None:
        super().__init__(f"{feature} is not supported by {adapter}; instead: {alternative}")
        self.feature = feature
        self.adapter = adapter
        self.alternative = alternative


class TopologyMismatch(ConfigurationError):
    """What stands at the broker under our name differs from what the program says, or is missing."""

    def __init__(self, resource: str, expected: str, actual: str) -> None:
        super().__init__(f"{resource}: expected {expected}, found {actual}")
        self.resource = resource
        self.expected = expected
        self.actual = actual

    @property
    def missing(self) -> bool:
        """Nothing stands there at all: `actual` is "none"."""
        return self.actual == "none"


class BusNotEntered(ConfigurationError):
    """The bus was used before `async with bus`, or after it was left."""


# ---------------------------------------------------------------- messages


class MessageError(MsgbusError):
    """One of our own checks refused a message before any I/O: nothing was sent."""


class EncodeError(MessageError):
    """The message does not fit its topic's model, or cannot be written as JSON."""


class DecodeError(MessageError):
    """A body does not fit the model. Carries `topic` and `message_id`; the codec's own error is the cause.

    `reason` is the dead letter's: "invalid" (the body), "unsupported" (its content type, encoding or schema version).
    """

    def __init__(self, topic: str, message_id: str, problem: str, reason: str = "invalid") -> None:
        super().__init__(f"message {message_id!r} of topic {topic!r}: {problem}")
        self.topic = topic
        self.message_id = message_id
        self.reason = reason


class MessageTooLarge(MessageError):
    """Body or headers are over the limit, which the error names."""


class InvalidHeader(MessageError):
    """A header that not every broker can carry, or one that is msgbus's own."""


class InvalidName(MessageError, ConfigurationError):
    """A topic, group, id or key that not every broker can hold. Raised at the call, or when a bus is entered."""


# ---------------------------------------------------------------- brokers


class BrokerError(MsgbusError):
    """The broker, or the way to it, failed. `retryable`: the same call may succeed later."""

    retryable: bool = False


class BrokerUnavailable(BrokerError):
    """The request never reached a socket: nothing was stored."""

    retryable = True


class AuthenticationFailed(BrokerError):
    """The broker does not accept the credentials, or does not let them do this."""


class PublishRejected(BrokerError):
    """The broker refused the message: stored nowhere, never delivered."""


class PublishUnknown(BrokerError):
    """The message may be stored: no answer in time, a lost link, or the call was cancelled.

    Publishing again with `id=error.message_id` is safe where consumers deduplicate.
    """

    retryable = True

    def __init__(self, message_id: str, problem: str) -> None:
        super().__init__(f"message {message_id!r} may be stored: {problem}")
        self.message_id = message_id


class PublishManyError(BrokerError):
    """`publish_many` stopped at its first failure, which is the cause.

    `confirmed` messages are stored, `failed` are not or may not be; `first_unconfirmed` is the position, from 0, of the
    first message that has no confirm. Nothing was read from the iterable after the failure was seen.
    """

    def __init__(self, confirmed: int, failed: int, first_unconfirmed: int) -> None:
        super().__init__(
            f"{confirmed} messages confirmed, {failed} not; the first without a confirm is number {first_unconfirmed} (from 0)"
        )
        self.confirmed = confirmed
        self.failed = failed
        self.first_unconfirmed = first_unconfirmed

    def __str__(self) -> str:
        return super().__str__() + (f": {self.__cause__}" if self.__cause__ is not None else "")


class AlreadySettled(MsgbusError):
    """A delivery was given a second word. Nothing was sent; `first` is the word that counted."""

    def __init__(self, message_id: str, first: str) -> None:
        super().__init__(f"delivery of {message_id!r} was already settled by {first}()")
        self.message_id = message_id
        self.first = first


class NotFound(MsgbusError):
    """No dead letter, subscription or topic goes by this name."""


class StoreError(MsgbusError):
    """A store failed. `retryable`: the same call may succeed later."""

    retryable: bool = True


class OutboxError(StoreError):
    """Nothing was stored in the outbox: no active transaction, another database than the relay's, a table that is missing.

    The transaction is as it was, unless the database itself failed.
    """

    retryable = False


class IdempotencyConflict(StoreError):
    """The same idempotency key came with another payload."""

    retryable = False


# ---------------------------------------------------------------- a handler's own words


class Reject(Exception):
    """Raised by a handler: this message can never be handled; make it a dead letter now, with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(Exception):
    """Raised by a handler: not now. Run it again `after` this long (default: the retry policy's own wait).

    It counts as an attempt; when none is left, the message becomes a dead letter.
    """

    def __init__(self, after: timedelta | None = None) -> None:
        if after is not None and not isinstance(after, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
            raise TypeError(f"RetryLater(after={after!r}): takes a timedelta")
        if after is not None and after < timedelta(0):
            raise ValueError(f"RetryLater(after) must not be negative, not {after}")
        super().__init__(f"after {after}" if after is not None else "after the policy's wait")
        self.after = after


class Drop(Exception):
    """Raised by a handler: nothing to do for this message. It is done, and counted as dropped."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BatchFailed(Exception):
    """Raised by a batch handler: these members failed (index in the list it was given → error); the others are done."""

    def __init__(self, errors: Mapping[int, Exception]) -> None:
        if not isinstance(errors, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
            raise TypeError(f"BatchFailed({errors!r}): takes a mapping: index in the batch to error")
        if not errors:
            raise ValueError("BatchFailed needs at least one failed member: {index: error}")
        super().__init__(f"{len(errors)} members failed, first: {next(iter(errors.values()))!r}")
        self.errors = dict(errors)
