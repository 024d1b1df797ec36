"""The reckoning: what customers were told against the books of the services. Each order must be in each book, once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.shop.books import BOOKS, Line
from examples.shop.demo import Outcome
from rich.table import Table


@dataclass(frozen=True)
class Judgement:
    """What is wrong with a book. All zero: nothing."""

    lost: int
    """Orders that were accepted, and are not in it as they were."""
    twice: int
    """Lines more than there are orders."""
    unknown: int
    """Orders that no customer was told of."""
    out_of_order: int
    """Lines behind one that the same customer bought later."""


def judge(accepted: Sequence[Line], book: Sequence[Line]) -> Judgement:
    """Compares a book with what was accepted, which is, of each customer, in the order bought."""
    place = {line.order_id: number for number, line in enumerate(accepted)}
    orders = {line.order_id for line in book}
    latest: dict[str, int] = {}
    out_of_order = 0
    for line in book:
        number, last = place.get(line.order_id, -1), latest.get(line.customer, -1)
        out_of_order += number < last
        latest[line.customer] = max(number, last)
    return Judgement(len(set(accepted) - set(book)), len(book) - len(orders), len(orders - place.keys()), out_of_order)


def problems(outcome: Outcome, orders: int, kills: int) -> list[str]:
    """What does not add up, a sentence each."""
    accepted = outcome.told.accepted
    found: list[str] = []
    if len(accepted) != orders:
        found.append(f"{len(accepted)} of {orders} orders were accepted")
    if outcome.told.two_orders:
        found.append(f"{outcome.told.two_orders} requests became two orders each")
    for service, book in outcome.books.items():
        judgement = judge(accepted, book)
        for count, what in (
            (judgement.lost, "orders are lost"),
            (judgement.twice, "lines are there a second time"),
            (judgement.unknown, "orders are there that no customer was told of"),
            (judgement.out_of_order, "lines stand behind a later one of the same customer"),
        ):
            if count:
                found.append(f"{service}: {count} {what}")
    if outcome.left:
        found.append(f"{outcome.left} messages or rows of an outbox were never done")
    found += [f"{part} was killed {count} times, and not {kills}" for part, count in outcome.killed.items() if count != kills]
    return found


def reconciliation(outcome: Outcome, title: str) -> Table:
    """The table that the demo ends with."""
    told = outcome.told
    expected = len(told.accepted)
    table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
    table.add_column("part", "expected", no_wrap=True)
    table.add_column("has", no_wrap=True)
    table.add_column("count", f"{expected:,}", justify="right")
    for name, footer in (("lost", "0"), ("twice", "0"), ("out of order", "0"), ("again", "any"), ("killed", "")):
        table.add_column(name, footer, justify="right")
    none = "[dim]–[/]"
    table.add_row("customers", "accepted", f"{expected:,}", none, _judged(told.two_orders, 0), none, f"{told.unanswered:,}", none)
    again = {**outcome.repeated, "orders": told.repeated}
    for part, killed in outcome.killed.items():
        book = outcome.books.get(part)
        if book is None:
            table.add_row(part, none, none, none, none, none, none, f"{killed:,}")
            continue
        judgement = judge(told.accepted, book)
        table.add_row(
            part,
            BOOKS[part],
            _judged(len(book), expected),
            _judged(judgement.lost, 0),
            _judged(judgement.twice, 0),
            _judged(judgement.out_of_order, 0),
            f"{again[part]:,}",
            f"{killed:,}",
        )
    return table


def _judged(number: int, expected: int) -> str:
    return f"[green]{number:,}[/]" if number == expected else f"[bold red]{number:,} ✗[/]"
