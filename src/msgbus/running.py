"""Makes the runners of a bus: plans, declared at the broker, bound to codecs, middleware and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from msgbus.inbound.plan import Plan
from msgbus.inbound.route import Route
from msgbus.inbound.runner import Runner, RunnerLimits
from msgbus.middleware.base import Middleware
from msgbus.middleware.idempotency import Idempotency
from msgbus.publishing import Publishes
from msgbus.runtime import Runtime, codec_of


async def make_runners(runtime: Runtime, publisher: Publishes, executors: list[ThreadPoolExecutor]) -> list[Runner]:
    """Declares every subscription and makes its runner, not started. A thread pool that is made is added to `executors`."""
    settings = runtime.settings
    limits = RunnerLimits(settings.max_deliveries, settings.drain_timeout.total_seconds(), runtime.close_timeout)
    runners: list[Runner] = []
    for plan in await runtime.declare_subscriptions():
        executor = None
        if not plan.signature.is_async:
            executor = ThreadPoolExecutor(plan.concurrency, thread_name_prefix=f"msgbus-{plan.name}")
            executors.append(executor)
        group = plan.group or plan.name
        route = Route(plan, codec_of(plan.topic), publisher, _middleware(runtime, plan, group), executor)
        runners.append(Runner(route, runtime.adapter, runtime.settler(plan.physical, group, plan.name), limits))
    return runners


def _middleware(runtime: Runtime, plan: Plan, group: str) -> list[Middleware]:
    """The user's own, then idempotency, innermost."""
    if plan.store is None:
        return [*runtime.middleware]
    lease = runtime.settings.lease.total_seconds()
    return [*runtime.middleware, Idempotency(plan.store, f"{plan.physical}.{group}", lease)]
