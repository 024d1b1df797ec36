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
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=100),
)
def test_a_mark_is_read_as_it_was_written(
    state: object, upto: int, suspects: list[tuple[int, int]], replayed: str, settled: list[tuple[int, int]]
) -> None:
    mark = Mark(state, upto, tuple(suspects), replayed, tuple(settled))  # type: ignore[arg-type]  # one of the states
    assert read_mark(mark.text()) == mark
    assert len(mark.text()) < 4096, "the broker's limit of a commit's text"


@given(st.text(max_size=40))
def test_the_text_of_another_tool_is_no_mark(text: str) -> None:
    """Whoever reset the offsets by Kafka's own tools killed nobody."""
    assert read_mark(text) == Mark()
    assert read_mark('["msgbus3","open","x",[],"",[]]') == Mark()
    assert read_mark('["msgbus3","open",1,[],"",[1]]') == Mark()


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


@given(st.data())
def test_who_takes_over_hands_out_what_is_not_settled_and_nothing_else(data: st.DataObject) -> None:
    """One holder after another reads some of the partition, settles some of that in any order and goes, each by what the one before it
    committed last: nothing is settled twice, and in the end everything is settled."""
    count = data.draw(st.integers(1, 40), "records")
    left = set(range(count))
    committed = Partition(PLACE, 0).mark("open")
    for _ in range(data.draw(st.integers(1, 4), "holders") + 1):
        head, text = committed
        partition = Partition(PLACE, head, settled=tuple((head + first, head + end) for first, end in read_mark(text).settled))
        assert partition.mark("open")[0] == head
        assert read_mark(partition.mark("open")[1]).settled == read_mark(text).settled, "who has not read yet knows what it was told"
        until = data.draw(st.integers(head, count), "read up to")
        for offset in range(head, until):
            partition.position = offset + 1
            if not partition.passes(offset):
                assert offset in left, "settled before"
                partition.unsettled[offset] = Received(Envelope("", "orders", b"", {}), (partition, offset), partition.tenure)
        for offset in data.draw(st.lists(st.sampled_from(sorted(partition.unsettled) or [-1]), unique=True), "settled"):
            if partition.unsettled.pop(offset, None) is not None:
                left.discard(offset)
        committed = partition.mark("open")
        assert committed[0] <= min(left, default=count), "nothing un-settled is before the head"
    handed_out = {offset for offset in range(count) if offset >= committed[0]} - {
        committed[0] + offset for first, end in read_mark(committed[1]).settled for offset in range(first, end)
    }
    assert handed_out == left


def test_a_mark_tells_of_so_many_ranges_as_a_commit_has_room_for() -> None:
    """Every second record of very many is settled: the first of them are told, and the text stays within the broker's limit."""
    partition = partition_with([*range(0, 100_000, 2)])
    head, text = partition.mark("open")
    assert head == 0
    assert read_mark(text).settled == tuple((offset, offset + 1) for offset in range(1, 200, 2))
    assert len(text) < 4096
