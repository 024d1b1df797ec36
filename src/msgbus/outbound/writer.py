"""Writer: model → envelope, for one topic. All that does not depend on the message is worked out once, when it is made."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgbus.contract.adapter import Capability, Limits, TopicSpec
from msgbus.contract.envelope import (
    CE_CAUSATION,
    CE_CORRELATION,
    CE_IDEMPOTENCY_KEY,
    CE_SOURCE,
    CE_SPECVERSION,
    CE_TIME,
    CE_TYPE,
    CONTENT_ENCODING,
    CONTENT_TYPE,
    HEADROOM,
    PRIORITIES,
    Envelope,
    check_headers,
    check_id,
    second_digits,
    utc_text,
)
from msgbus.errors import EncodeError, InvalidHeader, MessageTooLarge, UnsupportedFeature
from msgbus.publishing import PublishOptions, handling
from msgbus.topic import Topic

if TYPE_CHECKING:
    from msgbus.contract.codec import Codec

M = TypeVar("M")

_NO_OPTIONS = PublishOptions()
_KNOWN_OPTIONS = frozenset(PublishOptions.__optional_keys__)


def event_type(topic: Topic[Any]) -> str:
    """The CloudEvents type of a topic's messages: model and version."""
    return f"{topic.model_name}.v{topic.version}"


def topic_spec(topic: Topic[Any], namespace: str, adapter_name: str) -> TopicSpec:
    """What an adapter needs to know of a topic."""
    return TopicSpec(
        name=namespace + topic.name,
        keyed=topic.key is not None,
        shards=topic.shards,
        priorities=topic.priorities,
        retain=None if topic.retain is None else topic.retain.total_seconds(),
        native=topic.native.get(adapter_name, {}),
    )


class Writer(Generic[M]):
    """Writes the envelopes of one topic. Every check of a message is here, before any I/O."""

    def __init__(
        self,
        topic: Topic[M],
        codec: Codec[M],
        *,
        namespace: str,
        source: str,
        adapter_name: str,
        limits: Limits,
        capabilities: Capability,
        typed: bool = True,
    ) -> None:
        self.topic = topic
        self.spec = topic_spec(topic, namespace, adapter_name)
        self.declared = False
        self._encode = codec.encode
        self._key = _key_function(topic)
        self.typed = typed
        self._is_json = topic.model is not bytes
        self._name = self.spec.name
        self._adapter_name = adapter_name
        self._max_body = limits.body - HEADROOM
        self._max_delay = limits.delay
        self._can_delay = Capability.DELAY in capabilities
        self._headers = {
            CONTENT_TYPE: codec.content_type,
            CE_SPECVERSION: "1.0",
            CE_TYPE: event_type(topic),
            CE_SOURCE: source,
        }

    def write(self, message: M, options: PublishOptions = _NO_OPTIONS) -> Envelope:
        """The envelope of a message. Raises `MessageError`, `ValueError` or `UnsupportedFeature`; nothing was sent then."""
        if not self.typed and isinstance(message, bytes):
            raise EncodeError(f'{self.topic.name!r}: bytes under a plain name; publish them to Topic("{self.topic.name}", bytes)')
        try:
            body = self._encode(message)
        except (ValueError, TypeError) as error:
            raise EncodeError(f"a message for topic {self.topic.name!r} does not fit its model: {error}") from error
        if len(body) > self._max_body:
            raise MessageTooLarge(
                f"a message of {len(body)} bytes for topic {self.topic.name!r}: at most {self._max_body} on {self._adapter_name}; "
                "send a reference to it instead"
            )
        key = self._key(message) if self._key is not None else None
        headers = self._headers.copy()
        now = time.time()
        message_id = second_digits(int(now)) + os.urandom(12).hex()  # new_id()'s, spelled out: one call less a message
        headers[CE_TIME] = utc_text(now)
        cause = handling.get()
        if cause is not None:
            headers[CE_CORRELATION] = cause.headers.get(CE_CORRELATION) or cause.id
            headers[CE_CAUSATION] = cause.id
        if not options:
            return Envelope(message_id, self._name, body, headers, None if key is None else check_id(key, "key"))
        return self._with_options(message_id, body, headers, key, now, options)

    def _with_options(
        self,
        message_id: str,
        body: bytes,
        headers: dict[str, str],
        key: str | None,
        now: float,
        options: PublishOptions,
    ) -> Envelope:
        unknown = options.keys() - _KNOWN_OPTIONS
        if unknown:
            raise TypeError(f"publish() has no option {', '.join(sorted(unknown))}; known: {', '.join(sorted(_KNOWN_OPTIONS))}")
        own_id = options.get("id")
        if own_id is not None:
            message_id = check_id(own_id, "id")
        own_key = options.get("key")
        if own_key is not None:
            key = own_key
        if key is not None:
            check_id(key, "key")
        idempotency_key = options.get("idempotency_key")
        if idempotency_key is not None:
            headers[CE_IDEMPOTENCY_KEY] = check_id(idempotency_key, "idempotency_key")
        own_headers = options.get("headers")
        if own_headers:
            check_headers(own_headers)
            if self._is_json and any(name.lower() == CONTENT_ENCODING for name in own_headers):
                raise InvalidHeader(
                    f"header {CONTENT_ENCODING!r}: JSON travels as it is, and no consumer would decode it; use a topic of bytes"
                )
            headers = {**own_headers, **headers}
        priority = options.get("priority")
        if priority is not None:
            if priority not in PRIORITIES:
                raise ValueError(f"priority {priority!r}: one of {', '.join(PRIORITIES)}")
            if not self.topic.priorities:
                raise UnsupportedFeature(
                    f"priority on topic {self.topic.name!r}",
                    "a topic without priorities",
                    "Topic(..., priorities=True)",
                )
        expires_in = options.get("expires_in")
        if expires_in is not None and _duration(expires_in, "expires_in") <= timedelta(0):
            raise ValueError(f"expires_in must be positive, not {expires_in}")
        return Envelope(
            message_id,
            self._name,
            body,
            headers,
            key,
            priority=priority or "normal",
            delay=self._delay(options.get("delay"), options.get("deliver_at"), now),
            expires_at=None if expires_in is None else now + expires_in.total_seconds(),
        )

    def _delay(self, delay: timedelta | None, deliver_at: datetime | None, now: float) -> float:
        if delay is not None and deliver_at is not None:
            raise ValueError("delay and deliver_at say the same thing: give one of them")
        if delay is not None:
            seconds = _duration(delay, "delay").total_seconds()
            if seconds < 0:
                raise ValueError(f"delay must not be negative, not {delay}")
        elif deliver_at is not None:
            if not isinstance(deliver_at, datetime):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
                raise TypeError(f"deliver_at={deliver_at!r}: takes a datetime")
            if deliver_at.tzinfo is None:
                raise ValueError(f"deliver_at {deliver_at} has no time zone: datetime(..., tzinfo=UTC) or .astimezone()")
            seconds = max(0.0, deliver_at.timestamp() - now)
        else:
            return 0.0
        if seconds > 0 and (not self._can_delay or (self._max_delay is not None and seconds > self._max_delay)):
            longest = f"at most {timedelta(seconds=math.floor(self._max_delay or 0))}" if self._can_delay else "none"
            raise UnsupportedFeature(
                f"a delay of {delay if delay is not None else timedelta(seconds=seconds)} on topic {self.topic.name!r}",
                f"{self._adapter_name} ({longest})",
                "a shorter delay, or bus.outbox(session), whose rows wait for any time",
            )
        return seconds


def _duration(given: timedelta, option: str) -> timedelta:
    """The duration, if it is one: users without a checker write numbers."""
    if not isinstance(given, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{option}={given!r}: takes a timedelta")
    return given


def _key_function(topic: Topic[M]) -> Callable[[M], str | None] | None:
    key = topic.key
    if key is None:
        return None
    place = f"the key of topic {topic.name!r}"
    if callable(key):
        function = key

        def computed(message: M) -> str | None:
            found = function(message)
            return found if found is None or type(found) is str else _text(found, place)

        return computed
    field = key

    def looked_up(message: M) -> str | None:
        try:
            found = message[field] if isinstance(message, dict) else getattr(message, field)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] any model
        except (KeyError, AttributeError) as error:
            raise EncodeError(f"{place}: the message has no field {field!r}") from error
        return found if found is None or type(found) is str else _text(found, place)  # pyright: ignore[reportUnknownArgumentType]

    return looked_up


def _text(found: object, place: str) -> str:
    """A key's text. Numbers, UUIDs and string enums have one that every language writes alike; other types do not."""
    if isinstance(found, Enum):
        found = found.value
    if isinstance(found, str) or (isinstance(found, int) and not isinstance(found, bool)):
        return str(found)
    from uuid import UUID  # 1 ms of `import msgbus`, for those who have such keys

    if isinstance(found, UUID):
        return str(found)
    raise EncodeError(f"{place}: {type(found).__name__} has no one text; use str, int, UUID, or key= a function that returns text")
