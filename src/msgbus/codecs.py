"""The codecs that come with msgbus: JSON by pydantic for any model it knows, and bytes as they are. Built once a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from msgbus.contract.codec import Codec

M = TypeVar("M")

JSON = "application/json"
_HUGE_EXPONENT = re.compile(rb"e(?<=[0-9]e)\+?[0-9]{3,}(?![^\s,\]}])")
"""A number that may overflow: 1e999, in lower case. It begins with the letter alone, which is searched for three times as fast."""
_DIGITS = b"0123456789"
_LONGEST = 308
"""Digits of the largest number that a float holds."""
_LONG = re.compile(rb"[0-9]{%d}" % (_LONGEST + 1))
OCTETS = "application/octet-stream"


def codec_for(model: Any, content_type: str | None) -> Codec[Any]:  # Any: a model is a class, a union, list[...]: whatever pydantic takes
    """The codec of a model: bytes travel as they are, all else is JSON. Raises TypeError when pydantic knows no schema for it."""
    if model is bytes:
        return BytesCodec(content_type or OCTETS)
    return JsonCodec(model, content_type or JSON)


def decoder(codec: Codec[M]) -> Callable[[bytes], M]:
    """What decodes a body: the codec's method; of our own JSON codec the function that it would only call: one call a message less."""
    return codec.validate if type(codec) is JsonCodec else codec.decode


class BytesCodec(Codec[bytes]):
    """The message is the body. Reads every content type."""

    def __init__(self, content_type: str) -> None:
        self.content_type = content_type

    def accepts(self, content_type: str | None) -> bool:
        return True

    def encode(self, message: bytes) -> bytes:
        if type(message) is not bytes:
            raise TypeError(f"expected bytes, not {type(message).__name__}")
        return message

    def decode(self, body: bytes) -> bytes:
        return body


class JsonCodec(Codec[M], Generic[M]):
    """JSON, validated by pydantic both ways: what does not fit the model is neither sent nor handed to a handler."""

    def __init__(self, model: Any, content_type: str) -> None:  # Any: see codec_for
        self.content_type = content_type
        try:
            adapter: TypeAdapter[M] = TypeAdapter(model)
        except Exception as error:  # pydantic raises several kinds of error for a type that it has no schema for
            raise TypeError(f"pydantic knows no schema for {model!r}: {error}") from error
        self._adapter = adapter
        self._dump = adapter.serializer.to_json if adapter.pydantic_complete else adapter.dump_json
        self.validate = _finite_validator(adapter)
        self._model = model if isinstance(model, type) and issubclass(model, BaseModel) else None
        self._accepted: set[str] = {JSON}

    def decode(self, body: bytes) -> M:
        return self.validate(body)

    def accepts(self, content_type: str | None) -> bool:
        if content_type is None or content_type in self._accepted:
            return True
        base, _, parameters = content_type.lower().partition(";")
        base = base.strip()
        fits = base in {JSON, "text/json"} or (base.startswith("application/") and base.endswith("+json"))
        for parameter in parameters.split(";"):
            name, _, value = parameter.strip().partition("=")
            if name == "charset" and value.strip('" ') not in ("utf-8", "utf8", "us-ascii"):
                fits = False
        if fits and len(self._accepted) < 64:  # bounded: the text comes from outside
            self._accepted.add(content_type)
        return fits

    def encode(self, message: M) -> bytes:
        if self._model is not None and not isinstance(message, self._model):
            raise TypeError(f"expected {self._model.__name__}, not {type(message).__name__}")
        try:
            body = self._dump(message, by_alias=True, warnings="error")  # an alias is the name that validation reads
            has_null = b"null" in body
            if has_null and _holds_nan(self._adapter.dump_python(message)):
                raise ValueError("NaN and Infinity are not JSON: they would arrive as null")
            if b"NaN" in body or b"Infinity" in body:  # a model may ask pydantic for the bare words, which are no JSON either
                json.loads(body, parse_constant=_refuse)
            if self._model is None or has_null:  # pydantic writes a field that is missing, or None, without a word
                self.validate(body)
        except (PydanticSerializationError, ValidationError, RecursionError) as error:
            raise ValueError(str(error)) from error
        return body


def _finite_validator(adapter: TypeAdapter[M]) -> Callable[[bytes], M]:
    """Pydantic's validation of a body, less what it takes beyond JSON: NaN, Infinity, and numbers that overflow to it."""
    validate = adapter.validate_json
    try:
        has_numbers = '"number"' in json.dumps(adapter.json_schema())
    except Exception:  # pydantic has no JSON schema for every model that it validates
        has_numbers = True

    def validate_finite(body: bytes) -> M:
        message = validate(body)
        if (b"NaN" in body or b"Infinity" in body or (has_numbers and _may_overflow(body))) and _holds_nan(
            adapter.dump_python(message, warnings=False)
        ):
            raise ValueError("NaN and Infinity are not JSON, and have no number")
        return message

    return validate_finite


def _may_overflow(body: bytes) -> bool:
    """Whether a number in it may be more than a float holds. One of too many digits has one at some 309th byte."""
    some = body[_LONGEST :: _LONGEST + 1]
    long = len(some.translate(None, _DIGITS)) < len(some) and _LONG.search(body) is not None
    return long or _HUGE_EXPONENT.search(body.lower()) is not None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON; NaN and Infinity have no number there")


def _holds_nan(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    items: Iterable[object] = ()
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).values()
    elif isinstance(value, list | tuple | set | frozenset):
        items = cast("Iterable[object]", value)
    return any(_holds_nan(item) for item in items)
