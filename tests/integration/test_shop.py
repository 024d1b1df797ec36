"""The example of three services: nothing is lost or done twice, whatever is killed, and its README says what works."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from examples.shop.places import free_port
from sqlalchemy import create_engine, text
from tests.brokers import Server
from tests.unit.sql.databases import database
from tests.unit.test_docs import blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "examples" / "shop" / "README.md"

pytestmark = pytest.mark.timeout(240)


def shop(folder: Path, **variables: str) -> dict[str, list[str]]:
    """Runs a small one; the cells of its table a part. It says itself whether all is well, and its logs are in the folder."""
    command = [sys.executable, "-m", "examples.shop", "--orders", "20", "--seconds", "6", "--kills", "1", "--folder", str(folder)]
    with subprocess.Popen(
        command, env={**without_settings(), **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as running:
        try:
            said, _ = running.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            running.terminate()  # and with it its parts
            said, _ = running.communicate()
    assert running.returncode == 0, "\n".join([said, *(f"{log}:\n{log.read_text()}" for log in folder.rglob("*.log"))])
    assert "every order is invoiced and shipped, once, in the order bought" in said
    lines = [re.findall(r"[\w–]+", line) for line in said.splitlines() if line.startswith("│")]
    return {words[0]: words[1:] for words in lines}


def without_settings() -> dict[str, str]:
    """The environment, away from any settings."""
    return {name: value for name, value in os.environ.items() if name not in ("MSGBUS_URL", "MSGBUS_NAMESPACE", "DATABASE_URL")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker(name)) for name in ("redis", "kafka", "rabbitmq")])
def test_a_shop_that_is_killed_reconciles(name: str, running: Server, tmp_path: Path) -> None:
    """Each part is killed while customers buy: every order is invoiced and shipped once, in its customer's order, in SQLite."""
    cells = shop(tmp_path, MSGBUS_URL=running.url)
    assert [cells[part][:2] for part in ("orders", "billing", "shipping")] == [["orders", "20"], ["invoices", "20"], ["shipments", "20"]]
    assert {part: row[-1] for part, row in cells.items() if part in ("orders", "relay", "billing", "shipping")} == {
        "orders": "1",
        "relay": "1",
        "billing": "1",
        "shipping": "1",
    }
    assert int(cells["billing"][-2]) >= 10, "what the demo publishes once more is recognised"


@pytest.mark.broker("redis")
def test_it_reconciles_on_postgresql(running: Server, tmp_path: Path) -> None:
    """The same with a database of PostgreSQL for each service; none of them is left."""
    place = database("postgresql", tmp_path).url
    cells = shop(tmp_path, MSGBUS_URL=running.url, DATABASE_URL=place.render_as_string(hide_password=False))
    assert cells["shipping"][:2] == ["shipments", "20"]
    engine = create_engine(place.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        assert list(connection.scalars(text("SELECT datname FROM pg_database WHERE datname LIKE 'shop\\_%'"))) == []
    engine.dispose()


@pytest.mark.broker("redis-packaged")  # the program is there, then
def test_without_a_broker_it_kills_one_of_its_own(tmp_path: Path) -> None:
    """With nothing set, a Redis is started and killed like the rest, and loses nothing that it confirmed."""
    assert shop(tmp_path)["redis"][-1] == "1"


@contextmanager
def running_by_hand(command: str, folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """A command of the README, as it stands there, in a folder of its own."""
    words = shlex.split(command)
    program = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(program, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(40)


@pytest.mark.broker("redis")
def test_the_readme_by_hand(running: Server, tmp_path: Path) -> None:
    """Its four commands are the shop; its request, sent twice, buys once, and nothing else by the same key; `msgbus` answers."""
    port = str(free_port())  # 8000 may be somebody's
    by_hand = [block.text.replace("8000", port).splitlines() for block in blocks(README) if "uvicorn" in block.text or "curl" in block.text]
    services, (curl, *questions) = by_hand
    variables = {
        **without_settings(),
        "MSGBUS_URL": running.url,
        "MSGBUS_NAMESPACE": f"t{os.urandom(4).hex()}.",
        "PYTHONPATH": str(ROOT),
    }
    words = shlex.split(curl)
    url, header, body = words[1], words[words.index("-H") + 1].split(": "), json.loads(words[words.index("--json") + 1])
    with ExitStack() as stack:
        for command in services:
            stack.enter_context(running_by_hand(command, tmp_path, variables))
        deadline = time.monotonic() + 60
        answers: list[httpx.Response] = []
        while len(answers) < 2 and time.monotonic() < deadline:
            try:
                answers.append(httpx.post(url, json=body, headers=dict([header])))
            except httpx.TransportError:
                time.sleep(0.1)  # then it tries again
        assert [answer.status_code for answer in answers] == [201, 200], (tmp_path / "log").read_text()
        assert answers[0].json() == answers[1].json()
        other = httpx.post(url, json={**body, "cents": 1}, headers=dict([header]))
        assert (other.status_code, other.json()["detail"]) == (422, "this Idempotency-Key came before, with another purchase")
        while not (found := shipments(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found == [(answers[0].json()["order_id"], "ann", "tea", 350)], (tmp_path / "log").read_text()
        for question in questions:
            asked = subprocess.run([sys.executable, "-m", *shlex.split(question)], cwd=tmp_path, env=variables, check=False)
            assert asked.returncode == 0, question


def shipments(folder: Path) -> list[tuple[object, ...]]:
    try:
        with sqlite3.connect(folder / "shop-shipping.db") as connection:
            return list(connection.execute("SELECT order_id, customer, item, cents FROM shipments"))
    except sqlite3.OperationalError:  # shipping has not begun
        return []
    finally:
        connection.close()
