"""msgbus on Redis Streams. Chosen by a URL: `redis://`, `rediss://`, `redis+sentinel://`, `redis+cluster://`."""

from msgbus_redis.adapter import RedisAdapter
from msgbus_redis.store import RedisStore

__all__ = ["RedisAdapter", "RedisStore"]
