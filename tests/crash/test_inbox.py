"""Q1 to Q6: a consumer dies around its handler's transaction, its ack, a dead letter. Each effect happens once, as far as is promised."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from tests.crash.conftest import Came
from tests.crash.scene import LEASE, Scene
from tests.crash.worker import GROUP, LOOSE, RESULTS, STEPS, Step

from msgbus.contract.envelope import DEAD, utc_text
from msgbus.middleware.idempotency import TTL
from msgbus.testing.stage import QUIET

pytestmark = pytest.mark.timeout(180)

STEP = Step(key="a", n=1, seconds=0.3)
"""Its run takes long enough for an ack that comes too early to reach the broker."""
NEXT = Step(key="a", n=2)
"""Of the same key: it is not run before the first is settled."""
CLAIM = 6 * LEASE
"""Seconds that a claim holds: for longer than a broker takes to deliver a dead process's messages again."""


async def goes_on(scene: Scene, pid: str = "shop2", **terms: Any) -> None:  # Any: as of `hire`
    """Another process of the group takes over, and handles one message more; then nothing is left."""
    shop = await scene.hire(pid, store="sql", **terms)
    await scene.publish(NEXT)
    await scene.until(lambda: scene.runs(pid)[NEXT.id], 60, "the next message")
    await scene.all_settled(STEPS, GROUP)
    await scene.until(lambda: len(scene.stored(RESULTS)) == 2, 30, "the results")
    await scene.stop(shop)


async def one_result(scene: Scene) -> None:
    """Each of the two messages has had one effect and come to one result."""
    assert await scene.ids("effects") == [STEP.id, NEXT.id]
    await scene.quiet()
    assert sorted(scene.stored(RESULTS).values()) == [1, 1]


async def test_q1_before_the_inbox_row(scene: Scene, came: Came) -> None:
    """A consumer that dies before its inbox row has run nothing; the message is delivered again, and runs once."""
    await scene.publish(STEP)
    await scene.dies("shop1", store="sql", at="remember")
    assert (await scene.inbox(), await scene.ids("effects")) == ([], [])
    await goes_on(scene)
    assert (scene.runs("shop1")[STEP.id], scene.runs("shop2")[STEP.id]) == (0, 1)
    await one_result(scene)
    came("1 run, 1 effect")


async def test_q2_before_the_commit(scene: Scene, came: Came) -> None:
    """A consumer that dies with all written and nothing committed leaves neither inbox row, nor effect, nor a row to send; the message is
    delivered again, and has its effect."""
    await scene.publish(STEP)
    await scene.dies("shop1", store="sql", at="commit")
    assert (await scene.inbox(), await scene.ids("effects"), await scene.rows()) == ([], [], [])
    await goes_on(scene)
    assert (scene.runs("shop1")[STEP.id], scene.runs("shop2")[STEP.id]) == (1, 1)
    await one_result(scene)
    came("2 runs, 1 effect")


async def test_q3_before_the_ack(scene: Scene, came: Came) -> None:
    """A consumer that dies between its commit and the ack: the message is delivered again, known, and settled without a run; what it
    published is sent once."""
    await scene.publish(STEP)
    await scene.dies("shop1", store="sql", at="ack")
    assert await scene.ids("effects") == [STEP.id]
    await goes_on(scene)
    assert (scene.runs("shop1")[STEP.id], scene.runs("shop2")[STEP.id]) == (1, 0)
    assert [event["id"] for event in scene.events("shop2", "ack")] == [STEP.id, NEXT.id]
    await one_result(scene)
    came("1 run, 1 effect")


async def test_q4_before_it_is_remembered(scene: Scene, came: Came) -> None:
    """An effect outside the store's own transaction, as with claims in Redis: a consumer that dies before it is remembered has it again,
    when the claim's lease is over and not before. That is what is promised, no more."""
    await scene.publish(STEP)
    url = scene.url + f"?lease={LEASE:g}" * (scene.broker == "redis")  # the broker delivers it again while the claim holds
    await scene.dies("shop1", store="redis", at="complete", lease=CLAIM, url=url)
    died = scene.events("shop1", "run")[-1]["ts"]  # no claim was renewed after it
    assert await scene.ids("effects") == [STEP.id]
    shop = await scene.hire("shop2", store="redis", lease=CLAIM, url=url)
    await scene.until(lambda: scene.runs("shop2")[STEP.id], 60, "the second run")
    await scene.all_settled(STEPS, GROUP)
    await scene.stop(shop)
    again = scene.events("shop2", "run")
    assert len(again) == 1
    assert again[0]["ts"] >= died + CLAIM - 0.1, "it ran while the claim held"
    assert again[0]["attempt"] == 1
    assert await scene.ids("effects") == [STEP.id, STEP.id]
    came(f"2 runs, 2 effects, {again[0]['ts'] - died:.1f} s apart")


async def test_q5_before_the_ack_of_a_copy(scene: Scene, came: Came) -> None:
    """A consumer that dies when its dead letter is stored, and its original not acked: another one follows, with the same id; so it is
    with a retry. Where the broker stores and acks in one step there is one. Both are redriven, and one has the effect."""
    atomic = scene.broker == "redis"
    at = "forwarded" if atomic else "ack"
    bad, late = Step(key="a", n=1, do="reject"), Step(n=1, do="later")
    await scene.publish(bad)
    await scene.dies("shop1", store="sql", at=at)
    letters = 1 if atomic else 2
    second = await scene.hire("shop2", store="sql", at=at, nth=1 if atomic else 2)
    await scene.until(lambda: atomic or scene.events("shop2", "ack"), 60, "the second dead letter")
    await scene.all_settled(STEPS, GROUP)
    await asyncio.sleep(QUIET)  # an ack may travel a moment later, and not every broker tells whether it has come
    await scene.publish(late)
    await second.died(60)
    shop = await scene.hire("shop3", store="sql", willing=False)
    await scene.until(lambda: late.id in scene.runs("shop3"), 60, "the retry")
    for topic in (STEPS, LOOSE):
        await scene.all_settled(topic, GROUP, 60)
    assert await scene.ids("effects") == [late.id]
    runs = scene.runs("shop1", "shop2", "shop3")
    assert runs[bad.id] == letters
    found = await scene.dead_letters(STEPS, letters)
    assert {envelope.id for envelope in found} == {bad.id}
    assert {envelope.headers[DEAD + "reason"] for envelope in found} == {"rejected"}
    dead = (await scene.redrives()).dead_letters("steps", group=GROUP)
    assert [await dead.redrive() for _ in range(letters + 1)] == [1] * letters + [0]
    await scene.until(lambda: [event["id"] for event in scene.events("shop3", "ack")].count(bad.id) == letters, 60, "the redriven")
    await scene.all_settled(STEPS, GROUP)
    await scene.stop(shop)
    assert await scene.ids("effects") == [late.id, bad.id]
    assert scene.runs("shop1", "shop2", "shop3") == runs + Counter([bad.id])
    came(f"{letters} letter{'s' * (letters > 1)}, 1 effect")


async def test_q6_redriven_too_late(scene: Scene, came: Came) -> None:
    """Dead letters of two messages whose effects have happened. One is younger than the inbox remembers: it is redriven, and known. The
    other is older, and its inbox row gone: a redrive leaves it where it is, and with `force` it runs again."""
    young, old = STEP, Step(key="b", n=1)
    shop = await scene.hire("shop", store="sql")
    await scene.publish(young, old)
    await scene.until(lambda: len(scene.stored(RESULTS)) == 2, 60, "the results")
    assert {row.expires_at - row.completed_at for row in await scene.inbox()} == {TTL * 1000}
    dead = (await scene.redrives()).dead_letters("steps", group=GROUP)

    async def dies_late(step: Step, age: timedelta) -> None:
        await scene.dead_letters(STEPS, 0)
        letter, at = scene.dead_letter_of(step), utc_text((datetime.now(UTC) - age).timestamp())
        await scene.send(replace(letter, headers={**letter.headers, DEAD + "dead-at": at}))
        await scene.dead_letters(STEPS, 1)

    remembered = timedelta(seconds=TTL)
    await dies_late(young, remembered - timedelta(minutes=1))
    assert await dead.redrive() == 1
    await scene.until(lambda: [event["id"] for event in scene.events("shop", "ack")].count(young.id) == 2, 30, "the redriven")
    inbox, ttl = scene.store.tables.inbox, round(TTL * 1000)
    async with scene.engine.begin() as connection:  # a week passes for it
        aged = update(inbox).where(inbox.c.message_id == old.id)
        assert (await connection.execute(aged.values(expires_at=inbox.c.expires_at - ttl))).rowcount == 1
    await dies_late(old, remembered)
    assert [await dead.redrive(), await dead.redrive(dry_run=True)] == [0, 0]
    await scene.dead_letters(STEPS, 1)
    assert scene.runs("shop") == Counter([young.id, old.id])
    assert [await dead.redrive(force=True), await dead.redrive(force=True)] == [1, 0]
    await scene.until(lambda: scene.runs("shop")[old.id] == 2, 30, "the run that was forced")
    await scene.all_settled(STEPS, GROUP)
    await scene.stop(shop)
    assert scene.runs("shop") == Counter([young.id, old.id, old.id])
    assert Counter(await scene.ids("effects")) == scene.runs("shop")
    came("refused; forced: 2 effects")
