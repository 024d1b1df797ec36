"""`msgbus dead`: what a group has given up on: look at it, send it back, or discard it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.json import JSON
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import Json, Url, Where, confirm, err, failing, finish, load, note_private, opened, out, say, show, show_json
from msgbus.dead_letters import DeadLetter, DeadLetters
from msgbus.errors import ConfigurationError, NotFound
from msgbus.runtime import Runtime

SHOWN = 50
"""Rows of a table, unless `--limit` says otherwise."""

app = typer.Typer(help="What a group has given up on.", no_args_is_help=True, rich_markup_mode=None)


class ReasonName(StrEnum):
    """Why a message was given up."""

    exhausted = "exhausted"
    invalid = "invalid"
    unsupported = "unsupported"
    expired = "expired"
    poison = "poison"
    rejected = "rejected"
    idempotency_conflict = "idempotency_conflict"


Topic = Annotated[
    str | None, typer.Option("--topic", "-t", metavar="TOPIC", help="Without the namespace. May be left out where there is one choice.")
]
GroupName = Annotated[str | None, typer.Option("--group", "-g", metavar="GROUP", help="May be left out where there is one choice.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many.")]
WithReason = Annotated[
    ReasonName | None, typer.Option("--reason", metavar="REASON", help=f"Only those given up for it: {', '.join(ReasonName)}.")
]
Ids = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this one. May be given several times.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do nothing, and say how many it would be.")]


@dataclass
class Choice:
    """Which dead letters are meant; counts what it is asked about, which is how far a command has come."""

    reason: str | None = None
    ids: frozenset[str] = frozenset()
    looked_at: int = 0
    matched: int = 0
    on_look: Callable[[], None] | None = None

    @property
    def narrow(self) -> bool:
        """Whether it leaves any out."""
        return self.reason is not None or bool(self.ids)

    def __call__(self, letter: DeadLetter) -> bool:
        self.looked_at += 1
        if self.on_look is not None:
            self.on_look()
        fits = (self.reason is None or letter.reason == self.reason) and (not self.ids or letter.id in self.ids)
        self.matched += fits
        return fits


def choice(reason: ReasonName | None, ids: list[str] | None) -> Choice:
    """From the options of a command."""
    return Choice(None if reason is None else reason.value, frozenset(ids or ()))


@asynccontextmanager
async def dead_letters(
    bus: Bus, topic: str | None, group: str | None, *, note: bool = True
) -> AsyncGenerator[tuple[DeadLetters, str], None]:
    """The dead letters that `--topic` and `--group` mean, and their name.

    Raises `ConfigurationError` with the choices where that is not clear.
    """
    async with opened(bus) as runtime:
        if note:
            note_private(runtime)
        chosen_topic, chosen_group = _choose(runtime, topic, group)
        runtime.plans = []  # so that a look declares nothing, not even what this program would
        yield DeadLetters(lambda: runtime, chosen_topic, chosen_group), f"topic {chosen_topic!r}, group {chosen_group!r}"


def _choose(runtime: Runtime, topic: str | None, group: str | None) -> tuple[str, str]:
    if topic is not None and group is not None:
        return topic, group
    all_of_them = [(plan.topic.name, plan.group) for plan in runtime.plans if plan.group is not None]
    found = [one for one in all_of_them if topic in (None, one[0]) and group in (None, one[1])]
    if len(found) == 1:
        return found[0]
    listed = "".join(f"\n  --topic {name} --group {of}" for name, of in found or all_of_them)
    if not all_of_them:
        raise ConfigurationError("which dead letters? The program has no group of its own; give --topic and --group")
    given = " ".join(f"--{name} {value}" for name, value in (("topic", topic), ("group", group)) if value is not None)
    problem = "which dead letters? One of" if found else f"no subscription of this program fits {given}; it has"
    raise ConfigurationError(f"{problem}:{listed}")


# ---------------------------------------------------------------- list


@app.command("list", short_help="List them, oldest first.")
def list_letters(
    where: Where,
    topic: Topic = None,
    group: GroupName = None,
    limit: Limit = None,
    reason: WithReason = None,
    ids: Ids = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List them, oldest first, without taking them: a table of 50 unless --limit says otherwise; with --json all, one a line."""
    finish(where, url, lambda bus: _list(bus, topic, group, limit, choice(reason, ids), as_json))


async def _list(bus: Bus, topic: str | None, group: str | None, limit: int | None, which: Choice, as_json: bool) -> None:
    async with dead_letters(bus, topic, group) as (letters, _):
        if as_json:
            async for letter in letters.list(where=which, limit=limit):
                show_json(letter_json(letter), indent=None)
            return
        most = limit or SHOWN
        found = [letter async for letter in letters.list(where=which, limit=most + 1)]
        total = await letters.count()
    if not found:
        show(Text("no dead letters" + (" that fit" if which.narrow and total else "")))
        return
    more = len(found) > most
    of = f" of {total}" if total is not None and not which.narrow else ""
    show(
        tables.dead_letters(found[:most], out().width),
        Text(f"{min(len(found), most)}{of}" + ("; more with --limit, or all with --json" if more else "")),
    )


def letter_json(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as plain values; the body as text where it is UTF-8, else in base64."""
    try:
        body, encoding = letter.body.decode(), "utf-8"
    except UnicodeDecodeError:
        body, encoding = base64.b64encode(letter.body).decode(), "base64"
    return {
        "id": letter.id,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "deliveries": letter.deliveries,
        "dead_at": letter.dead_at,
        "redrives": letter.redrives,
        "headers": dict(letter.headers),
        "record": dict(letter.record),
        "body": body,
        "body_encoding": encoding,
    }


# ---------------------------------------------------------------- show


@app.command("show", short_help="Show one, with its record and body.")
def show_letter(
    where: Where,
    letter_id: Annotated[str, typer.Option("--id", metavar="ID", help="Which one.")],
    topic: Topic = None,
    group: GroupName = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show one: the whole record of its death, its headers and its body."""
    finish(where, url, lambda bus: _show(bus, topic, group, letter_id, as_json))


async def _show(bus: Bus, topic: str | None, group: str | None, letter_id: str, as_json: bool) -> None:
    async with dead_letters(bus, topic, group) as (letters, _):
        letter = await letters.show(letter_id)
    if as_json:
        show_json(letter_json(letter))
        return
    facts = {"id": letter.id, **letter.record, "sent back": f"{letter.redrives} times"}
    show(tables.facts("Dead letter", [(name, value) for name, value in facts.items() if value], ("record", "value")))
    if letter.headers:
        show(tables.facts("Headers", letter.headers.items(), ("name", "value")))
    show(Group(Text(f"Body, {len(letter.body):,} bytes", style="bold"), _body(letter.body)))


def _body(body: bytes) -> JSON | Text:
    """Pretty where it is JSON, text where it is text, else as Python writes bytes."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return Text(repr(body))
    try:
        return JSON.from_data(json.loads(text), ensure_ascii=False)
    except ValueError:
        return Text(text)


# ---------------------------------------------------------------- redrive


@app.command("redrive", short_help="Send them back to their group.")
def redrive(
    where: Where,
    topic: Topic = None,
    group: GroupName = None,
    limit: Limit = None,
    reason: WithReason = None,
    ids: Ids = None,
    rate: Annotated[float | None, typer.Option("--rate", metavar="N", min=0.001, help="At most so many a second.")] = None,
    dry_run: DryRun = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also those sent back 3 times before, and those older than stores remember.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Send them back to the group they came from, attempts counted anew. Ctrl-C stops it at any message; nothing is lost."""
    which = choice(reason, ids)
    sent = finish(where, url, lambda bus: _redrive(bus, topic, group, which, limit, rate, dry_run, force))
    left = max(0, which.matched - sent) if limit is None or sent < limit else 0
    if as_json:
        show_json({"dry_run": dry_run, "redriven": sent, "left": left}, indent=None)
        return
    show(Text(f"{sent} {'would be sent back' if dry_run else 'sent back'}"))
    if left:
        show(Text(f"{left} left where they are: sent back 3 times before, or older than stores remember (--force), or expired"))


async def _redrive(
    bus: Bus,
    topic: str | None,
    group: str | None,
    which: Choice,
    limit: int | None,
    rate: float | None,
    dry_run: bool,
    force: bool,
) -> int:
    async with dead_letters(bus, topic, group) as (letters, _):
        total = await letters.count()
        with _progress("sending back" if not dry_run else "looking") as (bar, task):
            bar.update(task, total=total if limit is None or total is None or which.narrow else min(limit, total))
            which.on_look = lambda: bar.advance(task)
            try:
                sent = await letters.redrive(where=which, limit=limit, rate=rate, dry_run=dry_run, force=force)
            except BaseException:
                if not dry_run:
                    say("stopped on the way: what was sent back is sent back, the rest is where it was")
                raise
    _expect(which)
    return sent


class _progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, what: str) -> None:
        console = err()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._what = what

    def __enter__(self) -> tuple[Progress, TaskID]:
        self._bar.start()
        return self._bar, self._bar.add_task(self._what, total=None)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _expect(which: Choice) -> None:
    """A dead letter that was named must be there."""
    if which.ids and which.matched < len(which.ids):
        raise NotFound(f"of the {len(which.ids)} ids given, {which.matched} are dead letters here")


# ---------------------------------------------------------------- purge


@app.command("purge")
def purge(
    where: Where,
    topic: Topic = None,
    group: GroupName = None,
    reason: WithReason = None,
    ids: Ids = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Discard them for good."""
    with failing():
        bus = load(where, url)
        counted, of = asyncio.run(_count(bus, topic, group, choice(reason, ids)))
        purged = 0
        if not dry_run and counted != 0:
            confirm(f"Discard {'all' if counted is None else counted} dead letters of {of} for good?", yes=yes)
            purged = asyncio.run(_purge(bus, topic, group, choice(reason, ids)))
    if as_json:
        show_json({"dry_run": dry_run, "purged": counted if dry_run else purged}, indent=None)
    else:
        show(Text(f"{counted} would be discarded" if dry_run else f"{purged} discarded"))


async def _count(bus: Bus, topic: str | None, group: str | None, which: Choice) -> tuple[int | None, str]:
    async with dead_letters(bus, topic, group) as (letters, of):
        if not which.narrow:
            return await letters.count(), of
        found = [letter.id async for letter in letters.list(where=which)]
        _expect(which)
        return len(found), of


async def _purge(bus: Bus, topic: str | None, group: str | None, which: Choice) -> int:
    async with dead_letters(bus, topic, group, note=False) as (letters, _):
        return await letters.purge(where=which)
