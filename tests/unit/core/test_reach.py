"""What a broker's URL says before its options: one way on every broker, and no word of it in an error."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msgbus.contract.options import read_reach
from msgbus.errors import ConfigurationError

SHAPE = "x://user:password@host:port/path"

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
hosts = st.lists(st.tuples(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True), st.integers(1, 65535)), min_size=1, max_size=4)


@given(user=names, password=names, hosts=hosts, path=st.lists(names, max_size=3))
def test_what_is_percent_encoded_comes_back(user: str, password: str, hosts: list[tuple[str, int]], path: list[str]) -> None:
    """Whatever user, password and path are, once they are percent-encoded."""
    where = ",".join(f"{host}:{port}" for host, port in hosts)
    url = f"x://{quote(user, safe='')}:{quote(password, safe='')}@{where}/{'/'.join(quote(part, safe='') for part in path)}"
    reach = read_reach(url, 1, SHAPE)
    assert (reach.user, reach.password, reach.hosts, reach.path) == (user, password, tuple(hosts), tuple(path))
    assert reach.shown == where


def test_what_is_left_out() -> None:
    """The port is the broker's own; without a user there is none, which is not an empty one; a host may have a default."""
    reach = read_reach("x://a,[::1]:7", 5, SHAPE)
    assert (reach.user, reach.password, reach.hosts, reach.path) == (None, "", (("a", 5), ("::1", 7)), ())
    assert reach.shown == "a:5,[::1]:7"
    assert read_reach("x://:only@a", 5, SHAPE).user == ""
    assert read_reach("x://", 5, SHAPE, host="here").hosts == (("here", 5),)
    assert "secret" not in repr(read_reach("x://u:secret@a", 5, SHAPE))


@pytest.mark.parametrize(
    "url",
    [
        "x://",
        "x://u:secret@",
        "x://u:secret@a,:7",
        "x://u:secret@a:port",
        "x://u:secret@a:65536",
        "x://u:secret@[::1",
        "x://u:secret#1@a",
        "x://u:secret/1@a",
        "x://u:12/secret@a",
    ],
)
def test_what_has_another_shape_is_refused_and_not_shown(url: str) -> None:
    """The error says what the URL is to be, and nothing of what it is: any part of it may belong to the password."""
    with pytest.raises(ConfigurationError) as caught:
        read_reach(url, 5, SHAPE)
    assert SHAPE in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
