"""Names, ids and headers: what every broker can hold passes, all else is refused by name. And the attempt that a header claims."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msgbus.contract.address import dead_topic, shard_of
from msgbus.contract.envelope import ATTEMPT, Envelope, check_group, check_headers, check_id, check_topic, parse_utc, utc_text
from msgbus.errors import ConfigurationError, InvalidHeader, InvalidName, MessageError
from msgbus.inbound.job import runs_before
from msgbus.inbound.reading import age_of

BAD_NAMES: list[Any] = [
    "", ".", "..", "a..b", ".a", "a.", "x" * 250, "a/b", "a b", "é", "a\nb", "a\n", "\x00", "*", "a.*", "#", "{tag}", "a:b", "a,b",
    "a\ud800", "amq.x", "__consumer_offsets", "msgbus.delay.due", None, 17, b"orders", 1.5, ["orders"],
]  # fmt: skip
RESERVED = ["dead", "retry", "soon", "delay", "member", "high", "normal", "low", "p0", "p17"]


@pytest.mark.parametrize(
    "name", [*BAD_NAMES, "x" * 121, *RESERVED, *(f"orders.{word}" for word in RESERVED)], ids=lambda name: repr(name)[:20]
)
def test_a_topic_that_not_every_broker_holds_is_refused(name: Any) -> None:
    """Empty, too long, other characters, brokers' own names, and the words of our own destinations."""
    with pytest.raises(InvalidName, match="topic"):
        check_topic(name)


@pytest.mark.parametrize("name", [*BAD_NAMES[:-5], None, 17, "x" * 61, "a.b", "42", *RESERVED], ids=lambda name: repr(name)[:20])
def test_a_group_that_not_every_broker_holds_is_refused(name: Any) -> None:
    """As topics, and no dots: they part topic and group."""
    if name in ("amq.x", "__consumer_offsets"):
        name = "amq.x"
    with pytest.raises(InvalidName, match="group"):
        check_group(name)


@pytest.mark.parametrize(
    "name", ["orders", "a", "x" * 120, "a.b-c_d.E9", "dead.orders", "deadly", "orders.p", "p1x", "orders.retries", "a.42"]
)
def test_good_topics(name: str) -> None:
    """What looks like a reserved word and is none passes."""
    assert check_topic(name) == name


@pytest.mark.parametrize("name", ["billing", "x" * 60, "a-b_c", "p", "deadly", "42a", "billing-audit"])
def test_good_groups(name: str) -> None:
    """Letters, digits, '_' and '-'."""
    assert check_group(name) == name


@given(st.text(max_size=130))
def test_a_name_passes_exactly_when_it_is_made_of_what_brokers_hold(name: str) -> None:
    """Against the rule written anew."""
    parts = name.split(".")
    good = (
        1 <= len(name) <= 120
        and all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts)
        and not name.startswith(("amq.", "__", "msgbus."))
        and parts[-1] not in RESERVED
        and not re.fullmatch(r"p[0-9]+", parts[-1])
    )
    try:
        check_topic(name)
    except InvalidName:
        assert not good
    else:
        assert good


@given(st.text("ab.p0", min_size=1, max_size=8), st.text("ab-p", min_size=1, max_size=8), st.text("ab.p0", min_size=1, max_size=8))
def test_no_topic_is_another_ones_dead_letters(topic: str, group: str, other: str) -> None:
    """A destination of ours is never a name that a user can give."""
    try:
        check_topic(topic)
        check_group(group)
    except InvalidName:
        return
    with pytest.raises(InvalidName):
        check_topic(dead_topic(topic, group))


@pytest.mark.parametrize(
    "text", ["", "x" * 256, "é" * 128, "a\x00b", "a\nb", "\x7f", "\ud800", None, 17, b"id", 1.5, ["id"]], ids=lambda text: repr(text)[:20]
)
@pytest.mark.parametrize("what", ["id", "key", "idempotency_key"])
def test_an_id_that_not_every_broker_holds_is_refused(text: Any, what: str) -> None:
    """1 to 255 bytes of UTF-8 without control characters; the error says which it is and shows it shortened."""
    with pytest.raises(InvalidName, match=f"^{what}") as raised:
        check_id(text, what)
    assert len(str(raised.value)) < 200


@given(st.text(min_size=1, max_size=300))
def test_an_id_passes_exactly_when_its_bytes_do(text: str) -> None:
    """Unicode is welcome; the limit counts bytes."""
    try:
        good = 1 <= len(text.encode()) <= 255 and not any(ord(character) < 32 or ord(character) == 127 for character in text)
    except UnicodeEncodeError:
        good = False
    try:
        assert check_id(text, "key") == text
    except InvalidName:
        assert not good
    else:
        assert good


BAD_HEADERS: dict[str, Any] = {
    "a number": {"a": 1},
    "None": {"a": None},
    "NaN": {"a": float("nan")},
    "bytes": {"a": b"b"},
    "nested": {"a": {"b": "c"}},
    "a list": {"a": ["b"]},
    "a number as name": {1: "a"},
    "None as name": {None: "a"},
    "an empty name": {"": "a"},
    "128 characters": {"a" * 128: "a"},
    "a space in the name": {"a b": "a"},
    "a colon in the name": {"a:b": "a"},
    "an umlaut in the name": {"ä": "a"},
    "a line end in the name": {"a\n": "a"},
    "CR": {"a": "b\rc"},
    "LF": {"a": "b\nc"},
    "NUL": {"a": "b\x00c"},
    "DEL": {"a": "\x7f"},
    "a lone surrogate": {"a": "\ud800"},
    "a long value": {"a": "b" * 8193},
    "a long value in bytes": {"a": "é" * 4097},
    "65": {f"h{number}": "x" for number in range(65)},
    "1000": {f"h{number}": "x" for number in range(1000)},
    "too much together": {f"h{number}": "x" * 8000 for number in range(5)},
    "ours": {"msgbus-attempt": "1"},
    "ours in capitals": {"MSGBUS-Attempt": "1"},
    "an attribute": {"ce-id": "1"},
    "an attribute in capitals": {"CE-Type": "1"},
    "the content type": {"Content-Type": "text/plain"},
    "no mapping": [("a", "b")],
    "text": "a=b",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_not_every_broker_carries_is_refused(name: str) -> None:
    """Before any I/O, shown by name: one such header can cost a whole connection."""
    with pytest.raises(InvalidHeader, match="header"):
        check_headers(BAD_HEADERS[name])


def test_headers_at_the_limits_pass() -> None:
    """64 headers, names of 127, values of 8 KiB, 32 KiB together; empty and Unicode values."""
    check_headers({f"h{number}": "x" for number in range(64)})
    check_headers({"a" * 127: "", "b": "é" * 4096})
    check_headers({f"h{number}": "x" * 8186 for number in range(4)})
    check_headers({"tenant": "ä 日本 \U0001f600", "traceparent": "not one", "msgbus": "x", "cells": "y"})


headers = st.dictionaries(st.text(max_size=10), st.text(max_size=10) | st.none() | st.integers() | st.binary(max_size=3), max_size=5)


@given(headers)
def test_any_headers_pass_or_are_an_invalid_header(given_headers: dict[str, Any]) -> None:
    """Nothing else is raised, and what passes is text that UTF-8 holds."""
    try:
        check_headers(given_headers)
    except InvalidHeader:
        pass
    else:
        for name, value in given_headers.items():
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,127}", name)
            assert value.encode().decode() == value


def test_an_invalid_name_is_a_message_error_and_a_configuration_error() -> None:
    """It is raised at calls and at start."""
    assert issubclass(InvalidHeader, MessageError)
    assert issubclass(InvalidName, MessageError)
    assert issubclass(InvalidName, ConfigurationError)


# ---------------------------------------------------------------- what headers claim


@pytest.mark.parametrize(
    ("claim", "runs"),
    [
        (None, 0), ("0", 0), ("1", 1), ("17", 17), ("007", 7), ("-1", 0), ("+1", 0), ("1.5", 0), ("", 0), (" 1", 0), ("1e3", 0), ("NaN", 0),
        ("1_000", 0), ("²", 0), ("٣", 0), (str(10**9), 0), ("9" * 5000, 0), ("999999999", 999999999), ("0x10", 0), ("1\x00", 0),
    ],
)  # fmt: skip
def test_a_claimed_attempt_is_a_plain_number_or_nothing(claim: str | None, runs: int) -> None:
    """What makes no sense counts as no run before."""
    assert runs_before(Envelope("1", "orders", b"", {} if claim is None else {ATTEMPT: claim})) == runs


@given(st.text(max_size=12))
def test_any_claimed_attempt_is_a_number_from_0(claim: str) -> None:
    """Whatever a header holds."""
    assert 0 <= runs_before(Envelope("1", "orders", b"", {ATTEMPT: claim})) < 10**9


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "yesterday",
        "2030-13-01T00:00:00Z",
        "2030-01-01T00:00:00",
        "2030-01-01",
        "9" * 1000,
        "\x00",
        "0000-00-00T00:00:00Z",
        "12:00Z",
    ],
)
def test_a_time_that_is_none_is_none(text: str | None) -> None:
    """Foreign messages may hold anything; a time without a zone says nothing."""
    assert parse_utc(text) is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "2020-01-01T00:00:00Z"])
def test_the_age_of_any_time_is_a_number_from_0(text: str) -> None:
    """The first and last moments of the calendar too; a publisher's clock that runs ahead makes no negative age."""
    assert age_of(Envelope("1", "orders", b"", {"ce-time": text})) >= 0


@given(st.floats(0, 4e9))
def test_a_moment_is_read_back(moment: float) -> None:
    """To the microsecond, in UTC, with a Z."""
    text = utc_text(moment)
    parsed = parse_utc(text)
    assert text.endswith("Z")
    assert parsed is not None
    assert parsed.timestamp() == pytest.approx(moment, abs=2e-6)


@given(st.none() | st.text(st.characters(codec="utf-8")), st.integers(1, 1024))
def test_a_key_has_one_shard(key: str | None, shards: int) -> None:
    """The same each time, within range; no key: the first."""
    shard = shard_of(key, shards)
    assert 0 <= shard < shards
    assert shard == shard_of(key, shards)
    if key is None:
        assert shard == 0
