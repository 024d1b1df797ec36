"""docs/brokers/traps.md names tests that are there, and has every trap that a comment names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from msgbus.testing import adapter_suite
from msgbus.testing.stage import REGISTRY

ROOT = Path(__file__).parents[2]
TRAP = re.compile(r"[RKS][0-9]{1,2}")


def rows() -> Iterator[list[str]]:
    """The cells of each trap."""
    for line in (ROOT / "docs" / "brokers" / "traps.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if TRAP.fullmatch(cells[0]):
            yield cells


def test_what_holds_a_guard_is_there() -> None:
    """Every trap has a guard, and every name in its last column is a test of this repository or of the suite."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    known = {*re.findall(r"def (test_\w+)\(", sources), *REGISTRY, "make bench", "sender.py"}
    assert len(REGISTRY) == len(adapter_suite.__all__)
    for number, what, guard, held in rows():
        assert what, number
        assert guard, number
        assert held, number
        assert set(re.findall(r"`([^`]+)`", held)) <= known, number


def test_traps_are_numbered_and_every_comment_names_one() -> None:
    """Each number is there once, in order, and no comment of an adapter names another."""
    numbers = [cells[0] for cells in rows()]
    for letter in "RKS":
        own = [number for number in numbers if number[0] == letter]
        assert own == [f"{letter}{place}" for place in range(1, len(own) + 1)]
    named = {
        found
        for path in (ROOT / "adapters").rglob("*.py")
        for found in re.findall(rf"\(({TRAP.pattern})\)", path.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= set(numbers)
