"""Fifty copies of one message, delivered at once to four processes: one effect, and every result that is published is the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

import pytest
from tests.crash.points import ASKED_FOR, PLACES
from tests.crash.scene import Scene
from tests.crash.worker import GROUP, LOOSE, RESULTS, Result, Step

from msgbus.contract.envelope import CE_IDEMPOTENCY_KEY, Envelope

COPIES, PROCESSES, WINDOW = 50, 4, 13
LEASE = 60.0
"""Seconds, as by default: nobody is to wait for its end."""
SOON = 20.0
STEP = Step(n=1, seconds=0.5)

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.parametrize(
        ("place", "store"),
        [
            pytest.param(place, store, id=f"{'-'.join(place)}-{store}", marks=pytest.mark.broker(place[1]))
            for place in PLACES
            for store in ("sql", "redis")
            if (store == "sql" or place[0] == "postgresql") and (ASKED_FOR or place[1] == "redis")
        ],
        indirect=["place"],
    ),
]


@pytest.mark.parametrize("alike", ["id", "idempotency key"])
async def test_copies(scene: Scene, store: Literal["sql", "redis"], alike: Literal["id", "idempotency key"]) -> None:
    """Copies with one id, as a broker delivers them, and messages with one idempotency key, as a client that is not sure sends them. The
    handler has its effect once, though the processes have them at the same time; all are settled soon after; one result is published, and
    a copy that comes later changes nothing."""
    pids = [f"shop{number}" for number in range(PROCESSES)]
    terms: dict[str, Any] = {"store": store, "lease": LEASE, "concurrency": WINDOW, "window": WINDOW}
    hired = await asyncio.gather(*(scene.hire(pid, **terms) for pid in pids))
    number = 100
    while not all(scene.runs(pid) for pid in pids):  # each of them takes part
        assert number < 1000, "not all of them consume"
        warm = [Step(n=n, seconds=0.05) for n in range(number, number + 20)]
        await scene.publish(*warm)
        await scene.all_settled(LOOSE, GROUP)
        number += len(warm)
    await scene.comes(Counter(f"loose-{n}" for n in range(100, number)))
    await scene.until(lambda: len(scene.stored(RESULTS)) == number - 100, 30, "their results")

    envelope = scene.envelope_of(STEP)
    names = [f"{STEP.id} {n}" if alike == "idempotency key" else STEP.id for n in range(COPIES + 1)]
    headers = {**envelope.headers, CE_IDEMPOTENCY_KEY: STEP.id}
    envelopes = [Envelope(name, envelope.topic, envelope.body, headers, None) for name in names]

    def count(what: str, *pids: str) -> int:
        return len([event for pid in pids for event in scene.events(pid, what) if event["id"] in names])

    def settled() -> int:  # one that waits goes by way of a copy, which is received and settled too
        return count("ack", *pids) - count("again", *pids)

    await scene.store_each(envelopes[:COPIES])
    await scene.until(lambda: settled() == COPIES, SOON, "all of them to be settled")
    had = {pid: count("received", pid) for pid in pids}

    async def effects() -> int:
        return (await scene.ids("effects")).count(STEP.id)

    def results() -> list[Result]:
        published = [Result.model_validate_json(copy.body) for copy in scene.copies if copy.topic == RESULTS.name]
        return [result for result in published if result.id == STEP.id]

    assert all(had.values()), had
    assert await effects() == 1
    await scene.until(results, 30, "the result")
    await scene.store_each(envelopes[COPIES:])
    await scene.until(lambda: settled() == COPIES + 1, SOON, "the late one to be settled")
    await scene.all_settled(LOOSE, GROUP)
    await scene.quiet()
    assert await effects() == 1
    assert len(results()) == 1, f"{len({result.nonce for result in results()})} results that differ"
    await asyncio.gather(*map(scene.stop, hired))
