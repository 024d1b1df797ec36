"""The application: every command and command group, put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from msgbus.cli import check, dead, explain, groups, outbox, replay, run, topics

app = typer.Typer(
    help="Runs, checks and explains a service written with msgbus, and looks after its topics, groups and dead letters.",
    epilog="Exit codes: 0 fine; 1 refused or failed (the reason is on stderr); 2 wrong usage; 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and with them secrets
    rich_markup_mode=None,
    add_completion=False,
)
app.command("run", short_help="Run it until it is told to stop.")(run.run)
app.command("check", short_help="Refuse what cannot be promised.")(check.check)
app.command("explain", short_help="Show what is promised, and who keeps it.")(explain.explain)
app.command("replay", short_help="Hand a group again what a topic retained.")(replay.replay)
app.add_typer(topics.app, name="topics")
app.add_typer(groups.app, name="groups")
app.add_typer(dead.app, name="dead")
app.add_typer(outbox.app, name="outbox")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msgbus {version('msgbus')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Runs, checks and explains a service written with msgbus, and looks after its topics, groups and dead letters."""
