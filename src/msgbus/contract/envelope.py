"""What travels: the envelope, the names of its headers, and the limits that hold on every broker.

An envelope is a CloudEvents 1.0 event in binary content mode. In the core its attributes are headers called `ce-…`; an adapter
writes them by its protocol's official binding (Kafka `ce_…`, AMQP `cloudEvents_…`) and `id`, `partitionkey`, `content-type` where
the broker has a place of its own. msgbus's bookkeeping is in headers called `msgbus-…`. Everything else is the user's.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from msgbus.errors import InvalidHeader, InvalidName

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")

# CloudEvents attributes, as headers. `id` and `partitionkey` are fields of the envelope.
CONTENT_TYPE = "content-type"
CONTENT_ENCODING = "content-encoding"  # of other producers: msgbus compresses nothing
CE = "ce-"
CE_SPECVERSION = "ce-specversion"
CE_TYPE = "ce-type"
CE_SOURCE = "ce-source"
CE_TIME = "ce-time"
CE_SUBJECT = "ce-subject"
CE_CORRELATION = "ce-correlationid"
CE_CAUSATION = "ce-causationid"
CE_TRACEPARENT = "ce-traceparent"
CE_IDEMPOTENCY_KEY = "ce-idempotencykey"

# msgbus's own bookkeeping. Believed only in what came by a group's own way (`Envelope.group`), never in a fresh message.
OWN = "msgbus-"
ATTEMPT = "msgbus-attempt"  # runs of the handler so far
NOT_BEFORE = "msgbus-not-before"  # seconds since the epoch: a wait longer than the broker's longest delay goes round until then
FIRST_FAILED_AT = "msgbus-first-failed-at"
REDRIVES = "msgbus-redrive-count"
DEAD = "msgbus-dlq-"  # + reason, topic, group, ...: see inbound/settle.py

HIDDEN = frozenset(
    {
        CONTENT_TYPE,
        CE_SPECVERSION,
        CE_TYPE,
        CE_SOURCE,
        CE_TIME,
        CE_SUBJECT,
        CE_CORRELATION,
        CE_CAUSATION,
        CE_TRACEPARENT,
        CE_IDEMPOTENCY_KEY,
    }
)
"""Headers that a handler reads as facts of its context, not among `context.headers`."""

# Limits on every broker, for what users publish (semantics.md, decision 10). msgbus's own headers do not count.
MAX_HEADERS = 64
MAX_HEADER_NAME = 127
MAX_HEADER_VALUE = 8 * 1024
MAX_HEADERS_TOTAL = 32 * 1024
MAX_ID = 255
MAX_TOPIC = 120
MAX_GROUP = 60
HEADROOM = 64 * 1024
"""A published body may be this much smaller than what the broker takes, so that a copy with the record of its death fits."""


@dataclass(slots=True, eq=False)
class Envelope:
    """One message on its way, as adapters see it. Never changed once it is made: type checkers refuse that, and to freeze it at run time
    would take as long again as all else that is done to make one.

    `topic` is the logical name, with the namespace. `group`: None for every group of the topic; a name for that group only (retries,
    redrives). `headers` are flat text. `delay` is in seconds from the moment of sending: the adapter adds its broker's clock.
    `expires_at` is a moment in seconds since the epoch.
    """

    id: Final[str]
    topic: Final[str]
    body: Final[bytes]
    headers: Final[Mapping[str, str]]
    key: Final[str | None] = None
    group: Final[str | None] = None
    priority: Final[Priority] = "normal"
    delay: Final[float] = 0.0
    expires_at: Final[float | None] = None


def new_id() -> str:
    """A fresh message id: 32 hexadecimal digits, the first 8 the second it was made in, the others random.

    So ids of one time are neighbours in a database's index, which need not read and write another page of it for each.
    """
    return second_digits(int(time.time())) + os.urandom(12).hex()


@functools.lru_cache(8)  # many messages are published within a second
def second_digits(second: int) -> str:
    """How a message id begins that is made in this second since the epoch."""
    return f"{second & 0xFFFFFFFF:08x}"


def utc_text(moment: float) -> str:
    """RFC 3339 with microseconds, as `ce-time` and the record of a dead letter have it; from seconds since the epoch."""
    second = math.floor(moment)
    return f"{_second_text(second)}.{int((moment - second) * 1_000_000):06d}Z"


@functools.lru_cache(8)  # many messages are published within a second
def _second_text(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat().removesuffix("+00:00")


def parse_utc(text: str | None) -> datetime | None:
    """The moment an RFC 3339 text names; None for anything else, since foreign messages may hold anything."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None


_NAME = re.compile(r"[A-Za-z0-9._-]+")
_RESERVED_ENDING = re.compile(r"(?:^|\.)(?:dead|retry|soon|delay|member|high|normal|low|p[0-9]+)$")
_RESERVED_GROUP = re.compile(r"dead|retry|soon|delay|member|high|normal|low|p[0-9]+|[0-9]+")
_HEADER_NAME = re.compile(r"[A-Za-z0-9._-]{1,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_topic(name: str) -> str:
    """The name, if every broker can hold it as a topic; else `InvalidName`."""
    if not _is_text(name) or not name or len(name) > MAX_TOPIC:
        raise InvalidName(f"topic {_shown(name)}: a name has 1 to {MAX_TOPIC} characters, its namespace included")
    if not _NAME.fullmatch(name) or name.startswith(".") or name.endswith(".") or ".." in name:
        raise InvalidName(f"topic {_shown(name)}: use letters, digits, '.', '_' and '-', no empty part between dots")
    if name.startswith(("amq.", "__", "msgbus.")):
        raise InvalidName(f"topic {_shown(name)}: names beginning with 'amq.' or '__' belong to the brokers, with 'msgbus.' to msgbus")
    if _RESERVED_ENDING.search(name):
        raise InvalidName(f"topic {_shown(name)}: the last part is a word that msgbus uses for its own destinations")
    return name


def check_group(name: str) -> str:
    """The name, if every broker can hold it as a group; else `InvalidName`. No dots: they part topic and group."""
    if not _is_text(name) or not name or len(name) > MAX_GROUP:
        raise InvalidName(f"group {_shown(name)}: a name has 1 to {MAX_GROUP} characters")
    if "." in name or not _NAME.fullmatch(name):
        raise InvalidName(f"group {_shown(name)}: use letters, digits, '_' and '-' (no dots: they part topic and group)")
    if _RESERVED_GROUP.fullmatch(name):
        raise InvalidName(f"group {_shown(name)}: the word is one that msgbus uses for its own destinations")
    return name


def check_id(text: str, what: str) -> str:
    """The text, if every broker can carry it as an id or key: 1 to 255 bytes of UTF-8 without control characters."""
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
        raise InvalidName(f"{what}: expected text, not {type(text).__name__}")
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidName(f"{what} {_shown(text)}: not UTF-8") from error
    if not 1 <= size <= MAX_ID or _CONTROL.search(text):
        raise InvalidName(f"{what} {_shown(text)}: 1 to {MAX_ID} bytes of UTF-8 without control characters")
    return text


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuses with `InvalidHeader` what not every broker can carry, naming the header."""
    if not isinstance(headers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] users without a checker
        raise InvalidHeader(f"headers: a mapping of text to text, not {type(headers).__name__}")
    if len(headers) > MAX_HEADERS:
        raise InvalidHeader(f"{len(headers)} headers: at most {MAX_HEADERS} travel on every broker")
    total = 0
    for name, value in headers.items():
        if not _is_text(name) or not _HEADER_NAME.fullmatch(name):
            raise InvalidHeader(f"header {_shown(name)}: a name has 1 to {MAX_HEADER_NAME} letters, digits, '.', '_' or '-'")
        lowered = name.lower()
        if lowered.startswith((OWN, CE)) or lowered == CONTENT_TYPE:
            raise InvalidHeader(f"header {_shown(name)}: names beginning with 'msgbus-' or 'ce-', and 'content-type', are set by msgbus")
        if not _is_text(value):
            raise InvalidHeader(f"header {name!r}: a value is text, not {type(value).__name__}")
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise InvalidHeader(f"header {name!r}: the value is not UTF-8") from error
        if size > MAX_HEADER_VALUE or _CONTROL.search(value):
            raise InvalidHeader(f"header {name!r}: a value has at most {MAX_HEADER_VALUE} bytes and no control characters")
        total += len(name) + size
    if total > MAX_HEADERS_TOTAL:
        raise InvalidHeader(f"headers of {total} bytes together: at most {MAX_HEADERS_TOTAL} travel on every broker")


def _is_text(value: object) -> bool:
    """Asked of what a type checker would have refused: not everyone runs one."""
    return isinstance(value, str)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
