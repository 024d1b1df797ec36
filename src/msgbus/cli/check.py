"""`msgbus check`: refuses what cannot be promised, before anything runs. Declares nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict

import typer
from rich.text import Text

from msgbus.bus import Bus
from msgbus.cli import tables
from msgbus.cli.console import FAILED, Json, Url, Where, broker_shown, connected, finish, say, show, show_json
from msgbus.cli.describe import native_uses, warnings
from msgbus.cli.explain import Offline
from msgbus.contract.adapter import ReceiverSpec, TopicSpec
from msgbus.errors import MsgbusError, TopologyMismatch
from msgbus.inbound.plan import check_topics, plan_all
from msgbus.outbound.writer import topic_spec
from msgbus.runtime import Runtime, dead_spec


def check(where: Where, url: Url = None, offline: Offline = False, as_json: Json = False) -> None:
    """Check that the broker can keep every promise of the program: exit 1 and the reasons where it cannot.

    Lists each use of native=, and what is not at the broker yet. Nothing is declared.
    """
    finish(where, url, lambda bus: _check(bus, offline, as_json))


async def _check(bus: Bus, offline: bool, as_json: bool) -> None:
    problems: list[str] = []
    missing: list[str] = []
    async with connected(bus, offline=offline) as runtime:
        await _look(runtime, problems, missing, offline=offline)
        natives = native_uses(runtime)
        notes = warnings(runtime)
    if as_json:
        show_json(
            {
                "ok": not problems,
                "broker": broker_shown(bus),
                "connected": not offline,
                "problems": problems,
                "not_yet_declared": missing,
                "native": [asdict(use) for use in natives],
                "warnings": notes,
            }
        )
    else:
        if natives:
            show(tables.natives(natives))
        show(*(Text(f"- not at the broker yet, made when it runs: {what}") for what in missing))
        show(*tables.warnings(notes))
    if problems:
        for problem in problems:
            say(f"error: {problem}")
        raise typer.Exit(FAILED)
    if not as_json:
        how = "not asked (--offline)" if offline else "asked"
        show(Text(f"ok: {len(runtime.plans)} subscriptions, {len(runtime.topics)} topics; {broker_shown(bus)} was {how}", style="green"))


async def _look(runtime: Runtime, problems: list[str], missing: list[str], *, offline: bool) -> None:
    """Every check that entering and running make, each problem noted rather than the first one raised."""

    @contextmanager
    def noting() -> Generator[None, None, None]:
        try:
            yield
        except MsgbusError as error:
            if str(error) not in problems:
                problems.append(str(error))

    for topic in runtime.topics.values():
        with noting():
            check_topics([topic], runtime.adapter)
    for subscription in runtime.subscriptions:
        with noting():
            plan_all([subscription], runtime.topics, runtime.defaults, runtime.adapter)
    if not problems:
        with noting():
            runtime.plans = plan_all(runtime.subscriptions, runtime.topics, runtime.defaults, runtime.adapter)
    if offline or problems:
        return
    runtime.plans = [await runtime.adopt(plan) for plan in runtime.plans]
    topics = {plan.topic.name: plan.topic for plan in runtime.plans} | runtime.topics
    absent: set[str] = set()
    for topic in topics.values():
        spec = topic_spec(topic, runtime.namespace, runtime.adapter.name)
        await _stands(runtime, f"topic {spec.name!r}", [spec], [], absent, problems)
    for plan in runtime.plans:
        if plan.group is None:
            continue
        group = f"group {plan.group!r} of topic {plan.physical!r}"
        if f"topic {plan.physical!r}" in absent:
            absent.add(group)
            continue
        spec = topic_spec(plan.topic, runtime.namespace, runtime.adapter.name)
        await _stands(runtime, group, [spec], [plan.receiver], absent, problems)
        if group not in absent:
            await _stands(runtime, f"dead letters of {group}", [dead_spec(plan.physical, plan.group)], [], absent, problems)
    if runtime.settings.topology == "create":
        missing.extend(sorted(absent))
    else:
        problems.extend(f"{what}: is not at the broker, and topology=check makes nothing" for what in sorted(absent))


async def _stands(
    runtime: Runtime, what: str, topics: list[TopicSpec], receivers: list[ReceiverSpec], absent: set[str], problems: list[str]
) -> None:
    """Asks the broker whether something is there as the program says, and notes it where it is absent or differs."""
    try:
        await runtime.declare(topics, receivers, create=False)
    except TopologyMismatch as error:
        if error.missing:
            absent.add(what)
        elif str(error) not in problems:
            problems.append(str(error))
