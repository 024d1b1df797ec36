"""The proof that programs find what is wrong: adapters that break the contract, each in one way, show other traces than the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, find, settings
from tests.differential.drawing import programs
from tests.differential.interpreter import exact_moves, run_program
from tests.differential.model import expected
from tests.differential.program import Halt, Listen, Program, Publish, Purge, Replay, Start
from tests.differential.test_programs import UNHURRIED, try_programs
from tests.differential.trace import differences
from tests.unit.suite.brokers import behind
from tests.unit.suite.sabotaged import AcksFirst, DelaysNothing, ForgetsSome, LosesOnRelease, ReordersAKey, SharesItsShards

from msgbus.contract.adapter import Depth, Received, SendOutcome
from msgbus.contract.envelope import Envelope, new_id
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import Broker

HURRY = 1.0
"""Seconds to wait for what must come: on these brokers it often does not."""


class StoresTwice(FaultyAdapter):
    """Of what it is sent it stores every fifth twice, the second one under another id, so that nobody can take it for the same."""

    count = 0

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        for envelope in envelopes:
            self.count += 1
            if self.count % 5 == 0:
                await super().send([replace(envelope, id=new_id())], timeout=timeout)
        return await super().send(envelopes, timeout=timeout)


class DeafAtFirst(FaultyReceiver):
    """What a private receiver gets first is not handed out."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        first = self.spec.group is None and not self.received
        return (await super().receive(limit, timeout))[first:]


class PurgesNothing(FaultyAdapter):
    """It says how many messages a purge would have discarded, and keeps them."""

    async def purge(self, topic: str, group: str) -> int:
        depth: Depth = await self.depth(topic, group)
        return depth.ready or 0


class ReplaysTooLittle(FaultyAdapter):
    """It replays what is younger by a moment than it was told."""

    async def replay(self, topic: str, group: str, since: float) -> int:
        count: int = await getattr(self.real, "replay")(topic, group, since + 0.01)  # noqa: B009  # not every adapter can
        return count


ADAPTERS = (DelaysNothing, ForgetsSome, StoresTwice, SharesItsShards, PurgesNothing, ReplaysTooLittle)
SABOTAGES: list[Any] = [
    pytest.param(FaultyAdapter, receiver, id=receiver.__name__) for receiver in (AcksFirst, LosesOnRelease, ReordersAKey, DeafAtFirst)
] + [pytest.param(adapter, FaultyReceiver, id=adapter.__name__) for adapter in ADAPTERS]


STEPS = """
    a keyed topic
    group billing: ordered, 1 attempts, concurrency 4
     1. publish
        0 key a: done
        1 key a: done
"""
"""The simplest program that shows an adapter that turns a key's messages round."""


def found_wrong(program: Program, broker: Broker, seconds: float = HURRY) -> list[str]:
    """How a program's trace differs from the model's."""
    return differences(run_program(program, broker, seconds), expected(program, exact_moves=exact_moves(broker)))


def could_show(program: Program, fault: type) -> bool:
    """Whether running a program may show a fault: that shards are shared only where an ordered group has two processes, for example."""
    steps = program.steps
    if fault is LosesOnRelease:  # a process is stopped that has not begun all that it holds
        few = {index for index, group in enumerate(program.groups) if group.handling == "unordered" and group.concurrency < 16}
        stops = [one for one, two in pairwise(steps) if isinstance(two, Halt) and not two.kill and two.group in few]
        return any(isinstance(one, Publish) and len(one.messages) > 2 for one in stops)
    needed: dict[type, type] = {PurgesNothing: Purge, ReplaysTooLittle: Replay, DeafAtFirst: Listen}
    if fault in needed:
        return any(isinstance(step, needed[fault]) for step in steps)
    if fault is not SharesItsShards:
        return True
    ordered = {index for index, group in enumerate(program.groups) if group.handling == "ordered"}
    processes: Counter[int] = Counter()
    for step in steps:
        match step:
            case Start(group):
                processes[group] += 1
            case Halt(group):
                processes[group] -= 1
            case Publish(messages) if any(processes[group] == 2 for group in ordered):
                if len({message.key for message in messages}) < len(messages) - 2:  # a key's messages are many enough to overlap
                    return True
            case _:
                pass
    return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("adapter", "receiver"), SABOTAGES)
def test_a_sabotaged_adapter_is_found(adapter: type[FaultyAdapter], receiver: type[FaultyReceiver]) -> None:
    """Most by the programs of one run; what shows only while two processes share a key's work takes a few times as many."""
    broker = behind(adapter, receiver)
    find(
        programs(),
        lambda program: could_show(program, adapter) and could_show(program, receiver) and bool(found_wrong(program, broker)),
        random=Random(0),
        settings=settings(max_examples=1000, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=UNHURRIED),
    )


@pytest.mark.timeout(300)
def test_what_fails_is_made_simple_and_printed_as_steps() -> None:
    """The report names seed and broker, says what was seen and what was expected, and shows the program."""
    with pytest.raises(AssertionError) as caught:
        try_programs(behind(receiver=ReordersAKey), seed=3, count=200, patience=HURRY)
    report = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "on memory, seed 3:" in report
    assert "billing, order of a: (1, 0), expected (0, 1)" in report
    assert STEPS in report
