"""`msgbus topics`: the program's topics, as the broker has them."""

from __future__ import annotations

from dataclasses import asdict

import typer

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import Json, Url, Where, finish, note_private, opened, show, show_json
from msgbus.cli.describe import describe_topic, groups_of, topics_of

app = typer.Typer(help="The program's topics, as the broker has them.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def topics() -> None:
    """The program's topics, as the broker has them."""


@app.command("list", short_help="List the program's topics.")
def list_topics(where: Where, url: Url = None, as_json: Json = False) -> None:
    """List the program's topics: shards, priorities, retention, groups and what is left of each."""
    finish(where, url, lambda bus: _list(bus, as_json))


async def _list(bus: Bus, as_json: bool) -> None:
    async with opened(bus) as runtime:
        note_private(runtime)
        found = [(await describe_topic(runtime, topic, asked=True), await groups_of(runtime, topic)) for topic in topics_of(runtime)]
    if as_json:
        show_json([asdict(topic) | {"groups": [asdict(group) for group in groups]} for topic, groups in found])
    else:
        show(tables.topic_list(found))
