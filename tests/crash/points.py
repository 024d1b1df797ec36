"""The fourteen points at which a process, or its database, can fail between a transaction and a broker, and what must come of each."""

from __future__ import annotations

import os
from typing import NamedTuple


class Point(NamedTuple):
    """A row of the table in docs/outbox.md: where the failure is, and what comes of it."""

    where: str
    outcome: str


POINTS = {
    "P1": Point("before the commit", "no row, no message"),
    "P2": Point("after the commit, before a relay has the row", "sent after the restart"),
    "P3": Point("a relay has claimed the row and not sent it", "sent when the `lease` is over"),
    "P4": Point("the broker has stored it, and the relay does not know", "sent twice, with the same id"),
    "P5": Point("it is confirmed and not yet marked", "sent twice, with the same id"),
    "P6": Point("a relay stands still past its `lease`, and goes on", "its late mark changes nothing; what it was at is sent twice"),
    "P7": Point("the database goes away after the publish", "as P5; `health` is degraded, and the database is asked seldom"),
    "P8": Point("amid the cleaning", "the next one goes on"),
    "Q1": Point("before the inbox row", "delivered again, runs once"),
    "Q2": Point("after the inbox row, before the commit", "rolled back, delivered again: one effect"),
    "Q3": Point("after the commit, before the ack", "delivered again and not run: one effect"),
    "Q4": Point("after an effect outside the store's transaction, before it is remembered", "runs again when the `lease` is over"),
    "Q5": Point("a dead letter or retry is stored, its original not acked", "stored twice, with the same id: one effect"),
    "Q6": Point("the inbox row has expired before a redrive", "too old to be redriven; with `force` it runs again"),
}

PLACES = (
    ("postgresql", "redis"),
    ("mysql", "redis"),
    ("sqlite", "redis"),
    ("postgresql", "rabbitmq"),
    ("postgresql", "kafka"),
)
"""Databases and brokers. The first is where all tests have them; `make crash` has all five."""

ASKED_FOR = bool(os.environ.get("MSGBUS_TEST_CRASH"))
"""All places, and a run in which one of the cells has not passed has failed."""
