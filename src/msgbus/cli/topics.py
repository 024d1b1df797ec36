"""`msgbus topics`: the program's topics, as the broker has them."""

from __future__ import annotations

import sys
from dataclasses import asdict

import typer

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import Json, Url, Where, broker_shown, finish, note_private, opened, say, show, show_json
from msgbus.cli.describe import describe_topic, groups_of, topics_of
from msgbus.cli.explain import Offline
from msgbus.contract.adapter import Exportable
from msgbus.errors import UnsupportedFeature

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


@app.command("export", short_help="Print what an operator must create.")
def export_topics(where: Where, url: Url = None, offline: Offline = False, as_json: Json = False) -> None:
    """Print what an operator must create before the program runs with topology=check: a file for the broker's own tools.

    RabbitMQ: definitions for `rabbitmqctl import_definitions`. Kafka and Redis: a shell script. Nothing is created by this command.
    """
    finish(where, url, lambda bus: _export(bus, offline, as_json))


async def _export(bus: Bus, offline: bool, as_json: bool) -> None:
    async with opened(bus, offline=offline) as runtime:
        topics, receivers = runtime.needs(topics_of(runtime))
        if not isinstance(runtime.adapter, Exportable):
            raise UnsupportedFeature("topics export", runtime.adapter.name, "topology=create")
        text = await runtime.adapter.export(topics, receivers)
        for name in sorted({plan.physical for plan in runtime.plans if plan.plain}):
            say(f"note: the program has no Topic for {name!r}: it is exported without a key; leave it to the program that has one")
    if as_json:
        show_json({"broker": broker_shown(bus), "text": text})
    elif text:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
    else:
        say(f"nothing to create: {broker_shown(bus)} has no topics that outlive the program")
