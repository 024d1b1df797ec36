"""Who gets which partitions: each topic's shared out evenly, nobody loses one that it has in hand, as few as possible move.

In a rebalance of Kafka's classic protocol a member gives all of its partitions up and hopes to get them back: what runs then, runs
twice, or everyone waits for it. Here members say what they own and what they have in hand. The one who shares out works out the even
shares; but a partition in hand stays where it is, and its owner is told to let go of it: it starts nothing more from there, and calls
for another round when it is done.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

Claims = tuple[int, Mapping[TopicPartition, tuple[bool, bool]]]
"""What a member says when it joins: its generation, and of its partitions whether it wants to keep and whether it has them in hand."""

_NOBODY = (0, "", False, False)


class Sharing:
    """An assignor of aiokafka, one a consumer."""

    name = "msgbus"

    def __init__(self, claims: Callable[[], Claims]) -> None:
        self._claims = claims
        self.let_go: set[TopicPartition] = set()
        """Of the last round: those of our partitions that are another's as soon as we have let go of them."""

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What goes to the one who shares out."""
        return ConsumerProtocolMemberMetadata(0, sorted(topics), _written(*self._claims()))

    def assign(self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The shares of all, and what each must let go of. `cluster` is aiokafka's, which has no types."""
        topics: dict[str, list[str]] = defaultdict(list)
        owners: dict[TopicPartition, tuple[int, str, bool, bool]] = {}
        for member in sorted(members):
            for topic in members[member].subscription:
                topics[topic].append(member)
            generation, owned = _read(members[member].user_data)
            for place, claim in owned.items():  # of two who claim one, it is the younger generation's: the other was thrown out since
                owners[place] = max(owners.get(place, _NOBODY), (generation, member, *claim))
        partitions = {topic: sorted(cluster.partitions_for_topic(topic) or ()) for topic in topics}
        shares: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        let_go: dict[str, list[TopicPartition]] = defaultdict(list)
        keeps = {place: owner for place, (_, owner, wanted, _) in owners.items() if wanted}
        for place, member in share_out(partitions, topics, keeps).items():
            _, owner, _, held = owners.get(place, _NOBODY)
            if held and owner != member and owner in topics[place.topic]:
                let_go[owner].append(place)
                shares[owner][place.topic].append(place.partition)
            else:
                shares[member][place.topic].append(place.partition)
        return {
            member: ConsumerProtocolMemberAssignment(
                0, [*shares[member].items()], _written(0, dict.fromkeys(let_go[member], (False, True)))
            )
            for member in members
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Comes before the listener is told of the partitions."""
        self.let_go = set(_read(assignment.user_data)[1])


def share_out(
    partitions: Mapping[str, Sequence[int]], members: Mapping[str, Sequence[str]], keeps: Mapping[TopicPartition, str]
) -> dict[TopicPartition, str]:
    """Each topic's partitions over its members, of which none has two more of a topic than another; who has one keeps it, as far as
    that goes."""
    shares: dict[TopicPartition, str] = {}
    total: Counter[str] = Counter()
    for topic in sorted(partitions, key=lambda name: (-len(partitions[name]), name)):
        places = [TopicPartition(topic, number) for number in partitions[topic]]
        owned = Counter(keeps.get(place, "") for place in places)
        each, over = divmod(len(places), len(members[topic]))
        ranked = sorted(members[topic], key=lambda name: (-owned[name], total[name], name))
        room = Counter({member: each + (rank < over) for rank, member in enumerate(ranked)})
        total.update(room)
        moving: list[TopicPartition] = []
        for place in places:
            member = keeps.get(place, "")
            if room[member] > 0:
                room[member] -= 1
                shares[place] = member
            else:
                moving.append(place)
        shares.update(zip(moving, room.elements(), strict=True))
    return shares


def _written(generation: int, owned: Mapping[TopicPartition, tuple[bool, bool]]) -> bytes:
    return json.dumps([generation, [[*place, *claim] for place, claim in owned.items()]]).encode()


def _read(data: bytes) -> Claims:
    """Claims as they were written; none where they cannot be read."""
    try:
        generation, owned = json.loads(data)
        return int(generation), {TopicPartition(str(topic), int(number)): (bool(keeps), bool(held)) for topic, number, keeps, held in owned}
    except (ValueError, TypeError):
        return 0, {}
