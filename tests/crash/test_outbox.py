"""P1 to P8: a process writes rows and dies, a relay dies or stands still, the database goes away. Nothing is lost or made up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from urllib.parse import urlsplit, urlunsplit

import pytest
from sqlalchemy import insert, select
from tests.crash.conftest import Came
from tests.crash.scene import BATCH, LEASE, Scene
from tests.crash.worker import GROUP, LOOSE, STEPS, Step
from tests.torture.proxy import proxy_before

from msgbus.outbound.relay import LONGEST_POLL
from msgbus.stores.sql.schema import PENDING, SENT
from msgbus.stores.sql.store import CHUNK

pytestmark = pytest.mark.timeout(180)

ONCE = Counter(step.id for step in BATCH)
FIRST_WAVE = Counter({"a-1": 1, "b-1": 1, "loose-1": 1, "loose-2": 1})
"""What a relay has on its way at once: of a key one."""
SLOW = 10.0
"""Seconds that a machine with much to do may be late."""
LONG = 60.0
"""A lease that leaves a relay time to send on such a machine: a third of it, or what is sent is unknown, and sent again."""


def kept(scene: Scene, expected: Counter[str]) -> Counter[str]:
    """The copies that the broker has of what was sent so often: Redis recognises an id that it had a moment ago, the others keep both."""
    return Counter(expected.keys()) if scene.broker == "redis" else expected


def sent_once(scene: Scene, pid: str) -> Counter[str]:
    """What a relay has sent by now, in its one round: all, or on a slow machine at least the first of each key."""
    sent = scene.sends(pid)
    assert FIRST_WAVE <= sent <= ONCE, sent
    return sent


async def consumed(scene: Scene, expected: Counter[str] = ONCE) -> None:
    """A service with an inbox takes all of it: each message has one effect, of each key in order; then nothing is left."""
    shop = await scene.hire("shop", store="sql")
    copies = sum(scene.stored().values())
    await scene.until(lambda: len(scene.events("shop", "ack")) == copies, 60, f"{copies} to be settled")
    for topic in (STEPS, LOOSE):
        await scene.all_settled(topic, GROUP)
    await scene.stop(shop)
    effects = await scene.ids("effects")
    assert Counter(effects) == expected, effects
    assert [id for id in effects if id.startswith("a-")] == sorted(id for id in expected if id.startswith("a-"))


async def all_sent(scene: Scene) -> None:
    """Returns when every row is marked; then no lease is left."""

    async def none_left() -> bool:
        return {row.status for row in await scene.rows()} == {SENT}

    await scene.until(none_left, 30, "all rows to be marked")
    assert await scene.leases() == []


async def test_p1_before_the_commit(scene: Scene, came: Came) -> None:
    """A process that dies with all written and nothing committed leaves neither business row nor outbox row, and nobody sends anything."""
    await scene.dies("writer", write=BATCH, at="commit")
    assert await scene.ids("business") == []
    assert await scene.rows() == []
    relay = await scene.hire("relay")
    await scene.until(lambda: len(scene.events("relay", "claim")) >= 3, 30, "looks of the relay")
    await scene.stop(relay)
    await scene.comes(Counter())
    came("nothing")


async def test_p2_after_the_commit(scene: Scene, came: Came) -> None:
    """A process that dies between its commit and its relay's claim leaves rows that are due; after the restart each is sent once."""
    await scene.dies("writer", write=BATCH, at="committed")
    assert scene.sends("writer") == Counter()
    assert await scene.ids("business") == [step.id for step in BATCH]
    assert [(row.message_id, row.status) for row in await scene.rows()] == [(step.id, PENDING) for step in BATCH]
    assert await scene.leases() == []
    relay = await scene.hire("relay", lease=LONG)
    await all_sent(scene)
    await scene.stop(relay)
    await scene.comes(ONCE)
    assert scene.order("a") == [1, 2, 3]
    assert scene.sends("relay") == ONCE
    came("sent once")


async def test_p3_claimed_and_not_sent(scene: Scene, came: Came) -> None:
    """What a dead relay had claimed and not sent is another one's when the lease is over, not before; each row is sent once."""
    await scene.dies("writer", write=BATCH, at="committed")
    await scene.dies("relay1", at="send")
    claimed = scene.events("relay1", "claimed")[-1]
    assert Counter(claimed["ids"]) == ONCE
    assert scene.sends("relay1") == Counter()
    until = max(row.lease_until for row in await scene.leases()) / 1000
    assert 0 < until - claimed["ts"] <= LEASE
    relay = await scene.hire("relay2", lease=LONG)
    up = time.time()
    await all_sent(scene)
    await scene.stop(relay)
    await scene.comes(ONCE)
    first, last = scene.copies[0].ts, scene.copies[-1].ts
    assert first >= until - 0.05, "sent while the lease held"
    assert last <= max(until, up) + LONGEST_POLL + SLOW
    assert scene.sends("relay2") == ONCE
    came(f"sent once, after {last - claimed['ts']:.1f} s")


async def test_p4_stored_and_not_confirmed(scene: Scene, came: Came) -> None:
    """A relay dies when the broker has stored what it sent and the confirm is not read: that is sent again, with the same ids, the rest
    once; a consumer's inbox knows the copies."""
    warm = [Step(key="a"), Step(key="b"), Step(), Step(n=-1)]
    await scene.dies("writer", write=warm, at="committed")
    parts = urlsplit(scene.url)
    assert parts.port is not None
    async with proxy_before(parts.port) as proxy:
        netloc = f"{parts.netloc.rpartition('@')[0]}@".removeprefix("@") + f"127.0.0.1:{proxy.port}"
        relay = await scene.hire("relay1", url=urlunsplit(parts._replace(netloc=netloc)), at="send", having="a-1", then="stand still")
        before = Counter(step.id for step in warm)
        await scene.comes(before)  # it knows topics and broker, and has nothing more to ask
        await scene.until(lambda: scene.events("relay1", "settled"), 10, "the mark")
        await scene.dies("writer2", write=BATCH, at="committed")
        await relay.paused(10)
        proxy.hears_nothing = True
        relay.goes_on()
        await scene.until(lambda: scene.stored() >= before + FIRST_WAVE, 10, "the first wave")
        await relay.kill()
    assert scene.sends("relay1") == before + FIRST_WAVE
    assert [row.status for row in await scene.rows()] == [SENT] * len(warm) + [PENDING] * len(BATCH)
    relay = await scene.hire("relay2", lease=LONG)
    await all_sent(scene)
    await scene.stop(relay)
    await scene.comes(before + kept(scene, ONCE + FIRST_WAVE))
    assert scene.sends("relay2") == ONCE
    await consumed(scene, before + ONCE)
    came("sent twice" + ", kept once" * (scene.broker == "redis"))


async def test_p5_confirmed_and_not_marked(scene: Scene, came: Came) -> None:
    """A relay dies between the confirm and the mark: its batch, and no more, is sent again, with the same ids; a consumer's inbox knows
    the copies."""
    await scene.dies("writer", write=BATCH, at="committed")
    await scene.dies("relay1", at="settle")
    first = sent_once(scene, "relay1")
    await scene.comes(first)
    assert {row.status for row in await scene.rows()} == {PENDING}
    relay = await scene.hire("relay2", lease=LONG)
    await all_sent(scene)
    await scene.stop(relay)
    await scene.comes(kept(scene, first + ONCE))
    assert scene.sends("relay2") == ONCE
    await consumed(scene)
    came("sent twice" + ", kept once" * (scene.broker == "redis"))


async def test_p6_paused_past_its_lease(scene: Scene, came: Came) -> None:
    """A relay stands still before its mark until another one has the rows, and has sent them too. Then the first goes on: its mark changes
    nothing. The batch came twice, old copies after new ones; an inbox knows them, so that each key has its order."""
    await scene.dies("writer", write=BATCH, at="committed")
    first = await scene.hire("relay1", at="settle", then="stand still")
    await first.paused(30)
    batch = sent_once(scene, "relay1")
    await scene.comes(batch)
    second = await scene.hire("relay2", lease=LONG, at="settle", then="stand still")
    await second.paused(30)
    token = scene.events("relay2", "claimed")[-1]["token"]

    async def held() -> set[tuple[object, ...]]:
        rows = {(row.message_id, row.status) for row in await scene.rows()}
        return rows | {(row.shard, row.token, row.lease_until) for row in await scene.leases()}

    before = await held()
    assert {row[1] for row in before} == {PENDING, token}
    first.goes_on()
    await scene.until(lambda: scene.events("relay1", "settled"), 10, "the late mark")
    late = scene.events("relay1", "settled")[0]
    assert (late["sent"], late["lost"]) == (len(batch), len(batch))
    assert await held() == before, "the late mark changed something"
    await scene.stop(first)
    second.goes_on()
    await all_sent(scene)
    await scene.stop(second)
    assert [event["lost"] for event in scene.events("relay2", "settled")] == [0]
    await scene.comes(kept(scene, batch + ONCE))
    old = sorted(int(id[2:]) for id in batch if id.startswith("a-"))
    assert scene.order("a") == ([1, 2, 3] if scene.broker == "redis" else [*old, 1, 2, 3])
    assert scene.sends("relay1") == batch
    assert scene.sends("relay2") == ONCE
    await consumed(scene)
    came("mark void, sent twice" + ", kept once" * (scene.broker == "redis"))


async def test_p7_database_away(scene: Scene, came: Came) -> None:
    """The database goes away between publish and mark, for longer than the lease: health says so, the database is asked seldom, and when
    it is back the batch is sent again, with the same ids, and health is well."""
    await scene.dies("writer", write=BATCH, at="committed")
    relay = await scene.hire("relay", at="settle", then="stand still")
    await relay.paused(30)
    batch = sent_once(scene, "relay")
    await scene.comes(batch)

    def failures() -> list[float]:
        return [event["ts"] for what in ("settle", "claim") for event in scene.events("relay", what) if event["failed"]]

    def health() -> tuple[str, str]:
        last = scene.events("relay", "health")[-1]
        return last["status"], " ".join(last["problems"])

    async with scene.without_database():
        relay.goes_on()
        began = time.time()
        await scene.until(lambda: health()[0] == "degraded", 15, "health to be degraded")
        noticed = time.time() - began
        assert "outbox: the database is away" in health()[1]
        await asyncio.sleep(max(0.0, began + LEASE + 3 - time.time()))  # an outage that outlasts the lease
        away = time.time() - began
        asked = len([ts for ts in failures() if ts >= began])
        assert health()[0] == "degraded"
    assert 1 <= asked <= 4 + 3 * away, f"the database was asked {asked} times in {away:.1f} s"
    assert scene.sends("relay") == batch, "sent while nothing could be marked"
    await all_sent(scene)
    await scene.until(lambda: health() == ("ok", ""), 30, "health to be well")
    await scene.stop(relay)
    again = scene.sends("relay") - batch
    assert again.keys() == ONCE.keys()
    await scene.comes(kept(scene, batch + again))
    await consumed(scene)
    came(f"as P5, asked {asked / away:.1f}/s, said after {noticed:.1f} s")


async def test_p8_amid_the_cleaning(scene: Scene, came: Came) -> None:
    """A relay dies amid its second deletion: the first stays, the second is undone, and the next relay deletes the rest, and only what is
    old."""
    await scene.dies("writer", write=BATCH, at="committed")
    outbox, old = scene.store.tables.outbox, 1500
    async with scene.engine.begin() as connection:
        template = dict((await connection.execute(select(outbox).limit(1))).mappings().one())
        del template["id"]
        sent = {"status": SENT, "sent_at": template["created_at"] - 2 * 86_400_000}
        await connection.execute(insert(outbox), [template | sent | {"message_id": f"old-{n}"} for n in range(old)])
        await connection.execute(insert(outbox), template | {"message_id": "fresh", "status": SENT, "sent_at": template["created_at"]})
    await scene.store.begin("g", "old", "f", 0.001)
    await scene.store.begin("g", "new", "f", 3600)

    async def left() -> Counter[str]:
        return Counter(row.message_id.split("-")[0] for row in await scene.rows())

    await scene.dies("relay1", at="clean", nth=2)
    mine = Counter(step.id.split("-")[0] for step in BATCH) + Counter({"fresh": 1})
    assert await left() == mine + Counter({"old": old - CHUNK})
    relay = await scene.hire("relay2", lease=LONG)

    async def done() -> bool:
        return await left() == mine and len(await scene.inbox()) == 1

    await scene.until(done, 30, "the rest to be deleted")
    await scene.stop(relay)
    assert [row.message_id for row in await scene.inbox()] == ["new"]
    await scene.comes(ONCE)
    came(f"{old} deleted, {len(BATCH)} sent once")
