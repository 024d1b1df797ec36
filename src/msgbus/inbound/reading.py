"""Envelope → message: what every body is checked for before its model sees it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from msgbus.codecs import decoder
from msgbus.contract.codec import Codec
from msgbus.contract.envelope import CE_TIME, CE_TYPE, CONTENT_ENCODING, CONTENT_TYPE, NOT_BEFORE, Envelope, parse_utc
from msgbus.errors import DecodeError
from msgbus.topic import Topic

M = TypeVar("M")

MOST_PROBLEMS = 100
"""Problems of one body that are spelled out."""
_LONGEST_WAIT = 366 * 86400.0
"""Seconds: a later not-before makes no sense."""
_MOST_TYPES = 64
"""Event types of a topic that are remembered as harmless: the text comes from outside."""
_OUR_TYPE = re.compile(r"(.*)\.v([0-9]{1,99})")


def reader(topic: Topic[Any], codec: Codec[M]) -> Callable[[Envelope], M]:
    """The function that decodes a topic's envelopes. It raises `DecodeError`, which makes a dead letter at once."""
    name, model, version = topic.name, topic.model_name, topic.version
    content_type, accepts, decode = codec.content_type, codec.accepts, decoder(codec)
    encoded_matters = topic.model is not bytes  # bytes are the handler's to decode
    known_types: set[str | None] = {None, f"{model}.v{version}"}

    def check_version(envelope: Envelope, event_type: str) -> None:
        """Refuses a newer version of our own model; what others call their types says nothing about the body."""
        match = _OUR_TYPE.fullmatch(event_type)
        if match and match[1] == model and int(match[2]) > version:
            problem = f"version {match[2]} of {model}, and this service knows up to {version}"
            raise DecodeError(name, envelope.id, problem, "unsupported")
        if len(known_types) < _MOST_TYPES:
            known_types.add(event_type)

    def read(envelope: Envelope) -> M:
        headers = envelope.headers
        event_type = headers.get(CE_TYPE)
        if event_type is not None and event_type not in known_types:
            check_version(envelope, event_type)
        given = headers.get(CONTENT_TYPE)
        if given != content_type and not accepts(given):
            raise DecodeError(name, envelope.id, f"content type {given!r} is none that {model} is read from", "unsupported")
        if encoded_matters and headers.get(CONTENT_ENCODING, "identity").lower() not in ("", "identity"):
            raise DecodeError(name, envelope.id, f"content encoding {headers[CONTENT_ENCODING]!r} is not supported", "unsupported")
        try:
            return decode(envelope.body)
        except (ValueError, TypeError, RecursionError, AssertionError) as error:  # what validators of a model may raise
            raise DecodeError(name, envelope.id, f"the body does not fit {model}: {_problem(error)}") from error

    return read


def _problem(error: Exception) -> str:
    """The codec's words; of very many problems their number: a million of them are 180 MB of text, and seconds of everybody's time."""
    if isinstance(error, ValidationError) and error.error_count() > MOST_PROBLEMS:
        return f"{error.error_count()} validation errors"
    return str(error)


def age_of(envelope: Envelope) -> float:
    """Seconds since it was first published, by what it says; 0 where it does not."""
    published = parse_utc(envelope.headers.get(CE_TIME))
    return 0.0 if published is None else max(0.0, time.time() - published.timestamp())


def rest_of_wait(envelope: Envelope, now: float) -> float:
    """Seconds until the group may have what came by its own way; 0 where it may. A wait that is longer than the broker's longest delay goes
    round until its time has come."""
    try:
        rest = float(envelope.headers.get(NOT_BEFORE, now)) - now
    except ValueError:
        return 0.0
    return rest if envelope.group is not None and 0.05 < rest < _LONGEST_WAIT else 0.0
