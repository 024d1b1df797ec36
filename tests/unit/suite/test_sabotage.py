"""The suite fails adapters that break the contract: each kind of sabotage, before the memory adapter, fails the tests that name it, and
the same tests pass where the same adapter is not sabotaged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from tests.unit.suite.brokers import behind, die
from tests.unit.suite.sabotaged import (
    AcksFirst,
    BeginsWith,
    ClaimsAll,
    CountsNoCrashes,
    DelaysNothing,
    DropsOnCancel,
    ExceedsTheWindow,
    ForgetsSome,
    HandsOutMore,
    KeepsNoPriority,
    LosesOnRelease,
    PrivateHasHistory,
    PrivateIsAGroup,
    ReordersAKey,
    RetainsNothing,
    ReturnsBeforeTheConfirm,
    SharesItsShards,
)
from tests.unit.suite.test_list import FALSE_CLAIM_FAILS

from msgbus.contract.adapter import (
    Adapter,
    AdapterSettings,
    Capability,
)
from msgbus.testing import suite_lifecycle
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import REGISTRY, Broker, Order, Stage
from msgbus.topic import Topic
from msgbus_memory import MemoryAdapter

PATIENCE = 0.25
"""Of the suite, here: what does not come on this broker does not come within 2.5 s either. The controls have no more."""

# ---------------------------------------------------------------- what fails them


@dataclass(frozen=True)
class Sabotage:
    """How an adapter breaks the contract, and the tests that must fail it; `claim`: the capability that it claims falsely."""

    must_fail: tuple[str, ...]
    receiver: type[FaultyReceiver] = FaultyReceiver
    adapter: type[FaultyAdapter] = FaultyAdapter
    claim: Capability = Capability.NONE

    def __str__(self) -> str:
        return self.receiver.__name__ if self.adapter is FaultyAdapter else self.adapter.__name__


SABOTAGES = [
    Sabotage(("ack_after_handler_only", "drain_timeout_cancels_unacked"), AcksFirst),
    Sabotage(("release_gives_back_uncounted", "drain_gives_back_what_was_not_started"), LosesOnRelease),
    Sabotage(("per_key_order_single_consumer",), ReordersAKey),
    Sabotage(("publish_returns_after_confirm",), adapter=ReturnsBeforeTheConfirm),
    Sabotage(("publish_concurrent_1000_all_confirmed",), adapter=ForgetsSome),
    Sabotage(("subscriber_ctx_cancel_stops",), DropsOnCancel),
    Sabotage(("never_more_than_the_window_un_settled",), HandsOutMore, ExceedsTheWindow),
    Sabotage(("delay_not_before", "delay_survives_restart"), adapter=DelaysNothing, claim=Capability.DELAY),
    Sabotage(("priority_preempts_backlog",), adapter=KeepsNoPriority, claim=Capability.PRIORITIES),
    Sabotage(
        ("per_key_order_many_consumers", "shards_spread_over_processes_and_come_back"),
        adapter=SharesItsShards,
        claim=Capability.SHARDS,
    ),
    Sabotage(("retained_topic_gives_history_to_a_later_group",), adapter=RetainsNothing, claim=Capability.RETAIN),
    Sabotage(("broadcast_each_instance",), adapter=PrivateIsAGroup, claim=Capability.BROADCAST),
    Sabotage(("broadcast_each_instance",), BeginsWith, PrivateHasHistory, Capability.BROADCAST),
    Sabotage(("poison_process_killer_dead_lettered_and_its_neighbours_spared",), CountsNoCrashes, claim=Capability.CRASH_COUNT),
    Sabotage(("processes_share_the_broker",), adapter=ClaimsAll, claim=Capability.SHARED),
    Sabotage(("confirmed_outlives_its_process_and_a_restart",), adapter=ClaimsAll, claim=Capability.DURABLE),
]

CASES = [pytest.param(sabotage, name, id=f"{sabotage}-{name}") for sabotage in SABOTAGES for name in sabotage.must_fail]
CONTROLS = sorted({name for sabotage in SABOTAGES for name in sabotage.must_fail if sabotage.adapter is not ClaimsAll})


def complaint(name: str, broker: Broker) -> str | None:
    """What a test of the suite says of a broker; None: it passes. A skip is no answer."""
    test = REGISTRY[name]
    try:
        test(broker)
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"{name} was skipped: {skipped}") from skipped
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def complaints() -> Iterator[dict[tuple[str, str], Future[str | None]]]:
    """What becomes of all cases, tried side by side: most of their time they wait for what does not come."""
    with ThreadPoolExecutor(len(CASES)) as executor:
        yield {
            (str(sabotage), name): executor.submit(complaint, name, behind(sabotage.adapter, sabotage.receiver, patience=PATIENCE))
            for sabotage in SABOTAGES
            for name in sabotage.must_fail
        }


@pytest.mark.parametrize(("sabotage", "name"), CASES)
def test_a_sabotaged_adapter_fails(complaints: dict[tuple[str, str], Future[str | None]], sabotage: Sabotage, name: str) -> None:
    """Each of the tests that name what it breaks."""
    assert complaints[str(sabotage), name].result() is not None


@pytest.mark.parametrize("name", CONTROLS)
def test_the_same_adapter_without_sabotage_passes(name: str) -> None:
    """With as little patience: it is the sabotage that failed, not the wrapper or the hurry."""
    assert complaint(name, behind(patience=PATIENCE)) is None


@pytest.fixture
def child_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's other process becomes another adapter, so that the broker in memory can play one that is shared."""

    async def publish_by_another_adapter(stage: Stage, n: int) -> None:
        async with stage.bus(service="child") as bus:
            await bus.publish(Topic("orders", Order), Order(n=n))

    monkeypatch.setattr(suite_lifecycle, "publish_in_another_process", publish_by_another_adapter)


@pytest.mark.usefixtures("child_in_this_process")
@pytest.mark.parametrize("name", ["processes_share_the_broker", "confirmed_outlives_its_process_and_a_restart"])
def test_a_broker_that_is_shared_and_keeps_everything_passes(name: str) -> None:
    """The two claims that the memory adapter cannot make, where they hold."""
    assert complaint(name, behind(ClaimsAll, patience=PATIENCE)) is None


@pytest.mark.usefixtures("child_in_this_process")
def test_a_shared_broker_that_forgets_when_it_is_restarted_is_not_durable() -> None:
    """The restart is what fails it."""
    restarts = 0

    def make(settings: AdapterSettings) -> Adapter:
        return ClaimsAll(MemoryAdapter(f"forgets{restarts}", settings=settings))

    async def restart() -> None:
        nonlocal restarts
        restarts += 1

    broker = Broker("memory://forgets", crash=die, make=make, restart=restart, patience=0.05)
    assert "before the restart" in (complaint("confirmed_outlives_its_process_and_a_restart", broker) or "")


def test_every_capability_is_claimed_falsely_here() -> None:
    """And fails what the list says that it fails."""
    failed: dict[Capability, set[str]] = defaultdict(set)
    for sabotage in SABOTAGES:
        if sabotage.claim:
            failed[sabotage.claim] |= {*sabotage.must_fail}
    assert failed == {flag: {*names} for flag, names in FALSE_CLAIM_FAILS.items()}
