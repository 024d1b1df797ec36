"""What the client's errors mean: the one place where they become msgbus's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiormq import exceptions as client

from msgbus.errors import (
    AuthenticationFailed,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    PublishRejected,
    PublishUnknown,
    TopologyMismatch,
)

CALL = 15.0
"""Seconds that a call may take. A quorum queue that is declared while its nodes restart takes a few."""

_REFUSED = (client.ChannelAccessRefused, client.ChannelNotFoundEntity, client.ChannelPreconditionFailed, client.PublishError)

_CLIENTS = (client.AMQPError, client.ChannelInvalidStateError, OSError, asyncio.CancelledError)  # TimeoutError is an OSError


@asynccontextmanager
async def calling(doing: str, seconds: float = CALL) -> AsyncGenerator[None, None]:
    """Around calls of the client that store nothing: they are over in time, and raise msgbus's errors. Who is cancelled sees that, also
    where the client swallows it, or says something else of the channel that it has ended."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        async with asyncio.timeout(seconds):
            yield
    except (Exception, asyncio.CancelledError) as error:
        if not (isinstance(error, _CLIENTS) or type(error) is Exception):  # of no kind: where the client knows no reason
            raise
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # ours; if nobody cancelled us it is the client's word for a link that was lost (R5)
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise call_error(error, doing) from error
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError


def call_error(error: BaseException, doing: str) -> BrokerError | ConfigurationError:
    """What became of a call that stores nothing."""
    said = f"{doing}: {words(error)}"
    refused = isinstance(error, client.ProbableAuthenticationError | client.AuthenticationError | client.ChannelAccessRefused)
    if refused or "CERTIFICATE" in said:  # what TLS says of either side's; of the client's as the text of a lost link
        return AuthenticationFailed(said)
    if isinstance(error, client.ChannelPreconditionFailed):  # its text names the resource and both values
        return TopologyMismatch(doing, "what msgbus declares", words(error))
    if isinstance(error, client.ConnectionNotAllowed | client.ConnectionNotImplemented):
        return ConfigurationError(said)
    return BrokerUnavailable(said)


def send_error(error: BaseException, message_id: str, alone: bool) -> BrokerError:
    """What became of a message that was written. `alone`: nothing else was under way on its channel, so the channel's end is the answer to
    this one; the mates of a message that ends a channel may be stored or not (R21)."""
    if isinstance(error, client.PublishError) or (alone and isinstance(error, _REFUSED)):
        return PublishRejected(f"message {message_id!r} was refused: {words(error)}")
    return PublishUnknown(message_id, words(error))


def is_missing(error: BrokerError) -> bool:
    """The broker says that there is no such thing."""
    return isinstance(error.__cause__, client.ChannelNotFoundEntity)


def is_locked(error: BrokerError) -> bool:
    """The broker says that it is another connection's alone."""
    return isinstance(error.__cause__, client.ChannelLockedResource)


def words(error: BaseException) -> str:
    """The error's text, or its name."""
    return "the link was lost" if isinstance(error, asyncio.CancelledError) else str(error) or type(error).__name__
