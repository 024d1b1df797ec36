"""The reckoning: what went in against what came out. Every departure must be somewhere, or the demo has failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from examples.flights.data import Expected
from examples.flights.results import Carrier
from rich.table import Table


@dataclass(frozen=True)
class GroupOutcome:
    """What one group made of the departures."""

    handled: int
    dead: int
    """Dead letters that the broker holds for it."""
    explained: int
    """Those of them that say, in pydantic's words, that `dep_time` is missing."""
    again: int
    """Repeated deliveries: allowed, and without effect."""


@dataclass(frozen=True)
class Outcome:
    """All that is compared."""

    expected: Expected
    published: int
    groups: Mapping[str, GroupOutcome]
    late: int
    """Different messages on `late-departures`."""
    out_of_order: int

    def lost(self, group: str) -> int:
        """Departures that a group neither handled nor gave up."""
        return self.expected.rows - self.groups[group].handled - self.groups[group].dead

    def problems(self, known: Expected | None = None) -> list[str]:
        """What does not add up, a sentence each. `known`: what the input itself must add up to, where that is known."""
        expected = self.expected
        found: list[str] = []
        if not expected.rows:
            found.append("there is no departure in the input")
        if known is not None and expected != known:
            found.append(f"the input is not the data set that is known: {expected}, and it should be {known}")
        if self.published != expected.rows:
            found.append(f"the feed read {expected.rows:,} departures, and {self.published:,} were confirmed")
        for name, group in self.groups.items():
            if (lost := self.lost(name)) != 0:
                found.append(f"{name}: {lost:,} of {expected.rows:,} departures are neither handled nor dead letters")
            if group.handled != expected.handled:
                found.append(f"{name}: handled {group.handled:,}, expected {expected.handled:,}")
            if group.dead != expected.dead:
                found.append(f"{name}: {group.dead:,} dead letters, expected {expected.dead:,}")
            if group.explained != group.dead:
                found.append(f"{name}: {group.dead - group.explained:,} dead letters have another reason than a missing dep_time")
        if self.late != expected.late:
            found.append(f"late-departures holds {self.late:,} messages, expected {expected.late:,}")
        if self.out_of_order:
            found.append(f"rotation: {self.out_of_order:,} departures came after a later one of the same plane")
        return found


def reconciliation(outcome: Outcome, title: str) -> Table:
    """The table that the demo ends with."""
    table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
    expected = outcome.expected
    table.add_column("group", "expected", no_wrap=True)
    table.add_column("handled", f"{expected.handled:,}", justify="right")
    table.add_column("dead letters", f"{expected.dead:,}", justify="right")
    table.add_column("lost", "0", justify="right")
    table.add_column("out of order", "0", justify="right")
    table.add_column("late departures", f"{expected.late:,}", justify="right")
    table.add_column("came twice", "any", justify="right")
    for name, group in outcome.groups.items():
        table.add_row(
            name,
            _judged(group.handled, expected.handled),
            _judged(group.dead, expected.dead),
            _judged(outcome.lost(name), 0),
            _judged(outcome.out_of_order, 0) if name == "rotation" else "[dim]–[/]",
            _judged(outcome.late, expected.late) if name == "alerts" else "[dim]–[/]",
            f"{group.again:,}",
        )
    return table


def punctuality(carriers: Mapping[str, Carrier], rows: int = 8) -> Table:
    """What the `punctuality` group found: the carriers with the most flights."""
    table = Table(title="Punctuality", title_justify="left", title_style="bold")
    table.add_column("carrier")
    for column in ("flights", "mean delay, min", "late, %"):
        table.add_column(column, justify="right")
    busiest = sorted(carriers.items(), key=lambda item: -item[1].flights)
    for name, carrier in busiest[:rows]:
        table.add_row(
            name, f"{carrier.flights:,}", f"{carrier.minutes / carrier.flights:.1f}", f"{100 * carrier.late / carrier.flights:.1f}"
        )
    if len(busiest) > rows:
        table.add_row(f"[dim]and {len(busiest) - rows} more[/]")
    return table


def _judged(number: int, expected: int) -> str:
    return f"[green]{number:,}[/]" if number == expected else f"[bold red]{number:,} ✗[/]"
