"""RedisStore: idempotency in Redis, shared by processes. Every change is one script that compares a token and sets."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import Any
from urllib.parse import parse_qsl

from redis import exceptions as client

from msgbus.contract.adapter import AdapterSettings
from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, IdempotencyStore, InProgress, New
from msgbus.errors import ConfigurationError, StoreError
from msgbus_redis.adapter import RedisAdapter
from msgbus_redis.connections import Links
from msgbus_redis.errors import CLIENT_ERRORS, MOVED
from msgbus_redis.scripts import digest

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
_SHA = {script: digest(script) for script in (BEGIN, COMPLETE, RENEW, ABANDON)}


class RedisStore(IdempotencyStore):
    """What is claimed and done, for all processes that name the same `url` and `prefix`. `url` is as the bus takes it, with its options.

    It knows what Redis knows: with an eviction policy other than `noeviction`, or without append-only persistence, what is forgotten is
    run again. Connects when it is first used; `close` when it is done with, after which it can be used again.
    """

    def __init__(self, url: str, *, prefix: str = "msgbus:idempotency:") -> None:
        where, _, query = url.partition("?")
        self._place = RedisAdapter.from_url(where, dict(parse_qsl(query, keep_blank_values=True)), AdapterSettings()).place
        if self._place.kind not in ("redis", "rediss", "sentinel", "cluster"):
            raise ConfigurationError(f"RedisStore: redis://, rediss://, redis+sentinel:// or redis+cluster://, not {self._place}")
        self._prefix = prefix.encode()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: Links | None = None

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
        made, self._links = self._links, None
        if made is not None and self._loop is asyncio.get_running_loop():
            await made.close()

    def __repr__(self) -> str:
        return f"RedisStore({str(self._place)!r})"

    # ------------------------------------------------------------ inside

    async def _run(self, script: str, group: str, key: str, *arguments: str | int | bytes) -> Any:  # Any: what a script answers
        name = self._name(group, key)
        links = self._connected()
        try:
            async with asyncio.timeout(TIMEOUT):
                reply: Any = None
                for _ in range(2):  # nothing was done by who is not the one to ask, or no more, and the second time another is asked
                    (reply,) = await links.call(name, ("EVALSHA", _SHA[script], 1, name, *arguments), timeout=TIMEOUT)
                    if not isinstance(reply, MOVED):
                        break
                if isinstance(reply, client.RedisError):
                    raise reply
                return reply
        except TimeoutError as error:
            raise StoreError(f"{self!r}: no answer within {TIMEOUT:g} s") from error
        except CLIENT_ERRORS as error:
            raise StoreError(f"{self!r}: {type(error).__name__}: {error}") from error

    def _name(self, group: str, key: str) -> bytes:
        raw = key.encode("utf-8", "surrogatepass")
        digested = raw if len(raw) <= 255 else b"sha256:" + hashlib.sha256(raw).hexdigest().encode()
        return self._prefix + group.encode() + b":" + digested

    def _connected(self) -> Links:
        """The connections of this event loop: they belong to the one that made them."""
        loop = asyncio.get_running_loop()
        if self._links is None or self._loop is not loop:
            self._loop, self._links = loop, Links(self._place, _SHA)
        return self._links


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
