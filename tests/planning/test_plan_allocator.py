"""The CUDA caching allocator, replayed: its rules one by one, and against a plainer telling of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.planning.allocator import MIB, Allocator


def after(*sizes: int) -> Allocator:
    """Return an allocator that took these sizes, in order; a negative one gives back the one taken as that number."""
    allocator = Allocator()
    taken = 0
    for size in sizes:
        taken += size > 0
        allocator.run([(taken if size > 0 else -size, size)])
    return allocator


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest small one
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # from here on each has its own
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # 2 MiB less 512 bytes over: split off
        (35 * MIB, 36 * MIB, 36 * MIB),  # 1 MiB over: not split off, and counted
        (35 * MIB - 512, 35 * MIB - 512, 36 * MIB),
    ],
)
def test_what_one_tensor_takes(size, allocated, reserved):
    allocator = after(size)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_a_small_block_is_split_down_to_512_bytes():
    assert after(1024, 512, -1, 512).allocated == 1024


def test_small_and_large_never_share_a_segment():
    assert after(5 * MIB, 512).reserved == 22 * MIB
    assert after(512, MIB + 512).reserved == 22 * MIB


def test_segments_are_shared_until_they_are_full():
    assert after(*[6 * MIB] * 3).reserved == 20 * MIB
    # 2 MiB are left of the first.
    assert after(*[6 * MIB] * 4).reserved == 40 * MIB
    assert after(*[6 * MIB] * 3, 2 * MIB).reserved == 20 * MIB
    assert after(*[MIB // 2] * 4).reserved == 2 * MIB
    assert after(*[MIB // 2] * 5).reserved == 4 * MIB


def test_the_smallest_free_block_that_fits_is_taken():
    # Of 40 and 30 MiB free, 30 take the second: then 40 still fit.
    assert after(40 * MIB, 30 * MIB, -1, -2, 30 * MIB, 40 * MIB).reserved == 70 * MIB
    # 31 MiB take the larger one, and what is left of it is too small for 30.
    assert after(40 * MIB, 30 * MIB, -1, -2, 31 * MIB, 30 * MIB, 10 * MIB).reserved == 80 * MIB


def test_of_equal_blocks_that_at_the_lowest_address_is_taken():
    # Of four in a segment the first and the third are free; only if the first is taken again do the last two join.
    assert after(*[5 * MIB] * 4, -1, -3, 5 * MIB, -4, 10 * MIB - 512).reserved == 20 * MIB


def test_freed_neighbours_join_in_any_order():
    for order in ([-1, -2, -3], [-3, -2, -1], [-1, -3, -2], [-2, -1, -3]):
        assert after(6 * MIB, 6 * MIB, 8 * MIB, *order, 20 * MIB).reserved == 20 * MIB


def test_only_emptying_gives_back_and_only_whole_segments():
    allocator = after(40 * MIB, 6 * MIB, 6 * MIB, 512, -1, -2, -4)
    assert allocator.reserved == 62 * MIB
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (6 * MIB, 20 * MIB)
    allocator.run([("more", 14 * MIB)])  # of the 20 MiB 6 lie on either side of those in use
    assert allocator.reserved == 34 * MIB


def test_peaks_stay_until_they_are_reset():
    allocator = after(40 * MIB, 6 * MIB, -1)
    assert (allocator.most_allocated, allocator.most_reserved) == (46 * MIB, 60 * MIB)
    allocator.empty_cache()
    assert (allocator.most_allocated, allocator.most_reserved) == (46 * MIB, 60 * MIB)
    allocator.reset_peaks()
    assert (allocator.most_allocated, allocator.most_reserved) == (6 * MIB, 20 * MIB)


def test_nothing_takes_nothing():
    assert after().run([("empty", 0)]) == 0


def test_lengths_that_rise_leave_segments_behind_and_those_that_fall_do_not():
    allocator = Allocator()
    for turn in range(4):
        size = (20 + 2 * turn) * MIB
        allocator.run([(turn, size), (turn, -size)])
    assert allocator.reserved == (20 + 22 + 24 + 26) * MIB
    falling = Allocator()
    for turn in range(4):
        size = (26 - 2 * turn) * MIB
        falling.run([(turn, size), (turn, -size)])
    assert falling.reserved == 26 * MIB


class Plain:
    """The same rules, searched from the start: a segment is a list of blocks, each [size, key or None]."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list]]] = []

    def take(self, key: int, size: int) -> None:
        size = -(-size // 512) * 512
        small = size <= MIB
        free = [
            (block[0], number, place)
            for number, (kind, blocks) in enumerate(self.segments)
            for place, block in enumerate(blocks)
            if kind == small and block[1] is None and block[0] >= size
        ]
        if not free:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append((small, [[whole, None]]))
            free = [(whole, len(self.segments) - 1, 0)]
        have, number, place = min(free)
        blocks = self.segments[number][1]
        if have - size >= 512 if small else have - size > MIB:
            blocks[place : place + 1] = [[size, key], [have - size, None]]
        else:
            blocks[place][1] = key

    def give(self, key: int) -> None:
        for _, blocks in self.segments:
            for block in blocks:
                if block[1] == key:
                    block[1] = None
            for place in range(len(blocks) - 1, 0, -1):
                if blocks[place][1] is None and blocks[place - 1][1] is None:
                    blocks[place - 1][0] += blocks.pop(place)[0]

    def empty_cache(self) -> None:
        self.segments = [(kind, b) for kind, b in self.segments if len(b) > 1 or b[0][1] is not None]

    @property
    def reserved(self) -> int:
        return sum(size for _, blocks in self.segments for size, _ in blocks)

    @property
    def allocated(self) -> int:
        return sum(size for _, blocks in self.segments for size, key in blocks if key is not None)


SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 8).map(lambda n: n * MIB // 4),
    st.integers(MIB - 600, MIB + 600),
    st.integers(1, 90).map(lambda n: n * MIB // 2),
    st.integers(9 * MIB, 11 * MIB),
)
DEEDS = st.lists(st.one_of(st.tuples(st.just("take"), SIZES), st.tuples(st.just("give"), st.integers(0)),
                           st.tuples(st.just("empty"), st.just(0))), max_size=60)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(DEEDS)
def test_it_allocates_and_reserves_what_the_plain_one_does(deeds):
    replayed, plain, live, most = Allocator(), Plain(), {}, 0
    for number, (deed, value) in enumerate(deeds):
        if deed == "take":
            replayed.run([(number, value)])
            plain.take(number, value)
            live[number] = value
        elif deed == "give" and live:
            key = sorted(live)[value % len(live)]
            replayed.run([(key, -live.pop(key))])
            plain.give(key)
        elif deed == "empty":
            replayed.empty_cache()
            plain.empty_cache()
        assert (replayed.allocated, replayed.reserved) == (plain.allocated, plain.reserved)
        most = max(most, replayed.reserved)
        assert replayed.most_reserved == most
        asked = sum(live.values())
        assert asked <= replayed.allocated <= replayed.reserved
        # What is not split off is at most 1 MiB of each.
        assert replayed.allocated <= asked + sum(512 if size <= MIB else MIB + 512 for size in live.values())
        assert replayed.reserved % (2 * MIB) == 0
    replayed.run([(key, -size) for key, size in live.items()])
    replayed.empty_cache()
    assert (replayed.allocated, replayed.reserved) == (0, 0)
