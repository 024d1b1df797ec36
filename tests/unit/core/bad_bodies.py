"""A corpus of bodies that fit no model, or none of ours: what foreign producers, broken ones and attackers send.

`BAD`: name → (body, headers, the reason that its dead letter must have). `ODD`: what looks bad and fits the model.
"""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Order(BaseModel):
    """What the tests' handlers take."""

    model_config = ConfigDict(extra="forbid")
    id: str
    amount: int = 0
    numbers: list[int] = []
    anything: Any = None


TOUCHED = Path("touched-by-a-body")
"""A file that some of these bodies would make, if anything ran them."""


class _Touches:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (TOUCHED,))


def _deep(depth: int) -> bytes:
    return b'{"id":"1","anything":' + b"[" * depth + b"]" * depth + b"}"


def _bomb() -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        for _ in range(20):
            file.write(b'{"id":"1"}' + b" " * 1_000_000)
    return packed.getvalue()


JSON = {"content-type": "application/json"}
GOOD = b'{"id":"1"}'

BAD: dict[str, tuple[bytes, dict[str, str], str]] = {
    "empty": (b"", {}, "invalid"),
    "a space": (b" ", JSON, "invalid"),
    "an open brace": (b"{", JSON, "invalid"),
    "cut off": (b'{"id":"1"', JSON, "invalid"),
    "two documents": (GOOD + GOOD, JSON, "invalid"),
    "a trailing comma": (b'{"id":"1",}', JSON, "invalid"),
    "single quotes": (b"{'id':'1'}", JSON, "invalid"),
    "a comment": (b'{"id":"1"} // x', JSON, "invalid"),
    "truncated UTF-8": (b'{"id":"\xe2\x82', JSON, "invalid"),
    "truncated UTF-8 inside": (b'{"id":"\xe2\x82"}', JSON, "invalid"),
    "overlong UTF-8": (b'{"id":"\xc0\xaf"}', JSON, "invalid"),
    "latin-1": ('{"id":"ä"}'.encode("latin-1"), JSON, "invalid"),
    "a surrogate in UTF-8": (b'{"id":"\xed\xa0\x80"}', JSON, "invalid"),
    "a lone surrogate, escaped": (b'{"id":"\\ud800"}', JSON, "invalid"),
    "UTF-16": ('{"id":"1"}'.encode("utf-16"), JSON, "invalid"),
    "a BOM": (b"\xef\xbb\xbf" + GOOD, JSON, "invalid"),
    "NUL": (b"\x00", JSON, "invalid"),
    "NULs": (b"\x00" * 1000, JSON, "invalid"),
    "NUL behind": (GOOD + b"\x00", JSON, "invalid"),
    "a raw line end in text": (b'{"id":"\n"}', JSON, "invalid"),
    "every byte": (bytes(range(256)), {}, "invalid"),
    "null": (b"null", JSON, "invalid"),
    "true": (b"true", JSON, "invalid"),
    "a number": (b"1", JSON, "invalid"),
    "text": (b'"1"', JSON, "invalid"),
    "a list": (b"[]", JSON, "invalid"),
    "a list of one": (b"[" + GOOD + b"]", JSON, "invalid"),
    "a missing field": (b"{}", JSON, "invalid"),
    "an unknown field": (b'{"id":"1","colour":"red"}', JSON, "invalid"),
    "another type": (b'{"id":1}', JSON, "invalid"),
    "text for a number": (b'{"id":"1","amount":"many"}', JSON, "invalid"),
    "NaN": (b'{"id":"1","amount":NaN}', JSON, "invalid"),
    "Infinity": (b'{"id":"1","amount":Infinity}', JSON, "invalid"),
    "-Infinity": (b'{"id":"1","amount":-Infinity}', JSON, "invalid"),
    "1e999": (b'{"id":"1","amount":1e999}', JSON, "invalid"),
    "nan alone": (b"nan", JSON, "invalid"),
    "a number of 5,000 digits": (b'{"id":"1","amount":' + b"9" * 5000 + b"}", JSON, "invalid"),
    "10,000 deep": (_deep(10_000), JSON, "invalid"),
    "100,000 deep": (_deep(100_000), JSON, "invalid"),
    "10,000 deep and open": (b"[" * 10_000, JSON, "invalid"),
    "objects 10,000 deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, JSON, "invalid"),
    "a million elements of another type": (b'{"id":"1","numbers":[' + b"null," * 999_999 + b"null]}", JSON, "invalid"),
    "a list of a million": (b"[" + b"1," * 999_999 + b"1]", JSON, "invalid"),
    "a hundred thousand unknown fields": (b"{" + b",".join(b'"f%d":1' % n for n in range(100_000)) + b"}", JSON, "invalid"),
    "gzip without a word": (gzip.compress(GOOD), JSON, "invalid"),
    "gzip": (gzip.compress(GOOD), {**JSON, "content-encoding": "gzip"}, "unsupported"),
    "a gzip bomb": (_bomb(), {**JSON, "content-encoding": "gzip"}, "unsupported"),
    "an unknown encoding": (GOOD, {**JSON, "content-encoding": "snappy"}, "unsupported"),
    "pickle": (pickle.dumps(_Touches()), {"content-type": "application/x-python-serialize"}, "unsupported"),
    "pickle by another name": (pickle.dumps(_Touches()), {"content-type": "application/python-pickle"}, "unsupported"),
    "pickle as JSON": (pickle.dumps(_Touches()), JSON, "invalid"),
    "pickle without a word": (pickle.dumps(_Touches()), {}, "invalid"),
    "YAML": (b"!!python/object/apply:os.system ['touch touched-by-a-body']", {"content-type": "application/x-yaml"}, "unsupported"),
    "YAML without a word": (b"!!python/object/apply:os.system ['touch touched-by-a-body']", {}, "invalid"),
    "msgpack": (b"\x81\xa2id\xa11", {"content-type": "application/msgpack"}, "unsupported"),
    "a msgpack extension": (b"\xc7\x01\x01\x00", {"content-type": "application/x-msgpack"}, "unsupported"),
    "an unknown content type": (GOOD, {"content-type": "application/vnd.shop.order"}, "unsupported"),
    "an empty content type": (GOOD, {"content-type": ""}, "unsupported"),
    "text/plain": (GOOD, {"content-type": "text/plain"}, "unsupported"),
    "charset latin-1": (GOOD, {"content-type": "application/json;charset=latin-1"}, "unsupported"),
    "a newer version": (GOOD, {**JSON, "ce-type": "Order.v2"}, "unsupported"),
    "a version far ahead": (GOOD, {**JSON, "ce-type": "Order.v999999999999"}, "unsupported"),
}

ODD: dict[str, tuple[bytes, dict[str, str]]] = {
    "no headers": (GOOD, {}),
    "spaces around": (b" \n\t" + GOOD + b"\r\n ", JSON),
    "a key twice: the last one counts": (b'{"id":"first","id":"1"}', JSON),
    "an int above 2**64": (b'{"id":"1","amount":340282366920938463463374607431768211456}', JSON),
    "an escaped NUL": (b'{"id":"\\u0000"}', JSON),
    "escaped everything": (b'{"\\u0069\\u0064":"\\ud83d\\ude00"}', JSON),
    "another one's event type": (GOOD, {**JSON, "ce-type": "com.shop.order.placed"}),
    "another name for JSON": (GOOD, {"content-type": "application/cloudevents+json; charset=UTF-8"}),
    "an identity encoding": (GOOD, {**JSON, "content-encoding": "identity"}),
    "100,000 elements": (b'{"id":"1","numbers":[' + b"1," * 99_999 + b"1]}", JSON),
}
