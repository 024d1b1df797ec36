"""The suite of idempotency stores: what every one must do. Import everything of it beside a fixture `stores`.

```python
import pytest

from msgbus.testing.store_suite import *  # noqa: F403
from msgbus.testing.store_suite import Stores


@pytest.fixture
def stores() -> Stores:
    return Stores(open_my_store)  # an async context manager that gives a store
```
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import pytest

from msgbus.contract.idempotency import AlreadyDone, Claim, Conflict, IdempotencyStore, InProgress, New

SHORT = 0.3
"""A lease, in seconds, whose end a test waits for."""
LONG = 60.0
PRINT, OTHER = "a" * 64, "b" * 64


@dataclass(frozen=True, slots=True)
class Stores:
    """What the fixture `stores` returns. `open()` gives a store; with `shared`, what two of them know is the same."""

    open: Callable[[], AbstractAsyncContextManager[IdempotencyStore]]
    shared: bool = True
    seconds: float = 30.0
    """A test's deadline."""


Test = Callable[[IdempotencyStore, str], Awaitable[None]]
TESTS: dict[str, Callable[[Stores], None]] = {}


def clause(function: Test) -> Callable[[Stores], None]:
    """Makes a test of the suite: an open store, a group of its own, a deadline."""

    async def run(stores: Stores) -> None:
        async with asyncio.timeout(stores.seconds), stores.open() as store:
            await function(store, _group())

    return _registered(function.__name__, function.__doc__, lambda stores: asyncio.run(run(stores)))


def _registered(name: str, words: str | None, work: Callable[[Stores], None]) -> Callable[[Stores], None]:
    def test(stores: Stores) -> None:
        work(stores)

    test.__name__ = test.__qualname__ = f"test_{name}"
    test.__doc__ = words
    TESTS[test.__name__] = test
    return test


def _group() -> str:
    return f"orders.g{uuid.uuid4().hex[:12]}"


async def claimed(store: IdempotencyStore, group: str, key: str = "k", lease: float = LONG) -> str:
    """The token of a claim that must succeed."""
    claim = await store.begin(group, key, PRINT, lease)
    assert isinstance(claim, New), claim
    return claim.token


async def free_again(store: IdempotencyStore, group: str, key: str = "k") -> str:
    """The token of the next claim, once the key is free. Asks all the while, so that it is not free a moment too early."""
    while True:
        claim = await store.begin(group, key, PRINT, LONG)
        if isinstance(claim, New):
            return claim.token
        await asyncio.sleep(0.01)  # then it looks again


@clause
async def one_of_many_at_once_gets_a_key(store: IdempotencyStore, group: str) -> None:
    """Of many claims at once one is new, and the others see it in progress."""
    claims = await asyncio.gather(*(store.begin(group, "k", PRINT, LONG) for _ in range(20)))
    assert [type(claim) for claim in claims].count(New) == 1
    others = [claim for claim in claims if not isinstance(claim, New)]
    assert all(isinstance(claim, InProgress) and 0 <= claim.remaining <= LONG for claim in others), others


@clause
async def a_claim_says_how_long_it_still_holds(store: IdempotencyStore, group: str) -> None:
    """`remaining` is in seconds, and what is left of the lease."""
    await claimed(store, group)
    claim = await store.begin(group, "k", PRINT, LONG)
    assert isinstance(claim, InProgress)
    assert LONG - 10 < claim.remaining <= LONG


@clause
async def what_is_done_stays_done(store: IdempotencyStore, group: str) -> None:
    """A completed effect is answered with its result, byte for byte; none is not the same as an empty one."""
    for number, result in enumerate([None, b"", b"\x00\xff\xfe", b"x" * 100_000]):
        token = await claimed(store, group, f"k{number}")
        assert await store.complete(group, f"k{number}", token, result, LONG) is True
        assert await store.begin(group, f"k{number}", PRINT, LONG) == AlreadyDone(result)


@clause
async def another_payload_conflicts(store: IdempotencyStore, group: str) -> None:
    """The same key with another fingerprint is a conflict, while it is in progress and when it is done; it changes nothing."""
    token = await claimed(store, group)
    assert await store.begin(group, "k", OTHER, LONG) == Conflict()
    assert await store.complete(group, "k", token, b"r", LONG) is True
    assert await store.begin(group, "k", OTHER, LONG) == Conflict()
    assert await store.begin(group, "k", PRINT, LONG) == AlreadyDone(b"r")


@clause
async def groups_do_not_know_each_other(store: IdempotencyStore, group: str) -> None:
    """Two groups that handle one message both run."""
    await claimed(store, group)
    await claimed(store, group + "-audit")


@clause
async def a_lease_ends(store: IdempotencyStore, group: str) -> None:
    """When a lease is over the key is free, not before, and the old token holds nothing any more."""
    began = asyncio.get_running_loop().time()
    old = await claimed(store, group, lease=SHORT)
    new = await free_again(store, group)
    assert asyncio.get_running_loop().time() - began >= SHORT * 0.9
    assert new != old
    assert await store.renew(group, "k", old, LONG) is False
    assert await store.abandon(group, "k", old) is False
    assert await store.complete(group, "k", old, b"late", LONG) is False
    assert isinstance(await store.begin(group, "k", PRINT, LONG), InProgress)
    assert await store.complete(group, "k", new, b"r", LONG) is True
    assert await store.begin(group, "k", PRINT, LONG) == AlreadyDone(b"r")


@clause
async def a_renewed_lease_goes_on(store: IdempotencyStore, group: str) -> None:
    """`renew` counts from now, and may shorten as well."""
    token = await claimed(store, group, lease=SHORT)
    assert await store.renew(group, "k", token, LONG) is True
    claim = await store.begin(group, "k", PRINT, LONG)
    assert isinstance(claim, InProgress)
    assert claim.remaining > SHORT
    assert await store.renew(group, "k", token, SHORT) is True
    await free_again(store, group)


@clause
async def a_claim_given_up_is_free_at_once(store: IdempotencyStore, group: str) -> None:
    """`abandon` frees the key, whatever the next payload; twice is once."""
    token = await claimed(store, group)
    assert await store.abandon(group, "k", token) is True
    assert await store.abandon(group, "k", token) is False
    assert isinstance(await store.begin(group, "k", OTHER, LONG), New)


@clause
async def only_the_token_holds_a_claim(store: IdempotencyStore, group: str) -> None:
    """A token that was never given, or is another key's, changes nothing."""
    token = await claimed(store, group)
    other = await claimed(store, group, "other")
    for wrong in ("never given", "", other):
        assert await store.complete(group, "k", wrong, b"r", LONG) is False
        assert await store.renew(group, "k", wrong, SHORT) is False
        assert await store.abandon(group, "k", wrong) is False
    assert await store.complete(group, "missing", token, b"r", LONG) is False
    assert await store.complete(group, "k", token, b"r", LONG) is True


@clause
async def what_is_done_is_no_longer_a_claim(store: IdempotencyStore, group: str) -> None:
    """After `complete` its token holds nothing: what is done can be neither given up nor done again."""
    token = await claimed(store, group)
    assert await store.complete(group, "k", token, b"r", LONG) is True
    assert await store.abandon(group, "k", token) is False
    assert await store.renew(group, "k", token, SHORT) is False
    assert await store.complete(group, "k", token, b"again", LONG) is False
    assert await store.begin(group, "k", PRINT, LONG) == AlreadyDone(b"r")


@clause
async def what_is_done_is_forgotten_in_the_end(store: IdempotencyStore, group: str) -> None:
    """When its time to live is over, an effect is unknown: the key is new, also with another payload."""
    token = await claimed(store, group)
    assert await store.complete(group, "k", token, b"r", SHORT) is True
    assert await store.begin(group, "k", PRINT, LONG) == AlreadyDone(b"r")
    await free_again(store, group)


@clause
async def keys_are_what_they_are(store: IdempotencyStore, group: str) -> None:
    """Keys that differ in case, accents, spaces, or their last of many characters are different keys; any text is one."""
    keys = [
        "a",
        "A",
        "ä",
        "a ",
        " a",
        "é",
        "e",
        "*",
        "{x}",
        "%s",
        "it's",
        "k" * 255,
        "k" * 256,
        "k" * 5000,
        "k" * 4999,
        "😀",
        "\x00",
        "\ud800",
        "",
    ]
    tokens = {key: await claimed(store, group, key) for key in keys}
    assert len(set(tokens.values())) == len(keys)
    for key, token in tokens.items():
        assert await store.complete(group, key, token, key.encode("utf-8", "surrogatepass"), LONG) is True
    for key in keys:
        assert await store.begin(group, key, PRINT, LONG) == AlreadyDone(key.encode("utf-8", "surrogatepass"))


@clause
async def a_cancelled_call_leaves_a_store_that_works(store: IdempotencyStore, group: str) -> None:
    """Whatever a cancelled `begin` came to, the store answers, and the key is free at the latest when its lease is over."""
    for number in range(10):
        begin = asyncio.ensure_future(store.begin(group, f"k{number}", PRINT, SHORT))
        for _ in range(number):
            await asyncio.sleep(0)
        begin.cancel()
        await asyncio.wait([begin])
    for number in range(10):
        await free_again(store, group, f"k{number}")


@clause
async def it_does_what_a_model_does(store: IdempotencyStore, group: str) -> None:
    """A long random program of all calls on few keys, nothing of it timed, has the answers of a dictionary."""
    draw = random.Random(7)
    model: dict[str, tuple[str, str | None, bytes | None]] = {}
    tokens = ["never given"]
    for _ in range(300):
        key = draw.choice("pqr")
        known = model.get(key)
        token = draw.choice(tokens[-4:])
        held = known is not None and known[1] == token
        match draw.randrange(5):
            case 0 | 1:
                fingerprint = draw.choice([PRINT, PRINT, PRINT, OTHER])
                claim: Claim = await store.begin(group, key, fingerprint, LONG)
                if known is None:
                    assert isinstance(claim, New)
                    model[key] = (fingerprint, claim.token, None)
                    tokens.append(claim.token)
                elif known[0] != fingerprint:
                    assert claim == Conflict()
                elif known[1] is None:
                    assert claim == AlreadyDone(known[2])
                else:
                    assert isinstance(claim, InProgress)
            case 2:
                result = draw.choice([None, b"", b"r"])
                assert await store.complete(group, key, token, result, LONG) is held
                if held and known is not None:
                    model[key] = (known[0], None, result)
            case 3:
                assert await store.abandon(group, key, token) is held
                if held:
                    del model[key]
            case _:
                assert await store.renew(group, key, token, LONG) is held


def _two_stores(stores: Stores) -> None:
    async def run() -> None:
        group = _group()
        async with asyncio.timeout(stores.seconds), stores.open() as one, stores.open() as two:
            claims = await asyncio.gather(*(store.begin(group, "k", PRINT, LONG) for store in [one, two] * 5))
            (token,) = [claim.token for claim in claims if isinstance(claim, New)]
            assert await two.renew(group, "k", token, LONG) is True
            assert await one.complete(group, "k", token, b"r", LONG) is True
            assert await two.begin(group, "k", PRINT, LONG) == AlreadyDone(b"r")

    if not stores.shared:
        pytest.skip("the store says that it is one process's own")
    asyncio.run(run())


_registered("processes_share_what_they_know", "What one store has claimed or done, another one of the same place knows.", _two_stores)

globals().update(TESTS)
__all__ = [f"{name}" for name in TESTS]  # pyright: ignore[reportUnsupportedDunderAll]  as many as there are
