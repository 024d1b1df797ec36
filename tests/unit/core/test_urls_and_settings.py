"""URLs and settings: what wins, what is refused by name, and that no secret shows."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from msgbus import Bus
from msgbus.contract.adapter import AdapterSettings
from msgbus.errors import ConfigurationError, MsgbusError, UnknownAdapter
from msgbus.settings import Settings, load
from msgbus.urls import ENTRY_POINTS, EXTRAS, adapter_from_url, hide_secrets
from msgbus_memory import MemoryAdapter


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own, and no variable of ours."""
    for name in list(os.environ):
        if name.upper().startswith("MSGBUS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- settings


def test_the_order_is_argument_variable_file_default(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one wins over those behind it, setting by setting."""
    assert load().concurrency == 16
    (elsewhere / "msgbus.toml").write_text('concurrency = 5\nshards = 5\nservice = "file"\n')
    assert (load().concurrency, load().shards, load().service) == (5, 5, "file")
    monkeypatch.setenv("MSGBUS_CONCURRENCY", "6")
    monkeypatch.setenv("MSGBUS_SERVICE", "variable")
    assert (load().concurrency, load().shards, load().service) == (6, 5, "variable")
    given_settings = Settings(concurrency=7)
    assert (given_settings.concurrency, given_settings.shards, given_settings.service) == (7, 5, "variable")
    assert load(given_settings) is given_settings


async def test_a_bus_reads_them_when_it_is_entered(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at import and not when it is made; an argument of `Bus` wins over all."""
    bus = Bus()
    named = Bus("memory://argument", service="argument")
    monkeypatch.setenv("MSGBUS_URL", "memory://variable")
    monkeypatch.setenv("MSGBUS_SERVICE", "variable")
    async with bus, named:
        assert (bus.runtime.service, repr(bus.runtime.adapter)) == ("variable", "<MemoryAdapter memory://variable open>")
        assert (named.runtime.service, repr(named.runtime.adapter)) == ("argument", "<MemoryAdapter memory://argument open>")


async def test_no_broker_is_memory_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Unset: `memory://`, and it says so."""
    async with Bus() as bus:
        assert bus.runtime.adapter.name == "memory"
    assert "MSGBUS_URL" in caplog.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2.5", 2.5), ("30", 30.0), ("PT30S", 30.0), ("PT5M", 300.0), ("P7D", 604800.0), ("00:01:00", 60.0), ("1 days, 00:00:00", 86400.0)],
)
def test_durations_are_seconds_or_iso_8601(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a variable, as TOML and as an argument."""
    monkeypatch.setenv("MSGBUS_LEASE", text)
    assert load().lease == timedelta(seconds=seconds)
    monkeypatch.delenv("MSGBUS_LEASE")
    Path("msgbus.toml").write_text(f'lease = "{text}"\n')
    assert load().lease == timedelta(seconds=seconds)
    assert load().for_adapter().lease == seconds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONCURRENCY", "0"), ("CONCURRENCY", "many"), ("CONCURRENCY", "1.5"), ("SHARDS", "2000"), ("SHARDS", "0"), ("LEASE", "0"),
        ("LEASE", "-1"), ("LEASE", "nan"), ("LEASE", "inf"), ("LEASE", "soon"), ("PUBLISH_TIMEOUT", "0"), ("DRAIN_TIMEOUT", "x"),
        ("DRAIN_TIMEOUT", "-1"), ("TOPOLOGY", "destroy"), ("DURABILITY", "maybe"), ("REQUIRE_DURABLE", "perhaps"), ("MAX_DELIVERIES", "0"),
        ("ACK_WINDOW", "0"), ("DEAD_LETTER_RETENTION", "0"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a variable, when the settings are read."""
    monkeypatch.setenv(f"MSGBUS_{name}", value)
    with pytest.raises(ConfigurationError, match=f"settings.*{name.lower()}"):
        load()


def test_unknown_names_are_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped variable, key of the file or argument is never ignored. Those of our tests are let be."""
    monkeypatch.setenv("MSGBUS_CONCURENCY", "3")
    with pytest.raises(ConfigurationError, match=r"unknown setting MSGBUS_CONCURENCY.*MSGBUS_CONCURRENCY"):
        load()
    monkeypatch.delenv("MSGBUS_CONCURENCY")
    monkeypatch.setenv("MSGBUS_TEST_BROKERS", "all")
    load()
    (elsewhere / "msgbus.toml").write_text("concurency = 3\n")
    with pytest.raises(ConfigurationError, match=r"msgbus\.toml.*concurency"):
        load()


@pytest.mark.parametrize("content", ["concurrency = ", "[[[", "\x00", "concurrency = 3\nconcurrency = 4"])
def test_a_file_that_is_no_toml_is_refused_by_name(content: str, elsewhere: Path) -> None:
    """`ConfigurationError` that names the file and what is wrong."""
    (elsewhere / "msgbus.toml").write_text(content)
    with pytest.raises(ConfigurationError, match=r"msgbus\.toml"):
        load()


SECRET = "s3cr3t-pässword"


def test_a_url_in_the_settings_is_hidden(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `repr` nor an error about another setting shows it."""
    monkeypatch.setenv("MSGBUS_URL", f"amqp://user:{SECRET}@host")
    settings = load()
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert SECRET not in str(settings.model_dump())
    assert settings.url is not None
    assert SECRET in settings.url.get_secret_value()
    monkeypatch.setenv("MSGBUS_SHARDS", "0")
    with pytest.raises(ConfigurationError) as raised:
        load()
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    monkeypatch.delenv("MSGBUS_SHARDS")
    (elsewhere / "msgbus.toml").write_text(f'url = ["amqp://{SECRET}"]\n')
    monkeypatch.delenv("MSGBUS_URL")
    with pytest.raises(ConfigurationError) as raised:
        load()
    assert SECRET not in "".join(traceback.format_exception(raised.value))


def test_settings_made_by_hand_hide_what_they_were_given_wrongly() -> None:
    """pydantic's own error, which shows no input: a URL may hold a password."""
    with pytest.raises(ValueError, match="url") as raised:
        Settings(url=[SECRET])  # type: ignore[arg-type]
    assert SECRET not in str(raised.value)


# ---------------------------------------------------------------- urls

PLAIN = AdapterSettings()


@pytest.fixture
def only_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no other adapter is installed."""
    memory = entry_points(group=ENTRY_POINTS, name="memory")
    monkeypatch.setattr("msgbus.urls.entry_points", lambda group: memory)


@pytest.mark.usefixtures("only_memory")
def test_a_scheme_that_is_not_installed_names_the_line_to_type() -> None:
    """pip with the right extra, where this version has it; `redis+sentinel` is redis's."""
    for scheme, extra in [*EXTRAS.items(), ("redis+sentinel", "redis"), ("redis+cluster", "redis")]:
        with pytest.raises(UnknownAdapter) as raised:
            adapter_from_url(f"{scheme}://user:{SECRET}@host", PLAIN)
        there = extra in (metadata("msgbus").get_all("Provides-Extra") or ())
        assert (f'pip install "msgbus[{extra}]"' if there else "this version of msgbus has no adapter") in str(raised.value)
        assert SECRET not in str(raised.value)


@pytest.mark.usefixtures("only_memory")
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memry://", "did you mean memory://?"),
        ("kafak://host", "did you mean kafka://?"),
        ("ampq://host", "did you mean amqp://?"),
        ("zzz://host", "known: memory://"),
        ("", "no scheme"),
        ("memory", "no scheme"),
        ("//host", "no scheme"),
    ],
)
def test_a_scheme_that_is_none_is_answered_with_what_is_near(url: str, says: str) -> None:
    """`UnknownAdapter`, with a guess or the list."""
    with pytest.raises(UnknownAdapter) as raised:
        adapter_from_url(url, PLAIN)
    assert says in str(raised.value)


@pytest.mark.parametrize("url", ["memory://?limit=1&limit=2", "memory://?limit=1&shards=2&limit=1"])
def test_an_option_named_twice_is_refused(url: str) -> None:
    """Neither is silently the one that counts."""
    with pytest.raises(ConfigurationError, match="twice"):
        adapter_from_url(url, PLAIN)


def test_an_options_value_wins_over_the_setting() -> None:
    """The URL's query is nearer."""
    adapter = adapter_from_url("memory://?shards=3", AdapterSettings(shards=9))
    assert isinstance(adapter, MemoryAdapter)
    assert adapter._terms.shards == 3


@pytest.mark.parametrize(
    "url", ["memory://?limit", f"memory://?{SECRET}", f"memory://?limit=1&{SECRET}", "memory://[", f"amqp://u:{SECRET}℀@host"]
)
def test_a_url_that_cannot_be_read_is_refused_without_showing_it(url: str) -> None:
    """`ConfigurationError`; what could be a secret is not in it."""
    with pytest.raises(ConfigurationError) as raised:
        adapter_from_url(url, PLAIN)
    shown = "".join(traceback.format_exception(raised.value, chain=True)).partition("\n")[2]
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None
    assert shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:secret@host:5672/vhost", "amqp://user:***@host:5672/vhost"),
        ("amqp://user@host", "amqp://user:***@host"),
        ("amqp://:secret@host", "amqp://:***@host"),
        ("amqp://user:sec@ret@host", "amqp://***"),
        ("amqp://user:sec/ret@host/vhost", "amqp://user:***@host/vhost"),
        ("amqp://user:sec#ret@host/vhost", "amqp://***"),
        ("amqp://user:sec?ret@host/vhost", "amqp://***"),
        ("amqp://user:secret@host?password=sec@ret", "amqp://***"),
        ("amqp:user:secret@host", "amqp"),
        ("amqp://user:secret@host?password=secret", "amqp://user:***@host"),
        ("kafka://h1:9092,h2:9092", "kafka://h1:9092,h2:9092"),
        ("memory://", "memory://"),
        ("memory://name?limit=3", "memory://name"),
        ("redis://host:6379/0#secret", "redis://host:6379/0"),
    ],
)
def test_a_url_is_shown_without_password_and_query(url: str, shown: str) -> None:
    """Also where the password was not percent-encoded as it should have been."""
    assert hide_secrets(url) == shown


for _scheme in ("amqp", "kafka"):
    adapter_from_url(f"{_scheme}://host", PLAIN)  # their libraries are loaded here, and not by an example that has a deadline


@given(
    st.sampled_from(["memory", "memry", "amqp", "kafka", ""]),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8).map(lambda text: f"XX{text}XX"),
    st.sampled_from(["{s}://user:{p}@host/path", "{s}://user:{p}@[::1]:5672/", "{s}://:{p}@host?limit=1", "{s}://u:{p}@h?limit={p}"]),
)
@example("amqp", "a?XX=1", "{s}://user:{p}@host/path")
@example("kafka", "a@b?x=XX", "{s}://user:{p}@host/path")
def test_no_password_shows_in_any_error_or_repr(scheme: str, password: str, pattern: str) -> None:
    """Whatever characters it has, and whatever is wrong with the URL."""
    url = pattern.format(s=scheme, p=password)
    assert "XX" not in hide_secrets(url)
    with pytest.raises(MsgbusError) as raised:
        raise MsgbusError(repr(adapter_from_url(url, PLAIN)))
    assert "XX" not in str(raised.value)


async def test_a_bus_shows_no_password() -> None:
    """Neither the bus's nor its parts' repr, nor the error when it is entered."""
    bus = Bus(f"zzz://user:{SECRET}@host", settings=Settings(url=SecretStr(f"zzz://u:{SECRET}@h")))
    assert SECRET not in repr(bus)
    with pytest.raises(UnknownAdapter) as raised:
        async with bus:
            pytest.fail("entered")
    assert SECRET not in str(raised.value)
