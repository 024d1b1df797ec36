"""The example on flight data, unchanged, on every broker: it comes to the same numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.brokers import Server
from tests.departures import write

ROOT = Path(__file__).parents[2]
ROWS = 2_000


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "name", ["memory", *(pytest.param(name, marks=pytest.mark.broker(name)) for name in ("redis", "kafka", "rabbitmq"))]
)
def test_the_demo_reconciles(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every departure is handled or a dead letter in every group, a plane's departures come in order, and nothing is lost."""
    if name == "memory":
        url = "memory://flights"
    else:
        running: Server = request.getfixturevalue("running")
        url = running.url
    expected = write(tmp_path / "flights.csv", ROWS)
    done = subprocess.run(
        [sys.executable, "-m", "examples.flights", "--input", str(tmp_path / "flights.csv")],
        env={**os.environ, "MSGBUS_URL": url, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=150,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = {words[0]: words[1:] for line in done.stdout.splitlines() if len(words := re.findall(r"[\w,–]+", line)) > 5}
    for group in ("punctuality", "rotation", "alerts"):
        assert cells[group][:3] == [f"{expected.handled:,}", f"{expected.dead:,}", "0"]
    assert (cells["rotation"][3], cells["alerts"][4]) == ("0", f"{expected.late:,}")
