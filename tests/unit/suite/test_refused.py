"""What an adapter does not claim is refused: the suite's mirrored tests, where the memory adapter claims less than it can."""

from __future__ import annotations

import re

import pytest
from tests.unit.suite.brokers import behind

from msgbus.contract.adapter import Capability
from msgbus.testing import adapter_suite  # noqa: F401  fills the registry
from msgbus.testing.stage import REGISTRY

MIRRORED = {
    Capability.BROADCAST: "broadcast_refused_with_alternative",
    Capability.PRIORITIES: "priorities_refused_with_alternative",
    Capability.SHARDS: "ordering_refused_with_alternative",
    Capability.RETAIN: "retain_refused_with_alternative",
    Capability.DELAY: "delay_refused_with_alternative",
    Capability.DURABLE: "durability_refused_with_alternative",
}


@pytest.mark.parametrize("flag", MIRRORED, ids=lambda flag: flag.name)
def test_refused_where_it_is_not_claimed(flag: Capability) -> None:
    """The mirrored test runs, and passes."""
    broker = behind(hidden=flag)
    try:
        REGISTRY[MIRRORED[flag]](broker)
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"skipped: {skipped}") from skipped


@pytest.mark.parametrize("flag", [flag for flag in MIRRORED if flag is not Capability.DURABLE], ids=lambda flag: flag.name)
def test_skipped_where_it_is_claimed(flag: Capability) -> None:
    """The reason names the capability."""
    with pytest.raises(pytest.skip.Exception, match=rf"\b{re.escape(flag.name or '')}\b"):
        REGISTRY[MIRRORED[flag]](behind())


def test_every_mirrored_test_is_tried_here() -> None:
    """But for patterns, which every broker refuses."""
    mirrored = {name for name in REGISTRY if name.endswith("_refused_with_alternative")}
    assert mirrored == {*MIRRORED.values(), "patterns_refused_with_alternative"}
