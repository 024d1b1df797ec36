"""Health: what a bus knows of itself and its broker, at a glance and without I/O. Kept up by a monitor in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgbus.contract.adapter import Adapter, HasGroups, HasWarnings
from msgbus.errors import MsgbusError
from msgbus.inbound.runner import Runner
from msgbus.outbound.relay import Relay
from msgbus.outbound.watch import Watch

log = logging.getLogger("msgbus")

LOOK_EVERY = 30.0
"""Seconds between two looks at topics and groups."""
COUNTED = ("done", "repeated", "dropped", "dead", "retried", "failed", "expired", "released", "stale_acks")


@dataclass(frozen=True, slots=True)
class SubscriptionHealth:
    """One subscription of this process. `counts` since it started: done (of them repeated: the store knew the effect), dropped, dead,
    retried, failed, expired, released, stale_acks; what has not happened is 0."""

    name: str
    topic: str
    group: str | None
    state: str
    running: int
    waiting: int
    intake_stopped: bool
    last_error: str | None
    counts: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class Health:
    """`status`: "ok"; "degraded" (works, but someone should look); "down" (the broker is away, or a subscription ended)."""

    status: Literal["ok", "degraded", "down"]
    problems: tuple[str, ...]
    subscriptions: tuple[SubscriptionHealth, ...]
    unclaimed_topics: tuple[str, ...]
    """Topics this bus published to that no group has ever claimed: their messages are kept for the first group, for a while."""

    @property
    def live(self) -> bool:
        """Worth keeping: a restart would not help."""
        return not any(subscription.state == "stopped" for subscription in self.subscriptions)


class Monitor:
    """Pings the broker while a bus is entered, and looks for topics nobody claims, and for what its adapter warns of.

    `published`: the topics that were; `handled`: topic and group of each subscription that has one.
    """

    def __init__(
        self,
        adapter: Adapter,
        interval: float,
        published: Callable[[], Iterable[str]],
        handled: Callable[[], Iterable[tuple[str, str]]] = tuple,
    ) -> None:
        self.problem: str | None = None
        """Why the last ping failed; None: it did not."""
        self.unclaimed: tuple[str, ...] = ()
        self._adapter = adapter
        self._interval = interval
        self._published = published
        self._handled = handled
        self._of_broker: tuple[str, ...] = ()
        self._of_groups: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What works, and should be looked at."""
        return [*self._of_broker, *self._of_groups]

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        next_look = loop.time() + self._interval
        while True:
            try:
                async with asyncio.timeout(self._interval):
                    await self._adapter.ping()
                before = self.warnings
                self._of_broker = tuple(await self._warnings())
                if loop.time() >= next_look:
                    await self._look_for_unclaimed()
                    self._of_groups = tuple([warning for group in [*self._handled()] for warning in await self._warnings(group)])
                    next_look = loop.time() + LOOK_EVERY
                for warning in self.warnings:
                    if warning not in before:
                        log.warning("broker: %s", warning)
            except (MsgbusError, TimeoutError) as error:
                self._note(str(error) or f"no answer within {self._interval:g} s")
            else:
                self._note(None)
            await asyncio.sleep(self._interval)

    def _note(self, problem: str | None) -> None:
        if (problem is None) != (self.problem is None):
            log.log(logging.INFO if problem is None else logging.WARNING, "broker: %s", problem or "it is back")
        self.problem = problem

    async def _warnings(self, *groups: tuple[str, str]) -> Sequence[str]:
        if not isinstance(self._adapter, HasWarnings):
            return ()
        async with asyncio.timeout(self._interval):
            return await self._adapter.warnings(groups)

    async def _look_for_unclaimed(self) -> None:
        """Each look is as good as a ping, and has its time; together they may take longer, for there may be many topics."""
        adapter = self._adapter
        if isinstance(adapter, HasGroups):
            unclaimed: list[str] = []
            for topic in [*self._published()]:
                async with asyncio.timeout(self._interval):
                    if not await adapter.groups(topic):
                        unclaimed.append(topic)
            self.unclaimed = tuple(unclaimed)


def assess(
    monitor: Monitor, runners: Sequence[Runner], ended: Iterable[str], relay: Relay | None = None, watch: Watch | None = None
) -> Health:
    """The health of a bus, from what its parts say just now."""
    problems: list[str] = []
    down = False
    if monitor.problem is not None:
        down = True
        problems.append(f"broker: {monitor.problem}")
    problems += monitor.warnings
    for name in ended:
        down = True
        problems.append(f"{name}: ended by an error; the process must be restarted")
    if relay is not None and relay.problem is not None:
        problems.append(f"outbox: {relay.problem}")
    elif watch is not None:
        problems += watch.problems
    subscriptions: list[SubscriptionHealth] = []
    for runner in runners:
        plan = runner.plan
        state = runner.state
        if state == "waiting for broker":
            down = True
            problems.append(f"{plan.name}: waiting for the broker: {runner.problem}")
        elif state in ("circuit open", "quarantine"):
            problems.append(f"{plan.name}: {state}: {runner.last_error or 'messages that processes died with'}")
        if runner.intake_stopped:
            problems.append(f"{plan.name}: nothing new is taken while {runner.waiting} failed messages wait")
        subscriptions.append(
            SubscriptionHealth(
                plan.name,
                plan.topic.name,
                plan.group,
                state,
                runner.running,
                runner.waiting,
                runner.intake_stopped,
                runner.last_error,
                {**dict.fromkeys(COUNTED, 0), **runner.counts},
            )
        )
    return Health("down" if down else "degraded" if problems else "ok", tuple(problems), tuple(subscriptions), monitor.unclaimed)
