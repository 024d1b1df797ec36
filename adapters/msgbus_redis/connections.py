"""Connections: one command after the other on each, every call under a deadline, nothing tried twice.

redis-py's own client would send again what had no answer (one `xadd()` call stored two entries) and hold a blocked read for a minute;
so its `Connection` is used, which does neither. What is cancelled, or has no answer in time, costs its connection, never an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import hiredis
from redis import exceptions as client
from redis.asyncio import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from msgbus.errors import BrokerError, BrokerUnavailable, ConfigurationError
from msgbus_redis.errors import call_error
from msgbus_redis.scripts import ALL, BY_SHA, SHA

CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 5.0
MAX_SENDS = 16
"""Sends under way at once."""
_FRESH = 0.05
"""Seconds for which a connection that was just used is not looked at before it is used again."""

# redis-py's own packing takes a third of a publisher's time. Its stub says a tuple of one.
_pack = cast(Callable[[tuple[Any, ...]], bytes], hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType]

Command = Sequence[Any]  # Any: str, bytes, int or float
Address = tuple[str, int]


def script(source: str, keys: Sequence[str], arguments: Iterable[Any] = ()) -> Command:
    """The command that runs a script."""
    return ("EVALSHA", SHA[source], len(keys), *keys, *arguments)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server is, from a URL. Its repr shows no secret."""

    scheme: str
    addresses: tuple[Address, ...]
    service: str = ""
    database: int = 0
    options: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    @classmethod
    def from_url(cls, url: str) -> Place:
        """`redis://user:password@host:6379/0`, `rediss://`, `redis+sentinel://host,host/service/0`, `redis+cluster://host,host`."""
        parts = urlsplit(url)
        credentials, at, hosts = parts.netloc.rpartition("@")
        sentinel, cluster = parts.scheme == "redis+sentinel", parts.scheme == "redis+cluster"
        shown = f"{parts.scheme}://{hosts}"
        try:
            addresses = tuple(_address(text, 26379 if sentinel else 6379) for text in (hosts or "localhost").split(","))
            path = [unquote(part) for part in parts.path.split("/") if part]
            service = path.pop(0) if sentinel and path else ""
            database = int(path.pop(0)) if path else 0
            if path or parts.fragment or database < 0:
                raise ValueError("there is more in it than a database")
        except ValueError as error:
            raise ConfigurationError(f"the URL {shown}: {error}; it is redis://user:password@host:6379/0") from None
        if sentinel and not service:
            raise ConfigurationError(f"the URL {shown}: it is redis+sentinel://host:26379,host:26379/SERVICE/0")
        if len(addresses) > 1 and not (sentinel or cluster):
            raise ConfigurationError(f"the URL {shown}: one host; several are for redis+sentinel:// and redis+cluster://")
        if cluster and database:
            raise ConfigurationError(f"the URL {shown}: a cluster has the database 0 alone")
        options: dict[str, Any] = {}
        if at:
            user, _, password = credentials.partition(":")
            options = {"username": unquote(user) or None, "password": unquote(password) or None}
        return cls(parts.scheme, addresses, service, database, options)

    def __str__(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.addresses)
        return f"{self.scheme}://{hosts}" + (f"/{self.service}" if self.service else "") + (f"/{self.database}" if self.database else "")


def _address(text: str, port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("it names no host")
    return parts.hostname, parts.port or port


class Link:
    """One connection, with all scripts loaded. For one call at a time."""

    def __init__(self, connection: Connection, address: Address) -> None:
        self.connection = connection
        self.address = address
        self.used = 0.0
        self.id = 0

    async def prepare(self) -> None:
        """Connects, and makes every script known. Raises the client's errors."""
        await self.connection.connect()  # type: ignore[no-untyped-call]  # redis-py says no types here
        replies = await self.call([("CLIENT", "ID"), *(("SCRIPT", "LOAD", source) for source in ALL)], CALL_TIMEOUT)
        self.id = replies[0] if isinstance(replies[0], int) else 0
        for reply in replies[1:]:
            if isinstance(reply, Exception):
                raise reply

    async def call(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """The answers, in order; an error the server answers is one of them. Anything else raises, and the connection is gone."""
        replies: list[Any] = []
        again: list[int] = []
        connection = self.connection
        try:
            async with asyncio.timeout(timeout):
                await connection.send_packed_command([_pack(tuple(command)) for command in commands], check_health=False)
                for index in range(len(commands)):
                    try:
                        replies.append(await connection.read_response())
                    except client.NoScriptError as error:  # SCRIPT FLUSH: nothing of it was run
                        again.append(index)
                        replies.append(error)
                    except client.ResponseError as error:
                        replies.append(error)
                for index in again:
                    source = BY_SHA[commands[index][1]]
                    both = [_pack(("SCRIPT", "LOAD", source)), _pack(tuple(commands[index]))]
                    await connection.send_packed_command(both, check_health=False)
                    await connection.read_response()
                    try:
                        replies[index] = await connection.read_response()
                    except client.ResponseError as error:
                        replies[index] = error
        except TimeoutError as error:
            self.abort()
            raise TimeoutError(f"no answer within {timeout:.3g} s") from error
        except BaseException:
            self.abort()
            raise
        self.used = time.monotonic()
        return replies

    async def alive(self) -> bool:
        """Whether the server has not closed it meanwhile: what is written to a dead one may or may not have been stored."""
        connection = self.connection
        if not connection.is_connected:
            return False
        if time.monotonic() - self.used < _FRESH:
            return True
        try:
            return not await _can_read(connection)
        except (client.RedisError, OSError):
            return False

    def abort(self) -> None:
        """Ends it at once, without a word."""
        # redis-py ends a connection politely, and by a coroutine: it would wait for a peer that is away.
        writer = getattr(self.connection, "_writer", None)
        if writer is not None:
            writer.transport.abort()
            for name in ("_writer", "_reader"):
                setattr(self.connection, name, None)

    async def close(self) -> None:
        """Ends it, bounded in time."""
        try:
            async with asyncio.timeout(1.0):
                await self.connection.disconnect()
        except (TimeoutError, client.RedisError, OSError):
            self.abort()


async def _can_read(connection: Connection) -> bool:
    look = getattr(connection, "can_read", None) or connection.can_read_destructive  # the name before redis-py 8
    return bool(await look())


class Links:
    """The connections of an open adapter. `call` borrows one; `link` gives one for its own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.closed = False
        self._idle: dict[Address, deque[Link]] = {}
        self._all: set[Link] = set()
        self._turns = asyncio.Semaphore(MAX_SENDS)
        self._slots: list[tuple[int, int, Address]] = []

    async def link(self, key: str) -> Link:
        """A new connection to the server that has a key. `BrokerUnavailable`, `AuthenticationFailed`."""
        self._check()
        address: Address | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                address = await self._address(key)
                link = Link(self._connection(address), address)
                self._all.add(link)
                try:
                    await link.prepare()
                except BaseException:
                    self.drop(link)
                    raise
        except BrokerError:
            raise
        except (client.RedisError, OSError, TimeoutError) as error:
            self._slots.clear()
            at = "" if address is None else f" ({address[0]}:{address[1]})"
            raise call_error(error, f"no connection to Redis at {self.place}{at}") from error
        try:
            self._check()  # it took a while
        except BrokerUnavailable:
            self.drop(link)
            raise
        return link

    async def send(self, key: str, *commands: Command, timeout: float) -> list[Any]:
        """`call` for what may wait long at the server: so many at once and no more, so that leases are renewed all the while."""
        deadline = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                await self._turns.acquire()
        except TimeoutError:
            raise BrokerUnavailable(f"Redis at {self.place} answers too slowly") from None
        try:
            return await self.call(key, *commands, timeout=max(0.001, deadline - time.monotonic()))
        finally:
            self._turns.release()

    async def call(self, key: str, *commands: Command, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """The answers of the server that has a key. `BrokerError`: nothing was written. Else the client's error, or `TimeoutError`."""
        deadline = time.monotonic() + timeout
        link = await self._borrow(key, timeout)
        try:
            replies = await link.call(commands, max(0.001, deadline - time.monotonic()))
        except BaseException:
            self.drop(link)
            raise
        if any(isinstance(reply, client.MovedError | client.ClusterDownError) for reply in replies):
            self._slots.clear()
        self._idle.setdefault(link.address, deque()).append(link)
        return replies

    async def run(self, key: str, *commands: Command, what: str, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """`call` for what stores nothing, or may be repeated: raises only `BrokerError`s, the server's answered ones too."""
        try:
            replies = await self.call(key, *commands, timeout=timeout)
        except (client.RedisError, OSError, TimeoutError) as error:
            raise call_error(error, what) from error
        for reply in replies:
            if isinstance(reply, client.RedisError):
                raise call_error(reply, what) from reply
        return replies

    def drop(self, link: Link) -> None:
        """Ends a connection at once."""
        link.abort()
        self._all.discard(link)

    def abort(self) -> None:
        """Ends all at once."""
        self.closed = True
        for link in list(self._all):
            self.drop(link)
        self._idle.clear()

    async def close(self) -> None:
        """Ends all. Twice is once."""
        self.closed = True
        links, self._all = list(self._all), set()
        self._idle.clear()
        await asyncio.gather(*(link.close() for link in links))

    # ------------------------------------------------------------ inside

    def _check(self) -> None:
        if self.closed:
            raise BrokerUnavailable("the Redis adapter is not open")

    async def _borrow(self, key: str, timeout: float) -> Link:
        self._check()
        address = self.place.addresses[0] if self.place.scheme in ("redis", "rediss") else await self._known(key)
        idle = self._idle.get(address) if address is not None else None
        while idle:
            link = idle.pop()
            if await link.alive():
                return link
            self.drop(link)
        try:
            async with asyncio.timeout(timeout):
                return await self.link(key)
        except TimeoutError:
            raise BrokerUnavailable(f"no connection to Redis at {self.place} within {timeout:.3g} s") from None

    async def _known(self, key: str) -> Address | None:
        """The server of a key as far as it is known without asking."""
        if self.place.service:
            return next((link.address for link in self._all), None)
        slot = key_slot(key.encode())
        return next((address for first, last, address in self._slots if first <= slot <= last), None)

    def _connection(self, address: Address, *, sentinel: bool = False) -> Connection:
        place = self.place
        options: dict[str, Any] = {} if sentinel else {"db": place.database, **place.options}
        kind = SSLConnection if place.scheme == "rediss" or options.pop("tls", False) else Connection
        return kind(
            host=address[0],
            port=address[1],
            protocol=2,  # answers have one shape, whatever the client's version (RESP3 has maps)
            socket_timeout=None,  # deadlines are ours: its own would cover a blocked read too, and try again
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            client_name="msgbus" if not sentinel else None,
            **options,
        )

    async def _address(self, key: str) -> Address:
        place = self.place
        if place.scheme == "redis+sentinel":
            return await self._ask(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", place.service), sentinel=True)
        if place.scheme == "redis+cluster":
            if not self._slots:
                await self._ask(("CLUSTER", "SLOTS"), sentinel=False)
            address = await self._known(key)
            if address is None:
                raise BrokerUnavailable(f"no node of the cluster {place} has the slot of {key}")
            return address
        return place.addresses[0]

    async def _ask(self, command: Command, *, sentinel: bool) -> Address:
        """Asks one after the other of those the URL names where the servers are."""
        problem: Exception = BrokerUnavailable(f"nobody at {self.place} knows")
        for address in self.place.addresses:
            connection = self._connection(address, sentinel=sentinel)
            try:
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py says no types here
                await connection.send_command(*command)
                answer = cast(Any, await connection.read_response())  # Any: what the server says
                if sentinel and answer:
                    return answer[0].decode(), int(answer[1])
                if not sentinel:
                    self._slots = [(first, last, (node[0].decode() or address[0], int(node[1]))) for first, last, node, *_ in answer]
                    return address
            except (client.RedisError, OSError, TimeoutError) as error:
                problem = error
            finally:
                await connection.disconnect(nowait=True)
        if isinstance(problem, BrokerError):
            raise problem
        raise call_error(problem, f"nobody at {self.place} answers") from problem
