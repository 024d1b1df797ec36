"""RedisStore: idempotency in Redis, shared by processes. Every change is one script that compares a token and sets."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import Any

from redis import exceptions as client
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, IdempotencyStore, InProgress, New
from msgbus.errors import ConfigurationError, StoreError
from msgbus_redis.connections import Place

TIMEOUT = 5.0
"""Seconds that a call may take."""

# A hash a key: f, the fingerprint; t, the token, where it is a claim; r, the result, where there is one.
BEGIN = """
local f, t, r = unpack(redis.call('HMGET', KEYS[1], 'f', 't', 'r'))
if not f or t == ARGV[2] then
  redis.call('HSET', KEYS[1], 'f', ARGV[1], 't', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return {'new'}
end
if f ~= ARGV[1] then return {'conflict'} end
if t then return {'claimed', redis.call('PTTL', KEYS[1])} end
return {'done', r}
"""
COMPLETE = """
if redis.call('HGET', KEYS[1], 't') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 't')
if ARGV[3] then redis.call('HSET', KEYS[1], 'r', ARGV[3]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
RENEW = """
if redis.call('HGET', KEYS[1], 't') ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
ABANDON = """
if redis.call('HGET', KEYS[1], 't') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return 1
"""


class RedisStore(IdempotencyStore):
    """What is claimed and done, for all processes that name the same `url` and `prefix`.

    It knows what Redis knows: with an eviction policy other than `noeviction`, or without append-only persistence, what is forgotten is
    run again. Connects when it is first used; `close` when it is done with, after which it can be used again.
    """

    def __init__(self, url: str, *, prefix: str = "msgbus:idempotency:") -> None:
        self._place = Place.from_url(url)
        if self._place.kind not in ("redis", "rediss", "sentinel", "cluster"):
            raise ConfigurationError(f"RedisStore: redis://, rediss://, redis+sentinel:// or redis+cluster://, not {self._place}")
        self._prefix = prefix.encode()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None  # redis-py's clients have types of their own each

    async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
        token = uuid.uuid4().hex
        reply = await self._run(BEGIN, group, key, fingerprint, token, _milliseconds(lease))
        match reply:
            case [b"new"]:
                return New(token)
            case [b"claimed", int(left)]:
                return InProgress(max(left, 0) / 1000)
            case [b"done", result]:
                return AlreadyDone(result)
            case [b"done"]:  # a nil at the end of a script's answer ends it
                return AlreadyDone(None)
            case _:
                return Conflict()

    async def complete(self, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
        remembered = () if result is None else (result,)
        return bool(await self._run(COMPLETE, group, key, token, _milliseconds(ttl), *remembered) == 1)

    async def renew(self, group: str, key: str, token: str, lease: float) -> bool:
        return bool(await self._run(RENEW, group, key, token, _milliseconds(lease)) == 1)

    async def abandon(self, group: str, key: str, token: str) -> bool:
        return bool(await self._run(ABANDON, group, key, token) == 1)

    async def close(self) -> None:
        """Ends the connections. Twice is once."""
        made, self._client = self._client, None
        if made is not None and self._loop is asyncio.get_running_loop():
            await made.aclose()

    def __repr__(self) -> str:
        return f"RedisStore({str(self._place)!r})"

    # ------------------------------------------------------------ inside

    async def _run(self, script: str, group: str, key: str, *arguments: str | int | bytes) -> Any:  # Any: what a script answers
        name = self._name(group, key)
        try:
            async with asyncio.timeout(TIMEOUT):
                made = self._connected()
                try:
                    return await made.evalsha(_SHA[script], 1, name, *arguments)
                except client.NoScriptError:  # nothing of it was run
                    return await made.eval(script, 1, name, *arguments)
        except TimeoutError as error:
            raise StoreError(f"{self!r}: no answer within {TIMEOUT:g} s") from error
        except (client.RedisError, OSError) as error:
            raise StoreError(f"{self!r}: {type(error).__name__}: {error}") from error

    def _name(self, group: str, key: str) -> bytes:
        raw = key.encode("utf-8", "surrogatepass")
        digested = raw if len(raw) <= 255 else b"sha256:" + hashlib.sha256(raw).hexdigest().encode()
        return self._prefix + group.encode() + b":" + digested

    def _connected(self) -> Any:  # Any: Redis or RedisCluster
        """The client of this event loop: connections belong to the one that made them."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop, self._client = loop, self._make()
        return self._client

    def _make(self) -> Any:  # Any: as above
        place = self._place
        host, port = place.addresses[0]
        options: dict[str, Any] = {**place.options, "socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
        if place.kind == "cluster":
            from redis.asyncio.cluster import ClusterNode, RedisCluster

            return RedisCluster(startup_nodes=[ClusterNode(*address) for address in place.addresses], **options)
        once = Retry(NoBackoff(), 0)  # the client's own repetition would take a claim that it has got for another's
        if place.kind == "sentinel":
            sentinel = Sentinel([*place.addresses], sentinel_kwargs={"socket_timeout": TIMEOUT})  # type: ignore[no-untyped-call]  # so it is
            return sentinel.master_for(place.service, retry=once, **options)  # pyright: ignore[reportUnknownMemberType]
        return Redis(host=host, port=port, ssl=place.kind == "rediss", retry=once, **options)


_SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in (BEGIN, COMPLETE, RENEW, ABANDON)}


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
