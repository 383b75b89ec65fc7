"""Rows in one sequence: every row is found again whole, and each of its tokens sees what it sees alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_way import dense_mask

from slimtune.attention.packed_layout import PackedLayout
from slimtune.data.packing import MIN_SHARED_TOKENS, bin_pack, pack_sequences

CPU = torch.device("cpu")


@st.composite
def rows(draw, most=9):
    """Rows of which many go on from the beginning of an earlier one, of few tokens, so that some agree by luck."""
    made = []
    for n in range(draw(st.integers(1, most))):
        start = draw(st.sampled_from(made)) if n and draw(st.integers(0, 3)) else []
        start = start[: draw(st.integers(0, len(start)))]
        made.append(start + draw(st.lists(st.integers(0, 3), min_size=0 if start else 1, max_size=16)))
    return made


def laid_tokens(some, share=True):
    return len(pack_sequences(some, share_prefix=share).tokens)


@given(rows=rows(), share=st.booleans())
def test_each_row_is_found_again(rows, share):
    laid = pack_sequences(rows, share_prefix=share)
    positions = laid.layout.positions()
    assert len(laid.segments) == len(rows)
    assert len(laid.tokens) == laid.layout.total
    assert all(n > 0 for n in laid.layout.lengths)
    for r, row in enumerate(rows):
        columns = laid.columns(r)
        assert [laid.tokens[c] for c in columns] == row
        assert [positions[c] for c in columns] == list(range(len(row)))


@settings(max_examples=50)
@given(rows=rows(), share=st.booleans())
def test_each_token_sees_its_row_up_to_itself(rows, share):
    laid = pack_sequences(rows, share_prefix=share)
    seen = dense_mask(laid.layout)
    for r in range(len(rows)):
        columns = laid.columns(r)
        for t, column in enumerate(columns):
            assert seen[column].nonzero()[:, 0].tolist() == sorted(columns[: t + 1])


@given(rows=rows())
def test_unshared_every_token_is_laid_once_a_row(rows):
    laid = pack_sequences(rows, share_prefix=False)
    assert laid.tokens == [t for row in rows for t in row]
    assert laid.layout == PackedLayout(tuple(map(len, rows)), (-1,) * len(rows))


@given(rows=rows())
def test_sharing_is_of_long_beginnings_alone(rows):
    """What is shared is never short, no token is laid that belongs to no row, and none is laid in vain."""
    laid = pack_sequences(rows)
    assert len(laid.tokens) <= sum(map(len, rows))
    assert {c for r in range(len(rows)) for c in laid.columns(r)} == set(range(len(laid.tokens)))
    above = set(laid.layout.parents) - {-1}
    assert all(laid.layout.lengths[s] >= MIN_SHARED_TOKENS for s in above)


def test_by_hand():
    begin, more = list(range(10)), list(range(20, 28))
    some = [
        [*begin, 50],
        [*begin, *more, 51],
        [*begin, *more, 52, 53],
        begin,
        [60, 61],
        [*begin[: MIN_SHARED_TOKENS - 1], 62],
    ]
    laid = pack_sequences(some)
    assert laid.layout == PackedLayout((10, 8, 1, 2, 1, 8, 2), (-1, 0, 1, 1, 0, -1, -1))
    shared = [(0, 10), (10, 8)]
    assert laid.segments[:3] == [[(0, 10), (21, 1)], [*shared, (18, 1)], [*shared, (19, 2)]]
    assert laid.segments[3:] == [[(0, 10)], [(30, 2)], [(22, 8)]]
    assert len(pack_sequences([begin, begin, begin]).tokens) == 10


rooms = st.integers(4, 60)


@given(rows=rows(most=14), room=rooms, share=st.booleans())
def test_each_row_goes_into_one_pack_that_keeps_to_the_room(rows, room, share):
    packs = bin_pack(rows, room, share_prefix=share)
    assert sorted(r for pack in packs for r in pack) == list(range(len(rows)))
    assert all(pack == sorted(pack) for pack in packs)
    for pack in packs:
        assert laid_tokens([rows[r] for r in pack], share) <= room or len(pack) == 1


@given(rows=rows(most=14), room=rooms, share=st.booleans())
def test_no_two_packs_would_go_into_one_that_is_half_empty(rows, room, share):
    """A row goes where it fits."""
    sizes = [laid_tokens([rows[r] for r in pack], share) for pack in bin_pack(rows, room, share_prefix=share)]
    assert sum(2 * n <= room for n in sizes) <= 1


@given(rows=rows(most=14), room=rooms)
def test_sharing_lays_fewer_tokens(rows, room):
    def total(share):
        return sum(laid_tokens([rows[r] for r in pack], share) for pack in bin_pack(rows, room, share_prefix=share))

    assert total(True) <= total(False) == sum(map(len, rows))


def test_rows_that_begin_alike_go_together():
    prompts = [[p] * 20 for p in range(4)]
    some = [[*prompts[i % 4], *range(100 + 10 * i, 105 + 10 * i)] for i in range(16)]
    packs = bin_pack(some, 40)
    assert sorted(map(len, packs)) == [4, 4, 4, 4]
    assert all(len({r % 4 for r in pack}) == 1 for pack in packs)


@settings(max_examples=30)
@given(rows=rows(), room=rooms, share=st.booleans())
def test_the_same_rows_are_laid_the_same(rows, room, share):
    first, again = (bin_pack([list(r) for r in rows], room, share_prefix=share) for _ in range(2))
    assert first == again
    assert pack_sequences(rows, share_prefix=share) == pack_sequences([list(r) for r in rows], share_prefix=share)


def test_no_room_named_is_one_pack():
    assert bin_pack([[1], [2, 3]], None) == [[0, 1]]
    assert bin_pack([[1] * 50, [2]], 10) == [[0], [1]]
