"""`msgbus explain`: every topic, group and guarantee of a bus on its broker. Declares nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import Json, Url, Where, broker_shown, finish, opened, out, show, show_json
from msgbus.cli.describe import Description, NativeUse, describe, native_uses

Offline = Annotated[bool, typer.Option("--offline", help="Do not connect: only what the program and the adapter say.")]


def explain(where: Where, url: Url = None, offline: Offline = False, as_json: Json = False) -> None:
    """Show what is promised, and who keeps it: subscriptions, topics, groups, guarantees, warnings."""
    finish(where, url, lambda bus: _explain(bus, offline, as_json))


async def _explain(bus: Bus, offline: bool, as_json: bool) -> None:
    async with opened(bus, offline=offline) as runtime:
        description = await describe(runtime, broker_shown(bus), asked=not offline)
        natives = native_uses(runtime)
    if as_json:
        show_json(asdict(description))
    else:
        _show(description, natives)


def _show(description: Description, natives: list[NativeUse]) -> None:
    show(
        tables.header(description),
        tables.subscriptions(description.subscriptions, out().width),
        tables.begins(description.subscriptions),
        tables.topics(description.topics, description.unclaimed),
        tables.guarantees(description.guarantees),
    )
    if description.broker_facts:
        show(tables.facts(f"The broker ({description.adapter})", description.broker_facts.items()))
    if natives:
        show(tables.natives(natives))
    show(*tables.warnings(description.warnings))
    if description.unclaimed:
        show(Text(f"! unclaimed: no group has ever asked for {', '.join(description.unclaimed)}", style="yellow"))
