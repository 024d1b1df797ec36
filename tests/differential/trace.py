"""Traces: what a user can observe of a program, as data that can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import cast

Run = tuple[int, int]
"""A message's number, and which run of the handler for it."""


@dataclass(frozen=True)
class GroupTrace:
    """What one group did."""

    runs: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """By message: the attempts of the runs that ended, sorted; each once where a repetition is allowed."""
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """By key: messages as they were completed first, of those whose order is promised."""
    sequence: Mapping[str, tuple[Run, ...]] = field(default_factory=dict[str, tuple[Run, ...]])
    """By key: all runs before any redrive in the order they ended, of those whose order is promised, where nothing may be repeated."""
    dead: Mapping[int, tuple[tuple[str, int, int], ...]] = field(default_factory=dict[int, tuple[tuple[str, int, int], ...]])
    """By message: reason, attempts, redrives of each of its dead letters; redrives are -1 where a repetition is allowed."""
    left: int = 0
    """Messages that the broker still has for it in the end."""
    overlaps: tuple[str, ...] = ()
    """Runs of one key that overlapped in one process, where it is ordered."""


@dataclass(frozen=True)
class Trace:
    """Of a whole program."""

    groups: Mapping[str, GroupTrace]
    early: tuple[int, ...] = ()
    """Messages that were run before their delay was over."""
    problems: tuple[str, ...] = ()
    """What kept the program from going through."""


def differences(observed: Trace, expected: Trace) -> list[str]:
    """In words, one line each; empty where they are equal."""
    lines = list(observed.problems)
    if observed.early:
        lines.append(f"run before their delay was over: {list(observed.early)}")
    for name in expected.groups:
        mine, wanted = observed.groups[name], expected.groups[name]
        for one in fields(GroupTrace):
            was, should = getattr(mine, one.name), getattr(wanted, one.name)
            if isinstance(was, Mapping):
                lines += _of_tables(f"{name}, {one.name}", cast("Mapping[object, object]", was), should)
            elif was != should:
                lines.append(f"{name}, {one.name}: {was}, expected {should}")
    return lines


def _of_tables(what: str, was: Mapping[object, object], should: Mapping[object, object]) -> Iterable[str]:
    for entry in sorted({*was, *should}, key=str):
        if was.get(entry) != should.get(entry):
            yield f"{what} of {entry}: {was.get(entry, 'nothing')}, expected {should.get(entry, 'nothing')}"
