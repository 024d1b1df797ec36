"""msgbus on Redis Streams. Chosen by a URL: `redis://`, `rediss://`, `redis+sentinel://`, `redis+cluster://`."""

from msgbus_redis.adapter import RedisAdapter

__all__ = ["RedisAdapter"]
