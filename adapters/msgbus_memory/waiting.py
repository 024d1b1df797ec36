"""How one task waits for what another task, thread or event loop does."""

from __future__ import annotations

import asyncio
from threading import get_ident


class Waiter:
    """One task's wait, again and again. Made on the event loop that waits; any thread may end the wait.

    A wake that comes while nobody waits is remembered, so look first, then wait: nothing is missed. A wait may end for
    nothing.
    """

    __slots__ = ("_future", "_loop", "_thread", "_woken")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._future: asyncio.Future[None] | None = None
        self._woken = False

    def wake(self) -> None:
        """Ends the wait. Never blocks or raises; nothing happens where the event loop is closed."""
        self._woken = True
        try:
            if get_ident() == self._thread:
                self._finish()
            else:
                self._loop.call_soon_threadsafe(self._finish)
        except RuntimeError:  # the loop is closed: whoever waited is gone, and the broker finds that out by itself
            return

    async def wait(self, seconds: float) -> None:
        """Returns at the next `wake`, at once after a remembered one, or when the time is over."""
        if not self._woken:
            self._thread = get_ident()
            self._future = future = self._loop.create_future()
            timer = self._loop.call_later(seconds, self._finish)
            try:
                await future
            finally:
                timer.cancel()
                self._future = None
        self._woken = False

    def _finish(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
