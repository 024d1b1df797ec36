"""`msgbus outbox`: the outbox of the program's store: what waits, what is parked, its schema, and a relay of its own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import FAILED, Json, Url, Where, broker_shown, connected, finish, say, show, show_json
from msgbus.contract.adapter import Capability
from msgbus.contract.outbox import OutboxStatus, TransactionalStore
from msgbus.errors import ConfigurationError, NotFound
from msgbus.running import make_relay

app = typer.Typer(help="The outbox of the program's store.", no_args_is_help=True, rich_markup_mode=None)

Limit = Annotated[int, typer.Option("--limit", min=0, help="Show at most so many parked rows.")]


@app.command("status", short_help="Count what waits, and show what is parked.")
def status(where: Where, limit: Limit = 20, as_json: Json = False) -> None:
    """Count what is due, delayed, parked and sent, and show the oldest parked rows with the broker's reason. Needs no broker.

    Says so, too, where rows are due and no relay takes them.
    """
    finish(where, None, lambda bus: _status(bus, limit, as_json))


async def _status(bus: Bus, limit: int, as_json: bool) -> None:
    async with _store(bus) as store:
        found = await store.status(limit)
    if as_json:
        show_json(asdict(found))
    else:
        show(*_shown(found))
        for problem in found.problems:
            say(f"warning: {problem}")


def _shown(found: OutboxStatus) -> list[Table]:
    headings = ("due", "oldest due", "delayed", "parked", "sent (kept a day)", "a relay took rows")
    counts = tables.table("Outbox", *headings, right=("due", "delayed", "parked"))
    oldest = "" if found.oldest is None else f"{found.oldest:.1f} s"
    last = "never" if found.idle is None else f"{found.idle:.0f} s ago"
    counts.add_row(str(found.due), oldest, str(found.delayed), str(found.parked), str(found.sent), last)
    if not found.parked_rows:
        return [counts]
    parked = tables.table("Parked", "row", "topic", "key", "message", "refused", "reason", right=("row", "refused"))
    for row in found.parked_rows:
        parked.add_row(*(Text(str(row[name] or "")) for name in ("id", "topic", "key", "message_id", "attempts", "last_error")))
    return [counts, parked]


@app.command("relay", short_help="Send the rows, and nothing else.")
def relay(where: Where, url: Url = None) -> None:
    """Send the outbox's rows until SIGTERM or Ctrl-C; runs no handlers. `msgbus run` does it too: this is for a process of its own.

    Any number of relays work side by side. A broker in the memory of one process (memory://) is refused: nobody would have the messages.
    """
    finish(where, url, _relay)


async def _relay(bus: Bus) -> None:
    async with _store(bus), connected(bus) as runtime:
        if Capability.SHARED not in runtime.adapter.capabilities:
            raise ConfigurationError(
                f"{runtime.adapter.name}:// lives in this process, which runs no handlers: what is sent there reaches nobody and counts as "
                "sent. Name a broker that processes share, by MSGBUS_URL or --url"
            )
        relaying = await make_relay(runtime)
        assert relaying is not None  # _store looked
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, relaying.stop)
        say(f"relaying to {broker_shown(bus)}; stop it with Ctrl-C")
        try:
            await relaying.run()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        say(f"stopped; {relaying.sent} messages sent")


@app.command("check", short_help="Compare the live schema with what the store needs.")
def check(where: Where, as_json: Json = False) -> None:
    """Compare the live schema with what the store needs: exit 1 and a line for each table, column or index that is missing."""
    finish(where, None, lambda bus: _check(bus, as_json))


async def _check(bus: Bus, as_json: bool) -> None:
    async with _store(bus) as store:
        problems = await store.problems()
    if as_json:
        show_json({"ok": not problems, "problems": problems})
    for problem in [] if as_json else problems:
        say(f"error: {problem}")
    if problems:
        raise typer.Exit(FAILED)
    if not as_json:
        show(Text(f"ok: {store!r} has what it needs", style="green"))


@app.command("retry", short_help="Make parked rows due again.")
def retry(
    where: Where,
    rows: Annotated[list[int] | None, typer.Argument(metavar="[ROW]...", help="The numbers that status shows.")] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="Every parked row.")] = False,
    as_json: Json = False,
) -> None:
    """Make parked rows due again, the count of refusals begun anew; a relay sends them, and what waits behind them."""
    if bool(rows) == all_of_them:
        raise typer.BadParameter("name rows, or --all")
    finish(where, None, lambda bus: _retry(bus, None if all_of_them else rows, as_json))


async def _retry(bus: Bus, rows: list[int] | None, as_json: bool) -> None:
    async with _store(bus) as store:
        count = await store.retry(rows)
    if rows is not None and count < len(set(rows)):
        raise NotFound(f"{len(set(rows)) - count} of these rows are not parked; {count} are due again")
    if as_json:
        show_json({"due_again": count}, indent=None)
    else:
        show(Text(f"{count} rows are due again"))


@asynccontextmanager
async def _store(bus: Bus) -> AsyncGenerator[TransactionalStore, None]:
    """The program's store, closed afterwards."""
    store = bus.store
    if not isinstance(store, TransactionalStore):
        raise ConfigurationError("the program has no outbox: Bus(store=SqlStore(...)), of msgbus.stores.sql")
    try:
        yield store
    finally:
        await store.close()
