"""`msgbus dead`: list, show, redrive, purge, on dead letters that a real run left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.unit.cli.conftest import Invoke, Said, Write

from msgbus import Bus, Topic
from msgbus.cli.loading import load_bus

orders = Topic("orders", bytes, content_type="application/json")


@dataclass
class Dead:
    """The dead letters of `shop`'s group: 3 that its handler rejected, 2 that did not fit."""

    url: str
    invoke: Invoke
    rejected: list[str] = field(default_factory=list[str])
    invalid: list[str] = field(default_factory=list[str])

    def __call__(self, command: str, *options: str, width: int = 140, answers: str | None = None) -> Said:
        return self.invoke("dead", command, "shop", "--url", self.url, *options, width=width, answers=answers)

    def left(self, *options: str) -> list[str]:
        """Ids, oldest first."""
        said = self("list", "--json", *options)
        assert said.code == 0, said.err
        return [json.loads(line)["id"] for line in said.out.splitlines()]


async def all_dead(bus: Bus) -> None:
    """Until the group has given up on all five."""
    deadline = time.monotonic() + 10
    while await bus.dead_letters("orders", group="billing").count() != 5:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture
def dead(shop: None, url: str, invoke: Invoke) -> Dead:
    """What a run of the program gave up on."""
    made = Dead(url, invoke)

    async def run() -> None:
        bus = load_bus("shop")
        bus.use_url(url)
        async with bus.running(), Bus(url, service="feed") as feed:
            for number in range(3):
                body = b'{"order_id": "%d", "amount": -1}' % number
                made.rejected.append((await feed.publish(orders, body, headers={"tenant": "a"})).id)
            for body in (b"not json", b"\xff\xfe"):
                made.invalid.append((await feed.publish(orders, body)).id)
            await all_dead(bus)

    asyncio.run(run())
    return made


def test_list_is_a_table_of_them(dead: Dead) -> None:
    """Id, reason, error, attempts, when; markup in an error is text; topic and group are the only ones there are."""
    said = dead("list")
    assert said.code == 0, said.err
    for words in (*dead.rejected, *dead.invalid, "rejected", "invalid", "no [bold]negative[/bold] amounts", "5 of 5"):
        assert words in said.out


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_the_terminal(width: int, dead: Dead) -> None:
    """Ids stay whole: they are there to be copied."""
    said = dead("list", width=width)
    assert max(map(len, said.out.splitlines())) <= width
    assert all(identity in said.out for identity in dead.rejected)


def test_list_in_json_is_a_line_each_with_everything(dead: Dead) -> None:
    """The body as text where it is UTF-8, else in base64."""
    letters = [json.loads(line) for line in dead("list", "--json").out.splitlines()]
    by_id = {letter["id"]: letter for letter in letters}
    first = by_id[dead.rejected[0]]
    assert (first["reason"], first["attempts"], first["headers"], first["redrives"]) == ("rejected", 1, {"tenant": "a"}, 0)
    assert (json.loads(first["body"]), first["body_encoding"]) == ({"order_id": "0", "amount": -1}, "utf-8")
    assert first["record"]["handler"] == "invoice"
    broken = by_id[dead.invalid[1]]
    assert (broken["reason"], broken["body"], broken["body_encoding"]) == ("invalid", "//4=", "base64")


def test_list_takes_a_reason_ids_and_a_limit(dead: Dead) -> None:
    """`--limit` counts those that fit, and a table that was cut says so."""
    assert sorted(dead.left("--reason", "invalid")) == sorted(dead.invalid)
    assert dead.left("--id", dead.rejected[1]) == [dead.rejected[1]]
    assert len(dead.left("--reason", "rejected", "--limit", "2")) == 2
    assert "2 of 5; more with --limit" in dead("list", "--limit", "2").out
    assert "no dead letters that fit" in dead("list", "--reason", "poison").out


def test_an_unknown_reason_or_a_limit_of_nothing_is_wrong_usage(dead: Dead) -> None:
    """Exit 2, before anything is opened."""
    for options in (("--reason", "bad-luck"), ("--limit", "0")):
        said = dead("list", *options)
        assert (said.code, said.out) == (2, "")


def test_show_prints_the_record_and_the_body(dead: Dead) -> None:
    """JSON is pretty, what is no JSON is text, and what is no text is shown as bytes."""
    said = dead("show", "--id", dead.rejected[0])
    assert said.code == 0, said.err
    for words in ("first-published-at", "traceback-digest", "billing", "tenant", '"amount": -1', "no [bold]negative[/bold] amounts"):
        assert words in said.out
    assert "not json" in dead("show", "--id", dead.invalid[0]).out
    assert r"b'\xff\xfe'" in dead("show", "--id", dead.invalid[1]).out
    assert json.loads(dead("show", "--id", dead.rejected[0], "--json").out)["id"] == dead.rejected[0]


def test_show_of_an_id_that_is_not_there(dead: Dead) -> None:
    """Exit 1, and nothing on stdout."""
    said = dead("show", "--id", "nobody")
    assert (said.code, said.out) == (1, "")
    assert "no dead letter 'nobody'" in said.err


def test_redrive_sends_back_those_chosen(dead: Dead) -> None:
    """A dry run only counts; a limit counts those sent; the rest stays."""
    assert dead("redrive", "--dry-run").out == "5 would be sent back\n"
    assert len(dead.left()) == 5
    assert dead("redrive", "--reason", "rejected", "--limit", "1").out == "1 sent back\n"
    assert dead("redrive", "--id", dead.invalid[0], "--rate", "1000").out == "1 sent back\n"
    assert len(dead.left()) == 3
    assert json.loads(dead("redrive", "--json").out) == {"dry_run": False, "redriven": 3, "left": 0}
    assert dead.left() == []
    (group,) = json.loads(dead.invoke("groups", "list", "shop", "--url", dead.url, "--json").out)
    assert (group["ready"] + group["delayed"], group["dead"]) == (5, 0)


def test_what_was_sent_back_three_times_stays_unless_forced(dead: Dead) -> None:
    """It says how many stayed, and how to send them all the same."""

    async def fail_again() -> None:
        bus = load_bus("shop")
        bus.use_url(dead.url)
        async with bus.running():
            await all_dead(bus)

    for _ in range(3):
        assert dead("redrive").out == "5 sent back\n"
        asyncio.run(fail_again())
    said = dead("redrive")
    assert said.code == 0
    assert said.out.startswith("0 sent back\n5 left where they are")
    assert dead("redrive", "--force").out == "5 sent back\n"


@pytest.mark.parametrize("command", ["redrive", "purge"])
def test_an_id_that_is_no_dead_letter_is_a_failure(command: str, dead: Dead) -> None:
    """Exit 1: a script that names one wants it gone."""
    said = dead(command, "--id", "nobody", *(["--yes"] if command == "purge" else []))
    assert (said.code, said.out) == (1, "")
    assert "of the 1 ids given, 0 are dead letters here" in said.err
    assert len(dead.left()) == 5


def test_purge_asks_and_takes_no_for_an_answer(dead: Dead) -> None:
    """The question says how many, of what; nobody there to answer is a no. Exit 1, nothing done."""
    for answers in ("n\n", ""):
        said = dead("purge", answers=answers)
        assert said.code == 1
        assert "Discard 5 dead letters of topic 'orders', group 'billing' for good?" in said.err
    assert len(dead.left()) == 5


def test_purge_discards_those_chosen(dead: Dead) -> None:
    """A dry run only counts; with a reason those alone; then all of them."""
    assert dead("purge", "--dry-run").out == "5 would be discarded\n"
    assert dead("purge", "--reason", "invalid", "--yes").out == "2 discarded\n"
    assert sorted(dead.left()) == sorted(dead.rejected)
    said = dead("purge", answers="y\n")
    assert said.code == 0, said.err
    assert said.out.endswith("3 discarded\n")
    assert json.loads(dead("purge", "--json").out) == {"dry_run": False, "purged": 0}
    assert dead("list").out == "no dead letters\n"


def test_a_group_that_never_was_has_no_dead_letters_to_list(dead: Dead) -> None:
    """Exit 1: a mistyped group must not look like an empty one."""
    said = dead("list", "--topic", "orders", "--group", "biling")
    assert (said.code, said.out) == (1, "")
    assert "no such group was ever declared" in said.err


def test_with_several_subscriptions_the_choices_are_listed(write: Write, invoke: Invoke, url: str) -> None:
    """One of the two options may still be enough."""
    write(
        "many",
        """
        from msgbus import Bus
        bus = Bus(service="billing")

        @bus.subscribe("orders")
        async def first(order: dict) -> None: ...

        @bus.subscribe("orders", name="second")
        async def second(order: dict) -> None: ...

        @bus.subscribe("refunds")
        async def third(order: dict) -> None: ...
        """,
    )
    said = invoke("dead", "list", "many", "--url", url)
    assert said.code == 1
    for choice in ("--topic orders --group billing\n", "--topic orders --group billing-second\n", "--topic refunds --group billing\n"):
        assert choice in said.err
    assert "no such group was ever declared" in invoke("dead", "list", "many", "--url", url, "--topic", "refunds").err
    assert "no subscription of this program fits --topic refnds" in invoke("dead", "list", "many", "--url", url, "--topic", "refnds").err


def test_a_look_at_dead_letters_declares_nothing(shop: None, invoke: Invoke, url: str) -> None:
    """Not even the program's own destination: twice the same answer."""
    for _ in range(2):
        said = invoke("dead", "list", "shop", "--url", url)
        assert said.code == 1
        assert "no such group was ever declared" in said.err


FILLED = """
    import asyncio
    from msgbus import Bus, Reject, Topic

    orders = Topic("orders", dict)

    def make():
        bus = Bus("memory://filled", service="billing")

        @bus.subscribe(orders)
        async def invoice(order: dict) -> None:
            raise Reject("no")

        return bus

    async def fill():
        bus = make()
        async with bus.running():
            await bus.publish_many(orders, ({"number": number} for number in range(60)))
            while await bus.dead_letters(orders, group="billing").count() != 60:
                await asyncio.sleep(0.01)

    asyncio.run(fill())
    bus = make()
    print("filled", flush=True)
"""


def test_ctrl_c_stops_a_redrive_and_says_what_became_of_it(here: Path, write: Write) -> None:
    """Exit 130; what was sent is sent, the rest is where it was: no traceback."""
    write("filled", FILLED)
    command = [sys.executable, "-m", "msgbus", "dead", "redrive", "filled", "--rate", "0.1"]
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while "lives in one process" not in (line := process.stderr.readline()):  # the last word before the work begins
                assert line, "it ended before it was interrupted"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
