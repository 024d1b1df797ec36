"""`msgbus replay`: a group is handed again what its topic retained."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli.console import Json, Url, Where, confirm, failing, load, note_private, opened, show, show_json
from msgbus.contract.adapter import Replayable
from msgbus.errors import UnsupportedFeature
from msgbus.settings import Duration

_DURATION: TypeAdapter[timedelta] = TypeAdapter(Duration)


def moment(text: str) -> datetime:
    """An ISO 8601 moment, local time where it names no zone; or how long ago, in seconds or as an ISO 8601 duration."""
    now = datetime.now(UTC)
    try:
        found = datetime.fromisoformat(text).astimezone()
    except ValueError:
        try:
            found = (now - _DURATION.validate_python(text)).astimezone()
        except (ValidationError, OverflowError):
            raise typer.BadParameter(f"{text!r} is neither a moment (2026-05-04T10:00) nor a duration (PT2H, 90)") from None
    if found > now:
        raise typer.BadParameter(f"{text!r} is in the future")
    return found


def replay(
    where: Where,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic's name, without the namespace.")],
    group: Annotated[str, typer.Argument(metavar="GROUP")],
    since: Annotated[
        datetime,
        typer.Option(
            parser=moment,
            metavar="WHEN",
            help="A moment (2026-05-04T10:00, local time where no zone is named), or how long ago (PT2H; 90 is seconds).",
        ),
    ],
    url: Url = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Hand a group again what was published to a topic since a moment, as far as the topic retains it: Topic(..., retain=...).

    Its handlers run again; an idempotency store knows what had its effect. Other groups notice nothing.
    """
    with failing():
        bus = load(where, url)
        told = since.isoformat(sep=" ", timespec="seconds")
        confirm(f"Hand group {group!r} of topic {topic!r} again all that was published since {told}?", yes=yes)
        count = asyncio.run(_replay(bus, topic, group, since.timestamp()))
    if as_json:
        show_json({"topic": topic, "group": group, "since": since.isoformat(), "replayed": count}, indent=None)
    else:
        why = "" if count else ": nothing was published since then, or the topic retains nothing"
        show(Text(f"group {group!r} of topic {topic!r} is handed {count} message{'s' * (count != 1)} again{why}"))


async def _replay(bus: Bus, topic: str, group: str, since: float) -> int:
    async with opened(bus) as runtime:
        note_private(runtime)
        if not isinstance(runtime.adapter, Replayable):
            raise UnsupportedFeature("replaying", runtime.adapter.name, "Kafka or Redis, and Topic(..., retain=...)")
        return await runtime.adapter.replay(runtime.namespace + topic, group, since)
