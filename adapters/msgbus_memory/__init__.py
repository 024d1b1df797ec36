"""The memory adapter: a broker that lives in the process, for tests and single-process programs. See README.md."""

from msgbus_memory.adapter import MemoryAdapter

__all__ = ["MemoryAdapter"]
