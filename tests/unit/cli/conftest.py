"""A program in a directory of its own, a broker of its own, and the command line in this process."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from msgbus.cli.app import app

_numbers = itertools.count()

SHOP = """
    from pydantic import BaseModel
    from msgbus import Bus, Reject, Topic

    class Order(BaseModel):
        order_id: str
        amount: int

    orders = Topic("orders", Order, key="order_id")
    bus = Bus(service="billing")

    @bus.subscribe(orders)
    async def invoice(order: Order) -> None:
        if order.amount < 0:
            raise Reject("no [bold]negative[/bold] amounts")
"""


@dataclass(frozen=True)
class Said:
    """What an invocation answered."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Said]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory of the command: empty, and nothing of it stays imported."""
    for name in list(os.environ):
        if name.startswith("MSGBUS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def write(here: Path) -> Write:
    """Writes a module of the program."""

    def write_module(name: str, text: str) -> Path:
        path = here / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return path

    return write_module


@pytest.fixture
def shop(write: Write) -> None:
    """The program `shop`: one topic, one group, and a handler that rejects negative amounts."""
    write("shop", SHOP)


@pytest.fixture
def url() -> str:
    """A broker that this test has for itself, shared by all of its invocations."""
    return f"memory://cli-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs the command line in this process, on a terminal of `width` columns."""

    def invoke_app(*arguments: str, width: int = 140, answers: str | None = None) -> Said:
        monkeypatch.setenv("COLUMNS", str(width))
        result = CliRunner().invoke(app, list(arguments), input=answers, prog_name="msgbus")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return invoke_app
