"""`msgbus run`: says what runs, on which broker, with which guarantees; then runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from msgbus.bus import Bus
from msgbus.cli import logs, tables
from msgbus.cli.console import Json, Url, Where, broker_shown, fail, failing, load, opened, out, say, show, show_json
from msgbus.cli.describe import describe
from msgbus.errors import MsgbusError

log = logging.getLogger("msgbus")


class Level(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def run(
    where: Where,
    url: Url = None,
    log_level: Annotated[Level | None, typer.Option("--log-level", help="Log from this level on (default: info).")] = None,
    as_json: Json = False,
) -> None:
    """Consume until SIGTERM or Ctrl-C, then drain; a second signal ends it now.

    Exit 0 when it was stopped; 1 when it could not start, or a subscription ended by a bug.
    """
    with failing():
        bus = load(where, url)
        logged = logs.set_up(None if log_level is None else log_level.value)
        if bus.given_adapter is None and bus.find_url() is None:
            fail(
                "no broker is set: export MSGBUS_URL=... or write --url ... (amqp://, kafka://, redis://); "
                "if a broker that lives in this process alone is meant, --url memory://"
            )
        try:
            asyncio.run(_run(bus, as_json))
        except MsgbusError:
            raise
        except Exception as error:  # a bug that ended a subscription, or the program's own lifespan
            if id(error) not in logged.shown:
                log.exception("the program ended by an error")
            fail(f"it ended by an error that is a bug: {type(error).__name__}: {error}")


async def _run(bus: Bus, as_json: bool) -> None:
    async with opened(bus) as runtime:
        description = await describe(runtime, broker_shown(bus), asked=True)
    if as_json:
        show_json(asdict(description), indent=None)
    elif not out().is_terminal:  # a log, where tables are in the way: `msgbus explain` has them
        show(tables.header(description), *tables.in_lines(description.subscriptions), *tables.warnings(description.warnings), wrapped=False)
    else:
        show(
            tables.header(description),
            tables.subscriptions(description.subscriptions, out().width),
            tables.guarantees(description.guarantees),
            tables.facts(f"The broker ({description.adapter})", description.broker_facts.items()),
            *tables.warnings(description.warnings),
        )
    await bus.run()
    say("stopped")
