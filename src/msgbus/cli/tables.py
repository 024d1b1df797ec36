"""Descriptions as tables: one layout for wide terminals, one for narrow ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from msgbus.cli.describe import Description, GroupFacts, Guarantee, NativeUse, SubscriptionFacts, TopicFacts, duration
from msgbus.dead_letters import DeadLetter

WIDE = 120
MAX_ERROR = 240
KEPT_BY = {"broker": "broker", "msgbus": "msgbus", "process": "in process", "nobody": "no"}
STYLES = {"broker": "green", "msgbus": "cyan", "process": "yellow", "nobody": "red"}


def table(title: str, *columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """An empty table in the one style of the command line. Nothing is ever cut short; columns in `whole` are broken last."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.ROUNDED, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole)
    return made


def header(description: Description) -> RenderableType:
    """Who, on which broker."""
    text = Text()
    text.append(description.service or "(no service name)", style="bold")
    text.append(" on ")
    text.append(description.broker, style="bold")
    if description.namespace:
        text.append(f", namespace {description.namespace}")
    return text


def subscriptions(found: Sequence[SubscriptionFacts], width: int) -> RenderableType:
    """What runs."""
    if not found:
        return Text("No subscriptions: this bus only publishes.")
    title = f"{len(found)} subscription{'s' if len(found) != 1 else ''}"
    if width >= WIDE:
        columns = ("topic", "group", "handler", "order", "at once\n/ window", "retry", "dead letters", "idempotency")
        made = table(title, *columns, whole=("topic", "group", "at once\n/ window", "dead letters"))
        made.columns[2].min_width = min(40, max(len(one.handler) for one in found))
        for one in found:
            made.add_row(
                Text(one.topic),
                Text(one.group or "(broadcast)"),
                Text(_handler(one)),
                Text(_order(one)),
                Text(f"{_at_once(one)} / {one.window}"),
                Text(one.retry),
                Text(one.dead_letters or "logged, not kept"),
                Text(one.idempotency or "off"),
            )
        return made
    made = table(title, "subscription", "handler", "when it fails")
    made.show_lines = True
    made.columns[0].max_width = made.columns[1].max_width = 22  # what fails has the longest words
    for one in found:
        made.add_row(
            Text(f"{one.topic}\n→ {one.group or '(broadcast)'}\norder: {_order(one)}"),
            Text(f"{_handler(one)}\n{_at_once(one)} at once,\n{one.window} held"),
            Text(f"{one.retry}\ndead letters:\n{one.dead_letters or 'logged, not kept'}\nidempotency: {one.idempotency or 'off'}"),
        )
    return made


def in_lines(found: Iterable[SubscriptionFacts]) -> list[RenderableType]:
    """What runs, a line each: for logs."""
    return [
        Text(
            f"{one.topic} → {one.group or '(broadcast)'}: {one.handler} ({one.model}), {_at_once(one)} at once, order: {_order(one)}; "
            f"{one.retry}, then {one.dead_letters or 'logged'}; idempotency: {one.idempotency or 'off'}"
        )
        for one in found
    ]


def begins(found: Iterable[SubscriptionFacts]) -> RenderableType:
    """Where each group begins."""
    made = table("Where each begins", "subscription", "topic", "group", "begins")
    for one in found:
        made.add_row(Text(one.name), Text(one.topic), Text(one.group or "(broadcast)"), Text(one.begins))
    return made


def _handler(one: SubscriptionFacts) -> str:
    notes = [f"takes {one.model}"]
    if one.publish_to is not None:
        notes.append(f"publishes {one.publish_to}")
    if one.runs_in == "threads":
        notes.append("in threads")
    if one.timeout is not None:
        notes.append(f"at most {duration(one.timeout)}")
    return "\n".join([one.handler, *notes])


def _order(one: SubscriptionFacts) -> str:
    return "none" if one.order is None else f"by {one.order}, {one.on_failure}"


def _at_once(one: SubscriptionFacts) -> str:
    return f"{one.concurrency}{f' × {one.batch}' if one.batch else ''}"


def topics(found: Iterable[TopicFacts], unclaimed: Iterable[str]) -> RenderableType:
    """Topics and where their history begins."""
    made = table("Topics", "topic", "model", "key", "later groups begin", "groups at the broker")
    nobody = set(unclaimed)
    for one in found:
        groups = "?" if one.groups is None else ", ".join(one.groups) or "none"
        made.add_row(
            Text(one.physical),
            Text(f"{one.model} v{one.version}"),
            Text(_key(one)),
            Text(one.later_groups),
            Text(groups, style="yellow" if one.name in nobody else ""),
        )
    return made


def _key(one: TopicFacts) -> str:
    shards = one.shards_at_broker or one.shards
    if one.key is None:
        return "none" + (", 3 priorities" if one.priorities else "")
    return one.key + (f", {shards} shards" if shards else "")


def topic_list(rows: Iterable[tuple[TopicFacts, Sequence[GroupFacts]]]) -> RenderableType:
    """Topics with the depth of each of their groups."""
    made = table("Topics", "topic", "model", "key", "shards", "prio", "retain", "groups", right=("shards",))
    made.show_lines = True
    for one, groups in rows:
        made.add_row(
            Text(one.physical),
            Text(f"{one.model} v{one.version}"),
            Text(one.key or "–"),
            Text(str(one.shards_at_broker or one.shards or "–")),
            Text("3" if one.priorities else "–"),
            Text("–" if one.retain is None else duration(one.retain)),
            Text("\n".join(_group_line(group) for group in groups) or "none: kept for the first one"),
        )
    return made


def _group_line(one: GroupFacts) -> str:
    if not one.declared:
        return f"{one.group}: not declared yet"
    if one.ready is None:
        return one.group
    about = "about " if one.approximate else ""
    also = [f"{count} {word}" for count, word in ((one.in_flight, "running"), (one.delayed, "delayed"), (one.dead, "dead")) if count]
    return f"{one.group}: " + ", ".join([f"{about}{one.ready} ready", *also])


def group_list(found: Iterable[GroupFacts]) -> RenderableType:
    """Groups, with what is left of each."""
    numbers = ("ready", "running", "delayed", "dead")
    made = table("Groups", "topic", "group", "whose", *numbers, right=numbers)
    for one in found:
        whose = "ours" if one.ours else "another program's"
        made.add_row(
            Text(one.topic),
            Text(one.group),
            Text(whose if one.declared else f"{whose}, not declared yet"),
            *(Text("–" if count is None else str(count)) for count in (one.ready, one.in_flight, one.delayed, one.dead)),
        )
    return made


def guarantees(found: Iterable[Guarantee]) -> RenderableType:
    """Promises, and who keeps them."""
    made = table("Guarantees on this broker", "what", "kept by", "which means")
    for one in found:
        made.add_row(Text(one.name), Text(KEPT_BY[one.kept_by], style=STYLES[one.kept_by]), Text(one.says))
    return made


def facts(title: str, found: Iterable[tuple[str, str]], columns: tuple[str, str] = ("what", "which means")) -> RenderableType:
    """Names and what they are."""
    made = table(title, *columns)
    for name, says in found:
        made.add_row(Text(name), Text(says))
    return made


def dead_letters(found: Iterable[DeadLetter], width: int) -> RenderableType:
    """Dead letters, a row each; what is long in an error is for `show`."""
    wide = width >= WIDE
    columns = ("id", "reason", "error", "attempts", "when (UTC)") if wide else ("dead letter", "error")
    made = table("", *columns, right=("attempts",), whole=("id", "reason", "dead letter", "when (UTC)"))
    for one in found:
        when = one.dead_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        error = one.error if len(one.error) <= MAX_ERROR else one.error[: MAX_ERROR - 1] + "…"
        reason = one.reason + (f", sent back {one.redrives}×" if one.redrives else "")
        if wide:
            made.add_row(Text(one.id), Text(reason), Text(error), Text(str(one.attempts)), Text(when))
        else:
            made.add_row(Text(f"{one.id}\n{reason}\nattempts: {one.attempts}\n{when} UTC"), Text(error))
            made.add_section()
    return made


def natives(found: Iterable[NativeUse]) -> RenderableType:
    """What only one broker has."""
    made = table("Native options (they bind this program to one broker)", "topic", "broker", "options", "")
    for one in found:
        options = ", ".join(f"{name}={value!r}" for name, value in one.options.items())
        made.add_row(Text(one.topic), Text(one.broker), Text(options), Text("in use" if one.in_use else "means nothing on this broker"))
    return made


def warnings(found: Iterable[str]) -> list[RenderableType]:
    """A line each."""
    return [Text(f"! {warning}", style="yellow") for warning in found]
