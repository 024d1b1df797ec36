"""Sending: envelopes of one topic are one script, which also recognises what was sent before; durability is waited for behind it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from redis import exceptions as client

from msgbus.contract.adapter import AdapterSettings, SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerError, BrokerUnavailable, MessageTooLarge, PublishRejected, PublishUnknown
from msgbus_redis import names, scripts
from msgbus_redis.connections import Command, Links, script
from msgbus_redis.errors import send_error, words
from msgbus_redis.names import Layout
from msgbus_redis.wire import fields_of

CHUNK = 256
CHUNK_BYTES = 4 * 1024 * 1024
"""Messages, and bytes of bodies, that one script writes: other clients wait meanwhile."""
SEEN_FOR = 120.0
"""Seconds for which a second send of an id to a topic is at least recognised."""

TRIM = 60.0
"""Seconds between a sender's trims of a topic."""

_nonces = count()
_process = os.urandom(6).hex()


def nonce() -> str:
    """Makes equal delayed envelopes two."""
    return f"{_process}{next(_nonces)}"


def trim(layout: Layout, group: str | None, settings: AdapterSettings) -> Command:
    """Drops from a topic's streams, and a group's own, what all groups are done with, and what is too old."""
    parts = layout.parts()
    own = [names.retry(part, group) for part in parts] if group is not None else []
    keys = [names.meta(layout.topic), names.private(layout.topic), *parts, *own]
    old = settings.dead_letter_retention if layout.kind == "dead" else None
    first, lag = int(settings.first_group_retention * 1000), int(settings.lease * 1000)
    return script(scripts.TRIM, keys, [len(parts), first, lag, "" if old is None else int(old * 1000)])


class Sender:
    """Of one open adapter."""

    def __init__(self, links: Links, settings: AdapterSettings, max_body: int, replicas: int) -> None:
        self._links = links
        self._settings = settings
        self._max_body = max_body
        self._durability = settings.durability
        self._trimmed: dict[str, float] = {}
        self._replicas = replicas
        self._layouts: dict[str, Layout] = {}

    def know(self, layout: Layout) -> None:
        """A topic was declared: it stands so at the broker."""
        self._layouts[layout.topic] = layout

    async def layout(self, topic: str, timeout: float) -> Layout:
        """How a topic stands at the broker; one that nobody declared is made, with one stream. Raises `BrokerError`."""
        known = self._layouts.get(topic)
        if known is None:
            key = names.meta(topic)
            (flat,) = await self._links.run(key, script(scripts.LAYOUT, [key]), what=f"topic {topic!r}", timeout=timeout)
            try:
                known = self._layouts[topic] = Layout.read(topic, flat)
            except ValueError as error:
                raise PublishRejected(f"key {key!r} is not msgbus's: {error}") from error
        return known

    async def send(self, envelopes: Sequence[Envelope], timeout: float) -> list[SendOutcome]:
        """One outcome an envelope; topics side by side, the envelopes of one in order."""
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        deadline = time.monotonic() + timeout
        topics: dict[str, list[int]] = {}
        for index, envelope in enumerate(envelopes):
            if len(envelope.body) > self._max_body:
                outcomes[index] = self._too_large(envelope)
            else:
                topics.setdefault(envelope.topic, []).append(index)
        if len(topics) == 1:
            for topic, indexes in topics.items():
                await self._send_to(topic, envelopes, indexes, outcomes, deadline)
        elif topics:
            async with asyncio.TaskGroup() as group:
                for topic, indexes in topics.items():
                    group.create_task(self._send_to(topic, envelopes, indexes, outcomes, deadline))
        return outcomes

    def _too_large(self, envelope: Envelope) -> MessageTooLarge:
        problem = f"body of {len(envelope.body)} bytes: {self._max_body} are taken (option max_body)"
        return MessageTooLarge(f"message {envelope.id!r}, {problem}")

    async def _send_to(
        self, topic: str, envelopes: Sequence[Envelope], indexes: list[int], outcomes: list[SendOutcome], deadline: float
    ) -> None:
        start = 0
        while start < len(indexes):
            end, size = start, 0
            while end < len(indexes) and end - start < CHUNK and (end == start or size < CHUNK_BYTES):
                size += len(envelopes[indexes[end]].body)
                end += 1
            chunk = [envelopes[index] for index in indexes[start:end]]
            results = await self._send_chunk(topic, chunk, deadline - time.monotonic())
            for index, outcome in zip(indexes[start:end], results, strict=True):
                outcomes[index] = outcome
            if any(isinstance(outcome, BrokerUnavailable | PublishUnknown) for outcome in results):
                # What follows must not overtake what may be sent again.
                for index in indexes[end:]:
                    outcomes[index] = BrokerUnavailable(f"message {envelopes[index].id!r} was not sent: one before it was not confirmed")
                return
            start = end

    async def _send_chunk(self, topic: str, chunk: Sequence[Envelope], timeout: float) -> list[SendOutcome]:
        if timeout <= 0:
            return [BrokerUnavailable(f"message {envelope.id!r} was not sent: no time was left") for envelope in chunk]
        try:
            layout = await self.layout(topic, timeout)
            commands = [self._add(layout, chunk), *self._confirm(timeout)]
            trims = self._trims(layout)
            replies = (await self._links.send(layout.base, *commands, *trims, timeout=timeout))[: len(commands)]
        except (client.RedisError, OSError, TimeoutError, BrokerError) as error:
            return [send_error(error, envelope.id) for envelope in chunk]
        if isinstance(replies[0], client.RedisError):
            # The script wrote nothing: what fails for one message alone is in its list of answers.
            return [send_error(replies[0], envelope.id) for envelope in chunk]
        problem = self._unconfirmed(replies)
        return [self._outcome(envelope, word, problem) for envelope, word in zip(chunk, replies[0], strict=True)]

    def _add(self, layout: Layout, chunk: Sequence[Envelope]) -> Command:
        keys = [names.seen(layout.topic)]
        numbers: dict[str, int] = {}

        def number(key: str) -> int:
            found = numbers.get(key)
            if found is None:
                keys.append(key)
                found = numbers[key] = len(keys)
            return found

        arguments: list[Any] = [int(SEEN_FOR * 1000), len(chunk)]
        for envelope in chunk:
            group = envelope.group
            part = layout.part(envelope)
            target = number(part if group is None else names.retry(part, group))
            delay = int(envelope.delay * 1000 + 0.999) if envelope.delay > 0 else 0
            waits = number(names.delayed(layout.topic, group)) if delay else 0
            fields = fields_of(envelope)
            arguments += (
                envelope.id if group is None else "",  # a retry's id is that of its original
                target,
                waits,
                delay,
                "0" if group is None else "1",
                nonce() if delay else "",
                len(fields),
            )
            arguments += fields
        return script(scripts.ADD, keys, arguments)

    def _trims(self, layout: Layout) -> list[Command]:
        """Now and then: what nobody consumes is kept for its time, no longer."""
        now = time.monotonic()
        if now < self._trimmed.get(layout.topic, 0.0):
            return []
        self._trimmed[layout.topic] = now + TRIM
        return [trim(layout, None, self._settings)]

    def _confirm(self, timeout: float) -> list[Command]:
        wait = max(1, int(timeout * 900))
        if self._durability == "fsync":
            return [("WAITAOF", 1, 0, wait)]
        return [("WAIT", self._replicas, wait)] if self._durability == "replicated" else []

    def _unconfirmed(self, replies: Sequence[Any]) -> str | None:
        """Why what was written is not as durable as asked; None: it is."""
        if len(replies) == 1:
            return None
        answer = replies[1]
        if isinstance(answer, Exception):
            return f"written, but durability {self._durability!r} could not be waited for: {words(answer)}"
        if self._durability == "fsync":
            return None if answer[0] >= 1 else "written, but not in the server's append-only file in time"
        return None if answer >= self._replicas else f"written, but at {answer} replicas in time, not {self._replicas}"

    @staticmethod
    def _outcome(envelope: Envelope, word: bytes, problem: str | None) -> SendOutcome:
        if word in (b"", b"dup"):
            return PublishUnknown(envelope.id, problem) if problem is not None else None
        if word == b"nogroup":
            return PublishRejected(f"message {envelope.id!r}: topic {envelope.topic!r} has no group {envelope.group!r}")
        return send_error(client.ResponseError(word.decode("utf-8", "replace")), envelope.id)

    async def forward(
        self, envelope: Envelope, source: str, lease: str | None, group: str, consumer: str, entry_id: bytes, token: str, timeout: float
    ) -> SendOutcome:
        """Stores and acks in one step; nothing of it where the entry is no longer the consumer's, or the lease not the token's."""
        if len(envelope.body) > self._max_body:
            return self._too_large(envelope)
        deadline = time.monotonic() + timeout
        try:
            layout = await self.layout(envelope.topic, timeout)
            part = layout.part(envelope)
            target = part if envelope.group is None else names.retry(part, envelope.group)
            keys = [source, lease or source, target, names.delayed(layout.topic, envelope.group)]
            delay = str(int(envelope.delay * 1000 + 0.999)) if envelope.delay > 0 else ""
            must = "0" if envelope.group is None else "1"
            arguments = [group, consumer, entry_id, token, delay, must, nonce() if delay else "", *fields_of(envelope)]
            left = deadline - time.monotonic()
            replies = await self._links.send(source, script(scripts.FORWARD, keys, arguments), *self._confirm(left), timeout=left)
        except (client.RedisError, OSError, TimeoutError, BrokerError) as error:
            return send_error(error, envelope.id)
        word = replies[0]
        if isinstance(word, client.RedisError):
            return send_error(word, envelope.id)
        if word == b"gone":
            return BrokerUnavailable(f"the delivery of {envelope.id!r} to forward went back to its group before")
        return self._outcome(envelope, word, self._unconfirmed(replies))
