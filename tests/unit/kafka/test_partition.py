"""Where a receiver stands in a partition: the contiguous head, and the count of deaths in the texts of commits."""

from __future__ import annotations

from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from msgbus.contract.adapter import Received
from msgbus.contract.envelope import Envelope
from msgbus_kafka.partition import Mark, Partition, read_mark, suspects_of

PLACE = TopicPartition("orders", 0)


def partition_with(offsets: list[int]) -> Partition:
    partition = Partition(PLACE, offsets[-1] + 1)
    for offset in offsets:
        partition.unsettled[offset] = Received(Envelope("", "orders", b"", {}), (partition, offset), partition.tenure)
    return partition


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_head_is_the_first_record_that_is_not_settled(gaps: list[int], draw: object) -> None:
    """Whatever the order in which records are settled, and where offsets have gaps: nothing un-settled is ever before the head."""
    offsets = [sum(gaps[:count]) for count in range(1, len(gaps) + 1)]
    partition = partition_with(offsets)
    order = offsets.copy()
    draw.shuffle(order)  # type: ignore[attr-defined]  # a Random
    left = set(offsets)
    for offset in order:
        assert partition.head() == min(left)
        del partition.unsettled[offset]
        left.discard(offset)
    assert partition.head() == partition.position


@given(
    st.sampled_from(["clean", "open", "alone"]),
    st.integers(0, 10**12),
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 99)), max_size=16),
    st.text("0123456789abcdef", max_size=32),
)
def test_a_mark_is_read_as_it_was_written(state: object, upto: int, suspects: list[tuple[int, int]], replayed: str) -> None:
    mark = Mark(state, upto, tuple(suspects), replayed)  # type: ignore[arg-type]  # one of the states
    assert read_mark(mark.text()) == mark
    assert len(mark.text()) < 4096, "the broker's limit of a commit's text"


@given(st.text(max_size=40))
def test_the_text_of_another_tool_is_no_mark(text: str) -> None:
    """Whoever reset the offsets by Kafka's own tools killed nobody."""
    assert read_mark(text) == Mark()
    assert read_mark('["msgbus2","open","x",[],""]') == Mark()


def test_a_death_counts_for_what_may_have_been_in_hand() -> None:
    """First as far as reading went; with suspicion, as far as it was written down; alone, for that one alone; after a clean end, nobody."""
    assert suspects_of(Mark("clean", 5), 5, 500, 100) == ()
    first = suspects_of(Mark("open", 5), 5, 500, 100)
    assert first == ((105, 1),)
    second = suspects_of(Mark("open", 15, first), 5, 500, 100)
    assert second == ((15, 2), (105, 1))
    alone = suspects_of(Mark("alone", 6, second), 5, 500, 100)
    assert alone == ((6, 3), (15, 2), (105, 1))
    assert suspects_of(Mark("clean", 6, alone), 6, 500, 100) == ((15, 2), (105, 1))
    partition = Partition(PLACE, 5, suspects=alone)
    assert [partition.deaths(offset) for offset in (5, 6, 14, 15, 104, 105)] == [3, 2, 2, 1, 1, 0]


def test_what_is_through_is_suspect_no_more() -> None:
    """Suspicion ends with the head's way beyond it."""
    partition = partition_with([0, 1])
    partition.suspects = ((1, 2), (2, 1))
    assert read_mark(partition.mark("open")[1]).suspects == ((1, 2), (2, 1))
    del partition.unsettled[0]
    assert read_mark(partition.mark("open")[1]).suspects == ((2, 1),)
    del partition.unsettled[1]
    assert read_mark(partition.mark("open")[1]).suspects == ()
