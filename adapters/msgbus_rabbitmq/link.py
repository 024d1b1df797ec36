"""Connections: opened by who needs one, once, and never by themselves; and the channel for what asks the broker something.

Three: publishing, consuming, asking. A broker that is short of memory stops reading from who publishes (R11), and an answer that says no
ends its channel (R16), so questions are asked on a channel that nothing else depends on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from ssl import SSLError
from typing import Any

import aiormq
from aiormq import Channel, Connection
from aiormq import exceptions as client
from aiormq.connection import SSLContextProvider, TransportFactory
from yarl import URL

from msgbus.errors import BrokerError, BrokerUnavailable, ConfigurationError
from msgbus_rabbitmq.errors import calling
from msgbus_rabbitmq.url import Place

CLOSE = 3.0
AT_ONCE = 32
"""Acks and nacks that a channel has under way to a quorum queue. The broker keeps what is more in the channel until these are applied."""


class Transport(TransportFactory):
    """Opens the socket, and keeps it at hand: only so can a connection end at once."""

    writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **given: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:  # Any: aiormq's signature
        """For aiormq."""
        provider: SSLContextProvider = given["ssl_context_provider"]
        try:
            context = await provider.get_context() if url.scheme == "amqps" else None
        except OSError as error:
            raise ConfigurationError(f"cafile, capath, certfile or keyfile cannot be read: {error}") from error
        if self.writer is not None:
            self.writer.transport.abort()  # whatever became of the connection before
        reader, self.writer = await asyncio.open_connection(url.host, url.port, ssl=context)
        return reader, self.writer


class Link:
    """One connection to the broker, which may be lost; whoever asks for it when it is not there has it opened again, once."""

    def __init__(self, place: Place, heartbeat: float, purpose: str) -> None:
        self._place = place
        self._url = place.client_url(heartbeat, f"msgbus {purpose}")
        self._opening = asyncio.Lock()
        self.numbering = asyncio.Lock()
        """Members of one connection take their numbers one after the other: to the broker its exclusive queues are free for all of them."""
        self._connection: Connection | None = None
        self._transport = Transport()
        self._ended = False

    async def connection(self) -> Connection:
        """Raises `BrokerUnavailable`, `AuthenticationFailed` or `ConfigurationError`."""
        async with self._opening:
            if self._ended:
                raise BrokerUnavailable("the RabbitMQ adapter is not open")
            if self._connection is None or self._connection.is_closed:
                doing = f"connecting to {self._place.shown}"
                try:
                    async with calling(doing, self._place.connection_timeout):
                        self._connection = await aiormq.connect(self._url, transport_factory=self._transport)
                except BrokerError as error:
                    self.abort()
                    if isinstance(error, BrokerUnavailable) and isinstance(error.__cause__, client.AMQPConnectionError | SSLError):
                        raise BrokerUnavailable(f"{error} (amqps:// is for a port with TLS, amqp:// for one without)") from error
                    # a no where Open-Ok was expected; aiormq keeps its text. A heartbeat there is who was too slow to answer.
                    if isinstance(error.__cause__, client.InvalidFrameError) and "Connection.Close" in str(error):
                        raise ConfigurationError(f"{doing}: there is no virtual host {self._place.vhost!r}, or not for us") from error
                    raise
            return self._connection

    async def channel(self, confirms: bool = False) -> Channel:
        """A new one. Errors as of `connection`."""
        connection = await self.connection()
        async with calling("opening a channel"):
            channel = await connection.channel(publisher_confirms=confirms)
            assert isinstance(channel, Channel)  # only its class knows all of its methods' arguments
            return channel

    async def stopped_reading(self) -> bool:
        """Whether the broker said that it reads nothing from us for now (R11). Waits for nothing."""
        if self._connection is None or self._connection.is_closed:
            return False
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()
        except TimeoutError:
            return True
        return False

    async def close(self) -> None:
        """In good order if the broker answers; bounded."""
        self._ended = True
        if self._connection is not None and not self._connection.is_closed:
            with suppress(BrokerError):
                async with calling("closing", CLOSE):
                    await self._connection.close()
        self.abort()

    def end(self) -> None:
        """`abort`, and nobody opens it again."""
        self._ended = True
        self.abort()

    def abort(self) -> None:
        """As the death of the process would."""
        if self._transport.writer is not None:
            self._transport.writer.transport.abort()


class Asking:
    """Questions and declarations, one block of them at a time, on a channel of their own that is opened again after a no."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._one = asyncio.Lock()
        self._channel: Channel | None = None
        self._spoilt: Channel | None = None
        """Of a block that failed: an answer may still come to it. It ends before the next block."""

    @asynccontextmanager
    async def __call__(self, doing: str) -> AsyncGenerator[Channel, None]:
        """The channel. Raises msgbus's errors; a no that means something is the cause."""
        async with self._one:
            if self._spoilt is not None:
                with suppress(BrokerError):
                    async with calling("closing a channel", CLOSE):
                        await self._spoilt.close()
                self._spoilt = None
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._link.channel(confirms=True)
            try:
                async with calling(doing):
                    yield self._channel
            except BaseException:
                self._spoilt, self._channel = self._channel, None
                if await self._link.stopped_reading():  # a new group's name is a publish, too: no question would be answered after it
                    self._link.abort()
                raise


async def give_back(channel: Channel, queues: Iterable[str]) -> None:
    """All that is un-settled, before the channel's end, which overtakes what is more than `AT_ONCE` (R23). `queues`: where it may be more.
    A get is answered when that many are applied, and then the rest is under way; what is got goes back, too."""
    for queue in queues:
        await channel.basic_get(queue)
    await channel.basic_nack(0, multiple=True, wait=False)
