"""Makes the runners of a bus: plans, declared at the broker, bound to codecs, middleware and threads."""

from __future__ import annotations

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.outbox import TransactionalStore
from msgbus.errors import StoreError
from msgbus.inbound.plan import Plan
from msgbus.inbound.route import Route
from msgbus.inbound.runner import Runner, RunnerLimits
from msgbus.middleware.base import Middleware
from msgbus.middleware.idempotency import Idempotency
from msgbus.middleware.inbox import Inbox
from msgbus.outbound.relay import Relay
from msgbus.outbox import Outbox, Scribe
from msgbus.publishing import Publishes
from msgbus.runtime import Runtime, codec_of

log = logging.getLogger("msgbus")


async def make_runners(runtime: Runtime, publisher: Publishes, executors: list[ThreadPoolExecutor]) -> list[Runner]:
    """Declares every subscription and makes its runner, not started. A thread pool that is made is added to `executors`."""
    settings = runtime.settings
    limits = RunnerLimits(settings.max_deliveries, settings.drain_timeout.total_seconds(), runtime.close_timeout)
    runners: list[Runner] = []
    scribe = make_scribe(runtime)
    for plan in await runtime.declare_subscriptions():
        executor = None
        if not plan.signature.is_async:
            executor = ThreadPoolExecutor(plan.concurrency, thread_name_prefix=f"msgbus-{plan.name}")
            executors.append(executor)
        group = plan.group or plan.name
        route = Route(plan, codec_of(plan.topic), publisher, _middleware(runtime, plan, scribe), executor)
        runners.append(Runner(route, runtime.adapter, runtime.settler(plan.physical, group, plan.name), limits))
    return runners


def _middleware(runtime: Runtime, plan: Plan, scribe: Scribe) -> list[Middleware]:
    """The user's own, then what makes effects happen once, innermost."""
    if plan.store is None:
        return [*runtime.middleware]
    # Of a broadcast every instance has the effect: what one has done is nothing to the others.
    group = plan.group or f"{plan.name}.{os.urandom(8).hex()}"
    consumer = f"{plan.physical}.{group}"
    lease = runtime.settings.lease.total_seconds()
    if plan.signature.session is not None and isinstance(plan.store, TransactionalStore):
        publisher = functools.partial(Outbox, scribe)
        return [*runtime.middleware, Inbox(plan.store, consumer, lease, is_async=plan.signature.is_async, publisher=publisher)]
    return [*runtime.middleware, Idempotency(plan.store, consumer, lease)]


def make_scribe(runtime: Runtime) -> Scribe:
    """Who writes the rows of the outbox."""
    return Scribe(
        runtime.adapter, namespace=runtime.namespace, service=runtime.service, topics=runtime.topics, middleware=runtime.middleware
    )


async def make_relay(runtime: Runtime) -> Relay | None:
    """The relay of the bus's store, not started; None where it has no outbox. Raises `ConfigurationError` for missing tables."""
    store = runtime.defaults.store
    if not isinstance(store, TransactionalStore):
        return None
    try:
        await store.open()
    except StoreError as error:  # nothing is run and nothing lost until it is back; health says so
        log.warning("the store is away: %s", error)

    async def declare(topic: TopicSpec) -> None:
        await runtime.declare([topic])

    return Relay(
        store,
        runtime.pipeline.deliver,
        declare,
        publish_timeout=runtime.publish_timeout,
        lease=runtime.settings.lease.total_seconds(),
    )
