"""docs/brokers says what the adapters say of themselves: which features a broker has, and which options its URL takes."""

from __future__ import annotations

import pytest
from tests.broker_pages import FEATURES, HOW, MEANS, PAGES, URLS, adapter_of, has, options_of, with_tables

from msgbus.contract.adapter import Adapter, Capability

INSTALLED = {name: there for name in URLS if (there := adapter_of(name)) is not None}


@pytest.fixture(params=INSTALLED)
def broker(request: pytest.FixtureRequest) -> str:
    """Its name."""
    return str(request.param)


@pytest.fixture
def adapter(broker: str) -> Adapter:
    """Its adapter, not opened."""
    return INSTALLED[broker]


def test_every_capability_is_a_feature() -> None:
    """A new one of the contract gets a row."""
    assert {claim for claim in FEATURES.values() if isinstance(claim, Capability)} == set(Capability)
    assert all(set(how) == set(FEATURES) for how in HOW.values())


def test_what_is_refused_is_what_the_adapter_does_not_claim(broker: str, adapter: Adapter) -> None:
    """And each refusal says what to do instead."""
    for feature in FEATURES:
        kind, _, how = HOW[broker][feature].partition(": ")
        assert kind in ("native", "emulated", "refused"), feature
        assert (kind != "refused") == has(adapter, feature), feature
        assert kind != "refused" or how, feature


def test_every_option_is_explained(broker: str) -> None:
    """Those that its URL takes."""
    assert [option for option in options_of(broker) if option not in MEANS] == []


def test_the_page_is_up_to_date(broker: str) -> None:
    """`python -m tests.broker_pages` writes it."""
    page = (PAGES / f"{broker}.md").read_text(encoding="utf-8")
    assert with_tables(broker, page) == page


def test_every_option_that_is_explained_is_one() -> None:
    """Where all adapters are there."""
    if len(INSTALLED) < len(URLS):
        pytest.skip(f"only {', '.join(INSTALLED)} are installed")
    assert set(MEANS) == {option for broker in INSTALLED for option in options_of(broker)}
