"""Settings: what can be said outside the program. Read when a bus is entered, never at import.

Order: an argument of `Bus(...)`, then one of `Settings(...)`, which reads what it is not given when it is made, then `MSGBUS_…`
variables, then `msgbus.toml` in the working directory, then the default.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from msgbus.checks import takes
from msgbus.contract.adapter import AdapterSettings
from msgbus.errors import ConfigurationError

TOML_FILE = "msgbus.toml"


def _seconds(value: Any) -> Any:  # Any: whatever a variable or a file holds; pydantic validates it next
    """A number, also as a variable's text, is seconds; pydantic reads ISO 8601 and `1 days HH:MM:SS` itself."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Duration = Annotated[timedelta, BeforeValidator(_seconds)]
Positive = Annotated[Duration, Field(gt=timedelta(0))]


class Settings(BaseSettings):
    """Every setting of a bus. Durations: `timedelta`, seconds, or ISO 8601 (`PT30S`). Unknown names are refused."""

    model_config = SettingsConfigDict(
        env_prefix="MSGBUS_", toml_file=TOML_FILE, extra="forbid", frozen=True, validate_default=False, hide_input_in_errors=True
    )

    url: SecretStr | None = None
    """The broker. Secret: a URL may hold a password."""
    service: str | None = None
    """Default group, and the CloudEvents source."""
    namespace: str = ""
    """In front of every physical name, for brokers that several environments share: `staging.`."""
    topology: Literal["create", "check"] = "create"
    concurrency: int = Field(default=16, ge=1)
    shards: int = Field(default=8, ge=1, le=1024)
    publish_timeout: Positive = timedelta(seconds=10)
    drain_timeout: Annotated[Duration, Field(ge=timedelta(0))] = timedelta(seconds=30)
    close_timeout: Positive = timedelta(seconds=5)
    heartbeat: Positive = timedelta(seconds=10)
    session_timeout: Positive = timedelta(seconds=15)
    lease: Positive = timedelta(seconds=60)
    max_deliveries: int = Field(default=5, ge=1)
    first_group_retention: Positive = timedelta(days=7)
    dead_letter_retention: Positive | None = None
    durability: Literal["broker", "fsync", "replicated"] = "broker"
    require_durable: bool = False
    ack_window: int = Field(default=1000, ge=1)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def for_adapter(self) -> AdapterSettings:
        """What an adapter needs to know of them, in seconds."""
        return AdapterSettings(
            heartbeat=self.heartbeat.total_seconds(),
            session_timeout=self.session_timeout.total_seconds(),
            lease=self.lease.total_seconds(),
            first_group_retention=self.first_group_retention.total_seconds(),
            dead_letter_retention=None if self.dead_letter_retention is None else self.dead_letter_retention.total_seconds(),
            durability=self.durability,
            require_durable=self.require_durable,
            ack_window=self.ack_window,
            shards=self.shards,
        )


def load(given: Settings | None = None) -> Settings:
    """The settings given, or those of the environment and `msgbus.toml`. Raises `ConfigurationError` naming each that is wrong.

    A `MSGBUS_…` variable that is no setting is refused too, unless it is the tests' (`MSGBUS_TEST_…`): a mistyped name is never ignored.
    """
    import os

    for variable in os.environ:
        name = variable.upper()
        if name.startswith("MSGBUS_") and not name.startswith("MSGBUS_TEST_") and name[7:].lower() not in Settings.model_fields:
            raise ConfigurationError(
                f"unknown setting {variable}; known: {', '.join('MSGBUS_' + known.upper() for known in Settings.model_fields)}"
            )
    if given is not None:
        takes("Bus(...): settings", given, Settings, "msgbus.settings.Settings(...)")
        return given
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors(include_input=False))
        raise ConfigurationError(f"settings (MSGBUS_… variables or {TOML_FILE}): {problems}") from None
    except (ValueError, OSError) as error:  # the file is no TOML, no UTF-8, or cannot be read
        raise ConfigurationError(f"settings ({TOML_FILE} in {os.getcwd()}): {error}") from error
