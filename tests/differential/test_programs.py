"""Random programs show on every broker what the model says, and so the same on each: deliveries, attempts, order a key, dead letters."""

from __future__ import annotations

import os

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given
from tests.differential.brokers import NAMES, broker_called
from tests.differential.drawing import programs
from tests.differential.interpreter import exact_moves, fitting, run_program
from tests.differential.model import expected
from tests.differential.program import Program
from tests.differential.trace import differences

from msgbus.testing.stage import Broker

PROGRAMS = "MSGBUS_TEST_DIFFERENTIAL_PROGRAMS"
USUAL = {"memory": 100}
"""Programs a run, unless the environment says how many."""
USUAL_ELSEWHERE = 10
PATIENCE = 10.0
IMPATIENCE = 3.0
"""Seconds to wait for what must come: in a program, and in the many simpler ones that are tried once one has failed."""
UNHURRIED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)


def try_programs(broker: Broker, seed: int, count: int, patience: float = PATIENCE) -> None:
    """Runs so many programs on a broker and fails where one differs from the model, with the simplest that does, as its steps."""
    seconds = patience

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=UNHURRIED,
    )
    @given(program=programs())
    def all_of_them(program: Program) -> None:
        nonlocal seconds
        program = fitting(program, broker)
        try:
            found = differences(run_program(program, broker, seconds), expected(program, exact_moves=exact_moves(broker)))
            assert not found, "\n".join([f"on {broker.url.partition(':')[0]}, seed {seed}:", *found])
        except BaseException:
            seconds = min(seconds, IMPATIENCE)
            raise

    all_of_them()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker(name)) for name in NAMES])
def test_programs_show_what_the_model_says(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    """A failing program is made as simple as it can be and printed as its steps."""
    try_programs(broker_called(name, request), seed, int(os.environ.get(PROGRAMS) or USUAL.get(name, USUAL_ELSEWHERE)))
