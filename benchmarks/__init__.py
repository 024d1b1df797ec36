"""Benchmarks: `python -m benchmarks [name …]`. Each is a module here with `run(options) -> list[Result]`.

They report ratios of contenders that were measured in one run, in rotating order: absolute times say more about the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """What the command line says. None, or nothing: the benchmark's own."""

    rounds: int | None = None
    count: int | None = None
    """Messages a run."""
    brokers: Sequence[str] = ()
    databases: Sequence[str] = ()
    work: float = 0.0
    """Seconds that a handler waits for something else."""


@dataclass(frozen=True)
class Result:
    """What a benchmark found. `measures`: name → median, in `unit`; `ratio` is what `limit` limits, from above or (`at_least`) below."""

    name: str
    what: str
    unit: str
    measures: dict[str, float]
    ratio: float
    limit: float | None
    rounds: int
    at_least: bool = False
    ratios: Sequence[float] = ()
    """One a round, where there are several."""
    notes: Sequence[str] = field(default_factory=tuple)
    """Versions, guarantees, and what was odd."""

    @property
    def kept(self) -> bool:
        """Whether the limit is kept."""
        return self.limit is None or (self.ratio >= self.limit if self.at_least else self.ratio <= self.limit)
