"""Sending: envelopes of one topic are one script, which also recognises what was sent before; durability is waited for behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

from redis import exceptions as client

from msgbus.contract.adapter import SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable, MessageTooLarge, PublishRejected, PublishUnknown
from msgbus_redis import scripts
from msgbus_redis.connections import Command
from msgbus_redis.errors import CLIENT_ERRORS, send_error, words
from msgbus_redis.names import Layout, own
from msgbus_redis.topology import Topology
from msgbus_redis.wire import fields_of

SEEN_FOR = 120
"""Seconds for which a second send of an id to a topic is recognised."""
TRIM = 60.0
"""Seconds between a sender's trims of a topic: what nobody consumes is kept for its time, no longer."""
LANES = 16
"""Connections that wait for durability: it is the connection that the server lets wait."""


class Source(NamedTuple):
    """What is acked for a message, in one step with it: an entry that a consumer of a group holds."""

    stream: str
    group: str
    consumer: str
    entry: bytes


class Sender:
    """Of one open adapter."""

    def __init__(self, topology: Topology, max_body: int, replicas: int) -> None:
        self.topology = topology
        self._durability = topology.settings.durability
        self._max_body = max_body
        self._replicas = replicas
        self._turns = count()

    async def send(self, envelopes: Sequence[Envelope], timeout: float) -> list[SendOutcome]:
        """One outcome an envelope; topics side by side, the envelopes of one in order."""
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        topics: dict[str, list[int]] = {}
        for index, envelope in enumerate(envelopes):
            if len(envelope.body) > self._max_body:
                outcomes[index] = self._too_large(envelope)
            else:
                topics.setdefault(envelope.topic, []).append(index)

        async def send_to(indexes: list[int]) -> None:
            for index, outcome in zip(indexes, await self._store([envelopes[index] for index in indexes], timeout), strict=True):
                outcomes[index] = outcome

        await asyncio.gather(*map(send_to, topics.values()))
        return outcomes

    async def forward(self, envelope: Envelope, source: Source, timeout: float) -> SendOutcome:
        """Stores and acks in one step; nothing of it where the entry is no longer the consumer's."""
        return self._too_large(envelope) or (await self._store([envelope], timeout, source))[0]

    def _too_large(self, envelope: Envelope) -> MessageTooLarge | None:
        size = len(envelope.body)
        if size <= self._max_body:
            return None
        return MessageTooLarge(f"message {envelope.id!r}, body of {size} bytes: {self._max_body} are taken (option max_body)")

    async def _store(self, envelopes: Sequence[Envelope], timeout: float, source: Source | None = None) -> list[SendOutcome]:
        deadline = time.monotonic() + timeout
        try:
            if timeout <= 0:
                raise BrokerUnavailable("not sent: no time was left")
            layout = await self.topology.layout(envelopes[0].topic, timeout)
            confirm: list[Command] = []
            if self._durability != "broker":
                patience = max(1, int((deadline - time.monotonic()) * 750))  # ms; the rest is for connecting, and for the answer
                confirm = [(*(("WAITAOF", 1, 0) if self._durability == "fsync" else ("WAIT", self._replicas)), patience)]
            commands = [_command(layout, envelopes, source), *confirm, *self.topology.trims(layout, None, TRIM)]
            lane = f"sending {next(self._turns) % LANES if confirm else 0}"
            word, *behind = await self.topology.links.call(
                layout.base, *commands, timeout=max(0.001, deadline - time.monotonic()), lane=lane
            )
            if isinstance(word, client.RedisError):  # the script wrote nothing: what fails for one message alone is in its list of answers
                raise word
        except CLIENT_ERRORS as error:
            return [send_error(error, envelope.id) for envelope in envelopes]
        problem = self._unconfirmed(behind[0]) if confirm else None
        if problem is None and not any(word):  # all of them are stored
            return [None] * len(envelopes)
        return [_outcome(envelope, found, problem) for envelope, found in zip(envelopes, word, strict=True)]

    def _unconfirmed(self, answer: Any) -> str | None:
        """Why what was written is not as durable as asked; None: it is."""
        if isinstance(answer, Exception):
            return f"written, but durability {self._durability!r} could not be waited for: {words(answer)}"
        if self._durability == "fsync":
            return None if answer[0] >= 1 else "written, but not in the server's append-only file in time"
        return None if answer >= self._replicas else f"written, but at {answer} replicas in time, not {self._replicas}"


def _command(layout: Layout, envelopes: Sequence[Envelope], source: Source | None) -> Command:
    keys = [layout.key("pub:"), source.stream if source else layout.base]
    numbers: dict[str, int] = {}
    arguments: list[Any] = [SEEN_FOR * 1000, *(source[1:] if source else ("", "", ""))]
    before: object = None
    run = 0  # where the number of messages that are alike is written
    for envelope in envelopes:
        group = envelope.group
        part = layout.part(envelope)
        delay = int(envelope.delay * 1000 + 0.999) if envelope.delay > 0 else 0
        names, values = fields_of(envelope)
        alike = part, group, delay, names
        if alike != before:
            before = alike
            run = len(arguments)
            arguments += (
                0,
                numbers.setdefault(part if group is None else own(part, "retry", group), len(numbers) + 3),
                numbers.setdefault(layout.key("delayed", group), len(numbers) + 3) if delay else 0,
                delay,
                0 if group is None else 1,
                1 if group is None and source is None else 0,  # a retry's id is that of its original
                len(names),
                *names,
            )
        arguments[run] += 1
        arguments += values
    return scripts.call(scripts.SEND, [*keys, *numbers], arguments)


def _outcome(envelope: Envelope, word: bytes, problem: str | None) -> SendOutcome:
    if word in (b"", b"dup"):
        return None if problem is None else PublishUnknown(envelope.id, problem)
    if word == b"nogroup":
        return PublishRejected(f"message {envelope.id!r}: topic {envelope.topic!r} has no group {envelope.group!r}")
    if word == b"gone":
        return BrokerUnavailable(f"the delivery of {envelope.id!r} to forward went back to its group before, or was settled")
    return send_error(client.ResponseError(word.decode("utf-8", "replace")), envelope.id)
