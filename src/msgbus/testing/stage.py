"""What a conformance test stands on: a broker, buses and adapters on it that are cleaned up, names of its own, and a deadline.

A test is an `async def` of one `Stage`, decorated with `@conformance(...)`; its docstring states the clause of the contract. It becomes
an ordinary pytest test that asks for the fixture `broker` and runs in an event loop of its own, so no pytest plug-in is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import pytest
from pydantic import BaseModel, SecretStr
from tenacity import RetryCallState
from tenacity.wait import wait_base

from msgbus.bus import Bus
from msgbus.contract.adapter import Adapter, AdapterSettings, Capability, Received, Receiver, ReceiverSpec, TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import Envelope, new_id
from msgbus.dead_letters import DeadLetter, read_dead_letter
from msgbus.runtime import dead_receiver, dead_spec
from msgbus.settings import Settings
from msgbus.testing.faults import FaultyAdapter
from msgbus.topic import Topic
from msgbus.urls import adapter_from_url

T = TypeVar("T")

QUIET = 0.3
"""Seconds of silence that count as "nothing more comes", where no later message can prove it."""

Crash = Callable[[Adapter], Awaitable[None]]
Restart = Callable[[], Awaitable[None]]

_patience: ContextVar[float] = ContextVar("patience", default=1.0)


async def _cannot_crash(adapter: Adapter) -> None:
    pytest.fail(f"the fixture `broker` gives no crash=: how does the process that holds {adapter!r} die?")


async def _cannot_restart() -> None:
    pytest.fail("the fixture `broker` gives no restart=: how does the broker that claims to be durable end, and come back?")


@dataclass(frozen=True, slots=True)
class Broker:
    """What the fixture `broker` returns: where the broker is, and how a process that uses it dies.

    `crash(adapter)` does to an adapter's connections what kill -9 of its process would: nothing is flushed, acked or released.
    `settings` are handed to every bus of the suite on top of its own (heartbeat 2 s, session 6 s, lease 5 s). `patience` stretches
    every deadline of the suite, for slow machines. `many`: how often what is done many times is done (on memory 100). `restart()` ends
    the broker itself as a power cut would and starts it again: asked of those who claim to be durable. `make` gives adapters that no
    URL leads to, such as one behind a `FaultyAdapter`. `shard_of(key, shards)` is the broker's own partitioner, if it has one.
    """

    url: str
    crash: Crash = _cannot_crash
    settings: dict[str, object] = field(default_factory=dict[str, object])
    patience: float = 1.0
    many: int = 10
    restart: Restart = _cannot_restart
    make: Callable[[AdapterSettings], Adapter] | None = None
    shard_of: Callable[[str, int], int] = shard_of


class Order(BaseModel):
    """The suite's message: `id` is its key where a topic has one, `n` counts."""

    id: str = "a"
    n: int = 0
    text: str = ""


def patient(seconds: float) -> float:
    """A deadline, stretched by the patience of the broker's fixture."""
    return seconds * _patience.get()


class Seen(Generic[T]):
    """What handlers have seen, and a way to wait for more of it."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._changed = asyncio.Condition()

    async def add(self, item: T) -> None:
        """From a handler."""
        async with self._changed:
            self.items.append(item)
            self._changed.notify_all()

    async def wait_for(self, count: int, seconds: float = 10.0) -> list[T]:
        """The items, once there are at least so many. Fails, showing them, when there are not in time."""
        return await self.wait_until(lambda items: len(items) >= count, seconds, f"{count} items")

    async def wait_until(self, enough: Callable[[list[T]], bool], seconds: float = 10.0, what: str = "it") -> list[T]:
        """The items, once `enough` says so."""
        seconds = patient(seconds)
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: enough(self.items))
        except TimeoutError:
            pytest.fail(f"waited {seconds:g} s for {what}; seen {len(self.items)}: {self.items[:50]!r}")
        return self.items


class Waits(wait_base):
    """The waits of a retry policy, decided by a test: `seconds(attempt)`, by the number of the run that failed. `drawn` is what it said."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.drawn: list[float] = []
        self._seconds = seconds

    def __call__(self, retry_state: RetryCallState) -> float:
        self.drawn.append(self._seconds(retry_state.attempt_number))
        return self.drawn[-1]


class Worker:
    """A bus at work in the background, as a process of its own would be."""

    def __init__(self, stage: Stage, bus: Bus, adapter: Adapter) -> None:
        self.bus = bus
        self.adapter = adapter
        self._stage = stage
        self._started = asyncio.Event()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self.bus.running():
            self._started.set()
            await self._stop.wait()

    async def started(self) -> None:
        """Returns when it consumes; raises what kept it from that."""
        waiting = asyncio.create_task(self._started.wait())
        await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Drains and ends. Twice is once."""
        self._stop.set()
        await self._task

    async def kill(self) -> None:
        """Dies as a process does by kill -9: nothing that it held is settled, no handler goes on."""
        await self._stage.crash(self.adapter)
        for runner in self.bus.runners:
            runner.cut()
        self._task.cancel()
        await asyncio.wait([self._task])


class Stage:
    """One test's stage. Names are the test's own: a namespace parts it from all others on the same broker."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.namespace = f"t{uuid.uuid4().hex[:12]}."
        self._closing = contextlib.AsyncExitStack()

    # ------------------------------------------------------------ buses

    def settings(self, **own: Any) -> Settings:
        """Settings of the suite: short leases and time-outs, this test's namespace; `own` on top."""
        values: dict[str, Any] = {
            "url": SecretStr(self.broker.url),
            "namespace": self.namespace,
            "heartbeat": timedelta(seconds=2),
            "session_timeout": timedelta(seconds=6),
            "lease": timedelta(seconds=5),
            "drain_timeout": timedelta(seconds=5),
            **self.broker.settings,
            **own,
        }
        return Settings(**values)

    def new_adapter(self, settings: Settings | None = None) -> Adapter:
        """An adapter of its own, as each process has one; not open."""
        terms = (settings or self.settings()).for_adapter()
        return self.broker.make(terms) if self.broker.make is not None else adapter_from_url(self.broker.url, terms)

    async def crash(self, adapter: Adapter) -> None:
        """The death of the process that holds an adapter; faults before it are taken away."""
        while isinstance(adapter, FaultyAdapter):
            adapter = adapter.real
        await self.broker.crash(adapter)

    def bus(self, *, adapter: Adapter | None = None, settings: Settings | None = None, service: str = "suite", **options: Any) -> Bus:
        """A bus with an adapter of its own, not entered."""
        settings = settings or self.settings()
        return Bus(adapter=adapter or self.new_adapter(settings), settings=settings, service=service, **options)

    async def entered(self, bus: Bus) -> Bus:
        """The bus, entered until the test ends: it can publish."""
        return await self._closing.enter_async_context(bus)

    async def publisher(self) -> Bus:
        """A bus that only publishes, entered until the test ends."""
        return await self.entered(self.bus(service="publisher"))

    async def start(self, bus: Bus) -> Worker:
        """The bus at work, until it is stopped or killed, or the test ends."""
        adapter = bus.given_adapter
        assert adapter is not None, "start() takes a bus of Stage.bus()"
        worker = Worker(self, bus, adapter)
        self._closing.push_async_callback(_stop_quietly, worker)
        await worker.started()
        return worker

    async def collect(self, topic: Topic[T], *, service: str = "suite", **options: Any) -> tuple[Worker, Seen[T]]:
        """A worker whose one handler notes what it is given and is done with it. `options` are those of `subscribe`."""
        bus = self.bus(service=service)
        seen: Seen[T] = Seen()

        async def collect(message: T) -> None:
            await seen.add(message)

        bus.subscribe(topic, **options)(collect)
        return await self.start(bus), seen

    # ------------------------------------------------------------ the seam itself

    async def open_adapter(self, settings: Settings | None = None) -> Adapter:
        """An open adapter, closed when the test ends."""
        adapter = self.new_adapter(settings)
        await adapter.open()
        self._closing.push_async_callback(adapter.close)
        return adapter

    async def receiver(self, adapter: Adapter, spec: ReceiverSpec) -> Receiver:
        """An open receiver, closed when the test ends."""
        receiver = await adapter.open_receiver(spec)
        self._closing.push_async_callback(receiver.close)
        return receiver

    def name(self, topic: str) -> str:
        """The physical name of a topic of this test."""
        return self.namespace + topic

    def topic_spec(self, topic: str = "orders", **fields: Any) -> TopicSpec:
        """A spec of a topic of this test."""
        return TopicSpec(self.name(topic), **fields)

    def receiver_spec(self, topic: str = "orders", group: str | None = "workers", **fields: Any) -> ReceiverSpec:
        """A spec of a receiver of this test."""
        return ReceiverSpec(self.name(topic), group, **fields)

    def envelope(self, topic: str = "orders", body: bytes = b"{}", **fields: Any) -> Envelope:
        """An envelope as a foreign producer would send it: no headers unless given."""
        values: dict[str, Any] = {"id": new_id(), "headers": {}, **fields}
        return Envelope(topic=self.name(topic), body=body, **values)

    async def dead_letters(self, count: int, topic: str = "orders", *, group: str = "suite", seconds: float = 10.0) -> list[DeadLetter]:
        """So many dead letters of a group of this test, read by a receiver, which every adapter has, and given back.

        Fails when there are not so many in time, or when there is one more.
        """
        adapter = await self.open_adapter()
        await adapter.declare([dead_spec(self.name(topic), group)], [])
        receiver = await adapter.open_receiver(dead_receiver(self.name(topic), group, window=count + 1))
        try:
            taken = await take(receiver, count, seconds)
            extra = await receiver.receive(1, patient(QUIET))
        finally:
            await receiver.close()
        letters = [read_dead_letter(received.envelope) for received in taken]
        assert not extra, f"{count} dead letters were expected, here is another: {extra[0].envelope}"
        return letters

    async def skip_without(self, needs: Capability) -> None:
        """Skips the test, naming the capability, on an adapter that does not claim it."""
        adapter = await self.open_adapter()
        missing = needs & ~adapter.capabilities
        if missing:
            pytest.skip(f"the adapter does not claim {', '.join(flag.name or '' for flag in missing)}")

    async def close(self) -> None:
        """Ends everything that the test opened."""
        await self._closing.aclose()


async def _stop_quietly(worker: Worker) -> None:
    with contextlib.suppress(Exception, asyncio.CancelledError):  # the test's own failure is the one to see
        await worker.stop()


async def take(receiver: Receiver, count: int, seconds: float = 10.0) -> list[Received]:
    """So many messages from a receiver, un-settled. Fails when they do not come in time."""
    loop = asyncio.get_running_loop()
    seconds = patient(seconds)
    deadline = loop.time() + seconds
    taken: list[Received] = []
    while len(taken) < count:
        remaining = deadline - loop.time()
        if remaining <= 0:
            pytest.fail(f"waited {seconds:g} s for {count} messages; got {len(taken)}")
        taken += await receiver.receive(count - len(taken), min(remaining, 1.0))
    return taken


async def eventually(true: Callable[[], object], seconds: float = 10.0, what: str = "it") -> None:
    """Returns once `true()` is; looks every few milliseconds, for facts that nobody announces. Fails after the deadline."""
    loop = asyncio.get_running_loop()
    seconds = patient(seconds)
    deadline = loop.time() + seconds
    while not true():
        if loop.time() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}")
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def opened(broker: Broker) -> AsyncGenerator[Stage, None]:
    """A stage, and after it the proof that it left no task behind."""
    stage = Stage(broker)
    before = asyncio.all_tasks()
    try:
        yield stage
    finally:
        await stage.close()
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    if left:
        await asyncio.wait(left, timeout=1.0)
    names = sorted(task.get_name() for task in left if not task.done())
    assert not names, f"tasks left behind: {names}"


def keys_of_shards(broker: Broker, shards: int, each: int) -> list[list[str]]:
    """So many keys of each shard, by the number of the shard."""
    keys: list[list[str]] = [[] for _ in range(shards)]
    number = 0
    while min(map(len, keys)) < each:
        key = f"key{number}"
        mine = keys[broker.shard_of(key, shards)]
        if len(mine) < each:
            mine.append(key)
        number += 1
    return keys


REGISTRY: dict[str, Callable[..., None]] = {}
"""Every test of the suite, by the name of the clause it holds."""


def conformance(
    *, needs: Capability = Capability.NONE, seconds: float = 30.0
) -> Callable[[Callable[[Stage], Awaitable[None]]], Callable[[Broker], None]]:
    """Makes a conformance test. `needs`: skipped, saying so, where the adapter does not claim it. `seconds`: its deadline."""

    def decorate(function: Callable[[Stage], Awaitable[None]]) -> Callable[[Broker], None]:
        async def run(broker: Broker) -> None:
            async with asyncio.timeout(seconds * broker.patience), opened(broker) as stage:
                if needs:
                    await stage.skip_without(needs)
                await function(stage)

        def test(broker: Broker) -> None:
            before = _patience.set(broker.patience)
            try:
                asyncio.run(run(broker))
            finally:
                _patience.reset(before)

        name = function.__name__.removeprefix("test_")
        assert function.__doc__, f"{name}: a docstring states the clause of the contract"
        assert name not in REGISTRY, f"{name} is there twice"
        test.__name__ = test.__qualname__ = f"test_{name}"
        test.__doc__ = function.__doc__
        test.__module__ = function.__module__
        REGISTRY[name] = test
        return test

    return decorate
