"""URLs of RabbitMQ: what they may say, and that nothing secret comes out again."""

from __future__ import annotations

import pytest

from msgbus.contract.adapter import AdapterSettings
from msgbus.errors import ConfigurationError, UnsupportedFeature
from msgbus.urls import adapter_from_url
from msgbus_rabbitmq import RabbitAdapter
from msgbus_rabbitmq.url import read_url

SETTINGS = AdapterSettings()
SECRET = "pa55word"


def test_parts_and_options_of_the_url() -> None:
    """What is percent-encoded is read; an option wins over the setting."""
    place, settings = read_url("amqp://me:p%40ss@host:5673/a%20shop", {"heartbeat": "3.5", "max_body": "100", "shards": "2"}, SETTINGS)
    assert (place.host, place.port, place.user, place.password, place.vhost) == ("host", 5673, "me", "p@ss", "a shop")
    assert (settings.heartbeat, settings.shards, place.max_body) == (3.5, 2, 100)
    url = place.client_url(settings.heartbeat, "test")
    assert (url.password, url.path, url.query["heartbeat"]) == ("p@ss", "/a shop", "4")


def test_defaults() -> None:
    """RabbitMQ's own: guest, the virtual host /, and the ports."""
    place, _ = read_url("amqp://host", {}, SETTINGS)
    assert (place.port, place.user, place.password, place.vhost) == (5672, "guest", "guest", "/")
    secure, _ = read_url("amqps://[::1]", {"cafile": "/ca.pem", "no_verify_ssl": "false"}, SETTINGS)
    assert (secure.host, secure.port) == ("::1", 5671)
    query = secure.client_url(10, "test").query
    assert (query["cafile"], query["no_verify_ssl"]) == ("/ca.pem", "0")


def test_no_secret_in_any_repr() -> None:
    """Neither the adapter's nor that of its parts."""
    adapter = adapter_from_url(f"amqp://me:{SECRET}@host", SETTINGS)
    assert isinstance(adapter, RabbitAdapter)
    assert SECRET not in repr(adapter)
    assert SECRET not in repr(vars(adapter))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("amqp://host?colour=red", "'colour'"),
        ("amqp://host/vhost/more", "amqp://user:password@host"),
        ("amqp://", "amqp://user:password@host"),
        ("amqp://host:port", "port"),
        ("amqp://one,two", "one host"),
        (f"amqp://u:{SECRET}/x@host", "% escapes"),
        ("amqp://host?max_body=0", "'max_body'"),
        ("amqp://host?heartbeat=never", "'heartbeat'"),
        ("amqp://host?cafile=/x", "amqps://"),
        ("amqp://host?durability=replicated", "three nodes"),
    ],
)
def test_what_cannot_be_is_refused_by_name(url: str, says: str) -> None:
    """With the option's name or the form of the URL, and without the password."""
    with pytest.raises(ConfigurationError) as raised:
        adapter_from_url(url, SETTINGS)
    assert says in str(raised.value)
    assert SECRET not in str(raised.value)


def test_durability_is_honoured_or_refused() -> None:
    """A confirm is written to disk on a majority of nodes: that is `fsync`, and durable. How many nodes there are AMQP does not say."""
    place, _ = read_url("amqp://host", {}, AdapterSettings(durability="fsync", require_durable=True))
    assert place.host == "host"
    with pytest.raises(UnsupportedFeature, match="'replicated'"):
        read_url("amqp://host", {}, AdapterSettings(durability="replicated"))
