"""Policies, durations and guarantees in words."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

import pytest
from pydantic import BaseModel
from tenacity import (
    retry_if_exception_type,
    wait_chain,
    wait_exponential,
    wait_fixed,
    wait_incrementing,
    wait_none,
    wait_random,
    wait_random_exponential,
)

from msgbus import Retry, Topic
from msgbus.cli.describe import duration, guarantees, key_shown, model_shown, retry_shown
from msgbus.contract.adapter import Capability, Limits
from msgbus.settings import Settings
from msgbus_memory import MemoryAdapter


class Order(BaseModel):
    number: int


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.25 s"), (2, "2 s"), (60, "1 min"), (90, "1 min 30 s"), (3600, "1 h"), (7 * 86400, "7 d"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, words: str) -> None:
    """The two largest units that say something."""
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("retry", "words"),
    [
        (Retry(), "8 runs, random exponential to 1 min"),
        (Retry.none(), "none"),
        (Retry(3, wait_fixed(2)), "3 runs, 2 s apart"),
        (Retry(3, wait_none()), "3 runs, at once"),
        (Retry(3, wait_random(1, 3)), "3 runs, 1 s to 3 s apart"),
        (Retry(3, wait_exponential(max=10)), "3 runs, exponential to 10 s"),
        (Retry(3, wait_random_exponential()), "3 runs, random exponential"),
        (Retry(3, wait_incrementing(1, 2, max=9)), "3 runs, 1 s, 2 s longer each time to 9 s"),
        (Retry(3, wait_fixed(1) + wait_random(0, 1)), "3 runs, 1 s apart + 0 s to 1 s apart"),
        (Retry(9, wait_chain(wait_fixed(1), wait_fixed(1), wait_fixed(5))), "9 runs, 1 s apart, then 5 s apart"),
        (Retry(2, wait_fixed(1), give_up_on=(KeyError, ValueError)), "2 runs, 1 s apart; not on KeyError, ValueError"),
        (Retry(2, wait_fixed(1), max_age=timedelta(hours=1)), "2 runs, 1 s apart; within 1 h"),
        (Retry(2, wait_fixed(1), retry_on=retry_if_exception_type(OSError)), "2 runs, 1 s apart; on exception_type"),
    ],
)
def test_retry_policies(retry: Retry, words: str) -> None:
    """How often, how far apart, and what ends it."""
    assert retry_shown(retry) == words


def test_models_and_keys() -> None:
    """As their user writes them; a key's function by its name."""

    def plane(order: Order) -> str:
        return str(order.number)

    assert [model_shown(model) for model in (Order, bytes, list[Order], Order | None)][:2] == ["Order", "bytes"]
    assert model_shown(dict[str, int]) == "dict[str, int]"
    assert key_shown(Topic("orders", Order, key=plane)) == "plane()"
    assert key_shown(Topic("orders", Order)) is None


class Little(MemoryAdapter):
    """A broker that can do next to nothing."""

    name: ClassVar[str] = "little"

    @property
    def capabilities(self) -> Capability:
        return Capability.DURABLE | Capability.SHARED

    @property
    def limits(self) -> Limits:
        return Limits(body=100_000, delay=120.0, unsettled=1800.0)


def test_a_broker_that_can_do_little_is_said_to() -> None:
    """What is refused, and what is done in the process instead; limits in words."""
    told = {promise.name: promise for promise in guarantees(Little(), Settings())}
    assert {name for name, promise in told.items() if promise.kept_by == "nobody"} == {
        "order of a key",
        "delay",
        "poison",
        "priorities",
        "broadcast",
        "retain",
    }
    assert told["retry"].kept_by == "process"
    assert told["durable"].kept_by == "broker"
    assert told["un-settled"].says.startswith("30 min")
    assert "34,464 bytes published" in told["message size"].says
