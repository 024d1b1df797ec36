"""Circuit breaker of one subscription: stops starting handlers while what they depend on is away. No clock of its own, no I/O."""

from __future__ import annotations

import random
from collections import deque
from typing import Literal

State = Literal["closed", "open", "half_open"]

WINDOW = 30.0
LEAST_RUNS = 10
SHARE = 0.5
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 60.0


class Breaker:
    """Opens when, in the last 30 s, at least half of at least 10 runs failed on a dependency.

    Open for 5 s, then half-open: one run decides. Each time it fails the pause doubles, up to 60 s, jittered. `runs` is how many ended
    since the start: it is sampled now and then, so that a run that succeeds costs nothing here.
    """

    __slots__ = ("_failures", "_pause", "_samples", "reopens_at", "state")

    def __init__(self) -> None:
        self.state: State = "closed"
        self.reopens_at = 0.0
        """While open: when one run may try, by the clock that is handed in."""
        self._pause = FIRST_PAUSE
        self._failures: deque[float] = deque()
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, runs: int) -> None:
        """Notes how many runs there were by now, at most once a second."""
        samples = self._samples
        if not samples or samples[-1][0] <= now - 1.0:
            samples.append((now, runs))
            while len(samples) > 1 and samples[1][0] <= now - WINDOW:
                samples.popleft()

    def succeeded(self) -> None:
        """A run ended, and nothing it depends on was away. Worth saying only when the breaker is not closed."""
        if self.state == "half_open":
            self.state = "closed"
            self._pause = FIRST_PAUSE

    def failed(self, now: float, runs: int) -> bool:
        """A run, counted in `runs`, failed on a dependency. True: the breaker has opened just now."""
        if self.state == "open":
            return False
        failures = self._failures
        failures.append(now)
        while failures[0] <= now - WINDOW:
            failures.popleft()
        if self.state == "half_open":
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        else:
            recent = runs - (self._samples[0][1] if self._samples else 0)
            if recent < LEAST_RUNS or len(failures) < SHARE * recent:
                return False
        self.state = "open"
        self.reopens_at = now + self._pause * random.uniform(0.8, 1.2)
        failures.clear()
        self._samples.clear()
        self._samples.append((now, runs))
        return True

    def try_again(self) -> None:
        """The pause is over: one run may try."""
        if self.state == "open":
            self.state = "half_open"
