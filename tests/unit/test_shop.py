"""The example of three services: its reckoning sees what is wrong, and what cannot work is said."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from examples.shop.__main__ import main
from examples.shop.books import Line
from examples.shop.customers import Told
from examples.shop.demo import Outcome
from examples.shop.parts import Part, ShopError
from examples.shop.places import SERVICES
from examples.shop.reconcile import problems, reconciliation
from rich.console import Console

A1, B1, A2, B2 = BOUGHT = [
    Line("a1", "ann", "tea", 350),
    Line("b1", "ben", "cup", 1290),
    Line("a2", "ann", "cup", 1290),
    Line("b2", "ben", "tea", 350),
]
BILLED = [A1, A2, B1, B2]
"""Another order than that in which they were accepted, but of each customer the same."""


def outcome(book: Sequence[Line] = BILLED) -> Outcome:
    """Two customers bought two things each, and this is what billing made of it."""
    books = {service: book if service == "billing" else BILLED for service in SERVICES}
    return Outcome(Told(accepted=list(BOUGHT)), books, dict.fromkeys((*SERVICES, "relay"), 2), dict.fromkeys(("billing", "shipping"), 1), 0)


def shown(found: Outcome) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(reconciliation(found, "title"))
    return capture.get()


def test_what_adds_up_has_no_problems() -> None:
    """Every order is in each book once, and customers' orders may mix."""
    assert problems(outcome(), 4, 2) == []
    assert "✗" not in shown(outcome())


@pytest.mark.parametrize(
    ("book", "problem"),
    [
        ([A1, A2, B1], "billing: 1 orders are lost"),
        ([A1, A2, B1, B2, A1], "billing: 1 lines are there a second time"),
        ([A1, A2, B1, B2, Line("x", "ann", "tea", 350)], "billing: 1 orders are there that no customer was told of"),
        ([A2, A1, B1, B2], "billing: 1 lines stand behind a later one of the same customer"),
        ([A1._replace(cents=1), A2, B1, B2], "billing: 1 orders are lost"),
    ],
)
def test_a_book_that_is_wrong_is_seen(book: list[Line], problem: str) -> None:
    """A line that lacks, is doubled, unknown, out of its customer's order or altered is a problem, and a cross in the table."""
    assert problem in problems(outcome(book), 4, 2)
    assert "✗" in shown(outcome(book))


def test_what_else_is_wrong_is_seen() -> None:
    """Orders that were not accepted, a request that became two, what was never done, a part that was not killed."""
    told = Told(accepted=list(BOUGHT), two_orders=1)
    found = problems(replace(outcome(), told=told, left=3, killed={"relay": 0}), 5, 2)
    assert found == [
        "4 of 5 orders were accepted",
        "1 requests became two orders each",
        "3 messages or rows of an outbox were never done",
        "relay was killed 0 times, and not 2",
    ]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MSGBUS_URL": "memory://shop"}, "memory:// lives in one process, and this shop is several"),
        ({"MSGBUS_URL": "redis://127.0.0.1:1", "DATABASE_URL": "mysql://127.0.0.1/shop"}, "DATABASE_URL names a PostgreSQL server"),
        ({"MSGBUS_URL": "redis://127.0.0.1:1", "DATABASE_URL": "postgresql://127.0.0.1:1/shop"}, "on which databases can be made"),
        ({"PATH": "/nowhere"}, "no broker is set, and there is no redis-server to be one"),
    ],
)
def test_what_cannot_be_is_said(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broker that processes cannot share, or a database that nothing can be made on: exit code 1, what to do, and nothing starts."""
    for name in ("MSGBUS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "300")
    assert main([]) == 1
    assert said in capsys.readouterr().out


async def until_it_ends(part: Part) -> None:
    while True:
        part.check()
        await asyncio.sleep(0.01)


async def test_a_part_that_ends_by_itself(tmp_path: Path) -> None:
    """It is an error that shows the end of its log; one that was killed and started again is none, nor one that stops when told."""
    part = Part("broken", (sys.executable, "-c", "raise SystemExit('out of tea')"), {}, tmp_path)
    await part.start()
    with pytest.raises(ShopError, match=r"broken ended by itself, with 1:\nout of tea"):
        await until_it_ends(part)
    lasting = Part("lasting", (sys.executable, "-c", "import signal; signal.pause()"), {}, tmp_path)
    await lasting.start()
    await lasting.kill()
    lasting.check()
    assert lasting.killed == 1
    await lasting.start()
    await lasting.stop()
    lasting.check()
