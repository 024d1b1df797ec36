"""Runner: a subscription at work, from its first receiver to the end of its drain.

What it holds is its `Hand`, what it fetches comes by its `Intake`, and what is not simply done is its `Carrier`'s. Here are the workers
that run handlers, how many may (pauses, the circuit breaker, quarantine), and the sessions between lost links.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from msgbus.contract.adapter import Adapter
from msgbus.contract.outcome import DONE, Dead, Outcome, Released, RetryAfter
from msgbus.errors import BrokerError, BrokerUnavailable
from msgbus.inbound.breaker import Breaker
from msgbus.inbound.carrying import Carrier, described
from msgbus.inbound.hand import Hand
from msgbus.inbound.intake import POLL, Intake
from msgbus.inbound.isolation import isolated
from msgbus.inbound.job import Job
from msgbus.inbound.route import Route
from msgbus.inbound.settle import Settler
from msgbus.inbound.suspects import Suspects
from msgbus.retry import is_dependency_failure

log = logging.getLogger("msgbus")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
"""Between tries to reach a broker that is away."""
LONGEST_PAUSE_AT_WORK = 1.0
"""The same, when handlers ran since the last try: the broker is there, and only the link breaks."""
LONGEST_OPENING = 30.0
"""Seconds that opening the receivers may take; then the broker counts as away."""
STEADY = 10.0
"""Seconds that a link must hold for the back-off to begin anew."""

State = Literal["starting", "running", "paused", "circuit open", "quarantine", "waiting for broker", "draining", "stopped"]


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What the settings say to a runner; seconds."""

    max_deliveries: int
    drain_timeout: float
    close_timeout: float
    """For each step of closing, of which there are a few."""


class Runner:
    """Runs one subscription until `stop`. Made and used in one event loop."""

    def __init__(self, route: Route[Any], adapter: Adapter, settler: Settler, limits: RunnerLimits) -> None:
        plan = route.plan
        self.plan = plan
        self.problem: str | None = None
        """Why nothing is received, while that is so."""
        self.opened = asyncio.Event()
        """Set when its receivers are open for the first time, and when it has ended."""
        self._route = route
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._suspects = Suspects()
        self._hand = Hand(plan, self._suspects, limits.max_deliveries, self._due_while_closed)
        self._carrier = Carrier(plan, self._hand, adapter, settler, limits.close_timeout)
        self._intake = Intake(plan, adapter, self._hand, self._carrier, self._suspects, self._after_batch)
        self._breaker = Breaker()
        self._runs = 0
        self._paused = False
        self._stopping = asyncio.Event()
        self._cutting = False
        self._cut = False
        self._workers: list[asyncio.Task[None]] = []
        self._chores: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None
        self._state: State = "starting"

    # ------------------------------------------------------------ what others see and say

    @property
    def state(self) -> State:
        """In one word, the most important first."""
        if self._state in ("draining", "stopped"):
            return self._state
        if self._paused:
            return "paused"
        if self.problem is not None:
            return "waiting for broker"
        if self._breaker.state != "closed":
            return "circuit open"
        return "quarantine" if self._suspects.quarantine else self._state

    @property
    def counts(self) -> Counter[str]:
        """done, dropped, dead, retried, failed, expired, released, stale_acks: since this runner started."""
        return self._hand.counts

    @property
    def last_error(self) -> str | None:
        """The last failure of a handler, or of the broker."""
        return self._hand.last_error

    @property
    def running(self) -> int:
        """Handlers at work now (batches, with a batch handler)."""
        return self._hand.running

    @property
    def waiting(self) -> int:
        """Failed messages that wait in this process for their next run."""
        return len(self._hand.waiting)

    @property
    def intake_stopped(self) -> bool:
        """So much waits for its next run, or behind such a message of its key, or cannot be settled, that nothing new is taken."""
        return self._hand.full_of_waiting or self._hand.blocked

    def pause(self) -> None:
        """Starts nothing more; gives back what is not started, where the group has no order. Twice is once."""
        self._paused = True
        self._refresh()

    def resume(self) -> None:
        """Undoes `pause`."""
        self._paused = False
        self._refresh()

    def stop(self) -> None:
        """Begins the drain; `run` returns when it is over. Twice is once."""
        self._stopping.set()

    def cut(self) -> None:
        """Ends the drain now: what still runs is cancelled and goes back, its attempt not counted."""
        self._stopping.set()
        self._cutting = True
        if self._hand.quiet is not None:
            self._hand.quiet.set()

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Consumes until `stop`, through lost links, then drains. Raises only what is a bug, ours or an adapter's."""
        name, concurrency = self.plan.name, self.plan.concurrency
        self._workers = [self._loop.create_task(self._work(), name=f"msgbus {name} {number}") for number in range(concurrency)]
        self._hand.awake = concurrency
        for worker in self._workers:
            worker.add_done_callback(self._worker_ended)
        try:
            await self._sessions()
        finally:
            await self._cut_off()
            await self._intake.close()
            self._state = "stopped"
            self.opened.set()
        if self._crash is not None:
            raise self._crash

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None and self._crash is None:
            self._crash = error
            self._stopping.set()

    async def _sessions(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopped():
            try:
                await self._open()
            except BrokerError as error:
                await self._intake.close()
                if not self._stopped():
                    pause = await self._back_off(error, pause)
                continue
            self.opened.set()
            started, runs = self._loop.time(), self._runs
            self._state = "running"
            self.problem = None
            self._refresh()
            lost = await self._intake.run_until(self._stopping)
            if self._stopped():
                await self._drain()
            elif lost is None:
                await self._settle_down()
            await self._intake.close()
            if lost is not None and not self._stopped():
                self._suspects.link_lost()
                if self._loop.time() - started > STEADY:
                    pause = FIRST_PAUSE
                elif self._runs > runs:
                    pause = min(pause, LONGEST_PAUSE_AT_WORK)
                pause = await self._back_off(lost, pause)

    async def _open(self) -> None:
        """Opens the receivers, unless it is stopped meanwhile: a broker that does not answer must not hold up a shutdown."""
        opening = self._loop.create_task(self._intake.open(), name=f"msgbus {self.plan.name} opening")
        stopped = self._loop.create_task(self._stopping.wait(), name=f"msgbus {self.plan.name} stopping")
        try:
            await asyncio.wait([opening, stopped], timeout=LONGEST_OPENING, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opening.cancel()
            stopped.cancel()
            await asyncio.wait([opening, stopped], timeout=self._limits.close_timeout)
        if opening.cancelled() or not opening.done():
            raise BrokerUnavailable(f"the broker opened no receiver within {LONGEST_OPENING:g} s")
        opening.result()

    def _stopped(self) -> bool:
        return self._stopping.is_set()

    async def _back_off(self, error: BrokerError, pause: float) -> float:
        """Waits before the next try, less than `pause` seconds; returns the pause after it."""
        if self.problem is None:
            log.warning("%s: cannot receive, trying again: %s", self.plan.name, error)
        self.problem = self._hand.last_error = str(error)
        try:
            async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                await self._stopping.wait()
        except TimeoutError:
            pass
        return min(pause * 2, LONGEST_PAUSE)

    async def _drain(self) -> None:
        """Intake ends, what is not started goes back, what runs may finish; then it is cancelled and goes back too."""
        self._state = "draining"
        self._hand.draining = True
        self._hand.stop_starting()
        deadline = self._loop.time() + (0 if self._cutting or self._crash is not None else self._limits.drain_timeout)
        try:
            async with asyncio.timeout_at(deadline):
                await self._intake.drain()
                await self._carrier.give_back(everything=True)
                await self._until_quiet()
        except TimeoutError:
            log.warning("%s: the drain's time is over: %d handlers are cancelled", self.plan.name, self._hand.running)
        await self._cut_off()
        await self._carrier.bounded(self._carrier.give_back_rest())

    async def _settle_down(self) -> None:
        """Before receivers are opened in another way: nothing runs and nothing is held. A stop ends the waiting."""
        self._hand.stop_starting()
        await self._carrier.give_back(everything=True)
        while self._hand.running and not self._stopped():
            try:
                async with asyncio.timeout(POLL):
                    await self._until_quiet()
            except TimeoutError:
                continue
        if self._stopped():
            await self._drain()
        else:
            await self._intake.drain()  # what they hold still goes back, and nobody has died over it
        self._hand.forget()

    async def _until_quiet(self) -> None:
        """Waits until nothing runs, or `cut`."""
        self._hand.quiet = quiet = asyncio.Event()
        try:
            while self._hand.running and not self._cutting:
                quiet.clear()
                await quiet.wait()
        finally:
            self._hand.quiet = None

    async def _cut_off(self) -> None:
        """Cancels what still runs: never acked, the attempt not counted. A handler that will not end is left behind. Twice is once."""
        if self._cut:
            return
        self._cut = self._cutting = True
        tasks = [task for task in [*self._workers, *self._chores] if not task.done()]
        for task in tasks:
            task.cancel()
        for job in list(self._hand.waiting):
            self._hand.cancel_wait(job)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._limits.close_timeout)
            if late:
                log.error("%s: %d handlers did not end when they were cancelled", self.plan.name, len(late))

    # ------------------------------------------------------------ workers

    async def _work(self) -> None:
        hand = self._hand
        task = asyncio.current_task()
        assert task is not None  # we are one
        while not self._cutting:
            if hand.running >= hand.limit or not hand.ready:
                await hand.idle()
                continue
            job = hand.ready.take()
            tenure = job.received.tenure
            if tenure.lost or tenure.draining or job.source.closed:
                await self._carrier.release(job)
                continue
            if job.envelope.expires_at is not None and hand.expired(job):
                continue
            hand.running += 1
            try:
                if job.outcome is not None:
                    await self._carrier.carry_out(job, job.outcome)
                elif self.plan.batch is not None:
                    if jobs := await self._gather(job):
                        await self._run_batch(jobs)
                else:
                    await self._run_one(job)
            finally:
                hand.running -= 1
                if hand.quiet is not None and not hand.running:
                    hand.quiet.set()
            if task.cancelling() and not self._cutting:
                await _forget_cancelling(task)

    async def _run_one(self, job: Job) -> None:
        hand = self._hand
        try:
            outcome = await isolated(self._route.handle(job), job.envelope, hand.pauses, hand.resumes)
        except asyncio.CancelledError as error:
            outcome = self._cancelled(job, error)
        if outcome is DONE and self._breaker.state == "closed":
            self._runs += 1
            hand.counts["done"] += 1
            hand.finish(job, ack=True)
        elif self._undone_by_cut(outcome):
            raise asyncio.CancelledError
        else:
            await self._settle(job, outcome)

    async def _run_batch(self, jobs: list[Job]) -> None:
        hand = self._hand
        try:
            outcomes = await isolated(self._route.handle_batch(jobs), jobs[0].envelope, hand.pauses, hand.resumes)
        except asyncio.CancelledError as error:
            outcomes = [self._cancelled(job, error) for job in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not self._undone_by_cut(outcome):
                await self._settle(job, outcome)

    async def _gather(self, first: Job) -> list[Job]:
        """A batch: what is ready, and what comes within its wait."""
        batch, hand = self.plan.batch, self._hand
        assert batch is not None  # _work asked
        jobs = [first]
        deadline = None if batch.wait is None else self._loop.time() + batch.wait.total_seconds()
        while len(jobs) < batch.size:
            if not hand.ready:
                if deadline is None or self._loop.time() >= deadline or hand.limit == 0:
                    break
                await hand.idle_until(deadline)
                continue
            job = hand.ready.take()
            if job.lost or job.received.tenure.draining:
                await self._carrier.release(job)
            elif job.outcome is not None:
                await self._carrier.carry_out(job, job.outcome)
            else:
                jobs.append(job)
        return await self._startable(jobs)

    async def _startable(self, jobs: list[Job]) -> list[Job]:
        """Those that may still be started, after the wait for the others. While nothing may start, they are not."""
        hand = self._hand
        found: list[Job] = []
        for job in jobs:
            if job.lost or job.received.tenure.draining or (hand.limit == 0 and hand.lanes is None):
                await self._carrier.release(job)
            elif not hand.expired(job):
                found.append(job)
        if hand.limit == 0:  # an ordered group's stay here, and return in order when its receiver closes
            for job in reversed(found):
                job.source.ready.appendleft(job)
            return []
        for job in [job for job in found if job.outcome is not None]:
            found.remove(job)
            await self._carrier.carry_out(job, job.outcome or DONE)
        return found

    def _cancelled(self, job: Job, error: asyncio.CancelledError) -> Outcome:
        """Cancelled by us: back it goes, uncounted. By anyone else: a failure like any other, and this worker lives on."""
        if self._cutting:
            raise error
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        return self._route.failed(job, error)

    def _undone_by_cut(self, outcome: Outcome) -> bool:
        """A failure that is only what the handler made of our cancelling it: the message goes back, its attempt not counted."""
        return self._cutting and isinstance(outcome, RetryAfter | Dead)

    async def _settle(self, job: Job, outcome: Outcome) -> None:
        """What a run came to: the breaker hears of it, and it is carried out."""
        self._feed_breaker(outcome)
        await self._carrier.carry_out(job, outcome)

    # ------------------------------------------------------------ how many may run

    def _after_batch(self) -> None:
        """Messages came in: paused, or with the circuit open, they go back; and the breaker learns how many runs there were."""
        if self._hand.limit == 0:
            self._refresh()
        self._breaker.sample(self._loop.time(), self._runs)

    def _due_while_closed(self) -> None:
        """A retry's time has come while nothing may run: others of the group may have it."""
        if self._paused or self._breaker.state == "open":
            self._refresh()

    def _feed_breaker(self, outcome: Outcome) -> None:
        """Tells the breaker how a run ended, and follows what it decides."""
        breaker = self._breaker
        self._runs += 1
        error = outcome.error if isinstance(outcome, RetryAfter | Dead) else None
        if isinstance(error, BaseException) and is_dependency_failure(error):
            now = self._loop.time()
            if breaker.failed(now, self._runs):
                log.warning("%s: circuit open for %.3g s: %s", self.plan.name, breaker.reopens_at - now, described(error))
                self._loop.call_at(breaker.reopens_at, self._try_again)
                self._refresh()
        elif breaker.state == "half_open" and not isinstance(outcome, Released):
            breaker.succeeded()
            log.info("%s: circuit closed", self.plan.name)
            self._refresh()

    def _try_again(self) -> None:
        self._breaker.try_again()
        self._refresh()

    def _refresh(self) -> None:
        """Works out how many may run now, and wakes who may go on."""
        hand = self._hand
        if self._stopped() or self._paused or self._breaker.state == "open":
            hand.stop_starting()
            if not self._stopped() and hand.lanes is None:
                self._spawn(self._carrier.give_back(everything=False))
            return
        hand.limit = 1 if self._suspects.quarantine or self._breaker.state == "half_open" else self.plan.concurrency
        if hand.running < hand.limit and hand.ready:
            hand.wake()
        self._intake.look_again()

    def _spawn(self, chore: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(chore, name=f"msgbus {self.plan.name} chore")
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


async def _forget_cancelling(task: asyncio.Task[Any]) -> None:
    """A handler cancelled the task it ran in, and ended before that came through: neither the worker nor the next message is to suffer."""
    while task.cancelling():
        task.uncancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
