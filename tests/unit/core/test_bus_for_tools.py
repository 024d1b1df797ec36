"""The doors of a bus that tools use: which broker it would take, another one in its place, its parts without opening them."""

from __future__ import annotations

import pytest

from msgbus import Bus
from msgbus.settings import Settings
from msgbus_memory import MemoryAdapter


def test_find_url_says_which_broker_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument first, then the settings; None where nothing says, or an adapter is given by hand."""
    monkeypatch.delenv("MSGBUS_URL", raising=False)
    assert Bus().find_url() is None
    assert Bus(adapter=MemoryAdapter()).find_url() is None
    monkeypatch.setenv("MSGBUS_URL", "memory://environment")
    assert Bus().find_url() == "memory://environment"
    assert Bus("memory://argument").find_url() == "memory://argument"
    assert Bus(settings=Settings(url="memory://settings")).find_url() == "memory://settings"  # type: ignore[arg-type]  # pydantic wraps it


async def test_use_url_takes_the_place_of_whatever_the_program_says() -> None:
    """Also of an adapter that was made by hand; it counts from the next time the bus is entered."""
    for bus in (Bus("memory://program"), Bus(adapter=MemoryAdapter("program"))):
        bus.use_url("memory://tool")
        async with bus:
            assert "memory://tool" in repr(bus.runtime.adapter)


async def test_make_runtime_opens_nothing() -> None:
    """Its adapter is not connected, and the bus is not entered by it."""
    runtime = Bus("memory://", service="shop").make_runtime()
    assert runtime.adapter.name == "memory"
    assert "closed" in repr(runtime.adapter)
