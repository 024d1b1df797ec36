"""How many programs, and from which seed: by environment, or `--hypothesis-seed`. The seed is in the summary."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator

import pytest

PROGRAMS = "MSGBUS_TEST_DIFFERENTIAL_PROGRAMS"
SEED = "MSGBUS_TEST_DIFFERENTIAL_SEED"

_drawn = random.SystemRandom().randrange(2**32)


def seed_of(config: pytest.Config) -> int:
    """The seed of all programs of this run: the same for every broker, so that each goes through the same ones."""
    given = config.getoption("--hypothesis-seed") or os.environ.get(SEED)
    return _drawn if given in (None, "") else int(given)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With this seed come the same programs again. In the summary: a header is not asked for where all tests are run."""
    seed = seed_of(config)
    terminalreporter.write_line(f"differential: seed {seed} (the same programs again: make differential SEED={seed}, or --hypothesis-seed)")


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
