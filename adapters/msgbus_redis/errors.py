"""What the client's and the server's errors mean. One function for what concerns a call, one for what concerns a message."""

from __future__ import annotations

from redis import exceptions as client

from msgbus.errors import (
    AuthenticationFailed,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    MsgbusError,
    PublishRejected,
    PublishUnknown,
)

CLIENT_ERRORS = (MsgbusError, client.RedisError, OSError)
"""What a call may raise, `TimeoutError` among them. Anything else is a bug."""
MOVED = (client.MovedError, client.ReadOnlyError, client.NoScriptError, client.MasterDownError, client.ClusterDownError)
"""Answers of a server that has not done it, and by whose connection it is not to be tried again."""
_NOT_NOW = (*MOVED, client.AskError, client.TryAgainError, client.BusyLoadingError)
_NOT_NOW_CODES = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "NOREPLICAS", "BUSY", "UNBLOCKED")


def call_error(error: BaseException, what: str) -> MsgbusError:
    """What became of a call that stores nothing, or that can be made again. For `raise … from error`."""
    if isinstance(error, MsgbusError):
        return error
    if isinstance(error, client.AuthenticationError | client.AuthorizationError | client.NoPermissionError):
        return AuthenticationFailed(f"{what}: the Redis server does not let us: {words(error)}")
    if "CERTIFICATE" in str(error):  # what TLS says of either side's
        return AuthenticationFailed(f"{what}: {error}")
    kind = ConfigurationError if "DB index" in str(error) else BrokerUnavailable
    return kind(f"{what}: {words(error)}")


def send_error(error: BaseException, message_id: str) -> BrokerError:
    """What became of a message, by the answer to the call that carried it, or its lack."""
    if isinstance(error, BrokerError):  # it never got a connection
        return error
    if isinstance(error, ConfigurationError):
        return PublishRejected(f"message {message_id!r}: {error}")
    if isinstance(error, _NOT_NOW) or (isinstance(error, client.ResponseError) and words(error).startswith(_NOT_NOW_CODES)):
        return BrokerUnavailable(f"message {message_id!r} was not stored: {words(error)}")
    if isinstance(error, client.ResponseError):
        return PublishRejected(f"message {message_id!r} was refused: {words(error)}")
    return PublishUnknown(message_id, words(error))


def words(error: BaseException) -> str:
    """The error's text. redis-py takes the code off those that it knows; people look for this one."""
    text = str(error) or type(error).__name__
    return f"OOM {text}" if isinstance(error, client.OutOfMemoryError) else text


def is_group_gone(error: BaseException) -> bool:
    """The stream or its group has vanished: NOGROUP, or on 7.0 a blocked reader's UNBLOCKED."""
    text = str(error)
    return "NOGROUP" in text or text.startswith("UNBLOCKED the stream key no longer exists") or "no such key" in text.lower()
