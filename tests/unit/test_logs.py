"""Client libraries are quiet unless a program wants to hear them."""

from __future__ import annotations

import logging
from collections.abc import Generator

import pytest

from msgbus.contract.logs import quieten


@pytest.fixture
def library() -> Generator[logging.Logger, None, None]:
    """A library's logger that nobody has given a level, in a program that warns; it is as it was afterwards."""
    root, logger = logging.getLogger(), logging.getLogger("a_library_of_this_test")
    before = root.level
    root.setLevel(logging.WARNING)
    yield logger
    root.setLevel(before)
    logger.setLevel(logging.NOTSET)


def test_it_is_quiet(library: logging.Logger) -> None:
    """And so are its parts."""
    quieten(library.name)
    assert not library.isEnabledFor(logging.ERROR)
    assert not library.getChild("part").isEnabledFor(logging.ERROR)


def test_who_gives_it_a_level_hears_it(library: logging.Logger) -> None:
    """Before or afterwards."""
    library.setLevel(logging.INFO)
    quieten(library.name)
    assert library.isEnabledFor(logging.INFO)
    library.setLevel(logging.NOTSET)
    quieten(library.name)
    library.setLevel(logging.ERROR)
    assert library.isEnabledFor(logging.ERROR)


def test_who_debugs_hears_it(library: logging.Logger) -> None:
    """All of it."""
    logging.getLogger().setLevel(logging.DEBUG)
    quieten(library.name)
    assert library.isEnabledFor(logging.DEBUG)
