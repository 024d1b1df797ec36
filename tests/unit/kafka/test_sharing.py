"""Who gets which partitions in a rebalance."""

from __future__ import annotations

from collections import Counter

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from hypothesis import given
from hypothesis import strategies as st

from msgbus_kafka.sharing import Claims, Sharing, share_out

Places = set[TopicPartition]

TOPICS = {"orders": list(range(8)), "orders.soon": [0], "orders.workers.soon": [0]}


class Member:
    """A member of a group, as an assignor sees it."""

    def __init__(self, generation: int = 0, keeps: Places | None = None, holds: Places | None = None) -> None:
        self.claim = (generation, keeps or set(), holds or set())
        self.sharing = Sharing(self.claims)

    def claims(self) -> Claims:
        generation, keeps, holds = self.claim
        return generation, {place: (place in keeps, place in holds) for place in keeps | holds}

    @property
    def let_go(self) -> Places:
        return self.sharing.let_go


class Cluster:
    """What an assignor asks of aiokafka's."""

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return set(TOPICS[topic]) if topic in TOPICS else None


def rebalance(members: dict[str, Member]) -> dict[str, Places]:
    said = {name: member.sharing.metadata(TOPICS) for name, member in members.items()}
    shares: dict[str, Places] = {}
    for name, assignment in Member().sharing.assign(Cluster(), said).items():
        members[name].sharing.on_assignment(assignment)
        shares[name] = {TopicPartition(topic, number) for topic, numbers in assignment.assignment for number in numbers}  # type: ignore[attr-defined]
    assert Counter(place for share in shares.values() for place in share) == Counter(
        TopicPartition(topic, number) for topic, numbers in TOPICS.items() for number in numbers
    ), "each partition has one owner"
    return shares


def of(share: Places, topic: str = "orders") -> int:
    return sum(place.topic == topic for place in share)


@given(st.integers(1, 12), st.dictionaries(st.integers(0, 7), st.integers(0, 11)))
def test_each_topic_is_shared_out_evenly_whoever_has_what(count: int, owners: dict[int, int]) -> None:
    names = [f"member{number}" for number in range(count)]
    keeps = {TopicPartition("orders", place): f"member{owner}" for place, owner in owners.items()}
    shares = share_out(TOPICS, dict.fromkeys(TOPICS, names), keeps)
    counts = Counter(member for place, member in shares.items() if place.topic == "orders")
    assert len(shares) == 10
    assert max(counts.values()) - min(counts[name] for name in names) <= 1
    stayed = sum(shares[place] == owner for place, owner in keeps.items() if owner in names)
    claimed = Counter(owner for owner in keeps.values() if owner in names)
    assert stayed >= sum(min(8 // count, claims) for claims in claimed.values()), "nothing moves that need not"


def test_a_joiner_gets_its_half_and_the_rest_stays() -> None:
    first = Member()
    everything = rebalance({"a": first})["a"]
    first.claim = (1, everything, set())
    shares = rebalance({"a": first, "b": Member()})
    assert (of(shares["a"]), of(shares["b"])) == (4, 4)
    assert shares["a"] <= everything
    assert first.let_go == set()


def test_what_is_in_hand_stays_until_it_is_let_go_of() -> None:
    """The owner is told which it must let go of; when it has, they move."""
    first, second = Member(), Member()
    everything = rebalance({"a": first})["a"]
    first.claim = (1, everything, everything)
    shares = rebalance({"a": first, "b": second})
    assert shares["a"] == everything
    assert of(first.let_go) == 4
    first.claim = (2, everything - first.let_go, everything - first.let_go)
    leaving = first.let_go
    shares = rebalance({"a": first, "b": second})
    assert shares["b"] == leaving
    assert first.let_go == set()


def test_who_was_thrown_out_owns_nothing() -> None:
    """Two claim what one of them lost: the younger generation has it."""
    everything = {TopicPartition(topic, number) for topic, numbers in TOPICS.items() for number in numbers}
    zombie, owner = Member(3, everything, everything), Member(5, everything, everything)
    shares = rebalance({"zombie": zombie, "owner": owner})
    assert shares["owner"] == everything
    assert zombie.let_go == set()
    gone = Member(0, everything, everything)
    assert rebalance({"gone": gone, "owner": owner})["owner"] == everything


def test_what_it_cannot_read_is_no_claim() -> None:
    said = {"a": Member().sharing.metadata(TOPICS), "b": ConsumerProtocolMemberMetadata(0, list(TOPICS), b"\xff{")}
    shares = Member().sharing.assign(Cluster(), said)
    assert set(shares) == {"a", "b"}
