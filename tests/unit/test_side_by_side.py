"""All tests at once: what becomes of the processes that have them. Here each runs a line of Python in place of pytest."""

from __future__ import annotations

import sys
import time

import pytest
from tests import side_by_side
from tests.brokers import RECIPES
from tests.conftest import HOUSE, HOUSES, SUMMARY
from tests.differential.seed import SEED

SAYS = f"""
import os, sys
print("seed", os.environ["{SEED}"])
with open(os.environ["{SUMMARY}"], "a") as summary:
    summary.write("how " + sys.argv[1] + " went\\n")
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({}, 0),
        ({"kafka": 1}, 1),
        ({"redis": side_by_side.NO_TESTS, "kafka": side_by_side.NO_TESTS}, 0),
        (dict.fromkeys(HOUSES, side_by_side.NO_TESTS), 1),
        ({"here": 2}, 1),
    ],
)
def test_one_failure_is_everybodys(
    codes: dict[str, int], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any process that fails fails the run, and so does a run without a test. All have the same seed, and a line at the end."""
    monkeypatch.setattr(side_by_side, "command", lambda house: [sys.executable, "-c", SAYS, house, str(codes.get(house, 0))])
    assert side_by_side.main() == code
    shown = capsys.readouterr().out.splitlines()
    assert len({line for line in shown if line.startswith("seed ")}) == 1
    assert {line for line in shown if line.startswith("how ")} == {f"how {house} went" for house in HOUSES}
    if code and any(each not in (0, side_by_side.NO_TESTS) for each in codes.values()):
        assert shown[-1] == f"failed: {', '.join(codes)}"


def test_a_run_that_lasts_too_long_is_interrupted_and_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As by a person at a terminal: pytest then says where it was. The others' results count."""
    waits = "import sys, time; print('here I was', flush=True); time.sleep(100 * (sys.argv[1] == 'kafka'))"
    monkeypatch.setattr(side_by_side, "command", lambda house: [sys.executable, "-c", waits, house])
    began = time.monotonic()
    assert side_by_side.main(limit=2.0) == 1
    assert time.monotonic() - began < 20
    shown = capsys.readouterr().out
    assert "interrupted: kafka" in shown
    assert shown.count("here I was") == len(HOUSES)
    assert shown.endswith("failed: kafka\n")


def test_every_broker_has_a_house() -> None:
    """One that is forgotten would be tested by no process."""
    assert {HOUSE.get(name, name) for name in [*RECIPES, "memory"]} == set(HOUSES)
