"""Rows packed into one sequence: every row is in it whole, and each of its tokens sees what it sees alone."""

from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dense_mask

from slimtune.core.attention.packed_layout import PackedLayout
from slimtune.core.data.packing import MIN_SHARED_TOKENS, bin_pack_example_indices, pack_into_one_sequence


@st.composite
def rows(draw, most=9):
    """Rows of which many continue a prefix of an earlier one, of few tokens, so that some agree by chance."""
    made = []
    for n in range(draw(st.integers(1, most))):
        start = draw(st.sampled_from(made)) if n and draw(st.integers(0, 3)) else []
        start = start[: draw(st.integers(0, len(start)))]
        made.append(start + draw(st.lists(st.integers(0, 3), min_size=0 if start else 1, max_size=16)))
    return made


many_rows, limits = rows(most=14), st.integers(4, 60)


def packed_tokens(some, share=True):
    return len(pack_into_one_sequence(some, share_prefix=share).tokens)


@settings(max_examples=50)
@given(rows=rows(), share=st.booleans())
def test_each_row_is_packed_whole_and_sees_only_itself(rows, share):
    packed = pack_into_one_sequence(rows, share_prefix=share)
    assert packed == pack_into_one_sequence([list(row) for row in rows], share_prefix=share)
    positions, mask = packed.layout.positions(), dense_mask(packed.layout)
    assert len(packed.segments) == len(rows)
    assert len(packed.tokens) == packed.layout.total
    assert all(n > 0 for n in packed.layout.lengths)
    for r, row in enumerate(rows):
        columns = packed.get_token_indices(r)
        assert [packed.tokens[c] for c in columns] == row
        assert [positions[c] for c in columns] == list(range(len(row)))
        for t, column in enumerate(columns):
            assert mask[column].nonzero()[:, 0].tolist() == sorted(columns[: t + 1])


@given(rows=rows())
def test_only_long_prefixes_are_shared(rows):
    """No shared segment is short, and every packed token belongs to a row; unshared, rows follow one another."""
    packed, unshared = pack_into_one_sequence(rows), pack_into_one_sequence(rows, share_prefix=False)
    assert {c for r in range(len(rows)) for c in packed.get_token_indices(r)} == set(range(len(packed.tokens)))
    parents = set(packed.layout.parents) - {-1}
    assert all(packed.layout.lengths[s] >= MIN_SHARED_TOKENS for s in parents)
    assert unshared.tokens == [t for row in rows for t in row]
    assert unshared.layout == PackedLayout(tuple(map(len, rows)), (-1,) * len(rows))
    assert len(packed.tokens) <= len(unshared.tokens)


def test_by_hand():
    prefix, more = list(range(10)), list(range(20, 28))
    some = [
        [*prefix, 50],
        [*prefix, *more, 51],
        [*prefix, *more, 52, 53],
        prefix,
        [60, 61],
        [*prefix[: MIN_SHARED_TOKENS - 1], 62],
    ]
    packed = pack_into_one_sequence(some)
    assert packed.layout == PackedLayout((10, 8, 1, 2, 1, 8, 2), (-1, 0, 1, 1, 0, -1, -1))
    shared = [(0, 10), (10, 8)]
    assert packed.segments[:3] == [[(0, 10), (21, 1)], [*shared, (18, 1)], [*shared, (19, 2)]]
    assert packed.segments[3:] == [[(0, 10)], [(30, 2)], [(22, 8)]]
    assert packed_tokens([prefix, prefix, prefix]) == 10


@given(rows=many_rows, limit=limits, share=st.booleans())
def test_groups_contain_each_row_once_and_keep_the_limit(rows, limit, share):
    groups = bin_pack_example_indices([[row] for row in rows], limit, share_prefix=share)
    assert groups == bin_pack_example_indices([[list(row)] for row in rows], limit, share_prefix=share)
    assert sorted(r for group in groups for r in group) == list(range(len(rows)))
    assert all(group == sorted(group) for group in groups)
    sizes = [packed_tokens([rows[r] for r in group], share) for group in groups]
    assert all(n <= limit or len(group) == 1 for n, group in zip(sizes, groups, strict=True))
    assert sum(2 * n <= limit for n in sizes) <= 1  # two groups that are half empty would be one


@given(rows=many_rows, limit=limits)
def test_sharing_packs_fewer_tokens(rows, limit):
    def total(share):
        groups = bin_pack_example_indices([[row] for row in rows], limit, share_prefix=share)
        return sum(packed_tokens([rows[r] for r in group], share) for group in groups)

    assert total(True) <= total(False) == sum(map(len, rows))


def test_rows_with_a_common_prefix_go_together():
    some = [[*[i % 4] * 20, *range(100 + 10 * i, 105 + 10 * i)] for i in range(16)]
    groups = bin_pack_example_indices([[row] for row in some], 40)
    assert sorted(map(len, groups)) == [4, 4, 4, 4]
    assert all(len({r % 4 for r in group}) == 1 for group in groups)


def test_limit_of_a_group():
    assert bin_pack_example_indices([[[1]], [[2, 3]]], None) == [[0, 1]]
    assert bin_pack_example_indices([[[1] * 50], [[2]]], 10) == [[0], [1]]


def test_rows_of_one_example_stay_together():
    pairs = [[[i] * 12 + [100, *answer] for answer in ([1, 2, 3], [4, 5])] for i in range(6)]
    groups = bin_pack_example_indices(pairs, 40)
    assert sorted(e for group in groups for e in group) == list(range(6))
    assert {packed_tokens([row for e in group for row in pairs[e]]) for group in groups} == {36}


def test_groups_are_balanced():
    rows = [[[i] * n] for i, n in enumerate((400, 400, 400, 350, 350, 300, 287))]
    sizes = [sum(len(rows[e][0]) for e in group) for group in bin_pack_example_indices(rows, 1280)]
    assert len(sizes) == 3
    assert max(sizes) < 1000  # best fit makes 1200, 1000 and 287
