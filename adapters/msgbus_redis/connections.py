"""Connections: many calls on the way on one, answered in turn, each under a deadline of its own, nothing tried twice.

redis-py's own client would send again what had no answer (one `xadd()` call stored two entries) and hold a blocked read for a minute;
so its `Connection` is used, which does neither. Who gives up waiting leaves the answer to nobody; the connection goes on.
Sentinels and nodes are asked the one question in the same way: its clients for them would try a dead one again and again first.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import hiredis
from redis import exceptions as client
from redis.asyncio import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from msgbus.contract.options import misshapen, read_reach
from msgbus.errors import BrokerUnavailable
from msgbus_redis.errors import MOVED, call_error
from msgbus_redis.scripts import SOURCES

CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 5.0
GOODBYE = 1.0
"""Seconds that TLS may take to end a connection."""
STALLED = 2.0
"""Seconds without any answer, though some are due, after which a call in vain ends its connection."""

# redis-py's own packing takes a third of a publisher's time. Its stub says a tuple of one.
_pack = cast(Callable[[tuple[Any, ...]], bytes], hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType]

Command = Sequence[Any]  # Any: str, bytes, int or float
Address = tuple[str, int]

_SHAPES = "redis://user:password@host:6379/0 (one host), redis+sentinel://host,host/SERVICE/0, redis+cluster://host,host (no database)"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server is, from a URL. `kind`: redis, rediss, sentinel or cluster. Its repr shows no secret."""

    kind: str
    shown: str
    addresses: tuple[Address, ...]
    service: str
    options: dict[str, Any] = field(repr=False)
    sentinel: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """Options that are others for a Sentinel."""

    @classmethod
    def from_url(cls, url: str) -> Place:
        """`redis://user:password@host:6379/0`, `rediss://`, `redis+sentinel://host,host/service/0`, `redis+cluster://host,host`."""
        kind = url.partition(":")[0].rpartition("+")[2]
        reach = read_reach(url, 26379 if kind == "sentinel" else 6379, _SHAPES, host="localhost")
        path = [*reach.path]
        try:
            service = path.pop(0) if kind == "sentinel" else ""
            database = int(path.pop(0)) if path and kind != "cluster" else 0
            if path or database < 0 or (len(reach.hosts) > 1 and kind.startswith("redis")):
                raise ValueError
        except (ValueError, IndexError):
            raise misshapen(_SHAPES) from None
        options: dict[str, Any] = {"username": reach.user or None, "password": reach.password or None}
        if kind != "cluster":
            options["db"] = database
        behind = "".join(f"/{part}" for part in (service, database) if part)
        own = {"username": None, "password": None, "db": 0}
        return cls(kind, f"{reach.scheme}://{reach.shown}{behind}", reach.hosts, service, options, own)

    def __str__(self) -> str:
        return self.shown


class Link:
    """One connection, with its scripts loaded."""

    def __init__(self, connection: Connection, scripts: Iterable[str]) -> None:
        self._connection = connection
        self._scripts = scripts
        self._waiting: deque[tuple[int, list[Any], asyncio.Future[list[Any]]]] = deque()
        """How many answers a call has, those that came, and who waits for them."""
        self._heard = 0.0
        self._reader: asyncio.Task[None] | None = None
        self._ended = False

    async def open(self) -> None:
        """Connects, and makes every script known. Raises the client's errors."""
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py says no types here
            self._reader = asyncio.create_task(self._read(), name="msgbus redis answers")
            for reply in await self.call([("SCRIPT", "LOAD", source) for source in self._scripts], CALL_TIMEOUT):
                if isinstance(reply, Exception):
                    raise reply
        except BaseException:
            self.abort()
            await _disconnect(self._connection)  # the reader would, but may not be there, or not have begun
            raise

    @property
    def alive(self) -> bool:
        """Whether it can be used: what is written to a dead one may or may not have been stored."""
        return self._connection.is_connected and not self._ended

    async def call(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """The answers, in order; an error the server answers is one of them. Raises `TimeoutError`, and the client's errors."""
        if not self.alive:  # redis-py would connect again, and nobody would read what it answers
            raise client.ConnectionError("the connection is gone")
        packed = [_pack(tuple(command)) for command in commands]
        if not self._waiting:
            self._heard = time.monotonic()
        answered: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((len(packed), [], answered))
        try:
            async with asyncio.timeout(timeout):
                await self._connection.send_packed_command(packed, check_health=False)
                return await answered
        except TimeoutError as error:
            if time.monotonic() - self._heard > STALLED:
                self.abort()
            raise TimeoutError(f"no answer within {timeout:.3g} s") from error

    async def _read(self) -> None:
        problem: Exception = client.ConnectionError("the connection was ended")
        try:
            while True:
                try:
                    reply = cast(Any, await self._connection.read_response(disconnect_on_error=False))  # Any: what the server says
                except client.ResponseError as error:
                    reply = error
                self._heard = time.monotonic()
                count, replies, answered = self._waiting[0]
                replies.append(reply)
                if len(replies) == count:
                    self._waiting.popleft()
                    if not answered.done():
                        answered.set_result(replies)
        except (client.RedisError, OSError) as error:
            problem = error
        finally:
            self._ended = True
            for _, _, answered in self._waiting:
                if not answered.done():
                    answered.set_exception(problem)
                    answered.exception()  # who could not write does not await it, and asyncio would complain
            await _disconnect(self._connection)

    def abort(self) -> None:
        """Ends it at once; returns before it has said goodbye."""
        self._ended = True
        if self._reader is not None:
            self._reader.cancel()

    async def gone(self) -> None:
        """Returns when nothing of it is left."""
        if self._reader is not None:
            await asyncio.wait([self._reader])


class Links:
    """The connections of an open adapter. `call` shares one with others; `link` gives one for its own. `scripts`: what each has loaded."""

    def __init__(self, place: Place, scripts: Iterable[str] = SOURCES.values()) -> None:
        self.place = place
        self._scripts = scripts
        self._closed = False
        self._connecting = asyncio.Lock()
        self._nodes: dict[int, Address] = {}
        """Where a slot was found; of what is no cluster, slot 0."""
        self._shared: dict[tuple[Address | None, str], Link] = {}
        self._all: weakref.WeakSet[Link] = weakref.WeakSet()

    async def call(self, key: str | bytes, *commands: Command, timeout: float = CALL_TIMEOUT, lane: str = "") -> list[Any]:
        """The answers of the server that has a key. What waits long at the server has a `lane` of its own: others wait behind it.

        `BrokerError`: nothing was written. Else the client's error, or `TimeoutError`.
        """
        deadline = time.monotonic() + timeout
        slot = self._slot(key)
        where = self._nodes.get(slot), lane
        link = self._shared.get(where)
        if link is None or not link.alive:
            try:
                async with asyncio.timeout(timeout), self._connecting:
                    where = self._nodes.get(slot), lane
                    link = self._shared.get(where)
                    if link is None or not link.alive:
                        link = await self.link(key, lane)
                        where = self._nodes.get(slot), lane
            except TimeoutError:
                raise BrokerUnavailable(f"no connection to Redis at {self.place} within {timeout:.3g} s") from None
        replies = await link.call(commands, max(0.001, deadline - time.monotonic()))
        elsewhere = [reply for reply in replies if isinstance(reply, MOVED)]
        if elsewhere:
            self._nodes.pop(slot, None)
        if self._shared.get(where) is link and not all(isinstance(reply, client.MovedError) for reply in elsewhere):
            del self._shared[where]  # what is on the way on it may have its answers
            asyncio.get_running_loop().call_later(CALL_TIMEOUT, link.abort)
        return replies

    async def ask(self, key: str, *commands: Command, what: str, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """`call` for what stores nothing, or may be repeated: raises only msgbus's errors. What the server refuses is among the answers."""
        try:
            return await self.call(key, *commands, timeout=timeout)
        except (client.RedisError, OSError) as error:
            raise call_error(error, what) from error

    async def run(self, key: str, *commands: Command, what: str, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """`ask` that raises what the server refuses, too."""
        replies = await self.ask(key, *commands, what=what, timeout=timeout)
        for reply in replies:
            if isinstance(reply, client.RedisError):
                raise call_error(reply, what) from reply
        return replies

    async def link(self, key: str | bytes, lane: str | None = None) -> Link:
        """A connection to the server that has a key: a new one, or the one of a lane. `BrokerUnavailable`, `AuthenticationFailed`."""
        where = f"{self.place}"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                host, port = address = self._nodes[self._slot(key)] = await self._address(key)
                where += f" ({host}:{port})"
                shared = None if lane is None else self._shared.get((address, lane))
                if shared is not None and shared.alive:
                    return shared
                link = Link(self._connection(host, port), self._scripts)
                self._all.add(link)
                await link.open()
        except (client.RedisError, OSError) as error:
            raise call_error(error, f"no connection to Redis at {where}") from error
        if self._closed:  # it took a while
            link.abort()
            raise BrokerUnavailable("the Redis adapter is not open")
        if lane is not None:
            self._shared[address, lane] = link
        return link

    def abort(self) -> None:
        """Ends all at once. Twice is once."""
        self._closed = True
        for link in self._all:
            link.abort()

    async def close(self) -> None:
        """Ends all, and returns when they are gone, in about a second."""
        self.abort()
        for link in list(self._all):
            await link.gone()

    def _connection(self, host: str, port: int, **own: Any) -> Connection:  # Any: redis-py's options have types of their own
        options = {**self.place.options, **own}
        kind = SSLConnection if options.pop("ssl", False) else Connection
        return kind(
            host=host,
            port=port,
            protocol=2,  # answers have one shape, whatever the client's version (RESP3 has maps)
            socket_timeout=None,  # deadlines are ours: its own would cover a blocked read too, and try again
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            client_name="msgbus",
            **options,
        )

    def _slot(self, key: str | bytes) -> int:
        return key_slot(key if isinstance(key, bytes) else key.encode()) if self.place.kind == "cluster" else 0

    async def _address(self, key: str | bytes) -> Address:
        """Of the server that has a key, as the first says that answers: a Sentinel, or any node of a cluster."""
        place = self.place
        if place.kind.startswith("redis"):
            return place.addresses[0]
        problem: Exception | None = None
        for host, port in place.addresses:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT / (len(place.addresses) + 1)):  # who is silent leaves time for the others
                    if place.kind == "cluster":
                        return await self._node(host, port, key)
                    if found := await self._ask(host, port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", place.service, **place.sentinel):
                        return found[0].decode(), int(found[1])
                problem = client.ResponseError(f"the Sentinel at {host}:{port} knows no service {place.service!r}")
            except (client.RedisError, OSError) as error:
                problem = error
        raise problem or AssertionError("a URL has an address")

    async def _node(self, host: str, port: int, key: str | bytes) -> Address:
        try:
            await self._ask(host, port, "EXISTS", key)
        except client.MovedError as moved:
            there: Address = cast(Any, moved).node_addr  # redis-py says no types here
            return there[0] or host, there[1]
        except (client.AskError, client.NoPermissionError):  # it is about to go, or not for us
            pass
        return host, port

    async def _ask(self, host: str, port: int, *question: str | bytes, **own: Any) -> Any:  # Any: what the server says
        connection = self._connection(host, port, **own)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis-py says no types here
            await connection.send_command(*question)
            return cast(Any, await connection.read_response())
        finally:
            await _disconnect(connection)


async def _disconnect(connection: Connection) -> None:
    """TLS says goodbye, and waits for the other's; who is silent is left all the same, and at once where the caller is cut off."""
    writer: asyncio.StreamWriter | None = cast(Any, connection)._writer  # noqa: SLF001  there is no public way to its socket
    try:
        with suppress(client.RedisError, OSError):
            async with asyncio.timeout(GOODBYE):
                await connection.disconnect()
    finally:
        if writer is not None:
            writer.transport.abort()
