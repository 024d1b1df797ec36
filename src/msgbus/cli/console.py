"""What every command shares: its options, where text goes, how errors end, and a bus opened to be looked at."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli.loading import load_bus
from msgbus.contract.adapter import Capability
from msgbus.errors import MsgbusError
from msgbus.inbound.plan import check_topics, plan_all
from msgbus.runtime import Runtime
from msgbus.urls import hide_secrets

T = TypeVar("T")

FAILED = 1
INTERRUPTED = 130

Where = Annotated[str, typer.Argument(metavar="APP:BUS", help="module:attribute of the Bus, or of a function that makes it.")]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="The broker, in place of what the program or MSGBUS_URL says.")]
Json = Annotated[bool, typer.Option("--json", help="JSON in place of tables.")]


def out() -> Console:
    """Where data goes. Made a time: tests and pipes exchange the streams."""
    return Console(highlight=False, soft_wrap=False)


def err() -> Console:
    """Where words go: errors, notes, progress, questions."""
    return Console(stderr=True, highlight=False)


def say(text: str, style: str = "") -> None:
    """A line on stderr, whatever it holds, not cut and not wrapped where it is not a terminal."""
    err().print(Text(text, style=style), soft_wrap=True)


def show(*parts: RenderableType, wrapped: bool = True) -> None:
    """Tables and lines on stdout; an empty line behind each table. Not `wrapped`: a line stays one, however long."""
    console = out()
    for part in parts:
        console.print(part, soft_wrap=not wrapped)
        if isinstance(part, Table):
            console.print()


def show_json(value: object, *, indent: int | None = 2) -> None:
    """JSON on stdout: one document, or, without indent, one line of many."""
    sys.stdout.write(json.dumps(value, indent=indent, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)


def fail(text: str) -> NoReturn:
    """Says why, and exits 1."""
    say(f"error: {text}", "red" if err().is_terminal else "")
    raise typer.Exit(FAILED)


@contextmanager
def failing() -> Generator[None, None, None]:
    """What msgbus raises becomes a line on stderr and exit 1, never a traceback. Anything else is a bug and shows one."""
    try:
        yield
    except MsgbusError as error:
        fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def finish(where: str, url: str | None, work: Callable[[Bus], Coroutine[Any, Any, T]]) -> T:
    """Loads the bus, outside of any event loop as a program expects to be imported, and does a command's work with it."""
    with failing():
        return asyncio.run(work(load(where, url)))


def load(where: str, url: str | None) -> Bus:
    """The bus of a command. Raises `MsgbusError`."""
    bus = load_bus(where)
    if url is not None:
        bus.use_url(url)
    return bus


def broker_shown(bus: Bus) -> str:
    """The broker's URL without secrets, or the adapter that the program made by hand."""
    if bus.given_adapter is not None:
        return f"{bus.given_adapter.name}, made by the program"
    url = bus.find_url()
    return "memory://" if url is None else hide_secrets(url)


@asynccontextmanager
async def connected(bus: Bus, *, offline: bool = False) -> AsyncGenerator[Runtime, None]:
    """The parts of a bus, connected (not, with `offline`), nothing checked, declared or running. Raises as entering the bus does."""
    runtime = bus.make_runtime()
    if not offline:
        with err().status(Text(f"connecting to {broker_shown(bus)} ...")):
            await runtime.patiently(runtime.adapter.open)
    try:
        yield runtime
    finally:
        if not offline:
            await runtime.close()


@asynccontextmanager
async def opened(bus: Bus, *, offline: bool = False) -> AsyncGenerator[Runtime, None]:
    """As `connected`, with every promise checked and its `plans` made."""
    async with connected(bus, offline=offline) as runtime:
        check_topics(runtime.topics.values(), runtime.adapter)
        runtime.plans = plan_all(runtime.subscriptions, runtime.topics, runtime.defaults, runtime.adapter)
        if not offline:
            runtime.plans = [await runtime.adopt(plan) for plan in runtime.plans]
        yield runtime


def note_private(runtime: Runtime) -> None:
    """A broker in the memory of one process has nothing to show to another: said before an empty answer misleads."""
    if Capability.SHARED not in runtime.adapter.capabilities:
        say(
            f"note: {runtime.adapter.name}:// lives in one process, and this command is one of its own: "
            "what another process published or gave up is not here",
            "yellow",
        )


def confirm(question: str, *, yes: bool) -> None:
    """Asks on stderr; anything but a yes, and nobody there to answer, ends the command with exit 1. `yes`: does not ask."""
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        say("")
        fail("nobody answered, so nothing was done; --yes does it without asking")
    if not agreed:
        fail("nothing was done")
