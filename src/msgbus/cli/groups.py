"""`msgbus groups`: the groups of the program's topics, and an end for those that are no longer wanted."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import Json, Url, Where, confirm, failing, finish, load, note_private, opened, show, show_json
from msgbus.cli.describe import groups_of, topics_of
from msgbus.contract.adapter import Adapter, HasDepth, HasGroups
from msgbus.errors import NotFound, UnsupportedFeature

app = typer.Typer(help="The groups of the program's topics.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", short_help="List every group of the program's topics.")
def list_groups(where: Where, url: Url = None, as_json: Json = False) -> None:
    """List every group of the program's topics, other programs' too, and what is left of each."""
    finish(where, url, lambda bus: _list(bus, as_json))


async def _list(bus: Bus, as_json: bool) -> None:
    async with opened(bus) as runtime:
        note_private(runtime)
        found = [group for topic in topics_of(runtime) for group in await groups_of(runtime, topic)]
    if as_json:
        show_json([asdict(group) for group in found])
    else:
        show(tables.group_list(found))


@app.command("drop", short_help="Forget a group.")
def drop_group(
    where: Where,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic's name, without the namespace.")],
    group: Annotated[str, typer.Argument(metavar="GROUP")],
    url: Url = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Forget a group and all that waits for it. Its dead letters stay. Declared again, it is a later group.

    A worker that still runs sees the broker go away.
    """
    with failing():
        bus = load(where, url)
        question = asyncio.run(_question(bus, topic, group))
        confirm(question, yes=yes)  # not connected meanwhile: a broker gives up on who is silent while a person thinks
        asyncio.run(_drop(bus, topic, group))
    if as_json:
        show_json({"topic": topic, "group": group, "dropped": True}, indent=None)
    else:
        show(Text(f"group {group!r} of topic {topic!r} is forgotten"))


async def _question(bus: Bus, topic: str, group: str) -> str:
    async with opened(bus) as runtime:
        note_private(runtime)
        adapter = _with_groups(runtime.adapter)
        physical = runtime.namespace + topic
        there = await adapter.groups(physical)
        if group not in there:
            raise NotFound(f"topic {physical!r} has no group {group!r} at the broker; there: {', '.join(there) or 'none'}")
        waiting = "all that waits for it"
        if isinstance(adapter, HasDepth) and (ready := (await adapter.depth(physical, group)).ready) is not None:
            waiting = f"the {ready} messages that wait for it"
        ours = any(plan.physical == physical and plan.group == group for plan in runtime.plans)
        return f"Forget group {group!r} of topic {physical!r}{', which this program uses,' if ours else ''} and {waiting}?"


async def _drop(bus: Bus, topic: str, group: str) -> None:
    async with opened(bus) as runtime:
        if not await _with_groups(runtime.adapter).drop_group(runtime.namespace + topic, group):
            raise NotFound(f"topic {topic!r} has no group {group!r} any more")


def _with_groups(adapter: Adapter) -> HasGroups:
    if not isinstance(adapter, HasGroups):
        raise UnsupportedFeature("dropping a group", adapter.name, "the broker's own tools")
    return adapter
