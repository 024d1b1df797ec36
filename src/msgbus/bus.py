"""Bus: wires the parts together. What it is told is kept; nothing is read, resolved or opened before it is entered."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from typing_extensions import Unpack

from msgbus.checks import each_takes, takes
from msgbus.contract.idempotency import IdempotencyStore
from msgbus.errors import BusNotEntered, ConfigurationError, NotFound
from msgbus.middleware.base import Middleware
from msgbus.publisher import Publisher
from msgbus.publishing import Publishes, PublishManyOptions, PublishOptions, Receipt, SyncPublishes
from msgbus.retry import Retry
from msgbus.router import Router
from msgbus.topic import Topic

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
    from sqlalchemy.orm import Session

    from msgbus.consumer import Consumer
    from msgbus.contract.adapter import Adapter, AdapterSettings
    from msgbus.dead_letters import DeadLetters
    from msgbus.health import Health
    from msgbus.inbound.plan import Plan
    from msgbus.inbound.runner import Runner
    from msgbus.inbound.subscription import Subscription
    from msgbus.outbound.relay import Relay
    from msgbus.outbox import Scribe
    from msgbus.runtime import Runtime
    from msgbus.settings import Settings

log = logging.getLogger("msgbus")

M = TypeVar("M")


class Bus(Router, Publishes):
    """One service's connection to one broker: publishes, and runs the handlers subscribed on it and its routers.

    `url` (else `MSGBUS_URL`) picks the broker; `service` (else `MSGBUS_SERVICE`) is the default group and the CloudEvents source;
    `adapter` in place of a URL for one that is made by hand; `settings` before the environment; `store` makes effects idempotent;
    `retry` is the default policy; `middleware`, the first one outermost; `lifespan(bus)` is entered before the handlers start and left
    after they have ended. Making a bus opens and reads nothing. It can be entered again after it was left, on another event loop too.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        service: str | None = None,
        adapter: Adapter | None = None,
        settings: Settings | None = None,
        store: IdempotencyStore | None = None,
        retry: Retry | None = None,
        middleware: Sequence[Middleware] = (),
        routers: Sequence[Router] = (),
        lifespan: Callable[[Bus], AbstractAsyncContextManager[object]] | None = None,
    ) -> None:
        super().__init__()
        if url is not None and adapter is not None:
            raise ConfigurationError("Bus(url=..., adapter=...): both say which broker; give one of them")
        each_takes(
            "Bus(...)",
            ("store", store, IdempotencyStore, "a store, such as msgbus.stores.MemoryStore()"),
            ("retry", retry, Retry, "msgbus.Retry(...)"),
            ("middleware", middleware, Iterable, "a list of msgbus.Middleware"),
            ("routers", routers, Iterable, "a list of msgbus.Router"),
        )
        if lifespan is not None and not callable(lifespan):
            raise ConfigurationError(f"Bus(...): lifespan={lifespan!r}: takes a function of the bus that returns an async context manager")
        self._url = url
        self._service = service
        self._adapter = adapter
        self._settings = settings
        self._store = store
        self._retry = retry if retry is not None else Retry()
        self._middleware = tuple(middleware)
        self._routers = tuple(routers)
        for each in self._middleware:
            takes("Bus(...): middleware", each, Middleware, "instances of msgbus.Middleware")
        for router in self._routers:
            takes("Bus(...): routers", router, Router, "instances of msgbus.Router")
        self._lifespan = lifespan
        self._published: list[Topic[Any]] = []
        self._made: tuple[tuple[str, AdapterSettings], Adapter] | None = None  # kept: a private memory:// outlives being left
        self._scribe: Scribe | None = None
        self._runtime: Runtime | None = None
        self._entering = False
        self._runners: list[Runner] = []
        self._relay: Relay | None = None
        self._ended: list[str] = []
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------ publishing

    @overload
    async def publish(self, topic: Topic[M], message: M, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    @overload
    async def publish(self, topic: str, message: object, /, **options: Unpack[PublishOptions]) -> Receipt: ...
    async def publish(self, topic: Topic[Any] | str, message: Any, /, **options: Unpack[PublishOptions]) -> Receipt:
        """Publishes one message; returns once the broker has confirmed that it is kept. Always goes to the broker.

        Waits up to `publish_timeout` for a broker that is away. Raises `MessageError` (refused before any I/O), `PublishRejected` or
        `BrokerUnavailable` (stored nowhere), `PublishUnknown` (may be stored: publish it again with the same `id=`; cancelling the
        call leaves it unknown too), `ValueError` or `UnsupportedFeature` for options that contradict each other or that the broker
        cannot keep, `BusNotEntered`. Inside a handler the message carries on correlation and causation.
        """
        runtime = self._runtime
        if runtime is None:
            raise self._not_entered()
        if asyncio.get_running_loop() is not self._loop:
            raise self._elsewhere()
        return await runtime.publish(topic, message, options)

    async def publish_many(
        self, topic: Topic[M], messages: Iterable[M] | AsyncIterable[M], /, **options: Unpack[PublishManyOptions]
    ) -> int:
        """Publishes every message, pipelined with a bounded window, in order a key; returns how many were confirmed.

        At the first failure it stops reading, waits for what is under way and raises `PublishManyError`.
        """
        runtime = self._entered()
        if asyncio.get_running_loop() is not self._loop:
            raise self._elsewhere()
        return await runtime.publish_many(topic, messages, options)

    def publisher(self, topic: Topic[M], /) -> Publisher[M]:
        """One topic's sending side. Can be made before the bus is entered; the topic is then one of the program's, as a subscription's is:
        declared on entering, and in `msgbus check`, `explain` and `topics export`.
        """
        takes("bus.publisher(...): topic", topic, Topic, "a Topic")
        if topic not in self._published:
            self._published.append(topic)
        return Publisher(self, topic)

    @overload
    def outbox(self, session: AsyncSession | AsyncConnection, /) -> Publishes: ...
    @overload
    def outbox(self, session: Session | Connection, /) -> SyncPublishes: ...
    def outbox(self, session: AsyncSession | AsyncConnection | Session | Connection, /) -> Publishes | SyncPublishes:
        """Publishing that is part of the session's transaction: rows that a relay sends once it is committed. No bus need be entered.

        Needs `Bus(store=SqlStore(...))`. Raises `OutboxError` for a session of another database than the store's.
        """
        from msgbus.contract.outbox import TransactionalStore, Writes
        from msgbus.outbox import Outbox, SyncOutbox

        if not isinstance(self._store, TransactionalStore):
            raise ConfigurationError("bus.outbox(session) writes to the store's tables: Bus(store=SqlStore(...)), of msgbus.stores.sql")
        writes = self._store.writes_to(session)
        if self._scribe is None:
            self._scribe = self._make_scribe()
        return Outbox(self._scribe, writes) if isinstance(writes, Writes) else SyncOutbox(self._scribe, writes)

    # ------------------------------------------------------------ consuming

    def consumer(
        self, topic: Topic[M], /, *, group: str, start: Literal["earliest", "latest"] = "earliest", window: int = 32
    ) -> Consumer[M]:
        """The pull side: `async with bus.consumer(...) as consumer`. Holds at most `window` messages un-settled; of a topic with priorities
        at least one a level."""
        from msgbus.consumer import Consumer

        return Consumer(self._entered, self, topic, group=group, start=start, window=window)

    def dead_letters(self, topic: str | Topic[Any], *, group: str) -> DeadLetters:
        """What a group has given up on."""
        from msgbus.dead_letters import DeadLetters

        return DeadLetters(self._entered, topic if isinstance(topic, str) else topic.name, group)

    # ------------------------------------------------------------ lifecycle

    async def __aenter__(self) -> Self:
        """Connects: publishing works from here on. Handlers do not run; that is `running()` or `run()`.

        Raises `ConfigurationError` for what the program or its settings cannot keep, `BrokerUnavailable` when the broker is away for
        `publish_timeout`, `AuthenticationFailed`.
        """
        if self._runtime is not None or self._entering:
            raise self._entered_already()
        self._entering = True
        try:
            runtime = self.make_runtime()
            await runtime.open()
        finally:
            self._entering = False
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        runtime, self._runtime = self._runtime, None
        self._loop = None
        if runtime is not None:
            await runtime.close()

    def running(self) -> AbstractAsyncContextManager[Self]:
        """Enters the bus and its lifespan, and consumes in the background until it is left; leaving drains.

        A FastAPI lifespan is one line: `async with bus.running(): yield`.
        """
        return self._running(handle_signals=False)

    async def run(self) -> None:
        """Consumes until `stop()`, SIGTERM or SIGINT, then drains: at most `drain_timeout` and `close_timeout`.

        A second signal ends it now.

        Raises what would make `async with bus` raise, and an error that ended a subscription for good (a bug, not a lost link).
        """
        async with self._running(handle_signals=True):
            assert self._stopping is not None  # set by _running
            await self._stopping.wait()

    def stop(self) -> None:
        """Ends `run()`. From any thread, a handler or a signal handler; twice is once; nothing happens when it does not run."""
        stopping, loop = self._stopping, self._loop
        if stopping is not None and loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nothing runs there any more
                loop.call_soon_threadsafe(stopping.set)

    def health(self) -> Health:
        """How the bus and its broker are, from what is known just now: no I/O."""
        from msgbus.health import assess

        runtime = self._entered()
        return assess(runtime.monitor, self._runners, self._ended, self._relay, runtime.watch)

    def pause(self, subscription: str) -> None:
        """Stops starting handlers of the subscriptions of this name, in this process. Raises `NotFound`."""
        for runner in self._named(subscription):
            runner.pause()

    def resume(self, subscription: str) -> None:
        """Undoes `pause`."""
        for runner in self._named(subscription):
            runner.resume()

    # ------------------------------------------------------------ for tools

    @property
    def plans(self) -> Sequence[Plan]:
        """The subscriptions with every default filled in: what `msgbus explain` shows. While entered."""
        return tuple(self._entered().plans)

    @property
    def runners(self) -> Sequence[Runner]:
        """The subscriptions at work in this process."""
        return tuple(self._runners)

    @property
    def store(self) -> IdempotencyStore | None:
        """What `Bus(store=...)` was given."""
        return self._store

    @property
    def given_adapter(self) -> Adapter | None:
        """The adapter that `Bus(adapter=...)` was given, if any."""
        return self._adapter

    @property
    def runtime(self) -> Runtime:
        """The open parts, for tools such as the command line. While entered."""
        return self._entered()

    def use_url(self, url: str) -> None:
        """Another broker than the program names, from the next time it is entered: what `msgbus run --url` says."""
        self._url, self._adapter, self._scribe = url, None, None

    def find_url(self) -> str | None:
        """The broker's URL, by argument or settings. Secret: it may hold a password. None: none is set, or `adapter=` is there instead."""
        from msgbus.settings import load

        if self._url is not None or self._adapter is not None:
            return self._url
        url = load(self._settings).url
        return None if url is None else url.get_secret_value()

    def make_runtime(self) -> Runtime:
        """What entering opens, not opened yet: for tools that look and declare nothing."""
        from msgbus.runtime import Runtime

        settings, adapter = self._parts()
        return Runtime(
            settings,
            adapter,
            service=self._service or settings.service,
            subscriptions=self._all_subscriptions(),
            published=self._published,
            retry=self._retry,
            store=self._store,
            middleware=self._middleware,
        )

    # ------------------------------------------------------------ inside

    def _parts(self) -> tuple[Settings, Adapter]:
        """The settings, read now, and the adapter, not opened."""
        from msgbus.settings import load
        from msgbus.urls import adapter_from_url

        settings = load(self._settings)
        if self._adapter is not None:
            return settings, self._adapter
        url = self.find_url()
        if url is None:
            log.warning("no broker is set (MSGBUS_URL or Bus(url)): memory:// is used, which forgets everything with the process")
            url = "memory://"
        wanted = (url, settings.for_adapter())
        if self._made is None or self._made[0] != wanted:
            self._made = (wanted, adapter_from_url(*wanted))
        return settings, self._made[1]

    def _all_subscriptions(self) -> list[Subscription]:
        return [*self.subscriptions, *(found for router in self._routers for found in router.subscriptions)]

    def _make_scribe(self) -> Scribe:
        from msgbus.inbound.plan import known_topics
        from msgbus.outbox import Scribe

        settings, adapter = self._parts()
        return Scribe(
            adapter,
            namespace=settings.namespace,
            service=self._service or settings.service,
            topics=known_topics(self._all_subscriptions(), self._published),
            middleware=self._middleware,
        )

    def _not_entered(self) -> BusNotEntered:
        return BusNotEntered("the bus is not entered: use it inside `async with bus:`, `async with bus.running():` or `bus.run()`")

    def _entered_already(self) -> ConfigurationError:
        return ConfigurationError("the bus is entered already; `async with bus`, `running()` and `run()` do not nest")

    def _elsewhere(self) -> ConfigurationError:
        return ConfigurationError(
            "the bus was entered on another event loop, and publishes there alone; from a thread: "
            "asyncio.run_coroutine_threadsafe(bus.publish(...), loop_of_the_bus).result()"
        )

    def _entered(self) -> Runtime:
        if self._runtime is None:
            raise self._not_entered()
        return self._runtime

    def _named(self, subscription: str) -> list[Runner]:
        self._entered()
        found = [runner for runner in self._runners if runner.plan.name == subscription]
        if not found:
            names = ", ".join(sorted({runner.plan.name for runner in self._runners})) or "none is running"
            raise NotFound(f"no subscription is called {subscription!r}; there are: {names}")
        return found

    @asynccontextmanager
    async def _running(self, *, handle_signals: bool) -> AsyncGenerator[Self, None]:
        if self._runtime is not None or self._entering:
            raise self._entered_already()
        self._stopping = asyncio.Event()  # here already: `stop()` while the broker is still being connected counts too
        self._loop = asyncio.get_running_loop()
        try:
            async with self:
                if self._lifespan is None:
                    async with self._consuming(handle_signals):
                        yield self
                else:
                    async with self._lifespan(self), self._consuming(handle_signals):
                        yield self
        finally:
            self._stopping = None

    @asynccontextmanager
    async def _consuming(self, handle_signals: bool) -> AsyncGenerator[None, None]:
        from msgbus.running import make_runners

        executors: list[ThreadPoolExecutor] = []
        self._ended = []
        try:
            async with self._relaying():
                runners = self._runners = await make_runners(self._entered(), self, executors)
                async with self._at_work(runners, handle_signals):
                    yield
        finally:
            self._runners = []
            for executor in executors:
                executor.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _relaying(self) -> AsyncGenerator[None, None]:
        """The outbox's rows are sent, where the store has an outbox. Ends after the handlers, whose rows may be the last."""
        from msgbus.running import make_relay

        relay = self._relay = await make_relay(self._entered())
        if relay is None:
            yield
            return
        task = asyncio.create_task(relay.run(), name="msgbus outbox relay")
        task.add_done_callback(functools.partial(self._note_end, "the outbox's relay"))
        try:
            yield
        finally:
            relay.stop()
            timeout = self._entered().close_timeout
            try:
                await asyncio.wait([task], timeout=timeout)
            finally:
                task.cancel()
                await asyncio.wait([task], timeout=timeout)
                self._relay = None
        if not task.cancelled() and task.done():
            task.result()

    @asynccontextmanager
    async def _at_work(self, runners: Sequence[Runner], handle_signals: bool) -> AsyncGenerator[None, None]:
        tasks = {asyncio.create_task(runner.run(), name=f"msgbus {runner.plan.name}"): runner for runner in runners}
        for task, runner in tasks.items():
            task.add_done_callback(functools.partial(self._note_end, runner.plan.name))
        undo = self._on_signals() if handle_signals else None
        try:
            assert self._stopping is not None  # set by _running
            await _broadcasts_open(runners, self._stopping, self._entered().publish_timeout)
            yield
        finally:
            try:
                for runner in runners:
                    runner.stop()
                await _all_ended(tasks)
            finally:
                if undo is not None:
                    undo()
        for task in tasks:
            task.result()

    def _note_end(self, name: str, task: asyncio.Task[None]) -> None:
        """What ends by an error takes `run()` with it: half a service is worse than one that is restarted."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._ended.append(name)
            log.error("%s ended", name, exc_info=error)
            if self._stopping is not None:
                self._stopping.set()

    def _on_signals(self) -> Callable[[], None] | None:
        """First signal: drain. Second: now."""
        if threading.current_thread() is not threading.main_thread():
            return None
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)

        def on_signal() -> None:
            stopping = self._stopping
            if stopping is not None and not stopping.is_set():
                log.info("stopping: what runs may finish; another signal ends it now")
                stopping.set()
            else:
                for runner in self._runners:
                    runner.cut()

        for number in signals:
            loop.add_signal_handler(number, on_signal)

        def undo() -> None:
            for number in signals:
                loop.remove_signal_handler(number)

        return undo


async def _broadcasts_open(runners: Iterable[Runner], stopping: asyncio.Event, timeout: float) -> None:
    """A broadcast gets what is published from now on: now, its receivers are open. Or the broker is away, and health says so."""
    pending: list[asyncio.Task[Any]] = [asyncio.create_task(runner.opened.wait()) for runner in runners if runner.plan.group is None]
    if not pending:
        return
    stopped = asyncio.create_task(stopping.wait())
    waits = [*pending, stopped]
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while pending and not stopped.done():
                    await asyncio.wait([*pending, stopped], return_when=asyncio.FIRST_COMPLETED)
                    pending = [task for task in pending if not task.done()]
    finally:
        for task in waits:
            task.cancel()
        await asyncio.wait(waits)


async def _all_ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Waits for every task; when this wait is cancelled, they are cancelled too, and still waited for."""
    pending = set(tasks)
    if not pending:
        return
    try:
        await asyncio.wait(pending)
    except asyncio.CancelledError:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        raise
