"""What the client's errors mean: the one place where they become msgbus's."""

from __future__ import annotations

import ssl

from aiokafka import errors as kafka

from msgbus.errors import (
    AuthenticationFailed,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    MessageTooLarge,
    MsgbusError,
    PublishRejected,
    PublishUnknown,
)

CLIENT_ERRORS = (kafka.KafkaError, kafka.ConsumerStoppedError, OSError, EOFError)
"""All that a call of the client may raise where it is no bug; a deadline's `TimeoutError` among them."""

_UNUSABLE = ("Invalid", "Unsupported", "PolicyViolation", "IncompatibleBroker")
"""What names of errors begin with that no other try will mend."""


def translate(error: BaseException, doing: str, right: str = "Read") -> MsgbusError:
    """The error of any call but a produce; for `raise translate(error, ...) from error`. One of ours stays as it is. `right`: the one that
    an ACL must give for the call."""
    if isinstance(error, MsgbusError):
        return error
    name = type(error).__name__
    said = f"{doing}: {error}" if isinstance(error, kafka.KafkaError) else f"{doing}: {name}: {error}".removesuffix(": ")
    if "Authorization" in name:
        said += f" (needs the right {right})"
    if "Auth" in name or "Sasl" in name or isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationFailed(said)
    return ConfigurationError(said) if name.startswith(_UNUSABLE) else BrokerUnavailable(said)


def produced(code: int, message_id: str, topic: str) -> BrokerError | MessageTooLarge:
    """What a produce that the broker answered with an error means for a message of it."""
    error = kafka.for_code(code)
    said = f"message {message_id!r} to Kafka topic {topic!r}: {error.__name__}"
    if issubclass(error, kafka.MessageSizeTooLargeError | kafka.RecordListTooLargeError):
        return MessageTooLarge(f"{said}: larger than the topic's max.message.bytes")
    if issubclass(error, kafka.RequestTimedOutError | kafka.NotEnoughReplicasAfterAppendError | kafka.UnknownError):
        return PublishUnknown(message_id, error.__name__)
    if "Authorization" in error.__name__:
        said += " (needs the right Write)"
    return BrokerUnavailable(said) if error.retriable else PublishRejected(said)
