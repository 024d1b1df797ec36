"""A broker that runs, by its name: at a URL of the environment, else in a container, else as a process of this machine.

`server("redis")` starts it when it is first asked for, once in a process, and waits until it answers. In this order:

1. `MSGBUS_TEST_REDIS_URL` names one that runs already. It is used as it is; nothing here can kill it.
2. A container, where a Docker engine answers; `MSGBUS_TEST_REDIS_IMAGE` replaces the official image.
3. A process, where the program is installed (`tests/install_brokers.py` installs what is missing).

What was started ends when this process ends, however it ends: a keeper of its own notices. It keeps its port when it is killed and
started again, and nobody gets that port as one of their own in between: it lies outside the range that the system gives out.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import glob
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Protocol

FOUND_BY = 180.0
"""Seconds until a broker that was started must answer: Kafka recovers every partition that it ever had."""
PORTS = 8
"""How many one may have."""
JARS = Path(__file__).parent.parent / ".brokers" / "kafka"
"""Where the process of Kafka has its jars."""
PATH = ":".join(
    ["/usr/lib/rabbitmq/bin", *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True), os.environ.get("PATH", os.defpath)]
)
"""Where programs are looked for, Debian's places among them. Its `rabbitmq-server` on the usual path is for root alone, and one node."""


class Unavailable(Exception):
    """There is no such broker here, or it cannot do what it was told to; says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a broker is started, and how one sees that it answers.

    In its texts stand for what is only known then: `{port}` for the port on this machine, `{port1}` to `{port7}` for those above it,
    `{folder}` for a folder of the process; in a container that is `/tmp`.
    """

    url: str
    hello: bytes
    """What a client says first, and `welcome`: what the answer of a broker that is ready has in it."""
    welcome: bytes
    ports: tuple[int, ...]
    """The container's, published at `{port}` and those above it. 0: the same, of a broker that tells its clients where it is."""
    image: str | None
    """The official one. None: a container only if the environment names an image."""
    program: str
    process: str
    """A shell command. It runs in `{folder}`, with `files` in it."""
    command: str | None = None
    """The container's; None: the image's own."""
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    process_variables: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """The process's, in its folder; and `container_files` the container's, by their paths."""
    container_files: Mapping[str, str] = field(default_factory=dict[str, str])


def _redis(program: str, image: str | None) -> Recipe:
    return Recipe(
        url="redis://127.0.0.1:{port}/0",
        hello=b"PING\r\n",
        welcome=b"+PONG",
        ports=(6379,),
        image=image,
        command=f"{program} --appendonly yes",
        program=program,
        process=f"exec {program} --bind 127.0.0.1 --port {{port}} --dir {{folder}} --appendonly yes",
    )


def _rabbitmq(image: str | None) -> Recipe:
    return Recipe(
        url="amqp://guest:guest@127.0.0.1:{port}/",
        hello=b"AMQP\x00\x00\x09\x01",
        welcome=b"\x01\x00\x00",
        ports=(5672, 15672),
        image=image,
        program="rabbitmq-server",
        process="epmd & exec rabbitmq-server",
        process_variables={
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": "{port2}",
            "HOME": "{folder}",
            "RABBITMQ_CONFIG_FILE": "{folder}/rabbitmq.conf",
            "RABBITMQ_DIST_PORT": "{port3}",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "{folder}/plugins",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": "{folder}",
            "RABBITMQ_NODENAME": "msgbus-{port}@localhost",
        },
        files={
            "plugins": "[rabbitmq_management].\n",
            "rabbitmq.conf": "listeners.tcp.1 = 127.0.0.1:{port}\nmanagement.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port1}\n",
        },
    )


# One node that takes both roles. Brokers speak to themselves at the address that they advertise, also to verify transactions: inside a
# container that is not the published port, hence a listener of their own.
_KAFKA = {
    "NODE_ID": "1",
    "PROCESS_ROLES": "broker,controller",
    "LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "INTER_BROKER_LISTENER_NAME": "BROKER",
    "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
    "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
    "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
    "TRANSACTION_STATE_LOG_MIN_ISR": "1",
    "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
}
_KAFKA_INSIDE = {
    "LISTENERS": "PLAINTEXT://:9092,BROKER://:9094,CONTROLLER://:9093",
    "ADVERTISED_LISTENERS": "PLAINTEXT://127.0.0.1:{port},BROKER://localhost:9094",
    "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
}
_KAFKA_HERE = {
    "LISTENERS": "PLAINTEXT://127.0.0.1:{port},BROKER://127.0.0.1:{port1},CONTROLLER://127.0.0.1:{port2}",
    "ADVERTISED_LISTENERS": "PLAINTEXT://127.0.0.1:{port},BROKER://127.0.0.1:{port1}",
    "CONTROLLER_QUORUM_VOTERS": "1@127.0.0.1:{port2}",
    "LOG_DIRS": "{folder}/data",
}
KAFKA_VERSION = "4.3.1"

RECIPES = {
    "redis": _redis("redis-server", "redis:8"),
    "valkey": _redis("valkey-server", "valkey/valkey:9"),
    "rabbitmq": _rabbitmq("rabbitmq:4-management"),
    "kafka": Recipe(
        url="kafka://127.0.0.1:{port}",
        hello=b"\0\0\0\x12\0\x0a\0\1\0\0\0\1\xff\xff\0\5ready\0",  # who coordinates the group "ready"? Its topic of commits is made then
        welcome=b"\0\x09127.0.0.1",
        ports=(9092,),
        image=f"apache/kafka:{KAFKA_VERSION}",
        variables={f"KAFKA_{name}": value for name, value in (_KAFKA | _KAFKA_INSIDE).items()},
        program="java",
        process=f"java -cp '{JARS}/*' kafka.tools.StorageTool format --ignore-formatted --cluster-id 5L6g3nShT-eMCtK--X86sw"
        f" --config server.properties && exec java -Xms256m -Xmx512m -XX:+UseSerialGC -cp '{JARS}/*' kafka.Kafka server.properties",
        files={
            "server.properties": "".join(f"{name.lower().replace('_', '.')}={value}\n" for name, value in (_KAFKA | _KAFKA_HERE).items())
        },
    ),
    "postgres": Recipe(
        url="postgresql://postgres:postgres@127.0.0.1:{port}/postgres",
        hello=b"\x00\x00\x00\x17\x00\x03\x00\x00user\x00postgres\x00\x00",
        welcome=b"SCRAM-SHA-256",
        ports=(5432,),
        image="postgres:18",
        variables={"POSTGRES_PASSWORD": "postgres"},
        program="postgres",
        # It refuses to be root.
        process="as=; if [ $(id -u) = 0 ]; then chown -R postgres . && as='setpriv --reuid=postgres --regid=postgres --clear-groups'; fi;"
        " [ -d data ] || $as initdb -D data -U postgres --pwfile=password -A scram-sha-256 -E UTF8 --locale=C.UTF-8 &&"
        " exec $as postgres -D data -p {port} -h 127.0.0.1 -k {folder}",
        files={"password": "postgres"},
    ),
    "mysql": Recipe(
        url="mysql://test:test@127.0.0.1:{port}/test",
        hello=b"",  # the server speaks first: protocol 10
        welcome=b"\x00\x00\x00\x0a",
        ports=(3306,),
        image="mysql:8.4",
        variables={f"MYSQL_{name}": "test" for name in ("USER", "PASSWORD", "DATABASE", "ROOT_PASSWORD")},
        program="mariadbd",
        process="[ -d data ] || mariadb-install-db --no-defaults --datadir={folder}/data --user=$(id -un) &&"
        " exec mariadbd --no-defaults --datadir={folder}/data --user=$(id -un) --port={port} --bind-address=127.0.0.1"
        " --socket={folder}/socket --init-file={folder}/init.sql",
        files={
            "init.sql": "create database if not exists test;\n"
            + "".join(  # nobody without a name is to come before them
                f"create user if not exists 'test'@'{host}' identified by 'test';\ngrant all on *.* to 'test'@'{host}';\n"
                for host in ("%", "localhost")
            )
        },
    ),
    "redis-packaged": _redis("redis-server", None),
    "rabbitmq-packaged": _rabbitmq(None),
}
"""Brokers, and the databases of stores. `…-packaged`: what the distribution packages, which is older (Redis 7.0, RabbitMQ 3.10)."""


def variable(name: str, what: str) -> str:
    """The variable of the environment that names a broker's URL or image."""
    return f"MSGBUS_TEST_{name.upper().replace('-', '_')}_{what}"


def required() -> bool:
    """Whether a broker that is missing is a failure: in CI, or where the environment says so; elsewhere the test is skipped."""
    return any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("CI", "MSGBUS_TEST_REQUIRE_BROKERS"))


# ------------------------------------------------------------------------------------------------------- what runs


class Machine(Protocol):
    """What a broker runs in."""

    what: str

    def start(self) -> None:
        """Also again, with all that it had stored and at the same port."""
        ...

    def stop(self) -> None:
        """As an operator does: it may finish."""
        ...

    def kill(self) -> None:
        """kill -9."""
        ...

    def pause(self) -> None:
        """It keeps its connections and answers nobody."""
        ...

    def unpause(self) -> None: ...

    def ended(self) -> bool:
        """Whether it runs no more."""
        ...

    def log(self) -> str: ...

    def shell(self, script: str) -> tuple[int, str]:
        """Runs a shell script beside the broker, as it is: exit code and output."""
        ...


class _Container:
    def __init__(self, recipe: Recipe, image: str, port: int) -> None:
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        testcontainers_config.ryuk_disabled = True  # its own keeper, in one more container: ours is enough
        self.what = f"container {image}"
        container = DockerContainer(image, env=_filled(recipe.variables, port))
        for index, inside in enumerate(recipe.ports):
            # Docker's own API takes an address too; on all of them, a broker with no password would be everybody's.
            container.ports[f"{inside or port + index}/tcp"] = ("127.0.0.1", port + index)  # type: ignore[assignment]
        for path, content in _filled(recipe.container_files, port).items():
            container.with_copy_into_container(content.encode(), path)
        if recipe.command is not None:
            container.with_command(_filled({"": recipe.command}, port)[""])
        try:
            container.start()
        except BaseException:
            container.stop()
            raise
        _keeper().keep("container", container.get_container_id())
        self._container = container.get_wrapped_container()
        self._client = container  # alive as long as this is: its connections serve the container

    def start(self) -> None:
        self._container.start()

    def stop(self) -> None:
        self._container.stop(timeout=10)

    def kill(self) -> None:
        self._container.kill()
        self._container.wait()

    def pause(self) -> None:
        self._container.pause()

    def unpause(self) -> None:
        self._container.unpause()

    def ended(self) -> bool:
        self._container.reload()
        return bool(self._container.status in ("exited", "dead"))

    def log(self) -> str:
        return str(self._container.logs(tail=20).decode(errors="replace"))

    def shell(self, script: str) -> tuple[int, str]:
        code, output = self._container.exec_run(["sh", "-c", script], workdir="/tmp")
        return int(code), str(output.decode(errors="replace"))


class _Process:
    def __init__(self, recipe: Recipe, port: int) -> None:
        self.what = f"process {recipe.program}"
        self._port = port
        self._folder = Path(tempfile.mkdtemp(prefix="msgbus-tests-"))
        _keeper().keep("folder", str(self._folder))
        filled = _filled({"": recipe.process, **recipe.process_variables}, port, self._folder)
        self._command = filled.pop("")
        self._variables = {**os.environ, **filled, "PATH": PATH}
        for name, content in _filled(recipe.files, port, self._folder).items():
            (self._folder / name).write_text(content)
        self.start()
        atexit.register(self._end)  # before the keeper, which would do it too, but leave this one's child without a parent that waits

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", self._command],
                cwd=self._folder,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the signals below are for it and its children, and for nobody else
            )
        _keeper().keep("group", str(self._process.pid))

    def stop(self) -> None:
        self._signal(signal.SIGTERM)
        self._gone(30.0)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._gone(10.0)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def unpause(self) -> None:
        self._signal(signal.SIGCONT)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def log(self) -> str:
        return "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-20:])

    def shell(self, script: str) -> tuple[int, str]:
        done = subprocess.run(["/bin/sh", "-c", script], cwd=self._folder, env=self._variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def _end(self) -> None:
        if not self.ended():
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _gone(self, seconds: float) -> None:
        """Until nobody listens any more: children of the shell may end after it."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        while _listens(self._port):
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.what} does not end")
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self._process.wait()
        _keeper().drop("group", str(self._process.pid))


class Server:
    """A broker that runs. Everything here blocks: a coroutine calls it by `asyncio.to_thread`."""

    def __init__(self, name: str, url: str, machine: Machine | None, port: int = 0) -> None:
        self.name = name
        self.url = url
        self.what = "of the environment" if machine is None else machine.what
        self.port = port
        self._machine = machine

    def restart(self) -> None:
        """What a power cut does, as far as a process shows it; returns when the broker answers again."""
        self.kill()
        self.start()

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self._ours().kill()

    def stop(self) -> None:
        """Ends it as an operator does; returns when it is gone."""
        self._ours().stop()

    def start(self) -> None:
        """Starts again what was stopped or killed; returns when it answers."""
        self._ours().start()
        self.wait()

    def pause(self) -> None:
        """From here on it keeps its connections and answers nobody."""
        self._ours().pause()

    def unpause(self) -> None:
        """It goes on where it was paused; returns when it answers."""
        self._ours().unpause()
        self.wait()

    def shell(self, script: str) -> tuple[int, str]:
        """Runs a shell script where the broker runs, its own tools on the path: exit code and output."""
        return self._ours().shell(script)

    def wait(self) -> None:
        """Returns when it answers; `Unavailable`, with the end of its log, when it has ended, or does not in time."""
        machine, recipe = self._ours(), RECIPES[self.name]
        deadline = time.monotonic() + FOUND_BY
        while not _answers(self.port, recipe.hello, recipe.welcome):
            ended = machine.ended()
            if ended or time.monotonic() > deadline:
                raise Unavailable(f"{machine.what} {'ended' if ended else 'does not answer'}:\n{machine.log()}")
            time.sleep(0.05)

    def _ours(self) -> Machine:
        if self._machine is None:
            raise Unavailable(f"{variable(self.name, 'URL')} names a {self.name} that is not ours to stop and start")
        return self._machine


_servers: dict[str, Server | Unavailable] = {}


def server(name: str) -> Server:
    """The broker of this name, once it answers; every time the same. `Unavailable`, saying what was tried, where there is none."""
    if name not in _servers:
        try:
            _servers[name] = _started(name)
        except Unavailable as why:
            _servers[name] = why
    found = _servers[name]
    if isinstance(found, Unavailable):
        raise found
    return found


def _started(name: str) -> Server:
    recipe = RECIPES[name]
    url = os.environ.get(variable(name, "URL"))
    if url:
        return Server(name, url, None)
    image = os.environ.get(variable(name, "IMAGE")) or recipe.image
    port = _free_port()
    tried: list[str] = []

    def found(start: Callable[[], Machine]) -> Server | None:
        try:
            started = Server(name, _filled({"": recipe.url}, port)[""], start(), port)
            started.wait()
        except Exception as why:  # whatever the client of Docker raises; it is told below
            tried.append(f"{type(why).__name__}: {why}")
            return None
        return started

    if image is None:
        tried.append("no image")
    elif no_engine():
        tried.append(no_engine())
    elif server := found(lambda: _Container(recipe, image, port)):
        return server
    if lacking := lacks(name):
        tried.append(lacking)
    elif server := found(lambda: _Process(recipe, port)):
        return server
    raise Unavailable(f"no {name} here, and {variable(name, 'URL')} is not set ({'; '.join(tried)})")


@cache
def no_engine() -> str:
    """Why there is no container to be had; empty where a Docker engine answers."""
    from testcontainers.core.docker_client import DockerClient

    found = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Docker's client leaves a socket that reached nobody to the garbage collector
        try:
            client = DockerClient().client
            client.ping()
            client.close()
        except Exception as why:  # what is not installed, not running, not allowed: each has an exception of its own
            found = f"no Docker engine answers: {why}"
        gc.collect()
    return found


def lacks(name: str) -> str:
    """Why a broker cannot be a process of this machine; empty where it can."""
    program = RECIPES[name].program
    if shutil.which(program, path=PATH) is None:
        return f"no {program} is installed"
    if program == "java" and not any(JARS.glob("kafka_*.jar")):
        return f"no jars of Kafka in {JARS}"
    return ""


def _filled(templates: Mapping[str, str], port: int, folder: Path = Path("/tmp")) -> dict[str, str]:
    above = {f"port{index}": port + index for index in range(1, PORTS)}
    return {name: value.format(port=port, folder=folder, **above) for name, value in templates.items()}


def _free_port() -> int:
    """One with free ones above it, of those that the system gives to nobody by itself.

    A client that looks for its broker at a port of that other kind may be given the very same as its own, and so find itself.
    """
    for start in random.SystemRandom().sample(range(20000, 32000, PORTS), 100):
        if all(map(_is_free, range(start, start + PORTS))):
            return start
    raise Unavailable("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _answers(port: int, hello: bytes, welcome: bytes) -> bool:
    """Whether the answer to `hello` has `welcome` in it: who only listens may not be ready, and a published port listens by itself."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.settimeout(2)
            connection.sendall(hello)
            return welcome in connection.recv(4096)
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------ the keeper


class _Keeper:
    """A process beside this one that ends what was started here when this one ends, be it by kill -9: then its pipe closes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True, cwd=Path(__file__).parent
        )

    def keep(self, kind: str, name: str) -> None:
        """To be ended: a `container`, a `group` of processes, or a `folder`."""
        self._say(f"keep {kind} {name}")

    def drop(self, kind: str, name: str) -> None:
        """It has ended: its name may be somebody else's by now."""
        self._say(f"drop {kind} {name}")

    def close(self) -> None:
        """Ends everything now."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe().close()
        self._process.wait()

    def _say(self, line: str) -> None:
        print(line, file=self._pipe(), flush=True)

    def _pipe(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin


@cache
def _keeper() -> _Keeper:
    keeper = _Keeper()
    atexit.register(keeper.close)
    return keeper


def keep() -> None:
    """The keeper's own work."""
    kept: list[tuple[str, str]] = []
    for line in sys.stdin:
        verb, kind, name = line.rstrip("\n").split(" ", 2)
        (kept.append if verb == "keep" else kept.remove)((kind, name))
    for kind, name in reversed(kept):
        match kind:
            case "container":
                from testcontainers.core.docker_client import DockerClient

                DockerClient().client.containers.get(name).remove(force=True, v=True)
            case "group":
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(name), signal.SIGKILL)
            case _:
                shutil.rmtree(name, ignore_errors=True)


if __name__ == "__main__":
    keep()
