"""Consumer[M] and Delivery[M]: the pull side, for code that asks for messages when it is ready for them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

from msgbus.checks import each_takes, takes
from msgbus.context import Context
from msgbus.contract.adapter import Capability, Received, Receiver, ReceiverSpec, SendOutcome
from msgbus.contract.envelope import Envelope, check_group
from msgbus.contract.outcome import Dead, RetryAfter
from msgbus.errors import AlreadySettled, BrokerError, ConfigurationError, DecodeError, Reject, RetryLater, UnsupportedFeature
from msgbus.inbound.job import runs_before
from msgbus.inbound.levels import Levels
from msgbus.inbound.reading import age_of, reader, rest_of_wait
from msgbus.topic import Topic

if TYPE_CHECKING:
    from msgbus.inbound.settle import Settler
    from msgbus.publishing import Publishes
    from msgbus.runtime import Runtime

log = logging.getLogger("msgbus")

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)

_POLL = 1.0


class Delivery(Generic[M_co]):
    """One message in hand. Say one word about it: `ack`, `retry` or `reject`; the word is said once."""

    def __init__(self, consumer: Consumer[M_co], received: Received, receiver: Receiver) -> None:
        self._consumer = consumer
        self._received = received
        self._receiver = receiver
        self._settled: str | None = None
        self._message: list[M_co] = []
        envelope = received.envelope
        self._attempt = 1 if envelope.group is None else runs_before(envelope) + 1
        self._context: Context | None = None

    @property
    def message(self) -> M_co:
        """Decoded on first use. Raises `DecodeError` when the body does not fit: the delivery is then a dead letter."""
        if not self._message:
            try:
                self._message.append(self._consumer.read(self._received.envelope))
            except DecodeError as error:
                if self._settled is None:
                    self._settled = "reject"
                    self._consumer.settle_soon(self._leave(error), self._received.envelope.id)
                raise
        return self._message[0]

    @property
    def context(self) -> Context:
        """What is known of the delivery."""
        if self._context is None:
            self._context = self._consumer.context(self._received.envelope, self._attempt)
        return self._context

    async def ack(self) -> None:
        """Done: the group will not be sent it again. Raises `AlreadySettled` on a second word."""
        self._say("ack")
        self._receiver.ack(self._received)

    async def retry(self, after: timedelta | None = None) -> None:
        """Failed: again later, as the bus's retry policy says, or `after` this long; a dead letter when no attempt is left.

        The order of its key is given up for it. Raises `AlreadySettled`, or `BrokerError` when the copy could not be stored: the delivery
        is then un-settled as before, and this may be called again.
        """
        word = RetryLater(after)  # before it is said: one that cannot be is no word
        self._say("retry")
        await self._leave(word)

    async def reject(self, reason: str) -> None:
        """Never: a dead letter now, with this reason. Raises as `retry`."""
        self._say("reject")
        await self._leave(Reject(reason))

    async def _leave(self, error: Exception) -> None:
        try:
            problem = await self._consumer.carry_out(self._receiver, self._received, self._attempt, error)
        except BaseException:
            self._settled = None
            raise
        if problem is not None:
            self._settled = None
            raise problem

    def _say(self, word: str) -> None:
        if self._settled is not None:
            raise AlreadySettled(self._received.envelope.id, self._settled)
        self._settled = word

    def __repr__(self) -> str:
        return f"Delivery({self._received.envelope.id!r}, attempt={self._attempt}, settled={self._settled!r})"


class Consumer(Generic[M_co]):
    """Pulls one topic for one group. Use it in `async with`; leaving it gives back what is not settled, its attempt not counted.

    On a keyed topic it owns shards like any member of an ordered group: deliveries of a key come in order, and `retry` gives that order up.
    """

    def __init__(
        self,
        entered: Callable[[], Runtime],
        publisher: Publishes,
        topic: Topic[M_co],
        *,
        group: str,
        start: Literal["earliest", "latest"],
        window: int,
    ) -> None:
        takes("bus.consumer(...): topic", topic, Topic, "a Topic")
        takes("bus.consumer(...): window", window, int, "an int")
        check_group(group)
        if window < 1:
            raise ConfigurationError(f"consumer({topic.name!r}, window={window}): at least 1")
        if start not in ("earliest", "latest"):
            raise ConfigurationError(f"consumer({topic.name!r}, start={start!r}): 'earliest' or 'latest'")
        self.read: Callable[[Envelope], M_co]
        """Envelope → message; raises `DecodeError`. There while the consumer is entered."""
        self._entered = entered
        self._publisher = publisher
        self._topic = topic
        self._group = group
        self._start: Literal["earliest", "latest"] = start
        self._window = window
        self._runtime: Runtime | None = None
        self._settler: Settler | None = None
        self._levels: Levels | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        """A receiver serves one task at a time; several may share a consumer."""

    async def __aenter__(self) -> Self:
        """Declares topic and group. Raises as entering the bus does."""
        from msgbus.outbound.writer import topic_spec
        from msgbus.runtime import codec_of, dead_spec

        if self._runtime is not None:
            raise ConfigurationError("this consumer is entered already")
        runtime = self._entered()
        if self._topic.key is not None and Capability.SHARDS not in runtime.adapter.capabilities:
            what = f"a pull consumer of {self._topic.name!r}, which has a key, so in order"
            raise UnsupportedFeature(what, runtime.adapter.name, "subscribe(..., ordered=False)")
        spec = topic_spec(self._topic, runtime.namespace, runtime.adapter.name)
        await runtime.writer(self._topic)  # refuses another Topic of this name, and declares it
        await runtime.declare([spec, dead_spec(spec.name, self._group)], [self._spec(spec.name)])
        self.read = reader(self._topic, codec_of(self._topic))
        self._settler = runtime.settler(spec.name, self._group, "consumer")
        self._turn = asyncio.Lock()  # of this event loop
        self._runtime = runtime
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        """Drains: what is not settled returns to the group."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=self._running().close_timeout)
        levels, self._levels = self._levels, None
        runtime, self._runtime = self._runtime, None
        if levels is not None and runtime is not None:
            await self._bounded(runtime, levels.drain())
            await self._bounded(runtime, levels.close())

    async def receive(self, limit: int = 1, timeout: timedelta | None = None) -> list[Delivery[M_co]]:
        """1 to `limit` deliveries; none after `timeout` (default: waits). While the window is full of un-settled ones it waits too.

        A lost link is mended meanwhile; what was un-settled comes again. Expired messages are settled here and not returned, and what came
        back before its time waits on.
        Cancelling loses nothing. Several tasks may share a consumer; whoever still waits when it is left gets a `ConfigurationError`.
        """
        takes("receive(...): limit", limit, int, "an int")
        each_takes("receive(...)", ("timeout", timeout, timedelta, "a timedelta"))
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout.total_seconds()
        pause = 0.1
        while True:
            runtime = self._running()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._turn.acquire()
            except TimeoutError:
                return []
            remaining = _POLL if deadline is None else max(0.0, min(_POLL, deadline - loop.time()))
            try:
                batch = await (await self._opened()).receive(limit, remaining)
            except BrokerError as error:
                if not error.retryable:
                    raise
                log.warning("consumer of %s: cannot receive, trying again: %s", self._topic.name, error)
                levels, self._levels = self._levels, None
                if levels is not None:
                    await self._bounded(runtime, levels.close())
                await asyncio.sleep(pause * random.uniform(0.5, 1.0) if deadline is None else min(pause, remaining))
                pause = min(pause * 2, 5.0)
                batch = []
            finally:
                self._turn.release()
            deliveries: list[Delivery[M_co]] = []
            now = time.time()
            for receiver, received in batch:
                envelope = received.envelope
                if envelope.expires_at is not None and envelope.expires_at <= now:
                    receiver.ack(received)
                elif rest := rest_of_wait(envelope, now):
                    self.settle_soon(self._put_off(receiver, received, rest), envelope.id)
                else:
                    deliveries.append(Delivery(self, received, receiver))
            if deliveries or (deadline is not None and loop.time() >= deadline):
                return deliveries

    def __aiter__(self) -> AsyncIterator[Delivery[M_co]]:
        """One delivery after the other, for ever; un-settled ones fill the window, and then it waits."""
        return self._each()

    async def _each(self) -> AsyncIterator[Delivery[M_co]]:
        while True:
            for delivery in await self.receive():
                yield delivery

    # ------------------------------------------------------------ for its deliveries

    def context(self, envelope: Envelope, attempt: int) -> Context:
        """The facts of a delivery."""
        return Context(envelope, self._publisher, topic=self._topic.name, group=self._group, attempt=attempt)

    def settle_soon(self, settling: Coroutine[Any, Any, None], message_id: str) -> None:
        """What must go elsewhere where nobody can wait does so in the background, at the latest when the consumer is left."""

        async def settle() -> None:
            try:
                await settling
            except (BrokerError, ConfigurationError) as error:  # un-settled, it comes again; or the consumer was left
                log.error("consumer of %s: message %r could not be moved: %s", self._topic.name, message_id, error)

        task = asyncio.create_task(settle())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _put_off(self, receiver: Receiver, received: Received, rest: float) -> None:
        settler = self._settler
        assert settler is not None  # set with the runtime
        runs = runs_before(received.envelope)
        problem = await settler.retry(receiver, received, runs=runs, delay=rest, failed_at=None)
        if problem is not None:
            raise problem

    async def carry_out(self, receiver: Receiver, received: Received, attempt: int, error: Exception) -> SendOutcome:
        """What the retry policy makes of a word, as a copy; None: it is stored and the original settled."""
        runtime, settler = self._running(), self._settler
        assert settler is not None  # set with the runtime
        envelope = received.envelope
        outcome = runtime.retry.next_action(attempt, error, age_of(envelope))
        now = time.time()
        if isinstance(outcome, RetryAfter):
            if envelope.expires_at is None or now + outcome.delay < envelope.expires_at:
                return await settler.retry(receiver, received, runs=attempt, delay=outcome.delay, failed_at=now)
            outcome = Dead("expired", error)
        assert isinstance(outcome, Dead)  # a Drop is no word of a delivery
        return await settler.bury(receiver, received, outcome, attempt=attempt, deliveries=attempt + received.crashes, failed_at=now)

    # ------------------------------------------------------------ inside

    def _spec(self, physical: str) -> ReceiverSpec:
        return ReceiverSpec(physical, self._group, window=self._window, start=self._start, exclusive=self._topic.key is not None)

    def _running(self) -> Runtime:
        if self._runtime is None:
            raise ConfigurationError("this consumer is not entered: async with bus.consumer(...) as consumer")
        return self._runtime

    async def _opened(self) -> Levels:
        """The open receivers. None stays open behind a consumer that was left meanwhile."""
        runtime = self._running()
        if self._levels is None:
            spec = self._spec(runtime.namespace + self._topic.name)
            levels = await Levels.open(runtime.adapter, spec, priorities=self._topic.priorities)
            if self._runtime is not runtime:
                await self._bounded(runtime, levels.close())
                self._running()
            self._levels = levels
        return self._levels

    async def _bounded(self, runtime: Runtime, call: Coroutine[Any, Any, None]) -> None:
        """An adapter's call that must not hold anybody up."""
        try:
            async with asyncio.timeout(runtime.close_timeout):
                await call
        except (TimeoutError, BrokerError) as error:
            log.warning("consumer of %s: closing: %s", self._topic.name, str(error) or "no answer")
