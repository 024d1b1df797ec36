"""What the client's errors mean: the one place where they become msgbus's."""

from __future__ import annotations

import asyncio

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

CLIENT_ERRORS = (kafka.KafkaError, kafka.ConsumerStoppedError, kafka.IllegalOperation, OSError, TimeoutError, asyncio.IncompleteReadError)
"""All that a call of the client may raise where it is no bug."""

_FORBIDDEN = (
    kafka.AuthenticationFailedError,
    kafka.AuthenticationMethodNotSupported,
    kafka.SaslAuthenticationFailed,
    kafka.UnsupportedSaslMechanismError,
    kafka.TopicAuthorizationFailedError,
    kafka.GroupAuthorizationFailedError,
    kafka.ClusterAuthorizationFailedError,
)
_UNUSABLE = (
    kafka.InvalidTopicError,
    kafka.InvalidPartitionsError,
    kafka.InvalidReplicationFactorError,
    kafka.InvalidConfigurationError,
    kafka.InvalidSessionTimeoutError,
    kafka.PolicyViolationError,
    kafka.UnsupportedCodecError,
    kafka.UnsupportedVersionError,
    kafka.IncompatibleBrokerVersion,
)
_NOT_STORED = (
    kafka.NotLeaderForPartitionError,
    kafka.LeaderNotAvailableError,
    kafka.UnknownTopicOrPartitionError,
    kafka.NotEnoughReplicasError,
    kafka.BrokerNotAvailableError,
    kafka.KafkaStorageError,
)


def translate(error: BaseException, doing: str) -> MsgbusError:
    """The error of any call but a produce; for `raise translate(error, ...) from error`."""
    said = f"{doing}: {type(error).__name__}" + (f": {error}" if str(error) else "")
    if isinstance(error, _FORBIDDEN):
        return AuthenticationFailed(said)
    if isinstance(error, _UNUSABLE):
        return ConfigurationError(said)
    return BrokerUnavailable(said)


def for_code(code: int, doing: str) -> MsgbusError:
    """The same, from the number in a response."""
    return translate(kafka.for_code(code)(), doing)


def produced(code: int, message_id: str, topic: str) -> BrokerError | MessageTooLarge:
    """What a produce that the broker answered with an error means for a message of it."""
    error = kafka.for_code(code)
    said = f"message {message_id!r} to Kafka topic {topic!r}: {error.__name__}"
    if issubclass(error, kafka.MessageSizeTooLargeError | kafka.RecordListTooLargeError):
        return MessageTooLarge(f"{said}: larger than the topic's max.message.bytes")
    if issubclass(error, _NOT_STORED):
        return BrokerUnavailable(said)
    if issubclass(error, kafka.RequestTimedOutError | kafka.NotEnoughReplicasAfterAppendError | kafka.UnknownError):
        return PublishUnknown(message_id, error.__name__)
    return PublishRejected(said)
