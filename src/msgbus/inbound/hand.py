"""Hand: what a subscription has in hand: received and not settled; and the slots in which it is run.

A message is in one of four places: in its key's lane behind another, ready, in a slot, or waiting for its next run. Only the table of
what is in hand knows them all. A fixed pool of workers takes what is ready: a worker that is about to wait wakes another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Generator

from msgbus.contract.adapter import Received
from msgbus.contract.envelope import NOT_BEFORE, Envelope
from msgbus.contract.outcome import Dead, Outcome, RetryAfter
from msgbus.inbound.job import Job, Source
from msgbus.inbound.lanes import Lanes
from msgbus.inbound.plan import Plan
from msgbus.inbound.reading import rest_of_wait
from msgbus.inbound.ready import ByWeight, OneLevel
from msgbus.inbound.suspects import Suspects

ON_ITS_WAY = 1.0
"""Seconds after which an ack has reached the broker, if the link holds."""
COMES_AGAIN = 60.0
"""Seconds in which a copy is expected of a message that is done, and of which the broker may not know it."""


class Hand:
    """Bookkeeping of one subscription in one event loop; it does no I/O but note acks."""

    def __init__(self, plan: Plan, suspects: Suspects, max_deliveries: int, due_while_closed: Callable[[], None]) -> None:
        self.counts: Counter[str] = Counter()
        """done, dropped, dead, retried, failed, expired, released, stale_acks: since the start."""
        self.last_error: str | None = None
        self.ready: OneLevel[Job] | ByWeight[Job] = ByWeight() if plan.topic.priorities else OneLevel()
        self.lanes: Lanes[Job] | None = Lanes() if plan.ordered else None
        self.waiting: dict[Job, asyncio.TimerHandle] = {}
        """What waits in this process for its next run, or to be carried out."""
        self.stuck: set[Job] = set()
        """Those of the waiting whose outcome could not be carried out."""
        self._leaving: set[Job] = set()
        self.limit = 0
        """How many may run at once, just now."""
        self.running = 0
        """How many do: messages, or batches of them."""
        self.draining = False
        self.quiet: asyncio.Event | None = None
        """Set, where there is one, whenever nothing runs."""
        self.awake = 0
        """Workers that will look at what is ready before they wait."""
        self._window = plan.window
        self._half = max(2, (plan.window + 1) // 2)
        self._loop = asyncio.get_running_loop()
        self._suspects = suspects
        self._max_deliveries = max_deliveries
        self._due_while_closed = due_while_closed
        self._jobs: dict[str, Job] = {}
        self._done: dict[str, float] = {}
        """What is done, and whose ack may be lost; until when its copy is expected, by the loop's clock."""
        self._idlers: deque[asyncio.Future[bool]] = deque()
        self._gathering: set[asyncio.Future[bool]] = set()

    # ------------------------------------------------------------ coming in

    def takes(self, source: Source, room: int) -> bool:
        """Whether to fetch now, for so much room: half the source's share at once, or anything when nothing of it is ready."""
        return (
            room > 0
            and self.limit > 0
            and (room * 2 >= source.share or not source.ready)
            and not ((self.waiting or self.stuck) and self.full_of_waiting)
        )

    def accept(self, source: Source, received: Received, now: float) -> None:
        """A message came: it goes to its lane, or is ready; a copy of one that is in hand joins it; an expired one is settled."""
        envelope = received.envelope
        source.held += 1
        job = self._jobs.get(envelope.id)
        if job is not None and job not in self._leaving:
            self._adopt(job, source, received)
            return
        if self._done and self._is_done(envelope):
            self._ack(source, received)
            source.held -= 1
            return
        if envelope.expires_at is not None and envelope.expires_at <= now:
            self.counts["expired"] += 1
            source.receiver.ack(received)
            source.held -= 1
            return
        job = self._jobs[envelope.id] = Job(received, source, self._loop.time())
        if received.crashes and self._suspects.quarantine:
            job.outcome = self._verdict(received)
        elif envelope.group is not None and NOT_BEFORE in envelope.headers:
            rest = rest_of_wait(envelope, now)
            job.outcome = RetryAfter(rest, counted=False) if rest else None
        if self.lanes is not None and envelope.key is not None and not self.lanes.enter(envelope.key, job):
            return
        self.put(job)

    def _adopt(self, job: Job, source: Source, received: Received) -> None:
        """Another copy, after a lost link or a repeated publish: settled with the one that is here, not run beside it."""
        twin = (job.source, job.received)
        job.source, job.received = source, received
        if job.twins is None:
            job.twins = [twin]
        else:
            job.twins.append(twin)

    def _verdict(self, received: Received) -> Outcome | None:
        deaths = self._suspects.deaths(received)
        return Dead("poison", f"{deaths} processes died while they held it") if deaths >= self._max_deliveries else None

    def take_draining(self) -> list[Job]:
        """Out of what is ready, what others of the group wait for."""
        ready = self.ready.take_all()
        for job in ready:
            if not job.received.tenure.draining:
                job.source.ready.append(job)
        return [job for job in ready if job.received.tenure.draining]

    def expired(self, job: Job) -> bool:
        """Whether it expired while it was in hand, and is settled by that. One that ran before is to be a dead letter instead."""
        expires_at = job.envelope.expires_at
        if expires_at is None or job.outcome is not None or expires_at > time.time():
            return False
        if job.attempt > 1:
            job.outcome = Dead("expired", "it expired before its next run")
            return False
        self.counts["expired"] += 1
        self.finish(job, ack=True)
        return True

    def put(self, job: Job) -> None:
        """It may start as soon as a slot is free."""
        job.source.ready.append(job)
        if not self.awake:
            self.wake()

    # ------------------------------------------------------------ going out

    def finish(self, job: Job, *, ack: bool) -> None:
        """It is settled, or its receiver will give it back: its place, its lane and its twins are free."""
        source = job.source
        if ack:
            self._ack(source, job.received)
        envelope = job.envelope
        if self._jobs.get(envelope.id) is job:  # else what it left behind has come back
            del self._jobs[envelope.id]
        self.stuck.discard(job)
        source.held -= 1
        if job.twins is not None:
            for twin_source, received in job.twins:
                twin_source.receiver.ack(received)
                twin_source.held -= 1
        if self.lanes is not None and envelope.key is not None:
            following = self.lanes.leave(envelope.key)
            while following is not None and following.lost:  # it must come again behind what comes again before it
                self._drop(following)
                following = self.lanes.leave(envelope.key)
            if following is not None:
                self.put(following)
        room = source.room
        if room is not None and (source.held * 2 <= source.window or not source.ready) and not room.done():
            room.set_result(True)
        for sibling in source.siblings:  # the place may be lent to another level
            if sibling.room is not None:
                resolve(sibling.room, True)

    def _ack(self, source: Source, received: Received) -> None:
        """The group is done with it."""
        source.receiver.ack(received)
        if received.envelope.group is None:  # what was made for this group, by a retry or a redrive, is another message of its id
            source.acked.append((self._loop.time(), received.envelope.id))
            if source.closed or received.tenure.lost:
                self.ack_again(source)

    def ack_again(self, source: Source) -> None:
        """The source is closed, or has lost a shard: what it acked last may come again. Then it is acked once more, and not run.

        Else a handler that takes longer than an unsteady link holds would run for ever.
        """
        now = self._loop.time()
        self._done = {id: until for id, until in self._done.items() if until > now}
        self._done.update((id, now + COMES_AGAIN) for at, id in source.acked if at > now - ON_ITS_WAY)
        source.acked.clear()

    def _is_done(self, envelope: Envelope) -> bool:
        """Whether it is only its ack that was lost. Said once: if somebody replays it later, it is to run."""
        return envelope.group is None and self._done.pop(envelope.id, 0.0) > self._loop.time()

    @contextlib.contextmanager
    def leaves(self, job: Job) -> Generator[None, None, None]:
        """While it is given back, or its copy stored: what comes under its id meanwhile is that very copy, and in hand in its place."""
        self._leaving.add(job)
        try:
            yield
        finally:
            self._leaving.discard(job)

    def _drop(self, job: Job) -> None:
        """Its receiver is gone: it comes again."""
        self._jobs.pop(job.envelope.id, None)
        for source, _ in [(job.source, job.received), *(job.twins or ())]:
            source.held -= 1
        self.counts["released"] += 1

    def all(self) -> list[Job]:
        """Everything in hand, oldest first."""
        return list(self._jobs.values())

    def forget(self) -> None:
        """Forgets all that is in hand: nothing runs, and the receivers that gave it are to be closed."""
        for job in list(self.waiting):
            self.cancel_wait(job)
        self._jobs.clear()
        self.stuck.clear()
        self.ready.take_all()
        if self.lanes is not None:
            self.lanes.clear()

    # ------------------------------------------------------------ waiting

    @property
    def full_of_waiting(self) -> bool:
        """So much waits for its next run, or cannot be settled, that nothing new should be taken."""
        return bool(self.stuck) or len(self.waiting) >= self._half

    @property
    def blocked(self) -> bool:
        """The window is full, and all of it waits: what failed for its next run, the rest behind it in the lanes of its keys."""
        return bool(self.waiting) and not self.running and not self.ready and len(self._jobs) >= self._window

    def wait(self, job: Job, delay: float) -> None:
        """It keeps its place in the window, and its lane, and is ready again after `delay` seconds."""
        self.waiting[job] = self._loop.call_later(delay, self.due, job)

    def due(self, job: Job) -> None:
        """Its time has come, or is not waited for."""
        if self.cancel_wait(job):
            self.put(job)
            if not self.limit:
                self._due_while_closed()

    def cancel_wait(self, job: Job) -> bool:
        """Whether it waited."""
        timer = self.waiting.pop(job, None)
        if timer is None:
            return False
        timer.cancel()
        return True

    # ------------------------------------------------------------ workers

    async def idle(self) -> None:
        """A worker has nothing to do until it is woken."""
        self.awake -= 1
        future: asyncio.Future[bool] = self._loop.create_future()
        self._idlers.append(future)
        await future  # whoever wakes us has counted us as awake

    async def idle_until(self, deadline: float) -> None:
        """A worker waits for more members of its batch: it is the first to be woken for what comes."""
        self.awake -= 1
        future: asyncio.Future[bool] = self._loop.create_future()
        self._idlers.appendleft(future)
        self._gathering.add(future)
        timer = self._loop.call_at(deadline, resolve, future, False)
        try:
            counted = await future
        finally:
            timer.cancel()
            self._gathering.discard(future)
        if not counted:
            self.awake += 1

    def stop_starting(self) -> None:
        """Nothing may start just now: who still waits for more members of a batch need not."""
        self.limit = 0
        for future in self._gathering:
            resolve(future, False)

    def wake(self) -> None:
        """One worker that has nothing to do looks at what is ready."""
        while self._idlers:
            future = self._idlers.popleft()
            if not future.done():
                self.awake += 1
                future.set_result(True)
                return

    def pauses(self) -> None:
        """The worker that runs just now is about to wait: another one takes what is ready."""
        self.awake -= 1
        if not self.awake and self.ready and self.running < self.limit:
            self.wake()

    def resumes(self) -> None:
        """It will look at what is ready again."""
        self.awake += 1


def resolve(future: asyncio.Future[bool], value: bool) -> None:
    """Sets a result, unless there is one."""
    if not future.done():
        future.set_result(value)
