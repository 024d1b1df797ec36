"""How tests get their brokers. Where one must run, a web server of Python plays it: it listens, answers, and can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from tests import brokers, conftest
from tests.brokers import RECIPES, Recipe, Unavailable

ROOT = Path(__file__).parent.parent.parent
NO_DOCKER = {"DOCKER_HOST": "tcp://127.0.0.1:1"}
WEB = Recipe(
    url="http://127.0.0.1:{port}/",
    hello=b"GET /kept HTTP/1.0\r\n\r\n",
    welcome=b"200 OK",
    ports=(80,),
    image=None,
    program="sh",
    process=f"exec '{sys.executable}' -m http.server --bind 127.0.0.1 {{port}}",
    files={"kept": "at {port}"},
)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> brokers.Server:
    """A process that answers."""
    monkeypatch.setitem(RECIPES, "web", WEB)
    monkeypatch.setattr(brokers, "_servers", {})
    return brokers.server("web")


def answers(server: brokers.Server) -> bool:
    return brokers._answers(int(server.url.rsplit(":", 1)[1].rstrip("/")), WEB.hello, WEB.welcome)


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- what is there


@pytest.mark.parametrize(
    ("variables", "required"),
    [
        ({}, False),
        ({"CI": "true"}, True),
        ({"CI": "false"}, False),
        ({"CI": ""}, False),
        ({"MSGBUS_TEST_REQUIRE_BROKERS": "1"}, True),
        ({"CI": "0", "MSGBUS_TEST_REQUIRE_BROKERS": "1"}, True),
    ],
)
def test_brokers_are_required_in_ci(variables: dict[str, str], required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable that CI systems set, or by our own."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("MSGBUS_TEST_REQUIRE_BROKERS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert brokers.required() is required


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_a_broker_that_is_missing_fails_in_ci_and_skips_elsewhere(required: str, outcome: str, tmp_path: Path) -> None:
    """No Docker, no program: the test that needs it says what was tried, and so does the line of the broker."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MSGBUS_TEST_") and name != "CI"}
    variables |= NO_DOCKER | {"PATH": str(tmp_path), "MSGBUS_TEST_REQUIRE_BROKERS": required}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/integration/redis", "-k", "test_roundtrip_empty_body"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == (1 if required else 0), done.stdout
    assert outcome in done.stdout.splitlines()[-1]
    assert "no redis-server is installed" in done.stdout
    assert f"redis: 0 passed, {int(bool(required))} failed, {int(not required)} skipped" in done.stdout


def test_a_url_of_the_environment_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names is not ours: it can be used, and not killed."""
    monkeypatch.setattr(brokers, "_servers", {})
    monkeypatch.setenv("MSGBUS_TEST_REDIS_PACKAGED_URL", "redis://elsewhere:1/3")
    server = brokers.server("redis-packaged")
    assert server.url == "redis://elsewhere:1/3"
    with pytest.raises(Unavailable, match="MSGBUS_TEST_REDIS_PACKAGED_URL names"):
        server.restart()


def test_what_ends_at_once_is_told_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not tried again by the next test."""
    tries = Recipe("", b"", b"x", (), None, "sh", "echo it has no configuration; exit 1")
    monkeypatch.setitem(RECIPES, "broken", tries)
    monkeypatch.setattr(brokers, "_servers", {})
    with pytest.raises(Unavailable, match="it has no configuration") as first:
        brokers.server("broken")
    with pytest.raises(Unavailable) as second:
        brokers.server("broken")
    assert second.value is first.value


# ---------------------------------------------------------------- what runs


def test_a_server_is_the_same_until_the_end_of_the_run(web: brokers.Server) -> None:
    """Started once, in a folder with its files."""
    assert brokers.server("web") is web
    assert answers(web)


def test_a_killed_server_comes_back_at_its_port(web: brokers.Server) -> None:
    """With kill -9 nobody listens; started again, it is where it was, with what it had."""
    web.kill()
    assert not answers(web)
    web.start()
    assert answers(web)
    web.stop()
    assert not answers(web)
    web.start()
    web.restart()
    assert answers(web)


def test_a_paused_server_keeps_its_connections_and_says_nothing(web: brokers.Server) -> None:
    """Who waits for its answer has it once the server goes on."""
    web.pause()
    with socket.create_connection(("127.0.0.1", int(web.url.rsplit(":", 1)[1].rstrip("/")))) as waiting:
        waiting.sendall(WEB.hello)
        waiting.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.recv(100)
        web.unpause()
        waiting.settimeout(10)
        assert WEB.welcome in waiting.recv(100)


CHILD = """
import sys, time
from tests import brokers
from tests.unit.test_brokers import WEB
brokers.RECIPES["web"] = WEB
print(brokers.server("web").url, brokers._servers["web"]._machine._folder, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_no_broker_behind(number: signal.Signals) -> None:
    """Not the process, not its folder: the keeper ends them."""
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        url, folder = child.stdout.readline().split()
        port = int(url.rsplit(":", 1)[1].rstrip("/"))
        assert brokers._listens(port)
        assert Path(folder).is_dir()
        child.send_signal(number)
        until(lambda: not brokers._listens(port) and not Path(folder).exists())


# ---------------------------------------------------------------- parts


def test_recipes_leave_no_gap() -> None:
    """Each place that a recipe leaves open is one that is filled; files of a process are its own folder's."""
    for recipe in RECIPES.values():
        for templates in (recipe.variables, recipe.process_variables, recipe.files, {"": recipe.process}, {"": recipe.url}):
            for filled in brokers._filled(templates, 20000, Path("/folder")).values():
                assert "{" not in filled


def test_ports_are_not_among_those_that_the_system_gives_out() -> None:
    """A client that looks for a broker that is away could otherwise be given the broker's port as its own, and find itself."""
    port = brokers._free_port()
    assert port + 3 < 32768
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        assert not brokers._is_free(port)


@pytest.mark.parametrize(("says", "ready"), [(b"+PONG\r\n", True), (b"-LOADING\r\n", False), (b"", False)])
def test_ready_is_who_answers_as_expected(says: bytes, ready: bool) -> None:
    """Not who listens: a published port does that by itself, and a broker that loads its data says no."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        assert brokers._answers(listening.getsockname()[1], b"PING\r\n", b"+PONG") is ready
        thread.join(10)


def test_programs_are_also_found_where_debian_hides_them() -> None:
    """What is on nobody's path is not installed."""
    assert shutil.which("sh", path=brokers.PATH)
    assert brokers.lacks("redis") == ("" if shutil.which("redis-server") else "no redis-server is installed")


def report(
    name: str,
    when: Literal["setup", "call", "teardown"],
    outcome: Literal["passed", "failed", "skipped"],
    why: str = "",
    test: str = "t",
) -> pytest.TestReport:
    longrepr = ("file", 1, f"Skipped: {why}") if outcome == "skipped" else None
    properties: list[tuple[str, object]] = [("broker", name)] if name else []
    return pytest.TestReport(test, ("file", 1, test), {}, outcome, longrepr, when, user_properties=properties)


def test_the_summary_has_a_line_a_broker() -> None:
    """A test whose clean-up fails too has failed once; reasons to skip are counted."""
    reports = [
        report("redis", "setup", "passed", test="a"),
        report("redis", "call", "passed", test="a"),
        report("redis", "call", "failed", test="b"),
        report("redis", "teardown", "failed", test="b"),
        report("redis", "call", "skipped", "the adapter does not claim PRIORITIES", test="c"),
        report("redis", "call", "skipped", "the adapter does not claim PRIORITIES", test="d"),
        report("kafka", "setup", "failed", test="e"),
        report("", "call", "passed", test="f"),
    ]
    assert list(conftest.by_broker(reports)) == [
        "kafka: 0 passed, 1 failed, 0 skipped",
        "redis: 1 passed, 1 failed, 2 skipped",
        "    2 skipped: the adapter does not claim PRIORITIES",
    ]
