"""`app:bus` → the Bus, and what is said where there is none."""

from __future__ import annotations

import sys

import pytest
from tests.unit.cli.conftest import Invoke, Write

from msgbus import Bus
from msgbus.cli.loading import load_bus
from msgbus.errors import ConfigurationError

FACTORIES = """
    import msgbus
    from msgbus import Bus, Router

    def make():
        return Bus(service="made")

    def make_for(tenant):
        return Bus(service=tenant)

    def make_none():
        return None

    def explode():
        raise RuntimeError("no database")

    async def later():
        return Bus()

    class Container:
        bus = Bus(service="inside")

    router = Router()
    number = 5
    the_bus = Bus(service="plain")
"""


@pytest.mark.parametrize(
    ("where", "service"),
    [("app:the_bus", "plain"), ("app:make", "made"), ("app:Container.bus", "inside")],
)
def test_a_bus_or_a_function_that_makes_one(where: str, service: str, write: Write) -> None:
    """An attribute, a function without parameters, and an attribute of an attribute."""
    write("app", FACTORIES)
    bus = load_bus(where)
    assert isinstance(bus, Bus)


def test_the_attribute_is_bus_unless_said(shop: None) -> None:
    """`shop` means `shop:bus`."""
    assert load_bus("shop") is load_bus("shop:bus")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("ap:the_bus", "there is no module 'ap'; did you mean 'app'?"),
        ("app.sub:bus", "there is no module 'app.sub'"),
        ("app:the_buss", "did you mean app:the_bus?"),
        ("app", "did you mean app:the_bus?"),
        ("app:router", "is a Router; give it to a Bus(routers=[...])"),
        ("app:number", "of type int"),
        ("app:Container", "the class Container"),
        ("app:msgbus", "of type module"),
        ("app:make_for", "needs tenant"),
        ("app:make_none", "returns of type NoneType, not a Bus"),
        ("app:later", "is an async function"),
        ("app:explode", "calling app:explode failed: RuntimeError: no database"),
    ],
)
def test_what_is_no_bus_is_refused_with_the_way_out(where: str, says: str, write: Write) -> None:
    """Each mistake has its own words."""
    write("app", FACTORIES)
    with pytest.raises(ConfigurationError) as refused:
        load_bus(where)
    assert says in str(refused.value)


def test_an_error_inside_the_module_is_told_with_its_place(write: Write, invoke: Invoke) -> None:
    """The user's file and line, the error, and nothing of msgbus or importlib; exit 1."""
    write("broken", "import msgbus\n\nnumber = 1 / 0\n")
    said = invoke("check", "broken")
    assert (said.code, said.out) == (1, "")
    assert "importing 'broken' failed: ZeroDivisionError: division by zero" in said.err
    assert 'broken.py", line 3' in said.err
    assert "importlib" not in said.err
    assert "loading.py" not in said.err


def test_a_missing_module_that_the_program_imports_is_the_program_s_error(write: Write, invoke: Invoke) -> None:
    """It is not confused with the program itself not being there."""
    write("broken", "import no_such_library\n")
    said = invoke("check", "broken")
    assert said.code == 1
    assert "importing 'broken' failed: ModuleNotFoundError: No module named 'no_such_library'" in said.err


def test_what_msgbus_refuses_at_import_is_one_line(write: Write, invoke: Invoke) -> None:
    """A subscription that can never work: its own message, no traceback."""
    write("broken", 'from msgbus import Bus\nbus = Bus()\n@bus.subscribe("orders")\nasync def handle(): ...\n')
    said = invoke("run", "broken", "--url", "memory://")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: handler broken.handle")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("where", ["shop.py", "./shop.py:bus", "shop:bus:more", ":bus"])
def test_what_is_no_module_and_attribute_is_wrong_usage(where: str, shop: None, invoke: Invoke) -> None:
    """Exit 2, with what to write."""
    said = invoke("check", where)
    assert said.code == 2
    assert "write" in said.err


def test_a_module_may_run_an_event_loop_when_it_is_imported(write: Write, invoke: Invoke, url: str) -> None:
    """No event loop runs yet when the program is loaded, by any command."""
    write("loops", 'import asyncio\nasyncio.run(asyncio.sleep(0))\nfrom msgbus import Bus\nbus = Bus(service="s")\n')
    for command in (["check"], ["explain"], ["topics", "list"], ["groups", "list"]):
        said = invoke(*command, "loops", "--url", url)
        assert said.code == 0, said.err
        sys.modules.pop("loops")
