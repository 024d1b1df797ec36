"""What the client's and the server's errors mean. One function for what concerns a call, one for what concerns a message."""

from __future__ import annotations

from redis import exceptions as client

from msgbus.errors import AuthenticationFailed, BrokerError, BrokerUnavailable, ConfigurationError, PublishRejected, PublishUnknown

NOT_NOW = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK", "MISCONF", "NOREPLICAS", "BUSY", "UNBLOCKED")
"""Answers of a server that did nothing, and may do it later: a failover, a cluster that moves, a disk that is full."""


def call_error(error: BaseException, what: str) -> BrokerError | ConfigurationError:
    """What became of a call that stores nothing, or that can be made again. For `raise … from error`."""
    if isinstance(error, client.AuthenticationError | client.AuthorizationError | client.NoPermissionError) or words(error).startswith(
        ("NOAUTH", "WRONGPASS", "NOPERM")
    ):
        return AuthenticationFailed(f"{what}: the Redis server does not let us: {words(error)}")
    if "DB index" in words(error):
        return ConfigurationError(f"{what}: {words(error)}")
    return BrokerUnavailable(f"{what}: {words(error)}")


def send_error(error: BaseException, message_id: str) -> BrokerError:
    """What became of a message, by the answer to the call that carried it, or its lack."""
    if isinstance(error, BrokerError):  # it never got a connection
        return error
    if isinstance(error, client.ResponseError | client.BusyLoadingError):
        text = words(error)
        if text.startswith(NOT_NOW) or isinstance(error, client.BusyLoadingError):
            return BrokerUnavailable(f"message {message_id!r} was not stored: {text}")
        return PublishRejected(f"message {message_id!r} was refused: {text}")
    return PublishUnknown(message_id, words(error))


def words(error: BaseException) -> str:
    """The error's text. redis-py takes the code of the errors that it knows off; it is put back where we look for it."""
    text = str(error) or type(error).__name__
    for kind, code in _CODES:
        if isinstance(error, kind) and not text.startswith(code):
            return f"{code} {text}"
    return text


_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (client.OutOfMemoryError, "OOM"),
    (client.ReadOnlyError, "READONLY"),
    (client.NoPermissionError, "NOPERM"),
    (client.ClusterDownError, "CLUSTERDOWN"),
    (client.MasterDownError, "MASTERDOWN"),
    (client.TryAgainError, "TRYAGAIN"),
    (client.MovedError, "MOVED"),
    (client.AskError, "ASK"),
    (client.NoScriptError, "NOSCRIPT"),
)


def is_group_gone(error: BaseException) -> bool:
    """The stream or its group has vanished: NOGROUP, or on 7.0 a blocked reader's UNBLOCKED."""
    text = str(error)
    return "NOGROUP" in text or text.startswith("UNBLOCKED the stream key no longer exists") or "no such key" in text.lower()
