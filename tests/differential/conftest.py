"""What all programs of a run have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from tests.differential.seed import seed_of


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of all programs of this run."""
    return seed_of(request.config)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Failures, retries and lost processes are what these programs are made of: their log would bury the one that matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)
