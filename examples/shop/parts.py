"""A process of the shop: started, killed by -9 and started again, and in the end stopped as an operator does."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_TIMEOUT = 40.0
"""Seconds that a part has to finish what it has begun; msgbus gives handlers 30."""


class ShopError(Exception):
    """The shop cannot be run, or a part of it does what it must not. Says what, and what to do."""


class Part:
    """One process, and its log."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.killed = 0
        self._command = command
        self._variables = variables
        self._log = folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None
        """What should be running just now."""

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._variables,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which ends its parts
            )

    def check(self) -> None:
        """Raises `ShopError` where it has ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            raise ShopError(f"{self.name} ended by itself, with {self._process.returncode}:\n{self.tail()}")

    async def kill(self) -> None:
        """kill -9; returns when it is gone. Nothing happens where it does not run."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
            self.killed += 1

    async def stop(self) -> None:
        """SIGTERM. Raises `ShopError` where it does not end well, or not in time."""
        self.check()
        assert self._process is not None, "it runs"
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                code = await self._process.wait()
        except TimeoutError:
            raise ShopError(f"{self.name} still runs {STOP_TIMEOUT:g} s after SIGTERM:\n{self.tail()}") from None
        if code not in (0, -signal.SIGTERM):  # uvicorn ends by the signal, once it has finished
            raise ShopError(f"{self.name} was stopped, and ended with {code}:\n{self.tail()}")
        self._process = None

    def said(self, words: str) -> int:
        """How many lines of its log have these words."""
        return sum(words in line for line in self._lines())

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self._lines()[-20:])

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
