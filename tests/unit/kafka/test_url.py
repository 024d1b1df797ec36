"""URLs of Kafka: what they may say, and that nothing secret comes out again."""

from __future__ import annotations

import pytest

from msgbus.contract.adapter import AdapterSettings
from msgbus.errors import ConfigurationError, UnsupportedFeature
from msgbus.urls import adapter_from_url
from msgbus_kafka import KafkaAdapter
from msgbus_kafka.url import read_url

SETTINGS = AdapterSettings()
SECRET = "pa55word"


def test_several_brokers_and_options_of_the_url() -> None:
    place, settings = read_url("kafka://one,two:9093", {"session_timeout": "6", "ack_window": "50", "replication": "3"}, SETTINGS)
    assert place.client_options()["bootstrap_servers"] == ["one:9092", "two:9093"]
    assert (settings.session_timeout, settings.ack_window, place.options["replication"]) == (6.0, 50, 3)
    assert place.client_options()["security_protocol"] == "PLAINTEXT"


def test_tls_and_sasl_are_mapped() -> None:
    place, _ = read_url(f"kafkas://me:{SECRET}%40@host", {"mechanism": "SCRAM-SHA-512"}, SETTINGS)
    options = place.client_options()
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert options["sasl_plain_password"] == SECRET + "@"
    assert options["ssl_context"].check_hostname


def test_no_secret_in_any_repr() -> None:
    adapter = adapter_from_url(f"kafka://me:{SECRET}@host", SETTINGS)
    assert isinstance(adapter, KafkaAdapter)
    assert SECRET not in repr(adapter)
    assert SECRET not in repr(vars(adapter))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("kafka://host?colour=red", "'colour'"),
        ("kafka://host/path", "nothing behind"),
        ("kafka://", "host:port"),
        ("kafka://host:port", "port"),
        ("kafka://host?ack_window=0", "'ack_window'"),
        ("kafka://host?session_timeout=never", "'session_timeout'"),
        ("kafka://host?cafile=/x", "kafkas://"),
        ("kafka://host?mechanism=PLAIN", "no user"),
        ("kafkas://u:p@host?mechanism=MAGIC", "'mechanism'"),
        ("kafka://host?durability=fsync", "fsync"),
    ],
)
def test_what_cannot_be_is_refused_by_name(url: str, says: str) -> None:
    with pytest.raises((ConfigurationError, UnsupportedFeature)) as raised:
        adapter_from_url(url.replace("kafkas://u:p@", f"kafkas://u:{SECRET}@"), SETTINGS)
    assert says in str(raised.value)
    assert SECRET not in str(raised.value)
