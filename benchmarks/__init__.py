"""Benchmarks: `python -m benchmarks [name …] [--json FILE]`. Each is a module here with `run() -> Result`.

They report ratios of contenders that were measured in one run, in rotating order: absolute times say more about the machine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a benchmark found. `measures`: name → value, in `unit`; `ratio` is what `limit` limits, where there is a limit."""

    name: str
    what: str
    unit: str
    measures: dict[str, float]
    ratio: float
    limit: float | None
    rounds: int

    @property
    def kept(self) -> bool:
        """Whether the limit is kept."""
        return self.limit is None or self.ratio <= self.limit
