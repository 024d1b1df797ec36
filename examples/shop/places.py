"""What the shop stands on: a broker, a database for each service, and the commands of its parts."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from examples.shop.database import engine_of
from examples.shop.parts import Part, ShopError
from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError

SERVICES = ("orders", "billing", "shipping")
SILENCE = {"MSGBUS_LEASE": "3", "MSGBUS_SESSION_TIMEOUT": "6"}
"""After how many seconds of silence a process counts as dead, and another has what it held. In production one waits longer."""


def broker(url: str | None, folder: Path) -> tuple[str, Part | None]:
    """The broker's URL, and the part that is it where it is the shop's own. Raises `ShopError` where there is none to share."""
    if url is None:
        redis = shutil.which("redis-server")
        if redis is None:
            raise ShopError(
                "no broker is set, and there is no redis-server to be one: set MSGBUS_URL (redis://, amqp://, kafka://), "
                "or install it (on Debian and Ubuntu: apt-get install redis-server)"
            )
        port = free_port()
        listens = ("--bind", "127.0.0.1", "--port", str(port))
        keeps = ("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always")  # what it has confirmed survives kill -9
        return f"redis://127.0.0.1:{port}/0", Part("redis", (redis, *listens, *keeps), os.environ, folder)
    if url.startswith("memory:"):
        raise ShopError(
            "memory:// lives in one process, and this shop is several: set MSGBUS_URL to a broker (redis://, amqp://, kafka://), "
            "or leave it out for a Redis of the shop's own"
        )
    return url, None


@asynccontextmanager
async def databases(server: str | None, run_id: str, folder: Path) -> AsyncGenerator[Mapping[str, str], None]:
    """A URL for each service: a database on the PostgreSQL server at this URL, dropped in the end, or a file of SQLite."""
    if server is None:
        yield {service: f"sqlite:///{folder / service}.db" for service in SERVICES}
        return
    url = make_url(server)
    if url.get_backend_name() != "postgresql":
        raise ShopError(
            "DATABASE_URL names a PostgreSQL server (postgresql://user:password@host/database); without it the shop uses SQLite"
        )
    names = {service: f"shop_{run_id}_{service}" for service in SERVICES}
    await _execute(server, [f"CREATE DATABASE {name}" for name in names.values()])
    try:
        yield {service: url.set(database=name).render_as_string(hide_password=False) for service, name in names.items()}
    finally:
        await _execute(server, [f"DROP DATABASE {name} WITH (FORCE)" for name in names.values()])


async def _execute(server: str, statements: Sequence[str]) -> None:
    engine = engine_of(server).execution_options(isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            for statement in statements:
                await connection.execute(text(statement))
    except (SQLAlchemyError, OSError) as error:
        raise ShopError(f"DATABASE_URL must name a PostgreSQL server on which databases can be made: {error}") from error
    finally:
        await engine.dispose()


def parts(variables: Mapping[str, Mapping[str, str]], port: int, folder: Path) -> list[Part]:
    """The shop's own processes, not started: the services, each with its environment, and the relay of the one that runs no bus."""
    commands = {
        "orders": ("orders", "uvicorn", "examples.shop.orders:app", "--port", str(port), "--log-level", "warning"),
        "relay": ("orders", "msgbus", "outbox", "relay", "examples.shop.orders:bus"),
        "billing": ("billing", "msgbus", "run", "examples.shop.billing:bus"),
        "shipping": ("shipping", "msgbus", "run", "examples.shop.shipping:bus"),
    }
    return [Part(name, (sys.executable, "-m", *command), variables[service], folder) for name, (service, *command) in commands.items()]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
