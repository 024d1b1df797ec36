"""Worker processes of their own, as tests that kill need them: started with a module and JSON, ended in each of the ways there are."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Hired:
    """A worker process at work."""

    def __init__(self, pid: str, process: asyncio.subprocess.Process) -> None:
        self.pid = pid
        """What it is called in histories."""
        self.process = process

    async def up(self, seconds: float = 30.0) -> Self:
        """Returns when it says "up" on its standard output: it consumes."""
        assert self.process.stdout is not None  # it is a pipe
        async with asyncio.timeout(seconds):
            line = await self.process.stdout.readline()
        assert line == b"up\n", f"{self.pid} ended with {await self.process.wait()}"
        return self

    async def kill(self) -> None:
        """By kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def died(self, seconds: float) -> None:
        """Returns when it has ended by kill -9, its own or another's. Fails when it lives on, or ends in another way."""
        try:
            async with asyncio.timeout(seconds):
                code = await self.process.wait()
        except TimeoutError:
            pytest.fail(f"{self.pid} did not die within {seconds:g} s")
        assert code == -signal.SIGKILL, f"{self.pid} ended with {code}"

    async def paused(self, seconds: float) -> None:
        """Returns when it stands still by SIGSTOP. Fails when it does not in time."""
        deadline = time.monotonic() + seconds
        while _state(self.process.pid) != "T":
            if self.process.returncode is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.pid} did not stop within {seconds:g} s (return code {self.process.returncode})")
            await asyncio.sleep(0.005)

    def goes_on(self) -> None:
        """After `paused`."""
        self.process.send_signal(signal.SIGCONT)

    async def stop(self, seconds: float) -> float:
        """By SIGTERM; how long it took. Fails when it takes longer, or ends with an error."""
        began = time.monotonic()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                code = await self.process.wait()
        except TimeoutError:
            await self.kill()
            pytest.fail(f"{self.pid} did not end within {seconds:g} s of SIGTERM")
        assert code in {0, -signal.SIGTERM}, f"{self.pid} ended with {code}"
        return time.monotonic() - began


async def hire(pid: str, module: str, terms: str, directory: Path, settings: Mapping[str, str]) -> Hired:
    """Starts `python -m module terms`; not up yet. `settings` are its `MSGBUS_` variables, without that; its log is in `directory`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MSGBUS_")}
    environment |= {f"MSGBUS_{name}": value for name, value in settings.items()}
    with (directory / f"{pid}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, terms, stdout=asyncio.subprocess.PIPE, stderr=log, cwd=ROOT, env=environment
        )
    return Hired(pid, process)


def _state(pid: int) -> str:
    """R, S, T, Z, ... as the kernel says; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
