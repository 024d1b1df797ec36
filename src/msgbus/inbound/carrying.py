"""Carrying out what is not simply done: an outcome becomes a wait here, a copy for later, a dead letter, or the message goes back."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from msgbus.contract.adapter import Adapter, Capability
from msgbus.contract.outcome import Dead, Done, Dropped, Outcome, Released, RetryAfter
from msgbus.errors import BrokerError
from msgbus.inbound.hand import Hand
from msgbus.inbound.job import Job
from msgbus.inbound.plan import Plan
from msgbus.inbound.settle import Settler, words_of

log = logging.getLogger("msgbus")
dead_log = logging.getLogger("msgbus.dead_letters")

MAX_LOCAL_TRIES = 3
MAX_LOCAL_WAIT = 5.0
"""So many tries, and seconds together, wait in the process; then the broker's delay takes over, which frees the place."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
"""Between tries to store a copy that the broker does not take."""
MAX_DESCRIBED = 500


class Carrier:
    """Of one subscription. Its coroutines are a worker's, and call back when they wait, so that another worker goes on."""

    def __init__(self, plan: Plan, hand: Hand, adapter: Adapter, settler: Settler, step_timeout: float) -> None:
        self._plan = plan
        self._hand = hand
        self._adapter = adapter
        self._settler = settler
        self._step_timeout = step_timeout
        self._blocks = plan.ordered and plan.on_failure == "block"
        self._can_copy = plan.group is not None and Capability.DELAY in adapter.capabilities
        self._pause = FIRST_PAUSE
        self._loop = asyncio.get_running_loop()

    async def carry_out(self, job: Job, outcome: Outcome) -> None:
        """The one place where an outcome becomes what the broker is told."""
        job.outcome = None  # among the stuck it stays, and intake with it, until it is settled
        match outcome:
            case Done(repeated):
                self._hand.counts["done"] += 1
                if repeated:
                    self._hand.counts["repeated"] += 1
                    log.info("%s: %s came again, and its effect was there already", self._plan.name, job.envelope.id)
                self._hand.finish(job, ack=True)
            case Dropped(reason):
                self._hand.counts["dropped"] += 1
                log.info("%s: dropped %s: %s", self._plan.name, job.envelope.id, reason)
                self._hand.finish(job, ack=True)
            case Released():
                await self.release(job)
            case RetryAfter():
                await self._retry(job, outcome)
            case Dead():
                await self._bury(job, outcome)

    # ------------------------------------------------------------ again

    async def _retry(self, job: Job, outcome: RetryAfter) -> None:
        envelope, delay = job.envelope, outcome.delay
        if outcome.counted and job.failed_at is None:
            job.failed_at = time.time()
        if outcome.error is not None:
            self._note_failure(job, outcome.error, delay)
        if envelope.expires_at is not None and time.time() + delay >= envelope.expires_at:
            await self._bury(job, Dead("expired", outcome.error or "it expires before its next run"))
            return
        runs = job.attempt if outcome.counted else job.attempt - 1
        if self._blocks and envelope.key is not None:
            longest = self._adapter.limits.unsettled
            if longest is not None and self._loop.time() - job.since + delay > longest * 0.9:
                why = f"its next run is in {delay:.3g} s, and the broker lets a message stay un-settled for {longest:.3g} s"
                await self._bury(job, Dead("unsupported", why))
                return
        elif self._takes_the_long_way(job, delay):
            self._hand.counts["retried"] += 1
            copying = self._settler.retry(job.source.receiver, job.received, runs=runs, delay=delay, failed_at=job.failed_at)
            await self._copy(job, outcome, copying)
            return
        if self._hand.draining:  # an ordered group: it goes back with its successors when the receiver closes
            self._hand.finish(job, ack=False)
            return
        self._hand.stuck.discard(job)
        job.tries += 1
        job.waited += delay
        job.attempt = runs + 1
        self._hand.counts["retried"] += 1
        self._hand.wait(job, delay)

    def _note_failure(self, job: Job, error: BaseException, delay: float) -> None:
        said = described(error)
        self._hand.counts["failed"] += 1
        self._hand.last_error = said
        log.warning("%s: run %d of %s failed, next in %.3g s: %s", self._plan.name, job.attempt, job.envelope.id, delay, said)

    def _takes_the_long_way(self, job: Job, delay: float) -> bool:
        """By the broker's delay, which frees its place in the window and its lane; short waits, and a broadcast's, stay here."""
        if not self._can_copy:
            return False
        if self._hand.lanes is not None and job.envelope.key is not None:  # order was given up for it: its key goes on
            return True
        return job.tries >= MAX_LOCAL_TRIES or job.waited + delay > MAX_LOCAL_WAIT or self._hand.limit == 0

    # ------------------------------------------------------------ never

    async def _bury(self, job: Job, dead: Dead) -> None:
        name, message_id, said = self._plan.name, job.envelope.id, described(dead.error)
        if self._plan.group is None:  # broadcast: nobody else has the message, and nobody could redrive it to this instance
            dead_log.error("%s: given up %s (%s): %s", name, message_id, dead.reason, said)
            self._hand.counts["dead"] += 1
            self._hand.finish(job, ack=True)
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
            self._hand.counts["dead"] += 1
            level = logging.INFO if dead.reason == "rejected" else logging.ERROR
            error = dead.error if isinstance(dead.error, BaseException) and dead.reason == "exhausted" else None
            dead_log.log(level, "%s: dead letter %s (%s): %s", name, message_id, dead.reason, said, exc_info=error)

    async def _copy(self, job: Job, outcome: Outcome, copying: Coroutine[Any, Any, BaseException | None]) -> bool:
        """A copy goes to its new place, then the original is settled. If it cannot, the outcome waits here, and intake with it."""
        hand = self._hand
        hand.pauses()
        try:
            with hand.leaves(job):
                problem = await copying
        finally:
            hand.resumes()
        if problem is None:
            self._pause = FIRST_PAUSE
            hand.finish(job, ack=False)
            return True
        log.error("%s: %s stays with its source, its copy could not be stored: %s", self._plan.name, job.envelope.id, problem)
        hand.last_error = described(problem)
        job.outcome = outcome
        hand.stuck.add(job)
        hand.wait(job, self._pause * random.uniform(0.5, 1.0))
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        return False

    # ------------------------------------------------------------ back

    async def release(self, job: Job) -> None:
        """Back to the group, as if it had not been handed out, but for its attempts. For a worker: another one goes on meanwhile."""
        self._hand.pauses()
        try:
            await self._return([job])
        finally:
            self._hand.resumes()

    async def put_back(self, job: Job) -> None:
        """As `release`, for those who are no workers."""
        hand = self._hand
        hand.counts["released"] += 1
        job.outcome = None
        with hand.leaves(job):
            for source, received in [(job.source, job.received), *(job.twins or ())]:
                if not (source.closed or received.tenure.lost):
                    await self.bounded(source.receiver.release(received))
        for source, _ in job.twins or ():
            source.held -= 1
        job.twins = None
        hand.finish(job, ack=False)

    async def give_back(self, *, everything: bool) -> None:
        """What is not started returns to the group; with `everything`, also what waits for its next run.

        In an ordered group nothing goes back alone: it stays here while paused, and returns in order when its receiver closes.
        """
        hand = self._hand
        if hand.lanes is not None:
            if everything:
                for job in list(hand.waiting):
                    hand.cancel_wait(job)
            return
        jobs = hand.ready.take_all()
        if everything:
            jobs += list(hand.waiting)
        await self._return(jobs)

    async def give_back_rest(self) -> None:
        """What was cancelled while it ran returns to the group; a copy keeps the count of the runs that ended before."""
        if self._hand.lanes is None:
            await self._return(self._hand.all())

    async def _return(self, jobs: Sequence[Job]) -> None:
        hand = self._hand
        for job in jobs:
            hand.cancel_wait(job)
            if job.tries and job.outcome is None and not job.lost and hand.lanes is None and self._can_copy:  # a copy keeps the count
                copying = self._settler.retry(job.source.receiver, job.received, runs=job.attempt - 1, delay=0.0, failed_at=job.failed_at)
                with hand.leaves(job):
                    problem = await copying
                if problem is None:
                    hand.finish(job, ack=False)
                    continue
            await self.put_back(job)

    async def bounded(self, call: Coroutine[Any, Any, None]) -> None:
        """An adapter's call that must not hold up a shutdown; what goes wrong is only logged: the broker gives back by itself."""
        try:
            async with asyncio.timeout(self._step_timeout):
                await call
        except (TimeoutError, BrokerError) as error:
            log.warning("%s: giving messages back: %s", self._plan.name, str(error) or "no answer")


def described(error: BaseException | str) -> str:
    """An error in one line: its type and what it says."""
    words = error if isinstance(error, str) else f"{type(error).__name__}: {words_of(error)}".removesuffix(": ")
    line = " ".join(words.split())
    return line if len(line) <= MAX_DESCRIBED else line[: MAX_DESCRIBED - 1] + "…"
