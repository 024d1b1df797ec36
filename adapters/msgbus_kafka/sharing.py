"""Who gets which partitions: each topic's shared out evenly, nobody loses one that it has in hand, as few as possible move.

In a rebalance of Kafka's classic protocol a member gives all of its partitions up and hopes to get them back: what runs then, runs
twice, or everyone waits for it. Here members say what they own and what they have in hand. The one who shares out works out the even
shares; but a partition in hand stays where it is, and its owner is told to let go of it: it starts nothing more from there, and calls
for another round when it is done.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

NAME = "msgbus"

Places = set[TopicPartition]


class Owner(Protocol):
    """What a member says of itself when it joins."""

    def claims(self) -> tuple[int, Places, Places]:
        """Its generation (0: it was thrown out and owns nothing), the partitions that it wants to keep, those that it has in hand."""
        ...

    def told(self, let_go: Places) -> None:
        """Which of its partitions are another's as soon as it has let go of them."""
        ...


class Sharing:
    """An assignor of aiokafka, one a consumer."""

    name = NAME

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What goes to the one who shares out."""
        generation, keeps, holds = self._owner.claims()
        said = json.dumps({"generation": generation, "keeps": _packed(keeps), "holds": _packed(holds)})
        return ConsumerProtocolMemberMetadata(0, sorted(topics), said.encode())

    def assign(self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The shares of all, and what each must let go of."""
        topics: dict[str, list[str]] = defaultdict(list)
        for member in sorted(members):
            for topic in members[member].subscription:
                topics[topic].append(member)
        partitions = {topic: sorted(cluster.partitions_for_topic(topic) or ()) for topic in topics}
        keeps, holds = _believed({member: metadata.user_data for member, metadata in members.items()})
        due = share_out(partitions, topics, keeps)
        shares: dict[str, Places] = defaultdict(set)
        let_go: dict[str, Places] = defaultdict(set)
        for place, member in due.items():
            holder = holds.get(place)
            if holder is not None and holder != member and holder in topics[place.topic]:
                shares[holder].add(place)
                let_go[holder].add(place)
            else:
                shares[member].add(place)
        return {
            member: ConsumerProtocolMemberAssignment(
                0, [(topic, numbers) for topic, numbers in _packed(shares[member]).items()], json.dumps(_packed(let_go[member])).encode()
            )
            for member in members
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Comes before the listener is told of the partitions."""
        self._owner.told(_unpacked(_read(assignment.user_data)))


def share_out(
    partitions: Mapping[str, Sequence[int]], members: Mapping[str, Sequence[str]], keeps: Mapping[TopicPartition, str]
) -> dict[TopicPartition, str]:
    """Each topic's partitions over its members, of which none has two more of a topic than another; who has one keeps it, as far as
    that goes."""
    shares: dict[TopicPartition, str] = {}
    total = dict.fromkeys((member for those in members.values() for member in those), 0)
    for topic in sorted(partitions, key=lambda name: (-len(partitions[name]), name)):
        those = members[topic]
        each, over = divmod(len(partitions[topic]), len(those))
        owned: dict[str, list[TopicPartition]] = {member: [] for member in those}
        for number in partitions[topic]:
            place = TopicPartition(topic, number)
            if keeps.get(place) in owned:
                owned[keeps[place]].append(place)
        count: dict[str, int] = {}
        for member in sorted(those, key=lambda name: (-len(owned[name]), total[name], name)):
            room = each
            if over and len(owned[member]) > each:
                room, over = each + 1, over - 1
            count[member] = min(room, len(owned[member]))
            for place in owned[member][:room]:
                shares[place] = member
        for number in partitions[topic]:
            place = TopicPartition(topic, number)
            if place in shares:
                continue
            lacking = [member for member in those if count[member] < each]
            member = min(lacking or [name for name in those if count[name] == each], key=lambda name: (total[name] + count[name], name))
            shares[place] = member
            count[member] += 1
        for member in those:
            total[member] += count[member]
    return shares


def _believed(said: Mapping[str, bytes]) -> tuple[dict[TopicPartition, str], dict[TopicPartition, str]]:
    """Who keeps and who holds a partition. Of two who claim one, the one of the younger generation: the other was thrown out since."""
    keeps: dict[TopicPartition, str] = {}
    holds: dict[TopicPartition, str] = {}
    claims = {member: _read(data) for member, data in said.items()}
    generations = {member: found for member, claim in claims.items() if isinstance(found := claim.get("generation"), int) and found > 0}
    for member in sorted(generations, key=lambda name: generations[name]):
        for place in _unpacked(claims[member].get("keeps")):
            keeps[place] = member
            holds.pop(place, None)
        for place in _unpacked(claims[member].get("holds")):
            holds[place] = member
    return keeps, holds


def _read(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _packed(places: Iterable[TopicPartition]) -> dict[str, list[int]]:
    packed: dict[str, list[int]] = {}
    for place in sorted(places):
        packed.setdefault(place.topic, []).append(place.partition)
    return packed


def _unpacked(packed: Any) -> Places:
    if not isinstance(packed, dict):
        return set()
    return {TopicPartition(topic, number) for topic, numbers in cast("dict[str, list[int]]", packed).items() for number in numbers}
