"""What an adapter's client library logs beside what msgbus says itself."""

from __future__ import annotations

import logging


def quieten(name: str) -> None:
    """For a library that logs each lost link, refusal and try of its own, which msgbus raises, or logs once. A program that gives this
    logger a level, or wants to see what is debugged, keeps what it says."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET and not logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.CRITICAL)
