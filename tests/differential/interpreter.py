"""Runs a program on a broker, through the public bus, and says what could be observed.

A process of a group is a bus at work with an adapter of its own; it ends by a drain, or by the death of its adapter's connections. What
each message does to a handler is in its body: handlers decide nothing. There are deadlines and no sleeps: the model says what to wait for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from tests.differential.model import MAX_REDRIVES, GroupState, Model, last_steps
from tests.differential.process import Log, Sent, Work, process
from tests.differential.program import (
    Discard,
    Forget,
    Halt,
    Leave,
    Listen,
    Pause,
    Program,
    Publish,
    Purge,
    Redrive,
    Replay,
    Settle,
    Start,
    Step,
)
from tests.differential.trace import GroupTrace, Run, Trace

from msgbus import Bus, Topic
from msgbus.contract.adapter import HasDepth
from msgbus.dead_letters import DeadLetter
from msgbus.errors import UnsupportedFeature
from msgbus.publishing import PublishManyOptions
from msgbus.testing.stage import Broker, Stage, Worker, opened

T = TypeVar("T")

Letter = tuple[int, tuple[str, int, int]]
"""A dead letter: message, and reason, attempts, redrives."""

TOPIC = "work"
MOMENT = 0.002
"""Seconds between a publish and what came before it, where a moment is to tell them apart."""
HISTORY = timedelta(hours=1)
LOOK_AGAIN = 0.003
"""Seconds between two looks at what nobody announces."""
CLOCKS = 0.002
"""Seconds that clocks may differ in how they round a delay."""
EXPIRIES = {"never": None, "at once": timedelta(microseconds=1), "in an hour": timedelta(hours=1)}


class Interpreter:
    """One program on one stage. `seconds`: how long to wait for what must come."""

    def __init__(self, program: Program, stage: Stage, publisher: Bus, seconds: float) -> None:
        self._program = program
        self._stage = stage
        self._publisher = publisher
        self._seconds = seconds
        options: dict[str, Any] = {
            "key": "key" if program.kind == "keyed" else None,
            "priorities": program.kind == "ranked",
            "retain": HISTORY if program.retain else None,
        }
        self._outgoing = Topic(TOPIC, Sent, **options)
        self._incoming = Topic(TOPIC, Work, **options)
        self._model = Model(program)
        self._logs = [Log() for _ in program.groups]
        self._letters: list[list[Letter]] = [[] for _ in program.groups]
        """Dead letters as last seen, when all else was settled: looking again at once is more than every broker can do."""
        self._processes: list[list[Worker]] = [[] for _ in program.groups]
        self._listeners: list[tuple[Worker, Log]] = []
        """Those that have left among them."""
        self._moments: list[float] = []
        """Before each publish, where there is history."""
        self._not_before: dict[int, float] = {}
        self._problems: list[str] = []

    async def run(self) -> Trace:
        """All steps, and what every program ends with."""
        for number, step in enumerate([*self._program.steps, *last_steps(self._program)], 1):
            await self._step(step)
            if self._problems:
                self._problems[0] = f"step {number}: {self._problems[0]}"
                for state in self._model.states:
                    self._letters[state.index] = await self._dead(state) if state.declared else []
                break
        groups = {state.group.name: await self._observed(state) for state in self._model.states}
        heard = {state.group.name: _heard(state, log) for state, (_, log) in zip(self._model.listeners, self._listeners, strict=True)}
        trace = Trace(groups | heard, self._early(), tuple(self._problems))
        for worker in [*(worker for processes in self._processes for worker in processes), *(worker for worker, _ in self._listeners)]:
            await worker.stop()
        return trace

    # ------------------------------------------------------------ steps

    async def _step(self, step: Step) -> None:
        match step:
            case Publish():
                await self._publish(step)
            case Start(group):
                bus = process(self._stage, self._incoming, group, self._program.groups[group], self._logs[group])
                self._processes[group].append(await self._stage.start(bus))
            case Halt(group, kill, after):
                log = self._logs[group]
                begun = log.started + after
                if after:  # for what may never come no longer than it usually takes
                    await log.until(lambda: log.started >= begun or _all_ended(self._model.states[group], log), 0.2)
                worker = self._processes[group].pop(0)
                await (worker.kill() if kill else worker.stop())
            case Leave():
                await self._settle()
                for state, (worker, _) in zip(self._model.listeners, self._listeners, strict=True):
                    if state.declared:
                        await worker.stop()
                        break
            case Pause(group):
                for worker in self._processes[group][:1]:
                    for runner in worker.bus.runners:
                        worker.bus.pause(runner.plan.name)
            case Redrive() | Discard():
                await self._settle()
                if self._model.may(step) and not self._problems:
                    await self._letters_of(step)
            case Purge() | Replay() | Forget():
                if self._model.may(step):
                    await self._operate(step)
            case Settle() | Listen():
                pass
        self._model.step(step)
        if isinstance(step, Listen):
            log = Log()
            bus = process(self._stage, self._incoming, 0, self._model.listeners[-1].group, log, listens=True)
            self._listeners.append((await self._stage.start(bus), log))
        if isinstance(step, Settle):
            await self._settle()

    async def _letters_of(self, step: Redrive | Discard) -> None:
        def chosen(n: int, redrives: int) -> bool:
            return not (step.even and n % 2) and (isinstance(step, Discard) or redrives < MAX_REDRIVES)

        def where(letter: DeadLetter) -> bool:
            return chosen(json.loads(letter.body)["n"], letter.redrives)

        meant = [n for n, (_, _, redrives) in self._letters[step.group] if chosen(n, redrives)]
        expected = len(meant if isinstance(step, Discard) else {*meant})  # of two of one message a redrive takes one
        dead = self._publisher.dead_letters(TOPIC, group=self._program.groups[step.group].name)
        if isinstance(step, Redrive):
            moved = await dead.redrive(where=where, limit=expected)
        else:  # it looks for a second whether there are more
            moved = await dead.purge(where=where) if expected else 0
        if moved != expected:
            self._problems.append(f"{moved} dead letters of {expected} were moved")

    async def _operate(self, step: Purge | Replay | Forget) -> None:
        adapter: Any = self._publisher.runtime.adapter
        state = self._model.states[step.group]
        waiting = sum(not (owed.settled or owed.maybe or owed.delayed) for owed in state.owed.values())
        where = self._stage.name(TOPIC), state.group.name
        match step:
            case Purge():
                found = await adapter.purge(*where)
                if found < waiting:
                    self._problems.append(f"{found} messages were purged, and {waiting} waited")
            case Replay(_, publishes):
                since = self._moments[-publishes] if publishes <= len(self._moments) else 0.0
                await adapter.replay(*where, since)
            case Forget():
                if not await adapter.drop_group(*where):
                    self._problems.append("there is no group to be dropped")

    async def _publish(self, step: Publish) -> None:
        sent = [Sent(n=message.n, key=message.key, plans=message.plans if message.readable else "unreadable") for message in step.messages]
        options: PublishManyOptions = {"expires_in": EXPIRIES[step.expires]}
        if step.delay_ms:
            options["delay"] = timedelta(milliseconds=step.delay_ms)
            due = asyncio.get_running_loop().time() + step.delay_ms / 1000
            self._not_before.update({message.n: due for message in sent})
        if self._program.kind == "ranked":
            options["priority"] = step.priority
        if self._program.retain:
            await asyncio.sleep(MOMENT)
            self._moments.append(time.time())
            await asyncio.sleep(MOMENT)
        if step.many:
            await self._publisher.publish_many(self._outgoing, sent, **options)
        else:
            for message in sent:
                await self._publisher.publish(self._outgoing, message, id=f"{self._stage.namespace}{message.n}", **options)

    # ------------------------------------------------------------ waiting

    async def _settle(self) -> None:
        """Until every group with a process has ended what it owes, and the broker has nothing left for it. What is missing is a problem."""
        deadline = asyncio.get_running_loop().time() + self._seconds
        for worker in (worker for workers in self._processes for worker in workers):
            for runner in worker.bus.runners:
                worker.bus.resume(runner.plan.name)
        for state in self._model.states:
            if self._processes[state.index]:
                await self._settle_group(state, deadline)
        for state, (_, log) in zip(self._model.listeners, self._listeners, strict=True):
            if not await log.until(partial(_all_ended, state, log), deadline - asyncio.get_running_loop().time()):
                self._problems.append(f"{state.group.name} was not told all within {self._seconds:g} s")

    async def _settle_group(self, state: GroupState, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        log = self._logs[state.index]
        if not await log.until(lambda: _all_ended(state, log), deadline - loop.time()):
            missing = sorted(n for n, owed in state.owed.items() if not owed.maybe and owed.fate.runs and log.rounds[n] < owed.rounds)
            self._problems.append(f"{state.group.name} has not ended {missing} within {self._seconds:g} s")
            return
        left = await _until_empty(lambda: self._left(state), deadline)
        if left:
            self._problems.append(f"{state.group.name} has ended all, and {left} are left within {self._seconds:g} s")
            return

        async def without_letter() -> list[int]:
            self._letters[state.index] = await self._dead(state)
            letters = Counter(n for n, _ in self._letters[state.index])
            return sorted(n for n, owed in state.owed.items() if not owed.maybe and letters[n] < len(owed.letters))

        missing = await _until_empty(without_letter, deadline)
        if missing:
            self._problems.append(f"{state.group.name} has no dead letter of {missing} within {self._seconds:g} s")

    async def _left(self, state: GroupState) -> int:
        """What the broker has for a group: waiting, in hand, delayed; 0 where it cannot say."""
        adapter = self._publisher.runtime.adapter
        if not isinstance(adapter, HasDepth):
            return 0
        depth = await adapter.depth(self._stage.name(TOPIC), state.group.name)
        return (depth.ready or 0) + (depth.in_flight or 0) + (depth.delayed or 0)

    async def _left_in_the_end(self, state: GroupState) -> int:
        """What a killed process had in hand comes back in the broker's own time: who is there must find nothing more to do."""
        patience = self._seconds if self._processes[state.index] and not self._problems else 0.0
        return await _until_empty(lambda: self._left(state), asyncio.get_running_loop().time() + patience)

    async def _dead(self, state: GroupState) -> list[Letter]:
        """Its dead letters."""
        try:
            letters = [letter async for letter in self._publisher.dead_letters(TOPIC, group=state.group.name).list()]
        except UnsupportedFeature:  # it cannot be looked at without taking it
            letters = await self._stage.dead_letters(sum(len(owed.letters) for owed in state.owed.values()), TOPIC, group=state.group.name)
        return [(int(json.loads(letter.body)["n"]), (letter.reason, letter.attempts, letter.redrives)) for letter in letters]

    # ------------------------------------------------------------ what was seen

    async def _observed(self, state: GroupState) -> GroupTrace:
        """Of one group, without what is not promised: repetitions where they are allowed, order where there is none."""
        left = await self._left_in_the_end(state) if state.declared else 0
        log = self._logs[state.index]
        repeats = state.repeats(exact_moves=self._exact_moves)
        unsure = {n for n, owed in state.owed.items() if owed.maybe}
        in_order = {owed.message.n: owed.fate.runs for owed in self._model.in_order(state)}
        runs: defaultdict[int, list[int]] = defaultdict(list)
        order: defaultdict[str, dict[int, None]] = defaultdict(dict)
        sequence: defaultdict[str, list[Run]] = defaultdict(list)
        for (n, attempt), key, last in log.ended:
            if n not in unsure:
                runs[n].append(attempt)
            if key is not None and n in in_order:
                if in_order[n]:  # not those of a redrive
                    sequence[key].append((n, attempt))
                    in_order[n] -= 1
                if last:
                    order[key].setdefault(n)
        dead: defaultdict[int, list[tuple[str, int, int]]] = defaultdict(list)
        if state.declared:
            for n, letter in self._letters[state.index]:
                if n not in unsure:
                    dead[n].append((*letter[:2], -1) if repeats else letter)
        return GroupTrace(
            {n: tuple(sorted(set(attempts) if repeats else attempts)) for n, attempts in runs.items()},
            {key: tuple(numbers) for key, numbers in order.items()},
            {key: tuple(all_of_it) for key, all_of_it in sequence.items()} if self._model.has_sequence(state, repeats) else {},
            {n: tuple(sorted(set(letters) if repeats else letters)) for n, letters in dead.items()},
            left,
            tuple(log.overlaps),
        )

    @property
    def _exact_moves(self) -> bool:
        return exact_moves(self._stage.broker)

    def _early(self) -> tuple[int, ...]:
        early = {n for log in self._logs for n, started in log.first_start.items() if started < self._not_before.get(n, 0.0) - CLOCKS}
        return tuple(sorted(early))


def _heard(state: GroupState, log: Log) -> GroupTrace:
    """Of a listener."""
    unsure = {n for n, owed in state.owed.items() if owed.maybe}
    runs: defaultdict[int, list[int]] = defaultdict(list)
    for (n, attempt), _, _ in log.ended:
        if n not in unsure:
            runs[n].append(attempt)
    return GroupTrace({n: tuple(sorted(attempts)) for n, attempts in runs.items()})


def _all_ended(state: GroupState, log: Log) -> bool:
    return all(log.rounds[n] >= owed.rounds for n, owed in state.owed.items() if owed.fate.runs and not owed.maybe)


async def _until_empty(look: Callable[[], Awaitable[T]], deadline: float) -> T:
    """What `look` finds, once it is nothing, or the time is over."""
    while True:
        found = await look()
        if not found or asyncio.get_running_loop().time() >= deadline:
            return found
        await asyncio.sleep(LOOK_AGAIN)


def fitting(program: Program, broker: Broker) -> Program:
    """The program, or the same without history, which RabbitMQ does not keep."""
    return replace(program, retain=False) if broker.url.startswith("amqp") else program


def exact_moves(broker: Broker) -> bool:
    """Whether a drain repeats nothing of a group without order: in memory each message is settled before the next word is said."""
    return broker.url.startswith("memory:")


async def _run(program: Program, broker: Broker, seconds: float) -> Trace:
    async with asyncio.timeout(6 * seconds * broker.patience + 10), opened(broker) as stage:
        publisher = await stage.publisher()
        interpreter = Interpreter(program, stage, publisher, seconds * broker.patience)
        return await interpreter.run()


def run_program(program: Program, broker: Broker, seconds: float = 10.0) -> Trace:
    """The trace of a program on a broker, in an event loop of its own."""
    return asyncio.run(_run(program, broker, seconds))
