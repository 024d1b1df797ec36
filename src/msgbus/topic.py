"""Topic[M]: the contract between who publishes and who subscribes: name, model, ordering key, version."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Generic, TypeVar, overload

from typing_extensions import TypeForm

from msgbus.checks import each_takes, takes
from msgbus.contract.envelope import check_topic
from msgbus.errors import ConfigurationError

M = TypeVar("M")

_BROKERS = {"memory": "memory", "rabbitmq": "rabbitmq", "amqp": "rabbitmq", "redis": "redis", "kafka": "kafka"}
"""What people call the brokers whose adapters are msgbus's own, and their names in `native`. Others' names are their own affair."""
_MEDIA_TYPE = re.compile(r"(?=.{1,255}$)[!-.0-~]+/[!-.0-~][ -~]*")


@dataclass(frozen=True, init=False, eq=True)
class Topic(Generic[M]):
    """A named stream of messages of one model. Frozen, equal by value, free to make at import: it opens nothing.

    `name`: 1 to 120 characters of `[A-Za-z0-9._-]`, the namespace included. `model`: a pydantic model, dataclass, TypedDict, `list[…]`,
    union, `Annotated[…]`, or `bytes`, which travel as they are. `key`: the field, or a function of the message, that names the ordering
    key: messages of one key are handled in the order published. `version` of the model, part of the CloudEvents type.
    `content_type` of the body, if not JSON's (or, for bytes, `application/octet-stream`). `shards`: how many processes of a group can
    share a keyed topic (default: the setting, 8). `priorities`: high, normal and low, on topics without key. `retain`: history that later
    groups get. `native`: what only one broker has, by its name: `{"rabbitmq": {…}}`.

    Raises `InvalidName` or `ConfigurationError` for what no broker, or no reader, could keep.
    """

    name: str
    model: Any  # a class or a type form: TypeForm[M] cannot be written for an attribute
    key: str | Callable[[M], str | None] | None
    version: int
    content_type: str | None
    shards: int | None
    priorities: bool
    retain: timedelta | None
    native: Mapping[str, Mapping[str, object]] = field(hash=False)

    @overload
    def __init__(
        self,
        name: str,
        model: type[M],
        *,
        key: str | Callable[[M], str | None] | None = None,
        version: int = 1,
        content_type: str | None = None,
        shards: int | None = None,
        priorities: bool = False,
        retain: timedelta | None = None,
        native: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        model: TypeForm[M],
        *,
        key: str | Callable[[M], str | None] | None = None,
        version: int = 1,
        content_type: str | None = None,
        shards: int | None = None,
        priorities: bool = False,
        retain: timedelta | None = None,
        native: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        model: Any,  # a class or a type form, as the overloads say
        *,
        key: str | Callable[[M], str | None] | None = None,
        version: int = 1,
        content_type: str | None = None,
        shards: int | None = None,
        priorities: bool = False,
        retain: timedelta | None = None,
        native: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        check_topic(name)
        place = f"Topic({name!r})"
        each_takes(
            place,
            ("version", version, int, "an int"),
            ("shards", shards, int, "an int"),
            ("retain", retain, timedelta, "a timedelta"),
            ("content_type", content_type, str, "text"),
            ("native", native, Mapping, "a mapping: name of a broker to its options"),
        )
        for broker, options in (native or {}).items():
            takes(f"{place}: native", broker, str, "names of brokers")
            takes(f"{place}: native[{broker!r}]", options, Mapping, "a mapping of options")
            if (meant := get_close_matches(broker.lower(), _BROKERS, n=1, cutoff=0.8)) and _BROKERS[meant[0]] != broker:
                raise ConfigurationError(f"{place}: native[{broker!r}]: no broker is called so; did you mean {_BROKERS[meant[0]]!r}?")
        if key is not None and not callable(key):
            takes(f"{place}: key", key, str, "the name of a field, or a function of the message")
        if content_type is not None and not _MEDIA_TYPE.fullmatch(content_type):
            raise ConfigurationError(f"{place}: content_type {content_type!r}: type/subtype, at most 255 printable characters of ASCII")
        if version < 1:
            raise ConfigurationError(f"{place}: version counts from 1, not {version}")
        if shards is not None and not 1 <= shards <= 1024:
            raise ConfigurationError(f"{place}: shards must be 1 to 1024, not {shards}")
        if shards is not None and key is None:
            raise ConfigurationError(f"{place}: shards slice a keyed topic; give it a key= or leave shards= out")
        if key is not None and priorities:
            raise ConfigurationError(f"{place}: a key's order and priorities contradict each other; make two topics, one of each")
        if key is not None and model is bytes and not callable(key):
            raise ConfigurationError(f"{place}: bytes have no field {key!r}; give key= a function of the bytes")
        if retain is not None and retain <= timedelta(0):
            raise ConfigurationError(f"{place}: retain must be positive, not {retain}")
        if model is None or (isinstance(model, str) and model):
            raise ConfigurationError(f"{place}: {model!r} is no model; give the class itself")
        for field_name, value in (
            ("name", name),
            ("model", model),
            ("key", key),
            ("version", version),
            ("content_type", content_type),
            ("shards", shards),
            ("priorities", priorities),
            ("retain", retain),
            ("native", MappingProxyType({broker: dict(options) for broker, options in (native or {}).items()})),
        ):
            object.__setattr__(self, field_name, value)  # frozen, and its __init__ is written out for the overloads

    @property
    def model_name(self) -> str:
        """What the CloudEvents type calls the model: its class's name, or the topic's where the model is no class of the user's."""
        if isinstance(self.model, type) and self.model.__module__ != "builtins":
            return self.model.__name__
        return self.name
