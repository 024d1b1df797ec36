"""What an open adapter does for its receivers."""

from __future__ import annotations

import logging
import time

from msgbus.contract.adapter import AdapterSettings, ReceiverSpec
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable
from msgbus_redis import names, scripts
from msgbus_redis.connections import Command, Links, script
from msgbus_redis.names import Layout
from msgbus_redis.sending import Sender

log = logging.getLogger("msgbus.redis")

TIDY = 1.0
"""Seconds between trims where there is something to trim."""
IDLE_TIDY = 30.0
"""Seconds between trims where nothing was acked here."""


class Services:
    """Of one open adapter."""

    def __init__(self, links: Links, sender: Sender, settings: AdapterSettings) -> None:
        self.links = links
        self.sender = sender
        self.settings = settings
        self.lost_tokens: dict[tuple[str, str, str], list[str]] = {}
        """Whose leases in this process were not given back: the next receiver of the topic, group and level goes on with them."""
        self._tidied: dict[tuple[str, str | None], float] = {}

    def is_time_to_tidy(self, topic: str, group: str | None, something: bool) -> bool:
        """Whether one of the receivers of a group should trim now."""
        now = time.monotonic()
        if now - self._tidied.get((topic, group), 0.0) < (TIDY if something else IDLE_TIDY):
            return False
        self._tidied[topic, group] = now
        return True

    def data_loss(self, what: str) -> None:
        """Says that somebody else destroyed messages."""
        log.error("data loss suspected: %s", what)

    async def revive(self, layout: Layout, spec: ReceiverSpec) -> None:
        """A group has vanished under its receiver. Dropped by an operator: `BrokerUnavailable`. By a FLUSHALL, a DEL: it is made again,
        at the beginning, so that what was sent since is not missed."""
        if spec.group is None:
            return
        what = f"group {spec.group!r} of topic {spec.topic!r}"
        command = declare_group(layout, spec.group, spec.start, "revive", self.settings)
        (answer,) = await self.links.run(layout.base, command, what=what)
        if answer[0] == b"dropped":
            raise BrokerUnavailable(f"{what} was dropped")
        if answer[0] != b"ok":
            raise BrokerUnavailable(f"{what}: {answer!r}")
        self.data_loss(f"{what} had vanished, and was made again")


def declare_group(layout: Layout, group: str, start: str, mode: str, settings: AdapterSettings) -> Command:
    """Makes a group of all the topic's streams, or looks for it."""
    parts = layout.parts()
    keys = [names.meta(layout.topic), *parts, *(names.retry(part, group) for part in parts)]
    return script(scripts.DECLARE_GROUP, keys, [mode, group, start, layout.kind, int(settings.first_group_retention * 1000)])


def went_back(envelope: Envelope) -> BrokerUnavailable:
    """The outcome of forwarding what is no longer ours."""
    return BrokerUnavailable(f"the delivery of {envelope.id!r} to forward went back to its group before, or was settled")
