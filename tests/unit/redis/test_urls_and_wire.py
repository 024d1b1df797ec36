"""The Redis adapter without a server: URLs, options, names of keys, and what an entry looks like."""

from __future__ import annotations

import pytest

from msgbus.contract.adapter import AdapterSettings
from msgbus.contract.envelope import Envelope
from msgbus.errors import ConfigurationError
from msgbus.urls import adapter_from_url
from msgbus_redis import names
from msgbus_redis.connections import Place
from msgbus_redis.wire import envelope_of, fields_of


def adapter(url: str) -> object:
    return adapter_from_url(url, AdapterSettings())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "redis://localhost:6379"),
        ("redis://u:p%40ss@h:1/2", "redis://h:1/2"),
        ("rediss://h/0?ssl_ca_certs=/x", "rediss://h:6379"),
        ("redis+sentinel://:pw@a,b:1/main/3", "redis+sentinel://a:26379,b:1/main/3"),
        ("redis+cluster://a:1,[::1]:2", "redis+cluster://a:1,[::1]:2"),
    ],
)
def test_urls_are_read_and_shown_without_secrets(url: str, shown: str) -> None:
    """All four schemes are accepted; a repr shows where, and no password."""
    assert repr(adapter(url)) == f"<RedisAdapter {shown} closed>"


def test_credentials_are_decoded() -> None:
    """What is special in a password is percent-encoded."""
    place = Place.from_url("redis://us%3Aer:p%40%2Fss@h")
    assert place.options == {"username": "us:er", "password": "p@/ss", "db": 0}
    assert "p@" not in repr(place)
    assert Place.from_url("redis://:only@h").options == {"username": None, "password": "only", "db": 0}


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis://h?lese=1", "lese"),
        ("redis://h?lease=soon", "lease"),
        ("redis://h?lease=0.1", "lease"),
        ("redis://h?durability=sometimes", "durability"),
        ("redis://h?max_body=0", "max_body"),
        ("redis://h?ssl_certfile=x", "rediss"),
        ("redis://h/first", "redis://user"),
        ("redis://h/0/1", "redis://user"),
        ("redis://a,b", "one host"),
        ("redis+sentinel://a", "SERVICE"),
        ("redis+cluster://a/1", "database"),
        ("redis://u:secret@h:x/0", "a port is a number"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(url: str, named: str) -> None:
    """An option or place that makes no sense: the error names it, and shows no password."""
    with pytest.raises(ConfigurationError, match=named) as caught:
        adapter(url)
    assert "secret" not in str(caught.value)


def test_all_keys_of_a_topic_are_in_one_slot() -> None:
    """Scripts touch a topic, its groups and their dead letters: one hash tag for all."""
    layout = names.Layout("shop.orders", 2, keyed=True)
    dead = names.Layout("shop.orders.g.dead")
    keys = [
        *layout.streams("g"),
        layout.key("meta"),
        layout.key("private"),
        layout.key("delayed"),
        layout.key("delayed", "g"),
        dead.base,
        dead.key("meta"),
    ]
    keys += [names.own(layout.parts()[0], "lease", "g"), names.own(layout.base, "members", "g")]
    assert {key[: key.index("}") + 1] for key in keys} == {"{shop.orders}"}
    assert len({*keys}) == len(keys)


def test_an_envelope_goes_there_and_back() -> None:
    """Every field, and headers whose names are those of our own fields."""
    envelope = Envelope(
        "id ☃",
        "t",
        b"\xff\x00",
        {"content-type": "a/b", "ce-type": "T", "data": "d", "ce_id": "x", "Ünï": "ö"},
        "k",
        None,
        "high",
        0.0,
        12.5,
    )
    pairs = zip(*fields_of(envelope), strict=True)
    flat = [text if isinstance(text, bytes) else text.encode() for pair in pairs for text in pair]
    back = envelope_of("t", None, "{t}", b"1-0", flat)
    for name in ("id", "topic", "body", "headers", "key", "group", "priority", "expires_at"):
        assert getattr(back, name) == getattr(envelope, name)
    assert envelope_of("t", "g", "{t}:retry:g", b"1-0", flat).group == "g"
