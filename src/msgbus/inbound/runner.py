"""Runner: a subscription at work: receive → slots and lanes → route → settle; and its way to an end.

One pump a source fills the window; a fixed pool of workers takes what is ready. Nothing here compares a broker's name.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from msgbus.contract.adapter import Adapter, Capability, Received, ReceiverSpec
from msgbus.contract.envelope import NOT_BEFORE, PRIORITIES, Priority
from msgbus.contract.outcome import DONE, Dead, Done, Dropped, Outcome, Released, RetryAfter
from msgbus.errors import BrokerError
from msgbus.inbound.breaker import Breaker
from msgbus.inbound.isolation import Isolated
from msgbus.inbound.job import Job, Source
from msgbus.inbound.lanes import Lanes
from msgbus.inbound.ready import ByWeight, OneLevel, share_of_window
from msgbus.inbound.route import Route
from msgbus.inbound.settle import Settler, words_of
from msgbus.retry import is_dependency_failure

log = logging.getLogger("msgbus")

POLL = 0.5
"""Seconds that a receive waits: also how soon a shard that others wait for is noticed."""
MAX_LOCAL_TRIES = 3
MAX_LOCAL_WAIT = 5.0
SUSPECT = 2
"""Deaths from which a delivery puts its subscription in quarantine."""
CALM = 3
"""Good deliveries in a row that end a quarantine."""
STEADY = 10.0
"""Seconds that a link must hold for the back-off to begin anew."""
REMEMBERED = 10_000
"""Messages whose first count of crashes a process remembers."""

State = Literal["starting", "running", "paused", "circuit open", "quarantine", "waiting for broker", "draining", "stopped"]


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What the settings say to a runner; seconds."""

    max_deliveries: int
    drain_timeout: float
    close_timeout: float
    """For each step of closing, of which there are a few."""


class _ReopenError(Exception):
    """The pump wants its receivers closed and opened again: into quarantine, or out of it."""


class Runner:
    """Runs one subscription until `stop`. Made and used in one event loop."""

    def __init__(self, route: Route[Any], adapter: Adapter, settler: Settler, limits: RunnerLimits) -> None:
        plan = route.plan
        self.plan = plan
        self.counts: Counter[str] = Counter()
        """done, dropped, dead, retried, failed, expired, released: since this runner started."""
        self.problem: str | None = None
        """Why nothing is received, while that is so."""
        self.last_error: str | None = None
        self.opened = asyncio.Event()
        """Set when its receivers are open for the first time, and when it has ended."""
        self._route = route
        self._adapter = adapter
        self._settler = settler
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._levels: tuple[Priority, ...] = PRIORITIES if plan.topic.priorities else ("normal",)
        self._ready: OneLevel[Job] | ByWeight[Job] = OneLevel() if len(self._levels) == 1 else ByWeight()
        self._lanes: Lanes[Job] | None = Lanes() if plan.ordered else None
        self._blocks = plan.ordered and plan.on_failure == "block"
        self._half = max(2, (plan.window + 1) // 2)  # so many waiting end the intake
        self._breaker = Breaker()
        self._runs = 0
        self._inflight: dict[str, Job] = {}
        self._waiting: dict[Job, asyncio.TimerHandle] = {}
        self._stuck: set[Job] = set()  # whose outcome could not be carried out, and waits to be tried again
        self._sources: list[Source] = []
        self._idlers: deque[asyncio.Future[bool]] = deque()
        self._awake = 0  # workers that will look at what is ready before they wait
        self._running = 0
        self._limit = 0  # how many may run at once, just now
        self._paused = False
        self._stopping = asyncio.Event()
        self._quarantined = False
        self._cutting = False
        self._quiet: asyncio.Event | None = None
        self._first_counts: OrderedDict[str, int] = OrderedDict()
        self._chores: set[asyncio.Task[None]] = set()
        self._workers: list[asyncio.Task[None]] = []
        self._crash: BaseException | None = None
        self._settle_pause = 1.0
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
        return "quarantine" if self._quarantined else self._state

    @property
    def running(self) -> int:
        """Handlers at work now (batches, with a batch handler)."""
        return self._running

    @property
    def waiting(self) -> int:
        """Failed messages that wait in this process for their next run."""
        return len(self._waiting)

    @property
    def intake_stopped(self) -> bool:
        """So much waits for its next run, or cannot be settled, that nothing new is taken."""
        return bool(self._stuck) or len(self._waiting) >= self._half

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
        if self._quiet is not None:
            self._quiet.set()

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Consumes until `stop`, through lost links, then drains. Raises only what is a bug, ours or an adapter's."""
        self._workers = [
            self._loop.create_task(self._work(), name=f"msgbus {self.plan.name} {number}") for number in range(self.plan.concurrency)
        ]
        self._awake = len(self._workers)
        for worker in self._workers:
            worker.add_done_callback(self._worker_ended)
        try:
            await self._sessions()
        finally:
            await self._cut_off()
            await self._close_sources()
            self._state = "stopped"
            self.opened.set()
        if self._crash is not None:
            raise self._crash

    async def _cut_off(self) -> None:
        """Cancels what still runs: never acked, the attempt not counted. A handler that will not end is left behind."""
        self._cutting = True
        tasks = [task for task in [*self._workers, *self._chores] if not task.done()]
        for task in tasks:
            task.cancel()
        for timer in self._waiting.values():
            timer.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._limits.close_timeout)
            if late:
                log.error("%s: %d handlers did not end when they were cancelled", self.plan.name, len(late))

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None and self._crash is None:
            self._crash = error
            self._stopping.set()

    async def _sessions(self) -> None:
        pause = 0.1
        while not self._stopped():
            try:
                await self._open()
            except BrokerError as error:
                await self._close_sources()
                pause = await self._back_off(error, pause)
                continue
            self.opened.set()
            started = self._loop.time()
            self._state = "running"
            self.problem = None
            self._refresh()
            lost = await self._pump_until_it_ends()
            if self._stopped():
                await self._drain()
            elif lost is None:
                await self._settle_down()
            await self._close_sources()
            if lost is not None and not self._stopped():
                pause = 0.1 if self._loop.time() - started > STEADY else pause
                pause = await self._back_off(lost, pause)

    def _stopped(self) -> bool:
        return self._stopping.is_set()

    async def _back_off(self, error: BrokerError, pause: float) -> float:
        """Waits before the next try, less than `pause` seconds; returns the pause after it."""
        if self.problem is None:
            log.warning("%s: the broker is away, trying again: %s", self.plan.name, error)
        self.problem = self.last_error = str(error)
        try:
            async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                await self._stopping.wait()
        except TimeoutError:
            pass
        return min(pause * 2, 10.0)

    async def _open(self) -> None:
        plan = self.plan
        for level in self._levels:
            window = plan.window if len(self._levels) == 1 else share_of_window(level, plan.window)
            if self._quarantined:
                window = 1
            spec = ReceiverSpec(
                topic=plan.physical,
                group=plan.group,
                window=window,
                priority=level,
                start=plan.start,
                exclusive=plan.ordered and plan.group is not None and Capability.SHARDS in self._adapter.capabilities,
                quarantine=self._quarantined,
            )
            self._sources.append(Source(await self._adapter.open_receiver(spec), level, window, self._ready.level(level)))

    async def _pump_until_it_ends(self) -> BrokerError | None:
        """None: stopped, or to be opened again; an error: the link is gone."""
        pumps = [self._loop.create_task(self._pump(source), name=f"msgbus {self.plan.name} {source.level}") for source in self._sources]
        stopping = self._loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait([*pumps, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in [*pumps, stopping]:
                task.cancel()
            await asyncio.wait([*pumps, stopping])
        lost: BrokerError | None = None
        for pump in pumps:
            result = None if pump.cancelled() else pump.exception()
            if isinstance(result, BrokerError):
                lost = result
            elif isinstance(result, Exception) and not isinstance(result, _ReopenError):
                raise result
        return lost

    async def _close_sources(self) -> None:
        """Closes the receivers; what they had handed out and not settled returns to the group."""
        sources, self._sources = self._sources, []
        for job in self._inflight.values():
            job.received.tenure.lost = True  # what is not started must not start: it comes again, here or elsewhere
        await asyncio.gather(*(self._bounded(source.receiver.close()) for source in sources))
        for source in sources:
            self.counts["stale_acks"] += source.receiver.stale_acks

    async def _drain(self) -> None:
        """Intake ends, what is not started goes back, what runs may finish; then it is cancelled and goes back too."""
        self._state = "draining"
        self._limit = 0
        deadline = self._loop.time() + (0 if self._cutting or self._crash is not None else self._limits.drain_timeout)
        try:
            async with asyncio.timeout_at(deadline):
                for source in self._sources:
                    await self._bounded(source.receiver.drain())
                await self._give_back(everything=True)
                await self._until_quiet()
        except TimeoutError:
            log.warning("%s: the drain's time is over: %d handlers are cancelled", self.plan.name, self._running)
        await self._cut_off()

    async def _settle_down(self) -> None:
        """Before receivers are opened in another way: nothing runs and nothing is held. A stop ends the waiting."""
        self._limit = 0
        await self._give_back(everything=True)
        while self._running and not self._stopping.is_set():
            try:
                async with asyncio.timeout(POLL):
                    await self._until_quiet()
            except TimeoutError:
                continue
        if self._stopping.is_set():
            await self._drain()
        self._forget_held()

    def _forget_held(self) -> None:
        """What is still held comes again from the receivers opened next."""
        for job in list(self._inflight.values()):
            self._cancel_wait(job)
        self._inflight.clear()
        self._ready.take_all()
        self._stuck.clear()
        if self._lanes is not None:
            self._lanes.clear()

    async def _until_quiet(self) -> None:
        """Waits until nothing runs, or `cut`."""
        self._quiet = asyncio.Event()
        try:
            while self._running and not self._cutting:
                self._quiet.clear()
                await self._quiet.wait()
        finally:
            self._quiet = None

    async def _bounded(self, call: Coroutine[Any, Any, None]) -> None:
        """An adapter's call that must not hold up a shutdown."""
        try:
            async with asyncio.timeout(self._limits.close_timeout):
                await call
        except (TimeoutError, BrokerError) as error:
            log.warning("%s: giving messages back: %s", self.plan.name, str(error) or "no answer")

    # ------------------------------------------------------------ receiving

    async def _pump(self, source: Source) -> None:
        while True:
            room = source.window - source.held
            if not self._takes(source, room):
                await self._wait_for_room(source)
                self._look_at_tenures()
                continue
            batch = await source.receiver.receive(min(room, self._limit) if self._limit < self.plan.concurrency else room, POLL)
            self._watch_for_suspects(source, batch)
            now = time.time()
            for received in batch:
                self._accept(source, received, now)
            if batch and self._limit == 0:  # paused, or the circuit opened, while it waited for them
                self._refresh()
            self._look_at_tenures()
            self._breaker.sample(self._loop.time(), self._runs)

    def _takes(self, source: Source, room: int) -> bool:
        """Whether to fetch now: half a window at once, or anything when nothing is ready."""
        return (
            room > 0
            and self._limit > 0
            and (room * 2 >= source.window or not len(self._ready))
            and not (self._waiting and (self._stuck or len(self._waiting) >= self._half))
        )

    async def _wait_for_room(self, source: Source) -> None:
        source.room = self._loop.create_future()
        timer = self._loop.call_later(POLL, _resolve, source.room, None)
        try:
            await source.room
        finally:
            timer.cancel()
            source.room = None

    def _watch_for_suspects(self, source: Source, batch: list[Received]) -> None:
        """Into quarantine when a message comes that was in hand at two deaths; out of it when the suspects are through."""
        suspects = 0
        for received in batch:
            if received.crashes and self._deaths(received) >= SUSPECT:
                suspects += 1
        if self._quarantined:
            source.calm = 0 if suspects else CALM if not batch else source.calm + 1
            if not all(other.calm >= CALM for other in self._sources):
                return
            log.info("%s: quarantine is over", self.plan.name)
        elif suspects:
            log.warning(
                "%s: messages came that were in hand when processes died: one at a time until they are through",
                self.plan.name,
            )
        else:
            return
        self._quarantined = not self._quarantined
        if self._lanes is None:
            for received in batch:
                self._spawn(self._bounded(source.receiver.release(received)))
        raise _ReopenError

    def _deaths(self, received: Received) -> int:
        """Deaths of processes that held it: the broker's count at this process's first sight of it. The rest are our own lost links."""
        seen = self._first_counts
        first = seen.setdefault(received.envelope.id, received.crashes)
        if len(seen) > REMEMBERED:
            seen.popitem(last=False)
        return first

    def _accept(self, source: Source, received: Received, now: float) -> None:
        envelope = received.envelope
        source.held += 1
        job = self._inflight.get(envelope.id)
        if job is not None:
            self._adopt(job, source, received)
            return
        if envelope.expires_at is not None and envelope.expires_at <= now:
            self.counts["expired"] += 1
            source.receiver.ack(received)
            source.held -= 1
            return
        job = self._inflight[envelope.id] = Job(received, source, self._loop.time())
        if received.crashes and self._quarantined and self._deaths(received) >= self._limits.max_deliveries:
            job.outcome = Dead("poison", f"{self._deaths(received)} processes died while they held it")
        elif envelope.group is not None and NOT_BEFORE in envelope.headers:
            job.outcome = self._rest_of_wait(job, now)
        if self._lanes is not None and envelope.key is not None and not self._lanes.enter(envelope.key, job):
            return
        self._put(job)

    def _rest_of_wait(self, job: Job, now: float) -> Outcome | None:
        """A wait longer than the broker's longest delay goes round until its time has come."""
        try:
            rest = float(job.envelope.headers[NOT_BEFORE]) - now
        except ValueError:
            return None
        return RetryAfter(rest, counted=False) if 0.05 < rest < 366 * 86400 else None

    def _adopt(self, job: Job, source: Source, received: Received) -> None:
        """Another copy of a message that is here already, after a lost link or a repeated publish: settled with it, not run beside it."""
        twin = (job.source, job.received)
        job.source, job.received = source, received
        if job.twins is None:
            job.twins = [twin]
        else:
            job.twins.append(twin)

    def _put(self, job: Job) -> None:
        job.source.ready.append(job)
        if not self._awake:
            self._wake_worker()

    def _look_at_tenures(self) -> None:
        """A retry that waits here must not hold up the hand-over of its shard."""
        if self._waiting:
            for job in [job for job in self._waiting if job.received.tenure.draining]:
                self._cancel_wait(job)
                self._put(job)

    # ------------------------------------------------------------ running

    async def _work(self) -> None:
        while True:
            if self._running >= self._limit or not len(self._ready):
                await self._idle()
                continue
            job = self._ready.take()
            tenure = job.received.tenure
            if tenure.lost or tenure.draining:
                await self._release(job)
                continue
            self._running += 1
            try:
                if job.outcome is not None:
                    await self._carry_out(job, job.outcome)
                elif self.plan.batch is not None:
                    await self._run_batch(job)
                else:
                    await self._run_one(job)
            finally:
                self._running -= 1
                if self._quiet is not None and not self._running:
                    self._quiet.set()

    async def _idle(self) -> None:
        self._awake -= 1
        future: asyncio.Future[bool] = self._loop.create_future()
        self._idlers.append(future)
        await future  # whoever wakes us has counted us as awake

    def _wake_worker(self) -> None:
        while self._idlers:
            future = self._idlers.popleft()
            if not future.done():
                self._awake += 1
                future.set_result(True)
                return

    def _waits(self) -> None:
        """The worker that runs just now is about to wait: another one takes what is ready."""
        self._awake -= 1
        if not self._awake and len(self._ready) and self._running < self._limit:
            self._wake_worker()

    async def _run_one(self, job: Job) -> None:
        run = Isolated(self._route.handle(job), job.envelope, self._waits)
        try:
            outcome = await run
        except asyncio.CancelledError as error:
            outcome = self._cancelled(job, error)
        if run.waited:
            self._awake += 1
        if self._cutting and isinstance(outcome, RetryAfter | Dead):
            raise asyncio.CancelledError  # what the handler made of our cancelling it: back it goes, uncounted
        if outcome is DONE and self._breaker.state == "closed":
            self._runs += 1
            self.counts["done"] += 1
            self._finish(job, acked=True)
        else:
            self._feed_breaker(outcome)
            await self._carry_out(job, outcome)

    def _cancelled(self, job: Job, error: asyncio.CancelledError) -> Outcome:
        """Cancelled by us: back it goes, uncounted. By anyone else: a failure like any other, and this worker lives on."""
        if self._cutting:
            raise error
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        return self._route.failed(job, error)

    async def _run_batch(self, first: Job) -> None:
        batch = self.plan.batch
        assert batch is not None  # _work asked
        jobs = [first]
        deadline = None if batch.wait is None else self._loop.time() + batch.wait.total_seconds()
        while len(jobs) < batch.size:
            if not len(self._ready):
                if deadline is None or self._loop.time() >= deadline or self._limit == 0:
                    break
                await self._fill(deadline)
                continue
            job = self._ready.take()
            if job.received.tenure.lost or job.received.tenure.draining:
                await self._release(job)
            elif job.outcome is not None:
                await self._carry_out(job, job.outcome)
            else:
                jobs.append(job)
        run = Isolated(self._route.handle_batch(jobs), first.envelope, self._waits)
        try:
            outcomes = await run
        except asyncio.CancelledError as error:
            outcomes = [self._cancelled(job, error) for job in jobs]
        if run.waited:
            self._awake += 1
        for job, outcome in zip(jobs, outcomes, strict=True):
            if self._cutting and isinstance(outcome, RetryAfter | Dead):
                continue  # as above
            self._feed_breaker(outcome)
            await self._carry_out(job, outcome)

    async def _fill(self, deadline: float) -> None:
        """Waits for more members of a batch: this worker is the one that is woken for them, until `deadline`."""
        self._awake -= 1
        future: asyncio.Future[bool] = self._loop.create_future()
        self._idlers.appendleft(future)
        timer = self._loop.call_at(deadline, _resolve, future, False)
        try:
            counted = await future
        finally:
            timer.cancel()
        if not counted:
            self._awake += 1

    # ------------------------------------------------------------ settling

    async def _carry_out(self, job: Job, outcome: Outcome) -> None:
        """The one place where an outcome becomes what the broker is told."""
        if job.outcome is not None:
            self._stuck.discard(job)
            job.outcome = None
        match outcome:
            case Done():
                self.counts["done"] += 1
                self._finish(job, acked=True)
            case Dropped(reason):
                self.counts["dropped"] += 1
                log.info("%s: dropped %s: %s", self.plan.name, job.envelope.id, reason)
                self._finish(job, acked=True)
            case Released():
                await self._release(job)
            case RetryAfter():
                await self._retry(job, outcome)
            case Dead():
                await self._bury(job, outcome)

    async def _retry(self, job: Job, outcome: RetryAfter) -> None:
        delay, error = outcome.delay, outcome.error
        if outcome.counted and job.failed_at is None:
            job.failed_at = time.time()
        envelope, plan = job.envelope, self.plan
        if error is not None:
            self.counts["failed"] += 1
            self.last_error = _said(error)
            log.warning(
                "%s: run %d of %s failed, next in %.3g s: %s",
                plan.name,
                job.attempt,
                envelope.id,
                delay,
                self.last_error,
            )
        if envelope.expires_at is not None and time.time() + delay >= envelope.expires_at:
            await self._bury(job, Dead("expired", error or "it expires before its next run"))
            return
        runs = job.attempt if outcome.counted else job.attempt - 1
        if self._blocks and envelope.key is not None:
            longest = self._adapter.limits.unsettled
            if longest is not None and self._loop.time() - job.since + delay > longest * 0.9:
                await self._bury(
                    job,
                    Dead(
                        "unsupported",
                        f"its next run is in {delay:.3g} s, and the broker lets a message stay un-settled for {longest:.3g} s",
                    ),
                )
                return
        elif self._takes_the_long_way(job, delay):
            self.counts["retried"] += 1
            copying = self._settler.retry(job.source.receiver, job.received, runs=runs, delay=delay, failed_at=job.failed_at)
            await self._copy(job, outcome, copying)
            return
        if self._state == "draining":  # an ordered group: it goes back with its successors when the receiver closes
            self._finish(job, acked=False)
            return
        job.tries += 1
        job.waited += delay
        job.attempt = runs + 1
        self.counts["retried"] += 1
        self._wait(job, delay)

    def _takes_the_long_way(self, job: Job, delay: float) -> bool:
        """By the broker's delay, which frees its place in the window and its lane; short waits, and a broadcast's, stay here."""
        if self.plan.group is None or Capability.DELAY not in self._adapter.capabilities:
            return False
        if self._lanes is not None and job.envelope.key is not None:  # order was given up for it: its key goes on
            return True
        return job.tries >= MAX_LOCAL_TRIES or job.waited + delay > MAX_LOCAL_WAIT or self._limit == 0

    async def _bury(self, job: Job, dead: Dead) -> None:
        if self.plan.group is None:  # broadcast: nobody else has the message, and nobody could redrive it to this instance
            log.error("%s: given up %s (%s): %s", self.plan.name, job.envelope.id, dead.reason, _said(dead.error))
            self.counts["dead"] += 1
            self._finish(job, acked=True)
            return
        copying = self._settler.bury(
            job.source.receiver,
            job.received,
            dead,
            attempt=job.attempt,
            deliveries=job.attempt + job.received.crashes,
            failed_at=job.failed_at or time.time(),
        )
        if await self._copy(job, dead, copying):
            self.counts["dead"] += 1
            level = logging.INFO if dead.reason == "rejected" else logging.ERROR
            error = dead.error if isinstance(dead.error, BaseException) and dead.reason == "exhausted" else None
            log.log(
                level,
                "%s: dead letter %s (%s): %s",
                self.plan.name,
                job.envelope.id,
                dead.reason,
                _said(dead.error),
                exc_info=error,
            )

    async def _copy(self, job: Job, outcome: Outcome, copying: Coroutine[Any, Any, BaseException | None]) -> bool:
        """A copy goes to its new place, then the original is settled. If it cannot, the outcome waits here, and intake with it."""
        self._waits()
        try:
            problem = await copying
        finally:
            self._awake += 1
        if problem is None:
            self._settle_pause = 1.0
            self._finish(job, acked=False)
            return True
        log.error("%s: %s stays with its source, its copy could not be stored: %s", self.plan.name, job.envelope.id, problem)
        self.last_error = _said(problem)
        job.outcome = outcome
        self._stuck.add(job)
        self._wait(job, self._settle_pause * random.uniform(0.5, 1.0))
        self._settle_pause = min(self._settle_pause * 2, 30.0)
        return False

    def _wait(self, job: Job, delay: float) -> None:
        """The job keeps its place in the window, and its lane, and comes back to be run, or carried out, after `delay` seconds."""
        self._waiting[job] = self._loop.call_later(delay, self._due, job)

    def _due(self, job: Job) -> None:
        if self._waiting.pop(job, None) is not None:
            self._put(job)
            if self._paused or self._breaker.state == "open":  # others of the group may have it
                self._refresh()

    def _cancel_wait(self, job: Job) -> None:
        timer = self._waiting.pop(job, None)
        if timer is not None:
            timer.cancel()

    async def _release(self, job: Job) -> None:
        """Back to the group, as if it had not been handed out."""
        self.counts["released"] += 1
        copies = [(job.source, job.received), *(job.twins or ())]
        self._waits()
        try:
            for source, received in copies:
                if not received.tenure.lost:
                    await self._bounded(source.receiver.release(received))
        finally:
            self._awake += 1
        for source, _ in job.twins or ():
            source.held -= 1
        job.twins = None
        self._finish(job, acked=False)

    def _finish(self, job: Job, *, acked: bool) -> None:
        """The job is settled: its place, its lane and its twins are free."""
        source = job.source
        if acked:
            source.receiver.ack(job.received)
        envelope = job.envelope
        self._inflight.pop(envelope.id, None)
        source.held -= 1
        if job.twins is not None:
            for twin_source, received in job.twins:
                twin_source.receiver.ack(received)
                twin_source.held -= 1
        if self._lanes is not None and envelope.key is not None:
            following = self._lanes.leave(envelope.key)
            if following is not None:
                self._put(following)
        room = source.room
        if room is not None and self._takes(source, source.window - source.held) and not room.done():
            room.set_result(None)

    async def _give_back(self, *, everything: bool) -> None:
        """What is not started returns to the group; with `everything`, also what waits for its next run.

        In an ordered group nothing goes back alone: it stays here while paused, and returns in order when its receiver closes.
        """
        if self._lanes is not None:
            if everything:
                for job in list(self._waiting):
                    self._cancel_wait(job)
            return
        jobs = self._ready.take_all()
        if everything:
            jobs += list(self._waiting)
        for job in jobs:
            self._cancel_wait(job)
            if job.outcome is not None:
                self._stuck.discard(job)
                job.outcome = None
            elif job.tries and self._takes_the_long_way(job, 0.0):  # a copy keeps the count of its attempts
                copying = self._settler.retry(job.source.receiver, job.received, runs=job.attempt - 1, delay=0.0, failed_at=job.failed_at)
                if await copying is None:
                    self._finish(job, acked=False)
                    continue
            await self._release(job)

    # ------------------------------------------------------------ how many may run

    def _feed_breaker(self, outcome: Outcome) -> None:
        """Tells the breaker how a run ended, and follows what it decides."""
        breaker = self._breaker
        self._runs += 1
        error = outcome.error if isinstance(outcome, RetryAfter | Dead) else None
        if isinstance(error, BaseException) and is_dependency_failure(error):
            now = self._loop.time()
            if breaker.failed(now, self._runs):
                log.warning("%s: circuit open for %.3g s: %s", self.plan.name, breaker.reopens_at - now, _said(error))
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
        if self._stopping.is_set() or self._paused or self._breaker.state == "open":
            self._limit = 0
            if not self._stopping.is_set() and self._lanes is None:
                self._spawn(self._give_back(everything=False))
            return
        self._limit = 1 if self._quarantined or self._breaker.state == "half_open" else self.plan.concurrency
        if self._running < self._limit and len(self._ready):
            self._wake_worker()
        for source in self._sources:
            if source.room is not None:
                _resolve(source.room, None)

    def _spawn(self, chore: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(chore, name=f"msgbus {self.plan.name} chore")
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _said(error: BaseException | str) -> str:
    if isinstance(error, str):
        return error
    words = words_of(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
