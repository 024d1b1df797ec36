"""The seed of all programs of a run: the same for every broker, so that each goes through the same ones, whichever process has it."""

from __future__ import annotations

import os
import random

import pytest

SEED = "MSGBUS_TEST_DIFFERENTIAL_SEED"
"""Says which seed; `--hypothesis-seed` does too. Without either, one is drawn, and left here for the processes that a run starts."""


def drawn() -> int:
    """Another one each time, whatever seed the tests have."""
    return random.SystemRandom().randrange(2**32)


def draw_seed(config: pytest.Config) -> None:
    """At the beginning of a run, before it starts processes of its own."""
    if not os.environ.get(SEED):
        os.environ[SEED] = str(config.getoption("--hypothesis-seed") or drawn())


def seed_of(config: pytest.Config) -> int:
    """Of this run."""
    return int(config.getoption("--hypothesis-seed") or os.environ[SEED])
