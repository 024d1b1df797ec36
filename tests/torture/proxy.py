"""A TCP proxy before a broker, which resets every connection, keeps the broker's words to itself, or is slow, when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncGenerator

HOSTS = (b"localhost", b"127.0.0.1")


class Proxy:
    """Forwards both ways. A broker that tells its clients its own address (Kafka) is made to tell the proxy's."""

    def __init__(self, port: int) -> None:
        self.port = 0
        """Where it listens, once it does."""
        self.resets = 0
        """Connections that it has reset."""
        self.hears_nothing = False
        """Set: what the broker says reaches nobody any more."""
        self.spares: int | None = None
        """Set: how many more words of clients pass; with the next one every connection is reset, once."""
        self.delay = 0.0
        """Seconds that a word takes, either way."""
        self._target = port
        self._open: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._open)

    def reset(self) -> None:
        """Every connection ends with a RST on both sides."""
        for writers in self._open.values():
            self.resets += 1
            for writer in writers:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    async def reset_every(self, seconds: float, *, during: float) -> None:
        """Again and again, for so many seconds."""
        deadline = asyncio.get_running_loop().time() + during
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(seconds)
            self.reset()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        task = asyncio.current_task()
        assert task is not None  # the server made one
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open[task] = (writer, far_writer)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, far_writer))
                both.create_task(self._forward(far_reader, writer, rename=True))
        finally:
            del self._open[task]
            for one in (writer, far_writer):
                one.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, rename: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if rename and self.hears_nothing:
                    continue
                if not rename and self.spares is not None:
                    self.spares -= 1
                    if self.spares < 0:
                        self.spares = None
                        self.reset()
                        return
                if rename:  # as long as before, so that no frame changes
                    for host in HOSTS:
                        data = data.replace(host + struct.pack(">i", self._target), host + struct.pack(">i", self.port))
                await asyncio.sleep(self.delay)  # it is far
                writer.write(data)
                await writer.drain()
        writer.close()

    async def end(self) -> None:
        """Closes what is open."""
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


@contextlib.asynccontextmanager
async def proxy_before(port: int) -> AsyncGenerator[Proxy, None]:
    """A proxy of a port of this machine, listening until it is left."""
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
