"""The history checker: it finds what was lost, repeated or out of order, and nothing where there is nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgbus.testing.history import Event, History, How, Inversion, Overlap, Report, check

GROUPS = ("billing", "audit")


def good(seed: int, messages: int) -> list[Event]:
    """A run as the contract wants it: keys published in order, two groups, handlers that overlap over keys and never within one, some
    runs that fail and come again, some messages that end dead, some that expire."""
    chance = random.Random(seed)
    events: list[Event] = []
    now = 0.0
    queue: list[Event] = []
    for number in range(messages):
        key = f"k{chance.randrange(3)}"
        message = Event(now, "publisher", "publish", "invoke", f"m{number}", key, number)
        events.append(message)
        queue.append(message)
        now += 1
        events.append(replace(message, ts=now, type="ok"))
        now += 1
    for group in GROUPS:
        lanes: dict[str, list[Event]] = {}
        for message in queue:
            lanes.setdefault(message.key or "", []).append(message)
        steps = {key: iter(steps_of(lane, group, chance)) for key, lane in lanes.items()}
        while steps:
            key = chance.choice(sorted(steps))
            event = next(steps[key], None)
            if event is None:
                del steps[key]
                continue
            now += 1
            events.append(replace(event, ts=now))
    return events


def steps_of(lane: list[Event], group: str, chance: random.Random) -> list[Event]:
    """What one key's messages go through in a group, one after the other."""
    steps: list[Event] = []
    for message in lane:
        base = replace(message, pid=f"{group}-worker", group=group, type="ok")
        if chance.random() < 0.1:
            steps.append(replace(base, f="gone"))
            continue
        attempt = 1
        while chance.random() < 0.2:
            steps += [replace(base, f="start", attempt=attempt), replace(base, f="fail", attempt=attempt)]
            attempt += 1
        if chance.random() < 0.1:
            steps.append(replace(base, f="dlq", attempt=attempt))
        else:
            steps += [replace(base, f="start", attempt=attempt), replace(base, f="done", attempt=attempt)]
    return steps


runs = st.builds(good, st.integers(0, 2**32), st.integers(1, 25))


def checked(events: list[Event]) -> Report:
    return check(History(events), groups=GROUPS)


@settings(deadline=None)
@given(runs)
def test_a_good_run_has_no_problem(events: list[Event]) -> None:
    """Whatever the interleaving, the retries, the dead letters and what expired."""
    report = checked(events)
    assert report.ok, report.problems
    assert report.duplicates == 0
    assert not report.recovered
    random.Random(0).shuffle(events)  # files of several processes come in any order: the clock decides
    assert checked(events) == report


@settings(deadline=None)
@given(runs, st.data())
def test_a_completion_that_is_missing_is_a_loss(events: list[Event], data: st.DataObject) -> None:
    """Of that message, in that group, and of nothing else."""
    ends = [event for event in events if event.f in ("done", "dlq", "gone")]
    missing = data.draw(st.sampled_from(ends))
    report = checked([event for event in events if event is not missing])
    assert report.lost == {(missing.group, missing.id)}
    assert any(problem.startswith("1 lost") for problem in report.problems)


@settings(deadline=None)
@given(runs, st.data())
def test_two_completions_of_a_key_that_changed_places_are_an_inversion(events: list[Event], data: st.DataObject) -> None:
    """Both of first runs, in one group."""
    done = [event for event in events if event.f == "done"]
    pairs = [
        (first, second)
        for first in done
        for second in done
        if (first.group, first.key) == (second.group, second.key) and first is not second
    ]
    if not pairs:
        return
    first, second = data.draw(st.sampled_from(pairs))
    swapped = [replace(event, ts=second.ts if event is first else first.ts if event is second else event.ts) for event in events]
    report = checked(swapped)
    assert report.inversions
    assert {inversion.key for inversion in report.inversions} == {first.key}
    assert not report.lost


@settings(deadline=None)
@given(runs, st.data())
def test_each_kind_of_wrong_is_seen(events: list[Event], data: st.DataObject) -> None:
    """Unexpected, aborted, recovered and duplicates are told apart."""
    done = [event for event in events if event.f in ("done", "dlq")]
    if not done:
        return
    one = data.draw(st.sampled_from(done))
    name = {(group, one.id) for group in GROUPS if any((event.group, event.id) == (group, one.id) for event in done)}
    without = [event for event in events if not (event.f == "publish" and event.id == one.id)]
    assert checked(without).unexpected == name
    refused = [
        replace(event, type="fail") if event.f == "publish" and event.type == "ok" and event.id == one.id else event for event in events
    ]
    assert checked(refused).aborted == name
    unknown = [
        replace(event, type="info") if event.f == "publish" and event.type == "ok" and event.id == one.id else event for event in events
    ]
    report = checked(unknown)
    assert report.recovered == name
    assert report.ok
    assert report.unknown == 1
    cut_off = [event for event in events if not (event.f == "publish" and event.type == "ok" and event.id == one.id)]
    assert checked(cut_off).recovered == name, "a publisher that died in the middle of its call"
    twice = [*events, replace(one, ts=1e9)]
    assert checked(twice).duplicates == 1
    assert not checked(twice).ok
    assert check(History(twice), groups=GROUPS, incidents=1, window=1).ok


@settings(deadline=None)
@given(runs)
def test_written_and_read_it_is_the_same(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> None:
    """Also over several files, as several processes write them."""
    folder = tmp_path_factory.mktemp("history")
    parts = [History(events[::2]), History(events[1::2])]
    paths = [folder / f"{number}.jsonl" for number in range(2)]
    for part, path in zip(parts, paths, strict=True):
        part.write(path)
    assert list(History.read(*paths)) == list(History(events))


def test_the_line_that_a_process_died_with_is_left_out(tmp_path: Path) -> None:
    """What is no event, anywhere else, is named by file and line."""
    path = tmp_path / "one.jsonl"
    History([Event(1.0, "a", "done", "ok", "m1", group="g")]).write(path)
    whole = path.read_text()
    path.write_text(whole + '{"ts": 2.0, "pid": "a", "f": "do')
    assert len(History.read(path)) == 1
    for broken in ("no json\n", '{"ts": 2.0, "pid": "a", "f": "dance", "type": "ok", "id": "m"}\n', '{"colour": "red"}\n', "[]\n"):
        path.write_text(whole + broken)
        with pytest.raises(ValueError, match=r"one\.jsonl:2: "):
            History.read(path)


@pytest.mark.parametrize("then", ["ok", "info"])
def test_refused_and_published_again_is_not_aborted(then: How) -> None:
    """The second call of one id decides: it was, or may have been, stored."""
    events = [Event(float(number), "p", "publish", how, "m") for number, how in enumerate(("invoke", "fail", "invoke", then))]
    report = check(History([*events, Event(9.0, "w", "done", "ok", "m", group="g")]))
    assert report.ok
    assert report.recovered == (set() if then == "ok" else {("g", "m")})


def test_a_replayed_suffix_is_no_inversion() -> None:
    """C4 speaks of first completions: after a death a new owner may repeat what was done."""
    done = [Event(float(number), "a", "done", "ok", f"m{seq}", "k", seq, "g") for number, seq in enumerate([1, 2, 3, 2, 3, 4])]
    report = check(History(done), incidents=1, window=2)
    assert report.inversions == ()
    assert report.duplicates == 2
    assert report.allowed_duplicates == 2


def test_an_inversion_says_what_came_after_what() -> None:
    """One line for each message that came too late."""
    done = [Event(float(number), "a", "done", "ok", f"m{seq}", "k", seq, "g") for number, seq in enumerate([1, 4, 2, 3, 5])]
    assert check(History(done)).inversions == (Inversion("g", "k", 2, 4), Inversion("g", "k", 3, 4))


def test_runs_of_a_key_in_one_process_must_not_overlap() -> None:
    """In two processes they may, where a paused one comes back; a run that was cut off has ended."""

    def at(ts: float, f: str, id: str, pid: str = "p1", type: str = "ok") -> Event:
        return Event(ts, pid, f, type, id, "k", 1, "g")  # type: ignore[arg-type]  # texts of the two Literals

    assert check(History([at(1, "start", "a"), at(2, "start", "b"), at(3, "done", "a"), at(4, "done", "b")])).overlaps == (
        Overlap("p1", "g", "k", "a", "b"),
    )
    assert not check(History([at(1, "start", "a"), at(2, "start", "b", "p2"), at(3, "done", "a"), at(4, "done", "b", "p2")])).overlaps
    assert not check(History([at(1, "start", "a"), at(2, "fail", "a", type="info"), at(3, "start", "b"), at(4, "done", "b")])).overlaps
    assert check(History([at(1, "start", "a"), at(2, "start", "a")])).overlaps, "two runs of the same message"


def test_a_group_that_got_nothing_has_lost_everything() -> None:
    """It is named by the caller: the history alone does not know of it."""
    history = History([Event(0.0, "p", "publish", "invoke", "m"), Event(1.0, "p", "publish", "ok", "m")])
    assert check(history).ok
    assert check(history, groups=["g"]).lost == {("g", "m")}
    assert check(History(), remaining=2).problems == ("2 messages were left at the broker",)


def test_the_report_counts_everything() -> None:
    """Printed after every stress test, so that a run which did nothing is seen to have done nothing."""
    text = str(check(History(good(7, 10)), groups=GROUPS))
    for name in (
        "confirmed 10",
        "lost 0",
        "unexpected 0",
        "aborted 0",
        "recovered 0",
        "duplicates 0 of 0 allowed",
        "inversions 0",
        "overlaps 0",
    ):
        assert name in text
