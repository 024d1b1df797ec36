"""The table of the points is the one that users read, and each point is tried by one test."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from tests.crash import test_inbox, test_outbox
from tests.crash.points import POINTS

PAGE = Path(__file__).parents[2] / "docs" / "outbox.md"


def test_the_page_has_the_table() -> None:
    """Row by row."""
    rows = re.findall(r"^\| ([PQ]\d) \| (.+) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert rows == [(name, point.where, point.outcome) for name, point in POINTS.items()]


def test_each_point_is_tried() -> None:
    """By one test, whose name begins with it."""
    names = [name for module in (test_outbox, test_inbox) for name, _ in inspect.getmembers(module, inspect.iscoroutinefunction)]
    tried = [found[1].upper() for name in names if (found := re.match(r"test_([pq]\d)_", name))]
    assert sorted(tried) == sorted(POINTS)
