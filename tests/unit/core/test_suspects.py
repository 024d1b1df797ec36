"""When a quarantine begins and ends, by what the receives bring."""

from __future__ import annotations

from collections import deque
from typing import cast

from msgbus.contract.adapter import Received, Receiver, Tenure
from msgbus.contract.envelope import Envelope, Priority, new_id
from msgbus.inbound.job import Job, Source
from msgbus.inbound.suspects import CALM, DOUBT, ELSEWHERE, SILENCE, SUSPECT, Suspects


def opened(level: Priority = "normal") -> Source:
    """A source whose receiver was just opened."""
    return Source(cast(Receiver, None), level, 32, 32, deque[Job]())  # None: suspects look at what came, not at who brought it


def message(crashes: int = 0, id_: str | None = None) -> Received:
    return Received(Envelope(id_ or new_id(), "work", b"", {}), None, Tenure(), crashes)


def begun(level: Priority = "normal") -> Suspects:
    """In quarantine."""
    suspects = Suspects()
    source = opened(level)
    assert suspects.turn(source, [source], [message(SUSPECT, "suspect")])
    return suspects


def test_a_receiver_that_waits_for_its_shards_ends_no_quarantine() -> None:
    """Nothing came yet since it was opened anew: the suspects are still to come. In the end nothing is waited for."""
    suspects, source = begun(), opened()
    assert [suspects.turn(source, [source], []) for _ in range(SILENCE)] == [False] * (SILENCE - 1) + [True]
    assert not suspects.quarantine


def test_the_suspects_are_through_when_nothing_more_comes() -> None:
    """After them an empty receive ends it at once."""
    suspects, source = begun(), opened()
    assert not suspects.turn(source, [source], [])
    assert not suspects.turn(source, [source], [message(SUSPECT)])
    assert suspects.turn(source, [source], [])
    assert not suspects.quarantine


def test_good_messages_in_a_row_end_it() -> None:
    """As many as `CALM`, after the last suspect."""
    suspects, source = begun(), opened()
    came = [message() for _ in range(2 * CALM)] + [message(SUSPECT, "suspect")] + [message() for _ in range(CALM)]
    assert [suspects.turn(source, [source], [one]) for one in came] == [False] * (len(came) - 1) + [True]


def test_a_suspect_that_does_not_come_again_is_not_waited_for_without_end() -> None:
    """A peer may have it, while good ones come all the time: `ELSEWHERE` of them are enough."""
    suspects, source = begun(), opened()
    assert [suspects.turn(source, [source], [message()]) for _ in range(ELSEWHERE)] == [False] * (ELSEWHERE - 1) + [True]


def test_a_level_that_had_no_suspects_is_not_waited_for() -> None:
    """Its first empty receive is enough."""
    suspects = begun("high")
    sources = [opened("high"), opened("low")]
    assert not suspects.turn(sources[1], sources, [])
    assert not suspects.turn(sources[0], sources, [message(SUSPECT)])
    assert suspects.turn(sources[0], sources, [])


def test_who_lost_its_link_believes_in_no_deaths_for_a_while() -> None:
    """Its peers' lost links are in the count of a message that it sees for the first time. Later, and in a new process, a count counts."""
    now = 0.0
    suspects = Suspects(lambda: now)
    early, late = message(9), message(9)
    suspects.link_lost()
    now = DOUBT - 1
    assert suspects.deaths(early) == 0
    now = DOUBT + 1
    assert suspects.deaths(early) == 0
    assert suspects.deaths(late) == 9
    assert Suspects().deaths(early) == 9
