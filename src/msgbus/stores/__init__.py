"""Idempotency stores: `MemoryStore`, for one process."""

from msgbus.stores.memory import MemoryStore as MemoryStore
